"""What a pixel score rewards losing: sharp edges, and noise of the right texture. 1 is like the target."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from skimage.filters import sobel

from seresvit.evaluation.tissues import TISSUES_HU

EDGE_PERCENTILE = 95.0
# The first size of which the target has enough: the larger, the better are frequencies told apart.
PATCH_PIXELS = (32, 16, 8)
MIN_PATCHES, MAX_PATCHES = 8, 2000
MIN_SOFT_SHARE = 0.95
# Parts of the Nyquist frequency.
BANDS = {"noise_low": (0.0, 1 / 3), "noise_mid": (1 / 3, 2 / 3), "noise_high": (2 / 3, 1.0)}


@dataclass(frozen=True, eq=False)
class TargetTexture:
    """Where a target (Z, Y, X) has its edges and its even patches, and what it shows there.

    `patches` (N, 3): place of each patch on the grid of half-overlapping ones; `power` has a patch's shape.
    """

    edges: np.ndarray
    edge_gradient: float
    patches: np.ndarray
    power: np.ndarray
    spacing_mm_yx: tuple[float, float]


def target_texture(
    target: np.ndarray, inside: np.ndarray, soft: np.ndarray | None, spacing_mm_yx: tuple[float, float]
) -> TargetTexture:
    """The edges are the 5 % of the voxels `inside` where the target's gradient (Sobel, in the plane) is steepest.

    The patches are all of 32 × 32 pixels, half overlapping, of which 95 % are soft tissue (`soft`); where there are
    fewer than 8, those of 16 × 16, or of 8 × 8 pixels; of many, 2000 evenly spread. A patch holds no air, lung or bone.
    None without `soft`, or with fewer than 8.
    """
    gradient = np.stack([sobel(plane) for plane in target])
    steep = np.percentile(gradient[inside], EDGE_PERCENTILE) if inside.any() else math.inf
    edges = inside & (gradient >= steep) & (gradient > 0)
    patches, power = np.empty((0, 3), int), np.zeros((0, 0))
    for size in PATCH_PIXELS:
        if soft is None or size > min(target.shape[1:]) or len(patches):
            continue
        found = np.argwhere([_is_even(*planes, size) for planes in zip(target, soft, strict=True)])
        if len(found) >= MIN_PATCHES:
            patches = found[:: -(-len(found) // MAX_PATCHES)]
            power = _power(_patches(target, size)[tuple(patches.T)])
    mean = float(gradient[edges].mean(dtype=np.float64)) if edges.any() else math.nan
    return TargetTexture(edges, mean, patches, power, spacing_mm_yx)


def edge_sharpness(target: TargetTexture, synthetic: np.ndarray) -> float:
    """Mean gradient of the synthetic image over that of the target, at the target's edges; below 1 is blurred."""
    if not target.edges.any():
        return math.nan
    in_planes = [sobel(plane)[edges] for plane, edges in zip(synthetic, target.edges, strict=True) if edges.any()]
    return float(np.concatenate(in_planes).mean(dtype=np.float64)) / target.edge_gradient


def noise_ratios(target: TargetTexture, synthetic: np.ndarray) -> dict[str, float]:
    """`noise_ratio` of the standard deviations of noise, and by band of frequency: synthetic over target.

    Noise is what a surface of second order leaves of the patches, its power spectrum that of AAPM TG-233 (Samei et
    al., Med. Phys. 2019). Each value is the root of the ratio of both spectra, summed over the band. NaN without a
    patch.
    """
    bands = {"noise_ratio": (0.0, math.inf), **BANDS}
    if not len(target.patches):
        return dict.fromkeys(bands, math.nan)
    size = len(target.power)
    power = _power(_patches(synthetic, size)[tuple(target.patches.T)])
    cycles_y, cycles_x = (np.fft.fftfreq(size, mm) for mm in target.spacing_mm_yx)
    share_of_nyquist = np.hypot(cycles_y[:, None], cycles_x) * 2 * max(target.spacing_mm_yx)
    ratios = {}
    for name, (low, high) in bands.items():
        band = (share_of_nyquist > low) & (share_of_nyquist <= high)
        wanted = target.power[band].sum()  # an image without noise has none to compare with
        ratios[name] = math.sqrt(power[band].sum() / wanted) if wanted else math.nan
    return ratios


def _is_even(target_YX: np.ndarray, soft_YX: np.ndarray, size: int) -> np.ndarray:
    """(rows, columns) bool: which of the half-overlapping patches of one slice are soft tissue alone."""
    low, high = TISSUES_HU["fat"][0], TISSUES_HU["contrast"][1]
    is_odd = (target_YX <= low) | (target_YX > high)
    is_soft, is_odd = (_patches(plane[None], size)[0].mean(axis=(-2, -1)) for plane in (soft_YX, is_odd))
    return (is_soft >= MIN_SOFT_SHARE) & (is_odd == 0)


def _patches(volume: np.ndarray, size: int) -> np.ndarray:
    """(Z, rows, columns, size, size) view of half-overlapping patches."""
    return sliding_window_view(volume, (size, size), axis=(1, 2))[:, :: size // 2, :: size // 2]


def _power(patches_NYX: np.ndarray) -> np.ndarray:
    """The mean of |DFT|² (Y, X) over patches less their least-squares surface of second order."""
    size = patches_NYX.shape[-1]
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].reshape(2, -1)
    surface, _ = np.linalg.qr(np.stack([np.ones_like(x), x, y, x * y, x**2, y**2], axis=1))
    flat = patches_NYX.reshape(len(patches_NYX), -1).astype(np.float64)
    noise = (flat - flat @ surface @ surface.T).reshape(patches_NYX.shape)
    return np.mean(np.abs(np.fft.fft2(noise)) ** 2, axis=0)
