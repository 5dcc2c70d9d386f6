"""Predictions written case by case: of one image, or of the cases of a manifest."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seresvit import __version__
from seresvit.config import ConfigError
from seresvit.data import read_volume, write_volume
from seresvit.data.deidentify import deidentified
from seresvit.data.mark import Mark
from seresvit.data.pair import load_sources
from seresvit.data.pairing import Case, image_hash, load_channels, read_manifest
from seresvit.data.volume import DataError, Volume, remove_abandoned, written_whole
from seresvit.synthesis.intervals import half_width
from seresvit.synthesis.pipeline import followed, overlapped, rank_and_size
from seresvit.synthesis.predictor import Predictor

RECORD = "prediction.json"


@dataclass(frozen=True)
class Failure:
    """A case that could not be predicted, and why, in one line."""

    name: str
    reason: str


@dataclass(frozen=True)
class Asked:
    """How results are written.

    `mark` puts the word SYNTHETIC on every slice, `anonymize` leaves nothing of the patient, `uncertainty` adds a
    second series, and `strict` refuses a source that `Predictor.doubts` doubts.
    """

    mark: Mark | None = None
    anonymize: bool = False
    uncertainty: bool = False
    strict: bool = False


class Loaded(NamedTuple):
    """A case as it was read, the folder that it goes to, and the hash of all that its result depends on."""

    sources: tuple[Volume, ...]
    out: Path
    patient: str
    source: str
    request: str


class Made(NamedTuple):
    """What is written of a case."""

    out: Path
    synthetic: Volume
    uncertainty: Volume | None
    record: dict[str, Any]


def predict_path(
    predictor: Predictor,
    source: Path,
    out: Path,
    mark: Mark | None = None,
    anonymize: bool = False,
    uncertainty: bool = False,
    strict: bool = False,
) -> Path:
    """Synthesise one folder of DICOM or PNG, or one image file, into the folder `out`, whole or not at all.

    The rest as in `Asked`. Raises ConfigError for an uncertainty of a single network that is not calibrated.
    """
    predict_image(predictor, source, out, Asked(mark, anonymize, uncertainty, strict))
    return out


def predict_image(predictor: Predictor, source: Path, out: Path, asked: Asked) -> tuple[Volume, Volume]:
    """The source as it was read and the synthetic volume, once `out` is written as by `predict_path`."""
    _check(predictor, asked)
    remove_abandoned(out.parent)
    with ThreadPoolExecutor(1, "hash") as beside:
        request = beside.submit(_request, predictor, asked, [source])
        volume = deidentified(read_volume(source)) if asked.anonymize else read_volume(source)
        named = (volume.patient, "") if asked.anonymize else ("", source.name)
        if obstacle := _obstacle(out, (volume,)):
            raise ConfigError(obstacle)
        loaded = Loaded((volume,), out, *named, request="")

        def make(follow: Callable[[Volume, int], None]) -> Made:
            made = _make(predictor, asked, loaded, follow)
            made.record["request"] = request.result()
            return made

        def write(synthetic: Volume | None, arriving: Iterator[int] | None, made: Callable[[], Made]) -> None:
            _write(predictor, asked, out, synthetic or made().synthetic, made, arriving)

        made = followed(make, write)
    return volume, made.synthetic


def predict_manifest(
    predictor: Predictor,
    manifest: Path,
    out: Path,
    split: str = "test",
    progress: Callable[[list[tuple[Case, ...]]], Iterable[tuple[Case, ...]]] = iter,
    mark: Mark | None = None,
    anonymize: bool = False,
    uncertainty: bool = False,
    strict: bool = False,
) -> list[Failure]:
    """Synthesise every case of a split into OUT/<case>; the cases that failed, the others being done all the same.

    `mark` to `strict` as in `Asked`; anonymous cases are named by a pseudonym of the patient. A case that was finished
    before, from the same files by the same checkpoint with the same options, is left as it is. Under torchrun each
    process does its share. Raises ConfigError when the split has no case.
    """
    asked = Asked(mark, anonymize, uncertainty, strict)
    _check(predictor, asked)
    cases = [case for case in read_manifest(manifest) if split in ("all", case.split)]
    groups = load_channels(cases, predictor.data.channels) if cases else []
    if not groups:
        raise ConfigError(f"{manifest}: no case in the split '{split}'; choose --split train, val, test or all")
    rank, num_processes = rank_and_size()
    groups, taken = groups[rank::num_processes], set[Path]()
    remove_abandoned(out)

    def read(group: tuple[Case, ...]) -> Loaded:
        source, patient = "+".join(case.source for case in group), group[0].patient
        images = [path for case in group for path in (case.source_path, case.mask_path) if path]
        request = _request(predictor, asked, images)
        if not anonymize and _is_finished(folder := out / f"{patient}_{source}", request):
            return Loaded((), folder, patient, source, request)
        volumes = tuple(load_sources(group, predictor.data))
        if anonymize:
            volumes = tuple(map(deidentified, volumes))
            patient = volumes[0].patient
        return Loaded(volumes, out / f"{patient}_{source}", patient, source, request)

    def work(group: tuple[Case, ...], loaded: Loaded) -> Made | None:
        if loaded.out in taken:
            raise DataError(f"{loaded.out}: another case of this study has that name; give it a source name of its own")
        taken.add(loaded.out)
        if _is_finished(loaded.out, loaded.request):
            return None
        if obstacle := _obstacle(loaded.out, loaded.sources):
            raise DataError(obstacle)
        return _make(predictor, asked, loaded)

    def write(group: tuple[Case, ...], made: Made | None) -> None:
        if made:
            _write(predictor, asked, made.out, made.synthetic, lambda: made)

    failures = []
    steps = overlapped(groups, read, work, write, (DataError, MemoryError, torch.OutOfMemoryError))
    for _, (group, error) in zip(progress(groups), steps, strict=True):
        if error is not None:
            reason = str(error) if isinstance(error, DataError) else "more than fits into memory"
            failures.append(Failure(f"{group[0].patient}_{'+'.join(case.source for case in group)}", reason))
    return failures


def _check(predictor: Predictor, asked: Asked) -> None:
    if asked.uncertainty and predictor.members.is_single and not predictor.intervals:
        raise ConfigError(
            f"--uncertainty: one prediction has no spread; add --flips, --planes or --ensemble, or calibrate "
            f"{predictor.path} with these options first (seresvit calibrate)"
        )


def _request(predictor: Predictor, asked: Asked, images: list[Path]) -> str:
    """The hash of all that the result depends on: the images' bytes, the checkpoints, the options, the version."""
    intervals = predictor.intervals.as_dict() if asked.uncertainty and predictor.intervals else None
    parts = [[image_hash(image) for image in images], predictor.members_record, predictor.names, intervals]
    options = [asked.mark, asked.anonymize, asked.uncertainty, asked.strict, __version__]
    return hashlib.sha256(json.dumps([*parts, *options], sort_keys=True).encode()).hexdigest()


def _is_finished(out: Path, request: str) -> bool:
    """Whether the folder holds, whole, what that request gave before."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record.get("request") == request and record.get("num_bytes") == _num_bytes(out)


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != RECORD)


def _make(
    predictor: Predictor, asked: Asked, loaded: Loaded, follow: Callable[[Volume, int], None] | None = None
) -> Made:
    sources = loaded.sources
    doubts = predictor.doubts(*sources)
    if doubts and asked.strict:
        raise DataError(f"{doubts[0]}; refused by --strict")
    started_s = time.monotonic()
    synthetic, spread, how = predictor.with_spread(*sources, follow=follow)
    elapsed_s = time.monotonic() - started_s
    for volume in sources:
        doubts = [doubt.removeprefix(f"{volume.path}: ") for doubt in doubts]
    uncertainty, intervals = None, predictor.intervals
    if asked.uncertainty and intervals:
        width = half_width(intervals, synthetic.array, None if spread is None else spread.array)
        uncertainty = replace(synthetic, array=width, energy_kev=None)
    elif asked.uncertainty and spread:
        uncertainty = replace(spread, energy_kev=None)
    record = {
        "patient": loaded.patient,
        "source": loaded.source,
        "target": predictor.target_name or "target",
        "checkpoint": predictor.path.name if asked.anonymize else str(predictor.path.absolute()),
        "checkpoint_sha256": predictor.checkpoint_sha256,
        "run": predictor.header.get("run", ""),
        "doubts": [*doubts, *how.pop("dropped")],
        **how,
        "members": predictor.members_record,
        "resample": predictor.data.resample,
        "interpolation": predictor.data.interpolation,
        "n4": predictor.data.n4,
        "mark": asked.mark,
        "anonymized": asked.anonymize,
        "num_slices": len(synthetic.array),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "elapsed_s": round(elapsed_s, 3),
        "device": str(predictor.device),
        "seresvit_version": __version__,
        "request": loaded.request,
    }
    return Made(loaded.out, synthetic, uncertainty, record)


def _write(
    predictor: Predictor,
    asked: Asked,
    out: Path,
    synthetic: Volume,
    made: Callable[[], Made],
    arriving: Iterable[int] | None = None,
) -> None:
    """`synthetic`, whose slices may be `arriving`, and what else was `made` once they are there."""
    target, intervals = predictor.target_name or "target", predictor.intervals

    def written(volume: Volume, folder: Path, description: str, **how: Any) -> str:
        sha256, mark = predictor.checkpoint_sha256, asked.mark
        path = write_volume(volume, folder, description=description, checkpoint_sha256=sha256, mark=mark, **how)
        return str(path.relative_to(temporary))

    with written_whole(out) as temporary:
        temporary.mkdir()
        title, energy_kev = f"Synthetic {target} (SE-ResViT)", predictor.target_energy_kev
        path = written(synthetic, temporary, title, energy_kev=energy_kev, arriving=arriving)
        _, _, uncertainty, record = made()
        record["path"] = path
        if uncertainty:
            kind = f"half-width of {100 * intervals.coverage:g}% interval" if intervals else "spread, not calibrated"
            description = f"Uncertainty of {target}: {kind}"
            path = written(uncertainty, temporary / "uncertainty", description, is_uncertainty=True)
            kind, coverage = ("interval", intervals.coverage) if intervals else ("spread", None)
            record["uncertainty"] = {"path": path, "kind": kind, "coverage": coverage, "unit": uncertainty.unit}
        record["num_bytes"] = _num_bytes(temporary)
        (temporary / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _obstacle(out: Path, sources: tuple[Volume, ...]) -> str:
    """Why `out` may not be written: it is neither new, empty nor an earlier prediction, or not apart from a source."""
    for volume in sources:
        taken, source = out.resolve(), volume.path.resolve()
        if taken == source or taken in source.parents or source in taken.parents:
            return f"{out}: holds, or lies in, the source {volume.path}; give another folder to write"
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file()):
        return f"{out}: exists and is no earlier prediction; give a new folder, nothing was replaced"
    return ""
