"""Augmentation: drawn apart from applied, geometry alike for both images, all else of the source alone."""

import json

import numpy as np
import pytest
import skimage.exposure
import skimage.transform

from seresvit.config import AugmentSettings, ConfigError, DataSettings, IntensitySettings, load_config
from seresvit.data.augmentation import apply, draw

PERCENTILE = IntensitySettings(source="percentile", target="percentile")
MR = DataSettings(intensity=PERCENTILE, augment=AugmentSettings(kind="mr", probability=1), flip=False)
CT = DataSettings(augment=AugmentSettings(kind="ct", probability=1), window_hu=(-1000, 1000), flip=False)
STILL = {"rotation_deg": 0.0, "shift": [0.0, 0.0], "scale": 1.0, "flip": False, "corner": [0, 0]}


def smooth(shape=(2, 60, 90), seed=0):
    """Images of a few waves with a masked (-1) border, float32 in [-1, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[1], : shape[2]] / 10
    waves = [np.sin(a * y + b * x + c) for a, b, c in rng.uniform(0, 2, (shape[0], 3))]
    images = np.stack(waves).astype(np.float32) * 0.8
    images[:, :6] = images[:, -6:] = images[..., :6] = images[..., -6:] = -1
    return images


def changed(source, **changes):
    """The source, (H, W) or (C, H, W), after these changes alone."""
    images = source.reshape(-1, *source.shape[-2:]).astype(np.float32)
    record = {**STILL, "size": list(source.shape[-2:]), "source": changes}
    return apply(record, np.concatenate([images, images[:1]]))[0].reshape(source.shape)


def test_without_augmentation_a_pair_is_as_it_was():
    pair = smooth()
    record = draw(DataSettings(flip=False), (60, 90), (60, 90), np.random.default_rng(0))
    assert record == {**STILL, "size": [60, 90], "source": {}}
    source, target = apply(record, pair)
    np.testing.assert_array_equal(source, pair[:1])
    np.testing.assert_array_equal(target, pair[1:])


@pytest.mark.parametrize("data", [MR, CT], ids=["mr", "ct"])
def test_a_record_is_json_and_repeats_the_pair(data):
    data = data.model_copy(update={"max_rotation_deg": 10.0, "max_shift": 0.1, "max_scale": 0.1, "flip": True})
    pair, seen = smooth((3, 60, 90)), set()
    for n in range(20):
        record = draw(data, (60, 90), (48, 100), np.random.default_rng(n))
        assert record == draw(data, (60, 90), (48, 100), np.random.default_rng(n))
        source, target = apply(record, pair)
        again = apply(json.loads(json.dumps(record)), pair)
        np.testing.assert_array_equal(source, again[0])
        np.testing.assert_array_equal(target, again[1])
        assert source.shape == (2, 48, 100) and target.shape == (1, 48, 100)
        assert source.dtype == target.dtype == np.float32 and max(abs(source).max(), abs(target).max()) <= 1
        seen.add(source.tobytes())
    assert len(seen) == 20


def test_geometry_moves_source_and_target_alike():
    image = smooth((1, 20, 31))
    data = DataSettings(max_rotation_deg=20, max_shift=0.1, max_scale=0.2)
    results = []
    for n in range(20):
        record = draw(data, (20, 31), (16, 40), np.random.default_rng(n))
        source, target = apply(record, np.concatenate([image, image / 2]))
        np.testing.assert_allclose(source / 2, target, atol=1e-6)
        results.append(source.tobytes())
    assert len(set(results)) == 20


def test_a_turn_keeps_a_disc_round_and_a_scale_its_centre_in_a_non_square_image():
    y, x = np.mgrid[:60, :90]
    disc = ((y - 29.5) ** 2 + (x - 44.5) ** 2 < 20**2).astype(np.float32)
    larger = ((y - 29.5) ** 2 + (x - 44.5) ** 2 < 25**2).astype(np.float32)
    record = {**STILL, "size": [60, 90], "source": {}}
    turned, _ = apply({**record, "rotation_deg": 40.0}, np.stack([disc, disc]))
    assert (abs(turned - disc) > 0.5).mean() < 0.005
    grown, _ = apply({**record, "scale": 1.25}, np.stack([disc, disc]))
    assert (abs(grown - larger) > 0.5).mean() < 0.005
    corner = np.zeros((60, 90), np.float32)
    corner[10:20, 60:80] = 1
    moved, _ = apply({**record, "rotation_deg": 30.0}, np.stack([corner, corner]))
    expected = skimage.transform.rotate(corner, 30, order=1)
    assert (abs(moved[0] - expected) > 0.1).mean() < 0.002


@pytest.mark.parametrize("data", [MR, CT], ids=["mr", "ct"])
def test_the_target_keeps_its_values(data):
    pair = smooth()
    for n in range(5):
        source, target = apply(draw(data, (60, 90), (60, 90), np.random.default_rng(n)), pair)
        np.testing.assert_array_equal(target, pair[1:])
        assert abs(source - pair[:1]).mean() > 0.002


def test_probability_and_strength():
    def drawn(count=300, **settings):
        data = MR.model_copy(update={"augment": AugmentSettings(kind="mr", **settings)})
        return [draw(data, (60, 90), (60, 90), np.random.default_rng(n))["source"] for n in range(count)]

    names = ["gamma", "contrast", "bias_field", "resolution", "rician_noise"]
    assert all(list(changes) == names for changes in drawn(3, probability=1))
    assert not any(drawn(probability=0))
    for name in names:
        assert np.mean([name in changes for changes in drawn(probability=0.3)]) == pytest.approx(0.3, abs=0.08)
    for strength in (1, 0.5):
        changes = drawn(probability=1, strength=strength)
        gammas, noises = [c["gamma"] for c in changes], [c["rician_noise"]["sd"] for c in changes]
        assert np.log(max(gammas)) == pytest.approx(0.4 * strength, rel=0.05)
        assert np.log(min(gammas)) == pytest.approx(-0.4 * strength, rel=0.05)
        assert max(noises) == pytest.approx(0.05 * strength, rel=0.05)
    image = smooth((1, 60, 90))
    np.testing.assert_allclose(changed(image, **drawn(1, probability=1, strength=0)[0]), image, atol=1e-6)


def test_gamma_is_that_of_scikit_image():
    image = smooth((1, 60, 90))
    expected = 2 * skimage.exposure.adjust_gamma((image + 1) / 2, 1.4) - 1
    np.testing.assert_allclose(changed(image, gamma=1.4), expected, atol=1e-6)


def test_contrast_stretches_about_the_mean_of_what_is_shown():
    image = smooth((1, 60, 90)) * 0.5 - 0.2
    image[image < -0.6] = -1
    found, shown = changed(image, contrast=1.2), image > -1
    assert found[shown].mean() == pytest.approx(image[shown].mean(), abs=1e-5)
    assert found[shown].std() == pytest.approx(1.2 * image[shown].std(), rel=1e-4)
    assert (found[~shown] == -1).all() and not shown.all()
    empty = np.full((1, 8, 8), -1, np.float32)
    np.testing.assert_array_equal(changed(empty, contrast=1.2), empty)


def test_bias_field_is_smooth_and_multiplies():
    image = np.full((1, 40, 50), -0.5, np.float32)
    image[0, :5] = -1
    coefficients = draw(MR, (40, 50), (40, 50), np.random.default_rng(3))["source"]["bias_field"]
    found = changed(image, bias_field=coefficients)
    assert (found[0, :5] == -1).all()
    log = np.log((found[0, 5:] + 1) / 0.5)
    y, x = (np.linspace(-1, 1, n) for n in (40, 50))
    terms = [np.outer(y[5:] ** i, x**j).ravel() for i in range(4) for j in range(4 - i)]
    fitted, *_ = np.linalg.lstsq(np.stack(terms, axis=1), log.ravel(), rcond=None)
    np.testing.assert_allclose(np.stack(terms, axis=1) @ fitted, log.ravel(), atol=1e-4)
    assert log.std() > 0.02


def test_resolution_is_lost_along_its_own_axis():
    y, x = np.mgrid[:64, :64]
    for axis, wave in ((0, np.sin(np.pi * y / 1.5)), (1, np.sin(np.pi * x / 1.5))):
        fine = (0.5 * wave).astype(np.float32)
        factors = [2.0, 1.0]
        assert changed(fine, resolution=factors).std() < (0.2 if axis == 0 else 1.1) * fine.std()
        np.testing.assert_allclose(changed(fine, resolution=[1.0, 1.0]), fine, atol=1e-6)
        assert changed(fine, resolution=factors[::-1]).std() < (1.1 if axis == 0 else 0.2) * fine.std()


def test_rician_noise_has_the_published_moments():
    """Without signal it is Rayleigh: mean σ·√(π/2), variance σ²·(2 - π/2) (Gudbjartsson, Patz 1995)."""
    sd = 0.03
    noise = {"sd": sd, "seed": 7}
    faint = np.full((1, 200, 200), -0.998, np.float32)
    faint[0, :100] = -1
    found = (changed(faint, rician_noise=noise) + 1) / 2
    assert (found[0, :100] == 0).all()
    assert found[0, 100:].mean() == pytest.approx(sd * np.sqrt(np.pi / 2), rel=0.02)
    assert found[0, 100:].var() == pytest.approx(sd**2 * (2 - np.pi / 2), rel=0.05)
    strong = (changed(np.zeros((1, 200, 200)), rician_noise=noise) + 1) / 2
    assert strong.mean() == pytest.approx(np.sqrt(0.5**2 + sd**2), rel=0.01)
    assert strong.std() == pytest.approx(sd, rel=0.02)
    channels = changed(np.zeros((2, 20, 20)), rician_noise=noise)
    assert not np.array_equal(channels[0], channels[1])


def test_ct_changes_are_in_hu():
    sources = [draw(CT, (9, 9), (9, 9), np.random.default_rng(n))["source"] for n in range(300)]
    per_hu = 2 / 2000
    assert max(s["offset"] for s in sources) / per_hu == pytest.approx(15, rel=0.05)
    assert min(s["offset"] for s in sources) / per_hu == pytest.approx(-15, rel=0.05)
    assert max(s["noise"]["sd"] for s in sources) / per_hu == pytest.approx(30, rel=0.05)
    flat = np.zeros((1, 200, 200), np.float32)
    noisy = changed(flat, noise={"sd": 20 * per_hu, "seed": 1}, offset=10 * per_hu) / per_hu
    assert noisy.std() == pytest.approx(20, rel=0.02) and noisy.mean() == pytest.approx(10, abs=0.5)
    point = np.zeros((1, 21, 21), np.float32)
    point[0, 10, 10] = 1
    spread = changed(point, blur=0.8)[0]
    rows = np.arange(21) - 10
    assert spread.sum() == pytest.approx(1, abs=1e-3)
    assert (spread.sum(axis=1) * rows**2).sum() == pytest.approx(0.8**2, rel=0.02)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["data.augment.kind=mr"], "augment.kind=mr is for intensity.source=percentile or uint8"),
        (["data.augment.kind=ct", "data.intensity={source: percentile}"], "augment.kind=ct is for .*window"),
        (["data.augment.kind=us"], "'none', 'mr' or 'ct'"),
        (["data.augment.probability=2"], "data.augment.probability"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_config(None, overrides)
