"""Fits to images whose relation is known, judged by it and by NumPy's polyfit."""

import csv

import numpy as np
import pytest
from PIL import Image

from seresvit.config import DataSettings
from seresvit.data.pairing import Case, read_manifest
from seresvit.evaluation.baselines import fit_baselines

TARGET = "55keV"


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Three training patients: 55 keV is 0.5 × 70 keV + 0.25 × 110 keV + 20; and 90 keV between both."""
    root, rng, rows = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for number in range(4):
        low, high = 4 * rng.integers(0, 50, (2, 2, 24, 24))
        images = {"70keV": low, "110keV": high, "90keV": (low + high) // 2, TARGET: low // 2 + high // 4 + 20}
        for name, volume in images.items():
            folder = root / name / f"P{number}"
            folder.mkdir(parents=True)
            for z, plane in enumerate(volume):
                Image.fromarray(plane.astype(np.uint8)).save(folder / f"{z + 1}.png")
        split = "test" if number == 3 else "train"
        for name in ("110keV", "90keV", "70keV"):
            rows.append([f"P{number}", split, name, TARGET, f"{name}/P{number}", f"{TARGET}/P{number}", ""])
    with open(root / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "split", "source", "target", "source_path", "target_path", "mask_path"])
        writer.writerows(rows)
    return read_manifest(root / "manifest.csv")


def fits(cases, sources):
    return {b.method: b for b in fit_baselines([sources], cases, DataSettings(), "uint8")[sources]}


def test_the_two_energy_fit_takes_the_ends_and_finds_the_mixture(cases):
    found = fits(cases, ("90keV",))["two-energy fit"]
    assert found.sources == ("70keV", "110keV")
    low, high = np.array([[0.0, 100.0, 200.0], [40.0, 40.0, 0.0]])
    assert found.apply([low, high]) == pytest.approx(0.5 * low + 0.25 * high + 20, abs=1e-3)


def test_the_linear_fit_is_least_squares_and_no_test_patient_is_in_it(cases):
    found = fits(cases, ("110keV",))["linear fit"]
    at = np.array([0.0, 255.0])
    train = [case for case in cases if case.split == "train" and case.source == "110keV"]
    x, y = (
        np.concatenate(
            [np.array(Image.open(file), float).ravel() for folder in folders for file in sorted(folder.glob("*"))]
        )
        for folders in ([case.source_path for case in train], [case.target_path for case in train])
    )
    # Pixels are drawn with replacement, so that the fit is that of all of them up to chance.
    assert found.apply([at]) == pytest.approx(np.polyval(np.polyfit(x, y, 1), at), abs=8)


def test_a_masked_protocol_is_fitted_inside_the_mask(tmp_path):
    """Within the mask the target is twice the source, everywhere else it is 7."""
    rng = np.random.default_rng(1)
    inside = np.zeros((24, 24), np.uint8)
    inside[8:12] = 1
    source = rng.integers(1, 100, (24, 24))
    for name, plane in (("x", source), ("y", np.where(inside, 2 * source, 7)), ("mask", inside)):
        (tmp_path / name).mkdir()
        Image.fromarray(plane.astype(np.uint8)).save(tmp_path / name / "1.png")
    masked = [Case("P0", "train", "x", "y", *(tmp_path / name for name in ("x", "y", "mask")))]
    found = fit_baselines([("x",)], masked, DataSettings(), "synthrad2023")["x",]
    assert found[0].apply([source[8:12]]) == pytest.approx(2 * source[8:12], abs=0.1)


def test_a_prediction_of_both_energies_has_no_other_two(cases):
    assert set(fits(cases, ("70keV", "110keV"))) == {"linear fit"}
    assert set(fits(cases, ("110keV",))) == {"linear fit", "two-energy fit", "intensity curve"}


def test_without_training_patients_there_are_none(cases):
    assert fits([case for case in cases if case.split == "test"], ("110keV",)) == {}


@pytest.mark.parametrize("falls", [True, False])
def test_the_curve_falls_where_the_relation_does(tmp_path, falls):
    """A relation that is far from a line, in either direction; the wrong one could give but a constant."""
    source = np.random.default_rng(2).integers(0, 256, (32, 32))
    for name, plane in (("x", source), ("y", (255 - source if falls else source) ** 2 // 255)):
        (tmp_path / name).mkdir()
        Image.fromarray(plane.astype(np.uint8)).save(tmp_path / name / "1.png")
    found = fits([Case("P0", "train", "x", "y", tmp_path / "x", tmp_path / "y")], ("x",))["intensity curve"]
    at = np.array([10.0, 128.0, 240.0])
    assert found.apply([at]) == pytest.approx((255 - at if falls else at) ** 2 / 255, abs=2)
