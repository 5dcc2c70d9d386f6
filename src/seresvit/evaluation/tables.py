"""Scores of slices and cases → patients, summary and statistics; as CSV, xlsx and JSON, and for the terminal.

Slices of one patient are alike, and so are sources: what is tested is patients. `docs/metrics.md` defines every column.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from openpyxl.styles import Font
from rich.markup import escape
from rich.table import Table

from seresvit.config import ConfigError
from seresvit.data.volume import DataError, written_whole
from seresvit.evaluation.baselines import CURVE, LINEAR, TWO_ENERGY
from seresvit.evaluation.metrics import HIGHER_IS_BETTER, find_protocol, main_metrics
from seresvit.evaluation.regions import UNNAMED
from seresvit.evaluation.statistics import Difference, holm, paired_difference, sentence

METHODS = ("synthetic", "source unchanged", LINEAR, TWO_ENERGY, CURVE)
IDENTITY = ("patient", "source", "split", "method")
COUNTS = ("slices", "missing_slices", "unmatched_slices")
SHARES = ("ssim", "ms_ssim", "nmse")
RATIOS = ("edge_sharpness", "noise_ratio", "noise_low", "noise_mid", "noise_high")
OF_VALUES = ("bias_", "loa_", "target_")
MAX_LABELS_SHOWN = 6


@dataclass(frozen=True)
class Evaluation:
    """All tables under one protocol.

    `slices`: one row a slice and method; `cases`: one row a case and method; `patients`: one row a patient and method,
    the rival of `against` too, with the mean over the patient's cases; `summary`: one row a split, source (and "all")
    and method, with mean, standard deviation and number over its cases; `statistics`: one row a split, metric and
    comparison; `notes`: lines on what was left out and why; `missing`: lines on what should have been there and was
    not; `unmatched`: every slice that not all images of its case have.
    """

    protocol: str
    slices: pd.DataFrame
    cases: pd.DataFrame
    summary: pd.DataFrame
    patients: pd.DataFrame
    statistics: pd.DataFrame
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()


def metrics_in(table: pd.DataFrame) -> list[str]:
    """The columns of a table of cases or slices that hold scores, in their order."""
    return [name for name in table.columns if name not in (*IDENTITY, *COUNTS, "slice", "position_mm")]


def patients_of(cases: pd.DataFrame) -> pd.DataFrame:
    """One row a patient, split and method: how many cases, and the mean of each metric over those that have it."""
    groups = cases.groupby(["patient", "split", "method"], sort=False)
    return groups.size().to_frame("cases").join(groups[metrics_in(cases)].mean()).reset_index()


def summarise(cases: pd.DataFrame, protocol: str, missing_cases: Mapping[tuple[str, str], int]) -> pd.DataFrame:
    """One row a split, source ("all" last) and method: counts; each metric's mean, sample deviation and n over cases.

    `missing_cases`: (split, source) → how many test cases were not predicted.
    """
    main = main_metrics(protocol)
    rows = []
    for split, of_split in cases.groupby("split", sort=False):
        groups = [*of_split.groupby("source", sort=False), ("all", of_split)]
        for source, of_source in groups:
            lacking = sum(n for (s, one), n in missing_cases.items() if s == split and source in (one, "all"))
            for method in METHODS:
                of_method = of_source[of_source["method"] == method]
                if of_method.empty:
                    continue
                row: dict[str, Any] = {"protocol": protocol, "split": split, "source": source, "method": method}
                row |= {"patients": of_method["patient"].nunique(), "cases": len(of_method)}
                slices, *without = (int(of_method[name].sum()) for name in COUNTS)
                row |= {"slices": slices, "missing_cases": lacking} | dict(zip(COUNTS[1:], without, strict=True))
                for name in metrics_in(cases):
                    # A patient may lack a tissue; a metric of the protocol that could not be had must show.
                    values = of_method[name] if name in main else of_method[name].dropna()
                    with np.errstate(invalid="ignore"):  # an infinite PSNR has no deviation
                        row |= {f"{name}_mean": values.mean(skipna=False), f"{name}_std": values.std(skipna=False)}
                    row[f"{name}_n"] = len(values)
                rows.append(row)
    return pd.DataFrame(rows)


def statistics_of(cases: pd.DataFrame, protocol: str, against: pd.DataFrame | None, name: str) -> pd.DataFrame:
    """One row a split, metric of the protocol, and comparison of the synthetic images with another method, by patient.

    A patient's value is the mean over the cases that both have. p is adjusted by Holm over the comparisons of one
    split and metric. `against`: the cases of another evaluation, whose synthetic images are the method `name`.
    """
    rows = []
    for split, of_split in cases.groupby("split", sort=False):
        others = {method: of_split[of_split["method"] == method] for method in METHODS[1:]}
        if against is not None:
            others[name] = rival_cases(against[against["split"] == split], name)
        ours = of_split[of_split["method"] == METHODS[0]].set_index(["patient", "source"])
        for metric in main_metrics(protocol):
            differences = {}
            for method, other in others.items():
                theirs = other.set_index(["patient", "source"])[metric].rename("theirs")
                both = ours[metric].rename("ours").to_frame().join(theirs, how="inner")
                if not both.empty:
                    by_patient = both.dropna().groupby("patient", sort=False).mean()
                    differences[method] = paired_difference(by_patient["ours"], by_patient["theirs"])
            for method, difference in holm(differences).items():
                unit, is_better = unit_of(metric, protocol), metric in HIGHER_IS_BETTER
                words = sentence(METHODS[0], method, shown_name(metric), unit, difference, is_better)
                row = {"split": split, "metric": metric, "first": METHODS[0], "second": method}
                rows.append(row | asdict(difference) | {"sentence": words})
    columns = ["split", "metric", "first", "second", *(field.name for field in fields(Difference)), "sentence"]
    table = pd.DataFrame(rows, columns=columns)  # also without a row, where nothing can be compared
    return table.astype(dict.fromkeys(("mean", "low", "high", "p", "p_adjusted", "effect_size"), float))


def read_cases(folder: Path, cases: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """The cases of the evaluation in `folder`, if it is of the same protocol and of the same cases as `cases`.

    Raises ConfigError for another protocol, DataError for a folder that holds no evaluation or one of other cases or of
    fewer or more slices of them.
    """
    try:
        identity = {"patient": str, "source": str, "split": str}
        other, summary = (
            pd.read_csv(folder / name, dtype=identity, keep_default_na=False, na_values="")  # a patient may be "NA"
            for name in ("cases.csv", "summary.csv")
        )
        found = summary["protocol"].iloc[0]
        theirs = set(map(tuple, other[["patient", "source", "split"]].to_numpy()))
    except (OSError, ValueError, LookupError) as error:
        fault = " ".join(str(error).split())
        raise DataError(f"{folder}: holds no evaluation ({fault}); give a folder of seresvit evaluate") from None
    if found != protocol:
        raise ConfigError(f"--against {folder}: scored under {found}, this under {protocol}; evaluate both under one")
    ours = set(map(tuple, cases[["patient", "source", "split"]].astype(str).to_numpy()))
    if ours != theirs:
        raise DataError(
            f"{folder}: holds {len(theirs)} cases, {len(ours & theirs)} of them among the {len(ours)} evaluated here; "
            "predict and evaluate the same cases with both"
        )
    counts = [table.groupby(["patient", "source"])["slices"].max() for table in (cases, other)]
    if len(differing := counts[0][counts[0] != counts[1]]):
        raise DataError(
            f"{folder}: {len(differing)} cases were scored on other slices than here, such as "
            f"{' '.join(differing.index[0])}; predict and evaluate the same slices with both"
        )
    return other


def rival_cases(other: pd.DataFrame, name: str) -> pd.DataFrame:
    """The synthetic images of another evaluation's cases, as the cases of a method called `name`."""
    return other[other["method"] == METHODS[0]].assign(method=name)


# Write.


def write(evaluation: Evaluation, out: Path) -> None:
    """Writes slices, cases, patients, summary and statistics as CSV, all of them as JSON, and evaluation.xlsx."""
    tables = {name: getattr(evaluation, name) for name in ("summary", "cases", "slices", "patients", "statistics")}
    for name, table in tables.items():
        with written_whole(out / f"{name}.csv") as path:
            table.to_csv(path, index=False)
    record: dict[str, Any] = {"protocol": evaluation.protocol, "notes": evaluation.notes, "missing": evaluation.missing}
    record |= {"unmatched": evaluation.unmatched, "headline": headline(evaluation)}
    shown = tables | {"slices": _detail(evaluation)}
    record |= {name: [_as_json(row) for row in table.to_dict("records")] for name, table in shown.items()}
    with written_whole(out / "evaluation.json") as path:
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    _write_workbook(evaluation, out / "evaluation.xlsx")


def _detail(evaluation: Evaluation) -> pd.DataFrame:
    """Of slices.csv the protocol's metrics and MAE by region: with all, neither sheet nor JSON of many slices opens."""
    return evaluation.slices[[c for c in evaluation.slices.columns if not c.startswith((*OF_VALUES, "dice_"))]]


def _as_json(row: dict[Any, Any]) -> dict[str, Any]:
    """A row with null for what has no value, and infinity as text, since JSON has neither."""

    def value(one: Any) -> Any:
        if isinstance(one, float):
            return None if math.isnan(one) else str(one) if math.isinf(one) else float(one)
        return one.item() if isinstance(one, np.generic) else one

    return {str(name): value(one) for name, one in row.items()}


def _write_workbook(evaluation: Evaluation, out: Path) -> None:
    sheets = {"Summary": evaluation.summary, "Patient_Average": evaluation.cases, "Detail": _detail(evaluation)}
    with written_whole(out) as path, pd.ExcelWriter(path, engine="openpyxl") as workbook:
        for sheet_name, table in sheets.items():
            table.to_excel(workbook, sheet_name=sheet_name, index=False, freeze_panes=(1, 0))
            sheet = workbook.sheets[sheet_name]
            for column, cells in zip(table.columns, sheet.columns, strict=True):
                for cell in cells:
                    if cell.data_type == "f":  # a name that begins with "=" is no formula
                        cell.data_type, cell.quotePrefix = "s", True
                cells[0].font = Font(bold=True)
                for cell in cells[1:]:
                    if isinstance(cell.value, float):
                        cell.number_format = "0." + "0" * digits_of(column, evaluation.protocol)
                texts = [len(cell.value) if isinstance(cell.value, str) else 8 for cell in cells]
                sheet.column_dimensions[cells[0].column_letter].width = min(max(texts) + 2, 40)


# Show.


def render_table(evaluation: Evaluation) -> Table:
    """The summary for a terminal: a row a source and method, metrics as mean ± standard deviation over cases.

    Of all columns the protocol's own, and MAE of the first labels or, without named labels, of the tissues.
    """
    summary, protocol = evaluation.summary, evaluation.protocol
    hidden = {"split": summary["split"].nunique() == 1, "source": summary["source"].nunique() == 2}
    if hidden["source"]:  # one source: "all" says the same again
        summary = summary[summary["source"] != "all"]
    metrics = _shown_metrics([c.removesuffix("_mean") for c in summary.columns if c.endswith("_mean")], protocol)
    table = Table(title=f"Protocol {protocol}: mean ± standard deviation over cases")
    leading = [name for name in ("split", "source", "method") if not hidden.get(name)]
    for name in leading:
        table.add_column(name)
    table.add_column("cases", justify="right")
    for metric in metrics:
        unit = unit_of(metric, protocol)
        shown = shown_name(metric)
        table.add_column(escape(f"{shown} [{unit}]" if unit else shown), justify="right")
    for row in summary.to_dict("records"):
        cells = [_mean_and_std(row, metric, protocol) for metric in metrics]
        table.add_row(*(escape(row[name]) for name in leading), str(row["cases"]), *cells)
    return table


def sentences(evaluation: Evaluation) -> list[str]:
    """What the statistics say of MAE, a line a comparison; of the test split where there is one, else of all."""
    rows = _of_mae(evaluation).to_dict("records")
    return [row["sentence"] + ("" if row["split"] == "test" else f" [split {row['split']}]") for row in rows]


def headline(evaluation: Evaluation) -> str:
    """The sentence on MAE against the method that needs no network and comes closest; empty where none is there."""
    found = _of_mae(evaluation)
    found = found[found["second"].isin(METHODS)].dropna(subset=["mean"])
    return "" if found.empty else str(found.loc[found["mean"].idxmax(), "sentence"])


def _of_mae(evaluation: Evaluation) -> pd.DataFrame:
    found = evaluation.statistics[evaluation.statistics["metric"] == "mae"]
    tested = found[found["split"] == "test"]
    return found if tested.empty else tested


def _shown_metrics(metrics: list[str], protocol: str) -> list[str]:
    main = list(main_metrics(protocol))
    of_regions = [name for name in metrics if name.startswith("mae_")]
    named = [name for name in of_regions if not name.startswith("mae_hu_") and name != f"mae_{UNNAMED}"]
    return main + (named[:MAX_LABELS_SHOWN] or of_regions)


def shown_name(metric: str) -> str:
    """The metric as people write it: MS-SSIM, MAE bone (of a label), MAE bone by HU (of a range)."""
    name, _, region = metric.partition("_") if metric.startswith("mae_") else (metric, "", "")
    region = f"{region[3:]} by HU" if region.startswith("hu_") else region
    return f"{name.upper().replace('_', '-')} {region}".rstrip()


def unit_of(metric: str, protocol: str) -> str:
    """HU, dB or nothing."""
    if metric == "psnr":
        return "dB"
    is_of_values = metric.startswith(("mae", "rmse", *OF_VALUES))
    return "HU" if is_of_values and "HU" in find_protocol(protocol).units else ""


def digits_of(column: str, protocol: str) -> int:
    """Decimals to show: two for HU and dB, four for shares of one, three for ratios."""
    metric = column.removesuffix("_mean").removesuffix("_std")
    if metric in RATIOS or metric.startswith("dice_"):
        return 3
    of_values = metric.startswith(("mae", *OF_VALUES))
    return 4 if metric in SHARES or (protocol == "mr" and of_values) else 2


def _mean_and_std(row: dict[Any, Any], metric: str, protocol: str) -> str:
    mean, std = row[f"{metric}_mean"], row[f"{metric}_std"]
    digits = digits_of(metric, protocol)
    if np.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if np.isnan(std) else f" ± {std:.{digits}f}")
