"""Checkpoints: ours round trip, theirs imported, wrong ones refused in one line that names the key."""

import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from seresvit.config import ModelSettings, VitSettings
from seresvit.model import checkpoint
from seresvit.model.checkpoint import CheckpointError
from seresvit.model.discriminator import Discriminator
from seresvit.model.fusion import record_gates
from seresvit.model.generator import Generator

REFERENCE = Path(__file__).parents[1] / "reference"
spec = importlib.util.spec_from_file_location("fill", REFERENCE / "fill.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

VIT = VitSettings(depth=2, width=64, heads=1, mlp_width=96)
TINY = ModelSettings(base_channels=4, token_grid=(2, 2), vit=VIT)
HEADER = {"sources": ["110keV"], "target": "70keV", "train_size": [32, 32]}


def vit_npz(path, shapes):
    np.savez(path, **{name: reference.fill(name, tuple(shape)) for name, shape in shapes.items()})
    return path


def tiny_vit_shapes(kernel=(1, 1), channels=64):
    shapes = json.loads((REFERENCE / "vit_npz.json").read_text())
    sizes = {768: 64, 3072: 96, 12: 1, 1024: channels}
    small = {
        n: [sizes.get(s, s) for s in shape]
        for n, shape in shapes.items()
        if "block_" not in n or int(n.split("block_")[1].split("/")[0]) < 2
    }
    return small | {"embedding/kernel": [*kernel, channels, 64]}


def test_reference_after_imagenet_weights(tmp_path):
    about = json.loads((REFERENCE / "se_256.json").read_text())
    torch.save(
        {
            k: torch.from_numpy(reference.fill(k, tuple(s)))
            for k, s in about["tensors"].items()
            if k not in about["aliases"]
        },
        tmp_path / "g.pth",
    )
    network = checkpoint.import_published(tmp_path / "g.pth")
    checkpoint.load_vit_npz(
        network, vit_npz(tmp_path / "vit.npz", json.loads((REFERENCE / "vit_npz.json").read_text()))
    )
    expected = np.load(REFERENCE / "se_256_vitnpz.npz")
    with torch.inference_mode(), record_gates(network) as gates:
        output = network(torch.from_numpy(reference.image("se_256_vitnpz", tuple(about["input_shape"]))))
    assert np.abs(output.numpy() - expected["output"]).max() <= 1e-4
    for block, gate in gates.items():
        np.testing.assert_allclose(gate.numpy(), expected[f"gates.{block}"], atol=1e-4)


def test_reference_discriminator(tmp_path):
    about = json.loads((REFERENCE / "patchgan_256.json").read_text())
    torch.save(
        {k: torch.from_numpy(reference.fill(k, tuple(s))) for k, s in about["tensors"].items()}, tmp_path / "d.pth"
    )
    network = checkpoint.import_discriminator(tmp_path / "d.pth")
    with torch.inference_mode():
        output = network(torch.from_numpy(reference.image("patchgan_256", tuple(about["input_shape"]))))
    assert np.abs(output.numpy() - np.load(REFERENCE / "patchgan_256.npz")["output"]).max() <= 1e-4


def test_spread_patch_kernel_keeps_a_constant_feature(tmp_path):
    network = Generator(TINY.model_copy(update={"patch_size": 2}))
    shapes = tiny_vit_shapes()
    checkpoint.load_vit_npz(network, vit_npz(tmp_path / "vit.npz", shapes))
    feature = torch.randn(1, 64, 1, 1)
    token = network.art_6.embed.patch(feature.expand(1, 64, 2, 2)).flatten()
    kernel = reference.fill("embedding/kernel", tuple(shapes["embedding/kernel"]))[0, 0]
    expected = feature.flatten().numpy() @ kernel + reference.fill("embedding/bias", (64,))
    np.testing.assert_allclose(token.detach().numpy(), expected, atol=1e-5)


def test_our_checkpoint_rebuilds_the_network(tmp_path):
    torch.manual_seed(0)
    settings = TINY.model_copy(update={"in_channels": 2, "transformer_blocks": (2, 5, 9)})
    network = Generator(settings).eval()
    checkpoint.save(network, tmp_path / "model.safetensors", HEADER)
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    assert loaded.settings == settings and not loaded.training
    assert loaded.header["sources"] == ["110keV"] and loaded.header["version"]
    x = torch.rand(1, 2, 40, 32)
    assert torch.equal(loaded(x), network(x))


def test_norm_travels_in_the_header_and_is_batch_where_it_does_not(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save(Generator(TINY.model_copy(update={"norm": "instance"})), path, HEADER)
    assert checkpoint.load(path).settings.norm == "instance"
    checkpoint.save(Generator(TINY), path, HEADER)
    state, header = checkpoint.read(path)
    del header["model"]["norm"]
    safetensors.torch.save_file(state, path, metadata={"seresvit": json.dumps(header)})
    assert checkpoint.load(path).settings == TINY


def broken(path, change):
    state = {k: v.clone() for k, v in torch.load(path, weights_only=True).items()}
    change(state)
    torch.save(state, path)


@pytest.fixture
def published(tmp_path):
    checkpoint.export_published(Generator(TINY), tmp_path / "latest_net_G.pth")
    return tmp_path / "latest_net_G.pth"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda s: s.pop("encoder_1.1.weight"), "stem.conv.weight"),
        (lambda s: s.pop("art_6.cc.block.3.weight"), "art_6.compress.body.1.conv.weight"),
        (lambda s: s.update(surprise=torch.zeros(1)), "surprise"),
        (lambda s: s.update({"decoder_1.1.bias": torch.zeros(3)}), "decode.0.norm.bias"),
        (lambda s: s["art_6.transformer.encoder_norm.bias"].add_(1), "art_6.transformer.encoder_norm.bias"),
    ],
)
def test_import_names_the_key_at_fault(published, change, named):
    broken(published, change)
    with pytest.raises(CheckpointError, match=named) as error:
        checkpoint.import_published(published)
    assert "\n" not in str(error.value) and published.name in str(error.value)


def test_export_refuses_what_the_published_layout_cannot_say(tmp_path):
    for change, said in (
        ({"vit": VIT.model_copy(update={"heads": 2})}, "heads as 64 wide"),
        ({"token_grid": (2, 8)}, "square token grids"),
        ({"norm": "group"}, "batch norm, this network group norm"),
    ):
        with pytest.raises(CheckpointError, match=said):
            checkpoint.export_published(Generator(TINY.model_copy(update=change)), tmp_path / "G.pth")
    assert list(tmp_path.iterdir()) == []


def test_import_accepts_data_parallel_and_a_single_alias(published):
    wrapped = {
        f"module.{k}": v
        for k, v in torch.load(published, weights_only=True).items()
        if not k.startswith(("transformer_encoder", "art_1.transformer"))
    }
    before = checkpoint.import_published(published).state_dict()
    torch.save(wrapped, published)
    after = checkpoint.import_published(published).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", pickle.dumps(Evil(), 2), pickle.dumps([1, 2], 2)],
    ids=["empty", "text", "code", "list"],
)
def test_files_of_another_kind_are_refused_in_one_line(tmp_path, content, capsys):
    for reader, name in (
        (checkpoint.import_published, "x.pth"),
        (checkpoint.load, "x.safetensors"),
        (checkpoint.load, "x.pth"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as error:
            reader(tmp_path / name)
        assert "\n" not in str(error.value)
    assert "unpickled" not in capsys.readouterr().out


def test_load_refuses_a_discriminator_a_truncated_file_and_foreign_safetensors(tmp_path):
    path = tmp_path / "d.safetensors"
    checkpoint.save(Discriminator(2, 4), path, HEADER)
    with pytest.raises(CheckpointError, match="discriminator"):
        checkpoint.load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"d\.safetensors"):
        checkpoint.load(path)
    safetensors.torch.save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not written by seresvit"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda s: s.pop("embedding/bias"), "embedding/bias"),
        (lambda s: s.update({"Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel": [64, 95]}), "encoderblock_1"),
        (lambda s: s.update({"embedding/kernel": [16, 16, 3, 64]}), "embedding/kernel"),
        (lambda s: s.update({"Transformer/posembed_input/pos_embedding": [1, 197, 32]}), "pos_embedding"),
    ],
)
def test_vit_npz_names_the_array_at_fault(tmp_path, change, named):
    shapes = tiny_vit_shapes()
    change(shapes)
    with pytest.raises(CheckpointError, match=named):
        checkpoint.load_vit_npz(Generator(TINY), vit_npz(tmp_path / "vit.npz", shapes))


def test_a_failed_write_keeps_the_older_file(tmp_path, monkeypatch):
    network = Generator(TINY)
    checkpoint.save(network, tmp_path / "m.safetensors", HEADER)
    before = (tmp_path / "m.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full_disk)
    with pytest.raises(Exception, match="No space left"):
        checkpoint.save(network, tmp_path / "m.safetensors", HEADER)
    assert (tmp_path / "m.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
