"""Pair: the images of one case on one grid, slice by slice.

Slices are matched by position along the normal, never by sorted order. Where images lie on different grids, that is
refused, unless `data.resample` says on whose grid they are to be.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from seresvit.config import DataSettings, Interpolation, Resample
from seresvit.data import read_volume
from seresvit.data.bias import without_bias
from seresvit.data.geometry import BACKGROUND, at_spacing, resampled
from seresvit.data.pairing import Case, short_path
from seresvit.data.volume import DataError, Volume, same_grid

# Two slices at one place, written by different software, differ by rounding of their decimal strings only.
SLICE_TOLERANCE_MM = 0.01
# On a foreign grid, a slice that shows less than this part of what the fullest one does is cut by an image's edge.
MIN_COVERED = 0.9
# The network sees the source's own planes in prediction, so those that it learns from may not be turned further.
MIN_AXIS_COSINE = 0.7
AS_THEY_ARE = DataSettings()


@dataclass(frozen=True, eq=False)
class Pair:
    """The images of one patient, every one with the same slices in the same order.

    `labels` (Z, Y, X) uint8, 0 outside; `dropped` the slices that not all have, as "folder: file at position".
    """

    case: Case
    sources: tuple[Volume, ...]
    target: Volume
    labels: np.ndarray | None
    label_names: dict[str, int]
    dropped: list[str]

    @property
    def source(self) -> Volume:
        """The first source: the only one, unless there are several channels."""
        return self.sources[0]


def load_pair(*cases: Case, data: DataSettings = AS_THEY_ARE, to_score: bool = False) -> Pair:
    """The source of each case and the target of the first, on one grid and cut to the slices that all have.

    `data` says on which grid (`resample`; by default all must lie on one already), whether MR sources lose their bias
    field (`n4`) and images what lies outside the mask (`mask_background`). `to_score`: where `resample` names a grid,
    whichever, the target's is taken, so that the target stays as it was acquired. Raises DataError when an image
    cannot be read, lies on another grid than asked for, shares no slice with the others, or lacks a needed mask.
    """
    case = cases[0]
    sources = [without_bias(read_volume(one.source_path), data) for one in cases]
    volumes = [*sources, read_volume(case.target_path)]
    if data.resample == "target" and not to_score:
        _check_planes_alike(volumes[0], volumes[-1])
    grid = "target" if to_score and data.resample else data.resample
    volumes, dropped = on_one_grid(volumes, grid, data.interpolation)
    labels, label_names = _labels_on(volumes[-1], case, data)
    if data.mask_background and labels is not None:
        volumes = [only_inside(volume, labels > 0) for volume in volumes]
    return Pair(case, tuple(volumes[:-1]), volumes[-1], labels, label_names, dropped)


def load_sources(cases: tuple[Case, ...], data: DataSettings) -> list[Volume]:
    """The sources of a case as the Predictor takes them, where the target is not known: its channels in order.

    On their own grids where `data.resample` lets them differ, else cut to the slices that all have; the background
    masked as `data.mask_background` asks. Raises DataError as `load_pair` does.
    """
    sources = [read_volume(case.source_path) for case in cases]
    sources = sources if data.resample else on_shared_slices(sources)
    if not data.mask_background:
        return sources
    masks = [_labels_on(volume, case, data)[0] for volume, case in zip(sources, cases, strict=True)]
    return [v if mask is None else only_inside(v, mask > 0) for v, mask in zip(sources, masks, strict=True)]


def _labels_on(volume: Volume, case: Case, data: DataSettings) -> tuple[np.ndarray | None, dict[str, int]]:
    """Labels (Z, Y, X) of a case's mask on the grid of `volume`, and their names; None without a mask."""
    if case.mask_path is None:
        if data.mask_background:
            raise DataError(f"{case.source_path}: data.mask_background needs a mask, and the manifest names none")
        return None, {}
    mask = read_volume(case.mask_path)
    mask = resampled(mask, volume, "nearest")[0] if data.resample else mask
    return labels_of(mask, volume, np.arange(len(volume.array)))


def on_one_grid(
    volumes: list[Volume], resample: Resample, interpolation: Interpolation
) -> tuple[list[Volume], list[str]]:
    """Sources and, as the last, target on the grid that `resample` names, and the slices that were dropped.

    "": nothing is resampled: all must lie on one grid, and are cut to the slices that all have. Else slices that
    not every image covers are dropped, and what not every image shows of the others is the background in all of them.
    Raises DataError when the images do not lie on one grid or have nothing in common.
    """
    source, target = volumes[0], volumes[-1]
    if not resample:
        for volume in volumes:
            if different := same_grid(volume, target):
                raise DataError(
                    f"{volume.path}: {different} of {target.path}; run seresvit audit, or set data.resample"
                )
        dropped = [f"{short_path(volume.path)}: {name}" for volume, name in unmatched_slices(volumes)]
        return on_shared_slices(volumes), dropped
    grid = {"source": source, "target": target}[resample] if isinstance(resample, str) else at_spacing(source, resample)
    on_grid, covers = zip(*(resampled(volume, grid, interpolation) for volume in volumes), strict=True)
    covered = np.logical_and.reduce(covers)
    shares = covered.mean(axis=(1, 2))
    if not shares.any():
        raise DataError(f"{source.path}: shows nothing of what {target.path} shows; are these images of one patient?")
    is_kept = shares >= MIN_COVERED * shares.max()
    kept = [_at_slices(only_inside(volume, covered), np.flatnonzero(is_kept)) for volume in on_grid]
    lost_mm = grid.positions_mm[~is_kept]
    return kept, [f"{short_path(grid.path)}: at {mm:.2f} mm, not covered by all images" for mm in lost_mm]


def _check_planes_alike(source: Volume, target: Volume) -> None:
    axes = [volume.affine[:3, :2] / np.linalg.norm(volume.affine[:3, :2], axis=0) for volume in (source, target)]
    if (axes[0] * axes[1]).sum(axis=0).min() < MIN_AXIS_COSINE:
        raise DataError(
            f"{source.path}: its planes are turned against those of {target.path}, which the network would learn and "
            "never see in prediction; set data.resample=source"
        )


def only_inside(volume: Volume, inside: np.ndarray) -> Volume:
    """The volume with the background of its unit wherever `inside` (Z, Y, X) is false."""
    return volume if inside.all() else replace(volume, array=np.where(inside, volume.array, BACKGROUND[volume.unit]))


def matched_slices(a: Volume, b: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Indices into `a` and, one for one, into `b` of the slices at the same position along the normal.

    At most SLICE_TOLERANCE_MM apart and always less than half the smallest slice gap, so that no slice is taken twice.
    """
    gaps_mm = np.abs([*np.diff(a.positions_mm), *np.diff(b.positions_mm)])
    tolerance = min([SLICE_TOLERANCE_MM, *gaps_mm / 2])
    distance = np.abs(np.subtract.outer(a.positions_mm, b.positions_mm))
    in_a = np.flatnonzero(distance.min(axis=1) < tolerance)
    return in_a, distance.argmin(axis=1)[in_a]


def on_shared_slices(volumes: list[Volume]) -> list[Volume]:
    """The volumes cut to the slice positions that all of them have, in the order of the last one, or DataError."""
    shared = _shared_slices(volumes)
    if not len(shared[0]):
        raise DataError(f"{volumes[0].path}: no slice lies where {volumes[-1].path} has one; run seresvit audit")
    return [_at_slices(volume, index) for volume, index in zip(volumes, shared, strict=True)]


def _shared_slices(volumes: list[Volume]) -> list[np.ndarray]:
    """For each volume the indices of the slices that all of them have, in the order of the last one, the target."""
    partners = np.full((len(volumes), len(volumes[-1].array)), -1)
    for partner, volume in zip(partners, volumes, strict=True):
        in_target, in_volume = matched_slices(volumes[-1], volume)
        partner[in_target] = in_volume
    return list(partners[:, (partners >= 0).all(axis=0)])


def unmatched_slices(volumes: list[Volume]) -> list[tuple[Volume, str]]:
    """The slices that not all volumes have, each as its volume and "file at position"."""
    unmatched = []
    for volume, shared in zip(volumes, _shared_slices(volumes), strict=True):
        for k in np.setdiff1d(range(len(volume.array)), shared):
            file = Path(getattr(volume.headers[k], "filename", "")).name if volume.format == "dicom" else ""
            file = str(volume.headers[k]) if volume.format == "png" else file
            unmatched.append((volume, f"{file or f'slice {k + 1}'} at {volume.positions_mm[k]:.2f} mm"))
    return unmatched


def _at_slices(volume: Volume, index: np.ndarray) -> Volume:
    """The volume with only these slices; its affine begins at the first of them."""
    positions, affine = volume.positions_mm[index], volume.affine.copy()
    gap_mm = [*np.diff(volume.positions_mm), 1][0]
    affine[:3, 3] += affine[:3, 2] * (positions[0] - volume.positions_mm[0]) / gap_mm
    affine[:3, 2] *= [*np.diff(positions), gap_mm][0] / gap_mm
    has_header_a_slice = volume.format in ("dicom", "png") and len(volume.headers) == len(volume.array)
    headers = tuple(volume.headers[k] for k in index) if has_header_a_slice else volume.headers
    return replace(volume, array=volume.array[index], affine=affine, positions_mm=positions, headers=headers)


def labels_of(mask: Volume, target: Volume, kept: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Labels (Z, Y, X) uint8 on the target's slices `kept`, and their names: of labels.json, else "mask" for all > 0.

    Raises DataError when the mask does not cover these slices on the target's grid, or has other labels than 0 to 255.
    """
    if different := same_grid(mask, target):
        raise DataError(f"{mask.path}: {different} against the target; draw or resample it on the target")
    in_target, in_mask = matched_slices(target, mask)
    if lacking := len(set(kept.tolist()) - set(in_target.tolist())):
        raise DataError(f"{mask.path}: {lacking} of {len(kept)} slices have no mask; draw or resample it on the target")
    values = mask.array[in_mask[np.isin(in_target, kept)]]
    names_path = mask.path.parent / "labels.json"
    if not names_path.is_file():
        return (values > 0).astype(np.uint8), {"mask": 1}
    try:
        names = json.loads(names_path.read_text(encoding="utf-8"))
        if not all(type(value) is int and 0 < value < 256 for value in names.values()):
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise DataError(f'{names_path}: expected {{"name": number from 1 to 255, ...}}; mend or remove it') from None
    if not np.isin(values, np.arange(256)).all():
        raise DataError(f"{mask.path}: labels must be whole numbers from 0 to 255; save the image as integers")
    return values.astype(np.uint8), names
