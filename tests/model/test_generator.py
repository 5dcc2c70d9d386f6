"""The network against the published one's outputs, which `tests/reference/fill.py` defines."""

import gc
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seresvit
from seresvit.config import FusionSettings, ModelSettings, VitSettings
from seresvit.model import checkpoint
from seresvit.model.fusion import altered_gates, record_gates
from seresvit.model.generator import (
    Generator,
    _Reflected,
    normalisation,
    pad_to_multiple,
    start_as_identity,
    upsample_widths,
)

REFERENCE = Path(__file__).parents[1] / "reference"
GENERATORS = ["concat_256", "se_256", "se_256_many", "se_512", "concat_512_deep", "rescnn_256"]

spec = importlib.util.spec_from_file_location("fill", REFERENCE / "fill.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

TINY = ModelSettings(
    base_channels=4, token_grid=(2, 2), vit=VitSettings(depth=2, width=16, heads=2, mlp_width=32, dropout=0.0)
)


def published_state(name):
    """The published state dict of a reference network, the shared encoder under all its prefixes."""
    about = json.loads((REFERENCE / f"{name}.json").read_text())
    state = {
        key: torch.from_numpy(reference.fill(key, tuple(shape)))
        for key, shape in about["tensors"].items()
        if key not in about["aliases"]
    }
    state |= {alias: state[key] for alias, key in about["aliases"].items()}
    return {key: state[key] for key in about["tensors"]}, tuple(about["input_shape"])


@pytest.fixture(scope="module", params=GENERATORS)
def imported(request, tmp_path_factory):
    """(name, published state, network imported from it, reference input, reference output)."""
    state, shape = published_state(request.param)
    path = tmp_path_factory.mktemp("pth") / "latest_net_G.pth"
    torch.save(state, path)
    network = checkpoint.import_published(path)
    path.unlink()
    yield request.param, state, network, torch.from_numpy(reference.image(request.param, shape))
    gc.collect()


def test_reference_outputs_and_gates(imported):
    name, _, network, source = imported
    expected = np.load(REFERENCE / f"{name}.npz")
    with torch.inference_mode(), record_gates(network) as gates:
        output = network(source)
    assert np.abs(output.numpy() - expected["output"]).max() <= 1e-4
    assert {f"gates.{block}" for block in gates} == set(expected.files) - {"output"}
    for block, gate in gates.items():
        np.testing.assert_allclose(gate.numpy(), expected[f"gates.{block}"], atol=1e-4)


def test_published_layout_round_trip_is_bit_exact(imported, tmp_path):
    _, state, network, _ = imported
    checkpoint.export_published(network, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_parameter_counts():
    counts = {}
    for kind in ("concat", "se"):
        with torch.device("meta"):
            network = Generator(ModelSettings(token_grid=(16, 16), fusion=FusionSettings(kind=kind)))
        counts[kind] = sum(parameter.numel() for parameter in network.parameters())
    assert counts == {"concat": 123_441_537, "se": 123_507_073}
    assert counts["se"] - counts["concat"] == 65_536


def test_shapes_of_the_art_block_at_256():
    """Every line of the table in docs/architecture.md, on the full-size network."""
    with torch.device("meta"):
        network = Generator(ModelSettings(token_grid=(16, 16))).eval()
        source = torch.empty(1, 1, 256, 256)
    block, shapes = network.art_1, {}
    watched = {"x": block, "downsample": block.downsample, "embed": block.embed, "transformer": network.transformer}
    watched |= {"upsample": block.upsample, "fuse": block.fuse, "compress": block.compress, "gate": block.fuse.gate}

    def watch(name):
        def note(module, inputs, output):
            shapes.setdefault(name, list(output.shape))

        return note

    for name, module in watched.items():
        module.register_forward_hook(watch(name))
    block.fuse.register_forward_pre_hook(lambda _, inputs: shapes.update(concat=list(inputs[0].shape)))
    block.upsample.register_forward_pre_hook(lambda _, inputs: shapes.update(reshape=list(inputs[0].shape)))
    network(source)
    assert shapes == {
        "x": [1, 256, 64, 64],
        "downsample": [1, 1024, 16, 16],
        "embed": [1, 256, 768],
        "transformer": [1, 256, 768],
        "reshape": [1, 768, 16, 16],
        "upsample": [1, 256, 64, 64],
        "concat": [1, 512, 64, 64],
        "gate": [1, 512],
        "fuse": [1, 512, 64, 64],
        "compress": [1, 256, 64, 64],
    }


@pytest.mark.parametrize(
    "downsamples, patch, widths", [(2, 1, [768, 512, 256]), (2, 2, [768, 512, 256, 256]), (3, 1, [768, 512, 256, 256])]
)
def test_upsample_stages_of_the_three_geometries(downsamples, patch, widths):
    assert upsample_widths(ModelSettings(num_downsamples=downsamples, patch_size=patch)) == widths


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (33, 50), (7, 90), (1, 1)])
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"num_downsamples": 3},
        {"patch_size": 2},
        {"transformer_blocks": ()},
        {"norm": "instance"},
        {"norm": "group"},
    ],
)
def test_any_size_and_geometry(size, geometry):
    network = Generator(TINY.model_copy(update={**geometry, "in_channels": 3, "out_channels": 2})).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, 3, *size)).shape == (2, 2, *size)


def test_padding_reflects_like_numpy():
    image = torch.arange(35.0).reshape(1, 1, 5, 7)
    expected = np.pad(image.numpy(), [(0, 0), (0, 0), (0, 11), (0, 9)], mode="reflect")
    np.testing.assert_array_equal(pad_to_multiple(image, 16).numpy(), expected)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    network = Generator(TINY).train()
    network(torch.rand(2, 1, 32, 32)).square().mean().backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in network.named_parameters() if "fuse.gate" in name)


def test_eval_is_deterministic_and_train_is_not():
    network = Generator(TINY.model_copy(update={"vit": TINY.vit.model_copy(update={"dropout": 0.5})}))
    x = torch.rand(2, 1, 32, 32)
    network.eval()
    assert torch.equal(network(x), network(x))
    network.train()
    assert not torch.equal(network(x), network(x))


def test_load_is_reachable_from_the_package():
    assert seresvit.load is checkpoint.load
    assert seresvit.record_gates is record_gates and seresvit.altered_gates is altered_gates


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_identity_start_returns_the_source(norm):
    torch.manual_seed(0)
    settings = ModelSettings(
        norm=norm, base_channels=8, token_grid=(4, 4), vit=VitSettings(depth=1, width=16, heads=2, mlp_width=16)
    )
    y, x = torch.meshgrid(torch.linspace(0, 9, 64), torch.linspace(0, 7, 64), indexing="ij")
    source = torch.stack([torch.sin(x * y / 9 + shift) for shift in torch.arange(4)])[:, None] * 0.9

    def likeness(network):
        synthetic = network(source).detach()
        if norm != "instance":
            return np.corrcoef(synthetic.flatten(), source.flatten())[0, 1]
        return min(np.corrcoef(s.flatten(), o.flatten())[0, 1] for s, o in zip(source, synthetic, strict=True))

    for blocks in ((), (1, 6)):
        network = Generator(settings.model_copy(update={"transformer_blocks": blocks})).train()
        before = likeness(network)
        start_as_identity(network)
        assert likeness(network) > 0.975 > before
    with pytest.raises(ValueError, match="8 base channels"):
        start_as_identity(Generator(TINY))


def test_identity_start_of_neighbouring_slices_returns_the_middle_one():
    """Two sources of three slices each: all but the middle ones are another image, which must not show."""
    torch.manual_seed(0)
    tiny = {"base_channels": 8, "token_grid": (4, 4), "transformer_blocks": (), "in_channels": 6}
    network = Generator(ModelSettings(**tiny)).eval()
    start_as_identity(network, context_slices=1)
    wanted, other = 0.9 * torch.sin(torch.arange(4096).reshape(64, 64) / 40), torch.randn(64, 64)
    synthetic = network(torch.stack([other, wanted, other, -other, wanted, other])[None])[0, 0].detach()
    assert np.corrcoef(synthetic.flatten(), wanted.flatten())[0, 1] > 0.97


def test_norms_are_those_of_torch():
    """Instance norm as torch's own; group norm over 8 channels together, fewer where 8 does not divide them."""
    x = torch.randn(3, 16, 5, 7) * 3 + 2
    torch.testing.assert_close(normalisation("instance", 16)(x), nn.InstanceNorm2d(16)(x))
    together = x.unflatten(1, (2, 8)).flatten(2)
    expected = (together - together.mean(2, keepdim=True)) / (together.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normalisation("group", 16)(x).flatten(2), expected.unflatten(2, (8, 35)).flatten(1, 2))
    assert isinstance(normalisation("batch", 16), nn.BatchNorm2d)
    assert [normalisation("group", width).num_groups for width in (4, 8, 12, 20, 64)] == [1, 1, 3, 5, 8]


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_an_image_does_not_depend_on_its_batch_nor_on_the_mode(norm):
    torch.manual_seed(0)
    network = Generator(TINY.model_copy(update={"norm": norm})).train()
    images = torch.randn(4, 1, 32, 48)
    together = network(images)
    torch.testing.assert_close(together[2:3], network(images[2:3]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together, network.eval()(images), atol=1e-5, rtol=0)
    assert not any("running" in key for key in network.state_dict())


def test_batch_norm_is_the_default_and_depends_on_the_batch():
    torch.manual_seed(0)
    network = Generator(TINY).train()
    images = torch.randn(4, 1, 32, 48)
    assert (network(images)[2:3] - network(images[2:3])).abs().max() > 1e-3
    assert "stem.norm.running_mean" in network.state_dict()


@pytest.mark.parametrize("edge, shape", [(1, (2, 3, 4, 5)), (3, (1, 2, 7, 4)), (1, (1, 4, 2, 2))])
def test_reflection_that_keeps_channels_last_is_that_of_torch_and_so_is_its_gradient(edge, shape):
    image = torch.randn(shape, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    ours, theirs = image.clone().requires_grad_(), image.clone().requires_grad_()
    padded = _Reflected.apply(ours, edge)
    expected = F.pad(theirs, (edge,) * 4, mode="reflect")
    assert torch.equal(padded, expected) and padded.is_contiguous(memory_format=torch.channels_last)
    slope = torch.randn_like(expected)
    padded.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(ours.grad, theirs.grad)
