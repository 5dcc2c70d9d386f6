"""Images whose blur and noise are known: filtered by scipy, with noise whose spectrum theory gives."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.signal import welch

from seresvit.evaluation.texture import edge_sharpness, noise_ratios, target_texture

SPACING_MM_YX = (0.7, 0.7)


def texture_of(target, soft=None):
    return target_texture(target, np.ones(target.shape, bool), soft, SPACING_MM_YX)


def test_sharpness_of_a_blurred_step_is_known():
    """A step over one pixel has a central difference of h / 2; three equal steps over three pixels one of h / 3."""
    step = np.where(np.arange(40) < 20, -100.0, 300.0) + np.zeros((2, 40, 1))
    ramp = np.interp(np.arange(40), [18, 21], [-100.0, 300.0]) + np.zeros((2, 40, 1))
    edges = texture_of(step)
    assert edge_sharpness(edges, step) == pytest.approx(1)
    assert edge_sharpness(edges, ramp) == pytest.approx((1 / 3) / (1 / 2))
    assert edge_sharpness(edges, 2 * step + 50) == pytest.approx(2)
    assert np.isnan(edge_sharpness(texture_of(np.zeros((1, 20, 20))), step[:1, :20, :20]))


def test_only_the_targets_edges_count():
    target = np.zeros((1, 40, 40))
    target[0, :, 20:] = 500
    elsewhere = target.copy()
    elsewhere[0, 5:8, 5:8] = 3000
    assert edge_sharpness(texture_of(target), elsewhere) == pytest.approx(1)


@pytest.fixture(scope="module")
def noise():
    return 40 + 12 * np.random.default_rng(0).normal(size=(6, 128, 128))


def test_noise_of_half_the_size_is_half_in_every_band(noise):
    other = 40 + 6 * np.random.default_rng(1).normal(size=noise.shape)
    found = noise_ratios(texture_of(noise, np.ones(noise.shape, bool)), other)
    assert found == pytest.approx(dict.fromkeys(("noise_ratio", "noise_low", "noise_mid", "noise_high"), 0.5), rel=0.05)


def test_a_surface_of_second_order_is_no_noise(noise):
    y, x = np.mgrid[:128, :128]
    shaded = noise + 0.01 * x**2 - 0.02 * x * y + 3 * y
    texture = texture_of(noise, np.ones(noise.shape, bool))
    assert noise_ratios(texture, shaded)["noise_ratio"] == pytest.approx(1, abs=1e-6)


def test_smoothing_takes_the_high_band_as_the_filters_transfer_function_says(noise):
    smooth = gaussian_filter(noise, (0, 0.6, 0.6), mode="wrap")
    found = noise_ratios(texture_of(noise, np.ones(noise.shape, bool)), smooth)
    cycles = np.fft.fftfreq(512)
    # Of the sampled kernel, which at this width is not quite a Gaussian's.
    kernel = gaussian_filter(np.eye(1, 512)[0], 0.6, mode="wrap")
    transfer = np.outer(np.fft.fft(kernel).real, np.fft.fft(kernel).real)
    part = 2 * np.hypot(cycles[:, None], cycles)
    for name, (low, high) in {"noise_low": (0, 1 / 3), "noise_mid": (1 / 3, 2 / 3), "noise_high": (2 / 3, 1)}.items():
        expected = np.sqrt(np.mean(transfer[(part > low) & (part <= high)] ** 2))
        assert found[name] == pytest.approx(expected, rel=0.1), name
    assert found["noise_low"] > found["noise_mid"] > found["noise_high"]


def test_the_bands_follow_the_spectrum_that_scipy_estimates():
    """Noise that varies along the rows only, so that its two-dimensional bands are those of one dimension."""
    rng = np.random.default_rng(2)
    lines = {name: np.cumsum(rng.normal(size=(400, 16)), axis=1) * k for name, k in (("a", 1.0), ("b", 1.7))}
    lines["b"] += rng.normal(size=(400, 16))
    volumes = {name: np.repeat(line[:, None], 16, axis=1) for name, line in lines.items()}
    found = noise_ratios(texture_of(volumes["a"], np.ones((400, 16, 16), bool)), volumes["b"])
    x = np.arange(16)
    power = {}
    for name, line in lines.items():
        left = line - np.stack([np.polyval(np.polyfit(x, one, 2), x) for one in line])
        frequencies, spectrum = welch(left, window="boxcar", nperseg=16, detrend=False, return_onesided=False)
        power[name] = spectrum.mean(axis=0)
    high = (np.abs(frequencies) * 2 > 2 / 3) & (np.abs(frequencies) * 2 <= 1)
    assert found["noise_high"] == pytest.approx(np.sqrt(power["b"][high].sum() / power["a"][high].sum()), rel=1e-3)


def test_patches_must_be_soft_tissue(noise):
    soft = np.zeros(noise.shape, bool)
    soft[0, :40, :40] = True
    other = noise.copy()
    other[1:] *= 5
    texture = texture_of(noise, soft)
    assert noise_ratios(texture, other)["noise_ratio"] == pytest.approx(1)
    # Of 32 × 32 there is one, of 16 × 16, half overlapping, four times four.
    assert len(texture.power) == 16 and len(texture.patches) == 16
    with_bone = noise.copy()
    with_bone[0, 20, 20] = 900
    assert len(texture_of(with_bone, soft).patches) == 12
    soft[0, 6:] = False
    assert all(np.isnan(list(noise_ratios(texture_of(noise, soft), other).values())))
