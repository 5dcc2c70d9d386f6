"""The run folder: what a run is, how far it came and what it logged; whatever kills a process, it can be read.

config.yaml manifest.json       what is trained, by what, on what
log.jsonl log.csv panels/       and TensorBoard events: what was seen on the way
checkpoints/{last,previous}     all that the next step needs, sealed: their files' sizes and hashes stand beside them
checkpoints/best                the network of the lowest validation error of its stage
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from seresvit import __version__
from seresvit.config import Config, ConfigError, from_tree, to_yaml
from seresvit.data.volume import DISK_FULL, LOCK, DataError, remove_abandoned, written_whole
from seresvit.model import checkpoint

SEAL = "files.json"
WAIT_S = 10
PANEL = "source | synthetic | target | absolute error, white = 10 % of the range"


def is_begun(run_dir: Path, config: Config, data_hash: str) -> bool:
    """Whether the folder holds a run of these very settings and images.

    Raises ConfigError that names what differs. A run that stopped before there was anything to keep is none.
    """
    written = run_dir / "config.yaml"
    if not written.is_file() or not any((run_dir / "checkpoints" / name).is_dir() for name in ("last", "previous")):
        return False
    # Read as settings: one that is newer than the run had its default then.
    recorded = from_tree(yaml.safe_load(written.read_text(encoding="utf-8")), str(written))
    differing = _differences(recorded.model_dump(mode="json"), config.model_dump(mode="json"))
    if differing:
        raise ConfigError(f"{run_dir}: holds a run with other {', '.join(differing)}; choose another --run-dir")
    if json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["data_hash"] != data_hash:
        raise ConfigError(f"{run_dir}: holds a run on other images; choose another --run-dir")
    return True


def begin(run_dir: Path, config: Config, facts: dict[str, Any]) -> None:
    """Write config.yaml and manifest.json (versions, seed, command and `facts`) of a new run; neither names a host."""
    libraries = ("torch", "lightning-fabric", "numpy", "safetensors")
    program = Path(sys.argv[0]).name
    record = {
        "seresvit": __version__,
        "commit": checkpoint.commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "cuda": torch.version.cuda,
        "command": shlex.join(["seresvit" if program == "__main__.py" else program, *sys.argv[1:]]),
        "seed": config.train.seed,
        **facts,
    }
    _write_json(run_dir / "manifest.json", record)
    with written_whole(run_dir / "config.yaml") as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def save_last(run_dir: Path, write: Callable[[Path], None]) -> None:
    """Make `checkpoints/last` of what `write` puts into the folder that it is given; the one before is `previous`.

    Written and synced under another name, then renamed: at every moment a whole one stands under one of both names.
    Raises DataError when it cannot be written, as on a full disk; those that stood there are then still whole.
    """
    last, previous = (run_dir / "checkpoints" / name for name in ("last", "previous"))
    with written_whole(last) as temporary:
        temporary.mkdir()
        try:
            write(temporary)
        except RuntimeError as error:  # torch's own, while the system's that the disk is full was on its way
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        files = {path.name: _size_and_hash(path) for path in sorted(temporary.iterdir())}
        (temporary / SEAL).write_text(json.dumps(files), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if last.is_dir():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(last, previous)
    _sync(last.parent)


def newest_whole(run_dir: Path) -> tuple[Path | None, str]:
    """The newest checkpoint of which nothing is missing or changed, None where none was written; and what to say of it.

    A damaged `last` is set aside as `damaged`, so that it never takes the place of a whole one. Also removes what a
    killed process was writing. Raises DataError, touching nothing, when there are checkpoints and none is whole.
    """
    folder, faults = run_dir / "checkpoints", list[str]()
    remove_abandoned(folder)
    for candidate in (folder / "last", folder / "previous"):
        fault = _fault(candidate) if candidate.is_dir() else "missing"
        if not fault:
            if faults:
                shutil.rmtree(folder / "damaged", ignore_errors=True)
                os.replace(folder / "last", folder / "damaged")
            return candidate, "; ".join([*faults, "going on from the checkpoint before it"]) if faults else ""
        if candidate.is_dir():
            faults.append(f"{candidate}: {fault}")
    if faults:
        raise DataError(f"{faults[0]}, and there is no whole one before it; restore a copy or start in a new --run-dir")
    return None, ""


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """The folder for this process alone. Raises ConfigError when another trains in it.

    For ten seconds it waits for what a killed process left to end by itself. On a file system that knows no locks
    nothing is held.
    """
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=WAIT_S)
    except Timeout:
        raise ConfigError(f"{run_dir}: another process trains in it; let it end or choose another --run-dir") from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_full_said(run_dir: Path) -> Iterator[None]:
    """Turns the system's word for a full disk, wherever it comes from, into a DataError that says what to do.

    TensorBoard writes in a thread of its own, whose traceback would stand before that line.
    """
    before = threading.excepthook

    def is_full(error: object) -> bool:
        return isinstance(error, OSError) and error.errno in DISK_FULL

    threading.excepthook = lambda thread: None if is_full(thread.exc_value) else before(thread)
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise DataError(
            f"{run_dir}: cannot be written ({error.strerror}); make room and give the same command again, "
            f"it goes on from the last checkpoint"
        ) from None
    finally:
        threading.excepthook = before


class Log:
    """What a run says of itself: log.jsonl, log.csv, TensorBoard, pictures, and Weights & Biases where asked for."""

    def __init__(self, run_dir: Path, config: Config, stage: int, images: int, validated: bool = True):
        """Goes on after `images` of `stage`: what an earlier process logged beyond them will come again.

        So will the validation there, unless it is `validated`.
        """
        self.folder, self.before_stage2 = run_dir, config.train.stage1.num_images
        self.lines = run_dir / "log.jsonl"
        if self.lines.is_file():
            kept = [line for line in self.lines.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in kept if _stays(json.loads(line), (stage, images), validated)]
            with written_whole(self.lines) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.board = SummaryWriter(str(run_dir), purge_step=self._images_in_all(stage, images) + 1)
        self.wandb = _wandb_run(run_dir, config) if config.train.wandb_project else None

    def numbers(self, stage: int, images: int, values: dict[str, float]) -> None:
        """One line of log.jsonl, and the same numbers wherever else they can be looked at."""
        with open(self.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "images": images, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, self._images_in_all(stage, images))
        if self.wandb:
            self.wandb.log({"stage": stage, **values}, step=self._images_in_all(stage, images))

    def panel(self, stage: int, images: int, rows: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Source, synthetic and target of some slices, each (H, W), with their error, to panels/ and TensorBoard."""
        picture_HW = pictured([(*row, np.abs(row[1] - row[2]) * 10 - 1) for row in rows])
        with written_whole(self.folder / "panels" / f"stage{stage}_{images:08d}.png") as temporary:
            Image.fromarray(picture_HW).save(temporary)
        self.board.add_image(PANEL, picture_HW, self._images_in_all(stage, images), dataformats="HW")

    def summarise(self, **numbers: float) -> None:
        """Bring log.csv up to date; add the median speed and these numbers to manifest.json."""
        table = pd.read_json(self.lines, lines=True)
        with written_whole(self.folder / "log.csv") as temporary:
            table.to_csv(temporary, index=False)
        if "images_per_s" in table:
            numbers |= {"images_per_s": round(float(table["images_per_s"].median()), 3)}
        path = self.folder / "manifest.json"
        _write_json(path, json.loads(path.read_text(encoding="utf-8")) | numbers)

    def close(self) -> None:
        """Let every writer finish."""
        with suppress(OSError):  # on a full disk there is nothing to finish, and that was said
            self.board.close()
        if self.wandb:
            self.wandb.finish()

    def _images_in_all(self, stage: int, images: int) -> int:
        return images + (self.before_stage2 if stage == 2 else 0)


def check_wandb(config: Config) -> None:
    """Raises ConfigError where Weights & Biases is asked for and not installed."""
    if not config.train.wandb_project:
        return
    found = find_spec("wandb")
    if not (found and found.origin):  # a mere folder of that name has none
        raise ConfigError("train.wandb_project: wandb is not installed; pip install 'seresvit[wandb]'")


def _wandb_run(run_dir: Path, config: Config) -> Any:
    import wandb

    name = run_dir.absolute().name
    identity = hashlib.sha256(f"{config.train.wandb_project} {name}".encode()).hexdigest()[:16]
    # It would record the host, the user's name and the paths of the machine.
    settings = wandb.Settings(x_disable_meta=True, x_disable_machine_info=True, disable_git=True, silent=True, host="-")
    return wandb.init(
        project=config.train.wandb_project, name=name, id=identity, resume="allow", dir=run_dir,
        config=config.model_dump(mode="json"), settings=settings,
    )  # fmt: skip


def pictured(rows: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of images (H, W) in [-1, 1] as one grey picture, uint8; black beside rows that are narrower."""
    strips = [((np.concatenate(row, axis=1).clip(-1, 1) + 1) * 127.5).astype(np.uint8) for row in rows]
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate([np.pad(strip, [(0, 0), (0, width - strip.shape[1])]) for strip in strips])


def _stays(line: dict[str, Any], reached: tuple[int, int], validated: bool) -> bool:
    """Whether a line of the log will not come again from a checkpoint of that stage and those images."""
    place = (line["stage"], line["images"])
    return place < reached or (place == reached and (validated or "val_mae" not in line))


def _fault(folder: Path) -> str:
    """What is wrong with a sealed folder, as words for a message; empty for nothing."""
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"without a readable {SEAL}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
        if _size_and_hash(path)[1] != digest:
            return f"{name} is not what was written"
    return ""


def _size_and_hash(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()


def _sync(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, record: dict[str, Any]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _differences(recorded: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key in sorted(recorded.keys() | wanted.keys()):
        before, now = recorded.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            names += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            names.append(f"{prefix}{key}")
    return names
