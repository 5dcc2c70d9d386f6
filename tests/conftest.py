"""What the tests of the whole command line share."""

import contextlib
import io
from types import SimpleNamespace

import pytest

from seresvit.cli import main


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
