"""Find each patient's images, match, check and split them: the manifest that everything downstream reads.

Images are matched by patient and slices by position along the normal, never by sorted order. What would teach the
network something false is a fault and stops the manifest; what merely costs data is a warning.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from seresvit.config import ConfigError
from seresvit.data import read_volume
from seresvit.data.volume import DataError, Volume, same_grid, written_whole

Split = Literal["train", "val", "test", "none"]
Images = dict[str, dict[str, Path]]  # modality → patient → folder or file
COLUMNS = ("patient", "split", "source", "target", "source_path", "target_path", "mask_path")
LAYOUTS = {"modality/patient": "ROOT/{}/P001", "patient/modality": "ROOT/P001/{}"}
IMAGE_FILE = re.compile(r"(.+?)\.(nii|nii\.gz|mha|nrrd)", re.IGNORECASE)
USUAL_MASKS = ("labels", "mask")

# Two slices at one place, written by different software, differ by rounding of their decimal strings only.
SLICE_TOLERANCE_MM = 0.01


@dataclass(frozen=True)
class Case:
    """One patient and one source: where the images lie (absolute paths) and which split the patient is in."""

    patient: str
    split: Split
    source: str
    target: str
    source_path: Path
    target_path: Path
    mask_path: Path | None = None

    @property
    def name(self) -> str:
        """The name of this case's folder among predictions."""
        return f"{self.patient}_{self.source}"


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

    `layout` is one of LAYOUTS or "auto"; `mask` names the mask modality (None: "labels" or "mask" where present);
    `val`, `test` and `exclude` name patient folders, and a split without names is drawn by its share; `progress` wraps
    the cases as they are read. Raises DataError when nothing can be paired, ConfigError for an unusable option.
    """
    root, val, test, exclude = Path(root).absolute(), list(val), list(test), list(exclude)
    if not sources or len({*sources, target}) != len(sources) + 1:
        raise ConfigError(f"--source {','.join(sources)} --target {target}: give different modalities, each once")
    layout, images = _find(root, [*sources, target], layout, (mask,) if mask else USUAL_MASKS)
    masks = next((images.pop(name) for name in (mask, *USUAL_MASKS) if name in images.keys() - {*sources, target}), {})
    if mask and not masks:
        raise DataError(f"{root}: no mask {LAYOUTS[layout].format(mask)} for any patient; change --mask")
    patients = _without(sorted({patient for found in images.values() for patient in found}), exclude)
    paired = [p for p in patients if p in images[target] and any(p in images[source] for source in sources)]
    if not paired:
        lacking = f"no patient with both a source ({', '.join(sources)}) and the target ({target})"
        raise DataError(f"{root}: {lacking}, found {_listed(patients)}; name a patient alike on both sides")
    splits = split_patients(paired, val, test, val_share, test_share, seed)
    cases = [
        Case(p, splits[p], source, target, images[source][p], images[target][p], masks.get(p))
        for p in paired
        for source in sources
        if p in images[source]
    ]
    faults: list[Finding] = []
    sides = images | ({"mask": masks} if masks else {})
    lacks = {p: ", ".join(name for name, found in sides.items() if p not in found) for p in patients}
    warnings = [Finding(p, "every image", f"no {lacks[p]}", "add it, or go on without") for p in patients if lacks[p]]
    geometry = []
    for case in progress(cases):
        if loaded := _load(case, faults):
            faults += [finding for check in FAULTS for finding in check(loaded)]
            warnings += [finding for check in WARNINGS for finding in check(loaded)]
            geometry.append(_geometry(loaded))
    settings: dict[str, Any] = {"sources": list(sources), "target": target, "layout": layout, "mask": mask}
    settings |= {"val": val, "test": test, "exclude": exclude, "val_share": val_share, "test_share": test_share}
    settings["seed"] = seed
    # A target that belongs to several sources is checked with each: what is wrong with it is said once.
    return Audit(cases, list(dict.fromkeys(faults)), list(dict.fromkeys(warnings)), settings, geometry)


def _find(root: Path, modalities: list[str], layout: str, masks: Iterable[str]) -> tuple[str, Images]:
    """The layout that holds every modality, and its images, masks included.

    Raises DataError when no layout does, when "auto" finds that both do, or when a patient has an image twice.
    """
    if layout not in (*LAYOUTS, "auto"):
        raise ConfigError(f"--layout {layout}: expected auto, {' or '.join(LAYOUTS)}")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds the images")
    asked = list(LAYOUTS) if layout == "auto" else [layout]
    found = {one: _images(root, one, {*modalities, *masks}) for one in asked}
    fitting = [one for one in asked if found[one].keys() >= set(modalities)]
    if len(fitting) == 1:
        return fitting[0], found[fitting[0]]
    if fitting:
        raise DataError(f"{root}: both {' and '.join(fitting)} fit what is there; say which one with --layout")
    lacking = min(([m for m in modalities if m not in images] for images in found.values()), key=len)[0]
    there = sorted(path.name for path in root.iterdir() if path.name[0] != ".")
    near = difflib.get_close_matches(lacking, [*there, *(_name(path) for path in root.glob("*/*"))], n=1)
    expected = " or ".join(LAYOUTS[one].format(lacking) for one in asked)
    remedy = (f"did you mean {near[0]}? " if near else "") + "Change --source, --target or --layout"
    raise DataError(f"{root}: no {expected}, found {_listed(there)}; {remedy}")


def _images(root: Path, layout: str, modalities: set[str]) -> Images:
    images: Images = {}
    for path in sorted(root.glob("*/*")):
        names = path.parent.name, _name(path)
        patient, modality = names if layout == "patient/modality" else names[::-1]
        if modality in modalities and patient and patient[0] != ".":
            first = images.setdefault(modality, {}).setdefault(patient, path)
            if first != path:
                raise DataError(f"{path}: {patient} has a second {modality}, {first.name}; keep one of them")
    return images


def _name(path: Path) -> str:
    """The name of a folder, or of an image file without its suffix; empty for other files."""
    image = IMAGE_FILE.fullmatch(path.name)
    return path.name if path.is_dir() else image[1] if image else ""


def _short(path: Path) -> str:
    """The path below the audited root, which in both layouts is a folder and what it holds."""
    return "/".join(path.parts[-2:])


def _listed(names: list[str], most: int = 8) -> str:
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def split_patients(
    patients: Iterable[str], val: Iterable[str], test: Iterable[str], val_share: float, test_share: float, seed: int
) -> dict[str, Split]:
    """Each patient's split: the named ones as named, and where no one is named, drawn by share and seed.

    A share of at least three patients is at least one patient, and at least one is left for training. The draw depends
    on names and seed alone, not on order, machine or library version. Raises ConfigError for unknown or repeated names.
    """
    patients, val, test = sorted(set(patients)), set(val), set(test)
    if min(val_share, test_share) < 0 or val_share + test_share >= 1:
        raise ConfigError(f"validation and test share {val_share}, {test_share}: each from 0, together below 1")
    _without(patients, (*val, *test))
    if both := sorted(val & test):
        raise ConfigError(f"{both[0]}: named for validation and for test; name a patient once")
    drawn = sorted(set(patients) - val - test, key=lambda p: hashlib.blake2b(f"{seed} {p}".encode()).digest())
    for named, share in ((test, test_share), (val, val_share)):
        if not named and share:
            count = max(1, round(share * len(patients))) if len(patients) >= 3 else 0
            named.update(drawn.pop() for _ in range(min(count, len(drawn) - 1)))
    return {p: "test" if p in test else "val" if p in val else "train" for p in patients}


def _without(patients: list[str], names: Iterable[str]) -> list[str]:
    """The patients less the named ones; raises ConfigError for a name that is not among them."""
    for name in names:
        if name not in patients:
            near = difflib.get_close_matches(name, patients, n=1)
            raise ConfigError(f"no patient {name} with a pair" + (f"; did you mean {near[0]}?" if near else ""))
    return [p for p in patients if p not in set(names)]


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A case with its images, as a check sees it."""

    case: Case
    source: Volume
    target: Volume
    mask: Volume | None

    @property
    def modalities(self) -> tuple[tuple[str, Volume], ...]:
        return (self.case.source, self.source), (self.case.target, self.target)


def _load(case: Case, faults: list[Finding]) -> _Loaded | None:
    """The images of a case, None when source or target cannot be read; what cannot be read joins `faults`."""
    volumes = {}
    for path in filter(None, (case.source_path, case.target_path, case.mask_path)):
        try:
            volumes[path] = read_volume(path)
        except DataError as error:
            found = str(error).removeprefix(f"{path}: ").replace(f"{path.parents[1]}{os.sep}", "")
            faults.append(Finding(_short(path), "readable", found, "mend it, or leave the patient out"))
    if not volumes.keys() >= {case.source_path, case.target_path}:
        return None
    mask = volumes.get(case.mask_path) if case.mask_path else None
    return _Loaded(case, volumes[case.source_path], volumes[case.target_path], mask)


def _one_patient(loaded: _Loaded) -> Iterator[Finding]:
    # Only DICOM headers identify a patient; the identifiers themselves are never shown.
    identities = {volume.patient for _, volume in loaded.modalities if volume.format == "dicom" and volume.patient}
    if len(identities) > 1:
        found = f"swapped patient: its PatientID is not the one in {_short(loaded.target.path)}"
        yield Finding(_short(loaded.source.path), "one patient a case", found, "move it to its own patient's folder")


def _one_grid(loaded: _Loaded) -> Iterator[Finding]:
    different = same_grid(loaded.source, loaded.target)
    if not different and not len(matched_slices(loaded.source, loaded.target)[0]):
        different = "no slice at the position of one"
    if different:
        found = f"{different} of {_short(loaded.target.path)}"
        yield Finding(_short(loaded.source.path), "same grid", found, "resample it, or leave the patient out")


def _named_energy(loaded: _Loaded) -> Iterator[Finding]:
    for modality, volume in loaded.modalities:
        named = re.search(r"(\d+(?:\.\d+)?)\s*kev", modality, re.IGNORECASE)
        if named and volume.energy_kev not in (None, float(named[1])):
            found = f"the header says {volume.energy_kev:g} keV, the name {modality}"
            yield Finding(_short(volume.path), "energy as named", found, "move it, or rename the modality")


def _not_constant(loaded: _Loaded) -> Iterator[Finding]:
    for _, volume in loaded.modalities:
        if (value := volume.array.min()) == volume.array.max():
            found, remedy = f"constant, every voxel is {value:g}", "export it again, or leave the patient out"
            yield Finding(_short(volume.path), "an image", found, remedy)


def _fitting_mask(loaded: _Loaded) -> Iterator[Finding]:
    if loaded.mask:
        try:
            _labels(loaded.mask, loaded.target, matched_slices(loaded.target, loaded.source)[0])
        except DataError as error:
            found, _, remedy = str(error).removeprefix(f"{loaded.mask.path}: ").rpartition("; ")
            yield Finding(_short(loaded.mask.path), "mask on the target's grid", found, remedy)


def _partnered_slices(loaded: _Loaded) -> Iterator[Finding]:
    for volume, name in _unmatched([loaded.source, loaded.target]):
        yield Finding(_short(volume.path), "slice on both sides", f"{name} has no partner", "add it, or go on without")


# One small function a rule: FAULTS would corrupt training, WARNINGS only cost data.
Check = Callable[[_Loaded], Iterator[Finding]]
FAULTS: list[Check] = [_one_patient, _one_grid, _named_energy, _not_constant, _fitting_mask]
WARNINGS: list[Check] = [_partnered_slices]


def _geometry(loaded: _Loaded) -> dict[str, Any]:
    """What `audit.json` keeps of a case; `dropped` names every slice that has no partner."""
    case, target = loaded.case, loaded.target
    return {
        **{key: getattr(case, key) for key in COLUMNS[:4]},
        "size_zyx": list(target.array.shape),
        "spacing_mm_zyx": [round(spacing, 4) for spacing in target.spacing_mm_zyx],
        "num_slices": len(matched_slices(loaded.source, target)[0]),
        "dropped": [f"{_short(volume.path)}: {name}" for volume, name in _unmatched([loaded.source, target])],
    }


def write(result: Audit, manifest_path: Path) -> bool:
    """True when the manifest was written; with any fault only `audit.json` beside it is. Raises DataError.

    `audit.json` holds counts, findings, settings and each case's geometry; of patients only folder names.
    """
    manifest_path = Path(manifest_path)
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


def write_manifest(cases: list[Case], path: Path) -> None:
    """Writes one row a case, with paths relative to the manifest's folder. Raises DataError when that cannot be."""
    folder = Path(path).absolute().parent
    table = pd.DataFrame([asdict(case) for case in cases], columns=list(COLUMNS))
    for column in COLUMNS[4:]:
        table[column] = [Path(os.path.relpath(image, folder)).as_posix() if image else "" for image in table[column]]
    with written_whole(Path(path)) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def read_manifest(path: Path) -> list[Case]:
    """The cases of a manifest, with absolute paths, in its order.

    Raises DataError, naming the line: no such file or no table, a column or value missing, a path that does not exist,
    a case twice, a patient in two splits.
    """
    path = Path(path)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())
        raise DataError(f"{path}: not a readable CSV table ({found}); write a manifest with seresvit audit") from None
    if missing := [column for column in COLUMNS if column not in table]:
        raise DataError(f"{path}: line 1: missing column {', '.join(missing)}; expected {','.join(COLUMNS)}")
    if table.empty:
        raise DataError(f"{path}: line 2: no case below the column names; write it again with seresvit audit")
    cases: dict[str, Case] = {}
    splits: dict[str, str] = {}
    for line, row in enumerate(table[list(COLUMNS)].to_dict("records"), start=2):
        where = f"{path}: line {line}"
        case = _case({str(column): str(text).strip() for column, text in row.items()}, path.absolute().parent, where)
        if (before := splits.setdefault(case.patient, case.split)) != case.split:
            raise DataError(f"{where}: {case.patient} is in {case.split}, above in {before}; choose one split")
        if cases.setdefault(case.name, case) is not case:
            raise DataError(f"{where}: {case.name} is there twice; keep one row a patient and source")
    return list(cases.values())


def _case(text: dict[str, str], folder: Path, where: str) -> Case:
    """The case of one row; raises DataError, which begins with `where`."""
    if empty := [column for column in COLUMNS[:-1] if not text[column]]:
        raise DataError(f"{where}: {empty[0]} is empty; fill it in")
    # Together they name an output folder, which must not lead elsewhere.
    if unsafe := [text[c] for c in ("patient", "source") if re.search(r"[/\\]|^\.+$", text[c])]:
        raise DataError(f"{where}: '{unsafe[0]}' cannot name a folder; leave out / and \\")
    if text["split"] not in get_args(Split):
        raise DataError(f"{where}: split '{text['split']}'; expected one of {', '.join(get_args(Split))}")
    paths = [Path(os.path.normpath(folder / text[column])) for column in COLUMNS[4:] if text[column]]
    if absent := [image for image in paths if not image.exists()]:
        raise DataError(f"{where}: {absent[0]} does not exist; run seresvit audit again where the images are")
    split: Any = text["split"]
    return Case(text["patient"], split, text["source"], text["target"], *paths)


@dataclass(frozen=True, eq=False)
class Pair:
    """The images of one patient, every one with the same slices in the same order.

    `labels` (Z, Y, X) uint8 on those slices, 0 outside; `label_names` what its values mean; `dropped` the slices that
    one image lacks and all are therefore without, as "folder: file at position".
    """

    case: Case
    sources: tuple[Volume, ...]
    target: Volume
    labels: np.ndarray | None
    label_names: dict[str, int]
    dropped: list[str]

    @property
    def source(self) -> Volume:
        """The first source: the only one, unless there are several channels."""
        return self.sources[0]


def load_channels(cases: list[Case], channels: tuple[str, ...]) -> list[tuple[Case, ...]]:
    """The cases that are read together: one a group, or with `channels` one group a patient, in the channels' order.

    Raises DataError, naming patient and channel, when a patient lacks one.
    """
    if not channels:
        return [(case,) for case in cases]
    by_source = {(case.patient, case.source): case for case in cases}
    groups = []
    for patient in dict.fromkeys(case.patient for case in cases):
        if lacking := [channel for channel in channels if (patient, channel) not in by_source]:
            lacks = f"patient {patient}: no source {', '.join(lacking)}, which data.channels names"
            raise DataError(f"{lacks}; add it, or take the patient out of the manifest")
        groups.append(tuple(by_source[patient, channel] for channel in channels))
    return groups


def load_pair(*cases: Case) -> Pair:
    """The source of each case and the target of the first, cut to the slices that all have.

    Raises DataError when an image cannot be read, lies on another grid than the target, or shares no slice with it.
    """
    case = cases[0]
    target = read_volume(case.target_path)
    volumes = [*(read_volume(one.source_path) for one in cases), target]
    for volume in volumes:
        if different := same_grid(volume, target):
            raise DataError(f"{volume.path}: {different} of {target.path}; run seresvit audit")
    shared = _shared_slices(volumes)
    if not len(shared[-1]):
        raise DataError(f"{volumes[0].path}: no slice lies where {target.path} has one; run seresvit audit")
    label_names: dict[str, int] = {}
    labels = None
    if case.mask_path:
        labels, label_names = _labels(read_volume(case.mask_path), target, shared[-1])
    dropped = [f"{_short(volume.path)}: {name}" for volume, name in _unmatched(volumes)]
    *sources, target = (_at_slices(volume, index) for volume, index in zip(volumes, shared, strict=True))
    return Pair(case, tuple(sources), target, labels, label_names, dropped)


def matched_slices(a: Volume, b: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Indices into `a` and, one for one, into `b` of the slices at the same position along the normal.

    At most SLICE_TOLERANCE_MM apart and always less than half the smallest slice gap, so that no slice is taken twice.
    """
    gaps = [np.abs(np.diff(volume.positions_mm)) for volume in (a, b)]
    tolerance = min([SLICE_TOLERANCE_MM, *(gap.min() / 2 for gap in gaps if gap.size)])
    distance = np.abs(np.subtract.outer(a.positions_mm, b.positions_mm))
    nearest = distance.argmin(axis=1)
    in_a = np.flatnonzero(distance.min(axis=1) < tolerance)
    return in_a, nearest[in_a]


def _shared_slices(volumes: list[Volume]) -> list[np.ndarray]:
    """For each volume the indices of the slices that all of them have, in the order of the last one, the target."""
    partners = np.full((len(volumes), len(volumes[-1].array)), -1)
    for partner, volume in zip(partners, volumes, strict=True):
        in_target, in_volume = matched_slices(volumes[-1], volume)
        partner[in_target] = in_volume
    return list(partners[:, (partners >= 0).all(axis=0)])


def _unmatched(volumes: list[Volume]) -> list[tuple[Volume, str]]:
    """The slices that not all volumes have, each as its volume and "file at position"."""
    unmatched = []
    for volume, shared in zip(volumes, _shared_slices(volumes), strict=True):
        for k in np.setdiff1d(range(len(volume.array)), shared):
            file = Path(getattr(volume.headers[k], "filename", "")).name if volume.format == "dicom" else ""
            file = f"{volume.headers[k]}.png" if volume.format == "png" else file
            unmatched.append((volume, f"{file or f'slice {k + 1}'} at {volume.positions_mm[k]:.2f} mm"))
    return unmatched


def _at_slices(volume: Volume, index: np.ndarray) -> Volume:
    """The volume with only these slices; its affine begins at the first of them."""
    positions, affine = volume.positions_mm, volume.affine.copy()
    if len(positions) > 1:
        per_mm = affine[:3, 2] / (positions[1] - positions[0])
        affine[:3, 3] += per_mm * (positions[index[0]] - positions[0])
        if len(index) > 1:
            affine[:3, 2] = per_mm * (positions[index[1]] - positions[index[0]])
    headers = tuple(volume.headers[k] for k in index) if volume.format in ("dicom", "png") else volume.headers
    return replace(volume, array=volume.array[index], affine=affine, positions_mm=positions[index], headers=headers)


def _labels(mask: Volume, target: Volume, kept: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Labels (Z, Y, X) uint8 on the target's slices `kept`, and their names.

    The names are those of labels.json beside the mask, else "mask" for all that is above zero. Raises DataError when
    the mask does not cover these slices on the target's grid.
    """
    if different := same_grid(mask, target):
        raise DataError(f"{mask.path}: {different} against the target; draw or resample it on the target")
    in_target, in_mask = matched_slices(target, mask)
    if lacking := len(set(kept.tolist()) - set(in_target.tolist())):
        raise DataError(f"{mask.path}: {lacking} of {len(kept)} slices have no mask; draw or resample it on the target")
    values = mask.array[in_mask[np.isin(in_target, kept)]]
    names_path = mask.path.parent / "labels.json"
    if not names_path.is_file():
        return (values > 0).astype(np.uint8), {"mask": 1}
    try:
        names = json.loads(names_path.read_text(encoding="utf-8"))
        if not all(type(value) is int and 0 < value < 256 for value in names.values()):
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise DataError(f'{names_path}: expected {{"name": number from 1 to 255, ...}}; mend or remove it') from None
    if not np.isin(values, np.arange(256)).all():
        raise DataError(f"{mask.path}: labels must be whole numbers from 0 to 255; save the image as integers")
    return values.astype(np.uint8), names


def content_hash(cases: list[Case]) -> str:
    """BLAKE2b, as 32 hexadecimal digits, over the bytes of every image of these cases and the splits they are in.

    The same data gives the same hash wherever it lies and in whatever order the cases come. Raises DataError.
    """
    total = hashlib.blake2b(digest_size=16)
    for case in sorted(cases, key=lambda case: case.name):
        total.update(json.dumps([getattr(case, key) for key in COLUMNS[:4]]).encode())
        for image in filter(None, (case.source_path, case.target_path, case.mask_path)):
            files = sorted(p for p in image.rglob("*") if p.is_file()) if image.is_dir() else [image]
            try:
                for path in (p for p in files if p.name[0] != "."):
                    total.update(path.name.encode() + hashlib.blake2b(path.read_bytes()).digest())
            except OSError as error:
                raise DataError(f"{image}: cannot be read ({error.strerror}); run seresvit audit again") from None
    return total.hexdigest()
