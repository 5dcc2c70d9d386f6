"""The score tables of a report: methods as rows, then regions as rows; the best of each comparison in bold."""

import math
from typing import Any

import pandas as pd

from seresvit.evaluation.metrics import HIGHER_IS_BETTER, main_metrics
from seresvit.evaluation.regions import UNNAMED
from seresvit.evaluation.statistics import MINUS, signed
from seresvit.evaluation.tables import METHODS, digits_of, shown_name, unit_of

# Beside the protocol's own metrics, in the first table.
TEXTURE = {"edge_sharpness": "edge sharpness", "noise_ratio": "noise"}


def scores(summary: pd.DataFrame, statistics: pd.DataFrame | None) -> dict[str, Any]:
    """The tables of the summary and of its statistics, its headline and its protocol, as words for the page."""
    if summary["source"].nunique() == 2:  # one source: "all" says the same again
        summary = summary[summary["source"] != "all"]
    protocol = str(summary["protocol"].iloc[0])
    return {
        "scores": _score_table(summary, protocol),
        "regions": _region_table(summary, protocol),
        "differences": _differences(statistics, protocol) if statistics is not None else [],
        "headline": _headline(summary, statistics, protocol),
        "protocol": protocol,
        "methods": list(summary["method"].unique()),
    }


def _score_table(summary: pd.DataFrame, protocol: str) -> dict[str, Any]:
    main = [name for name in main_metrics(protocol) if f"{name}_mean" in summary]
    texture = [name for name in TEXTURE if f"{name}_mean" in summary and summary[f"{name}_mean"].notna().any()]
    groups = []
    for (split, source), rows in summary.groupby(["split", "source"], sort=False):
        best = {metric: _best(rows, metric) for metric in main}
        lines = [
            {
                "method": row["method"],
                "cells": [(_cell(row, m, protocol), row[f"{m}_mean"] == best.get(m)) for m in main + texture],
            }
            for row in rows.to_dict("records")
        ]
        counts = {name: int(rows[name].iloc[0]) for name in ("patients", "cases", "slices")}
        lacks = ("missing_cases", "missing_slices", "unmatched_slices")
        missing = {name: int(rows[name].iloc[0]) if name in rows else 0 for name in lacks}
        groups.append({"split": split, "source": _source_words(source), "rows": lines} | counts | missing)
    columns = [
        {"title": shown_name(m), "unit": unit_of(m, protocol), "better": "↑" if m in HIGHER_IS_BETTER else "↓"}
        for m in main
    ]
    columns += [{"title": TEXTURE[m], "unit": "", "better": "→ 1"} for m in texture]
    return {"columns": columns, "groups": groups, "splits": summary["split"].nunique() > 1, "texture": bool(texture)}


def _best(rows: pd.DataFrame, metric: str) -> float | None:
    """The best mean of several methods."""
    means = rows[f"{metric}_mean"]
    if len(rows) == 1:
        return None
    return float(means.max() if metric in HIGHER_IS_BETTER else means.min())


def _region_table(summary: pd.DataFrame, protocol: str) -> dict[str, Any] | None:
    """A row a region, in the headline's group: MAE of each method; bias, limits and Dice of the network."""
    rows = _headline_group(summary)
    metrics = [column.removesuffix("_mean") for column in summary.columns if column.endswith("_mean")]
    regions = [name.removeprefix("mae_") for name in metrics if name.startswith("mae_")]
    regions = [name for name in regions if rows[f"mae_{name}_mean"].notna().any()]
    if not regions:
        return None
    network = rows[rows["method"] == METHODS[0]].to_dict("records")
    lines = []
    for region in regions:
        best = _best(rows, f"mae_{region}")
        means = [row[f"mae_{region}_mean"] for row in rows.to_dict("records")]
        cells = [(_number(mean, "mae", protocol), mean == best) for mean in means]
        for row in network:
            limits = [_number(row.get(f"loa_{end}_{region}_mean"), f"loa_{end}_", protocol) for end in ("low", "high")]
            cells.append((_number(row.get(f"bias_{region}_mean"), "bias_", protocol, with_sign=True), False))
            cells.append((" to ".join(limits), False))
            cells.append((_number(row.get(f"dice_{region}_mean"), "dice_", protocol), False))
        n = rows.get(f"mae_{region}_n", rows["cases"]).max()
        lines.append({"region": region_words(region), "n": int(n), "cells": cells})
    return {
        "methods": list(rows["method"]),
        "cases": int(rows["cases"].iloc[0]),
        "unit": unit_of("mae", protocol),
        "rows": lines,
        "source": _source_words(str(rows["source"].iloc[0])),
        "dice": any(name.startswith("dice_") for name in summary.columns),
        "by_hu": any(name.startswith("hu_") for name in regions),
    }


def region_words(region: str) -> str:
    """A label by its name, a tissue by HU as such: the two may share a name and differ."""
    if region.startswith("hu_"):
        return f"{region.removeprefix('hu_')} by HU"
    return "inside the mask" if region == UNNAMED else region


def _differences(statistics: pd.DataFrame, protocol: str) -> list[dict[str, Any]]:
    """A row a metric and rival of the split that counts: difference, interval, p and effect size in words."""
    lines = []
    for row in tested(statistics).to_dict("records"):
        metric = row["metric"]
        ends = [_number(row[end], metric, protocol, with_sign=True) for end in ("low", "high")]
        lines.append(
            {
                "metric": shown_name(metric),
                "unit": unit_of(metric, protocol),
                "second": row["second"],
                "mean": _number(row["mean"], metric, protocol, with_sign=True),
                "interval": f"{ends[0]} to {ends[1]}" if ends[0] != "–" else "–",
                "n": int(row["n"]),
                "p": p_words(row["p_adjusted"]),
                "effect_size": _number(row["effect_size"], "", protocol, with_sign=True),
                "why": next((row[k] for k in ("why_no_interval", "why_no_p") if isinstance(row.get(k), str)), ""),
            }
        )
    return lines


def p_words(p: float | None) -> str:
    """A p-value as papers print it; a dash where there is none."""
    if p is None or math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _headline(summary: pd.DataFrame, statistics: pd.DataFrame | None, protocol: str) -> dict[str, Any] | None:
    """MAE of every method over the last group of the test split (all its sources), and what the statistics say."""
    rows = _headline_group(summary).to_dict("records")
    if "mae_mean" not in summary or len({row["split"] for row in rows}) != 1:
        return None
    figures = [(str(row["method"]), _number(row["mae_mean"], "mae", protocol)) for row in rows]
    counts = {name: int(rows[0][name]) for name in ("patients", "cases")}
    of_network = next((row["mae_mean"] for row in rows if row["method"] == METHODS[0]), math.nan)
    beaten_by = [str(row["method"]) for row in rows if row["mae_mean"] < of_network]
    sentences = []
    if statistics is not None and not statistics.empty:
        told = tested(statistics)
        sentences = list(told.loc[told["metric"] == "mae", "sentence"])
    words = {"unit": unit_of("mae", protocol), "split": rows[0]["split"], "sentences": sentences}
    return {"figures": figures, "beaten_by": beaten_by, **words, **counts}


def _headline_group(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last source ("all" of several) of the test split, or of what there is without one."""
    of_test = tested(summary)
    return of_test[of_test["source"] == of_test["source"].iloc[-1]]


def tested(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the test split, or all where there is none."""
    of_test = table[table["split"] == "test"]
    return table if of_test.empty else of_test


def _source_words(source: str) -> str:
    return "all sources" if source == "all" else source


def _cell(row: dict[Any, Any], metric: str, protocol: str) -> str:
    """Mean ± standard deviation, and over how many cases where not all have it."""
    mean, std = row[f"{metric}_mean"], row[f"{metric}_std"]
    text = _number(mean, metric, protocol)
    if text == "–":
        return text
    lacking = row.get(f"{metric}_n", row["cases"]) < row["cases"]
    number = f" (n = {row[f'{metric}_n']:.0f})" if lacking else ""
    return text + ("" if math.isnan(std) else f" ± {std:.{digits_of(metric, protocol)}f}") + number


def _number(value: float | None, metric: str, protocol: str, with_sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    digits = digits_of(metric, protocol)
    return signed(value, digits) if with_sign else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", MINUS)
