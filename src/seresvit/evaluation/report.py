"""One self-contained HTML page of whatever lies in a folder: of one evaluation, or of a comparison of fusions.

Reads from top to bottom: an evaluation's page → its viewer → its gates → a comparison's page. Every section is shown
where its files are there, and every image is inside the page, so that it can be sent as one file.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seresvit.data.volume import DataError, written_whole
from seresvit.evaluation.charts import (
    agreement,
    bland_altman,
    compared_curves,
    distributions,
    forest,
    slopes,
)
from seresvit.evaluation.gate_figures import BRANCH_NAMES
from seresvit.evaluation.gate_maps import GateMap, read_gate_maps
from seresvit.evaluation.gates import block_title
from seresvit.evaluation.knockouts import knockout_words
from seresvit.evaluation.metrics import HIGHER_IS_BETTER
from seresvit.evaluation.page import data_url, read_json, read_table, write_page
from seresvit.evaluation.panels import (
    Prediction,
    load_case,
    load_slices,
    panels,
    read_predictions,
    voxels,
)
from seresvit.evaluation.provenance import trained
from seresvit.evaluation.ranking import chosen_cases, ranked_cases
from seresvit.evaluation.scores import p_words, scores, tested
from seresvit.evaluation.statistics import signed
from seresvit.evaluation.tables import METHODS, digits_of, shown_name, unit_of
from seresvit.evaluation.viewer import linked_views, scripts

MEMORY = "report.json"
CONCAT = "concat"
MAX_COLUMNS = 4


def write_report(out: Path, predictions: Path | None = None, manifest: Path | None = None) -> Path:
    """The path of `out`/report.html, built again from what lies in `out`.

    The tables of seresvit evaluate give the scores, those and the figures of seresvit explain what the gates did; each
    is shown where it is there. `predictions` (a folder of seresvit predict) and `manifest` give the images and name
    the checkpoint; report.json remembers them, relative to `out`, for a later call without them. Raises DataError when
    `out` holds nothing to report, or when a file in it cannot be read.
    """
    out = Path(out)
    summary, cases, slices = (read_table(out / f"{name}.csv") for name in ("summary", "cases", "slices"))
    explained = read_json(out / "gates.json")
    if summary is None and explained is None:
        raise DataError(f"{out}: holds neither summary.csv nor gates.json; run seresvit evaluate or explain first")
    found, missing = read_predictions(*_remembered(out, predictions, manifest))
    trained_at = (found[0].record if found else {}).get("checkpoint") or (explained or {}).get("checkpoint")
    page: dict[str, Any] = {"missing": missing}
    if summary is not None:
        page |= scores(summary, read_table(out / "statistics.csv"))
        page["notes"] = (read_json(out / "evaluation.json") or {}).get("notes", [])
    if summary is not None and cases is not None:
        of_test = tested(cases)
        page |= {"distributions": distributions(of_test, page["protocol"])}
        page |= {"agreement": agreement(of_test, page["protocol"])}
        page |= {"slopes": _patient_slopes(out, page["protocol"])}
    maps = read_gate_maps(out) if explained is not None and not _is_other(explained, found) else []
    if cases is not None and slices is not None:
        page |= _images(cases, slices, found, maps)
    if explained is not None:
        page["gates"] = _gates(out, explained, found, maps)
    if trained_at:
        page["trained"] = trained(Path(trained_at), [prediction.record for prediction in found])
    return write_page(out / "report.html", "report.html.j2", page, scripts() if page.get("viewer") else ())


def _patient_slopes(out: Path, protocol: str) -> str:
    """MAE of each patient of the test split with every rival and with the network; "" where nothing can be paired."""
    patients = read_table(out / "patients.csv")
    if patients is None or "mae" not in patients:
        return ""
    means = tested(patients).pivot(index="patient", columns="method", values="mae")
    rivals = [name for name in tested(patients)["method"].unique() if name != METHODS[0]]
    return slopes(means, [(rival, METHODS[0]) for rival in rivals], "MAE", unit_of("mae", protocol), False)


def _remembered(out: Path, predictions: Path | None, manifest: Path | None) -> tuple[Path | None, Path | None]:
    """The paths given now, else those given before; and writes them down."""
    before = read_json(out / MEMORY) or {}
    places = {"predictions": predictions, "manifest": manifest}
    for name, path in places.items():
        if path is None and name in before:
            places[name] = Path(os.path.normpath(out / before[name]))
    relative = {name: os.path.relpath(path, out) for name, path in places.items() if path is not None}
    with written_whole(out / MEMORY) as temporary:
        temporary.write_text(json.dumps(relative, indent=1), encoding="utf-8")
    return places["predictions"], places["manifest"]


def _images(cases: pd.DataFrame, slices: pd.DataFrame, found: list[Prediction], maps: list[GateMap]) -> dict[str, Any]:
    """The images of a few cases, their voxels as one chart, and the case to scroll through; nothing without images."""
    chosen = chosen_cases(cases, slices)
    shown = load_slices(chosen, found, maps)
    pictures = panels(chosen, shown)
    if pictures is None:
        return {}
    target, synthetic = voxels([images for _, images in shown])
    chart = bland_altman(target, synthetic, pictures["unit"]) if len(target) > 1 else ""
    return {"panels": pictures, "bland_altman": chart, "viewer": _viewer(cases, slices, found, pictures["window"])}


def _viewer(
    cases: pd.DataFrame, slices: pd.DataFrame, found: list[Prediction], window: tuple[float, float]
) -> dict[str, Any] | None:
    """The case with the median error, at its slice with the largest."""
    ranked = ranked_cases(cases)
    patient, source = ranked.index[(len(ranked) - 1) // 2]
    for prediction in found:
        if prediction.cases and prediction.of == (patient, source):
            of_case = slices[(slices["patient"] == patient) & (slices["source"] == source)]
            of_network = of_case[of_case["method"] == METHODS[0]]
            worst = int(of_network.loc[of_network["mae"].idxmax(), "slice"])
            views = linked_views(load_case(prediction), window, worst)
            return {"patient": patient, "source": source, "part": views.pop("part"), "volumes": views}
    return None


# Gates: what explain found, with the images of its two examples.


def _is_other(explained: dict[str, Any], found: list[Prediction]) -> bool:
    """Whether the gates are of another checkpoint than the predictions: by its bytes, or by its place."""
    key = "checkpoint_sha256" if "checkpoint_sha256" in explained else "checkpoint"
    return bool(found) and found[0].record.get(key) != explained[key]


def _gates(
    out: Path, explained: dict[str, Any], found: list[Prediction], maps: Iterable[GateMap] = ()
) -> dict[str, Any]:
    """The claim and what was measured of it, the example table, the correlations and the figures, for the page."""
    examples = [
        {**example, "slices": [{"slice": example["slice"], "position_mm": example["position_mm"]}]}
        for example in explained["examples"]
    ]
    # A column a block and branch: of gates first, then of maps.
    parts = {"blocks": "shares", "maps": "map_means"}
    places = [
        (part, block, branch)
        for part in parts
        for block, of_block in explained.get(part, {}).items()
        for branch in BRANCH_NAMES
        if branch in of_block
    ]
    for example in examples:
        example["numbers"] = [f"{example[parts[part]][block][branch]:.4f}" for part, block, branch in places]
    moved = [explained[part][block][branch] for part, block, branch in places]
    told = ("num_images", "num_patients", "tissues_by", "finding", "run", "split")
    images = {name: out / f"{name}.png" for name in ("gates", "knockouts", "channels", "maps")}
    # Explain counts slices on the grid of training, which is the target's unless `data.resample` names another one.
    on_target = all(prediction.record.get("resample") in (None, "", "target") for prediction in found)
    return {
        **{name: explained[name] for name in told},
        "fusion": explained.get("fusion", ""),
        "claim": explained.get("claim"),
        "causal": explained.get("causal", []),
        "knockouts": _knockouts(out),
        "of_other_checkpoint": _is_other(explained, found),
        "columns": [
            f"{block_title(block)} {BRANCH_NAMES[branch]}{' map' if part == 'maps' else ''}"
            for part, block, branch in places
        ],
        "examples": examples,
        "panels": panels(examples, load_slices(examples, found, maps)) if on_target else None,
        "means": [f"{m['mean']:.4f} ± {m.get('std', m.get('std_over_images')):.4f}" for m in moved],
        "ranges": [f"{m['min']:.4f} to {m['max']:.4f}" if "min" in m else "–" for m in moved],
        "spreads": _spreads(explained),
        "carriers": _carriers(out, explained),
        "verdicts": [of["verdict"] for part in parts for of in explained.get(part, {}).values()],
        "tissues": list(dict.fromkeys(c["tissue"] for c in explained["correlations"])),
        "correlations": _correlations(explained["correlations"]),
        "figures": {name: data_url(path.read_bytes()) for name, path in images.items() if path.is_file()},
    }


def _spreads(explained: dict[str, Any]) -> list[dict[str, str]]:
    """A row a block: how far apart its channels lie in an image, how many of them are at an end, and how far one moves
    between images; mean, and lowest to highest image."""
    rows = []
    for block, of_block in explained.get("blocks", {}).items():
        if "in_image" in of_block:
            std, *ends = (of_block["in_image"][name] for name in ("std", "dead", "saturated"))
            row = {"block": block_title(block), "std": f"{std['mean']:.4f} ({std['min']:.4f} to {std['max']:.4f})"}
            for name, end in zip(("dead", "saturated"), ends, strict=True):
                row[name] = f"{end['mean']:.3g} ({end['min']:.0f} to {end['max']:.0f})"
            rows.append(row | {"moves": f"{of_block['std_over_images']:.4f}"})
    return rows


def _carriers(out: Path, explained: dict[str, Any]) -> dict[str, Any] | None:
    """The channels that the ranked tissue needs most: what the MAE of each tissue loses without each of them."""
    channels, found = read_table(out / "channels.csv"), explained.get("channels_carrying")
    if channels is None or not found or "mae_change" not in channels:
        return None
    tissue = found[0]["region"]
    suffixed = [name for name in channels.columns if name.startswith("mae_change_")]
    columns = {name: name.removeprefix("mae_change_").replace("_", " ") for name in suffixed}
    columns = {"mae_change": "whole image"} | columns
    by_place = channels.set_index(["block", "channel"])
    rows = []
    for one in found:
        row = by_place.loc[(one["block"], one["channel"])]
        changes = [row[name] for name in columns]
        most = max((change for change in changes if pd.notna(change)), default=None)
        interval = f"{signed(one['low'])} to {signed(one['high'])}" if one["low"] is not None else "–"
        cells = [(signed(change), change == most) for change in changes]
        rank = row.get("rank" if tissue == "image" else f"rank_{tissue}")
        gate = f"{row['mean']:.3f}" if "mean" in row else "–"
        facts = {"place": f"{block_title(one['block'])}, channel {one['channel']}", "rank": f"{rank:.0f}"}
        rows.append(facts | {"branch": BRANCH_NAMES[one["branch"]], "gate": gate, "interval": interval, "cells": cells})
    knockouts = read_table(out / "knockouts.csv")
    unit = knockouts["unit"].iloc[0] if knockouts is not None else ""
    words = "the whole image" if tissue == "image" else tissue
    return {
        "tissue": words,
        "unit": unit if isinstance(unit, str) else "",
        "columns": [*columns.values()],
        "rows": rows,
    }


def _correlations(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a source, block and branch: ρ by tissue, in words."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in entries:
        source = "all sources" if entry["source"] == "all" else entry["source"]
        row = rows.setdefault((source, entry["block"], entry["branch"]), {"counts": entry, "rho": {}})
        row["rho"][entry["tissue"]] = signed(entry["rho"], 2)
    return [
        {"source": source, "place": f"{block_title(block)} {BRANCH_NAMES[branch]}", **row}
        for (source, block, branch), row in rows.items()
    ]


def _knockouts(out: Path) -> list[dict[str, str]]:
    """The rows of knockouts.csv over the whole image, in words."""
    table = read_table(out / "knockouts.csv")
    if table is None:
        return []
    lines = []
    for row in table[table["region"] == "image"].to_dict("records"):
        unit = row["unit"] if isinstance(row["unit"], str) else ""
        lines.append(
            {
                "knockout": knockout_words(row["knockout"]),
                "site": "all blocks" if row["site"] == "all" else block_title(row["site"]),
                "change": f"{signed(row['change'])} {unit}".rstrip(),
                "interval": f"{signed(row['low'])} to {signed(row['high'])}" if pd.notna(row["low"]) else "–",
                "percent": f"{signed(row['percent'])} %",
                "n": str(row["n"]),
                "p": p_words(row["p_adjusted"]),
            }
        )
    return lines


# A comparison: fusions under one budget, from the tables of seresvit compare.


def write_comparison(out: Path) -> Path:
    """The path of `out`/report.html, of what seresvit compare wrote into `out`.

    Raises DataError without a compare.json, or when a file cannot be read.
    """
    out = Path(out)
    record = read_json(out / "compare.json")
    fusions, patients, comparisons, curves = (
        read_table(out / f"{name}.csv") for name in ("compare", "patients", "comparisons", "curves")
    )
    if record is None or fusions is None or patients is None:
        raise DataError(f"{out}: holds no compare.json with its tables; run seresvit compare first")
    protocol, metric = record["protocol"], record["metric"]
    unit = unit_of(metric, protocol)
    metrics = [name.removesuffix("_mean") for name in fusions.columns if name.endswith("_mean")]
    # Few enough columns for a printed page.
    parts = [metrics[first : first + MAX_COLUMNS] for first in range(0, len(metrics), MAX_COLUMNS)]
    page: dict[str, Any] = {"record": record, "metric": shown_name(metric)}
    page["tables"] = [_fusion_table(fusions, part, protocol) for part in parts]
    reference = CONCAT if CONCAT in record["fusions"] else record["fusions"][0]
    page |= {"reference": reference}
    means = patients.groupby(["fusion", "patient"], sort=False)[metric].mean().unstack("fusion")
    pairs = [(reference, fusion) for fusion in means.columns if fusion != reference]
    page["slopes"] = slopes(means, pairs, shown_name(metric), unit, metric in HIGHER_IS_BETTER)
    if comparisons is not None and len(comparisons):
        page |= {"forest": forest(comparisons, metric, unit), "comparisons": _comparisons(comparisons, protocol)}
    if curves is not None and len(curves):
        page["curves"] = compared_curves(curves, unit)
    return write_page(out / "report.html", "comparison.html.j2", page)


def _fusion_table(fusions: pd.DataFrame, metrics: list[str], protocol: str) -> dict[str, Any]:
    """A row a fusion: its metrics as mean ± deviation over patients (and over seeds), and its costs."""
    best = {m: fusions[f"{m}_mean"].max() if m in HIGHER_IS_BETTER else fusions[f"{m}_mean"].min() for m in metrics}
    lines = []
    plain: dict[Any, Any] = next((row for row in fusions.to_dict("records") if row["fusion"] == CONCAT), {})
    for row in fusions.to_dict("records"):
        cells = []
        for m in metrics:
            digits = digits_of(m, protocol)
            numbers = [f"{row[f'{m}_{part}']:.{digits}f}" for part in ("mean", "std_patients", "std_seeds")]
            text = f"{numbers[0]} ± {numbers[1]} ({numbers[2]})".replace("nan", "–")
            cells.append((text, len(fusions) > 1 and row[f"{m}_mean"] == best[m]))
        lines.append({"fusion": row["fusion"], "cells": cells, "costs": _costs(row, plain)})
    columns = [
        {"title": shown_name(m), "unit": unit_of(m, protocol), "better": "↑" if m in HIGHER_IS_BETTER else "↓"}
        for m in metrics
    ]
    return {"columns": columns, "rows": lines}


def _costs(row: dict[Any, Any], plain: dict[Any, Any]) -> list[str]:
    """Parameters, GFLOPs, and time relative to concat in training and prediction, "–" where not measured; `plain`: the
    row of concat, if there is one, beyond which parameters and FLOPs are also told in percent."""

    def ratio(name: str) -> str:
        low, value, high = (row.get(f"{name}_ratio{end}", np.nan) for end in ("_low", "", "_high"))
        return "–" if pd.isna(value) else f"{value:.3f}" + ("" if pd.isna(low) else f" ({low:.3f} to {high:.3f})")

    def number(name: str, form: str) -> str:
        value, before = row.get(name, np.nan), plain.get(name, np.nan)
        if pd.isna(value):
            return "–"
        more = "" if pd.isna(before) or value == before else f" ({signed(100 * (value / before - 1))} %)"
        return format(value, form) + more

    return [number("parameters", ",.0f"), number("gflops", ",.4g"), ratio("step"), ratio("predict")]


def _comparisons(comparisons: pd.DataFrame, protocol: str) -> list[dict[str, str]]:
    """A row a pair and metric, in words."""
    lines = []
    for row in comparisons.to_dict("records"):
        digits = digits_of(row["metric"], protocol)
        mean, low, high = (signed(row[name], digits) for name in ("mean", "low", "high"))
        lines.append(
            {
                "pair": f"{row['first']} − {row['second']}",
                "metric": shown_name(row["metric"]),
                "unit": unit_of(row["metric"], protocol),
                "mean": mean,
                "interval": f"{low} to {high}" if low != "–" else "–",
                "n": str(row["n"]),
                "p": p_words(row["p_adjusted"]),
                "effect_size": signed(row["effect_size"]),
            }
        )
    return lines
