"""A Chromium in which tests open pages."""

from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
# Without a graphics card, WebGL is drawn by the processor.
ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--use-angle=swiftshader"]
ARGUMENTS += ["--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs Debian's chromium at {CHROMIUM}")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """A function that opens a file at a width; the test fails when a page says or loads anything."""
    views, said = [], []

    def open_page(path, width):
        view = chromium.new_page(viewport={"width": width, "height": 800})
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        view.goto(path.as_uri())
        views.append(view)
        return view

    yield open_page
    for view in views:
        view.close()
    assert said == []
