"""The images of a report: source, synthetic, target, error and gate map of chosen slices, each under one scale."""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.image import imsave

from seresvit.data.geometry import BACKGROUND
from seresvit.data.pair import matched_slices
from seresvit.data.pairing import read_manifest
from seresvit.data.volume import DataError, Unit, Volume, same_grid
from seresvit.evaluation.evaluate import Prediction, load_prediction, prediction_of
from seresvit.evaluation.gate_maps import BALANCE, GateMap
from seresvit.evaluation.gates import block_title
from seresvit.evaluation.metrics import in_protocol_values
from seresvit.evaluation.page import data_url, read_json
from seresvit.evaluation.tissues import BODY_ABOVE_HU

# Blue, white, red: no error is as white as the page.
ERROR_COLOURS = LinearSegmentedColormap.from_list("error", ["#0b3c7d", "#5b9bd1", "#ffffff", "#e2775b", "#8f1023"])

# Of a gate map: told apart by the colour-blind, and light where it is high. What is not known is grey.
MAP_COLOURS = colormaps["cividis"].with_extremes(bad="#c8cdd2")
MAP_SPAN = 0.1

# Grey levels as a radiologist would set them: soft tissue, or wider where iodine would saturate it.
WINDOWS = {"HU": (-160.0, 240.0), "arbitrary": (0.0, 1.0), "uint8": (0.0, 255.0)}
CONTRAST_WINDOW_HU = (-200.0, 500.0)
SATURATED_SHARE = 0.02


@dataclass(frozen=True)
class CaseImages:
    """A case as it is shown, every array (Z, Y, X) on the target's grid, in the values of its unit; MR in parts of its
    own scale."""

    source: np.ndarray
    target: np.ndarray
    synthetic: np.ndarray
    source_unit: Unit
    unit: Unit
    affine: np.ndarray  # from voxel index (x, y, z) to LPS millimetres
    positions_mm: np.ndarray
    spacing_mm_zyx: tuple[float, float, float]
    supine_axial: bool  # rows run to the patient's left, columns to the back
    predicted: np.ndarray | None = None  # the slices that were predicted, None for all


@dataclass(frozen=True)
class Images:
    """One slice of a case, every array (Y, X); `maps`: what `gate_maps` shows of it, by title."""

    source: np.ndarray
    target: np.ndarray
    synthetic: np.ndarray
    source_unit: Unit
    unit: Unit
    pixel_aspect: float  # row distance over column distance
    supine_axial: bool
    maps: dict[str, np.ndarray] = field(default_factory=dict)


def read_predictions(folder: Path | None, manifest: Path | None) -> tuple[list[Prediction], list[str]]:
    """The predictions, and sentences on what is no longer where it was."""
    if folder is None or manifest is None:
        return [], []
    records = {path.parent: read_json(path) for path in sorted(folder.glob("*/prediction.json"))}
    if not records:
        return [], [f"No images are shown: {folder} holds no predictions any more."]
    try:
        known, missing = {(case.patient, case.source): case for case in read_manifest(manifest)}, []
    except DataError as error:
        known, missing = {}, [f"No images are shown: {error}."]
    return [prediction_of(path, record, known) for path, record in records.items()], missing


# Slices of the chosen cases, and how they are shown.


def load_slices(
    chosen: list[dict[str, Any]], found: list[Prediction], maps: Iterable[GateMap] = ()
) -> list[tuple[dict[str, Any], Images]]:
    """Each line of `slices` of the chosen cases with its images, where the predictions have that slice.

    `maps` lie with the images of their slice, unless their size says that they are of others.
    """
    shown: list[tuple[dict[str, Any], Images]] = []
    for case in chosen:
        for prediction in found:
            if prediction.cases and (case["patient"], case["source"]) == prediction.of:
                images = load_case(prediction)
                known = range(len(images.target)) if images.predicted is None else images.predicted
                for line in (line for line in case["slices"] if line["slice"] in known):
                    of_slice = (case["patient"], case["source"], line["slice"])
                    its = [one for one in maps if (one.patient, one.source, one.slice) == of_slice]
                    shape = images.target.shape[1:]
                    fitting = {map_title(one): one.array for one in its if one.array.shape == shape}
                    shown.append((line, replace(_slice(images, line["slice"]), maps=fitting)))
    return shown


def map_title(one: GateMap) -> str:
    """What stands below the picture, such as "balance, ART 1"."""
    return f"{one.shows}, {block_title(one.block)}"


def panels(chosen: list[dict[str, Any]], shown: list[tuple[dict[str, Any], Images]]) -> dict[str, Any] | None:
    """The chosen cases, every line of theirs with its images as data URLs, all under one window, one error scale, and
    one scale a gate map; and these. None without any image."""
    if not shown:
        return None
    every = [images for _, images in shown]
    window = window_of(every)
    errors = np.concatenate([np.abs(images.synthetic - images.target).ravel() for images in every])
    limit = _round_up(float(np.percentile(errors, 99)))
    ranges = map_ranges(every)
    for line, images in shown:
        line["images"] = _encoded(images, window, limit, ranges)
    ramp = np.linspace(0, 1, 256)[None]
    return {
        "cases": chosen,
        "window": window,
        "unit": "HU" if every[0].unit == "HU" else "",
        "grey": grey_words(every[0], window),
        "limit": f"{limit:g}",
        "error_bar": _png(ramp, 0, 1, ERROR_COLOURS),
        "maps": [{"title": title, "low": low, "high": high} for title, (low, high) in ranges.items()],
        "map_bar": _png(ramp, 0, 1, MAP_COLOURS),
        "balances": any(title.startswith(BALANCE) for title in ranges),
        "lack_maps": bool(ranges) and any(not images.maps for images in every),
        "supine_axial": all(images.supine_axial for images in every),
    }


def map_ranges(every: list[Images]) -> dict[str, tuple[float, float]]:
    """For each title of a map the lowest and the highest value in all slices, at least MAP_SPAN apart, so that what is
    nearly the same everywhere looks so."""
    values: dict[str, list[np.ndarray]] = {}
    for images in every:
        for title, map_YX in images.maps.items():
            values.setdefault(title, []).append(map_YX[np.isfinite(map_YX)])
    ranges = {}
    for title, arrays in values.items():
        known = np.concatenate(arrays)
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        wider = max(0.0, MAP_SPAN - (high - low)) / 2
        low, high = low - wider, high + wider
        # No scale shows a balance beyond 0 or 1.
        shift = max(0.0, -low) - max(0.0, high - 1) if title.startswith(BALANCE) else 0.0
        ranges[title] = (low + shift, high + shift)
    return ranges


def voxels(every: list[Images]) -> tuple[np.ndarray, np.ndarray]:
    """Target and synthetic values of these slices, without what is air in the target (or 0 where there is no HU)."""
    target, synthetic = (np.concatenate([getattr(i, name).ravel() for i in every]) for name in ("target", "synthetic"))
    inside = target > (BODY_ABOVE_HU if every[0].unit == "HU" else 0)
    return target[inside], synthetic[inside]


def load_case(prediction: Prediction) -> CaseImages:
    """All slices that source and target share; what was not predicted of them, which `evaluate --allow-missing` lets
    pass, is the background. Raises DataError when the prediction is on another grid or has none of them."""
    pair, predicted = load_prediction(prediction)
    in_target, in_prediction = matched_slices(pair.target, predicted)
    if same_grid(predicted, pair.target) or not len(in_target):
        raise DataError(f"{prediction.folder}: is not on the target's grid any more; predict and evaluate again")
    rule = prediction.record.get("intensity") or {}
    values = displayed(predicted, rule["high"] if rule.get("kind") == "percentile" else None)
    synthetic = np.full(pair.target.array.shape, BACKGROUND[pair.target.unit], np.float32)
    synthetic[in_target] = values[in_prediction]
    affine = pair.target.affine
    rightward, downward = (affine[:3, :2] / np.linalg.norm(affine[:3, :2], axis=0)).T
    axial = pair.target.format != "png" and bool(rightward[0] > 0.9 and downward[1] > 0.9)
    arrays = displayed(pair.source), displayed(pair.target), synthetic
    geometry = affine, pair.target.positions_mm, pair.target.spacing_mm_zyx
    return CaseImages(*arrays, pair.source.unit, pair.target.unit, *geometry, axial, in_target)


def _slice(case: CaseImages, z: int) -> Images:
    _, row_mm, column_mm = case.spacing_mm_zyx
    arrays = case.source[z].copy(), case.target[z].copy(), case.synthetic[z].copy()  # the rest may leave the memory
    return Images(*arrays, case.source_unit, case.unit, row_mm / column_mm, case.supine_axial)


def displayed(volume: Volume, scale: float | None = None) -> np.ndarray:
    """CT and 8-bit values as they are; MR in parts of its own (or the given) scale, since its unit means nothing."""
    return in_protocol_values(volume.array, "mr", scale) if volume.unit == "arbitrary" else volume.array


def window_of(every: list[Images]) -> tuple[float, float]:
    """Grey levels of the target: for CT the soft tissue window, unless it would saturate what the body holds."""
    window = WINDOWS[every[0].unit]
    body = np.concatenate([images.target[images.target > -300] for images in every])
    saturated = every[0].unit == "HU" and body.size and (body > window[1]).mean() > SATURATED_SHARE
    return CONTRAST_WINDOW_HU if saturated else window


def grey_words(images: Images, window: tuple[float, float]) -> str:
    def words(unit: Unit, low: float, high: float) -> str:
        of_ct = f"level {(low + high) / 2:g}, width {high - low:g} HU (from {low:g} to {high:g} HU)".replace(" -", " −")
        return {"HU": of_ct, "arbitrary": "0 to the 99.5th percentile of the foreground", "uint8": "0 to 255"}[unit]

    same = images.source_unit == images.unit
    of_source = "" if same else f"; source: {words(images.source_unit, *WINDOWS[images.source_unit])}"
    return words(images.unit, *window) + of_source


def _encoded(
    images: Images, window: tuple[float, float], limit: float, ranges: dict[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """Source, synthetic, target, error and maps as {name, url, width, height}; width to height as in millimetres."""
    source_window = window if images.source_unit == images.unit else WINDOWS[images.source_unit]
    rows, columns = images.target.shape
    urls = {
        "source": _png(images.source, *source_window),
        "synthetic": _png(images.synthetic, *window),
        "target": _png(images.target, *window),
        "error": _png(images.synthetic - images.target, -limit, limit, ERROR_COLOURS),
    }
    urls |= {title: _png(map_YX, *ranges[title], MAP_COLOURS) for title, map_YX in images.maps.items()}
    height = f"{rows * images.pixel_aspect:g}"
    return [{"name": name, "url": url, "width": columns, "height": height} for name, url in urls.items()]


def _png(array: np.ndarray, low: float, high: float, colours: Colormap = colormaps["gray"]) -> str:
    buffer = io.BytesIO()
    imsave(buffer, array, vmin=low, vmax=high, cmap=colours, format="png")
    return data_url(buffer.getvalue())


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten: a scale that people can read."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))
