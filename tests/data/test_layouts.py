"""Images are found where the layouts say, whatever the format, and nothing is guessed; pictures come apart exactly."""

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image
from typer.testing import CliRunner

from seresvit.cli import app
from seresvit.config import ConfigError
from seresvit.data import read_volume
from seresvit.data.layouts import find
from seresvit.data.pairing import read_manifest
from seresvit.data.volume import DataError

HARVARD = Path(__file__).parents[3] / "shared" / "data" / "harvard_mr_ct"


def found(root, sources, target, layout="auto", masks=("labels", "mask")):
    return find(Path(root), sources, target, list(masks), layout, Path(root).parent / "unpacked")


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def audit(root, out, *options):
    """The exit code, what the command said, and the cases of the manifest."""
    result = CliRunner().invoke(
        app, ["audit", str(root), "--no-pixels", "--workers", "1", "--out", str(out / "manifest.csv"), *options]
    )
    return result, read_manifest(out / "manifest.csv") if (out / "manifest.csv").is_file() else []


def write_volume_file(path, array):
    """A volume of 1 mm voxels, in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.float32)), str(path))


# ------------------------------------------------------------------------------------------------ folders


def test_both_nestings_hold_the_same_images(tmp_path):
    for patient in ("P1", "P2"):
        touch(tmp_path / "a" / patient / "T1.nii.gz", tmp_path / "a" / patient / "T2.nrrd")
        touch(tmp_path / "b" / "T1" / f"{patient}.zip", tmp_path / "b" / "T2" / f"{patient}.tif")
    by_patient, by_modality = found(tmp_path / "a", ["T1"], "T2"), found(tmp_path / "b", ["T1"], "T2")
    assert (by_patient.layout, by_modality.layout) == ("patient/modality", "modality/patient")
    assert by_patient.images["T2"] == {p: tmp_path / "a" / p / "T2.nrrd" for p in ("P1", "P2")}
    assert by_modality.images["T1"] == {p: tmp_path / "b" / "T1" / f"{p}.zip" for p in ("P1", "P2")}
    assert by_patient.splits == by_modality.splits == {}


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_synthrad_folders_are_read_as_they_are_downloaded(tmp_path, suffix):
    brain = tmp_path / "Task1" / "brain"
    for number in range(1, 5):
        values = np.random.default_rng(number).uniform(0, 100, (6, 24, 24))
        for name, array in (("mr", values), ("ct", values * 20 - 1000), ("mask", values > 1)):
            write_volume_file(brain / f"1BA00{number}" / f"{name}{suffix}", array)
    touch(brain / "overview" / "1BA001_train.png")
    layout, images, splits = found(brain, ["mr"], "ct")
    assert (layout, splits) == ("patient/modality", {}) and images.keys() == {"mr", "ct", "mask"}
    assert list(images["mr"]) == [f"1BA00{number}" for number in range(1, 5)]
    assert images["mask"]["1BA001"] == brain / "1BA001" / f"mask{suffix}"
    assert read_volume(images["ct"]["1BA001"]).unit == "HU"


def test_what_fits_no_layout_names_what_is_there_and_the_near_match(tmp_path):
    touch(tmp_path / "P001" / "T1.nii", tmp_path / "P001" / "T2.nii")
    with pytest.raises(DataError, match=r"T2w.*found P001.*did you mean T2\?.*--layout"):
        found(tmp_path, ["T1"], "T2w")
    with pytest.raises(DataError, match="no such folder"):
        found(tmp_path / "absent", ["T1"], "T2")
    with pytest.raises(ConfigError, match="aligned-png"):
        found(tmp_path, ["T1"], "T2", layout="flat")
    touch(tmp_path / "P001" / "T1.mha")
    with pytest.raises(DataError, match=r"T1\.nii: P001 has a second T1, T1\.mha"):
        found(tmp_path, ["T1"], "T2")


def test_what_fits_both_nestings_is_not_guessed(tmp_path):
    touch(*(tmp_path / outer / f"{inner}.nii" for outer in ("T1", "T2") for inner in ("T1", "T2")))
    with pytest.raises(DataError, match=r"both .*--layout"):
        found(tmp_path, ["T1"], "T2")
    assert found(tmp_path, ["T1"], "T2", "patient/modality").images["T1"].keys() == {"T1", "T2"}


# ------------------------------------------------------------------------------------------------ a table


@pytest.fixture
def table(tmp_path):
    """Five patients, their images where no layout would find them, named by a table that a spreadsheet saved."""
    for number in range(5):
        values = np.random.default_rng(number).uniform(1, 100, (5, 24, 24))
        write_volume_file(tmp_path / "scans" / f"a{number}.nii.gz", values)
        write_volume_file(tmp_path / "elsewhere" / str(number) / "x.mha", values * 2)
        write_volume_file(tmp_path / "rois" / f"{number}.nii", values > 1)
    rows = [
        ("patient", "source_path", "target_path", "split", "mask_path"),
        *((f"P{n}", f"scans/a{n}.nii.gz", f"elsewhere/{n}/x.mha", split, f"rois/{n}.nii") for n, split in SPLIT_OF),
    ]
    with (tmp_path / "pairs.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "pairs.csv"


SPLIT_OF = list(enumerate(["train", "train", "val", "test", "train"]))


def test_a_table_names_images_and_splits(table, tmp_path):
    result, cases = audit(table, tmp_path, "--source", "T1", "--target", "T2")
    assert result.exit_code == 0, result.output
    assert [(case.patient, case.split) for case in cases] == [(f"P{n}", split) for n, split in SPLIT_OF]
    assert cases[3].source_path == tmp_path / "scans" / "a3.nii.gz"
    assert cases[3].target_path == tmp_path / "elsewhere" / "3" / "x.mha"
    assert cases[3].mask_path == tmp_path / "rois" / "3.nii"
    # The manifest is such a table itself.
    again, same = audit(tmp_path / "manifest.csv", tmp_path, "--source", "T1", "--target", "T2")
    assert again.exit_code == 0 and same == cases
    named = audit(table, tmp_path, "--source", "T1", "--target", "T2", "--val", "P0")[0]
    assert isinstance(named.exception, ConfigError) and "split itself" in str(named.exception)


def test_a_table_may_hold_several_sources_and_leave_the_split_to_the_draw(table, tmp_path):
    lines = ["patient,source,target,source_path,target_path"]
    for n in range(5):
        lines += [f"P{n},{source},T2,scans/a{n}.nii.gz,elsewhere/{n}/x.mha" for source in ("T1", "PD", "DWI")]
    table.write_text("\n".join(lines) + "\n")
    result = found(table, ["T1", "PD"], "T2")
    assert result.layout == "table" and result.splits == {} and result.images.keys() == {"T1", "PD", "T2"}
    assert result.images["PD"].keys() == {f"P{n}" for n in range(5)}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("source_path", "source", "line 1.*missing column source_path"),
        ("P1,scans/a1.nii.gz", "P1,", "line 3.*source_path is empty"),
        ("scans/a1", "scans/a9", r"line 3.*a9\.nii\.gz does not exist.*relative"),
        ("P1,", "P/1,", "line 3.*cannot name"),
        ("x.mha,val", "x.mha,valid", "line 4.*valid"),
        ("x.mha,val", "x.mha,", "P2 has no split"),
        ("P1,", "P0,", "line 3.*P0 has a second"),
        ("P2,", "P0,", "line 4.*P0 is in val, above in train"),
    ],
)
def test_a_table_that_cannot_be_trusted_is_refused_with_its_line(table, old, new, words):
    table.write_text(table.read_text(encoding="utf-8-sig").replace(old, new, 1))
    with pytest.raises(DataError, match=words) as refused:
        found(table, ["T1"], "T2")
    assert "\n" not in str(refused.value) and str(refused.value).startswith(str(table))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"\x00" * 99, b'"'])
def test_what_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"pairs\.csv"):
        found(tmp_path / "pairs.csv", ["T1"], "T2")


# ------------------------------------------------------------------------------------------------ side by side


def aligned(root, split, name, sources, target):
    """A picture with the target beside the sources, which are its grey or its red, green and blue."""
    left = sources[0] if len(sources) == 1 else np.stack([*sources, np.zeros_like(target)][:3], axis=-1)
    right = target if len(sources) == 1 else np.stack([target] * 3, axis=-1)
    (root / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([left, right], axis=1)).save(root / split / f"{name}.png")


def planes(number, count):
    return list(np.random.default_rng(number).integers(0, 256, (count, 24, 20), dtype=np.uint8))


@pytest.mark.parametrize("num_sources", [1, 2, 3])
def test_pictures_side_by_side_come_apart_exactly(tmp_path, num_sources):
    names = ["T1", "T2", "PD"][:num_sources]
    patients = {"P1": "train", "P2": "train", "P3": "val", "IXI-012-T1": "test"}
    truth = {}
    for at, (patient, split) in enumerate(patients.items()):
        for k in (1, 2, 10):
            truth[patient, k] = planes(10 * at + k, num_sources + 1)
            *sources, target = truth[patient, k]
            aligned(tmp_path / "data", split, f"{patient}_{k}", sources, target)
    _, images, splits = found(tmp_path / "data", names, "FLAIR", "aligned-png")
    assert splits == patients and list(images) == [*names, "FLAIR"]
    for channel, (modality, folders) in enumerate(images.items()):
        assert folders.keys() == patients.keys()
        for patient, folder in folders.items():
            volume = read_volume(folder)
            assert folder == tmp_path / "unpacked" / modality / patient
            assert volume.positions_mm.tolist() == [1, 2, 10]
            np.testing.assert_array_equal(volume.array, [truth[patient, k][channel] for k in (1, 2, 10)])


def test_pictures_are_unpacked_again_only_when_they_changed(tmp_path):
    for k in (1, 2):
        aligned(tmp_path / "data", "train", f"P1_{k}", *(lambda a, b: ([a], b))(*planes(k, 2)))
    unpacked = found(tmp_path / "data", ["T1"], "T2").images["T1"]["P1"]
    before = (unpacked / "slice_0002.png").stat().st_mtime_ns
    found(tmp_path / "data", ["T1"], "T2")
    assert (unpacked / "slice_0002.png").stat().st_mtime_ns == before
    (tmp_path / "data" / "train" / "P1_2.png").unlink()
    found(tmp_path / "data", ["T1"], "T2")
    assert [path.name for path in unpacked.iterdir()] == ["slice_0001.png"]
    (tmp_path / "unpacked" / "unpacked.txt").unlink()
    with pytest.raises(DataError, match="would replace"):
        found(tmp_path / "data", ["T1"], "T2")


def test_pictures_with_a_number_alone_are_one_patient_a_split_and_a_warning(tmp_path):
    for split in ("train", "val", "test"):
        for k in range(3):
            sources, target = planes(k, 1), planes(k + 5, 1)[0]
            aligned(tmp_path / "data", split, str(k), sources, target)
    result, cases = audit(tmp_path / "data", tmp_path / "out", "--source", "A", "--target", "B")
    assert {case.patient: case.split for case in cases} == {"train": "train", "val": "val", "test": "test"}
    assert result.output.count("PATIENT_NUMBER.png") == 3


@pytest.mark.parametrize(
    ("name", "pixels", "words"),
    [
        ("P1_last", np.zeros((8, 8), np.uint8), r"P1_last\.png.*P001_0012"),
        ("P1_1", np.zeros((8, 9), np.uint8), "one width, found 9"),
        ("P1_1", np.arange(192, dtype=np.uint8).reshape(8, 8, 3), "right half, the target, must be grey"),
        ("P0_1", np.zeros((8, 8), np.uint8), "P0 is in (val|train) and in (val|train)"),
        ("P1_1", np.zeros((8, 8, 4), np.uint8), "grey or RGB, found RGBA"),
    ],
)
def test_pictures_that_cannot_be_taken_apart_are_refused(tmp_path, name, pixels, words):
    aligned(tmp_path / "data", "train", "P0_1", planes(0, 1), planes(1, 1)[0])
    (tmp_path / "data" / "val").mkdir()
    Image.fromarray(pixels).save(tmp_path / "data" / "val" / f"{name}.png")
    with pytest.raises(DataError, match=words) as refused:
        found(tmp_path / "data", ["T1"], "T2")
    assert "\n" not in str(refused.value) and not (tmp_path / "unpacked").exists()


def test_the_number_of_sources_must_fit_the_colours(tmp_path):
    aligned(tmp_path / "data", "train", "P0_1", planes(0, 1), planes(1, 1)[0])
    with pytest.raises(DataError, match="need a colour picture"):
        found(tmp_path / "data", ["T1", "PD"], "T2")
    with pytest.raises(ConfigError, match="a picture holds three"):
        found(tmp_path / "data", ["a", "b", "c", "d"], "T2")
    aligned(tmp_path / "data", "train", "P0_1", planes(0, 2), planes(1, 1)[0])
    with pytest.raises(DataError, match="one source must be grey"):
        found(tmp_path / "data", ["T1"], "T2")


@pytest.mark.skipif(not HARVARD.is_dir(), reason="needs the MR and CT slices beside the checkout")
def test_real_slices_side_by_side(tmp_path):
    for path in sorted((HARVARD / "MRI").rglob("20*.png"))[:5]:
        mr, ct = (np.asarray(Image.open(p).convert("L")) for p in (path, Path(str(path).replace("/MRI/", "/CT/"))))
        aligned(tmp_path / "data", "train", f"{path.stem[:2]}_{path.stem[2:]}", [mr], ct)
    unpacked = found(tmp_path / "data", ["MRI"], "CT").images["CT"]["20"]
    original = Image.open(sorted((HARVARD / "CT").glob("20*.png"))[0]).convert("L")
    np.testing.assert_array_equal(read_volume(unpacked).array[0], np.asarray(original))
