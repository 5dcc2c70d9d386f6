"""Training in two stages: the convolutional network alone, then transformers and gates in.

Reads from top to bottom: train → fit → step → validate. All lengths are in images seen. What is on disk is the truth:
stage 2 starts from the last checkpoint of stage 1, and the same command again resumes from the last one of either.
"""

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning_fabric
import numpy as np
import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from seresvit import __version__
from seresvit.config import Config, ConfigError, StageSettings, to_yaml
from seresvit.data.dataset import Prepared, TrainingSlices, prepare, read_slice, slices_of
from seresvit.data.intensity import Intensity, reference_intensity
from seresvit.data.volume import DataError, written_whole
from seresvit.model import checkpoint
from seresvit.model.discriminator import Discriminator
from seresvit.model.generator import Generator, start_as_identity
from seresvit.training.losses import discriminator_loss, generator_losses

MODEL, DISCRIMINATOR, STATE = "model.safetensors", "discriminator.safetensors", "state.pt"
LOG_EVERY_BATCHES = 20

# Called with (stage, images seen, images in all, words to show) after every batch.
Progress = Callable[[int, int, int, str], None]


@dataclass
class Stage:
    """Everything that changes while one stage trains."""

    number: int
    settings: StageSettings
    generator: _FabricModule
    optimizer: torch.optim.Optimizer
    discriminator: _FabricModule
    discriminator_optimizer: torch.optim.Optimizer
    images: int = 0
    best_mae: float = math.inf


@dataclass(frozen=True)
class Run:
    """What stays the same during a run."""

    config: Config
    store: Prepared
    folder: Path
    fabric: Fabric
    header: checkpoint.Header
    target_intensity: Intensity
    board: SummaryWriter


def train(config: Config, manifest: Path, run_dir: Path, progress: Progress = lambda *_: None) -> Path:
    """The best checkpoint's path after training both stages; goes on where an earlier call with these settings stopped.

    Writes the run folder: config.yaml, manifest.json, log.jsonl, TensorBoard events, checkpoints/{last,best}.
    Raises ConfigError when the folder holds a run of other settings, DataError for unusable data or a diverged loss.
    """
    fabric = Fabric(accelerator="auto", devices=1, precision=precision_of(config))
    fabric.seed_everything(config.train.seed, verbose=False)
    store = prepare(manifest, config.data)
    for split in ("train", "val"):
        if not slices_of(store, split):
            raise DataError(f"{manifest}: no case in the {split} split; audit again with more patients or --{split}")
    check_starting_points(config)
    target_intensity = reference_intensity(store.target_intensities("train"))
    folder = open_run(run_dir, config, store, fabric)
    with SummaryWriter(str(folder)) as board:
        header = _header(config, store, target_intensity, folder)
        run = Run(config, store, folder, fabric, header, target_intensity, board)
        for number, settings in ((1, config.train.stage1), (2, config.train.stage2)):
            saved = _saved_state(folder)
            if settings.num_images and (saved is None or saved["stage"] <= number):
                fit(run, start_stage(run, number, settings, saved), progress)
    best = folder / "checkpoints" / "best" / MODEL
    if not best.is_file():
        raise ConfigError("train.stage1.num_images and train.stage2.num_images are both 0: nothing to train")
    return best


def describe(config: Config, manifest: Path) -> str:
    """What `train` would do: the resolved settings, the networks' sizes, the slices. Raises as `train` would."""
    store = prepare(manifest, config.data)
    check_starting_points(config)
    lines = [to_yaml(config)]
    for number in (1, 2):
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in stage_network(config, number).parameters())
        lines.append(
            f"stage {number}: {count:,} parameters, {getattr(config.train, f'stage{number}').num_images:,} images"
        )
    counts = (f"{len(slices_of(store, s, config.data.min_foreground))} {s}" for s in ("train", "val"))
    return "\n".join([*lines, f"slices: {', '.join(counts)}; precision {precision_of(config)}"])


def check_starting_points(config: Config) -> None:
    """Raises CheckpointError when `train.init_from` or `train.vit_weights` will not fit the stage that takes them."""
    if config.train.init_from:
        first = 1 if config.train.stage1.num_images else 2
        take_weights(stage_network(config, first), Path(config.train.init_from))
    if config.train.vit_weights and config.train.stage2.num_images:
        checkpoint.load_vit_npz(stage_network(config, 2), config.train.vit_weights)


def precision_of(config: Config) -> Any:
    """Fabric's name for the precision to compute in."""
    if config.train.precision != "auto":
        return config.train.precision
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"


def open_run(run_dir: Path, config: Config, store: Prepared, fabric: Fabric) -> Path:
    """The run folder, new or of these very settings. Raises ConfigError naming a setting that differs."""
    written = run_dir / "config.yaml"
    if written.is_file() and (run_dir / "checkpoints").is_dir():  # else it stopped before there was anything to keep
        differing = _differences(yaml.safe_load(written.read_text(encoding="utf-8")), yaml.safe_load(to_yaml(config)))
        if differing:
            raise ConfigError(f"{run_dir}: holds a run with other {', '.join(differing)}; choose another --run-dir")
        recorded = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
        if recorded["data_hash"] != store.data_hash:
            raise ConfigError(f"{run_dir}: holds a run on other images; choose another --run-dir")
        return run_dir
    record = {
        "seresvit": __version__,
        "commit": checkpoint.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fabric": lightning_fabric.__version__,
        "device": str(fabric.device),
        "device_name": torch.cuda.get_device_name() if fabric.device.type == "cuda" else platform.machine(),
        "precision": precision_of(config),
        "seed": config.train.seed,
        "data_hash": store.data_hash,
        "num_slices": {split: len(slices_of(store, split)) for split in ("train", "val", "test")},
        "num_patients": {s: len({c.patient for c in store.cases if c.split == s}) for s in ("train", "val", "test")},
    }
    with written_whole(run_dir / "manifest.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    with written_whole(written) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")
    return run_dir


def start_stage(run: Run, number: int, settings: StageSettings, saved: dict[str, Any] | None) -> Stage:
    """A stage where it was interrupted, else with the weights of the stage before or of `train.init_from`."""
    config, last = run.config, run.folder / "checkpoints" / "last"
    generator = stage_network(config, number)
    channels = config.model.in_channels + config.model.out_channels
    discriminator = Discriminator(channels, config.train.discriminator_channels)
    if config.train.identity_start:
        start_as_identity(generator)
    if saved is not None:
        take_weights(generator, last / MODEL)
        checkpoint.fill(discriminator, checkpoint.read(last / DISCRIMINATOR)[0], str(last / DISCRIMINATOR))
    elif config.train.init_from:
        take_weights(generator, Path(config.train.init_from))
    if number == 2 and config.train.vit_weights and (saved is None or saved["stage"] == 1):
        checkpoint.load_vit_npz(generator, config.train.vit_weights)

    def adam(network: torch.nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=settings.learning_rate, betas=config.train.adam_betas)

    # channels_last: convolutions of two to four dozen channels run faster so, on CPU and GPU alike.
    generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stage = Stage(
        number,
        settings,
        *run.fabric.setup(generator, adam(generator)),
        *run.fabric.setup(discriminator, adam(discriminator)),
    )
    if saved is not None and saved["stage"] == number:
        stage.images, stage.best_mae = saved["images"], saved["best_mae"]
        stage.optimizer.load_state_dict(saved["optimizer"])
        stage.discriminator_optimizer.load_state_dict(saved["discriminator_optimizer"])
        torch.set_rng_state(saved["rng"])
        rng_cuda = saved.get("rng_cuda", [])
        if torch.cuda.device_count() == len(rng_cuda):
            torch.cuda.set_rng_state_all(rng_cuda)
    return stage


def stage_network(config: Config, number: int) -> Generator:
    """The generator of a stage, freshly initialised: without transformers in stage 1."""
    blocks = config.model.transformer_blocks if number == 2 else ()
    return Generator(config.model.model_copy(update={"transformer_blocks": blocks, "token_grid": config.token_grid}))


def take_weights(generator: Generator, path: Path) -> None:
    """Copy the weights of a checkpoint, ours or a published `.pth`, into a network that may have more than they fill.

    Raises CheckpointError naming a weight that has no place, or another shape, in the network.
    """
    source = checkpoint.import_published(path) if path.suffix in (".pth", ".pt") else checkpoint.load(path)
    blocks, wanted = source.settings.transformer_blocks, generator.settings.transformer_blocks
    if set(blocks) - set(wanted):
        raise checkpoint.CheckpointError(
            f"{path}: has transformers in blocks {blocks}, this stage in {wanted}; set train.stage1.num_images=0"
        )
    if blocks and source.settings.vit.heads != generator.settings.vit.heads:
        raise checkpoint.CheckpointError(f"{path}: set model.vit.heads={source.settings.vit.heads}, as it was trained")
    checkpoint.fill(generator, {**generator.state_dict(), **source.state_dict()}, str(path))


def fit(run: Run, stage: Stage, progress: Progress) -> None:
    """Train one stage to its end: validate and save when due, then one step."""
    config, total = run.config.train, stage.settings.num_images
    dataset = TrainingSlices(run.store, run.config.data, config.size, seed=2 * config.seed + stage.number)
    workers = 4 if run.fabric.device.type == "cuda" else 0
    order = range(stage.images, total)
    loader = DataLoader(
        dataset,
        config.batch_size,
        sampler=order,
        num_workers=workers,
        pin_memory=workers > 0,
        # Its own: an iterator draws a seed, which would shift the dropout of a resumed run.
        generator=torch.Generator(),
    )
    sums: dict[str, torch.Tensor] = {}
    counted, started_s = 0, time.monotonic()
    stage.generator.train()
    for batch, (source, target) in enumerate(run.fabric.setup_dataloaders(loader), 1):
        set_learning_rate(stage)
        losses = step(run, stage, source, target)
        before, stage.images = stage.images, stage.images + len(source)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss
        counted += 1
        if batch % LOG_EVERY_BATCHES == 0 or stage.images >= total:
            means = {name: float(loss) / counted for name, loss in sums.items()}
            rate = (stage.images - order.start) / (time.monotonic() - started_s)
            log(run, stage, {**means, "images_per_s": rate})
            sums, counted = {}, 0
        progress(stage.number, stage.images, total, f"best val MAE {stage.best_mae:.1f}")
        if _due(before, stage.images, config.validate_every_images, total):
            validate(run, stage)
        if _due(before, stage.images, config.save_every_images, total):
            save(run, stage)


def step(run: Run, stage: Stage, source: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """One update of both networks; the unweighted losses, detached. Raises DataError when they are not finite."""
    adversarial = stage.settings.adversarial_weight > 0
    synthetic = stage.generator(source)

    # The discriminator is frozen while the generator steps: no gradient of its own is computed.
    stage.discriminator.requires_grad_(False)
    losses = generator_losses(source, synthetic, target, stage.discriminator if adversarial else None)
    weights = {"l1": stage.settings.l1_weight, "adversarial": stage.settings.adversarial_weight}
    total = sum((weights[name] * loss for name, loss in losses.items()), torch.zeros((), device=source.device))
    if not torch.isfinite(total):
        raise _diverged(run, stage)
    stage.optimizer.zero_grad(set_to_none=True)
    run.fabric.backward(total)
    stage.optimizer.step()

    if adversarial:
        stage.discriminator.requires_grad_(True)
        losses["discriminator"] = discriminator_loss(source, synthetic, target, stage.discriminator)
        stage.discriminator_optimizer.zero_grad(set_to_none=True)
        run.fabric.backward(losses["discriminator"])
        stage.discriminator_optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def set_learning_rate(stage: Stage) -> None:
    """Constant, then falling in a straight line to zero: a pure function of the images seen."""
    settings = stage.settings
    seen = stage.images / settings.num_images
    falling = 1.0 if seen < settings.constant_share else (1 - seen) / (1 - settings.constant_share)
    for optimizer in (stage.optimizer, stage.discriminator_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * falling


@torch.inference_mode()
def validate(run: Run, stage: Stage) -> None:
    """Log the validation MAE and a panel; keep the checkpoint as `best` when it is the best of this stage."""
    every = slices_of(run.store, "val", run.config.data.min_foreground) or slices_of(run.store, "val")
    count = min(len(every), run.config.train.validation_slices)
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, count).round().astype(int)]
    errors, rows = [], []
    stage.generator.eval()
    for number, (case, index) in enumerate(chosen):
        source, target = read_slice(run.store, case, index)
        synthetic = stage.generator(torch.from_numpy(source)[None].to(run.fabric.device))[0].float().cpu().numpy()
        errors.append(np.abs(synthetic - target).mean())
        if number % max(count // 4, 1) == 0:
            rows.append(_panel(source[0], synthetic[0], target[0]))
    stage.generator.train()
    if not np.isfinite(errors).all():
        raise _diverged(run, stage)
    half_range = (run.target_intensity.high - run.target_intensity.low) / 2
    mae = float(np.mean(errors)) * half_range
    log(run, stage, {"val_mae": mae})
    if len({row.shape for row in rows}) == 1:
        title = "source | synthetic | target | absolute error, white = 10 % of the range"
        run.board.add_image(title, np.concatenate(rows), _global_images(run, stage), dataformats="HWC")
    if mae < stage.best_mae:
        stage.best_mae = mae
        with written_whole(run.folder / "checkpoints" / "best") as temporary:
            header = {**run.header, "stage": stage.number, "images": stage.images, "val_mae": mae}
            checkpoint.save(stage.generator.module, temporary / MODEL, header)


def save(run: Run, stage: Stage) -> None:
    """Write `checkpoints/last`: both networks, and all that makes the next step what it would have been."""
    state = {
        "stage": stage.number,
        "images": stage.images,
        "best_mae": stage.best_mae,
        "optimizer": stage.optimizer.state_dict(),
        "discriminator_optimizer": stage.discriminator_optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all(),
    }
    header = {**run.header, "stage": stage.number, "images": stage.images}
    with written_whole(run.folder / "checkpoints" / "last") as temporary:
        checkpoint.save(stage.generator.module, temporary / MODEL, header)
        checkpoint.save(stage.discriminator.module, temporary / DISCRIMINATOR, header)
        torch.save(state, temporary / STATE)


def log(run: Run, stage: Stage, values: dict[str, float]) -> None:
    """One line of log.jsonl and the same numbers for TensorBoard."""
    learning_rate = stage.optimizer.param_groups[0]["lr"]
    line = {"stage": stage.number, "images": stage.images, "learning_rate": learning_rate, **values}
    with open(run.folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    for name, value in values.items():
        run.board.add_scalar(name, value, _global_images(run, stage))


def _diverged(run: Run, stage: Stage) -> DataError:
    best = run.folder / "checkpoints" / "best" / MODEL
    return DataError(
        f"{run.folder}: the loss or the output is not finite after {stage.images} images of stage {stage.number}; "
        f"lower train.stage{stage.number}.learning_rate in a new --run-dir, perhaps with --set train.init_from={best}"
    )


def _global_images(run: Run, stage: Stage) -> int:
    return stage.images + (run.config.train.stage1.num_images if stage.number == 2 else 0)


def _due(before: int, now: int, every: int, total: int) -> bool:
    return now // every > before // every or now >= total


def _saved_state(folder: Path) -> dict[str, Any] | None:
    path = folder / "checkpoints" / "last" / STATE
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def _header(config: Config, store: Prepared, target_intensity: Intensity, folder: Path) -> checkpoint.Header:
    return {
        "data": config.data.model_dump(mode="json"),
        "train_size": list(config.train.size),
        "target_intensity": target_intensity.as_dict(),
        "sources": sorted({source for case in store.cases for source in case.sources}),
        "target": store.cases[0].target,
        "spacing_mm_yx": np.median([c.spacing_mm_zyx[1:] for c in store.cases if c.split == "train"], axis=0).tolist(),
        "run": folder.absolute().name,
        "data_hash": store.data_hash,
    }


def _differences(recorded: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key in sorted(recorded.keys() | wanted.keys()):
        before, now = recorded.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            names += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            names.append(f"{prefix}{key}")
    return names


def _panel(source: np.ndarray, synthetic: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The three images and their absolute error side by side, (H, 4W, 1) uint8."""
    error = np.clip(np.abs(synthetic - target) / 0.2, 0, 1)
    shades = [(image + 1) / 2 for image in (source, synthetic, target)] + [error]
    return (np.concatenate(shades, axis=1)[..., None] * 255).astype(np.uint8)
