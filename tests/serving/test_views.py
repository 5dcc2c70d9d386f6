"""What the page is given of a finished job: images read by nibabel, gates as the network has them."""

import gzip
import json
from dataclasses import replace

import nibabel
import numpy as np
import pydicom
import pytest
import torch

import seresvit
from seresvit.config import FusionSettings, ModelSettings, VitSettings
from seresvit.data import read_volume
from seresvit.evaluation.tissues import BODY_ABOVE_HU
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.serving import views
from seresvit.serving.views import PAGE_FILES, VIEW, gates_of, hearing, write_views
from seresvit.synthesis.predictor import Predictor

VIT = VitSettings(depth=1, width=16, heads=2, mlp_width=16)


def predictor_with(fusion, path, header):
    torch.manual_seed(1)
    settings = ModelSettings(base_channels=4, token_grid=(2, 2), vit=VIT, fusion=FusionSettings(kind=fusion))
    checkpoint.save(Generator(settings), path, header)
    return Predictor(path, "cpu")


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint):
    return Predictor(tiny_checkpoint, "cpu")


@pytest.fixture(scope="module")
def source(patients):
    return read_volume(patients / "110keV/P001")


@pytest.fixture(scope="module")
def shown(predictor, source, tmp_path_factory):
    """The folder of a view, what was told of it, and the synthetic volume in it."""
    folder = tmp_path_factory.mktemp("job") / "view"
    synthetic = predictor(source)
    return folder, write_views(predictor, (source,), synthetic, folder), synthetic


def test_images_are_in_hu_and_lie_as_in_the_patient(shown, source, patients):
    folder, told, synthetic = shown
    assert json.loads((folder / VIEW).read_text()) == json.loads(json.dumps(told))
    planes = [pydicom.dcmread(path) for path in (patients / "110keV/P001").glob("*.dcm")]
    planes.sort(key=lambda plane: float(plane.ImagePositionPatient[2]))
    hu = np.stack([p.pixel_array * float(p.RescaleSlope) + float(p.RescaleIntercept) for p in planes])
    expected = {"source": hu, "synthetic": synthetic.array}
    assert set(told["images"]) == set(expected)
    for name, array in expected.items():
        image = nibabel.load(folder / told["images"][name]["file"])
        assert image.get_data_dtype() == np.int16 and told["images"][name]["unit"] == "HU"
        assert np.abs(image.get_fdata().transpose(2, 1, 0) - array).max() <= 0.5 + 1e-3
        for z, plane in enumerate(planes):
            corner_ras = image.affine @ [0, 0, z, 1]
            assert np.allclose(corner_ras[:3] * [-1, -1, 1], np.array(plane.ImagePositionPatient, float), atol=1e-3)
    assert told["positions_mm"] == [float(plane.ImagePositionPatient[2]) for plane in planes]
    assert told["slices"] == [0, 1, 2] and told["averaged"] == 1 and told["oriented"] and told["format"] == "dicom"


def test_windows_of_ct_and_ends_of_the_difference(shown, source):
    _, told, synthetic = shown
    levels = {name: (low + high) / 2 for name, (low, high) in told["windows"].items()}
    widths = {name: high - low for name, (low, high) in told["windows"].items()}
    assert levels == {"soft_tissue": 40, "lung": -600, "bone": 400, "pe": 100}
    assert widths == {"soft_tissue": 400, "lung": 1500, "bone": 1800, "pe": 700}
    low, high = told["difference"]["window"]
    reached = np.percentile(np.abs(synthetic.array - source.array)[source.array > BODY_ABOVE_HU], 95)
    assert low == -high and high == min([limit for limit in views.LIMITS if limit >= reached] or [1000])
    assert told["unit"] == "HU" and told["target"] == "70keV"


def test_shares_are_means_of_the_halves_of_the_gates(shown, predictor, source):
    _, told, _ = shown
    for z in range(3):
        plane = torch.from_numpy((source.array[z] + 1024) / 3072 * 2 - 1).clip(-1, 1)[None, None].float()
        with torch.inference_mode(), seresvit.record_gates(predictor.net) as gates:
            predictor.net(plane)
        for block in ("art_1", "art_6"):
            half = gates[block].shape[1] // 2
            shares = told["gates"][block]
            assert shares["transformer"][z] == pytest.approx(float(gates[block][0, :half].mean()), abs=1e-4)
            assert shares["cnn"][z] == pytest.approx(float(gates[block][0, half:].mean()), abs=1e-4)
    assert set(told["gates"]) == {"art_1", "art_6"} and told["highest_gate"] == 1 and told["fusion"] == "se"


def test_gates_heard_in_prediction_are_those_of_the_network(predictor, source):
    predictor.batch_size, before = 2, predictor.batch_size
    try:
        with hearing(predictor) as heard:
            predictor(source)
            assert heard(2) is None  # the last batch has one slice, the one before it two
        found = heard(3)
    finally:
        predictor.batch_size = before
    asked = gates_of(predictor, (source,))
    assert found and set(found) == set(asked)
    for name, value in asked.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)
    with hearing(predictor) as heard:
        pass
    assert heard(3) is None


def test_what_another_backend_predicts_is_not_heard(tiny_checkpoint, source):
    pytest.importorskip("onnxruntime")
    predictor = Predictor(tiny_checkpoint, "cpu", backend="onnxruntime")
    with hearing(predictor) as heard:
        predictor(source)
    assert heard(3) is None


@pytest.mark.parametrize(("fusion", "maps"), [("concat", False), ("attention-gate", True), ("spatial-se", True)])
def test_fusions_without_gates_say_so(fusion, maps, predictor, source, tmp_path):
    other = predictor_with(fusion, tmp_path / "other.safetensors", predictor.header)
    with hearing(other) as heard:
        synthetic = other(source)
    told = write_views(other, (source,), synthetic, tmp_path / "view", heard(3))
    assert told["fusion"] == fusion and told["maps"] == maps
    assert set(told["gates"]) == ({"art_1", "art_6"} if fusion == "spatial-se" else set())


def test_images_of_two_units_have_no_difference_and_mr_keeps_its_scale(predictor, source, tmp_path):
    values = np.random.default_rng(0).gamma(2, 150, source.array.shape).astype(np.float32)
    mr = replace(source, array=values, unit="arbitrary")
    synthetic = replace(source, array=source.array + 1)
    told = write_views(predictor, (mr,), synthetic, tmp_path / "view", {})
    assert "difference" not in told
    assert told["images"]["source"]["unit"] == "arbitrary" and told["windows"]
    np.testing.assert_allclose(told["images"]["source"]["window"], np.percentile(values, (1, 99)), rtol=1e-5)
    image = nibabel.load(tmp_path / "view/source.nii.gz")
    assert np.abs(image.get_fdata().transpose(2, 1, 0) - values).max() <= values.max() / 32767
    both = write_views(predictor, (mr,), replace(mr, array=values * 2), tmp_path / "mr", {})
    assert "difference" not in both and both["windows"] == {}


def test_large_images_are_averaged_and_that_is_told(predictor, source, tmp_path, monkeypatch):
    monkeypatch.setattr(views, "MAX_SIDE", 16)
    told = write_views(predictor, (source,), source, tmp_path / "side", {})
    assert told["averaged"] == 2
    image = nibabel.load(tmp_path / "side/source.nii.gz")
    averaged = source.array.reshape(3, 16, 2, 16, 2).mean(axis=(2, 4))
    assert np.abs(image.get_fdata().transpose(2, 1, 0) - averaged).max() <= 0.5 + 1e-3
    # The first voxel's centre is that of the four that it is the mean of.
    expected = source.affine @ [0.5, 0.5, 0, 1] * [-1, -1, 1, 1]
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], expected, atol=1e-3)
    monkeypatch.setattr(views, "MAX_SIDE", 512)
    monkeypatch.setattr(views, "MAX_VOXELS", source.array.size // 5)
    assert write_views(predictor, (source,), source, tmp_path / "voxels", {})["averaged"] == 3


def test_slices_that_are_not_axial_are_shown_as_they_lie(predictor, source, tmp_path):
    sagittal = source.affine.copy()
    sagittal[:3, :3] = np.array([[0, 0, 2.0], [1.0, 0, 0], [0, -1.0, 0]])
    told = write_views(predictor, (replace(source, affine=sagittal),), source, tmp_path / "view", {})
    assert not told["oriented"]
    image = nibabel.load(tmp_path / "view/source.nii.gz")
    np.testing.assert_allclose(image.affine, np.diag([-1, -1, 2, 1]), atol=1e-6)


def test_a_view_is_the_same_every_time_and_replaced_whole(predictor, source, tmp_path):
    folder = tmp_path / "view"
    write_views(predictor, (source,), source, folder, {})
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_views(predictor, (source,), source, folder, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert len(gzip.decompress(first["source.nii.gz"])) == 352 + 2 * source.array.size
    assert [path.name for path in tmp_path.iterdir()] == ["view"]


def test_a_single_slice_has_a_view(predictor, source, tmp_path):
    one = replace(source, array=source.array[:1], positions_mm=source.positions_mm[:1], headers=source.headers[:1])
    told = write_views(predictor, (one,), predictor(one), tmp_path / "view")
    assert told["slices"] == [0] and len(told["gates"]["art_1"]["cnn"]) == 1


def test_the_page_is_whole():
    assert {"index.html", "page.js", "viewer.js", "page.css", "words.json", "icon.svg", "niivue.js"} <= set(PAGE_FILES)
    assert all(path.is_file() for path in PAGE_FILES.values())
