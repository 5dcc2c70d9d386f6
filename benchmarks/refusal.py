"""Plants mistakes in the sources of simulated patients and measures how well `familiarity` tells them apart.

    seresvit simulate new --patients 20 --slices 8 --size 128 --kev 50,70,110,115,140 --seed 11
    python benchmarks/refusal.py CHECKPOINT new [CT folder] [MR folder]

CHECKPOINT is of a training on 110 or 115 keV that has not seen these patients (`configs/tiny.yaml`, the demo's). AUROC
is of the distance, planted images against the same patients' own; "warned" is the share beyond the limit, which for
clean images is the share of false alarms. With folders of PNG slices, real CT and MR of the same heads, the measure is
also fitted on all CT patients but one and tried on that one's CT and MR, for each in turn, without a network's gates.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import zoom

from seresvit.data import read_volume
from seresvit.model import familiarity
from seresvit.model.fusion import record_gates
from seresvit.synthesis.predictor import Predictor

Mistake = Callable[[dict[str, np.ndarray], np.random.Generator], np.ndarray]
SOURCE = "110keV"
# T1-like grey values by HU: air and bone dark, fat bright, fluid and muscle between.
MR_LIKE = ([-1024, -900, -100, 0, 60, 300, 1000], [0, 20, 900, 300, 350, 100, 20])


def energy(name: str) -> Mistake:
    return lambda of, rng: of[name]


def zoomed(factor: float) -> Mistake:
    """The centre magnified, or the whole made small in air, as when pixels have another size than trained."""

    def change(of: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
        array = of[SOURCE]
        size, larger = array.shape[1], zoom(array, (1, factor, factor), order=1)
        if (new := larger.shape[1]) >= size:
            start = (new - size) // 2
            return larger[:, start : start + size, start : start + size]
        before = (size - new) // 2
        after = size - new - before
        return np.pad(larger, ((0, 0), (before, after), (before, after)), constant_values=-1024)

    return change


def without_contrast(of: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Blood without iodine: the phase before the contrast agent."""
    return np.where(of["labels"] == of["contrast"], 45 + rng.normal(0, 10, of[SOURCE].shape), of[SOURCE])


MISTAKES: dict[str, Mistake] = {
    "none (110 keV)": energy("110keV"),
    "none (115 keV)": energy("115keV"),
    "50 keV": energy("50keV"),
    "70 keV, the target itself": energy("70keV"),
    "140 keV": energy("140keV"),
    "no contrast agent": without_contrast,
    "MR-like values": lambda of, rng: np.interp(of[SOURCE], *MR_LIKE),
    "HU + 1024 (intercept lost)": lambda of, rng: of[SOURCE] + 1024,
    "HU / 10": lambda of, rng: of[SOURCE] / 10,
    "8 bits of a soft-tissue window": lambda of, rng: ((of[SOURCE] + 160) / 400).clip(0, 1) * 255,
    "upside down": lambda of, rng: of[SOURCE][:, ::-1],
    "left and right": lambda of, rng: of[SOURCE][:, :, ::-1],
    "slices in reverse": lambda of, rng: of[SOURCE][::-1],
    "quarter turn": lambda of, rng: np.rot90(of[SOURCE], axes=(1, 2)),
    "pixels × 1.2": zoomed(1.2),
    "pixels × 1.5": zoomed(1.5),
    "pixels × 0.67": zoomed(0.67),
    "noise of 50 HU": lambda of, rng: of[SOURCE] + rng.normal(0, 50, of[SOURCE].shape),
}


def auroc(clean: list[float], planted: list[float]) -> float:
    """The chance that a planted image lies farther out than a clean one."""
    difference = np.subtract.outer(planted, clean)
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def row(name: str, distances: list[float], clean: list[float]) -> None:
    warned = np.mean(np.array(distances) > 1)
    print(f"| {name} | {np.median(distances):.2f} | {auroc(clean, distances):.2f} | {warned:.0%} |", flush=True)


@torch.inference_mode()
def simulated(predictor: Predictor, root: Path) -> None:
    record, rule = predictor.header["familiarity"], predictor.target_intensity(None)  # type: ignore[arg-type]
    distances: dict[str, list[float]] = {}
    for number, folder in enumerate(sorted((root / SOURCE).iterdir())):
        rng = np.random.default_rng(number)
        of = {path.name: read_volume(path / folder.name).array for path in root.glob("*keV")}
        of["labels"], of["contrast"] = read_volume(root / "labels" / f"{folder.name}.nii.gz").array, np.array(5)
        for name, mistake in MISTAKES.items():
            slices = rule.normalise(mistake(of, rng)[familiarity.looked_at(len(of[SOURCE]))])[:, None]
            slices_BCHW = torch.from_numpy(np.ascontiguousarray(slices))
            with record_gates(predictor.net) as gates:
                predictor.net(slices_BCHW)
            far, _ = familiarity.distance(familiarity.described(slices_BCHW, gates), record)
            distances.setdefault(name, []).append(far)
    clean = distances["none (110 keV)"] + distances["none (115 keV)"]
    print(f"{len(clean) // 2} simulated patients, {record['num_patients']} in training")
    print("| mistake | median distance | AUROC | warned |\n|---|---|---|---|")
    for name, found in distances.items():
        row(name, found, clean)


def real(ct: Path, mr: Path) -> None:
    """Slices are named PATIENT followed by three digits, in both folders alike."""
    patients: dict[str, list[str]] = {}
    for path in sorted(ct.glob("*.png")):
        patients.setdefault(path.stem[:-3], []).append(path.name)

    def described(folder: Path, names: list[str]) -> dict[str, float]:
        chosen = [names[index] for index in familiarity.looked_at(len(names))]
        grey = np.stack([np.asarray(Image.open(folder / name).convert("L"), np.float32) for name in chosen])
        return familiarity.described(torch.from_numpy(grey / 127.5 - 1)[:, None], {})

    names = sorted(patients)
    of_ct, of_mr = ({name: described(folder, patients[name]) for name in names} for folder in (ct, mr))
    clean, planted = [], []
    for left_out in names:
        record = familiarity.learned((name, of_ct[name]) for name in names if name != left_out)
        clean.append(familiarity.distance(of_ct[left_out], record)[0])
        planted.append(familiarity.distance(of_mr[left_out], record)[0])
    print(f"\n{len(names)} real patients, each left out in turn")
    print("| image | median distance | AUROC | warned |\n|---|---|---|---|")
    row("CT", clean, clean)
    row("MR in its place", planted, clean)


if __name__ == "__main__":
    simulated(Predictor(sys.argv[1], "cpu"), Path(sys.argv[2]))
    if len(sys.argv) > 4:
        real(Path(sys.argv[3]), Path(sys.argv[4]))
