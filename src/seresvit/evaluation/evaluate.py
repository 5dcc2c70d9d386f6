"""Predictions against targets under a named protocol → tables of slices, cases and the summary of cases.

Beside the prediction stand what costs nothing: the source as it is, and the best monotone curve from source to target
values. A network that does not beat them has learned no anatomy. `docs/metrics.md` defines every column.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from openpyxl.styles import Font
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from scipy.optimize import isotonic_regression

from seresvit.config import DataSettings
from seresvit.data import read_volume
from seresvit.data.geometry import resampled
from seresvit.data.intensity import Intensity
from seresvit.data.pair import Pair, load_pair, matched_slices, only_inside
from seresvit.data.pairing import Case, read_manifest
from seresvit.data.volume import DataError, Volume, same_grid, written_whole
from seresvit.evaluation.metrics import find_protocol, in_protocol_values, score, score_slices

METHODS = ("synthetic", "source unchanged", "intensity curve")
CURVE_PROTOCOLS = ("dect", "uint8")
CURVE_CASES = 16
CURVE_PIXELS_A_CASE = 100_000
CURVE_SEED = 0
IDENTITY = ("patient", "source", "split", "method")
SHARES = ("ssim", "ms_ssim", "nmse")

Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """Three tables under one protocol.

    `slices`: one row a slice and method; `cases`: one row a case and method, with the mean over its slices; `summary`:
    one row a split, source (and "all") and method, with mean and standard deviation over its cases.
    """

    protocol: str
    slices: pd.DataFrame
    cases: pd.DataFrame
    summary: pd.DataFrame


@dataclass(frozen=True)
class _Prediction:
    """One prediction folder, what its record says, and the manifest's cases (one a channel) that it was made from."""

    folder: Path
    record: dict[str, Any]
    cases: tuple[Case, ...]

    @property
    def source(self) -> str:
        return "+".join(case.source for case in self.cases)


def evaluate(predictions: Path, manifest: Path, protocol: str, out: Path) -> Evaluation:
    """The tables of all predictions below `predictions`, which are also written into `out`.

    `out` gets slices.csv, cases.csv, summary.csv and evaluation.xlsx. Each folder with a prediction.json is matched to
    the manifest by patient and source ("T1+T2" for several channels), its slices to the target's by position. Raises
    ConfigError for an unknown protocol, and DataError, with nothing written, that lists every fault: a folder that the
    manifest does not know, a test case without prediction (of the sources that were predicted), a missing slice.
    """
    predictions, out = Path(predictions), Path(out)
    find_protocol(protocol)
    cases = read_manifest(Path(manifest))
    matched, faults = _match(predictions, cases)
    _refuse(predictions, faults)
    curves = _fit_curves(matched, cases, protocol)
    slice_rows: list[dict[str, Any]] = []
    case_rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for prediction in track(matched, "evaluate", console=console, transient=True, disable=not console.is_terminal):
        try:
            for of_slices, of_case in _score_prediction(prediction, protocol, curves.get(prediction.source)):
                slice_rows += of_slices
                case_rows.append(of_case)
        except DataError as error:
            faults.append(str(error))
    _refuse(predictions, faults)
    cases_table = pd.DataFrame(case_rows)
    evaluation = Evaluation(protocol, pd.DataFrame(slice_rows), cases_table, _summarise(cases_table, protocol))
    _write(evaluation, out)
    return evaluation


def _refuse(predictions: Path, faults: list[str], most: int = 8) -> None:
    if faults:
        more = f" · and {len(faults) - most} more" if len(faults) > most else ""
        raise DataError(f"{predictions}: nothing was evaluated: {' · '.join(faults[:most])}{more}")


# Match: which prediction is of which case.


def _match(predictions: Path, cases: list[Case]) -> tuple[list[_Prediction], list[str]]:
    """The predictions in the manifest's order, and a line for each fault."""
    if not predictions.is_dir():
        raise DataError(f"{predictions}: no such folder; give the folder that seresvit predict wrote")
    known = {(case.patient, case.source): case for case in cases}
    found: dict[tuple[str, str], _Prediction] = {}
    faults = []
    for folder in sorted(p for p in predictions.iterdir() if p.is_dir() and not p.name.startswith(".")):
        record = _read_record(folder)
        if record is None:
            faults.append(f"{folder.name} has no readable prediction.json: predict it again or remove it")
            continue
        patient, source = record["patient"], record["source"]
        names = [source] if (patient, source) in known else source.split("+")
        group = tuple(known[patient, name] for name in names if (patient, name) in known)
        if len(group) < len(names):
            faults.append(
                f"{folder.name} is of no case of the manifest: remove it or use the manifest it was made with"
            )
        elif (patient, source) in found:
            faults.append(f"{folder.name} predicts what {found[patient, source].folder.name} does: remove one")
        else:
            found[patient, source] = _Prediction(folder, record, group)
    if not found and not faults:
        raise DataError(f"{predictions}: no folder with a prediction; give the folder that seresvit predict wrote")
    checkpoints = {prediction.record.get("checkpoint_sha256") for prediction in found.values()}
    if len(checkpoints) > 1:
        faults.append(f"the predictions are of {len(checkpoints)} different checkpoints: predict all of them again")
    predicted = {(case.patient, case.source) for prediction in found.values() for case in prediction.cases}
    sources = {source for _, source in predicted}
    faults += [
        f"{case.name} is a test case without prediction: predict it too"
        for case in cases
        if case.split == "test" and case.source in sources and (case.patient, case.source) not in predicted
    ]
    order = {(case.patient, case.source): place for place, case in enumerate(cases)}
    return sorted(found.values(), key=lambda p: order[p.cases[0].patient, p.cases[0].source]), faults


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    readable = isinstance(record, dict) and {"patient", "source"} <= record.keys()
    return {**record, "patient": str(record["patient"]), "source": str(record["source"])} if readable else None


# Score: every method on the same slices of the same target.


def _score_prediction(
    prediction: _Prediction, protocol: str, curve: Curve | None
) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """For each method the rows of its slices and the row of the case. Raises DataError, naming the prediction."""
    pair, predicted = load_prediction(prediction.folder, prediction.record, prediction.cases)
    units = find_protocol(protocol).units
    if pair.target.unit not in units:
        raise DataError(
            f"{pair.target.path} holds {pair.target.unit} values, protocol {protocol} compares {' or '.join(units)}: "
            f"choose another protocol"
        )
    recorded = Intensity.from_dict(prediction.record["intensity"]) if prediction.record.get("intensity") else None
    recorded_scale = recorded.high if recorded and recorded.kind == "percentile" else None
    methods: list[tuple[str, np.ndarray, float | None]] = [
        (METHODS[0], _on_target_slices(predicted, prediction.folder.name, pair), recorded_scale)
    ]
    # An MR compared with a CT voxel by voxel would be a number without meaning.
    if pair.source.unit == pair.target.unit:
        methods.append((METHODS[1], pair.source.array, None))
    if curve is not None:
        methods.append((METHODS[2], np.interp(pair.source.array, *curve), None))
    case = prediction.cases[0]
    scored = []
    for method, array, scale in methods:
        identity = dict(zip(IDENTITY, (case.patient, prediction.source, case.split, method), strict=True))
        try:
            of_slices, of_case = _score_method(pair, array, scale, protocol)
        except DataError as error:
            raise DataError(f"{prediction.folder.name}, {method}: {error}") from None
        scored.append(([identity | row for row in of_slices], identity | of_case))
    return scored


def load_prediction(folder: Path, record: dict[str, Any], cases: tuple[Case, ...]) -> tuple[Pair, Volume]:
    """The images of a case and what was predicted in `folder`, on the target's grid, where every protocol scores.

    They are resampled to it where the prediction's record says that the network was trained so, and else never. Raises
    DataError when an image cannot be read or the prediction lacks a slice.
    """
    if record.get("mark") == "burned":
        raise DataError(f"{folder.name} has a word burned into its pixels: predict it again without --mark burned")
    geometry = _geometry(record)
    pair, predicted = load_pair(*cases, data=geometry, to_score=True), read_volume(folder / record.get("path", "."))
    if not geometry.resample:
        return pair, predicted
    predicted, covered = resampled(predicted, pair.target, geometry.interpolation)
    if lacking := int((~covered.any(axis=(1, 2))).sum()):
        raise DataError(f"{folder.name} lacks {lacking} of {len(covered)} slices of its target: predict it again")
    # The reader may not have known the unit, and where nothing was predicted the target's background counts.
    return pair, only_inside(replace(predicted, unit=pair.target.unit), covered)


def _geometry(record: dict[str, Any]) -> DataSettings:
    """What the record says of the grid that the network was trained on."""
    try:
        return DataSettings(**{key: record[key] for key in ("resample", "interpolation") if key in record})
    except ValueError:
        raise DataError(
            f"{record.get('patient')} {record.get('source')}: its prediction.json holds no usable resample and "
            "interpolation; predict it again"
        ) from None


def _on_target_slices(volume: Volume, name: str, pair: Pair) -> np.ndarray:
    """The predicted array (Z, Y, X) in the order of the target's slices; slices that the target lacks are left out."""
    if different := same_grid(volume, pair.target):
        raise DataError(f"{name} is not on the target's grid: {different}; predict it again")
    in_target, in_prediction = matched_slices(pair.target, volume)
    missing = np.setdiff1d(np.arange(len(pair.target.array)), in_target)
    if missing.size:
        raise DataError(
            f"{name} lacks {missing.size} of {len(pair.target.array)} slices of its target "
            f"(the first at {pair.target.positions_mm[missing[0]]:.2f} mm): predict it again"
        )
    return volume.array[in_prediction]


def _score_method(
    pair: Pair, array: np.ndarray, scale: float | None, protocol: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the slices that count, and the row of the case: its volume's score, or the mean over these slices."""
    target, labels = pair.target.array, pair.labels
    error = np.abs(in_protocol_values(target, protocol) - in_protocol_values(array, protocol, scale))
    of_volume = {}
    if find_protocol(protocol).per == "slice":
        of_slices = score_slices(target, array, protocol, scale)
    else:
        mask = None if labels is None else labels > 0
        of_volume = score(target, array, mask, protocol)
        of_slices = [{"mae": _mean(e if mask is None else e[mask[z]])} for z, e in enumerate(error)]
    counted = [z for z, metrics in enumerate(of_slices) if metrics]
    if not counted:
        raise DataError(f"no slice counts under protocol {protocol}, since each is almost empty; is the target right?")

    def per_label(where: Any) -> dict[str, float]:
        if labels is None:
            return {}
        return {f"mae_{name}": _mean(error[where][labels[where] == value]) for name, value in pair.label_names.items()}

    rows = [
        {"slice": z, "position_mm": float(pair.target.positions_mm[z]), **of_slices[z], **per_label(z)} for z in counted
    ]
    metrics = of_volume or {
        name: float(np.mean([of_slices[z][name] for z in counted])) for name in of_slices[counted[0]]
    }
    return rows, {"slices": len(counted), **metrics, **per_label(counted)}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64)) if values.size else float("nan")


def _fit_curves(predictions: list[_Prediction], cases: list[Case], protocol: str) -> dict[str, Curve]:
    """Source → the monotone curve with the least squared error from source to target values, as points to interpolate.

    Fitted on random pixels of at most CURVE_CASES random training patients, so that it is known before any test image;
    none without a training split, and none for several channels. (Barlow et al. 1972, by pool adjacent violators.)
    """
    curves: dict[str, Curve] = {}
    if protocol not in CURVE_PROTOCOLS:
        return curves
    for source, record in {p.source: p.record for p in predictions if len(p.cases) == 1}.items():
        rng = np.random.default_rng(CURVE_SEED)
        training = [case for case in cases if case.split == "train" and case.source == source]
        pixels = []
        for place in rng.permutation(len(training))[:CURVE_CASES]:
            pair = load_pair(training[place], data=_geometry(record), to_score=True)
            chosen = rng.integers(pair.target.array.size, size=min(CURVE_PIXELS_A_CASE, pair.target.array.size))
            pixels.append(np.stack([pair.source.array.ravel()[chosen], pair.target.array.ravel()[chosen]]))
        if pixels:
            source_values, target_values = np.concatenate(pixels, axis=1).astype(np.float64)
            levels, level_of, counts = np.unique(source_values, return_inverse=True, return_counts=True)
            means = np.bincount(level_of, weights=target_values) / counts
            curves[source] = levels, isotonic_regression(means, weights=counts).x
    return curves


# Tabulate: cases are the unit of statistics, since slices of one patient are alike.


def _summarise(cases: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """One row a split, source ("all" last) and method: counts, each metric's mean and sample deviation over cases."""
    metrics = [name for name in cases.columns if name not in (*IDENTITY, "slices")]
    rows = []
    for split, of_split in cases.groupby("split", sort=False):
        groups = [*of_split.groupby("source", sort=False), ("all", of_split)]
        for source, of_source in groups:
            for method in METHODS:
                of_method = of_source[of_source["method"] == method]
                if of_method.empty:
                    continue
                row: dict[str, Any] = {"protocol": protocol, "split": split, "source": source, "method": method}
                row |= {"patients": of_method["patient"].nunique(), "cases": len(of_method)}
                row["slices"] = int(of_method["slices"].sum())
                for name in metrics:
                    # A patient may lack a tissue; a metric that could not be had must show.
                    values = of_method[name].dropna() if name.startswith("mae_") else of_method[name]
                    with np.errstate(invalid="ignore"):  # an infinite PSNR has no deviation
                        row |= {f"{name}_mean": values.mean(skipna=False), f"{name}_std": values.std(skipna=False)}
                rows.append(row)
    return pd.DataFrame(rows)


def _write(evaluation: Evaluation, out: Path) -> None:
    tables = {"summary": evaluation.summary, "cases": evaluation.cases, "slices": evaluation.slices}
    for name, table in tables.items():
        with written_whole(out / f"{name}.csv") as path:
            table.to_csv(path, index=False)
    with written_whole(out / "evaluation.xlsx") as path, pd.ExcelWriter(path, engine="openpyxl") as workbook:
        for sheet_name, table in zip(("Summary", "Patient_Average", "Detail"), tables.values(), strict=True):
            table.to_excel(workbook, sheet_name=sheet_name, index=False, freeze_panes=(1, 0))
            sheet = workbook.sheets[sheet_name]
            for column, cells in zip(table.columns, sheet.columns, strict=True):
                cells[0].font = Font(bold=True)
                for cell in cells[1:]:
                    if isinstance(cell.value, float):
                        cell.number_format = "0." + "0" * _digits(column, evaluation.protocol)
                texts = [len(cell.value) if isinstance(cell.value, str) else 8 for cell in cells]
                sheet.column_dimensions[cells[0].column_letter].width = min(max(texts) + 2, 40)


def _digits(column: str, protocol: str) -> int:
    """Decimals to show: two for HU and dB, four for shares of one."""
    metric = column.removesuffix("_mean").removesuffix("_std")
    return 4 if metric in SHARES or (protocol == "mr" and metric.startswith("mae")) else 2


def render_table(evaluation: Evaluation) -> Table:
    """The summary for a terminal: a row a source and method, metrics as mean ± standard deviation over cases."""
    summary = evaluation.summary
    hidden = {"split": summary["split"].nunique() == 1, "source": summary["source"].nunique() == 2}
    if hidden["source"]:  # one source: "all" says the same again
        summary = summary[summary["source"] != "all"]
    unit = "HU" if "HU" in find_protocol(evaluation.protocol).units else ""
    units = {"mae": unit, "rmse": unit, "psnr": "dB"}
    metrics = [column.removesuffix("_mean") for column in summary.columns if column.endswith("_mean")]
    table = Table(title=f"Protocol {evaluation.protocol}: mean ± standard deviation over cases")
    leading = [name for name in ("split", "source", "method") if not hidden.get(name)]
    for name in leading:
        table.add_column(name)
    table.add_column("cases", justify="right")
    for metric in metrics:
        name, _, label = metric.partition("mae_")
        shown = f"MAE {label}" if label else name.upper().replace("_", "-")
        of_unit = units.get("mae" if label else name, "")
        table.add_column(escape(f"{shown} [{of_unit}]" if of_unit else shown), justify="right")
    for row in summary.to_dict("records"):
        cells = [_mean_and_std(row, metric, evaluation.protocol) for metric in metrics]
        table.add_row(*(escape(row[name]) for name in leading), str(row["cases"]), *cells)
    return table


def _mean_and_std(row: dict[Any, Any], metric: str, protocol: str) -> str:
    mean, std = row[f"{metric}_mean"], row[f"{metric}_std"]
    digits = _digits(metric, protocol)
    if np.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if np.isnan(std) else f" ± {std:.{digits}f}")
