"""The page when things take long or go wrong, and for everyone: other languages, other screens, no mouse, no eyes."""

import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seresvit.config import DataSettings
from seresvit.data import read_volume
from seresvit.data.checks import of_one_image
from seresvit.serving.views import PAGE_FILES

WORDS = json.loads(PAGE_FILES["words.json"].read_text(encoding="utf-8"))
SLICES = 6
TOKEN = "0123456789abcdef"
# What Chromium itself writes of an answer that is an error.
REPORTED = "Failed to load resource"
AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"


def word(key, **values):
    return re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), WORDS["en"][key])


def give(view, *paths):
    """Chooses a folder or files, and sends them."""
    view.set_input_files("#folder" if paths[0].is_dir() else "#files", list(paths))
    view.click("#start [type=submit]")


# Progress, and what can go wrong.


def test_progress_counts_slices_and_a_job_can_be_cancelled(opened, server, patient):
    server.pause_s = 0.5
    view, second = opened(), opened()
    give(view, patient)
    view.wait_for_selector(".steps .now[data-step=running]")
    give(second, patient)
    second.wait_for_selector("#work .detail:not(:empty)")
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


def test_nothing_of_one_job_stands_beside_another(opened, server, patient):
    view = opened()
    give(view, patient)
    view.wait_for_selector("#viewer[data-ready]")
    other = server.jobs.submit("se", lambda source: shutil.copytree(patient, source, dirs_exist_ok=True))
    while server.jobs.get(other.id).state != "done":
        view.wait_for_timeout(50)
    held, downloads = [], view.locator("#downloads .act").first.locator("button")
    view.route(f"**/{other.id}/view", lambda route: held.append(route))
    with view.expect_request(f"**/{other.id}/view"):
        view.evaluate(f"location.hash = '{other.id}'")
    view.wait_for_selector("#result h1")
    assert view.is_hidden("#downloads") and view.is_hidden("#gates")
    while not held:
        view.wait_for_timeout(50)
    held[0].continue_()
    view.wait_for_selector("#viewer[data-ready]")
    with view.expect_response(f"**/{other.id}/result*"):
        downloads.first.click()


def test_views_that_come_too_late_change_nothing(opened, server, patient):
    view = opened()
    give(view, patient)
    view.wait_for_selector("#viewer[data-ready]")
    first, held = server.job(view).id, []
    view.route(f"**/{first}/view/source.nii.gz", lambda route: held.append(route))
    view.reload()
    other = server.jobs.submit("se", lambda source: shutil.copytree(patient, source, dirs_exist_ok=True))
    while not held or server.jobs.get(other.id).state != "done":
        view.wait_for_timeout(50)
    view.evaluate(f"location.hash = '{other.id}'")
    view.wait_for_selector("#viewer[data-ready]")
    view.locator("#slice").fill("0")
    held[0].continue_()
    view.wait_for_timeout(1000)
    assert view.locator("#viewer canvas").count() == 3 and view.input_value("#slice") == "0"
    assert view.is_hidden("#undrawn") and view.is_visible("#viewer .controls")


def test_images_that_cannot_be_shown_can_still_be_taken_home(opened, server, patient):
    view = opened()
    give(view, patient)
    view.wait_for_selector("#viewer[data-ready]")
    address, image = view.url, server.job(view).view / "synthetic.nii.gz"
    image.rename(image.with_name("away"))
    view.reload()
    view.wait_for_selector("#undrawn:not([hidden])")
    assert view.is_hidden("#viewer .controls") and view.is_visible("#downloads button.main")
    image.with_name("away").rename(image)
    view.goto(f"{server.url}/#")
    view.wait_for_selector("#start:not([hidden])")
    view.goto(address)
    view.wait_for_selector("#viewer[data-ready]")
    assert view.is_hidden("#undrawn") and view.is_visible("#viewer .controls")


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


def test_a_server_that_goes_and_comes_back(browsing, own_server, patient):
    server = own_server()
    server.pause_s = 0.4
    view = browsing(server.url)
    give(view, patient)
    view.wait_for_selector(".steps .now[data-step=running]")
    server.stop()
    view.wait_for_selector("#lost:not([hidden])")
    assert view.inner_text("#lost") == word("lost")
    server.pause_s = 0.0
    server.start()
    view.wait_for_selector("#viewer[data-ready]")
    server.stop()
    view.click("#downloads .act button")
    view.wait_for_selector(f"#saving:has-text('{word('failed_net')[:30]}')")
    assert [line for line in view.said if not line.startswith(REPORTED)] == []


def test_a_token_is_asked_for_once(browsing, own_server, patient):
    server = own_server(token=TOKEN)
    view = browsing(server.url, ready="#ask-token[open]")
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
