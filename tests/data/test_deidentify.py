"""De-identification: nothing of the patient is left in any format, and references stay consistent."""

import dataclasses
import shutil
import subprocess

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from seresvit.data import read_volume, write_volume
from seresvit.data.deidentify import deidentified
from seresvit.data.derivation import code
from seresvit.data.derived import write_derived
from seresvit.data.dicom import read_series

MARKER = "Zebrastripe"
# What PS3.15 table E.1-1 protects, among it attributes of other people, places and dates.
PLANTED = {
    **dict.fromkeys(("PatientName", "ReferringPhysicianName", "OperatorsName", "PerformingPhysicianName"), MARKER),
    **dict.fromkeys(("PatientID", "AccessionNumber", "StudyID", "InstitutionName", "StationName"), MARKER),
    **dict.fromkeys(("StudyDescription", "SeriesDescription", "ProtocolName", "PatientComments"), MARKER),
    **dict.fromkeys(("PatientAddress", "OtherPatientNames", "InstitutionAddress", "ImageComments"), MARKER),
    **dict.fromkeys(("StudyDate", "AcquisitionDate", "PatientBirthDate"), "19871231"),
}


@pytest.fixture
def named(series):
    folder, _ = series
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        for keyword, value in PLANTED.items():
            setattr(ds, keyword, value)
        request, person = Dataset(), Dataset()
        request.RequestedProcedureDescription = MARKER
        person.InstitutionName, person.StationName, person.OperatorsName = MARKER, MARKER, MARKER
        person.Manufacturer, person.PurposeOfReferenceCodeSequence = "Maker", [code(codes.DCM.ProcessingEquipment)]
        ds.RequestAttributesSequence = [request]
        ds.ContributingEquipmentSequence = [person]
        ds.private_block(0x0011, MARKER, create=True).add_new(1, "LO", MARKER)
        ds.save_as(path)
    return folder


def test_nothing_of_the_patient_is_left_in_a_derived_series(named, tmp_path):
    source = read_series(named)
    clean = deidentified(source)
    assert MARKER not in repr(dataclasses.astuple(dataclasses.replace(clean, path=tmp_path)))
    np.testing.assert_array_equal(clean.array, source.array)
    paths = write_derived(clean, tmp_path / "out", description="Synthetic", checkpoint_sha256="a" * 64, energy_kev=70)
    originals = [pydicom.dcmread(path) for path in named.iterdir()]
    uids = {
        ds[name].value for ds in originals for name in ("StudyInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID")
    }
    for path in paths:
        content = path.read_bytes()
        assert not any(word.encode() in content for word in (MARKER, "19871231", "SECRET VENDOR", *uids))
        ds = pydicom.dcmread(path)
        assert ds.PatientIdentityRemoved == "YES" and ds.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
        assert str(ds.PatientName) == ds.PatientID == clean.patient and clean.patient.startswith("ANON-")
        assert ds.SeriesDescription == "Synthetic 70 keV" and ds.BodyPartExamined == "ABDOMEN"
    again = read_series(tmp_path / "out")
    np.testing.assert_array_equal(again.affine, source.affine)


def test_references_are_the_new_uids_of_what_they_name(named, tmp_path):
    clean = deidentified(read_series(named))
    again = deidentified(read_series(named))
    assert [h.SOPInstanceUID for h in again.headers] == [h.SOPInstanceUID for h in clean.headers]
    assert len({h.StudyInstanceUID for h in clean.headers} | {h.FrameOfReferenceUID for h in clean.headers}) == 2
    paths = write_derived(clean, tmp_path / "out", description="x", checkpoint_sha256="a" * 64)
    references = [pydicom.dcmread(path).SourceImageSequence[0].ReferencedSOPInstanceUID for path in paths]
    assert references == [h.SOPInstanceUID for h in clean.headers]


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian dicom3tools) is not installed")
def test_validator_finds_no_error_in_a_de_identified_series(named, tmp_path):
    clean = deidentified(read_series(named))
    path = write_derived(clean, tmp_path / "out", description="x", checkpoint_sha256="a" * 64)[0]
    found = subprocess.run(["dciodvfy", str(path)], capture_output=True, check=False)
    lines = (found.stdout + found.stderr).decode(errors="replace").splitlines()
    assert lines and [line for line in lines if line.startswith("Error")] == []


def test_nifti_and_png_lose_their_texts_and_names(tmp_path):
    image = nib.Nifti1Image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.diag([-1, -1, 2, 1]))
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[field] = MARKER
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", MARKER.encode()))
    image.to_filename(tmp_path / f"{MARKER}.nii")
    source = read_volume(tmp_path / f"{MARKER}.nii")
    clean = deidentified(source)
    written = write_volume(clean, tmp_path / "nifti", description="Synthetic CT")
    read = nib.load(written)
    assert MARKER not in str(read.header) and len(read.header.extensions) == 0
    np.testing.assert_array_equal(read.affine, image.affine)
    assert clean.patient == deidentified(read_volume(tmp_path / f"{MARKER}.nii")).patient != source.patient

    (tmp_path / "png").mkdir()
    for number in (3, 4):
        Image.new("L", (8, 8), number).save(tmp_path / "png" / f"{MARKER}_{number}.png")
    written = write_volume(deidentified(read_volume(tmp_path / "png")), tmp_path / "out", description="x")
    assert sorted(p.name for p in written.iterdir()) == ["slice_0003.png", "slice_0004.png"]
