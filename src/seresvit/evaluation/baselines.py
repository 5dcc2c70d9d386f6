"""What costs no network: fits from source to target values, pixel by pixel, on training patients.

A network that does not beat them has learned no anatomy. Each is fitted on random pixels of at most MAX_CASES random
training patients, so that it is known before any test image.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from seresvit.config import DataSettings
from seresvit.data.pair import load_pair
from seresvit.data.pairing import Case
from seresvit.data.volume import energy_kev_in
from seresvit.evaluation.metrics import find_protocol, in_protocol_values

LINEAR, TWO_ENERGY, CURVE = "linear fit", "two-energy fit", "intensity curve"
MAX_CASES = 16
PIXELS_A_CASE = 100_000
SEED = 0


@dataclass(frozen=True)
class Baseline:
    """A fitted map from the values of `sources`, in this order, to those of the target, voxel by voxel."""

    method: str
    sources: tuple[str, ...]
    apply: Callable[[list[np.ndarray]], np.ndarray]


def fit_baselines(
    predicted: Iterable[tuple[str, ...]], cases: list[Case], geometry: DataSettings, protocol: str
) -> dict[tuple[str, ...], list[Baseline]]:
    """For the source names of each kind of prediction (one a channel) the baselines that can be fitted to it.

    Linear fit: least squares over the prediction's own channels. Two-energy fit: the same over the lowest and the
    highest of the energies that the manifest's sources name, which for monoenergetic images is what physics leaves
    (two basis materials). Intensity curve: the monotone curve of least squared error, rising or falling, for one
    channel (isotonic regression, Barlow et al. 1972). A baseline is lacking where no training patient has its sources
    in the target's unit. Values, and pixels, are those that the protocol scores. Raises DataError for a training image
    that cannot be read.
    """
    energies = {kev: case.source for case in cases if (kev := energy_kev_in(case.source)) is not None}
    ends = (energies[min(energies)], energies[max(energies)]) if len(energies) > 1 else ()
    found: dict[tuple[str, ...], list[Baseline]] = {}
    samples: dict[tuple[str, ...], np.ndarray | None] = {}
    for sources in dict.fromkeys(predicted):
        wanted = {LINEAR: sources}
        if ends and set(ends) != set(sources):
            wanted[TWO_ENERGY] = ends
        if len(sources) == 1:
            wanted[CURVE] = sources
        found[sources] = []
        for method, inputs in wanted.items():
            if inputs not in samples:
                samples[inputs] = _sampled(inputs, cases, geometry, protocol)
            if (values := samples[inputs]) is not None:
                fit = _curve if method == CURVE else _plane
                found[sources].append(Baseline(method, inputs, fit(values[:-1], values[-1])))
    return found


def _sampled(sources: tuple[str, ...], cases: list[Case], geometry: DataSettings, protocol: str) -> np.ndarray | None:
    """Values (sources and target, pixels) float64 of random pixels of random training patients; None without any."""
    rng = np.random.default_rng(SEED)
    by_patient: dict[str, dict[str, Case]] = {}
    for case in cases:
        if case.split == "train" and case.source in sources:
            by_patient.setdefault(case.patient, {})[case.source] = case
    groups = [[of[source] for source in sources] for of in by_patient.values() if len(of) == len(set(sources))]
    sampled = []
    for place in rng.permutation(len(groups))[:MAX_CASES]:
        pair = load_pair(*groups[place], data=geometry, to_score=True)
        if {volume.unit for volume in pair.sources} != {pair.target.unit}:
            continue  # an MR's values are no HU
        # A fit to pixels that are not scored, such as the air around a mask, would be a weaker rival than there is.
        is_masked = find_protocol(protocol).mask == "given"
        inside = np.flatnonzero(pair.labels) if is_masked and pair.labels is not None else None
        number = pair.target.array.size if inside is None else len(inside)
        if not number:
            continue
        chosen = rng.integers(number, size=min(PIXELS_A_CASE, number))
        chosen = chosen if inside is None else inside[chosen]
        volumes = (*pair.sources, pair.target)
        sampled.append(np.stack([in_protocol_values(v.array, protocol).ravel()[chosen] for v in volumes]))
    return np.concatenate(sampled, axis=1).astype(np.float64) if sampled else None


def _plane(sources: np.ndarray, target: np.ndarray) -> Callable[[list[np.ndarray]], np.ndarray]:
    (*slopes, offset), *_ = np.linalg.lstsq(np.stack([*sources, np.ones_like(target)], axis=1), target)

    def apply(arrays: list[np.ndarray]) -> np.ndarray:
        fitted = np.full(arrays[0].shape, offset, np.float32)
        for slope, array in zip(slopes, arrays, strict=True):
            fitted += np.float32(slope) * array
        return fitted

    return apply


def _curve(sources: np.ndarray, target: np.ndarray) -> Callable[[list[np.ndarray]], np.ndarray]:
    """The rising or the falling curve, whichever comes closer to the training pixels (T1 against T2 mostly falls)."""
    levels, level_of, counts = np.unique(sources[0], return_inverse=True, return_counts=True)
    means = np.bincount(level_of, weights=target) / counts
    curves = [isotonic_regression(means, weights=counts, increasing=rises).x for rises in (True, False)]
    heights = min(curves, key=lambda curve: np.sum(counts * (curve - means) ** 2))
    return lambda arrays: np.interp(arrays[0], levels, heights)
