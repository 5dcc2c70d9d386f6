"""Conformal intervals: they hold what they promise on patients that they were not fitted to, in every range."""

import json

import numpy as np
import pytest
from scipy.stats import norm

from seresvit.synthesis.intervals import FEWEST_VOXELS, Intervals, fit, half_width, sample_of


def patient(rng, shape=(8, 64, 64)):
    """Errors whose size depends on the value and on a spread that is only roughly known, as a network's are."""
    synthetic = np.where(rng.random(shape) < 0.03, rng.uniform(300, 1200, shape), rng.normal(0, 60, shape))
    spread = rng.gamma(2, 3, shape)
    target = synthetic + rng.normal(size=shape) * (5 + 2 * spread) * np.where(synthetic > 250, 4, 1)
    return synthetic.astype(np.float32), spread.astype(np.float32), target.astype(np.float32)


@pytest.fixture(scope="module")
def calibrated():
    rng = np.random.default_rng(0)
    return fit([sample_of(*patient(rng), rng) for _ in range(10)], 0.9, {"flips": True})


def test_nine_tenths_of_the_voxels_of_new_patients_lie_inside_in_every_range(calibrated):
    rng = np.random.default_rng(1)
    synthetic, spread, target = (np.stack(arrays) for arrays in zip(*(patient(rng) for _ in range(10)), strict=True))
    inside = np.abs(target - synthetic) <= half_width(calibrated, synthetic, spread)
    assert abs(inside.mean() - 0.9) < 0.01
    for low, high in ((-200, 0), (0, 200), (300, 1200)):
        assert abs(inside[(synthetic > low) & (synthetic < high)].mean() - 0.9) < 0.02, (low, high)


def test_one_width_for_all_would_miss_the_rare_range(calibrated):
    rng = np.random.default_rng(2)
    synthetic, spread, target = patient(rng)
    plain = np.quantile(np.abs(target - synthetic), 0.9)
    assert (np.abs(target - synthetic) <= plain)[synthetic > 300].mean() < 0.6
    assert half_width(calibrated, synthetic, spread)[synthetic > 300].mean() > 2 * plain


def test_of_gaussian_errors_without_a_spread_the_width_is_the_gaussian_quantile():
    rng = np.random.default_rng(3)
    samples = []
    for _ in range(8):
        synthetic = rng.uniform(-100, 100, (4, 64, 64))
        samples.append(sample_of(synthetic, None, synthetic + rng.normal(0, 7, synthetic.shape), rng))
    intervals = fit(samples, 0.9, {})
    widths = half_width(intervals, np.linspace(-100, 100, 50), None)
    np.testing.assert_allclose(widths, 7 * norm.ppf(0.95), rtol=0.1)


def test_every_range_is_well_filled_and_the_record_comes_back_from_json(calibrated):
    rng = np.random.default_rng(0)
    value = np.concatenate([sample_of(*patient(rng), rng) for _ in range(10)], axis=1)[0]
    assert len(calibrated.edges) > 3 and sorted(calibrated.edges) == calibrated.edges
    assert np.bincount(np.digitize(value, calibrated.edges)).min() >= FEWEST_VOXELS
    assert Intervals(**json.loads(json.dumps(calibrated.as_dict()))) == calibrated


def test_the_factor_is_the_score_of_the_rank_that_covers_a_further_one():
    """By hand: of scores 1 to n the ⌈(n + 1) · coverage⌉-th, a rank above the plain quantile."""
    for n, coverage, rank in ((1001, 0.9, 902), (2001, 0.95, 1902)):
        one = np.zeros((3, n))
        one[2] = np.random.default_rng(n).permutation(n) + 1
        assert fit([one], coverage, {}).factors == [rank]


def test_a_constant_image_has_one_range():
    flat = np.zeros((3, 2000))
    flat[2] = np.linspace(0, 10, 2000)
    intervals = fit([flat, flat], 0.9, {})
    assert intervals.edges == [] and intervals.factors[0] == pytest.approx(9, abs=0.02)
