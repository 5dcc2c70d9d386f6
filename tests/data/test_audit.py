"""Every planted fault must be found under its rule with the file named, and clean patients must raise no alarm."""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from scipy.ndimage import gaussian_filter

from seresvit.config import DataSettings
from seresvit.data import phantom
from seresvit.data.audit import anonymized, audit, stale_path, write

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data"
planted = runpy.run_path(str(ROOT / "benchmarks" / "planted_faults.py"))
KINDS = [*planted["CT_KINDS"], *planted["MR_KINDS"]]
SOURCE, TARGET, PATIENT, OTHER = "110keV", "70keV", "P001", "P002"


@pytest.fixture(scope="module")
def ct(tmp_path_factory) -> Path:
    """Two simulated patients as ROOT/{110keV,70keV,labels}/P00n."""
    (root,) = planted["simulated"](tmp_path_factory.mktemp("ct"), 1)
    return root


@pytest.fixture(scope="module")
def mr(tmp_path_factory) -> Path:
    """A head of blobs in two contrasts, as ROOT/P001/{T1,T2}.nii.gz."""
    root, random = tmp_path_factory.mktemp("mr"), np.random.default_rng(0)
    z, y, x = np.ogrid[-1:1:24j, -1:1:48j, -1:1:40j]
    tissue = gaussian_filter(random.normal(size=(24, 48, 40)), 2) * (z**2 + y**2 + (x - 0.1) ** 2 < 0.8)
    (root / PATIENT).mkdir()
    for name, values in (("T1", 200 + 2000 * tissue), ("T2", 900 - 2500 * tissue - 4000 * tissue**2)):
        array = np.where(tissue == 0, 0, values + random.normal(size=tissue.shape))
        nib.save(
            nib.Nifti1Image(array.T.astype(np.float32), np.diag([-2.0, -2, 3, 1])), root / PATIENT / f"{name}.nii.gz"
        )
    return root


@pytest.fixture
def copy(ct, tmp_path) -> Path:
    return Path(shutil.copytree(ct, tmp_path / "copy"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_planted_fault_is_found_under_its_rule_and_its_file_is_named(kind, ct, mr):
    assert planted["is_found"](kind, ct if kind in planted["CT_KINDS"] else mr, np.random.default_rng(7))


def test_the_clean_patients_raise_no_alarm(ct, mr):
    for result in (audit(ct, [SOURCE], TARGET), audit(mr, ["T1"], "T2")):
        assert result.faults == result.warnings == []


def test_a_clean_case_is_recorded_with_its_geometry(ct):
    case = audit(ct, [SOURCE], TARGET).geometry[0]
    assert case.pop("split") and case == {
        "patient": PATIENT,
        "source": SOURCE,
        "target": TARGET,
        "files": ["110keV/P001", "70keV/P001", "labels/P001.nii.gz"],
        "size_zyx": [8, 64, 64],
        "spacing_mm_zyx": [15.0, 5.9375, 5.9375],
        "num_slices": 8,
        "dropped": [],
    }


@pytest.mark.skipif(not REAL.is_dir(), reason="needs real MR volumes beside the checkout")
def test_real_pairs_are_clean_but_for_their_known_residuals(tmp_path):
    """The stroke subject is aligned exactly, as is case 9 of BraTS; case 5 is off by two slices."""
    stroke, *_ = planted["real"]([REAL / "stroke_t1_t2_flair"], tmp_path)
    exact = audit(stroke, ["FLAIR"], "T2")
    assert exact.faults == exact.warnings == []
    (tmp_path / "brats").mkdir()
    two_off, aligned = (next((REAL / "brats_t1_flair").glob(f"case_{number}*")) for number in (5, 9))
    for folder in (two_off, aligned):
        (tmp_path / "brats" / folder.name).symlink_to(folder)
    result = audit(tmp_path / "brats", ["T1"], "FLAIR")
    (warning,) = result.warnings
    assert not result.faults and two_off.name in warning.file and "2 slices" in warning.found


# Across cases and sides


def test_a_fault_of_a_shared_target_is_said_once(copy):
    shutil.copytree(copy / SOURCE, copy / "100keV")
    for patient in (PATIENT, OTHER):
        for path in (copy / "100keV" / patient).glob("*.dcm"):
            image = pydicom.dcmread(path)
            image.SeriesDescription = image.ImageComments = image.DerivationDescription = "100 keV"
            image.save_as(path)
    (copy / TARGET / PATIENT / "P001_0001.dcm").write_bytes(b"no image")
    result = audit(copy, [SOURCE, "100keV"], TARGET)
    assert [fault.file for fault in result.faults if fault.rule == "readable"] == ["70keV/P001/P001_0001.dcm"]


def test_resampling_turns_another_grid_into_a_warning(copy):
    shutil.rmtree(copy / "labels")
    planted["header"](PixelSpacing=[5, 5])(copy, np.random.default_rng(0))
    refused = audit(copy, [SOURCE], TARGET)
    assert [fault.rule for fault in refused.faults] == ["same grid"] and "--resample" in refused.faults[0].remedy
    allowed = audit(copy, [SOURCE], TARGET, data=DataSettings(resample="target"))
    assert "same grid" in {warning.rule for warning in allowed.warnings}
    assert "same grid" not in {fault.rule for fault in allowed.faults} and allowed.settings["resample"] == "target"


def test_a_narrow_window_of_the_config_counts(copy):
    result = audit(copy, [SOURCE], TARGET, data=DataSettings(window_hu=(-1024, 100)))
    assert {warning.rule for warning in result.warnings} == {"values in the window"}


# Headers only, cores, and their ends


def test_headers_alone_tell_what_headers_can_and_read_no_pixels(copy, monkeypatch):
    edit = planted["edit"]
    edit(sorted((copy / SOURCE / PATIENT).glob("*.dcm")), lambda image, stored: 0 * stored)
    edit(sorted((copy / SOURCE / OTHER).glob("*.dcm")), lambda image, _: setattr(image, "PatientID", "other"))
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda self: pytest.fail("pixels were read")))
    result = audit(copy, [SOURCE], TARGET, pixels=False)
    assert [(fault.file, fault.rule) for fault in result.faults] == [("110keV/P002", "one patient a case")]
    assert not result.pictures and result.settings["pixels"] is False


def test_many_processes_find_the_same_and_a_bad_case_stops_no_other(copy):
    next((copy / SOURCE / PATIENT).glob("*.dcm")).write_bytes(b"no image")
    seen = []
    alone = audit(copy, [SOURCE], TARGET)
    spread = audit(copy, [SOURCE], TARGET, workers=2, progress=lambda cases: seen.extend(cases) or cases)
    assert spread == alone and len(seen) == 2
    assert [case["patient"] for case in spread.geometry] == [OTHER]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """As many patients as keep two workers busy for longer than a signal takes."""
    root = tmp_path_factory.mktemp("many")
    kev = tuple(float(name.removesuffix("keV")) for name in (SOURCE, TARGET))
    phantom.simulate(root, patients=32, slices=4, size=32, kev=kev)
    return root


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, 1)], ids=["Ctrl-C", "worker killed"])
def test_an_interrupted_audit_and_a_dead_worker_end_in_one_line(many, tmp_path, sent, code):
    command = [
        sys.executable,
        "-m",
        "seresvit",
        "audit",
        many,
        "--source",
        SOURCE,
        "--target",
        TARGET,
        "--workers",
        "2",
    ]
    running = subprocess.Popen(
        [*map(str, command), "--workers", "2", "--out", str(tmp_path / "manifest.csv")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if not Path(f"/proc/{running.pid}/task/{running.pid}/children").is_file():
        pytest.skip("needs /proc to know the workers")

    def children(process):
        with suppress(OSError):  # it has ended
            return Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return []

    # One child keeps count of shared resources, the other is the server whose children are the workers.
    while running.poll() is None and len(workers := [w for c in children(running.pid) for w in children(c)]) < 2:
        time.sleep(0.02)
    if sent == signal.SIGINT:
        os.killpg(running.pid, sent)
    else:
        os.kill(int(workers[-1]), sent)
    told = running.communicate(timeout=120)[1]
    assert running.returncode == code and "Traceback" not in told
    assert not (tmp_path / "manifest.csv").exists()


# What is written


def test_a_fault_leaves_no_manifest_that_looks_valid(copy, tmp_path):
    manifest = tmp_path / "out" / "manifest.csv"
    assert write(audit(copy, [SOURCE], TARGET), manifest) and manifest.is_file()
    before = manifest.read_text()
    (copy / SOURCE / PATIENT / "P001_0003.dcm").write_bytes(b"no image")
    result = audit(copy, [SOURCE], TARGET)
    assert not write(result, manifest) and not manifest.exists()
    assert stale_path(manifest).read_text() == before
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert record["counts"]["faults"] == 1 and record["faults"][0]["file"] == "110keV/P001/P001_0003.dcm"
    assert set(record["faults"][0]) == {"file", "rule", "found", "remedy"}
    assert str(tmp_path) not in json.dumps(record)


def test_the_page_shows_findings_and_a_picture_of_every_case_and_loads_nothing(copy, tmp_path):
    planted["header"](PhotometricInterpretation="MONOCHROME1")(copy, np.random.default_rng(0))
    result = audit(copy, [SOURCE], TARGET)
    write(result, tmp_path / "manifest.csv")
    page = (tmp_path / "audit.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(result.cases) == 2
    assert "MONOCHROME1" in page and page.index("Warnings") < page.index("<figure")
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert len(page) < 60_000 * len(result.cases)


def test_identifiers_are_never_shown(copy, tmp_path):
    for number, path in enumerate(sorted((copy / SOURCE).rglob("*.dcm"))):
        image = pydicom.dcmread(path)
        image.PatientID, image.PatientName, image.PatientBirthDate = "SECRET-1", "Hidden^Jane", "19700203"
        image.StudyInstanceUID = "1.2.3.444" if number < 8 else image.StudyInstanceUID
        image.save_as(path)
    result = audit(copy, [SOURCE], TARGET)
    assert len(result.faults) == 2 and not write(result, tmp_path / "manifest.csv")
    for name in ("audit.json", "audit.html"):
        written = (tmp_path / name).read_text()
        assert not any(secret in written for secret in ("SECRET", "Hidden", "1970", "1.2.3.444"))


def test_anonymized_names_stay_in_the_paths_of_the_manifest_only(copy, tmp_path):
    (copy / SOURCE / PATIENT / "P001_0003.dcm").unlink()
    for side in (SOURCE, TARGET):
        shutil.copytree(copy / side / OTHER, copy / side / "7")
        planted["edit"](sorted((copy / side / "7").glob("*.dcm")), lambda image, stored: 0 * stored)
    (copy / "labels" / f"{OTHER}.nii.gz").unlink()
    result = anonymized(audit(copy, [SOURCE], TARGET, test=[OTHER], exclude=[]))
    assert any("every voxel is" in fault.found for fault in result.faults)
    assert not write(result, tmp_path / "manifest.csv")
    for name in ("audit.json", "audit.html"):
        written = (tmp_path / name).read_text()
        assert not re.search(r"P00[12]|keV/7\b", written) and "patient-0002" in written
    shutil.rmtree(copy / SOURCE / "7")
    assert write(anonymized(audit(copy, [SOURCE], TARGET)), tmp_path / "manifest.csv")
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    assert {row["patient"] for row in rows} == {"patient-0002", "patient-0003"}
    assert rows[0]["source_path"].endswith("110keV/P001")
