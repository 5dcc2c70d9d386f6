"""Find each patient's images, match and split them: the manifest that everything downstream reads.

Images are matched by patient and slices by position along the normal, never by sorted order.
"""

import difflib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Literal, cast, get_args

import numpy as np
import pandas as pd

from seresvit.config import ConfigError
from seresvit.data import read_volume
from seresvit.data.volume import DataError, Volume, same_grid, written_whole

Split = Literal["train", "val", "test", "none"]
Images = dict[str, dict[str, Path]]  # modality → patient → folder or file
COLUMNS = ("patient", "split", "source", "target", "source_path", "target_path", "mask_path")
LAYOUTS = ("modality/patient", "patient/modality")
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


def find_images(root: Path, modalities: list[str], layout: str, masks: Iterable[str]) -> tuple[str, Images]:
    """The layout that holds every modality, and its images, masks included; raises DataError for none or both."""
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
    near = difflib.get_close_matches(
        lacking, [*there, *(path.name.partition(".")[0] for path in root.glob("*/*"))], n=1
    )
    remedy = (f"did you mean {near[0]}? " if near else "") + "Change --source, --target or --layout"
    where = f"{' or '.join(asked)}, found {shorten(', '.join(there), 200) or 'nothing'}"
    raise DataError(f"{root}: no {lacking} in the layout {where}; {remedy}")


def _images(root: Path, layout: str, modalities: set[str]) -> Images:
    images: Images = {}
    for path in sorted(root.glob("*/*")):
        image = IMAGE_FILE.fullmatch(path.name)
        name = path.name if path.is_dir() else image[1] if image else ""
        patient, modality = (path.parent.name, name) if layout == "patient/modality" else (name, path.parent.name)
        if modality in modalities and patient and patient[0] != ".":
            first = images.setdefault(modality, {}).setdefault(patient, path)
            if first != path:
                raise DataError(f"{path}: {patient} has a second {modality}, {first.name}; keep one of them")
    return images


def short_path(path: Path) -> str:
    """The path below the audited root: in both layouts a folder and what it holds."""
    return "/".join(path.parts[-2:])


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
    without(patients, (*val, *test))
    if both := sorted(val & test):
        raise ConfigError(f"{both[0]}: named for validation and for test; name a patient once")
    drawn = sorted(set(patients) - val - test, key=lambda p: hashlib.blake2b(f"{seed} {p}".encode()).digest())
    # The smaller share first: the larger one then cannot leave it without a patient.
    for named, share in sorted(((test, test_share), (val, val_share)), key=lambda pair: pair[1]):
        if not named and share:
            count = max(1, round(share * len(patients))) if len(patients) >= 3 else 0
            named.update(drawn.pop() for _ in range(min(count, len(drawn) - 1)))
    return {p: "test" if p in test else "val" if p in val else "train" for p in patients}


def without(patients: list[str], names: Iterable[str]) -> list[str]:
    """The patients less the named ones; raises ConfigError for a name that is not among them."""
    for name in names:
        if name not in patients:
            near = difflib.get_close_matches(name, patients, n=1)
            raise ConfigError(f"no patient {name} with a pair" + (f"; did you mean {near[0]}?" if near else ""))
    return [p for p in patients if p not in set(names)]


def write_manifest(cases: list[Case], path: Path) -> None:
    """Writes one row a case, with paths relative to the manifest's folder. Raises DataError when that cannot be."""
    folder = Path(path).absolute().parent
    table = pd.DataFrame(map(asdict, cases), columns=list(COLUMNS))
    for column in COLUMNS[4:]:
        table[column] = [Path(os.path.relpath(image, folder)).as_posix() if image else "" for image in table[column]]
    with written_whole(Path(path)) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def read_manifest(path: Path) -> list[Case]:
    """The cases of a manifest, in its order, with absolute paths.

    Raises DataError, naming the line: a column, value or image missing, a case twice, a patient in two splits.
    """
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # of a first row too long
            table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, skip_blank_lines=False)
    except (OSError, ValueError, pd.errors.ParserWarning) as error:
        raise DataError(f"{path}: not a CSV table ({' '.join(str(error).split())}); run seresvit audit") from None
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
    return Case(text["patient"], cast(Split, text["split"]), text["source"], text["target"], *paths)


@dataclass(frozen=True, eq=False)
class Pair:
    """The images of one patient, every one with the same slices in the same order.

    `labels` (Z, Y, X) uint8, 0 outside; `dropped` the slices that not all have, as "folder: file at position".
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
    """The cases read together: one a group, or with `channels` a patient's in that order; DataError if one lacks."""
    if not channels:
        return [(case,) for case in cases]
    by_source = {(case.patient, case.source): case for case in cases}
    groups = []
    for patient in dict.fromkeys(case.patient for case in cases):
        if lacking := [channel for channel in channels if (patient, channel) not in by_source]:
            raise DataError(f"patient {patient}: no {', '.join(lacking)}, as data.channels asks; add or exclude it")
        groups.append(tuple(by_source[patient, channel] for channel in channels))
    return groups


def load_pair(*cases: Case) -> Pair:
    """The source of each case and the target of the first, cut to the slices that all have.

    Raises DataError when an image cannot be read, lies on another grid than the target, or shares no slice with it.
    """
    case, target = cases[0], read_volume(cases[0].target_path)
    volumes = [*(read_volume(one.source_path) for one in cases), target]
    for volume in volumes:
        if different := same_grid(volume, target):
            raise DataError(f"{volume.path}: {different} of {target.path}; run seresvit audit")
    shared = _shared_slices(volumes)
    *sources, kept_target = on_shared_slices(volumes)
    labels, label_names = labels_of(read_volume(case.mask_path), target, shared[-1]) if case.mask_path else (None, {})
    dropped = [f"{short_path(volume.path)}: {name}" for volume, name in unmatched_slices(volumes)]
    return Pair(case, tuple(sources), kept_target, labels, label_names, dropped)


def matched_slices(a: Volume, b: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Indices into `a` and, one for one, into `b` of the slices at the same position along the normal.

    At most SLICE_TOLERANCE_MM apart and always less than half the smallest slice gap, so that no slice is taken twice.
    """
    gaps_mm = np.abs([*np.diff(a.positions_mm), *np.diff(b.positions_mm)])
    tolerance = min([SLICE_TOLERANCE_MM, *gaps_mm / 2])
    distance = np.abs(np.subtract.outer(a.positions_mm, b.positions_mm))
    in_a = np.flatnonzero(distance.min(axis=1) < tolerance)
    return in_a, distance.argmin(axis=1)[in_a]


def on_shared_slices(volumes: list[Volume]) -> list[Volume]:
    """The volumes cut to the slice positions that all of them have, in the order of the last one, or DataError."""
    shared = _shared_slices(volumes)
    if not len(shared[0]):
        raise DataError(f"{volumes[0].path}: no slice lies where {volumes[-1].path} has one; run seresvit audit")
    return [_at_slices(volume, index) for volume, index in zip(volumes, shared, strict=True)]


def _shared_slices(volumes: list[Volume]) -> list[np.ndarray]:
    """For each volume the indices of the slices that all of them have, in the order of the last one, the target."""
    partners = np.full((len(volumes), len(volumes[-1].array)), -1)
    for partner, volume in zip(partners, volumes, strict=True):
        in_target, in_volume = matched_slices(volumes[-1], volume)
        partner[in_target] = in_volume
    return list(partners[:, (partners >= 0).all(axis=0)])


def unmatched_slices(volumes: list[Volume]) -> list[tuple[Volume, str]]:
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
    positions, affine = volume.positions_mm[index], volume.affine.copy()
    gap_mm = [*np.diff(volume.positions_mm), 1][0]
    affine[:3, 3] += affine[:3, 2] * (positions[0] - volume.positions_mm[0]) / gap_mm
    affine[:3, 2] *= [*np.diff(positions), gap_mm][0] / gap_mm
    headers = tuple(volume.headers[k] for k in index) if volume.format in ("dicom", "png") else volume.headers
    return replace(volume, array=volume.array[index], affine=affine, positions_mm=positions, headers=headers)


def labels_of(mask: Volume, target: Volume, kept: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Labels (Z, Y, X) uint8 on the target's slices `kept`, and their names: of labels.json, else "mask" for all > 0.

    Raises DataError when the mask does not cover these slices on the target's grid, or has other labels than 0 to 255.
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
    """BLAKE2b in hexadecimal over every image's bytes and split, wherever they lie, in whatever order; or DataError."""
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
