"""What every derived DICOM object has from its source, says of itself, and how it stores its values.

DICOM PS3.3 C.7.6.1 (General Image), C.7.6.16 (functional groups), C.8.2.2 (multi-energy CT), C.12.1 (SOP Common).
"""

import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydicom import Dataset, uid
from pydicom.datadict import dictionary_VR
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import format_number_as_ds

from seresvit import __version__
from seresvit.data.dicom import text_of
from seresvit.data.mark import WORD, Mark, lettering
from seresvit.data.volume import Volume, energy_kev_in


def _tags(keywords: str) -> set[BaseTag]:
    return {Tag(keyword) for keyword in keywords.split()}


# Group 0028 describes the source's pixels, but for these.
KEPT_0028 = _tags("""
    Rows Columns PixelSpacing BurnedInAnnotation QualityControlImage
    RecognizableVisualFeatures LongitudinalTemporalInformationModified
    LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod
""")
WINDOW = _tags("WindowCenter WindowWidth WindowCenterWidthExplanation")
# When the modality changes (MR to CT), acquisition attributes (group 0018) would state a scan that never was.
KEPT_0018 = _tags("""
    BodyPartExamined SliceThickness SpacingBetweenSlices PatientPosition SoftwareVersions DeviceSerialNumber
    ContributingEquipmentSequence
""")
OF_MR_ALONE = _tags("ComplexImageComponent AcquisitionContrast")
# Statements on the source alone: its derivation, comments, creator, stored-value maps, icon, signatures, and when its
# series and pixels were made. The derived object does not state when it was made: see `Derivation`.
DROPPED = _tags("""
    SourceImageSequence DerivationCodeSequence ImageComments InstanceCreatorUID ReferencedFrameNumber IconImageSequence
    RealWorldValueMappingSequence MACParametersSequence DigitalSignaturesSequence EncryptedAttributesSequence
    MultienergyCTProcessingSequence MultienergyCTCharacteristicsSequence PixelPresentation
    InstanceCreationDate InstanceCreationTime SeriesDate SeriesTime ContentDate ContentTime
    ConcatenationUID InConcatenationNumber InConcatenationTotalNumber ConcatenationFrameOffsetNumber
    SOPInstanceUIDOfConcatenationSource
""")
# Attributes of type 2 (must be there, may be empty) of the modules that CT and MR images share.
TYPE_2 = _tags("""
    PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID ReferringPhysicianName Manufacturer
    AccessionNumber PositionReferenceIndicator
""")
MULTI_ENERGY = ("MultienergyCTAcquisitionSequence", "MultienergyCTCharacteristicsSequence")


@dataclass(frozen=True)
class Derivation:
    """One derived series: what it is, by which checkpoint, and how its values are stored.

    That is signed 16 bits of 1 HU where HU fit these; any other values, and an uncertainty, of which parts of one HU
    count, span unsigned 16 bits. `slope` and `intercept` are the series' own, since a viewer may overlook those of a
    slice; `window` is centre and width. `stored_sha256` is that of all its slices, empty while they are not all there.
    """

    label: str
    checkpoint_sha256: str
    modality: str
    energy_kev: float | None
    mark: Mark | None
    is_uncertainty: bool
    dtype: Literal["<i2", "<u2"]
    slope: str
    intercept: str
    rescale_type: str
    window: tuple[str, str]
    stored_sha256: str = ""

    def uid_of(self, source_uid: str) -> str:
        """The UID of what was derived from the object of that UID: the same when it is derived again.

        An archive takes two objects of one UID for one object. So what a synthetic object depends on is in its UID:
        the source's UID, the checkpoint, the version, the mark, and the values, whose last digit may differ between
        devices. And nothing is in the object that differs between runs, such as the time. All are 64 characters long,
        so that one can take the place of another in a file.
        """
        made_by = (self.checkpoint_sha256, __version__, self.label, self.energy_kev, self.mark)
        values = (self.stored_sha256, self.slope, self.intercept)
        return uid.generate_uid(entropy_srcs=["|".join(map(str, (source_uid, *made_by, *values)))])


def derivation_of(
    volume: Volume,
    array: np.ndarray | None,
    description: str,
    checkpoint_sha256: str,
    energy_kev: float | None,
    mark: Mark | None,
    is_uncertainty: bool,
) -> Derivation:
    """How the (Z, Y, X) `array`, in the unit of `volume`, is stored and described.

    Without one, when they are still to come, they are taken to be HU that fit signed 16 bits.
    """
    as_ct = volume.unit == "HU" and not is_uncertainty
    dtype: Literal["<i2", "<u2"] = "<i2"
    if array is None or (as_ct and fit_int16(array)):
        slope, intercept = "1", "0"
    else:
        low, high = float(array.min()), float(array.max())
        dtype, slope = "<u2", format_number_as_ds((high - low) / 65534 if high > low else 1.0)
        intercept = format_number_as_ds(low)
    soft_tissue = (40.0 - 200, 40.0 + 200)
    dim, bright = soft_tissue if array is None or as_ct else map(float, np.percentile(array, (1, 99)))
    label = description.replace("\\", "/")
    if energy_kev is not None and energy_kev != energy_kev_in(label):
        label = f"{label[:54].rstrip()} {energy_kev:g} keV"
    return Derivation(
        label=label,
        checkpoint_sha256=checkpoint_sha256,
        modality=modality_of(volume),
        energy_kev=energy_kev,
        mark=mark,
        is_uncertainty=is_uncertainty,
        dtype=dtype,
        slope=slope,
        intercept=intercept,
        rescale_type="HU" if volume.unit == "HU" else "US",
        window=(
            format_number_as_ds((dim + bright) / 2),
            format_number_as_ds(max(bright - dim, float(slope))),
        ),
    )


def modality_of(volume: Volume) -> str:
    """CT for HU, whatever they were computed from; else that of the source."""
    return "CT" if volume.unit == "HU" else volume.modality or text_of(volume.headers[0], "Modality")


def fit_int16(array: np.ndarray) -> bool:
    """Whether all values, rounded, are signed 16-bit numbers; others than numbers are not."""
    return bool(array.min() >= -32768.5 and array.max() <= 32767.5)


def stored_as(derivation: Derivation, plane: np.ndarray) -> np.ndarray:
    """The plane in 16 bits, as the series stores its values."""
    if (derivation.slope, derivation.intercept) == ("1", "0"):
        steps = np.rint(plane)
    else:
        steps = np.rint((plane.astype(np.float64) - float(derivation.intercept)) / float(derivation.slope))
    limits = np.iinfo(derivation.dtype)
    return steps.clip(limits.min, limits.max).astype(derivation.dtype)


def inherited(source: Dataset, modality: str) -> Dataset:
    """What a derived object has from its source: nothing private, nothing about the source's pixels or creation."""
    other_modality = modality != text_of(source, "Modality")

    def carries_over(tag: BaseTag) -> bool:
        if tag.is_private or tag in DROPPED or tag.element == 0 or tag.group == 0x0002:
            return False
        if tag in WINDOW:
            return modality == "CT" and not other_modality
        if tag.group == 0x0028:
            return tag in KEPT_0028
        if other_modality and (tag.group == 0x0018 or tag in OF_MR_ALONE):
            return tag in KEPT_0018
        # Curves, functional groups, waveforms, overlays and pixels.
        return not (0x5000 <= tag.group < 0x5500 or tag.group >= 0x6000)

    derived = Dataset()
    for tag in list(source.keys()):
        if carries_over(tag) and readable(source, tag):
            # Values are replaced and never changed in place, but for items of sequences.
            element = source[tag]
            derived.add(copy.deepcopy(element) if element.VR == "SQ" else copy.copy(element))
    derived.remove_private_tags()
    for tag in TYPE_2 - derived.keys():
        derived.add_new(tag, dictionary_VR(tag), "")
    derived.Modality = modality
    derived.file_meta = FileMetaDataset()
    derived.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    return derived


def readable(dataset: Dataset, tag: BaseTag) -> bool:
    """Elements that cannot be parsed cannot be written again in another transfer syntax."""
    try:
        element = dataset[tag]
        items = element.value if element.VR == "SQ" else ()
        return all(readable(item, inner) for item in items for inner in list(item.keys()))
    except Exception:  # what a damaged value raises depends on its type
        return False


def describe(derived: Dataset, source: Dataset, derivation: Derivation) -> None:
    """What the object is, and by what it was computed."""
    if not derivation.label.isascii():
        derived.decode()
        derived.SpecificCharacterSet = "ISO_IR 192"
    derived.SeriesDescription = derivation.label[:64]
    derived.SeriesInstanceUID = derivation.uid_of(source.SeriesInstanceUID)
    derived.SOPInstanceUID = derivation.uid_of(source.SOPInstanceUID)
    first = 2000 if derivation.is_uncertainty else 1000
    derived.SeriesNumber = first + (int(number) if (number := text_of(source, "SeriesNumber")).isdecimal() else 0)
    if derivation.mark == "burned":
        derived.BurnedInAnnotation = "YES"
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [code(codes.DCM.SynthesizingEquipment)]
    equipment.Manufacturer, equipment.ManufacturerModelName = "SE-ResViT", "seresvit"
    equipment.SoftwareVersions = [__version__, derivation.checkpoint_sha256]
    equipment.ContributionDescription = (
        "Computed the pixels from those of the source image; the software versions are that of the package and the"
        " SHA-256 of the network's checkpoint"
    )
    derived.ContributingEquipmentSequence = [*(derived.get("ContributingEquipmentSequence") or []), equipment]
    # A reader gives MONOCHROME1 bright where signal is high, or in HU.
    derived.SamplesPerPixel, derived.PhotometricInterpretation = 1, "MONOCHROME2"
    derived.BitsAllocated, derived.BitsStored, derived.HighBit = 16, 16, 15
    derived.PixelRepresentation = int(derivation.dtype == "<i2")


def derivation_statement(derivation: Derivation) -> Dataset:
    """DerivationDescription and DerivationCodeSequence."""
    statement = Dataset()
    description = f"{derivation.label}: computed by the neural network of seresvit {__version__}"
    statement.DerivationDescription = description[:1024]
    # No code of CID 7203 is true of a network; the group may be extended, and this one of PS3.16 is.
    statement.DerivationCodeSequence = [code(codes.DCM.ArtificialIntelligence)]
    return statement


def source_reference(source: Dataset) -> Dataset:
    """The item of SourceImageSequence for the slice of that header."""
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    if frame_number := source.get("ReferencedFrameNumber"):
        reference.ReferencedFrameNumber = frame_number
    reference.PurposeOfReferenceCodeSequence = [code(codes.DCM.SourceImageForImageProcessingOperation)]
    return reference


def monoenergetic(derivation: Derivation, *parts: Dataset) -> Dataset | None:
    """The item of MultienergyCTCharacteristicsSequence (C.8.2.2); None unless the source is a multi-energy object.

    `parts` of the source are its header and functional groups.
    """
    is_multi_energy = any(keyword in part for keyword in MULTI_ENERGY for part in parts)
    if derivation.modality != "CT" or derivation.energy_kev is None:
        return None
    if not is_multi_energy and "VMI" not in list(parts[0].get("ImageType") or [])[3:4]:
        return None
    item = Dataset()
    item.MonoenergeticEnergyEquivalent = float(derivation.energy_kev)
    return item


def rescale(derivation: Derivation) -> Dataset:
    """The Modality LUT, which is also the pixel value transformation of enhanced objects."""
    lut = Dataset()
    lut.RescaleSlope, lut.RescaleIntercept = derivation.slope, derivation.intercept
    lut.RescaleType = derivation.rescale_type
    return lut


def overlay(rows: int, columns: int) -> Dataset:
    """The word SYNTHETIC as an overlay plane (C.9.2): shown over the pixels, and not in them."""
    word, _ = lettering(rows, columns)
    bits = np.packbits(word.ravel(), bitorder="little").tobytes()
    plane = Dataset()
    for element, vr, value in (
        *((0x0010, "US", rows), (0x0011, "US", columns), (0x0022, "LO", WORD), (0x0040, "CS", "G")),
        *((0x0050, "SS", [1, 1]), (0x0100, "US", 1), (0x0102, "US", 0), (0x1500, "LO", WORD)),
        (0x3000, "OW", bits + b"\0" * (len(bits) % 2)),
    ):
        plane.add_new((0x6000, element), vr, value)
    return plane


def set_pixels(derived: Dataset, stored: np.ndarray) -> None:
    """`stored` as little-endian words."""
    derived.PixelData = stored.tobytes()
    derived["PixelData"].VR = "OW"


def code(concept: Code) -> Dataset:
    """The item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = (
        concept.value,
        concept.scheme_designator,
        concept.meaning,
    )
    return item
