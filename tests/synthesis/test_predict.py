"""The Predictor: eval mode, the grid of its source, the target's unit, and refusals in one line."""

import errno
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from seresvit.config import ConfigError, ModelSettings, VitSettings
from seresvit.data import phantom, read_volume, write_volume
from seresvit.data.audit import audit, write
from seresvit.data.mark import lettering
from seresvit.data.volume import DataError
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis.predict import Predictor, predict_manifest, predict_path

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
VIT = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
WINDOW = {"kind": "window", "low": -1024.0, "high": 2048.0, "unit": "HU"}


def saved(path, in_channels=1, channels=(), spacing_mm_yx=None, **data):
    torch.manual_seed(0)
    network = Generator(ModelSettings(base_channels=8, in_channels=in_channels, token_grid=(2, 3), vit=VIT))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    header = {
        "data": {"window_hu": [-1024, 2048], "channels": list(channels), **data},
        "train_size": [32, 48],
        "target_intensity": WINDOW,
        "sources": ["110keV"],
        "target": "70keV",
        "run": "r",
    }
    if spacing_mm_yx:
        header["spacing_mm_yx"] = spacing_mm_yx
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


def test_a_folder_that_may_not_be_replaced_fails_its_case_alone(predictor, patients, tmp_path):
    taken = tmp_path / "out" / "P002_110keV"
    taken.mkdir(parents=True)
    (taken / "notes.txt").write_text("mine")
    failures = predict_manifest(predictor, patients / "manifest.csv", tmp_path / "out")
    assert [failure.name for failure in failures] == ["P002_110keV"]
    assert "no earlier prediction" in failures[0].reason and "\n" not in failures[0].reason
    assert (taken / "notes.txt").read_text() == "mine" and len(list(taken.iterdir())) == 1
    assert len(list((tmp_path / "out").glob("*/prediction.json"))) == 3


def test_what_a_killed_prediction_left_is_removed_by_the_next(predictor, patients, tmp_path):
    for parent in (tmp_path / "out", tmp_path):
        left = parent / ".writing-killed" / "P002_110keV"
        left.mkdir(parents=True)
        (left.parent / ".lock").touch()  # held by nobody
    predict_manifest(predictor, patients / "manifest.csv", tmp_path / "out")
    assert not list((tmp_path / "out").glob(".writing-*"))
    predict_path(predictor, patients / "dicom" / "110keV" / "P001", tmp_path / "one")
    assert not list(tmp_path.glob(".writing-*"))


@pytest.fixture
def slice_by_slice(predictor, monkeypatch):
    """The predictor with one slice a batch; the test says what happens before each."""
    monkeypatch.setattr(predictor, "batch_size", 1)
    seen = []

    def set_watch(act):
        monkeypatch.setattr(predictor, "watch", lambda _: (seen.append(1), act(len(seen))))
        return seen

    return set_watch


def test_slices_are_written_while_the_network_works_as_they_are_when_it_is_done(
    predictor, slice_by_slice, patients, tmp_path
):
    def wait_for_the_last_but_one(number):
        for _ in range(6000 if number > 1 else 0):
            if list(tmp_path.rglob(f"SYN_{number - 1:04d}.dcm")):
                return
            time.sleep(0.01)
        assert number == 1, "nothing is written before the network is done"

    slice_by_slice(wait_for_the_last_but_one)
    source = patients / "dicom/110keV/P001"
    out = predict_path(predictor, source, tmp_path / "out")
    predictor.watch = lambda _: None
    how = {"description": "Synthetic 70keV (SE-ResViT)", "energy_kev": 70.0}
    whole = write_volume(
        predictor(read_volume(source)), tmp_path / "whole", checkpoint_sha256=predictor.checkpoint_sha256, **how
    )
    assert len(list(whole.iterdir())) == 5
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    record = json.loads((out / "prediction.json").read_text())
    assert len(record["request"]) == 64 and record["num_bytes"] == sum(p.stat().st_size for p in out.glob("*.dcm"))


@pytest.mark.parametrize("fault", ["interrupt", "not a number", "disk full"])
def test_what_ends_a_prediction_in_the_middle_leaves_what_was_there(
    predictor, slice_by_slice, patients, tmp_path, monkeypatch, fault
):
    source = patients / "dicom/110keV/P001"
    predict_path(predictor, source, tmp_path / "out", mark="burned")  # an earlier one
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def act(number):
        if fault == "interrupt" and number == 4:
            raise KeyboardInterrupt
        if fault == "not a number" and number == 5:
            monkeypatch.setattr(predictor.net, "forward", lambda x_BCHW: x_BCHW * torch.nan)
        if fault == "disk full" and number > 2:
            time.sleep(0.5)

    def save_as(dataset, path, **_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fault == "disk full":
        monkeypatch.setattr(pydicom.Dataset, "save_as", save_as)
    seen = slice_by_slice(act)
    expected = {"interrupt": (KeyboardInterrupt, None), "not a number": (DataError, "not finite; check")}
    error, message = expected.get(fault, (DataError, "cannot be written .No space left on device"))
    with pytest.raises(error, match=message):
        predict_path(predictor, source, tmp_path / "out")
    assert len(seen) < 5 or fault == "not a number"  # the network does not go on for nothing
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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


MARKER = "Zebrastripe"
PERSON = {
    **dict.fromkeys(("PatientName", "PatientID", "OtherPatientNames", "PatientAddress", "PatientComments"), MARKER),
    **dict.fromkeys(("ReferringPhysicianName", "OperatorsName", "PerformingPhysicianName", "AccessionNumber"), MARKER),
    "PatientBirthDate": "19871231",
}


def test_no_name_nor_birth_date_is_ever_told(predictor, patients, tmp_path, monkeypatch, capfd):
    import shutil

    from seresvit import cli

    shutil.copytree(patients / "dicom", tmp_path / "dicom")
    for path in (tmp_path / "dicom").rglob("*.dcm"):
        header = pydicom.dcmread(path)
        for keyword, value in PERSON.items():
            setattr(header, keyword, value)
        header.save_as(path)
    split = ["--val", "P001,P002", "--test", "P003"]
    broken = next((tmp_path / "dicom/110keV/P003").glob("*.dcm"))

    def run(*words):
        monkeypatch.setattr("sys.argv", ["seresvit", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code
        return 0

    manifest, model = tmp_path / "manifest.csv", predictor.path
    assert run("audit", tmp_path / "dicom", "--source", "110keV", "--target", "70keV", "--out", manifest, *split) == 0
    whole = broken.read_bytes()
    broken.write_bytes(whole.replace(b"70keV", b"90keV")[:-300])
    assert run("predict", model, manifest, tmp_path / "predictions", "--device", "cpu") == 1
    broken.write_bytes(whole)
    assert run("predict", model, manifest, tmp_path / "predictions", "--device", "cpu") == 0
    out = tmp_path / "evaluation"
    assert run("evaluate", tmp_path / "predictions", "--manifest", manifest, "--out", out) == 0

    told = [*capfd.readouterr(), *(str(path) for path in tmp_path.rglob("*"))]
    written = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".csv", ".html", ".jsonl", ".txt")]
    assert {path.name for path in written} >= {"prediction.json", "audit.json", "report.html", "cases.csv"}
    told += [path.read_text(encoding="utf-8") for path in written]
    assert not [text for text in told if MARKER.lower() in text.lower() or "19871231" in text]


def test_anonymous_predictions_tell_nothing_of_whom_they_are(predictor, patients, tmp_path):
    out = tmp_path / "out"
    assert predict_manifest(predictor, patients / "manifest.csv", out, anonymize=True) == []
    source = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, (patients / "dicom").rglob("*.dcm"))}
    folders = sorted(out.iterdir())
    assert len(folders) == 4 and all(folder.name.startswith("ANON-") for folder in folders)
    for folder in folders:
        record = (folder / "prediction.json").read_text()
        assert not any(word in record for word in ("P002", "P003", str(tmp_path), str(predictor.path.parent)))
        assert json.loads(record)["patient"] == folder.name.split("_")[0] and json.loads(record)["anonymized"]
        header = pydicom.dcmread(next(folder.glob("*.dcm")))
        assert header.PatientIdentityRemoved == "YES" and header.PatientID == folder.name.split("_")[0]
        assert header.SourceImageSequence[0].ReferencedSOPInstanceUID not in source
        assert np.abs(read_volume(folder).array).max() > 0


def test_the_mark_is_on_record_and_only_dicom_has_overlays(predictor, patients, tmp_path):
    predict_path(predictor, patients / "dicom/110keV/P001", tmp_path / "dicom", mark="overlay")
    assert json.loads((tmp_path / "dicom/prediction.json").read_text())["mark"] == "overlay"
    assert (0x6000, 0x3000) in pydicom.dcmread(next((tmp_path / "dicom").glob("*.dcm")))
    source = read_volume(patients / "dicom/110keV/P001")
    image = sitk.GetImageFromArray(source.array)
    image.SetDirection([1, 0, 0, 0, 1, 0, 0, 0, 1])
    sitk.WriteImage(image, tmp_path / "ct.mha")
    with pytest.raises(DataError, match="--mark burned"):
        predict_path(predictor, tmp_path / "ct.mha", tmp_path / "mha", mark="overlay")
    plain, marked = (predict_path(predictor, tmp_path / "ct.mha", tmp_path / str(m), mark=m) for m in (None, "burned"))
    differs = read_volume(plain / "synthetic.mha").array != read_volume(marked / "synthetic.mha").array
    word, rim = lettering(*source.array.shape[1:])
    assert differs[:, word | rim].mean() > 0.9 and not differs[:, ~word & ~rim].any()


@pytest.mark.parametrize(
    ("resample", "shape"),
    [("source", (5, 40, 40)), ("target", (5, 20, 27)), ([1.0, 2.0], (5, 40, 20)), (3.0, (5, 14, 14))],
)
def test_a_network_of_another_grid_predicts_there_and_returns_on_the_sources_own(patients, tmp_path, resample, shape):
    source = read_volume(patients / "dicom/110keV/P001")
    z_mm, y_mm, x_mm = source.spacing_mm_zyx
    trained_mm = [2 * y_mm, 1.5 * x_mm]
    if resample == [1.0, 2.0]:
        resample = [y_mm, 2 * x_mm]
    elif resample == 3.0:
        resample = [z_mm, 3 * y_mm, 3 * x_mm]
    path = saved(tmp_path / "model.safetensors", resample=resample, spacing_mm_yx=trained_mm)
    predictor, seen = Predictor(path, "cpu"), []
    predictor.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    predict_path(predictor, patients / "dicom/110keV/P001", tmp_path / "out")
    assert (sum(len(batch) for batch in seen), *seen[0].shape[2:]) == shape
    written = read_volume(tmp_path / "out")
    np.testing.assert_array_equal(written.affine, source.affine)
    np.testing.assert_array_equal(written.positions_mm, source.positions_mm)
    assert written.array.shape == source.array.shape and written.array[:, 0, 0].min() > -1024
    record = json.loads((tmp_path / "out/prediction.json").read_text())
    assert (record["resample"], record["interpolation"]) == (resample, "linear")
    assert bool(record["doubts"]) == (resample == "source")  # all others come to the trained spacing


def test_the_way_to_the_trained_grid_and_back_keeps_the_anatomy(patients, tmp_path):
    class Unchanged(torch.nn.Module):
        settings = ModelSettings()

        def forward(self, image_BCHW):
            return image_BCHW

    source = read_volume(patients / "dicom/110keV/P001")
    fine = [mm / 3 for mm in source.spacing_mm_zyx]  # a third has the source's own voxels among its
    predictor = Predictor(saved(tmp_path / "model.safetensors", resample=fine), "cpu")
    predictor.net = Unchanged()
    np.testing.assert_allclose(predictor(source).array, source.array.clip(-1024, 2048), atol=0.05)


def test_a_channel_on_another_grid_is_resampled_only_where_training_did_so(patients, tmp_path):
    one, two = (read_volume(patients / f"dicom/{kev}keV/P001") for kev in (110, 125))
    finer = replace(two, array=two.array[:, 4:-4, 4:-4], affine=two.affine.copy())
    finer.affine[:3, 3] += two.affine[:3, :2] @ [4, 4]
    channels = ["110keV", "125keV"]
    strict = Predictor(saved(tmp_path / "strict.safetensors", 2, channels), "cpu")
    with pytest.raises(DataError, match=r"differs from .* in image size"):
        strict(one, finer)
    lenient = Predictor(saved(tmp_path / "lenient.safetensors", 2, channels, resample="source"), "cpu")
    assert lenient(one, finer).array.shape == one.array.shape
    np.testing.assert_array_equal(lenient.as_trained(one, finer)[1].array[:, 4:-4, 4:-4], finer.array)
    with pytest.raises(DataError, match="does not cover all slices"):
        lenient(one, replace(finer, array=finer.array[:2], positions_mm=finer.positions_mm[:2], headers=()))
