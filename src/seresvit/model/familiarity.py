"""What the images that a network was trained on look like to it, and how far another image lies from them.

Each slice is described by a few numbers: quantiles of its values as the network gets them, how much of them is cut off,
how sharp it is, where in the slice it is bright, and how the gates share their weight. A case is the mean over a few of
its slices. Its distance is Mahalanobis' from the training cases, in which every number counts by how much it varies
from patient to patient, and in which direction. The limit is what nearly all left-out training patients stay below.

It finds images of another kind: another modality, unit, window, energy or orientation. It does not find pathology, nor
an image that is wrong in a place of a few pixels; and a network that was trained on few patients knows few.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from seresvit.data.prepared import Prepared, read_slice
from seresvit.model.fusion import record_gates
from seresvit.model.generator import Generator

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# What is measured in each cell of this many rows and columns says how the body lies in the image.
CELLS = 4
# Slices of a case that are looked at, evenly spread: more would only cost time.
SLICES = 8
# Between training patients, variance below this share of the mean one is noise of the estimate (shrinkage).
SHRINKAGE = 0.1
# The limit is this many times the upper quartile of the distances of left-out patients; their maximum would be set by
# one odd patient.
MARGIN = 1.5
FEWEST_PATIENTS = 5
# Of more training cases, this many evenly spread ones are looked at.
CASES = 200

Gates = dict[str, torch.Tensor]
Record = dict[str, Any]


def looked_at(num_slices: int) -> list[int]:
    """Indices of the slices that stand for a case."""
    return sorted({int(index) for index in np.linspace(0, num_slices - 1, min(SLICES, num_slices)).round()})


def described(source_BCHW: torch.Tensor, gates: Gates) -> dict[str, float]:
    """What the slices of one case are like, by name, mean over them. `gates` as `record_gates` fills them."""
    found: dict[str, float] = {}
    for channel, image_BHW in enumerate(source_BCHW.detach().float().cpu().unbind(1)):
        of = f"channel {channel + 1} " if source_BCHW.shape[1] > 1 else ""
        values_BN = image_BHW.flatten(1)
        for level, value in zip(QUANTILES, torch.quantile(values_BN, torch.tensor(QUANTILES), dim=1), strict=True):
            found[f"{of}quantile {level:g}"] = float(value.mean())
        found[f"{of}below the range"] = float((values_BN <= -1).float().mean())
        found[f"{of}above the range"] = float((values_BN >= 1).float().mean())
        for axis, name in ((1, "rows"), (2, "columns")):
            found[f"{of}step between {name}"] = float(image_BHW.diff(dim=axis).abs().mean())
        cells = torch.nn.functional.adaptive_avg_pool2d(image_BHW[:, None], CELLS).mean(dim=0).flatten()
        for cell, value in enumerate(cells):
            found[f"{of}brightness of cell {cell // CELLS + 1},{cell % CELLS + 1}"] = float(value)
    for name, gate in gates.items():
        half = gate.shape[1] // 2
        if gate.ndim == 2:
            found[f"gate {name} transformer"] = float(gate[:, :half].float().mean())
            found[f"gate {name} cnn"] = float(gate[:, half:].float().mean())
        else:
            found[f"gate {name}"] = float(gate.float().mean())
    return found


@torch.inference_mode()
def of_training(
    network: Generator, store: Prepared, context_slices: int, stopping: Callable[[], bool] = lambda: False
) -> Record:
    """What the training cases of a prepared store are like to a network in eval mode; see `learned`.

    Nothing when `stopping` says so between two cases.
    """
    cases = [case for case in store.cases if case.split == "train"]
    cases = [cases[int(index)] for index in np.linspace(0, len(cases) - 1, min(CASES, len(cases))).round()]
    if len({case.patient for case in cases}) < FEWEST_PATIENTS:
        return {}
    device, found = next(network.parameters()).device, []
    for case in cases:
        if stopping():
            return {}
        slices = [read_slice(store, case, index, context_slices)[0] for index in looked_at(case.shape[0])]
        slices_BCHW = torch.from_numpy(np.stack(slices)).to(device)
        with record_gates(network) as gates:
            network(slices_BCHW)
        found.append((case.patient, described(slices_BCHW, gates)))
    return learned(found)


def learned(cases: Iterable[tuple[str, dict[str, float]]]) -> Record:
    """The record of these (patient, `described`) for a checkpoint's header, JSON; {} below FEWEST_PATIENTS patients."""
    patients, features = zip(*cases, strict=True)
    names = list(features[0])
    x_NF = np.array([[of[name] for name in names] for of in features])
    if len(set(patients)) < FEWEST_PATIENTS:
        return {}
    left_out = [patient != np.array(patients) for patient in sorted(set(patients))]
    distances = [_distance(x_NF[~kept], *_fit(x_NF[kept])).max() for kept in left_out]
    mean_F, inverse_FF = _fit(x_NF)
    return {
        "names": names,
        "mean": mean_F.tolist(),
        "inverse": inverse_FF.tolist(),
        "limit": MARGIN * float(np.quantile(distances, 0.75)),
        "num_patients": len(set(patients)),
    }


def distance(features: dict[str, float], record: Record) -> tuple[float, str]:
    """How far a case lies from the training, 1 being the limit; and the name of what contributes most."""
    names = record["names"]
    off_F = np.array([features[name] for name in names]) - record["mean"]
    inverse_FF = np.array(record["inverse"])
    parts_F = off_F * (inverse_FF @ off_F)
    return float(np.sqrt(max(parts_F.sum(), 0.0))) / record["limit"], names[int(parts_F.argmax())]


def _fit(x_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse covariance, shrunk towards its diagonal; a number that never varies gets a small variance."""
    deviation_F = np.maximum(x_NF.std(axis=0), 1e-3)
    z_NF = (x_NF - x_NF.mean(axis=0)) / deviation_F
    correlation_FF = (1 - SHRINKAGE) * (z_NF.T @ z_NF) / len(z_NF) + SHRINKAGE * np.eye(z_NF.shape[1])
    return x_NF.mean(axis=0), np.linalg.inv(correlation_FF) / np.outer(deviation_F, deviation_F)


def _distance(x_NF: np.ndarray, mean_F: np.ndarray, inverse_FF: np.ndarray) -> np.ndarray:
    off_NF = x_NF - mean_F
    return np.sqrt(np.einsum("nf,fg,ng->n", off_NF, inverse_FF, off_NF).clip(0))
