"""Resampling against SimpleITK on the grids that it has, and against straight ramps on those that it has not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from seresvit.data.geometry import at_spacing, resampled
from seresvit.data.volume import DataError, Volume, normal_of, origins_mm

RNG = np.random.default_rng(0)
ITK = {"nearest": sitk.sitkNearestNeighbor, "linear": sitk.sitkLinear, "bspline": sitk.sitkBSpline}
NOWHERE = -7.0


def placed(shape=(9, 20, 24), spacing_mm_xyz=(1.0, 1.0, 2.0), turn_deg=(0, 0, 0), origin=(0, 0, 0), tilt=0.0, at=None):
    """An empty volume there; `tilt` mm that each slice lies further back a mm, `at` the positions of uneven slices."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix() @ np.diag(spacing_mm_xyz)
    affine[:3, 2] += tilt * spacing_mm_xyz[2] * affine[:3, 1] / spacing_mm_xyz[1]
    affine[:3, 3] = origin
    volume = Volume(np.zeros(shape, np.float32), affine, np.zeros(1), "arbitrary", Path("P1/mr.nii"), "nifti")
    steps_mm = np.arange(shape[0]) * spacing_mm_xyz[2] if at is None else np.asarray(at, float)
    affine[:3, 2] *= (steps_mm[1] - steps_mm[0]) / spacing_mm_xyz[2] if at is not None else 1
    return replace(volume, affine=affine, positions_mm=normal_of(volume) @ affine[:3, 3] + steps_mm)


def places_mm(volume):
    """The LPS place of every voxel, (Z, Y, X, 3)."""
    _, rows, columns = volume.array.shape
    y, x = np.mgrid[:rows, :columns][..., None]
    in_plane = x * volume.affine[:3, 0] + y * volume.affine[:3, 1]
    return origins_mm(volume, volume.positions_mm)[:, None, None] + in_plane


def with_ramp(volume):
    return replace(volume, array=(places_mm(volume) @ [0.5, -1.5, 2.0] + 100).astype(np.float32))


def in_itk(volume):
    image = sitk.GetImageFromArray(volume.array)
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(volume.affine[:3, 3].tolist())
    image.SetDirection((volume.affine[:3, :3] / spacing).ravel().tolist())
    return image


OBLIQUE = placed((12, 30, 40), (0.8, 0.9, 2.5), (10, -5, 20), (-10, 5, 7))
OTHER = placed((20, 35, 33), (1.1, 0.7, 1.7), (-3, 7, 11), (-8, 6, 4))


@pytest.mark.parametrize("interpolation", ITK)
def test_oblique_anisotropic_grids_agree_with_simpleitk(interpolation):
    z, y, x = np.mgrid[:12, :30, :40]
    smooth = replace(OBLIQUE, array=(np.sin(z / 2) + np.cos(y / 4) + np.sin(x / 5)).astype(np.float32))
    ours, covered = resampled(smooth, OTHER, interpolation)
    itk = sitk.Resample(in_itk(smooth), in_itk(OTHER), sitk.Transform(), ITK[interpolation], NOWHERE)
    expected = sitk.GetArrayFromImage(itk)
    np.testing.assert_array_equal(covered, expected != NOWHERE)
    assert 0.2 < covered.mean() < 0.8 and (ours.array[~covered] == 0).all()
    if interpolation == "bspline":
        # In the outer half voxel ITK goes on with the curve, where the edge stays the edge here.
        one, _ = resampled(replace(smooth, array=np.pad(np.ones((10, 28, 38), np.float32), 1)), OTHER, "linear")
        covered &= one.array == 1
    expected = expected.clip(smooth.array.min(), smooth.array.max())
    np.testing.assert_allclose(ours.array[covered], expected[covered], atol=1e-5)
    np.testing.assert_array_equal(ours.affine, OTHER.affine)


@settings(max_examples=40, deadline=None)
@given(
    turn=st.tuples(*[st.floats(-40, 40)] * 3),
    shift=st.tuples(*[st.floats(-6, 6)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 3)] * 3),
    tilt=st.floats(-0.4, 0.4),
    gaps=st.lists(st.floats(1, 1.4), min_size=8, max_size=8),
)
def test_a_ramp_stays_the_ramp_on_any_grid_from_uneven_slices_of_a_tilted_gantry(turn, shift, spacing, tilt, gaps):
    volume = with_ramp(placed(tilt=tilt, at=np.cumsum([0, *gaps])))
    grid = placed((7, 11, 12), spacing, turn, shift, tilt=-tilt)
    found, covered = resampled(volume, grid, "linear")
    # The outer half voxel holds the edge, so the ramp ends half a voxel before the image.
    inner, _ = resampled(replace(volume, array=np.pad(np.ones((7, 18, 22), np.float32), 1)), grid, "linear")
    known = covered & (inner.array == 1)
    np.testing.assert_allclose(found.array[known], with_ramp(grid).array[known], atol=2e-3)


def test_what_lies_beyond_half_a_voxel_is_background_and_not_covered():
    volume = replace(with_ramp(placed((3, 4, 4), (1, 1, 2))), unit="HU")
    found, covered = resampled(volume, placed((11, 4, 4), (1, 1, 0.5), origin=(0, 0, -1.25)), "linear")
    assert covered.any(axis=(1, 2)).tolist() == [False, *[True] * 10]
    assert (found.array[0] == -1024).all() and (found.array[1] == volume.array[0]).all()


def test_a_missing_slice_is_not_invented():
    whole = with_ramp(placed())
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    gapped = replace(whole, array=whole.array[kept], positions_mm=whole.positions_mm[kept])
    _, covered = resampled(gapped, whole, "linear")
    assert covered.all(axis=(1, 2)).tolist() == [k != 4 for k in range(9)]


def test_uneven_slices_are_refused_for_b_splines_with_the_remedy():
    with pytest.raises(DataError, match=r"mr\.nii: .*gaps from 1\.00 to 3\.00 mm; set data\.interpolation=linear"):
        resampled(placed((4, 8, 8), at=[0, 1, 2, 5]), placed(), "bspline")


def test_b_splines_stay_within_the_range_of_the_image():
    edge = replace(placed(), array=np.where(places_mm(placed())[..., 0] > 10.5, 1000, -1000).astype(np.float32))
    found, covered = resampled(edge, placed((9, 60, 70), (0.33, 0.33, 2)), "bspline")
    assert found.array[covered].min() == -1000 and found.array[covered].max() == 1000


def test_positions_that_mean_nothing_to_each_other_are_refused():
    one, two = (replace(placed(), frame_of_reference=uid) for uid in ("1.2", "1.3"))
    with pytest.raises(DataError, match="another frame of reference"):
        resampled(one, two, "linear")
    with pytest.raises(DataError, match="PNG has no place"):
        resampled(replace(placed(), format="png"), placed((9, 20, 25)), "linear")


def test_an_image_on_its_own_grid_is_returned_untouched():
    volume = with_ramp(OBLIQUE)
    found, covered = resampled(volume, replace(volume, array=volume.array * 0), "bspline")
    assert found is volume and covered.all()


@settings(max_examples=30, deadline=None)
@given(spacing=st.tuples(*[st.floats(0.3, 5)] * 3), tilt=st.floats(-0.3, 0.3), in_plane=st.booleans())
def test_another_spacing_keeps_axes_centre_and_field_of_view_and_leads_back(spacing, tilt, in_plane):
    volume = replace(placed((6, 9, 14), (0.8, 0.9, 2.5), (10, 20, -30), (3, 4, 5), tilt), unit="HU")
    grid = at_spacing(volume, spacing[1:] if in_plane else spacing)
    expected_z = volume.spacing_mm_zyx[0] if in_plane else spacing[0] * np.hypot(1, tilt)
    assert grid.spacing_mm_zyx == pytest.approx((expected_z, *spacing[1:]))
    np.testing.assert_allclose(places_mm(grid).mean(axis=(0, 1, 2)), places_mm(volume).mean(axis=(0, 1, 2)), atol=1e-6)
    _, there = resampled(volume, grid, "linear")
    back, here = resampled(replace(grid, array=np.ones(grid.array.shape, np.float32)), volume, "linear")
    assert there.all() and here.all() and (back.array == 1).all()
    assert not in_plane or np.array_equal(grid.positions_mm, volume.positions_mm)
