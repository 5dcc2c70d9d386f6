"""Small images whose errors are known by hand, written by pydicom, nibabel and Pillow, evaluated from disk."""

import csv
import io
import json
import shutil

import nibabel
import numpy as np
import openpyxl
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from rich.console import Console
from scipy.stats import wilcoxon

from seresvit.config import ConfigError
from seresvit.data.volume import DataError
from seresvit.evaluation.evaluate import evaluate
from seresvit.evaluation.metrics import score
from seresvit.evaluation.page import read_table
from seresvit.evaluation.report import write_report
from seresvit.evaluation.tables import METHODS, render_table, sentences

FRAME = generate_uid()


def write_dicom(folder, array_hu, names=None):
    folder.mkdir(parents=True)
    study, series = generate_uid(), generate_uid()
    for z, plane in enumerate(array_hu):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = pydicom.Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.PatientID, ds.PatientName, ds.Modality, ds.InstanceNumber = folder.name, "A^B", "CT", z + 1
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, FRAME
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 2.5 * z], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [1, 1], 2.5
        ds.Rows, ds.Columns = plane.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleIntercept, ds.RescaleSlope = -1024, 1
        ds.PixelData = (plane + 1024).astype("<u2").tobytes()
        name = (names or [f"{z}" for z in range(len(array_hu))])[z]
        ds.save_as(folder / f"{name}.dcm", enforce_file_format=True)
    return folder


def write_nifti(path, array_zyx):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array_zyx.transpose(2, 1, 0).astype(np.float32), np.diag([-1, -1, 1, 1])), path)
    return path


def write_png(folder, array):
    folder.mkdir(parents=True)
    for z, plane in enumerate(array):
        Image.fromarray(plane.astype(np.uint8)).save(folder / f"{z + 1:03}.png")
    return folder


def write_prediction(folder, patient, source, path=".", **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prediction.json").write_text(json.dumps({"patient": patient, "source": source, "path": path, **more}))


def write_manifest(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "split", "source", "target", "source_path", "target_path", "mask_path"])
        writer.writerows(rows)
    return path


def row(frame, **where):
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


@pytest.fixture
def dect(tmp_path):
    """P1 and P2 (test) and their predictions; the error of slice z of P1 is 10 (z + 1), of the source always 30."""
    rng = np.random.default_rng(0)
    rows = []
    for patient, factor in (("P1", 1), ("P2", 3)):
        target = rng.integers(-900, 1500, (2, 16, 16))
        write_dicom(tmp_path / "70keV" / patient, target)
        write_dicom(tmp_path / "110keV" / patient, target + 30)
        folder = tmp_path / "predictions" / f"{patient}_110keV"
        write_dicom(folder, target + factor * np.array([10, 20])[:, None, None])
        write_prediction(folder, patient, "110keV")
        rows.append([patient, "test", "110keV", "70keV", f"110keV/{patient}", f"70keV/{patient}", ""])
    labels = np.zeros((2, 16, 16), int)
    labels[0, 0, :4] = labels[1, 0, :12] = 1
    labels[0, 5] = 2
    write_dicom(tmp_path / "labels" / "P1", labels)
    (tmp_path / "labels" / "labels.json").write_text('{"iodine": 1, "bone": 2}')
    rows[0][-1] = "labels/P1"
    write_manifest(tmp_path / "manifest.csv", rows)
    return tmp_path


def run(folder, protocol="dect", out="out", **more):
    return evaluate(folder / "predictions", folder / "manifest.csv", protocol, folder / out, **more)


def test_dect_by_hand(dect):
    result = run(dect)
    of_p1 = row(result.cases, patient="P1", method="synthetic")
    assert of_p1["mae"] == pytest.approx(15) and of_p1["rmse"] == pytest.approx(15) and of_p1["slices"] == 2
    assert of_p1["psnr"] == pytest.approx(np.mean(20 * np.log10(4095 / np.array([10, 20]))))
    assert row(result.cases, patient="P2", method="source unchanged")["mae"] == pytest.approx(30)
    second = row(result.slices, patient="P1", method="synthetic", slice=1)
    assert second["mae"] == pytest.approx(20) and second["position_mm"] == pytest.approx(2.5)
    summary = row(result.summary, source="all", method="synthetic")
    assert summary["mae_mean"] == pytest.approx(30) and summary["mae_std"] == pytest.approx(30 / np.sqrt(2))
    assert (summary["patients"], summary["cases"], summary["slices"]) == (2, 2, 4)


def test_predictions_of_two_checkpoints_are_not_scored_as_one(dect):
    for patient, checkpoint in (("P1", "aa"), ("P2", "bb")):
        write_prediction(dect / "predictions" / f"{patient}_110keV", patient, "110keV", checkpoint_sha256=checkpoint)
    with pytest.raises(DataError, match="2 different checkpoints: predict all of them again"):
        run(dect)
    assert not (dect / "out").exists()


def test_labels_are_weighed_by_their_voxels(dect):
    result = run(dect)
    of_p1 = row(result.cases, patient="P1", method="synthetic")
    assert of_p1["mae_iodine"] == pytest.approx((4 * 10 + 12 * 20) / 16)
    assert of_p1["mae_bone"] == pytest.approx(10)
    assert np.isnan(row(result.slices, patient="P1", method="synthetic", slice=1)["mae_bone"])
    assert np.isnan(row(result.cases, patient="P2", method="synthetic")["mae_bone"])
    assert row(result.summary, source="110keV", method="synthetic")["mae_bone_mean"] == pytest.approx(10)


def test_a_label_named_as_a_tissue_by_hu_does_not_take_its_place(dect):
    before = row(run(dect).cases, patient="P1", method="synthetic")
    (dect / "labels" / "labels.json").write_text('{"image": 1, "hu_bone": 2}')
    after = row(run(dect, out="again").cases, patient="P1", method="synthetic")
    assert after["mae_hu_bone"] == before["mae_hu_bone"] and after["mae"] == before["mae"]
    assert (after["mae_label_image"], after["mae_label_hu_bone"]) == (before["mae_iodine"], before["mae_bone"])


def test_a_perfect_prediction_has_an_infinite_psnr(dect):
    for patient in ("P1", "P2"):
        folder = dect / "predictions" / f"{patient}_110keV"
        for file in folder.glob("*.dcm"):
            shutil.copy(dect / "70keV" / patient / file.name, file)
    summary = row(run(dect).summary, source="all", method="synthetic")
    assert (summary["mae_mean"], summary["psnr_mean"], summary["ssim_mean"]) == (0, np.inf, pytest.approx(1))


def test_names_of_files_decide_nothing(dect):
    before = run(dect)
    folder = dect / "predictions" / "P1_110keV"
    (folder / "0.dcm").rename(folder / "z.dcm")
    after = run(dect, out="again")
    pd.testing.assert_frame_equal(before.slices, after.slices)


def test_files(dect):
    result = run(dect)
    tables = ["cases", "patients", "slices", "statistics", "summary"]
    assert sorted(p.name for p in (dect / "out").iterdir()) == sorted(
        [*(f"{name}.csv" for name in tables), "evaluation.json", "evaluation.xlsx"]
    )
    record = json.loads((dect / "out" / "evaluation.json").read_text())
    for name in tables:
        table = getattr(result, name)
        written = pd.read_csv(dect / "out" / f"{name}.csv").fillna({"why_no_p": "", "why_no_interval": ""})
        pd.testing.assert_frame_equal(written, table, check_dtype=False)
        assert len(record[name]) == len(table) and set(record[name][0]) <= set(table.columns)
    assert record["summary"][0]["mae_mean"] == result.summary["mae_mean"][0]
    book = openpyxl.load_workbook(dect / "out" / "evaluation.xlsx")
    assert book.sheetnames == ["Summary", "Patient_Average", "Detail"]
    detail = result.slices.filter(regex="^(?!bias_|loa_|target_|dice_)")
    for sheet, frame in zip(book, (result.summary, result.cases, detail), strict=True):
        assert [cell.value for cell in sheet[1]] == list(frame.columns) and sheet["A1"].font.bold
        assert sheet.freeze_panes == "A2" and sheet.max_row == len(frame) + 1
    columns = [cell.value for cell in book["Detail"][1]]
    assert book["Detail"].cell(2, columns.index("ssim") + 1).number_format == "0.0000"


def test_table(dect):
    console = Console(width=200, file=io.StringIO())
    console.print(render_table(run(dect)))
    text = console.file.getvalue()
    assert "30.00 ± 21.21" in text and "PSNR [dB]" in text and "MAE iodine [HU]" in text and "all" not in text


def test_faults_are_listed_and_nothing_is_written(dect):
    shutil.rmtree(dect / "predictions" / "P2_110keV")
    write_prediction(dect / "predictions" / "stranger", "P9", "110keV")
    (dect / "predictions" / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        run(dect)
    message = str(caught.value)
    assert all(name in message for name in ("P2_110keV", "stranger", "empty")) and "\n" not in message
    assert not (dect / "out").exists()


def test_a_missing_slice_is_refused(dect):
    (dect / "predictions" / "P1_110keV" / "1.dcm").unlink()
    with pytest.raises(DataError, match=r"P1_110keV lacks 1 of 2 slices .* 2\.50 mm"):
        run(dect)
    assert not (dect / "out").exists()


def test_missing_slices_and_cases_are_counted_when_allowed(dect):
    (dect / "predictions" / "P1_110keV" / "0.dcm").unlink()
    shutil.rmtree(dect / "predictions" / "P2_110keV")
    result = run(dect, allow_missing=True)
    assert len(result.missing) == 2 and "P1_110keV lacks 1 of 2 slices" in result.missing[1]
    # Every method is scored on the slices that are there, which keep their numbers.
    assert row(result.cases, method="synthetic")["mae"] == pytest.approx(20)
    assert set(result.slices["slice"]) == {1} and set(result.cases["slices"]) == {1}
    summary = row(result.summary, source="all", method="synthetic")
    assert (summary["missing_cases"], summary["missing_slices"], summary["cases"]) == (1, 1, 1)
    assert json.loads((dect / "out" / "evaluation.json").read_text())["missing"] == list(result.missing)


def test_a_slice_that_was_not_predicted_is_refused(dect):
    write_prediction(dect / "predictions" / "P2_110keV", "P2", "110keV", num_slices=1)
    with pytest.raises(DataError, match="P2_110keV holds 1 slices that were not predicted"):
        run(dect)
    assert row(run(dect, allow_missing=True).cases, patient="P2", method="synthetic")["missing_slices"] == 1


def test_a_protocol_for_other_units_is_refused(dect):
    with pytest.raises(DataError, match="HU values, protocol uint8"):
        run(dect, "uint8")
    with pytest.raises(ConfigError, match="did you mean dect"):
        run(dect, "dectt")


def test_a_slice_that_source_and_target_do_not_share_is_listed_and_counted(dect):
    (dect / "110keV" / "P1" / "0.dcm").unlink()
    with pytest.raises(
        DataError, match=r"P1_110keV: 1 slice that not all .* is not scored \(.*P1: 0\.dcm at 0\.00 mm\)"
    ):
        run(dect)
    assert not (dect / "out").exists()
    result = run(dect, allow_missing=True)
    assert row(result.cases, patient="P1", method="synthetic")["mae"] == pytest.approx(20)
    summary = row(result.summary, source="all", method="synthetic")
    assert (summary["unmatched_slices"], summary["missing_slices"], summary["slices"]) == (1, 0, 3)
    assert list(result.cases.loc[result.cases["method"] == "synthetic", "unmatched_slices"]) == [1, 0]
    record = json.loads((dect / "out" / "evaluation.json").read_text())
    assert len(record["missing"]) == 1 and [one.split()[-2] for one in record["unmatched"]] == ["0.00"]
    page = write_report(dect / "out").read_text(encoding="utf-8")
    assert "1 slice is not in all images of a case and not scored" in page
    assert "unmatched_slices" not in page and "unmatched_slices" not in result.patients.columns


def test_splits_are_not_mixed(dect):
    rows = list(csv.reader((dect / "manifest.csv").read_text().splitlines()))[1:]
    rows[1][1] = "train"
    write_manifest(dect / "manifest.csv", rows)
    result = run(dect)
    assert row(result.summary, split="test", source="110keV", method="synthetic")["mae_mean"] == pytest.approx(15)
    assert row(result.summary, split="train", source="110keV", method="synthetic")["mae_mean"] == pytest.approx(45)
    # The source is 30 too bright everywhere, in the training patient as in the other.
    assert row(result.cases, split="test", method="intensity curve")["mae"] < 10


def test_volume_protocols_take_the_labels_as_mask(tmp_path):
    rng = np.random.default_rng(3)
    target = rng.integers(-900, 1500, (8, 24, 24))
    prediction = target + rng.integers(-40, 40, target.shape)
    mask = np.zeros(target.shape, int)
    mask[1:, 4:20, 4:20] = 1
    write_dicom(tmp_path / "CT" / "P1", target)
    write_dicom(tmp_path / "CBCT" / "P1", target + 5)
    write_dicom(tmp_path / "mask" / "P1", mask)
    write_dicom(tmp_path / "predictions" / "P1_CBCT", prediction)
    write_prediction(tmp_path / "predictions" / "P1_CBCT", "P1", "CBCT")
    write_manifest(tmp_path / "manifest.csv", [["P1", "test", "CBCT", "CT", "CBCT/P1", "CT/P1", "mask/P1"]])
    result = run(tmp_path, "synthrad2023")
    expected = score(target, prediction, mask, "synthrad2023")
    assert dict(row(result.cases, method="synthetic")[list(expected)]) == pytest.approx(expected)
    of_slices = result.slices[result.slices["method"] == "synthetic"]["mae"]
    assert np.isnan(of_slices.iloc[0])
    assert of_slices.iloc[3] == pytest.approx(np.abs(prediction - target)[3, 4:20, 4:20].mean())
    assert {"mae", "mae_mask"} <= set(result.slices.columns) and "psnr" not in result.slices


def test_the_intensity_curve_learns_a_monotone_map_from_training_patients(tmp_path):
    rng = np.random.default_rng(4)
    rows = []
    for patient, split in (("P1", "train"), ("P2", "test")):
        source = rng.integers(0, 256, (2, 32, 32))
        write_png(tmp_path / "MRI" / patient, source)
        write_png(tmp_path / "CT" / patient, source**2 // 255)
        rows.append([patient, split, "MRI", "CT", f"MRI/{patient}", f"CT/{patient}", ""])
    shutil.copytree(tmp_path / "MRI" / "P2", tmp_path / "predictions" / "P2_MRI")
    write_prediction(tmp_path / "predictions" / "P2_MRI", "P2", "MRI")
    write_manifest(tmp_path / "manifest.csv", rows)
    result = run(tmp_path, "uint8")
    assert row(result.cases, method="intensity curve")["mae"] < 0.1
    assert row(result.cases, method="source unchanged")["mae"] > 20


def mr_case(folder, **record):
    rng = np.random.default_rng(5)
    images = {name: rng.uniform(0, 500, (2, 16, 16)) for name in ("T1", "FLAIR", "T2")}
    for name, image in images.items():
        write_nifti(folder / name / "P1.nii.gz", image)
    rows = [["P1", "test", name, "T2", f"{name}/P1.nii.gz", "T2/P1.nii.gz", ""] for name in ("T1", "FLAIR")]
    write_manifest(folder / "manifest.csv", rows)
    prediction = folder / "predictions" / "P1_T1+FLAIR"
    write_nifti(prediction / "synthetic.nii.gz", 3 * images["T2"])
    write_prediction(prediction, "P1", "T1+FLAIR", "synthetic.nii.gz", **record)
    return images


def test_several_channels_of_mr(tmp_path):
    images = mr_case(tmp_path)
    result = run(tmp_path, "mr")
    assert result.cases["source"].tolist() == ["T1+FLAIR"] * 2
    assert row(result.cases, method="synthetic")["mae"] == pytest.approx(0, abs=1e-6)
    expected = score(images["T2"], images["T1"], protocol="mr")
    assert row(result.cases, method="source unchanged")["nmse"] == pytest.approx(expected["nmse"], rel=1e-5)


def test_a_missing_case_of_several_channels_is_counted_once(tmp_path):
    mr_case(tmp_path)
    rows = [
        [patient, "test", name, "T2", f"{name}/P1.nii.gz", "T2/P1.nii.gz", ""]
        for patient in ("P1", "P2")
        for name in ("T1", "FLAIR")
    ]
    write_manifest(tmp_path / "manifest.csv", rows)
    result = run(tmp_path, "mr", allow_missing=True)
    assert result.missing == ("P2_T1+FLAIR is a test case without prediction: predict it too",)
    assert result.summary["missing_cases"].tolist() == [1] * len(result.summary)


def test_the_recorded_scale_of_an_mr_prediction_counts(tmp_path):
    images = mr_case(tmp_path, intensity={"kind": "percentile", "low": 0, "high": 500.0, "unit": "arbitrary"})
    expected = score(images["T2"], 3 * images["T2"], protocol="mr", prediction_scale=500.0)
    assert expected["mae"] > 0.1
    assert row(run(tmp_path, "mr").cases, method="synthetic")["mae"] == pytest.approx(expected["mae"], rel=1e-5)


def test_a_prediction_on_another_grid_is_scored_on_the_targets_where_training_resampled(tmp_path):
    """Source and prediction are the inner half of the target's field, with every voxel twice as large in the plane."""

    def flat(path, array_zyx, spacing_mm, origin_mm, first_slice_mm):
        path.parent.mkdir(parents=True, exist_ok=True)
        affine = np.diag([-spacing_mm, -spacing_mm, 1, 1.0])
        affine[:3, 3] = -origin_mm, -origin_mm, first_slice_mm
        nibabel.save(nibabel.Nifti1Image(array_zyx.transpose(2, 1, 0).astype(np.float32), affine), path)

    ramp = 20.0 * np.arange(32) - 700 + 0 * np.arange(6)[:, None, None] + 0 * np.arange(32)[None, :, None]
    coarse = 20.0 * (8.5 + 2 * np.arange(8)) - 700 + 0 * np.arange(6)[:, None, None] + 0 * np.arange(8)[None, :, None]
    flat(tmp_path / "P1/ct.nii", ramp, 1, 0, 0)
    flat(tmp_path / "P1/cbct.nii", coarse[1:] + 30, 2, 8.5, 1)
    flat(tmp_path / "predictions/P1_cbct/synthetic.nii", coarse[1:] + 10, 2, 8.5, 1)
    write_manifest(tmp_path / "manifest.csv", [["P1", "test", "cbct", "ct", "P1/cbct.nii", "P1/ct.nii", ""]])
    write_prediction(tmp_path / "predictions/P1_cbct", "P1", "cbct", "synthetic.nii")
    with pytest.raises(DataError, match=r"image size .* set data\.resample"):
        run(tmp_path)
    write_prediction(tmp_path / "predictions/P1_cbct", "P1", "cbct", "synthetic.nii", resample="source")
    result = run(tmp_path)
    assert result.missing == () and result.unmatched == ("P1_cbct: P1/ct.nii: at 0.00 mm, not covered by all images",)
    assert "1 slice that not all of its images have is not scored" in result.notes[-1]
    assert (result.summary["unmatched_slices"] == 1).all()
    slices = result.slices
    of_synthetic = slices[slices["method"] == "synthetic"]
    assert len(of_synthetic) == 5  # the target's first slice is not covered
    # A quarter of the field is covered; its outermost half voxels hold the edge, 5 HU off at either end.
    assert of_synthetic["mae"].to_numpy() == pytest.approx(10 / 4, abs=0.1)
    assert row(slices, method="source unchanged", slice=0)["mae"] == pytest.approx(30 / 4, abs=0.1)
    flat(tmp_path / "predictions/P1_cbct/synthetic.nii", coarse[1:4] + 10, 2, 8.5, 1)
    with pytest.raises(DataError, match="P1_cbct lacks 2 of 5 slices"):
        run(tmp_path)
    some = run(tmp_path, allow_missing=True).slices
    assert some[some["method"] == "synthetic"]["slice"].tolist() == [0, 1, 2]


PATIENTS = 8


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Eight test patients, two training patients, 110 and 140 keV: errors of 10 ± 1 HU, of the source 30 or 50."""
    root, rng, rows = tmp_path_factory.mktemp("cohort"), np.random.default_rng(6), []
    for number in range(PATIENTS + 2):
        patient, split = f"P{number}", "test" if number < PATIENTS else "train"
        target = rng.integers(-900, 400, (1, 16, 16))
        write_nifti(root / f"70keV/{patient}.nii.gz", target)
        for source, by in (("110keV", 30), ("140keV", 50)):
            write_nifti(root / f"{source}/{patient}.nii.gz", target + by)
            rows.append([patient, split, source, "70keV", f"{source}/{patient}.nii.gz", f"70keV/{patient}.nii.gz", ""])
            if split == "test":
                for folder, error in (("predictions", 10 + number / 10), ("others", 12 + number / 5)):
                    case = root / folder / f"{patient}_{source}"
                    write_nifti(case / "synthetic.nii.gz", target + error + (source == "140keV"))
                    write_prediction(case, patient, source, "synthetic.nii.gz")
    write_manifest(root / "manifest.csv", rows)
    evaluate(root / "others", root / "manifest.csv", "dect", root / "other")
    return root, run(root, against=root / "other")


def test_every_method_and_the_patients_table(cohort):
    result = cohort[1]
    assert list(result.cases["method"][:5]) == list(METHODS) and result.notes == ()
    # Both sources are the target and a constant, which every fit finds.
    assert row(result.summary, source="140keV", method="linear fit")["mae_mean"] == pytest.approx(0, abs=1e-3)
    assert row(result.summary, source="110keV", method="two-energy fit")["mae_mean"] == pytest.approx(0, abs=1e-3)
    of_p3 = row(result.patients, patient="P3", method="synthetic")
    assert of_p3["cases"] == 2 and of_p3["mae"] == pytest.approx((10.3 + 11.3) / 2, rel=1e-5)
    summary = row(result.summary, source="all", method="synthetic")
    assert (summary["mae_n"], summary["patients"], summary["bias_hu_soft_n"]) == (16, 8, 16)
    assert summary["bias_hu_soft_mean"] == pytest.approx(10.85, rel=1e-4)


def test_statistics_are_of_patients_and_compare_with_another_evaluation(cohort):
    root, result = cohort
    found = row(result.statistics, metric="mae", second=str(root / "other"))
    of_ours, of_theirs = (10.5 + np.arange(PATIENTS) / 10, 12.5 + np.arange(PATIENTS) / 5)
    assert found["n"] == PATIENTS and found["mean"] == pytest.approx((of_ours - of_theirs).mean(), rel=1e-4)
    assert found["p"] == pytest.approx(wilcoxon(of_ours, of_theirs).pvalue) and found["p_adjusted"] >= found["p"]
    lines = sentences(result)
    assert any(line.startswith(f"synthetic lowers MAE by 2.4 HU against {root / 'other'}") for line in lines)
    assert any(line.startswith("synthetic raises MAE by") and "linear fit, for the worse" in line for line in lines)
    record = json.loads((root / "out" / "evaluation.json").read_text())
    assert record["headline"] in lines and "for the worse" in record["headline"]
    assert len(lines) == len(METHODS) and "n = 8 patients" in lines[0]
    of_other = result.patients[result.patients["method"] == str(root / "other")]
    assert of_other["mae"].tolist() == pytest.approx(of_theirs.tolist(), rel=1e-4)


def test_another_evaluation_must_be_of_the_same_cases_and_protocol(cohort, dect):
    run(dect, out="other")
    with pytest.raises(DataError, match="16 cases, 2 of them among the 2 evaluated here"):
        run(dect, against=cohort[0] / "other")
    with pytest.raises(DataError, match="holds no evaluation"):
        run(dect, against=dect / "predictions")
    summary = dect / "other" / "summary.csv"
    summary.write_text(summary.read_text().replace("dect", "synthrad2023"))
    with pytest.raises(ConfigError, match="scored under synthrad2023, this under dect"):
        run(dect, against=dect / "other")


def test_another_evaluation_must_be_of_the_same_slices(dect):
    run(dect, out="whole")
    (dect / "predictions" / "P2_110keV" / "0.dcm").unlink()
    with pytest.raises(DataError, match="1 cases were scored on other slices than here, such as P2 110keV"):
        run(dect, allow_missing=True, against=dect / "whole")


def test_a_patient_may_be_called_na(dect):
    manifest = dect / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("P1,test", "NA,test"))
    write_prediction(dect / "predictions" / "P1_110keV", "NA", "110keV")
    run(dect, out="first")
    assert "NA" in set(run(dect, against=dect / "first").patients["patient"])
    assert set(read_table(dect / "out" / "slices.csv")["patient"]) == {"NA", "P2"}


def test_without_a_training_case_the_fits_are_left_out_with_a_line(dect):
    result = run(dect)
    assert set(result.cases["method"]) == {"synthetic", "source unchanged"}
    assert len(result.notes) == 1 and "no training case" in result.notes[0]
    words = sentences(result)[0]
    assert "in 2 patients" in words and "no p-value" in words and "nan" not in words


def test_a_patient_whose_name_looks_like_a_formula_is_text(dect):
    manifest = (dect / "manifest.csv").read_text().replace("P1,test", "=1+1,test")
    (dect / "manifest.csv").write_text(manifest)
    write_prediction(dect / "predictions" / "P1_110keV", "=1+1", "110keV")
    run(dect)
    sheet = openpyxl.load_workbook(dect / "out" / "evaluation.xlsx")["Patient_Average"]
    cell = next(cell for row in sheet.iter_rows() for cell in row if cell.value == "=1+1")
    assert cell.data_type == "s" and cell.quotePrefix


def test_json_holds_no_number_that_is_none(dect):
    for patient in ("P1", "P2"):
        for file in (dect / "predictions" / f"{patient}_110keV").glob("*.dcm"):
            shutil.copy(dect / "70keV" / patient / file.name, file)
    run(dect)

    def refuse(word):
        raise AssertionError(word)

    record = json.loads((dect / "out" / "evaluation.json").read_text(), parse_constant=refuse)
    assert record["summary"][0]["psnr_mean"] == "inf" and record["summary"][0]["noise_ratio_mean"] is None
