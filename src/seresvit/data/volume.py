"""Volume: one image in patient space, with all that is needed to write a derived one beside it.

Axes: Z slice, Y row, X column. Patient coordinates are millimetres in DICOM's LPS frame (x to the patient's left,
y to the back, z to the head), whatever the file held.
"""

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike

Unit = Literal["HU", "arbitrary", "uint8"]


# Deflate cannot compress more than 1032 times (RFC 1951: 258 bytes in 2 bits).
MOST_DEFLATED = 1032
ROOM_FOR_HEADER = 2**20
# Arrays above this many bytes lie on disk, from where the system takes into memory what is looked at.
MOST_IN_MEMORY = 2**28
# Of what is being written: the beginning of its folder's name, and the lock in it.
WRITING, LOCK = ".writing-", ".lock"
ABANDONED_AFTER_S = 24 * 3600
# What the system says where there is no room left: on the disk, for this user, in one file.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DataError(ValueError):
    """Input that cannot be used as it is: the message is one line and names the file, what was found, what to do."""


@dataclass(frozen=True, eq=False)
class Volume:
    """An image of one patient.

    `array` (Z, Y, X) float32 in `unit`; `affine` 4×4 float64 from voxel index (x, y, z) to LPS millimetres, with the
    z column from the first to the second slice; `positions_mm` (Z,) of the slices along the normal, which need not be
    evenly spaced; `headers`, what the reader kept for the writer: one pydicom Dataset without pixels a slice, or one
    nibabel header and its like; `set_aside`, what lay there and is no image, each as "RS.dcm: RTSTRUCT".
    """

    array: np.ndarray
    affine: np.ndarray
    positions_mm: np.ndarray
    unit: Unit
    path: Path
    format: Literal["dicom", "nifti", "itk", "png"]
    patient: str = ""
    modality: str = ""
    description: str = ""
    energy_kev: float | None = None
    frame_of_reference: str = ""
    headers: tuple[Any, ...] = field(default=(), repr=False)
    set_aside: tuple[str, ...] = ()

    @property
    def spacing_mm_zyx(self) -> tuple[float, float, float]:
        """Distances between voxel centres (slice, row, column) in millimetres."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)


def energy_kev_in(text: str) -> float | None:
    """The one energy that a label names, such as 70.0 for 'MonoE 70keV[HU] 070keV'; None for none or several."""
    energies = {float(number) for number in re.findall(r"(\d+(?:\.\d+)?)[\s_-]*keV", text, re.IGNORECASE)}
    return energies.pop() if len(energies) == 1 else None


def normal_of(volume: Volume) -> np.ndarray:
    """The unit vector (3,) along which `positions_mm` are measured, at right angles to the slices."""
    normal = np.cross(volume.affine[:3, 0], volume.affine[:3, 1])
    return normal / np.linalg.norm(normal)


def origins_mm(volume: Volume, positions_mm: np.ndarray) -> np.ndarray:
    """Where the first voxel of a slice at each of these positions lies, on the line of slices: (N, 3) LPS mm."""
    step = volume.affine[:3, 2] / (normal_of(volume) @ volume.affine[:3, 2])
    return volume.affine[:3, 3] + np.outer(positions_mm - volume.positions_mm[0], step)


def same_grid(a: Volume, b: Volume, tolerance_mm: float = 0.01) -> str:
    """Empty when the slices of both lie in one plane grid, else what differs, as words for a message.

    Compares in-plane size, spacing, orientation and in-plane origin; not the number of slices, since a missing slice is
    matched by position. Origins are compared at the first and the last slice of the shorter series, so that neither a
    tilted gantry nor another first slice is taken for a shift.
    """
    if a.array.shape[1:] != b.array.shape[1:]:
        return f"image size {a.array.shape[1]}×{a.array.shape[2]} against {b.array.shape[1]}×{b.array.shape[2]}"
    if not np.allclose(a.spacing_mm_zyx[1:], b.spacing_mm_zyx[1:], atol=1e-3):
        return f"pixel spacing {a.spacing_mm_zyx[1:]} mm against {b.spacing_mm_zyx[1:]} mm"
    axes_a, axes_b = (v.affine[:3, :2] / np.linalg.norm(v.affine[:3, :2], axis=0) for v in (a, b))
    if not np.allclose(axes_a, axes_b, atol=1e-3):
        return "orientation of rows and columns"
    ends_mm = min(a.positions_mm, b.positions_mm, key=len)[[0, -1]]
    offsets = (origins_mm(a, ends_mm) - origins_mm(b, ends_mm)) @ axes_a
    # A line of slices is known from its first two, so that rounding in the headers grows along it.
    followed_mm = np.abs(ends_mm - a.positions_mm[0]) + np.abs(ends_mm - b.positions_mm[0])
    if (shifted := np.abs(offsets).max(axis=1) > tolerance_mm + 1e-3 * followed_mm).any():
        return f"in-plane origin by {offsets[shifted.argmax()].round(3).tolist()} mm"
    if a.frame_of_reference and b.frame_of_reference and a.frame_of_reference != b.frame_of_reference:
        return "frame of reference"
    return ""


def check_claim(path: Path, shape: tuple[int, ...], itemsize: int, most: int) -> None:
    """Refuses a file that cannot hold what it claims, before memory is taken for it.

    `most` is the largest number of bytes that its own can unpack to. Raises DataError.
    """
    claimed = itemsize * int(np.prod([int(n) for n in shape], dtype=object))
    if claimed <= 0 or claimed > most + ROOM_FOR_HEADER:
        raise DataError(f"{path}: {shape} voxels need {claimed} bytes, more than the file can hold; copy it again")


def room(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> np.ndarray:
    """An array to be filled; a large one in a file without a name in TMPDIR, which is gone with the array.

    So the memory that must be there for a long series is that of a short one. Where the disk has no room for it, it
    lies in memory.
    """
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if num_bytes > MOST_IN_MEMORY and hasattr(os, "posix_fallocate"):
        with suppress(OSError), tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # else a disk that fills up later ends the process
            return np.memmap(file, dtype, "r+", shape=shape)
    return np.empty(shape, dtype)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends without an error, and else is removed.

    The temporary name keeps the suffixes, since writers choose their format by them. Works for a file or a folder
    (make the folder inside the block); what stood at `path` is replaced. Raises DataError when it cannot be written.
    What a killed process leaves behind, `remove_abandoned` knows by the lock that nobody holds any more.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=WRITING, dir=path.parent))
    except OSError as error:
        raise _unwritten(path, error) from None
    temporary, lock = folder / path.name, FileLock(folder / LOCK)
    try:
        with suppress(OSError, NotImplementedError):  # a file system without locks
            lock.acquire(timeout=0)
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        if path.is_dir():
            os.replace(path, folder / "replaced")
        try:
            os.replace(temporary, path)
        except BaseException:  # also Ctrl-C: what stood there comes back
            if (folder / "replaced").exists():
                os.replace(folder / "replaced", path)
            raise
    except OSError as error:
        raise _unwritten(path, error) from None
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _unwritten(path: Path, error: OSError) -> DataError:
    path = Path(*(part for part in path.parts if not part.startswith(WRITING)))
    remedy = "make room and give the same command again" if error.errno in DISK_FULL else "choose another folder"
    return DataError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed, {remedy}")


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`, and nothing that one still writes.

    That is what nobody holds the lock of, on this machine or another; and what has no lock, as from a file system that
    knows none, a day after it was last touched.
    """
    for path in folder.glob(f"{WRITING}*"):
        with suppress(OSError, NotImplementedError):  # a living one has just finished, or it cannot be told
            if (path / LOCK).exists():
                with suppress(Timeout), FileLock(path / LOCK, timeout=0):
                    shutil.rmtree(path, ignore_errors=True)
            elif time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)
