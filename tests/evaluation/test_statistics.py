"""Judged by scipy, by counting all sign flips, by hand, and by how often an interval holds what it should."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from seresvit.evaluation import statistics
from seresvit.evaluation.statistics import (
    Difference,
    holm,
    paired_difference,
    seeds_and_patients_difference,
    sentence,
    signed,
)


def patients(values):
    return pd.Series(list(values), index=[f"P{k}" for k in range(len(values))], dtype=float)


def shifted(n, by, seed=0, spread=1.2):
    """Two methods on n patients, who differ more from each other than the methods do."""
    rng = np.random.default_rng(seed)
    second = patients(rng.normal(30, 8, n))
    return second + by + rng.normal(0, spread, n), second


def test_against_scipy_on_the_same_differences():
    first, second = shifted(12, -1.8)
    found, differences = (
        paired_difference(first.rename("se"), second[::-1].rename("concat")),
        (first - second).to_numpy(),
    )
    expected = scipy.stats.bootstrap((differences,), np.mean, n_resamples=50_000, rng=np.random.default_rng(7))
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.05)
    assert found.mean == pytest.approx(differences.mean()) and found.n == 12
    assert found.p == pytest.approx(scipy.stats.wilcoxon(first, second).pvalue)
    # Cohen's d_z is the paired t statistic over the root of n.
    assert found.effect_size == pytest.approx(scipy.stats.ttest_rel(first, second).statistic / np.sqrt(12))


@pytest.mark.parametrize("differences", [[1, 2, 3, 4, 5, -6, 7, 8], [1, 1, 2, 2, -3, 4, 4]], ids=["untied", "tied"])
def test_p_is_the_share_of_sign_flips_as_extreme(differences):
    ranks = scipy.stats.rankdata(np.abs(differences))
    sums = [ranks @ np.array(signs) for signs in itertools.product((-1, 1), repeat=len(differences))]
    expected = np.mean(np.abs(sums) >= abs(ranks @ np.sign(differences)) - 1e-9)
    found = paired_difference(patients(differences), patients(np.zeros(len(differences))))
    assert found.p == pytest.approx(expected)


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    samples, truth = np.random.default_rng(1).lognormal(0, 0.5, (250, 20)), np.exp(0.125)
    intervals = [paired_difference(patients(d), patients(0 * d)) for d in samples]
    assert 0.89 <= np.mean([d.low <= truth <= d.high for d in intervals]) <= 0.98


def seed_table(rng, seeds, patient_count, seed_spread):
    """True difference 1; each seed, each patient and each run of a seed on a patient adds its own."""
    values = 1 + rng.normal(0, seed_spread, (seeds, 1)) + rng.normal(0, 0.5, (1, patient_count))
    values = values + rng.normal(0, 0.2, (seeds, patient_count))
    columns = [f"P{k}" for k in range(patient_count)]
    return pd.DataFrame(values, columns=columns), pd.DataFrame(0.0 * values, columns=columns)


def test_seeds_count_in_the_interval_of_seeds_and_patients(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    rng = np.random.default_rng(2)
    held = {"seeds and patients": 0, "patients alone": 0}
    for _ in range(100):
        first, second = seed_table(rng, 8, 12, seed_spread=0.6)
        both = seeds_and_patients_difference(first, second)
        alone = paired_difference(first.mean(), second.mean())
        held["seeds and patients"] += both.low <= 1 <= both.high
        held["patients alone"] += alone.low <= 1 <= alone.high
    assert held["seeds and patients"] >= 88
    assert held["patients alone"] < 80


def test_one_seed_is_the_paired_difference_and_p_is_that_of_the_means():
    first, second = seed_table(np.random.default_rng(3), 3, 9, 0.1)
    one = seeds_and_patients_difference(first.iloc[:1], second.iloc[:1])
    assert one == paired_difference(first.iloc[0], second.iloc[0])
    three = seeds_and_patients_difference(first, second.iloc[::-1, ::-1])
    assert three.p == pytest.approx(scipy.stats.wilcoxon(first.mean() - second.mean()).pvalue)
    assert three.mean == pytest.approx(first.to_numpy().mean()) and three.n == 9


def test_holm_by_hand():
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "few": None}
    found = holm({key: Difference(1, 0, 2, 9, p) for key, p in p_values.items()})
    # Sorted: 4 × 0.005, 3 × 0.01, 2 × 0.03, and 1 × 0.04, which may not fall below the one before it.
    assert {key: d.p_adjusted for key, d in found.items()} == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02, "few": None}
    )
    assert holm({1: Difference(0, 0, 0, 9, 0.7), 2: Difference(0, 0, 0, 9, 0.8)})[2].p_adjusted == 1


@pytest.mark.parametrize("n", range(1, 6))
def test_no_p_below_six_patients_and_no_interval_below_four(n):
    first, second = shifted(n, -1.8)
    found = paired_difference(first, second)
    assert found.p is None and "6 patients" in found.why_no_p
    assert (found.low is None) == (n < 4) == bool(found.why_no_interval)
    words = sentence("se", "concat", "MAE", "HU", found)
    assert "lowers" not in words and "nan" not in words and "p =" not in words and "no p-value" in words
    assert "no patient has a value" in sentence("a", "b", "MAE", "HU", paired_difference(first[:0], second[:0]))


def test_equal_differences_are_said_to_be_equal():
    second = shifted(8, 0)[1]
    constant = paired_difference(second - 3, second)
    assert constant.low is None and constant.effect_size is None and constant.p == pytest.approx(2 / 2**8)
    assert "all patients differ by the same" in sentence("se", "concat", "MAE", "HU", constant)
    same = paired_difference(second, second)
    assert same.p == 1 and "they are equal (n = 8 patients)" in sentence("se", "concat", "MAE", "HU", same)


def test_patients_without_a_value_are_left_out_and_others_are_refused():
    first, second = shifted(9, -1.8)
    first["P3"] = second["P3"] = np.nan
    assert paired_difference(first, second).n == 8
    second["P3"] = 1
    with pytest.raises(ValueError, match="value in one of the two only"):
        paired_difference(first, second)
    with pytest.raises(ValueError, match="patients: P8 only in one"):
        paired_difference(first, second[:8])
    with pytest.raises(ValueError, match="seeds: 1 only in one"):
        seeds_and_patients_difference(pd.DataFrame([[1.0], [2.0]]), pd.DataFrame([[1.0]]))
    infinite = paired_difference(patients([np.inf] * 7), patients([30.0] * 7))
    assert infinite.p is None and "not finite" in sentence("a", "b", "PSNR", "dB", infinite, True)


@pytest.mark.parametrize(
    ("difference", "higher_is_better", "words"),
    [
        (
            Difference(-1.8, -2.6, -0.9, 12, 0.004),
            False,
            "se lowers MAE by 1.8 HU against concat (95 % CI 0.9 to 2.6, n = 12 patients, p = 0.004)",
        ),
        (
            Difference(1.8, 0.9, 2.6, 12, 0.0004, 0.0012),
            False,
            "se raises MAE by 1.8 HU against concat, for the worse "
            "(95 % CI 0.9 to 2.6, n = 12 patients, p = 0.001 after Holm's correction)",
        ),
        (
            Difference(-1.8, -2.6, -0.9, 12, 0.03, 0.09),
            False,
            "no difference in MAE was shown between se and concat "
            "(mean −1.8 HU, 95 % CI −2.6 to −0.9, n = 12 patients, p = 0.090 after Holm's correction)",
        ),
        (
            Difference(-1.8, -3.7, 0.1, 12, 0.04),
            False,
            "no difference in MAE was shown between se and concat "
            "(mean −1.8 HU, 95 % CI −3.7 to 0.1, n = 12 patients, p = 0.040)",
        ),
        (
            Difference(2.0, 0.01, 4.0, 9, 0.04),
            True,
            "se raises MAE by 2.00 HU against concat (95 % CI 0.01 to 4.00, n = 9 patients, p = 0.040)",
        ),
    ],
)
def test_sentences(difference, higher_is_better, words):
    assert sentence("se", "concat", "MAE", "HU", difference, higher_is_better) == words


def test_a_number_is_written_one_way_everywhere():
    assert [signed(number) for number in (0.04567, -0.5, 2600.4, -12345.0, 0.0, None, np.nan)] == [
        *("+0.0457", "−0.5", "+2,600", "−12,345", "0", "–", "–")
    ]
    assert [signed(number, 2) for number in (0.456, -1.0, -0.004, np.float64("nan"))] == ["+0.46", "−1.00", "0.00", "–"]
