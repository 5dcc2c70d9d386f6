"""The page in Chromium against the real server: what a person gives, watches, sees and takes home."""

import gzip
import io
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from seresvit.data import read_volume
from seresvit.serving.views import PAGE_FILES, write_views

WORDS = json.loads(PAGE_FILES["words.json"].read_text(encoding="utf-8"))
SIDE, SLICES = 128, 6


def word(key, **values):
    return re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), WORDS["en"][key])


def give(view, *paths):
    """Chooses a folder or files, and sends them."""
    view.set_input_files("#folder" if paths[0].is_dir() else "#files", list(paths))
    view.click("#start [type=submit]")


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
    policy = opened().request.get(server.url).headers["content-security-policy"].split("; ")
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert not any("unsafe" in rule or "*" in rule or "blob" in rule for rule in policy)
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
    folder, z = server.job(shown).view, place(shown)
    source, synthetic = (nibabel.load(folder / f"{one}.nii.gz").get_fdata().T[z] for one in ("source", "synthetic"))
    difference = synthetic - source
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


def test_images_without_hu_have_greys_of_their_own(opened, server, predictors, patient):
    """The view of a finished job written anew: an MR that became a CT, and an MR that became another."""
    view = opened()
    give(view, patient)
    view.wait_for_selector("#viewer[data-ready]")
    ct = read_volume(patient)
    mr = replace(ct, array=np.abs(ct.array + 1000) * 0.01, unit="arbitrary")
    job = server.job(view)
    for synthetic, presets in ((ct, ["Soft tissue", "Lung", "Bone", "PE"]), (mr, ["Full range"])):
        write_views(predictors["se"], (mr,), synthetic, job.view, {})
        view.reload()
        view.wait_for_selector("#viewer[data-ready]")
        assert view.locator("#windows label").all_inner_texts() == presets
        assert view.inner_text("#viewer .part") == word("no_difference") and view.is_hidden(".colours")
        assert view.locator(".view").count() == 2
        value = mr.array[place(view), SIDE - 1 - SIDE // 2, SIDE - 1 - SIDE // 2]
        assert float(view.inner_text('[data-name="source"] output')) == pytest.approx(float(value), abs=2e-3)
        before = {name: pixels(view, name) for name in ("source", "synthetic")}
        assert all(image.std() > 15 for image in before.values())
        box = view.locator('[data-name="source"] .screen').bounding_box()
        view.mouse.move(box["x"] + 100, box["y"] + 100)
        view.mouse.down(button="right")
        view.mouse.move(box["x"] + 200, box["y"] + 100, steps=3)
        view.mouse.up(button="right")
        assert np.abs(pixels(view, "source") - before["source"]).mean() > 1
        assert np.abs(pixels(view, "synthetic") - before["synthetic"]).max() == 0


def gunzipped(path, folder):
    (folder / "taken.nii").write_bytes(gzip.decompress(Path(path).read_bytes()))
    return folder / "taken.nii"


def test_everything_is_done_with_the_keyboard_alone(opened, server, patient, tmp_path):
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for file in patient.iterdir():
            archive.write(file, file.name)
    view = opened()
    # Told of before anything is pressed, so that Chromium asks the test and not a person.
    view.on("filechooser", lambda chooser: chooser.set_files(tmp_path / "study.zip"))

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
    view.keyboard.press("Enter")
    view.wait_for_selector("#chosen:not([hidden])")
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
