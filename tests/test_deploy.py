"""Dockerfile and systemd unit: what they copy is there, what they run are commands of ours, and their linters agree."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from seresvit.cli import app

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "deploy" / "seresvit.service"
# What systemd-analyze calls OK ends at 5.0 of 10; the unit had 1.1 when it was written.
MOST_EXPOSED = 2.0


def parse(words):
    """The values with which the command would run; raises, or exits, for an option that it does not have."""
    return typer.main.get_command(app).commands[words[0]].make_context(words[0], list(words[1:])).params


def instructions():
    """Each instruction of the Dockerfile, and all that follows it, in one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [tuple(line.split(None, 1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def of(kind):
    return [rest for instruction, rest in instructions() if instruction == kind]


def in_context(path):
    """Whether .dockerignore lets the file through: the last line that names it, or a folder above it, decides."""
    relative, is_in = path.relative_to(ROOT), True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split():
        names = [str(part) for part in (relative, *relative.parents) if part.name]
        pattern = line.removeprefix("!").removeprefix("**/")
        if any(fnmatch.fnmatch(Path(name).name if "**/" in line else name, pattern) for name in names):
            is_in = line.startswith("!")
    return is_in


def test_image_holds_the_package_and_nothing_else():
    copied = {source for rest in of("COPY") for source in rest.split()[:-1]}
    assert copied == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "configs", "src"}
    for source in copied:
        assert (ROOT / source).exists() and in_context(ROOT / source)
    assert in_context(ROOT / "src" / "seresvit" / "serving" / "page" / "index.html")
    for kept_out in (".git/config", "tests/conftest.py", "data/P001.dcm", "src/model.safetensors", ".venv/bin/python"):
        assert not in_context(ROOT / kept_out)


def test_image_installs_what_the_project_asks_for(tmp_path):
    (program,) = (re.search(r'python -c "(.*?)"', rest)[1] for rest in of("RUN") if "tomllib" in rest)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in ("serve", "serve,export"):
        asked = [one for name in extras.split(",") for one in project["optional-dependencies"][name]]
        code = program.replace("${EXTRAS}", extras)
        listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert listed.stdout.split("\n")[:-1] == project["dependencies"] + asked
    # Every installation is held to the one torch version, but that of the package alone.
    for command in (part for rest in of("RUN") for part in re.findall(r"pip install [^&|>]*", rest)):
        assert "-c constraints.txt" in command or "--no-deps" in command
    assert [rest.partition("=")[2] for rest in of("ARG") if "://" in rest] == ["https://download.pytorch.org/whl/cpu"]


def test_image_starts_the_server_as_nobody_in_particular():
    (entry,), (command,) = of("ENTRYPOINT"), of("CMD")
    assert json.loads(entry) == ["seresvit"]
    found = parse(json.loads(command))
    # Everything that it needs from outside is mounted, and beyond its own machine it demands a token.
    assert found["host"] == "0.0.0.0" and found["token_file"] == Path("/run/secrets/seresvit-token")
    assert str(found["folder"]) in json.loads(of("VOLUME")[0])
    assert str(found["port"]) in of("EXPOSE")[0].split()
    assert of("USER") == ["10001:10001"]
    (health,) = of("HEALTHCHECK")
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(of("ENV"))))
    assert environment["HEALTH_URL"] == f"http://127.0.0.1:{found['port']}/health"
    compile(json.loads(health.partition("CMD")[2])[2], "HEALTHCHECK", "exec")


def test_dockerfile_passes_its_linter():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    found = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_unit_starts_the_server_with_options_that_it_has():
    lines = dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE))
    program, *words = shlex.split(lines["ExecStart"].replace("%S", "/STATE").replace("%d", "/CREDENTIALS"))
    found = parse(words)
    assert Path(program).name == "seresvit" and Path(program).is_absolute()
    assert found["host"] == "127.0.0.1" and found["folder"] == Path("/STATE") / lines["StateDirectory"]
    name, _, path = lines["LoadCredential"].partition(":")
    assert found["token_file"] == Path("/CREDENTIALS") / name and Path(path).is_absolute()


def test_unit_passes_the_checks_of_systemd(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    # systemd looks for the program: one that is there on any machine stands for ours.
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(encoding="utf-8")))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    exposed = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", f"--threshold={MOST_EXPOSED * 10:.0f}", "--no-pager", unit],
        capture_output=True,
        text=True,
    )
    assert exposed.returncode == 0, exposed.stdout or exposed.stderr


def test_the_page_on_serving_names_options_that_there_are():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash|ini)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s*#.*", "", line) for block in blocks for line in block.splitlines()]
    # On its own, in a container or in a unit.
    found = [re.search(r"(?:^|[ /])seresvit (serve|simulate)( .*)", line) for line in lines]
    commands = [[match[1], *shlex.split(match[2])] for match in found if match]
    assert len([words for words in commands if words[0] == "serve"]) > 3
    for words in commands:
        parse(words)
