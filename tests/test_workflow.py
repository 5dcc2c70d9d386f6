"""The whole path on simulated patients, through the commands: what each leaves for the next, and for a person."""

import pandas as pd
import pytest

from seresvit.config import shipped_config

SMALL = [
    "model.base_channels=8",
    "model.vit={depth: 1, width: 16, heads: 2, mlp_width: 16, dropout: 0}",
    "train.size=32",
    "train.validate_every_images=80",
    "train.stage1.num_images=160",
    "train.stage2.num_images=160",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, seresvit):
    """Everything from simulated DICOM to the report, with the shipped tiny config made smaller still."""
    out = tmp_path_factory.mktemp("workflow")

    def done(*words):
        finished = seresvit(*words)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    manifest, run, best = out / "manifest.csv", out / "run", out / "run/checkpoints/best/model.safetensors"
    done("simulate", out / "dicom", "--patients", 5, "--slices", 4, "--size", 40, "--kev", "70,110,115")
    words = ["--source", "110keV,115keV", "--target", "70keV", "--out", manifest]
    done("audit", out / "dicom", *words, "--val", "P003", "--test", "P004,P005", "--workers", 1)
    settings = [word for setting in SMALL for word in ("--set", setting)]
    done("train", shipped_config("tiny.yaml"), "--manifest", manifest, "--run-dir", run, *settings)
    done("predict", best, manifest, out / "predictions")
    words = ["--manifest", manifest, "--protocol", "dect", "--out", out / "evaluation"]
    (out / "table.txt").write_text(done("evaluate", out / "predictions", *words))
    done("explain", best, "--manifest", manifest, "--out", out / "evaluation")
    return out


def test_every_promised_file_is_there(folder):
    evaluation = ["slices.csv", "cases.csv", "summary.csv", "evaluation.xlsx", "gates.csv", "gates.json", "report.html"]
    for name in [*(f"evaluation/{n}" for n in evaluation), "audit.json", "run/config.yaml", "run/manifest.json"]:
        assert (folder / name).is_file(), name
    names = sorted(p.name for p in (folder / "predictions").iterdir())
    assert names == ["P004_110keV", "P004_115keV", "P005_110keV", "P005_115keV"]
    assert not list(folder.rglob(".writing-*"))


def test_the_table_has_the_baselines_beside_the_network(folder):
    summary = pd.read_csv(folder / "evaluation/summary.csv")
    baselines = {"source unchanged", "linear fit", "two-energy fit", "intensity curve"}
    assert set(summary["method"]) == {"synthetic", *baselines}
    assert set(summary["source"]) == {"110keV", "115keV", "all"}
    text = (folder / "table.txt").read_text()
    assert "source" in text and "unchanged" in text and "MAE bone" in text


def test_a_little_training_already_approaches_the_target(folder):
    cases = pd.read_csv(folder / "evaluation/cases.csv").groupby("method")["mae_bone"].mean()
    assert cases["synthetic"] < cases["source unchanged"]


def test_the_report_shows_scores_images_gates_and_training(folder):
    page = (folder / "evaluation/report.html").read_text()
    for part in ("source unchanged", "transformer", "data:image/png;base64", "not a medical device", "val"):
        assert part in page, part
    gates = pd.read_csv(folder / "evaluation/gates.csv")
    assert len(gates) == 4 * 4 and {"art_1_transformer", "art_1_cnn", "art_6_transformer"} <= set(gates.columns)
