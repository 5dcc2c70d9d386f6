"""The project as a whole: what documents, commands, settings and imports promise one another."""

import ast
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer

from seresvit.cli import app
from seresvit.config import load_config
from seresvit.model.discriminator import Discriminator
from seresvit.training.stage import stage_network

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "seresvit"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
READMES = (ROOT / "README.md", ROOT / "README.ko.md")
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# A file imports only from files above its own.
ROOMS = [
    *("seresvit", "config", "data.volume", "data.dicom", "data.mark", "data.derivation", "data.enhanced"),
    *("data.derived", "data.nifti", "data.pictures", "data", "data.deidentify", "data.workers"),
    *("data.geometry", "data.intensity", "data.bias", "data.pairing", "data.layouts", "data.pair"),
    *("data.registration", "data.checks", "data.audit_page", "data.audit"),
    *("data.prepared", "data.augmentation", "data.dataset", "data.phantom"),
    *(
        "model",
        "model.cuda_graph",
        "model.fusion",
        "model.transformer",
        "model.generator",
        "model.discriminator",
        "model.checkpoint",
    ),
    "model.familiarity",
    *("training", "training.perceptual", "training.losses", "training.run", "training.stage", "training.processes"),
    *("training.train", "training.rehearsal"),
    *("synthesis", "synthesis.export", "synthesis.bundle", "synthesis.backends", "synthesis.tiles"),
    "synthesis.ensemble",
    *("synthesis.intervals", "synthesis.pipeline", "synthesis.predictor", "synthesis.calibrate", "synthesis.predict"),
    "synthesis.quantise",
    *("evaluation", "evaluation.tissues", "evaluation.metrics", "evaluation.statistics", "evaluation.regions"),
    *("evaluation.texture", "evaluation.baselines", "evaluation.tables", "evaluation.ranking", "evaluation.evaluate"),
    *("evaluation.page", "evaluation.figures", "evaluation.gates", "evaluation.knockouts"),
    *("evaluation.gate_maps", "evaluation.gate_figures", "evaluation.explain"),
    *("evaluation.trials", "evaluation.cost", "evaluation.compare", "evaluation.scores"),
    *("evaluation.charts", "evaluation.panels", "evaluation.viewer", "evaluation.provenance", "evaluation.report"),
    *("serving", "serving.jobs", "serving.uploads", "serving.views", "serving.worker"),
    *("serving.results", "serving.peers", "serving.commitment", "serving.stow", "serving.delivery", "serving.spool"),
    *("serving.node", "serving.guard", "serving.api", "serving.serve"),
    *("terminal", "cli", "__main__"),
]

# Spellings that scripts may rely on, and values that the command must see.
FIXED_SPELLINGS = {
    "simulate OUT --patients 6 --slices 8 --size 128 --kev 70,110 --seed 0": {"out": Path("OUT"), "kev": "70,110"},
    "audit ROOT --source 110keV,90keV --target 70keV --out manifest.csv": {"source": "110keV,90keV", "layout": "auto"},
    "audit ROOT --source T1 --target T2 --layout modality/patient": {"layout": "modality/patient"},
    "audit ROOT --source T1 --target T2 --layout patient/modality": {"layout": "patient/modality"},
    "audit ROOT --source T1 --target T2 --layout aligned-png": {"layout": "aligned-png"},
    "train CONFIG --manifest m.csv --run-dir runs/NAME --dry-run": {"run_dir": Path("runs/NAME"), "dry_run": True},
    "train CONFIG --manifest m.csv --run-dir NAME --set a=1 --set b=2": {"overrides": ["a=1", "b=2"]},
    "predict CHECKPOINT INPUT OUT --device cpu": {"source": Path("INPUT"), "device": "cpu", "backend": "torch"},
    "predict CHECKPOINT INPUT OUT --backend auto": {"backend": "auto"},
    "predict CHECKPOINT INPUT OUT --backend openvino": {"backend": "openvino"},
    "evaluate PREDICTIONS --manifest m.csv --protocol synthrad2025 --out DIR": {"protocol": "synthrad2025"},
    "explain CHECKPOINT --manifest m.csv --out DIR": {"checkpoint": Path("CHECKPOINT"), "out": Path("DIR")},
    "compare CONFIG --manifest m.csv --fusions concat,se --seeds 3 --out DIR": {"fusions": "concat,se", "seeds": 3},
    "convert IN OUT": {"source": Path("IN"), "out": Path("OUT")},
    "predict CHECKPOINT INPUT OUT --flips --ensemble a": {"flips": True, "ensemble": [Path("a")]},
    "calibrate CHECKPOINT --manifest m.csv --split val --held-out test": {"checkpoint": Path("CHECKPOINT")},
    "serve --checkpoint a --checkpoint b --port 1 --accept A@1.2.3.4": {
        "checkpoint": [Path("a"), Path("b")],
        "port": 1,
    },
    "serve --checkpoint a --dicom SERESVIT:11112 --send-to PACS@h:4242": {
        "host": "127.0.0.1",
        "send_to": ["PACS@h:4242"],
    },
    "demo": {"out": Path("demo")},
}


def text(path):
    return path.read_text(encoding="utf-8")


def parse(words):
    """The values with which the command would run; raises, or exits, for an option that it does not have."""
    group = typer.main.get_command(app)
    return group.commands[words[0]].make_context(words[0], list(words[1:])).params


def code_blocks(path, language):
    """The lines of all code in that language, without comments."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text(path), flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s*#.*", "", line) for block in blocks for line in block.splitlines()]


def imported(file):
    """The dotted names of all modules that a source file imports, also inside functions."""
    for node in ast.walk(ast.parse(text(file))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative import"
            inside = ((SOURCE.parent / node.module.replace(".", "/") / f"{name.name}.py") for name in node.names)
            for name, path in zip(node.names, inside, strict=True):
                yield f"{node.module}.{name.name}" if path.is_file() else node.module


def place(module):
    """Where a module (named without the package) stands in the order; an unlisted one stands where its folder does."""
    return ROOMS.index(module if module in ROOMS else module.partition(".")[0])


def test_help_imports_nothing_heavy():
    heavy = ("torch", "SimpleITK", "pandas", "matplotlib", "nibabel", "pydicom", "scipy", "lightning_fabric")
    script = (
        "import sys; sys.argv = ['seresvit', '--help']\n"
        "from seresvit.cli import main\n"
        "try: main()\n"
        "finally: print('heavy:', *sorted({m.partition('.')[0] for m in sys.modules} & set(" + repr(heavy) + ")))\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "heavy:" and "explain" in shown


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_its_networks_and_is_documented(config):
    settings = load_config(config)
    height, width = settings.train.size
    with torch.device("meta"), torch.inference_mode():
        source = torch.empty(1, settings.model.in_channels, height, width)
        for stage in (1, 2):
            synthetic = stage_network(settings, stage).eval()(source)
            assert synthetic.shape == (1, settings.model.out_channels, height, width)
        channels = settings.model.in_channels + settings.model.out_channels
        Discriminator(channels, settings.train.discriminator_channels)(torch.cat([source, synthetic], dim=1))
    assert any(config.name in text(ROOT / name) for name in ("README.md", "CONTRIBUTING.md"))


@pytest.mark.parametrize("spelling", FIXED_SPELLINGS)
def test_fixed_spellings(spelling):
    found = parse(spelling.split())
    wanted = FIXED_SPELLINGS[spelling]
    assert {name: found[name] for name in wanted} == wanted


def test_readme_commands_run_with_these_options():
    commands = [shlex.split(line)[1:] for line in code_blocks(READMES[0], "bash") if line.startswith("seresvit ")]
    assert {words[0] for words in commands} >= {"audit", "train", "predict", "evaluate", "explain", "convert"}
    for words in commands:
        if words == ["--help"]:
            continue
        found = parse(words)
        config = ROOT / found["config"] if found.get("config") else None
        load_config(config, found.get("overrides") or [])


@pytest.mark.parametrize("language", ["bash", "python"])
def test_readmes_agree(language):
    english, korean = (code_blocks(path, language) for path in READMES)
    assert english == korean and english
    if language == "python":
        ast.parse("\n".join(english))


def test_every_dependency_is_explained():
    asked = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    explained = re.findall(r"^\| `([\w.-]+)` \| \S.+\. \|$", text(ROOT / "CONTRIBUTING.md"), flags=re.MULTILINE)
    assert sorted(re.split(r"[<>=~!\[ ]", one)[0] for one in asked) == sorted(explained)


def test_every_library_is_declared():
    extras = (one for name, extra in PROJECT["optional-dependencies"].items() if name != "dev" for one in extra)
    declared = {re.split(r"[<>=~!\[ ]", one)[0].lower() for one in (*PROJECT["dependencies"], *extras)}
    owners = importlib.metadata.packages_distributions()
    tops = {name.partition(".")[0] for file in SOURCE.rglob("*.py") for name in imported(file)}
    libraries = tops - set(sys.stdlib_module_names) - {"seresvit"}
    assert not libraries & {"torchvision", "timm", "lpips"}
    # An extra need not be installed; its package then has the name that is imported.
    undeclared = {
        name
        for name in libraries
        if not declared & {owner.lower().replace("_", "-") for owner in owners.get(name, [name])}
    }
    assert not undeclared


def test_imports_go_up_only():
    # The package's front door loads what it offers on first use, and so may name anything.
    for file in sorted(set(SOURCE.rglob("*.py")) - {SOURCE / "__init__.py"}):
        room = ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        for module in (name for name in imported(file) if name.partition(".")[0] == "seresvit"):
            assert place(module.removeprefix("seresvit.")) <= place(room), f"{file} imports {module}, which is below it"


def test_contributing_lays_out_every_source_file():
    tree = text(ROOT / "CONTRIBUTING.md").split("\nsrc/seresvit/\n")[1].split("\ntests/")[0]
    folder, listed = SOURCE, set()
    for indent, name in re.findall(r"^( {2,4})(\S+)", tree, flags=re.MULTILINE):
        parent = SOURCE if len(indent) == 2 else folder
        folder = SOURCE / name if name.endswith("/") else folder
        listed.add(parent / name)
    there = {file for file in SOURCE.rglob("*.py") if file.name != "__init__.py" or text(file)}
    assert {path for path in listed if path.suffix} == there - {SOURCE / "__init__.py"}


def test_model_card_holds_no_number_that_was_not_measured():
    measured = text(ROOT / "docs" / "experiments.md") + text(ROOT / "docs" / "prediction.md")
    card = re.sub(r"\]\(\S+?\)|version \S+|Apache \S+", "", text(ROOT / "MODEL_CARD.md"))
    numbers = re.findall(r"\d+\.\d+", card)
    assert len(numbers) > 20 and not [number for number in numbers if number not in measured]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_links_resolve_and_name_no_machine(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", text(document)):
        if not re.match(r"[a-z]+:", link):
            path, _, heading = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {link} leads nowhere"
            # As GitHub names headings: lower case, no punctuation, hyphens for spaces.
            headings = re.findall(r"^#+ (.+)$", text(target), re.MULTILINE) if heading else [""]
            names = {re.sub(r"[^\w\- ]", "", words).strip().lower().replace(" ", "-") for words in headings}
            assert heading in names, f"{document.name}: {link} leads to no heading"
    machine = r"(?<![\w.])/(home|root|work|tmp|Users|mnt|data\d*|media|var)/|[A-Z]:\\\\?Users"
    assert not re.search(machine, text(document))
