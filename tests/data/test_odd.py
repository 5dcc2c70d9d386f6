"""Odd and hostile real files, read right or refused in one line: all by one process, in little memory and time."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest

ODD = Path(__file__).parents[3] / "shared" / "data" / "odd"
pytestmark = pytest.mark.skipif(not ODD.is_dir(), reason="the collection of real and damaged files is not here")

MOST_MEMORY = 2 * 2**30
MOST_SECONDS = 20
# Reads every path of its arguments; stored values are what the file holds before slope and intercept.
READER = """
import json, resource, sys, time
import numpy as np
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
from seresvit.data import read_volume
from seresvit.data.volume import DataError
for path in sys.argv[1:]:
    began = time.perf_counter()
    try:
        volume = read_volume(path)
        found = {"shape": volume.array.shape, "range": [float(volume.array.min()), float(volume.array.max())]}
        found |= {"unit": volume.unit, "set_aside": volume.set_aside, "finite": bool(np.isfinite(volume.array).all())}
        if volume.format == "dicom":
            scale = [(float(h.get("RescaleSlope", 1)), float(h.get("RescaleIntercept", 0))) for h in volume.headers]
            slope, intercept = np.array(scale).T[:, :, None, None]
            stored = np.rint((volume.array - intercept) / slope)
            found["stored"] = [int(stored.min()), int(stored.max())]
    except DataError as error:
        found = {"refused": str(error)}
    found["seconds"] = time.perf_counter() - began
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([path, found]))
"""
FOLDERS = {
    "ct_gaps_with_rtstruct": (8, 480, 480),
    "dicom2nifti_compressed/ge_anatomical_001_single_slice": (1, 256, 256),
    "dicom2nifti_compressed/generic_compressed_jpeg_001": (4, 256, 256),
    "dicom2nifti_compressed/generic_compressed_jpegls_001": (4, 256, 256),
    "dicom2nifti_compressed/generic_compressed_rle_001": (4, 256, 256),
    "dicom2nifti_compressed/generic_rgb_001": "found RGB",
    "dicom2nifti_compressed/philips_enhanced_anatomical_001": (8, 256, 256),
    "dicom2nifti_compressed/siemens_multiframe_anatomical_001": (8, 256, 256),
    "dicom2nifti_failing/gantrytilting": (4, 512, 512),
    "dicom2nifti_failing/notavolume": "two slices at one position",
    "dicom2nifti_failing/slicecount": (2, 256, 256),
    "dicom2nifti_failing/sliceincrement": (4, 512, 512),
    "dicom2nifti_failing/sliceorientation": "ImageOrientationPatient must be the same",
    "adversarial": "46341 x 46341 pixels need 4294976562 bytes, found 10124",
    "pydicom_data": "functional groups",
    "transfer_syntaxes": "two slices at one position",
}
FILES = sorted((ODD / "dicom").rglob("*.dcm"))
NIFTI = sorted((ODD / "nifti").glob("*"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Each path, and what reading it gave; the nested sequences are unpacked first, and also given packed."""
    packed = next((ODD / "dicom" / "adversarial").glob("*Nested*.gz"))
    nested = tmp_path_factory.mktemp("odd") / "nested.dcm"
    nested.write_bytes(gzip.decompress(packed.read_bytes()))
    paths = [*FILES, *NIFTI, *(ODD / "dicom" / folder for folder in FOLDERS), packed, nested]
    command = [sys.executable, "-c", READER, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=len(paths) * MOST_SECONDS, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    found = {path: outcome for path, outcome in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == set(map(str, paths))
    return found


def refused(outcome, name):
    message = outcome.get("refused", "")
    assert "\n" not in message and len(message) < 700 and (not message or name in message)
    return message


def test_nothing_takes_much_memory_or_time(outcomes):
    assert max(outcome["memory"] for outcome in outcomes.values()) < MOST_MEMORY
    assert max(outcome["seconds"] for outcome in outcomes.values()) < MOST_SECONDS


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(ODD / "dicom"))[-60:])
def test_a_slice_holds_the_values_of_the_table(outcomes, file):
    header = pydicom.dcmread(file, stop_before_pixels=True)
    # The table's folders are not reliable: a file is told by its name and transfer syntax.
    with (ODD / "expected_dicom.csv").open(newline="") as table:
        said = [
            row["pydicom+pylibjpeg pixel_array"]
            for row in csv.DictReader(table)
            if (Path(row["file"]).name, row["transfer_syntax"]) == (file.name, header.file_meta.TransferSyntaxUID)
        ]
    outcome = outcomes[str(file)]
    if refused(outcome, file.name):
        colour = header.get("PhotometricInterpretation") == "RGB"
        unplaced = "NumberOfFrames" in header and "PerFrameFunctionalGroupsSequence" not in header
        assert colour or unplaced or not any(words.startswith("ok") for words in said)
    else:
        shape, (low, high) = outcome["shape"], outcome["stored"]
        size = str(tuple(shape if shape[0] > 1 else shape[1:]))
        assert any(words.startswith(f"ok {size}") and words.endswith(f"[{low},{high}]") for words in said), said


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_one_series_or_refused(outcomes, folder):
    outcome, expected = outcomes[str(ODD / "dicom" / folder)], FOLDERS[folder]
    if isinstance(expected, str):
        assert expected in refused(outcome, folder)
    else:
        assert tuple(outcome["shape"]) == expected
        assert [name[-8:] for name in outcome["set_aside"]] == ["RTSTRUCT"] * ("rtstruct" in folder)


@pytest.mark.parametrize("file", NIFTI, ids=lambda path: path.name)
def test_an_image_file_holds_the_values_of_the_table(outcomes, file):
    with (ODD / "expected_nifti.csv").open(newline="") as table:
        row = next(row for row in csv.DictReader(table) if row["file"] == f"nifti/{file.name}")
    outcome = outcomes[str(file)]
    if row["min"] == "complex":
        assert "complex" in refused(outcome, file.name)
    elif int(row["n_nonfinite"]):
        assert f"found {row['n_nonfinite']}" in refused(outcome, file.name)
    else:
        np.testing.assert_allclose(outcome["range"], (float(row["min"]), float(row["max"])), rtol=1e-6)
        assert sorted(outcome["shape"]) == sorted(json.loads(row["shape"].replace("(", "[").replace(")", "]"))[:3])


def test_hostile_files_are_refused_by_what_they_claim(outcomes):
    for side, length in ((46341, 10124), (65535, None)):
        (outcome,) = (found for path, found in outcomes.items() if f"oob-monochrome-{side}" in path)
        message = refused(outcome, str(side))
        assert "missing" in message or (f"{side} x {side}" in message and str(length or "") in message)
    assert "nested" in next(found["refused"] for path, found in outcomes.items() if path.endswith("nested.dcm"))
    assert ".gz files" in next(found["refused"] for path, found in outcomes.items() if path.endswith(".dcm.gz"))
