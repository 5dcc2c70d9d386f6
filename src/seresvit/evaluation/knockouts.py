"""What the gates are good for: the error with a part of the fusion switched off, against the network as it is.

Reads from top to bottom: what is drawn → one channel at a time → gates, maps and halves → tables. Errors are absolute,
in the target's unit, on the grid that the network was trained on, pooled over a patient's pixels in a region: the whole
image, the body, or a tissue. The patient is the unit of statistics.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from seresvit.data.intensity import intensity_of
from seresvit.data.pair import Pair
from seresvit.evaluation.gates import BRANCHES
from seresvit.evaluation.statistics import Difference, holm, paired_difference, sentence
from seresvit.evaluation.tissues import IMAGE
from seresvit.model.fusion import altered_gates, record_gates
from seresvit.model.generator import Generator
from seresvit.synthesis.predictor import Predictor

# What is bounded, so that a large test set costs no more than a small one. All draws are seeded.
KNOCKOUT_SLICES = 64  # of the explained split, evenly over cases and positions, at least one a case
CHANNEL_PATIENTS, CHANNEL_SLICES = 16, 4  # for single channels: a slice a patient, or these many in all if that is more
TRAINING_CASES, TRAINING_SLICES = 16, 64  # for the mean gate
SEED = 0
# Together, top channels are this part of a block's.
TOP_SHARE = 1 / 16

TRAINING_MEAN, SWAPPED = "gates at training mean", "gates swapped"
MAP_MEAN, MAP_FLIPPED, MAP_SWAPPED = "maps at their mean", "maps flipped", "maps swapped"
ALL = "all"
# The name of a knock-out, where it is done, and what the network runs in.
Context = tuple[str, str, AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class Sample:
    """Slices of one case for knock-outs: inputs (Z, C, H, W), target (Z, Y, X) and regions, name → (Z, Y, X) bool.

    `restore` takes the network's output to the target's unit, as Predictor does.
    """

    patient: str
    source: str
    inputs: torch.Tensor
    target: np.ndarray
    regions: dict[str, np.ndarray]
    restore: Callable[[np.ndarray], np.ndarray]
    unit: str


@dataclass(frozen=True)
class Knockouts:
    """`table`: that of knockouts.csv; `channels`: block, channel, and the change of the error in each region;
    `carriers`: the channels that the ranked tissue needs most, with intervals; `sentences`: in words."""

    table: pd.DataFrame
    channels: pd.DataFrame
    carriers: list[dict[str, Any]]
    sentences: list[str]


# Draw: a bounded number of slices, evenly over patients.


def draw_sample(
    predictor: Predictor, pair: Pair, inputs_ZCHW: torch.Tensor, regions: dict[str, np.ndarray], most: int
) -> Sample:
    """At most `most` slices of a case, evenly over its positions.

    HU and 8-bit targets are as they were acquired; an MR target, which has no unit, is brought to the one scale that
    the network's output is restored to.
    """
    kept = _evenly(len(inputs_ZCHW), most)
    rule, target = predictor.target_intensity(pair.source), pair.target
    values = target.array
    if target.unit == "arbitrary":
        values = rule.restore(intensity_of(target, predictor.data.intensity.target, predictor.data).normalise(values))
    inside = {IMAGE: np.ones(target.array.shape, bool)} | regions
    return Sample(
        pair.case.patient,
        pair.case.source,
        inputs_ZCHW[kept],
        values[kept],
        {name: pixels[kept] for name, pixels in inside.items()},
        rule.restore,
        {"uint8": "grey levels", "arbitrary": ""}.get(target.unit, target.unit),
    )


def _evenly(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` things: the middles of as many equal parts."""
    number = min(count, max(most, 1))
    return ((np.arange(number) + 0.5) * count / number).astype(int)


# Switch off: every alteration is a context in which the network runs.


@contextmanager
def shut(network: nn.Module, keep: dict[str, torch.Tensor]) -> Iterator[None]:
    """Each named block's fused features (B, 2C, H, W) times its `keep`, (1 or B, 2C): 0 shuts a channel, 1 leaves it.

    Behind the gate, so that it does the same whatever the fusion, and to a plain concatenation.
    """
    handles = [
        network.get_submodule(f"{block}.fuse").register_forward_hook(
            lambda module, inputs, x_BCHW, keep_BC=keep_BC: x_BCHW * keep_BC[:, :, None, None]
        )
        for block, keep_BC in keep.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _repeated(network: nn.Module, block: str, copies: int) -> Iterator[None]:
    """One image becomes `copies` of it at the fusion of that block: what comes before runs once."""
    fuse = network.get_submodule(f"{block}.fuse")
    handle = fuse.register_forward_pre_hook(lambda module, inputs: inputs[0].expand(copies, -1, -1, -1))
    try:
        yield
    finally:
        handle.remove()


def fusion_blocks(network: Generator) -> list[str]:
    """The blocks that fuse two branches: those with a transformer."""
    return [f"art_{number}" for number in sorted(network.settings.transformer_blocks)]


def channels_of(network: Generator) -> int:
    """2C: the channels that a fusion scales."""
    return 8 * network.settings.base_channels


# One channel at a time.


def knock_out_channels(
    predictor: Predictor, samples: list[Sample], progress: Callable[[list[Any]], Iterable[Any]] = iter
) -> pd.DataFrame:
    """A row a block, channel, patient and region: the change of the error when this one channel is shut.

    A change is that of the patient's mean over the region's pixels, on the slices of `_channel_slices`.
    """
    slices = _channel_slices(samples)
    blocks, num_channels = fusion_blocks(predictor.net), channels_of(predictor.net)
    rows = []
    for sample, z in progress(slices):
        image_1CHW = sample.inputs[z : z + 1].to(predictor.device)
        sizes = _sizes(sample, z)
        (intact,) = _error_sums(predictor, sample, image_1CHW, [z])
        for block in blocks:
            for channels in torch.arange(num_channels, device=predictor.device).split(predictor.batch_size):
                keep_VC = torch.ones(len(channels), num_channels, device=predictor.device)
                keep_VC[torch.arange(len(channels)), channels] = 0
                with _repeated(predictor.net, block, len(channels)), shut(predictor.net, {block: keep_VC}):
                    sums = _error_sums(predictor, sample, image_1CHW, [z] * len(channels))
                for channel, of_channel in zip(channels.tolist(), sums, strict=True):
                    for region, size in sizes.items():
                        change = of_channel[region] - intact[region]
                        rows.append((block, channel, sample.patient, region, change, size))
    table = pd.DataFrame(rows, columns=["block", "channel", "patient", "region", "change", "pixels"])
    sums = table.groupby(["block", "channel", "patient", "region"], sort=False).sum()
    return (sums["change"] / sums["pixels"].where(sums["pixels"] > 0)).rename("change").reset_index()


def _channel_slices(samples: list[Sample]) -> list[tuple[Sample, int]]:
    """At most CHANNEL_PATIENTS patients, and of each as many slices as make about CHANNEL_SLICES, but at least one."""
    of_patient: dict[str, list[tuple[Sample, int]]] = {}
    for sample in samples:
        of_patient.setdefault(sample.patient, []).extend((sample, z) for z in range(len(sample.inputs)))
    patients = list(of_patient.values())
    patients = [patients[place] for place in _evenly(len(patients), CHANNEL_PATIENTS)]
    each = CHANNEL_SLICES // len(patients)
    return [slices[place] for slices in patients for place in _evenly(len(slices), each)]


def _error_sums(
    predictor: Predictor, sample: Sample, inputs_BCHW: torch.Tensor, slices: list[int]
) -> list[dict[str, float]]:
    """For each image that comes out, whose target is that of `slices`: region → the sum of absolute errors."""
    with torch.inference_mode():
        synthetic_BYX = predictor.net(inputs_BCHW.to(predictor.device))[:, 0].float().cpu().numpy()
    error_BYX = np.abs(sample.restore(synthetic_BYX) - sample.target[slices])
    return [
        {region: float(error_YX[inside[z]].sum(dtype=np.float64)) for region, inside in sample.regions.items()}
        for z, error_YX in zip(slices, error_BYX, strict=True)
    ]


def _sizes(sample: Sample, z: int) -> dict[str, int]:
    return {region: int(inside[z].sum()) for region, inside in sample.regions.items()}


def rank_tissue(regions: Iterable[str]) -> str:
    """The region by which channels are ranked: bone where it is known, else the whole image."""
    return "bone" if "bone" in regions else IMAGE


def top_channels(changes: pd.DataFrame, tissue: str, without_patient: str) -> dict[str, list[int]]:
    """Block → its TOP_SHARE of channels that `tissue` needs most, judged by the other patients, so that the choice and
    its test share none; by all where there is but one."""
    of_tissue = changes[changes["region"] == tissue].dropna(subset="change")
    others = of_tissue[of_tissue["patient"] != without_patient]
    mean = (others if len(others) else of_tissue).groupby(["block", "channel"], sort=False)["change"].mean()
    return {
        str(block): of_block.droplevel("block").nlargest(_num_top(changes["channel"].nunique())).index.tolist()
        for block, of_block in mean.groupby("block", sort=False)
    }


def _num_top(num_channels: int) -> int:
    return max(round(TOP_SHARE * num_channels), 1)


# Gates, maps and halves.


def knock_out_all(
    predictor: Predictor,
    samples: list[Sample],
    mean_gates: dict[str, np.ndarray],
    *,
    gate_names: Iterable[str] = (),
    progress: Callable[[str], Callable[[list[Any]], Iterable[Any]]] = lambda verb: iter,
) -> Knockouts:
    """Every knock-out that the network's fusion allows, on all samples.

    `mean_gates`: block → (2C,), the mean gate over training images; `gate_names`: what the fusion has, as
    `record_gates` names it ("art_1", "art_1.map").
    """
    changes = knock_out_channels(predictor, samples, progress("shutting channels"))
    tissue = rank_tissue(changes.dropna(subset="change")["region"].unique())
    names = list(gate_names)
    rng = np.random.default_rng(SEED)
    rows: list[dict[str, Any]] = []
    for sample in progress("knocking out")(samples):
        top = top_channels(changes, tissue, sample.patient)
        for places in np.array_split(np.arange(len(sample.inputs)), -(-len(sample.inputs) // predictor.batch_size)):
            inputs_BCHW = sample.inputs[places].to(predictor.device)
            donor = _donor_gates(predictor, samples, sample, places, rng) if names else {}
            contexts: list[Context] = [("intact", ALL, nullcontext())]
            contexts += _of_gates(predictor, names, mean_gates, donor)
            contexts += _of_channels(predictor, top, tissue, mean_gates, len(places), rng)
            for name, site, context in contexts:
                with context:
                    sums = _error_sums(predictor, sample, inputs_BCHW, places.tolist())
                for z, of_image in zip(places.tolist(), sums, strict=True):
                    sizes = _sizes(sample, z)
                    rows += [
                        {"knockout": name, "site": site, "patient": sample.patient, "region": region}
                        | {"sum": of_image[region], "pixels": sizes[region]}
                        for region in sizes
                    ]
    num_slices = sum(len(sample.inputs) for sample in samples)
    table, sentences = _differences(pd.DataFrame(rows), samples[0].unit, num_slices)
    return Knockouts(table, _channel_summary(changes), _carriers(changes, tissue), sentences)


def _sites(predictor: Predictor, names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """("all", every block) and, of several, each block alone."""
    blocks = [block for block in fusion_blocks(predictor.net) if block in names]
    return [(ALL, blocks), *([(block, [block]) for block in blocks] if len(blocks) > 1 else [])]


def _of_gates(
    predictor: Predictor, names: list[str], mean_gates: dict[str, np.ndarray], donor: dict[str, torch.Tensor]
) -> list[Context]:
    """Gates at the training mean or of another image, maps at their own mean (no "where"), mirrored, or of another."""

    def change(to: Callable[[str, torch.Tensor], torch.Tensor], chosen: list[str]) -> AbstractContextManager[Any]:
        return altered_gates(predictor.net, lambda name, value: to(name, value) if name in chosen else value)

    def mean_gate(name: str, value: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(mean_gates[name])

    def of_donor(name: str, value: torch.Tensor) -> torch.Tensor:
        other = donor[name].to(value)
        same_size = other.ndim == 2 or other.shape[-2:] == value.shape[-2:]
        return other if same_size else F.interpolate(other, value.shape[-2:], mode="bilinear")

    contexts: list[Context] = []
    gates = [name for name in names if not name.endswith(".map")]
    maps = [name for name in names if name.endswith(".map")]
    if gates:
        contexts += [(TRAINING_MEAN, site, change(mean_gate, blocks)) for site, blocks in _sites(predictor, gates)]
        contexts += [(SWAPPED, ALL, change(of_donor, gates))] if donor else []
    if maps:
        for site, blocks in _sites(predictor, [name.removesuffix(".map") for name in maps]):
            chosen = [f"{block}.map" for block in blocks]
            mean_map = change(lambda name, value: value.mean(dim=(2, 3), keepdim=True), chosen)
            contexts.append((MAP_MEAN, site, mean_map))
        contexts.append((MAP_FLIPPED, ALL, change(lambda name, value: value.flip(-1), maps)))
        contexts += [(MAP_SWAPPED, ALL, change(of_donor, maps))] if donor else []
    return contexts


def _of_channels(
    predictor: Predictor,
    top: dict[str, list[int]],
    tissue: str,
    mean_gates: dict[str, np.ndarray],
    num_images: int,
    rng: np.random.Generator,
) -> list[Context]:
    """One half of the channels shut, or as many as `top` holds: the ranked ones, the most open ones, or any."""
    blocks, num_channels = fusion_blocks(predictor.net), channels_of(predictor.net)

    def without(chosen: dict[str, Any]) -> AbstractContextManager[None]:
        keep = {block: torch.ones(num_images, num_channels, device=predictor.device) for block in chosen}
        for block, channels_BK in chosen.items():
            shut_BK = torch.as_tensor(channels_BK, device=predictor.device).expand(num_images, -1)
            keep[block].scatter_(1, shut_BK, 0.0)
        return shut(predictor.net, keep)

    halves = dict(zip(BRANCHES, np.arange(num_channels).reshape(2, -1), strict=True))
    contexts: list[Context] = [
        (f"{branch} shut", site, without(dict.fromkeys(of_site, half)))
        for branch, half in halves.items()
        for site, of_site in _sites(predictor, blocks)
    ]
    ranked = "bone channels shut" if tissue == "bone" else "most needed channels shut"
    contexts.append((ranked, ALL, without(top)))
    count = _num_top(num_channels)
    if mean_gates:
        most_open = {block: np.argsort(-mean)[:count].copy() for block, mean in mean_gates.items()}
        contexts.append(("most open channels shut", ALL, without(most_open)))
    drawn = {block: rng.random((num_images, num_channels)).argsort(axis=1)[:, :count] for block in blocks}
    contexts.append(("random channels shut", ALL, without(drawn)))
    return contexts


def _donor_gates(
    predictor: Predictor, samples: list[Sample], sample: Sample, places: np.ndarray, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """For each image at `places` the gates and maps of a random one of another patient, all of one case; where there is
    no other, of another image of this case, and nothing where that is none either."""
    others = [other for other in samples if other.patient != sample.patient]
    if not others and len(sample.inputs) == 1:
        return {}
    donor = others[rng.integers(len(others))] if others else sample
    drawn = rng.integers(len(donor.inputs), size=len(places))
    if not others:  # never an image's own
        drawn = (places + rng.integers(1, len(donor.inputs), size=len(places))) % len(donor.inputs)
    with torch.inference_mode(), record_gates(predictor.net) as gates:
        predictor.net(donor.inputs[drawn].to(predictor.device))
    return gates


# Tables: changes by patient, with their intervals.


def question_of(knockout: str) -> str:
    """What a knock-out asks about: "gates", "maps", "halves" or "channels". p is adjusted among those that ask the
    same: over all of them nothing could be shown with few patients, however large it is."""
    first, _, last = knockout.partition(" ")
    if first in BRANCHES and last == "shut":
        return "halves"
    return first if first in ("gates", "maps") else "channels"


def knockout_words(knockout: str) -> str:
    """The name of a knock-out as people write it."""
    return knockout.replace("cnn", "CNN")


def _differences(errors: pd.DataFrame, unit: str, num_slices: int) -> tuple[pd.DataFrame, list[str]]:
    """The table of knockouts.csv, and a sentence for the whole image of each knock-out at all blocks."""
    sums = errors.groupby(["knockout", "site", "region", "patient"], sort=False)[["sum", "pixels"]].sum()
    mae = (sums["sum"] / sums["pixels"].where(sums["pixels"] > 0)).unstack("patient")
    rows, sentences = [], []
    for region in mae.index.get_level_values("region").unique():
        intact = mae.loc["intact", ALL, region]
        of_region = mae.xs(region, level="region").drop(index="intact", level="knockout")
        differences = {key: paired_difference(of_region.loc[key], intact) for key in of_region.index}
        families: dict[str, dict[Any, Difference]] = {question_of(name): {} for name, _ in differences}
        for key, difference in differences.items():
            families[question_of(key[0])][key] = difference
        adjusted = {key: one for family in families.values() for key, one in holm(family).items()}
        for name, site in differences:
            difference = adjusted[name, site]
            numbers = asdict(difference)
            identity = {"knockout": name, "site": site, "region": region, "unit": unit, "slices": num_slices}
            maes = {"mae_intact": intact.mean(), "mae": of_region.loc[name, site].mean()}
            change = {"change": numbers.pop("mean")}
            percent = {"percent": 100 * change["change"] / maes["mae_intact"] if maes["mae_intact"] else np.nan}
            rows.append(identity | maes | change | numbers | percent)
            if region == IMAGE and site == ALL:
                sentences.append(sentence(knockout_words(name), "the intact network", "MAE", unit, difference))
    table = pd.DataFrame(rows)
    may_be_none = ["low", "high", "p", "p_adjusted", "effect_size"]
    return table.astype(dict.fromkeys(may_be_none, np.float64)), sentences


def _channel_summary(changes: pd.DataFrame) -> pd.DataFrame:
    """A row a block and channel: mae_change (of the whole image), mae_change_REGION, rank_REGION in the block (1: the
    error grows most without it), each the mean over patients."""
    mean = changes.groupby(["block", "channel", "region"], sort=False)["change"].mean().unstack("region", sort=False)
    table = pd.DataFrame(index=mean.index)
    for region in mean.columns:
        suffix = "" if region == IMAGE else f"_{region}"
        table[f"mae_change{suffix}"] = mean[region]
        table[f"rank{suffix}"] = mean[region].groupby("block").rank(ascending=False, method="first").astype("Int64")
    table = table.reset_index()
    half = (table["channel"].max() + 1) // 2
    table.insert(2, "branch", np.where(table["channel"] < half, *BRANCHES))
    return table


def _carriers(changes: pd.DataFrame, tissue: str, most: int = 10) -> list[dict[str, Any]]:
    """The channels of all blocks that `tissue` needs most, with the interval of each over patients; it was chosen for
    being large, so that its size is a little flattered."""
    of_tissue = changes[changes["region"] == tissue].dropna(subset="change")
    mean = of_tissue.groupby(["block", "channel"], sort=False)["change"].mean().nlargest(most)
    half = (changes["channel"].max() + 1) // 2
    found = []
    for block, channel in mean.index:
        its = of_tissue[(of_tissue["block"] == block) & (of_tissue["channel"] == channel)].set_index("patient")[
            "change"
        ]
        difference = paired_difference(its, its * 0)
        found.append(
            {"block": block, "channel": int(channel), "branch": BRANCHES[int(channel >= half)], "region": tissue}
            | {"change": difference.mean, "low": difference.low, "high": difference.high, "patients": difference.n}
        )
    return found
