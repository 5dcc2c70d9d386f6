"""Planted faults must be found and named, and every pair must hold the same anatomy in both images."""

import csv
import random
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from seresvit.config import ConfigError
from seresvit.data.audit import audit, write
from seresvit.data.pair import load_pair, matched_slices
from seresvit.data.pairing import Case, content_hash, load_channels, read_manifest, split_patients, write_manifest
from seresvit.data.volume import DataError, Volume

BRATS = Path(__file__).parents[3] / "shared" / "data" / "brats_t1_flair"
IDENTITY = "ID-THAT-MUST-STAY-HIDDEN"


def truth(patient: int, num_slices: int = 5, size: int = 6) -> np.ndarray:
    """Values (Z, Y, X) that no two slices or patients share."""
    return np.arange(num_slices * size * size, dtype=np.int16).reshape(num_slices, size, size) + 200 * patient


def write_nifti(path: Path, array: np.ndarray, spacing_mm: float = 1.0, origin=(0, 0, 0)) -> None:
    affine = np.diag([-spacing_mm, -spacing_mm, 2.0, 1.0])
    affine[:3, 3] = origin
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), affine), path)


def write_dicom(folder: Path, array_hu: np.ndarray, *, patient=IDENTITY, kev=None, skip=(), study="1.2.3") -> None:
    """A CT series, 2 mm between slices, file names in no order of position."""
    folder.mkdir(parents=True, exist_ok=True)
    series = generate_uid()
    for k, plane in enumerate(array_hu):
        if k in skip:
            continue
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series, study, "1.2.4"
        ds.PatientID, ds.PatientName, ds.Modality, ds.InstanceNumber = patient, "Doe^Jane", "CT", k + 1
        ds.SeriesDescription = f"MonoE {kev}keV[HU]" if kev else "CT"
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 2 * k - 40], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness, ds.RescaleSlope, ds.RescaleIntercept = [1, 1], 2, 1, -1024
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *plane.shape, 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 0
        ds.PixelData = (plane + 1024).astype(np.uint16).tobytes()
        ds.save_as(folder / f"{(7 * k) % 11:02d}_{k + 1:03d}.dcm", enforce_file_format=True)


def write_png(folder: Path, array: np.ndarray, numbers) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, plane in zip(numbers, array, strict=True):
        Image.fromarray(plane.astype(np.uint8)).save(folder / f"slice_{number}.png")


@pytest.fixture
def mr(tmp_path) -> Path:
    """Four patients as ROOT/P00n/{T1,T2}.nii.gz, T2 = T1 + 1."""
    for n in range(1, 5):
        write_nifti(tmp_path / "mr" / f"P{n:03d}" / "T1.nii.gz", truth(n))
        write_nifti(tmp_path / "mr" / f"P{n:03d}" / "T2.nii.gz", truth(n) + 1)
    return tmp_path / "mr"


@pytest.fixture
def ct(tmp_path) -> Path:
    """Three patients as ROOT/{110keV,70keV}/P00n/ DICOM, 70 keV = 110 keV + 10 HU."""
    for n in range(1, 4):
        write_dicom(tmp_path / "ct/110keV" / f"P{n:03d}", truth(n), patient=f"{IDENTITY}{n}", kev=110)
        write_dicom(tmp_path / "ct/70keV" / f"P{n:03d}", truth(n) + 10, patient=f"{IDENTITY}{n}", kev=70)
    return tmp_path / "ct"


def one(findings):
    assert len(findings) == 1, findings
    return findings[0]


# Find and match


@pytest.mark.parametrize(
    ("sources", "target", "layout"), [(["T2"], "T2", "auto"), (["T1", "T1"], "T2", "auto"), (["T1"], "T2", "flat")]
)
def test_unusable_options_are_refused(mr, sources, target, layout):
    with pytest.raises(ConfigError):
        audit(mr, sources, target, layout=layout)


def test_a_patient_on_one_side_is_left_out_with_a_warning(mr):
    (mr / "P003" / "T2.nii.gz").unlink()
    result = audit(mr, ["T1"], "T2")
    assert one(result.warnings).file == "P003" and "T2" in result.warnings[0].found
    assert [c.patient for c in result.cases] == ["P001", "P002", "P004"] and not result.faults


def test_no_pair_at_all_is_an_error(tmp_path):
    write_nifti(tmp_path / "T1" / "A.nii.gz", truth(1))
    write_nifti(tmp_path / "T2" / "B.nii.gz", truth(1))
    with pytest.raises(DataError, match=r"no patient with both .*A, B"):
        audit(tmp_path, ["T1"], "T2")


def test_several_sources_make_several_cases_in_one_split(mr):
    for n in (1, 2, 4):
        write_nifti(mr / f"P{n:03d}" / "PD.nii.gz", truth(n) + 5)
    result = audit(mr, ["T1", "PD"], "T2")
    with_pd = [f"{p}_{source}" for p in ("P001", "P002", "P003", "P004") for source in ("T1", "PD")]
    assert [c.name for c in result.cases] == [name for name in with_pd if name != "P003_PD"]
    assert len({(c.patient, c.split) for c in result.cases}) == 4
    assert one(result.warnings).file == "P003" and "PD" in result.warnings[0].found


# Masks


def test_a_mask_is_taken_by_its_usual_name_and_keeps_its_labels(ct):
    labels = np.random.default_rng(0).integers(0, 3, (5, 6, 6)).astype(np.uint8)
    for n in range(1, 4):
        # The same place as the DICOM in nibabel's RAS: first slice at -40 mm, 2 mm apart.
        write_nifti(ct / "labels" / f"P{n:03d}.nii.gz", labels, origin=(0, 0, -40))
    (ct / "labels" / "labels.json").write_text('{"heart": 1, "lung": 2}')
    result = audit(ct, ["110keV"], "70keV")
    assert not result.faults and result.settings["mask"] == "labels"
    pair = load_pair(result.cases[0])
    assert pair.label_names == {"heart": 1, "lung": 2} and pair.labels.dtype == np.uint8
    np.testing.assert_array_equal(pair.labels, labels)

    (ct / "labels" / "labels.json").unlink()
    pair = load_pair(result.cases[0])
    assert pair.label_names == {"mask": 1}
    np.testing.assert_array_equal(pair.labels, labels > 0)

    (ct / "labels" / "labels.json").write_text('{"heart": "one"}')
    with pytest.raises(DataError, match=r"labels\.json"):
        load_pair(result.cases[0])


@pytest.mark.parametrize("plant", [{"size": 8}, {"num_slices": 4}], ids=["another size", "a slice too few"])
def test_a_mask_on_another_grid_is_a_fault(mr, plant):
    for n in range(1, 4):
        write_nifti(mr / f"P{n:03d}" / "ROI.nii.gz", (truth(0, **(plant if n == 2 else {})) > 7).astype(np.uint8))
    result = audit(mr, ["T1"], "T2", mask="ROI")
    assert one(result.faults).file == "P002/ROI.nii.gz"
    assert one(result.warnings).file == "P004"
    with pytest.raises(DataError, match=r"ROI\.nii\.gz"):
        load_pair(result.cases[1])


def test_a_mask_that_is_nowhere_is_an_error(mr):
    with pytest.raises(DataError, match="GTV"):
        audit(mr, ["T1"], "T2", mask="GTV")


# Slices


def test_a_missing_slice_leaves_every_other_pair_right(ct):
    for path in (ct / "110keV" / "P002").glob("*_003.dcm"):
        path.unlink()
    for path in (ct / "70keV" / "P002").glob("*_001.dcm"):
        path.unlink()
    result = audit(ct, ["110keV"], "70keV")
    assert not result.faults
    # Names of the slices that were left without a partner, in the images that still have them.
    assert {(w.file, w.found.split()[0]) for w in result.warnings} == {
        ("110keV/P002", "00_001.dcm"),
        ("70keV/P002", "03_003.dcm"),
    }
    assert any("-36.00 mm" in w.found for w in result.warnings)
    assert result.geometry[1]["num_slices"] == 3 and len(result.geometry[1]["dropped"]) == 2
    pair = load_pair(result.cases[1])
    np.testing.assert_array_equal(pair.source.array, truth(2)[[1, 3, 4]])
    np.testing.assert_array_equal(pair.target.array, truth(2)[[1, 3, 4]] + 10)
    for volume in (pair.source, pair.target):
        np.testing.assert_allclose(volume.positions_mm, [-38, -34, -32])
        assert [float(h.ImagePositionPatient[2]) for h in volume.headers] == [-38, -34, -32]
        np.testing.assert_allclose(volume.affine[:3, 3], [0, 0, -38])
        np.testing.assert_allclose(volume.affine[:3, 2], [0, 0, 4])
    assert sorted(pair.dropped) == sorted(result.geometry[1]["dropped"])


def test_labels_follow_the_matched_slices(tmp_path):
    write_nifti(tmp_path / "P1" / "T1.nii.gz", truth(1)[1:], origin=(0, 0, 2))
    write_nifti(tmp_path / "P1" / "T2.nii.gz", truth(1)[:4])
    write_nifti(
        tmp_path / "P1" / "mask.nii.gz", (np.arange(5)[:, None, None] * np.ones((5, 6, 6)) % 2).astype(np.uint8)
    )
    result = audit(tmp_path, ["T1"], "T2")
    assert not result.faults and len(result.warnings) == 2
    pair = load_pair(result.cases[0])
    np.testing.assert_array_equal(pair.source.array, truth(1)[1:4])
    np.testing.assert_array_equal(pair.target.array, truth(1)[1:4])
    np.testing.assert_array_equal(pair.labels[:, 0, 0], [1, 0, 1])


def test_png_slices_are_matched_by_number_not_by_order(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (4, 8, 8))
    write_png(tmp_path / "MRI" / "20", array[[0, 1, 3]], [8, 9, 11])
    write_png(tmp_path / "CT" / "20", array, [8, 9, 10, 11])
    result = audit(tmp_path, ["MRI"], "CT")
    warning = one(result.warnings)
    assert warning.file == "CT/20" and "slice_10.png" in warning.found
    pair = load_pair(result.cases[0])
    np.testing.assert_array_equal(pair.source.array, pair.target.array)
    np.testing.assert_array_equal(pair.target.array, array[[0, 1, 3]])
    assert pair.target.headers == ("slice_8.png", "slice_9.png", "slice_11.png")


def test_channels_share_the_slices_that_all_have(mr):
    write_nifti(mr / "P001" / "PD.nii.gz", truth(1)[:4] + 5)
    write_nifti(mr / "P001" / "T1.nii.gz", truth(1)[1:], origin=(0, 0, 2))
    cases = [case for case in audit(mr, ["T1", "PD"], "T2").cases if case.patient == "P001"]
    (group,) = load_channels(cases, ("PD", "T1"))
    pair = load_pair(*group)
    assert [case.source for case in group] == ["PD", "T1"] and len(pair.sources) == 2
    np.testing.assert_array_equal(pair.sources[0].array, truth(1)[1:4] + 5)
    np.testing.assert_array_equal(pair.sources[1].array, truth(1)[1:4])
    np.testing.assert_array_equal(pair.target.array, truth(1)[1:4] + 1)


def test_a_patient_without_a_channel_is_refused(mr):
    write_nifti(mr / "P001" / "PD.nii.gz", truth(1))
    cases = audit(mr, ["T1", "PD"], "T2").cases
    assert load_channels(cases, ()) == [(case,) for case in cases]
    with pytest.raises(DataError, match=r"P002.*PD"):
        load_channels(cases, ("T1", "PD"))


def test_load_pair_checks_a_manifest_that_no_audit_wrote(mr):
    case = audit(mr, ["T1"], "T2").cases[1]
    write_nifti(case.source_path, truth(2), spacing_mm=2)
    with pytest.raises(DataError, match=r"T1\.nii\.gz.*pixel spacing"):
        load_pair(case)
    write_nifti(case.source_path, truth(2), origin=(0, 0, 999))
    with pytest.raises(DataError, match=r"T1\.nii\.gz.*no slice"):
        load_pair(case)


def at(positions_mm) -> Volume:
    positions = np.asarray(positions_mm, dtype=float)
    return Volume(np.zeros((len(positions), 2, 2)), np.eye(4), positions, "HU", Path("x"), "nifti")


def test_matched_slices_go_by_position_within_a_hundredth_of_a_millimetre():
    a, b = matched_slices(at([0, 2.5, 5, 10]), at([2.5049, 5.02, 9.9951, 12]))
    assert (a.tolist(), b.tolist()) == ([1, 3], [0, 2])
    assert not len(matched_slices(at([0]), at([1]))[0])


@given(st.sets(st.integers(0, 60), min_size=1), st.sets(st.integers(0, 60), min_size=1), st.floats(0.5, 5))
def test_matched_slices_are_exactly_the_shared_positions(a, b, gap_mm):
    in_a, in_b = matched_slices(at(np.array(sorted(a)) * gap_mm), at(np.array(sorted(b)) * gap_mm))
    assert [sorted(a)[k] for k in in_a] == [sorted(b)[k] for k in in_b] == sorted(a & b)


# Splits


@given(
    st.sets(st.text("abcXYZ019", min_size=1, max_size=4), min_size=1, max_size=40),
    st.integers(0, 5),
    st.tuples(st.floats(0, 0.98), st.floats(0, 0.98)).filter(lambda shares: sum(shares) < 1),
)
def test_a_drawn_split_is_complete_and_does_not_depend_on_order(patients, seed, shares):
    val_share, test_share = shares
    splits = split_patients(patients, (), (), val_share, test_share, seed)
    assert set(splits) == patients and set(splits.values()) <= {"train", "val", "test"}
    shuffled = random.sample(sorted(patients), len(patients))
    assert split_patients(shuffled, (), (), val_share, test_share, seed) == splits
    assert "train" in splits.values()
    if len(patients) >= 3:
        assert ("val" in splits.values()) == (val_share > 0) and ("test" in splits.values()) == (test_share > 0)


def test_the_draw_follows_its_shares_and_seed():
    patients = [f"P{n:03d}" for n in range(100)]
    splits = [split_patients(patients, (), (), 0.15, 0.2, seed) for seed in range(3)]
    for split in splits:
        assert sorted(split.values()) == ["test"] * 20 + ["train"] * 65 + ["val"] * 15
    assert splits[0] != splits[1] != splits[2]


def test_named_patients_go_where_they_are_named(mr):
    result = audit(mr, ["T1"], "T2", val=["P004"], test=["P002"], exclude=["P001"])
    assert {c.patient: c.split for c in result.cases} == {"P002": "test", "P003": "train", "P004": "val"}
    with pytest.raises(ConfigError, match=r"P0004.*P004"):
        audit(mr, ["T1"], "T2", val=["P0004"])
    with pytest.raises(ConfigError, match="P001"):
        audit(mr, ["T1"], "T2", val=["P001"], test=["P001"])
    with pytest.raises(ConfigError, match="P00"):
        audit(mr, ["T1"], "T2", exclude=["P00"])
    with pytest.raises(ConfigError, match="share"):
        audit(mr, ["T1"], "T2", val_share=0.5, test_share=0.5)


# The manifest


def test_the_manifest_reads_back_as_it_was_written_and_moves_with_its_data(mr, tmp_path):
    result = audit(mr, ["T1"], "T2")
    assert write(result, mr.parent / "manifest.csv")
    assert read_manifest(mr.parent / "manifest.csv") == result.cases
    rows = list(csv.DictReader((mr.parent / "manifest.csv").open()))
    assert ",".join(rows[0]) == "patient,split,source,target,source_path,target_path,mask_path"
    assert rows[0]["source_path"] == "mr/P001/T1.nii.gz" and rows[0]["mask_path"] == ""
    assert not list(mr.parent.glob(".writing*"))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    mr.rename(moved / "mr")
    (mr.parent / "manifest.csv").rename(moved / "manifest.csv")
    assert [c.source_path.parents[2] for c in read_manifest(moved / "manifest.csv")] == [moved] * 4


def test_patient_names_stay_text(mr, tmp_path):
    for old, new in (("P001", "007"), ("P002", "NA"), ("P003", "1e5")):
        (mr / old).rename(mr / new)
    assert write(audit(mr, ["T1"], "T2"), tmp_path / "manifest.csv")
    assert {c.patient for c in read_manifest(tmp_path / "manifest.csv")} == {"007", "NA", "1e5", "P004"}


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda text: "", "CSV"),
        (lambda text: text.splitlines()[0], "line 2"),
        (lambda text: text.replace("split,", "fold,", 1), "line 1.*split"),
        (lambda text: text.replace("P002/T1", "P002/T9"), "line 3.*T9.*does not exist"),
        (lambda text: text.replace("P003,", "P003,,", 1), "line 4"),
        (lambda text: text.replace("P001,", "P001,,", 1), "CSV"),
        (lambda text: text.replace("\n", ",\n").replace("path,", "path", 1), "CSV"),
        (lambda text: text.replace("P002,train", "P002,training"), "line 3.*training"),
        (lambda text: text + text.splitlines()[1].replace("train", "test") + "\n", "line 6.*P001.*test.*train"),
        (lambda text: text + text.splitlines()[1] + "\n", "line 6.*P001_T1.*twice"),
        (lambda text: text.replace("\nP004", "\n../P004"), "line 5.*cannot name"),
        (lambda text: text.replace("\nP002", "\n\nP002"), "line 3.*empty"),
        (lambda text: text.replace("train,T1,T2", "train,T2,T2", 1), "line 2.*both called 'T2'"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused_with_its_line(mr, edit, expected):
    path = mr.parent / "manifest.csv"
    write_manifest([replace(case, split="train") for case in audit(mr, ["T1"], "T2").cases], path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(DataError, match=rf"manifest\.csv: .*{expected}") as refused:
        read_manifest(path)
    assert "\n" not in str(refused.value)


def test_a_manifest_that_a_spreadsheet_saved_is_read(mr):
    path = mr.parent / "manifest.csv"
    cases = audit(mr, ["T1"], "T2").cases
    write_manifest(cases, path)
    # A byte order mark, and a nameless empty column at the end.
    path.write_text(path.read_text().replace("\n", ",\n"), encoding="utf-8-sig")
    assert read_manifest(path) == cases


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"absent\.csv.*seresvit audit"):
        read_manifest(tmp_path / "absent.csv")


def test_the_content_hash_follows_bytes_and_splits_only(mr, tmp_path):
    cases = audit(mr, ["T1"], "T2").cases
    known = content_hash(cases)
    (mr / "P002" / ".DS_Store").write_text("x")
    assert content_hash(cases[::-1]) == known
    moved = tmp_path / "copy"
    mr.rename(moved)
    there = audit(moved, ["T1"], "T2").cases
    assert content_hash(there) == known
    assert content_hash([replace(there[0], split="none"), *there[1:]]) != known
    write_nifti(moved / "P002" / "T1.nii.gz", truth(2) + (truth(2) == 405))
    assert content_hash(there) != known


def test_the_content_hash_of_a_series_needs_every_file(ct):
    case = Case("P001", "train", "110keV", "70keV", ct / "110keV" / "P001", ct / "70keV" / "P001")
    known = content_hash([case])
    next((ct / "70keV" / "P001").glob("*.dcm")).unlink()
    assert content_hash([case]) != known
    with pytest.raises(DataError, match="absent"):
        content_hash([replace(case, source_path=ct / "absent")])


# Real volumes


@pytest.mark.skipif(not BRATS.is_dir(), reason="needs the BraTS volumes beside the checkout")
def test_real_mr_with_masks(tmp_path):
    folders = sorted(path.name for path in BRATS.iterdir() if path.is_dir())
    test = [name for name in folders if name.startswith(("case_8", "case_9"))]
    result = audit(BRATS, ["T1"], "FLAIR", mask="GT_W", test=test)
    assert not result.faults and result.settings["layout"] == "patient/modality"
    splits = {case.patient: case.split for case in result.cases}
    assert list(splits) == folders and [p for p, split in splits.items() if split == "test"] == test
    assert sorted(splits.values()).count("val") == 2
    assert result.geometry[0]["size_zyx"] == [155, 240, 240] and result.geometry[0]["num_slices"] == 155
    assert write(result, tmp_path / "manifest.csv")
    case = next(c for c in read_manifest(tmp_path / "manifest.csv") if c.split == "test")
    pair = load_pair(case)
    tumour = nib.load(BRATS / test[0] / "GT_W.nii.gz").get_fdata() > 0
    flair = nib.load(BRATS / test[0] / "FLAIR.nii.gz").get_fdata()
    assert pair.labels.sum() == tumour.sum() and pair.dropped == []
    assert pair.target.array[pair.labels > 0].mean() == pytest.approx(flair[tumour].mean(), rel=1e-5)
