"""Fusions under one budget, with several seeds → which one is better, with what certainty, at what cost.

All fusions see the same images in the same order and start from the same weights wherever theirs have the same shape.
Compared are patients, never slices; seeds and patients both enter the intervals. What is not shown is said not to be.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.table import Table

from seresvit.data.volume import DataError, written_whole
from seresvit.evaluation import cost
from seresvit.evaluation.figures import COLOURS, STYLE, log_scale
from seresvit.evaluation.metrics import HIGHER_IS_BETTER
from seresvit.evaluation.statistics import ALPHA, Difference, holm, seeds_and_patients_difference, sentence
from seresvit.evaluation.tables import METHODS, digits_of, shown_name, unit_of
from seresvit.evaluation.trials import (
    SHARED,
    Bars,
    Comparison,
    begin,
    failure,
    is_done,
    no_bars,
    settings_of,
    spread,
    visible_gpus,
    work,
    worker_command,
)

MAIN = "mae"
METRICS = ("mae", "psnr", "ssim", "ms_ssim")  # and the MAE of every region
REFERENCES = ("concat", "se-frozen")
ALL_FUSIONS = "all"  # the fusion of the curve that they share

Say = Callable[[str], None]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Compared:
    """What was found: a row a fusion, a row a comparison, and the record that compare.json holds."""

    fusions: pd.DataFrame
    comparisons: pd.DataFrame
    record: dict[str, Any]


def compare(
    comparison: Comparison,
    say: Say = lambda _: None,
    bars: Bars = no_bars,
    preparing: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Compared:
    """The comparison of all runs, after doing those that are left, on all GPUs of this machine or else on the CPU.

    The folder gets compare.csv, patients.csv, comparisons.csv, curves.csv, curves.png, costs.csv and, last,
    compare.json. Runs that failed are named in the record and left out of the tables; a pair of fusions is compared on
    the seeds that both have. Raises ConfigError and DataError as `trials.begin` does, DataError when no fusion has a
    run, and Stopped after SIGTERM or SIGINT; the same call then goes on.
    """
    num_patients = begin(comparison, preparing)
    say(f"{len(comparison.runs)} runs on {num_patients} test patients: {_budget(comparison)['words']}")
    gpus = visible_gpus()
    if len(gpus) > 1:
        spread(worker_command(comparison), gpus)
    else:
        work(comparison, say, bars)
    failed = [
        {"fusion": fusion, "seed": seed, "reason": failure(comparison, fusion, seed)}
        for fusion, seed in comparison.runs
        if not is_done(comparison, fusion, seed)
    ]
    patients = _patients(comparison)
    if patients.empty:
        raise DataError(f"{comparison.out}: no run of a fusion is done; the first one: {failed[0]['reason']}")
    metrics = [name for name in patients.columns if name in METRICS or name.startswith("mae_")]
    comparisons = _comparisons(patients, metrics, comparison)
    best, best_is_shown, of_best = _best(patients, comparison)
    costs = _costs(comparison, say)
    fusions = _fusions(patients, metrics).merge(costs, on="fusion", how="left")
    of_main = comparisons[comparisons["metric"] == MAIN]
    record = {
        "protocol": comparison.protocol,
        "metric": MAIN,
        "unit": unit_of(MAIN, comparison.protocol),
        "fusions": list(comparison.fusions),
        "seeds": list(comparison.seeds),
        "patients": int(patients["patient"].nunique()),
        "budget": _budget(comparison),
        "costs": json.loads(costs.to_json(orient="records")),
        "best": best,
        "best_is_shown": best_is_shown,
        "verdict": [of_best, *of_main["sentence"]],
        "notes": _notes(comparison, len(of_main)),
        "failed": failed,
    }
    compared = Compared(fusions, comparisons, record)
    _write(compared, patients, _curves(comparison), comparison)
    return compared


def _budget(comparison: Comparison) -> dict[str, Any]:
    """What every fusion was given, in numbers and in words."""
    train = comparison.config.train
    height, width = train.size
    stage1 = f"{train.stage1.num_images:,} images of stage 1, trained once a seed and shared by all fusions, then "
    words = (
        f"{stage1 if comparison.shares_stage1 else ''}{train.stage2.num_images:,} images of stage 2 for each fusion "
        f"and seed, {train.batch_size} a step, {height}×{width} pixels"
    )
    return {
        "stage1_images": train.stage1.num_images,
        "stage2_images": train.stage2.num_images,
        "batch_size": train.batch_size,
        "size": [height, width],
        "shared_stage1": comparison.shares_stage1,
        "words": words,
    }


def _notes(comparison: Comparison, num_comparisons: int) -> list[str]:
    """How to read the tables."""
    notes = [
        "For one seed, all fusions see the same images in the same order, changed in the same way, and start from the "
        "same weights except those of the fusion itself."
    ]
    if comparison.shares_stage1:
        notes.append(
            "Stage 1 has no fusion: it is trained once a seed, and every fusion of that seed starts stage 2 from its "
            "generator, with a discriminator of its own that starts anew."
        )
    notes.append("Evaluated is the checkpoint with the lowest validation MAE of each run, on the test patients.")
    if comparison.num_seeds > 1:
        notes.append("Intervals: bootstrap of seeds and patients. p: of the patients' means over these seeds.")
    else:
        notes.append("With one seed, nothing is known of how much another seed would change; take three or more.")
    if left_out := _unmatched(comparison):
        are = (
            "s that not all images of their cases have are"
            if left_out > 1
            else " that not all images of its case have is"
        )
        notes.append(f"{left_out} slice{are} left out of every run.")
    if num_comparisons > 1:
        notes.append(f"p is adjusted by Holm's procedure over the {num_comparisons} comparisons of a metric.")
    return notes


def _unmatched(comparison: Comparison) -> int:
    """How many slices of the test cases have no partner; the same in each run, and read of the first that is done."""
    done = next(((f, seed) for f, seed in comparison.runs if f != SHARED and is_done(comparison, f, seed)), None)
    if done is None:
        return 0
    cases = pd.read_csv(comparison.folder(*done) / "evaluation" / "cases.csv")
    tested = cases[(cases["method"] == METHODS[0]) & (cases["split"] == "test")]
    return int(tested.get("unmatched_slices", pd.Series(dtype=int)).sum())


# Tabulate: one number a fusion, seed and patient.


def _patients(comparison: Comparison) -> pd.DataFrame:
    """One row a fusion, seed and test patient: each metric's mean over the patient's sources."""
    tables = []
    for fusion in comparison.fusions:
        for seed in comparison.seeds:
            if is_done(comparison, fusion, seed):
                path = comparison.folder(fusion, seed) / "evaluation" / "patients.csv"
                scored = pd.read_csv(path, dtype={"patient": str}, keep_default_na=False, na_values="")
                scored = scored[(scored["method"] == METHODS[0]) & (scored["split"] == "test")]
                scored = scored.drop(columns=["method", "split", "cases"])
                scored.insert(0, "fusion", fusion)
                scored.insert(1, "seed", seed)
                tables.append(scored)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _by_seed(patients: pd.DataFrame, fusion: str, metric: str) -> pd.DataFrame:
    """One metric of a fusion: rows seeds, columns patients."""
    return patients[patients["fusion"] == fusion].pivot(index="seed", columns="patient", values=metric)


def _fusions(patients: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """One row a fusion: of each metric its mean, and its deviation over patients and over seeds."""
    rows = []
    for fusion in patients["fusion"].unique():
        of_fusion = patients[patients["fusion"] == fusion]
        row = {"fusion": fusion, "seeds": of_fusion["seed"].nunique(), "patients": of_fusion["patient"].nunique()}
        for metric in metrics:
            values = _by_seed(patients, fusion, metric)
            row[f"{metric}_mean"] = values.mean().mean()
            row[f"{metric}_std_patients"] = values.mean().std()
            row[f"{metric}_std_seeds"] = values.mean(axis=1).std()
        rows.append(row)
    return pd.DataFrame(rows)


def _curves(comparison: Comparison) -> pd.DataFrame:
    """The validation MAE of every run along the way; that of the shared stage 1 once a seed, with fusion "all"."""
    rows = []
    for fusion, seed in comparison.runs:
        log = comparison.folder(fusion, seed) / "run" / "log.jsonl"
        for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
            logged = json.loads(line)
            if "val_mae" in logged:
                name = ALL_FUSIONS if fusion == SHARED else fusion
                rows.append({"fusion": name, "seed": seed} | {k: logged[k] for k in ("stage", "images", "val_mae")})
    return pd.DataFrame(rows, columns=["fusion", "seed", "stage", "images", "val_mae"])


def _costs(comparison: Comparison, say: Say) -> pd.DataFrame:
    """One row a fusion: what it costs, measured now unless it was before."""
    path = comparison.out / "costs.csv"
    known = pd.read_csv(path) if path.is_file() else pd.DataFrame({"fusion": []})
    lacking = [fusion for fusion in comparison.fusions if fusion not in set(known["fusion"])]
    seed = next((s for s in comparison.seeds if not comparison.shares_stage1 or is_done(comparison, SHARED, s)), None)
    if lacking and seed is not None:
        say(f"timing {', '.join(lacking)} against concat")
        reference = settings_of(comparison, "concat", seed)
        rows = []
        for fusion in lacking:
            config = settings_of(comparison, fusion, seed)
            rows.append({"fusion": fusion} | cost.size(config) | cost.times(config, reference, comparison.manifest))
        known = pd.DataFrame([*known.to_dict("records"), *rows])
        with written_whole(path) as temporary:
            known.to_csv(temporary, index=False)
    return known[known["fusion"].isin(comparison.fusions)]


# Compare: fusions by patients and seeds.


def _differences(patients: pd.DataFrame, pairs: Iterable[Pair], metric: str) -> dict[Pair, Difference]:
    """first − second of each pair on the seeds that both have, p adjusted over the pairs; no entry without seeds."""
    found = {}
    for first, second in pairs:
        ours, theirs = _by_seed(patients, first, metric), _by_seed(patients, second, metric)
        if len(seeds := ours.index.intersection(theirs.index)):
            found[first, second] = seeds_and_patients_difference(ours.loc[seeds], theirs.loc[seeds])
    return holm(found)


def _pairs(patients: pd.DataFrame) -> list[Pair]:
    """Every fusion against each reference: concat and se-frozen, or, where neither is there, the first fusion."""
    fusions = list(patients["fusion"].unique())
    references = [fusion for fusion in REFERENCES if fusion in fusions] or fusions[:1]
    return [
        (fusion, reference)
        for number, reference in enumerate(references)
        for fusion in fusions
        if fusion != reference and fusion not in references[:number]  # concat and se-frozen only once
    ]


def _comparisons(patients: pd.DataFrame, metrics: list[str], comparison: Comparison) -> pd.DataFrame:
    """One row a pair and metric; p adjusted over the pairs of a metric."""
    rows = []
    seeds_of = {fusion: set(rows["seed"]) for fusion, rows in patients.groupby("fusion")}
    for metric in metrics:
        differences = _differences(patients, _pairs(patients), metric)
        for (first, second), d in differences.items():
            num_seeds = len(seeds_of[first] & seeds_of[second])
            rows.append(
                {"first": first, "second": second, "metric": metric, "mean": d.mean, "low": d.low, "high": d.high}
                | {"n": d.n, "seeds": num_seeds, "p": d.p, "p_adjusted": d.p_adjusted, "effect_size": d.effect_size}
                | {"sentence": _said(first, second, metric, comparison.protocol, d, num_seeds, len(differences))}
            )
    names = ("first", "second", "metric", "mean", "low", "high", "n", "seeds", "p", "p_adjusted", "effect_size")
    return pd.DataFrame(rows, columns=[*names, "sentence"])


def _said(
    first: str, second: str, metric: str, protocol: str, difference: Difference, num_seeds: int, num_comparisons: int
) -> str:
    """The sentence of `statistics`, with the number of seeds and of comparisons."""
    words = sentence(
        first, second, shown_name(metric), unit_of(metric, protocol), difference, metric in HIGHER_IS_BETTER
    )
    of_seeds = f" × {num_seeds} seed{'s' if num_seeds != 1 else ''}"
    for patients in (f"n = {difference.n} patients", f"n = {difference.n} patient", f"in {difference.n} patients"):
        if patients in words:
            words = words.replace(patients, patients + of_seeds, 1)
            break
    return words.replace("after Holm's correction", f"Holm over {num_comparisons} comparisons")


def _best(patients: pd.DataFrame, comparison: Comparison) -> tuple[str, bool, str]:
    """The fusion of the lowest mean MAE, whether it is shown to be the best, and both in words.

    It is when it is shown to be lower than each other one. Since the numbers chose it, p is adjusted over all pairs of
    fusions, not only over its own.
    """
    of_fusion = {fusion: _by_seed(patients, fusion, MAIN) for fusion in patients["fusion"].unique()}
    # A run may have failed: only seeds that all fusions have are compared, since seeds differ more than fusions do.
    common = set.intersection(*(set(table.index) for table in of_fusion.values()))
    means = {fusion: table.loc[sorted(common) or table.index].mean().mean() for fusion, table in of_fusion.items()}
    best, *others = sorted(means, key=means.__getitem__)
    mean = f"{means[best]:.{digits_of(MAIN, comparison.protocol)}f} {unit_of(MAIN, comparison.protocol)}".strip()
    if not others:
        return best, False, f"{best} alone has runs, with a mean MAE of {mean}: nothing to compare it with"
    differences = _differences(patients, combinations([best, *others], 2), MAIN)
    not_shown = [other for other in others if not _is_lower(differences.get((best, other)))]
    words = f"{best} has the lowest mean MAE, {mean}"
    over = f" (p over all {len(differences)} pairs)" if len(differences) > 1 else ""
    over += ", for these trainings of one seed" if comparison.num_seeds == 1 else ""
    if not_shown:
        return best, False, f"{words}; that it is lower than that of {' and '.join(not_shown)} was not shown{over}"
    return best, True, f"{words}, and lower than that of every other fusion, as was shown{over}"


def _is_lower(difference: Difference | None) -> bool:
    if difference is None or difference.p_adjusted is None or difference.high is None:
        return False
    return difference.p_adjusted < ALPHA and difference.high < 0


# Show.


def render_table(compared: Compared) -> Table:
    """The fusions for a terminal: each metric's mean ± standard deviation over patients, and what a fusion costs."""
    record, fusions = compared.record, compared.fusions
    metrics = [name.removesuffix("_mean") for name in fusions.columns if name.endswith("_mean")]
    labelled = [name for name in metrics if not name.startswith("mae_hu_")]
    metrics = labelled if any(name.startswith("mae_") for name in labelled) else metrics
    title = f"Protocol {record['protocol']}: mean ± standard deviation over {record['patients']} test patients"
    table = Table(title=title)
    table.add_column("fusion")
    for metric in metrics:
        unit = unit_of(metric, record["protocol"])
        table.add_column(f"{shown_name(metric)} {unit}".strip(), justify="right")
    for name in ("seeds", "parameters", "time of a step", "of a prediction"):
        table.add_column(name, justify="right")
    for row in fusions.to_dict("records"):
        cells = []
        for metric in metrics:
            digits = digits_of(metric, record["protocol"])
            mean, std = row[f"{metric}_mean"], row[f"{metric}_std_patients"]
            cells.append(f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}"))
        parameters = row.get("parameters", math.nan)
        cells += [str(row["seeds"]), "–" if math.isnan(parameters) else f"{parameters:,.0f}"]
        cells += [_ratio(row, "step"), _ratio(row, "predict")]
        table.add_row(row["fusion"], *cells)
    return table


def _ratio(row: dict[Any, Any], name: str) -> str:
    ratio = row.get(f"{name}_ratio", math.nan)
    if math.isnan(ratio):
        return "–"
    return f"× {ratio:.2f} ({row[f'{name}_ratio_low']:.2f} to {row[f'{name}_ratio_high']:.2f})"


def _write(compared: Compared, patients: pd.DataFrame, curves: pd.DataFrame, comparison: Comparison) -> None:
    tables = {
        "compare": compared.fusions,
        "patients": patients,
        "comparisons": compared.comparisons,
        "curves": curves,
    }
    for name, table in tables.items():
        with written_whole(comparison.out / f"{name}.csv") as path:
            table.to_csv(path, index=False)
    with written_whole(comparison.out / "curves.png") as path:
        _plot(curves, comparison, path)
    with written_whole(comparison.out / "compare.json") as path:
        path.write_text(json.dumps(compared.record, indent=1), encoding="utf-8")


def _plot(curves: pd.DataFrame, comparison: Comparison, path: Path) -> None:
    """Validation MAE against images seen: a thin line a seed, a thick one for the mean of a fusion's seeds."""
    looks = dict(zip(comparison.fusions, product(("-", "--"), COLOURS), strict=False)) | {ALL_FUSIONS: ("-", "#8a939b")}
    before_stage2 = comparison.config.train.stage1.num_images
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axis = figure.subplots()
        for fusion, of_fusion in curves.groupby("fusion", sort=False):
            line, colour = looks[str(fusion)]
            seen = of_fusion.assign(seen=of_fusion["images"] + before_stage2 * (of_fusion["stage"] == 2))
            for _, of_seed in seen.groupby("seed"):
                axis.plot(of_seed["seen"], of_seed["val_mae"], line, color=colour, linewidth=0.6, alpha=0.5)
            mean = seen.groupby("seen")["val_mae"].mean()
            label = "stage 1, shared" if fusion == ALL_FUSIONS else str(fusion)
            axis.plot(mean.index, mean, line, color=colour, linewidth=1.8, label=label)
        axis.set_xlabel("images seen")
        unit = unit_of(MAIN, comparison.protocol)
        axis.set_ylabel(f"MAE in validation{f' [{unit}]' if unit else ''}")
        log_scale(axis)
        axis.legend(ncols=2)
        figure.savefig(path, dpi=150)
