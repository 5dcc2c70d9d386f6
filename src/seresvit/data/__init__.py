"""Volumes from and to disk, whatever the format; the imaging libraries load on first use, not with the package."""

from pathlib import Path

from seresvit.data.volume import DataError, Volume


def read_volume(path: Path) -> Volume:
    """The image at `path`: a folder of DICOM or of PNG slices, or a .nii, .nii.gz, .mha, .nrrd or DICOM file.

    Raises DataError: nothing there, or not one of these; and what the reader of the format refuses.
    """
    from seresvit.data.dicom import read_series
    from seresvit.data.nifti import ITK, NIFTI, read_image, read_png_folder

    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a folder of DICOM or PNG, or a .nii, .mha or .nrrd file")
    if path.is_dir():
        has_png = any(p.suffix.lower() == ".png" and not p.name.startswith(".") for p in path.iterdir())
        return read_png_folder(path) if has_png else read_series(path)
    if path.name.lower().endswith(NIFTI + ITK):
        return read_image(path)
    if path.suffix.lower() in ("", ".dcm", ".ima"):
        return read_series(path)
    raise DataError(
        f"{path}: cannot read {path.suffix} files; give a folder of DICOM or 8-bit grey PNG, or a .nii, .nii.gz,"
        " .mha or .nrrd file"
    )


def write_volume(volume: Volume, path: Path, *, description: str, energy_kev: float | None = None) -> Path:
    """Writes `volume` under the folder `path` in its own format; what comes back is what `read_volume` reads again.

    DICOM and PNG become the folder, whatever stood there (never its source); NIfTI and ITK images become
    `synthetic.nii.gz`, `.mha` or `.nrrd` in it. `description` goes into the header of every format, `energy_kev` into
    that of DICOM. Raises DataError as the writers do.
    """
    from seresvit.data.derived import write_derived
    from seresvit.data.nifti import write_image, write_png_folder

    path = Path(path)
    source = volume.path.resolve()
    if volume.format in ("dicom", "png") and path.resolve() in (source, *source.parents):
        raise DataError(f"{path}: holds the source, which the new slices would replace; choose another folder")
    if volume.format == "dicom":
        write_derived(volume, path, description=description, energy_kev=energy_kev)
        return path
    if volume.format == "png":
        write_png_folder(volume, path, description)
        return path
    suffix = volume.path.suffix.lower() if volume.format == "itk" else ".nii.gz"
    file = path / f"synthetic{suffix}"
    write_image(volume, file, description)
    return file
