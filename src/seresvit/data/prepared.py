"""The prepared store: matched slices on disk, made once, read one at a time, never taken for what they no longer are.

`prepared/` beside the manifest holds a folder for each set of settings that stored values depend on. In it a case
stands under a hash of its files' bytes: one `.npy` a volume, float32 in [-1, 1], and, written after them, a `.json`
that describes them. So wherever the work is stopped, a case is there whole or not at all, and two processes at one
store write the same twice. int16 would take half the space, but its scaling longer than the reading.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seresvit.config import DataSettings
from seresvit.data.intensity import Intensity, intensity_of, shown_in
from seresvit.data.pair import Pair, load_pair
from seresvit.data.pairing import Case, content_hash, image_files, image_hash, load_channels, read_manifest
from seresvit.data.volume import DataError, remove_abandoned, written_whole
from seresvit.data.workers import mapping

INDEX, HASHES = "index.json", "hashes.json"
# Raise it when the same files and settings are to be stored as other values.
STORE_VERSION = 2
# Settings that act on stored slices only. Every other one, also a future one, is part of the folder's name.
NOT_STORED = {"context_slices", "min_foreground", "flip", "max_rotation_deg", "max_shift", "max_scale", "augment"}
# Worker processes take seconds to start: images of fewer bytes are prepared in this one.
WORKERS_FROM_BYTES = 2**26
# Two changes within one tick of a file system's clock look like one: a hash so fresh is not remembered.
SETTLED_AFTER_NS = 2 * 10**9

Group = tuple[Case, ...]  # the cases read together: one, or a patient's channels
Known = dict[str, dict[str, Any]]  # image path → its stamp and, under that stamp, its hash


@dataclass(frozen=True)
class PreparedCase:
    """A matched pair on disk: `.npy` names, and the rules by which their values came to be in [-1, 1].

    `num_bytes` are of the source files in order, of the target file and of `mask_file`, "" where no mask is stored;
    `label_names` says what the mask's values mean; `foreground` is the share of each slice's target that is above its
    lower bound.
    """

    name: str
    patient: str
    split: str
    sources: list[str]
    target: str
    source_files: list[str]
    target_file: str
    mask_file: str
    label_names: dict[str, int]
    num_bytes: list[int]
    shape: list[int]
    spacing_mm_zyx: list[float]
    source_intensities: list[dict[str, Any]]
    target_intensity: dict[str, Any]
    foreground: list[float]

    @functools.cached_property
    def intensities(self) -> list[Intensity]:
        """The rule of every source and, last, of the target."""
        return [Intensity.from_dict(rule) for rule in (*self.source_intensities, self.target_intensity)]


@dataclass(frozen=True)
class Prepared:
    """The prepared store of a manifest: its folder, its cases and the hash of the images that it was made from."""

    folder: Path
    data_hash: str
    cases: list[PreparedCase]

    def target_intensities(self, split: str) -> list[Intensity]:
        """The rules of all targets of a split."""
        return [case.intensities[-1] for case in self.cases if case.split == split]


def prepare(
    manifest: Path,
    data: DataSettings,
    progress: Callable[[list[Group]], Iterable[Group]] = iter,
    workers: int | None = None,
    masks: bool = False,
) -> Prepared:
    """The prepared store of `manifest`, beside it; only cases with new bytes or settings are made.

    Every volume becomes one `.npy` of matched slices, float32 in [-1, 1]; with `masks` the labels of the manifest's
    mask, uint8, another. `workers` processes (None: one a core) make one case at a time each; `progress` wraps the list
    of those cases.
    Raises DataError for images that cannot be paired or scaled, and for a store that cannot be written.
    """
    started_ns = time.time_ns()
    groups = load_channels(read_manifest(manifest), data.channels)
    folder = manifest.absolute().parent / "prepared" / _fingerprint(data, masks)
    for place in (folder.parent, folder):
        remove_abandoned(place)
    stamps = {image: _stamp(image) for image in sorted({image for group in groups for image in _images(group)})}
    remembered: Known = _read_json(folder.parent / HASHES)
    known = {image: remembered[image] for image, s in stamps.items() if remembered.get(image, {}).get("stamp") == [*s]}
    records = {group: _stored(folder, group, known) for group in groups}
    lacking = [group for group, record in records.items() if record is None]
    num_bytes = sum(stamps[image].num_bytes for group in lacking for image in _images(group))
    count = min(workers or os.cpu_count() or 1, len(lacking)) if workers or num_bytes >= WORKERS_FROM_BYTES else 1
    tasks = [(folder, data, masks, group, {i: known[i] for i in _images(group) if i in known}) for group in lacking]
    died = "prepared store: a worker process was killed, perhaps for memory; run it again"
    try:
        with mapping(count, __name__, died) as mapped:
            for group, (found, record) in zip(progress(lacking), mapped(_make, tasks), strict=True):
                known |= found
                records[group] = record
    finally:
        settled = {i: k for i, k in known.items() if Stamp(*k["stamp"]).newest_ns < started_ns - SETTLED_AFTER_NS}
        _update_json(folder.parent / HASHES, remembered | settled)
    data_hash = content_hash([case for group in groups for case in group], lambda image: known[str(image)]["hash"])
    cases = [PreparedCase(**_identity(group), **record) for group, record in records.items() if record]
    _update_json(folder / INDEX, {"data_hash": data_hash, "cases": [asdict(case) for case in cases]})
    return Prepared(folder, data_hash, cases)


def _fingerprint(data: DataSettings, masks: bool) -> str:
    stored = [STORE_VERSION, data.model_dump(mode="json", exclude=NOT_STORED), *(["masks"] if masks else [])]
    return hashlib.blake2b(json.dumps(stored, sort_keys=True).encode(), digest_size=6).hexdigest()


def _images(group: Group) -> list[str]:
    """The paths of all images of a case, and of the labels.json that names the labels of its mask, each once."""
    paths = [path for case in group for path in (case.source_path, case.target_path, case.mask_path) if path]
    names = [case.mask_path.with_name("labels.json") for case in group if case.mask_path]
    return [str(path) for path in dict.fromkeys([*paths, *(path for path in names if path.is_file())])]


def _identity(group: Group) -> dict[str, Any]:
    """What the manifest alone says of a case."""
    first = group[0]
    name = "+".join([first.name, *(case.source for case in group[1:])])
    sources = [case.source for case in group]
    return {"name": name, "patient": first.patient, "split": first.split, "sources": sources, "target": first.target}


class Stamp(NamedTuple):
    """What is quick to know of an image's files: as long as it stays the same, so do their bytes."""

    num_bytes: int
    newest_ns: int
    digest: str


def _stamp(image: str) -> Stamp:
    num_bytes, newest_ns, total = 0, 0, hashlib.blake2b(digest_size=16)
    for path in image_files(Path(image)):
        status = os.stat(path)
        num_bytes += status.st_size
        # The time of the last change of status too: copying tools set the other one back.
        newest_ns = max(newest_ns, status.st_mtime_ns, status.st_ctime_ns)
        total.update(f"{path}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}\n".encode())
    return Stamp(num_bytes, newest_ns, total.hexdigest())


def _stored(folder: Path, group: Group, known: Known) -> dict[str, Any] | None:
    """The record of a case that stands in the store whole, else None."""
    if not known.keys() >= set(_images(group)):
        return None
    record = _read_json(folder / f"{_key(group, known)}.json")
    if not record:
        return None
    names = (*record["source_files"], record["target_file"], record["mask_file"])
    files = [folder / name for name in names if name]
    sizes = [file.stat().st_size if file.is_file() else None for file in files]
    return record if sizes == record["num_bytes"] else None


def _key(group: Group, known: Known) -> str:
    """The name under which a case is stored: other bytes, other name."""
    images = [[case.source, *(known[image]["hash"] for image in _images((case,)))] for case in group]
    parts = json.dumps([*images, group[0].target]).encode()
    return f"{_identity(group)['name']}-{hashlib.blake2b(parts, digest_size=8).hexdigest()}"


def _make(task: tuple[Path, DataSettings, bool, Group, Known]) -> tuple[Known, dict[str, Any]]:
    """The stamps and hashes of a case's images, and its record, after writing the case unless it was there."""
    folder, data, masks, group, known = task
    stamps = {image: _stamp(image) for image in _images(group)}
    for image, stamp in stamps.items():
        if known.get(image, {}).get("stamp") != [*stamp]:
            known[image] = {"stamp": [*stamp], "hash": image_hash(Path(image))}
    record = _stored(folder, group, known)
    if record is None:
        pair = load_pair(*group, data=data)
        if changed := [image for image, stamp in stamps.items() if _stamp(image) != stamp]:
            raise DataError(f"{changed[0]}: changed while it was read; run the same command again when it is complete")
        record = _write(folder / _key(group, known), pair, group, data, masks)
    return known, record


def _write(base: Path, pair: Pair, group: Group, data: DataSettings, masks: bool) -> dict[str, Any]:
    """The record of a case after writing its volumes and, with `masks`, its labels, and then the record itself."""
    volumes, target = [*pair.sources, pair.target], pair.target
    kinds = [*[data.intensity.source] * len(group), data.intensity.target]
    rules = [intensity_of(volume, kind, data) for volume, kind in zip(volumes, kinds, strict=True)]
    names = [*(case.source for case in group), group[0].target]
    files = [base.with_name(f"{base.name}.{name}.npy") for name in names]
    for file, volume, rule in zip(files, volumes, rules, strict=True):
        _write_npy(file, np.float32, volume.array, rule.normalise)
    named = {"source_files": [file.name for file in files[:-1]], "target_file": files[-1].name}
    mask: dict[str, Any] = {"mask_file": "", "label_names": {}}
    if masks and pair.labels is not None:
        files.append(base.with_name(f"{base.name}-mask.npy"))  # no modality's name can make this one
        _write_npy(files[-1], np.uint8, pair.labels)
        mask = {"mask_file": files[-1].name, "label_names": pair.label_names}
    record = {
        **named,
        **mask,
        "num_bytes": [file.stat().st_size for file in files],
        "shape": list(target.array.shape),
        "spacing_mm_zyx": list(target.spacing_mm_zyx),
        "source_intensities": [rule.as_dict() for rule in rules[:-1]],
        "target_intensity": rules[-1].as_dict(),
        "foreground": shown_in(target, rules[-1]).mean(axis=(1, 2)).round(6).tolist(),
    }
    _update_json(base.with_name(f"{base.name}.json"), record)
    return record


def _write_npy(
    path: Path, dtype: type, array: np.ndarray, of_plane: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": array.shape}
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for plane in array:  # so that no second copy of the volume is held
            file.write(of_plane(plane).astype(dtype, order="C", copy=False).data)


def _read_json(path: Path) -> dict[str, Any]:
    """What the file holds; nothing when it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _update_json(path: Path, content: dict[str, Any]) -> None:
    if _read_json(path) != content:
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def slices_of(store: Prepared, split: str, min_foreground: float = 0.0) -> list[tuple[PreparedCase, int]]:
    """All slices of a split that show at least that share of foreground, in the order of the manifest."""
    return [
        (case, index)
        for case in store.cases
        if case.split == split
        for index, share in enumerate(case.foreground)
        if share >= min_foreground
    ]


def read_pair(store: Prepared, case: PreparedCase, index: int, pair: np.ndarray | None = None) -> np.ndarray:
    """One slice of every source and, last, of the target: (C + 1, H, W) float32 in [-1, 1], in `pair` if given.

    Raises DataError when a file is shorter than it was written, or gone.
    """
    if pair is None:
        pair = np.empty((len(case.sources) + 1, *case.shape[1:]), np.float32)
    for out, file, num_bytes in zip(pair, (*case.source_files, case.target_file), case.num_bytes, strict=False):
        _read_plane(store.folder / file, num_bytes, case.shape[0] - index, out)
    return pair


def read_labels(store: Prepared, case: PreparedCase, index: int) -> np.ndarray:
    """One slice (H, W) uint8 of the mask's labels; 0 where the case has no mask in the store. Raises as `read_pair`."""
    labels = np.zeros(case.shape[1:], np.uint8)
    if case.mask_file:
        _read_plane(store.folder / case.mask_file, case.num_bytes[-1], case.shape[0] - index, labels)
    return labels


def _read_plane(path: Path, num_bytes: int, planes_left: int, out: np.ndarray) -> None:
    """Fill `out` with the plane of a file of `num_bytes` behind whose start there are so many planes."""
    try:
        # Read, not memory-mapped: every map would hold an open file, and one that is cut short would end the process.
        with open(path, "rb", buffering=0) as file:
            file.seek(num_bytes - planes_left * out.nbytes)
            read = file.readinto(out.data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run the same command again") from None
    if read < out.nbytes:
        raise DataError(f"{path}: shorter than it was written; run the same command again")


def read_slice(
    store: Prepared, case: PreparedCase, index: int, context_slices: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Source (C, H, W) and target (1, H, W) of one slice, float32 in [-1, 1].

    With `context_slices` every source channel comes with that many slices before and behind it, in their order.
    """
    pair = read_pair(store, case, index)
    if not context_slices:
        return pair[:-1], pair[-1:]
    around = np.clip(range(index - context_slices, index + context_slices + 1), 0, case.shape[0] - 1)
    sources = [pair[:-1] if k == index else read_pair(store, case, int(k))[:-1] for k in around]
    return np.stack(sources, axis=1).reshape(-1, *pair.shape[1:]), pair[-1:]
