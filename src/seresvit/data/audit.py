"""Check every pair of a folder before anything learns from it.

Cases are found, loaded and checked one by one on all cores, compared with one another, and written down: the manifest,
`audit.json` for machines, `audit.html` for people. A fault stops the manifest, a warning does not.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from seresvit.config import ConfigError, DataSettings
from seresvit.data import read_volume
from seresvit.data.audit_page import audit_page, overview
from seresvit.data.checks import FAULTS, PIXEL_FAULTS, PIXEL_WARNINGS, WARNINGS, Check, Loaded, parted
from seresvit.data.layouts import ALIGNED, SPLITS, USUAL_MASKS, find
from seresvit.data.pair import matched_slices, unmatched_slices
from seresvit.data.pairing import COLUMNS, Case, short_path, split_patients, without, write_manifest
from seresvit.data.volume import DataError, Volume, written_whole
from seresvit.data.workers import mapping

# Patients' names up to this length are pseudonymised in paths only.
SHORT_NAME = 3


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
class Checked:
    """What is left of a case when its images are gone: all of it small.

    `patient_id` as DICOM has it, "" where the sides differ or name none; `pixel_hashes` of all but constant images.
    """

    case: Case
    faults: list[Finding]
    warnings: list[Finding] = field(default_factory=list)
    geometry: dict[str, Any] = field(default_factory=dict)
    picture: str = ""
    patient_id: str = ""
    pixel_hashes: dict[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit:
    """All cases of a folder, what is wrong with them, the settings asked for, each case's geometry and picture."""

    cases: list[Case]
    faults: list[Finding]
    warnings: list[Finding]
    settings: dict[str, Any]
    geometry: list[dict[str, Any]]
    pictures: dict[str, str]


def audit(
    root: Path,
    sources: list[str],
    target: str,
    *,
    layout: str = "auto",
    unpacked: Path = Path("unpacked"),
    mask: str | None = None,
    val: Iterable[str] = (),
    test: Iterable[str] = (),
    exclude: Iterable[str] = (),
    val_share: float = 0.15,
    test_share: float = 0.15,
    seed: int = 0,
    data: DataSettings = DataSettings(),  # noqa: B008
    pixels: bool = True,
    workers: int = 1,
    progress: Callable[[list[Case]], Iterable[Case]] = iter,
) -> Audit:
    """The pairs below `root`, checked and split by patient.

    `root` may be a table; pictures with source and target side by side go into `unpacked`: see `layouts.find`. `mask`
    names the mask modality (None: "labels" or "mask" if present); `val`, `test` and `exclude` name patients; unless the
    layout gives splits, one without names is drawn by its share. `data` gives window and `resample`; without `pixels`
    only headers are read. Each of `workers` processes holds one case's images at a time; `progress` wraps the cases as
    they are read. Raises DataError when nothing can be paired, ConfigError for an unusable option.
    """
    root, val, test, exclude = Path(root).absolute(), list(val), list(test), list(exclude)
    modalities = [*sources, target]
    if not sources or len({*modalities, mask}) != len(modalities) + 1:
        raise ConfigError(f"--source {','.join(sources)} --target {target}: give different modalities, each once")
    masks_to_try = [mask] if mask else [usual for usual in USUAL_MASKS if usual not in modalities]
    layout, images, fixed_splits = find(root, sources, target, masks_to_try, layout, unpacked)
    if fixed_splits and (val or test):
        raise ConfigError(f"--val, --test: {root} gives each patient's split itself; leave them out")
    if mask and mask not in images:
        raise DataError(f"{root}: no mask {mask} in the layout {layout}; change --mask")
    mask = next((name for name in masks_to_try if name in images), None)
    masks = images[mask] if mask else {}
    images = {modality: images[modality] for modality in modalities}
    patients = without(sorted({patient for found in images.values() for patient in found}), exclude)
    paired = [p for p in patients if p in images[target] and any(p in images[source] for source in sources)]
    if not paired:
        there = shorten(", ".join(patients), 200)
        raise DataError(f"{root}: no patient with both a source and {target}, found {there}; name patients alike")
    splits = fixed_splits or split_patients(paired, val, test, val_share, test_share, seed)
    chosen = [(p, source) for p in paired for source in sources if p in images[source]]
    cases = [Case(p, splits[p], s, target, images[s][p], images[target][p], masks.get(p)) for p, s in chosen]
    sides = images | ({"mask": masks} if masks else {})
    lacks = {p: ", ".join(name for name, found in sides.items() if p not in found) for p in patients}
    warned = [Finding(p, "every image", f"no {lacks[p]}", "add it, or go on without") for p in patients if lacks[p]]
    if layout == ALIGNED:
        unnamed, remedy = "its pictures are numbered, but name no patient", "name them PATIENT_NUMBER.png"
        warned += [Finding(p, "a patient a name", unnamed, remedy) for p in paired if p in SPLITS]
    settings: dict[str, Any] = {"sources": sources, "target": target, "layout": layout, "mask": mask, "seed": seed}
    settings |= {"val": val, "test": test, "exclude": exclude, "val_share": val_share, "test_share": test_share}
    settings |= {"window_hu": data.window_hu, "resample": data.resample, "pixels": pixels}
    check = partial(check_case, mask_name=mask or "", data=data, pixels=pixels)
    died = "a worker died, perhaps for lack of memory; audit again with fewer --workers"
    with mapping(min(workers, len(cases)), __name__, died) as mapped:
        checked: list[Checked] = [one for _, one in zip(progress(cases), mapped(check, cases), strict=True)]
    across_faults, across_warnings = _across(checked)
    # A target that belongs to several sources is checked with each: what is wrong with it is said once.
    return Audit(
        cases,
        list(dict.fromkeys([*(finding for one in checked for finding in one.faults), *across_faults])),
        list(dict.fromkeys([*warned, *(finding for one in checked for finding in one.warnings), *across_warnings])),
        settings,
        [one.geometry for one in checked if one.geometry],
        {one.case.name: one.picture for one in checked if one.picture},
    )


def check_case(case: Case, mask_name: str, data: DataSettings, pixels: bool) -> Checked:
    """What every rule finds in one case; an image that cannot be read is a fault too."""
    faults: list[Finding] = []
    volumes: dict[Path | None, Volume] = {}
    for path in filter(None, (case.source_path, case.target_path, case.mask_path)):
        try:
            volumes[path] = read_volume(path, pixels)
        except DataError as error:
            faults.append(_unreadable(path, error))
        except MemoryError:
            faults.append(Finding(short_path(path), "readable", "more than fits into memory", "use fewer --workers"))
    source, target = volumes.get(case.source_path), volumes.get(case.target_path)
    if not (source and target):
        return Checked(case, faults)
    loaded = Loaded(case, source, target, volumes.get(case.mask_path), mask_name, data, pixels)
    faults += _findings([*FAULTS, *(PIXEL_FAULTS if pixels else ())], loaded)
    picture = ""
    if pixels:
        shown = [source, target]  # as they are, where they do not fit
        with suppress(DataError):
            shown = loaded.on_grid
        picture = overview(*shown)
    return Checked(
        case,
        faults,
        _findings([*WARNINGS, *(PIXEL_WARNINGS if pixels else ())], loaded),
        _geometry(loaded),
        picture,
        source.patient if source.patient == target.patient else "",
        {v.path: _pixel_hash(v) for v in (source, target) if v.array.min() < v.array.max()},
    )


def _unreadable(path: Path, error: DataError) -> Finding:
    """The reader's refusal, with the file that it names, which may be one of a folder."""
    named = Path(str(error).partition(": ")[0])
    if path not in named.parents:
        return Finding(short_path(path), "readable", *parted(error, path))
    found, remedy = parted(error, path)
    file = f"{short_path(path)}/{named.relative_to(path).as_posix()}"
    return Finding(file, "readable", found.removeprefix(f"{file}: "), remedy)


def _findings(checks: list[Check], loaded: Loaded) -> list[Finding]:
    return [Finding(short_path(path), *problem) for check in checks for path, *problem in check(loaded)]


def _pixel_hash(volume: Volume) -> str:
    return hashlib.blake2b(repr(volume.array.shape).encode() + volume.array.tobytes(), digest_size=16).hexdigest()


def _geometry(loaded: Loaded) -> dict[str, Any]:
    """What `audit.json` keeps of a case; `dropped` names every slice that has no partner."""
    volumes = (loaded.source, loaded.target, loaded.mask)
    return {
        **{key: getattr(loaded.case, key) for key in COLUMNS[:4]},
        "files": [short_path(volume.path) for volume in volumes if volume],
        "size_zyx": list(loaded.target.array.shape),
        "spacing_mm_zyx": [round(spacing, 4) for spacing in loaded.target.spacing_mm_zyx],
        "num_slices": len(matched_slices(loaded.source, loaded.target)[0]),
        "dropped": [f"{short_path(v.path)}: {name}" for v, name in unmatched_slices([loaded.source, loaded.target])],
    }


def _across(checked: list[Checked]) -> tuple[list[Finding], list[Finding]]:
    """Faults and warnings that show between cases only: one patient under two names, one image under two patients."""
    faults: list[Finding] = []
    warnings: list[Finding] = []
    cases_of: dict[str, dict[str, Case]] = defaultdict(dict)  # PatientID → patient → its first case
    images_of: dict[str, dict[str, tuple[Case, Path]]] = defaultdict(dict)  # hash → patient → image
    for one in checked:
        if one.patient_id:
            cases_of[one.patient_id].setdefault(one.case.patient, one.case)
        for path, pixel_hash in one.pixel_hashes.items():
            images_of[pixel_hash].setdefault(one.case.patient, (one.case, path))
    num_patients = len({one.case.patient for one in checked})
    for cases in cases_of.values():
        first, *others = cases.values()
        if len(cases) == num_patients > 2:
            found = "all patients have one PatientID, so that it tells no one apart"
            warnings.append(Finding(short_path(first.source_path), "a patient a name", found, "see that it is meant"))
            continue
        for other in others:
            found = (
                f"its PatientID is that of {short_path(first.source_path)} ({first.split}), this is in {other.split}"
            )
            finding = Finding(short_path(other.source_path), "one split a patient", found, "name both folders alike")
            (faults if other.split != first.split else warnings).append(finding)
    for images in images_of.values():
        (first, first_path), *others_found = images.values()
        for other, path in others_found:
            found = f"the very pixels of {short_path(first_path)} ({first.split}), this is in {other.split}"
            faults.append(Finding(short_path(path), "an image once", found, "keep one of them"))
    return faults, warnings


def anonymized(result: Audit) -> Audit:
    """The same with pseudonyms for the patients' names, which then only the manifest's paths still hold."""
    unpaired = {finding.file for finding in result.warnings if finding.rule == "every image"}
    names = sorted({case.patient for case in result.cases} | unpaired | set(result.settings["exclude"]))
    pseudonyms = {name: f"patient-{number:04d}" for number, name in enumerate(names, 1)}
    # A short name may also be a number or a word: it is meant only as a part of a path.
    patterns = [
        re.escape(name)
        if len(name) > SHORT_NAME
        else rf"(?<=/){re.escape(name)}(?![\w-])|(?<![\w./-]){re.escape(name)}(?=/)|^{re.escape(name)}$"
        for name in sorted(names, key=len, reverse=True)
    ]
    known = re.compile("|".join(patterns))

    def told(value: Any) -> Any:
        if isinstance(value, str):
            return known.sub(lambda name: pseudonyms[name[0]], value)
        if isinstance(value, list):
            return [told(item) for item in value]
        return {key: told(item) for key, item in value.items()} if isinstance(value, dict) else value

    return Audit(
        [replace(case, patient=pseudonyms[case.patient]) for case in result.cases],
        [Finding(**told(asdict(finding))) for finding in result.faults],
        [Finding(**told(asdict(finding))) for finding in result.warnings],
        told(result.settings),
        told(result.geometry),
        {
            replace(case, patient=pseudonyms[case.patient]).name: result.pictures[case.name]
            for case in result.cases
            if case.name in result.pictures
        },
    )


def write(result: Audit, manifest_path: Path) -> bool:
    """True when the manifest was written; with any fault only `audit.json` and `audit.html` beside it are.

    A manifest that an earlier audit wrote there is then renamed, `manifest.csv` to `manifest.stale.csv`, so that
    nothing is trained by it unawares. Raises DataError when a file cannot be written.
    """
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
    with written_whole(manifest_path.with_name("audit.html")) as path:
        path.write_text(audit_page(record, result.pictures), encoding="utf-8")
    if result.faults:
        if manifest_path.is_file():
            manifest_path.replace(stale_path(manifest_path))
        return False
    write_manifest(result.cases, manifest_path)
    return True


def stale_path(manifest_path: Path) -> Path:
    """What a manifest is renamed to when its images turn out to be faulty."""
    return manifest_path.with_suffix(f".stale{manifest_path.suffix}")
