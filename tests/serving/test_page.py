"""The page in Chromium against the real server: what a person gives, watches, sees and takes home."""

import gzip
import io
import json
import re
import shutil
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
import uvicorn
from PIL import Image

from seresvit.config import DataSettings, FusionSettings, ModelSettings, VitSettings
from seresvit.data import phantom, read_volume
from seresvit.data.checks import of_one_image
from seresvit.model import checkpoint
from seresvit.model.generator import Generator, start_as_identity
from seresvit.serving.api import Served, make_app
from seresvit.serving.jobs import Jobs
from seresvit.serving.uploads import Bounds
from seresvit.serving.views import PAGE_FILES
from seresvit.serving.worker import Worker
from seresvit.synthesis.predictor import Predictor

WORDS = json.loads(PAGE_FILES["words.json"].read_text(encoding="utf-8"))
SIDE, SLICES = 128, 6
TOKEN = "0123456789abcdef"
AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
# What Chromium itself writes of an answer that is an error.
REPORTED = "Failed to load resource"


def word(key, language="en", **values):
    return re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), WORDS[language][key])


def saved(path, fusion):
    """A network that nobody trained: it roughly returns its source, and its gates differ between slices."""
    torch.manual_seed(0)
    vit = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
    settings = ModelSettings(
        base_channels=8, token_grid=(2, 2), vit=vit, fusion=FusionSettings(kind=fusion), norm="instance"
    )
    network = Generator(settings)
    start_as_identity(network)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".fuse.gate." in name:
                weight.mul_(3)
    header = {
        "data": {"window_hu": [-1024, 2048]},
        "train_size": [SIDE, SIDE],
        "target_intensity": {"kind": "window", "low": -1626.0, "high": 434.0, "unit": "HU"},
        "sources": ["110keV"],
        "target": "70keV",
        "spacing_mm_yx": [10.0, 10.0],
    }
    checkpoint.save(network, path, header)
    return path


class Server:
    """The real server, in a thread; `pause_s` is how long the network takes longer for a batch."""

    def __init__(self, folder, predictors, token=""):
        self.folder, self.predictors, self.token = folder, predictors, token
        self.pause_s, self.port = 0.0, 0
        self.start()

    def start(self):
        self.jobs = Jobs(self.folder, most_waiting=2)
        self.jobs.recover()
        self.worker, self.stopping = Worker(self.jobs, self.predictors), threading.Event()
        served = Served(self.jobs, self.predictors, self.worker, Bounds(most_bytes=20_000_000), self.token)
        config = uvicorn.Config(make_app(served), port=self.port, log_config=None, lifespan="off")
        self.web = uvicorn.Server(config)
        self.threads = [
            threading.Thread(target=self.web.run, daemon=True),
            threading.Thread(target=self.worker.run, args=(self.stopping,), daemon=True),
        ]
        for thread in self.threads:
            thread.start()
        while not self.web.started:
            time.sleep(0.02)
        self.port = self.web.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.web.should_exit = True
        self.stopping.set()
        self.worker.woken.set()
        for thread in self.threads:
            thread.join(30)
        self.jobs.close()

    def job(self, view):
        return self.jobs.get(view.evaluate("location.hash").removeprefix("#"))


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A simulated patient as DICOM: a folder of six slices of 128 × 128."""
    root = tmp_path_factory.mktemp("patient")
    phantom.simulate(root, patients=1, slices=SLICES, size=SIDE, kev=(70, 110))
    return root / "110keV" / "P001"


@pytest.fixture(scope="module")
def predictors(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        fusion: Predictor(saved(root / f"{fusion}.safetensors", fusion), "cpu")
        for fusion in ("se", "concat", "attention-gate")
    }


@pytest.fixture(scope="module")
def server(predictors, tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("served") / "jobs", predictors)
    for predictor in predictors.values():
        predictor.batch_size = 1
        predictor.net.register_forward_pre_hook(lambda *_: time.sleep(running.pause_s))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browsing(chromium):
    """A function that opens a page; what it says on the console, and every request that leaves the server, is kept."""
    contexts = []

    def browse(url, width=1280, language="en-US", ready="#start .choices label", **options):
        context = chromium.new_context(viewport={"width": width, "height": 820}, locale=language, **options)
        contexts.append(context)
        view = context.new_page()
        view.set_default_timeout(20_000)
        view.said = []
        view.on("console", lambda message: view.said.append(message.text))
        view.on("pageerror", lambda error: view.said.append(str(error)))
        view.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else view.said.append(r.url))
        view.goto(f"{url}/")
        view.wait_for_selector(ready)
        return view

    yield browse
    for context in contexts:
        context.close()


@pytest.fixture
def opened(server, browsing):
    """`browsing` of the server at full speed; the test fails when a page says anything."""
    server.pause_s, views = 0.0, []

    def browse(**options):
        views.append(browsing(server.url, **options))
        return views[-1]

    yield browse
    server.pause_s = 0.0
    for view in views:
        said = [line for line in view.said if not line.startswith(REPORTED)]
        view.context.close()
        assert said == []


def give(view, *paths):
    """Chooses a folder or files, and sends them."""
    view.set_input_files("#folder" if paths[0].is_dir() else "#files", list(paths))
    view.click("#start [type=submit]")


@pytest.fixture(scope="module")
def finished(server, browsing, patient):
    """A page with the views of a finished job; tests leave slice, window and language as they found them."""
    view = browsing(server.url)
    give(view, patient)
    view.wait_for_selector("#viewer[data-ready]")
    yield view
    assert view.said == []


@pytest.fixture
def shown(finished):
    """That page, at the middle slice, fitted, soft tissue."""
    finished.click("#difference label:nth-child(1)")
    finished.click("#windows label:nth-child(1)")
    finished.click("[data-zoom=reset]")
    finished.locator("#slice").fill(str((SLICES - 1) // 2))
    return finished


def pixels(view, name):
    """The view of that name as it is on the screen, grey, without its edges, where letters and badge stand."""
    picture = Image.open(io.BytesIO(view.locator(f'[data-name="{name}"] .screen').screenshot()))
    values = np.asarray(picture.convert("RGB"), float)
    return values[30:-30, 30:-30]


def told(view, name):
    """The value at the crosshair."""
    text = view.inner_text(f'[data-name="{name}"] output')
    return float(text.replace("−", "-").replace(",", "").removesuffix(" HU"))


def place(view):
    return int(view.input_value("#slice"))


def view_of(server, view):
    return json.loads((server.job(view).view / "view.json").read_text())


# Start.


def test_the_start_page_lists_the_networks_and_warns(opened):
    view = opened()
    assert [label.split("\n")[0] for label in view.locator("#models label").all_inner_texts()] == [
        "se",
        "concat",
        "attention-gate",
    ]
    assert "110 keV → 70 keV" in view.inner_text("#models label:first-child")
    assert view.is_checked("#models label:first-child input")
    assert "computed, not acquired. Not for diagnosis" in view.inner_text("header")
    assert view.title() == "Make a synthetic image · SE-ResViT"
    assert view.evaluate("document.activeElement.textContent") == "Make a synthetic image"


def test_nothing_is_sent_before_images_are_chosen(opened, server, patient):
    view = opened()
    view.click("#start [type=submit]")
    assert view.inner_text("#refused") == word("none_chosen")
    view.set_input_files("#folder", patient)
    assert re.match(rf"{SLICES} files, \d", view.inner_text("#chosen"))
    view.click("#clear")
    assert view.is_hidden("#chosen") and not view.evaluate("location.hash")


def test_the_policy_lets_nothing_from_elsewhere_in(opened, server):
    view = opened()
    policy = view.locator("meta[http-equiv]").get_attribute("content").split("; ")
    assert "default-src 'self'" in policy and not any("unsafe" in rule or "*" in rule for rule in policy)
    html = PAGE_FILES["index.html"].read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|style=|https?://", html)


# From a folder to the views.


def test_a_folder_comes_to_the_views_without_its_names(shown, server, patient):
    job = server.job(shown)
    assert job.state == "done" and job.checkpoint == "se"
    names = json.loads((job.folder / "names.json").read_text()).values()
    assert sorted(names) == [f"{number:05d}.dcm" for number in range(1, SLICES + 1)]
    assert shown.inner_text("#result h1") == "Synthetic 70 keV"
    assert f"{SLICES} slices" in shown.inner_text(".facts")
    captions = shown.locator(".view figcaption b").all_inner_texts()
    assert captions == [
        "Source",
        "Synthetic",
        "Synthetic − source",
    ]
    for name in ("source", "synthetic", "difference"):
        assert pixels(shown, name).std() > 15, name
    assert shown.inner_text('[data-name="synthetic"] .badge') == "SYNTHETIC"


def test_values_at_the_crosshair_are_those_of_the_image(shown, server, patient):
    """Clicks at places of known pixels: the right of the patient is on the left, and no axis is turned round."""
    source = read_volume(patient).array
    synthetic = nibabel.load(server.job(shown).view / "synthetic.nii.gz").get_fdata().transpose(2, 1, 0)
    box = shown.locator('[data-name="source"] .screen').bounding_box()
    for row, column in ((20, 100), (64, 30), (100, 90), (45, 64)):
        at = (column + 0.5) / SIDE * box["width"], (row + 0.5) / SIDE * box["height"]
        shown.mouse.click(box["x"] + at[0], box["y"] + at[1])
        z = place(shown)
        assert told(shown, "source") == round(float(source[z, row, column]))
        assert told(shown, "synthetic") == pytest.approx(synthetic[z, row, column], abs=0.51)
        assert told(shown, "difference") == pytest.approx(synthetic[z, row, column] - source[z, row, column], abs=1.01)


def test_the_wheel_changes_the_slice_of_all_views_and_the_bars(shown, server):
    gates = view_of(server, shown)["gates"]

    def bars():
        return [float(text) for text in shown.locator("#gates .share output").all_inner_texts()]

    def expected(z):
        return [round(gates[block][branch][z], 3) for block in gates for branch in ("transformer", "cnn")]

    before, first = {name: pixels(shown, name) for name in ("source", "synthetic", "difference")}, place(shown)
    assert bars() == pytest.approx(expected(first), abs=6e-4)
    shown.hover('[data-name="synthetic"] .screen')
    for _ in range(3):
        shown.mouse.wheel(0, 120)
    assert place(shown) == first + 3
    for name, earlier in before.items():
        assert np.abs(pixels(shown, name) - earlier).mean() > 1, name
    assert bars() == pytest.approx(expected(first + 3), abs=6e-4)
    assert expected(first) != expected(first + 3)
    width = shown.eval_on_selector("#gates .meter i", "bar => bar.offsetWidth / bar.parentElement.clientWidth")
    assert width == pytest.approx(bars()[0], abs=0.02)
    assert shown.inner_text("#where") == word(
        "place", slice=first + 4, of=SLICES, mm=f"{view_of(server, shown)['positions_mm'][first + 3]:.1f}"
    ).replace("-", "−")
    shown.click('.place [data-step="-1"]')
    assert place(shown) == first + 2


def test_windows_change_the_greys(shown):
    seen = {}
    for number, (level, width) in enumerate(((40, 400), (-600, 1500), (400, 1800), (100, 700)), 1):
        shown.click(f"#windows label:nth-child({number})")
        assert (shown.input_value("#level"), shown.input_value("#width")) == (str(level), str(width))
        seen[number] = {name: pixels(shown, name) for name in ("source", "synthetic", "difference")}
    for one, other in ((1, 2), (2, 3), (3, 4), (1, 4)):
        for name in ("source", "synthetic"):
            assert np.abs(seen[one][name] - seen[other][name]).mean() > 1, (one, other, name)
        assert np.abs(seen[one]["difference"] - seen[other]["difference"]).max() == 0
    shown.locator("#level").fill("-100")
    shown.locator("#level").press("Enter")
    assert not shown.locator("#windows :checked").count()
    assert np.abs(pixels(shown, "source") - seen[4]["source"]).mean() > 1


def test_greys_are_those_of_the_window(shown, patient):
    """Soft tissue: −160 HU is black and 240 HU white; between them it is linear."""
    shown.click("#cross")
    array = read_volume(patient).array[place(shown)]
    greys = np.clip((array + 160) / 400, 0, 1) * 255
    box = shown.locator('[data-name="source"] .screen').bounding_box()
    picture = Image.open(io.BytesIO(shown.locator('[data-name="source"] .screen').screenshot())).convert("L")
    small = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), float)
    inner = slice(20, -20)
    assert box["width"] > SIDE and np.abs(small - greys)[inner, inner].mean() < 8
    shown.click("#cross")


def test_the_difference_lies_beside_over_or_nowhere(shown):
    shown.select_option("#limit", "100")
    plain = pixels(shown, "synthetic")
    shown.click("#difference label:nth-child(2)")
    assert shown.locator('.view[data-name="difference"]').is_hidden()
    over = pixels(shown, "synthetic")
    red, _, blue = over.reshape(-1, 3).T
    assert (np.abs(red - blue) > 40).mean() > 0.02
    shown.select_option("#limit", "1000")
    assert np.abs(pixels(shown, "synthetic") - over).mean() > 1
    shown.click("#difference label:nth-child(3)")
    grey = pixels(shown, "synthetic")
    assert np.abs(grey[..., 0] - grey[..., 2]).mean() < np.abs(over[..., 0] - over[..., 2]).mean() / 4
    shown.click("#difference label:nth-child(1)")
    assert np.abs(pixels(shown, "synthetic") - plain).mean() < 1


def test_colours_of_the_difference_tell_its_sign_without_red_and_green(shown, server):
    shown.select_option("#limit", "100")
    shown.click("#cross")
    difference = nibabel.load(server.job(shown).view / "difference.nii.gz").get_fdata().transpose(2, 1, 0)[place(shown)]
    picture = Image.open(io.BytesIO(shown.locator('[data-name="difference"] .screen').screenshot())).convert("RGB")
    seen = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), float)
    inner = np.s_[20:-20, 20:-20]
    difference, (red, _, blue) = difference[inner], np.moveaxis(seen[inner], -1, 0)
    # Where neighbours agree, so that no interpolation mixes signs.
    higher, lower = (
        np.all([np.roll(difference * sign > 60, move, axis) for move in (-1, 0, 1) for axis in (0, 1)], axis=0)
        for sign in (1, -1)
    )
    assert higher.sum() > 50 and lower.sum() > 50
    assert (red > blue)[higher].mean() > 0.99 and (blue > red)[lower].mean() > 0.99
    shown.click("#cross")


def test_zoom_and_pan_move_all_views_alike(shown):
    before = {name: pixels(shown, name) for name in ("source", "synthetic")}
    for _ in range(4):
        shown.click("[data-zoom=in]")
    zoomed = {name: pixels(shown, name) for name in before}
    box = shown.locator('[data-name="source"] .screen').bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    value = told(shown, "source")
    shown.mouse.move(*middle)
    shown.mouse.down(button="middle")
    shown.mouse.move(middle[0] + 60, middle[1] + 40, steps=4)
    shown.mouse.up(button="middle")
    moved = {name: pixels(shown, name) for name in before}
    for name in before:
        assert np.abs(before[name] - zoomed[name]).mean() > 1
        # What was there lies 60 pixels to the right and 40 down now.
        shifted = np.roll(zoomed[name], (40, 60), (0, 1))[60:-20, 80:-20]
        assert np.abs(moved[name][60:-20, 80:-20] - shifted).mean() < np.abs(moved[name] - zoomed[name]).mean() / 3
    assert told(shown, "source") == value
    shown.click("[data-zoom=reset]")
    assert np.abs(pixels(shown, "source") - before["source"]).mean() < 0.5


def test_the_right_button_sets_level_and_width(shown):
    box = shown.locator('[data-name="source"] .screen').bounding_box()
    shown.mouse.move(box["x"] + 100, box["y"] + 100)
    shown.mouse.down(button="right")
    shown.mouse.move(box["x"] + 160, box["y"] + 130, steps=3)
    shown.mouse.up(button="right")
    assert float(shown.input_value("#width")) == 480 and float(shown.input_value("#level")) == 80


def test_warnings_stand_beside_the_images(shown, server):
    lines = [line.strip() for line in shown.locator("#warnings .warns").all_inner_texts()]
    assert len(lines) == 1 and "the network was trained on 10.00×10.00 mm" in lines[0]


def test_downloads_are_what_their_names_say(shown, server, patient, tmp_path):
    taken = {}
    for number, name in enumerate(("synthetic.zip", "synthetic.nii.gz"), 1):
        with shown.expect_download() as download:
            shown.click(f"#downloads .act button:nth-child({number})")
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        taken[name] = tmp_path / name
        assert name in shown.inner_text("#saving")
    with zipfile.ZipFile(taken["synthetic.zip"]) as archive:
        planes = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    planes.sort(key=lambda plane: float(plane.ImagePositionPatient[2]))
    assert len(planes) == SLICES and all(plane.ImageType[0] == "DERIVED" for plane in planes)
    hu = np.stack([p.pixel_array * float(p.RescaleSlope) + float(p.RescaleIntercept) for p in planes])
    image = nibabel.load(taken["synthetic.nii.gz"]).get_fdata().transpose(2, 1, 0)
    np.testing.assert_allclose(image, hu, atol=0.51)
    shown_there = nibabel.load(server.job(shown).view / "synthetic.nii.gz").get_fdata().transpose(2, 1, 0)
    np.testing.assert_allclose(shown_there, hu, atol=0.51)


def test_the_address_leads_back_to_the_job(opened, finished):
    view = opened()
    view.goto(finished.url)
    view.wait_for_selector("#viewer[data-ready]")
    view.reload()
    view.wait_for_selector("#viewer[data-ready]")
    assert view.inner_text("#result h1") == "Synthetic 70 keV"


# Other ways in.


def test_a_dropped_folder_is_read_to_its_depths(opened, server, patient, tmp_path):
    study = tmp_path / "study"
    shutil.copytree(patient, study / "deep" / "series")
    (study / ".DS_Store").write_text("x")
    view = opened()
    box = view.locator("#drop").bounding_box()
    session = view.context.new_cdp_session(view)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send(
            "Input.dispatchDragEvent",
            {
                "type": kind,
                "x": box["x"] + 50,
                "y": box["y"] + 50,
                "data": {"items": [], "files": [str(study)], "dragOperationsMask": 1},
            },
        )
    view.wait_for_selector("#chosen:not([hidden])")
    assert view.inner_text("#chosen").startswith(f"{SLICES} files")
    view.keyboard.press("Enter")  # the button that sends has the focus
    view.wait_for_selector("#viewer[data-ready]")
    assert len(list(server.job(view).source.iterdir())) == SLICES


def test_a_zip_and_another_network(opened, server, patient, tmp_path):
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for file in patient.iterdir():
            archive.write(file, f"study/{file.name}")
    view = opened()
    view.check("[name=model][value=concat]")
    give(view, tmp_path / "study.zip")
    view.wait_for_selector("#viewer[data-ready]")
    assert server.job(view).checkpoint == "concat"
    assert view.inner_text("#gates .note") == word("gates_none_concat")
    assert not view.locator("#gates .share").count()


def test_a_nifti_has_no_dicom_to_download(opened, patient, tmp_path):
    volume = read_volume(patient)
    image = nibabel.Nifti1Image(volume.array.T.astype(np.int16), np.diag([-1.0, -1, 3, 1]))
    nibabel.save(image, tmp_path / "image.nii.gz")
    view = opened()
    view.check('[name=model][value="attention-gate"]')
    give(view, tmp_path / "image.nii.gz")
    view.wait_for_selector("#viewer[data-ready]")
    assert view.locator("#downloads button.main").all_inner_texts() == ["NIfTI"]
    assert view.inner_text("#gates .note") == word("gates_none_maps", fusion="attention-gate")
    with view.expect_download() as download:
        view.click("#downloads button.main")
    assert np.asarray(nibabel.load(gunzipped(download.value.path(), tmp_path)).dataobj).shape == (SIDE, SIDE, SLICES)


def gunzipped(path, folder):
    (folder / "taken.nii").write_bytes(gzip.decompress(Path(path).read_bytes()))
    return folder / "taken.nii"


# Progress, and what can go wrong.


def test_progress_counts_slices_and_a_job_can_be_cancelled(opened, server, patient):
    server.pause_s = 0.5
    view, second = opened(), opened()
    give(view, patient)
    view.wait_for_selector(".steps .now[data-step=running]")
    give(second, patient)
    second.wait_for_selector(".steps .now[data-step=queued]")
    assert second.inner_text("#work .detail") in (word("next"), word("before_one"))
    view.wait_for_selector(f"#work .detail:text-matches('^[2-5] of {SLICES} slices, about .* left')")
    assert 0 < view.eval_on_selector("#work progress", "bar => bar.value") < 1
    for one in (second, view):
        one.click("#cancel")
        one.wait_for_selector("#failed:not([hidden])")
        assert one.inner_text("#failed .advice") == word("failed_cancelled")
        assert server.job(one).state == "cancelled"
    view.click("#again")
    view.wait_for_selector("#start:not([hidden])")
    assert not view.evaluate("location.hash")


def test_what_is_no_image_is_told_in_a_line(opened, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear colleague")
    view = opened()
    give(view, tmp_path / "letter.txt")
    view.wait_for_selector("#failed:not([hidden])")
    assert view.inner_text("#failed .detail")
    assert "Traceback" not in view.inner_text("main") and str(tmp_path) not in view.inner_text("main")
    assert view.evaluate("document.activeElement.textContent") == word("failed_title")


def test_a_full_queue_is_told_and_tried_again(opened, server, patient):
    server.pause_s = 1.0
    waiting = [opened() for _ in range(3)]
    for view in waiting:
        give(view, patient)
        view.wait_for_selector(".steps .now:is([data-step=queued], [data-step=running])")
    late = opened()
    give(late, patient)
    late.wait_for_selector("#failed:not([hidden])")
    assert late.inner_text("#failed .advice") == word("failed_full")
    for view in reversed(waiting):
        view.click("#cancel")
        view.wait_for_selector("#failed:not([hidden])")
    server.pause_s = 0.0
    late.click("#retry")
    late.wait_for_selector("#viewer[data-ready]")


def test_more_than_the_server_takes_is_told(opened, tmp_path):
    (tmp_path / "large.nii").write_bytes(bytes(21_000_000))
    view = opened()
    give(view, tmp_path / "large.nii")
    view.wait_for_selector("#failed:not([hidden])")
    assert view.inner_text("#failed .advice") == word("failed_large")


def test_a_job_that_is_gone_is_told(opened, server):
    view = opened()
    for address in (f"{server.url}/#{'0' * 32}", f"{server.url}/#../../etc"):
        view.goto(address)
        view.wait_for_selector("#failed:not([hidden])")
        assert view.inner_text("#failed .advice") == word("failed_gone")


def test_results_are_erased_when_asked(opened, server, patient):
    view = opened()
    give(view, patient)
    view.wait_for_selector("#viewer[data-ready]")
    folder = server.job(view).folder
    view.click("#erase")
    view.click("#ask-erase [value=no]")
    assert folder.exists() and view.is_visible("#result")
    view.click("#erase")
    view.click("#ask-erase [value=yes]")
    view.wait_for_selector("#start:not([hidden])")
    assert not folder.exists()


def test_a_server_that_goes_and_comes_back(browsing, predictors, patient, tmp_path):
    own = Server(tmp_path / "jobs", predictors)
    own.pause_s = 0.4
    handles = [p.net.register_forward_pre_hook(lambda *_: time.sleep(own.pause_s)) for p in predictors.values()]
    try:
        view = browsing(own.url)
        give(view, patient)
        view.wait_for_selector(".steps .now[data-step=running]")
        own.stop()
        view.wait_for_selector("#lost:not([hidden])")
        assert view.inner_text("#lost") == word("lost")
        own.pause_s = 0.0
        own.start()
        view.wait_for_selector("#viewer[data-ready]")
        own.stop()
        view.click("#downloads .act button")
        view.wait_for_selector(f"#saving:has-text('{word('failed_net')[:30]}')")
        assert [line for line in view.said if not line.startswith(REPORTED)] == []
    finally:
        for handle in handles:
            handle.remove()
        own.web.should_exit = True


def test_a_token_is_asked_for_once(browsing, predictors, patient, tmp_path):
    own = Server(tmp_path / "jobs", predictors, TOKEN)
    try:
        view = browsing(own.url, ready="#ask-token[open]")
        view.fill("#token", "wrong")
        view.click("#ask-token [type=submit]")
        view.wait_for_selector(f"#ask-token .trouble:has-text('{word('token_wrong')}')")
        view.fill("#token", TOKEN)
        view.click("#ask-token [type=submit]")
        view.wait_for_selector("#start .choices label")
        give(view, patient)
        view.wait_for_selector("#viewer[data-ready]")
        with view.expect_download() as download:
            view.click("#downloads .act button")
        assert zipfile.is_zipfile(download.value.path())
        assert view.evaluate("Object.keys(localStorage).join() + Object.keys(sessionStorage).join()") == "token"
        assert TOKEN not in view.url
        assert [line for line in view.said if not line.startswith(REPORTED)] == []
    finally:
        own.stop()


# Everyone.


def test_both_languages_have_the_same_words(server):
    english, korean = WORDS["en"], WORDS["ko"]
    assert english.keys() == korean.keys()
    for key, text in english.items():
        if isinstance(text, str):
            assert re.findall(r"\{\w+\}", text).sort() == re.findall(r"\{\w+\}", korean[key]).sort(), key
            assert bool(text) == bool(korean[key]), key
    html = PAGE_FILES["index.html"].read_text(encoding="utf-8")
    for key, text in re.findall(r'data-word="(\w+)"[^>]*>([^<]*)<', html):
        assert text in (english[key], ""), key
    for key, text in re.findall(r'data-label="(\w+)" aria-label="([^"]*)"', html):
        assert text == english[key]
    own = (path for name, path in PAGE_FILES.items() if name.endswith(".js") and name != "niivue.js")
    scripts = "".join(path.read_text(encoding="utf-8") for path in own)
    named = set(re.findall(r'\bword\(\s*"(\w+)"', scripts)) | set(re.findall(r'key: "(\w+)"', scripts))
    assert named <= english.keys()


def test_warnings_are_told_in_korean(patient, tmp_path):
    """Sentences as the checks really write them, against the patterns of the words."""
    volume = read_volume(patient)
    tilted = volume.affine.copy()
    tilted[1, 2] += 1.0
    odd = [
        replace(volume, positions_mm=np.array([0, 3, 6, 9, 12, 30.0])),
        replace(volume, affine=tilted),
        replace(volume, set_aside=("RS.dcm: RTSTRUCT",)),
        replace(volume, array=np.full_like(volume.array, 7)),
        replace(volume, array=np.abs(volume.array)),
        replace(volume, array=volume.array + 3000),
        replace(volume, array=volume.array + 700),
    ]
    lines = {line for one in odd for line in of_one_image(one, DataSettings(window_hu=(-1024, 1500)))}
    assert len({line.partition(":")[0] for line in lines}) >= 6
    for line in lines:
        texts = [text for pattern, text in WORDS["ko"]["lines"] if re.fullmatch(pattern, line)]
        assert len(texts) == 1, line
        groups = max(int(number) for number in re.findall(r"\$(\d)", texts[0]))
        assert groups == re.compile(next(p for p, t in WORDS["ko"]["lines"] if t == texts[0])).groups


def test_korean_readers_meet_korean_alone(opened, finished):
    view = opened(language="ko-KR")
    assert view.get_attribute("html", "lang") == "ko"
    assert view.inner_text("#start h1") == WORDS["ko"]["start_title"]
    view.goto(finished.url)
    view.wait_for_selector("#viewer[data-ready]")
    text = view.inner_text("body")
    allowed = r"SE-ResViT|English|70 keV|[Ss]e\b|HU|PE|ART|CNN|DICOM|NIfTI|zip|mm|Page|Up|Down|Shift|Ctrl|[dx]\b"
    assert not re.findall(r"[A-Za-z]{2,}", re.sub(allowed, "", text))
    view.click("[data-language=en]")
    assert view.inner_text("#viewer figcaption b") == "Source" and view.get_attribute("html", "lang") == "en"
    view.reload()
    view.wait_for_selector("#viewer[data-ready]")
    assert view.get_attribute("html", "lang") == "en"


def test_everything_is_done_with_the_keyboard_alone(opened, server, patient, tmp_path):
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for file in patient.iterdir():
            archive.write(file, file.name)
    view = opened()

    def tab_to(selector):
        for _ in range(60):
            if view.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            view.keyboard.press("Tab")
        raise AssertionError(f"{selector} is not reached")

    view.keyboard.press("Tab")
    tab_to("[name=model]")
    view.keyboard.press("ArrowDown")
    assert view.is_checked("[name=model][value=concat]")
    view.keyboard.press("ArrowUp")
    tab_to("#pick-files")
    with view.expect_file_chooser() as chooser:
        view.keyboard.press("Enter")
    chooser.value.set_files(tmp_path / "study.zip")
    tab_to("#start [type=submit]")
    view.keyboard.press("Enter")
    view.wait_for_selector("#viewer[data-ready]")
    assert view.evaluate("document.activeElement.textContent") == "Synthetic 70 keV"
    tab_to('[data-name="source"] .screen')
    source, at = read_volume(patient).array, place(view)
    view.keyboard.press("PageUp")
    view.keyboard.press("ArrowUp")
    view.keyboard.press("ArrowLeft")
    # The crosshair starts in the middle: pixel 63 from the right and from below, since NiiVue counts to R, A and S.
    row, column = SIDE - 1 - SIDE // 2 - 1, SIDE - 1 - SIDE // 2 - 1
    assert place(view) == at + 1 and told(view, "source") == round(float(source[at + 1, row, column]))
    view.wait_for_selector(f"#told:has-text('Slice {at + 2} of {SLICES}')", state="attached")
    assert re.search(r"Source −?\d+ HU, Synthetic −?[\d,]+ HU", view.text_content("#told"))
    view.keyboard.press("3")
    assert view.input_value("#width") == "1800"
    view.keyboard.press("Shift+ArrowRight")
    assert float(view.input_value("#width")) > 1800
    view.keyboard.press("d")
    assert view.is_checked("#difference [value=over]")
    view.keyboard.press("x")
    assert view.get_attribute("#cross", "aria-pressed") == "false"
    tab_to("#downloads button.main")
    with view.expect_download():
        view.keyboard.press("Enter")


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(opened, finished, width):
    view = opened(width=width)
    wide = "document.documentElement.scrollWidth"
    assert view.evaluate(wide) <= width
    view.goto(finished.url)
    view.wait_for_selector("#viewer[data-ready]")
    assert view.evaluate(wide) <= width
    boxes = [view.locator(f'[data-name="{name}"] .screen').bounding_box() for name in ("source", "synthetic")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] == boxes[1]["width"] >= 160


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened, finished, scheme):
    if not AXE.exists():
        pytest.skip("needs axe-core: npm install --no-save axe-core")
    view = opened(color_scheme=scheme)
    screens = {
        view.url: "#start .choices label",
        finished.url: "#viewer[data-ready]",
        f"{view.url}#{'0' * 32}": "#failed .advice:visible",
    }
    for address, ready in screens.items():
        view.goto(address)
        view.wait_for_selector(ready)
        view.evaluate(AXE.read_text(encoding="utf-8"))
        found = view.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
