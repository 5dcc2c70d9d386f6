"""What the gates were and what they are good for, as tables, figures and sentences.

Reads from top to bottom: explain → the claim that is tested → what is written → the terminal.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table

from seresvit.config import ConfigError
from seresvit.data.intensity import intensity_of
from seresvit.data.pair import load_pair
from seresvit.data.pairing import Case, load_channels, read_manifest
from seresvit.data.volume import written_whole
from seresvit.evaluation.gate_figures import BRANCH_NAMES, draw_channels, draw_knockouts, draw_maps, draw_shares
from seresvit.evaluation.gate_maps import gate_maps, write_gate_maps
from seresvit.evaluation.gates import (
    BRANCHES,
    TISSUES_BY,
    block_title,
    channel_table,
    correlations,
    find_examples,
    finding,
    fraction_table,
    gate_table,
    highest_gate,
    identity_table,
    map_movement,
    map_table,
    movement,
    network_inputs,
    read_gates,
    regions_of,
    tissues_of,
)
from seresvit.evaluation.knockouts import (
    KNOCKOUT_SLICES,
    MAP_SWAPPED,
    SEED,
    TRAINING_CASES,
    TRAINING_MEAN,
    TRAINING_SLICES,
    Sample,
    draw_sample,
    knock_out_all,
    knockout_words,
)
from seresvit.evaluation.statistics import ALPHA, MIN_PATIENTS_P, signed
from seresvit.synthesis.predictor import Predictor

Group = tuple[Case, ...]
Progress = Callable[[str], Callable[[list[Any]], Iterable[Any]]]

# A change of the error below this part of it is called none, however certain it is.
NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class Explanation:
    """`images`, `maps`, `channels`, `knockouts`: the tables of gates.csv, maps.csv, channels.csv and knockouts.csv,
    empty where there is nothing to say; `gates`: block → (N, 2C); `summary`: what gates.json holds."""

    images: pd.DataFrame
    gates: dict[str, np.ndarray]
    maps: pd.DataFrame
    channels: pd.DataFrame
    knockouts: pd.DataFrame
    summary: dict[str, Any]


def explain(
    predictor: Predictor,
    manifest: Path,
    out: Path,
    *,
    split: str = "test",
    knock_out: bool = True,
    progress: Progress = lambda verb: iter,
) -> Explanation:
    """Gates and maps of every slice of a split, and what knocking them out does, which is also written into `out`.

    `docs/gates.md` defines every file and column: gates.csv, gate_values.csv, channels.csv, maps.csv, knockouts.csv,
    gates.json and the figures. Tissues are those of the label images when every case has them, else HU ranges of the
    target, else unknown. `progress`: for the name of each part of the work, what wraps its list of items. Raises
    ConfigError for a network in which nothing is fused, or without gates when nothing is knocked out, and for a split
    without cases; DataError for images.
    """
    cases = load_channels(read_manifest(Path(manifest)), predictor.data.channels)
    groups = [group for group in cases if split in ("all", group[0].split)]
    if not groups:
        raise ConfigError(f"{manifest}: no case in the split '{split}'; choose --split train, val, test or all")
    _check_explainable(predictor, knock_out)
    most = max(KNOCKOUT_SLICES // len(groups), 1) if knock_out else 0
    images, gates_NC, maps, samples = _describe(predictor, groups, most, progress("reading gates"))
    highest = highest_gate(predictor)
    examples = find_examples(images, maps)
    summary = {
        "checkpoint": str(predictor.path.absolute()),
        "checkpoint_sha256": predictor.checkpoint_sha256,
        "run": predictor.header.get("run", ""),
        "fusion": predictor.net.settings.fusion.kind,
        "split": split,
        "num_images": len(images),
        "num_patients": int(images["patient"].nunique()),
        "tissues_by": TISSUES_BY[0 if _all_labelled(groups) else 1] if tissues_of(images) else None,
        "blocks": {block: movement(block, gate_NC, highest) for block, gate_NC in gates_NC.items()},
        "maps": {block: map_movement(block, maps) for block in dict.fromkeys(maps.get("block", []))},
        "correlations": correlations(images),
        "examples": examples,
        "finding": finding(images, examples),
    }
    channels = pd.concat([pd.DataFrame(), *(channel_table(block, g, highest) for block, g in gates_NC.items())])
    table = pd.DataFrame()
    if samples:
        mean_gates, mean_of = _mean_gates(predictor, cases, gates_NC, progress("reading training gates"))
        names = [*gates_NC, *(f"{block}.map" for block in summary["maps"])]
        found = knock_out_all(predictor, samples, mean_gates, gate_names=names, progress=progress)
        table = found.table
        on = ["block", "channel", "branch"]
        channels = found.channels if channels.empty else channels.merge(found.channels, on=on, validate="1:1")
        summary |= {
            "mean_gates_of": mean_of,
            "causal": found.sentences,
            "claim": judge(table, summary["fusion"], mean_of),
            "channels_carrying": found.carriers,
        }
    explanation = Explanation(images, gates_NC, maps, channels, table, summary)
    panels = _example_panels(predictor, groups, examples) if len(maps) else []
    _write(explanation, panels, Path(out))
    write_gate_maps(gate_maps(predictor, groups, Path(out), examples), Path(out))
    return explanation


def _check_explainable(predictor: Predictor, knock_out: bool) -> None:
    settings = predictor.net.settings
    if not settings.transformer_blocks:
        raise ConfigError(
            f"{predictor.path}: a network without transformer blocks fuses nothing that could be explained"
        )
    if settings.fusion.kind == "concat" and not knock_out:
        raise ConfigError(
            f"{predictor.path}: the network has no gates to describe (model.fusion.kind: concat); leave out "
            "--no-knockouts, or give a checkpoint of another fusion"
        )


def _all_labelled(groups: list[Group]) -> bool:
    """Whether every case has label images with names: one definition of tissue for all, or they would not compare."""
    masks = [group[0].mask_path for group in groups]
    return all(mask is not None and (mask.parent / "labels.json").is_file() for mask in masks)


def _describe(
    predictor: Predictor, groups: list[Group], most: int, progress: Callable[[list[Any]], Iterable[Any]]
) -> tuple[pd.DataFrame, dict[str, np.ndarray], pd.DataFrame, list[Sample]]:
    """The tables of images and of maps, block → gates (N, 2C), and `most` slices of each case for knock-outs."""
    by_labels = _all_labelled(groups)
    rows, maps, samples = [], [pd.DataFrame()], []
    gates: dict[str, list[np.ndarray]] = {}
    for group in progress(groups):
        pair = load_pair(*group, data=predictor.data)
        inputs_ZCHW, regions = network_inputs(predictor, group, pair), regions_of(pair, by_labels)
        identity = identity_table(pair, "+".join(case.source for case in group))
        for name, value in read_gates(predictor, inputs_ZCHW).items():
            if name.endswith(".map"):
                maps.append(map_table(name.removesuffix(".map"), value, identity, regions))
            else:
                gates.setdefault(name, []).append(value)
        rows.append(pd.concat([identity, fraction_table(regions)], axis=1))
        if most:
            samples.append(draw_sample(predictor, pair, inputs_ZCHW, regions, most))
    gates_NC = {block: np.concatenate(batches) for block, batches in gates.items()}
    images = pd.concat(rows, ignore_index=True)
    of_gates = gate_table(gates_NC, highest_gate(predictor))
    identities = len(identity.columns)
    images = pd.concat([images.iloc[:, :identities], of_gates, images.iloc[:, identities:]], axis=1)
    return images, gates_NC, pd.concat(maps, ignore_index=True), samples


def _mean_gates(
    predictor: Predictor,
    cases: list[Group],
    gates_NC: dict[str, np.ndarray],
    progress: Callable[[list[Any]], Iterable[Any]],
) -> tuple[dict[str, np.ndarray], str]:
    """Block → (2C,) the mean gate over a bounded random sample of training slices, and what it is the mean of: without
    a training split, the explained images."""
    training = [group for group in cases if group[0].split == "train"]
    if not gates_NC:
        return {}, ""
    if not training:
        return {block: gate_NC.mean(axis=0) for block, gate_NC in gates_NC.items()}, "the explained images"
    rng = np.random.default_rng(SEED)
    drawn = [training[place] for place in rng.permutation(len(training))[:TRAINING_CASES]]
    found: dict[str, list[np.ndarray]] = {}
    for group in progress(drawn):
        inputs_ZCHW = network_inputs(predictor, group, load_pair(*group, data=predictor.data))
        kept = rng.permutation(len(inputs_ZCHW))[: TRAINING_SLICES // len(drawn)]
        for block, gate_ZC in read_gates(predictor, inputs_ZCHW[kept]).items():
            found.setdefault(block, []).append(gate_ZC)
    gates = {block: np.concatenate(found[block]) for block in gates_NC}
    number = len(next(iter(gates.values())))
    return {block: gate_NC.mean(axis=0) for block, gate_NC in gates.items()}, f"{number} training images"


# Judge: does each image set its own balance?


def judge(table: pd.DataFrame, fusion: str, mean_of: str) -> dict[str, Any]:
    """Whether the claim "each image sets its own balance" holds in its effect, and in words why.

    It rests on one knock-out: gates fixed at their mean, or for a fusion that has only maps, maps of other images. On
    the whole image: `holds` is True when the error grows, its interval leaves out zero and the change is NEGLIGIBLE or
    more of it; None when the interval is open or too wide to say; else False. The same is told of bone, where known.
    """
    claim = "Each image sets its own balance"
    tests = table[table["site"] == "all"].set_index(["knockout", "region"])
    done = {TRAINING_MEAN: f"fixing every gate at its mean over {mean_of}", MAP_SWAPPED: "taking another image's map"}
    tested = [name for name in done if (name, "image") in tests.index]
    if not tested and fusion != "concat":
        return {"holds": None, "sentence": f"{claim}: not shown; there is no other image whose map could be taken."}
    if not tested:
        return {"holds": False, "sentence": f"{claim}: no, for {fusion} has no gate; both branches pass unscaled."}
    holds, words, why = _judge_region(tests.loc[(tested[0], "image")])
    sentence = (
        f"{claim}: {words}; {done[tested[0]]} changes the MAE by {_measured(tests.loc[(tested[0], 'image')])}, {why}."
    )
    if (tested[0], "bone") in tests.index and pd.notna(tests.loc[(tested[0], "bone"), "change"]):
        bone = tests.loc[(tested[0], "bone")]
        _, words, _ = _judge_region(bone)
        sentence += f" In bone alone: {words}; {_measured(bone)}."
    return {"holds": holds, "sentence": sentence}


def _judge_region(row: pd.Series) -> tuple[bool | None, str, str]:
    change, least = row["change"], NEGLIGIBLE * row["mae_intact"]
    has_interval = pd.notna(row["low"])
    low, high = (row["low"], row["high"]) if has_interval else (np.nan, np.nan)
    if abs(change) < 1e-3 * least:  # rounding: then too few patients for an interval are enough
        low = high = change
    # The interval of few patients is too narrow (docs/metrics.md), so that it must not speak alone.
    enough, shown = low == high or row["n"] >= MIN_PATIENTS_P, pd.notna(row["p"]) and row["p"] < ALPHA
    if enough and max(abs(low), abs(high)) < least:
        return False, "no, not in effect", "so one that is not the image's own does as well"
    if shown and low > 0 and change >= least:
        return True, "yes", "so each image needs its own"
    if shown and low > 0:
        return False, "hardly", f"which is there, but below {NEGLIGIBLE:.0%}"
    if shown and high < 0:
        return False, "no", "so its own serves an image worse"
    why = "which these patients cannot tell from nothing" if has_interval else row["why_no_interval"]
    return None, "not shown", why


def _measured(row: pd.Series) -> str:
    unit = f" {row['unit']}".rstrip()
    interval = f"95 % CI {signed(row['low'])} to {signed(row['high'])}, " if pd.notna(row["low"]) else ""
    certainty = f"({interval}n = {row['n']} patient{'s' if row['n'] != 1 else ''})"
    return f"{signed(row['change'])}{unit} {certainty}, {abs(row['percent']):.2g} % of {row['mae_intact']:.4g}{unit}"


# Write.


def _example_panels(predictor: Predictor, groups: list[Group], examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each example, or without any the middle slice of the first case: its source and its maps."""
    panels = []
    for example in examples or [{}]:
        chosen = [
            group
            for group in groups
            if example
            and (group[0].patient, "+".join(case.source for case in group)) == (example["patient"], example["source"])
        ]
        group = (chosen or groups)[0]
        pair = load_pair(*group, data=predictor.data)
        z = example["slice"] if example else len(pair.target.array) // 2
        found = read_gates(predictor, network_inputs(predictor, group, pair)[z : z + 1])
        maps = {
            (name.removesuffix(".map"), branch): map_KHW
            for name, value in found.items()
            if name.endswith(".map")
            for branch, map_KHW in zip(BRANCHES if value.shape[1] == 2 else ("both",), value[0], strict=True)
        }
        source_YX = pair.source.array[z]
        rule = intensity_of(pair.source, predictor.data.intensity.source, predictor.data)
        grey = (-1000.0, 500.0) if pair.source.unit == "HU" else (rule.low, rule.high)
        what = (
            f"most {'soft tissue' if example['tissue'] == 'soft' else example['tissue']}" if example else "middle slice"
        )
        panels.append(
            {"title": f"{what}: {group[0].patient}, slice {z}", "source": source_YX, "grey": grey, "maps": maps}
        )
    return panels


def _write(explanation: Explanation, panels: list[dict[str, Any]], out: Path) -> None:
    summary, knockouts = explanation.summary, explanation.knockouts
    tables = {"gates": explanation.images, "gate_values": _gate_values(explanation), "maps": explanation.maps}
    tables |= {"channels": explanation.channels, "knockouts": knockouts}
    figures: dict[str, Callable[[Path], None]] = {}
    if summary["blocks"]:
        figures["gates"] = lambda path: draw_shares(explanation.images, summary["correlations"], path)
    if len(knockouts):
        tissue, unit = summary["channels_carrying"][0]["region"], str(knockouts["unit"].iloc[0])
        figures["knockouts"] = lambda path: draw_knockouts(knockouts, path)
        figures["channels"] = lambda path: draw_channels(explanation.channels, tissue, unit, path)
    if panels:
        figures["maps"] = lambda path: draw_maps(panels, path)
    for name, table in tables.items():
        if len(table):
            with written_whole(out / f"{name}.csv") as path:
                table.to_csv(path, index=False)
        else:  # what an earlier explanation left would be taken for this one's
            (out / f"{name}.csv").unlink(missing_ok=True)
    for name in ("gates", "knockouts", "channels", "maps"):
        if name in figures:
            with written_whole(out / f"{name}.png") as path:
                figures[name](path)
        else:
            (out / f"{name}.png").unlink(missing_ok=True)
    with written_whole(out / "gates.json") as path:
        path.write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _gate_values(explanation: Explanation) -> pd.DataFrame:
    """A row an image and block: patient, source, slice, block, and all its gates: transformer_0 …, cnn_0 …"""
    identity = explanation.images[["patient", "source", "slice"]]
    tables = [pd.DataFrame()]
    for block, gate_NC in explanation.gates.items():
        names = [f"{branch}_{channel}" for branch in BRANCHES for channel in range(gate_NC.shape[1] // 2)]
        values = pd.DataFrame(gate_NC.astype(np.float64).round(5), columns=names)
        tables.append(pd.concat([identity.assign(block=block), values], axis=1))
    return pd.concat(tables, ignore_index=True)


def render_table(explanation: Explanation) -> Table:
    """For a terminal: the scores of the two example images, and their mean and deviation over all images."""
    summary = explanation.summary
    verdicts = [of_block["verdict"] for part in ("blocks", "maps") for of_block in summary[part].values()]
    causal = [summary["claim"]["sentence"], _changes(explanation.knockouts)] if "claim" in summary else []
    table = Table(
        title=f"Gates ({summary['fusion']}): {summary['num_images']} images of {summary['num_patients']} patients",
        caption="\n".join(filter(None, [summary["finding"], *verdicts, *causal])),
        caption_justify="left",
    )
    table.add_column("image")
    places = [
        (part, block, branch)
        for part in ("blocks", "maps")
        for block in summary[part]
        for branch in summary[part][block]
        if branch in BRANCH_NAMES
    ]
    for part, block, branch in places:
        word = " map" if part == "maps" else ""
        table.add_column(f"{block_title(block)}\n{BRANCH_NAMES[branch]}{word}", justify="right")
    for example in summary["examples"]:
        tissue = example["tissue"]
        where = f"{example['patient']} {example['source']} slice {example['slice']}"
        words = f"most {tissue} ({example['fractions'][tissue]:.1%} of the body): {where}"
        numbers = [
            example["shares" if part == "blocks" else "map_means"][block][branch] for part, block, branch in places
        ]
        table.add_row(escape(words), *(f"{number:.4f}" for number in numbers))
    spreads = [
        (of["mean"], of["std" if part == "blocks" else "std_over_images"])
        for part, block, branch in places
        for of in [summary[part][block][branch]]
    ]
    if spreads:
        table.add_row("all images, mean ± standard deviation", *(f"{mean:.4f} ± {std:.4f}" for mean, std in spreads))
    return table


def _changes(knockouts: pd.DataFrame) -> str:
    """One line on what every knock-out of all blocks does to the whole image."""
    rows = knockouts[(knockouts["site"] == "all") & (knockouts["region"] == "image")].to_dict("records")
    intervals = [f" ({signed(r['low'])} to {signed(r['high'])})" if pd.notna(r["low"]) else "" for r in rows]
    changes = [
        f"{knockout_words(r['knockout'])} {signed(r['change'])}{of_r}" for r, of_r in zip(rows, intervals, strict=True)
    ]
    unit = f" [{rows[0]['unit']}]" if rows[0]["unit"] else ""
    return f"Change of MAE{unit} (95 % CI): {'; '.join(changes)}."
