"""What the tests of several rooms share: the command line, and a Chromium in which pages are opened."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from seresvit.cli import main

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


@pytest.fixture(scope="session")
def seresvit():
    """The command line, run in this process, where its libraries are imported once: exit code, stdout, stderr."""

    def run(*words, cwd="."):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["seresvit", *map(str, words)])
            with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main()
                    code = 0
                except SystemExit as left:
                    code = left.code or 0
        return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())

    return run
