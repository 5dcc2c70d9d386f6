"""Agreement by tissue and by label: MAE, bias, Bland-Altman limits and Dice, of each slice and of the whole case.

Voxels are tallied once, by slice, label and tissue of the target; every score is a sum of these tallies, so that a case
weighs each voxel alike. `docs/metrics.md` defines the scores.
"""

import math
from dataclasses import dataclass

import numpy as np

from seresvit.evaluation.tissues import TISSUES_HU, tissue_map

LIMITS_OF_AGREEMENT_SD = 1.96
# What the label is called that says no more than where the body is.
UNNAMED = "mask"


@dataclass(frozen=True)
class Tally:
    """Sums over voxels, by slice, label (0 outside) and tissue (0 none of TISSUES_HU).

    `errors` (Z, L, T, 5): number of voxels; sums of e, |e|, e² and the target, e = synthetic − target, T by the target.
    `in_target`, `in_synthetic`, `in_both` (Z, L, T): voxels that show the tissue in the one, the other, and in both.
    `names`: label → value.
    """

    errors: np.ndarray
    in_target: np.ndarray
    in_synthetic: np.ndarray
    in_both: np.ndarray
    names: dict[str, int]
    is_hu: bool


def tally(
    target: np.ndarray, synthetic: np.ndarray, labels: np.ndarray | None, names: dict[str, int], is_hu: bool
) -> Tally:
    """The tally of two volumes (Z, Y, X) in the protocol's values; without HU there are labels, but no tissues."""
    labels = np.ones(target.shape, np.uint8) if labels is None else labels
    shape = (int(max(labels.max(initial=1), *names.values(), 1)) + 1, len(TISSUES_HU) + 1)
    cells = shape[0] * shape[1]
    errors, of_target, of_synthetic, of_both = [], [], [], []
    for target_YX, synthetic_YX, labels_YX in zip(target, synthetic, labels, strict=True):
        error = (synthetic_YX.astype(np.float64) - target_YX).ravel()
        nothing = np.zeros(error.size, np.uint8)
        tissue, shown = (tissue_map(plane).ravel() if is_hu else nothing for plane in (target_YX, synthetic_YX))
        row = labels_YX.ravel().astype(np.intp) * shape[1]
        cell = row + tissue
        weighted = (None, error, np.abs(error), error**2, target_YX.ravel())
        sums = [np.bincount(cell, weights, cells) for weights in weighted]
        errors.append(np.stack(sums, axis=-1).reshape(*shape, len(sums)))
        of_target.append(np.bincount(cell, minlength=cells).reshape(shape))
        of_synthetic.append(np.bincount(row + shown, minlength=cells).reshape(shape))
        of_both.append(np.bincount(cell[tissue == shown], minlength=cells).reshape(shape))
    return Tally(np.stack(errors), np.stack(of_target), np.stack(of_synthetic), np.stack(of_both), names, is_hu)


def region_scores(tally: Tally, slices: list[int]) -> dict[str, float]:
    """`mae_R`, `bias_R`, `loa_low_R`, `loa_high_R`, `target_R` and, in HU, `dice_R` of each label and tissue R.

    Over these slices; `target_R` is the target's mean. NaN where the region has no voxel in them.
    """
    errors_LTS = tally.errors[slices].sum(axis=0)
    counts = [counted[slices].sum(axis=0) for counted in (tally.in_target, tally.in_synthetic, tally.in_both)]
    scores: dict[str, float] = {}
    for name, value in tally.names.items():
        scores |= _error_scores(name, errors_LTS[value].sum(axis=0))
        if tally.is_hu and name != UNNAMED:
            # The tissue that fills most of the label in the whole case, so that a slice is not judged by another one.
            tissue = 1 + int(tally.in_target[:, value, 1:].sum(axis=0).argmax())
            scores[f"dice_{name}"] = _dice(*(counted[value, tissue] for counted in counts))
    for place, name in enumerate(TISSUES_HU if tally.is_hu else (), start=1):
        scores |= _error_scores(f"hu_{name}", errors_LTS[1:, place].sum(axis=0))
        scores[f"dice_hu_{name}"] = _dice(*(counted[1:, place].sum() for counted in counts))
    return scores


def _error_scores(region: str, sums: np.ndarray) -> dict[str, float]:
    n, total, absolute, squared, of_target = map(float, sums)
    bias = total / n if n else math.nan
    spread = math.sqrt(max(squared - n * bias**2, 0.0) / (n - 1)) if n > 1 else math.nan
    return {
        f"mae_{region}": absolute / n if n else math.nan,
        f"bias_{region}": bias,
        f"loa_low_{region}": bias - LIMITS_OF_AGREEMENT_SD * spread,
        f"loa_high_{region}": bias + LIMITS_OF_AGREEMENT_SD * spread,
        f"target_{region}": of_target / n if n else math.nan,
    }


def _dice(in_target: float, in_synthetic: float, in_both: float) -> float:
    """2 |both| / (|target| + |synthetic|) (Dice, Ecology 1945); NaN where neither shows the tissue."""
    return float(2 * in_both / (in_target + in_synthetic)) if in_target + in_synthetic else math.nan
