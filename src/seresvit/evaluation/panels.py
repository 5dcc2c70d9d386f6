"""The images of a report: source, synthetic, target and error of chosen slices, all under one window and one scale."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.image import imsave

from seresvit.data.geometry import BACKGROUND
from seresvit.data.pair import matched_slices
from seresvit.data.pairing import read_manifest
from seresvit.data.volume import DataError, Unit, Volume, same_grid
from seresvit.evaluation.evaluate import Prediction, load_prediction, prediction_of
from seresvit.evaluation.metrics import in_protocol_values
from seresvit.evaluation.page import data_url, read_json
from seresvit.evaluation.tables import METHODS
from seresvit.evaluation.tissues import BODY_ABOVE_HU

MAX_CASES = 4
# Blue, white, red: no error is as white as the page.
ERROR_COLOURS = LinearSegmentedColormap.from_list("error", ["#0b3c7d", "#5b9bd1", "#ffffff", "#e2775b", "#8f1023"])

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
    """One slice of a case, every array (Y, X)."""

    source: np.ndarray
    target: np.ndarray
    synthetic: np.ndarray
    source_unit: Unit
    unit: Unit
    pixel_aspect: float  # row distance over column distance
    supine_axial: bool


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


# Cases from the best to the worst, of each the slice with median error and the one with the largest.


def ranked_cases(cases: pd.DataFrame) -> pd.Series:
    """MAE of the network by patient and source, ascending: of the test split where there is one."""
    return _of_network(cases).set_index(["patient", "source"])["mae"].sort_values(kind="stable")


def _of_network(slices: pd.DataFrame) -> pd.DataFrame:
    of_network = slices[slices["method"] == METHODS[0]].dropna(subset=["mae"])  # an empty mask has no error
    tested = of_network[of_network["split"] == "test"]
    return of_network if tested.empty else tested


def chosen_cases(cases: pd.DataFrame, slices: pd.DataFrame) -> list[dict[str, Any]]:
    """Up to MAX_CASES cases, evenly spread over their ranks by MAE, with the two slices of each."""
    of_network, ranked = _of_network(slices), ranked_cases(cases)
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


def load_slices(chosen: list[dict[str, Any]], found: list[Prediction]) -> list[tuple[dict[str, Any], Images]]:
    """Each line of `slices` of the chosen cases with its images, where the predictions have that slice."""
    shown: list[tuple[dict[str, Any], Images]] = []
    for case in chosen:
        for prediction in found:
            if prediction.cases and (case["patient"], case["source"]) == prediction.of:
                images = load_case(prediction)
                known = range(len(images.target)) if images.predicted is None else images.predicted
                shown += [(line, _slice(images, line["slice"])) for line in case["slices"] if line["slice"] in known]
    return shown


def panels(chosen: list[dict[str, Any]], shown: list[tuple[dict[str, Any], Images]]) -> dict[str, Any] | None:
    """The chosen cases, every line of theirs with its images as data URLs, all under one window and one error scale;
    and these. None without any image."""
    if not shown:
        return None
    every = [images for _, images in shown]
    window = window_of(every)
    errors = np.concatenate([np.abs(images.synthetic - images.target).ravel() for images in every])
    limit = _round_up(float(np.percentile(errors, 99)))
    for line, images in shown:
        line["images"] = _encoded(images, window, limit)
    return {
        "cases": chosen,
        "window": window,
        "unit": "HU" if every[0].unit == "HU" else "",
        "grey": grey_words(every[0], window),
        "limit": f"{limit:g}",
        "error_bar": _png(np.linspace(-1, 1, 256)[None], -1, 1, ERROR_COLOURS),
        "supine_axial": all(images.supine_axial for images in every),
    }


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


def _encoded(images: Images, window: tuple[float, float], limit: float) -> list[dict[str, Any]]:
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
    return data_url(buffer.getvalue())


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten: a scale that people can read."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))
