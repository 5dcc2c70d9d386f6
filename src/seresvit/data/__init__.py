"""Volumes from and to disk, whatever the format; the imaging libraries load on first use, not with the package."""

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from seresvit.data.volume import DataError, Volume

if TYPE_CHECKING:
    from seresvit.data.mark import Mark


def read_volume(path: Path, pixels: bool = True) -> Volume:
    """The image at `path`: a folder or zip of DICOM, a folder of PNG or TIFF slices, or an image file.

    Files may be .nii, .nii.gz, .mha, .nrrd, .tif or DICOM. Without `pixels` only headers are read: the array, of the
    right shape, is a view of one 0. Raises DataError: nothing there, or not one of these; and what the reader of the
    format refuses.
    """
    from seresvit.data.dicom import read_series
    from seresvit.data.nifti import ITK, NIFTI, read_image
    from seresvit.data.pictures import PICTURES, TIFF, read_pictures, read_tiff

    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a folder of DICOM or PNG, or a .nii, .mha or .nrrd file")
    if path.is_dir():
        try:
            names = [p.name for p in path.iterdir()]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
        has_pictures = any(Path(name).suffix.lower() in PICTURES and name[0] != "." for name in names)
        return read_pictures(path, pixels) if has_pictures else read_series(path, pixels)
    if path.name.lower().endswith(NIFTI + ITK):
        return read_image(path, pixels)
    if path.suffix.lower() in TIFF:
        return read_tiff(path, pixels)
    if path.suffix.lower() in ("", ".dcm", ".ima", ".zip"):
        return read_series(path, pixels)
    raise DataError(
        f"{path}: cannot read {path.suffix} files; give a folder or .zip of DICOM, a folder of grey PNG or TIFF, or a"
        " .nii, .nii.gz, .mha, .nrrd or .tif file"
    )


def write_volume(
    volume: Volume,
    path: Path,
    *,
    description: str,
    energy_kev: float | None = None,
    checkpoint_sha256: str = "",
    mark: "Mark | None" = None,
    is_uncertainty: bool = False,
    arriving: Iterable[int] | None = None,
) -> Path:
    """Writes `volume` under the folder `path` in its own format; what comes back is what `read_volume` reads again.

    DICOM and PNG become the folder, whatever stood there (never its source); NIfTI and ITK images become
    `synthetic.nii.gz`, `.mha` or `.nrrd` in it. `description` goes into the header of every format, `energy_kev` and
    `checkpoint_sha256` into that of DICOM, whose UIDs depend on it. `mark` puts the word SYNTHETIC on every slice:
    "burned" into the values, or an "overlay", which only DICOM has. DICOM says what `is_uncertainty`. `arriving`, in a
    volume that is still being made, gives the numbers of its slices, in order, as they come to be there. Raises
    DataError as the writers do, and what `arriving` raises.
    """
    from seresvit.data.derived import write_derived
    from seresvit.data.mark import burned
    from seresvit.data.nifti import write_image
    from seresvit.data.pictures import TIFF, write_pictures

    path = Path(path)
    source = volume.path.resolve()
    if volume.format in ("dicom", "png") and path.resolve() in (source, *source.parents):
        raise DataError(f"{path}: holds the source, which the new slices would replace; choose another folder")
    if volume.format == "dicom":
        write_derived(
            volume,
            path,
            description=description,
            checkpoint_sha256=checkpoint_sha256,
            energy_kev=energy_kev,
            mark=mark,
            is_uncertainty=is_uncertainty,
            arriving=arriving,
        )
        return path
    deque(arriving or (), maxlen=0)  # the other formats are one file, or need the range of all values
    if mark == "overlay":
        raise DataError(f"{volume.path}: only DICOM images have overlay planes; use --mark burned")
    if mark == "burned":
        volume = replace(volume, array=burned(volume.array, volume.unit))
    if volume.format == "png":
        pictures = path / "synthetic.tif" if volume.path.suffix.lower() in TIFF else path
        write_pictures(volume, pictures, description)
        return pictures
    suffix = volume.path.suffix.lower() if volume.format == "itk" else ".nii.gz"
    file = path / f"synthetic{suffix}"
    write_image(volume, file, description)
    return file
