"""How wide an interval must be to hold the target: split conformal prediction, by the synthetic value.

On patients that the network never saw, a voxel's score is its absolute error over its spread (Lei et al., JASA 2018,
section 5.2). The quantile of the scores at the wanted coverage, times the spread of a new voxel, is the half-width of
its interval. Quantiles are taken apart for ranges of the synthetic value (Mondrian: Vovk, ACML 2012), since bone and
lung are not wrong alike and a prediction has no labels to tell them by.

What is promised: a voxel drawn at random from a new patient lies within its interval about as often as asked for, if
that patient comes from where the calibration patients came from. What is not: that it holds in each patient, since the
voxels of one are wrong together; in each place; or for a range in which the calibration patients had few voxels. The
number of patients is what counts, not that of voxels, and no correction for few patients is made: with under twenty,
expect a few percent of coverage too many or too few.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numpy as np

# A patient's share of the sample, drawn at random among all voxels.
SAMPLED_VOXELS = 50_000
RANGES = 64
# A range has at least this many sampled voxels, and those of half of the patients; else it joins its neighbour.
FEWEST_VOXELS = 1_000


@dataclass(frozen=True)
class Intervals:
    """Half-widths by synthetic value and spread: `factors[range]` · (spread + `floor`), see `half_width`.

    `edges` are the bounds between the ranges of the synthetic value, in its unit, as `floor` is; `members` says which
    prediction this holds for.
    """

    coverage: float
    floor: float
    edges: list[float]
    factors: list[float]
    num_patients: int
    members: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; `Intervals(**...)` takes it back."""
        return asdict(self)


def sample_of(
    synthetic: np.ndarray, spread: np.ndarray | None, target: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Synthetic value, spread and absolute error of random voxels, (3, N); the spread of a single network is 0."""
    index = rng.integers(synthetic.size, size=SAMPLED_VOXELS)
    value, wanted = synthetic.ravel()[index], target.ravel()[index]
    spread = np.zeros_like(value) if spread is None else spread.ravel()[index]
    return np.stack([value, spread, np.abs(value - wanted)]).astype(np.float64)


def fit(samples: Sequence[np.ndarray], coverage: float, members: dict[str, Any]) -> Intervals:
    """The intervals of that coverage from the `sample_of` each calibration patient, every patient counting alike."""
    value, spread, error = np.concatenate(samples, axis=1)
    patient = np.repeat(np.arange(len(samples)), [sample.shape[1] for sample in samples])
    # Where all members agree they can still be wrong. Without any spread the floor is 1, and factors are half-widths.
    floor = float(spread.mean()) or 1.0
    edges = _edges(value, patient, len(samples))
    score, range_of = error / (spread + floor), np.digitize(value, edges)
    factors = [_quantile(score[range_of == k], coverage) for k in range(len(edges) + 1)]
    return Intervals(coverage, floor, edges, factors, len(samples), members)


def _quantile(score: np.ndarray, coverage: float) -> float:
    """The score of rank ⌈(n + 1) · coverage⌉ among n (Lei et al., algorithm 2): what a further one stays below."""
    rank = min(ceil((len(score) + 1) * coverage), len(score))
    return float(np.partition(score, rank - 1)[rank - 1])


def half_width(intervals: Intervals, synthetic: np.ndarray, spread: np.ndarray | None) -> np.ndarray:
    """Half the width of each voxel's interval, float32, in the unit of the synthetic values."""
    factor = np.array(intervals.factors, np.float32)[np.digitize(synthetic, intervals.edges)]
    return factor * np.float32(intervals.floor) if spread is None else factor * (spread + np.float32(intervals.floor))


def _edges(value: np.ndarray, patient: np.ndarray, num_patients: int) -> list[float]:
    """Bounds between ranges of the value: RANGES of one width, joined until each is well filled."""
    candidates = np.linspace(value.min(), value.max(), RANGES + 1)[1:-1]
    order = np.argsort(value)
    parts = np.split(order, np.searchsorted(value[order], candidates))
    edges: list[float] = []
    voxels, patients = 0, set[int]()

    def is_filled() -> bool:
        return voxels >= FEWEST_VOXELS and 2 * len(patients) >= num_patients

    for bound, part in zip(candidates, parts[:-1], strict=True):
        voxels, patients = voxels + len(part), patients | set(np.unique(patient[part]).tolist())
        if is_filled():
            edges.append(float(bound))
            voxels, patients = 0, set()
    voxels, patients = voxels + len(parts[-1]), patients | set(np.unique(patient[parts[-1]]).tolist())
    return edges if is_filled() else edges[:-1]
