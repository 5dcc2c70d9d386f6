"""Figures of what the gates and maps were and of what switching them off did."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from seresvit.evaluation.figures import COLOURS, MARKERS, STYLE, literal
from seresvit.evaluation.gates import BRANCHES, block_title, blocks_of, on_pixels, tissues_of
from seresvit.evaluation.knockouts import knockout_words
from seresvit.evaluation.statistics import signed

BRANCH_NAMES = {"transformer": "transformer", "cnn": "CNN", "both": "both branches"}
MAX_BARS = 24


def draw_shares(images: pd.DataFrame, correlations: list[dict[str, Any]], path: Path) -> None:
    """Shares against bone and contrast, a row a block, coloured by source; against position without tissues."""
    tissues = tissues_of(images)
    usual = [tissue for tissue in ("bone", "contrast") if tissue in tissues]
    across = {f"fraction_{tissue}": f"{tissue} in the body" for tissue in usual or tissues[:2]}
    across = across or {"position_mm": "slice position [mm]"}
    of_all = [found for found in correlations if found["source"] == "all"]
    rho = {(found["block"], found["branch"], f"fraction_{found['tissue']}"): found["rho"] for found in of_all}
    blocks = blocks_of(images)
    columns = [(branch, column) for branch in BRANCHES for column in across]
    with rc_context(STYLE):
        figure = Figure(figsize=(2.9 * len(columns), 2.6 * len(blocks) + 0.3), layout="constrained")
        axes = figure.subplots(len(blocks), len(columns), squeeze=False, sharex="col", sharey=False)
        for row, block in zip(axes, blocks, strict=True):
            for axis, (branch, column) in zip(row, columns, strict=True):
                for place, (source, points) in enumerate(images.groupby("source", sort=False)):
                    look = {"c": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
                    shares, label = points[f"{block}_{branch}"], literal(str(source))
                    axis.scatter(points[column], shares, s=14, alpha=0.65, label=label, **look)
                    axis.collections[-1].set_linewidth(0)
                known = rho.get((block, branch, column))
                shown = "" if known is None else f"   ρ = {signed(known, 2)}"
                axis.set_title(f"{block_title(block)}, {BRANCH_NAMES[branch]}{shown}", loc="left")
                axis.ticklabel_format(axis="y", useOffset=False)
                axis.locator_params(nbins=5)
                if column.startswith("fraction_"):
                    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        for axis, (_, column) in zip(axes[-1], columns, strict=True):
            axis.set_xlabel(literal(across[column]))
        for row in axes:
            row[0].set_ylabel("share (mean gate)")
        if images["source"].nunique() > 1:
            figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
        _save(figure, path)


def draw_knockouts(table: pd.DataFrame, path: Path) -> None:
    """The change of the MAE by each knock-out with its interval over patients, in percent of the intact network's.

    In the whole image, and in bone if known. Linear within ± 1 %, which is shaded, and logarithmic beyond: a shut half
    and a fixed gate lie decades apart.
    """
    regions = [region for region in ("image", "bone") if region in set(table["region"])]
    order = table[["knockout", "site"]].drop_duplicates()
    unit = str(table["unit"].iloc[0])
    names = [f"{name}, {block_title(site)}" if site != "all" else name for name, site in order.to_numpy()]
    with rc_context(STYLE):
        figure = Figure(figsize=(3.2 + 3.2 * len(regions), 0.9 + 0.27 * len(names)), layout="constrained")
        axes = figure.subplots(1, len(regions), squeeze=False, sharey=True)[0]
        for axis, region in zip(axes, regions, strict=True):
            rows = order.merge(table[table["region"] == region], on=["knockout", "site"], how="left")
            intact, places = rows["mae_intact"], np.arange(len(rows))
            axis.axvspan(-1, 1, color="#eef2f5", linewidth=0)
            axis.axvline(0, color="#5c6670", linewidth=1)
            low, high = 100 * rows["low"] / intact, 100 * rows["high"] / intact
            axis.hlines(places, low, high, color=COLOURS[0], linewidth=2)
            axis.plot(rows["percent"], places, "o", color=COLOURS[0], markersize=5)
            axis.set_xscale("symlog", linthresh=1)
            extent = [-1, 1, *rows["percent"].dropna(), *low.dropna(), *high.dropna()]
            least, most = min(extent), max(extent)
            decades = [10**k for k in range(int(np.ceil(np.log10(max(-least, most)))) + 1)]
            ticks = [tick for tick in [*(-d for d in decades), 0, *decades] if 1.5 * least <= tick <= 10 * most]
            words = [f"{tick:+d}".replace("000", "k").replace("-", "−") if tick else "0" for tick in ticks]
            axis.set_xticks(ticks, words)
            axis.set_xlim(1.5 * least, 1.5 * most)
            where = "whole image" if region == "image" else region
            known = f": {intact.dropna().iloc[0]:.4g} {unit} intact" if intact.notna().any() else ""
            axis.set_title(f"MAE, {where}{known}", loc="left")
            axis.set_xlabel("change of MAE [%]")
        axes[0].set_yticks(np.arange(len(names)), [knockout_words(name) for name in names])
        axes[0].invert_yaxis()
        _save(figure, path)


def draw_channels(channels: pd.DataFrame, tissue: str, unit: str, path: Path) -> None:
    """For each block the channels that the tissue needs most: the change of its MAE when only this one is shut."""
    column = "mae_change" if tissue == "image" else f"mae_change_{tissue}"
    blocks = list(channels["block"].unique())
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.6 + 2.3 * len(blocks)), layout="constrained")
        for axis, block in zip(figure.subplots(len(blocks), 1, squeeze=False)[:, 0], blocks, strict=True):
            best = channels[channels["block"] == block].nlargest(MAX_BARS, column)
            for colour, hatch, branch in zip(COLOURS, ("", "/"), BRANCHES, strict=False):
                mine = (best["branch"] == branch).to_numpy()
                heights = np.where(mine, best[column], 0.0)
                axis.bar(
                    np.arange(len(best)),
                    heights,
                    color=colour,
                    hatch=hatch,
                    edgecolor="white",
                    label=BRANCH_NAMES[branch],
                )
            axis.set_xticks(np.arange(len(best)), best["channel"], rotation=90)
            axis.grid(visible=False, axis="x")
            where = "in the whole image" if tissue == "image" else f"in {tissue}"
            axis.set_title(f"{block_title(block)}: MAE {where} without this channel", loc="left")
            axis.set_ylabel(f"change of MAE{f' [{unit}]' if unit else ''}")
            axis.axhline(0, color="#5c6670", linewidth=1)
        axis.set_xlabel(f"channel, the {MAX_BARS} that {'matter' if tissue == 'image' else f'{tissue} needs'} most")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=2)
        _save(figure, path)


def draw_maps(panels: list[dict[str, Any]], path: Path) -> None:
    """A row an image: the source, and each map in colour over it, on one scale for all images.

    `panels`: of each image its `title`, `source` (Y, X) with its `grey` range, and `maps`, (block, branch) → (h, w).
    Maps that are one number everywhere are left out.
    """
    places = [
        place for place in panels[0]["maps"] if any(np.ptp(panel["maps"][place]) > 1e-6 for panel in panels)
    ] or list(panels[0]["maps"])[:1]
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(2.6 * (1 + len(places)), 2.7 * len(panels) + 0.6), layout="constrained")
        axes = figure.subplots(len(panels), 1 + len(places), squeeze=False)
        for row, panel in zip(axes, panels, strict=True):
            for axis in row:
                axis.imshow(panel["source"], cmap="gray", vmin=panel["grey"][0], vmax=panel["grey"][1])
                axis.set_axis_off()
            row[0].set_title(literal(panel["title"]), loc="left")
        for column, place in enumerate(places, start=1):
            maps = [on_pixels(panel["maps"][place], panel["source"].shape) for panel in panels]
            low, high = min(map(np.min, maps)), max(map(np.max, maps))
            for row, map_YX in zip(axes, maps, strict=True):
                shown = row[column].imshow(map_YX, cmap="viridis", vmin=low, vmax=max(high, low + 1e-6), alpha=0.6)
            axes[0, column].set_title(f"{block_title(place[0])}, {BRANCH_NAMES[place[1]]}", loc="left")
            bar = figure.colorbar(
                ScalarMappable(shown.norm, shown.cmap), ax=axes[:, column], location="bottom", shrink=0.9, pad=0.02
            )
            bar.outline.set_visible(False)
            bar.set_label("factor of the features")
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Without such a font the legend shows boxes, which is no reason to disturb the command line.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=150)
