"""DICOM: a derived series out, beside the series that it was computed from.

A new series of the same study and frame of reference whose every slice names the slice that it was computed from
(DICOM PS3.3 C.7.6.1.1.4 and C.12.4.1).
"""

import copy
from datetime import datetime
from pathlib import Path

import numpy as np
from pydicom import Dataset, uid
from pydicom.datadict import dictionary_VR
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import format_number_as_ds

from seresvit import __version__
from seresvit.data.dicom import text_of, tolerant
from seresvit.data.volume import DataError, Unit, Volume, energy_kev_in, written_whole


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
    if energy_kev is not None and energy_kev != energy_kev_in(label):
        label = f"{label[:54].rstrip()} {energy_kev:g} keV"
    series_uid, now = uid.generate_uid(), datetime.now()
    names = [f"SYN_{number:04d}.dcm" for number in range(1, count + 1)]
    with tolerant(), written_whole(folder) as temporary:
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
    other_modality = modality != text_of(header, "Modality")

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
    if not text_of(derived, "BodyPartExamined") and "Laterality" not in derived:
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
    if len(kinds) < 3 or derived.Modality != text_of(source, "Modality"):
        kinds = ["", "", "OTHER" if derived.Modality == "MR" else "AXIAL"]
    derived.ImageType = ["DERIVED", "SECONDARY", kinds[2]]
    if not label.isascii():
        derived.decode()
        derived.SpecificCharacterSet = "ISO_IR 192"
    derived.SeriesDescription = label[:64]
    derived.DerivationDescription = f"{label}: computed by the neural network of seresvit {__version__}"[:1024]
    derived.ImageComments = "Synthetic image: computed, not acquired by a scanner"
    derived.SeriesNumber = 1000 + (int(number) if (number := text_of(source, "SeriesNumber")).isdecimal() else 0)

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
