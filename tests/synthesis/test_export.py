"""Exported files, read by ONNX Runtime and OpenVINO alone: the same images as torch, any size, all facts inside."""

import json

import numpy as np
import pytest
import torch

from seresvit.config import ConfigError, ModelSettings, VitSettings
from seresvit.data.volume import DataError
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis import export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

WINDOW = {"kind": "window", "low": -1024.0, "high": 2048.0, "unit": "HU"}
SIZES = [(1, 32, 48), (3, 37, 50), (2, 64, 33), (1, 5, 90), (1, 2, 2)]


def lively(**settings):
    """A small network whose outputs fill (-1, 1): norms hold the statistics of an image, the head is steep."""
    torch.manual_seed(0)
    vit = VitSettings(depth=2, width=16, heads=2, mlp_width=16)
    network = Generator(ModelSettings(base_channels=8, token_grid=(2, 3), vit=vit, **settings)).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    for number in network.settings.transformer_blocks:
        torch.nn.init.normal_(getattr(network, f"art_{number}").embed.position)
    with torch.no_grad():
        network(torch.rand(4, network.settings.in_channels, 32, 48) * 2 - 1)
        network.head.conv.weight *= 2 / network.head.conv.weight.std() / network.head.conv.weight[0].numel() ** 0.5
    return network.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    header = {
        "data": {"window_hu": [-1024, 2048]},
        "target_intensity": WINDOW,
        "target": "70keV",
        "sources": ["110keV"],
    }
    checkpoint.save(lively(), path, header)
    return path


@pytest.fixture(scope="module")
def files(saved):
    for suffix in (".onnx", ".xml"):
        export.export(saved, saved.with_suffix(suffix))
    assert sorted(p.suffix for p in saved.parent.iterdir()) == [".bin", ".onnx", ".safetensors", ".xml"]
    return saved


@pytest.fixture(scope="module")
def runs(files):
    """What each file gives, by its runtime's own few lines."""
    session = onnxruntime.InferenceSession(files.with_suffix(".onnx"))
    model = openvino.Core().compile_model(files.with_suffix(".xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {
        ".onnx": lambda array: session.run(["synthetic"], {"source": array})[0],
        ".xml": lambda array: model({"source": array})["synthetic"],
    }


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_other_runtimes_give_what_torch_gives_at_any_size(runs, files, suffix, size):
    batch, height, width = size
    source = np.random.default_rng(0).uniform(-1, 1, (batch, 1, height, width)).astype(np.float32)
    with torch.inference_mode():
        expected = checkpoint.load(files)(torch.from_numpy(source)).numpy()
    assert expected.std() > 0.1 and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(runs[suffix](source), expected, atol=1e-4)


def test_the_rules_and_the_whole_header_are_inside(files):
    header = checkpoint.read(files)[1]
    props = {entry.key: entry.value for entry in onnx.load(files.with_suffix(".onnx")).metadata_props}
    model = openvino.Core().read_model(files.with_suffix(".xml"))
    assert {key: model.get_rt_info(["seresvit", key]).astype(str) for key in props} == props
    assert json.loads(props["seresvit"]) == header
    assert json.loads(props["intensity_source"]) == json.loads(props["intensity_target"]) == WINDOW
    assert props["checkpoint_sha256"] == export.sha256_of(files) and props["target"] == "70keV"


def test_what_the_graph_says_of_its_ends_is_free_in_batch_height_and_width(files):
    model = onnx.load(files.with_suffix(".onnx"))
    onnx.checker.check_model(model, full_check=True)
    for end in (*model.graph.input, *model.graph.output):
        assert [d.dim_param or d.dim_value for d in end.type.tensor_type.shape.dim] == ["batch", 1, "height", "width"]


def test_folding_leaves_the_image_and_no_batch_norm():
    network = lively(in_channels=2)
    source = torch.rand(1, 2, 40, 56) * 2 - 1
    copy = export.folded(network)
    assert not [module for module in copy.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    with torch.inference_mode():
        torch.testing.assert_close(copy(source), network(source), atol=1e-4, rtol=0)


def test_a_graph_that_differs_is_not_written(saved, tmp_path, monkeypatch):
    def wrong(network):
        copy = folded(network)
        copy.art_3.residual[0].conv.weight.data *= 1.01
        return copy

    folded = export.folded
    monkeypatch.setattr(export, "folded", wrong)
    with pytest.raises(DataError, match=r"differs from torch by .* nothing was written"):
        export.export(saved, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_refusals_name_the_remedy(saved, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"\.onnx or \.xml"):
        export.export(saved, tmp_path / "model.trt")
    with pytest.raises(checkpoint.CheckpointError, match="no such file"):
        export.export(tmp_path / "none.safetensors", tmp_path / "model.onnx")
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ConfigError, match=r'^openvino is not installed; pip install "seresvit\[export\]"$'):
        export.export(saved, tmp_path / "model.xml")
    assert not list(tmp_path.iterdir())
