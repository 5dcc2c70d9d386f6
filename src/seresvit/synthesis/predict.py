"""Predictor: Volume → Volume, the only inference path in the project; and writing its results case by case."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from seresvit import __version__
from seresvit.config import ConfigError, DataSettings
from seresvit.data import read_volume, write_volume
from seresvit.data.bias import without_bias
from seresvit.data.deidentify import deidentified
from seresvit.data.geometry import BACKGROUND, at_spacing, resampled
from seresvit.data.intensity import MASKED_SHARE, Intensity, intensity_of
from seresvit.data.mark import Mark
from seresvit.data.pair import load_sources
from seresvit.data.pairing import Case, load_channels, read_manifest
from seresvit.data.volume import DataError, Volume, energy_kev_in, same_grid, written_whole
from seresvit.model import checkpoint

RECORD = "prediction.json"
BATCH_SIZE = 8
# Pixels of nearly the trained spacing are not resampled: it would cost sharpness and change no anatomy's size.
SAME_SPACING = 0.01


class Predictor:
    """A trained network and all that its checkpoint says of its input and output."""

    def __init__(
        self,
        path: str | Path,
        device: str = "auto",
        norm_statistics: Literal["running", "image"] = "running",
    ):
        """Raises CheckpointError for an unusable file, ConfigError for a device that is not there.

        `norm_statistics="image"` normalises each image by its own statistics, dropout off: what published code did at
        test time by leaving its generator in train mode. It is for checkpoints that were chosen so.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda") and not re.fullmatch(r"cuda:\d+", device):
            raise ConfigError(f"--device {device}: expected auto, cpu or cuda")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"--device {device}: no CUDA device is visible; use --device cpu")
        self.path = Path(path)
        self.net = checkpoint.load(path, device)
        self.header = self.net.header
        self.device = torch.device(device)
        try:
            self.data = DataSettings.model_validate(self.header["data"])
        except (KeyError, ValidationError) as error:
            fault = " ".join(str(error).split())[:150]
            raise checkpoint.CheckpointError(f"{path}: its header lacks usable data settings ({fault})") from None
        self.batch_size = BATCH_SIZE
        if norm_statistics == "image":
            self.batch_size = 1
            for module in self.net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train()
                    module.momentum = 0.0

    def __call__(self, *sources: Volume) -> Volume:
        """The synthetic volume on the grid of the first source, in the target's unit, float32.

        Several sources are the input channels, in the order of `data.channels`. Raises DataError for a number of
        sources or an intensity unit that the network was not trained on, and for sources that do not share a grid
        (unless `data.resample` gave them one in training: then `as_trained` does so here).
        """
        trained = self.as_trained(*sources)
        synthetic = [self._synthesise(batch).float().cpu().numpy() for batch in self.batches(*trained)]
        values = np.concatenate(synthetic)[:, 0]
        if not np.isfinite(values).all():
            raise DataError(f"{sources[0].path}: the network gave values that are not finite; check {self.path}")
        target = self._target_intensity(trained[0])
        on_trained = replace(trained[0], array=target.restore(values), unit=target.unit)
        on_source, _ = resampled(on_trained, sources[0], self.data.interpolation)
        return replace(sources[0], array=on_source.array, unit=target.unit, energy_kev=self.target_energy_kev)

    def as_trained(self, *sources: Volume) -> tuple[Volume, ...]:
        """The sources as training prepared them: without bias field (`data.n4`), on the grid of `data.resample`.

        That is the first source's own grid, at the spacing that `data.resample` gives or, where training was on the
        targets' grids, at theirs in the plane (the checkpoint's median). Its planes stay what they are.
        """
        sources = tuple(without_bias(volume, self.data) for volume in sources)
        if not self.data.resample:
            return sources
        grid, trained_mm = sources[0], self.header.get("spacing_mm_yx")
        if not isinstance(self.data.resample, str):
            grid = at_spacing(grid, self.data.resample)
        elif self.data.resample == "target" and trained_mm:
            alike = np.allclose(grid.spacing_mm_zyx[1:], trained_mm, rtol=SAME_SPACING)
            grid = grid if alike else at_spacing(grid, trained_mm)
        on_grid = []
        for volume in sources:
            one, covered = resampled(volume, grid, self.data.interpolation)
            if volume is not sources[0] and not covered.any(axis=(1, 2)).all():
                raise DataError(f"{volume.path}: does not cover all slices of {sources[0].path}; leave the others out")
            on_grid.append(one)
        return tuple(on_grid)

    @property
    def target_name(self) -> str:
        """What the network synthesises, as the manifest of its training called it."""
        return self.header.get("target", "")

    @property
    def target_energy_kev(self) -> float | None:
        """The energy that the target's name states, None when it states none."""
        return energy_kev_in(self.target_name)

    @cached_property
    def checkpoint_sha256(self) -> str:
        """The hash of the checkpoint file, read once however many cases are predicted."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def doubts(self, *sources: Volume) -> list[str]:
        """One line for each thing in which the sources differ from what the network was trained on; usually none.

        Looks at the energy, where the source and the names of the training sources state one, at the pixel spacing,
        where the checkpoint records it and nothing is resampled to it (more than a quarter off), at the background,
        and at files that could not be read as DICOM.
        """
        found = []
        trained_kev = [kev for kev in map(energy_kev_in, self.header.get("sources", [])) if kev is not None]
        trained_mm = self.header.get("spacing_mm_yx") if self.data.resample in ("", "source") else None
        for volume in sources:
            if volume.energy_kev and trained_kev and volume.energy_kev not in trained_kev:
                trained = " and ".join(f"{kev:g}" for kev in trained_kev)
                found.append(
                    f"{volume.path}: a {volume.energy_kev:g} keV image; the network was trained on {trained} keV"
                )
            if trained_mm and not np.allclose(volume.spacing_mm_zyx[1:], trained_mm, rtol=0.25):
                spacing, trained = (f"{y:.2f}×{x:.2f} mm" for y, x in (volume.spacing_mm_zyx[1:], trained_mm))
                found.append(f"{volume.path}: pixels of {spacing}; the network was trained on {trained}")
            if self.data.mask_background and (volume.array == BACKGROUND[volume.unit]).mean() < MASKED_SHARE:
                found.append(f"{volume.path}: shows its background; the network was trained on masked images")
            if unread := sum(file.endswith("not DICOM") for file in volume.set_aside):
                found.append(f"{volume.path}: {unread} files are not DICOM and were left out; see that none is a slice")
        return found

    def batches(self, *sources: Volume) -> Iterator[torch.Tensor]:
        """The slices as the network takes them: (B, C, H, W) float32 in [-1, 1] on its device, in order."""
        context = self.data.context_slices
        channels = self.net.settings.in_channels // (2 * context + 1)
        if len(sources) != channels:
            raise DataError(
                f"{sources[0].path}: {len(sources)} source given, {self.path.name} takes {channels} channels"
            )
        for other in sources[1:]:
            difference = same_grid(sources[0], other)
            if difference or len(other.array) != len(sources[0].array):
                raise DataError(f"{other.path}: differs from {sources[0].path} in {difference or 'number of slices'}")
        rules = [intensity_of(volume, self.data.intensity.source, self.data) for volume in sources]
        for start in range(0, len(sources[0].array), self.batch_size):
            stop = min(start + self.batch_size, len(sources[0].array))
            around = np.arange(start, stop)[:, None] + np.arange(-context, context + 1)
            index = np.clip(around, 0, len(sources[0].array) - 1)
            planes = [rule.normalise(volume.array[index]) for rule, volume in zip(rules, sources, strict=True)]
            yield torch.from_numpy(np.concatenate(planes, axis=1)).to(self.device)

    @torch.inference_mode()
    def _synthesise(self, batch_BCHW: torch.Tensor) -> torch.Tensor:
        return self.net(batch_BCHW)

    def _target_intensity(self, source: Volume) -> Intensity:
        """The rule recorded in training; an imported network has none and gets the rule of its settings."""
        if recorded := self.header.get("target_intensity"):
            return Intensity.from_dict(recorded)
        if self.data.intensity.target == "window":
            return Intensity("window", *self.data.window_hu, "HU")
        if self.data.intensity.target == "uint8":
            return Intensity("uint8", 0.0, 255.0, "uint8")
        return intensity_of(source, "percentile", self.data)


@dataclass(frozen=True)
class Failure:
    """A case that could not be predicted, and why, in one line."""

    name: str
    reason: str


def predict_path(
    predictor: Predictor, source: Path, out: Path, mark: Mark | None = None, anonymize: bool = False
) -> Path:
    """Synthesise one folder of DICOM or PNG, or one image file, into the folder `out`, whole or not at all.

    `mark` puts the word SYNTHETIC on every slice; `anonymize` leaves nothing of the patient in what is written.
    """
    volume = read_volume(source)
    if not anonymize:
        return _predict_into(predictor, (volume,), out, patient="", source=source.name, mark=mark)
    volume = deidentified(volume)
    return _predict_into(predictor, (volume,), out, patient=volume.patient, source="", mark=mark, anonymize=True)


def predict_manifest(
    predictor: Predictor,
    manifest: Path,
    out: Path,
    split: str = "test",
    progress: Callable[[list[tuple[Case, ...]]], Iterable[tuple[Case, ...]]] = iter,
    mark: Mark | None = None,
    anonymize: bool = False,
) -> list[Failure]:
    """Synthesise every case of a split into OUT/<case>; the cases that failed, the others being done all the same.

    `mark` and `anonymize` as in `predict_path`; anonymous cases are named by a pseudonym of the patient. Raises
    ConfigError when the split has no case.
    """
    cases = [case for case in read_manifest(manifest) if split in ("all", case.split)]
    groups = load_channels(cases, predictor.data.channels) if cases else []
    if not groups:
        raise ConfigError(f"{manifest}: no case in the split '{split}'; choose --split train, val, test or all")
    failures, written = [], set()
    for group in progress(groups):
        source = "+".join(case.source for case in group)
        patient = group[0].patient
        try:
            volumes = tuple(load_sources(group, predictor.data))
            if anonymize:
                volumes = tuple(map(deidentified, volumes))
                patient = volumes[0].patient
            folder = out / f"{patient}_{source}"
            if folder in written:
                raise DataError(f"{folder}: another case of this study has that name; give it a source name of its own")
            _predict_into(predictor, volumes, folder, patient=patient, source=source, mark=mark, anonymize=anonymize)
            written.add(folder)
        except (DataError, MemoryError) as error:
            reason = str(error) if isinstance(error, DataError) else "more than fits into memory"
            failures.append(Failure(f"{group[0].patient}_{source}", reason))
    return failures


def _predict_into(
    predictor: Predictor,
    sources: tuple[Volume, ...],
    out: Path,
    *,
    patient: str,
    source: str,
    mark: Mark | None,
    anonymize: bool = False,
) -> Path:
    _refuse_to_overwrite(out, sources)
    started_s = time.monotonic()
    synthetic = predictor(*sources)
    elapsed_s = time.monotonic() - started_s
    target = predictor.target_name or "target"
    with written_whole(out) as temporary:
        temporary.mkdir()
        written = write_volume(
            synthetic,
            temporary,
            description=f"Synthetic {target} (SE-ResViT)",
            energy_kev=predictor.target_energy_kev,
            checkpoint_sha256=predictor.checkpoint_sha256,
            mark=mark,
        )
        record = {
            "patient": patient,
            "source": source,
            "target": target,
            "path": str(written.relative_to(temporary)),
            "checkpoint": predictor.path.name if anonymize else str(predictor.path.absolute()),
            "checkpoint_sha256": predictor.checkpoint_sha256,
            "run": predictor.header.get("run", ""),
            "intensity": predictor._target_intensity(sources[0]).as_dict(),
            "resample": predictor.data.resample,
            "interpolation": predictor.data.interpolation,
            "n4": predictor.data.n4,
            "mark": mark,
            "anonymized": anonymize,
            "num_slices": len(synthetic.array),
            "doubts": [doubt.removeprefix(f"{v.path}: ") for v in sources for doubt in predictor.doubts(v)],
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "elapsed_s": round(elapsed_s, 3),
            "device": str(predictor.device),
            "seresvit_version": __version__,
        }
        (temporary / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return out


def _refuse_to_overwrite(out: Path, sources: tuple[Volume, ...]) -> None:
    """Raises ConfigError unless `out` is new, empty or an earlier prediction, and apart from every source."""
    for volume in sources:
        taken, source = out.resolve(), volume.path.resolve()
        if taken == source or taken in source.parents or source in taken.parents:
            raise ConfigError(f"{out}: holds, or lies in, the source {volume.path}; give another folder to write")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file()):
        raise ConfigError(f"{out}: exists and is no earlier prediction; give a new folder, nothing was replaced")
