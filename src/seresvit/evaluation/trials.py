"""The runs of a comparison: each fusion and seed trained, predicted and evaluated under one budget.

OUT/config.yaml manifest.json                 what all runs share, by what version, on what images
OUT/stage-1/seedN/{run,model.safetensors}     the convolutional network of a seed; every fusion of that seed starts here
OUT/FUSION/seedN/{run,predictions,evaluation}

What is on disk is the truth: a run is done when its evaluation is there, and one that was killed goes on from its last
checkpoint. Each is locked while it is worked on, so that any number of processes can share a comparison.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout

from seresvit.config import Config, ConfigError, from_tree
from seresvit.data.pairing import read_manifest
from seresvit.data.prepared import prepare
from seresvit.data.volume import DataError, written_whole
from seresvit.evaluation.evaluate import evaluate
from seresvit.evaluation.metrics import find_protocol
from seresvit.model.fusion import FUSIONS
from seresvit.synthesis.predict import Predictor, predict_manifest
from seresvit.training import run as run_folder
from seresvit.training.processes import Stopped, signals_caught
from seresvit.training.stage import MODEL
from seresvit.training.train import Progress, train

SHARED = "stage-1"  # stands where a fusion's name does, for what all fusions share
ERROR = "error.log"

# A context that gives what `train` calls after every step.
Bars = Callable[[], AbstractContextManager[Progress]]


def no_bars() -> AbstractContextManager[Progress]:
    """Bars that show nothing."""
    return nullcontext(lambda *_: None)


@dataclass(frozen=True)
class Comparison:
    """What is compared: `fusions` under the settings of `config`, with `num_seeds` seeds from its `train.seed` on."""

    config: Config
    manifest: Path
    fusions: tuple[str, ...]
    num_seeds: int
    protocol: str
    out: Path

    @property
    def seeds(self) -> tuple[int, ...]:
        """The value of `train.seed` in each run of a fusion."""
        return tuple(range(self.config.train.seed, self.config.train.seed + self.num_seeds))

    @property
    def shares_stage1(self) -> bool:
        """Whether there is a stage 1, which is the same for all fusions of a seed."""
        return self.config.train.stage1.num_images > 0

    @property
    def runs(self) -> list[tuple[str, int]]:
        """All runs as (fusion, seed) in the order in which they are done: seed after seed, what is shared first."""
        shared = [(SHARED, seed) for seed in self.seeds] if self.shares_stage1 else []
        return shared + [(fusion, seed) for seed in self.seeds for fusion in self.fusions]

    def folder(self, fusion: str, seed: int) -> Path:
        """The folder of one run."""
        return self.out / fusion / f"seed{seed}"


def settings_of(comparison: Comparison, fusion: str, seed: int) -> Config:
    """The settings of one run: those of the comparison with that fusion and seed.

    A fusion starts from the shared stage 1 where there is one. Its discriminator starts anew: only the generator is
    handed on.
    """
    tree = comparison.config.model_dump(mode="json")
    settings = tree["train"]
    settings["seed"] = seed
    if fusion == SHARED:
        settings["stage2"]["num_images"] = 0
    else:
        tree["model"]["fusion"]["kind"] = fusion
        if comparison.shares_stage1:
            settings["stage1"]["num_images"] = 0
            settings["init_from"] = str((comparison.folder(SHARED, seed) / MODEL).absolute())
    return from_tree(tree, f"{fusion}, seed {seed}")


# Begin: refuse what cannot be compared before anything is trained.


def begin(comparison: Comparison, preparing: Callable[[list[Any]], Any] = iter) -> int:
    """The number of test patients, after preparing the images and writing what the comparison is into its folder.

    Raises ConfigError for unknown fusions, a protocol that does not fit, and a folder with a comparison of other
    settings or images, naming what differs; DataError for unusable images and where no patient is there to test on.
    Further fusions and seeds may be added to a comparison, and another protocol asked for.
    """
    config, fusions = comparison.config, comparison.fusions
    if unknown := [fusion for fusion in fusions if fusion not in FUSIONS]:
        raise ConfigError(f"--fusions: there is no {unknown[0]}; choose among {', '.join(FUSIONS)}")
    if len(set(fusions)) < max(len(fusions), 1) or comparison.num_seeds < 1:
        raise ConfigError(f"--fusions {','.join(fusions)} --seeds {comparison.num_seeds}: name each fusion once")
    if not config.train.stage2.num_images or not config.model.transformer_blocks:
        raise ConfigError("no fusion to train: train.stage2.num_images is 0, or model.transformer_blocks empty")
    units = find_protocol(comparison.protocol).units
    patients = {case.patient for case in read_manifest(comparison.manifest) if case.split == "test"}
    if not patients:
        raise DataError(f"{comparison.manifest}: no case in the test split; audit again with more patients or --test")
    store = prepare(comparison.manifest, config.data, preparing)
    if (unit := store.cases[0].intensities[-1].unit) not in units:
        raise ConfigError(f"--protocol {comparison.protocol} compares {' or '.join(units)}, the target holds {unit}")
    # Each run has its own fusion and seed, so that those of the config say nothing.
    shared = config.model_dump(mode="json")
    shared["model"]["fusion"]["kind"] = "concat"
    if differing := _differences(comparison.out, shared, store.data_hash):
        raise ConfigError(
            f"{comparison.out}: holds a comparison with other {', '.join(differing)}; choose another --out"
        )
    if not (comparison.out / "config.yaml").is_file():
        run_folder.begin(comparison.out, from_tree(shared, "config"), {"data_hash": store.data_hash})
    return len(patients)


def _differences(out: Path, wanted: dict[str, Any], data_hash: str) -> list[str]:
    """The settings in which a comparison that lies in `out` differs, and "images"; nothing where there is none."""
    written = out / "config.yaml"
    if not written.is_file():
        return []
    # Read as settings: one that is newer than the comparison had its default then.
    recorded = from_tree(yaml.safe_load(written.read_text(encoding="utf-8")), str(written))
    before, now = (pd.json_normalize(tree).to_dict("records")[0] for tree in (recorded.model_dump(mode="json"), wanted))
    differing = [str(key) for key in now.keys() | before.keys() if before.get(key) != now.get(key)]
    record = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return sorted(differing) + ["images"] * (record["data_hash"] != data_hash)


# Work: what one process does.


def is_done(comparison: Comparison, fusion: str, seed: int) -> bool:
    """Whether nothing is left to do of a run."""
    folder = comparison.folder(fusion, seed)
    if fusion == SHARED:
        return (folder / MODEL).is_file()
    scores = folder / "evaluation" / "summary.csv"
    return scores.is_file() and pd.read_csv(scores)["protocol"].eq(comparison.protocol).all()


def work(comparison: Comparison, say: Callable[[str], None] = lambda _: None, bars: Bars = no_bars) -> None:
    """Do every run that is left, one after another, on the device of this process.

    A run that another process works on is left to it. What a run fails with is written into its error.log, and the
    next one is begun. Raises ConfigError for unusable settings, and Stopped after SIGTERM or SIGINT in a training.
    """
    for number, (fusion, seed) in enumerate(comparison.runs, 1):
        folder = comparison.folder(fusion, seed)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                if not is_done(comparison, fusion, seed):
                    say(f"{number} of {len(comparison.runs)}: {fusion}, seed {seed}")
                    _try(comparison, fusion, seed, bars)
        except Timeout:
            continue


def _try(comparison: Comparison, fusion: str, seed: int, bars: Bars) -> None:
    error_log = comparison.folder(fusion, seed) / ERROR
    error_log.unlink(missing_ok=True)
    try:
        _run(comparison, fusion, seed, bars)
    except ConfigError:
        raise
    except Exception:  # whatever ends one run must not end the others
        error_log.write_text(traceback.format_exc(), encoding="utf-8")


def _run(comparison: Comparison, fusion: str, seed: int, bars: Bars) -> None:
    """Train one run, or what is left of it; predict and evaluate the test patients with its best checkpoint."""
    folder, manifest = comparison.folder(fusion, seed), comparison.manifest
    if fusion != SHARED and comparison.shares_stage1:
        _wait_for_stage1(comparison, seed)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # the run's record says how much memory it took
    with bars() as progress:
        best = train(settings_of(comparison, fusion, seed), manifest, folder / "run", progress)
    if fusion == SHARED:  # its end, not its best: as stage 2 of any run starts
        with written_whole(folder / MODEL) as temporary:
            shutil.copyfile(folder / "run" / "checkpoints" / "last" / MODEL, temporary)
        return
    failures = predict_manifest(Predictor(best), manifest, folder / "predictions")
    if failures:
        raise DataError(f"{len(failures)} cases were not predicted, such as {failures[0].name}: {failures[0].reason}")
    with written_whole(folder / "evaluation") as temporary:
        # Nothing is missing, since every case was predicted; a slice without a partner is left out of every fusion.
        evaluate(folder / "predictions", manifest, comparison.protocol, temporary, allow_missing=True)


def _wait_for_stage1(comparison: Comparison, seed: int) -> None:
    folder = comparison.folder(SHARED, seed)
    with FileLock(folder / ".lock"):
        if not is_done(comparison, SHARED, seed):
            raise DataError(f"its stage 1 is not trained, see {folder / ERROR}")


def failure(comparison: Comparison, fusion: str, seed: int) -> str:
    """Why a run is not done: the last line of its error.log."""
    error_log = comparison.folder(fusion, seed) / ERROR
    lines = error_log.read_text(encoding="utf-8").splitlines() if error_log.is_file() else []
    return lines[-1] if lines else "its process ended before it; the same command goes on"


# Spread: one process a GPU.


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    numbers = [str(number) for number in range(torch.cuda.device_count())]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return chosen[: len(numbers)] if chosen != [""] else numbers


def spread(command: list[str], gpus: list[str]) -> None:
    """Run the same command once on each GPU, and wait for all. A worker of a comparison takes what no other has.

    SIGTERM and SIGINT are handed on; raises Stopped when all have saved and ended.
    """
    with signals_caught() as signals:
        workers = [subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus]
        told = False
        while any(worker.poll() is None for worker in workers):
            if signals and not told:
                told = True
                for worker in workers:
                    worker.send_signal(signal.SIGTERM)
            time.sleep(0.2)
    if signals:
        raise Stopped("stopped, all that was trained is saved", signals[0])


def worker_command(comparison: Comparison) -> list[str]:
    """The command line of a process that works on this comparison and writes no tables."""
    return [
        *(sys.executable, "-m", "seresvit", "compare", str(comparison.out / "config.yaml")),
        *("--manifest", str(comparison.manifest), "--out", str(comparison.out), "--protocol", comparison.protocol),
        *("--fusions", ",".join(comparison.fusions), "--seeds", str(comparison.num_seeds), "--runs-only"),
    ]
