"""How far source and target lie apart although their headers agree: a flip or a shift, found in the pixels alone.

Two modalities share no scale, but where they are aligned one predicts the other best: their normalised mutual
information is highest (Studholme, Hill, Hawkes, Pattern Recognition 32 (1999) 71). It is searched over flips and whole
shifts: on blocks of pixels in the plane for every flip, then on single pixels and slices around the best.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.ndimage import minimum_filter

# The axes of (Z, Y, X) along which the source may have been flipped.
FLIPS = {"": (), "left–right": (2,), "top–bottom": (1,), "half-turn": (1, 2), "first-to-last": (0,)}

BLOCKS = 48
BLOCK_SLICES = 12
REACH_BLOCKS = 8
MAX_BLOCKS = 8000
REACH_SLICES = 4
MAX_POINTS = 60_000
MIN_POINTS = 1000
POINTS_PER_CELL = 50
MAX_LEVELS = 32
# Images cut out by one mask (skull-stripped) share its outline, aligned or not: only what lies deeper is evidence.
SHARED_OUTLINE_DICE = 0.99
OUTLINE_PIXELS = 6

Shift = tuple[int, int, int]
Points = tuple[np.ndarray, ...]


class Residual(NamedTuple):
    """What lays the source onto the target: a flip of FLIPS, then a shift in whole slices, rows and columns (z, y, x).

    `gain` is the mutual information that it wins, as a share of what there is without it.
    """

    flip: str
    shift_zyx: Shift
    gain: float


def residual(source: np.ndarray, target: np.ndarray) -> Residual | None:
    """The flip and shift between two images (Z, Y, X) of one grid, slice by slice; None when they hold too little.

    Told are one flip at a time, and shifts up to a sixth of the larger in-plane size and up to 4 slices, or a third of
    the slices where they are few.
    """
    inside = _inside(source, target)
    slices_off = min(REACH_SLICES, (len(target) - 1) // 3)
    points = _points(inside, slices_off, MAX_POINTS)
    if len(points[0]) < MIN_POINTS:
        return None
    block = -(-max(target.shape[1:]) // BLOCKS)
    source_blocks, target_blocks, inside_blocks = (_blocks(array, block) for array in (source, target, inside))
    block_points, block_reach = _points(inside_blocks > 0.5, 0, MAX_BLOCKS), (0, REACH_BLOCKS, REACH_BLOCKS)
    coarse = {
        flip: _best_shift(np.flip(source_blocks, axes), target_blocks, block_points, (0, 0, 0), block_reach)
        for flip, axes in FLIPS.items()
    }
    unmoved, _ = _best_shift(source, target, points, (0, 0, 0), (0, 0, 0))
    found = []
    for flip in dict.fromkeys(["", max(coarse, key=lambda flip: coarse[flip][0])]):
        flipped, (_, y, x) = np.flip(source, FLIPS[flip]), coarse[flip][1]
        _, near = _best_shift(flipped, target, points, (0, y * block, x * block), (0, block, block))
        found.append((*_best_shift(flipped, target, points, near, (slices_off, 1, 1)), flip))
    information, shift, flip = max(found, key=lambda one: one[0])
    return Residual(flip, shift, (information - unmoved) / max(unmoved, 1e-6))


def _inside(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The voxels that can tell: all, but in two images cut out alike, those well below the common outline."""
    everywhere = np.ones(target.shape, dtype=bool)
    if source.min() < 0 or target.min() < 0:
        return everywhere
    in_source, in_target = source > 0, target > 0
    both = in_source & in_target
    if both.all() or 2 * both.sum() < SHARED_OUTLINE_DICE * (in_source.sum() + in_target.sum()):
        return everywhere
    deep = minimum_filter(both, size=(1, 2 * OUTLINE_PIXELS + 1, 2 * OUTLINE_PIXELS + 1), mode="constant")
    return deep if deep.sum() >= MIN_POINTS else both


def _points(inside: np.ndarray, slices_off: int, most: int) -> Points:
    """At most so many voxels inside, drawn the same each time, with `slices_off` slices on either side of each."""
    places = np.flatnonzero(inside[slices_off : len(inside) - slices_off])
    if len(places) > most:
        places = np.random.default_rng(0).choice(places, most, replace=False)
    z, y, x = np.unravel_index(places, inside.shape)
    return z + slices_off, y, x


def _blocks(array: np.ndarray, block: int) -> np.ndarray:
    """Means of block × block pixels in up to BLOCK_SLICES slices, evenly spaced from the first to the last."""
    height, width = array.shape[1] // block, array.shape[2] // block
    chosen = np.linspace(0, len(array) - 1, min(BLOCK_SLICES, len(array))).round().astype(int)
    cut = array[chosen, : height * block, : width * block].astype(np.float32)
    return cut.reshape(len(chosen), height, block, width, block).mean(axis=(2, 4))


def _best_shift(
    source: np.ndarray, target: np.ndarray, points: Points, around: Shift, reach: Shift
) -> tuple[float, Shift]:
    """The highest information at these points of the target, and the shift of the source that gives it."""
    num_levels = int(np.clip(np.sqrt(len(points[0]) / POINTS_PER_CELL), 4, MAX_LEVELS))
    source_range, target_range = (np.percentile(array[points], (1, 99)) for array in (source, target))
    target_levels = _levels(target[points], target_range, num_levels)
    best, most = around, -1.0
    z, y, x = (range(middle - far, middle + far + 1) for middle, far in zip(around, reach, strict=True))
    # The least change first: of equals it stays.
    for shift in sorted(product(z, y, x), key=lambda shift: sum(map(abs, np.subtract(shift, around)))):
        moved = tuple(np.clip(at + by, 0, n - 1) for at, by, n in zip(points, shift, source.shape, strict=True))
        information = _information(_levels(source[moved], source_range, num_levels), target_levels, num_levels)
        if information > most:
            best, most = shift, information
    return most, best


def _levels(values: np.ndarray, low_high: np.ndarray, num_levels: int) -> np.ndarray:
    """Whole grey levels from 0, what lies outside the range clipped."""
    low, high = low_high
    return ((values - low) * (num_levels / max(high - low, 1e-6))).clip(0, num_levels - 1).astype(np.intp)


def _information(source: np.ndarray, target: np.ndarray, num_levels: int) -> float:
    """Normalised mutual information less 1: 0 for images that say nothing of one another, 1 for the same."""
    joint = np.bincount(source * num_levels + target, minlength=num_levels**2).reshape(num_levels, num_levels)
    together = _entropy(joint)
    return (_entropy(joint.sum(0)) + _entropy(joint.sum(1))) / together - 1 if together > 0 else 0.0


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
