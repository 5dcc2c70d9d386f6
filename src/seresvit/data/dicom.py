"""DICOM: a series in as one Volume, and a derived series out beside it.

What is read is decided by geometry alone: slices lie where ImagePositionPatient puts them, never in the order of
InstanceNumber or file name. What is written is a new series of the same study and frame of reference whose every slice
names the slice that it was computed from (DICOM PS3.3 C.7.6.1.1.4 and C.12.4.1).
"""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.config import disable_value_validation
from pydicom.dataset import FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    MRImageStorage,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

from seresvit import __version__
from seresvit.data.volume import DataError, Unit, Volume, written_whole

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
# Objects with pixels that are no image of the patient; those without Rows are told by that.
NOT_IMAGES = ("RTDOSE", "SEG")
# RescaleType may be absent for HU only (C.8.2.1.1.1); "US" (unspecified) is common on plain CT.
HU_TYPES = ("", "HU", "HU_MOD", "US")

IDENTITY = "SOPClassUID SOPInstanceUID SeriesInstanceUID StudyInstanceUID".split()
MULTI_FRAME = (
    "NumberOfFrames SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence DimensionOrganizationSequence"
    " DimensionIndexSequence"
).split()
FUNCTIONAL_GROUPS = (
    "PlanePositionSequence PlaneOrientationSequence PixelMeasuresSequence PixelValueTransformationSequence"
    " FrameVOILUTSequence"
).split()

SAME_ORIENTATION = 1e-3
SAME_SPACING_MM = 1e-3
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


def read_series(folder: Path) -> Volume:
    """The one image series in `folder` (or in one file), slices sorted along their normal, values rescaled.

    Files that are not DICOM and objects that are not images (RTSTRUCT, SR, ...) are set aside. Unit "HU" for CT whose
    RescaleType says nothing else, "arbitrary" otherwise. Gaps may differ: `positions_mm` carries them; a tilted gantry
    is carried by the affine. Enhanced multi-frame objects are read by their functional groups. `headers` holds one
    Dataset a slice in the same order.

    Raises DataError: nothing to read, several series, differing size, spacing, orientation or frame of reference, two
    slices at one position, no geometry, colour, pixels that are short, damaged or in an unknown transfer syntax.
    """
    folder = Path(folder)
    with _tolerant():
        frames = _find_frames(folder)
        _check_one_series(folder, frames)
        frames, affine, positions_mm = _sort_along_normal(frames)
        array = _read_pixels(frames)
    first = frames[0].header
    if not np.isfinite(array).all():
        raise DataError(f"{folder}: values must be finite after the rescale; check RescaleSlope and RescaleIntercept")
    return Volume(
        array=array,
        affine=affine,
        positions_mm=positions_mm,
        unit=_unit(first),
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
        paths = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else [folder]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
    frames = []
    for path in paths:
        if path.name.startswith("."):
            continue
        header = _read_header(path)
        if header is not None and _is_image(header):
            _check_pixel_claim(path, header)
            frames += _split_frames(path, header)
    if not frames:
        raise DataError(f"{folder}: no DICOM image found; give the folder that holds the slices of one series")
    return frames


def _read_header(path: Path) -> Dataset | None:
    """None for a file that is not DICOM and does not say to be."""
    try:
        return dcmread(path, stop_before_pixels=True)
    except InvalidDicomError:
        if path.suffix.lower() != ".dcm":
            return None
        raise DataError(f"{path}: not a DICOM file in spite of its name; remove it, or copy it again") from None
    except RecursionError:
        raise DataError(f"{path}: sequences are nested too deeply to be an image; remove the file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or 'damaged'}); check or copy it again") from None
    except Exception as error:  # a damaged file makes the parser raise almost anything
        raise DataError(f"{path}: damaged DICOM header ({type(error).__name__}); copy the file again") from None


def _is_image(header: Dataset) -> bool:
    # A file cut short may have lost its Rows: its class still tells an image, which must not vanish unnoticed.
    sop_class = UID(str(header.file_meta.get("MediaStorageSOPClassUID", "")))
    return ("Rows" in header or "Image Storage" in sop_class.name) and _text(header, "Modality") not in NOT_IMAGES


def _check_pixel_claim(path: Path, header: Dataset) -> None:
    """Refuses before anything is allocated for it what the file cannot hold."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise DataError(f"{path}: no transfer syntax in its file header; convert it, for example with dcmconv")
    missing = [keyword for keyword in IDENTITY if not _text(header, keyword)]
    if missing:
        raise DataError(f"{path}: {missing[0]} is missing; export the series again from the archive")
    colour = _text(header, "PhotometricInterpretation")
    if not colour.startswith("MONOCHROME"):
        raise DataError(
            f"{path}: pixels must be MONOCHROME, found {colour or 'nothing'}; give the original grey series"
        )
    try:
        frames = int(header.get("NumberOfFrames") or 1)
        claimed = frames * int(header.Rows) * int(header.Columns) * int(header.BitsAllocated) // 8
    except (AttributeError, TypeError, ValueError):
        raise DataError(f"{path}: Rows, Columns or BitsAllocated is not a number; export the series again") from None
    size = path.stat().st_size
    # No real image compresses a thousandfold, unless it is blank and small.
    if claimed <= 0 or claimed > (size if syntax in NATIVE else max(2**26, 1000 * size)):
        raise DataError(
            f"{path}: {frames} x {header.Rows} x {header.Columns} pixels need {claimed} bytes, found {size};"
            " it is truncated or damaged: copy it again"
        )


def _split_frames(path: Path, header: Dataset) -> list[Frame]:
    """One Frame for a classic object; for an enhanced one, a header a frame with its functional groups laid flat."""
    if header.file_meta.TransferSyntaxUID in (JPEGBaseline8Bit, JPEGExtended12Bit):
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
        if keyword in header:
            del header[keyword]
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
    series: dict[str, Frame] = {}
    for frame in frames:
        series.setdefault(_text(frame.header, "SeriesInstanceUID"), frame)
    if len(series) > 1:
        named = [f"{f.path.name} ({_text(f.header, 'SeriesDescription') or 'no description'})" for f in series.values()]
        more = ", ..." if len(named) > 4 else ""
        raise DataError(
            f"{folder}: a folder holds one series, found {len(named)}, for example in {', '.join(named[:4])}{more};"
            " move each into a folder of its own"
        )
    first = frames[0]
    for keyword in ("Rows", "Columns", "Modality", "FrameOfReferenceUID"):
        for frame in frames:
            if (found := _text(frame.header, keyword)) != (expected := _text(first.header, keyword)):
                raise DataError(
                    f"{frame.path}: {keyword} must be the same in all slices, found {found or 'none'} against"
                    f" {expected or 'none'} in {first.path.name}; move the odd slices out of the folder"
                )


def _sort_along_normal(frames: list[Frame]) -> tuple[list[Frame], np.ndarray, np.ndarray]:
    """Frames by position, the affine (voxel index to LPS mm) and the positions in mm along the normal."""
    origins = np.stack([_numbers(frame, "ImagePositionPatient", 3) for frame in frames])
    spacings = np.stack([_numbers(frame, "PixelSpacing", 2) for frame in frames])
    cosines = np.stack([_numbers(frame, "ImageOrientationPatient", 6) for frame in frames])
    for keyword, values, tolerance in (
        ("ImageOrientationPatient", cosines, SAME_ORIENTATION),
        ("PixelSpacing", spacings, SAME_SPACING_MM),
    ):
        if (odd := np.abs(values - values[0]).max(axis=1)).max() > tolerance:
            raise DataError(
                f"{frames[odd.argmax()].path}: {keyword} must be the same in all slices, found"
                f" {values[odd.argmax()].tolist()} against {values[0].tolist()} in {frames[0].path.name};"
                " move localizers and other stacks out of the folder"
            )
    axes = cosines[0].reshape(2, 3).T
    if not np.allclose(axes.T @ axes, np.eye(2), atol=1e-2) or spacings[0].min() <= 0:
        raise DataError(
            f"{frames[0].path}: ImageOrientationPatient needs perpendicular unit vectors, PixelSpacing > 0,"
            f" found {cosines[0].tolist()} and {spacings[0].tolist()}; export the series again"
        )
    normal = np.cross(axes[:, 0], axes[:, 1])
    normal /= np.linalg.norm(normal)
    positions_mm = origins @ normal
    order = np.argsort(positions_mm, kind="stable")
    frames, origins, positions_mm = [frames[i] for i in order], origins[order], positions_mm[order]
    gaps = np.diff(positions_mm)
    if gaps.size and gaps.min() < SAME_POSITION_MM:
        one, other = frames[gaps.argmin()], frames[gaps.argmin() + 1]
        raise DataError(
            f"{other.path}: two slices at one position ({positions_mm[gaps.argmin()]:.2f} mm), here and in"
            f" {one.path.name}; keep one time point, echo or copy of each slice"
        )
    if gaps.size:
        step = origins[1] - origins[0]
        direction = (origins[-1] - origins[0]) / (positions_mm[-1] - positions_mm[0])
        on_line = origins[0] + np.outer(positions_mm - positions_mm[0], direction)
        if (off := np.linalg.norm(origins - on_line, axis=1)).max() > OFF_LINE_MM:
            raise DataError(
                f"{frames[off.argmax()].path}: slices must lie on one straight line, found {off.max():.2f} mm off it;"
                " move stacks with another centre out of the folder"
            )
    else:
        step = normal * _single_slice_mm(frames[0].header)
    affine = np.eye(4)
    # PixelSpacing is (between rows, between columns): the x step is its second number.
    affine[:3, :3] = np.column_stack([axes[:, 0] * spacings[0, 1], axes[:, 1] * spacings[0, 0], step])
    affine[:3, 3] = origins[0]
    return frames, affine, positions_mm


def _single_slice_mm(header: Dataset) -> float:
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        try:
            if (value := float(_text(header, keyword))) > 0:
                return value
        except ValueError:
            continue
    return 1.0


def _read_pixels(frames: list[Frame]) -> np.ndarray:
    """(Z, Y, X) float32 in the order of `frames`, after the Modality LUT or rescale of each."""
    places: dict[Path, list[int]] = {}
    for place, frame in enumerate(frames):
        places.setdefault(frame.path, []).append(place)
    shape = int(frames[0].header.Rows), int(frames[0].header.Columns)
    array = np.empty((len(frames), *shape), np.float32)
    for path, here in places.items():
        try:
            stored = dcmread(path).pixel_array
            stored = stored.reshape(-1, *shape)
            for place in here:
                array[place] = apply_modality_lut(stored[frames[place].number], frames[place].header)
        except NotImplementedError:
            syntax = dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID.name
            raise DataError(f"{path}: cannot decode {syntax}; decompress it first, for example with gdcmconv") from None
        except Exception as error:  # each decoder has errors of its own
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise DataError(f"{path}: pixels are missing or damaged ({reason}); copy the file again") from None
    return array


def _unit(header: Dataset) -> Unit:
    return "HU" if _text(header, "Modality") == "CT" and _text(header, "RescaleType") in HU_TYPES else "arbitrary"


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


def _numbers(frame: Frame, keyword: str, count: int) -> np.ndarray:
    try:
        values = np.asarray(frame.header.get(keyword), dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise DataError(
            f"{frame.path}: {keyword} must be {count} numbers that place the slice in the patient, found"
            f" {_text(frame.header, keyword) or 'none'}; export the series again from the archive"
        )
    return values


# ------------------------------------------------------------------------------------------------ writing


def _tags(keywords: str) -> set[BaseTag]:
    return {Tag(keyword) for keyword in keywords.split()}


# Group 0028 describes the source's pixels, but for these.
KEPT_0028 = _tags(
    "Rows Columns PixelSpacing PhotometricInterpretation BurnedInAnnotation QualityControlImage WindowCenter WindowWidth"
    " WindowCenterWidthExplanation RecognizableVisualFeatures LongitudinalTemporalInformationModified"
    " LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod"
)
# When the modality changes (MR to CT), acquisition attributes (group 0018) would state a scan that never was.
KEPT_0018 = _tags(
    "BodyPartExamined SliceThickness SpacingBetweenSlices SoftwareVersions PatientPosition ContributingEquipmentSequence"
    " DeviceSerialNumber"
)
# Statements on the source alone: its derivation, comments, creator, stored-value maps, icon, signatures.
DROPPED = _tags(
    "SourceImageSequence DerivationCodeSequence ImageComments InstanceCreatorUID ReferencedFrameNumber IconImageSequence"
    " RealWorldValueMappingSequence MACParametersSequence DigitalSignaturesSequence EncryptedAttributesSequence"
    " MultienergyCTProcessingSequence PixelPresentation"
)
# Type 2 attributes (must be there, may be empty) of the modules that CT and MR images share, then of each.
SHARED_TYPE_2 = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID ReferringPhysicianName AccessionNumber"
    " Manufacturer PositionReferenceIndicator SliceThickness AcquisitionNumber PatientPosition"
).split()
DEFAULTS = {
    "CT": {"KVP": ""},
    # Research mode is the standard's word for a sequence that has none of its names; these two are type 1.
    "MR": {"ScanningSequence": "RM", "SequenceVariant": "NONE"}
    | dict.fromkeys("ScanOptions MRAcquisitionType EchoTime EchoTrainLength RepetitionTime".split(), ""),
}
STORAGE = {"CT": CTImageStorage, "MR": MRImageStorage}


class Encoding(NamedTuple):
    """How the values of one series are stored: 16 bits, with a rescale and a window to look at them."""

    slope: str
    intercept: str
    signed: bool
    rescale_type: str
    window: tuple[float, float]

    def stored(self, values: np.ndarray) -> np.ndarray:
        """Little-endian 16-bit integers that come back within half a slope."""
        info = np.iinfo(np.int16 if self.signed else np.uint16)
        stored = np.rint((values.astype(np.float64) - float(self.intercept)) / float(self.slope))
        return np.clip(stored, info.min, info.max).astype("<i2" if self.signed else "<u2")


def write_derived(volume: Volume, folder: Path, *, description: str, energy_kev: float | None = None) -> list[Path]:
    """Paths SYN_0001.dcm, ... in `folder`, in the order of `volume.array`, whose `headers` are the source slices.

    Study, patient, frame of reference and geometry are the source's; series and instances are new, DERIVED\\SECONDARY,
    and name the source slices. "HU" becomes CT (also from MR headers) in signed 16 bits of 1 HU; other units keep the
    modality and get one slope for the series. `energy_kev` is written into SeriesDescription. `folder` must be new or
    empty; it appears when complete. DerivationDescription tells what no standard code does (CID 7203): computed by a
    neural network. Raises DataError: headers and slices differ in number or size, values not finite or beyond 16 bits.
    """
    folder = Path(folder)
    headers = volume.headers
    if volume.format != "dicom" or len(headers) != len(volume.array) or not headers:
        raise DataError(
            f"{folder}: a derived series needs one DICOM header a slice, found {len(headers)} for {len(volume.array)}"
            f" slices of {volume.path}; read the source as DICOM"
        )
    if not np.isfinite(volume.array).all():
        bad = int((~np.isfinite(volume.array)).sum())
        raise DataError(f"{folder}: values must be finite, found {bad} that are not; nothing was written")
    encoding = _encoding(volume, folder)
    label = description.replace("\\", "/")
    if energy_kev is not None and energy_kev not in _energies_kev(label):
        label = f"{label[:54].rstrip()} {energy_kev:g} keV"
    series_uid, now = generate_uid(), datetime.now()
    names = [f"SYN_{number:04d}.dcm" for number in range(1, len(headers) + 1)]
    with _tolerant(), written_whole(folder) as temporary:
        temporary.mkdir()
        for number, (name, header, values) in enumerate(zip(names, headers, volume.array, strict=True), 1):
            if values.shape != (header.Rows, header.Columns):
                raise DataError(
                    f"{folder}: slice {number} is {values.shape[0]}x{values.shape[1]}, its source header says"
                    f" {header.Rows}x{header.Columns}; resample to the source grid first"
                )
            derived = _inherited(header, _target_modality(volume, header))
            _describe(derived, header, label, now)
            derived.SeriesInstanceUID, derived.SOPInstanceUID, derived.InstanceNumber = (
                series_uid,
                generate_uid(),
                number,
            )
            _set_pixels(derived, values, encoding)
            derived.save_as(temporary / name, enforce_file_format=True)
    return [folder / name for name in names]


def _target_modality(volume: Volume, header: Dataset) -> str:
    return "CT" if volume.unit == "HU" else volume.modality or _text(header, "Modality")


def _encoding(volume: Volume, folder: Path) -> Encoding:
    low, high = float(volume.array.min()), float(volume.array.max())
    if volume.unit == "HU":
        if low < -32768.5 or high > 32767.5:
            raise DataError(f"{folder}: HU must fit 16 bits, found {low:.0f} to {high:.0f}; nothing was written")
        return Encoding("1", "0", True, "HU", (40.0, 400.0))
    # One slope for the series, so that viewers which overlook it still show all slices alike.
    slope = format_number_as_ds((high - low) / 65534 if high > low else 1.0)
    dim, bright = np.percentile(volume.array, (1, 99))
    window = float((dim + bright) / 2), max(float(bright - dim), float(slope))
    return Encoding(slope, format_number_as_ds(low), False, "US", window)


def _inherited(header: Dataset, modality: str) -> Dataset:
    """What the derived slice has from its source: no private element, nothing about the source's pixels or creation."""
    derived = copy.deepcopy(header)
    other_modality = modality != _text(header, "Modality")

    def carries_over(tag: BaseTag) -> bool:
        if tag.is_private or tag in DROPPED or tag.element == 0:
            return False
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
    if other_modality:
        for keyword in ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation"):
            derived.pop(Tag(keyword), None)
    for keyword, value in (dict.fromkeys(SHARED_TYPE_2, "") | DEFAULTS.get(modality, {})).items():
        if keyword not in derived:
            setattr(derived, keyword, value)
    if not _text(derived, "BodyPartExamined") and "Laterality" not in derived:
        derived.Laterality = ""
    derived.Modality = modality
    derived.SOPClassUID = STORAGE.get(modality, header.SOPClassUID)
    derived.file_meta = FileMetaDataset()
    derived.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return derived


def _readable(dataset: Dataset, tag: BaseTag) -> bool:
    """Elements that cannot be parsed cannot be written again in another transfer syntax."""
    try:
        element = dataset[tag]
        return element.VR != "SQ" or all(
            _readable(item, inner) for item in element.value for inner in list(item.keys())
        )
    except Exception:  # what a damaged value raises depends on its type
        return False


def _describe(derived: Dataset, source: Dataset, label: str, now: datetime) -> None:
    """What the slice is, by what and from what it was computed, and when."""
    image_type = source.get("ImageType") or []
    kinds = [image_type] if isinstance(image_type, str) else [kind.strip() for kind in image_type]
    same_modality = derived.Modality == _text(source, "Modality")
    plain = "OTHER" if derived.Modality == "MR" else "AXIAL"
    derived.ImageType = ["DERIVED", "SECONDARY", kinds[2] if same_modality and len(kinds) > 2 else plain]
    if not label.isascii():
        derived.decode()
        derived.SpecificCharacterSet = "ISO_IR 192"
    derived.SeriesDescription = label[:64]
    derived.DerivationDescription = f"{label}: computed by the neural network of seresvit {__version__}"[:1024]
    derived.ImageComments = "Synthetic image: computed, not acquired by a scanner"
    number = _text(source, "SeriesNumber")
    derived.SeriesNumber = (int(number) if number.isdecimal() else 0) + 1000

    origin = Dataset()
    origin.ReferencedSOPClassUID, origin.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    if "ReferencedFrameNumber" in source:
        origin.ReferencedFrameNumber = source.ReferencedFrameNumber
    origin.PurposeOfReferenceCodeSequence = [_code(codes.DCM.SourceImageForImageProcessingOperation)]
    derived.SourceImageSequence = [origin]

    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code(codes.DCM.ProcessingEquipment)]
    equipment.Manufacturer = "SE-ResViT"
    equipment.ManufacturerModelName = "seresvit"
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


def _set_pixels(derived: Dataset, values: np.ndarray, encoding: Encoding) -> None:
    derived.SamplesPerPixel = 1
    derived.BitsAllocated, derived.BitsStored, derived.HighBit = 16, 16, 15
    derived.PixelRepresentation = int(encoding.signed)
    derived.RescaleSlope, derived.RescaleIntercept = encoding.slope, encoding.intercept
    derived.RescaleType = encoding.rescale_type
    if encoding.rescale_type != "HU" or not ("WindowCenter" in derived and "WindowWidth" in derived):
        derived.WindowCenter, derived.WindowWidth = (format_number_as_ds(value) for value in encoding.window)
        derived.pop(Tag("WindowCenterWidthExplanation"), None)
    derived.PixelData = encoding.stored(values).tobytes()
    derived["PixelData"].VR = "OW"
