"""NIfTI, MHA and NRRD, in and out.

Files keep their voxels in any order of axes. Inside the project the array is always turned to LPS (x to the patient's
left, y to the back, z to the head), so that slices are axial and look as in DICOM; the writer turns it back.
"""

import re
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from seresvit.data.volume import MOST_DEFLATED, DataError, Unit, Volume, check_claim, written_whole

NIFTI = (".nii", ".nii.gz")
ITK = (".mha", ".nrrd")
READERS = {".mha": "MetaImageIO", ".nrrd": "NrrdImageIO"}
# Where the header of an MHA or NRRD file, which is text, has to end.
MOST_HEADER = 2**16
# A line of the header of an MHA file.
FIELD = re.compile(rb"[ \t]*([^\s=:][^=:]*?)[ \t]*[=:][ \t]*([!-~].*)")

# nibabel's world is RAS, ours (and ITK's) LPS: both flip x and y.
FLIP_XY = np.diag([-1.0, -1.0, 1.0, 1.0])
# These formats do not name a unit. Only air in HU reaches so far below zero; MR and label values do not.
HU_BELOW = -500.0


def read_image(path: Path, pixels: bool = True) -> Volume:
    """The 3-D image in a NIfTI (format "nifti"), MHA or NRRD (format "itk") file, turned to LPS.

    Slope and intercept are applied, single-element axes beyond the third dropped. Unit "HU" when the minimum is at or
    below -500, which only a CT with air reaches, "arbitrary" otherwise. `headers` holds what `write_image` needs.
    Without `pixels` only the header is read: the array is a view of one 0, and the unit, told by values, "arbitrary".
    Raises DataError: not readable or shorter than its header says, not three axes, complex or RGB, a singular affine,
    values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of an image")
    return _read_nifti(path, pixels) if path.name.lower().endswith(NIFTI) else _read_itk(path, pixels)


def write_image(volume: Volume, path: Path, description: str = "") -> None:
    """Writes `volume.array` into the voxel order, affine and header that `read_image` met.

    Data are int16 (rounded) for "HU" and float32 else; scale and display range are reset, and `description` is put into
    the header (NIfTI: `descrip`, its first 79 bytes); all else of a NIfTI header is untouched. Raises DataError:
    headers of another format, another size than the source file, values not finite or beyond int16.
    """
    path = Path(path)
    if volume.format not in ("nifti", "itk") or not volume.headers:
        raise DataError(f"{path}: needs the header of an image file, found format {volume.format}; write it as that")
    array = _storable(volume, path)
    header = volume.headers[0]
    if volume.format == "nifti":
        shape, affine = tuple(header.get_data_shape()), header.get_best_affine()
        array_xyz = _from_lps(array, affine, shape[:3], path)
        header = header.copy()
        header.set_data_dtype(array.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0
        if description:
            header["descrip"] = description.encode()[:79].decode(errors="ignore").encode()
        image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        # Given no affine, nibabel keeps every geometric field of the header as it is.
        image = image_class(array_xyz.reshape(shape), None, header)
        with written_whole(path) as temporary:
            image.to_filename(temporary)
        return
    array_xyz = _from_lps(array, _itk_affine_ras(header), header["size"], path)
    itk_image = sitk.GetImageFromArray(np.ascontiguousarray(array_xyz.T))
    itk_image.SetOrigin(header["origin"])
    itk_image.SetSpacing(header["spacing"])
    itk_image.SetDirection(header["direction"])
    if description:
        itk_image.SetMetaData("description", description)
    with written_whole(path) as temporary:
        try:
            sitk.WriteImage(itk_image, temporary, useCompression=True)
        except RuntimeError as error:
            raise DataError(f"{path}: cannot be written ({_reason(error)}); choose another folder") from None


def _read_nifti(path: Path, pixels: bool) -> Volume:
    try:
        with LoggingOutputSuppressor():  # remarks on odd headers that it then mends
            image: Any = nib.load(path)
        shape, dtype = tuple(image.shape), image.get_data_dtype()
        affine = np.asarray(image.affine, dtype=np.float64)
    except Exception as error:  # nibabel raises its own and the decompressor's errors
        raise DataError(f"{path}: not a readable NIfTI file ({_reason(error)}); write it again") from None
    if dtype.kind not in "iuf":
        kind = "complex" if dtype.kind == "c" else "RGB"
        raise DataError(f"{path}: values must be plain numbers, found {kind}; save one grey component as float32")
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise DataError(f"{path}: an image has three axes, found {shape}; save one volume of the series to a file")
    size = path.stat().st_size
    check_claim(path, shape, dtype.itemsize, size * (MOST_DEFLATED if path.suffix == ".gz" else 1))
    if not pixels:
        return _to_lps(np.broadcast_to(np.float32(0), shape[:3]), affine, path, "nifti", image.header)
    try:
        array_xyz = np.asarray(image.dataobj, dtype=np.float32).reshape(shape[:3])
    except Exception as error:
        raise DataError(f"{path}: values cannot be read ({_reason(error)}); copy the file again") from None
    return _to_lps(array_xyz, affine, path, "nifti", image.header)


def _read_itk(path: Path, pixels: bool) -> Volume:
    _check_detached(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(READERS[path.suffix.lower()])
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path}: not a readable image file ({_reason(error)}); write it again") from None
    shape = reader.GetSize()
    if reader.GetNumberOfComponents() != 1 or "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise DataError(f"{path}: values must be plain numbers, found several components; save one grey component")
    if len(shape) != 3:
        raise DataError(f"{path}: an image has three axes, found {shape}; save one volume of the series to a file")
    check_claim(path, shape, 1, path.stat().st_size * MOST_DEFLATED)
    header = {
        "size": reader.GetSize(),
        "origin": reader.GetOrigin(),
        "spacing": reader.GetSpacing(),
        "direction": reader.GetDirection(),
    }
    if not pixels:
        return _to_lps(np.broadcast_to(np.float32(0), shape), _itk_affine_ras(header), path, "itk", header)
    try:
        array_xyz = sitk.GetArrayFromImage(reader.Execute()).astype(np.float32, copy=False).T
    except RuntimeError as error:
        raise DataError(f"{path}: values cannot be read ({_reason(error)}); copy the file again") from None
    return _to_lps(array_xyz, _itk_affine_ras(header), path, "itk", header)


def _check_detached(path: Path) -> None:
    """Refuses a header that takes its voxels from another file, which may be any file that the process can read."""
    with open(path, "rb") as file:
        header = file.read(MOST_HEADER)
    lines = header.replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # both readers know all three ends of lines
    if path.suffix.lower() == ".mha":
        is_attached = False
        for line in header.split(b"\n"):
            field = FIELD.match(line)
            if field is None:  # a field without a value takes the next line for it, and hides that from the reader
                break
            if b"elementdatafile" in line.lower():
                is_attached = (field[1].lower(), field[2].strip().upper()) == (b"elementdatafile", b"LOCAL")
                break
    else:
        is_attached = b"\n\n" in lines and not re.search(
            rb"^\s*data\s*file\s*[:=]", lines, re.IGNORECASE | re.MULTILINE
        )
    if not is_attached:
        raise DataError(
            f"{path}: not a readable image file (no voxels after its header); save header and voxels in one file"
        )


def _itk_affine_ras(header: dict[str, Any]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(header["direction"], (3, 3)) * np.asarray(header["spacing"])
    affine[:3, 3] = header["origin"]
    return FLIP_XY @ affine


def _to_lps(
    array_xyz: np.ndarray, affine_ras: np.ndarray, path: Path, kind: Literal["nifti", "itk"], header: Any
) -> Volume:
    if not np.isfinite(affine_ras).all() or abs(np.linalg.det(affine_ras[:3, :3])) < 1e-9:
        raise DataError(f"{path}: the affine must be invertible, found {affine_ras[:3].tolist()}; repair the header")
    was_read = any(array_xyz.strides)
    if was_read and (bad := int((~np.isfinite(array_xyz)).sum())):
        raise DataError(f"{path}: values must be finite, found {bad} that are not; replace them, for example by 0")
    turn = _turn_to_lps(affine_ras)
    affine = FLIP_XY @ affine_ras @ inv_ornt_aff(turn, array_xyz.shape)
    turned = apply_orientation(array_xyz, turn).T
    array = np.ascontiguousarray(turned) if was_read else turned
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    unit: Unit = "HU" if was_read and array.min() <= HU_BELOW else "arbitrary"
    return Volume(
        array=array,
        affine=affine,
        positions_mm=normal @ affine[:3, 3] + np.arange(len(array)) * (normal @ affine[:3, 2]),
        unit=unit,
        path=path,
        format=kind,
        modality="CT" if unit == "HU" else "",
        headers=(header,),
    )


def _turn_to_lps(affine_ras: np.ndarray) -> np.ndarray:
    return ornt_transform(io_orientation(affine_ras), axcodes2ornt("LPS"))


def _from_lps(array: np.ndarray, affine_ras: np.ndarray, shape: tuple[int, ...], path: Path) -> np.ndarray:
    """The inverse of the turn in `_to_lps`: (x, y, z) as in the file."""
    back = ornt_transform(axcodes2ornt("LPS"), io_orientation(affine_ras))
    array_xyz = apply_orientation(array.T, back)
    if array_xyz.shape != tuple(shape):
        raise DataError(
            f"{path}: the source file has {tuple(shape)} voxels, found {array_xyz.shape}; predict all slices"
        )
    return array_xyz


def _storable(volume: Volume, path: Path) -> np.ndarray:
    if bad := int((~np.isfinite(volume.array)).sum()):
        raise DataError(f"{path}: values must be finite, found {bad} that are not; nothing was written")
    if volume.unit != "HU":
        return volume.array.astype(np.float32)
    rounded = np.rint(volume.array)
    if rounded.min() < -32768 or rounded.max() > 32767:
        raise DataError(f"{path}: HU must fit int16, found {rounded.min():g} to {rounded.max():g}; nothing was written")
    return rounded.astype(np.int16)


def _reason(error: Exception) -> str:
    """The last line of a library's message, which in ITK's is the one that tells."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][-160:] if lines else type(error).__name__
