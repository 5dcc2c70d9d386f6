"""The charts of a report: colours that the colour-blind can tell apart, with a marker each, and units on every axis."""

import io
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seresvit.evaluation.figures import COLOURS, MARKERS, STYLE, literal, log_scale
from seresvit.evaluation.metrics import main_metrics
from seresvit.evaluation.page import data_url
from seresvit.evaluation.regions import LIMITS_OF_AGREEMENT_SD
from seresvit.evaluation.scores import region_words
from seresvit.evaluation.statistics import ALPHA, signed
from seresvit.evaluation.tables import METHODS, shown_name, unit_of

QUIET = "#5c6670"
ALL_FUSIONS = "all"  # the fusion of a curve that all share
WIDTH_INCH = 9.6


def learning_curves(log: pd.DataFrame, unit: str) -> str:
    """Losses and validation MAE by images seen, of a log.jsonl with `seen`, the images over both stages."""
    with rc_context(STYLE):
        figure, (left, right) = _figure(2.9, 1, 2, sharex=True)
        names = {"l1": "L1", "adversarial": "adversarial", "discriminator": "discriminator"} | {
            term: term.replace("_", " ") for term in ("ms_ssim", "gradient", "perceptual")
        }
        for colour, (column, name) in zip(COLOURS, names.items(), strict=False):
            if column in log:
                drawn = log.dropna(subset=[column])
                left.plot(drawn["seen"], drawn[column], color=colour, linewidth=1.2, label=name)
        left.set_title("Training losses", loc="left")
        left.set_ylabel("loss")
        left.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        if "val_mae" in log:
            drawn = log.dropna(subset=["val_mae"])
            right.plot(drawn["seen"], drawn["val_mae"], color=COLOURS[0], linewidth=1.2, marker="o", markersize=3)
        right.set_title("Validation", loc="left")
        right.set_ylabel(_with_unit("MAE", unit if unit == "HU" else ""))
        begins = log.loc[log["stage"] == 1, "seen"].max() if log["stage"].nunique() > 1 else None
        for axis in (left, right):
            _images_seen(axis)
            log_scale(axis)
            if begins is not None:
                axis.axvline(begins, color="#aab2b9", linewidth=1, linestyle=":")
                axis.text(begins, 0.03, " stage 2", transform=axis.get_xaxis_transform(), fontsize=8, color=QUIET)
        return _png(figure)


def distributions(cases: pd.DataFrame, protocol: str) -> str:
    """One point a case, and a box of the quartiles, of each metric of the protocol: a row a method."""
    metrics = [name for name in main_metrics(protocol) if name in cases]
    methods = [name for name in METHODS if (cases["method"] == name).any()]
    with rc_context(STYLE):
        figure, axes = _figure(0.42 * len(methods) + 1.1, 1, len(metrics), sharey=True, squeeze=False)
        for axis, metric in zip(axes[0], metrics, strict=True):
            for place, method in enumerate(methods):
                values = cases.loc[cases["method"] == method, metric].replace([np.inf, -np.inf], np.nan).dropna()
                colour = COLOURS[place % len(COLOURS)]
                axis.boxplot(
                    [values],
                    positions=[place],
                    orientation="horizontal",
                    widths=0.6,
                    showfliers=False,
                    boxprops={"color": QUIET},
                    whiskerprops={"color": QUIET},
                    capprops={"color": QUIET},
                    medianprops={"color": "#1f272e", "linewidth": 1.6},
                )
                spread = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(len(values))
                axis.scatter(values, place + spread, s=14, color=colour, marker=MARKERS[place], alpha=0.8)
                axis.collections[-1].set_zorder(3)
            axis.set_xlabel(_with_unit(shown_name(metric), unit_of(metric, protocol)))
            axis.xaxis.set_major_locator(MaxNLocator(nbins=5, prune="both"))
            axis.grid(axis="y", visible=False)
        axes[0, 0].set_yticks(range(len(methods)), methods)
        axes[0, 0].invert_yaxis()
        return _png(figure)


def agreement(cases: pd.DataFrame, protocol: str) -> str:
    """Bias of each case by region, over the mean limits between which 95 % of voxel differences lie; "" without any."""
    of_network = cases[cases["method"] == METHODS[0]]
    regions = [name.removeprefix("bias_") for name in cases.columns if name.startswith("bias_")]
    regions = [name for name in regions if of_network[f"bias_{name}"].notna().any()]
    if not regions:
        return ""
    with rc_context(STYLE):
        figure, axis = _figure(0.3 * len(regions) + 1.2, 1, 1)
        axis.axvline(0, color="#1f272e", linewidth=0.8)
        for place, region in enumerate(regions):
            biases = of_network[f"bias_{region}"].dropna()
            low, high = (of_network[f"loa_{end}_{region}"].mean() for end in ("low", "high"))
            axis.plot([low, high], [place, place], color=COLOURS[5], linewidth=6, solid_capstyle="butt", alpha=0.7)
            axis.scatter(biases, np.full(len(biases), place), s=16, color=COLOURS[0], alpha=0.7, zorder=3)
            axis.plot(biases.mean(), place, marker="|", markersize=14, markeredgewidth=2, color="#1f272e", zorder=4)
        axis.set_yticks(range(len(regions)), [literal(region_words(name)) for name in regions])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(_with_unit("synthetic − target", unit_of("mae", protocol)))
        return _png(figure)


def bland_altman(target: np.ndarray, synthetic: np.ndarray, unit: str) -> str:
    """Differences of two arrays of voxels by their mean, as counts; their mean and limits of agreement as lines.

    (Bland and Altman, Lancet 1986: the mean of both, since neither is without error.)
    """
    means, differences = (target + synthetic) / 2, synthetic - target
    bias, spread = float(differences.mean()), LIMITS_OF_AGREEMENT_SD * float(differences.std(ddof=1))
    (low, high), reach = np.percentile(means, [0.05, 99.95]), np.percentile(np.abs(differences - bias), 99.9)
    half = 1.05 * max(reach, spread) or 1.0  # equal images differ by nothing, and an axis needs a length
    extent = (low, max(high, low + 1e-3), bias - half, bias + half)
    with rc_context(STYLE):
        figure, axis = _figure(3.6, 1, 1)
        drawn = axis.hexbin(
            means, differences, gridsize=(110, 30), extent=extent, bins="log", mincnt=1, cmap="cividis_r"
        )
        figure.colorbar(drawn, ax=axis, label="voxels", pad=0.01)
        for value, words in (
            (bias, "bias"),
            (bias - spread, f"bias − {LIMITS_OF_AGREEMENT_SD} SD"),
            (bias + spread, f"bias + {LIMITS_OF_AGREEMENT_SD} SD"),
        ):
            axis.axhline(value, color=COLOURS[1], linewidth=1.4, linestyle="-" if words == "bias" else "--")
            axis.annotate(
                f"{words}: {signed(value)}",
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
        axis.set_xlim(extent[:2])
        axis.set_ylim(extent[2:])
        axis.set_xlabel(_with_unit("mean of synthetic and target", unit))
        axis.set_ylabel(_with_unit("synthetic − target", unit))
        return _png(figure)


def slopes(means: pd.DataFrame, pairs: Sequence[tuple[str, str]], name: str, unit: str, higher_is_better: bool) -> str:
    """For each pair of columns of `means`, a row a patient, each patient's two values joined by a line; "" without one.

    `name` and `unit` are of the values. Told is in how many patients the second of the pair is better.
    """
    drawn = [(pair, means[[*pair]].dropna()) for pair in pairs if set(pair) <= set(means.columns)]
    drawn = [(pair, both) for pair, both in drawn if len(both)]
    if not drawn:
        return ""
    across = min(len(drawn), 5)
    down = -(-len(drawn) // across)
    with rc_context(STYLE):
        figure, axes = _figure(2.6 * down + 0.3, down, across, sharey=True, squeeze=False)
        for axis, (pair, both) in zip(axes.flat, drawn, strict=False):
            change = both[pair[1]] - both[pair[0]]
            better = change > 0 if higher_is_better else change < 0
            for patient, ends in both.iterrows():
                style = ("-", COLOURS[0], "o") if better[patient] else ("--", COLOURS[1], "^")
                axis.plot((0, 1), ends, linestyle=style[0], color=style[1], marker=style[2], markersize=4, linewidth=1)
            axis.set_title(f"better in {int(better.sum())} of {len(both)} patients", loc="left")
            axis.set_xticks((0, 1), [literal(_in_lines(one)) for one in pair])
            axis.set_xlim(-0.25, 1.25)
            axis.grid(axis="x", visible=False)
        for axis in axes.flat[len(drawn) :]:
            axis.set_visible(False)
        for row in axes:
            row[0].set_ylabel(_with_unit(name, unit))
        return _png(figure)


def _in_lines(name: str) -> str:
    """The name in short lines, a path broken behind its slashes."""
    broken = textwrap.fill(name.replace("/", "/ "), 14, break_long_words=False, break_on_hyphens=False)
    return broken.replace("/ ", "/")


def forest(comparisons: pd.DataFrame, metric: str, unit: str) -> str:
    """Each comparison's difference with its 95 % interval against the line of no difference."""
    rows = comparisons[(comparisons["metric"] == metric) & comparisons["mean"].notna()]
    if rows.empty:
        return ""
    with rc_context(STYLE):
        figure, axis = _figure(0.32 * len(rows) + 1.0, 1, 1)
        axis.axvline(0, color="#1f272e", linewidth=0.8)
        for place, row in enumerate(rows.to_dict("records")):
            shown = row["p_adjusted"] < ALPHA and (row["low"] > 0 or row["high"] < 0)
            colour = COLOURS[0] if shown else QUIET
            axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
            axis.plot(row["mean"], place, marker="s", color=colour, markerfacecolor=colour if shown else "white")
        pairs = zip(rows["first"], rows["second"], strict=True)
        axis.set_yticks(range(len(rows)), [f"{first} − {second}" for first, second in pairs])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(_with_unit(f"difference in {shown_name(metric)}, with 95 % interval", unit))
        return _png(figure)


def compared_curves(curves: pd.DataFrame, unit: str) -> str:
    """Validation MAE by images of each stage: a line a run, a colour and a marker a fusion, a dash every sixth."""
    stages = sorted(curves["stage"].unique())
    dashes = ("-", "--", ":")
    fusions = [name for name in curves["fusion"].unique() if name != ALL_FUSIONS]
    with rc_context(STYLE):
        figure, axes = _figure(3.1, 1, len(stages), squeeze=False)
        for axis, stage in zip(axes[0], stages, strict=True):
            for (fusion, _), run in curves[curves["stage"] == stage].groupby(["fusion", "seed"], sort=False):
                style: dict[str, Any] = {"color": QUIET, "marker": ".", "label": "shared by all fusions"}
                if fusion != ALL_FUSIONS:
                    row, place = divmod(fusions.index(fusion), len(COLOURS))
                    style = {"color": COLOURS[place], "marker": MARKERS[place], "label": fusion}
                    style |= {"linestyle": dashes[row % len(dashes)]}
                drawn = run.dropna(subset=["val_mae"])
                axis.plot(drawn["images"], drawn["val_mae"], linewidth=1.2, markersize=4, **style)
            axis.set_title(f"Stage {stage}", loc="left")
            log_scale(axis)
            _images_seen(axis)
            handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
            axis.legend(handles.values(), handles.keys(), fontsize=8)
        axes[0, 0].set_ylabel(_with_unit("MAE in validation", unit))
        return _png(figure)


def _figure(height_inch: float, rows: int, columns: int, **subplots: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_INCH, height_inch), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **subplots)


def _images_seen(axis: Axes) -> None:
    axis.set_xlabel("images seen")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.locator_params(axis="x", nbins=6)


def _with_unit(words: str, unit: str) -> str:
    return f"{words} [{unit}]" if unit else words


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Without a font for it, a name shows boxes, which is no reason to disturb the command line.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=180)
    return data_url(buffer.getvalue())
