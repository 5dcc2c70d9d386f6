"""One grid for all images of a patient: what a volume shows at the voxels of another, and where it shows anything.

Slices lie on one straight line, but neither evenly (a gap in a series) nor always at right angles to it (a tilted
gantry). So a voxel's slice follows from its position in millimetres, and not from one affine alone.
"""

from dataclasses import replace
from math import ceil

import numpy as np
from scipy import ndimage

from seresvit.config import Interpolation
from seresvit.data.volume import DataError, Unit, Volume, normal_of, origins_mm, same_grid

ORDERS = {"nearest": 0, "linear": 1, "bspline": 3}
BACKGROUND: dict[Unit, float] = {"HU": -1024.0, "arbitrary": 0.0, "uint8": 0.0}
# Between slices this many usual gaps apart one is missing, and what it showed is not known.
MISSING_SLICE_GAPS = 1.5


def resampled(volume: Volume, grid: Volume, interpolation: Interpolation) -> tuple[Volume, np.ndarray]:
    """`volume` at the voxels of `grid`, and where it covers them: (Z, Y, X) bool.

    A voxel reaches half its size to every side; beyond that stands the unit's background. Linear interpolation between
    slices goes by position; where one is missing, nothing is covered. Exact for every affine, also a sheared one, which
    images of SimpleITK cannot have; on others equal to its ResampleImageFilter. "bspline" is cubic, cut at the range
    of the volume. A coarser grid takes points, not means. What lies on the grid already is returned as it is.
    Raises DataError: different frames of reference, PNG (which has no place in space), "bspline" of uneven slices.
    """
    if lies_on(volume, grid):
        return volume, np.broadcast_to(np.True_, volume.array.shape)
    _check_comparable(volume, grid, interpolation)
    order, lowest, highest = ORDERS[interpolation], volume.array.min(), volume.array.max()
    values = ndimage.spline_filter(volume.array, order, np.float32, "mirror") if order > 1 else volume.array
    array = np.full(grid.array.shape, BACKGROUND[volume.unit], dtype=np.float32)
    covered = np.empty(grid.array.shape, dtype=bool)
    for k, origin_mm in enumerate(origins_mm(grid, grid.positions_mm)):
        index_ZYX, inside, covered[k] = _index_of_plane(volume, grid, origin_mm)
        shown = ndimage.map_coordinates(values, index_ZYX[:, inside], order=order, mode="mirror", prefilter=False)
        array[k, inside] = shown.clip(lowest, highest)
    frame = grid.frame_of_reference
    on_grid = replace(volume, array=array, affine=grid.affine, positions_mm=grid.positions_mm, headers=())
    return replace(on_grid, frame_of_reference=frame or volume.frame_of_reference), covered


def at_spacing(volume: Volume, spacing_mm: tuple[float, ...]) -> Volume:
    """A grid for `resampled`, its array an empty view: the axes and the field of view of `volume` at another spacing.

    `spacing_mm` (row, column) leaves the slices where they are; (slice, row, column) places them evenly.
    """
    rows, columns = volume.array.shape[1:]
    affine, positions_mm = volume.affine.copy(), volume.positions_mm
    if len(spacing_mm) == 3:
        gap_mm, reach_mm = usual_gap_mm(volume), np.ptp(positions_mm)
        count = _enough(reach_mm + gap_mm, spacing_mm[0])
        positions_mm = (np.arange(count) - (count - 1) / 2) * spacing_mm[0] + positions_mm[[0, -1]].mean()
        affine[:3, 3] = origins_mm(volume, positions_mm[:1])[0]
        affine[:3, 2] *= spacing_mm[0] / (normal_of(volume) @ affine[:3, 2])
    # The centre of the field stays, so the first voxel moves.
    for axis, (size, mm) in enumerate(((columns, spacing_mm[-1]), (rows, spacing_mm[-2]))):
        old_mm = np.linalg.norm(affine[:3, axis])
        count = _enough(size * old_mm, mm)
        affine[:3, 3] += affine[:3, axis] / old_mm * ((size - 1) * old_mm - (count - 1) * mm) / 2
        affine[:3, axis] *= mm / old_mm
        rows, columns = (rows, count) if axis == 0 else (count, columns)
    array = np.broadcast_to(np.float32(0), (len(positions_mm), rows, columns))
    return replace(volume, array=array, affine=affine, positions_mm=positions_mm, headers=())


def _enough(length_mm: float, spacing_mm: float) -> int:
    """How many voxels cover a length; at most one more than fit, so that the way back has none to invent."""
    return max(1, ceil(length_mm / spacing_mm - 1e-3))


def usual_gap_mm(volume: Volume) -> float:
    """The median distance between neighbouring slices; of a single slice, what its header says."""
    gaps_mm = np.abs(np.diff(volume.positions_mm))
    return float(np.median(gaps_mm) if gaps_mm.size else np.linalg.norm(volume.affine[:3, 2]))


def lies_on(volume: Volume, grid: Volume) -> bool:
    """Whether the voxels of both are the same, so that nothing is resampled."""
    same_shape = volume.array.shape == grid.array.shape and not same_grid(volume, grid)
    return same_shape and np.allclose(volume.positions_mm, grid.positions_mm, rtol=0, atol=0.01)


def _check_comparable(volume: Volume, grid: Volume, interpolation: Interpolation) -> None:
    frames = {volume.frame_of_reference, grid.frame_of_reference} - {""}
    if len(frames) > 1:
        raise DataError(
            f"{volume.path}: another frame of reference than {grid.path}, so positions do not compare; register them "
            "first, and export the registered series"
        )
    if "png" in (volume.format, grid.format):
        raise DataError(f"{volume.path}: PNG has no place in space to resample by; give slices of one size and number")
    gaps_mm = np.diff(volume.positions_mm)
    if interpolation == "bspline" and gaps_mm.size and np.ptp(gaps_mm) > 0.01 * usual_gap_mm(volume):
        raise DataError(
            f"{volume.path}: B-splines need evenly spaced slices, found gaps from {gaps_mm.min():.2f} to "
            f"{gaps_mm.max():.2f} mm; set data.interpolation=linear"
        )


def _index_of_plane(volume: Volume, grid: Volume, origin_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For a plane of `grid` the fractional indices (3, Y, X) into `volume`, and (Y, X) bool: inside it, and covered."""
    depth, *size_yx = volume.array.shape
    to_index = np.linalg.inv(volume.affine[:3, :3])
    first, per_pixel = to_index @ (origin_mm - volume.affine[:3, 3]), to_index @ grid.affine[:3, :2]
    down, across = np.ogrid[: grid.array.shape[1], : grid.array.shape[2]]
    x, y, steps = (first[axis] + per_pixel[axis, 0] * across + per_pixel[axis, 1] * down for axis in range(3))
    position_mm = volume.positions_mm[0] + steps * (normal_of(volume) @ volume.affine[:3, 2])
    z = np.interp(position_mm, volume.positions_mm, np.arange(depth))
    inside = np.ones(x.shape, dtype=bool)
    for index, size in zip((y, x), size_yx, strict=True):
        inside &= np.abs(index - (size - 1) / 2) <= size / 2 + 1e-6
    gap_mm, distance_mm = usual_gap_mm(volume), np.abs(position_mm - volume.positions_mm[np.rint(z).astype(int)])
    at_slice = distance_mm <= gap_mm / 2 + 1e-6
    inside &= at_slice | ((z > 0) & (z < depth - 1))
    gaps_mm = np.append(np.diff(volume.positions_mm), 0)
    covered = inside & (at_slice | (gaps_mm[z.astype(int)] <= MISSING_SLICE_GAPS * gap_mm))
    return np.stack([z, y.clip(0, size_yx[0] - 1), x.clip(0, size_yx[1] - 1)]), inside, covered
