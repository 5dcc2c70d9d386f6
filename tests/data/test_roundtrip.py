"""Write, then read: nothing changes; and what other software makes of it: SimpleITK, nibabel, DCMTK and Orthanc."""

import dataclasses
import email
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.spatial.transform import Rotation

from seresvit.data import read_volume, write_volume
from seresvit.data.volume import Volume

BY = {"description": "Synthetic 70keV (SE-ResViT)", "energy_kev": 70.0, "checkpoint_sha256": "5e" * 32}
DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
orthanc_is_here = pytest.mark.skipif(
    not (shutil.which("Orthanc") and shutil.which("storescu") and DICOMWEB.is_file()),
    reason="a DICOM server (Debian orthanc, orthanc-dicomweb, dcmtk) is not installed",
)

spacings_mm = st.floats(0.2, 8.0)
turns_deg = st.tuples(*[st.floats(-180, 180)] * 3)
shapes = st.tuples(st.integers(1, 4), st.integers(2, 7), st.integers(2, 7))
origins_mm = st.tuples(*[st.floats(-900, 900)] * 3)
# Values in HU with the extremes of 16 bits, or any finite float32 that a network may give.
ranges_hu = st.sampled_from([(-32768, 32767), (-1024, 3071), (0, 0), (-32768, -32768), (-40000, 70000)])
ranges = st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(0, 1e6, width=32))


def values_between(low, high, shape, seed):
    values = np.random.default_rng(seed).uniform(low, high, shape)
    values.flat[0], values.flat[-1] = low, high
    return values.astype(np.float32)


def dicom_source(folder, shape, spacing_mm_zyx, turn_deg, origin_mm, modality):
    """Slices of zeros, oblique and anisotropic, in a shuffled order of names."""
    axes = Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix()
    study, series, frame = (generate_uid() for _ in range(3))
    for z in range(shape[0]):
        ds = FileDataset("", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
        ds.Modality, ds.SOPInstanceUID, ds.PatientID = modality, generate_uid(), "P7"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        position = np.array(origin_mm) + axes[:, 2] * z * spacing_mm_zyx[0]
        ds.ImagePositionPatient = [f"{v:.9g}" for v in position]
        ds.ImageOrientationPatient = [f"{v:.9g}" for v in axes[:, :2].T.ravel()]
        ds.PixelSpacing = [f"{v:.9g}" for v in spacing_mm_zyx[1:]]
        ds.SliceThickness = f"{spacing_mm_zyx[0]:.9g}"
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *shape[1:], 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.PixelData = bytes(2 * shape[1] * shape[2])
        ds.save_as(folder / f"{(z * 7) % 10}.dcm", enforce_file_format=True)
    return read_volume(folder)


def with_values(volume: Volume, values: np.ndarray) -> Volume:
    return dataclasses.replace(volume, array=values)


def half_step(values, unit):
    """Of 1 HU where 16 bits hold the range, else of the range in 65534 steps; and what float32 itself loses."""
    low, high = float(values.min()), float(values.max())
    step = 1.0 if unit == "HU" and low >= -32768 and high <= 32767 else max((high - low) / 65534, 0.0)
    return step / 2 + 1e-6 * max(abs(low), abs(high)) + 1e-6


@settings(max_examples=40, deadline=None)
@given(shapes, st.tuples(*[spacings_mm] * 3), turns_deg, origins_mm, ranges_hu, ranges, st.booleans())
def test_dicom_comes_back_the_same(shape, spacing_mm_zyx, turn_deg, origin_mm, range_hu, range_other, is_ct):
    with TemporaryDirectory() as folder:
        made = Path(folder) / "source"
        made.mkdir()
        source = dicom_source(made, shape, spacing_mm_zyx, turn_deg, origin_mm, "CT" if is_ct else "MR")
        low, high = range_hu if is_ct else (range_other[0], range_other[0] + range_other[1])
        values = values_between(low, high, shape, seed=int(abs(low)))
        again = read_volume(write_volume(with_values(source, values), Path(folder) / "out", **BY))
        assert np.abs(again.array.astype(np.float64) - values).max() <= half_step(values, source.unit)
        assert (again.unit, again.modality) == (source.unit, source.modality)
        np.testing.assert_array_equal(again.affine, source.affine)
        np.testing.assert_array_equal(again.positions_mm, source.positions_mm)
        if shape[0] > 1:
            names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(Path(folder) / "out"))
            image = sitk.ReadImage(names, sitk.sitkFloat64)
            np.testing.assert_allclose(sitk.GetArrayFromImage(image), again.array, rtol=1e-6, atol=1e-6)
            corner = [n - 1 for n in shape[::-1]]
            expected = image.TransformIndexToPhysicalPoint(corner)
            np.testing.assert_allclose((again.affine @ [*corner, 1])[:3], expected, atol=1e-2)


@settings(max_examples=30, deadline=None)
@given(
    shapes,
    st.tuples(*[spacings_mm] * 3),
    turns_deg,
    origins_mm,
    ranges,
    st.booleans(),
    st.sampled_from([".nii.gz", ".mha", ".nrrd"]),
)
def test_image_files_come_back_the_same(shape, spacing_mm_zyx, turn_deg, origin_mm, value_range, is_hu, suffix):
    axes = Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix()
    first = np.random.default_rng(0).normal(-1000 if is_hu else 0, size=shape).astype(np.float32)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"source{suffix}"
        if suffix != ".nii.gz":
            image = sitk.GetImageFromArray(first)
            image.SetSpacing(spacing_mm_zyx[::-1])
            image.SetDirection(axes.ravel().tolist())
            image.SetOrigin(origin_mm)
            sitk.WriteImage(image, path)
        else:
            affine = np.eye(4)
            affine[:3, :3], affine[:3, 3] = axes * spacing_mm_zyx[::-1], origin_mm
            nib.save(nib.Nifti1Image(first.T, affine), path)
        source = read_volume(path)
        low, high = (-32768, 32767) if is_hu else (value_range[0], sum(value_range))
        values = values_between(low, high, source.array.shape, seed=0)
        written = write_volume(with_values(source, values), Path(folder) / "out", **BY)
        again = read_volume(written)
        # NRRD keeps spacing and direction as one product.
        np.testing.assert_allclose(again.affine, source.affine, rtol=0, atol=1e-9 if suffix == ".nrrd" else 0)
        np.testing.assert_array_equal(again.array, np.rint(values) if is_hu else values)
        assert again.unit == source.unit == ("HU" if is_hu else "arbitrary") or low <= -500
        if suffix != ".nii.gz":
            ours, theirs = sitk.ReadImage(written), sitk.ReadImage(path)
            np.testing.assert_allclose(ours.GetDirection(), theirs.GetDirection(), rtol=0, atol=1e-12)
            assert ours.GetOrigin() == theirs.GetOrigin()
        else:
            np.testing.assert_array_equal(nib.load(written).affine, nib.load(path).affine)


def synthetic_series(folder):
    """A prediction of random HU on an oblique grid, written as DICOM."""
    (folder / "source").mkdir()
    source = dicom_source(folder / "source", (4, 30, 20), (2.5, 0.7, 0.9), (10, 20, 30), (5, 6, 7), "CT")
    values = values_between(-1024, 3071, source.array.shape, seed=1)
    out = write_volume(with_values(source, values), folder / "out", **BY)
    return read_volume(out), sorted(out.iterdir())


@pytest.mark.skipif(shutil.which("dcmdump") is None, reason="dcmdump (Debian dcmtk) is not installed")
def test_dcmtk_reads_the_same_values_and_attributes(tmp_path):
    volume, paths = synthetic_series(tmp_path)
    for z, path in enumerate(paths):
        dumped = subprocess.run(["dcmdump", str(path)], capture_output=True, check=True)
        assert dumped.stderr == b"" and rb"[DERIVED\SECONDARY\AXIAL]" in dumped.stdout
        # A window of 65536 grey values of 1 HU: 16-bit grey is HU + 32768.
        window = ["--set-window", "0", "65536", "--write-16-bit-pnm"]
        shown = subprocess.run(["dcm2pnm", *window, str(path)], capture_output=True, check=True).stdout
        grey = np.array(shown.split()[-volume.array[z].size :], dtype=np.float64).reshape(volume.array[z].shape)
        np.testing.assert_allclose(grey - 32768, volume.array[z], atol=1)


@pytest.fixture
def orthanc(tmp_path):
    """The ports of a DICOM server with DICOMweb that is there for one test: its HTTP address and DICOM port."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        http, dicom = one.getsockname()[1], other.getsockname()[1]
    settings = {
        **{"HttpPort": http, "DicomPort": dicom, "RemoteAccessAllowed": False, "AuthenticationEnabled": False},
        **{"StorageDirectory": str(tmp_path / "db"), "IndexDirectory": str(tmp_path / "db")},
        **{"Plugins": [str(DICOMWEB)], "DicomAlwaysAllowStore": True, "OverwriteInstances": False},
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    server = subprocess.Popen(
        ["Orthanc", str(tmp_path / "orthanc.json")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://127.0.0.1:{http}"
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{address}/system", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield address, dicom
    finally:
        server.kill()
        server.wait()


@orthanc_is_here
def test_an_archive_takes_the_series_and_gives_it_back(tmp_path, orthanc):
    address, port = orthanc
    _, paths = synthetic_series(tmp_path)
    sent = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, paths)}
    # Twice: a prediction that is run and sent again is the same series, not a second one.
    for _ in range(2):
        subprocess.run(["storescu", "127.0.0.1", str(port), *map(str, paths)], capture_output=True, check=True)

    def got(query, accept):
        request = urllib.request.Request(f"{address}/dicom-web/{query}", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers["Content-Type"], answer.read()

    one = next(iter(sent.values()))
    query = f"series?SeriesInstanceUID={one.SeriesInstanceUID}&includefield=SeriesDescription"
    (found,) = json.loads(got(query, "application/dicom+json")[1])
    found = pydicom.Dataset.from_json(found)
    assert found.SeriesDescription == BY["description"] and found.Modality == "CT"
    assert found.StudyInstanceUID == one.StudyInstanceUID
    assert found.NumberOfSeriesRelatedInstances == len(sent)

    kind, body = got(
        f"studies/{one.StudyInstanceUID}/series/{one.SeriesInstanceUID}",
        'multipart/related; type="application/dicom"',
    )
    message = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    returned = [pydicom.dcmread(BytesIO(part.get_payload(decode=True))) for part in message.get_payload()]
    assert len(returned) == len(sent)
    for ds in returned:
        assert ds == sent[ds.SOPInstanceUID]
