"""Check every pair of a folder before anything learns from it.

What would teach the network something false is a fault and stops the manifest; what merely costs data is a warning.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from seresvit.config import ConfigError
from seresvit.data import read_volume
from seresvit.data.pairing import (
    COLUMNS,
    USUAL_MASKS,
    Case,
    find_images,
    labels_of,
    matched_slices,
    short_path,
    split_patients,
    unmatched_slices,
    without,
    write_manifest,
)
from seresvit.data.volume import DataError, Volume, energy_kev_in, same_grid, written_whole

Problem = tuple[Volume, str, str, str]  # the image at fault, then a Finding's rule, found and remedy


@dataclass(frozen=True)
class Finding:
    """Something wrong with one file or folder (relative to the audited root), and what to do about it."""

    file: str
    rule: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.rule}: {self.found}; {self.remedy}"


@dataclass(frozen=True)
class Audit:
    """All cases of a folder, what is wrong with them, the settings asked for, and each case's geometry."""

    cases: list[Case]
    faults: list[Finding]
    warnings: list[Finding]
    settings: dict[str, Any]
    geometry: list[dict[str, Any]]


def audit(
    root: Path,
    sources: list[str],
    target: str,
    *,
    layout: str = "auto",
    mask: str | None = None,
    val: Iterable[str] = (),
    test: Iterable[str] = (),
    exclude: Iterable[str] = (),
    val_share: float = 0.15,
    test_share: float = 0.15,
    seed: int = 0,
    progress: Callable[[list[Case]], Iterable[Case]] = iter,
) -> Audit:
    """The pairs below `root`, checked and split by patient.

    `mask` names the mask modality (None: "labels" or "mask" if present); `val`, `test` and `exclude` name patients, and
    a split without names is drawn by its share; `progress` wraps the cases as they are read. Raises DataError when
    nothing can be paired, ConfigError for an unusable option.
    """
    root, val, test, exclude = Path(root).absolute(), list(val), list(test), list(exclude)
    modalities = [*sources, target]
    if not sources or len({*modalities, mask}) != len(modalities) + 1:
        raise ConfigError(f"--source {','.join(sources)} --target {target}: give different modalities, each once")
    masks_to_try = [mask] if mask else [usual for usual in USUAL_MASKS if usual not in modalities]
    layout, images = find_images(root, modalities, layout, masks_to_try)
    if mask and mask not in images:
        raise DataError(f"{root}: no mask {mask} in the layout {layout}; change --mask")
    mask = next((name for name in masks_to_try if name in images), None)
    masks = images[mask] if mask else {}
    images = {modality: images[modality] for modality in modalities}
    patients = without(sorted({patient for found in images.values() for patient in found}), exclude)
    paired = [p for p in patients if p in images[target] and any(p in images[source] for source in sources)]
    if not paired:
        found = shorten(", ".join(patients), 200)
        raise DataError(f"{root}: no patient with both a source and {target}, found {found}; name patients alike")
    splits = split_patients(paired, val, test, val_share, test_share, seed)
    chosen = [(p, source) for p in paired for source in sources if p in images[source]]
    cases = [Case(p, splits[p], s, target, images[s][p], images[target][p], masks.get(p)) for p, s in chosen]
    faults: list[Finding] = []
    sides = images | ({"mask": masks} if masks else {})
    lacks = {p: ", ".join(name for name, found in sides.items() if p not in found) for p in patients}
    warned = [Finding(p, "every image", f"no {lacks[p]}", "add it, or go on without") for p in patients if lacks[p]]
    geometry = []
    for case in progress(cases):
        if loaded := _load(case, faults):
            faults += _findings(FAULTS, loaded)
            warned += _findings(WARNINGS, loaded)
            geometry.append(_geometry(loaded))
    settings: dict[str, Any] = {"sources": sources, "target": target, "layout": layout, "mask": mask, "seed": seed}
    settings |= {"val": val, "test": test, "exclude": exclude, "val_share": val_share, "test_share": test_share}
    # A target that belongs to several sources is checked with each: what is wrong with it is said once.
    return Audit(cases, list(dict.fromkeys(faults)), list(dict.fromkeys(warned)), settings, geometry)


class _Loaded(NamedTuple):
    """A case with its images, as a check sees it."""

    case: Case
    source: Volume
    target: Volume
    mask: Volume | None


def _load(case: Case, faults: list[Finding]) -> _Loaded | None:
    """The images of a case, None when source or target cannot be read; what cannot be read joins `faults`."""
    volumes: dict[Path | None, Volume] = {}
    for path in filter(None, (case.source_path, case.target_path, case.mask_path)):
        try:
            volumes[path] = read_volume(path)
        except DataError as error:
            faults.append(Finding(short_path(path), "readable", *_parted(error, path)))
    source, target = volumes.get(case.source_path), volumes.get(case.target_path)
    return _Loaded(case, source, target, volumes.get(case.mask_path)) if source and target else None


def _parted(error: DataError, path: Path) -> tuple[str, str]:
    """What was found and the remedy, from a message about the file at `path`; the audited root is cut away."""
    found, _, remedy = str(error).removeprefix(f"{path}: ").replace(f"{path.parents[1]}{os.sep}", "").partition("; ")
    return found, remedy or "mend it, or leave the patient out"


def _one_patient(loaded: _Loaded) -> Iterator[Problem]:
    # Only DICOM headers identify a patient; the identifiers themselves are never shown.
    identities = {v.patient for v in (loaded.source, loaded.target) if v.format == "dicom" and v.patient}
    if len(identities) > 1:
        found = f"swapped patient: its PatientID is not the one in {short_path(loaded.target.path)}"
        yield loaded.source, "one patient a case", found, "move it to its own patient's folder"


def _one_grid(loaded: _Loaded) -> Iterator[Problem]:
    different = same_grid(loaded.source, loaded.target)
    if not different and not len(matched_slices(loaded.source, loaded.target)[0]):
        different = "no slice at the position of one"
    if different:
        found = f"{different} of {short_path(loaded.target.path)}"
        yield loaded.source, "same grid", found, "resample it, or leave the patient out"


def _named_energy(loaded: _Loaded) -> Iterator[Problem]:
    for volume, modality in ((loaded.source, loaded.case.source), (loaded.target, loaded.case.target)):
        if energy_kev_in(modality) and volume.energy_kev not in (None, energy_kev_in(modality)):
            found = f"the header says {volume.energy_kev:g} keV, the name {modality}"
            yield volume, "energy as named", found, "move it, or rename the modality"


def _not_constant(loaded: _Loaded) -> Iterator[Problem]:
    for volume in (loaded.source, loaded.target):
        if (value := volume.array.min()) == volume.array.max():
            yield volume, "an image", f"constant, every voxel is {value:g}", "export it again, or leave the patient out"


def _fitting_mask(loaded: _Loaded) -> Iterator[Problem]:
    if loaded.mask:
        try:
            labels_of(loaded.mask, loaded.target, matched_slices(loaded.target, loaded.source)[0])
        except DataError as error:
            yield loaded.mask, "mask on the target's grid", *_parted(error, loaded.mask.path)


def _partnered_slices(loaded: _Loaded) -> Iterator[Problem]:
    for volume, name in unmatched_slices([loaded.source, loaded.target]):
        yield volume, "slice on both sides", f"{name} has no partner", "add it, or go on without"


# One small function a rule: FAULTS would corrupt training, WARNINGS only cost data.
Check = Callable[[_Loaded], Iterator[Problem]]
FAULTS: list[Check] = [_one_patient, _one_grid, _named_energy, _not_constant, _fitting_mask]
WARNINGS: list[Check] = [_partnered_slices]


def _findings(checks: list[Check], loaded: _Loaded) -> list[Finding]:
    return [Finding(short_path(volume.path), *problem) for check in checks for volume, *problem in check(loaded)]


def _geometry(loaded: _Loaded) -> dict[str, Any]:
    """What `audit.json` keeps of a case; `dropped` names every slice that has no partner."""
    return {
        **{key: getattr(loaded.case, key) for key in COLUMNS[:4]},
        "size_zyx": list(loaded.target.array.shape),
        "spacing_mm_zyx": [round(spacing, 4) for spacing in loaded.target.spacing_mm_zyx],
        "num_slices": len(matched_slices(loaded.source, loaded.target)[0]),
        "dropped": [f"{short_path(v.path)}: {name}" for v, name in unmatched_slices([loaded.source, loaded.target])],
    }


def write(result: Audit, manifest_path: Path) -> bool:
    """True when the manifest was written; with any fault only `audit.json` beside it is. Raises DataError."""
    splits = list({case.patient: case.split for case in result.cases}.values())
    record = {
        "counts": {f"{split}_patients": splits.count(split) for split in ("train", "val", "test")}
        | {"cases": len(result.cases), "faults": len(result.faults), "warnings": len(result.warnings)},
        "faults": [asdict(finding) for finding in result.faults],
        "warnings": [asdict(finding) for finding in result.warnings],
        "settings": result.settings,
        "cases": result.geometry,
    }
    with written_whole(manifest_path.with_name("audit.json")) as path:
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not result.faults:
        write_manifest(result.cases, manifest_path)
    return not result.faults
