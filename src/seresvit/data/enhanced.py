"""DICOM: a derived enhanced multi-frame object for each enhanced object that slices were computed from.

Its frames keep their functional groups, and each names the frame that it was computed from (DICOM PS3.3 C.7.6.16.2.6).
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from pydicom import Dataset
from pydicom.datadict import keyword_for_tag, tag_for_keyword

from seresvit.data.derivation import (
    Derivation,
    derivation_statement,
    describe,
    inherited,
    monoenergetic,
    readable,
    rescale,
    set_pixels,
    source_reference,
    stored_as,
)
from seresvit.data.dicom import text_of
from seresvit.data.volume import room

FRAME_TYPE = {"CT": "CTImageFrameTypeSequence", "MR": "MRImageFrameTypeSequence"}
# Groups that state how the source's pixels were derived and stored.
OF_THE_SOURCE = (
    *("PixelValueTransformationSequence", "RealWorldValueMappingSequence", "FrameVOILUTSequence"),
    *("DerivationImageSequence", "ConversionSourceAttributesSequence", "UnassignedSharedConvertedAttributesSequence"),
    *("UnassignedPerFrameConvertedAttributesSequence", "MultienergyCTProcessingSequence"),
    *("MultienergyCTCharacteristicsSequence", *FRAME_TYPE.values()),
)
# Attributes that an object which is not ORIGINAL may not have (C.8.13.4).
MR_PULSE_SEQUENCE = (
    *("PulseSequenceName", "MRAcquisitionType", "EchoPulseSequence", "MultipleSpinEcho", "MultiPlanarExcitation"),
    *("PhaseContrast", "TimeOfFlightContrast", "ArterialSpinLabelingContrast", "SteadyStatePulseSequence"),
    *("EchoPlanarPulseSequence", "SaturationRecovery", "SpectrallySelectedSuppression", "OversamplingPhase"),
    *("GeometryOfKSpaceTraversal", "SegmentedKSpaceTraversal", "RectilinearPhaseEncodeReordering"),
    *("CoverageOfKSpace", "NumberOfKSpaceTrajectories"),
)


def is_enhanced(source: Dataset, modality: str) -> bool:
    """True where slices of `modality` computed from that header become an enhanced object.

    A CT computed from an enhanced MR becomes single slices: an enhanced CT must name an irradiation (A.38.1.4), and
    there was none.
    """
    return hasattr(source, "enhanced") and text_of(source, "Modality") == modality


def enhanced_objects(headers: tuple[Dataset, ...], derivation: Derivation, array: np.ndarray) -> Iterator[Dataset]:
    """One derived object for each source object, its frames in the source's order.

    `headers` as `read_series` gives them: one a slice, each with the whole source object as `enhanced`. The frames are
    one stack whose one dimension is the position in it, whatever the dimensions of the source were.
    """
    stored = room(array.shape, derivation.dtype)
    for plane, values in zip(stored, array, strict=True):
        plane[:] = stored_as(derivation, values)
    derivation = replace(derivation, stored_sha256=hashlib.sha256(stored.data).hexdigest())
    sources = {id(header.enhanced): header.enhanced for header in headers}
    for number, (identity, source) in enumerate(sources.items(), 1):
        places = [place for place, header in enumerate(headers) if id(header.enhanced) == identity]
        places.sort(key=lambda place: headers[place].ReferencedFrameNumber)
        shared = (source.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        own = source.PerFrameFunctionalGroupsSequence
        energy = monoenergetic(derivation, source, shared, own[0])

        derived = inherited(source, derivation.modality)
        derived.SOPClassUID = source.SOPClassUID
        describe(derived, source, derivation)
        derived.InstanceNumber, derived.NumberOfFrames = number, len(places)
        derived.ImageType = _image_type(source, is_vmi=energy is not None)
        _complete(derived, source)
        _set_one_dimension(derived, derivation.uid_of(f"dimension of {source.SOPInstanceUID}"))
        derived.SourceImageEvidenceSequence = [_evidence(source)]
        derived.SharedFunctionalGroupsSequence = [_shared(shared, headers[places[0]], derivation, energy)]
        frames = []
        for place in places:
            frames.append(_frame(own[headers[place].ReferencedFrameNumber - 1], shared, derived))
            _place_and_derive(frames[-1], headers[place], derivation, position=place + 1)
        derived.PerFrameFunctionalGroupsSequence = frames
        set_pixels(derived, stored[places])
        yield derived


def _image_type(source: Dataset, is_vmi: bool) -> list[str]:
    """SECONDARY is no value of enhanced objects (C.8.16.1.2)."""
    kinds = list(source.get("ImageType") or [])
    third, fourth = kinds[2:] if len(kinds) == 4 else ("VOLUME", "NONE")
    return ["DERIVED", "PRIMARY", third, "VMI" if is_vmi else fourth]


def _complete(derived: Dataset, source: Dataset) -> None:
    """What enhanced images must hold, and must not."""
    for keyword in MR_PULSE_SEQUENCE:
        derived.pop(keyword, None)
    derived.PixelPresentation, derived.PresentationLUTShape = "MONOCHROME", "IDENTITY"
    derived.VolumetricProperties = text_of(source, "VolumetricProperties") or "VOLUME"
    derived.VolumeBasedCalculationTechnique = "NONE"
    derived.ContentQualification = "RESEARCH"
    # YES is no value of enhanced objects; and the word SYNTHETIC names neither patient nor date, as YES would say.
    derived.BurnedInAnnotation = "NO"
    # The time must be there, and must not differ between runs: it is that of the source.
    for kind, unknown in (("Date", "19000101"), ("Time", "000000")):
        known = (text_of(source, f"{event}{kind}") for event in ("Content", "Acquisition", "Series", "Study"))
        setattr(derived, f"Content{kind}", next(filter(None, known), unknown))


def _set_one_dimension(derived: Dataset, organization_uid: str) -> None:
    """Frames are told by stack and position in it (C.7.6.17)."""
    organization, stack, position = Dataset(), Dataset(), Dataset()
    for item in (organization, stack, position):
        item.DimensionOrganizationUID = organization_uid
    for index, keyword in ((stack, "StackID"), (position, "InStackPositionNumber")):
        index.DimensionIndexPointer = tag_for_keyword(keyword)
        index.FunctionalGroupPointer = tag_for_keyword("FrameContentSequence")
    derived.DimensionOrganizationSequence, derived.DimensionIndexSequence = [organization], [stack, position]
    derived.pop("DimensionOrganizationType", None)


def _evidence(source: Dataset) -> Dataset:
    """The study, series and object that the frames were computed from (C.8.16.1)."""
    instance, series, study = Dataset(), Dataset(), Dataset()
    instance.ReferencedSOPClassUID, instance.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    series.SeriesInstanceUID, series.ReferencedSOPSequence = source.SeriesInstanceUID, [instance]
    study.StudyInstanceUID, study.ReferencedSeriesSequence = source.StudyInstanceUID, [series]
    return study


def _shared(groups: Dataset, header: Dataset, derivation: Derivation, energy: Dataset | None) -> Dataset:
    """The groups that all frames have in common."""
    shared, window = _kept(groups), Dataset()
    shared.PixelValueTransformationSequence = [rescale(derivation)]
    of_source = (header.get("WindowCenter"), header.get("WindowWidth"))
    window.WindowCenter, window.WindowWidth = (
        of_source if derivation.modality == "CT" and all(of_source) else derivation.window
    )
    shared.FrameVOILUTSequence = [window]
    if energy is not None:
        shared.MultienergyCTCharacteristicsSequence = [energy]
    return shared


def _frame(groups: Dataset, shared: Dataset, derived: Dataset) -> Dataset:
    """The groups of one frame that the source had, its type now that of the image."""
    frame = _kept(groups)
    if keyword := FRAME_TYPE.get(derived.Modality):
        frame_type = copy.deepcopy((groups.get(keyword) or shared.get(keyword) or [Dataset()])[0])
        frame_type.FrameType = list(derived.ImageType)
        for description in ("PixelPresentation", "VolumetricProperties", "VolumeBasedCalculationTechnique"):
            setattr(frame_type, description, derived[description].value)
        setattr(frame, keyword, [frame_type])
    return frame


def _place_and_derive(frame: Dataset, header: Dataset, derivation: Derivation, position: int) -> None:
    """Adds where the frame stands in the stack, and from which frame it was computed."""
    content = (frame.get("FrameContentSequence") or [Dataset()])[0]
    content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", position, [1, position]
    frame.FrameContentSequence = [content]
    statement = derivation_statement(derivation)
    statement.SourceImageSequence = [source_reference(header)]
    frame.DerivationImageSequence = [statement]


def _kept(groups: Dataset) -> Dataset:
    kept = Dataset()
    for tag in list(groups.keys()):
        if keyword_for_tag(tag) not in OF_THE_SOURCE and not tag.is_private and readable(groups, tag):
            kept.add(copy.deepcopy(groups[tag]))
    kept.remove_private_tags()
    return kept
