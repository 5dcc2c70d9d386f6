"""The images of a case on one grid: whose, what is kept of them, and real MR brought back from an oblique grid."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.spatial.transform import Rotation

from seresvit.config import DataSettings
from seresvit.data import read_volume
from seresvit.data.pair import load_pair, load_sources
from seresvit.data.pairing import Case
from seresvit.data.volume import DataError, Volume

BRATS = Path(__file__).parents[3] / "shared" / "data" / "brats_t1_flair"


def ramp(x_mm, y_mm, z_mm):
    return 200 + x_mm - 2 * y_mm + 3 * z_mm


def write(path: Path, shape_xyz, spacing_mm_xyz, origin_ras, shown=ramp) -> Path:
    """An image whose values follow from the place in RAS millimetres alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing_mm_xyz, 1.0])
    affine[:3, 3] = origin_ras
    index = np.indices(shape_xyz).reshape(3, -1)
    values = shown(*(affine[:3, :3] @ index + affine[:3, 3:])).reshape(shape_xyz)
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), path)
    return path


@pytest.fixture
def case(tmp_path) -> Case:
    """A coarse source of 12 × 12 × 12 mm beside a fine target that is wider to every side."""
    source = write(tmp_path / "P1" / "mr.nii.gz", (12, 12, 6), (1, 1, 2), (-6, -6, -5))
    target = write(tmp_path / "P1" / "ct.nii.gz", (32, 32, 32), (0.5, 0.5, 0.5), (-8, -8, -8))
    mask = write(tmp_path / "P1" / "mask.nii.gz", (12, 12, 12), (1, 1, 1), (-6, -6, -5.5), lambda x, y, z: x < 0)
    return Case("P1", "train", "mr", "ct", source, target, mask)


def shows_the_ramp(volume: Volume, where) -> bool:
    """Its values, at its own places, are those that were written; fails at the first that is not."""
    y, x = np.mgrid[: volume.array.shape[1], : volume.array.shape[2]]
    for plane, position_mm, known in zip(volume.array, volume.positions_mm, where, strict=True):
        place = volume.affine[:3, 0, None, None] * x + volume.affine[:3, 1, None, None] * y
        x_mm, y_mm = place[:2] + volume.affine[:2, 3, None, None]
        expected = ramp(-x_mm, -y_mm, position_mm)  # LPS to RAS
        np.testing.assert_allclose(plane[known], expected[known], atol=2e-3)
    return where.any()


def test_by_default_images_on_different_grids_are_refused_with_the_remedy(case):
    with pytest.raises(DataError, match=r"mr\.nii\.gz: image size 12×12 against 32×32 .*set data\.resample"):
        load_pair(case)


@pytest.mark.parametrize(
    ("resample", "shape", "spacing_mm_zyx"),
    [
        ("source", (6, 12, 12), (2, 1, 1)),
        ("target", (25, 32, 32), (0.5, 0.5, 0.5)),
        ((1.0, 1.0, 1.0), (12, 12, 12), (1, 1, 1)),
        ((0.75, 1.5), (6, 16, 8), (2, 0.75, 1.5)),
    ],
)
def test_source_and_target_meet_on_the_grid_that_is_named(case, resample, shape, spacing_mm_zyx):
    pair = load_pair(case, data=DataSettings(resample=resample))
    assert pair.source.array.shape == pair.target.array.shape == pair.labels.shape == shape
    assert pair.source.spacing_mm_zyx == pair.target.spacing_mm_zyx == pytest.approx(spacing_mm_zyx)
    np.testing.assert_array_equal(pair.source.positions_mm, pair.target.positions_mm)
    shown = pair.target.array != 0
    assert np.array_equal(shown, pair.source.array != 0) and shown.any(axis=(1, 2)).all()
    # Where an image ends, its last half voxel is flat.
    inner = (slice(2, -2), slice(8, -8), slice(8, -8)) if resample == "target" else (slice(1, -1),) * 3
    where = np.zeros(shape, bool)
    where[inner] = True
    assert shows_the_ramp(pair.target, where & shown)
    assert shows_the_ramp(pair.source, where & shown)
    assert len(pair.dropped) == (7 if resample == "target" else 0)
    assert set(np.unique(pair.labels)) == {0, 1} and 0.2 < pair.labels[shown].mean() < 0.8


def test_scores_are_taken_on_the_targets_grid_whatever_the_training_grid(case):
    pair = load_pair(case, data=DataSettings(resample=(1.0, 1.0, 1.0)), to_score=True)
    whole = read_volume(case.target_path)
    shown = pair.target.array != 0
    at = np.searchsorted(whole.positions_mm, pair.target.positions_mm)
    np.testing.assert_array_equal(pair.target.array[shown], whole.array[at][shown])


def test_planes_that_prediction_would_not_show_are_not_learnt(case, tmp_path):
    image = nib.load(case.source_path)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(np.full(3, 58 / np.sqrt(3)), degrees=True).as_matrix()
    nib.save(nib.Nifti1Image(image.get_fdata(), affine), tmp_path / "t.nii")
    turned = replace(case, source_path=tmp_path / "t.nii")
    with pytest.raises(DataError, match=r"t\.nii: its planes are turned .* set data\.resample=source"):
        load_pair(turned, data=DataSettings(resample="target"))
    assert load_pair(turned, data=DataSettings(resample="target"), to_score=True).target.array.any()
    assert load_pair(turned, data=DataSettings(resample="source")).source.array.shape[1:] == (12, 12)


def test_images_that_have_nothing_in_common_are_refused(case, tmp_path):
    nothing = replace(case, target_path=write(tmp_path / "far.nii", (4, 4, 4), (1, 1, 1), (900, 0, 0)))
    with pytest.raises(DataError, match="shows nothing of what"):
        load_pair(nothing, data=DataSettings(resample="target"))


def test_a_mask_takes_the_background_out_of_both_images_and_of_the_sources_in_prediction(case):
    data = DataSettings(resample="source", mask_background=True)
    pair = load_pair(case, data=data)
    for volume in (pair.source, pair.target):
        assert (volume.array[pair.labels == 0] == 0).all() and (volume.array[pair.labels == 1] != 0).all()
    (source,) = load_sources((case,), data)
    np.testing.assert_array_equal(source.array, pair.source.array)
    with pytest.raises(DataError, match=r"mr\.nii\.gz: data\.mask_background needs a mask"):
        load_pair(replace(case, mask_path=None), data=data)


@pytest.mark.skipif(not BRATS.is_dir(), reason="needs the BraTS volumes beside the checkout")
@pytest.mark.parametrize(("interpolation", "most"), [("linear", 0.02), ("bspline", 0.005)])
def test_a_real_t1_comes_back_from_an_oblique_grid(tmp_path, interpolation, most):
    folder = next(BRATS.glob("case_9_*"))
    for name in ("T1", "FLAIR"):
        whole = sitk.ReadImage(str(folder / f"{name}.nii.gz"), sitk.sitkFloat32)
        sitk.WriteImage(whole[60:180, 50:190, 60:100], tmp_path / f"{name}.nii.gz")
    folder = tmp_path
    image = sitk.ReadImage(str(folder / "T1.nii.gz"))
    rotation = sitk.Euler3DTransform(image.TransformContinuousIndexToPhysicalPoint([59.5, 69.5, 19.5]), 0.2, -0.15, 0.3)
    grid = sitk.Image([180, 190, 110], sitk.sitkFloat32)
    grid.SetSpacing([0.9, 0.9, 0.9])
    grid.SetDirection(rotation.GetMatrix())
    middle = np.array(grid.TransformContinuousIndexToPhysicalPoint([89.5, 94.5, 54.5]))
    grid.SetOrigin((np.array(rotation.GetCenter()) - middle).tolist())
    sitk.WriteImage(sitk.Resample(image, grid, sitk.Transform(), sitk.sitkBSpline), tmp_path / "oblique.nii.gz")
    case = Case("P9", "train", "T1", "FLAIR", tmp_path / "oblique.nii.gz", folder / "FLAIR.nii.gz")
    pair = load_pair(case, data=DataSettings(resample="target", interpolation=interpolation))
    original = read_volume(folder / "T1.nii.gz").array
    assert pair.dropped == [] and np.array_equal(pair.target.array, read_volume(folder / "FLAIR.nii.gz").array)
    brain = original > 0
    brain[:3] = brain[-3:] = brain[:, :3] = brain[:, -3:] = brain[..., :3] = brain[..., -3:] = False
    error = np.abs(pair.source.array - original)[brain].mean() / original[brain].mean()
    assert error < most
    # A shift by one voxel would not pass for it.
    assert np.abs(np.roll(original, 1, axis=2) - original)[brain].mean() / original[brain].mean() > 2 * most
