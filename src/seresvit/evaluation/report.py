"""One self-contained HTML page of whatever lies in an evaluation folder: what was trained, scores, images, gates.

Reads from top to bottom: write_report → what was trained → scores → images → gates. Every image is inside the page, so
that it can be sent as one file and opens without a network; its content security policy lets nothing be loaded.
"""

import io
import json
import math
import os
import re
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import LogLocator, NullLocator

from seresvit import __version__
from seresvit.data.pair import matched_slices
from seresvit.data.pairing import Case, read_manifest
from seresvit.data.volume import DataError, Unit, Volume, same_grid, written_whole
from seresvit.evaluation.evaluate import METHODS, SHARES, load_prediction
from seresvit.evaluation.gates import BRANCHES, COLOURS, STYLE, block_title
from seresvit.evaluation.metrics import in_protocol_values
from seresvit.model import checkpoint

TEMPLATE = "report.html.j2"
MEMORY = "report.json"
MAX_CASES = 4
# Blue, white, red: no error is as white as the page.
ERROR_COLOURS = LinearSegmentedColormap.from_list("error", ["#0b3c7d", "#5b9bd1", "#ffffff", "#e2775b", "#8f1023"])
HIGHER_IS_BETTER = ("psnr", "ssim", "ms_ssim")

# Grey levels as a radiologist would set them: soft tissue, or wider where iodine would saturate it.
WINDOWS = {"HU": (-160.0, 240.0), "arbitrary": (0.0, 1.0), "uint8": (0.0, 255.0)}
CONTRAST_WINDOW_HU = (-200.0, 500.0)
SATURATED_SHARE = 0.02


@dataclass(frozen=True)
class _Prediction:
    """One prediction folder, what its prediction.json says, and the cases (one a channel) that it is of, if known."""

    folder: Path
    record: dict[str, Any]
    cases: tuple[Case, ...]

    @property
    def of(self) -> tuple[str, str]:
        """Patient and source."""
        return str(self.record["patient"]), str(self.record["source"])


@dataclass(frozen=True)
class _Images:
    """One slice as it is shown, every array (Y, X) in the values of `unit`; MR in parts of its own scale."""

    source: np.ndarray
    target: np.ndarray
    synthetic: np.ndarray
    source_unit: Unit
    unit: Unit
    pixel_aspect: float  # row distance over column distance
    supine_axial: bool  # rows run to the patient's left, columns to the back


def write_report(out: Path, predictions: Path | None = None, manifest: Path | None = None) -> Path:
    """The path of `out`/report.html, built again from what lies in `out`.

    summary.csv, cases.csv and slices.csv give the scores; gates.csv, gates.json and gates.png what the gates did; each
    is shown where it is there. `predictions` (a folder of seresvit predict) and `manifest` give the images and name
    the checkpoint; report.json remembers them, relative to `out`, for a later call without them. Raises DataError when
    `out` holds nothing to report, or when a file in it cannot be read.
    """
    out = Path(out)
    summary, slices = (_read(out / name, _table) for name in ("summary.csv", "slices.csv"))
    explained = _read(out / "gates.json", json.loads)
    if summary is None and explained is None:
        raise DataError(f"{out}: holds neither summary.csv nor gates.json; run seresvit evaluate or explain first")
    found, missing = _read_predictions(*_remembered(out, predictions, manifest))
    first = found[0].record if found else {}
    unit = (first.get("intensity") or {}).get("unit", "")
    trained_at = first.get("checkpoint") or (explained or {}).get("checkpoint")
    page: dict[str, Any] = {"version": __version__, "missing": missing}
    if summary is not None:
        page |= _scores(summary, unit)
    if slices is not None:
        page["panels"] = _panels(_chosen(slices), found)
    if explained is not None:
        page["gates"] = _gates(out, explained, found)
    if trained_at:
        page["trained"] = _trained(Path(trained_at), [prediction.record for prediction in found])
    templates = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    with written_whole(out / "report.html") as path:
        path.write_text(environment.get_template(TEMPLATE).render(page), encoding="utf-8")
    return out / "report.html"


def _remembered(out: Path, predictions: Path | None, manifest: Path | None) -> tuple[Path | None, Path | None]:
    """The paths given now, else those given before; and writes them down."""
    before = _read(out / MEMORY, json.loads) or {}
    places = {"predictions": predictions, "manifest": manifest}
    for name, path in places.items():
        if path is None and name in before:
            places[name] = Path(os.path.normpath(out / before[name]))
    relative = {name: os.path.relpath(path, out) for name, path in places.items() if path is not None}
    with written_whole(out / MEMORY) as temporary:
        temporary.write_text(json.dumps(relative, indent=1), encoding="utf-8")
    return places["predictions"], places["manifest"]


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of the file's text; None where there is no file."""
    if not path.is_file():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fault = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({fault}); remove it and run the command that wrote it") from None


def _table(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text), dtype={"patient": str, "source": str, "split": str})


def _read_predictions(folder: Path | None, manifest: Path | None) -> tuple[list[_Prediction], list[str]]:
    """The predictions, and sentences on what is no longer where it was."""
    if folder is None or manifest is None:
        return [], []
    records = {path.parent: _read(path, json.loads) for path in sorted(folder.glob("*/prediction.json"))}
    if not records:
        return [], [f"No images are shown: {folder} holds no predictions any more."]
    try:
        known = {(case.patient, case.source): case for case in read_manifest(manifest)}
    except DataError as error:
        return [_Prediction(path, record, ()) for path, record in records.items()], [f"No images are shown: {error}."]
    found = []
    for path, record in records.items():
        patient, source = _Prediction(path, record, ()).of
        names = [source] if (patient, source) in known else source.split("+")
        group = tuple(known[patient, name] for name in names if (patient, name) in known)
        found.append(_Prediction(path, record, group if len(group) == len(names) else ()))
    return found, []


# What was trained: from the checkpoint, and from the run folder that it lies in.


def _trained(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Facts as (term, words), curves and settings; less of it when the checkpoint or its run folder is gone."""
    facts: list[tuple[str, str]] = []
    try:
        state, header = checkpoint.read(path)
        learned = (
            tensor for key, tensor in state.items() if not re.search(r"\.(running_\w+|num_batches_tracked)$", key)
        )
        facts += _facts_of_checkpoint(header, sum(tensor.numel() for tensor in learned))
    except DataError:
        header = {}
        facts.append(("Checkpoint", f"{path.name}, no longer where it was at prediction"))
    run = path.parents[2] if len(path.parents) > 2 else path.parent
    made = _read(run / "manifest.json", json.loads) if (run / "config.yaml").is_file() else None
    log = _read_log(run / "log.jsonl") if made else pd.DataFrame()
    if made:
        patients, planes = made["num_patients"], made["num_slices"]
        verbs = {"train": "to train", "val": "to validate"}
        counts = (f"{patients[split]} {verb} ({planes[split]:,} slices)" for split, verb in verbs.items())
        facts.append(("Patients", ", ".join(counts)))
        if len(log):
            seen = (f"{of.images.max():,} in stage {stage}" for stage, of in log.groupby("stage"))
            facts.append(("Images seen", " and ".join(seen)))
        facts.append(("Machine", f"{made['device_name']} ({made['device']}), precision {made['precision']}"))
        versions = f"seresvit {made['seresvit']}, PyTorch {made['torch']}, Python {made['python']}"
        facts.append(("Software", versions + (f", commit {made['commit']}" if made.get("commit") else "")))
        facts.append(("Seed", str(made["seed"])))
    elif header:
        facts.append(("Software", f"seresvit {header['version']}, commit {header.get('commit') or 'not known'}"))
    if records:
        rate = sum(r["elapsed_s"] for r in records) / max(sum(r["num_slices"] for r in records), 1)
        facts.append(("Prediction", f"{rate:.2g} s a slice on {records[0].get('device', 'its device')}"))
        facts.append(("Checkpoint SHA-256", records[0]["checkpoint_sha256"][:16] + "…"))
    unit = (header.get("target_intensity") or {}).get("unit", "")
    return {
        "sources": header.get("sources") or sorted({r["source"] for r in records}),
        "target": header.get("target") or (records[0]["target"] if records else "target"),
        "facts": facts,
        "curves": _curves(log, unit) if len(log) else None,
        "settings": (run / "config.yaml").read_text(encoding="utf-8") if made else "",
    }


def _facts_of_checkpoint(header: checkpoint.Header, parameters: int) -> list[tuple[str, str]]:
    model, rule = header.get("model", {}), header.get("target_intensity") or {}
    unit = rule.get("unit", "").replace("arbitrary", "")
    blocks = " and ".join(f"ART {number}" for number in model.get("transformer_blocks", ()))
    kind = model.get("fusion", {}).get("kind")
    joined = {"se": "SE gates", "concat": "concatenation, no gates"}.get(kind, f"fusion {kind}")
    network = f"transformers in {blocks}, {joined}" if blocks else "convolutions only, no transformer"
    facts = [("Network", f"{network}; {parameters / 1e6:,.2f} million parameters")]
    if "train_size" in header:
        facts.append(("Image size in training", " × ".join(str(n) for n in header["train_size"])))
    if rule:
        facts.append(("Target values", f"{rule['low']:g} to {rule['high']:g} {unit}".replace("-", "−")))
    if "val_mae" in header:
        score = f"validation MAE {header['val_mae']:.1f} {unit}".strip()
        facts.append(("This checkpoint", f"stage {header['stage']} after {header['images']:,} images, {score}"))
    return facts


def _read_log(path: Path) -> pd.DataFrame:
    """The lines of log.jsonl with `seen`, the images over both stages; what a resumed run did again counts once."""
    kept: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        line = json.loads(text)
        now = line["stage"], line["images"]
        kept = [old for old in kept if (old["stage"], old["images"]) <= now] + [line]
    log = pd.DataFrame(kept, columns=None if kept else ["stage", "images"])
    first = log.loc[log["stage"] == 1, "images"].max() if (log["stage"] == 1).any() else 0
    return log.assign(seen=log["images"] + np.where(log["stage"] == 2, first, 0))


def _curves(log: pd.DataFrame, unit: str) -> str:
    """Losses and validation MAE by images seen, as a PNG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharex=True)
        names = {"l1": "L1", "adversarial": "adversarial", "discriminator": "discriminator"} | {
            term: term.replace("_", " ") for term in ("ms_ssim", "gradient", "perceptual")
        }
        for colour, (column, name) in zip(COLOURS, names.items(), strict=False):
            if column in log:
                drawn = log.dropna(subset=[column])
                left.plot(drawn["seen"], drawn[column], color=colour, linewidth=1.2, label=name)
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.yaxis.set_minor_locator(NullLocator())
        left.set_title("Training losses", loc="left")
        left.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        if "val_mae" in log:
            drawn = log.dropna(subset=["val_mae"])
            right.plot(drawn["seen"], drawn["val_mae"], color=COLOURS[0], linewidth=1.2, marker="o", markersize=3)
            right.set_ylim(bottom=0)
        right.set_title("MAE in validation" + (f" [{unit}]" if unit == "HU" else ""), loc="left")
        begins = log.loc[log["stage"] == 1, "seen"].max() if log["stage"].nunique() > 1 else None
        for axis in (left, right):
            axis.set_xlabel("images seen")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.locator_params(axis="x", nbins=6)
            if begins is not None:
                axis.axvline(begins, color="#aab2b9", linewidth=1, linestyle=":")
                axis.text(begins, 0.03, " stage 2", transform=axis.get_xaxis_transform(), fontsize=8, color="#5c6670")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=180)
    return _data_url(buffer.getvalue())


# Scores: methods as rows, the best of each column in bold.


def _scores(summary: pd.DataFrame, unit: str) -> dict[str, Any]:
    """The tables of the summary (all metrics, then MAE of each label), its headline and its protocol."""
    if summary["source"].nunique() == 2:  # one source: "all" says the same again
        summary = summary[summary["source"] != "all"]
    metrics = [column.removesuffix("_mean") for column in summary.columns if column.endswith("_mean")]
    of_labels = [metric for metric in metrics if metric.startswith("mae_")]
    chosen = {"": [m for m in metrics if m not in of_labels], "Mean absolute error by label": of_labels}
    tables = [{"title": title, **_score_table(summary, names, unit)} for title, names in chosen.items() if names]
    protocol = str(summary["protocol"].iloc[0]) if "protocol" in summary else ""
    words = {"protocol": protocol, "methods": list(summary["method"].unique())}
    return {"scores": tables, "headline": _headline(summary, unit), **words}


def _score_table(summary: pd.DataFrame, metrics: list[str], unit: str) -> dict[str, Any]:
    groups = []
    for (split, source), rows in summary.groupby(["split", "source"], sort=False):
        best = {}
        for metric in metrics:
            means = rows[f"{metric}_mean"]
            best[metric] = (means.max() if metric in HIGHER_IS_BETTER else means.min()) if len(rows) > 1 else None
        lines = [
            {
                "method": row["method"],
                "cells": [
                    (_mean_and_std(row, metric, summary), row[f"{metric}_mean"] == best[metric]) for metric in metrics
                ],
            }
            for row in rows.to_dict("records")
        ]
        counts = {name: int(rows[name].iloc[0]) for name in ("patients", "cases", "slices")}
        groups.append({"split": split, "source": "all sources" if source == "all" else source, "rows": lines} | counts)
    columns = []
    for metric in metrics:
        name, _, label = metric.partition("mae_")
        of_unit = "dB" if name == "psnr" else unit if unit == "HU" and (label or name in ("mae", "rmse")) else ""
        title = label or metric.upper().replace("_", "-")
        columns.append({"title": title, "unit": of_unit, "better": "↑" if name in HIGHER_IS_BETTER else "↓"})
    return {"columns": columns, "groups": groups, "splits": summary["split"].nunique() > 1}


def _digits(metric: str, summary: pd.DataFrame) -> int:
    """Decimals: four for shares of one (NMSE stands in the MR protocol only, whose MAE is one too), else two."""
    return 4 if metric in SHARES or ("nmse_mean" in summary and metric.startswith("mae")) else 2


def _mean_and_std(row: dict[Any, Any], metric: str, summary: pd.DataFrame) -> str:
    mean, std = row[f"{metric}_mean"], row[f"{metric}_std"]
    if math.isnan(mean):
        return "–"
    digits = _digits(metric, summary)
    number = "∞" if math.isinf(mean) else f"{mean:.{digits}f}"
    return number if math.isnan(std) else f"{number} ± {std:.{digits}f}"


def _headline(summary: pd.DataFrame, unit: str) -> dict[str, Any] | None:
    """MAE of every method over the last group of the test split (all its sources), for the large figures on top."""
    chosen = summary[summary["split"] == "test"] if (summary["split"] == "test").any() else summary
    rows = chosen[chosen["source"] == chosen["source"].iloc[-1]].to_dict("records")
    if "mae_mean" not in summary or len({row["split"] for row in rows}) != 1:
        return None
    figures = [(str(row["method"]), f"{row['mae_mean']:.{_digits('mae', summary)}f}") for row in rows]
    counts = {name: int(rows[0][name]) for name in ("patients", "cases")}
    of_network = next((row["mae_mean"] for row in rows if row["method"] == METHODS[0]), math.nan)
    beaten_by = [str(row["method"]) for row in rows if row["mae_mean"] < of_network]
    words = {"unit": unit if unit == "HU" else "", "split": rows[0]["split"]}
    return {"figures": figures, "beaten_by": beaten_by, **words, **counts}


# Images: cases from the best to the worst, of each the slice with median error and the one with the largest.


def _chosen(slices: pd.DataFrame) -> list[dict[str, Any]]:
    """Up to MAX_CASES cases, evenly spread over their ranks by MAE, with the two slices of each."""
    of_network = slices[slices["method"] == METHODS[0]].dropna(subset=["mae"])  # an empty mask has no error
    tested = of_network[of_network["split"] == "test"]
    of_network = of_network if tested.empty else tested
    ranked = of_network.groupby(["patient", "source"], sort=False)["mae"].mean().sort_values(kind="stable")
    chosen: list[dict[str, Any]] = []
    for place in sorted(set(np.linspace(0, len(ranked) - 1, MAX_CASES).round().astype(int).tolist())):
        patient, source = ranked.index[place]
        of_case = of_network[(of_network["patient"] == patient) & (of_network["source"] == source)].sort_values("mae")
        picks = {"median error": of_case.iloc[(len(of_case) - 1) // 2], "largest error": of_case.iloc[-1]}
        if len(of_case) == 1:
            picks.pop("median error")
        rows = [
            {"why": why, "slice": int(r["slice"]), "position_mm": r["position_mm"], "mae": r["mae"]}
            for why, r in picks.items()
        ]
        case = {"patient": patient, "source": source, "slices": rows}
        chosen.append(case | {"rank": place + 1, "of": len(ranked), "mae": float(ranked.iloc[place])})
    return chosen


def _panels(chosen: list[dict[str, Any]], found: list[_Prediction]) -> dict[str, Any] | None:
    """The images of each chosen case's slices as data URLs, all under one window and one error scale; and these."""
    shown: list[tuple[dict[str, Any], _Images]] = []
    for case in chosen:
        for prediction in found:
            if prediction.cases and (case["patient"], case["source"]) == prediction.of:
                loaded = _load(prediction, [line["slice"] for line in case["slices"]])
                shown += zip(case["slices"], loaded, strict=True)
    if not shown:
        return None
    every = [images for _, images in shown]
    window = _window(every)
    errors = np.concatenate([np.abs(images.synthetic - images.target).ravel() for images in every])
    limit = _round_up(float(np.percentile(errors, 99)))
    for line, images in shown:
        line["images"] = _encoded(images, window, limit)
    return {
        "cases": chosen,
        "unit": "HU" if every[0].unit == "HU" else "",
        "grey": _grey_words(every[0], window),
        "limit": f"{limit:g}",
        "error_bar": _png(np.linspace(-1, 1, 256)[None], -1, 1, ERROR_COLOURS),
        "supine_axial": all(images.supine_axial for images in every),
    }


def _load(prediction: _Prediction, indices: list[int]) -> list[_Images]:
    """These slices, as indices into those that source and target share. Raises DataError when they are not there."""
    pair, synthetic = load_prediction(prediction.folder, prediction.record, prediction.cases)
    place = dict(zip(*(index.tolist() for index in matched_slices(pair.target, synthetic)), strict=True))
    if same_grid(synthetic, pair.target) or not place.keys() >= set(indices):
        raise DataError(f"{prediction.folder}: is not on the target's grid any more; predict and evaluate again")
    rule = prediction.record.get("intensity") or {}
    source, target = _displayed(pair.source), _displayed(pair.target)
    values = _displayed(synthetic, rule["high"] if rule.get("kind") == "percentile" else None)
    _, row_mm, column_mm = pair.target.spacing_mm_zyx
    rightward, downward = (pair.target.affine[:3, :2] / np.linalg.norm(pair.target.affine[:3, :2], axis=0)).T
    axial = pair.target.format != "png" and bool(rightward[0] > 0.9 and downward[1] > 0.9)
    units = pair.source.unit, pair.target.unit
    return [_Images(source[z], target[z], values[place[z]], *units, row_mm / column_mm, axial) for z in indices]


def _displayed(volume: Volume, scale: float | None = None) -> np.ndarray:
    """CT and 8-bit values as they are; MR in parts of its own (or the given) scale, since its unit means nothing."""
    return in_protocol_values(volume.array, "mr", scale) if volume.unit == "arbitrary" else volume.array


def _window(every: list[_Images]) -> tuple[float, float]:
    """Grey levels of the target: for CT the soft tissue window, unless it would saturate what the body holds."""
    window = WINDOWS[every[0].unit]
    body = np.concatenate([images.target[images.target > -300] for images in every])
    saturated = every[0].unit == "HU" and body.size and (body > window[1]).mean() > SATURATED_SHARE
    return CONTRAST_WINDOW_HU if saturated else window


def _grey_words(images: _Images, window: tuple[float, float]) -> str:
    def words(unit: Unit, low: float, high: float) -> str:
        of_ct = f"level {(low + high) / 2:g}, width {high - low:g} HU (from {low:g} to {high:g} HU)".replace(" -", " −")
        return {"HU": of_ct, "arbitrary": "0 to the 99.5th percentile of the foreground", "uint8": "0 to 255"}[unit]

    same = images.source_unit == images.unit
    of_source = "" if same else f"; source: {words(images.source_unit, *WINDOWS[images.source_unit])}"
    return words(images.unit, *window) + of_source


def _encoded(images: _Images, window: tuple[float, float], limit: float) -> list[dict[str, Any]]:
    """Source, synthetic, target and error as {name, url, width, height}; width to height as they are in millimetres."""
    source_window = window if images.source_unit == images.unit else WINDOWS[images.source_unit]
    rows, columns = images.target.shape
    urls = {
        "source": _png(images.source, *source_window),
        "synthetic": _png(images.synthetic, *window),
        "target": _png(images.target, *window),
        "error": _png(images.synthetic - images.target, -limit, limit, ERROR_COLOURS),
    }
    height = f"{rows * images.pixel_aspect:g}"
    return [{"name": name, "url": url, "width": columns, "height": height} for name, url in urls.items()]


def _png(array: np.ndarray, low: float, high: float, colours: Colormap = colormaps["gray"]) -> str:
    buffer = io.BytesIO()
    imsave(buffer, array, vmin=low, vmax=high, cmap=colours, format="png")
    return _data_url(buffer.getvalue())


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + b64encode(png).decode()


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten: a scale that people can read."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


# Gates: what explain found, with the images of its two examples.


def _gates(out: Path, explained: dict[str, Any], found: list[_Prediction]) -> dict[str, Any]:
    """The example table, the correlations as rows of text, and the plot, ready for the page."""
    blocks = list(explained["blocks"])
    examples = [
        {**example, "slices": [{"slice": example["slice"], "position_mm": example["position_mm"]}]}
        for example in explained["examples"]
    ]
    for example in examples:
        example["numbers"] = [f"{example['shares'][block][branch]:.4f}" for block in blocks for branch in BRANCHES]
    moved = [explained["blocks"][block][branch] for block in blocks for branch in BRANCHES]
    tissues = list(dict.fromkeys(c["tissue"] for c in explained["correlations"]))
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in explained["correlations"]:
        branch = "CNN" if entry["branch"] == "cnn" else entry["branch"]
        source = "all sources" if entry["source"] == "all" else entry["source"]
        row = rows.setdefault((source, entry["block"], branch), {"counts": entry, "rho": {}})
        row["rho"][entry["tissue"]] = "–" if entry["rho"] is None else f"{entry['rho']:+.2f}".replace("-", "−")
    plot = out / "gates.png"
    return {
        **{name: explained[name] for name in ("num_images", "num_patients", "tissues_by", "finding", "run", "split")},
        "of_other_checkpoint": bool(found) and found[0].record.get("checkpoint") != explained["checkpoint"],
        "blocks": [block_title(block) for block in blocks],
        "examples": examples,
        "panels": _panels(examples, found),
        "means": [f"{share['mean']:.4f} ± {share['std']:.4f}" for share in moved],
        "ranges": [f"{share['min']:.4f} to {share['max']:.4f}" for share in moved],
        "verdicts": [explained["blocks"][block]["verdict"] for block in blocks],
        "tissues": tissues,
        "correlations": [
            {"source": source, "place": f"{block_title(block)} {branch}", **row}
            for (source, block, branch), row in rows.items()
        ],
        "plot": _data_url(plot.read_bytes()) if plot.is_file() else "",
    }
