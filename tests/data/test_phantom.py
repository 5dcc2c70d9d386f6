"""The simulated patients against published attenuation data, the DICOM validator, and NIfTI's own idea of space."""

import json
import shutil
import subprocess
from itertools import pairwise

import nibabel as nib
import numpy as np
import pydicom
import pytest

from seresvit.config import ConfigError
from seresvit.data import phantom
from seresvit.data.volume import DataError

SIZE = 64
ENERGIES = (60, 70, 110, 130)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom")
    phantom.simulate(out, patients=4, slices=6, size=128, kev=ENERGIES, seed=3)
    return out


def series(out, energy, patient):
    return [pydicom.dcmread(path) for path in sorted((out / f"{energy}keV" / patient).glob("*.dcm"))]


def hounsfield(out, energy, patient):
    images = series(out, energy, patient)
    return np.stack([i.pixel_array * float(i.RescaleSlope) + float(i.RescaleIntercept) for i in images])


def labels(out, patient):
    return np.asarray(nib.load(out / "labels" / f"{patient}.nii.gz").dataobj).transpose(2, 1, 0)


def content(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# NIST Standard Reference Database 126 (Hubbell & Seltzer), mass attenuation × density, in 1/cm.
@pytest.mark.parametrize(
    ("material", "energy_kev", "published"),
    [
        ("water", 60, 0.2059),
        ("water", 80, 0.1837),
        ("water", 100, 0.1707),
        ("water", 150, 0.1505),
        ("cortical bone", 60, 0.3148 * 1.92),
        ("cortical bone", 80, 0.2229 * 1.92),
        ("cortical bone", 100, 0.1855 * 1.92),
        ("adipose", 60, 0.1974 * 0.95),
        ("muscle", 60, 0.2048 * 1.05),
        ("air", 60, 0.1875 * 0.001205),
    ],
)
def test_attenuation_is_that_of_nist(material, energy_kev, published):
    assert phantom.mu_per_cm(material, energy_kev) == pytest.approx(published, rel=0.01)


def test_hounsfield_units_of_reference_materials():
    energies = np.array([50.0, 70, 110, 190])
    assert np.all(phantom.hu("water", energies) == 0)
    assert phantom.hu("cortical bone", [70, 110]) == pytest.approx([1560, 1020], abs=10)
    assert phantom.iodine_hu_per_mg_ml([70, 110]) == pytest.approx([26, 9.1], abs=0.2)
    assert phantom.hu("air", energies) == pytest.approx(-1000, abs=2)
    assert 40 < phantom.hu("blood", 70) < 65
    assert -110 < phantom.hu("adipose", 70) < -60


@pytest.mark.parametrize("material", phantom.MATERIALS)
def test_mass_fractions_add_up(material):
    _, elements, per_mille = phantom.MATERIALS[material]
    assert len(elements.split()) == len(per_mille)
    assert sum(per_mille) == pytest.approx(1000, abs=0.01)


def test_iodine_and_trabecular_bone_share_source_values_but_not_target_values(simulated):
    ratio = []
    shared = {"bone": 0, "contrast": 0}
    for patient in ("P001", "P002", "P003", "P004"):
        at70, at110 = (hounsfield(simulated, energy, patient) for energy in (70, 110))
        label = labels(simulated, patient)
        for name in shared:
            inside = (label == phantom.LABELS[name]) & (at110 > 100) & (at110 < 180)
            shared[name] += inside.sum()
            ratio.append((name, at70[inside].mean() / at110[inside].mean()))
    assert min(shared.values()) > 300
    assert max(r for n, r in ratio if n == "bone") + 0.2 < min(r for n, r in ratio if n == "contrast")


def test_tissues_have_their_hounsfield_units(simulated):
    at70, label = hounsfield(simulated, 70, "P001"), labels(simulated, "P001")
    median = {name: np.median(at70[label == value]) for name, value in phantom.LABELS.items()}
    assert np.median(at70[label == 0]) == pytest.approx(-1000, abs=5)
    assert -110 < median["body"] < -60
    assert 30 < median["soft"] < 70
    assert -850 < median["lung"] < -600
    assert 250 < median["bone"] < 1000
    assert 150 < median["contrast"] < 500
    assert 20 < median["embolus"] < 120


def test_every_other_patient_has_emboli(simulated):
    assert json.loads((simulated / "labels" / "labels.json").read_text()) == phantom.LABELS
    found = [(labels(simulated, f"P00{n}") == phantom.LABELS["embolus"]).sum() > 5 for n in (1, 2, 3, 4)]
    assert sorted(found) == [False, False, True, True]
    assert all(a != b for a, b in pairwise(found))


def test_noise_is_a_combination_of_two_fields(simulated):
    """The images of four energies of one patient, less the tissue, span two dimensions, and are of the stated size."""
    label = labels(simulated, "P001")
    stack = np.stack([hounsfield(simulated, energy, "P001") for energy in ENERGIES])
    # Air beside the patient has no structure of its own; the mean of it is a constant.
    outside = label == 0
    outside[:, 10:-10, 10:-10] = False
    noise = stack[:, outside] - stack[:, outside].mean(axis=1, keepdims=True)
    assert np.all((noise.std(axis=1) > 6) & (noise.std(axis=1) < 14))
    assert noise.std(axis=1)[0] > noise.std(axis=1)[1] > noise.std(axis=1)[2]
    strength = np.linalg.svd(noise, compute_uv=False)
    assert strength[1] > 4 * strength[2]  # what remains is the rounding to whole HU and the clipping at -1024
    assert np.corrcoef(noise[1], noise[2])[0, 1] > 0.7


def test_labels_lie_on_the_images_in_patient_space(simulated):
    image = nib.load(simulated / "labels" / "P002.nii.gz")
    for k, slice_ in enumerate(series(simulated, 110, "P002")):
        row, column = 40, 90
        x, y, z = (float(v) for v in slice_.ImagePositionPatient)
        lps = np.array([x + column * float(slice_.PixelSpacing[1]), y + row * float(slice_.PixelSpacing[0]), z])
        assert np.allclose(image.affine @ (column, row, k, 1), [-lps[0], -lps[1], lps[2], 1], atol=1e-3)
        assert slice_.InstanceNumber == k + 1


def test_headers_of_one_patient_agree_across_energies(simulated):
    low, high = series(simulated, 70, "P001"), series(simulated, 110, "P001")
    other = series(simulated, 70, "P002")
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert len({i[keyword].value for i in low + high}) == 1
        assert low[0][keyword].value != other[0][keyword].value
    assert len({i.SeriesInstanceUID for i in low}) == 1
    assert low[0].SeriesInstanceUID != high[0].SeriesInstanceUID
    assert len({i.SOPInstanceUID for i in low + high}) == len(low + high)
    assert [i.ImagePositionPatient for i in low] == [i.ImagePositionPatient for i in high]
    assert high[0].SeriesDescription == "MonoE 110keV[HU]"
    assert "SIMULATED" in high[0].ImageType
    assert str(high[0].PatientName) == "Simulated^P001"


def test_dciodvfy_finds_no_error(simulated):
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy of dicom3tools is not installed")
    path = simulated / "70keV" / "P002" / "P002_0003.dcm"
    answer = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    said = answer.stdout + answer.stderr
    assert "CTImage" in said
    assert "Error" not in said


def test_a_patient_depends_on_seed_and_number_only(tmp_path):
    phantom.simulate(tmp_path / "one", patients=1, slices=2, size=SIZE, kev=(70,))
    phantom.simulate(tmp_path / "two", patients=2, slices=2, size=SIZE, kev=(110, 70))
    phantom.simulate(tmp_path / "other", patients=1, slices=2, size=SIZE, kev=(70,), seed=1)
    one, two, other = (content(tmp_path / name) for name in ("one", "two", "other"))
    assert set(one) < set(two)
    assert all(two[name] == data for name, data in one.items())
    assert sorted(other) == sorted(one)
    assert all(other[name] != data for name, data in one.items() if not name.endswith("json"))
    assert two["70keV/P001/P001_0001.dcm"] != two["70keV/P002/P002_0001.dcm"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kev": (70, 30)}, "70,30"),
        ({"kev": (70, 191)}, "70,191"),
        ({"kev": (70, 70.0)}, "70,70"),
        ({"kev": ()}, "--kev"),
        ({"patients": 0}, "--patients 0"),
        ({"slices": 0}, "--slices 0"),
        ({"size": 31}, "--size 31"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(tmp_path, arguments, said):
    with pytest.raises(ConfigError) as error:
        phantom.simulate(tmp_path / "out", **arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_patients_of_two_runs_never_mix(tmp_path):
    phantom.simulate(tmp_path, patients=1, slices=1, size=SIZE, kev=(70,))
    before = content(tmp_path)
    with pytest.raises(DataError, match="70keV"):
        phantom.simulate(tmp_path, patients=2, slices=1, size=SIZE, kev=(110,))
    assert content(tmp_path) == before
    (tmp_path / "file").touch()
    with pytest.raises(DataError):
        phantom.simulate(tmp_path / "file", patients=1, slices=1, size=SIZE)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    whole = phantom._write_patient

    def interrupted(number, *others):
        if number == 2:
            raise KeyboardInterrupt
        whole(number, *others)

    monkeypatch.setattr(phantom, "_write_patient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        phantom.simulate(tmp_path, patients=2, slices=1, size=SIZE)
    assert list(tmp_path.iterdir()) == []
