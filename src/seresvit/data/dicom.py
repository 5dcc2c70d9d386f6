"""DICOM: a series in as one Volume, and a derived series out beside it.

What is read is decided by geometry alone: slices lie where ImagePositionPatient puts them, never in the order of
InstanceNumber or file name. What is written is a new series of the same study and frame of reference whose every slice
names the slice that it was computed from (DICOM PS3.3 C.7.6.1.1.4 and C.12.4.1).
"""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom import Dataset, dcmread, uid
from pydicom.config import disable_value_validation
from pydicom.datadict import dictionary_VR
from pydicom.dataset import FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import format_number_as_ds

from seresvit import __version__
from seresvit.data.volume import DataError, Unit, Volume, written_whole

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
MULTI_FRAME = (
    *("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("DimensionOrganizationSequence", "DimensionIndexSequence"),
)
# The plane of a slice, by attribute and count of its numbers; all but the position are the same in a series.
GEOMETRY = {"ImageOrientationPatient": 6, "PixelSpacing": 2, "ImagePositionPatient": 3}
SAME_IN_SERIES = ("Modality", "FrameOfReferenceUID", "Rows", "Columns", "ImageOrientationPatient", "PixelSpacing")
SAME_NUMBER = 1e-3
SAME_POSITION_MM = 1e-2
OFF_LINE_MM = 0.1


class Frame(NamedTuple):
    """One plane: its file, its number there, and its header, as of a single-frame object without pixels."""

    path: Path
    number: int
    header: Dataset


@contextmanager
def _tolerant() -> Iterator[None]:
    """pydicom without its remarks on non-standard values: archives are full of them, and they name patients."""
    with disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _told_in_one_line(path: Path) -> Iterator[None]:
    """Parsers and decoders of damaged files raise almost anything: here it becomes a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except RecursionError:
        raise DataError(f"{path}: sequences are nested too deeply to be an image; remove the file") from None
    except NotImplementedError:
        syntax = dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID.name
        raise DataError(f"{path}: cannot decode {syntax}; decompress it first, for example with gdcmconv") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{path}: cannot be read as DICOM ({reason}); check it or copy it again") from None


def read_series(folder: Path) -> Volume:
    """The one image series in `folder` (or in one file), slices sorted along their normal, values rescaled.

    Files that are not DICOM and objects that are not images (RTSTRUCT, SR, ...) are set aside. Unit "HU" for CT whose
    RescaleType says nothing else, "arbitrary" otherwise. Gaps may differ: `positions_mm` carries them, and the affine a
    tilted gantry. Enhanced multi-frame objects are read by their functional groups. `headers`: one Dataset a slice.
    Raises DataError: nothing to read, several series, differing size, spacing, orientation or frame of reference, two
    slices at one position, no geometry, colour, pixels that are short, damaged or in an unknown transfer syntax.
    """
    folder = Path(folder)
    with _tolerant():
        frames = _find_frames(folder)
        _check_one_series(folder, frames)
        frames, affine, positions_mm = _sort_along_normal(frames)
        array = _read_pixels(frames)
    if not np.isfinite(array).all():
        raise DataError(f"{folder}: values must be finite after the rescale; check RescaleSlope and RescaleIntercept")
    first = frames[0].header
    return Volume(
        array=array,
        affine=affine,
        positions_mm=positions_mm,
        unit="HU" if _text(first, "Modality") == "CT" and _text(first, "RescaleType") in HU_TYPES else "arbitrary",
        path=folder,
        format="dicom",
        patient=_text(first, "PatientID"),
        modality=_text(first, "Modality"),
        description=_text(first, "SeriesDescription"),
        energy_kev=_energy_kev(first),
        frame_of_reference=_text(first, "FrameOfReferenceUID"),
        headers=tuple(frame.header for frame in frames),
    )


def _find_frames(folder: Path) -> list[Frame]:
    try:
        inside = folder.iterdir() if folder.is_dir() else [folder]
        paths = sorted(path for path in inside if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
    frames = []
    for path in paths:
        with _told_in_one_line(path):
            try:
                header = dcmread(path, stop_before_pixels=True)
            except InvalidDicomError:
                if path.suffix.lower() == ".dcm":
                    raise DataError(f"{path}: not DICOM in spite of its name; remove it, or copy it again") from None
                continue
            if _is_image(header):
                _check_pixel_claim(path, header)
                frames += _split_frames(path, header)
    if not frames:
        raise DataError(f"{folder}: no DICOM image found; give the folder that holds the slices of one series")
    return frames


def _is_image(header: Dataset) -> bool:
    """True also for a file cut before Rows: it counts as the image that it was, and must not vanish unnoticed."""
    sop_class = uid.UID(str(header.file_meta.get("MediaStorageSOPClassUID", "")))
    if sop_class == uid.MediaStorageDirectoryStorage or _text(header, "Modality") in NOT_IMAGES:
        return False
    return "Rows" in header or "SeriesInstanceUID" not in header or "Image Storage" in sop_class.name


def _check_pixel_claim(path: Path, header: Dataset) -> None:
    """Refuses before anything is allocated for it what the file cannot hold."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise DataError(f"{path}: no transfer syntax in its file header; convert it, for example with dcmconv")
    for keyword in (*IDENTITY, "Rows", "Columns", "BitsAllocated"):
        if not _text(header, keyword):
            raise DataError(f"{path}: {keyword} is missing; the file is truncated, or export the series again")
    if not (colour := _text(header, "PhotometricInterpretation")).startswith("MONOCHROME"):
        raise DataError(f"{path}: pixels must be MONOCHROME, found {colour or 'none'}; give the original grey series")
    frames = int(header.get("NumberOfFrames") or 1)
    claimed = frames * int(header.Rows) * int(header.Columns) * int(header.BitsAllocated) // 8
    size = path.stat().st_size
    # No real image compresses a thousandfold, unless it is blank and small.
    if claimed <= 0 or claimed > (size if syntax in NATIVE else max(2**26, 1000 * size)):
        raise DataError(
            f"{path}: {frames} x {header.Rows} x {header.Columns} pixels need {claimed} bytes, found {size};"
            " it is truncated or damaged: copy it again"
        )


def _split_frames(path: Path, header: Dataset) -> list[Frame]:
    """One Frame for a classic object; for an enhanced one, a header a frame with its functional groups laid flat."""
    if header.file_meta.TransferSyntaxUID in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        header.LossyImageCompression = "01"
    if "NumberOfFrames" not in header:
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
    for keyword in MULTI_FRAME:
        header.pop(keyword, None)
    frames = []
    for number, own in enumerate(groups):
        flat = Dataset()
        flat.update(header)
        flat.ReferencedFrameNumber = number + 1
        for keyword in FUNCTIONAL_GROUPS:
            for item in (own.get(keyword) or shared.get(keyword) or [])[:1]:
                flat.update(item)
        frames.append(Frame(path, number, flat))
    return frames


def _check_one_series(folder: Path, frames: list[Frame]) -> None:
    first, series = frames[0], {_text(f.header, "SeriesInstanceUID"): f for f in reversed(frames)}
    if len(series) > 1:
        named = [f"{f.path.name} ({_text(f.header, 'SeriesDescription') or 'no description'})" for f in series.values()]
        raise DataError(
            f"{folder}: a folder holds one series, found {len(named)}, for example in {', '.join(named[:4])};"
            " move each into a folder of its own"
        )
    for frame, keyword in product(frames, SAME_IN_SERIES):
        if not _alike(frame, first, keyword):
            found, expected = (_text(f.header, keyword) or "none" for f in (frame, first))
            raise DataError(
                f"{frame.path}: {keyword} must be the same in all slices, found {found} against {expected} in"
                f" {first.path.name}; move localizers and other stacks out of the folder"
            )


def _alike(a: Frame, b: Frame, keyword: str) -> bool:
    if keyword in GEOMETRY:
        return np.allclose(_numbers(a, keyword), _numbers(b, keyword), rtol=0, atol=SAME_NUMBER)
    return _text(a.header, keyword) == _text(b.header, keyword)


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
            if (value := float(_text(header, keyword))) > 0:
                return value
    return 1.0


def _read_pixels(frames: list[Frame]) -> np.ndarray:
    """(Z, Y, X) float32 in the order of `frames`, after the Modality LUT or rescale of each."""
    places: dict[Path, list[int]] = {}
    for place, frame in enumerate(frames):
        places.setdefault(frame.path, []).append(place)
    shape = int(frames[0].header.Rows), int(frames[0].header.Columns)
    array = np.empty((len(frames), *shape), np.float32)
    for path, here in places.items():
        with _told_in_one_line(path):
            stored = dcmread(path).pixel_array.reshape(-1, *shape)
            for place in here:
                array[place] = apply_modality_lut(stored[frames[place].number], frames[place].header)
    return array


def _energy_kev(header: Dataset) -> float | None:
    """The one energy that the labels of a virtual monoenergetic image name, such as 'MonoE 70keV[HU] 070keV'."""
    for keyword in ("SeriesDescription", "ImageComments"):
        if len(energies := _energies_kev(_text(header, keyword))) == 1:
            return energies.pop()
    return None


def _energies_kev(text: str) -> set[float]:
    return {float(number) for number in re.findall(r"(\d+(?:\.\d+)?)\s*keV", text, re.IGNORECASE)}


def _text(header: Dataset, keyword: str) -> str:
    """The value as one line of text; empty when absent or unreadable."""
    try:
        return " ".join(str(header.get(keyword, "") or "").split())
    except Exception:  # values are parsed on access, and a damaged one raises what its parser raises
        return ""


def _numbers(frame: Frame, keyword: str) -> np.ndarray:
    try:
        values = np.asarray(frame.header.get(keyword), dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (GEOMETRY[keyword],) or not np.isfinite(values).all():
        raise DataError(
            f"{frame.path}: {keyword} must be {GEOMETRY[keyword]} numbers that place the slice in the patient, found"
            f" {_text(frame.header, keyword) or 'none'}; export the series again from the archive"
        )
    return values


# ------------------------------------------------------------------------------------------------ writing


def _tags(keywords: str) -> set[BaseTag]:
    return {Tag(keyword) for keyword in keywords.split()}


# Group 0028 describes the source's pixels, but for these.
KEPT_0028 = _tags("""
    Rows Columns PixelSpacing PhotometricInterpretation BurnedInAnnotation QualityControlImage
    RecognizableVisualFeatures LongitudinalTemporalInformationModified
    LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod
""")
WINDOW = _tags("WindowCenter WindowWidth WindowCenterWidthExplanation")
# When the modality changes (MR to CT), acquisition attributes (group 0018) would state a scan that never was.
KEPT_0018 = _tags("""
    BodyPartExamined SliceThickness SpacingBetweenSlices PatientPosition SoftwareVersions DeviceSerialNumber
    ContributingEquipmentSequence
""")
# Statements on the source alone: its derivation, comments, creator, stored-value maps, icon, signatures.
DROPPED = _tags("""
    SourceImageSequence DerivationCodeSequence ImageComments InstanceCreatorUID ReferencedFrameNumber IconImageSequence
    RealWorldValueMappingSequence MACParametersSequence DigitalSignaturesSequence EncryptedAttributesSequence
    MultienergyCTProcessingSequence PixelPresentation
""")
# Attributes of type 2 (must be there, may be empty) of the modules that CT and MR images share, then of each.
TYPE_2 = _tags("""
    PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID ReferringPhysicianName Manufacturer
    AccessionNumber PositionReferenceIndicator SliceThickness AcquisitionNumber PatientPosition
""")
TYPE_2_OF = {"CT": _tags("KVP"), "MR": _tags("ScanOptions MRAcquisitionType RepetitionTime EchoTime EchoTrainLength")}
STORAGE = {"CT": uid.CTImageStorage, "MR": uid.MRImageStorage}


def write_derived(volume: Volume, folder: Path, *, description: str, energy_kev: float | None = None) -> list[Path]:
    """Paths SYN_0001.dcm, ... in `folder`, in the order of `volume.array`, whose `headers` are the source slices.

    Study, patient, frame of reference and geometry are the source's; series and instances are new, DERIVED\\SECONDARY,
    and name the source slices. "HU" becomes CT (also from MR headers) in signed 16 bits of 1 HU; other units keep the
    modality and get one slope for the series. `energy_kev` is written into SeriesDescription. `folder` is replaced when
    all is written. DerivationDescription tells what no standard code does (CID 7203): computed by a neural network.
    Raises DataError: headers and slices differ in number or size, values not finite or beyond 16 bits.
    """
    folder, headers, count = Path(folder), volume.headers, len(volume.array)
    if volume.format != "dicom" or len(headers) != count or not headers:
        raise DataError(f"{folder}: needs one DICOM header a slice, found {len(headers)} for {count}; read DICOM first")
    if bad := int((~np.isfinite(volume.array)).sum()):
        raise DataError(f"{folder}: values must be finite, found {bad} that are not; nothing was written")
    scale = _scale(volume, folder)
    label = description.replace("\\", "/")
    if energy_kev is not None and energy_kev not in _energies_kev(label):
        label = f"{label[:54].rstrip()} {energy_kev:g} keV"
    series_uid, now = uid.generate_uid(), datetime.now()
    names = [f"SYN_{number:04d}.dcm" for number in range(1, count + 1)]
    with _tolerant(), written_whole(folder) as temporary:
        temporary.mkdir()
        for number, (name, header, values) in enumerate(zip(names, headers, volume.array, strict=True), 1):
            if values.shape != (size := (header.Rows, header.Columns)):
                raise DataError(
                    f"{folder}: slices must be {size} as in the source, found {values.shape}; resample first"
                )
            derived = _inherited(header, "CT" if volume.unit == "HU" else volume.modality or header.Modality)
            _describe(derived, header, label, now)
            derived.InstanceNumber = number
            derived.SeriesInstanceUID, derived.SOPInstanceUID = series_uid, uid.generate_uid()
            _set_pixels(derived, values, volume.unit, *scale)
            derived.save_as(temporary / name, enforce_file_format=True)
    return [folder / name for name in names]


def _scale(volume: Volume, folder: Path) -> tuple[str, str, tuple[float, float]]:
    """Slope, intercept and window (centre, width), one for the series, since a viewer may overlook the first two."""
    low, high = float(volume.array.min()), float(volume.array.max())
    if volume.unit == "HU":
        if low < -32768.5 or high > 32767.5:
            raise DataError(f"{folder}: HU must fit 16 bits, found {low:.0f} to {high:.0f}; nothing was written")
        return "1", "0", (40.0, 400.0)
    slope = format_number_as_ds((high - low) / 65534 if high > low else 1.0)
    dim, bright = np.percentile(volume.array, (1, 99))
    return slope, format_number_as_ds(low), (float(dim + bright) / 2, max(float(bright - dim), float(slope)))


def _inherited(header: Dataset, modality: str) -> Dataset:
    """What the derived slice has from its source: nothing private, nothing about the source's pixels or creation."""
    derived = copy.deepcopy(header)
    other_modality = modality != _text(header, "Modality")

    def carries_over(tag: BaseTag) -> bool:
        if tag.is_private or tag in DROPPED or tag.element == 0:
            return False
        if tag in WINDOW:
            return modality == "CT" and not other_modality
        if tag.group == 0x0028:
            return tag in KEPT_0028
        if tag.group == 0x0018 and other_modality:
            return tag in KEPT_0018
        # Curves, overlays, waveforms and pixels.
        return not (0x5000 <= tag.group < 0x5500 or tag.group >= 0x6000)

    for tag in list(derived.keys()):
        if not carries_over(tag) or not _readable(derived, tag):
            del derived[tag]
    derived.remove_private_tags()
    for tag in (TYPE_2 | TYPE_2_OF.get(modality, set())) - derived.keys():
        derived.add_new(tag, dictionary_VR(tag), "")
    if modality == "MR" and "ScanningSequence" not in derived:
        # The standard's words for a sequence that has none of its names.
        derived.ScanningSequence, derived.SequenceVariant = "RM", "NONE"
    if not _text(derived, "BodyPartExamined") and "Laterality" not in derived:
        derived.Laterality = ""
    derived.Modality, derived.SOPClassUID = modality, STORAGE.get(modality, header.SOPClassUID)
    derived.file_meta = FileMetaDataset()
    derived.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    return derived


def _readable(dataset: Dataset, tag: BaseTag) -> bool:
    """Elements that cannot be parsed cannot be written again in another transfer syntax."""
    try:
        element = dataset[tag]
        items = element.value if element.VR == "SQ" else ()
        return all(_readable(item, inner) for item in items for inner in list(item.keys()))
    except Exception:  # what a damaged value raises depends on its type
        return False


def _describe(derived: Dataset, source: Dataset, label: str, now: datetime) -> None:
    """What the slice is, by what and from what it was computed, and when."""
    image_type = source.get("ImageType") or []
    kinds = [image_type] if isinstance(image_type, str) else [kind.strip() for kind in image_type]
    if len(kinds) < 3 or derived.Modality != _text(source, "Modality"):
        kinds = ["", "", "OTHER" if derived.Modality == "MR" else "AXIAL"]
    derived.ImageType = ["DERIVED", "SECONDARY", kinds[2]]
    if not label.isascii():
        derived.decode()
        derived.SpecificCharacterSet = "ISO_IR 192"
    derived.SeriesDescription = label[:64]
    derived.DerivationDescription = f"{label}: computed by the neural network of seresvit {__version__}"[:1024]
    derived.ImageComments = "Synthetic image: computed, not acquired by a scanner"
    derived.SeriesNumber = 1000 + (int(number) if (number := _text(source, "SeriesNumber")).isdecimal() else 0)

    origin = Dataset()
    origin.ReferencedSOPClassUID, origin.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    if frame_number := source.get("ReferencedFrameNumber"):
        origin.ReferencedFrameNumber = frame_number
    origin.PurposeOfReferenceCodeSequence = [_code(codes.DCM.SourceImageForImageProcessingOperation)]
    derived.SourceImageSequence = [origin]
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code(codes.DCM.ProcessingEquipment)]
    equipment.Manufacturer, equipment.ManufacturerModelName = "SE-ResViT", "seresvit"
    equipment.SoftwareVersions = __version__
    equipment.ContributionDateTime = now.strftime("%Y%m%d%H%M%S")
    derived.ContributingEquipmentSequence = [*(derived.get("ContributingEquipmentSequence") or []), equipment]
    for what in ("InstanceCreation", "Series", "Content"):
        setattr(derived, f"{what}Date", now.strftime("%Y%m%d"))
        setattr(derived, f"{what}Time", now.strftime("%H%M%S"))


def _code(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def _set_pixels(
    derived: Dataset, values: np.ndarray, unit: Unit, slope: str, intercept: str, window: tuple[float, float]
) -> None:
    """16 bits, signed for HU, that come back within half a slope."""
    dtype = np.dtype("<i2" if unit == "HU" else "<u2")
    derived.SamplesPerPixel = 1
    derived.BitsAllocated, derived.BitsStored, derived.HighBit = 16, 16, 15
    derived.PixelRepresentation = int(unit == "HU")
    derived.RescaleSlope, derived.RescaleIntercept = slope, intercept
    derived.RescaleType = "HU" if unit == "HU" else "US"
    if not ("WindowCenter" in derived and "WindowWidth" in derived):
        derived.WindowCenter, derived.WindowWidth = (format_number_as_ds(value) for value in window)
    stored = np.rint((values.astype(np.float64) - float(intercept)) / float(slope))
    derived.PixelData = stored.clip(np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype).tobytes()
    derived["PixelData"].VR = "OW"
