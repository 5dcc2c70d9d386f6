"""Each patient's images and split: the manifest that everything downstream reads."""

import difflib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import pandas as pd

from seresvit.config import ConfigError
from seresvit.data.volume import DataError, written_whole

Split = Literal["train", "val", "test", "none"]
COLUMNS = ("patient", "split", "source", "target", "source_path", "target_path", "mask_path")


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
    if unsafe := [text[c] for c in ("patient", "source", "target") if re.search(r"[/\\]|^\.+$", text[c])]:
        raise DataError(f"{where}: '{unsafe[0]}' cannot name a folder; leave out / and \\")
    if text["source"] == text["target"]:
        raise DataError(f"{where}: source and target are both called '{text['target']}'; name them apart")
    if text["split"] not in get_args(Split):
        raise DataError(f"{where}: split '{text['split']}'; expected one of {', '.join(get_args(Split))}")
    paths = [Path(os.path.normpath(folder / text[column])) for column in COLUMNS[4:] if text[column]]
    if absent := [image for image in paths if not image.exists()]:
        raise DataError(f"{where}: {absent[0]} does not exist; run seresvit audit again where the images are")
    return Case(text["patient"], cast(Split, text["split"]), text["source"], text["target"], *paths)


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


def image_files(image: Path) -> list[str]:
    """The files of an image, sorted: itself, or all in its folder and below that are not hidden."""
    if not image.is_dir():
        return [str(image)]
    return sorted(os.path.join(top, name) for top, _, names in os.walk(image) for name in names if name[0] != ".")


def image_hash(image: Path) -> str:
    """BLAKE2b in hexadecimal over the names and bytes of an image's files, wherever they lie; or DataError."""
    total = hashlib.blake2b(digest_size=16)
    try:
        for path in image_files(image):
            with open(path, "rb") as file:
                total.update(os.path.basename(path).encode() + hashlib.file_digest(file, "blake2b").digest())
    except OSError as error:
        raise DataError(f"{image}: cannot be read ({error.strerror}); run seresvit audit again") from None
    return total.hexdigest()


def content_hash(cases: list[Case], hash_of: Callable[[Path], str] = image_hash) -> str:
    """BLAKE2b in hexadecimal over every image's bytes and split, wherever they lie, in whatever order; or DataError."""
    total = hashlib.blake2b(digest_size=16)
    for case in sorted(cases, key=lambda case: case.name):
        images = (case.source_path, case.target_path, case.mask_path)
        hashes = [hash_of(image) for image in images if image]
        total.update(json.dumps([*(getattr(case, key) for key in COLUMNS[:4]), *hashes]).encode())
    return total.hexdigest()
