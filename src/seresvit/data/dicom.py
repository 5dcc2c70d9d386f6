"""DICOM: a series in as one Volume.

What is read is decided by geometry alone: slices lie where ImagePositionPatient puts them, never in the order of
InstanceNumber or file name.
"""

import logging
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
from pydicom import Dataset, FileDataset, dcmread, uid
from pydicom.config import disable_value_validation
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset
from pydicom.pixels import apply_modality_lut

from seresvit.data.volume import DataError, Unit, Volume, energy_kev_in, room

NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
# Objects with pixels that are no image; those without pixels are told by that.
NOT_IMAGES = ("RTDOSE", "RTIMAGE", "SEG")
# RescaleType may be absent from a CT image for HU only (C.8.2.1.1.1).
HU_TYPES = ("", "HU", "HU_MOD")
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
FUNCTIONAL_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"),
    *("PixelValueTransformationSequence", "FrameVOILUTSequence"),
)
# A functional group too (C.8.15.3.12), and in single-frame objects a sequence as it is (C.8.2.2).
MULTI_ENERGY = "MultienergyCTCharacteristicsSequence"
# Where scanners without it name the energy of a virtual monoenergetic image.
ENERGY_LABELS = ("SeriesDescription", "ImageComments", "ImageType", "DerivationDescription")
MULTI_FRAME = (
    *("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("DimensionOrganizationSequence", "DimensionIndexSequence"),
)
# The plane of a slice, by attribute and count of its numbers; all but the position are the same in a series.
GEOMETRY = {"ImageOrientationPatient": 6, "PixelSpacing": 2, "ImagePositionPatient": 3}
SAME_IN_SERIES = ("Modality", "FrameOfReferenceUID", "Rows", "Columns", "ImageOrientationPatient", "PixelSpacing")
# Copies that were numbered anew may share the UID of their series, and are two patients' all the same.
SAME_PERSON = ("StudyInstanceUID", "PatientID")
SAME_NUMBER = 1e-3
SAME_POSITION_MM = 1e-2
OFF_LINE_MM = 0.1
# Unless they are blank and small, no real images deflate a hundredfold, and none compresses a thousandfold at all.
MOST_DEFLATED = 100
MOST_COMPRESSED = 1000
SMALL = 2**28

File = Path | zipfile.Path


class Frame(NamedTuple):
    """One plane: its file, its number there, and its header, as of a single-frame object without pixels."""

    path: File
    number: int
    header: Dataset


_TOLERANT, _TOLERANT_THREADS, _TOLERANT_LOCK = ExitStack(), [0], threading.Lock()


@contextmanager
def tolerant() -> Iterator[None]:
    """pydicom without its remarks on non-standard values: archives are full of them, and they name patients.

    What it changes belongs to the process: the first thread that enters changes it, the last one out changes it back.
    """
    with _TOLERANT_LOCK:
        if not _TOLERANT_THREADS[0]:
            _TOLERANT.enter_context(_without_remarks())
        _TOLERANT_THREADS[0] += 1
    try:
        yield
    finally:
        with _TOLERANT_LOCK:
            _TOLERANT_THREADS[0] -= 1
            if not _TOLERANT_THREADS[0]:
                _TOLERANT.close()


@contextmanager
def _without_remarks() -> Iterator[None]:
    logger, level = logging.getLogger("pydicom"), logging.getLogger("pydicom").level
    logger.setLevel(logging.CRITICAL)
    try:
        with disable_value_validation(), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _told_in_one_line(path: File) -> Iterator[None]:
    """Parsers and decoders of damaged files raise almost anything: here it becomes a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except RecursionError:
        raise DataError(f"{path}: sequences are nested too deeply to be an image; remove the file") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{path}: cannot be read as DICOM ({reason}); check it or copy it again") from None


def read_series(folder: Path, pixels: bool = True) -> Volume:
    """The one image series in `folder` (or in one file, or a zip), slices sorted along their normal, values rescaled.

    Files that are not DICOM and objects that are not images (RTSTRUCT, SR, ...) are set aside, and localizers beside
    other images. Unit "HU" for CT whose RescaleType says nothing else, "arbitrary" otherwise; there MONOCHROME1, whose
    high values are dark (C.7.6.3.1.2), is inverted. Gaps may differ: `positions_mm` carries them, and the affine a
    tilted gantry. Enhanced multi-frame objects are read by their functional groups. `headers`: one Dataset a slice.
    Without `pixels` only headers are read, and the array is a view of one 0.
    Raises DataError: nothing to read; several series, studies or patients; differing size, spacing, orientation or
    frame of reference; two slices at one position; no geometry; colour; pixels that are short, damaged or in an unknown
    transfer syntax.
    """
    folder = Path(folder)
    with tolerant(), _files(folder) as files:
        frames, set_aside = _find_frames(folder, files)
        _check_one_series(folder, frames)
        frames, affine, positions_mm = _sort_along_normal(frames)
        first = frames[0].header
        shape = (len(frames), int(first.Rows), int(first.Columns))
        array = _read_pixels(frames, shape) if pixels else np.broadcast_to(np.float32(0), shape)
    if pixels and not all(np.isfinite(plane).all() for plane in array):
        raise DataError(f"{folder}: values must be finite after the rescale; check RescaleSlope and RescaleIntercept")
    return Volume(
        array=array,
        affine=affine,
        positions_mm=positions_mm,
        unit=_unit(first),
        path=folder,
        format="dicom",
        patient=text_of(first, "PatientID"),
        modality=text_of(first, "Modality"),
        description=text_of(first, "SeriesDescription"),
        energy_kev=_energy_kev(first),
        frame_of_reference=text_of(first, "FrameOfReferenceUID"),
        headers=tuple(frame.header for frame in frames),
        set_aside=tuple(set_aside),
    )


@contextmanager
def _files(folder: Path) -> Iterator[list[File]]:
    """What may be an image in a folder or zip, or the one file itself. Nothing of a zip is ever written to disk."""
    if folder.suffix.lower() == ".zip" and folder.is_file():
        with _told_in_one_line(folder):
            archive = zipfile.ZipFile(folder)
        with archive:
            members = _checked_members(folder, archive)
            yield [zipfile.Path(archive, member.filename) for member in members]
        return
    try:
        inside = [path for path in (folder.iterdir() if folder.is_dir() else [folder]) if path.name[0] != "."]
        if lost := [path for path in inside if not path.exists()]:
            raise DataError(f"{lost[0]}: a link to a file that is not there; fetch the file, or remove the link")
        paths = sorted(path for path in inside if path.is_file())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
    yield list(paths)


def _checked_members(folder: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in a zip, refused when they claim to unpack to more than images do; `zipfile` unpacks no more."""
    members = [m for m in archive.infolist() if not m.is_dir() and not PurePosixPath(m.filename).name.startswith(".")]
    claimed, size = sum(member.file_size for member in members), folder.stat().st_size
    if claimed > max(SMALL, MOST_DEFLATED * size):
        raise DataError(f"{folder}: {size} bytes claim to unpack to {claimed}; zip the series again")
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{folder}: {member.filename} is encrypted or not deflated; zip the series again")
    return members


def read_object(file: File, pixels: bool) -> FileDataset:
    """One object, without its pixels unless they are asked for; refused where it would inflate to more than images do.

    Raises DataError for that, and what pydicom raises for what is not DICOM or damaged.
    """
    with file.open("rb") as stream:
        begin = stream.read(1024)
        if uid.DeflatedExplicitVRLittleEndian.encode() in begin:
            # The file's own header: 132 bytes, then its length, an element of 12 bytes (PS3.10, 7.1).
            stream.seek(144 + int.from_bytes(begin[140:144], "little"))
            _check_deflated(file, stream)
        stream.seek(0)
        found = dcmread(stream, stop_before_pixels=not pixels)
        found.ends_at = stream.tell()  # where pixels begin, unless they are deflated
        return found


def _with_pixels(file: File, header: Dataset) -> Dataset:
    """The pixels of the object of that header and what describes them; only the pixels are read."""
    if header.file_meta.TransferSyntaxUID == uid.DeflatedExplicitVRLittleEndian:
        return read_object(file, pixels=True)
    whole = header[0x00280000:]
    whole.file_meta = header.file_meta
    with file.open("rb") as stream:
        stream.seek(header.ends_at)
        whole.update(read_dataset(stream, *header.original_encoding))  # type: ignore[arg-type]
    return whole


def _check_deflated(file: File, stream: IO[bytes]) -> None:
    """Refuses a dataset that inflates to more than images do, piece by piece, since pydicom takes it whole."""
    inflate, inflated = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while piece := inflate.unconsumed_tail or stream.read(2**20):
        inflated += len(inflate.decompress(piece, 2**20))
        if inflated > max(SMALL, MOST_DEFLATED * stream.tell()):
            raise DataError(f"{file}: inflates to more than {inflated} bytes, as no image does; copy it again")


def _find_frames(folder: Path, files: list[File]) -> tuple[list[Frame], list[str]]:
    """The planes of all images, and what was set aside, as "name: what it is"."""
    frames: list[Frame] = []
    set_aside = []
    for file in files:
        with _told_in_one_line(file):
            try:
                header = read_object(file, pixels=False)
            except InvalidDicomError:
                if file.suffix.lower() == ".dcm":
                    raise DataError(f"{file}: not DICOM in spite of its name; remove it, or copy it again") from None
                set_aside.append(f"{file.name}: not DICOM")
                continue
            if _is_image(header):
                _check_pixel_claim(file, header)
                frames += _split_frames(file, header)
            else:
                sop_class = uid.UID(str(header.file_meta.get("MediaStorageSOPClassUID", "")))
                set_aside.append(f"{file.name}: {text_of(header, 'Modality') or sop_class.name or 'no image'}")
    images = [frame for frame in frames if not _is_localizer(frame)]
    if images:
        set_aside += [f"{frame.path.name}: LOCALIZER" for frame in frames if _is_localizer(frame)]
        frames = images
    if not frames:
        raise DataError(f"{folder}: no DICOM image found; give the folder that holds the slices of one series")
    return frames, set_aside


def _is_localizer(frame: Frame) -> bool:
    """By value 3 of ImageType (C.8.2.1.1.1)."""
    return "LOCALIZER" in text_of(frame.header, "ImageType")


def _is_image(header: Dataset) -> bool:
    """True also for a file cut before Rows: it counts as the image that it was, and must not vanish unnoticed."""
    sop_class = uid.UID(str(header.file_meta.get("MediaStorageSOPClassUID", "")))
    if sop_class == uid.MediaStorageDirectoryStorage or text_of(header, "Modality") in NOT_IMAGES:
        return False
    return "Rows" in header or "SeriesInstanceUID" not in header or "Image Storage" in sop_class.name


def _check_pixel_claim(path: File, header: Dataset) -> None:
    """Refuses before anything is allocated for it what the file cannot hold."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise DataError(f"{path}: no transfer syntax in its file header; convert it, for example with dcmconv")
    for keyword in (*IDENTITY, "Rows", "Columns", "BitsAllocated"):
        if not text_of(header, keyword):
            raise DataError(f"{path}: {keyword} is missing; the file is truncated, or export the series again")
    if not (colour := text_of(header, "PhotometricInterpretation")).startswith("MONOCHROME"):
        raise DataError(f"{path}: pixels must be MONOCHROME, found {colour or 'none'}; give the original grey series")
    frames = int(header.get("NumberOfFrames") or 1)
    claimed = frames * int(header.Rows) * int(header.Columns) * int(header.BitsAllocated) // 8
    size = path.stat().st_size if isinstance(path, Path) else path.root.getinfo(path.at).file_size
    if claimed <= 0 or claimed > (size if syntax in NATIVE else max(SMALL, MOST_COMPRESSED * size)):
        raise DataError(
            f"{path}: {frames} x {header.Rows} x {header.Columns} pixels need {claimed} bytes, found {size};"
            " it is truncated or damaged: copy it again"
        )


def _split_frames(path: File, header: Dataset) -> list[Frame]:
    """One Frame for a classic object; for an enhanced one, a header a frame with its functional groups laid flat."""
    if header.file_meta.TransferSyntaxUID in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        header.LossyImageCompression = "01"
    if int(header.get("NumberOfFrames") or 1) == 1 and "PerFrameFunctionalGroupsSequence" not in header:
        return [Frame(path, 0, header)]
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != int(header.NumberOfFrames or 1):
        raise DataError(
            f"{path}: a multi-frame image needs functional groups for each of its {header.NumberOfFrames} frames, found"
            f" {len(groups)}; export it as single-frame objects"
        )
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    # Text must be decoded while the character set of the file is known.
    header.decode()
    common = Dataset()
    common.update(header)
    for keyword in MULTI_FRAME:
        common.pop(keyword, None)
    frames = []
    for number, own in enumerate(groups):
        flat = Dataset()
        flat.update(common)
        flat.enhanced = header  # the object as it was, for the writer of an enhanced one
        flat.filename, flat.ReferencedFrameNumber = header.filename, number + 1
        if energy := own.get(MULTI_ENERGY) or shared.get(MULTI_ENERGY):
            setattr(flat, MULTI_ENERGY, energy)
        for keyword in FUNCTIONAL_GROUPS:
            for item in (own.get(keyword) or shared.get(keyword) or [])[:1]:
                flat.update(item)
        frames.append(Frame(path, number, flat))
    return frames


def _check_one_series(folder: Path, frames: list[Frame]) -> None:
    first, series = frames[0], {text_of(f.header, "SeriesInstanceUID"): f for f in reversed(frames)}
    if len(series) > 1:
        named = [
            f"{f.path.name} ({text_of(f.header, 'SeriesDescription') or 'no description'})" for f in series.values()
        ]
        raise DataError(
            f"{folder}: a folder holds one series, found {len(named)}, for example in {', '.join(named[:4])};"
            " move each into a folder of its own"
        )
    for frame, keyword in product(frames, SAME_PERSON):
        if text_of(frame.header, keyword) != text_of(first.header, keyword):  # whose values are not for messages
            raise DataError(
                f"{frame.path}: {keyword} must be the same in all slices, and is another in {first.path.name};"
                " find out whose images these are"
            )
    if other := next((frame for frame in frames if _unit(frame.header) != _unit(first.header)), None):
        found, expected = (text_of(f.header, "RescaleType") or "none" for f in (other, first))
        raise DataError(
            f"{other.path}: RescaleType must be the same in all slices, found {found} against {expected} in"
            f" {first.path.name}; move each into a folder of its own"
        )
    for frame, keyword in product(frames, SAME_IN_SERIES):
        if not _alike(frame, first, keyword):
            found, expected = (text_of(f.header, keyword) or "none" for f in (frame, first))
            raise DataError(
                f"{frame.path}: {keyword} must be the same in all slices, found {found} against {expected} in"
                f" {first.path.name}; move localizers and other stacks out of the folder"
            )


def _alike(a: Frame, b: Frame, keyword: str) -> bool:
    if keyword in GEOMETRY:
        return np.allclose(_numbers(a, keyword), _numbers(b, keyword), rtol=0, atol=SAME_NUMBER)
    return text_of(a.header, keyword) == text_of(b.header, keyword)


def _sort_along_normal(frames: list[Frame]) -> tuple[list[Frame], np.ndarray, np.ndarray]:
    """Frames by position, the affine (voxel index to LPS mm) and the positions in mm along the normal."""
    first = frames[0]
    origins = np.stack([_numbers(frame, "ImagePositionPatient") for frame in frames])
    row_mm, column_mm = spacing = _numbers(first, "PixelSpacing")
    axes = _numbers(first, "ImageOrientationPatient").reshape(2, 3).T
    if not np.allclose(axes.T @ axes, np.eye(2), atol=1e-2) or spacing.min() <= 0:
        raise DataError(
            f"{first.path}: ImageOrientationPatient needs perpendicular unit vectors, PixelSpacing > 0, found"
            f" {axes.T.tolist()} and {spacing.tolist()}; export the series again"
        )
    normal = np.cross(*axes.T) / np.linalg.norm(np.cross(*axes.T))
    positions_mm = origins @ normal
    order = np.argsort(positions_mm, kind="stable")
    frames, origins, positions_mm = [frames[i] for i in order], origins[order], positions_mm[order]
    gaps = np.diff(positions_mm)
    if gaps.size == 0:
        step = normal * _single_slice_mm(first.header)
    elif gaps.min() < SAME_POSITION_MM:
        at = gaps.argmin()
        raise DataError(
            f"{frames[at + 1].path}: two slices at one position ({positions_mm[at]:.2f} mm), here and in"
            f" {frames[at].path.name}; keep one time point, echo or copy of each slice"
        )
    else:
        step = origins[1] - origins[0]
        direction = (origins[-1] - origins[0]) / (positions_mm[-1] - positions_mm[0])
        on_line = origins[0] + np.outer(positions_mm - positions_mm[0], direction)
        if (off := np.linalg.norm(origins - on_line, axis=1)).max() > OFF_LINE_MM:
            raise DataError(
                f"{frames[off.argmax()].path}: slices must lie on one straight line, found {off.max():.2f} mm off it;"
                " move stacks with another centre out of the folder"
            )
    # PixelSpacing is (between rows, between columns): the x step is its second number.
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([axes[:, 0] * column_mm, axes[:, 1] * row_mm, step])
    affine[:3, 3] = origins[0]
    return frames, affine, positions_mm


def _single_slice_mm(header: Dataset) -> float:
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        with suppress(ValueError):
            if (value := float(text_of(header, keyword))) > 0:
                return value
    return 1.0


def _read_pixels(frames: list[Frame], shape: tuple[int, int, int]) -> np.ndarray:
    """(Z, Y, X) float32 in the order of `frames`, after the Modality LUT or rescale of each."""
    places: dict[File, list[int]] = {}
    for place, frame in enumerate(frames):
        places.setdefault(frame.path, []).append(place)
    array = room(shape)
    for file, here in places.items():
        with _told_in_one_line(file):
            header = frames[here[0]].header
            dataset = _with_pixels(file, getattr(header, "enhanced", header))
            try:
                stored = dataset.pixel_array.reshape(-1, *shape[1:])
            except NotImplementedError:
                syntax = dataset.file_meta.TransferSyntaxUID.name
                raise DataError(f"{file}: cannot decode {syntax}; decompress it, for example with gdcmconv") from None
            if _unit(frames[0].header) != "HU" and text_of(dataset, "PhotometricInterpretation") == "MONOCHROME1":
                # The least and the greatest stored value change places; ~n is -1 - n.
                stored = ~stored if dataset.PixelRepresentation else 2**dataset.BitsStored - 1 - stored
            for place in here:
                array[place] = apply_modality_lut(stored[frames[place].number], frames[place].header)
    return array


def _unit(header: Dataset) -> Unit:
    is_hu = text_of(header, "Modality") == "CT" and text_of(header, "RescaleType") in HU_TYPES
    return "HU" if is_hu else "arbitrary"


def _energy_kev(header: Dataset) -> float | None:
    """The energy of a virtual monoenergetic image: the standard's attribute, else the first label that names one."""
    for item in header.get(MULTI_ENERGY) or []:
        with suppress(ValueError):
            if (energy_kev := float(text_of(item, "MonoenergeticEnergyEquivalent"))) > 0:
                return energy_kev
    energies = (energy_kev_in(text_of(header, keyword)) for keyword in ENERGY_LABELS)
    return next((energy_kev for energy_kev in energies if energy_kev is not None), None)


def text_of(header: Dataset, keyword: str) -> str:
    """The value as one line of text; empty when absent or unreadable."""
    try:
        return " ".join(str(header.get(keyword, "") or "").split())
    except Exception:  # values are parsed on access, and a damaged one raises what its parser raises
        return ""


def _numbers(frame: Frame, keyword: str) -> np.ndarray:
    try:
        values = np.asarray(frame.header.get(keyword), dtype=np.float64)
    except Exception:  # as in text_of
        values = np.empty(0)
    if values.shape != (GEOMETRY[keyword],) or not np.isfinite(values).all():
        raise DataError(
            f"{frame.path}: {keyword} must be {GEOMETRY[keyword]} numbers that place the slice in the patient, found"
            f" {text_of(frame.header, keyword) or 'none'}; export the series again from the archive"
        )
    return values
