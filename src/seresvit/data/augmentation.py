"""Augmentation of a training pair: drawn as a record that can be written down, then applied.

Geometry (turn, shift, scale, flip, crop) is the same for source and target. Changes of intensity, noise and resolution
are of the source alone: they stand for what another scanner does to the image that is given, while the image that is
wanted stays as it was. A changed target would teach that the scanner of the source decides how the target looks; noise
in it cannot be predicted, so that L1 would only learn to blur. All channels of a source get the same change.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from numpy.polynomial.legendre import leggrid2d

from seresvit.config import DataSettings

# Plain numbers, strings and lists: JSON keeps it, and `apply` repeats it.
Record = dict[str, Any]

# The largest changes at `data.augment.strength` 1. MR values are shares of the intensity scale, 0 being no signal.
LOG_GAMMA, CONTRAST, BIAS, RICIAN_SD, LOST_RESOLUTION = 0.4, 0.25, 0.2, 0.05, 1.0
BLUR_PIXELS, SHIFT_HU, NOISE_HU = 1.0, 15.0, 30.0
# A masked background holds -1, but for what interpolation rounds; air that was acquired has noise above it.
NO_SIGNAL = -0.999
# Orders of the bias field's polynomial along rows and along columns add up to this at most.
BIAS_ORDER = 3
# A target above this is foreground: the lower bound of its rule, and a little more for rounding.
LOWER_BOUND = -0.99


def draw(
    data: DataSettings,
    shape: tuple[int, int],
    size: tuple[int, int],
    rng: np.random.Generator,
    foreground_bias: float = 0.0,
) -> Record:
    """What happens to an image of `shape` (H, W) that training wants at `size`; without augmentation the crop alone.

    `shift` is in half-image units, `corner` the crop's first row and column, `source` what changes the source. With
    `foreground_bias` that share of the crops has a number `on_foreground` in [0, 1), which chooses among the corners
    that put the crop's centre on the target's foreground; `corner` then holds where there is none.
    """
    record: Record = {
        "rotation_deg": rng.uniform(-1, 1) * data.max_rotation_deg,
        "shift": (rng.uniform(-2, 2, size=2) * data.max_shift).tolist(),
        "flip": bool(data.flip and rng.random() < 0.5),
        "corner": [int(rng.integers(0, max(have - want, 0) + 1)) for have, want in zip(shape, size, strict=True)],
        "size": list(size),
        "scale": 1 + rng.uniform(-1, 1) * data.max_scale,
        "source": {},
    }
    augment = data.augment
    if augment.kind != "none":
        changes = _draw_mr(rng, augment.strength) if augment.kind == "mr" else _draw_ct(rng, augment.strength, data)
        chosen = rng.random(len(changes)) < augment.probability
        record["source"] = {name: change for (name, change), keep in zip(changes.items(), chosen, strict=True) if keep}
    if foreground_bias and (size[0] < shape[0] or size[1] < shape[1]) and rng.random() < foreground_bias:
        record["on_foreground"] = rng.random()
    return record


def _draw_mr(rng: np.random.Generator, strength: float) -> Record:
    """What scanners and protocols do to an MR. Ranges near those of nnU-Net (Isensee et al., Nature Methods 2021)."""
    orders = np.add.outer(np.arange(BIAS_ORDER + 1), np.arange(BIAS_ORDER + 1))
    bias = rng.uniform(-BIAS, BIAS, orders.shape) * (orders <= BIAS_ORDER) * strength
    # The constant only darkens: scaled by a percentile, an image gets darker by bright vessels or fat, never brighter.
    bias[0, 0] = -abs(bias[0, 0])
    return {
        "gamma": float(np.exp(rng.uniform(-LOG_GAMMA, LOG_GAMMA) * strength)),
        "contrast": 1 + rng.uniform(-CONTRAST, CONTRAST) * strength,
        "bias_field": bias.tolist(),
        "resolution": (1 + rng.uniform(0, LOST_RESOLUTION, 2) * strength).tolist(),
        "rician_noise": {"sd": rng.uniform(0, RICIAN_SD) * strength, "seed": int(rng.integers(2**31))},
    }


def _draw_ct(rng: np.random.Generator, strength: float, data: DataSettings) -> Record:
    """What reconstruction kernel, calibration and dose do to a CT; HU in the network's values."""
    per_hu = 2 / (data.window_hu[1] - data.window_hu[0])
    return {
        "blur": rng.uniform(0, BLUR_PIXELS) * strength,
        "offset": rng.uniform(-SHIFT_HU, SHIFT_HU) * strength * per_hu,
        "noise": {"sd": rng.uniform(0, NOISE_HU) * strength * per_hu, "seed": int(rng.integers(2**31))},
    }


def apply(record: Record, pair_CHW: np.ndarray, labels_HW: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Source (C, H, W) and target (1, H, W) at the record's size, float32 in [-1, 1]; always the same for a record.

    `pair_CHW` is the whole slice as it is stored: the source's channels, then the target, float32 in [-1, 1]. With
    `labels_HW`, uint8, labels (1, H, W) that went the same way, the nearest taken, are the third.
    """
    moved_CHW = moved(pair_CHW, record)
    corner = _corner(record, moved_CHW[-1])
    cropped_CHW = _cropped(moved_CHW, corner, record["size"])
    source_CHW, target_CHW = cropped_CHW[:-1], cropped_CHW[-1:]
    for name, change in _CHANGES.items():
        if name in record["source"]:
            source_CHW = change(source_CHW, record["source"][name])
    source_CHW = np.clip(source_CHW, -1, 1).astype(np.float32)
    if labels_HW is None:
        return source_CHW, target_CHW
    labels_1HW = moved(labels_HW[None].astype(np.float32), record, "nearest").astype(np.uint8)
    return source_CHW, target_CHW, _cropped(labels_1HW, corner, record["size"])


def moved(images_CHW: np.ndarray, record: Record, mode: str = "bilinear") -> np.ndarray:
    """All channels turned, shifted, scaled, flipped and, where smaller than the crop, padded by reflection alike."""
    angle, shift, scale = np.deg2rad(record["rotation_deg"]), record["shift"], record["scale"]
    if angle or any(shift) or scale != 1:
        images_CHW = _transformed(images_CHW, angle, shift, scale, mode)
    if record["flip"]:
        images_CHW = images_CHW[..., ::-1]
    lacking = [max(want - have, 0) for want, have in zip(record["size"], images_CHW.shape[-2:], strict=True)]
    if any(lacking):
        images_CHW = np.pad(images_CHW, [(0, 0), *((n // 2, n - n // 2) for n in lacking)], mode="reflect")
    return images_CHW


def _corner(record: Record, target_HW: np.ndarray) -> tuple[int, int]:
    """The crop's first row and column."""
    top, left = record["corner"]
    if "on_foreground" not in record:
        return top, left
    height, width = record["size"]
    rows, columns = (have - want + 1 for have, want in zip(target_HW.shape, record["size"], strict=True))
    # The centres of all crops that lie in the image, in the place of their corners.
    centres = target_HW[height // 2 : height // 2 + rows, width // 2 : width // 2 + columns]
    on_foreground = np.flatnonzero(centres > LOWER_BOUND)
    if not on_foreground.size:
        return top, left
    top, left = divmod(int(on_foreground[int(record["on_foreground"] * on_foreground.size)]), columns)
    return top, left


def _cropped(images_CHW: np.ndarray, corner: tuple[int, int], size: list[int]) -> np.ndarray:
    (top, left), (height, width) = corner, size
    return np.ascontiguousarray(images_CHW[:, top : top + height, left : left + width])


def _transformed(images_CHW: np.ndarray, angle_rad: float, shift: list[float], scale: float, mode: str) -> np.ndarray:
    """Turned and scaled about the centre, shifted in half-image units; the edge repeated outside."""
    height, width = images_CHW.shape[-2:]
    cos, sin = np.cos(angle_rad) / scale, np.sin(angle_rad) / scale
    # affine_grid works in units of half the image, so that a turn of a non-square image needs the sides' ratio.
    theta = torch.tensor(
        [[cos, -sin * height / width, shift[1]], [sin * width / height, cos, shift[0]]], dtype=torch.float32
    )
    grid = F.affine_grid(theta[None], [1, 1, height, width], align_corners=False)
    images = torch.from_numpy(images_CHW)[None]
    return F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)[0].numpy()


def _gamma(source: np.ndarray, exponent: float) -> np.ndarray:
    """Signal to the power of `exponent`; no signal and full signal stay."""
    return 2 * ((source + 1) / 2) ** exponent - 1


def _contrast(source: np.ndarray, factor: float) -> np.ndarray:
    """Signal stretched about its mean, in [-1, 1]; where there is none, as in a masked background, none appears."""
    shown = source > NO_SIGNAL
    if not shown.any():
        return source
    mean = source[shown].mean()
    return np.where(shown, np.clip(mean + factor * (source - mean), -1, 1), source)


def _bias_field(source: np.ndarray, coefficients: list[list[float]]) -> np.ndarray:
    """Signal times the exponential of a Legendre polynomial in row and column: a coil's uneven sensitivity."""
    rows, columns = (np.linspace(-1, 1, n) for n in source.shape[-2:])
    return (source + 1) * np.exp(leggrid2d(rows, columns, coefficients)) - 1


def _resolution(source: np.ndarray, factors: list[float]) -> np.ndarray:
    """As if acquired with rows and columns that many times as wide, then interpolated back."""
    image, shape = torch.from_numpy(source.astype(np.float32))[None], source.shape[-2:]
    coarse = [max(round(n / factor), 1) for n, factor in zip(shape, factors, strict=True)]
    image = F.interpolate(image, size=coarse, mode="bilinear", antialias=True)
    return F.interpolate(image, size=shape, mode="bilinear")[0].numpy()


def _rician_noise(source: np.ndarray, noise: Record) -> np.ndarray:
    """The magnitude of a signal with noise in both its parts (Gudbjartsson, Patz 1995); a masked background stays."""
    real, imaginary = np.random.default_rng(noise["seed"]).normal(0, noise["sd"], (2, *source.shape))
    return np.where(source > NO_SIGNAL, 2 * np.hypot((source + 1) / 2 + real, imaginary) - 1, source)


def _blur(source: np.ndarray, sd_pixels: float) -> np.ndarray:
    """Under a Gaussian: a softer reconstruction kernel."""
    return scipy.ndimage.gaussian_filter(source, (0, sd_pixels, sd_pixels))


def _offset(source: np.ndarray, offset: float) -> np.ndarray:
    """Every value a little higher or lower: calibration, or another energy."""
    return source + offset


def _noise(source: np.ndarray, noise: Record) -> np.ndarray:
    """White noise: less dose."""
    return source + np.random.default_rng(noise["seed"]).normal(0, noise["sd"], source.shape)


# In the order in which they act.
_CHANGES: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "gamma": _gamma,
    "contrast": _contrast,
    "bias_field": _bias_field,
    "resolution": _resolution,
    "rician_noise": _rician_noise,
    "blur": _blur,
    "offset": _offset,
    "noise": _noise,
}
