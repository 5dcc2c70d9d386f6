"""What the gates did: the transformer and the CNN share of every image, against the tissue that is in it.

A share is the mean of the gate over the channels of one branch: the first half transformer, the second half CNN. Shares
say how strongly a block scaled each branch; not where in the image, and not whether that was right.
"""

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from rich.markup import escape
from rich.table import Table
from scipy.stats import spearmanr

from seresvit.config import ConfigError
from seresvit.data.pair import Pair, load_pair, load_sources, matched_slices
from seresvit.data.pairing import Case, load_channels, read_manifest
from seresvit.data.volume import written_whole
from seresvit.model.fusion import record_gates
from seresvit.synthesis.predict import Predictor

BRANCHES = ("transformer", "cnn")

# Without named labels, the target's HU decide. -300 to -150 is partial volume of lung and wall and counts for nothing;
# iodine denser than 250 HU cannot be told from bone this way.
BODY_ABOVE_HU = -950.0
TISSUES_HU = {
    "lung": (-950.0, -300.0),
    "fat": (-150.0, -20.0),
    "soft": (-20.0, 100.0),
    "contrast": (100.0, 250.0),
    "bone": (250.0, np.inf),
}

# A slice that hardly meets the body is no example of a tissue.
MIN_BODY_SHARE = 0.05
# A gate is called nearly constant when its channels move between images by less than this part of what they differ by,
# or, in an untrained network whose channels are all alike, by less than a thousandth of the gate's range.
NEARLY_CONSTANT, THOUSANDTH = 0.1, 0.001

COLOURS = ("#2f6690", "#d1673a", "#4b8b5a", "#8a5a9e", "#9a7b1f", "#5c6670")
# Names of sources may be in Hangul, which Matplotlib's own font lacks.
HANGUL_FONTS = {"Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo"}
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans", *sorted(HANGUL_FONTS & {font.name for font in fontManager.ttflist})],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": "#aab2b9",
    "axes.labelcolor": "#3c4650",
    "text.color": "#1f272e",
    "xtick.color": "#5c6670",
    "ytick.color": "#5c6670",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8ebed",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Explanation:
    """`images`: the table of gates.csv, one row an image; `summary`: what gates.json holds, see `explain`."""

    images: pd.DataFrame
    summary: dict[str, Any]


def explain(
    predictor: Predictor,
    manifest: Path,
    out: Path,
    *,
    split: str = "test",
    progress: Callable[[list[tuple[Case, ...]]], Iterable[tuple[Case, ...]]] = iter,
) -> Explanation:
    """Gate shares of every slice of a split, which are also written into `out`: gates.csv, gates.json and gates.png.

    gates.csv: patient, source, slice (from 0, as in slices.csv), position_mm; for each block its two shares and the
    standard deviation over all its channels, in (0, 1); body_share of the pixels; fraction_NAME, parts of the body,
    by the label images when every case has named ones, else by TISSUES_HU, and absent when the target is not in HU.
    gates.json: how far shares and channels move between images, Spearman's ρ with each fraction (over all sources and
    over each; no p-values, since slices of one patient are alike), and the image with most bone beside the one with
    most soft tissue. Raises ConfigError for a network without gates or a split without cases; DataError for images.
    """
    cases = load_channels(read_manifest(Path(manifest)), predictor.data.channels)
    groups = [group for group in cases if split in ("all", group[0].split)]
    if not groups:
        raise ConfigError(f"{manifest}: no case in the split '{split}'; choose --split train, val, test or all")
    identities: list[pd.DataFrame] = []
    gates: dict[str, list[np.ndarray]] = {}
    tissues: dict[str, list[pd.DataFrame | None]] = {"label images": [], "HU ranges of the target": []}
    for group in progress(groups):
        pair = load_pair(*group, data=predictor.data)
        for block, gate_ZC in read_gates(predictor, group, pair).items():
            gates.setdefault(block, []).append(gate_ZC)
        identities.append(_identity(pair, "+".join(case.source for case in group)))
        for fractions, of_pair in zip(tissues.values(), (label_fractions(pair), hu_fractions(pair)), strict=True):
            fractions.append(of_pair)
    # One definition of tissue for all images, or they could not be compared.
    basis = next((name for name, found in tissues.items() if all(table is not None for table in found)), None)
    gates_NC = {block: np.concatenate(found) for block, found in gates.items()}
    parts = [pd.concat(identities, ignore_index=True), shares(gates_NC)]
    if basis:
        parts.append(pd.concat([table for table in tissues[basis] if table is not None], ignore_index=True))
    images = pd.concat(parts, axis=1)
    summary = {
        "checkpoint": str(predictor.path.absolute()),
        "run": predictor.header.get("run", ""),
        "split": split,
        "num_images": len(images),
        "num_patients": int(images["patient"].nunique()),
        "tissues_by": basis,
        "blocks": {block: _movement(block, gate_NC) for block, gate_NC in gates_NC.items()},
        "correlations": correlations(images),
        "examples": _examples(images),
    }
    explanation = Explanation(images, {**summary, "finding": _finding(images, summary["examples"])})
    _write(explanation, Path(out))
    return explanation


def read_gates(predictor: Predictor, cases: tuple[Case, ...], pair: Pair) -> dict[str, np.ndarray]:
    """Block → gates (Z, 2C) of the slices of `pair`, which is that of `cases`. Raises ConfigError without a gate."""
    sources, index = pair.sources, np.arange(len(pair.target.array))
    if pair.dropped and not predictor.data.resample:
        # An intensity rule by percentile sees the whole image in prediction; so it must here.
        sources = predictor.as_trained(*load_sources(cases, predictor.data))
        index = matched_slices(pair.target, sources[0])[1]
    found: dict[str, list[np.ndarray]] = {}
    for batch_BCHW in predictor.batches(*sources):
        with torch.inference_mode(), record_gates(predictor.net) as gates:
            predictor.net(batch_BCHW)
        for block, gate_BC in gates.items():
            found.setdefault(block, []).append(gate_BC.float().cpu().numpy())
    if not found:
        settings = predictor.net.settings
        raise ConfigError(
            f"{predictor.path}: the network has no gates to explain (model.fusion.kind: {settings.fusion.kind}, "
            f"model.transformer_blocks: {list(settings.transformer_blocks)}); give a checkpoint that was trained with "
            "model.fusion.kind=se"
        )
    return {block: np.concatenate(batches)[index] for block, batches in found.items()}


def shares(gates_NC: dict[str, np.ndarray]) -> pd.DataFrame:
    """A row an image: for each block the mean of either half of its channels, and the deviation over all of them."""
    columns = {}
    for block, gate_NC in gates_NC.items():
        half = gate_NC.shape[1] // 2
        columns[f"{block}_transformer"] = gate_NC[:, :half].mean(axis=1)
        columns[f"{block}_cnn"] = gate_NC[:, half:].mean(axis=1)
        columns[f"{block}_std"] = gate_NC.std(axis=1)
    return pd.DataFrame(columns).astype(np.float64)


def label_fractions(pair: Pair) -> pd.DataFrame | None:
    """A row a slice: the body's share of the pixels (label > 0) and each label's share of the body, by the names of
    labels.json; None where the labels have no names."""
    if pair.labels is None or set(pair.label_names) == {"mask"}:
        return None
    return _fractions(pair.labels > 0, {name: pair.labels == value for name, value in pair.label_names.items()})


def hu_fractions(pair: Pair) -> pd.DataFrame | None:
    """The same by TISSUES_HU of the target, the body being its mask, else what is above BODY_ABOVE_HU; None without
    HU."""
    if pair.target.unit != "HU":
        return None
    values = pair.target.array
    body = values > BODY_ABOVE_HU if pair.labels is None else pair.labels > 0
    return _fractions(
        body, {name: body & (values > low) & (values <= high) for name, (low, high) in TISSUES_HU.items()}
    )


def _fractions(body: np.ndarray, tissues: dict[str, np.ndarray]) -> pd.DataFrame:
    sizes = body.sum(axis=(1, 2))
    columns = {"body_share": sizes / body[0].size}
    for name, pixels in tissues.items():
        columns[f"fraction_{name}"] = np.where(sizes > 0, pixels.sum(axis=(1, 2)) / np.maximum(sizes, 1), np.nan)
    return pd.DataFrame(columns)


def _identity(pair: Pair, source: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": pair.case.patient,
            "source": source,
            "slice": np.arange(len(pair.target.array)),
            "position_mm": pair.target.positions_mm.astype(np.float64),
        }
    )


# Summarise: what the numbers say, and how much they move at all.


def correlations(images: pd.DataFrame) -> list[dict[str, Any]]:
    """Spearman's ρ of each share with each tissue fraction, over all sources ("all") and, of several, over each.

    `rho` is None where one of the two does not vary. `n_images` counts slices, `n_patients` what is independent.
    """
    sources = list(images["source"].unique())
    found = []
    for source in ["all", *(sources if len(sources) > 1 else [])]:
        of_source = images if source == "all" else images[images["source"] == source]
        for block in blocks_of(images):
            for branch in BRANCHES:
                for tissue in tissues_of(images):
                    share = f"{block}_{branch}"
                    both = of_source[["patient", share, f"fraction_{tissue}"]].dropna()
                    varies = all(both[column].nunique() > 1 for column in both.columns[1:])
                    rho = float(spearmanr(both[share], both[f"fraction_{tissue}"]).statistic) if varies else None
                    found.append(
                        {"source": source, "block": block, "branch": branch, "tissue": tissue, "rho": rho}
                        | {"n_images": len(both), "n_patients": int(both["patient"].nunique())}
                    )
    return found


def blocks_of(images: pd.DataFrame) -> list[str]:
    """The blocks of a gates.csv table, in the order of the network."""
    return [column.removesuffix("_cnn") for column in images.columns if column.endswith("_cnn")]


def tissues_of(images: pd.DataFrame) -> list[str]:
    """The tissues of a gates.csv table."""
    return [column.removeprefix("fraction_") for column in images.columns if column.startswith("fraction_")]


def block_title(block: str) -> str:
    """How people write the name of a block: art_1 is ART 1."""
    return block.replace("art_", "ART ")


def _movement(block: str, gate_NC: np.ndarray) -> dict[str, Any]:
    """How far a block's shares, and its channels one by one, move between images."""
    of_image = shares({block: gate_NC})
    moved: dict[str, Any] = {}
    for branch in BRANCHES:
        share = of_image[f"{block}_{branch}"]
        spread = {"mean": share.mean(), "std": share.std(ddof=0), "min": share.min(), "max": share.max()}
        moved[branch] = {name: float(value) for name, value in spread.items()}
    over_images = float(np.sqrt(gate_NC.var(axis=0, dtype=np.float64).mean()))
    over_channels = float(gate_NC.mean(axis=0, dtype=np.float64).std())
    constant = len(gate_NC) > 1 and over_images < max(NEARLY_CONSTANT * over_channels, THOUSANDTH)
    verdict = (
        f"The gate of {block_title(block)} {'is nearly constant' if constant else 'changes with the image'}: between "
        f"images a channel's value moves by {over_images:.4f} (standard deviation), while channels differ by "
        f"{over_channels:.4f}."
    )
    return moved | {
        "std_over_images": over_images,
        "std_over_channels": over_channels,
        "nearly_constant": constant,
        "verdict": verdict,
    }


def _examples(images: pd.DataFrame) -> list[dict[str, Any]]:
    """The image with most bone and the one with most soft tissue, both of the first source so that they compare."""
    examples = []
    candidates = images[images["source"] == images["source"].iloc[0]]
    for tissue in ("bone", "soft"):
        column = f"fraction_{tissue}"
        if column not in images or not (candidates["body_share"] >= MIN_BODY_SHARE).any():
            return []
        chosen = candidates[candidates["body_share"] >= MIN_BODY_SHARE]
        if chosen[column].isna().all():
            return []
        row = chosen.loc[chosen[column].idxmax()]
        examples.append(
            {
                "tissue": tissue,
                "patient": str(row["patient"]),
                "source": str(row["source"]),
                "slice": int(row["slice"]),
                "position_mm": float(row["position_mm"]),
                "fractions": {name: float(row[f"fraction_{name}"]) for name in ("bone", "soft")},
                "shares": {b: {k: float(row[f"{b}_{k}"]) for k in BRANCHES} for b in blocks_of(images)},
            }
        )
    return examples


def _finding(images: pd.DataFrame, examples: list[dict[str, Any]]) -> str:
    """One sentence on what the two example images show: the largest difference, its direction and its size."""
    if not examples:
        return ""
    # Rounded as the table shows them, so that the reader's subtraction comes to the same.
    bone, soft = (
        {block: {branch: round(share, 4) for branch, share in of_block.items()} for block, of_block in shares.items()}
        for shares in (example["shares"] for example in examples)
    )
    places = [(block, branch) for block in bone for branch in BRANCHES]
    differences = {(block, branch): bone[block][branch] - soft[block][branch] for block, branch in places}
    block, branch = max(differences, key=lambda place: abs(differences[place]))
    difference, spread = differences[block, branch], float(images[f"{block}_{branch}"].std(ddof=0))
    name = {"transformer": "transformer", "cnn": "CNN"}
    size = f", {100 * abs(difference) / soft[block][branch]:.2f} % of it"
    size += f" and {abs(difference) / spread:.1f} standard deviations of all {len(images)} images" if spread else ""
    others = "; ".join(
        f"{name[k]} {block_title(b)} {_signed(differences[b, k])}" for b, k in places if (b, k) != (block, branch)
    )
    return (
        f"The two images differ most in the {name[branch]} share of {block_title(block)}, which is "
        f"{bone[block][branch]:.4f} with most bone against {soft[block][branch]:.4f} with most soft tissue "
        f"({_signed(difference)}{size}); the other differences are {others}."
    )


def _signed(number: float) -> str:
    return f"{number:+.4f}".replace("-", "−") if abs(number) >= 5e-5 else "0.0000"


def _write(explanation: Explanation, out: Path) -> None:
    with written_whole(out / "gates.csv") as path:
        explanation.images.to_csv(path, index=False)
    with written_whole(out / "gates.json") as path:
        path.write_text(json.dumps(explanation.summary, indent=1), encoding="utf-8")
    with written_whole(out / "gates.png") as path:
        _plot(explanation, path)


def _plot(explanation: Explanation, path: Path) -> None:
    """Shares against bone and contrast, a row a block, coloured by source; against position without tissues."""
    images = explanation.images
    tissues = tissues_of(images)
    usual = [tissue for tissue in ("bone", "contrast") if tissue in tissues]
    across = {f"fraction_{tissue}": f"{tissue} in the body" for tissue in usual or tissues[:2]}
    across = across or {"position_mm": "slice position [mm]"}
    of_all = [found for found in explanation.summary["correlations"] if found["source"] == "all"]
    rho = {(found["block"], found["branch"], f"fraction_{found['tissue']}"): found["rho"] for found in of_all}
    blocks = blocks_of(images)
    columns = [(branch, column) for branch in BRANCHES for column in across]
    with rc_context(STYLE):
        figure = Figure(figsize=(2.9 * len(columns), 2.6 * len(blocks) + 0.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(blocks), len(columns), squeeze=False, sharex="col", sharey=False)
        for row, block in zip(axes, blocks, strict=True):
            for axis, (branch, column) in zip(row, columns, strict=True):
                for colour, (source, points) in enumerate(images.groupby("source", sort=False)):
                    shade = COLOURS[colour % len(COLOURS)]
                    label = str(source).replace("$", r"\$")
                    axis.scatter(points[column], points[f"{block}_{branch}"], s=13, c=shade, alpha=0.65, label=label)
                    axis.collections[-1].set_linewidth(0)
                known = rho.get((block, branch, column))
                shown = "" if known is None else f"   ρ = {known:+.2f}"
                axis.set_title(f"{block_title(block)}, {'CNN' if branch == 'cnn' else branch}{shown}", loc="left")
                axis.ticklabel_format(axis="y", useOffset=False)
                axis.locator_params(nbins=5)
                if column.startswith("fraction_"):
                    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        for axis, (_, column) in zip(axes[-1], columns, strict=True):
            axis.set_xlabel(across[column])
        for row in axes:
            row[0].set_ylabel("share")
        if images["source"].nunique() > 1:
            figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
        with warnings.catch_warnings():
            # Without such a font the legend shows boxes, which is no reason to disturb the command line.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(path, dpi=150)


def render_table(explanation: Explanation) -> Table:
    """For a terminal: the shares of the two example images, and the mean and deviation over all images."""
    images, summary = explanation.images, explanation.summary
    table = Table(
        title=f"Gates: {summary['num_images']} images of {summary['num_patients']} patients",
        caption="\n".join(filter(None, [summary["finding"], *(b["verdict"] for b in summary["blocks"].values())])),
        caption_justify="left",
    )
    table.add_column("image")
    for block in summary["blocks"]:
        for branch in ("transformer", "CNN"):
            table.add_column(f"{block_title(block)}\n{branch}", justify="right")
    for example in summary["examples"]:
        tissue = example["tissue"]
        where = f"{example['patient']} {example['source']} slice {example['slice']}"
        words = f"most {tissue} ({example['fractions'][tissue]:.1%} of the body): {where}"
        numbers = [example["shares"][block][branch] for block in summary["blocks"] for branch in BRANCHES]
        table.add_row(escape(words), *(f"{number:.4f}" for number in numbers))
    of_all = [images[f"{block}_{branch}"] for block in summary["blocks"] for branch in BRANCHES]
    table.add_row(
        "all images, mean ± standard deviation", *(f"{share.mean():.4f} ± {share.std(ddof=0):.4f}" for share in of_all)
    )
    return table
