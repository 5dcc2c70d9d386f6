"""Simulated dual-energy chest CT: patients whose true image at every energy is known, for demos and tests.

The chain is the physical one: anatomy in millimetres → volume fractions of tissues of published composition →
attenuation at an energy → Hounsfield units → blur and noise → DICOM. A patient is one canonical chest of solids,
seen through a random smooth warp, with vessels, iodine, fat and bone density of its own.

Sources. Compositions: ICRU Report 44 (1989) as tabulated by NIST (Hubbell & Seltzer, NISTIR 5632, table 2); spongiosa,
red marrow, cartilage and liver: ICRU Report 46 (1992) after Woodard & White, Br J Radiol 59 (1986) 1209. Attenuation:
Elam, Ravel, Sieber, Radiat Phys Chem 63 (2002) 121, total cross section, as in xraydb. HU: DICOM PS3.3 C.11.1.1.2.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import xraydb
from numpy.typing import ArrayLike
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.ndimage import gaussian_filter

from seresvit.config import ConfigError
from seresvit.data.volume import DataError, written_whole

# Material → density in g/cm³, elements, their mass in parts per thousand.
MATERIALS: dict[str, tuple[float, str, tuple[float, ...]]] = {
    "air": (0.001205, "C N O Ar", (0.124, 755.268, 231.781, 12.827)),
    "water": (1.0, "H O", (111.894, 888.106)),
    "adipose": (0.95, "H C N O Na S Cl", (114, 598, 7, 278, 1, 1, 1)),
    "skin": (1.09, "H C N O Na P S Cl K", (100, 204, 42, 645, 2, 1, 2, 3, 1)),
    "muscle": (1.05, "H C N O Na P S Cl K", (102, 143, 34, 710, 1, 2, 3, 1, 4)),
    "blood": (1.06, "H C N O Na P S Cl K Fe", (102, 110, 33, 745, 1, 1, 2, 3, 2, 1)),
    "liver": (1.06, "H C N O Na P S Cl K", (102, 139, 30, 716, 2, 3, 3, 2, 3)),
    "cartilage": (1.10, "H C N O Na P S Cl", (96, 99, 22, 744, 5, 22, 9, 3)),
    "lung tissue": (1.05, "H C N O Na P S Cl K", (103, 105, 31, 749, 2, 2, 3, 3, 2)),
    "red marrow": (1.03, "H C N O P S Cl K Fe", (105, 414, 34, 439, 1, 2, 2, 2, 1)),
    "spongiosa": (1.18, "H C N O Na Mg P S Cl K Ca Fe", (85, 404, 28, 367, 1, 1, 34, 2, 2, 1, 74, 1)),
    "cortical bone": (1.92, "H C N O Na Mg P S Ca", (34, 155, 42, 435, 1, 2, 103, 3, 225)),
}

# Exclusive: iodinated blood is "contrast" and nothing else. "body" is what no other label holds: skin, fat, airways.
LABELS = {"body": 1, "soft": 2, "lung": 3, "bone": 4, "contrast": 5, "embolus": 6}

# What a point of the drawing can hold: label of a voxel that is mostly made of it (0: outside), and main material.
_SUBSTANCES = {
    "outside": (0, "air"), "skin": (1, "skin"), "fat": (1, "adipose"), "airway": (1, "air"), "muscle": (2, "muscle"),
    "myocardium": (2, "muscle"), "cartilage": (2, "cartilage"), "liver": (2, "liver"), "lung": (3, "lung tissue"),
    "cortex": (4, "cortical bone"), "trabeculae": (4, "spongiosa"), "right blood": (5, "blood"),
    "left blood": (5, "blood"), "clot": (6, "blood"),
}  # fmt: skip
_INDEX = {name: i for i, name in enumerate(_SUBSTANCES)}

FIELD_OF_VIEW_MM = 380.0
COVERAGE_MM = 120.0  # from the aortic arch to the dome of the liver
MAX_THICKNESS_MM = 5.0
SUBSAMPLES = 3  # points a voxel edge at which the anatomy is drawn; their shares are the volume fractions
BLUR_MM = 0.6  # standard deviation of the scanner's point spread
NOISE_SD_HU = 9.0
NOISE_PER_IODINE = 0.3
NOISE_CORRELATION_VOXELS = 0.7


def mu_per_cm(material: str, energy_kev: ArrayLike) -> np.ndarray:
    """Linear attenuation coefficient of a material of MATERIALS in 1/cm at one energy or an array of them, in keV.

    The mixture rule: density × sum of mass fraction × mass attenuation coefficient, coherent scatter included.
    """
    energy_ev = np.asarray(energy_kev, dtype=np.float64) * 1000
    density_g_cm3, elements, per_mille = MATERIALS[material]
    parts = [m / 1000 * xraydb.mu_elam(e, energy_ev) for e, m in zip(elements.split(), per_mille, strict=True)]
    return density_g_cm3 * np.sum(parts, axis=0)


def hu(material: str, energy_kev: ArrayLike) -> np.ndarray:
    """HU of a material of MATERIALS at one energy or an array of them, in keV: 1000 (μ - μ_water) / μ_water."""
    water = mu_per_cm("water", energy_kev)
    return 1000 * (mu_per_cm(material, energy_kev) - water) / water


def iodine_hu_per_mg_ml(energy_kev: ArrayLike) -> np.ndarray:
    """What 1 mg of iodine in 1 ml adds to the HU of its solvent, whose volume it leaves as it was."""
    iodine_per_cm = 1e-3 * xraydb.mu_elam("I", np.asarray(energy_kev, dtype=np.float64) * 1000)
    return 1000 * iodine_per_cm / mu_per_cm("water", energy_kev)


def _noise_weight(energy_kev: ArrayLike) -> np.ndarray:
    """Weight in HU of the second of two independent unit noises a and b; that of a is NOISE_SD_HU.

    A virtual monoenergetic image is W + k(E) I, a water and an iodine image weighted by the HU of iodine (Yu, Leng,
    McCollough, AJR 199 (2012) S9). Their noise is anticorrelated and cancels best at one energy, here 100 keV, so that
    the sum is a + (k(E) - k(100 keV)) b, scaled. Its standard deviation: 9 HU at 110 keV, 10 at 70, 12 at 60, 23 at 40.
    """
    return NOISE_PER_IODINE * (iodine_hu_per_mg_ml(energy_kev) - iodine_hu_per_mg_ml(100.0))


def simulate(
    out: Path, *, patients: int = 6, slices: int = 8, size: int = 128, kev: Sequence[float] = (70, 110), seed: int = 0
) -> None:
    """Write simulated patients: OUT/70keV/P001/P001_0001.dcm ..., OUT/labels/P001.nii.gz and OUT/labels/labels.json.

    Each series has `slices` images of `size` × `size` pixels over the same 380 mm × 120 mm of chest, in HU; slice 1 is
    the lowest. Every other patient has pulmonary emboli. Label images are uint8 with the values of LABELS, 0 outside
    the patient, on the grid of the series. The same arguments give the same bytes; a patient does not depend on how
    many there are, nor an image on which other energies are written. Nothing appears in OUT before all of it is done.

    Raises ConfigError: an argument out of range; DataError: OUT already holds patients, or cannot be written.
    """
    out = Path(out)
    for name, value, least in (("patients", patients, 1), ("slices", slices, 1), ("size", size, 32), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"--{name} {value}: must be at least {least}")
    if not kev or not all(40 <= energy <= 190 for energy in kev) or len(set(kev)) < len(kev):
        found = ",".join(f"{energy:g}" for energy in kev)
        raise ConfigError(f"--kev {found}: expected different energies between 40 and 190 keV, such as 70,110")
    for held in (*sorted(out.glob("*keV")), out / "labels"):
        if held.exists():
            raise DataError(f"{held}: is there already, and patients of two runs must not mix; choose a new folder")
    material_hu = np.array([*(hu(m, kev) for m in MATERIALS), iodine_hu_per_mg_ml(kev)])
    with ExitStack() as written:
        series = [
            (energy, written.enter_context(written_whole(out / f"{energy:g}keV")), *physics)
            for energy, *physics in zip(kev, material_hu.T, _noise_weight(kev), strict=True)
        ]
        labels_folder = written.enter_context(written_whole(out / "labels"))
        labels_folder.mkdir()
        (labels_folder / "labels.json").write_text(json.dumps(LABELS, indent=2) + "\n", encoding="utf-8")
        for number in range(1, patients + 1):
            _write_patient(number, slices, size, seed, series, labels_folder)


def _write_patient(number: int, slices: int, size: int, seed: int, series: list[tuple], labels_folder: Path) -> None:
    # series: energy, folder, HU of each material and of 1 mg/ml of iodine, weight of the second noise
    patient = _draw_patient(np.random.default_rng([seed, number, 0]), embolism=(number + seed) % 2 == 0)
    name = f"P{number:03d}"
    study = f"seresvit phantom {seed} {slices} {size} {name}"
    spacing_mm, step_mm = round(FIELD_OF_VIEW_MM / size, 6), round(COVERAGE_MM / slices, 6)
    affine = np.diag([spacing_mm, spacing_mm, step_mm, 1.0])
    affine[:3, 3] = [round(-step * (n - 1) / 2, 6) for step, n in ((spacing_mm, size),) * 2 + ((step_mm, slices),)]
    labels = np.zeros((slices, size, size), np.uint8)
    for index in range(slices):
        position_mm = [round(float(p), 6) for p in affine[:3] @ (0, 0, index, 1)]
        rng = np.random.default_rng([seed, number, 1 + index])
        plane = _draw_plane(patient, position_mm[2], size * SUBSAMPLES, spacing_mm / SUBSAMPLES)
        mixture, labels[index] = _mix(plane, patient.mixtures, rng)
        noise = [_unit_noise(rng, size, NOISE_CORRELATION_VOXELS) for _ in range(2)]
        for energy, folder, material_hu, noise_weight in series:
            array_hu = gaussian_filter(np.tensordot(material_hu, mixture, 1), BLUR_MM / spacing_mm)
            array_hu += NOISE_SD_HU * noise[0] + noise_weight * noise[1]
            image = _dicom(array_hu, name, energy, index + 1, study)
            image.PixelSpacing, image.SliceThickness = [spacing_mm, spacing_mm], min(step_mm, MAX_THICKNESS_MM)
            image.ImagePositionPatient, image.SliceLocation = position_mm, position_mm[2]
            (folder / name).mkdir(parents=True, exist_ok=True)
            pydicom.dcmwrite(folder / name / f"{name}_{index + 1:04d}.dcm", image, enforce_file_format=True)
    nifti = nib.Nifti1Image(labels.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    nifti.header.set_xyzt_units("mm")
    nib.save(nifti, labels_folder / f"{name}.nii.gz")


# The canonical chest, in mm: x to the left, y to the back, z to the head. Polylines of (x, y, z, radius).
_TUBES: dict[str, list[list[tuple[float, ...]]]] = {
    "left": [
        [(6, -12, -8, 13), (-10, -24, 10, 14.5), (-17, -28, 30, 15), (-12, -24, 48, 14), (4, -4, 57, 13),
         (20, 18, 55, 12.5), (28, 33, 42, 12), (29, 37, 20, 12), (26, 39, -30, 11.5), (20, 40, -85, 11)],
        [(-14, 12, -8, 8), (-34, 8, -2, 7), (-52, 4, 2, 5)],
        [(-14, 18, -18, 8), (-34, 22, -24, 7), (-52, 26, -32, 5)],
        [(18, 8, -6, 8), (36, 2, 0, 7), (54, -4, 6, 5)],
        [(18, 18, -16, 8), (36, 23, -24, 7), (52, 28, -34, 5)],
    ],
    "artery": [
        [(14, -54, -16, 12), (20, -46, 6, 13.5), (22, -28, 21, 13.5), (40, -4, 25, 11.5), (57, 10, 23, 9.5)],
        [(22, -28, 20, 12), (6, -6, 17, 12), (-14, 3, 15, 11.5), (-34, 4, 13, 10.5), (-54, 5, 9, 9)],
        [(57, 10, 23, 9), (60, 24, 2, 7.5), (60, 31, -34, 4.5)],
        [(52, 2, 25, 6), (56, -8, 42, 4.5), (58, -12, 65, 3)],
        [(-54, 5, 9, 8.5), (-58, 20, -8, 7), (-60, 30, -32, 4.5)],
        [(-48, 4, 12, 6.5), (-54, -6, 34, 4.5), (-56, -10, 62, 3)],
    ],
    "cava": [[(-24, -32, 75, 8), (-33, -26, 32, 8), (-34, -20, 0, 9), (-30, -16, -22, 10)]],
    "airway": [
        [(0, 8, 78, 9), (0, 15, 36, 9)],
        [(0, 15, 36, 7.5), (-28, 21, 23, 7), (-52, 17, 8, 4.5), (-58, 26, -20, 3)],
        [(0, 15, 36, 7), (32, 25, 16, 6.5), (52, 20, 6, 4.5), (56, 30, -20, 3)],
    ],
    "oesophagus": [[(5, 33, 78, 6), (7, 37, 0, 6), (12, 31, -85, 7)]],
}  # fmt: skip

# Arch of one vertebra, z from its middle: spinous process; on both sides pedicle, joints, lamina, transverse process.
_ARCH = np.array([
    [(0, 99, -3, 3.5), (0, 106, -20, 3)],
    [(-14, 72, 4, 4.5), (-14, 88, 2, 4.5)], [(-14, 88, 6, 4.2), (-14, 90, -10, 4.2)],
    [(-14, 90, -1, 4), (0, 99, -4, 4)], [(-14, 88, 3, 4.5), (-35, 97, 5, 4)],
    [(14, 72, 4, 4.5), (14, 88, 2, 4.5)], [(14, 88, 6, 4.2), (14, 90, -10, 4.2)],
    [(14, 90, -1, 4), (0, 99, -4, 4)], [(14, 88, 3, 4.5), (35, 97, 5, 4)],
])  # fmt: skip

# Chambers in the frame of the heart: u to the apex, v to the left and back. Centre u, v, z; semi-axes; wall in mm.
_CHAMBERS = [
    ("right blood", (14, -24, -42), (40, 14, 38), 4), ("right blood", (-30, -22, -36), (23, 20, 30), 3),
    ("left blood", (20, 15, -45), (34, 17, 32), 10), ("left blood", (-26, 32, -14), (22, 26, 19), 3),
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Patient:
    scale_xy: np.ndarray  # size of this body against the canonical one
    waves: np.ndarray  # (2, 4, 5): for x and y, four sine waves (kx, ky, kz, phase, amplitude in mm)
    fat_mm: float
    rib_offset_mm: np.ndarray  # right and left side
    vertebra_offset_mm: float
    heart_turn_deg: float
    mixtures: np.ndarray  # (substance, material + 1): volume fractions, and in the last column iodine in mg/ml
    tubes: dict[str, np.ndarray]  # name → (N, 2, 4): both ends of each segment, as (x, y, z, radius)


def _draw_patient(rng: np.random.Generator, embolism: bool) -> _Patient:
    tubes = {}
    for name, lines in _TUBES.items():
        moved = [np.array(line) + rng.normal(0, (1.3, 1.3, 1.3, 0.3), (len(line), 4)) for line in lines]
        tubes[name] = np.concatenate([np.stack([line[:-1], line[1:]], axis=1) for line in moved])
    points = rng.uniform((-135, -90, -85), (135, 90, 85), (20_000, 3))
    in_lung = points[(_beyond_chest(*points.T) < -4) & (_beyond_mediastinum(*points[:, :2].T) > 2)]
    for name, trunk, count in (("artery tree", "artery", 2000), ("vein tree", "left", 1600)):
        points, in_lung = in_lung[:count], in_lung[count:]
        tubes[name] = np.concatenate([_tree(rng, tubes[trunk], points[points[:, 0] * side > 0]) for side in (-1, 1)])
    tubes["clot"] = _clots(rng, tubes["artery"]) if embolism else np.zeros((0, 2, 4))

    k = 2 * np.pi / np.array([160, 160, 200])
    waves = rng.uniform((*-k, 0, 0.3), (*k, 2 * np.pi, 1.8), (2, 4, 5))
    return _Patient(
        scale_xy=rng.uniform((0.90, 0.90), (1.0, 1.08)),
        waves=waves,
        fat_mm=rng.uniform(6, 22),
        rib_offset_mm=rng.uniform(0, 26) + rng.uniform(-2, 2, 2),
        vertebra_offset_mm=rng.uniform(0, 24),
        heart_turn_deg=rng.uniform(32, 48),
        mixtures=_mixtures(rng),
        tubes=tubes,
    )


def _mixtures(rng: np.random.Generator) -> np.ndarray:
    """Volume fractions and, as last column, iodine of every substance in this patient.

    Iodinated blood and trabecular bone are meant to share their HU at high energy: 5 to 15 mg/ml at 110 keV look like
    50 to 95 % spongiosa, and are up to 200 HU apart at 70 keV. No curve from pixel to pixel can tell them apart.
    """
    fractions = np.array([[float(m == main) for m in MATERIALS] for _, main in _SUBSTANCES.values()])
    _exchange(fractions[_INDEX["lung"]], "lung tissue", "air", rng.uniform(0.66, 0.78))
    _exchange(fractions[_INDEX["trabeculae"]], "spongiosa", "red marrow", rng.uniform(0.05, 0.5))
    right = rng.uniform(5, 15)
    left = np.clip(right * rng.uniform(0.5, 1.1), 2, 15)
    iodine = {"right blood": right, "left blood": left, "myocardium": 0.12 * left, "liver": 0.08 * left}
    return np.column_stack([fractions, [iodine.get(s, 0.0) for s in _SUBSTANCES]])


def _tree(rng: np.random.Generator, trunk: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Segments (N, 2, 4) of a vascular tree from the trunk's nodes to every target point in the lung.

    Each target joins the node that makes both its own twig and its way to the heart short (Cuntz et al., PLoS Comput
    Biol 6 (2010) e1000877); radii follow from the number of twigs fed, by Murray's law with exponent 2.7.
    """
    roots = trunk.reshape(-1, 4)[:, :3]
    roots = roots[roots[:, 0] * np.sign(targets[0, 0]) > 45]
    targets = targets[np.argsort(np.linalg.norm(targets[:, None] - roots, axis=2).min(axis=1))]
    nodes = np.concatenate([roots, targets])
    way_mm, parent = np.zeros(len(nodes)), np.zeros(len(nodes), dtype=int)
    for i in range(len(roots), len(nodes)):
        twig_mm = np.linalg.norm(nodes[:i] - nodes[i], axis=1)
        parent[i] = np.argmin(twig_mm + 0.4 * way_mm[:i])
        way_mm[i] = way_mm[parent[i]] + twig_mm[parent[i]]
    fed = np.ones(len(nodes))
    for i in range(len(nodes) - 1, len(roots) - 1, -1):
        fed[parent[i]] += fed[i]
    radius_mm = np.minimum(rng.uniform(0.55, 0.75) * fed ** (1 / 2.7), 4.0)
    ends = np.column_stack([nodes, radius_mm])[len(roots) :]
    starts = np.column_stack([nodes[parent[len(roots) :]], ends[:, 3]])
    return np.stack([starts, ends], axis=1)


def _clots(rng: np.random.Generator, arteries: np.ndarray) -> np.ndarray:
    """Emboli in two to four of the large pulmonary arteries, narrower than the lumen, so that contrast flows past."""
    large = arteries[(arteries[:, :, 3].min(axis=1) > 4.5) & (np.abs(arteries[:, :, 0]).max(axis=1) > 30)]
    clots = large[rng.choice(len(large), size=rng.integers(2, 5), replace=False)]
    clots[:, :, :3] += rng.uniform(-0.25, 0.25, (len(clots), 1, 3)) * clots[:, :, 3].min(axis=1)[:, None, None]
    clots[:, :, 3] *= rng.uniform(0.55, 0.8, (len(clots), 1))
    return clots


@dataclass(frozen=True, eq=False)
class _Plane:  # one slice: the solids cut at z, painted back to front
    x: np.ndarray  # canonical millimetres of every point, (n, n)
    y: np.ndarray
    z: float
    substance: np.ndarray  # (n, n) uint8, an index into _SUBSTANCES
    points_per_mm: np.ndarray  # along x and y

    def paint(self, where: np.ndarray, name: str) -> None:
        self.substance[where] = _INDEX[name]

    def tubes(self, segments: np.ndarray, name: str, grow_mm: float = 0.0, within: str | None = None) -> None:
        """Fill round tubes, only where there is `within`, if given. The work is kept to a box around each segment."""
        n = len(self.x)
        reach = segments[:, :, 3].max(axis=1) + grow_mm
        cut = (segments[:, :, 2].min(axis=1) - reach < self.z) & (segments[:, :, 2].max(axis=1) + reach > self.z)
        margin = reach[cut, None] + 8  # the warp moves no point by more than 7.2 mm
        low = (segments[cut, :, :2].min(axis=1) - margin) * self.points_per_mm + n / 2
        high = (segments[cut, :, :2].max(axis=1) + margin) * self.points_per_mm + n / 2
        boxes = np.clip(np.concatenate([low, high], axis=1), 0, n).astype(int)
        for (start, end), (x0, y0, x1, y1) in zip(segments[cut], boxes, strict=True):
            box = slice(y0, y1), slice(x0, x1)
            way = (end - start).astype(np.float32)
            dx, dy, dz = self.x[box] - np.float32(start[0]), self.y[box] - np.float32(start[1]), self.z - start[2]
            along = np.clip((dx * way[0] + dy * way[1] + dz * way[2]) / (way[:3] @ way[:3]), 0, 1)
            radius = start[3] + along * way[3] + grow_mm
            away2 = (dx - along * way[0]) ** 2 + (dy - along * way[1]) ** 2 + (dz - along * way[2]) ** 2
            inside = away2 < np.maximum(radius, 0) ** 2
            if within is not None:
                inside &= self.substance[box] == _INDEX[within]
            self.substance[box][inside] = _INDEX[name]


def _beyond(x: np.ndarray, y: np.ndarray, a: ArrayLike, b: ArrayLike, power: float) -> np.ndarray:
    """Millimetres along the radius beyond the superellipse |x/a|^power + |y/b|^power = 1; negative inside."""
    rho = np.maximum((np.abs(x / a) ** power + np.abs(y / b) ** power) ** (1 / power), 1e-3)
    return np.hypot(x, y) * (1 - 1 / rho)


def _beyond_chest(x: np.ndarray, y: np.ndarray, z: ArrayLike) -> np.ndarray:
    """Millimetres beyond the pleura of the chest wall, which narrows towards the head."""
    narrowing = np.maximum(np.asarray(z, dtype=np.float32) + 10, 0) ** 2
    return _beyond(x, y + 4, 130 - 0.0028 * narrowing, 84 - 0.001 * narrowing, 2.3)


def _beyond_mediastinum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    width = 8 + 30 * np.exp(-(((y + 8) / 46) ** 2)) + 20 * np.exp(-(((y - 68) / 24) ** 2))
    return np.abs(x - 2) - width


def _ellipsoid(plane: _Plane, x: np.ndarray, y: np.ndarray, z_mm: float, semi: Sequence[float]) -> np.ndarray:
    return (x / semi[0]) ** 2 + (y / semi[1]) ** 2 + ((plane.z - z_mm) / semi[2]) ** 2 < 1


def _draw_plane(patient: _Patient, z_mm: float, points: int, spacing_mm: float) -> _Plane:
    """The slice at z_mm as a drawing of `points` × `points`, `spacing_mm` apart."""
    axis = ((np.arange(points) - (points - 1) / 2) * spacing_mm).astype(np.float32)
    x = np.broadcast_to(axis / np.float32(patient.scale_xy[0]), (points, points))
    y = np.broadcast_to(axis[:, None] / np.float32(patient.scale_xy[1]), (points, points))
    shift = [
        sum(amplitude * np.sin(kx * x + ky * y + (kz * z_mm + phase)) for kx, ky, kz, phase, amplitude in waves)
        for waves in patient.waves.astype(np.float32)
    ]
    blank = np.zeros((points, points), np.uint8)
    plane = _Plane(x + shift[0], y + shift[1], z_mm, blank, patient.scale_xy / spacing_mm)
    _paint_wall(plane, patient)
    _paint_spine(plane, patient)
    _paint_heart_and_vessels(plane, patient)
    return plane


def _paint_wall(plane: _Plane, patient: _Patient) -> None:
    x, y, z = plane.x, plane.y, plane.z
    beyond_chest = _beyond_chest(x, y, z)
    # Angle from the back (0) round either side to the front (1).
    turn = np.arctan2(np.abs(x), y + 4) / np.float32(np.pi)
    beyond_muscle = _beyond(x, y - 4, 152, 108, 2.5) + np.where(y > 0, 4, 0) * np.exp(-((x / 11) ** 2))
    beyond_muscle -= 5 * np.exp(-(((np.abs(x) - 70) / 32) ** 2)) * (y < 0) / (1 + np.exp(-z / 20))
    fat_mm = patient.fat_mm * (1 + 0.35 * np.cos(np.pi * (turn - 0.85) * 2))
    plane.paint(beyond_muscle < fat_mm, "skin")
    plane.paint(beyond_muscle < fat_mm - 2, "fat")
    plane.paint(beyond_muscle < 0, "muscle")
    # Planes of fat between the layers of muscle outside the ribs.
    layer = np.abs(np.sin(beyond_chest / 7.5 + 1.1 * np.sin(9 * turn + z / 25) + patient.rib_offset_mm[0]))
    plane.paint((beyond_chest > 11) & (beyond_muscle < 0) & (layer < 0.16), "fat")

    plane.paint(beyond_chest < 0, "lung")
    for cx, cz, semi in ((-62, -112, (78, 76, 70)), (72, -128, (62, 66, 68))):
        plane.paint(_ellipsoid(plane, x - cx, y - 4, cz, semi) & (beyond_chest < -1), "liver")
    plane.paint((beyond_chest < 0) & (_beyond_mediastinum(x, y) < 0), "fat")

    # Ribs slope down from back to front, so that a slice cuts a few of them on each side, each at a slant.
    rib_mm = np.where(x < 0, *patient.rib_offset_mm) - 95 * np.minimum(turn, 0.8) ** 1.2
    from_rib_mm = (z - rib_mm + 13) % 26 - 13
    for shell_mm, bone in ((0.0, "cortex"), (1.3, "trabeculae")):
        rib = ((beyond_chest - 5.5) / (4.2 - shell_mm)) ** 2 + (from_rib_mm / (6.8 - shell_mm)) ** 2 < 1
        plane.paint(rib & (turn > 0.09) & (turn < 0.8), bone)
        plane.paint(rib & (turn >= 0.8) & (np.abs(x) > 20), "cartilage")
        sternum = (x / (17 - shell_mm)) ** 2 + ((beyond_chest - 7) / (6 - shell_mm)) ** 2 < 1
        plane.paint(sternum & (y < 0), bone if z > -45 else "cartilage")
        blade = (np.abs(turn - 0.30) / np.clip(0.0016 * (z + 25), 1e-3, 0.1)) ** 6
        blade = blade + ((beyond_chest - 17 - 25 * (turn - 0.25)) / (3.6 - shell_mm)) ** 2
        plane.paint((blade < 1) & (beyond_muscle < -2), bone)


def _paint_spine(plane: _Plane, patient: _Patient) -> None:
    """Thoracic vertebrae every 24 mm: body, disc, arch round the canal, transverse and spinous processes."""
    x, y = plane.x, plane.y
    plane.paint((x / 27) ** 2 + ((y - 66) / 24) ** 2 < 1, "fat")
    height = (plane.z - patient.vertebra_offset_mm + 12) % 24 - 12
    arches = np.concatenate([_ARCH + np.array([0, 0, plane.z - height + up, 0]) for up in (-24, 0, 24)])
    for shell_mm, bone in ((0.0, "cortex"), (1.4, "trabeculae")):
        body = np.abs(x / (17.5 - shell_mm)) ** 2.4 + np.abs((y - 62) / (14.5 - shell_mm)) ** 2.4 < 1
        plane.paint(body, bone if abs(height) < 9.8 else "cartilage")
        plane.tubes(arches, bone, grow_mm=-shell_mm)
    plane.paint((x / 9.5) ** 2 + ((y - 86) / 8.5) ** 2 < 1, "fat")
    plane.paint((x / 6.5) ** 2 + ((y - 86) / 5.5) ** 2 < 1, "muscle")


def _paint_heart_and_vessels(plane: _Plane, patient: _Patient) -> None:
    tubes, turn = patient.tubes, np.deg2rad(patient.heart_turn_deg)
    great = ("left", "artery", "cava", "airway", "oesophagus")
    for name in great:
        plane.tubes(tubes[name], "fat", grow_mm=1.8, within="lung")
    from_x, from_y = plane.x - 18, plane.y + 28
    u, v = from_x * np.cos(turn) - from_y * np.sin(turn), from_x * np.sin(turn) + from_y * np.cos(turn)
    in_chest = _beyond_chest(plane.x, plane.y, plane.z) < -3
    plane.paint(in_chest & _ellipsoid(plane, u, v, -38, (66, 50, 50)), "fat")
    for name in great:
        plane.tubes(tubes[name], "muscle", grow_mm=1.0)
    for wall in (True, False):
        for blood, (cu, cv, cz), semi, wall_mm in _CHAMBERS:
            solid = _ellipsoid(plane, u - cu, v - cv, cz, [s + wall_mm * wall for s in semi])
            plane.paint(in_chest & solid, "myocardium" if wall else blood)
    for cu, cv in ((16, 6), (22, 24)):  # papillary muscles of the left ventricle
        plane.paint(_ellipsoid(plane, u - cu, v - cv, -52, (7, 3.5, 18)), "myocardium")
    for name, blood in (("cava", "right blood"), ("artery", "right blood"), ("left", "left blood")):
        plane.tubes(tubes[name], blood)
    plane.tubes(tubes["airway"], "airway")
    plane.tubes(tubes["oesophagus"], "airway", grow_mm=-4.5)
    plane.tubes(tubes["artery tree"], "right blood", within="lung")
    plane.tubes(tubes["vein tree"], "left blood", within="lung")
    plane.tubes(tubes["clot"], "clot", within="right blood")


def _mix(plane: _Plane, mixtures: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One slice: volume fractions and, last, iodine in mg/ml, (material + 1, size, size); labels (size, size)."""
    size = len(plane.substance) // SUBSAMPLES
    points = plane.substance.reshape(size, SUBSAMPLES, size, SUBSAMPLES)
    shares = np.array([(points == index).mean(axis=(1, 3), dtype=np.float32) for index in _INDEX.values()])
    mixture = np.tensordot(mixtures.T, shares, 1)
    label_of = np.array([label for label, _ in _SUBSTANCES.values()])
    labels = np.argmax([shares[label_of == label].sum(axis=0) for label in (0, *LABELS.values())], axis=0)

    texture = _unit_noise(rng, size, 4.0 / FIELD_OF_VIEW_MM * size)
    to_back = np.linspace(-0.5, 0.5, size)[:, None]  # the lung that lies lowest is the densest
    _exchange(mixture, "lung tissue", "air", 0.08 * texture - to_back)
    _exchange(mixture, "spongiosa", "red marrow", 0.10 * texture)
    _exchange(mixture, "muscle", "adipose", 0.05 * np.abs(texture))
    return mixture, labels.astype(np.uint8)


def _exchange(fractions: np.ndarray, giver: str, taker: str, share: np.ndarray | float) -> None:
    """Move a share of one material's volume to another, in place; negative shares go the other way."""
    g, t = list(MATERIALS).index(giver), list(MATERIALS).index(taker)
    moved = np.clip(share * fractions[g], -fractions[t], fractions[g])
    fractions[g] -= moved
    fractions[t] += moved


def _unit_noise(rng: np.random.Generator, size: int, correlation_voxels: float) -> np.ndarray:
    """Gaussian noise (size, size) of unit standard deviation, blurred so that neighbours are correlated."""
    noise = gaussian_filter(rng.standard_normal((size, size)), correlation_voxels, mode="wrap")
    return noise / noise.std()


def _dicom(array_hu: np.ndarray, name: str, energy_kev: float, number: int, study: str) -> Dataset:
    """A CT Image Storage object (PS3.3 A.3), still without its place: 12 bits of HU + 1024, clipped to -1024..3071.

    The energy stands where scanners write it, in the descriptions: KVP is that of the tube.
    """
    label, series = f"MonoE {energy_kev:g}keV[HU]", [study, f"{energy_kev:g}keV"]
    stored = np.clip(np.rint(array_hu) + 1024, 0, 4095).astype("<u2")
    attributes = {
        "SOPClassUID": CTImageStorage, "SOPInstanceUID": generate_uid(entropy_srcs=[*series, str(number)]),
        "SeriesInstanceUID": generate_uid(entropy_srcs=[*series, "series"]),
        "StudyInstanceUID": generate_uid(entropy_srcs=[study, "study"]),
        "FrameOfReferenceUID": generate_uid(entropy_srcs=[study, "frame"]),
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL", "VMI", "SIMULATED"], "Modality": "CT", "KVP": 120,
        "PatientName": f"Simulated^{name}", "PatientID": name, "PatientBirthDate": "", "PatientSex": "O",
        "PatientComments": "SIMULATED", "StudyDescription": "SIMULATED chest, no real patient", "StudyID": "1",
        "StudyDate": "", "StudyTime": "", "AccessionNumber": "", "ReferringPhysicianName": "",
        "SeriesDescription": label, "ImageComments": f"{label} {energy_kev:g}keV SIMULATED",
        "DerivationDescription": "SIMULATED virtual monoenergetic image of a numerical phantom",
        "SeriesNumber": round(energy_kev), "AcquisitionNumber": 1, "InstanceNumber": number,
        "Manufacturer": "SE-ResViT", "ManufacturerModelName": "simulated dual-energy CT", "BodyPartExamined": "CHEST",
        "PatientPosition": "HFS", "PositionReferenceIndicator": "", "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": len(stored), "Columns": len(stored),
        "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0, "PixelData": stored.tobytes(),
        "RescaleIntercept": -1024, "RescaleSlope": 1, "RescaleType": "HU", "WindowCenter": 60, "WindowWidth": 360,
    }  # fmt: skip
    image = Dataset()
    for keyword, value in attributes.items():
        setattr(image, keyword, value)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return image
