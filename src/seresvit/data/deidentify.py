"""De-identification of a source before anything is derived from it: what is derived then tells nothing of the patient.

DICOM: the Basic Application Level Confidentiality Profile (PS3.15 annex E), whose table of attributes and actions is
that of the package dicom-anonymizer. UIDs are replaced by hashes of themselves: always the same, and telling nothing to
whoever does not have the original. Pixels are left as they are.
"""

import copy
import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dicomanonymizer import simpledicomanonymizer as profile
from nibabel.nifti1 import Nifti1Extensions, Nifti1Header
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from seresvit.data.derivation import code, readable
from seresvit.data.dicom import text_of, tolerant
from seresvit.data.volume import Volume

EDITION = "dicomfields_2026c"
FREE_TEXTS_OF_NIFTI = ("descrip", "db_name", "aux_file", "intent_name")


def deidentified(volume: Volume) -> Volume:
    """The volume with headers that tell nothing of the patient, and a pseudonym as its `patient`.

    The pseudonym is the same for all series of a study (DICOM), or for the same voxels (other formats): names and IDs
    are too few for a hash of them to hide them. NIfTI loses its free texts and extensions, PNG its file names.
    """
    if volume.format == "dicom":
        return _deidentified_dicom(volume)
    if volume.format == "png":
        suffixes = (Path(name).suffix for name in volume.headers)
        headers = tuple(f"slice_{z:04.0f}{suffix}" for z, suffix in zip(volume.positions_mm, suffixes, strict=True))
    else:
        headers = tuple(map(_without_texts, volume.headers))
    return replace(volume, headers=headers, patient=_pseudonym(volume.array.tobytes()), description="")


def _deidentified_dicom(volume: Volume) -> Volume:
    pseudonym = _pseudonym(volume.headers[0].StudyInstanceUID.encode())
    whole: dict[int, Dataset] = {}
    with tolerant():
        headers = tuple(_cleaned(header, pseudonym) for header in volume.headers)
        for clean, header in zip(headers, volume.headers, strict=True):
            if hasattr(header, "enhanced"):
                if id(header.enhanced) not in whole:
                    whole[id(header.enhanced)] = _cleaned(header.enhanced, pseudonym)
                clean.enhanced = whole[id(header.enhanced)]
    frame_of_reference = text_of(headers[0], "FrameOfReferenceUID")
    return replace(volume, headers=headers, patient=pseudonym, description="", frame_of_reference=frame_of_reference)


def _pseudonym(entropy: bytes) -> str:
    return f"ANON-{hashlib.sha256(entropy).hexdigest()[:12]}"


@cache
def _actions() -> dict[tuple[int, ...], Any]:
    return profile.initialize_actions(EDITION)


def _cleaned(header: Dataset, pseudonym: str) -> Dataset:
    clean = Dataset()
    clean.update({tag: copy.deepcopy(header[tag]) for tag in list(header.keys()) if readable(header, tag)})
    clean.decode()
    _clean(clean)
    clean.PatientName = clean.PatientID = pseudonym
    clean.PatientIdentityRemoved = "YES"
    clean.DeidentificationMethod = "DICOM PS3.15 Basic Profile, by seresvit"
    clean.DeidentificationMethodCodeSequence = [code(codes.DCM.BasicApplicationConfidentialityProfile)]
    clean.LongitudinalTemporalInformationModified = "REMOVED"
    return clean


def _clean(dataset: Dataset) -> None:
    """Applies the profile to all levels of nesting."""
    dataset.remove_private_tags()
    for tag in list(dataset.keys()):
        action = _actions().get((tag.group, tag.element))
        element = dataset[tag]
        if element.VR == "SQ" and action is profile.delete_or_empty:
            element.value = []
        elif element.VR == "SQ" and action:
            # None of these sequences is needed to place an image.
            del dataset[tag]
        elif element.VR == "SQ":
            for item in element.value:
                _clean(item)
        elif element.VR in ("DA", "TM") and action:
            element.value = ""  # the package's dummy is the year 1, which is no valid date
        elif element.VR == "DT" and action:
            del dataset[tag]
        elif element.VR == "UI" and action:
            values = [element.value] if element.VM == 1 else element.value
            element.value = [generate_uid(entropy_srcs=["de-identified", str(value)]) for value in values]
        elif action:
            action(dataset, (tag.group, tag.element))


def _without_texts(header: Any) -> Any:
    """A NIfTI header without texts; ITK's holds only geometry."""
    if not isinstance(header, Nifti1Header):
        return header
    clean = header.copy()
    for field in FREE_TEXTS_OF_NIFTI:
        clean[field] = b""
    clean.extensions = Nifti1Extensions()
    return clean
