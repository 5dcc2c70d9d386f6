"""Predictions against targets under a named protocol → tables of slices, cases, patients, and what they show.

Beside the prediction stands what costs no network: the source as it is, and the fits of `baselines.py`. Reads from top
to bottom: evaluate → match → score. `docs/metrics.md` defines every column.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track

from seresvit.config import DataSettings
from seresvit.data import read_volume
from seresvit.data.geometry import resampled
from seresvit.data.intensity import Intensity
from seresvit.data.pair import Pair, load_pair, matched_slices, only_inside
from seresvit.data.pairing import Case, read_manifest
from seresvit.data.volume import DataError, Volume, origins_mm, same_grid
from seresvit.evaluation.baselines import Baseline, fit_baselines
from seresvit.evaluation.metrics import find_protocol, in_protocol_values, score, score_slices
from seresvit.evaluation.regions import region_scores, tally
from seresvit.evaluation.tables import (
    IDENTITY,
    METHODS,
    Evaluation,
    patients_of,
    read_cases,
    rival_cases,
    statistics_of,
    summarise,
    write,
)
from seresvit.evaluation.texture import TargetTexture, edge_sharpness, noise_ratios, target_texture
from seresvit.evaluation.tissues import BODY_ABOVE_HU, TISSUES_HU, label_regions, tissue_map


@dataclass(frozen=True)
class Prediction:
    """One prediction folder, what its prediction.json says, and the manifest's cases (one a channel) that it is of.

    Without `cases` the manifest does not know it.
    """

    folder: Path
    record: dict[str, Any]
    cases: tuple[Case, ...]

    @property
    def of(self) -> tuple[str, str]:
        """Patient and source, "T1+T2" for several channels."""
        return str(self.record["patient"]), str(self.record["source"])

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(case.source for case in self.cases)


def evaluate(
    predictions: Path,
    manifest: Path,
    protocol: str,
    out: Path,
    allow_missing: bool = False,
    against: Path | None = None,
) -> Evaluation:
    """The tables of all predictions below `predictions`, which are also written into `out`.

    `out` gets slices, cases, patients, summary and statistics as CSV, evaluation.json and evaluation.xlsx. Each folder
    with a prediction.json is matched to the manifest by patient and source ("T1+T2" for several channels), its slices
    to the target's by position. `against`: the folder of another evaluation of the same cases, to compare with.

    Raises ConfigError for an unknown protocol, and DataError, with nothing written, that lists every fault: a folder
    that the manifest does not know, a test case without prediction (of the sources that were predicted), a missing
    slice, a slice that was not predicted, a slice that only source or target has. With `allow_missing` the last four
    are counted in the summary instead. Where training resampled, images may reach differently far: slices that not all
    of them cover are then counted and noted, and no fault.
    """
    predictions, out = Path(predictions), Path(out)
    find_protocol(protocol)
    cases = read_manifest(Path(manifest))
    matched, unpredicted, faults = _match(predictions, cases)
    missing = [f"{case.name} is a test case without prediction: predict it too" for case in unpredicted]
    _refuse(predictions, faults + ([] if allow_missing else missing))
    known = {(case.patient, case.source): case for case in cases}
    baselines = fit_baselines((p.sources for p in matched), cases, _geometry(matched[0].record), protocol)
    slice_rows: list[dict[str, Any]] = []
    case_rows: list[dict[str, Any]] = []
    unmatched: list[str] = []
    notes = [] if any(baselines.values()) else [_why_no_baseline(cases)]
    console = Console(stderr=True)
    for prediction in track(matched, "evaluate", console=console, transient=True, disable=not console.is_terminal):
        try:
            scored = _score_prediction(prediction, protocol, baselines[prediction.sources], known)
        except DataError as error:
            faults.append(str(error))
            continue
        slice_rows += scored.slices
        case_rows += scored.cases
        missing += scored.missing
        notes += scored.notes
        unmatched += scored.unmatched
    _refuse(predictions, faults + ([] if allow_missing else missing))
    cases_table = pd.DataFrame(case_rows)
    other = None if against is None else read_cases(Path(against), cases_table, protocol)
    evaluation = Evaluation(
        protocol,
        pd.DataFrame(slice_rows),
        cases_table,
        summarise(cases_table, protocol, Counter((case.split, case.source) for case in unpredicted)),
        patients_of(cases_table if other is None else pd.concat([cases_table, rival_cases(other, str(against))])),
        statistics_of(cases_table, protocol, other, str(against)),
        tuple(notes),
        tuple(missing),
        tuple(unmatched),
    )
    write(evaluation, out)
    return evaluation


def _refuse(predictions: Path, faults: list[str], most: int = 8) -> None:
    if faults:
        more = f" · and {len(faults) - most} more" if len(faults) > most else ""
        raise DataError(f"{predictions}: nothing was evaluated: {' · '.join(faults[:most])}{more}")


def _why_no_baseline(cases: list[Case]) -> str:
    if not any(case.split == "train" for case in cases):
        return "the manifest has no training case, on which a fit or curve could be made: these rows are left out"
    return "no training case has its sources in the target's unit: rows of fits and curves are left out"


# Match: which prediction is of which case.


def _match(predictions: Path, cases: list[Case]) -> tuple[list[Prediction], list[Case], list[str]]:
    """The predictions in the manifest's order, the test cases that should have one, and a line for each fault.

    A test case of several channels is told once, by its first channel and the source "T1+T2".
    """
    if not predictions.is_dir():
        raise DataError(f"{predictions}: no such folder; give the folder that seresvit predict wrote")
    known = {(case.patient, case.source): case for case in cases}
    found: dict[tuple[str, str], Prediction] = {}
    faults = []
    for folder in sorted(p for p in predictions.iterdir() if p.is_dir() and not p.name.startswith(".")):
        record = _read_record(folder)
        if record is None:
            faults.append(f"{folder.name} has no readable prediction.json: predict it again or remove it")
            continue
        prediction = prediction_of(folder, record, known)
        if not prediction.cases:
            faults.append(
                f"{folder.name} is of no case of the manifest: remove it or use the manifest it was made with"
            )
        elif prediction.of in found:
            faults.append(f"{folder.name} predicts what {found[prediction.of].folder.name} does: remove one")
        else:
            found[prediction.of] = prediction
    if not found and not faults:
        raise DataError(f"{predictions}: no folder with a prediction; give the folder that seresvit predict wrote")
    checkpoints = {prediction.record.get("checkpoint_sha256") for prediction in found.values()}
    if len(checkpoints) > 1:
        faults.append(f"the predictions are of {len(checkpoints)} different checkpoints: predict all of them again")
    predicted = {(prediction.cases[0].patient, prediction.sources) for prediction in found.values()}
    unpredicted = [
        replace(case, source="+".join(sources))
        for sources in dict.fromkeys(prediction.sources for prediction in found.values())
        for case in cases
        if case.split == "test" and case.source == sources[0] and (case.patient, sources) not in predicted
    ]
    order = {(case.patient, case.source): place for place, case in enumerate(cases)}
    in_order = sorted(found.values(), key=lambda p: order[p.cases[0].patient, p.cases[0].source])
    return in_order, unpredicted, faults


def prediction_of(folder: Path, record: dict[str, Any], known: dict[tuple[str, str], Case]) -> Prediction:
    """The prediction in `folder`, whose prediction.json is `record`; `known`: the manifest's by patient and source."""
    patient, source = str(record["patient"]), str(record["source"])
    names = [source] if (patient, source) in known else source.split("+")
    cases = tuple(known[patient, name] for name in names if (patient, name) in known)
    return Prediction(folder, record, cases if len(cases) == len(names) else ())


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    readable = isinstance(record, dict) and {"patient", "source"} <= record.keys()
    return record if readable else None


# Score: every method on the same slices of the same target.


@dataclass(frozen=True)
class _Scored:
    """The rows of one prediction, a row a slice or case and method, lines on what is lacking, and the slices that not
    all images of the case have."""

    slices: list[dict[str, Any]]
    cases: list[dict[str, Any]]
    missing: list[str]
    notes: list[str]
    unmatched: list[str]


@dataclass(frozen=True, eq=False)
class _Target:
    """What every method of a case is scored against: `values` in the protocol's, `numbers` of its slices."""

    pair: Pair
    numbers: np.ndarray
    values: np.ndarray
    texture: TargetTexture


def _score_prediction(
    prediction: Prediction, protocol: str, baselines: list[Baseline], known: dict[tuple[str, str], Case]
) -> _Scored:
    """Raises DataError, naming the prediction, when it cannot be scored."""
    name = prediction.folder.name
    pair, predicted = load_prediction(prediction)
    units = find_protocol(protocol).units
    if pair.target.unit not in units:
        raise DataError(
            f"{pair.target.path} holds {pair.target.unit} values, protocol {protocol} compares {' or '.join(units)}: "
            f"choose another protocol"
        )
    pair, numbers, array, missing, num_missing = _on_shared_slices(pair, predicted, prediction)
    recorded = Intensity.from_dict(prediction.record["intensity"]) if prediction.record.get("intensity") else None
    recorded_scale = recorded.high if recorded and recorded.kind == "percentile" else None
    methods: list[tuple[str, np.ndarray, float | None]] = [(METHODS[0], array, recorded_scale)]
    # An MR compared with a CT voxel by voxel would be a number without meaning.
    if pair.source.unit == pair.target.unit:
        methods.append((METHODS[1], pair.source.array, None))
    notes = []
    for baseline in baselines:
        sources = _sources_of(baseline, prediction, pair, known)
        if sources is None:
            needed = " and ".join(baseline.sources)
            notes.append(f"{name}: no {baseline.method}, which needs {needed} on every slice, in the target's unit")
            continue
        values = [in_protocol_values(source, protocol) for source in sources]
        methods.append((baseline.method, baseline.apply(values), 1.0))  # MR is scaled already
    if pair.dropped:
        (notes if _geometry(prediction.record).resample else missing).append(_unmatched_words(name, pair.dropped))
    case = prediction.cases[0]
    target = _target(pair, numbers, protocol)
    scored = _Scored([], [], missing, notes, [f"{name}: {one}" for one in pair.dropped])
    counts = {"missing_slices": num_missing, "unmatched_slices": len(pair.dropped)}
    for method, array, scale in methods:
        identity = dict(zip(IDENTITY, (case.patient, "+".join(prediction.sources), case.split, method), strict=True))
        try:
            of_slices, of_case = _score_method(target, array, scale, protocol)
        except DataError as error:
            raise DataError(f"{name}, {method}: {error}") from None
        scored.slices.extend(identity | row for row in of_slices)
        scored.cases.append(identity | {"slices": len(of_slices)} | counts | of_case)
    return scored


def _unmatched_words(name: str, dropped: list[str], most: int = 3) -> str:
    more = f" and {len(dropped) - most} more" if len(dropped) > most else ""
    are = "s that not all of its images have are" if len(dropped) > 1 else " that not all of its images have is"
    return f"{name}: {len(dropped)} slice{are} not scored ({', '.join(dropped[:most])}{more})"


def load_prediction(prediction: Prediction) -> tuple[Pair, Volume]:
    """The images of a case and what was predicted of it, on the target's grid, where every protocol scores.

    They are resampled to it where the prediction's record says that the network was trained so, and else never; slices
    that the prediction then does not reach are left out of it. Raises DataError when an image cannot be read.
    """
    folder, record = prediction.folder, prediction.record
    if record.get("mark") == "burned":
        raise DataError(f"{folder.name} has a word burned into its pixels: predict it again without --mark burned")
    geometry = _geometry(record)
    pair = load_pair(*prediction.cases, data=geometry, to_score=True)
    predicted = read_volume(folder / record.get("path", "."))
    if not geometry.resample:
        return pair, predicted
    predicted, covered = resampled(predicted, pair.target, geometry.interpolation)
    reached = np.flatnonzero(covered.any(axis=(1, 2)))
    if not reached.size:
        raise DataError(f"{folder.name} reaches no slice of its target: predict it again")
    # The reader may not have known the unit, and where nothing was predicted the target's background counts.
    predicted = only_inside(replace(predicted, unit=pair.target.unit), covered)
    affine = predicted.affine.copy()
    affine[:3, 3] = origins_mm(predicted, predicted.positions_mm[reached[:1]])[0]
    positions_mm = predicted.positions_mm[reached]
    return pair, replace(predicted, array=predicted.array[reached], affine=affine, positions_mm=positions_mm)


def _geometry(record: dict[str, Any]) -> DataSettings:
    """What the record says of the grid that the network was trained on."""
    try:
        return DataSettings(**{key: record[key] for key in ("resample", "interpolation") if key in record})
    except ValueError:
        raise DataError(
            f"{record.get('patient')} {record.get('source')}: its prediction.json holds no usable resample and "
            "interpolation; predict it again"
        ) from None


def _on_shared_slices(
    pair: Pair, predicted: Volume, prediction: Prediction
) -> tuple[Pair, np.ndarray, np.ndarray, list[str], int]:
    """The pair cut to the slices that were predicted, their numbers in it, and the predicted array (Z, Y, X) in that
    order; then what is lacking, in words and as a number of slices. Slices that the target lacks are left out."""
    name = prediction.folder.name
    if different := same_grid(predicted, pair.target):
        raise DataError(f"{name} is not on the target's grid: {different}; predict it again")
    in_target, in_prediction = matched_slices(pair.target, predicted)
    lacking = np.setdiff1d(np.arange(len(pair.target.array)), in_target)
    words = []
    if lacking.size:
        words.append(
            f"{name} lacks {lacking.size} of {len(pair.target.array)} slices of its target "
            f"(the first at {pair.target.positions_mm[lacking[0]]:.2f} mm): predict it again"
        )
    if not in_target.size:
        raise DataError(words[0])
    strange = 0
    if not _geometry(prediction.record).resample:
        strange = max(0, len(predicted.array) - int(prediction.record.get("num_slices", len(predicted.array))))
    if strange:
        words.append(f"{name} holds {strange} slices that were not predicted: predict it again")
    array, num_missing = predicted.array[in_prediction], int(lacking.size) + strange
    if not lacking.size:
        return pair, in_target, array, words, num_missing

    def cut(volume: Volume) -> Volume:
        return replace(volume, array=volume.array[in_target], positions_mm=volume.positions_mm[in_target])

    labels = None if pair.labels is None else pair.labels[in_target]
    pair = replace(pair, sources=tuple(map(cut, pair.sources)), target=cut(pair.target), labels=labels)
    return pair, in_target, array, words, num_missing


def _sources_of(
    baseline: Baseline, prediction: Prediction, pair: Pair, known: dict[tuple[str, str], Case]
) -> list[np.ndarray] | None:
    """The arrays that the baseline is applied to, on the slices of `pair`; None where this patient lacks them."""
    if baseline.sources == prediction.sources:
        volumes = pair.sources
    else:
        patient = prediction.cases[0].patient
        cases = [known[patient, source] for source in baseline.sources if (patient, source) in known]
        if len(cases) < len(baseline.sources):
            return None
        other = load_pair(*cases, data=_geometry(prediction.record), to_score=True)
        in_pair, in_other = matched_slices(pair.target, other.target)
        if len(in_pair) < len(pair.target.array):
            return None
        volumes = tuple(replace(volume, array=volume.array[in_other]) for volume in other.sources)
    if {volume.unit for volume in volumes} != {pair.target.unit}:
        return None
    return [volume.array for volume in volumes]


def _target(pair: Pair, numbers: np.ndarray, protocol: str) -> _Target:
    values = in_protocol_values(pair.target.array, protocol)
    is_hu = pair.target.unit == "HU"
    inside = values > (BODY_ABOVE_HU if is_hu else 0) if pair.labels is None else pair.labels > 0
    soft = inside & (tissue_map(values) == 1 + list(TISSUES_HU).index("soft")) if is_hu else None
    return _Target(pair, numbers, values, target_texture(values, inside, soft, pair.target.spacing_mm_zyx[1:]))


def _score_method(
    target: _Target, array: np.ndarray, scale: float | None, protocol: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the slices that count, and the row of the case: its volume's score, or the mean over these slices."""
    pair, labels = target.pair, target.pair.labels
    values = in_protocol_values(array, protocol, scale)
    of_volume = {}
    if find_protocol(protocol).per == "slice":
        of_slices = score_slices(pair.target.array, array, protocol, scale)
    else:
        mask = None if labels is None else labels > 0
        of_volume = score(pair.target.array, array, mask, protocol)
        error = np.abs(target.values - values)
        of_slices = [{"mae": _mean(e if mask is None else e[mask[z]])} for z, e in enumerate(error)]
    counted = [z for z, metrics in enumerate(of_slices) if metrics]
    if not counted:
        raise DataError(f"no slice counts under protocol {protocol}, since each is almost empty; is the target right?")
    is_hu = pair.target.unit == "HU"
    tallied = tally(target.values, values, labels, label_regions(pair.label_names), is_hu)
    rows = [
        {"slice": int(target.numbers[z]), "position_mm": float(pair.target.positions_mm[z])}
        | of_slices[z]
        | region_scores(tallied, [z])
        for z in counted
    ]
    metrics = of_volume or {
        name: float(np.mean([of_slices[z][name] for z in counted])) for name in of_slices[counted[0]]
    }
    texture = {"edge_sharpness": edge_sharpness(target.texture, values)}
    texture |= noise_ratios(target.texture, values) if is_hu else {}
    return rows, metrics | texture | region_scores(tallied, counted)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64)) if values.size else float("nan")
