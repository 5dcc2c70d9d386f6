"""The report page of a small random network on simulated patients, parsed by html.parser and opened by Chromium."""

import base64
import gzip
import hashlib
import io
import json
import os
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image

import seresvit
from seresvit.config import Config, DataSettings, ModelSettings, VitSettings, to_yaml
from seresvit.data.pairing import Case, write_manifest
from seresvit.data.phantom import simulate
from seresvit.data.volume import DataError
from seresvit.evaluation import report
from seresvit.evaluation.charts import agreement, bland_altman, distributions
from seresvit.evaluation.evaluate import evaluate
from seresvit.evaluation.explain import explain
from seresvit.evaluation.page import read_table, write_page
from seresvit.evaluation.panels import CaseImages, load_case, load_slices, read_predictions
from seresvit.evaluation.provenance import trained
from seresvit.evaluation.ranking import chosen_cases
from seresvit.evaluation.report import _gates, write_report
from seresvit.evaluation.statistics import signed
from seresvit.evaluation.viewer import linked_views, scripts
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis.predict import Predictor, predict_manifest


class Page(HTMLParser):
    """All tags with their attributes, the text outside of style and scripts, and the scripts by their type."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.inside, self.scripts, self.rows = [], "", "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "tr":
            self.rows.append("")
        if tag == "script":
            self.scripts.append([dict(attrs).get("type", ""), ""])

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1][1] += data
        elif self.inside != "style":
            self.text += data
            if self.rows:
                self.rows[-1] += f" {data}"

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
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    assert all(image["alt"] for image in page.images())
    assert "url(" not in "".join(attributes.get("style", "") or "" for _, attributes in page.tags)


def test_the_policy_lets_no_other_script_run(page):
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    run = [text for kind, text in page.scripts if not kind]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        "script-src " + " ".join(f"'sha256-{digest}'" for digest in hashes),
    ]
    vendored = Path(seresvit.__file__).parent / "viewer"
    assert run == [(vendored / name).read_text(encoding="utf-8") for name in ("niivue.js", "linked.js")]
    assert "BSD 2-Clause License" in (vendored / "niivue.LICENSE").read_text()


def test_the_page_warns_and_holds_the_numbers_of_the_summary(folder, page):
    assert "Synthetic images. Research software, not a medical device." in page.text
    text = page.text.replace("−", "-")
    summary = pd.read_csv(folder / "evaluation" / "summary.csv")
    assert {"synthetic", "source unchanged", "intensity curve"} <= set(summary["method"])
    for row in summary.to_dict("records"):
        assert row["method"] in text
        for metric in ("mae", "rmse", "psnr"):
            assert f"{row[f'{metric}_mean']:.2f} ± {row[f'{metric}_std']:.2f}" in text
        assert f"{row['ssim_mean']:.4f} ± {row['ssim_std']:.4f}" in text
        if row["source"] == "all":
            for region in ("bone", "contrast", "hu_bone"):
                assert f"{row[f'mae_{region}_mean']:.2f}" in text
    network = summary[(summary["source"] == "all") & (summary["method"] == "synthetic")].iloc[0]
    assert f"{network['bias_bone_mean']:+.2f}" in text
    assert f"{network['dice_bone_mean']:.3f}" in text


def test_the_page_says_what_the_statistics_say(folder, page):
    statistics = pd.read_csv(folder / "evaluation" / "statistics.csv")
    for sentence in statistics.loc[statistics["metric"] == "mae", "sentence"]:
        assert sentence in page.text
    for mean in statistics["mean"]:
        assert any(f"{mean:+.{digits}f}".replace("-", "−") in page.text for digits in (2, 4))


def test_the_best_of_each_column_is_bold(folder):
    html = (folder / "evaluation" / "report.html").read_text(encoding="utf-8").replace("−", "-")
    summary = pd.read_csv(folder / "evaluation" / "summary.csv")
    for _, rows in summary.groupby("source"):
        assert len(rows) > 2
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


def test_the_channels_that_bone_needs_are_told_by_tissue_and_every_gate_with_its_ends(folder, page):
    """The first row of the ranking and both blocks' spreads against gates.csv and channels.csv."""
    images, channels = (pd.read_csv(folder / "evaluation" / f"{name}.csv") for name in ("gates", "channels"))
    first = channels.loc[channels["mae_change_bone"].idxmax()]
    rows = [" ".join(row.split()) for row in page.rows]
    place = f"{first['block'].replace('art_', 'ART ')}, channel {first['channel']}"
    row = next(row for row in rows if row.startswith(place))
    assert f"{first['mean']:.3f}" in row and " 1 " in row
    for tissue in ("bone", "soft", "lung"):
        assert signed(first[f"mae_change_{tissue}"]) in row
    for block in ("art_1", "art_6"):
        std, dead = images[f"{block}_std"], images[f"{block}_dead"]
        words = (
            f"{std.mean():.4f} ({std.min():.4f} to {std.max():.4f}) {dead.mean():.3g} ({dead.min()} to {dead.max()})"
        )
        assert any(words in row for row in rows)


def test_patients_are_joined_by_lines_from_each_rival_to_the_network(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "slopes", lambda means, pairs, *more: drawn.append((means, pairs, *more)) or "")
    write_report(folder / "evaluation")
    patients = pd.read_csv(folder / "evaluation" / "patients.csv").set_index(["patient", "method"])["mae"]
    means, pairs, *words = drawn[0]
    assert (
        pairs == [(rival, "synthetic") for rival in patients["P002"].index if rival != "synthetic"] and len(pairs) > 2
    )
    assert words == ["MAE", "HU", False]
    for patient in ("P002", "P003", "P004"):
        assert means.loc[patient].to_dict() == patients[patient].to_dict()


def test_the_viewer_holds_the_images_as_they_lie_in_the_patient(folder, page):
    """The case of median error: its NIfTI, read by nibabel, against what pydicom reads of the slices."""
    slices = pd.read_csv(folder / "evaluation" / "slices.csv")
    ranked = slices[slices["method"] == "synthetic"].groupby(["patient", "source"])["mae"].mean().sort_values()
    patient, source = ranked.index[(len(ranked) - 1) // 2]
    assert f"{patient}, {source} → 70keV, the case with the median error" in page.text
    told = json.loads(next(text for kind, text in page.scripts if kind == "application/json"))
    places = {"source": ("images", source, patient), "target": ("images", "70keV", patient)}
    places |= {"synthetic": ("predictions", f"{patient}_{source}")}
    assert [view["name"] for view in told["views"]] == ["source", "synthetic", "target"]
    for view in told["views"]:
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(view["nifti"])))
        planes = [pydicom.dcmread(path) for path in folder.joinpath(*places[view["name"]]).glob("*.dcm")]
        planes.sort(key=lambda plane: float(plane.ImagePositionPatient[2]))
        expected = np.stack([p.pixel_array * float(p.RescaleSlope) + float(p.RescaleIntercept) for p in planes])
        assert image.get_data_dtype() == np.int16
        assert np.abs(image.get_fdata().transpose(2, 1, 0) - expected).max() <= 0.5
        for z, plane in enumerate(planes):
            corner_ras = image.affine @ [0, 0, z, 1]
            assert np.allclose(corner_ras[:3] * [-1, -1, 1], np.array(plane.ImagePositionPatient, float), atol=1e-3)
    assert told["positions_mm"] == [float(plane.ImagePositionPatient[2]) for plane in planes]


def test_a_large_case_is_shown_in_part_and_the_page_says_so():
    rng = np.random.default_rng(0)
    source, target, synthetic = rng.normal(0, 200, (3, 12, 300, 301)).astype(np.float32)
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    positions_mm = 2.0 * np.arange(12)
    case = CaseImages(source, target, synthetic, "HU", "HU", affine, positions_mm, (2.0, 0.5, 0.5), True)
    views = linked_views(case, (-160.0, 240.0), start=10, most_bytes=400_000)
    assert sum(len(base64.b64decode(view["nifti"])) for view in views["views"]) <= 400_000
    first, last = views["slices"][0], views["slices"][-1]
    assert 0 < first <= 10 <= last < 12 and views["slices"][views["start"]] == 10
    assert "2 × 2 pixels are averaged into one" in views["part"]
    assert f"slices {first} to {last} of 0 to 11 are shown" in views["part"]
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(views["views"][2]["nifti"])))
    averaged = target[first : last + 1, :, :300].reshape(-1, 150, 2, 150, 2).mean(axis=(2, 4))
    assert np.abs(image.get_fdata().transpose(2, 1, 0) - averaged).max() <= 0.5 + 1e-3
    # The first voxel's centre is that of the four that it is the mean of.
    assert np.allclose(image.affine @ [0, 0, 0, 1], [-0.25, -0.25, 2.0 * first, 1])
    assert linked_views(case, (-160.0, 240.0), start=0)["part"] == views["part"].split(" and ")[0] + "."


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


def test_what_was_not_predicted_is_no_reason_for_no_page(folder, tmp_path):
    predictions, manifest = tmp_path / "predictions", folder / "manifest.csv"
    shutil.copytree(folder / "predictions" / "P002_90keV", predictions / "P002_90keV")
    last = max((predictions / "P002_90keV").glob("*.dcm"), key=lambda f: pydicom.dcmread(f).ImagePositionPatient[2])
    last.unlink()
    found, _ = read_predictions(predictions, manifest)
    case = load_case(found[0])
    assert (case.synthetic[2] == -1024).all() and (case.synthetic[:2] > -1024).any()
    lines = [{"slice": 1}, {"slice": 2}]
    shown = load_slices([{"patient": "P002", "source": "90keV", "slices": lines}], found)
    assert [line for line, _ in shown] == lines[:1] and (shown[0][1].synthetic == case.synthetic[1]).all()


def test_examples_of_another_grid_are_not_shown_by_their_number(folder):
    explained = json.loads((folder / "evaluation" / "gates.json").read_text())
    found, _ = read_predictions(folder / "predictions", folder / "manifest.csv")
    assert _gates(folder / "evaluation", explained, found)["panels"]
    resampled = [replace(prediction, record=prediction.record | {"resample": "source"}) for prediction in found]
    assert not _gates(folder / "evaluation", explained, resampled)["panels"]


def test_charts_take_metrics_without_a_number_and_labels_with_dollars():
    case = {"method": "synthetic", "mae": 1.0, "rmse": 1.0, "psnr": np.inf, "ssim": np.nan}
    case |= {f"{name}_a$\\foo$": number for name, number in (("bias", 1.0), ("loa_low", 0.0), ("loa_high", 2.0))}
    for chart in (distributions, agreement):
        assert chart(pd.DataFrame([case]), "dect").startswith("data:image/png")
    values = np.linspace(-100, 100, 50)
    for target, synthetic in ((values, values), (0 * values, 0 * values + 1)):
        assert bland_altman(target, synthetic, "HU").startswith("data:image/png")


def test_cases_are_ranked_by_their_own_score(folder):
    cases, slices = (read_table(folder / "evaluation" / f"{name}.csv") for name in ("cases", "slices"))
    cases.loc[(cases["patient"] == "P004") & (cases["source"] == "90keV"), "mae"] = 1e6  # as volume protocols may say
    worst = chosen_cases(cases, slices)[-1]
    assert (worst["patient"], worst["source"], worst["mae"]) == ("P004", "90keV", 1e6)


def test_a_network_beside_a_comparison_is_told_without_its_run(folder, tmp_path):
    path = tmp_path / "stage-1" / "seed0" / "model.safetensors"
    path.parent.mkdir(parents=True)
    shutil.copy(folder / "runs" / "first" / "checkpoints" / "best" / "model.safetensors", path)
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    (tmp_path / "manifest.json").write_text('{"data_hash": "0"}')
    assert "Network" in dict(trained(path, [])["facts"])


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


def test_chromium_opens_the_page_without_a_fault(folder, opened):
    for width in (1280, 400):
        view = opened(folder / "evaluation" / "report.html", width)
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        assert view.evaluate("document.images.length") > 20
        assert view.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


def test_chromium_scrolls_the_linked_views(tmp_path, opened):
    """Three volumes of noise, each another: all are drawn, and the wheel over one of them moves all."""
    source, target, synthetic = np.random.default_rng(0).normal(0, 150, (3, 5, 32, 32)).astype(np.float32)
    positions_mm = np.array([-4.0, -2.0, 0.0, 2.0, 4.0])
    geometry = np.diag([1.0, 1.0, 2.0, 1.0]), positions_mm, (2.0, 1.0, 1.0)
    views = linked_views(CaseImages(source, target, synthetic, "HU", "HU", *geometry, True), (-160.0, 240.0), start=1)
    facts = {"patient": "P1", "source": "90keV", "part": views.pop("part"), "volumes": views}
    path = write_page(tmp_path / "page.html", "report.html.j2", {"missing": [], "viewer": facts}, scripts())
    view = opened(path, 1280)
    view.wait_for_selector("#viewer[data-ready]", timeout=60_000)
    canvases = view.query_selector_all("#viewer canvas")
    screens = view.query_selector_all("#viewer .screen")

    def seen():
        view.wait_for_timeout(300)
        return [np.asarray(Image.open(io.BytesIO(screen.screenshot())).convert("L"), float) for screen in screens]

    def values():
        return [caption.inner_text().replace("−", "-") for caption in view.query_selector_all("#viewer figcaption")]

    before = seen()
    assert len(before) == 3 and all(image.std() > 20 for image in before)
    assert view.inner_text("#viewer output") == "slice 1 at −2 mm"
    canvases[1].hover()
    view.mouse.wheel(0, 100)
    scrolled = seen()
    place = int(view.inner_text("#viewer output").split()[1])
    assert place != 1 and view.eval_on_selector("#viewer input", "slider => slider.value") == str(place)
    assert all(np.abs(a - b).mean() > 5 for a, b in zip(before, scrolled, strict=True))
    # The crosshair of each stands at one voxel of one slice, whose value is told.
    for name, volume, words in zip(
        ("source", "synthetic", "target"), (source, synthetic, target), values(), strict=True
    ):
        value = float(words.removeprefix(f"{name}: ").removesuffix(" HU"))
        assert np.abs(volume[place] - value).min() <= 0.5
    view.select_option("#viewer select", "bone")
    assert all(np.abs(a - b).mean() > 5 for a, b in zip(scrolled, seen(), strict=True))
