"""Plants each kind of fault in patients that have none, at random places, and counts what the audit finds.

A fault counts as found when a finding of the expected rule names the faulty image or file. Clean are the same patients
with nothing planted. CT are simulated patients as DICOM; MR is planted in real volumes, where there are some.

    python benchmarks/planted_faults.py [places a kind, default 5] [folder of PATIENT/{T1,T2,FLAIR}.nii.gz ...]
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pydicom
from pydicom.uid import JPEGLosslessSV1, generate_uid

from seresvit.data.audit import Audit, audit
from seresvit.data.phantom import simulate

SOURCE, TARGET, PATIENT, OTHER = "110keV", "70keV", "P001", "P002"
SIZE, SLICES = 64, 8
CLEAN_ROOTS = 10
Plant = Callable[[Path, np.random.Generator], str]


class Kind(NamedTuple):
    """A kind of fault, the rule that must find it, and what plants it below a root and returns the name to be found."""

    name: str
    rule: str
    plant: Plant


def edit(paths: list[Path], change: Callable[[pydicom.Dataset, np.ndarray], np.ndarray | None]) -> None:
    """Each slice read, changed and written; `change` gets header and stored pixels and may return other pixels."""
    for path in paths:
        image = pydicom.dcmread(path)
        stored = change(image, image.pixel_array)
        if stored is not None:
            image.Rows, image.Columns = stored.shape
            image.PixelData = stored.astype(np.uint16).tobytes()
        image.save_as(path)


def slices(root: Path, side: str, patient: str = PATIENT) -> list[Path]:
    return sorted((root / side / patient).glob("*.dcm"))


def one_slice(root: Path, random: np.random.Generator) -> Path:
    return random.choice(slices(root, either(random))[1:-1])


def either(random: np.random.Generator) -> str:
    return str(random.choice([SOURCE, TARGET]))


def header(**attributes: object) -> Plant:
    """The same attributes in every slice of one side."""

    def plant(root: Path, random: np.random.Generator) -> str:
        side = either(random)
        edit(slices(root, side), lambda image, _: [setattr(image, *item) for item in attributes.items()] and None)
        return f"{side}/{PATIENT}"

    return plant


def pixels(change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Plant:
    """Other stored values (Z, Y, X) in one side, under the headers that were there."""

    def plant(root: Path, random: np.random.Generator) -> str:
        side = either(random)
        paths = slices(root, side)
        changed = iter(change(np.stack([pydicom.dcmread(path).pixel_array for path in paths]), random))
        edit(paths, lambda *_: next(changed))
        return f"{side}/{PATIENT}"

    return plant


def shifted(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    angle, distance = random.uniform(0, 2 * np.pi), random.uniform(2.8, 8)
    return np.roll(array, np.rint(distance * np.array([np.sin(angle), np.cos(angle)])).astype(int), (1, 2))


def slices_off(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.roll(array, random.choice([-1, 1]) * int(random.integers(1, max(2, len(array) // 40))), 0)


def missing_slice(root: Path, random: np.random.Generator) -> str:
    gone = one_slice(root, random)
    gone.unlink()
    return gone.name.replace(SOURCE, TARGET)


def extra_slice(root: Path, random: np.random.Generator) -> str:
    path = slices(root, either(random))[-1]
    extra = path.with_name("extra.dcm")
    shutil.copy(path, extra)
    change = random.choice([0.3, 1.0])

    def beyond(image: pydicom.Dataset, _: np.ndarray) -> None:
        x, y, z = image.ImagePositionPatient
        image.ImagePositionPatient, image.SOPInstanceUID = [x, y, z + 15 * change], generate_uid()

    edit([extra], beyond)
    return extra.name


def doubled_slice(root: Path, random: np.random.Generator) -> str:
    path = one_slice(root, random)
    shutil.copy(path, path.with_name("copy.dcm"))
    edit([path.with_name("copy.dcm")], lambda image, _: setattr(image, "SOPInstanceUID", generate_uid()))
    return "copy.dcm"


def swapped(root: Path, random: np.random.Generator) -> str:
    side = either(random)
    (root / side / PATIENT).rename(root / side / "hold")
    (root / side / OTHER).rename(root / side / PATIENT)
    (root / side / "hold").rename(root / side / OTHER)
    return f"{side}/{PATIENT}"


def swapped_anonymous(root: Path, random: np.random.Generator) -> str:
    for side in (SOURCE, TARGET):
        for patient in (PATIENT, OTHER):
            edit(slices(root, side, patient), lambda image, _: setattr(image, "PatientID", "ANON"))
    return swapped(root, random)


def other_size(root: Path, random: np.random.Generator) -> str:
    side = either(random)
    edit(slices(root, side), lambda _, stored: stored[:-8, :-8])
    return f"{side}/{PATIENT}"


def other_origin(root: Path, random: np.random.Generator) -> str:
    side, offset = either(random), random.uniform(1, 30)

    def move(image: pydicom.Dataset, _: np.ndarray) -> None:
        image.ImagePositionPatient = [float(image.ImagePositionPatient[0]) + offset, *image.ImagePositionPatient[1:]]

    edit(slices(root, side), move)
    return f"{side}/{PATIENT}"


def gap_on_both_sides(root: Path, random: np.random.Generator) -> str:
    gone = one_slice(root, random)
    for side in (SOURCE, TARGET):
        (root / side / PATIENT / gone.name).unlink()
    return PATIENT


def tilted(root: Path, random: np.random.Generator) -> str:
    slope = np.tan(np.radians(random.uniform(2, 25)))

    def tilt(image: pydicom.Dataset, _: np.ndarray) -> None:
        x, y, z = map(float, image.ImagePositionPatient)
        image.ImagePositionPatient = [x, round(y + slope * z, 4), z]

    for side in (SOURCE, TARGET):
        edit(slices(root, side), tilt)
    return PATIENT


def turned_slice(root: Path, random: np.random.Generator) -> str:
    path = one_slice(root, random)
    edit([path], lambda image, _: setattr(image, "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]))
    return path.parent.name


def two_series(root: Path, random: np.random.Generator) -> str:
    path = one_slice(root, random)
    edit([path], lambda image, _: setattr(image, "SeriesInstanceUID", generate_uid()))
    return path.name


def not_an_image(modality: str, sop_class: str) -> Plant:
    def plant(root: Path, random: np.random.Generator) -> str:
        path = one_slice(root, random)
        image = pydicom.dcmread(path)
        for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated"):
            delattr(image, keyword)
        image.Modality, image.SOPInstanceUID, image.SeriesInstanceUID = modality, generate_uid(), generate_uid()
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = sop_class
        image.save_as(path.with_name("object.dcm"))
        return "object.dcm"

    return plant


def localizer(root: Path, random: np.random.Generator) -> str:
    path = one_slice(root, random)
    scout = path.with_name("scout.dcm")
    shutil.copy(path, scout)

    def as_scout(image: pydicom.Dataset, _: np.ndarray) -> None:
        image.ImageType, image.ImageOrientationPatient = ["ORIGINAL", "PRIMARY", "LOCALIZER"], [1, 0, 0, 0, 0, -1]
        image.SOPInstanceUID, image.SeriesInstanceUID = generate_uid(), generate_uid()

    edit([scout], as_scout)
    return scout.name


def blank_slice(root: Path, random: np.random.Generator) -> str:
    path = one_slice(root, random)
    edit([path], lambda _, stored: np.full_like(stored, random.integers(0, 2000)))
    return "/".join(path.parts[-3:-1])


def bright_block(root: Path, random: np.random.Generator) -> str:
    y, x = random.integers(0, SIZE // 2, 2)

    def brighten(image: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
        image.BitsStored, image.HighBit = 16, 15
        stored[y : y + SIZE // 4, x : x + SIZE // 4] = 9000
        return stored

    side = either(random)
    edit(slices(root, side), brighten)
    return f"{side}/{PATIENT}"


def infinite_slope(root: Path, random: np.random.Generator) -> str:
    side = either(random)
    edit(slices(root, side), lambda image, _: setattr(image, "RescaleSlope", "1e39"))
    return f"{side}/{PATIENT}"


def wrong_energy(root: Path, random: np.random.Generator) -> str:
    label = f"MonoE {random.choice([40, 60, 90, 150])}keV"
    return header(SeriesDescription=label, ImageComments="", DerivationDescription="")(root, random)


def copied_image(root: Path, random: np.random.Generator) -> str:
    side = either(random)
    from_other = iter([pydicom.dcmread(path).pixel_array for path in slices(root, side, OTHER)])
    edit(slices(root, side), lambda *_: next(from_other))
    return f"{side}/{PATIENT}"


def patient_twice(root: Path, random: np.random.Generator) -> str:
    identity = pydicom.dcmread(slices(root, SOURCE, OTHER)[0]).PatientID
    for side in (SOURCE, TARGET):
        edit(slices(root, side), lambda image, _: setattr(image, "PatientID", identity))
    return PATIENT


def same_on_both_sides(root: Path, random: np.random.Generator) -> str:
    from_target = iter([pydicom.dcmread(path).pixel_array for path in slices(root, TARGET)])
    edit(slices(root, SOURCE), lambda *_: next(from_target))
    return f"{SOURCE}/{PATIENT}"


def cut_short(root: Path, random: np.random.Generator) -> str:
    path = one_slice(root, random)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * random.uniform(0.2, 0.95))])
    return path.name


def undecodable(root: Path, random: np.random.Generator) -> str:
    path = one_slice(root, random)
    image = pydicom.dcmread(path)
    image.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    image.PixelData = pydicom.encaps.encapsulate([random.bytes(len(image.PixelData) // 2)])
    image["PixelData"].is_undefined_length = True
    image.save_as(path)
    return path.name


def mask(change: Callable[[np.ndarray, np.random.Generator], np.ndarray], name: str = "labels") -> Plant:
    def plant(root: Path, random: np.random.Generator) -> str:
        path = root / name / f"{PATIENT}.nii.gz"
        (root / "labels").rename(root / name)
        image = nib.load(root / name / path.name)
        changed = change(np.asarray(image.dataobj).copy(), random)
        nib.save(nib.Nifti1Image(changed, image.affine, image.header), path)
        return f"{name}/{path.name}"

    return plant


def corner(labels_xyz: np.ndarray, random: np.random.Generator) -> np.ndarray:
    kept = np.zeros_like(labels_xyz)
    kept[:6, :6] = 1
    return np.flip(kept, random.choice([0, 1]))


def small_part(labels_xyz: np.ndarray, random: np.random.Generator) -> np.ndarray:
    labels_xyz[random.integers(12, 24) :] = 0
    return labels_xyz


def nifti(change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Plant:
    """Other values (X, Y, Z) in one of the two images of an MR patient."""

    def plant(root: Path, random: np.random.Generator) -> str:
        path = random.choice(sorted((root / PATIENT).glob("*.nii.gz")))
        image = nib.load(path)
        array = np.asarray(image.dataobj, dtype=np.float32)
        nib.save(nib.Nifti1Image(change(array, random), image.affine), path)
        return f"{PATIENT}/{path.name}"

    return plant


def not_finite(value: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    def change(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
        array.flat[random.integers(array.size)] = value
        return array

    return change


def other_affine(root: Path, random: np.random.Generator) -> str:
    path = random.choice(sorted((root / PATIENT).glob("*.nii.gz")))
    image = nib.load(path)
    affine = image.affine @ np.diag([random.uniform(1.05, 2), 1, 1, 1])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)
    return f"{PATIENT}/{path.name}"


def cut_short_nifti(root: Path, random: np.random.Generator) -> str:
    path = random.choice(sorted((root / PATIENT).glob("*.nii.gz")))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * random.uniform(0.1, 0.95))])
    return f"{PATIENT}/{path.name}"


CT_KINDS = [
    Kind("slice missing on one side", "slice on both sides", missing_slice),
    Kind("extra slice on one side", "slice on both sides", extra_slice),
    Kind("two slices at one position", "readable", doubled_slice),
    Kind("swapped patients", "one patient a case", swapped),
    Kind("swapped patients, one PatientID for all", "one patient a case", swapped_anonymous),
    Kind("another study, same frame of reference", "one study a case", header(StudyInstanceUID="1.2.3")),
    Kind("another orientation", "same grid", header(ImageOrientationPatient=[0, 1, 0, 1, 0, 0])),
    Kind("another pixel spacing", "same grid", header(PixelSpacing=[2, 2])),
    Kind("another size", "same grid", other_size),
    Kind("another origin", "same grid", other_origin),
    Kind("another frame of reference", "same grid", header(FrameOfReferenceUID="1.2.3")),
    Kind("left–right flip", "aligned", pixels(lambda array, _: array[:, :, ::-1])),
    Kind("top–bottom flip", "aligned", pixels(lambda array, _: array[:, ::-1])),
    Kind("in-plane shift, 2 to 8 pixels", "aligned", pixels(shifted)),
    Kind("through-plane shift, 1 slice", "aligned", pixels(slices_off)),
    Kind("uneven slice spacing", "even slices", gap_on_both_sides),
    Kind("gantry tilt", "no gantry tilt", tilted),
    Kind("a turned slice in the series", "readable", turned_slice),
    Kind("a second series in the folder", "readable", two_series),
    Kind("RTSTRUCT beside the slices", "only images", not_an_image("RTSTRUCT", "1.2.840.10008.5.1.4.1.1.481.3")),
    Kind("report beside the slices", "only images", not_an_image("SR", "1.2.840.10008.5.1.4.1.1.88.11")),
    Kind("localizer beside the slices", "only images", localizer),
    Kind("constant image", "an image", pixels(lambda array, _: np.full_like(array, 1000))),
    Kind("constant slice", "an image in every slice", blank_slice),
    Kind("infinite values", "readable", infinite_slope),
    Kind("values outside the window", "values in the window", bright_block),
    Kind("MONOCHROME1", "MONOCHROME2", header(PhotometricInterpretation="MONOCHROME1")),
    Kind("CT inverted", "CT in HU", pixels(lambda array, _: 4095 - array)),
    Kind("CT without intercept", "CT in HU", header(RescaleIntercept=0)),
    Kind("CT scaled to 0 to 1", "CT in HU", header(RescaleIntercept=0, RescaleSlope="0.000244140625")),
    Kind("wrong keV folder", "energy as named", wrong_energy),
    Kind("one image under two patients", "an image once", copied_image),
    Kind("one patient under two names", "one split a patient", patient_twice),
    Kind("source is the target", "two images a case", same_on_both_sides),
    Kind("empty mask", "mask on the body", mask(lambda labels, _: labels * 0)),
    Kind("mask in the air", "mask on the body", mask(corner)),
    Kind("mask of half a body", "mask on the body", mask(small_part, "mask")),
    Kind("mask of another size", "mask on the target's grid", mask(lambda labels, _: labels[:-4])),
    Kind("truncated file", "readable", cut_short),
    Kind("undecodable pixels", "readable", undecodable),
]
MR_KINDS = [
    Kind("left–right flip", "aligned", nifti(lambda array, _: array[::-1])),
    Kind("top–bottom flip", "aligned", nifti(lambda array, _: array[:, ::-1])),
    Kind("in-plane shift, 2 to 8 pixels", "aligned", nifti(lambda array, random: shifted(array.T, random).T)),
    Kind("through-plane shift, 1 to 3 slices", "aligned", nifti(lambda array, random: slices_off(array.T, random).T)),
    Kind("NaN", "readable", nifti(not_finite(np.nan))),
    Kind("infinite values", "readable", nifti(not_finite(-np.inf))),
    Kind("another voxel size", "same grid", other_affine),
    Kind("truncated file", "readable", cut_short_nifti),
]


def simulated(root: Path, patients: int) -> list[Path]:
    """Clean roots of two simulated patients each."""
    simulate(root / "all", patients=2 * patients, slices=SLICES, size=SIZE, kev=(70, 110), seed=3)
    roots = []
    for number in range(patients):
        for side in (SOURCE, TARGET):
            for new, old in ((PATIENT, 2 * number + 1), (OTHER, 2 * number + 2)):
                shutil.copytree(root / "all" / side / f"P{old:03d}", root / str(number) / side / new)
        (root / str(number) / "labels").mkdir()
        for new, old in ((PATIENT, 2 * number + 1), (OTHER, 2 * number + 2)):
            shutil.copy(root / "all/labels" / f"P{old:03d}.nii.gz", root / str(number) / "labels" / f"{new}.nii.gz")
        roots.append(root / str(number))
    return roots


def check(root: Path) -> Audit:
    """The audit of a root; two patients in one root are in different splits."""
    if (root / SOURCE).is_dir():
        test = [OTHER] if (root / SOURCE / OTHER).is_dir() else []
        return audit(root, [SOURCE], TARGET, test=test, val_share=0)
    source, target = sorted(path.name.partition(".")[0] for path in next(root.iterdir()).glob("*.nii.gz"))
    return audit(root, [source], target)


def is_found(kind: Kind, clean: Path, random: np.random.Generator) -> bool:
    """True when the audit of a copy of `clean` with the fault planted names the file under the rule."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        alone = kind.plant not in (swapped, swapped_anonymous, copied_image, patient_twice)
        shutil.copytree(clean, root, ignore=shutil.ignore_patterns(f"{OTHER}*") if alone else None)
        name = kind.plant(root, random)
        result = check(root)
        return any(f.rule == kind.rule and name in f"{f.file} {f.found}" for f in result.faults + result.warnings)


def real(folders: list[Path], to: Path) -> list[Path]:
    """Clean roots, each with one pair of the images in the folders."""
    roots = []
    for number, folder in enumerate(folders):
        images = {path.name.partition(".")[0]: path for path in folder.glob("*.nii.gz")}
        names = sorted(images.keys() & {"T1", "T2", "FLAIR"})
        for source in names[:-1]:
            root = to / f"{number}{source}"
            for name in (source, names[-1]):
                (root / PATIENT).mkdir(parents=True, exist_ok=True)
                shutil.copy(images[name], root / PATIENT / f"{name}.nii.gz")
            roots.append(root)
    return roots


def main() -> None:
    places = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        roots = {"CT": simulated(Path(folder) / "ct", CLEAN_ROOTS)}
        roots["MR"] = real([Path(name) for name in sys.argv[2:]], Path(folder) / "mr")
        print("| fault | planted in | found by the rule | found |\n|---|---|---|---|")
        for modality, kinds in (("CT", CT_KINDS), ("MR", MR_KINDS)):
            for kind in kinds if roots[modality] else ():
                clean, random = roots[modality], np.random.default_rng(len(kind.name))
                found = [is_found(kind, clean[place % len(clean)], random) for place in range(places)]
                print(f"| {kind.name} | {modality} | {kind.rule} | {sum(found)}/{places} |", flush=True)
        results = {modality: [check(root) for root in roots[modality]] for modality in roots}
        for modality, audits in results.items():
            cases = sum(len(result.cases) for result in audits)
            alarms = [finding for result in audits for finding in result.faults + result.warnings]
            print(f"{modality}: {cases} clean cases, {len(alarms)} findings")
            print(*alarms, sep="\n")


if __name__ == "__main__":
    main()
