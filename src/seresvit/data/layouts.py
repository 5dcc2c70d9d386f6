"""Where each patient's images lie: folders that nest in one of two ways, pictures with source and target side by side,
or a table that names every file.
"""

import csv
import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple, cast, get_args

import numpy as np
from PIL import Image

from seresvit.config import ConfigError
from seresvit.data.pairing import Split
from seresvit.data.pictures import picture_array
from seresvit.data.volume import DataError, written_whole

Images = dict[str, dict[str, Path]]  # modality → patient → folder or file
NESTINGS = ("modality/patient", "patient/modality")
ALIGNED = "aligned-png"
USUAL_MASKS = ("labels", "mask")
IMAGE_FILE = re.compile(r"(.+?)\.(nii|nii\.gz|mha|nrrd|tiff?|zip)", re.IGNORECASE)
SPLITS = ("train", "val", "test")
# In an aligned picture's name: the patient, any separator, the slice.
PATIENT_AND_SLICE = re.compile(r"(.*?)[ _.-]*(\d+)")
LISTED = ("patient", "source_path", "target_path")


class Found(NamedTuple):
    """The layout, its images, masks included, and the split of each patient where the layout gives one."""

    layout: str
    images: Images
    splits: dict[str, Split]


def find(root: Path, sources: list[str], target: str, masks: list[str], layout: str, unpacked: Path) -> Found:
    """Where the images of these modalities lie below the folder `root`, or as the table `root` says.

    `layout` "auto" tells the layouts apart. Pictures with source and target side by side are unpacked into `unpacked`.
    Raises DataError: nothing there, no modality or several layouts fit; ConfigError for an unknown layout.
    """
    if layout not in (*NESTINGS, ALIGNED, "auto"):
        raise ConfigError(f"--layout {layout}: expected auto, {', '.join(NESTINGS)} or {ALIGNED}")
    if root.is_file():
        return Found("table", *_listed(root, sources, target, masks))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds the images")
    if layout == ALIGNED or (layout == "auto" and any(root.glob("train/*.png"))):
        return Found(ALIGNED, *_unpack(root, sources, target, unpacked.absolute()))
    return Found(*_find_nested(root, [*sources, target], masks, layout), {})


def _find_nested(root: Path, modalities: list[str], masks: Iterable[str], layout: str) -> tuple[str, Images]:
    asked = list(NESTINGS) if layout == "auto" else [layout]
    found = {one: _nested(root, one, {*modalities, *masks}) for one in asked}
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


def _nested(root: Path, layout: str, modalities: set[str]) -> Images:
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


# ------------------------------------------------------------------------------------------------ table


def _listed(table: Path, sources: list[str], target: str, masks: list[str]) -> tuple[Images, dict[str, Split]]:
    """The images and splits of a CSV with the columns LISTED and, if there, source, target, split, mask_path.

    Paths are relative to it. Rows without a name of source or target are of those asked for, others are passed over.
    """
    images: Images = {}
    splits: dict[str, Split] = {}
    for where, row in _rows(table):
        patient, split = row["patient"], row.get("split") or ""
        source, its_target = row.get("source") or sources[0], row.get("target") or target
        if source not in sources or its_target != target:
            continue
        if re.search(r"[/\\]|^\.+$", patient):
            raise DataError(f"{where}: '{patient}' cannot name a folder; leave out / and \\")
        if split and split not in get_args(Split):
            raise DataError(
                f"{where}: split '{split}'; expected one of {', '.join(get_args(Split))}, in every row or none"
            )
        if splits and (patient in splits) and splits[patient] != split:
            raise DataError(
                f"{where}: {patient} is in {split or 'no split'}, above in {splits[patient]}; choose one split"
            )
        splits[patient] = cast(Split, split)
        named = [(source, row["source_path"]), (target, row["target_path"]), (masks[0], row.get("mask_path") or "")]
        for modality, text in named:
            if not text:
                continue
            path = Path(os.path.normpath(table.parent / text))
            if not path.exists():
                raise DataError(f"{where}: {path} does not exist; paths are relative to the table")
            if (first := images.setdefault(modality, {}).setdefault(patient, path)) != path:
                raise DataError(f"{where}: {patient} has a second {modality}, above {first.name}; keep one of them")
    if absent := [modality for modality in (*sources, target) if modality not in images]:
        raise DataError(f"{table}: no row for {absent[0]}; change --source or --target, or add the row")
    if len({bool(split) for split in splits.values()}) > 1:
        lacking = next(patient for patient, split in splits.items() if not split)
        raise DataError(f"{table}: {lacking} has no split, others have; fill in the column split, or leave it out")
    return images, splits if any(splits.values()) else {}


def _rows(table: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of a CSV with its file and line, as words for a message."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{table}: not a CSV table ({error}); give a folder of images, or a CSV that names them"
        ) from None
    if missing := [column for column in LISTED if column not in columns]:
        raise DataError(f"{table}: line 1: missing column {', '.join(missing)}; expected at least {','.join(LISTED)}")
    for line, row in rows:
        if empty := [column for column in LISTED if not (row[column] or "").strip()]:
            raise DataError(f"{table}: line {line}: {empty[0]} is empty; fill it in")
        yield f"{table}: line {line}", {key: text.strip() for key, text in row.items() if key and text}


# ------------------------------------------------------------------------------------------------ aligned pictures


def _unpack(root: Path, sources: list[str], target: str, unpacked: Path) -> tuple[Images, dict[str, Split]]:
    """Folders of slices, MODALITY/PATIENT/slice_NUMBER.png in `unpacked`, from pictures of source beside target.

    The left half holds the sources, several of them in the order of its red, green and blue; the right half the target.
    """
    if len(sources) > 3:
        raise ConfigError(
            f"--source {','.join(sources)}: a picture holds three; name them in the order red, green, blue"
        )
    pictures, splits = _aligned_pictures(root)
    modalities = [*sources, target]
    state = [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in pictures.values()]
    mark = hashlib.blake2b(repr((modalities, state)).encode(), digest_size=16).hexdigest()
    marker = unpacked / "unpacked.txt"
    if unpacked.exists() and not marker.is_file():
        raise DataError(f"{unpacked}: holds other files, which unpacked pictures would replace; choose another --out")
    if not unpacked.exists() or marker.read_text(encoding="utf-8").strip() != mark:
        with written_whole(unpacked) as temporary:
            for (patient, number), path in pictures.items():
                for modality, plane in zip(modalities, _planes(path, len(sources)), strict=True):
                    folder = temporary / modality / patient
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(plane).save(folder / f"slice_{number:04d}.png")
            (temporary / marker.name).write_text(mark + "\n", encoding="utf-8")
    return {modality: {patient: unpacked / modality / patient for patient in splits} for modality in modalities}, splits


def _aligned_pictures(root: Path) -> tuple[dict[tuple[str, int], Path], dict[str, Split]]:
    """The picture of each patient and slice, named as in P001_0012.png, and the split of each patient.

    Pictures named by a number alone are one patient a split.
    """
    pictures: dict[tuple[str, int], Path] = {}
    splits: dict[str, Split] = {}
    for path in sorted(path for split in SPLITS for path in root.glob(f"{split}/*.png")):
        named = PATIENT_AND_SLICE.fullmatch(path.stem)
        if named is None:
            raise DataError(f"{path}: the name must be patient and slice number, as in P001_0012.png; rename it")
        split = cast(Split, path.parent.name)
        patient, number = named[1] or split, int(named[2])
        if (before := splits.setdefault(patient, split)) != split:
            raise DataError(f"{path}: {patient} is in {split} and in {before}; move a patient's slices into one split")
        if (first := pictures.setdefault((patient, number), path)) != path:
            raise DataError(f"{path}: slice {number} of {patient} twice, also {first.name}; remove one")
    if not pictures:
        raise DataError(f"{root}: no train/*.png, val/*.png or test/*.png; change --layout")
    return pictures, splits


def _planes(path: Path, num_sources: int) -> list[np.ndarray]:
    """The grey sources and the target of one picture."""
    pixels = picture_array(path)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[1] % 2:
        raise DataError(f"{path}: source and target must be of one width, found {pixels.shape[1]} columns in all")
    if num_sources > pixels.shape[2]:
        raise DataError(f"{path}: {num_sources} sources need a colour picture, found grey; name one --source")
    left, right = np.split(pixels, 2, axis=1)
    if (right != right[..., :1]).any():
        raise DataError(f"{path}: the right half, the target, must be grey, found colours; save it as grey")
    if num_sources == 1 and (left != left[..., :1]).any():
        raise DataError(f"{path}: one source must be grey, found colours on the left; name a --source for each channel")
    return [*(left[..., channel] for channel in range(num_sources)), right[..., 0]]
