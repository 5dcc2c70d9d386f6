"""Prepared slices: matched pairs on disk, memory-mapped, and the order and augmentation in which training sees them.

Which slice comes n-th, and how it is flipped, turned and cropped, is a pure function of (seed, n). So the position of
the loader is one integer, the number of images seen, and a resumed run goes on exactly where it stopped.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from seresvit.config import DataSettings
from seresvit.data.intensity import Intensity, intensity_of
from seresvit.data.pairing import Case, content_hash, load_channels, load_pair, read_manifest
from seresvit.data.volume import DataError, Volume, written_whole

INDEX = "index.json"


@dataclass(frozen=True)
class PreparedCase:
    """A matched pair on disk: `.npy` names, and what turns their values into [-1, 1]."""

    name: str
    patient: str
    split: str
    sources: list[str]
    target: str
    source_files: list[str]
    target_file: str
    shape: list[int]
    spacing_mm_zyx: list[float]
    source_intensities: list[dict[str, Any]]
    target_intensity: dict[str, Any]
    foreground: list[float]


@dataclass(frozen=True)
class Prepared:
    """The prepared store of a manifest: its folder, its cases and the hash of the images that it was made from."""

    folder: Path
    data_hash: str
    cases: list[PreparedCase]

    def target_intensities(self, split: str) -> list[Intensity]:
        """The rules of all targets of a split."""
        return [Intensity.from_dict(case.target_intensity) for case in self.cases if case.split == split]


def prepare(
    manifest: Path, data: DataSettings, progress: Callable[[list[tuple[Case, ...]]], Iterable[tuple[Case, ...]]] = iter
) -> Prepared:
    """The prepared store of `manifest`, made beside it unless it is there for the same files and settings.

    Every volume becomes one `.npy` of matched slices in its own unit, int16 where that is exact and else float32.
    `progress` wraps the list of cases. Raises DataError for images that cannot be paired or scaled.
    """
    groups = load_channels(read_manifest(manifest), data.channels)
    fingerprint = _fingerprint(groups, data)
    folder = manifest.absolute().parent / "prepared" / fingerprint
    if not (folder / INDEX).is_file():
        with written_whole(folder) as temporary:
            temporary.mkdir()
            cases = [_prepare_case(group, data, temporary) for group in progress(groups)]
            data_hash = content_hash([case for group in groups for case in group])
            index = {"data_hash": data_hash, "cases": [asdict(case) for case in cases]}
            (temporary / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return Prepared(folder, index["data_hash"], [PreparedCase(**case) for case in index["cases"]])


def _prepare_case(group: tuple[Case, ...], data: DataSettings, folder: Path) -> PreparedCase:
    pair = load_pair(*group)
    name = "+".join([group[0].name, *(case.source for case in group[1:])])
    source_files = [
        _store(volume, folder / f"{name}.{case.source}.npy") for volume, case in zip(pair.sources, group, strict=True)
    ]
    target_intensity = intensity_of(pair.target, data.intensity.target, data)
    shown = target_intensity.normalise(pair.target.array) > -0.99
    return PreparedCase(
        name=name,
        patient=group[0].patient,
        split=group[0].split,
        sources=[case.source for case in group],
        target=group[0].target,
        source_files=source_files,
        target_file=_store(pair.target, folder / f"{name}.{group[0].target}.npy"),
        shape=list(pair.target.array.shape),
        spacing_mm_zyx=list(pair.target.spacing_mm_zyx),
        source_intensities=[intensity_of(v, data.intensity.source, data).as_dict() for v in pair.sources],
        target_intensity=target_intensity.as_dict(),
        foreground=shown.mean(axis=(1, 2)).round(6).tolist(),
    )


def _store(volume: Volume, path: Path) -> str:
    rounded = volume.array.astype(np.int16)
    exact = np.array_equal(rounded, volume.array)
    np.save(path, rounded if exact else volume.array.astype(np.float32))
    return path.name


def _fingerprint(groups: list[tuple[Case, ...]], data: DataSettings) -> str:
    """Changes when a file, a split or a setting that the store depends on does; cheap, since it reads no image."""
    parts: list[Any] = [data.model_dump(mode="json", include={"window_hu", "percentile", "intensity", "channels"})]
    for case in (case for group in groups for case in group):
        parts.append([case.name, case.split, case.target])
        for path in (case.source_path, case.target_path):
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            parts += [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=6).hexdigest()


@functools.lru_cache(maxsize=4096)
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def read_slice(store: Prepared, case: PreparedCase, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Source (C, H, W) and target (1, H, W) of one slice, float32 in [-1, 1]."""
    source = [
        Intensity.from_dict(rule).normalise(_mapped(store.folder / file)[index])
        for file, rule in zip(case.source_files, case.source_intensities, strict=True)
    ]
    target = Intensity.from_dict(case.target_intensity).normalise(_mapped(store.folder / case.target_file)[index])
    return np.stack(source), target[None]


def slices_of(store: Prepared, split: str, min_foreground: float = 0.0) -> list[tuple[PreparedCase, int]]:
    """All slices of a split that show at least that share of foreground, in the order of the manifest."""
    return [
        (case, index)
        for case in store.cases
        if case.split == split
        for index, share in enumerate(case.foreground)
        if share >= min_foreground
    ]


class TrainingSlices(Dataset):
    """`dataset[n]` is the n-th image that training sees: (source (C, H, W), target (1, H, W)), float32 in [-1, 1].

    n counts on beyond one pass: pass e shows every slice once, in an order drawn from (seed, e).
    """

    def __init__(self, store: Prepared, data: DataSettings, size: tuple[int, int], seed: int):
        """Raises DataError when the train split has no slice to show."""
        self.store, self.data, self.size, self.seed = store, data, size, seed
        self.slices = slices_of(store, "train", data.min_foreground)
        if not self.slices:
            raise DataError(
                f"{store.folder}: no training slice (of {len(slices_of(store, 'train'))}) shows a foreground of "
                f"{data.min_foreground:.0%}; lower data.min_foreground or audit with more training patients"
            )

    def __getitem__(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, place = divmod(n, len(self.slices))
        case, index = self.slices[_order(self.seed, epoch, len(self.slices))[place]]
        source, target = read_slice(self.store, case, index)
        pair = torch.from_numpy(np.concatenate([source, target]))
        pair = augmented(pair, self.data, self.size, np.random.default_rng([self.seed, 1, n]))
        return pair[:-1], pair[-1:]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def augmented(
    pair_CHW: torch.Tensor, data: DataSettings, size: tuple[int, int], rng: np.random.Generator
) -> torch.Tensor:
    """Source and target channels turned, shifted, flipped and cropped (or padded by reflection) alike to `size`."""
    angle = np.deg2rad(rng.uniform(-1, 1) * data.max_rotation_deg)
    shift = rng.uniform(-2, 2, size=2) * data.max_shift
    if angle or shift.any():
        pair_CHW = _turned(pair_CHW, angle, shift)
    if data.flip and rng.random() < 0.5:
        pair_CHW = pair_CHW.flip(-1)
    height, width = size
    lacking = [max(height - pair_CHW.shape[-2], 0), max(width - pair_CHW.shape[-1], 0)]
    if any(lacking):
        widths = [(0, 0), *((n // 2, n - n // 2) for n in lacking)]
        pair_CHW = torch.from_numpy(np.pad(pair_CHW.numpy(), widths, mode="reflect"))
    top, left = (rng.integers(0, have - want + 1) for have, want in zip(pair_CHW.shape[-2:], size, strict=True))
    return pair_CHW[:, top : top + height, left : left + width].contiguous()


def _turned(pair_CHW: torch.Tensor, angle_rad: float, shift: np.ndarray) -> torch.Tensor:
    """A rotation about the centre and a shift in half-image units, bilinear, the edge repeated outside."""
    height, width = pair_CHW.shape[-2:]
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    # affine_grid works in units of half the image, so that a turn of a non-square image needs the sides' ratio.
    theta = torch.tensor(
        [[cos, -sin * height / width, shift[1]], [sin * width / height, cos, shift[0]]], dtype=torch.float32
    )
    grid = F.affine_grid(theta[None], [1, 1, height, width], align_corners=False)
    return F.grid_sample(pair_CHW[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
