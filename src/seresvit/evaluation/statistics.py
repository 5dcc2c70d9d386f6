"""Is one better than the other? Differences by patient, never by slice: slices and sources of one patient are alike.

Every function takes one number a patient. `docs/metrics.md` says what each statistic means and how far it can be
trusted with few patients.
"""

import math
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, wilcoxon

LEVEL = 0.95
RESAMPLES = 9999
SEED = 0
ALPHA = 0.05
# With five patients the smallest two-sided p of the signed-rank test is 2/2^5 = 0.0625: nothing could be shown.
MIN_PATIENTS_P = 6
# With three, the smallest of all resampled means has a probability of 1/27, more than the 2.5 % beyond a limit.
MIN_PATIENTS_INTERVAL = 4

MINUS = "−"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """The mean of first − second over patients, and how certain it is.

    `low`, `high`: its 95 % interval, None where `why_no_interval` says why. `p`: two-sided, of Wilcoxon's signed-rank
    test, None where `why_no_p` says why; `p_adjusted`: after `holm`. `effect_size`: Cohen's d_z, the mean over the
    standard deviation of the differences; None where that is zero or unknown.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    p: float | None
    p_adjusted: float | None = None
    effect_size: float | None = None
    why_no_p: str = ""
    why_no_interval: str = ""


def paired_difference(first: pd.Series, second: pd.Series) -> Difference:
    """first − second, both indexed by patient; patients in whom neither could be measured (NaN) are left out.

    Interval: bias-corrected and accelerated bootstrap of the mean (Efron, JASA 1987), seeded; p: Wilcoxon's test, exact
    below 51 patients without ties and below 14 with ties. Raises ValueError: other patients, a patient twice, or a
    patient whom only one of the two measured.
    """
    differences = _paired(first.to_frame("seed").T, second.to_frame("seed").T)[0]
    return _with_certainty(differences, _bca_interval)


def seeds_and_patients_difference(first: pd.DataFrame, second: pd.DataFrame) -> Difference:
    """first − second, rows seeds, columns patients: how certain it is for another seed and other patients.

    Interval: percentiles of a bootstrap that draws seeds and, for each draw, patients, one draw of patients for all
    drawn seeds, since each seed saw the same patients (crossed: Owen, Ann. Appl. Stat. 2007, who shows that it is
    conservative for many; with few seeds it is too narrow still). With one seed, it is that of `paired_difference` and
    knows nothing of other seeds. p and effect size: of the patients' means over seeds, so for these seeds. Seed k of
    `first` is compared with seed k of `second`. Raises ValueError: other seeds or patients.
    """
    differences_SP = _paired(first, second)
    if len(differences_SP) == 1:
        return _with_certainty(differences_SP[0], _bca_interval)

    def crossed_interval(_: np.ndarray) -> tuple[float, float]:
        rng = np.random.default_rng(SEED)
        seeds, patients = (rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in differences_SP.shape)
        low, high = np.quantile(((seeds @ differences_SP) * patients).sum(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    return _with_certainty(differences_SP.mean(axis=0), crossed_interval)


def holm(differences: dict[Key, Difference]) -> dict[Key, Difference]:
    """The same with `p_adjusted` (Holm, Scand. J. Stat. 1979) over all that have a p; the others as they are."""
    p_of = {key: difference.p for key, difference in differences.items() if difference.p is not None}
    adjusted, largest = dict(differences), 0.0
    for rank, key in enumerate(sorted(p_of, key=p_of.__getitem__)):
        largest = max(largest, min(1.0, (len(p_of) - rank) * p_of[key]))
        adjusted[key] = replace(differences[key], p_adjusted=largest)
    return adjusted


def sentence(
    first: str, second: str, metric: str, unit: str, difference: Difference, higher_is_better: bool = False
) -> str:
    """What the difference says in plain words: that first lowers or raises the metric, or that nothing was shown.

    A difference is shown when p, adjusted where it was, is below 0.05 and the interval, if there is one, leaves out
    zero. Too few patients for a test: what was found in them, and no more.
    """
    d = difference
    p = d.p if d.p_adjusted is None else d.p_adjusted
    leaves_out_zero = d.low is None or d.high is None or d.low > 0 or d.high < 0
    patients = f"n = {d.n} patient{'s' if d.n != 1 else ''}"
    if not d.n or not math.isfinite(d.mean):
        return f"{metric} of {first} and {second} cannot be compared: {d.why_no_interval}"
    if d.mean == 0 and d.effect_size is None:
        return f"no difference in {metric} was shown between {first} and {second}: they are equal ({patients})"
    written = _numbers(d.mean, d.low, d.high, unit)
    if p is not None and p < ALPHA and leaves_out_zero:
        verb = "lowers" if d.mean < 0 else "raises"
        size, *limits = written if d.mean > 0 else _numbers(*_turned(d), unit)
        for_the_worse = ", for the worse" if (d.mean > 0) != higher_is_better else ""
        certainty = ", ".join([_interval(d, limits), patients, _p(d)])
        return f"{first} {verb} {metric} by {size} against {second}{for_the_worse} ({certainty})"
    if p is None:
        found = f"{metric} of {first} minus that of {second} is {written[0]} in {d.n} patient{'s' if d.n != 1 else ''}"
        return f"{found} ({_interval(d, written[1:])}); no p-value: {d.why_no_p}"
    certainty = ", ".join([f"mean {written[0]}", _interval(d, written[1:]), patients, _p(d)])
    return f"no difference in {metric} was shown between {first} and {second} ({certainty})"


def _paired(first: pd.DataFrame, second: pd.DataFrame) -> np.ndarray:
    """first − second (S, P) float64 with rows and columns matched by name, less the columns that are NaN in both."""
    for name, ours, theirs in (("patients", first.columns, second.columns), ("seeds", first.index, second.index)):
        if not (ours.is_unique and theirs.is_unique):
            raise ValueError(f"{name}: one is there twice; take the mean first")
        if other := sorted(map(str, set(ours) ^ set(theirs))):
            raise ValueError(f"{name}: {', '.join(other[:5])} only in one of the two; compare the same {name}")
    a = first.to_numpy(np.float64)
    b = second.reindex(index=first.index, columns=first.columns).to_numpy(np.float64)
    if (np.isnan(a) != np.isnan(b)).any():
        raise ValueError("a patient has a value in one of the two only; compare the same patients")
    with np.errstate(invalid="ignore"):  # two infinite PSNRs
        difference = np.where(a == b, 0.0, a - b)
    return difference[:, ~(np.isnan(a) & np.isnan(b)).any(axis=0)]


def _with_certainty(differences_P: np.ndarray, interval: Callable[[np.ndarray], tuple[float, float]]) -> Difference:
    n = len(differences_P)
    mean = float(differences_P.mean()) if n else math.nan
    spread = float(differences_P.std(ddof=1)) if n > 1 and math.isfinite(mean) else 0.0
    are_equal = not spread > 1e-9 * abs(mean)
    low = high = None
    why_no_interval = _why_no_interval(n, mean, are_equal)
    if not why_no_interval:
        low, high = interval(differences_P)
        if not math.isfinite(low + high):
            low, high, why_no_interval = None, None, "the bootstrap gives none for these differences"
    p, why_no_p = None, ""
    if not math.isfinite(mean):
        why_no_p = why_no_interval
    elif n < MIN_PATIENTS_P:
        why_no_p = f"with fewer than {MIN_PATIENTS_P} patients no test can reach p < {ALPHA}"
    else:
        # Zeros everywhere leave the test nothing to rank: then nothing speaks against equality.
        p = float(wilcoxon(differences_P).pvalue) if differences_P.any() else 1.0
    effect_size = None if are_equal else mean / spread
    return Difference(mean, low, high, n, p, None, effect_size, why_no_p, why_no_interval)


def _why_no_interval(n: int, mean: float, are_equal: bool) -> str:
    if n == 0:
        return "no patient has a value"
    if not math.isfinite(mean):
        return "a value is not finite"
    if n < MIN_PATIENTS_INTERVAL:
        return f"with fewer than {MIN_PATIENTS_INTERVAL} patients there is no 95 % interval"
    return "no 95 % interval, since all patients differ by the same" if are_equal else ""


def _bca_interval(differences_P: np.ndarray) -> tuple[float, float]:
    rng = np.random.default_rng(SEED)
    with warnings.catch_warnings(action="ignore"):  # of degenerate data, which come back as NaN
        found = bootstrap((differences_P,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


# Words.


def _numbers(mean: float, low: float | None, high: float | None, unit: str) -> list[str]:
    """The mean with its unit and the limits, to two digits of what is larger, the mean or half the interval."""
    limits = [] if low is None or high is None else [low, high]
    scale = max(abs(mean), *(abs(limit - mean) / 2 for limit in limits), 1e-6)
    decimals = max(0, 1 - math.floor(math.log10(scale)))
    while decimals < 6 and any(limit and round(limit, decimals) == 0 for limit in limits):
        decimals += 1  # a limit that is not zero is not written as zero
    numbers = [f"{number:.{decimals}f}".replace("-", MINUS) for number in (mean, *limits)]
    return [f"{numbers[0]} {unit}".rstrip(), *numbers[1:]]


def signed(number: float | None, decimals: int | None = None) -> str:
    """The number with its sign, "–" for none: to three digits, or with so many decimals; what rounds to zero has no
    sign."""
    if number is None or math.isnan(number):
        return "–"
    if decimals is None:
        rounded = f"{number:+,.0f}" if abs(number) >= 1000 else f"{number:+.3g}" if number else "0"
    else:
        rounded = f"{number:+.{decimals}f}" if round(number, decimals) else f"{0:.{decimals}f}"
    return rounded.replace("-", MINUS)


def _turned(difference: Difference) -> tuple[float, float | None, float | None]:
    low, high = difference.low, difference.high
    return (-difference.mean, None, None) if low is None or high is None else (-difference.mean, -high, -low)


def _interval(difference: Difference, limits: list[str]) -> str:
    return difference.why_no_interval or f"95 % CI {limits[0]} to {limits[1]}"


def _p(difference: Difference) -> str:
    adjusted = difference.p_adjusted
    value = difference.p if adjusted is None else adjusted
    assert value is not None
    words = "p < 0.001" if value < 0.001 else f"p = {value:.{3 if value < 0.1 else 2}f}"
    return words if adjusted is None or adjusted == difference.p else f"{words} after Holm's correction"
