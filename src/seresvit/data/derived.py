"""DICOM: a derived series out, beside the series that it was computed from.

A new series of the same study and frame of reference whose every slice names the slice that it was computed from
(DICOM PS3.3 C.7.6.1.1.4 and C.12.4.1).
"""

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydicom import Dataset, uid
from pydicom.datadict import dictionary_VR
from pydicom.tag import Tag

from seresvit.data.derivation import (
    Derivation,
    derivation_of,
    derivation_statement,
    describe,
    fit_int16,
    inherited,
    modality_of,
    monoenergetic,
    overlay,
    rescale,
    set_pixels,
    source_reference,
    stored_as,
)
from seresvit.data.dicom import text_of, tolerant
from seresvit.data.enhanced import enhanced_objects, is_enhanced
from seresvit.data.mark import Mark, burned
from seresvit.data.volume import DataError, Volume, written_whole

STORAGE = {"CT": uid.CTImageStorage, "MR": uid.MRImageStorage}
# Attributes of type 2 (must be there, may be empty) of single-frame images, and of each modality.
TYPE_2 = ("SliceThickness", "AcquisitionNumber", "PatientPosition")
TYPE_2_OF = {
    "CT": ("KVP",),
    "MR": ("ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "EchoTrainLength"),
}


def write_derived(
    volume: Volume,
    folder: Path,
    *,
    description: str,
    checkpoint_sha256: str,
    energy_kev: float | None = None,
    mark: Mark | None = None,
    is_uncertainty: bool = False,
    arriving: Iterable[int] | None = None,
) -> list[Path]:
    """Paths SYN_0001.dcm, ... in `folder`: a slice each in the order of `volume.array`, or an enhanced object each.

    `volume.headers` are those of the source slices. Study, patient, frame of reference and geometry are the source's;
    series and instances are new, DERIVED, and name the source slices. "HU" becomes CT (also from MR headers), other
    units keep the modality. Values come back within half a slope; the slope is 1 HU where 16 bits hold the range. The
    same values, source and `checkpoint_sha256` give the same bytes. `energy_kev` goes into SeriesDescription, and into
    the multi-energy attributes where the source has them. `mark`: "burned" into the pixels, or an "overlay" plane.
    `is_uncertainty`: a map of how far a synthetic image may be off, stored as finely as 16 bits allow. `arriving`
    gives the numbers of the slices, in order, as they come to be in `volume.array`: HU of single slices are written
    then, all else when the last has come. `folder` is replaced when all is written. Raises DataError: headers and
    slices differ in number or size, values not finite, an overlay for enhanced objects.
    """
    folder, headers, count = Path(folder), volume.headers, len(volume.array)
    if volume.format != "dicom" or len(headers) != count or not headers:
        raise DataError(
            f"{volume.path}: needs one DICOM header a slice, found {len(headers)} for {count}; read DICOM first"
        )
    if (found := volume.array.shape[1:]) != (size := (headers[0].Rows, headers[0].Columns)):
        raise DataError(f"{volume.path}: slices must be {size} as in the source, found {found}; resample first")
    enhanced = is_enhanced(headers[0], modality_of(volume))
    if enhanced and mark == "overlay":
        raise DataError(f"{volume.path}: enhanced DICOM has no overlay planes; use --mark burned")
    how = (description, checkpoint_sha256, energy_kev, mark, is_uncertainty)
    with tolerant(), written_whole(folder) as temporary:
        temporary.mkdir()
        names, slices = list[str](), range(count) if arriving is None else arriving
        if volume.unit == "HU" and not is_uncertainty and not enhanced and mark != "burned":
            names = _write_slices(headers, derivation_of(volume, None, *how), volume.array, slices, temporary)
        if not names:
            deque(slices, maxlen=0)
            array = _checked(volume, mark)
            derivation = derivation_of(volume, array, *how)
            if enhanced:
                for number, derived in enumerate(enhanced_objects(headers, derivation, array), 1):
                    names.append(f"SYN_{number:04d}.dcm")
                    derived.save_as(temporary / names[-1], enforce_file_format=True)
            else:
                names = _write_slices(headers, derivation, array, range(count), temporary)
    return [folder / name for name in names]


def _checked(volume: Volume, mark: Mark | None) -> np.ndarray:
    """The values to be written, once they are all there."""
    if bad := sum(int((~np.isfinite(plane)).sum()) for plane in volume.array):
        raise DataError(f"{volume.path}: values must be finite, found {bad} that are not; nothing was written")
    return burned(volume.array, volume.unit) if mark == "burned" else volume.array


def _write_slices(
    headers: tuple[Dataset, ...], derivation: Derivation, array: np.ndarray, slices: Iterable[int], folder: Path
) -> list[str]:
    """The names of the files written, one a slice as `slices` gives their numbers; none when one does not fit.

    The UIDs depend on all values, so that those of the series as yet without its hash stand in until the end.
    """
    names, stored_sha256, num_bytes = list[str](), hashlib.sha256(), 0
    for index in slices:
        if derivation.dtype == "<i2" and not fit_int16(array[index]):
            return []
        stored = stored_as(derivation, array[index])
        stored_sha256.update(stored.data)
        names.append(f"SYN_{index + 1:04d}.dcm")
        num_bytes = stored.nbytes
        _slice(headers[index], derivation, stored, index + 1).save_as(folder / names[-1], enforce_file_format=True)
    final = replace(derivation, stored_sha256=stored_sha256.hexdigest())
    for name, source in zip(names, headers, strict=True):
        with open(folder / name, "r+b") as file:
            head = file.read((folder / name).stat().st_size - num_bytes)
            for of_source in (source.SeriesInstanceUID, source.SOPInstanceUID):
                stand_in, uid = (made.uid_of(of_source).encode() for made in (derivation, final))
                assert stand_in in head and len(stand_in) == len(uid)
                head = head.replace(stand_in, uid)
            file.seek(0)
            file.write(head)
    return names


def _slice(source: Dataset, derivation: Derivation, stored: np.ndarray, number: int) -> Dataset:
    derived = inherited(source, derivation.modality)
    _complete(derived, source)
    describe(derived, source, derivation)
    derived.InstanceNumber = number
    derived.ImageType = ["DERIVED", "SECONDARY", _third_value(derived, source)]
    derived.update(derivation_statement(derivation))
    derived.ImageComments = "Synthetic image: computed, not acquired by a scanner"
    if derivation.is_uncertainty:
        derived.ImageComments = "Uncertainty of a synthetic image: a map, no image of the patient"
    derived.SourceImageSequence = [source_reference(source)]
    if (energy := monoenergetic(derivation, source)) is not None:
        derived.ImageType = [*derived.ImageType, "VMI"]
        derived.MultienergyCTCharacteristicsSequence = [energy]
    derived.update(rescale(derivation))
    if not ("WindowCenter" in derived and "WindowWidth" in derived):
        derived.WindowCenter, derived.WindowWidth = derivation.window
    if derivation.mark == "overlay":
        derived.update(overlay(*stored.shape))
    set_pixels(derived, stored)
    return derived


def _complete(derived: Dataset, source: Dataset) -> None:
    """The class of the modality's single-frame images, and what they must hold."""
    if not text_of(derived, "BodyPartExamined") and "Laterality" not in derived:
        derived.Laterality = ""
    derived.SOPClassUID = STORAGE.get(derived.Modality, source.SOPClassUID)
    for keyword in (*TYPE_2, *TYPE_2_OF.get(derived.Modality, ())):
        if keyword not in derived:
            derived.add_new(Tag(keyword), dictionary_VR(keyword), "")
    if derived.Modality == "MR" and "ScanningSequence" not in derived:
        # The standard's words for a sequence that has none of its names.
        derived.ScanningSequence, derived.SequenceVariant = "RM", "NONE"


def _third_value(derived: Dataset, source: Dataset) -> str:
    image_type = source.get("ImageType") or []
    kinds = [image_type] if isinstance(image_type, str) else [kind.strip() for kind in image_type]
    if len(kinds) < 3 or derived.Modality != text_of(source, "Modality"):
        return "OTHER" if derived.Modality == "MR" else "AXIAL"
    return kinds[2]
