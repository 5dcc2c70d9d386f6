"""Predictor: Volume → Volume, the only inference path in the project."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from seresvit.config import ConfigError, DataSettings, Interpolation
from seresvit.data.bias import without_bias
from seresvit.data.geometry import BACKGROUND, at_spacing, lies_on, resampled
from seresvit.data.intensity import MASKED_SHARE, Intensity, intensity_of
from seresvit.data.volume import DataError, Volume, energy_kev_in, room, same_grid
from seresvit.model import checkpoint, familiarity
from seresvit.model.fusion import record_gates
from seresvit.synthesis import backends
from seresvit.synthesis.ensemble import PLANES, Members, flipped, mean_and_spread, turned, turned_back
from seresvit.synthesis.export import sha256_of
from seresvit.synthesis.intervals import Intervals
from seresvit.synthesis.pipeline import slices_at_a_time
from seresvit.synthesis.tiles import tiled

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
        backend: str = "torch",
        members: Members | None = None,
    ):
        """Raises CheckpointError for an unusable file, ConfigError for a device or backend that is not there.

        `backend` is one of `backends.PRECISIONS`, or `auto`: the first of `backends.fastest_first` that starts and, on
        the first and the middle slice of the study at hand, gives what torch gives in float32.
        `norm_statistics="image"` normalises each image by its own statistics, dropout off: what published code did at
        test time by leaving its generator in train mode. It is for checkpoints that were chosen so.
        `members` are averaged, see `synthesis/ensemble.py`; further checkpoints must have the data settings and the
        target of this one, flips a training with `data.flip`, and shared gates in tiles the backend torch.
        """
        if device == "auto":
            local = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % max(torch.cuda.device_count(), 1)}"
            device = local if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda") and not re.fullmatch(r"cuda:\d+", device):
            raise ConfigError(f"--device {device}: expected auto, cpu or cuda")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"--device {device}: no CUDA device is visible; use --device cpu")
        self.path = Path(path)
        self.net = checkpoint.load(path, device)
        self.checkpoint_sha256 = sha256_of(self.path)  # at once: a training may replace the file later
        self.header = self.net.header
        self.device = torch.device(device)
        backends.check(backend, self.device, norm_statistics)
        self.names = [backend]
        if backend == "auto":
            self.names = backends.fastest_first(self.device) if norm_statistics == "running" else ["torch"]
        self._started: dict[str, backends.Backend] = {}
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
        self.norm_statistics = norm_statistics
        self.members = members or Members()
        if self.members.flips and not self.data.flip:
            raise ConfigError(f"--flips: {path} was trained without mirror images (data.flip); leave it out")
        if self.members.tiles and self.names != ["torch"]:
            raise ConfigError(f"--tiles: tiles share their gates in PyTorch alone, found --backend {backend}")
        if self.members.tiles and len(self.header.get("train_size", ())) != 2:
            raise ConfigError(f"--tiles: {path} does not say on which size it was trained; leave it out")
        others = (Predictor(one, device, norm_statistics, backend) for one in self.members.checkpoints)
        self.ensemble: list[Predictor] = [self, *others]
        for other in self.ensemble[1:]:
            if other.data != self.data or other.target_name != self.target_name:
                raise ConfigError(f"--ensemble {other.path}: other data settings or another target than {path}")
        if len({one.checkpoint_sha256 for one in self.ensemble}) < len(self.ensemble):
            raise ConfigError("--ensemble: one checkpoint twice agrees with itself, whatever it gives; name each once")
        self._last_trained: tuple[tuple[Volume, ...], tuple[Volume, ...]] = ((), ())
        # Told the number of slices before each batch; what it raises ends the prediction.
        self.watch: Callable[[int], None] = lambda num_slices: None

    def __call__(self, *sources: Volume) -> Volume:
        """The synthetic volume on the grid of the first source, in the target's unit, float32.

        Several sources are the input channels, in the order of `data.channels`. Raises DataError for a number of
        sources or an intensity unit that the network was not trained on, and for sources that do not share a grid
        (unless `data.resample` gave them one in training: then `as_trained` does so here).
        """
        return self.with_record(*sources)[0]

    def with_record(self, *sources: Volume) -> tuple[Volume, dict[str, Any]]:
        """The synthetic volume, as calling the predictor gives it, and how its voxels came about.

        That is the target's `intensity`, the `backend` that ran, its `precision` and `version`, by how much it differed
        from torch in float32 (`parity`, in the target's unit; None for torch itself), and `dropped`: one line for each
        faster backend that failed. Of several checkpoints see `backends.together`. Raises as calling does, and
        DataError when the one backend asked for fails.
        """
        synthetic, _, record = self.with_spread(*sources)
        return synthetic, record

    def with_spread(
        self, *sources: Volume, follow: Callable[[Volume, int], None] | None = None
    ) -> tuple[Volume, Volume | None, dict[str, Any]]:
        """The mean of the members, their standard deviation (None for a single one), and what `with_record` says.

        `follow` is told the synthetic volume, after each batch, and how many of its slices are what they will be. It is
        not called where these are known only in the end: of several members, or resampled.
        """
        trained = self.as_trained(*sources)
        fits = [one._fit_backend(trained) for one in self.ensemble]
        target = self.target_intensity(trained[0])

        def on_source(array: np.ndarray, interpolation: Interpolation) -> Volume:
            on_trained = replace(trained[0], array=array, unit=target.unit)
            moved, _ = resampled(on_trained, sources[0], interpolation)
            return replace(sources[0], array=moved.array, unit=target.unit, energy_kev=self.target_energy_kev)

        is_final = self.members.is_single and lies_on(trained[0], sources[0])

        def told(array: np.ndarray, count: int) -> None:
            if follow and is_final:
                follow(on_source(array, self.data.interpolation), count)

        members = self._member_values(trained, [backend for backend, _ in fits], told)
        mean, spread = mean_and_spread(members)
        record = {"intensity": target.as_dict(), **backends.together([fit for _, fit in fits])}
        # Splines swing below zero, where no deviation can be.
        on_grid = None if spread is None else on_source(spread, "linear")
        return on_source(mean, self.data.interpolation), on_grid, record

    def _member_values(
        self, trained: tuple[Volume, ...], running: list[backends.Backend], told: Callable[[np.ndarray, int], None]
    ) -> Iterator[np.ndarray]:
        """The values (Z, Y, X) of each member in the target's unit, on the trained grid."""
        for predictor, backend in zip(self.ensemble, running, strict=True):
            run, settings = backend.run, predictor.net.settings
            if self.members.tiles:
                height, width = predictor.header["train_size"]
                run = torch.inference_mode()(tiled(run, (height, width), settings.stride, predictor.net))
            for plane in PLANES if self.members.planes else PLANES[:1]:
                views = tuple(turned(volume, plane) for volume in trained)
                for synthesise in (run, flipped(run)) if self.members.flips else (run,):
                    yield turned_back(predictor._values(synthesise, views, told), plane)

    def _values(
        self, synthesise: backends.Run, views: tuple[Volume, ...], told: Callable[[np.ndarray, int], None]
    ) -> np.ndarray:
        """What `synthesise` gives for all slices of the views, (Z, Y, X) in the target's unit."""
        target, values, done = self.target_intensity(views[0]), room(views[0].array.shape), 0
        for batch_BCHW in self.batches(*views):
            synthetic_BYX = synthesise(batch_BCHW).float().cpu().numpy()[:, 0]
            if not np.isfinite(synthetic_BYX).all():
                raise DataError(f"{views[0].path}: the network gave values that are not finite; check {self.path}")
            values[done : done + len(synthetic_BYX)] = target.restore(synthetic_BYX)
            done += len(synthetic_BYX)
            told(values, done)
        return values

    def _fit_backend(self, trained: tuple[Volume, ...]) -> tuple[backends.Backend, dict[str, Any]]:
        """The first backend that passes on this study, and what `with_record` says of it.

        Each is tried on each study anew, so that what runs depends on the study and not on those before it.
        """
        target, dropped = self.target_intensity(trained[0]), []
        ends = sorted({0, len(trained[0].array) // 2})
        slices_BCHW = torch.cat(list(self.batches(*trained, of=ends))) if self.names != ["torch"] else None
        for name in self.names:
            try:
                if name not in self._started:
                    self._started[name] = backends.started(name, self.net, self.device, self.checkpoint_sha256)
                backend, parity = self._started[name], None
                if slices_BCHW is not None and name != "torch":
                    parity = backends.parity(backend, self.net, slices_BCHW, target)
            except (MemoryError, torch.OutOfMemoryError):
                raise  # what else runs on the machine must not decide which image a study gets
            except Exception as error:  # whatever a runtime raises, the next may do
                if name == self.names[-1]:
                    raise DataError(f"--backend {name}: {error}; use --backend torch") from error
                dropped.append(f"backend {name} {' '.join(str(error).split())[:200]}; another was used")
                continue
            how = {"backend": name, "precision": backends.PRECISIONS[name], "backend_version": backend.version}
            return backend, {**how, "parity": parity, "dropped": dropped}
        raise AssertionError("the last name has returned or raised")

    def as_trained(self, *sources: Volume) -> tuple[Volume, ...]:
        """The sources as training prepared them: without bias field (`data.n4`), on the grid of `data.resample`.

        That is the first source's own grid, at the spacing that `data.resample` gives or, where training was on the
        targets' grids, at theirs in the plane (the checkpoint's median). Its planes stay what they are.
        """
        if self._last_trained[0] == sources:  # the very same volumes: doubts and prediction both ask
            return self._last_trained[1]
        self._last_trained = (sources, self._as_trained(tuple(without_bias(volume, self.data) for volume in sources)))
        return self._last_trained[1]

    def _as_trained(self, sources: tuple[Volume, ...]) -> tuple[Volume, ...]:
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
    def members_record(self) -> dict[str, Any]:
        """What the spread and the intervals depend on, for JSON."""
        return {
            "checkpoints": [one.checkpoint_sha256 for one in self.ensemble],
            "flips": self.members.flips,
            "planes": self.members.planes,
            "tiles": self.members.tiles,
            "norm_statistics": self.norm_statistics,
        }

    @cached_property
    def intervals(self) -> Intervals | None:
        """What `seresvit calibrate` wrote beside the checkpoint, where it is for these very members."""
        path = intervals_path(self.path)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = Intervals(**{name: record[name] for name in Intervals.__dataclass_fields__})
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: not a calibration; run seresvit calibrate again, or remove it") from None
        return found if found.members == self.members_record else None

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
        return found + self._unfamiliar(sources)

    @torch.inference_mode()
    def _unfamiliar(self, sources: tuple[Volume, ...]) -> list[str]:
        """A line when a few slices, or the gates that they get, are unlike those of the training."""
        record = self.header.get("familiarity")
        if not record or len(sources) != max(len(self.data.channels), 1):
            return []
        trained = self.as_trained(*sources)
        batches, gates = [], []
        for batch_BCHW in self.batches(*trained, of=familiarity.looked_at(len(trained[0].array))):
            with record_gates(self.net) as of_batch:
                self.net(batch_BCHW)
            batches.append(batch_BCHW)
            gates.append(of_batch)
        of_all = {name: torch.cat([of_batch[name] for of_batch in gates]) for name in gates[0]}
        distance, name = familiarity.distance(familiarity.described(torch.cat(batches), of_all), record)
        if distance <= 1:
            return []
        return [
            f"{sources[0].path}: unlike the {record['num_patients']} patients that the network was trained on "
            f"({distance:.1f} times the limit, most in {name}); check modality, unit, window, energy and orientation"
        ]

    def batches(self, *sources: Volume, of: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """All slices, or those `of` these indices, as the network takes them: (B, C, H, W) float32 in [-1, 1]."""
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
        wanted = np.arange(len(sources[0].array)) if of is None else np.array(of)
        shape_yx = sources[0].array.shape[1:]
        size = min(self.batch_size, slices_at_a_time(shape_yx, self.net.settings.base_channels, self.device))
        for start in range(0, len(wanted), size):
            around = wanted[start : start + size, None] + np.arange(-context, context + 1)
            index = np.clip(around, 0, len(sources[0].array) - 1)
            self.watch(len(index))
            planes = [rule.normalise(volume.array[index]) for rule, volume in zip(rules, sources, strict=True)]
            yield torch.from_numpy(np.concatenate(planes, axis=1)).to(self.device)

    def target_intensity(self, source: Volume) -> Intensity:
        """The rule recorded in training; an imported network has none and gets the rule of its settings."""
        if recorded := self.header.get("target_intensity"):
            return Intensity.from_dict(recorded)
        if self.data.intensity.target == "window":
            return Intensity("window", *self.data.window_hu, "HU")
        if self.data.intensity.target == "uint8":
            return Intensity("uint8", 0.0, 255.0, "uint8")
        return intensity_of(source, "percentile", self.data)


def intervals_path(checkpoint_path: Path) -> Path:
    """Where the calibration of a checkpoint stands."""
    return checkpoint_path.with_suffix(".calibration.json")
