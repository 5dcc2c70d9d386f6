"""Scaling against the written rules, numpy's own percentiles and the real BraTS volumes."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from seresvit.config import DataSettings
from seresvit.data.intensity import Intensity, intensity_of, reference_intensity, shown_in
from seresvit.data.volume import DataError, Volume

DATA = Path(__file__).parents[3] / "shared" / "data"
SETTINGS = DataSettings()


def volume(array, unit: str = "arbitrary") -> Volume:
    array = np.asarray(array, dtype=np.float32)
    return Volume(array, np.eye(4), np.arange(len(array), dtype=float), unit, Path("P001/T1.nii.gz"), "nifti")


@given(
    array=arrays(np.float32, (3, 4, 5), elements=st.floats(-2000, 5000, width=32)),
    low=st.floats(-1500, 100),
    width=st.floats(1, 5000),
)
def test_restore_undoes_normalise_up_to_clipping(array, low, width):
    rule = Intensity("window", low, low + width, "HU")
    scaled = rule.normalise(array)
    assert scaled.dtype == np.float32 and scaled.min() >= -1 and scaled.max() <= 1
    restored = rule.restore(scaled)
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, np.clip(array, low, low + width), atol=2e-6 * (abs(low) + width))


def test_window_takes_its_ends_to_minus_and_plus_one():
    ct = volume([[[-1024, 3071, -3000, 9000, 1023.5]]], "HU")
    rule = intensity_of(ct, "window", SETTINGS)
    np.testing.assert_allclose(rule.normalise(ct.array).ravel(), [-1, 1, -1, 1, 0], atol=1e-6)
    assert (rule.low, rule.high, rule.unit) == (-1024, 3071, "HU")


def test_uint8_scales_by_its_range_not_by_its_values():
    rule = intensity_of(volume([[[10, 20, 200]]], "uint8"), "uint8", SETTINGS)
    np.testing.assert_allclose(rule.normalise(np.array([0, 127.5, 255])), [-1, 0, 1], atol=1e-6)


def test_percentile_of_a_masked_image_is_that_of_its_positive_voxels():
    array = np.zeros((10, 10, 10), dtype=np.float32)
    array[5:] = np.arange(1, 501).reshape(5, 10, 10)
    rule = intensity_of(volume(array), "percentile", DataSettings(percentile=90))
    assert (rule.low, rule.high) == (0, pytest.approx(np.percentile(np.arange(1, 501), 90)))


def test_percentile_of_an_unmasked_image_leaves_noisy_air_out():
    rng = np.random.default_rng(0)
    air, head = rng.uniform(1, 20, (30, 20, 20)), rng.uniform(400, 600, (10, 20, 20))
    rule = intensity_of(volume(np.concatenate([air, head])), "percentile", DataSettings(percentile=60))
    assert rule.high == pytest.approx(np.percentile(head, 60), rel=1e-4)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the BraTS volumes beside the checkout")
def test_percentile_of_a_real_skull_stripped_volume():
    from seresvit.data import read_volume

    t1 = read_volume(next(DATA.glob("brats_t1_flair/case_9_*")) / "T1.nii.gz")
    rule = intensity_of(t1, "percentile", SETTINGS)
    assert rule.high == pytest.approx(np.percentile(t1.array[t1.array > 0], 99.5))
    assert 100 < rule.high < 503
    scaled = rule.normalise(t1.array)
    assert (scaled[t1.array == 0] == -1).all() and (scaled == 1).mean() < 0.005


@pytest.mark.parametrize(
    ("unit", "kind", "fitting"),
    [
        ("arbitrary", "window", "percentile"),
        ("uint8", "window", "uint8"),
        ("HU", "percentile", "window"),
        ("HU", "uint8", "window"),
        ("arbitrary", "uint8", "percentile"),
    ],
)
def test_a_rule_that_does_not_fit_the_unit_is_refused(unit, kind, fitting):
    with pytest.raises(
        DataError, match=rf"P001.T1\.nii\.gz: .*data\.intensity\.source.*target.*'{fitting}'"
    ) as refused:
        intensity_of(volume([[[1, 2, 3]]], unit), kind, SETTINGS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("array", "unit", "kind"),
    [
        (np.full((2, 3, 3), -1000.0), "HU", "window"),
        (np.zeros((2, 3, 3)), "arbitrary", "percentile"),
        (np.full((2, 3, 3), 7.0), "uint8", "uint8"),
        (np.eye(3)[None], "arbitrary", "percentile"),
        (-np.eye(3)[None], "arbitrary", "percentile"),
        (np.array([[[0, np.nan, 1]]]), "arbitrary", "percentile"),
    ],
    ids=["air", "zeros", "grey", "binary mask", "nothing above zero", "NaN"],
)
def test_an_image_that_holds_nothing_to_scale_by_is_refused(array, unit, kind):
    with pytest.raises(DataError, match=r"P001.T1\.nii\.gz: "):
        intensity_of(volume(array, unit), kind, SETTINGS)


def test_the_record_survives_json():
    rule = Intensity("percentile", 0.0, 0.1 + 0.2, "arbitrary")
    assert Intensity.from_dict(json.loads(json.dumps(rule.as_dict()))) == rule


@pytest.mark.parametrize(
    "change", [{"kind": "sigmoid"}, {"unit": "mm"}, {"high": -1}, {"high": "x"}, {"low": None}, {"high": float("nan")}]
)
def test_a_meaningless_record_is_refused(change):
    with pytest.raises(DataError):
        Intensity.from_dict(Intensity("window", 0, 1, "HU").as_dict() | change)


def test_reference_is_the_median_of_the_training_targets():
    rules = [Intensity("percentile", 0, high, "arbitrary") for high in (700, 90, 400, 410)]
    assert reference_intensity(rules) == Intensity("percentile", 0, 405, "arbitrary")


def test_z_scores_map_deviations_of_the_foreground_to_either_side_of_its_mean():
    head = np.random.default_rng(0).normal(500, 40, (10, 20, 20))
    rule = intensity_of(volume(np.concatenate([np.zeros((10, 20, 20)), head])), "zscore", DataSettings(zscore_limit=2))
    expected = [head.mean() - 2 * head.std(), head.mean(), head.mean() + head.std(), head.mean() + 2 * head.std()]
    np.testing.assert_allclose(rule.normalise(np.array(expected)), [-1, 0, 0.5, 1], atol=1e-4)
    np.testing.assert_allclose(
        rule.restore(rule.normalise(head.clip(rule.low, rule.high))), head.clip(rule.low, rule.high), atol=1e-3
    )


def test_of_z_scores_the_foreground_counts_as_shown_and_of_windows_what_is_above_the_bound():
    array = np.zeros((2, 4, 4))
    array[1, :2] = [[300, 310, 320, 330]] * 2
    one = volume(array)
    assert shown_in(one, intensity_of(one, "zscore", SETTINGS)).mean(axis=(1, 2)).tolist() == [0, 0.5]
    ct = volume([[[-1024, -1000, 40, 3000]]], "HU")
    rule = intensity_of(ct, "window", SETTINGS)
    assert shown_in(ct, rule).ravel().tolist() == (rule.normalise(ct.array) > -0.99).ravel().tolist()


def test_reference_of_z_scores_is_the_median_of_either_bound():
    rules = [Intensity("zscore", low, high, "arbitrary") for low, high in ((-9, 700), (-100, 90), (2, 410))]
    assert reference_intensity(rules) == Intensity("zscore", -9, 410, "arbitrary")


def test_reference_of_no_or_mixed_targets_is_refused():
    with pytest.raises(DataError, match="no target"):
        reference_intensity([])
    with pytest.raises(DataError, match="one common"):
        reference_intensity([Intensity("percentile", 0, 9, "arbitrary"), Intensity("uint8", 0, 255, "uint8")])
