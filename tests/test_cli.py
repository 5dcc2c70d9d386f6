"""The command line as a user meets it: exit codes, one line for every error, nothing half-written."""

import subprocess
import sys

import pytest

from seresvit.config import ModelSettings, VitSettings, load_config
from seresvit.model import checkpoint
from seresvit.model.discriminator import Discriminator
from seresvit.model.generator import Generator
from seresvit.training.stage import stage_network


def one_line(finished, code, *parts):
    assert finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("seresvit: ")
    for part in parts:
        assert part in last, last


@pytest.fixture(scope="module")
def patients(seresvit, tmp_path_factory):
    root = tmp_path_factory.mktemp("patients")
    assert seresvit("simulate", root / "dicom", "--patients", 3, "--slices", 2, "--size", 32).returncode == 0
    words = [
        "--source",
        "110keV",
        "--target",
        "70keV",
        "--out",
        root / "manifest.csv",
        "--val",
        "P002",
        "--test",
        "P003",
        "--workers",
        1,
    ]
    finished = seresvit("audit", root / "dicom", *words)
    assert finished.returncode == 0 and "3 cases of 3 patients (1 train, 1 val, 1 test)" in finished.stdout
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    vit = VitSettings(depth=1, width=64, heads=1, mlp_width=16)
    network = Generator(ModelSettings(base_channels=4, token_grid=(2, 2), vit=vit))
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    header = {"data": {}, "train_size": [32, 32], "sources": ["110keV"], "target": "70keV"}
    checkpoint.save(network, path, header)
    return path


def test_empty_folder_and_no_pairs(seresvit, tmp_path, patients):
    (tmp_path / "empty").mkdir()
    one_line(
        seresvit("audit", tmp_path / "empty", "--source", "a", "--target", "b", cwd=tmp_path),
        1,
        str(tmp_path / "empty"),
    )
    lacking = seresvit(
        "audit", patients / "dicom", "--source", "110keV", "--target", "60keV", "--out", tmp_path / "m.csv"
    )
    one_line(lacking, 1, "60keV")
    assert not (tmp_path / "m.csv").exists()


def test_a_corrupt_file_stops_the_audit_with_its_name(seresvit, tmp_path, patients):
    import shutil

    shutil.copytree(patients / "dicom", tmp_path / "dicom")
    broken = tmp_path / "dicom" / "110keV" / "P001" / "P001_0002.dcm"
    broken.write_bytes(broken.read_bytes()[:700])
    words = ["--source", "110keV", "--target", "70keV", "--out", tmp_path / "manifest.csv", "--workers", 1]
    finished = seresvit("audit", tmp_path / "dicom", *words)
    one_line(finished, 1, "1 faults")
    assert "fault: " in finished.stdout and "P001_0002.dcm" in finished.stdout
    assert not (tmp_path / "manifest.csv").exists() and (tmp_path / "audit.json").exists()


def test_unknown_setting_suggests_the_near_one(seresvit, patients, tmp_path):
    (tmp_path / "c.yaml").write_text("train: {batchsize: 3}\n")
    words = ["--manifest", patients / "manifest.csv", "--run-dir", tmp_path / "run"]
    one_line(seresvit("train", tmp_path / "c.yaml", *words), 2, "train.batchsize", "did you mean train.batch_size?")
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_plan_and_writes_no_run(seresvit, patients, tmp_path):
    (tmp_path / "c.yaml").write_text("{}\n")
    words = [
        "--manifest",
        patients / "manifest.csv",
        "--run-dir",
        tmp_path / "run",
    ]
    small = ["train.size=32", "train.batch_size=1", "model.base_channels=4", "model.fusion.kind=concat"]
    small += ["model.vit={depth: 1, width: 16, heads: 2, mlp_width: 16}"]
    finished = seresvit(
        "train", tmp_path / "c.yaml", *words, "--dry-run", *(w for one in small for w in ("--set", one))
    )
    assert finished.returncode == 0, finished.stderr
    network = stage_network(load_config(None, small), 2)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert "kind: concat" in finished.stdout and f"stage 2: {count:,} parameters" in finished.stdout
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["first-batch.png"]


def test_wrong_checkpoints_are_named_with_the_remedy(seresvit, patients, tmp_path, model):
    source = patients / "dicom" / "110keV" / "P001"
    (tmp_path / "text.safetensors").write_text("no")
    one_line(seresvit("predict", tmp_path / "text.safetensors", source, tmp_path / "out"), 1, "text.safetensors")
    (tmp_path / "latest_net_G.pth").write_bytes(b"PK")
    one_line(seresvit("predict", tmp_path / "latest_net_G.pth", source, tmp_path / "out"), 1, "seresvit convert")
    checkpoint.save(Discriminator(2, 4), tmp_path / "d.safetensors", {})
    one_line(seresvit("predict", tmp_path / "d.safetensors", source, tmp_path / "out"), 1, "holds a discriminator")
    one_line(seresvit("predict", tmp_path / "none.safetensors", source, tmp_path / "out"), 1, "no such file")
    assert not (tmp_path / "out").exists()


def test_predict_of_another_size_than_trained_keeps_the_size(seresvit, patients, tmp_path, model):
    assert seresvit("simulate", tmp_path / "other", "--patients", 1, "--slices", 2, "--size", 45).returncode == 0
    finished = seresvit("predict", model, tmp_path / "other" / "110keV" / "P001", tmp_path / "out")
    assert finished.returncode == 0, finished.stderr
    from seresvit.data import read_volume

    assert read_volume(tmp_path / "out").array.shape == (2, 45, 45)


def test_an_unwritable_output_is_named_and_nothing_is_left(seresvit, patients, tmp_path, model):
    (tmp_path / "file").write_text("")
    source = patients / "dicom" / "110keV" / "P001"
    one_line(seresvit("predict", model, source, tmp_path / "file" / "out"), 1, "file/out", "cannot be written")
    one_line(seresvit("simulate", tmp_path / "file" / "x"), 1, "cannot be written")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_convert_there_and_back_is_bit_exact(seresvit, tmp_path, model):
    import torch

    assert seresvit("convert", model, tmp_path / "G.pth").returncode == 0
    finished = seresvit(
        "convert", tmp_path / "G.pth", tmp_path / "again.safetensors", "--set", "data.window_hu=[-500,500]"
    )
    assert finished.returncode == 0, finished.stderr
    before, after = checkpoint.load(model), checkpoint.load(tmp_path / "again.safetensors")
    assert all(torch.equal(after.state_dict()[k], v) for k, v in before.state_dict().items())
    assert after.header["data"]["window_hu"] == [-500.0, 500.0]
    one_line(seresvit("convert", model, tmp_path / "model.xyz"), 2, ".pth")


@pytest.mark.parametrize("words", [["predict"], ["train", "--nonsense"], ["nonsense"]])
def test_bad_usage_exits_with_two(seresvit, words):
    finished = seresvit(*words)
    assert finished.returncode == 2 and "Traceback" not in finished.stderr


def test_as_a_process_of_its_own_the_exit_code_and_the_line_are_the_same(seresvit, tmp_path):
    words = ["train", str(tmp_path / "none.yaml"), "--manifest", "manifest.csv", "--run-dir", str(tmp_path / "run")]
    alone = subprocess.run([sys.executable, "-m", "seresvit", *words], capture_output=True, text=True)
    within = seresvit(*words)
    assert (alone.returncode, alone.stdout, alone.stderr) == (within.returncode, within.stdout, within.stderr)
    one_line(alone, 2, "none.yaml", "cannot be read")
