"""Several predictions of one image, their mean and how far they lie apart: flips, planes, checkpoints.

The spread of the members is no interval: it says where they disagree, not how wrong they are. `intervals.py` turns it
into one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from seresvit.data.volume import DataError, Volume
from seresvit.synthesis.tiles import Synthesise

Plane = Literal["own", "rows", "columns"]
# A volume's own slices, and those at right angles to them: for axial slices the coronal and the sagittal ones.
PLANES: tuple[Plane, ...] = ("own", "rows", "columns")
# Voxels count as cubes up to this ratio of their longest side to their shortest.
ISOTROPIC = 1.1


@dataclass(frozen=True)
class Members:
    """Which predictions are averaged: mirror images, orthogonal planes, further checkpoints; and whether by tiles."""

    flips: bool = False
    planes: bool = False
    tiles: bool = False
    checkpoints: tuple[Path, ...] = ()

    @property
    def is_single(self) -> bool:
        """Whether there is one prediction and nothing to average."""
        return not (self.flips or self.planes or self.checkpoints)


def flipped(synthesise: Synthesise) -> Synthesise:
    """`synthesise` of the mirror image (left and right, as training draws it), mirrored back."""
    return lambda image_BCHW: synthesise(image_BCHW.flip(-1)).flip(-1)


def turned(volume: Volume, plane: Plane) -> Volume:
    """The volume as slices of another plane: "rows" stacks along its rows' axis, "columns" along its columns'.

    The old slices' axis runs up the new slices, the last slice on top: of axial slices that begin at the feet, coronal
    and sagittal ones with the head up. Without headers, since no file has these slices. `turned_back` is the inverse.
    Raises DataError for voxels that are no cubes or slices that are not evenly spaced.
    """
    if plane == "own":
        return volume
    sides, gaps_mm = volume.spacing_mm_zyx, np.diff(volume.positions_mm)
    is_even = len(gaps_mm) == 0 or np.ptp(gaps_mm) <= 0.01 * np.abs(gaps_mm).max()
    if max(sides) > ISOTROPIC * min(sides) or not is_even:
        voxel = "×".join(f"{side:.2f}" for side in sides)
        raise DataError(
            f"{volume.path}: orthogonal planes need cubic voxels in evenly spaced slices, found {voxel} mm"
            f"{'' if is_even else ' and uneven gaps'}; leave --planes out, or train with data.resample in mm"
        )
    num_slices, num_rows, num_columns = volume.array.shape
    x, y, z, origin = (volume.affine[:3, axis] for axis in range(4))
    top = origin + (num_slices - 1) * z
    # Columns to the patient's right come first in sagittal slices, so that the three axes stay right-handed.
    axes, start = ((x, -z, y), top) if plane == "rows" else ((y, -z, -x), top + (num_columns - 1) * x)
    affine = np.eye(4)
    affine[:3] = np.column_stack([*axes, start])
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    count = num_rows if plane == "rows" else num_columns
    positions_mm = normal @ start + np.arange(count) * (normal @ affine[:3, 2])
    array = np.ascontiguousarray(_transposed(volume.array, plane))
    return replace(volume, array=array, affine=affine, positions_mm=positions_mm, headers=())


def turned_back(array: np.ndarray, plane: Plane) -> np.ndarray:
    """(Z, Y, X) of the volume's own slices from an array of `turned` ones."""
    if plane == "own":
        return array
    if plane == "rows":
        return array[:, ::-1].transpose(1, 0, 2)
    return array[::-1, ::-1].transpose(1, 2, 0)


def _transposed(array: np.ndarray, plane: Plane) -> np.ndarray:
    if plane == "rows":
        return array.transpose(1, 0, 2)[:, ::-1]
    return array.transpose(2, 0, 1)[::-1, ::-1]


def mean_and_spread(members: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean and standard deviation (n − 1) of arrays of one shape, float32; no deviation (None) of a single one.

    One member is in memory at a time (Welford, Technometrics 1962).
    """
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for member in members:
        count += 1
        if count == 1:
            mean = member
            continue
        if count == 2:
            mean, squares = mean.astype(np.float32), np.zeros(member.shape, np.float32)
        difference = member - mean
        mean += difference / count
        squares += difference * (member - mean)
    if count == 0:
        raise ValueError("no member to average")
    return mean, np.sqrt(squares / (count - 1)) if count > 1 else None
