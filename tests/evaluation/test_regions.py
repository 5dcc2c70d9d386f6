"""Judged by NumPy on boolean masks, one region at a time, and by Python sets of voxels."""

from types import SimpleNamespace

import numpy as np
import pytest

from seresvit.evaluation.gates import regions_of
from seresvit.evaluation.regions import region_scores, tally
from seresvit.evaluation.tissues import TISSUES_HU, label_regions, tissue_map

NAMES = {"vessel": 2, "femur": 5, "absent": 7}


@pytest.fixture(scope="module")
def volumes():
    rng = np.random.default_rng(0)
    target = rng.choice([-1000, -700, -250, -80, 40, 180, 900], (3, 20, 24)) + rng.normal(0, 15, (3, 20, 24))
    synthetic = target + rng.normal(4, 60, target.shape)
    labels = rng.choice([0, 1, 2, 5], target.shape).astype(np.uint8)
    target[labels == 5] = np.abs(target[labels == 5]) + 260
    return target.astype(np.float32), synthetic.astype(np.float32), labels


@pytest.mark.parametrize("slices", [[1], [0, 2], [0, 1, 2]])
def test_every_score_of_every_region_by_masks(volumes, slices):
    target, synthetic, labels = volumes
    found = region_scores(tally(target, synthetic, labels, NAMES, True), slices)
    t, s, inside = target[slices].astype(float), synthetic[slices].astype(float), labels[slices]
    regions = {name: inside == value for name, value in NAMES.items()}
    for name, (low, high) in TISSUES_HU.items():
        regions[f"hu_{name}"] = (inside > 0) & (t > low) & (t <= high)
    assert {name.split("_", 1)[1].removeprefix("low_").removeprefix("high_") for name in found} == set(regions)
    for name, where in regions.items():
        error = (s - t)[where]
        if not where.any():
            assert np.isnan([found[f"mae_{name}"], found[f"bias_{name}"], found[f"loa_low_{name}"]]).all()
            continue
        assert found[f"target_{name}"] == pytest.approx(t[where].mean())
        assert found[f"mae_{name}"] == pytest.approx(np.abs(error).mean())
        # The error of a region of interest: mean HU of the synthetic image less that of the target.
        assert found[f"bias_{name}"] == pytest.approx(s[where].mean() - t[where].mean(), abs=1e-6)
        assert found[f"loa_low_{name}"] == pytest.approx(error.mean() - 1.96 * error.std(ddof=1))
        assert found[f"loa_high_{name}"] == pytest.approx(error.mean() + 1.96 * error.std(ddof=1))


def dice(a, b):
    return 2 * len(a & b) / (len(a) + len(b))


def voxels(mask):
    return set(np.flatnonzero(mask).tolist())


def test_dice_of_bone_and_of_what_fills_a_label(volumes):
    target, synthetic, labels = volumes
    found = region_scores(tally(target, synthetic, labels, NAMES, True), [0, 1, 2])
    inside = labels > 0
    assert found["dice_hu_bone"] == pytest.approx(
        dice(voxels(inside & (target > 250)), voxels(inside & (synthetic > 250)))
    )
    of_femur = [voxels((labels == 5) & (array > 250)) for array in (target, synthetic)]
    assert found["dice_femur"] == pytest.approx(dice(*of_femur)) and found["dice_femur"] < 1
    assert np.isnan(found["dice_absent"])


def test_a_missed_clot_costs_dice_of_its_label_alone():
    target, labels = np.full((1, 8, 8), 180.0), np.ones((1, 8, 8), np.uint8)
    target[0, 2:4, 2:4], labels[0, 2:4, 2:4] = 50, 2
    filled_in = np.full_like(target, 180)
    found = region_scores(tally(target, filled_in, labels, {"vessel": 1, "embolus": 2}, True), [0])
    assert found["dice_embolus"] == 0 and found["dice_vessel"] == 1 and found["bias_embolus"] == 130


def test_without_a_mask_all_counts_and_without_hu_there_are_no_tissues(volumes):
    target, synthetic, labels = volumes
    everywhere = region_scores(tally(target, synthetic, None, {}, True), [0, 1, 2])
    bone = target > 250
    assert everywhere["mae_hu_bone"] == pytest.approx(np.abs(synthetic - target)[bone].mean(dtype=float))
    of_mr = region_scores(tally(target, synthetic, labels, NAMES, False), [0, 1, 2])
    assert not any("hu_" in name or "dice" in name for name in of_mr)
    assert of_mr["mae_vessel"] == pytest.approx(np.abs(synthetic - target)[labels == 2].mean(dtype=float))


def test_a_mask_without_names_is_no_tissue(volumes):
    target, synthetic, labels = volumes
    found = region_scores(tally(target, synthetic, (labels > 0).astype(np.uint8), {"mask": 1}, True), [0])
    assert "mae_mask" in found and "dice_mask" not in found


def test_ranges_hold_their_upper_bound():
    names = [None, *TISSUES_HU]
    found = [names[k] for k in tissue_map(np.array([-950, -949, -300, -200, -150, -20, 100, 250, 250.1, 3000]))]
    assert found == [None, "lung", "lung", None, None, "fat", "soft", "contrast", "bone", "bone"]


def test_a_label_never_takes_the_name_of_a_region_of_ours():
    names = {"hu_bone": 1, "image": 2, "whole_body": 3, "bone": 4, "label_image": 5}
    regions = label_regions(names)
    assert regions == {"label_hu_bone": 1, "label_label_image": 2, "label_whole_body": 3, "bone": 4, "label_image": 5}
    labels = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    found = regions_of(SimpleNamespace(labels=labels, label_names=names), by_labels=True)
    assert found["whole_body"].sum() == 5 and "image" not in found and len(found) == 6
    assert all((found[region] == (labels == value)).all() for region, value in regions.items())
