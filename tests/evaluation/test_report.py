"""The report page of a small random network on simulated patients, parsed by html.parser and opened by Chromium."""

import base64
import io
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image

from seresvit.config import Config, DataSettings, ModelSettings, VitSettings, to_yaml
from seresvit.data.pairing import Case, write_manifest
from seresvit.data.phantom import simulate
from seresvit.data.volume import DataError
from seresvit.evaluation.evaluate import evaluate
from seresvit.evaluation.gates import explain
from seresvit.evaluation.report import write_report
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis.predict import Predictor, predict_manifest

CHROMIUM = Path("/usr/bin/chromium")


class Page(HTMLParser):
    """All tags with their attributes, and the text outside of style."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        self.text += "" if self.inside == "style" else data

    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def write_run(root):
    """A run folder such as training writes, with weights that nobody trained, and a resumed log."""
    torch.manual_seed(0)
    vit = VitSettings(depth=1, width=32, heads=2, mlp_width=32)
    path = root / "runs" / "first" / "checkpoints" / "best" / "model.safetensors"
    path.parent.mkdir(parents=True)
    header = {
        "data": DataSettings().model_dump(mode="json"),
        "train_size": [48, 48],
        "sources": ["110keV", "90keV"],
        "target": "70keV",
        "target_intensity": {"kind": "window", "low": -1024.0, "high": 3071.0, "unit": "HU"},
        "run": "first",
        "stage": 2,
        "images": 1234,
        "val_mae": 56.78,
    }
    checkpoint.save(Generator(ModelSettings(base_channels=4, token_grid=(3, 3), vit=vit)), path, header)
    run = path.parents[2]
    (run / "config.yaml").write_text(to_yaml(Config()))
    made = {"seresvit": "0.1.0", "commit": "abc1234", "python": "3.12", "torch": "2.x", "device": "cpu", "seed": 7}
    made |= {"device_name": "x86_64", "precision": "32-true"}
    made |= {"num_slices": {"train": 1111, "val": 22}, "num_patients": {"train": 33, "val": 4}}
    (run / "manifest.json").write_text(json.dumps(made))
    log = [(1, 100, 80.0), (1, 200, 70.0), (2, 100, 65.0), (2, 200, 64.0), (2, 100, 66.0), (2, 1234, 56.78)]
    lines = [
        {"stage": stage, "images": images, "learning_rate": 1e-4, **values}
        for stage, images, mae in log
        for values in ({"l1": 0.1, "adversarial": 0.3, "discriminator": 0.2, "images_per_s": 9.0}, {"val_mae": mae})
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four simulated patients, three of them tested from two sources, predicted, evaluated and explained."""
    root = tmp_path_factory.mktemp("report")
    images = root / "images"
    simulate(images, patients=4, slices=3, size=48, kev=(70, 90, 110))
    cases = [
        Case(
            f"P00{number}",
            "train" if number == 1 else "test",
            source,
            "70keV",
            images / source / f"P00{number}",
            images / "70keV" / f"P00{number}",
            images / "labels" / f"P00{number}.nii.gz",
        )
        for number in (1, 2, 3, 4)
        for source in ("90keV", "110keV")
    ]
    write_manifest(cases, root / "manifest.csv")
    predictor = Predictor(write_run(root), "cpu")
    assert not predict_manifest(predictor, root / "manifest.csv", root / "predictions")
    evaluate(root / "predictions", root / "manifest.csv", "dect", root / "evaluation")
    write_report(root / "evaluation", root / "predictions", root / "manifest.csv")
    explain(predictor, root / "manifest.csv", root / "evaluation")
    write_report(root / "evaluation")
    return root


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "evaluation" / "report.html")


def test_everything_is_inside_the_page(page):
    assert ("html", {"lang": "en"}) in page.tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    assert all(image["alt"] for image in page.images())
    assert "url(" not in "".join(attributes.get("style", "") or "" for _, attributes in page.tags)


def test_the_page_warns_and_holds_the_numbers_of_the_summary(folder, page):
    assert "Synthetic images. Research software, not a medical device." in page.text
    summary = pd.read_csv(folder / "evaluation" / "summary.csv")
    assert set(summary["method"]) == {"synthetic", "source unchanged", "intensity curve"}
    for row in summary.to_dict("records"):
        assert row["method"] in page.text
        for metric in ("mae", "rmse", "psnr", "mae_bone", "mae_contrast"):
            assert f"{row[f'{metric}_mean']:.2f} ± {row[f'{metric}_std']:.2f}" in page.text
        assert f"{row['ssim_mean']:.4f} ± {row['ssim_std']:.4f}" in page.text


def test_the_best_of_each_column_is_bold(folder):
    html = (folder / "evaluation" / "report.html").read_text()
    summary = pd.read_csv(folder / "evaluation" / "summary.csv")
    for _, rows in summary.groupby("source"):
        for metric, best in (("mae", rows["mae_mean"].idxmin()), ("psnr", rows["psnr_mean"].idxmax())):
            for index, row in rows.iterrows():
                cell = f"{row[f'{metric}_mean']:.2f} ± {row[f'{metric}_std']:.2f}"
                assert (f"<b>{cell}</b>" in html) == (index == best)


def test_what_was_trained_is_told_from_the_run_folder(page):
    for words in ("33 to train (1,111 slices)", "4 to validate (22 slices)", "stage 2 after 1,234 images"):
        assert words in page.text
    for words in ("validation MAE 56.8 HU", "200 in stage 1 and 1,234 in stage 2", "commit abc1234", "window_hu:"):
        assert words in page.text


def test_panels_show_the_target_in_the_window_and_the_error_in_its_colours(folder, page):
    """The first panel against images made here from the arrays: the case with the lowest MAE, its median slice."""
    slices = pd.read_csv(folder / "evaluation" / "slices.csv")
    of_network = slices[slices["method"] == "synthetic"]
    patient, source = of_network.groupby(["patient", "source"])["mae"].mean().idxmin()
    rows = of_network[(of_network["patient"] == patient) & (of_network["source"] == source)].sort_values("mae")
    median = int(rows.iloc[1]["slice"])

    def hu(directory):
        planes = [pydicom.dcmread(path) for path in directory.glob("*.dcm")]
        planes.sort(key=lambda plane: float(plane.ImagePositionPatient[2]))
        return planes[median].pixel_array * float(planes[median].RescaleSlope) + float(planes[median].RescaleIntercept)

    shown = {}
    for image in page.images():
        name = image["alt"].split(",")[0].split(" ")[0].lower()
        png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        shown.setdefault(name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float))
    target, synthetic = hu(folder / "images" / "70keV" / patient), hu(folder / "predictions" / f"{patient}_{source}")
    assert "level 150, width 700 HU" in page.text  # the simulated patients hold iodine
    for name, values in (("target", target), ("synthetic", synthetic)):
        expected = np.clip((values + 200) / 700, 0, 1) * 255
        assert np.abs(shown[name][..., 0] - expected).max() < 2
    error = synthetic - target
    red, _, blue = np.moveaxis(shown["error"], -1, 0)
    assert (red > blue)[error > 50].all() and (blue > red)[error < -50].all()


def test_gates_and_their_example_are_told(folder, page):
    explained = json.loads((folder / "evaluation" / "gates.json").read_text())
    assert explained["finding"] in page.text
    for example in explained["examples"]:
        for shares in example["shares"].values():
            assert f"{shares['transformer']:.4f}" in page.text and f"{shares['cnn']:.4f}" in page.text
    plot = base64.b64encode((folder / "evaluation" / "gates.png").read_bytes()).decode()
    assert any(image["src"].endswith(plot) for image in page.images())


def test_the_folders_are_remembered_relative_to_the_report(folder, tmp_path):
    memory = json.loads((folder / "evaluation" / "report.json").read_text())
    assert memory == {"predictions": os.path.join("..", "predictions"), "manifest": os.path.join("..", "manifest.csv")}
    moved = tmp_path / "evaluation"
    shutil.copytree(folder / "evaluation", moved)
    page = Page(write_report(moved))
    assert "No images are shown" in page.text and not any(image["alt"].startswith("Target") for image in page.images())


def test_pixels_that_are_not_square_are_shown_so(tmp_path):
    """One slice of 16 rows 2 mm apart and 24 columns 1 mm apart, with a prediction that nobody's checkpoint made."""
    values = np.random.default_rng(0).uniform(-1000, 1000, (24, 16, 1)).astype(np.float32)
    for name, array in (("source", values), ("target", values + 5), ("predictions/P1_source/synthetic", values + 40)):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -2.0, 3.0, 1.0])), path)
    record = {"patient": "P1", "source": "source", "target": "target", "path": "synthetic.nii.gz", "num_slices": 1}
    record |= {"checkpoint": "/nowhere/model.safetensors", "checkpoint_sha256": "0" * 64, "elapsed_s": 1.0}
    record |= {"intensity": {"kind": "window", "low": -1024, "high": 3071, "unit": "HU"}}
    (tmp_path / "predictions" / "P1_source" / "prediction.json").write_text(json.dumps(record))
    case = Case("P1", "test", "source", "target", tmp_path / "source.nii.gz", tmp_path / "target.nii.gz")
    write_manifest([case], tmp_path / "manifest.csv")
    evaluate(tmp_path / "predictions", tmp_path / "manifest.csv", "dect", tmp_path / "out")
    page = Page(write_report(tmp_path / "out", tmp_path / "predictions", tmp_path / "manifest.csv"))
    shown = [image for image in page.images() if image["alt"].startswith(("Source", "Synthetic", "Target", "Error"))]
    assert [image["style"] for image in shown] == ["aspect-ratio: 24 / 32"] * 4
    assert "further from the target than source unchanged" in page.text
    assert "no longer where it was" in page.text


def test_gates_alone_make_a_page_and_an_empty_folder_does_not(folder, tmp_path):
    for name in ("gates.csv", "gates.json", "gates.png"):
        shutil.copy(folder / "evaluation" / name, tmp_path / name)
    page = Page(write_report(tmp_path))
    assert "What the gates did" in page.text and "PSNR" not in page.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither"):
        write_report(tmp_path / "empty")
    (tmp_path / "gates.json").write_text("{")
    with pytest.raises(DataError, match=r"gates\.json: cannot be read"):
        write_report(tmp_path)


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs Debian's chromium at {CHROMIUM}")
def test_chromium_opens_the_page_without_a_fault(folder):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    said = []
    with playwright.sync_playwright() as run:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = run.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        for width in (1280, 400):
            view = browser.new_page(viewport={"width": width, "height": 800})
            view.on("console", lambda message: said.append(message.text))
            view.on("pageerror", lambda error: said.append(str(error)))
            view.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
            view.goto((folder / "evaluation" / "report.html").as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            assert view.evaluate("document.images.length") > 20
            assert view.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        browser.close()
    assert said == []
