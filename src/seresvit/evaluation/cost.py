"""What a fusion costs: parameters, FLOPs, and the time of a step and of a prediction against plain concatenation."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch.utils.flop_counter import FlopCounterMode

from seresvit.config import Config
from seresvit.training.processes import machine, start_processes
from seresvit.training.stage import stage_network, start_stage, train_mode
from seresvit.training.train import load, open_run, step

ROUNDS, MIN_ROUNDS, WARM_UP = 22, 7, 2
# A pair of networks is timed for so long at most, after MIN_ROUNDS.
LIMIT_S = 60.0
RESAMPLES = 2000

Timed = Callable[[], object]


def size(config: Config) -> dict[str, float]:
    """Parameters of the generator, and GFLOP of one image of `train.size` through it.

    One multiply-add is two FLOPs; convolutions and matrix products are counted, what is done element by element is not.
    """
    with torch.device("meta"), torch.inference_mode():
        network = stage_network(config, 2).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, config.model.in_channels, *config.train.size))
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "gflops": counter.get_total_flops() / 1e9,
    }


def times(config: Config, reference: Config, manifest: Path) -> dict[str, Any]:
    """How long a training step and a prediction of one batch take, and their ratio to those of `reference`.

    The two networks take turns on the same images, and who comes first changes with every round, so that a machine that
    slows down slows both. A ratio is the median of those of all rounds, with the 95 % percentile bootstrap interval of
    that median; `step_ms` and `predict_ms` are medians. The reference against a second copy of itself tells what the
    clock can tell. Without an entry is what the device's memory has no room for, since it must hold both networks.
    """
    fabric = start_processes(config)
    found: dict[str, Any] = {"device": machine(fabric)["device_name"]}
    try:
        ours, theirs = (_timed(one, manifest, fabric) for one in (config, reference))
        for name in ours:
            first_s, second_s = _taking_turns(fabric, ours[name], theirs[name])
            found[f"{name}_ms"] = 1000 * float(np.median(first_s))
            found |= ratio(name, first_s, second_s)
    except torch.OutOfMemoryError:
        return found
    return found


def ratio(name: str, first_s: np.ndarray, second_s: np.ndarray) -> dict[str, float]:
    """The median of first / second over rounds, as NAME_ratio, and its interval, NAME_ratio_low to NAME_ratio_high."""
    ratios = first_s / second_s
    medians = np.median(np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return {f"{name}_ratio": float(np.median(ratios)), f"{name}_ratio_low": low, f"{name}_ratio_high": high}


def _timed(config: Config, manifest: Path, fabric: Fabric) -> dict[str, Timed]:
    """A training step and a prediction, each on the first batch of stage 2; nothing is written."""
    run = open_run(config, manifest, manifest.with_suffix(".timing"), fabric)
    stage = start_stage(fabric, config, 2, None)
    source, target, *weights = next(load(run, stage))

    def one_step() -> None:
        train_mode(stage)
        step(run, stage, source, target, *weights)

    @torch.inference_mode()
    def one_prediction() -> None:
        stage.model.eval()(source)

    return {"step": one_step, "predict": one_prediction}


def _taking_turns(fabric: Fabric, first: Timed, second: Timed) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of both in every round that counts."""
    seconds: list[tuple[float, float]] = []
    started_s = time.monotonic()
    while len(seconds) < MIN_ROUNDS or (len(seconds) < ROUNDS and time.monotonic() - started_s < LIMIT_S):
        pair = [0.0, 0.0]
        for place in (0, 1) if len(seconds) % 2 else (1, 0):
            pair[place] = _seconds(fabric, (first, second)[place])
        seconds.append((pair[0], pair[1]))
    counted = np.array(seconds)[WARM_UP:]
    return counted[:, 0], counted[:, 1]


def _seconds(fabric: Fabric, action: Timed) -> float:
    started_s = time.perf_counter()
    action()
    if fabric.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s
