"""Flips, planes and checkpoints averaged: every voxel comes back to its place, and the spread is the deviation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from seresvit.data.volume import DataError, Volume, same_grid
from seresvit.synthesis.ensemble import PLANES, flipped, mean_and_spread, turned, turned_back


@pytest.fixture
def cube():
    affine = np.diag([2.0, 2.0, 2.1, 1.0])
    affine[:3, 3] = (-10, 20, 30)
    array = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    return Volume(array, affine, 30 + 2.1 * np.arange(3), "HU", Path("cube.nii"), "nifti")


def test_turned_slices_keep_every_voxel_at_its_place_in_space(cube):
    for plane in PLANES:
        view = turned(cube, plane)
        np.testing.assert_array_equal(turned_back(view.array, plane), cube.array)
        assert len(view.positions_mm) == len(view.array) and not same_grid(view, view)
        values = []
        for volume in (cube, view):
            z, y, x = np.indices(volume.array.shape).reshape(3, -1)
            places = (volume.affine @ np.stack([x, y, z, np.ones_like(x)])).T.round(6)
            values.append({tuple(place): v for place, v in zip(places, volume.array.ravel(), strict=True)})
        assert values[0] == values[1]
        normal = np.cross(view.affine[:3, 0], view.affine[:3, 1])
        normal /= np.linalg.norm(normal)
        last = view.affine @ [0, 0, len(view.array) - 1, 1]
        np.testing.assert_allclose(view.positions_mm[[0, -1]], [normal @ view.affine[:3, 3], normal @ last[:3]])
    assert turned(cube, "rows").array.shape == (4, 3, 5) and turned(cube, "columns").array.shape == (5, 3, 4)
    np.testing.assert_array_equal(turned(cube, "rows").array[1, 0], cube.array[-1, 1])  # the head is up


def test_orthogonal_planes_need_cubic_voxels(cube):
    flat = replace(cube, affine=cube.affine @ np.diag([1, 1, 3, 1.0]), positions_mm=cube.positions_mm * 3)
    with pytest.raises(DataError, match="cubic voxels"):
        turned(flat, "rows")
    with pytest.raises(DataError, match="uneven gaps"):
        turned(replace(cube, positions_mm=np.array([30, 32.1, 35])), "columns")
    assert turned(flat, "own") is flat


def test_a_flip_is_undone():
    image = torch.rand(2, 1, 4, 6)
    torch.testing.assert_close(flipped(lambda x: x * 2)(image), image * 2)
    ramp = torch.arange(6.0)  # a network that adds what is on the left adds it on the right of the mirror image
    torch.testing.assert_close(flipped(lambda x: x + ramp)(image), image + ramp.flip(0))


def test_mean_and_spread_are_those_of_numpy():
    members = np.random.default_rng(1).normal(1000, 3, (4, 2, 3, 3)).astype(np.float32)
    mean, spread = mean_and_spread(iter(members))
    np.testing.assert_allclose(mean, members.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(spread, members.std(axis=0, ddof=1), rtol=1e-4)
    mean, spread = mean_and_spread(iter(members[:1]))
    assert spread is None and np.array_equal(mean, members[0])
