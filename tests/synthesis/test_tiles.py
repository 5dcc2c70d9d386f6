"""Tiles: no border shows, and the gates are those of the whole image."""

import numpy as np
import pytest
import torch

from seresvit.config import ModelSettings, VitSettings
from seresvit.model.fusion import altered_gates, record_gates
from seresvit.model.generator import Generator
from seresvit.synthesis.tiles import tiled

VIT = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
STRIDE = 16


def network_of(kind, seed=0):
    torch.manual_seed(seed)
    settings = ModelSettings(base_channels=4, token_grid=(2, 2), vit=VIT, fusion={"kind": kind})
    network = Generator(settings)
    for name, parameter in network.named_parameters():  # gates that react to the image, features that vary
        if ".fuse." in name or "norm.weight" in name:
            parameter.data.mul_(3)
    return network.eval()


@pytest.fixture(scope="module")
def half_bright():
    rng = np.random.default_rng(0)
    image = rng.normal(0, 0.1, (2, 1, 80, 112)).astype(np.float32)
    image[..., 56:] += 0.8
    return torch.from_numpy(image.clip(-1, 1))


def test_a_pixelwise_network_gives_what_it_gives_the_whole_image(half_bright):
    by_tiles = tiled(torch.tanh, (32, 32), STRIDE, None)
    torch.testing.assert_close(by_tiles(half_bright), torch.tanh(half_bright))
    odd = half_bright[..., :75, :101]
    torch.testing.assert_close(by_tiles(odd), torch.tanh(odd))


def test_far_from_tile_borders_a_convolution_sees_what_it_sees_in_the_whole(half_bright):
    kernel = torch.ones(1, 1, 5, 5) / 25

    def blur(image):
        return torch.nn.functional.conv2d(image, kernel, padding=2)  # zeros outside: wrong near borders

    whole, tiles = blur(half_bright), tiled(blur, (48, 48), STRIDE, None)(half_bright)
    error = (whole - tiles).abs()
    # Hann windows give the two pixels at a tile's border almost no weight.
    assert error[..., 2:-2, 2:-2].max() < 0.01 < error_of_hard_tiles(blur, half_bright, whole)


def error_of_hard_tiles(synthesise, image, whole):
    hard = torch.cat([synthesise(part) for part in image.split(28, dim=-1)], dim=-1)
    return (whole - hard).abs().max()


def test_small_images_are_taken_whole_and_once():
    seen = []
    tiled(lambda image: seen.append(image.shape) or image, (30, 40), STRIDE, None)(torch.zeros(1, 1, 32, 48))
    assert seen == [(1, 1, 32, 48)]


@pytest.mark.parametrize("kind", ["se", "spatial-se"])
def test_all_tiles_have_the_gates_of_the_whole_image(half_bright, kind):
    network, used = network_of(kind), []
    with torch.inference_mode(), record_gates(network) as whole:
        network(half_bright)
    whole = {name: value.clone() for name, value in whole.items()}

    def synthesise(image):
        with record_gates(network) as gates:
            synthetic = network(image)
        used.append(dict(gates))
        return synthetic

    with torch.inference_mode():
        shared = tiled(synthesise, (32, 32), STRIDE, network)(half_bright)
        own = tiled(network, (32, 32), STRIDE, None)(half_bright)
    assert len(used) > 10 and whole
    for name, value in whole.items():
        for number, gates in enumerate(used[1:]):
            if value.ndim == 2:
                torch.testing.assert_close(gates[name], value, msg=f"{name} of tile {number}")
            else:
                assert gates[name].shape[-2:] == (8, 8)
        if value.ndim == 4:
            torch.testing.assert_close(used[1][name], value[..., :8, :8])
            torch.testing.assert_close(used[-1][name], value[..., -8:, -8:])
    assert (shared - own).abs().max() > 1e-4


def test_there_is_no_step_where_tiles_that_disagree_meet():
    """Each tile is off by a tenth of its own mean; on a ramp, tiles side by side jump and blended ones do not."""
    ramp = torch.linspace(-1, 1, 128).expand(1, 1, 64, 128)

    def off(image):
        return image + 0.1 * image.mean()

    hard = torch.cat([off(part) for part in ramp.split(32, dim=-1)], dim=-1)
    blended = tiled(off, (32, 32), STRIDE, None)(ramp)
    usual, (of_hard, of_blended) = 2 / 127, (image.diff(dim=-1).abs().max() for image in (hard, blended))
    assert of_hard > 3 * usual and of_blended < 1.3 * usual


def test_with_constant_gates_it_makes_no_difference_whose_gates_a_tile_takes(half_bright):
    network = network_of("se")
    with torch.inference_mode(), altered_gates(network, lambda name, gate: torch.full_like(gate, 0.5)):
        own = tiled(network, (32, 32), STRIDE, None)(half_bright)
        shared = tiled(network, (32, 32), STRIDE, network)(half_bright)
    torch.testing.assert_close(own, shared)
