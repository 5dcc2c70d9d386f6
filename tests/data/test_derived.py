"""DICOM out, against SimpleITK's readers, pydicom, and the standard's validator dciodvfy."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from seresvit import __version__
from seresvit.data import write_volume
from seresvit.data.derived import write_derived
from seresvit.data.dicom import read_series
from seresvit.data.mark import lettering
from seresvit.data.volume import DataError

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
COMPRESSED = DATA / "odd" / "dicom" / "dicom2nifti_compressed"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="the collection of real and damaged files is not here")
validator = pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy (Debian dicom3tools) is not installed"
)
BY = {"checkpoint_sha256": "5e" * 32}


def change(folder, **attributes):
    """Sets attributes of all slices, or removes those that are None."""
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        for keyword, value in attributes.items():
            if value is None:
                ds.pop(keyword, None)
            else:
                setattr(ds, keyword, value)
        ds.save_as(path)


def errors_of(path):
    found = subprocess.run(["dciodvfy", str(path)], capture_output=True, check=False)
    lines = (found.stdout + found.stderr).decode(errors="replace").splitlines()
    return {line for line in lines if line.startswith("Error")}


def bytes_of(paths):
    return [path.read_bytes() for path in paths]


def enhanced_from(folder, path):
    """One enhanced CT of the slices in `folder`: the last two in concatenated frames of a dimension of their own."""
    slices = [pydicom.dcmread(p) for p in sorted(folder.iterdir())]
    ds = slices[0]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    ds.ImageType, ds.ContentDate, ds.ContentTime = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "20240102", "101112"
    ds.NumberOfFrames, ds.PixelData = len(slices), b"".join(d.PixelData for d in slices)
    ds.ConcatenationUID, ds.InConcatenationNumber = generate_uid(), 1

    def item(source, *keywords):
        made = Dataset()
        for keyword in keywords:
            made[keyword] = source[keyword]
        return [made]

    shared = Dataset()
    shared.PlaneOrientationSequence = item(ds, "ImageOrientationPatient")
    shared.PixelMeasuresSequence = item(ds, "PixelSpacing", "SliceThickness")
    shared.FrameVOILUTSequence = item(ds, "WindowCenter", "WindowWidth")
    shared.MultienergyCTCharacteristicsSequence = [Dataset()]
    shared.MultienergyCTCharacteristicsSequence[0].MonoenergeticEnergyEquivalent = 110.0
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], []
    for number, source in enumerate(slices, 1):
        own, exposure = Dataset(), Dataset()
        own.PlanePositionSequence = item(source, "ImagePositionPatient")
        own.PixelValueTransformationSequence = item(source, "RescaleSlope", "RescaleIntercept", "RescaleType")
        exposure.ExposureInmAs = 100.0 + number
        own.CTExposureSequence = [exposure]
        own.add_new((0x0009, 0x0010), "LO", "SECRET VENDOR")
        ds.PerFrameFunctionalGroupsSequence.append(own)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "WindowCenter"):
        del ds[keyword]
    ds.save_as(path)
    return ds


def test_derived_series_keeps_the_study_and_names_its_sources(series, tmp_path):
    folder, _ = series
    source = read_series(folder)
    values = np.random.default_rng(1).uniform(-1024, 3071, source.array.shape).astype(np.float32)
    synthetic = dataclasses.replace(source, array=values)
    paths = write_derived(synthetic, tmp_path / "out", description="SE-ResViT synthetic", energy_kev=70, **BY)

    count = len(values)
    assert [p.name for p in paths] == [f"SYN_{n:04d}.dcm" for n in range(1, count + 1)]
    again = read_series(tmp_path / "out")
    assert np.abs(again.array - values).max() <= 0.5
    np.testing.assert_array_equal(again.affine, source.affine)
    np.testing.assert_array_equal(again.positions_mm, source.positions_mm)
    assert (again.energy_kev, again.frame_of_reference, again.patient) == (70, source.frame_of_reference, "P7")
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "out")))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), again.array)

    originals = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, folder.iterdir())}
    derived = [pydicom.dcmread(path) for path in paths]
    assert len({ds.SOPInstanceUID for ds in derived} - originals.keys()) == count
    for ds in derived:
        origin = ds.SourceImageSequence[0]
        of = originals[origin.ReferencedSOPInstanceUID]
        assert origin.ReferencedSOPClassUID == of.SOPClassUID
        assert origin.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert ds.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "StudyInstanceUID"):
            assert ds[keyword].value == of[keyword].value
        assert ds.SeriesInstanceUID != of.SeriesInstanceUID and ds.SeriesNumber == 1003
        assert ds.ImageType == ["DERIVED", "SECONDARY", "AXIAL"] and "synthetic" in ds.SeriesDescription
        assert ds.DerivationCodeSequence[0].CodeValue == "123110" and __version__ in ds.DerivationDescription
        assert str(ds.PatientName) == str(of.PatientName) == "Hong^Gildong=洪^吉洞=홍^길동"
        assert (ds.WindowCenter, ds.WindowWidth) == (60, 360)
        assert (0x6000, 0x0010) not in ds and (0x0028, 0x0120) not in ds and (0x0009, 0x1001) not in ds
        equipment = ds.ContributingEquipmentSequence[-1]
        assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109100"
        assert equipment.SoftwareVersions == [__version__, BY["checkpoint_sha256"]]
        assert "LossyImageCompression" not in ds


def test_the_same_prediction_gives_the_same_bytes_and_any_other_other_uids(series, tmp_path):
    source = read_series(series[0])

    def written(name, array=source.array, **given):
        given = BY | {"description": "synthetic"} | given
        return write_derived(dataclasses.replace(source, array=array), tmp_path / name, **given)

    first = written("first")
    assert bytes_of(written("again")) == bytes_of(first)
    others = [
        written("other checkpoint", checkpoint_sha256="0" * 64),
        written("other values", source.array + 1),
        written("marked", mark="overlay"),
    ]
    uids = {
        (ds.SeriesInstanceUID, ds.SOPInstanceUID) for paths in (first, *others) for ds in map(pydicom.dcmread, paths)
    }
    assert len(uids) == 4 * len(source.array) == len({instance for _, instance in uids})
    assert len({of_series for of_series, _ in uids}) == 4


@pytest.mark.parametrize("last", [1.0, 1000.0, np.nan])
def test_slices_that_come_one_by_one_give_the_same_bytes(series, tmp_path, last):
    volume = read_series(series[0])
    array = volume.array.copy()
    array[-1] *= last  # a thousand times as many HU do not fit: all that was written before is written again
    volume = dataclasses.replace(volume, array=np.full_like(array, 7e4))

    def arriving():
        for number, plane in enumerate(array):
            volume.array[number] = plane
            yield number

    if np.isnan(last):
        with pytest.raises(DataError, match=f"found {array[-1].size} that are not"):
            write_derived(volume, tmp_path / "out", description="x", arriving=arriving(), **BY)
        assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".writing-*"))
        return
    one_by_one = write_derived(volume, tmp_path / "out", description="x", arriving=arriving(), **BY)
    whole = write_derived(dataclasses.replace(volume, array=array), tmp_path / "whole", description="x", **BY)
    assert bytes_of(one_by_one) == bytes_of(whole) and len(whole) == len(array)
    np.testing.assert_allclose(read_series(tmp_path / "out").array, array, atol=0.5 if last == 1 else 50)


def test_korean_labels_and_lossy_flags_survive(series, tmp_path):
    folder, _ = series
    lossy = {"LossyImageCompressionRatio": 8.5, "LossyImageCompressionMethod": "ISO_15444_1"}
    change(folder, LossyImageCompression="01", **lossy)
    path = write_derived(read_series(folder), tmp_path / "out", description="합성 영상", energy_kev=70, **BY)[0]
    ds = pydicom.dcmread(path)
    assert ds.SeriesDescription == "합성 영상 70 keV"
    assert str(ds.PatientName) == "Hong^Gildong=洪^吉洞=홍^길동"
    assert (ds.LossyImageCompression, ds.LossyImageCompressionRatio) == ("01", 8.5)


@pytest.mark.parametrize(
    ("unit", "low", "high"),
    [("arbitrary", 0, 1.7), ("arbitrary", -3e4, 2e6), ("arbitrary", 5, 5), ("HU", -1e5, 4e5), ("HU", 0, 1e30)],
)
def test_any_range_comes_back_within_half_a_step(series, tmp_path, unit, low, high):
    folder, _ = series
    if unit == "arbitrary":
        change(folder, SOPClassUID=MRImageStorage, Modality="MR", RescaleType=None)
    source = read_series(folder)
    assert source.unit == unit
    values = np.linspace(low, high, source.array.size, dtype=np.float32).reshape(source.array.shape)
    paths = write_derived(dataclasses.replace(source, array=values), tmp_path / "out", description="T2", **BY)
    again = read_series(tmp_path / "out")
    half = 0.5 * float(pydicom.dcmread(paths[0]).RescaleSlope)
    assert again.unit == unit
    assert np.abs(again.array.astype(np.float64) - values).max() <= half + 1e-6 * max(abs(low), abs(high))
    assert half <= max((high - low) / 131000, 0.5 if low == high else 0)


def test_writer_refuses_and_leaves_nothing(series, tmp_path):
    folder, _ = series
    source = read_series(folder)
    broken = source.array.copy()
    broken[1, 2, 3] = np.nan
    wider = np.pad(source.array, ((0, 0), (0, 0), (0, 1)))
    for array, words in ((broken, "found 1"), (source.array[1:], "found 5 for 4"), (wider, "resample")):
        with pytest.raises(DataError, match=words):
            write_derived(dataclasses.replace(source, array=array), tmp_path / "out", description="x", **BY)
        assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="holds the source"):
        write_volume(source, folder, description="x")
    assert len(list(folder.iterdir())) == len(source.array)


def test_the_energy_of_the_target_stands_where_a_multi_energy_source_had_its_own(series, tmp_path):
    folder, _ = series
    plain = write_derived(read_series(folder), tmp_path / "out", description="x", energy_kev=70, **BY)[0]
    assert "MultienergyCTCharacteristicsSequence" not in pydicom.dcmread(plain)
    own, acquisition = Dataset(), Dataset()
    own.MonoenergeticEnergyEquivalent, acquisition.MultienergyAcquisitionDescription = 110.0, "two tubes"
    change(
        folder,
        ImageType=["DERIVED", "PRIMARY", "AXIAL", "VMI"],
        MultienergyCTAcquisition="YES",
        MultienergyCTAcquisitionSequence=[acquisition],
        MultienergyCTCharacteristicsSequence=[own],
    )
    path = write_derived(read_series(folder), tmp_path / "out", description="x", energy_kev=70, **BY)[0]
    ds = pydicom.dcmread(path)
    assert ds.ImageType == ["DERIVED", "SECONDARY", "AXIAL", "VMI"]
    assert ds.MultienergyCTCharacteristicsSequence[0].MonoenergeticEnergyEquivalent == 70
    unknown = write_derived(read_series(folder), tmp_path / "out", description="x", **BY)[0]
    assert "MultienergyCTCharacteristicsSequence" not in pydicom.dcmread(unknown)


def test_the_mark_is_an_overlay_beside_the_pixels_or_burned_into_them(series, tmp_path):
    source = read_series(series[0])
    word, rim = lettering(*source.array.shape[1:])
    assert 0.01 < word.mean() < 0.3 and not (word & rim).any()
    path = write_derived(source, tmp_path / "out", description="x", mark="overlay", **BY)[2]
    np.testing.assert_array_equal(read_series(tmp_path / "out").array, source.array)
    ds = pydicom.dcmread(path)
    np.testing.assert_array_equal(ds.overlay_array(0x6000), word)
    assert "BurnedInAnnotation" not in ds

    path = write_derived(source, tmp_path / "out", description="x", mark="burned", **BY)[2]
    again = read_series(tmp_path / "out").array
    np.testing.assert_array_equal(again[:, ~word & ~rim], source.array[:, ~word & ~rim])
    assert (again[:, word] == source.array.max()).all() and (again[:, rim] == source.array.min()).all()
    assert pydicom.dcmread(path).BurnedInAnnotation == "YES"


@pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="dcm2pnm (Debian dcmtk) is not installed")
def test_dcmtk_shows_the_overlay_over_the_pixels(series, tmp_path):
    source = read_series(series[0])
    shown = {}
    for mark in (None, "overlay"):
        path = write_derived(source, tmp_path / str(mark), description="x", mark=mark, **BY)[0]
        image = subprocess.run(["dcm2pnm", "--set-window", "0", "8000", str(path)], capture_output=True, check=True)
        shown[mark] = np.frombuffer(image.stdout[-source.array[0].size :], np.uint8).reshape(source.array[0].shape)
    word, _ = lettering(*source.array.shape[1:])
    np.testing.assert_array_equal(shown["overlay"] != shown[None], word)


def test_enhanced_objects_come_out_enhanced_with_the_groups_of_each_frame(series, tmp_path):
    (tmp_path / "one").mkdir()
    source_object = enhanced_from(series[0], tmp_path / "one" / "enhanced.dcm")
    source = read_series(tmp_path / "one")
    values = source.array[:, ::-1] * 0.5
    synthetic = dataclasses.replace(source, array=values)
    (path,) = write_derived(synthetic, tmp_path / "out", description="synthetic", energy_kev=70, **BY)
    again, ds = read_series(tmp_path / "out"), pydicom.dcmread(path)
    assert np.abs(again.array - values).max() <= 0.5
    np.testing.assert_allclose(again.affine, source.affine)
    assert (ds.SOPClassUID, ds.NumberOfFrames) == (EnhancedCTImageStorage, len(values))
    assert ds.ImageType == ["DERIVED", "PRIMARY", "VOLUME", "VMI"] and "ConcatenationUID" not in ds
    energy = ds.SharedFunctionalGroupsSequence[0].MultienergyCTCharacteristicsSequence[0]
    assert energy.MonoenergeticEnergyEquivalent == 70
    assert ds.SourceImageEvidenceSequence[0].StudyInstanceUID == source_object.StudyInstanceUID
    pairs = zip(ds.PerFrameFunctionalGroupsSequence, source_object.PerFrameFunctionalGroupsSequence, strict=True)
    for number, (derived, of) in enumerate(pairs, 1):
        assert derived.CTExposureSequence == of.CTExposureSequence and (0x0009, 0x0010) not in derived
        assert derived.PlanePositionSequence == of.PlanePositionSequence
        reference = derived.DerivationImageSequence[0].SourceImageSequence[0]
        assert reference.ReferencedSOPInstanceUID == source_object.SOPInstanceUID
        assert reference.ReferencedFrameNumber == number
        position = derived.FrameContentSequence[0].InStackPositionNumber
        np.testing.assert_allclose(
            derived.PlanePositionSequence[0].ImagePositionPatient, source.headers[position - 1].ImagePositionPatient
        )
    with pytest.raises(DataError, match="--mark burned"):
        write_derived(synthetic, tmp_path / "out", description="x", mark="overlay", **BY)


@validator
def test_validator_finds_no_error_in_a_derived_series(series, tmp_path):
    folder, _ = series
    source = read_series(folder)
    for mark in (None, "overlay", "burned"):
        for path in write_derived(source, tmp_path / "ct", description="SE-ResViT", energy_kev=70, mark=mark, **BY):
            assert errors_of(path) == set()
    # A CT computed from MR slices is a CT object; nothing of the MR acquisition may remain.
    change(folder, SOPClassUID=MRImageStorage, Modality="MR", KVP=None, EchoTime=80, ScanningSequence="SE")
    from_mr = dataclasses.replace(read_series(folder), array=source.array, unit="HU")
    for path in write_derived(from_mr, tmp_path / "mr", description="synthetic CT", **BY):
        assert errors_of(path) == set()
        ds = pydicom.dcmread(path)
        assert (ds.SOPClassUID, ds.Modality) == (CTImageStorage, "CT") and "EchoTime" not in ds
    assert read_series(tmp_path / "mr").unit == "HU"


REAL = {
    "vmi_phantom/IQon/100.dcm": "HU",
    "odd/dicom/ct_gaps_with_rtstruct": "HU",
    "odd/dicom/dicom2nifti_compressed/generic_compressed_jpegls_001": "arbitrary",
    "odd/dicom/dicom2nifti_compressed/philips_enhanced_anatomical_001": "arbitrary",
    "odd/dicom/dicom2nifti_compressed/siemens_multiframe_anatomical_001": "arbitrary",
    "odd/dicom/pydicom_data/eCT_Supplemental.dcm": "arbitrary",
}


@real_data
@validator
@pytest.mark.parametrize("name", REAL)
def test_validator_finds_no_new_error_in_real_series(name, tmp_path):
    source = read_series(DATA / name)
    files = [DATA / name] if name.endswith(".dcm") else sorted((DATA / name).glob("[!r]*.dcm"))
    known = set().union(*(errors_of(file) for file in files))
    paths = write_derived(source, tmp_path / "out", description="SE-ResViT", energy_kev=70, **BY)
    assert set().union(*map(errors_of, paths)) <= known
    first = pydicom.dcmread(paths[0])
    assert first.SOPClassUID == pydicom.dcmread(files[0]).SOPClassUID
    again = read_series(tmp_path / "out")
    step = 1.0 if source.unit == "HU" else (source.array.max() - source.array.min()) / 65000
    assert again.unit == source.unit == REAL[name]
    assert np.abs(again.array - source.array).max() <= step / 2
    np.testing.assert_allclose(again.affine, source.affine, atol=1e-6)


@real_data
@validator
def test_a_ct_computed_from_an_enhanced_mr_is_single_slices(tmp_path):
    source = read_series(COMPRESSED / "philips_enhanced_anatomical_001")
    ct = dataclasses.replace(source, array=source.array - 100, unit="HU")
    paths = write_derived(ct, tmp_path / "out", description="synthetic CT", **BY)
    assert len(paths) == len(source.array)
    frames = {pydicom.dcmread(path).SourceImageSequence[0].ReferencedFrameNumber for path in paths}
    assert frames == set(range(1, len(paths) + 1))
    allowed = ("FrameOfReferenceUID", "Patient's Age", "Value Representations")  # as in the source
    assert all(any(word in line for word in allowed) for path in paths for line in errors_of(path))
