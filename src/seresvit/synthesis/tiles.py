"""Images larger than the network was trained on, tile by tile.

A whole image that is larger than the trained one stretches the position grid: its tokens lie farther apart in what the
transformer learned. Tiles of the trained size keep it as it was. What a tile cannot see is the rest of the image; so
the gates, which are a judgement on the whole image, are taken from it once and shared by all tiles.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from seresvit.model.fusion import altered_gates, record_gates
from seresvit.model.generator import pad_to_multiple

# The slices of a batch (B, C, H, W) in [-1, 1] to their synthetic ones (B, 1, H, W).
Synthesise = Callable[[torch.Tensor], torch.Tensor]


def tiled(synthesise: Synthesise, size_yx: tuple[int, int], stride: int, network: nn.Module | None) -> Synthesise:
    """`synthesise` that takes images larger than `size_yx` apart; smaller ones it takes as they are.

    Tiles of `size_yx`, rounded up to the network's `stride`, overlap by about half and are blended by Hann windows,
    so that no pixel jumps at a border. All tiles get the gates and maps that `network`, which `synthesise` runs, gives
    the whole image in one further pass; with None (a network that is not PyTorch's) each tile keeps its own. Statistics
    of instance and group normalisation are each tile's own.
    """
    tile_yx = [-(-side // stride) * stride for side in size_yx]

    def by_tiles(image_BCHW: torch.Tensor) -> torch.Tensor:
        height, width = image_BCHW.shape[-2:]
        if height <= tile_yx[0] and width <= tile_yx[1]:
            return synthesise(image_BCHW)
        padded_BCHW = pad_to_multiple(image_BCHW, stride)
        shared = whole_image_gates(synthesise, padded_BCHW, network) if network else {}
        sides = [min(tile, side) for tile, side in zip(tile_yx, padded_BCHW.shape[-2:], strict=True)]
        weight_HW = torch.outer(*(_hann(side, image_BCHW.device) for side in sides))
        blended = weights = torch.zeros(())
        for number, (rows, columns) in enumerate(_tiles(padded_BCHW.shape[-2:], sides, stride)):
            tile_BCHW = padded_BCHW[..., rows, columns]
            if network and shared:
                change = partial(_cut, shared, rows, columns, padded_BCHW.shape[-1])
                with altered_gates(network, change):
                    synthetic_BCHW = synthesise(tile_BCHW)
            else:
                synthetic_BCHW = synthesise(tile_BCHW)
            if number == 0:
                blended = torch.zeros((*synthetic_BCHW.shape[:2], *padded_BCHW.shape[-2:]), device=image_BCHW.device)
                weights = torch.zeros(padded_BCHW.shape[-2:], device=image_BCHW.device)
            blended[..., rows, columns] += synthetic_BCHW.float() * weight_HW
            weights[rows, columns] += weight_HW
        return (blended / weights)[..., :height, :width]

    return by_tiles


def whole_image_gates(synthesise: Synthesise, image_BCHW: torch.Tensor, network: nn.Module) -> dict[str, torch.Tensor]:
    """The gates (B, 2C) and maps (B, K, h, w) by name that the network gives these images, as `record_gates` does."""
    with record_gates(network) as gates:
        synthesise(image_BCHW)
    return dict(gates)


def _cut(
    shared: dict[str, torch.Tensor], rows: slice, columns: slice, width: int, name: str, value: torch.Tensor
) -> torch.Tensor:
    """The whole image's gate in place of the tile's; of a map the part that lies over the tile."""
    whole = shared[name]
    if whole.ndim < 4:
        return whole
    step = width // whole.shape[-1]  # pixels that one place of the map stands for
    return whole[..., rows.start // step : rows.stop // step, columns.start // step : columns.stop // step]


def _tiles(shape_yx: torch.Size, sides: list[int], stride: int) -> Iterator[tuple[slice, slice]]:
    tops, lefts = (_starts(length, side, stride) for length, side in zip(shape_yx, sides, strict=True))
    for top in tops:
        for left in lefts:
            yield slice(top, top + sides[0]), slice(left, left + sides[1])


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Where tiles of `side` begin, multiples of `stride`, at most about half a side apart, the last at the end."""
    gaps = -(-2 * (length - side) // side)
    return [round(number * (length - side) / gaps / stride) * stride for number in range(gaps + 1)] if gaps else [0]


def _hann(side: int, device: torch.device) -> torch.Tensor:
    """The Hann window without its two zeros, so that the pixels at the image's edge have a weight."""
    return torch.hann_window(side + 2, periodic=False, device=device)[1:-1]
