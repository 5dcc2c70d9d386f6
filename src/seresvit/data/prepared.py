"""The prepared store: matched slices on disk, made once, read one at a time, never taken for what they no longer are.

`prepared/` beside the manifest holds a folder for each set of settings that stored values depend on. In it a case
stands under a hash of its files' bytes: one `.npy` a volume and, written after them, a `.json` that describes them. So
wherever the work is stopped, a case is there whole or not at all, and two processes at one store write the same twice.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seresvit.config import DataSettings
from seresvit.data.intensity import Intensity, intensity_of, shown_in
from seresvit.data.pair import load_pair
from seresvit.data.pairing import Case, content_hash, image_files, image_hash, load_channels, read_manifest
from seresvit.data.volume import DataError, Volume, written_whole

INDEX, HASHES = "index.json", "hashes.json"
# Raise it when the same files and settings are to be stored as other values.
STORE_VERSION = 1
# Settings that act on stored slices only. Every other one, also a future one, is part of the folder's name.
NOT_STORED = {"context_slices", "min_foreground", "flip", "max_rotation_deg", "max_shift", "max_scale", "augment"}
# Worker processes take seconds to start: images of fewer bytes are prepared in this one.
WORKERS_FROM_BYTES = 2**26
# Two changes within one tick of a file system's clock look like one: a hash so fresh is not remembered.
SETTLED_AFTER_NS = 2 * 10**9
ABANDONED_AFTER_S = 24 * 3600

Group = tuple[Case, ...]  # the cases read together: one, or a patient's channels
Known = dict[str, dict[str, Any]]  # image path → its stamp and, under that stamp, its hash


@dataclass(frozen=True)
class PreparedCase:
    """A matched pair on disk: `.npy` names, and what turns their values into [-1, 1].

    `dtypes` and `num_bytes` are of the source files in order and, last, of the target file; `foreground` is the share
    of each slice's target that is above its lower bound.
    """

    name: str
    patient: str
    split: str
    sources: list[str]
    target: str
    source_files: list[str]
    target_file: str
    dtypes: list[str]
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
) -> Prepared:
    """The prepared store of `manifest`, beside it; only cases with new bytes or settings are made.

    Every volume becomes one `.npy` of matched slices in its own unit, int16 where that is exact and else float32.
    `workers` processes (None: one a core) make one case at a time each; `progress` wraps the list of those cases.
    Raises DataError for images that cannot be paired or scaled, and for a store that cannot be written.
    """
    started_ns = time.time_ns()
    groups = load_channels(read_manifest(manifest), data.channels)
    folder = manifest.absolute().parent / "prepared" / _fingerprint(data)
    _remove_abandoned(folder)
    stamps = {image: _stamp(image) for image in sorted({image for group in groups for image in _images(group)})}
    remembered: Known = _read_json(folder.parent / HASHES)
    known = {image: remembered[image] for image, s in stamps.items() if remembered.get(image, {}).get("stamp") == [*s]}
    records = {group: _stored(folder, group, known) for group in groups}
    lacking = [group for group, record in records.items() if record is None]
    num_bytes = sum(stamps[image].num_bytes for group in lacking for image in _images(group))
    count = min(workers or os.cpu_count() or 1, len(lacking)) if workers or num_bytes >= WORKERS_FROM_BYTES else 1
    tasks = [(folder, data, group, {i: known[i] for i in _images(group) if i in known}) for group in lacking]
    try:
        with _mapping(count) as mapped:
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


def _fingerprint(data: DataSettings) -> str:
    settings = data.model_dump(mode="json", exclude=NOT_STORED)
    return hashlib.blake2b(json.dumps([STORE_VERSION, settings], sort_keys=True).encode(), digest_size=6).hexdigest()


def _images(group: Group) -> list[str]:
    """The paths of all images of a case, each once."""
    paths = [path for case in group for path in (case.source_path, case.target_path, case.mask_path) if path]
    return [str(path) for path in dict.fromkeys(paths)]


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
    files = [folder / file for file in (*record["source_files"], record["target_file"])]
    sizes = [file.stat().st_size if file.is_file() else None for file in files]
    return record if sizes == record["num_bytes"] else None


def _key(group: Group, known: Known) -> str:
    """The name under which a case is stored: other bytes, other name."""
    images = [[case.source, *(known[image]["hash"] for image in _images((case,)))] for case in group]
    parts = json.dumps([*images, group[0].target]).encode()
    return f"{_identity(group)['name']}-{hashlib.blake2b(parts, digest_size=8).hexdigest()}"


def _make(task: tuple[Path, DataSettings, Group, Known]) -> tuple[Known, dict[str, Any]]:
    """The stamps and hashes of a case's images, and its record, after writing the case unless it was there."""
    folder, data, group, known = task
    stamps = {image: _stamp(image) for image in _images(group)}
    for image, stamp in stamps.items():
        if known.get(image, {}).get("stamp") != [*stamp]:
            known[image] = {"stamp": [*stamp], "hash": image_hash(Path(image))}
    record = _stored(folder, group, known)
    if record is None:
        pair = load_pair(*group, data=data)
        if changed := [image for image, stamp in stamps.items() if _stamp(image) != stamp]:
            raise DataError(f"{changed[0]}: changed while it was read; run the same command again when it is complete")
        names = [*(case.source for case in group), group[0].target]
        record = _write(folder / _key(group, known), [*pair.sources, pair.target], names, data)
    return known, record


def _write(base: Path, volumes: list[Volume], names: list[str], data: DataSettings) -> dict[str, Any]:
    """The record of a case after writing its volumes, the target last, and then the record itself."""
    kinds = [*[data.intensity.source] * (len(volumes) - 1), data.intensity.target]
    rules = [intensity_of(volume, kind, data) for volume, kind in zip(volumes, kinds, strict=True)]
    files = [base.with_name(f"{base.name}.{name}.npy") for name in names]
    dtypes = [_write_npy(volume.array, file) for volume, file in zip(volumes, files, strict=True)]
    target = volumes[-1]
    record = {
        "source_files": [file.name for file in files[:-1]],
        "target_file": files[-1].name,
        "dtypes": dtypes,
        "num_bytes": [file.stat().st_size for file in files],
        "shape": list(target.array.shape),
        "spacing_mm_zyx": list(target.spacing_mm_zyx),
        "source_intensities": [rule.as_dict() for rule in rules[:-1]],
        "target_intensity": rules[-1].as_dict(),
        "foreground": shown_in(target, rules[-1]).mean(axis=(1, 2)).round(6).tolist(),
    }
    _update_json(base.with_name(f"{base.name}.json"), record)
    return record


def _write_npy(array: np.ndarray, path: Path) -> str:
    """The type of the numbers in the `.npy` that was written: int16 where that is exact, else float32."""
    with np.errstate(invalid="ignore"):
        exact = all(np.array_equal(plane.astype(np.int16), plane) for plane in array)
    dtype = np.dtype(np.int16 if exact else np.float32)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": array.shape}
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for plane in array:  # so that no second copy of the volume is held
            file.write(plane.astype(dtype, order="C").data)
    return dtype.name


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


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left half-written, long after any living one would have finished it."""
    for path in (*folder.parent.glob(".writing-*"), *folder.glob(".writing-*")):
        with suppress(FileNotFoundError):  # a living one has just finished
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _mapping(count: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map`, or its like that works in `count` processes; what has not begun when the block ends is left undone."""
    if count <= 1:
        yield map
        return
    # Never a copy of this process, which may hold torch, its threads and a GPU.
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    context.set_forkserver_preload([__name__, "seresvit.data.dicom", "seresvit.data.nifti"])
    pool = ProcessPoolExecutor(count, context, _begin_worker)
    try:
        yield pool.map
    except BrokenProcessPool:
        raise DataError("prepared store: a worker process was killed, perhaps for memory; run it again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """One thread of computation, no word of Ctrl-C, and an end together with the process that it works for."""
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


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

    Raises DataError when a file is shorter than it was written.
    """
    if pair is None:
        pair = np.empty((len(case.intensities), *case.shape[1:]), np.float32)
    for out, rule, plane in zip(pair, case.intensities, stored_planes(store, case, index), strict=True):
        rule.normalise(plane, out)
    return pair


def stored_planes(store: Prepared, case: PreparedCase, index: int) -> Iterator[np.ndarray]:
    """One slice (H, W) of every source and, last, of the target, in their own units. Raises as `read_pair` does."""
    depth, height, width = case.shape
    for file, dtype, size in zip((*case.source_files, case.target_file), case.dtypes, case.num_bytes, strict=True):
        # Read, not memory-mapped: every map would hold an open file, and one that is cut short would end the process.
        start = size - height * width * np.dtype(dtype).itemsize * (depth - index)
        plane = np.fromfile(store.folder / file, dtype, height * width, offset=start)
        if plane.size < height * width:
            raise DataError(f"{store.folder / file}: shorter than it was written; run the same command again")
        yield plane.reshape(height, width)


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
