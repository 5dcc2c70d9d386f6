"""Judged by the challenge codes' own outputs (`tests/reference/metrics.json`), scikit-image and arithmetic."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import fftconvolve
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from seresvit.config import ConfigError
from seresvit.data.volume import DataError
from seresvit.evaluation.metrics import PROTOCOLS, main_metrics, score, score_slices

REFERENCE = Path(__file__).parents[1] / "reference"
CORRECTED = "synthrad2025-corrected"
ENTRIES = json.loads((REFERENCE / "metrics.json").read_text())


def volume_pair(name, shape):
    spec = importlib.util.spec_from_file_location("fill", REFERENCE / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    return fill.volume_pair(name, tuple(shape))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
@pytest.mark.parametrize("protocol", ["synthrad2023", "synthrad2025"])
def test_volume_protocols_equal_the_challenge_codes(entry, protocol):
    target, prediction, mask = volume_pair(entry["name"], entry["shape"])
    assert score(target, prediction, mask, protocol) == pytest.approx(entry[protocol], rel=1e-6)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_dect_equals_the_users_protocol(entry):
    target, prediction, _ = volume_pair(entry["name"], entry["shape"])
    expected = dict(entry["dect"])
    plane = expected.pop("slice")
    assert score(target[plane], prediction[plane], protocol="dect") == pytest.approx(expected, rel=1e-6)
    assert score_slices(target, prediction, "dect")[plane] == pytest.approx(expected, rel=1e-6)


def test_a_volume_of_a_slice_protocol_is_the_mean_of_its_slices():
    target, prediction, _ = volume_pair("small", (40, 64, 72))
    each = [score(t, p, protocol="dect")["psnr"] for t, p in zip(target, prediction, strict=True)]
    assert score(target, prediction, protocol="dect")["psnr"] == pytest.approx(np.mean(each))


def test_uint8_is_scikit_image_at_255():
    rng = np.random.default_rng(0)
    target, prediction = rng.integers(0, 256, (2, 32, 40)).astype(np.uint8)
    found = score(target, prediction, protocol="uint8")
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(target, prediction, data_range=255))
    assert found["ssim"] == pytest.approx(structural_similarity(target, prediction, data_range=255), rel=1e-5)
    assert found["mae"] == pytest.approx(np.abs(target.astype(int) - prediction).mean())


def mr_volume():
    """Three slices of a disc of brain, and one with 4 % of foreground only."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[-20:20, -20:20]
    volume = np.where(x**2 + y**2 < 200, rng.uniform(100, 900, (4, 40, 40)), 0)
    volume[3] = 0
    volume[3, :8, :8] = 500
    return volume


def test_mr_is_free_of_the_two_images_units():
    target = mr_volume()
    prediction = target + np.where(target > 0, np.random.default_rng(2).normal(0, 60, target.shape), 0)
    expected = score(target, prediction, protocol="mr")
    assert score(37 * target, 0.01 * prediction, protocol="mr") == pytest.approx(expected, rel=1e-4)
    assert score(target, 5 * target, protocol="mr")["mae"] == pytest.approx(0, abs=1e-6)
    assert score(target, 5 * target, protocol="mr", prediction_scale=1e6)["mae"] > 0.3


def test_mr_against_scikit_image_and_by_hand():
    target = mr_volume()
    prediction = np.roll(target, 1, axis=2) * 2
    unit_t, unit_p = (np.clip(v / np.percentile(v[v > 0], 99.5), 0, 1) for v in (target, prediction))
    rows = score_slices(target, prediction, "mr")
    assert rows[3] == {}
    for t, p, row in zip(unit_t[:3], unit_p[:3], rows[:3], strict=True):
        assert row["mae"] == pytest.approx(np.abs(t - p)[t > 0].mean(), rel=1e-5)
        assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(t, p, data_range=1), rel=1e-5)
        assert row["ssim"] == pytest.approx(structural_similarity(t, p, data_range=1), rel=1e-5)
        assert row["nmse"] == pytest.approx(((t - p) ** 2).sum() / (t**2).sum(), rel=1e-5)


@pytest.mark.parametrize("protocol", ["synthrad2023", "synthrad2025"])
def test_nothing_outside_the_mask_counts(protocol):
    target, prediction, mask = volume_pair("small", (40, 64, 72))
    spoiled = np.where(mask > 0, prediction, 2500)
    assert score(target, spoiled, mask, protocol) == score(target, prediction, mask, protocol)
    assert score(target, spoiled, None, protocol)["mae"] > 2 * score(target, spoiled, mask, protocol)["mae"]


def test_equal_images():
    target, _, mask = volume_pair("small", (40, 64, 72))
    assert score(target, target, mask) == pytest.approx({"mae": 0, "psnr": math.inf, "ms_ssim": 1})


def test_the_corrected_protocol_counts_luminance_once_by_scikit_image():
    """With an endless K1 luminance is one, so that scikit-image gives contrast × structure alone."""
    target, prediction, mask = volume_pair("small", (40, 64, 72))
    margins = [((97 - n) // 2, 97 - n - (97 - n) // 2) for n in target.shape]
    inside = np.pad(mask > 0, margins, mode="edge")
    images = [np.where(mask > 0, np.clip(v, -1024, 3071) + 1024.0, 0) for v in (target, prediction)]
    images = [np.pad(image, margins, mode="edge") for image in images]
    expected = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        whole, rest = (structural_similarity(*images, data_range=4095, K1=k, full=True)[1] for k in (0.01, 1e6))
        similarity = np.maximum(whole if scale == 4 else rest, 0) ** weight
        expected *= similarity[3:-3, 3:-3, 3:-3][inside[3:-3, 3:-3, 3:-3]].mean()
        images = [fftconvolve(image, np.ones((2, 2, 2)) / 8, mode="same")[::2, ::2, ::2] for image in images]
        inside = inside[::2, ::2, ::2]
    assert score(target, prediction, mask, CORRECTED)["ms_ssim"] == pytest.approx(expected, rel=1e-6)


def test_the_corrected_protocol_is_else_the_published_one():
    target, prediction, mask = volume_pair("small", (40, 64, 72))
    published, corrected = (score(target, prediction, mask, name) for name in ("synthrad2025", CORRECTED))
    assert published["mae"] == corrected["mae"] and published["psnr"] == corrected["psnr"]
    assert published["ms_ssim"] < corrected["ms_ssim"] < 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_gives_the_metrics_that_it_names(protocol):
    target, prediction, _ = volume_pair("small", (40, 64, 72))
    low = 0 if protocol in ("mr", "uint8") else -1024
    found = score(np.maximum(target, low)[:8], np.maximum(prediction, low)[:8], protocol=protocol)
    assert tuple(found) == main_metrics(protocol)


def test_a_mask_too_small_for_the_coarsest_scale_has_no_ms_ssim():
    target, prediction, mask = volume_pair("small", (40, 64, 72))
    corner = np.zeros_like(mask)
    corner[:4, :4, :4] = 1
    assert math.isnan(score(target, prediction, corner)["ms_ssim"])


IMAGE = np.zeros((8, 16, 16), np.float32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((IMAGE, IMAGE[:7]), "shape"),
        ((IMAGE, np.full_like(IMAGE, np.nan)), "not finite"),
        ((IMAGE, IMAGE, IMAGE), "mask is empty"),
        ((IMAGE, IMAGE, IMAGE[:, :4]), "mask"),
        ((IMAGE, IMAGE, IMAGE, "dect"), "without a given mask"),
        ((IMAGE[0], IMAGE[0]), "volume"),
        ((IMAGE[:4], IMAGE[:4], None, "synthrad2023"), "smaller than the SSIM window"),
        ((IMAGE, IMAGE, None, "mr"), "no voxel above zero"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(arguments, words):
    with pytest.raises(DataError, match=words) as caught:
        score(*arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_protocol_names_the_nearest():
    with pytest.raises(ConfigError, match="synthrad2025"):
        score(IMAGE, IMAGE, protocol="synthrad25")
