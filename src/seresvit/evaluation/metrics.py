"""Named protocols: which pixels, which range, which window. `docs/metrics.md` defines every number."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import uniform_filter
from skimage.metrics import structural_similarity

from seresvit.config import ConfigError
from seresvit.data.volume import DataError, Unit

SSIM_WINDOW = 7
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_MIN_SIZE = 97
MR_PERCENTILE = 99.5
MR_MIN_FOREGROUND = 0.05
HIGHER_IS_BETTER = ("psnr", "ssim", "ms_ssim")


@dataclass(frozen=True)
class Protocol:
    """One way to compare a prediction with its target, every choice stated.

    `per`: what one score belongs to; `units`: what the images may hold; `clip`: values beyond are cut (MR: after its
    own scaling; the SynthRAD protocols: for PSNR and SSIM, not for MAE); `data_range`: of PSNR and SSIM; `mask`:
    whether a mask may be given, or the target's foreground is taken, or every pixel counts; `metrics`: their names.
    """

    per: Literal["slice", "volume"]
    units: tuple[Unit, ...]
    clip: tuple[float, float] | None
    data_range: float
    mask: Literal["none", "foreground", "given"]
    metrics: tuple[str, ...]
    compute: Callable[[np.ndarray, np.ndarray, np.ndarray, "Protocol"], dict[str, float]]


def _whole_slice(target: np.ndarray, prediction: np.ndarray, mask: np.ndarray, protocol: Protocol) -> dict[str, float]:
    mse = _mean_square(target, prediction)
    return {
        "mae": _mean_absolute(target, prediction),
        "rmse": math.sqrt(mse),
        "psnr": _psnr(mse, protocol.data_range),
        "ssim": float(structural_similarity(target, prediction, win_size=SSIM_WINDOW, data_range=protocol.data_range)),
    }


def _mr_slice(target: np.ndarray, prediction: np.ndarray, mask: np.ndarray, protocol: Protocol) -> dict[str, float]:
    mse = _mean_square(target, prediction)
    return {
        "mae": _mean_absolute(target[mask], prediction[mask]),
        "psnr": _psnr(mse, protocol.data_range),
        "ssim": float(structural_similarity(target, prediction, win_size=SSIM_WINDOW, data_range=protocol.data_range)),
        "nmse": mse / float(np.mean(np.square(target), dtype=np.float64)),
    }


def _synthrad2023(target: np.ndarray, prediction: np.ndarray, mask: np.ndarray, protocol: Protocol) -> dict[str, float]:
    """Thummerer et al., Med. Phys. 2023, and the challenge's evaluation code."""
    mae = _mean_absolute(target[mask], prediction[mask])
    target, prediction = _masked_from_zero(target, mask, protocol), _masked_from_zero(prediction, mask, protocol)
    _, ssim_map = structural_similarity(
        target, prediction, win_size=SSIM_WINDOW, data_range=protocol.data_range, full=True
    )
    psnr = _psnr(_mean_square(target[mask], prediction[mask]), protocol.data_range)
    return {"mae": mae, "psnr": psnr, "ssim": _mean_inside(ssim_map, mask)}


def _synthrad2025(target: np.ndarray, prediction: np.ndarray, mask: np.ndarray, protocol: Protocol) -> dict[str, float]:
    """Thummerer et al., Med. Phys. 2025, and the challenge's evaluation code: luminance counts at every scale."""
    return _synthrad2025_with(MS_SSIM_WEIGHTS, target, prediction, mask, protocol)


def _synthrad2025_corrected(
    target: np.ndarray, prediction: np.ndarray, mask: np.ndarray, protocol: Protocol
) -> dict[str, float]:
    """The same with luminance at the coarsest scale only, as Wang et al. 2003, Eq. 7, have it."""
    coarsest_only = (0.0,) * (len(MS_SSIM_WEIGHTS) - 1) + MS_SSIM_WEIGHTS[-1:]
    return _synthrad2025_with(coarsest_only, target, prediction, mask, protocol)


def _synthrad2025_with(
    luminance_weights: tuple[float, ...],
    target: np.ndarray,
    prediction: np.ndarray,
    mask: np.ndarray,
    protocol: Protocol,
) -> dict[str, float]:
    mae = _mean_absolute(target[mask], prediction[mask])
    target, prediction = _masked_from_zero(target, mask, protocol), _masked_from_zero(prediction, mask, protocol)
    psnr = _psnr(_mean_square(target[mask], prediction[mask]), protocol.data_range)
    ms_ssim = _ms_ssim(target, prediction, mask, protocol.data_range, luminance_weights)
    return {"mae": mae, "psnr": psnr, "ms_ssim": ms_ssim}


_OF_SLICES = ("mae", "rmse", "psnr", "ssim")
_OF_2025 = ("mae", "psnr", "ms_ssim")
PROTOCOLS = {
    "dect": Protocol("slice", ("HU",), None, 4095.0, "none", _OF_SLICES, _whole_slice),
    "uint8": Protocol("slice", ("uint8",), None, 255.0, "none", _OF_SLICES, _whole_slice),
    "mr": Protocol(
        "slice", ("arbitrary", "uint8"), (0.0, 1.0), 1.0, "foreground", ("mae", "psnr", "ssim", "nmse"), _mr_slice
    ),
    "synthrad2023": Protocol(
        "volume", ("HU",), (-1024.0, 3000.0), 4024.0, "given", ("mae", "psnr", "ssim"), _synthrad2023
    ),
    "synthrad2025": Protocol("volume", ("HU",), (-1024.0, 3071.0), 4095.0, "given", _OF_2025, _synthrad2025),
    "synthrad2025-corrected": Protocol(
        "volume", ("HU",), (-1024.0, 3071.0), 4095.0, "given", _OF_2025, _synthrad2025_corrected
    ),
}


def main_metrics(protocol: str) -> tuple[str, ...]:
    """The names of the protocol's own metrics, in the order of the tables. Raises ConfigError: no such protocol."""
    return find_protocol(protocol).metrics


def find_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises ConfigError that lists the known ones."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(PROTOCOLS)}"
        raise ConfigError(f"protocol {name}: unknown; {hint}")
    return PROTOCOLS[name]


def score(
    target: np.ndarray,
    prediction: np.ndarray,
    mask: np.ndarray | None = None,
    protocol: str = "synthrad2025",
    prediction_scale: float | None = None,
) -> dict[str, float]:
    """The metrics of `protocol` under lower-case names: `mae`, `psnr`, then `rmse`, `ssim`, `ms_ssim` or `nmse`.

    Arrays are (Z, Y, X), or (Y, X) for a protocol that scores slices; a volume then gets the mean over its slices.
    `mask` (same shape, > 0 inside) is for the SynthRAD protocols only; None takes every voxel. `prediction_scale`: see
    `in_protocol_values`. MAE and RMSE are in the images' unit (MR: shares of its scale), PSNR in dB (infinite for equal
    images). Raises DataError: shapes that differ, values that are not finite, an empty mask; ConfigError: no protocol.
    """
    rule = find_protocol(protocol)
    if rule.per == "volume":
        target, prediction = _checked(target, prediction, rule)
        return rule.compute(target, prediction, _as_mask(mask, target.shape), rule)
    if mask is not None:
        raise DataError(f"protocol {protocol} scores without a given mask; leave the mask out")
    if np.ndim(target) == np.ndim(prediction) == 2:
        target, prediction = np.asarray(target)[None], np.asarray(prediction)[None]
    slices = [values for values in score_slices(target, prediction, protocol, prediction_scale) if values]
    if not slices:
        raise DataError(f"no slice whose foreground is above {MR_MIN_FOREGROUND:.0%} of its pixels: nothing to score")
    return {name: float(np.mean([values[name] for values in slices])) for name in slices[0]}


def score_slices(
    target: np.ndarray, prediction: np.ndarray, protocol: str, prediction_scale: float | None = None
) -> list[dict[str, float]]:
    """One dictionary of metrics a slice of two (Z, Y, X) volumes, for a protocol that scores slices.

    Empty for a slice that the protocol leaves out (MR: foreground on 5 % of the pixels or fewer). Errors as in `score`.
    """
    rule = find_protocol(protocol)
    target, prediction = _checked(target, prediction, rule)
    target = in_protocol_values(target, protocol)
    prediction = in_protocol_values(prediction, protocol, prediction_scale)
    rows: list[dict[str, float]] = []
    for target_YX, prediction_YX in zip(target, prediction, strict=True):
        foreground = target_YX > 0
        counts = rule.mask != "foreground" or foreground.mean() > MR_MIN_FOREGROUND
        rows.append(rule.compute(target_YX, prediction_YX, foreground, rule) if counts else {})
    return rows


def in_protocol_values(volume: np.ndarray, protocol: str, scale: float | None = None) -> np.ndarray:
    """The volume in the values that the protocol compares, float32: MR in [0, 1], all others untouched.

    MR is divided by `scale`, or else by the 99.5th percentile of its own foreground (voxels > 0), and clipped.
    Raises DataError: an MR without foreground.
    """
    rule = find_protocol(protocol)
    volume = np.asarray(volume, np.float32)
    if rule.mask != "foreground" or rule.clip is None:
        return volume
    if scale is None:
        foreground = volume[volume > 0]
        if not foreground.size:
            raise DataError("the image has no voxel above zero, so that it has no scale; is it the right file?")
        scale = float(np.percentile(foreground, MR_PERCENTILE))
    return np.clip(volume / np.float32(scale), *rule.clip)


def _checked(target: np.ndarray, prediction: np.ndarray, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    target, prediction = np.asarray(target, np.float32), np.asarray(prediction, np.float32)
    if target.shape != prediction.shape:
        raise DataError(f"target {target.shape} and prediction {prediction.shape} differ in shape; match slices first")
    if target.ndim != 3 or not target.size:
        raise DataError(f"expected a volume (Z, Y, X), found shape {target.shape}")
    # MS-SSIM alone pads what is smaller than its window.
    sides = target.shape[1:] if protocol.per == "slice" else target.shape
    if min(sides) < SSIM_WINDOW and "ssim" in protocol.metrics:
        raise DataError(f"an image of {sides} is smaller than the SSIM window of {SSIM_WINDOW}; SSIM is not defined")
    for name, array in (("target", target), ("prediction", prediction)):
        if not np.isfinite(array).all():
            raise DataError(
                f"the {name} holds {(~np.isfinite(array)).sum()} values that are not finite; repair it first"
            )
    return target, prediction


def _as_mask(mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    inside = np.ones(shape, bool) if mask is None else np.asarray(mask) > 0
    if inside.shape != shape:
        raise DataError(f"mask {inside.shape} and target {shape} differ in shape; the mask lies on the target's grid")
    if not inside.any():
        raise DataError("the mask is empty: no voxel above zero, nothing to score")
    return inside


def _mean_absolute(target: np.ndarray, prediction: np.ndarray) -> float:
    return float(np.mean(np.abs(target - prediction), dtype=np.float64))


def _mean_square(target: np.ndarray, prediction: np.ndarray) -> float:
    return float(np.mean(np.square(target - prediction), dtype=np.float64))


def _psnr(mse: float, data_range: float) -> float:
    return 10 * math.log10(data_range**2 / mse) if mse else math.inf


def _masked_from_zero(array: np.ndarray, mask: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Clipped, air outside the mask, and the lower bound at zero, since SSIM's luminance term wants no negatives."""
    assert protocol.clip is not None
    low, high = protocol.clip
    return np.where(mask, np.clip(array, low, high) - np.float32(low), np.float32(0))


def _mean_inside(similarity: np.ndarray, mask: np.ndarray) -> float:
    """The mean over the mask, less the border where the window leaves the image; NaN where nothing is left."""
    inner = (slice(SSIM_WINDOW // 2, -(SSIM_WINDOW // 2)),) * similarity.ndim
    values = similarity[inner][mask[inner]]
    return float(np.mean(values, dtype=np.float64)) if values.size else math.nan


def _ms_ssim(
    target: np.ndarray,
    prediction: np.ndarray,
    mask: np.ndarray,
    data_range: float,
    luminance_weights: tuple[float, ...],
) -> float:
    """MS-SSIM (Wang et al., Asilomar 2003) over a masked volume, as SynthRAD 2025 has it, which differs from the paper.

    Luminance counts at every scale with that scale's weight (in the paper, at the last only: `luminance_weights` says
    which); the weight is applied to each voxel's similarity, before the mean; the window is uniform; the mask is
    thinned, not averaged; and halving averages each voxel with the one before it, taking zero before the first.
    """
    lacking = [max(MS_SSIM_MIN_SIZE - size, 0) for size in target.shape]
    margins = [(n // 2, n - n // 2) for n in lacking]
    target, prediction, mask = (np.pad(array, margins, mode="edge") for array in (target, prediction, mask))
    product = 1.0
    for weight, luminance_weight in zip(MS_SSIM_WEIGHTS, luminance_weights, strict=True):
        luminance, rest = _similarity(target, prediction, data_range)
        similarity = luminance ** np.float32(luminance_weight) * rest ** np.float32(weight)
        product *= min(_mean_inside(similarity, mask), 1.0)
        target, prediction = (uniform_filter(a, 2, mode="constant")[::2, ::2, ::2] for a in (target, prediction))
        mask = mask[::2, ::2, ::2]
    return product


def _similarity(target: np.ndarray, prediction: np.ndarray, data_range: float) -> tuple[np.ndarray, np.ndarray]:
    """Luminance, and contrast × structure, around each voxel (Wang et al. 2004, Eq. 6, 9 and 10), none below zero."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    c3 = c2 / 2
    voxels = SSIM_WINDOW**target.ndim
    unbiased = voxels / (voxels - 1)
    mean_t, mean_p = uniform_filter(target, SSIM_WINDOW), uniform_filter(prediction, SSIM_WINDOW)
    variance_t = unbiased * (uniform_filter(target * target, SSIM_WINDOW) - mean_t * mean_t)
    variance_p = unbiased * (uniform_filter(prediction * prediction, SSIM_WINDOW) - mean_p * mean_p)
    covariance = unbiased * (uniform_filter(target * prediction, SSIM_WINDOW) - mean_t * mean_p)
    deviations = np.sqrt(np.maximum(variance_t, 0)) * np.sqrt(np.maximum(variance_p, 0))
    luminance = (2 * mean_t * mean_p + c1) / (mean_t * mean_t + mean_p * mean_p + c1)
    contrast = (2 * deviations + c2) / (variance_t + variance_p + c2)
    structure = (covariance + c3) / (deviations + c3)
    return np.maximum(luminance, 0), np.maximum(contrast, 0) * np.maximum(structure, 0)
