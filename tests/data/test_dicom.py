"""DICOM in, against SimpleITK's readers, pydicom and damaged real files."""

import logging
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    RTStructureSetStorage,
)

from seresvit.data import dicom, read_volume, write_volume
from seresvit.data.dicom import read_series
from seresvit.data.volume import DataError

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
ODD = DATA / "odd"
real_data = pytest.mark.skipif(not ODD.is_dir(), reason="the collection of real and damaged files is not here")

DEPTH, HEIGHT, WIDTH = 5, 24, 40  # of the fixture `series` in conftest.py


def change(folder, name="a.dcm", to=None, **attributes):
    """Rewrites a slice, or writes a copy of it, with these attributes; None removes one."""
    ds = pydicom.dcmread(folder / name)
    for keyword, value in attributes.items():
        if value is None:
            ds.pop(keyword, None)
        else:
            setattr(ds, keyword, value)
    ds.save_as(folder / (to or name))


def refusal(path, reader=read_series):
    with pytest.raises(DataError) as caught:
        reader(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def test_series_is_what_simpleitk_reads(series):
    folder, stored = series
    (folder / "notes.txt").write_text("not DICOM")
    volume = read_series(folder)

    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names)
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image))
    np.testing.assert_array_equal(volume.array, stored.astype(np.float32) - 1024)
    for index in ((0, 0, 0), (7, 3, 2), (WIDTH - 1, HEIGHT - 1, DEPTH - 1)):
        expected = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((volume.affine @ [*index, 1])[:3], expected, atol=1e-4)
    np.testing.assert_allclose(volume.spacing_mm_zyx, (2.5, 0.7, 0.9), atol=1e-6)
    np.testing.assert_allclose(np.diff(volume.positions_mm), 2.5, atol=1e-6)
    assert (volume.unit, volume.modality, volume.patient, volume.energy_kev) == ("HU", "CT", "P7", 110)
    assert len(volume.headers) == DEPTH and "PixelData" not in volume.headers[0]
    assert read_volume(folder).array.shape == (DEPTH, HEIGHT, WIDTH)


def test_unequal_gaps_and_one_slice(series):
    folder, _ = series
    by_position = sorted(folder.iterdir(), key=lambda p: -pydicom.dcmread(p).InstanceNumber)
    by_position[2].unlink()
    np.testing.assert_allclose(np.diff(read_series(folder).positions_mm), [2.5, 5, 2.5], atol=1e-6)

    one = by_position[0]
    assert read_series(one).spacing_mm_zyx[0] == pytest.approx(3)
    change(folder, one.name, SpacingBetweenSlices=4)
    assert read_series(one).spacing_mm_zyx[0] == pytest.approx(4)
    change(folder, one.name, SpacingBetweenSlices=None, SliceThickness=None)
    assert read_series(one).spacing_mm_zyx[0] == pytest.approx(1)


def test_values_follow_the_modality_lut_and_the_sign(series):
    folder, _ = series
    stored = np.arange(-480, 480, dtype=np.int16).reshape(HEIGHT, WIDTH)
    change(folder, PixelData=stored.tobytes(), PixelRepresentation=1, BitsStored=16, HighBit=15, RescaleSlope=2.5)
    np.testing.assert_array_equal(read_series(folder / "a.dcm").array[0], stored * 2.5 - 1024)
    change(folder, RescaleType="MGML")
    assert read_series(folder / "a.dcm").unit == "arbitrary"


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_every_encoding_holds_the_same_values(series, syntax):
    folder, stored = series
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        if syntax == ExplicitVRBigEndian:
            ds.PixelData = ds.pixel_array.astype(">u2").tobytes()
        if syntax == RLELossless:
            ds.compress(syntax)
        ds.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(path, ds, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    np.testing.assert_array_equal(read_series(folder).array, stored.astype(np.float32) - 1024)


@pytest.mark.parametrize(
    ("text", "energy"),
    [
        ("MonoE 100keV[HU] 100keV", 100),
        ("Mono+ 50keV", 50),
        ("VMI 70 keV Abd", 70),
        ("Mono 40keV-190keV", None),
        ("Abdomen 3.0 B30f", None),
    ],
)
def test_energy_is_read_from_labels(series, text, energy):
    folder, _ = series
    change(folder, SeriesDescription=text)
    assert read_series(folder / "a.dcm").energy_kev == energy
    change(folder, SeriesDescription="Spectral", ImageComments=text)
    assert read_series(folder / "a.dcm").energy_kev == energy


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"SeriesInstanceUID": "1.2.3", "SeriesDescription": "Scout"}, ("one series", "a.dcm (Scout)", "b.dcm (VMI")),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, ("ImageOrientationPatient", "localizers")),
        ({"PatientID": "P77"}, ("PatientID", "same in all slices", "a.dcm")),
        ({"StudyInstanceUID": "1.2.3"}, ("StudyInstanceUID", "same in all slices")),
        ({"PixelSpacing": [0.7, 0.7]}, ("PixelSpacing", "same in all slices")),
        ({"Rows": WIDTH, "Columns": HEIGHT}, ("Rows", "same in all slices")),
        ({"FrameOfReferenceUID": "1.2.3"}, ("FrameOfReferenceUID",)),
        ({"ImagePositionPatient": [10, -20, 30]}, ("two slices at one position", "e.dcm")),
        ({"ImagePositionPatient": None}, ("ImagePositionPatient", "a.dcm", "none")),
        ({"ImagePositionPatient": [0, 0, 50]}, ("straight line",)),
        ({"PhotometricInterpretation": "RGB"}, ("MONOCHROME", "RGB")),
        ({"PixelData": b"\0" * 100}, ("a.dcm", "need 1920 bytes")),
        ({"PixelData": None}, ("a.dcm",)),
        ({"RescaleSlope": "1e39"}, ("finite",)),
    ],
)
def test_refused_in_one_line(series, attributes, words):
    folder, _ = series
    change(folder, **attributes)
    message = refusal(folder)
    assert all(word in message for word in words), message
    assert "Gildong" not in message and "P7" not in message


def test_refuses_what_holds_no_series(series, tmp_path):
    folder, _ = series
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no DICOM image" in refusal(empty)
    assert "no such file" in refusal(tmp_path / "absent", read_volume)
    (folder / "f.dcm").write_bytes(b"")
    assert "f.dcm" in refusal(folder)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_truncated_slice_never_vanishes(series, share):
    folder, _ = series
    raw = (folder / "a.dcm").read_bytes()
    (folder / "a.dcm").write_bytes(raw[: int(len(raw) * share)])
    assert "a.dcm" in refusal(folder)


def test_a_slice_cut_anywhere_in_its_header_is_refused(series):
    folder, _ = series
    raw = (folder / "a.dcm").read_bytes()
    for length in range(0, raw.index(b"OW"), 9):
        (folder / "a.dcm").write_bytes(raw[:length])
        assert "a.dcm" in refusal(folder / "a.dcm"), length
        assert "no DICOM image" not in refusal(folder / "a.dcm"), length


@real_data
@pytest.mark.parametrize("energy", [50, 100, 150])
def test_energies_of_a_real_spectral_ct(energy):
    assert read_series(DATA / "vmi_phantom" / "IQon" / f"{energy}.dcm").energy_kev == energy


@real_data
def test_real_gaps_and_a_tilted_gantry():
    gaps = read_series(ODD / "dicom" / "ct_gaps_with_rtstruct")
    np.testing.assert_allclose(np.diff(gaps.positions_mm), [5, 2.5, 2.5, 2.5, 2.5, 10, 7.5], atol=1e-3)
    tilted = read_series(ODD / "dicom" / "dicom2nifti_failing" / "gantrytilting")
    np.testing.assert_allclose(tilted.affine[:3, 2], [0, 0, 5], atol=1e-6)
    np.testing.assert_allclose(np.diff(tilted.positions_mm), 5 * 0.9702957, atol=1e-5)


@real_data
@pytest.mark.parametrize("name", ["philips_enhanced_anatomical_001", "siemens_multiframe_anatomical_001"])
def test_enhanced_multi_frame_is_what_simpleitk_reads(name):
    file = next((ODD / "dicom" / "dicom2nifti_compressed" / name).glob("*.dcm"))
    volume, image, ds = read_series(file), sitk.ReadImage(str(file)), pydicom.dcmread(file)
    groups = ds.PerFrameFunctionalGroupsSequence
    positions = np.array([g.PlanePositionSequence[0].ImagePositionPatient for g in groups], dtype=float)
    order = np.argsort(positions @ np.cross(volume.affine[:3, 0], volume.affine[:3, 1]))
    for z, frame in enumerate(order):
        rescale = groups[frame].get("PixelValueTransformationSequence")
        slope = float(rescale[0].RescaleSlope) if rescale else 1.0
        np.testing.assert_allclose(volume.array[z], ds.pixel_array[frame] * slope, rtol=1e-6)
        np.testing.assert_allclose(volume.headers[z].ImagePositionPatient, positions[frame])
    np.testing.assert_allclose(volume.spacing_mm_zyx[1:], image.GetSpacing()[1::-1], atol=1e-5)


def test_compressed_pixels_may_not_claim_more_than_a_thousandfold(series):
    folder, _ = series
    ds = pydicom.dcmread(folder / "a.dcm")
    ds.compress(RLELossless)
    ds.Rows = ds.Columns = 46341
    ds.save_as(folder / "a.dcm")
    assert "46341" in refusal(folder / "a.dcm")


# ------------------------------------------------------------------------------------------------ what lies beside


def test_headers_alone_tell_all_but_the_values(series):
    folder, _ = series
    whole, header = read_volume(folder), read_volume(folder, pixels=False)
    assert header.array.shape == whole.array.shape and not any(header.array.strides)
    np.testing.assert_array_equal(header.affine, whole.affine)
    np.testing.assert_array_equal(header.positions_mm, whole.positions_mm)
    assert (header.unit, header.energy_kev, header.patient) == (whole.unit, whole.energy_kev, whole.patient)


def test_what_is_no_image_is_set_aside_by_name(series):
    folder, _ = series
    (folder / "notes.txt").write_text("not DICOM")
    change(folder, "a.dcm", "scout.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesInstanceUID="1.2.3")
    change(folder, "a.dcm", "scout2.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], Rows=WIDTH, Columns=HEIGHT)
    for name, modality, sop_class in (("RS", "RTSTRUCT", RTStructureSetStorage), ("SR", "SR", BasicTextSRStorage)):
        ds = pydicom.dcmread(folder / "a.dcm")
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class
        ds.Modality = modality
        del ds.Rows, ds.Columns, ds.PixelData
        ds.save_as(folder / f"{name}.dcm")
    volume = read_series(folder)
    assert len(volume.array) == DEPTH
    assert sorted(volume.set_aside) == [
        "RS.dcm: RTSTRUCT",
        "SR.dcm: SR",
        "notes.txt: not DICOM",
        "scout.dcm: LOCALIZER",
        "scout2.dcm: LOCALIZER",
    ]
    assert read_series(folder / "scout.dcm").set_aside == ()
    # Beside two series a localizer settles nothing.
    change(folder, "a.dcm", "other.dcm", SeriesInstanceUID="1.2.4")
    assert "one series" in refusal(folder) and "scout" not in refusal(folder)


# ------------------------------------------------------------------------------------------------ MONOCHROME1, keV


@pytest.mark.parametrize("signed", [False, True])
def test_monochrome1_keeps_hu_and_turns_the_rest(series, tmp_path, signed):
    folder, _ = series
    stored = np.random.default_rng(1).integers(0, 4096, (HEIGHT, WIDTH), dtype=np.int16) - 2048 * signed
    for path in sorted(folder.glob("[b-e].dcm")):
        path.unlink()
    pixels = {"PixelData": stored.tobytes(), "PixelRepresentation": int(signed)}
    change(folder, PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, **pixels)
    np.testing.assert_array_equal(read_series(folder).array[0], stored * 2.0 - 1024)

    change(folder, Modality="MR", SOPClassUID=MRImageStorage, RescaleType=None, RescaleIntercept=0)
    mr = read_series(folder)
    np.testing.assert_array_equal(mr.array[0], ((-1 if signed else 4095) - stored) * 2.0)
    write_volume(mr, tmp_path / "out", description="x")
    assert np.abs(read_volume(tmp_path / "out").array - mr.array).max() <= 0.1


def test_the_energy_of_the_standard_comes_first(series):
    folder, _ = series
    item = pydicom.Dataset()
    item.MonoenergeticEnergyEquivalent = 66.5
    change(folder, SeriesDescription="VMI 110 keV", MultienergyCTCharacteristicsSequence=[item])
    assert read_series(folder / "a.dcm").energy_kev == 66.5
    change(folder, MultienergyCTCharacteristicsSequence=[pydicom.Dataset()])
    assert read_series(folder / "a.dcm").energy_kev == 110
    change(folder, SeriesDescription="Spectral", ImageType=["DERIVED", "SECONDARY", "AXIAL", "MONO_55_KEV"])
    assert read_series(folder / "a.dcm").energy_kev == 55


# ------------------------------------------------------------------------------------------------ a zip


def zipped(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_zip_holds_what_the_folder_holds(series, tmp_path):
    folder, _ = series
    files = {f"../PATIENT/IMG/{path.name}": path.read_bytes() for path in folder.iterdir()}
    study = zipped(tmp_path / "study.zip", files | {"DICOM/README": b"viewer", "__MACOSX/._a.dcm": b"\0"})
    volume, unpacked = read_volume(study), read_volume(folder)
    np.testing.assert_array_equal(volume.array, unpacked.array)
    np.testing.assert_array_equal(volume.affine, unpacked.affine)
    assert volume.set_aside == ("README: not DICOM",) and volume.path == study
    assert {p.name for p in tmp_path.iterdir()} == {"study.zip", "source"}
    assert read_volume(study, pixels=False).array.shape == volume.array.shape
    write_volume(volume, tmp_path / "out", description="x")
    np.testing.assert_array_equal(read_volume(tmp_path / "out").array, volume.array)


def test_a_zip_that_is_none_or_a_bomb_is_refused(series, tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "SMALL", 2**20)
    folder, _ = series
    content = {"a.dcm": (folder / "a.dcm").read_bytes()}
    bomb = zipped(tmp_path / "bomb.zip", {"zeros.dcm": bytes(2**20 + 1)})
    assert "claim to unpack" in refusal(bomb)
    # A claim that is too small: no more than that is unpacked, and the checksum is wrong.
    false = bytearray(zipped(tmp_path / "false.zip", content).read_bytes())
    at = false.index(b"PK\x01\x02")
    false[at + 24 : at + 28] = (500).to_bytes(4, "little")
    (tmp_path / "false.zip").write_bytes(false)
    assert "a.dcm" in refusal(tmp_path / "false.zip")
    encrypted = bytearray(zipped(tmp_path / "locked.zip", content).read_bytes())
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(encrypted)
    assert "encrypted" in refusal(tmp_path / "locked.zip")
    assert "not deflated" in refusal(zipped(tmp_path / "lzma.zip", content, zipfile.ZIP_LZMA))
    (tmp_path / "no.zip").write_bytes(b"PK")
    assert "no.zip" in refusal(tmp_path / "no.zip")
    assert "no DICOM image" in refusal(zipped(tmp_path / "empty.zip", {}))
    cut = zipped(tmp_path / "cut.zip", {"a.dcm": content["a.dcm"][:-400]})
    assert "a.dcm" in refusal(cut)


def test_a_deflated_dataset_may_not_inflate_without_bound(series, monkeypatch):
    monkeypatch.setattr(dicom, "SMALL", 2**20)
    folder, _ = series
    ds = pydicom.dcmread(folder / "a.dcm")
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(folder / "a.dcm")
    assert len(read_series(folder).array) == DEPTH
    ds.PixelData = bytes(2**23)
    ds.save_as(folder / "a.dcm")
    assert (folder / "a.dcm").stat().st_size < 2**14
    assert "inflates" in refusal(folder)


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("syntax", ["native", "deflated", "rle"])
def test_damaged_anywhere_a_slice_is_read_or_refused(series, damaged, syntax):
    folder, _ = series
    ds = pydicom.dcmread(folder / "a.dcm")
    if syntax == "rle":
        ds.compress(RLELossless)
    elif syntax == "deflated":
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(folder / "a.dcm")
    refused = 0
    for raw in damaged((folder / "a.dcm").read_bytes(), count=80, header_bytes=1400):
        (folder / "a.dcm").write_bytes(raw)
        try:
            assert np.isfinite(read_series(folder / "a.dcm").array).all()
        except DataError as error:
            refused += 1
            assert "\n" not in str(error) and "a.dcm" in str(error)
    assert refused > 10


def test_a_slice_in_another_unit_and_a_link_to_nowhere_are_refused_and_one_frame_is_a_slice(series):
    folder, stored = series
    first, second, third, *_ = sorted(folder.iterdir())
    slice_ = pydicom.dcmread(first)
    slice_.NumberOfFrames = 1
    slice_.save_as(first)
    assert len(read_series(folder).array) == len(stored)
    slice_ = pydicom.dcmread(second)
    slice_.RescaleType = "US"
    slice_.save_as(second)
    with pytest.raises(DataError, match=rf"{second.name}: RescaleType must be the same"):
        read_series(folder)
    third.unlink()
    third.symlink_to(folder / "elsewhere")
    with pytest.raises(DataError, match=rf"{third.name}: a link to a file that is not there"):
        read_series(folder)


def test_pydicom_stays_tolerant_until_the_last_thread_leaves():
    """As when one thread writes while another reads: else an odd header ends the batch, or is logged with its name."""
    settings, logger = pydicom.config.settings, logging.getLogger("pydicom")
    before = settings.reading_validation_mode, settings.writing_validation_mode, logger.level
    reading, writing = dicom.tolerant(), dicom.tolerant()
    reading.__enter__()
    writing.__enter__()
    reading.__exit__(None, None, None)
    assert (settings.writing_validation_mode, logger.level) == (pydicom.config.IGNORE, logging.CRITICAL)
    writing.__exit__(None, None, None)
    assert (settings.reading_validation_mode, settings.writing_validation_mode, logger.level) == before
