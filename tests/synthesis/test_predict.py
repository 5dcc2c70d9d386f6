"""The Predictor: eval mode, the grid of its source, the target's unit, and refusals in one line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch

from seresvit.config import ConfigError, ModelSettings, VitSettings
from seresvit.data import phantom, read_volume
from seresvit.data.audit import audit, write
from seresvit.data.volume import DataError
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis.predict import Predictor, predict_manifest, predict_path

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
VIT = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
WINDOW = {"kind": "window", "low": -1024.0, "high": 2048.0, "unit": "HU"}


def saved(path, in_channels=1, channels=()):
    torch.manual_seed(0)
    network = Generator(ModelSettings(base_channels=8, in_channels=in_channels, token_grid=(2, 3), vit=VIT))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    header = {
        "data": {"window_hu": [-1024, 2048], "channels": list(channels)},
        "train_size": [32, 48],
        "target_intensity": WINDOW,
        "sources": ["110keV"],
        "target": "70keV",
        "run": "r",
    }
    checkpoint.save(network, path, header)
    return path


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    root = tmp_path_factory.mktemp("patients")
    phantom.simulate(root / "dicom", patients=3, slices=5, size=40, kev=(70, 110, 125))
    found = audit(root / "dicom", ["110keV", "125keV"], "70keV", val=["P001"], test=["P002", "P003"])
    assert write(found, root / "manifest.csv")
    return root


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Predictor(saved(tmp_path_factory.mktemp("model") / "model.safetensors"), "cpu")


def test_a_volume_is_what_the_network_says_slice_by_slice(predictor, patients):
    source = read_volume(patients / "dicom/110keV/P001")
    synthetic = predictor(source)
    assert synthetic.array.shape == source.array.shape and synthetic.unit == "HU"
    np.testing.assert_array_equal(synthetic.affine, source.affine)
    for index in (0, 4):
        plane = torch.from_numpy((source.array[index] + 1024) / 3072 * 2 - 1).clip(-1, 1)[None, None].float()
        with torch.inference_mode():
            expected = (predictor.net(plane)[0, 0].numpy() + 1) / 2 * 3072 - 1024
        np.testing.assert_allclose(synthetic.array[index], expected, atol=0.02)


def test_prediction_repeats_exactly_and_does_not_depend_on_neighbours(predictor, patients):
    source = read_volume(patients / "dicom/110keV/P001")
    whole = predictor(source)
    np.testing.assert_array_equal(predictor(source).array, whole.array)
    one = replace(source, array=source.array[2:3], positions_mm=source.positions_mm[2:3], headers=source.headers[2:3])
    np.testing.assert_allclose(predictor(one).array[0], whole.array[2], atol=0.02)


def test_norm_statistics_of_the_image_leave_dropout_off_and_weights_alone(tmp_path, patients):
    path = saved(tmp_path / "model.safetensors")
    source = read_volume(patients / "dicom/110keV/P001")
    by_image, running = Predictor(path, "cpu", "image"), Predictor(path, "cpu")
    first = by_image(source).array
    assert np.abs(first - running(source).array).max() > 1
    np.testing.assert_array_equal(by_image(source).array, first)
    before, after = checkpoint.load(path).state_dict(), by_image.net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if "num_batches" not in k)


def test_manifest_predictions_are_derived_series_with_a_record(predictor, patients, tmp_path):
    assert predict_manifest(predictor, patients / "manifest.csv", tmp_path / "out") == []
    folders = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert folders == ["P002_110keV", "P002_125keV", "P003_110keV", "P003_125keV"]
    folder = tmp_path / "out" / "P002_110keV"
    record = json.loads((folder / "prediction.json").read_text())
    assert (record["patient"], record["source"], record["target"]) == ("P002", "110keV", "70keV")
    assert record["num_slices"] == 5 and record["intensity"] == WINDOW and len(record["checkpoint_sha256"]) == 64
    written = read_volume(folder)
    expected = predictor(read_volume(patients / "dicom/110keV/P002"))
    assert np.abs(written.array - expected.array).max() <= 0.5
    assert written.energy_kev == 70
    header = pydicom.dcmread(next(folder.glob("*.dcm")), stop_before_pixels=True)
    assert list(header.ImageType[:2]) == ["DERIVED", "SECONDARY"] and "ynthetic" in header.SeriesDescription


def test_several_sources_are_channels_in_the_order_of_the_settings(patients, tmp_path):
    both = Predictor(saved(tmp_path / "two.safetensors", 2, ["125keV", "110keV"]), "cpu")
    assert predict_manifest(both, patients / "manifest.csv", tmp_path / "out") == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["P002_125keV+110keV", "P003_125keV+110keV"]
    sources = [read_volume(patients / f"dicom/{kev}keV/P003") for kev in (125, 110)]
    written = read_volume(tmp_path / "out" / "P003_125keV+110keV")
    assert np.abs(written.array - both(*sources).array).max() <= 0.5
    with pytest.raises(DataError, match="takes 2 channels"):
        both(sources[0])


def test_a_failed_case_does_not_stop_the_others(predictor, patients, tmp_path):
    import shutil

    shutil.copytree(patients, tmp_path / "copy")
    broken = next((tmp_path / "copy/dicom/110keV/P002").glob("*.dcm"))
    broken.write_bytes(broken.read_bytes()[:900])
    failures = predict_manifest(predictor, tmp_path / "copy" / "manifest.csv", tmp_path / "out")
    assert [failure.name for failure in failures] == ["P002_110keV"] and broken.name in failures[0].reason
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["P002_125keV", "P003_110keV", "P003_125keV"]


def test_a_source_unlike_the_training_is_doubted_and_the_record_says_so(predictor, patients, tmp_path):
    trained_on, other = (read_volume(patients / f"dicom/{kev}keV/P001") for kev in (110, 125))
    assert predictor.doubts(trained_on) == []
    assert "125 keV image; the network was trained on 110 keV" in predictor.doubts(other)[0]
    predict_path(predictor, patients / "dicom/125keV/P001", tmp_path / "out")
    assert "125 keV" in json.loads((tmp_path / "out/prediction.json").read_text())["doubts"][0]
    coarse = replace(trained_on, affine=trained_on.affine @ np.diag([2, 2, 1, 1.0]))
    predictor.header["spacing_mm_yx"] = list(trained_on.spacing_mm_zyx[1:])
    try:
        assert predictor.doubts(trained_on) == [] and "pixels of" in predictor.doubts(coarse)[0]
    finally:
        del predictor.header["spacing_mm_yx"]


def test_the_source_and_other_peoples_files_are_never_replaced(predictor, patients, tmp_path):
    import shutil

    shutil.copytree(patients / "dicom" / "110keV", tmp_path / "data")
    (tmp_path / "data" / "notes.txt").write_text("mine")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    for out in ("data/P001", "data", ".", "data/P001/out"):
        with pytest.raises(ConfigError, match=r"give another folder|give a new folder"):
            predict_path(predictor, tmp_path / "data" / "P001", tmp_path / out)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.csv").write_text("mine")
    with pytest.raises(ConfigError, match="no earlier prediction"):
        predict_path(predictor, tmp_path / "data" / "P001", tmp_path / "results")
    assert (tmp_path / "results" / "table.csv").read_text() == "mine"
    assert before == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if "results" not in p.parts)
    for _ in range(2):
        predict_path(predictor, tmp_path / "data" / "P001", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.dcm"))) == 5


def test_an_imported_mr_to_ct_network_restores_hu_by_the_stated_window(patients, tmp_path):
    path = saved(tmp_path / "model.safetensors")
    header = checkpoint.read(path)[1]
    network = checkpoint.load(path)
    del header["target_intensity"]
    header["data"] = {"window_hu": [-1000, 1000], "intensity": {"source": "percentile", "target": "window"}}
    checkpoint.save(network, path, header)
    mr = replace(read_volume(patients / "dicom/110keV/P001"), unit="arbitrary")
    synthetic = Predictor(path, "cpu")(replace(mr, array=mr.array + 1024))
    assert synthetic.unit == "HU" and synthetic.array.min() >= -1000 and synthetic.array.max() <= 1000


def test_refusals(predictor, patients, tmp_path):
    with pytest.raises(ConfigError, match="no case in the split 'train'"):
        predict_manifest(predictor, patients / "manifest.csv", tmp_path / "out", "train")
    mr = replace(read_volume(patients / "dicom/110keV/P001"), unit="arbitrary")
    with pytest.raises(DataError, match="intensity"):
        predictor(mr)
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        Predictor(predictor.path, "gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cpu"):
            Predictor(predictor.path, "cuda")
    with pytest.raises(DataError):
        predict_path(predictor, tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason="the collection of real images is not here")
def test_a_real_series_with_gaps_and_an_rtstruct_keeps_its_geometry(predictor, tmp_path):
    series = DATA / "odd" / "dicom" / "ct_gaps_with_rtstruct"
    predict_path(predictor, series, tmp_path / "out")
    source, written = read_volume(series), read_volume(tmp_path / "out")
    np.testing.assert_allclose(written.positions_mm, source.positions_mm, atol=1e-3)
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-6)
    assert written.array.shape == source.array.shape == (8, 480, 480)
