"""Members, uncertainty, intervals and refusal: what the Predictor does beyond one pass of one network."""

import csv
import hashlib
import json
from dataclasses import replace

import numpy as np
import pydicom
import pytest
import torch

from seresvit.config import ConfigError, DataSettings, ModelSettings, VitSettings
from seresvit.data import pair, phantom, read_volume
from seresvit.data.pairing import load_channels, read_manifest
from seresvit.data.prepared import prepare
from seresvit.data.volume import DataError
from seresvit.model import checkpoint, familiarity
from seresvit.model.generator import Generator
from seresvit.synthesis import backends
from seresvit.synthesis import calibrate as calibrating
from seresvit.synthesis import predictor as predicting
from seresvit.synthesis.calibrate import calibrate
from seresvit.synthesis.ensemble import Members
from seresvit.synthesis.predict import predict_manifest, predict_path
from seresvit.synthesis.predictor import Predictor, intervals_path

VIT = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
WINDOW = {"kind": "window", "low": -1024.0, "high": 2048.0, "unit": "HU"}
NUM_PATIENTS = 13
HEADER = {
    "data": {"window_hu": [-1024, 2048]},
    "train_size": [16, 32],
    "target_intensity": WINDOW,
    "sources": ["110keV"],
    "target": "70keV",
}


def saved(path, seed=0, **header):
    torch.manual_seed(seed)
    network = Generator(ModelSettings(base_channels=4, token_grid=(1, 2), vit=VIT))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    checkpoint.save(network, path, {**HEADER, **header})
    return path


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    root = tmp_path_factory.mktemp("patients")
    phantom.simulate(root, patients=NUM_PATIENTS, slices=3, size=32, kev=(70, 110), seed=3)
    splits = ["train"] * 6 + ["val"] * 5 + ["test"] * 2
    with open(root / "manifest.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["patient", "split", "source", "target", "source_path", "target_path", "mask_path"])
        for number, split in enumerate(splits, 1):
            name = f"P{number:03d}"
            paths = [f"110keV/{name}", f"70keV/{name}", f"labels/{name}.nii.gz"]
            rows.writerow([name, split, "110keV", "70keV", *paths])
    return root


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def source(patients):
    return read_volume(patients / "110keV/P012")


class Unchanged(torch.nn.Module):
    settings = ModelSettings(token_grid=(1, 2), vit=VIT)

    def forward(self, image_BCHW):
        return image_BCHW


def test_flips_and_checkpoints_are_averaged_and_the_spread_is_their_deviation(path, source, tmp_path):
    other = saved(tmp_path / "other.safetensors", seed=1)
    mirrored = replace(source, array=source.array[:, :, ::-1].copy())
    one_by_one = [Predictor(p, "cpu")(v).array for p in (path, other) for v in (source, mirrored)]
    members = np.stack([one_by_one[0], one_by_one[1][..., ::-1], one_by_one[2], one_by_one[3][..., ::-1]])
    together = Predictor(path, "cpu", members=Members(flips=True, checkpoints=(other,)))
    mean, spread, _ = together.with_spread(source)
    np.testing.assert_allclose(mean.array, members.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(spread.array, members.std(axis=0, ddof=1), atol=0.02)
    np.testing.assert_array_equal(together(source).array, mean.array)
    assert spread.array.mean() > 1 and Predictor(path, "cpu").with_spread(source)[1] is None


def test_an_ensemble_records_what_every_member_ran_on(path, source, tmp_path, monkeypatch):
    """The second checkpoint's fast backend gives another image than torch, so that it falls back to torch."""
    other = saved(tmp_path / "other.safetensors", seed=1)
    together = Predictor(path, "cpu", backend="auto", members=Members(checkpoints=(other,)))
    shifts = {one.checkpoint_sha256: shift for one, shift in zip(together.ensemble, (1e-5, 1.0), strict=True)}

    def started(name, network, device, sha256):
        shift = 0.0 if name == "torch" else shifts[sha256]
        return backends.Backend(name, f"{name} 1", torch.inference_mode()(lambda image: network(image) + shift))

    monkeypatch.setattr(backends, "started", started)
    for one in together.ensemble:
        one.names = ["openvino", "torch"]
    _, _, record = together.with_spread(source)
    assert record["member_backends"] == ["openvino", "torch"] and record["backend"] == "openvino+torch"
    assert (record["precision"], record["backend_version"]) == ("float32", "openvino 1+torch 1")
    assert 0 < record["parity"]["largest"] < 0.1 and len(record["dropped"]) == 1
    assert "member_backends" not in Predictor(path, "cpu").with_record(source)[1]


def test_a_network_that_changes_nothing_gives_the_source_by_every_plane_and_tile(path, source):
    cubic = replace(source, affine=np.diag([2.0, 2.0, 2.0, 1.0]), positions_mm=2.0 * np.arange(3))
    predictor = Predictor(path, "cpu", members=Members(flips=True, planes=True, tiles=True))
    predictor.net = Unchanged()
    mean, spread, _ = predictor.with_spread(cubic)
    np.testing.assert_allclose(mean.array, cubic.array.clip(-1024, 2048), atol=0.05)
    assert spread.array.max() < 0.05
    with pytest.raises(DataError, match="cubic voxels"):
        predictor.with_spread(replace(cubic, affine=np.diag([2.0, 2.0, 9.0, 1.0]), positions_mm=9.0 * np.arange(3)))


def test_tiles_differ_from_the_whole_image_and_have_its_size(path, source):
    whole, tiles = Predictor(path, "cpu")(source), Predictor(path, "cpu", members=Members(tiles=True))(source)
    assert tiles.array.shape == whole.array.shape and np.abs(tiles.array - whole.array).max() > 0.1


def test_members_that_do_not_belong_together_are_refused(path, tmp_path):
    unmirrored = saved(tmp_path / "a.safetensors", data={"window_hu": [-1024, 2048], "flip": False})
    with pytest.raises(ConfigError, match="without mirror images"):
        Predictor(unmirrored, "cpu", members=Members(flips=True))
    elsewhere = saved(tmp_path / "b.safetensors", data={"window_hu": [-1000, 1000]})
    with pytest.raises(ConfigError, match="other data settings"):
        Predictor(path, "cpu", members=Members(checkpoints=(elsewhere,)))
    with pytest.raises(ConfigError, match="other data settings or another target"):
        Predictor(path, "cpu", members=Members(checkpoints=(saved(tmp_path / "c.safetensors", target="50keV"),)))
    with pytest.raises(ConfigError, match="one checkpoint twice"):
        Predictor(path, "cpu", members=Members(checkpoints=(path,)))


def test_the_uncertainty_is_a_series_of_its_own_that_says_what_it_is(path, patients, source, tmp_path):
    predictor = Predictor(path, "cpu", members=Members(flips=True))
    predict_path(predictor, patients / "110keV/P012", tmp_path / "out", uncertainty=True)
    mean, spread, _ = predictor.with_spread(source)
    assert np.abs(read_volume(tmp_path / "out").array - mean.array).max() <= 0.51
    written = read_volume(tmp_path / "out/uncertainty")
    assert written.unit == "HU" and np.abs(written.array - spread.array).max() <= 0.05
    np.testing.assert_array_equal(written.affine, source.affine)
    of_mean, of_spread = (
        pydicom.dcmread(next(folder.glob("*.dcm"))) for folder in (tmp_path / "out", tmp_path / "out/uncertainty")
    )
    assert of_mean.SeriesInstanceUID != of_spread.SeriesInstanceUID
    assert of_spread.SeriesDescription == "Uncertainty of 70keV: spread, not calibrated"
    assert (
        of_spread.SeriesNumber == of_mean.SeriesNumber + 1000 and "no image of the patient" in of_spread.ImageComments
    )
    assert of_spread.RescaleSlope < 0.1  # a spread below 1 HU is not lost
    record = json.loads((tmp_path / "out/prediction.json").read_text())
    assert record["uncertainty"] == {"path": "uncertainty", "kind": "spread", "coverage": None, "unit": "HU"}
    with pytest.raises(ConfigError, match="--uncertainty: one prediction has no spread"):
        predict_path(Predictor(path, "cpu"), patients / "110keV/P012", tmp_path / "other", uncertainty=True)


def test_calibrated_intervals_hold_for_their_own_members_only(patients, source, tmp_path):
    model = saved(tmp_path / "model.safetensors")
    predictor = Predictor(model, "cpu", members=Members(flips=True))
    intervals, table = calibrate(predictor, patients / "manifest.csv")
    assert intervals.num_patients == 5 and set(table.index) >= {"all", "bone", "lung"}
    assert abs(table.loc["all", "inside"] - 0.9) < 0.08 and table.loc["all", "patients"] == 2
    assert json.loads(intervals_path(model).read_text())["measured"][0]["region"] == "all"

    again = Predictor(model, "cpu", members=Members(flips=True))
    predict_path(again, patients / "110keV/P012", tmp_path / "out", uncertainty=True)
    synthetic, spread, _ = again.with_spread(source)
    target = read_volume(patients / "70keV/P012").array
    width = read_volume(tmp_path / "out/uncertainty").array
    assert abs((np.abs(synthetic.array - target) <= width + 0.5).mean() - 0.9) < 0.1
    assert width.mean() > 2 * spread.array.mean()
    record = json.loads((tmp_path / "out/prediction.json").read_text())
    assert (record["uncertainty"]["kind"], record["uncertainty"]["coverage"]) == ("interval", 0.9)
    assert Predictor(model, "cpu").intervals is None
    with pytest.raises(ConfigError, match="2 patients in the split 'test'"):
        calibrate(predictor, patients / "manifest.csv", split="test", held_out="val")
    with pytest.raises(ConfigError, match="--held-out val: intervals are tried on other patients"):
        calibrate(predictor, patients / "manifest.csv", held_out="val")


def test_calibration_takes_the_bias_field_off_once(path, patients, monkeypatch):
    for module in (pair, predicting):
        monkeypatch.setattr(module, "without_bias", lambda v, data: replace(v, array=v.array + 100) if data.n4 else v)
    predictor = Predictor(path, "cpu")
    predictor.net, predictor.data = Unchanged(), predictor.data.model_copy(update={"n4": True})
    group = load_channels(read_manifest(patients / "manifest.csv"), ())[0]
    source = read_volume(group[0].source_path).array
    np.testing.assert_allclose(calibrating._predicted(predictor, group)[1], (source + 100).clip(-1024, 2048), atol=0.05)


def test_an_image_unlike_the_training_is_doubted_and_refused_when_strict(patients, tmp_path):
    store = prepare(patients / "manifest.csv", DataSettings.model_validate(HEADER["data"]))
    network = checkpoint.load(saved(tmp_path / "first.safetensors"))
    record = familiarity.of_training(network, store, 0)
    assert record["num_patients"] == 6 and "gate art_1 cnn" in record["names"]
    predictor = Predictor(saved(tmp_path / "model.safetensors", familiarity=record), "cpu")
    known = read_volume(patients / "110keV/P001")
    assert predictor.doubts(known) == []
    lost = replace(known, array=known.array + 1024)  # the intercept was not applied
    (doubt,) = predictor.doubts(lost)
    assert "unlike the 6 patients" in doubt and "times the limit" in doubt

    for file in (patients / "110keV/P001").glob("*.dcm"):
        header = pydicom.dcmread(file)
        header.RescaleIntercept = 0
        (tmp_path / "lost").mkdir(exist_ok=True)
        header.save_as(tmp_path / "lost" / file.name)
    predict_path(predictor, tmp_path / "lost", tmp_path / "out")
    assert "unlike the 6 patients" in json.loads((tmp_path / "out/prediction.json").read_text())["doubts"][0]
    with pytest.raises(DataError, match="refused by --strict"):
        predict_path(predictor, tmp_path / "lost", tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()
    predict_path(predictor, patients / "110keV/P001", tmp_path / "strict", strict=True)


def test_finished_cases_are_left_alone_and_others_made_again(path, patients, tmp_path):
    predictor, out = Predictor(path, "cpu"), tmp_path / "out"

    def made(**options):
        before = {f: f.stat().st_mtime_ns for f in out.rglob("prediction.json")}
        assert predict_manifest(predictor, patients / "manifest.csv", out, **options) == []
        return sorted(f.parent.name for f in out.rglob("prediction.json") if before.get(f) != f.stat().st_mtime_ns)

    assert made() == ["P012_110keV", "P013_110keV"] and made() == []
    next((out / "P013_110keV").glob("*.dcm")).unlink()
    assert made() == ["P013_110keV"]
    assert made(mark="burned") == ["P012_110keV", "P013_110keV"]
    predictor = Predictor(saved(tmp_path / "other.safetensors", seed=1), "cpu")
    assert made(mark="burned") == ["P012_110keV", "P013_110keV"] and made(mark="burned") == []
    assert made(mark="burned", strict=True) == ["P012_110keV", "P013_110keV"]  # not looked at so closely before
    out = tmp_path / "anonymous"
    assert len(made(anonymize=True)) == 2 and made(anonymize=True) == []


def test_a_checkpoint_that_is_replaced_later_is_known_by_the_bytes_that_were_loaded(tmp_path):
    predictor = Predictor(saved(tmp_path / "model.safetensors"), "cpu")
    loaded = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    saved(tmp_path / "model.safetensors", seed=1)
    assert predictor.members_record["checkpoints"] == [loaded]


def test_familiarity_goes_through_the_network_in_the_batches_of_prediction(patients, tmp_path):
    record = {"names": ["gate art_1 cnn"], "mean": [0.0], "inverse": [[1.0]], "limit": 1e-9, "num_patients": 6}
    predictor = Predictor(saved(tmp_path / "model.safetensors", familiarity=record), "cpu", "image")
    sizes = []
    predictor.net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    volume = read_volume(patients / "110keV/P001")
    assert len(predictor.doubts(volume)) == 1 and sizes == [1, 1, 1]


def test_the_processes_of_torchrun_share_the_cases(path, patients, tmp_path, monkeypatch):
    shares = []
    for rank in range(2):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        out = tmp_path / str(rank)
        assert predict_manifest(Predictor(path, "cpu"), patients / "manifest.csv", out, "val") == []
        shares.append({folder.name for folder in out.iterdir()})
    assert not shares[0] & shares[1] and len(shares[0]) == 3 and len(shares[1]) == 2
