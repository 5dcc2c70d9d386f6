"""What the gates were: the scores of every image, and the transformer and the CNN share, against the tissue in it.

A share is the mean of the gate over the channels of one branch: the first half transformer, the second half CNN. Shares
say how strongly a block scaled each branch. What that did to the image, `knockouts.py` tests.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from seresvit.data.pair import Pair, load_sources, matched_slices
from seresvit.data.pairing import Case
from seresvit.data.volume import energy_kev_in
from seresvit.evaluation.statistics import signed
from seresvit.evaluation.tissues import BODY_ABOVE_HU, TISSUES_HU, WHOLE_BODY, label_regions
from seresvit.model.fusion import record_gates
from seresvit.synthesis.predictor import Predictor

BRANCHES = ("transformer", "cnn")
TISSUES_BY = ("label images", "HU ranges of the target")

# A channel is dead or saturated within this distance of the lowest or highest value that its gate can take.
MARGIN = 0.05
HIGHEST_GATE = {"gct": 2.0}  # all others end in a sigmoid or a softmax
# Both encoding stages halve the image before the blocks.
PIXELS_A_POSITION = 4
# A slice that hardly meets the body is no example of a tissue.
MIN_BODY_SHARE = 0.05
# A gate is called nearly constant when its channels move between images by less than this part of what they differ by,
# or, in an untrained network whose channels are all alike, by less than a thousandth of the gate's range.
NEARLY_CONSTANT, THOUSANDTH = 0.1, 0.001
# Shares of one gate differ by less between batches of different sizes; ranks would make a correlation of it.
ROUNDING = 1e-6
# A map that differs between positions by less than this says the same everywhere.
FLAT_MAP = 0.01


def highest_gate(predictor: Predictor) -> float:
    """The value that no gate of this fusion exceeds; the lowest is 0."""
    return HIGHEST_GATE.get(predictor.net.settings.fusion.kind, 1.0)


def network_inputs(predictor: Predictor, cases: tuple[Case, ...], pair: Pair) -> torch.Tensor:
    """The slices of `pair`, which is that of `cases`, as the network takes them: (Z, C, H, W), on the CPU."""
    sources, index = pair.sources, np.arange(len(pair.target.array))
    if pair.dropped and not predictor.data.resample:
        # An intensity rule by percentile sees the whole image in prediction; so it must here.
        sources = predictor.as_trained(*load_sources(cases, predictor.data))
        index = matched_slices(pair.target, sources[0])[1]
    return torch.cat([batch_BCHW.cpu() for batch_BCHW in predictor.batches(*sources)])[index]


def read_gates(predictor: Predictor, inputs_ZCHW: torch.Tensor) -> dict[str, np.ndarray]:
    """ "art_1" → gates (Z, 2C); "art_1.map" → maps (Z, K, h, w), K = 1 for all channels or 2: transformer's, CNN's.

    A fusion with a map for every channel is given as the mean map of either branch. Empty for one that has neither.
    """
    found: dict[str, list[np.ndarray]] = {}
    for batch_BCHW in inputs_ZCHW.split(predictor.batch_size):
        with torch.inference_mode(), record_gates(predictor.net) as gates:
            predictor.net(batch_BCHW.to(predictor.device))
        for name, value in gates.items():
            if name.endswith(".map") and value.shape[1] > 1:
                value = value.unflatten(1, (2, -1)).mean(dim=2)
            found.setdefault(name, []).append(value.float().cpu().numpy())
    return {name: np.concatenate(batches) for name, batches in found.items()}


def regions_of(pair: Pair, by_labels: bool) -> dict[str, np.ndarray]:
    """Name → (Z, Y, X) bool: WHOLE_BODY, then each tissue; empty where neither labels nor HU tell them.

    By the label images and the names of their labels.json; else by TISSUES_HU of the target, the body being its mask,
    or what is above BODY_ABOVE_HU.
    """
    if by_labels and pair.labels is not None:
        named = label_regions(pair.label_names)
        return {WHOLE_BODY: pair.labels > 0} | {name: pair.labels == value for name, value in named.items()}
    if pair.target.unit != "HU":
        return {} if pair.labels is None else {WHOLE_BODY: pair.labels > 0}
    values = pair.target.array
    body = values > BODY_ABOVE_HU if pair.labels is None else pair.labels > 0
    return {WHOLE_BODY: body} | {
        name: body & (values > low) & (values <= high) for name, (low, high) in TISSUES_HU.items()
    }


# Tables: a row an image.


def identity_table(pair: Pair, source: str) -> pd.DataFrame:
    """A row a slice: patient, source, source_kev (NaN where neither header nor name says it), slice (from 0, as in
    slices.csv), position_mm."""
    kev = pair.source.energy_kev or energy_kev_in(source)
    return pd.DataFrame(
        {
            "patient": pair.case.patient,
            "source": source,
            "source_kev": np.nan if kev is None else kev,
            "slice": np.arange(len(pair.target.array)),
            "position_mm": pair.target.positions_mm.astype(np.float64),
        }
    )


def fraction_table(regions: dict[str, np.ndarray]) -> pd.DataFrame:
    """body_share of the pixels, and fraction_TISSUE, parts of the body; without regions no column."""
    if not regions:
        return pd.DataFrame()
    sizes = regions[WHOLE_BODY].sum(axis=(1, 2))
    columns = {"body_share": sizes / regions[WHOLE_BODY][0].size}
    for name, pixels in regions.items():
        if name != WHOLE_BODY:
            columns[f"fraction_{name}"] = np.where(sizes > 0, pixels.sum(axis=(1, 2)) / np.maximum(sizes, 1), np.nan)
    return pd.DataFrame(columns)


def gate_table(gates_NC: dict[str, np.ndarray], highest: float = 1.0) -> pd.DataFrame:
    """For each block the mean gate of either half of its channels, the deviation over all of them, and how many of them
    are dead (below MARGIN) or saturated (above `highest` − MARGIN)."""
    columns = {}
    for block, gate_NC in gates_NC.items():
        half = gate_NC.shape[1] // 2
        columns[f"{block}_transformer"] = gate_NC[:, :half].mean(axis=1, dtype=np.float64)
        columns[f"{block}_cnn"] = gate_NC[:, half:].mean(axis=1, dtype=np.float64)
        columns[f"{block}_std"] = gate_NC.std(axis=1, dtype=np.float64)
        columns[f"{block}_dead"] = (gate_NC < MARGIN).sum(axis=1)
        columns[f"{block}_saturated"] = (gate_NC > highest - MARGIN).sum(axis=1)
    return pd.DataFrame(columns)


def map_table(block: str, map_ZKHW: np.ndarray, identity: pd.DataFrame, regions: dict[str, np.ndarray]) -> pd.DataFrame:
    """A row an image and branch ("both" where one map scales all channels): mean and std over positions, and the mean
    inside each region (in_whole_body, in_TISSUE; NaN where the image has none)."""
    tables = []
    for k, branch in enumerate(BRANCHES if map_ZKHW.shape[1] == 2 else ("both",)):
        map_ZYX = map_ZKHW[:, k]
        table = identity[["patient", "source", "slice"]].assign(block=block, branch=branch)
        table["mean"], table["std"] = (
            getattr(map_ZYX, statistic)(axis=(1, 2), dtype=np.float64) for statistic in ("mean", "std")
        )
        for name, inside in regions.items():
            sums = (on_pixels(map_ZYX, inside.shape[1:]) * inside).sum(axis=(1, 2), dtype=np.float64)
            sizes = inside.sum(axis=(1, 2))
            table[f"in_{name}"] = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def on_pixels(map_HW: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Maps (..., h, w) with each position repeated over its pixels and cut to the image's rows and columns."""
    repeated = map_HW.repeat(PIXELS_A_POSITION, axis=-2).repeat(PIXELS_A_POSITION, axis=-1)
    return repeated[..., : size[0], : size[1]]


def channel_table(block: str, gate_NC: np.ndarray, highest: float = 1.0) -> pd.DataFrame:
    """A row a channel of one block: its mean and deviation over images, its range, and in which part of the images it
    is dead or saturated."""
    num_channels = gate_NC.shape[1]
    return pd.DataFrame(
        {
            "block": block,
            "channel": np.arange(num_channels),
            "branch": np.repeat(BRANCHES, num_channels // 2),
            "mean": gate_NC.mean(axis=0, dtype=np.float64),
            "std_over_images": gate_NC.std(axis=0, dtype=np.float64),
            "min": gate_NC.min(axis=0).astype(np.float64),
            "max": gate_NC.max(axis=0).astype(np.float64),
            "dead_share": (gate_NC < MARGIN).mean(axis=0),
            "saturated_share": (gate_NC > highest - MARGIN).mean(axis=0),
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
                    varies = all(np.ptp(both[column]) > ROUNDING for column in both.columns[1:]) if len(both) else False
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


def movement(block: str, gate_NC: np.ndarray, highest: float = 1.0) -> dict[str, Any]:
    """How far a block's shares, and its channels one by one, move between images; how many channels are at an end."""
    of_image = gate_table({block: gate_NC}, highest)
    moved: dict[str, Any] = {}
    for branch in BRANCHES:
        share = of_image[f"{block}_{branch}"]
        spread = {"mean": share.mean(), "std": share.std(ddof=0), "min": share.min(), "max": share.max()}
        moved[branch] = {name: float(value) for name, value in spread.items()}
    in_image = {name: of_image[f"{block}_{name}"] for name in ("std", "dead", "saturated")}
    over_images = float(np.sqrt(gate_NC.var(axis=0, dtype=np.float64).mean()))
    over_channels = float(gate_NC.mean(axis=0, dtype=np.float64).std())
    constant = len(gate_NC) > 1 and over_images < max(NEARLY_CONSTANT * over_channels, THOUSANDTH)
    dead, saturated = (float(of_image[f"{block}_{end}"].mean()) for end in ("dead", "saturated"))
    says = "is nearly constant, so little more than a learned scale" if constant else "changes with the image"
    says = says if len(gate_NC) > 1 else "was seen in one image only, which does not tell whether it changes"
    verdict = (
        f"The gate of {block_title(block)} {says}: between images a channel's value moves by {over_images:.4f} "
        f"(standard deviation), while channels differ by {over_channels:.4f}. Of its {gate_NC.shape[1]} channels, "
        f"{dead:.3g} are dead and {saturated:.3g} saturated in the mean image."
    )
    return moved | {
        "dead": dead,
        "saturated": saturated,
        "in_image": {
            name: {end: float(getattr(values, end)()) for end in ("mean", "min", "max")}
            for name, values in in_image.items()
        },
        "std_over_images": over_images,
        "std_over_channels": over_channels,
        "nearly_constant": constant,
        "verdict": verdict,
    }


def map_movement(block: str, maps: pd.DataFrame) -> dict[str, Any]:
    """How far a block's maps differ between positions and between images, and their mean inside each tissue."""
    of_block: dict[str, Any] = {}
    says = []
    for branch, rows in maps[maps["block"] == block].groupby("branch", sort=False):
        over_positions = float(np.sqrt((rows["std"] ** 2).mean()))
        of_branch = {
            "mean": float(rows["mean"].mean()),
            "std_over_images": float(rows["mean"].std(ddof=0)),
            "std_over_positions": over_positions,
            "flat": over_positions < FLAT_MAP,
        }
        inside = {column: rows[column].mean() for column in rows.columns if column.startswith("in_")}
        of_block[str(branch)] = of_branch | {name: float(mean) for name, mean in inside.items() if not np.isnan(mean)}
        whose = {"both": "map", "transformer": "transformer's map", "cnn": "CNN's map"}[str(branch)]
        says.append(
            f"The {whose} of {block_title(block)} "
            f"{'says the same everywhere' if of_branch['flat'] else 'tells positions apart'}: they differ by "
            f"{over_positions:.4f} (standard deviation) around {of_branch['mean']:.4f}; its mean moves between images "
            f"by {of_branch['std_over_images']:.4f}."
        )
    return of_block | {"verdict": " ".join(says)}


def find_examples(images: pd.DataFrame, maps: pd.DataFrame) -> list[dict[str, Any]]:
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
        map_means: dict[str, dict[str, float]] = {}
        if len(maps):
            its = maps[(maps[["patient", "source", "slice"]] == row[["patient", "source", "slice"]]).all(axis=1)]
            for of_map in its.to_dict("records"):
                map_means.setdefault(of_map["block"], {})[of_map["branch"]] = float(of_map["mean"])
        examples.append(
            {
                "tissue": tissue,
                "patient": str(row["patient"]),
                "source": str(row["source"]),
                "slice": int(row["slice"]),
                "position_mm": float(row["position_mm"]),
                "fractions": {name: float(row[f"fraction_{name}"]) for name in ("bone", "soft")},
                "shares": {b: {k: float(row[f"{b}_{k}"]) for k in BRANCHES} for b in blocks_of(images)},
                "map_means": map_means,
            }
        )
    return examples


def finding(images: pd.DataFrame, examples: list[dict[str, Any]]) -> str:
    """One sentence on what the two example images show: the largest difference, its direction and its size."""
    if not examples or not examples[0]["shares"]:
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
        f"{name[k]} {block_title(b)} {signed(differences[b, k], 4)}" for b, k in places if (b, k) != (block, branch)
    )
    return (
        f"The two images differ most in the {name[branch]} share of {block_title(block)}, which is "
        f"{bone[block][branch]:.4f} with most bone against {soft[block][branch]:.4f} with most soft tissue "
        f"({signed(difference, 4)}{size}); the other differences are {others}."
    )
