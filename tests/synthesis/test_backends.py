"""Backends give what torch gives in float32, or are not used; which one ran is on record."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from seresvit.config import ConfigError, ModelSettings, VitSettings
from seresvit.data import phantom, read_volume
from seresvit.data.intensity import Intensity
from seresvit.data.volume import DataError
from seresvit.model import checkpoint
from seresvit.model.generator import Generator, start_as_identity
from seresvit.synthesis import backends
from seresvit.synthesis.export import traced
from seresvit.synthesis.predict import Predictor, predict_path

onnx = pytest.importorskip("onnx")
for extra in ("onnxruntime", "openvino"):
    pytest.importorskip(extra)

CPU = torch.device("cpu")
HU = Intensity("window", -1024.0, 2048.0, "HU")
# The compiled ones compile for a minute; what is around the compiler is tested without it.
QUICK = ["torch-bf16", "openvino", "openvino-bf16", "onnxruntime"]
CARRIERS = {"stem.conv", "head.conv", *(f"{way}.{stage}.conv" for way in ("encode", "decode") for stage in (0, 1))}
for block in ("art_1", "art_6"):
    CARRIERS |= {f"{block}.compress.skip.conv", f"{block}.fuse.gate.reduce", f"{block}.fuse.gate.expand"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield backends.cache_folder()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(1)
    vit = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
    network = Generator(ModelSettings(base_channels=8, token_grid=(2, 3), vit=vit)).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.rand(4, 1, 32, 48) * 2 - 1)
        network.head.conv.weight *= 2 / network.head.conv.weight.std() / network.head.conv.weight[0].numel() ** 0.5
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    header = {"data": {"window_hu": [-1024, 2048]}, "target_intensity": HU.as_dict(), "sources": [], "target": "70keV"}
    checkpoint.save(network.eval(), path, header)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("patient")
    phantom.simulate(root, patients=1, slices=5, size=40, kev=(110,))
    return root / "110keV" / "P001"


@pytest.mark.parametrize("name", QUICK)
def test_every_backend_gives_what_torch_gives(saved, name):
    network = checkpoint.load(saved)
    backend = backends.started(name, network, CPU, "a" * 64)
    # bfloat16 has 8 bits, and the steep head of noisy weights makes much of the errors of 40 layers.
    mean_most = {"bfloat16": (5e-2, 1.0), "float32": (2e-5, 2e-4)}[backends.PRECISIONS[name]]
    for batch, height, width in [(1, 32, 48), (3, 37, 50), (1, 5, 90)]:
        source_BCHW = torch.rand(batch, 1, height, width) * 2 - 1
        with torch.inference_mode():
            expected_BCHW = network(source_BCHW)
        synthetic_BCHW = backend.run(source_BCHW)
        assert synthetic_BCHW.dtype == torch.float32 and synthetic_BCHW.shape == expected_BCHW.shape
        apart_BCHW = (synthetic_BCHW - expected_BCHW).abs()
        assert apart_BCHW.mean() < mean_most[0] and apart_BCHW.max() < mean_most[1]
    assert expected_BCHW.std() > 0.1


def test_in_bfloat16_what_carries_the_image_stays_in_float32(saved, monkeypatch):
    dtypes, folded = {}, backends.folded

    def watched(network):
        copy = folded(network)
        for name, module in copy.named_modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear):
                module.register_forward_hook(lambda _, x, y, name=name: dtypes.update({name: y.dtype}))
        return copy

    monkeypatch.setattr(backends, "folded", watched)
    network = checkpoint.load(saved)
    backends.started("torch-bf16", network, CPU, "").run(torch.rand(1, 1, 32, 48))
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == CARRIERS
    assert {*dtypes.values()} == {torch.float32, torch.bfloat16} and len(dtypes) > 40


def test_the_graph_in_bfloat16_says_itself_what_stays_in_float32(saved):
    graph = traced(checkpoint.load(saved), "", "bfloat16").graph
    kinds = {weight.name: weight.data_type for weight in graph.initializer}
    weighted = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose", "MatMul")]
    products = {node.name: kinds[node.input[1]] for node in weighted if node.input[1] in kinds}
    carriers = {name for name in products if re.search("/(stem|encode|decode|head|fuse|skip)/", name)}
    assert {name for name, kind in products.items() if kind == onnx.TensorProto.FLOAT} == carriers
    assert {*products.values()} == {onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16}
    assert len(carriers) == len(CARRIERS) and len(products) > 40


@pytest.mark.parametrize("name", ["torch-bf16", "openvino-bf16"])
def test_a_gate_that_scales_the_image_does_so_exactly_in_bfloat16(name):
    """Nothing but carriers and gates makes the image of a network that starts as the identity."""
    torch.manual_seed(0)
    vit = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
    network = Generator(ModelSettings(base_channels=8, token_grid=(2, 3), vit=vit, fusion={"reduction": 4})).eval()
    start_as_identity(network)
    network.header = {}
    backend = backends.started(name, network, CPU, "c" * 64)
    assert backends.parity(backend, network, torch.rand(1, 1, 32, 48) * 2 - 1, HU)["mean"] < 0.01


def test_compiled_torch_is_the_folded_network(saved, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    network = checkpoint.load(saved)
    source_BCHW = torch.rand(2, 1, 37, 50) * 2 - 1
    for name in ("torch-compiled", "torch-compiled-bf16"):
        run = backends.started(name, network, CPU, "").run
        assert backends.parity(backends.Backend(name, "", run), network, source_BCHW, replace(HU, high=-1014.0))
    assert len(compiled) == 2 and not any(isinstance(m, torch.nn.BatchNorm2d) for m in compiled[0].modules())


def test_the_exported_network_is_kept_for_the_next_run(saved, cache):
    network = checkpoint.load(saved)
    first = backends.exported(network, "b" * 64)
    written = first.stat().st_mtime_ns
    assert first.parent == cache and backends.exported(network, "b" * 64).stat().st_mtime_ns == written


def test_auto_tries_bfloat16_first_where_the_processor_itself_has_it(monkeypatch):
    float32 = ["openvino", "onnxruntime", "torch"]
    for found, names in [
        ({"avx512_bf16": True}, ["openvino-bf16", "torch-bf16", *float32]),
        ({"amx_bf16": True}, ["openvino-bf16", "torch-bf16", *float32]),
        ({"avx512_bf16": False, "avx512_f": True}, float32),
        ({}, float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert backends.fastest_first(CPU) == names
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert backends.fastest_first(CPU) == ["torch-bf16", "onnxruntime", "torch"]


def test_auto_takes_the_first_that_is_right_and_says_so(saved, source, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "has_bf16", lambda device: False)
    auto = Predictor(saved, "cpu", backend="auto")
    predict_path(auto, source, tmp_path / "auto")
    record = json.loads((tmp_path / "auto" / "prediction.json").read_text())
    assert record["backend"] == backends.fastest_first(CPU)[0] == "openvino"
    assert record["precision"] == backends.PRECISIONS[record["backend"]]
    assert record["backend_version"].startswith("openvino 2") and 0 <= record["parity"]["mean"] <= 0.5
    predict_path(Predictor(saved, "cpu"), source, tmp_path / "torch")
    plain = json.loads((tmp_path / "torch" / "prediction.json").read_text())
    assert (plain["backend"], plain["precision"], plain["parity"]) == ("torch", "float32", None)
    by_auto, by_torch = (read_volume(tmp_path / name).array for name in ("auto", "torch"))
    assert np.abs(by_auto - by_torch).mean() <= 0.5 and by_torch.std() > 50
    volume = read_volume(source)
    np.testing.assert_array_equal(auto(volume).array, Predictor(saved, "cpu", backend="auto")(volume).array)


def test_a_wrong_backend_is_dropped_in_one_line(saved, source, tmp_path, monkeypatch):
    started = backends.started

    def injected(name, *arguments):
        if name.startswith("openvino"):
            return replace(started("torch", *arguments), name=name, run=lambda x: checkpoint.load(saved)(x) + 0.01)
        if name == "onnxruntime":
            raise RuntimeError("no such instruction\nat 0x1")
        return started(name, *arguments)

    monkeypatch.setattr(backends, "started", injected)
    monkeypatch.setattr(backends, "has_bf16", lambda device: False)
    predict_path(Predictor(saved, "cpu", backend="auto"), source, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert record["backend"] == "torch" and record["parity"] is None
    wrong, broken = (doubt for doubt in record["doubts"] if doubt.startswith("backend"))
    assert "differs from torch in float32 by 15.4 HU in the mean" in wrong and wrong.endswith("another was used")
    assert broken == "backend onnxruntime no such instruction at 0x1; another was used"
    with pytest.raises(DataError, match=r"--backend openvino: differs .* use --backend torch"):
        Predictor(saved, "cpu", backend="openvino")(read_volume(source))


def test_lack_of_memory_does_not_change_the_backend(saved, source, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backends, "started", full)
    with pytest.raises(torch.OutOfMemoryError):
        Predictor(saved, "cpu", backend="auto")(read_volume(source))


def test_what_is_not_a_number_or_right_in_the_mean_alone_fails(saved):
    network = checkpoint.load(saved)
    source_BCHW = torch.rand(1, 1, 32, 48)

    def spoiled(value):
        def run(x):
            y = network(x).detach()
            y[0, 0, 3, 4] += value
            return y

        return backends.Backend("openvino", "", run)

    for value in (float("nan"), 0.02):
        with pytest.raises(DataError, match="at most"):
            backends.parity(spoiled(value), network, source_BCHW, HU)
    assert backends.parity(spoiled(0.001), network, source_BCHW, HU)["largest"] == pytest.approx(1.536, rel=1e-3)
    mr = Intensity("percentile", 0.0, 400.0, "arbitrary")
    with pytest.raises(DataError, match=r"more than 0.05 and 1"):
        backends.parity(spoiled(0.02), network, source_BCHW, mr)


def test_refusals_name_the_remedy(saved, monkeypatch):
    with pytest.raises(ConfigError, match="expected auto, torch, torch-fp16, torch-bf16"):
        Predictor(saved, "cpu", backend="tensorflow")
    with pytest.raises(ConfigError, match="needs --backend torch"):
        Predictor(saved, "cpu", "image", backend="openvino")
    assert Predictor(saved, "cpu", "image", backend="auto").names == ["torch"]
    with pytest.raises(ConfigError, match="runs on the CPU"):
        backends.check("onnxruntime", torch.device("cuda"), "running")
    with pytest.raises(ConfigError, match="torch-fp16: needs a GPU"):
        Predictor(saved, "cpu", backend="torch-fp16")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="no bfloat16"):
        patch.setattr(backends, "_openvino_has_bf16", lambda: False)
        Predictor(saved, "cpu", backend="openvino-bf16")
    monkeypatch.setattr(backends, "has_bf16", lambda device: False)
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf'^{name} is not installed; pip install "seresvit\[export\]"$'):
            Predictor(saved, "cpu", backend=name)
    assert Predictor(saved, "cpu", backend="auto").names == ["torch"]


def test_the_record_holds_the_intensity_rule_that_the_voxels_had(saved, source, tmp_path):
    """A network without a recorded rule takes it from the image as it was resampled, and says which."""
    header = checkpoint.read(saved)[1]
    del header["target_intensity"]
    header["data"] = {"intensity": {"source": "percentile", "target": "percentile"}, "resample": [4.0, 4.0]}
    path = tmp_path / "mr.safetensors"
    checkpoint.save(checkpoint.load(saved), path, header)
    hu = read_volume(source)
    mr = replace(hu, array=(hu.array + 1024).clip(0), unit="arbitrary")
    predictor = Predictor(path, "cpu")
    trained = predictor.as_trained(mr)
    synthetic, how = predictor.with_record(mr)
    used = predictor.target_intensity(trained[0]).as_dict()
    assert how["intensity"] == used != predictor.target_intensity(mr).as_dict()
    with torch.inference_mode():
        plane = predictor.net(next(predictor.batches(*trained)))[0, 0].numpy()
    assert (plane.max() + 1) / 2 * used["high"] == pytest.approx(synthetic.array[0].max(), rel=0.1)
