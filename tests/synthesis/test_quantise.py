"""int8 files: integers inside, their error as an independent run finds it, and no file where it is too large."""

import numpy as np
import pytest
import torch

from seresvit.config import ConfigError, ModelSettings, VitSettings
from seresvit.data import phantom, read_volume
from seresvit.data.volume import DataError
from seresvit.model import checkpoint
from seresvit.model.generator import Generator, start_as_identity
from seresvit.synthesis import quantise
from seresvit.synthesis.quantise import export_int8

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

TISSUES_HU = {"soft": (-20.0, 100.0), "bone": (250.0, np.inf), "none": (9000.0, 9001.0)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network that gives back its source, nearly: a phantom's own HU are then the tissues."""
    torch.manual_seed(0)
    vit = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
    network = Generator(ModelSettings(base_channels=8, token_grid=(2, 2), vit=vit, fusion={"reduction": 4}))
    start_as_identity(network)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    header = {"data": {"window_hu": [-1024, 2048]}, "sources": ["110keV"], "target": "70keV"}
    checkpoint.save(network, path, header)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("patient")
    phantom.simulate(root, patients=1, slices=4, size=48, kev=(110,))
    return root / "110keV" / "P001"


def test_int8_says_its_error_by_tissue(saved, source, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "MOST_HU", 1000.0)
    out = tmp_path / "int8.onnx"
    errors = export_int8(saved, out, source, TISSUES_HU)
    weights = {tensor.name: tensor.data_type for tensor in onnx.load(out).graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for kind in weights.values()) > 30
    assert errors.keys() == {"all", "soft", "bone"}
    session = onnxruntime.InferenceSession(out)
    assert session.get_modelmeta().custom_metadata_map["precision"] == "int8"
    slices = ((read_volume(source).array[1::2, None] + 1024) / 1536 - 1).clip(-1, 1).astype(np.float32)
    with torch.inference_mode():
        exact_hu = checkpoint.load(saved)(torch.from_numpy(slices)).numpy() * 1536 + 512
    apart_hu = np.abs(session.run(None, {"source": slices})[0] * 1536 + 512 - exact_hu)
    assert errors["all"] == pytest.approx(apart_hu.mean(), rel=1e-3) and errors["all"] > 0.1
    assert errors["soft"] == pytest.approx(apart_hu[(exact_hu > -20) & (exact_hu <= 100)].mean(), rel=1e-3)


def test_of_many_patients_the_middles_are_looked_at(saved, source, tmp_path, monkeypatch):
    """A volume's first slice may be air, which int8 gives back without an error."""
    rows = [f"P{n:03d},train,110keV,70keV,{source},{source.parent}," for n in range(70)]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("patient,split,source,target,source_path,target_path,mask_path\n" + "\n".join(rows) + "\n")
    volume, asked = read_volume(source), []
    monkeypatch.setattr(quantise, "load_sources", lambda group, data: [volume])
    predictor = quantise.Predictor(saved, "cpu")
    batches = predictor.batches
    monkeypatch.setattr(predictor, "batches", lambda *v, of: asked.append(of) or batches(*v, of=of))
    slices, _ = quantise._spread(predictor, manifest, "train")
    assert len(slices) == len(asked) == 35 and asked == 35 * [[2]]


def test_too_large_an_error_is_refused(saved, source, tmp_path, monkeypatch):
    monkeypatch.setattr(quantise, "quantised", lambda float_model, slices: float_model)  # quick, and off by rounding
    monkeypatch.setattr(quantise, "MOST_HU", 1e-9)
    with pytest.raises(DataError, match=r"int8 is off by all .*, soft .* HU in the mean, more than 1e-09; not written"):
        export_int8(saved, tmp_path / "int8.xml", source, TISSUES_HU)
    with pytest.raises(ConfigError, match="needs at least 2 slices, found 1"):
        export_int8(saved, tmp_path / "int8.xml", next(source.glob("*.dcm")), TISSUES_HU)
    assert not list(tmp_path.iterdir())
