"""Training in two stages: the convolutional network alone, then transformers and gates in.

Reads from top to bottom: train → fit → step → validate. All lengths are in images seen, by all processes together. What
is on disk is the truth: stage 2 starts from the last checkpoint of stage 1, and the same command again resumes from the
last one of either.
"""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricOptimizer
from torch.utils.data import DataLoader

from seresvit.config import Config, ConfigError
from seresvit.data.dataset import TrainingSlices, check_labels
from seresvit.data.intensity import Intensity, reference_intensity
from seresvit.data.prepared import Group, Prepared, PreparedCase, prepare, read_slice, slices_of
from seresvit.data.volume import DataError, written_whole
from seresvit.model import checkpoint, familiarity
from seresvit.model.cuda_graph import recorded
from seresvit.training import losses
from seresvit.training import run as run_folder
from seresvit.training.processes import (
    Stopped,
    ignore_signals,
    machine,
    peak_memory_mib,
    precision_of,
    readers,
    signals_caught,
    start_processes,
    summed,
)
from seresvit.training.stage import (
    MODEL,
    Replay,
    Stage,
    Terms,
    check_starting_points,
    draw_from,
    position,
    rate_factor,
    start_stage,
    train_mode,
    write_stage,
)

LOG_EVERY_STEPS = 20
PANEL_SLICES = 4

# Called with (stage, images seen, images in all, words to show) after every step.
Progress = Callable[[int, int, int, str], None]
# Source, target and, with `mask_weights`, the weight of every pixel.
Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Run:
    """What stays the same during a run. Only the first process has a `log`; `signals` fills when it is told to stop."""

    config: Config
    store: Prepared
    folder: Path
    fabric: Fabric
    header: checkpoint.Header
    target_intensity: Intensity
    log: run_folder.Log | None = None
    signals: list[int] = field(default_factory=list)


def train(
    config: Config,
    manifest: Path,
    run_dir: Path,
    progress: Progress = lambda *_: None,
    preparing: Callable[[list[Group]], Iterable[Group]] = iter,
) -> Path:
    """The best checkpoint's path after training both stages; goes on where an earlier call with these settings stopped.

    `preparing` wraps the cases that must be prepared before. Under torchrun, all its processes train together. What is
    written stands in `training/run.py`. Raises ConfigError when the folder holds a run of other settings, DataError for
    unusable data, a diverged loss or a full disk, and Stopped after SIGTERM or SIGINT.
    """
    fabric = start_processes(config)
    with fabric.rank_zero_first():  # the first prepares the store and finds what is wrong, the others then only read
        run = open_run(config, manifest, run_dir, fabric, preparing)
        if fabric.is_global_zero and not run_folder.is_begun(run_dir, config, run.store.data_hash):
            facts = {**machine(fabric), "precision": precision_of(config), **_counts(run.store)}
            run_folder.begin(run_dir, config, facts)
    with run_folder.held(run_dir) if fabric.is_global_zero else nullcontext():
        return _go_on(run, progress)


def _go_on(run: Run, progress: Progress) -> Path:
    """The best checkpoint's path, when what the run folder still lacks is trained."""
    config, fabric, run_dir = run.config, run.fabric, run.folder
    last, fault = fabric.broadcast(run_folder.newest_whole(run_dir) if fabric.is_global_zero else (None, ""))
    if fault:
        fabric.print(fault)
    stage, images, validated = position(last)
    ends = [(number, images_of(config, number)) for number in (1, 2) if images_of(config, number)]
    # A stage that was stopped between its last step and its last validation still has the latter before it.
    left = [number for number, end in ends if (number, end) > (stage, images) or (number == stage and not validated)]
    if not left:
        change = "its best checkpoint was completed" if acquaint(run) else "nothing was changed"
        fabric.print(f"{run_dir}: this run is finished; {change}")
        return run_dir / "checkpoints" / "best" / MODEL
    with signals_caught() as signals, run_folder.disk_full_said(run_dir):
        log = run_folder.Log(run_dir, config, stage, images, validated) if fabric.is_global_zero else None
        try:
            for number in left:
                # No name holds the stage on: its networks and optimizers must be gone when the next ones come.
                fit(replace(run, log=log, signals=signals), start_stage(fabric, config, number, last), progress)
                last = run_dir / "checkpoints" / "last"
            acquaint(replace(run, signals=signals))
        finally:
            if log:
                log.close()
    return run_dir / "checkpoints" / "best" / MODEL


def acquaint(run: Run) -> bool:
    """Write into the best checkpoint what the training images look like to it; False where that stands there already.

    A signal ends it with Stopped and nothing written; the next call does it.
    """
    best = run.folder / "checkpoints" / "best" / MODEL
    if run.fabric.is_global_zero and best.is_file():
        network = checkpoint.load(best, run.fabric.device)
        if "familiarity" not in network.header:
            record = familiarity.of_training(
                network, run.store, run.config.data.context_slices, lambda: bool(run.signals)
            )
            if run.signals:
                raise Stopped(f"{run.folder}: stopped after its last image", run.signals[0])
            checkpoint.save(network, best, {**network.header, "familiarity": record})
            return True
    return False


def open_run(
    config: Config,
    manifest: Path,
    run_dir: Path,
    fabric: Fabric,
    preparing: Callable[[list[Group]], Iterable[Group]] = iter,
) -> Run:
    """The run that the settings and the images make, nothing written yet but the store. Raises as `train` does."""
    if not any(images_of(config, number) for number in (1, 2)):
        raise ConfigError("train.stage1.num_images and train.stage2.num_images are both 0: nothing to train")
    check_starting_points(config)
    run_folder.check_wandb(config)
    weights = [getattr(config.train, f"stage{n}").mask_weights for n in (1, 2) if images_of(config, n)]
    store = prepare(manifest, config.data, preparing, masks=any(weights))
    for split in ("train", "val"):
        if not slices_of(store, split):
            raise DataError(f"{manifest}: no case in the {split} split; audit again with more patients or --{split}")
    for mask_weights in weights:
        check_labels(store, mask_weights)
    run_folder.is_begun(run_dir, config, store.data_hash)
    target_intensity = reference_intensity(store.target_intensities("train"))
    spacings_mm_yx = [case.spacing_mm_zyx[1:] for case in store.cases if case.split == "train"]
    header = {
        "data": config.data.model_dump(mode="json"),
        "train_size": list(config.train.size),
        "target_intensity": target_intensity.as_dict(),
        "sources": sorted({source for case in store.cases for source in case.sources}),
        "target": store.cases[0].target,
        "spacing_mm_yx": np.median(spacings_mm_yx, axis=0).tolist(),
        "run": run_dir.absolute().name,
        "data_hash": store.data_hash,
    }
    return Run(config, store, run_dir, fabric, header, target_intensity)


def fit(run: Run, stage: Stage, progress: Progress) -> None:
    """Train one stage to its end: validate, save and maybe stop; then one step."""
    config, total = run.config.train, stage.settings.num_images
    batches = load(run, stage)
    saved_at, started_at, started_s = stage.images, stage.images, time.monotonic()
    since_log: list[Terms] = []
    note = ""
    train_mode(stage)
    while True:
        stopping = told_to_stop(run)
        validating = stage.validated_at < stage.images and _due(run, stage, config.validate_every_images)
        if validating and not stopping:
            validate(run, stage)
            stopping = told_to_stop(run)
        # The last validation of a resumed stage is news, too.
        if (saved_at < stage.images or (validating and stage.images >= total)) and (
            stopping or _due(run, stage, config.save_every_images)
        ):
            save(run, stage)
            saved_at = stage.images
        if stopping:
            told = run.signals[0] if run.signals else signal.SIGTERM  # perhaps another process was
            raise Stopped(f"{run.folder}: stopped after {stage.images:,} images of stage {stage.number}", told)
        if stage.images >= total:
            return

        set_learning_rate(stage)
        terms = step(run, stage, *next(batches))
        stage.images += config.batch_size
        since_log += [terms] if terms else []
        if stage.images // config.batch_size % LOG_EVERY_STEPS == 0 or stage.images >= total:
            note = log_steps(run, stage, since_log, (stage.images - started_at) / (time.monotonic() - started_s))
            since_log = []
        progress(stage.number, min(stage.images, total), total, f"{note}best val MAE {stage.best_mae:.1f}")


def told_to_stop(run: Run) -> bool:
    """Whether any process was sent a signal; all of them agree."""
    return summed(run.fabric, len(run.signals)) != [0]


def load(run: Run, stage: Stage) -> Iterator[Batch]:
    """The batches that are left of the stage: of each, the share of this process.

    The n-th image is a function of the seed and of n alone. Batch after batch, the processes are dealt theirs.
    """
    config, fabric = run.config.train, run.fabric
    share = config.batch_size // fabric.world_size
    starts = range(stage.images, stage.settings.num_images, config.batch_size)
    mine = fabric.global_rank * share
    workers = readers(fabric.device)
    loader = DataLoader(
        training_slices(run, stage),
        batch_sampler=([*range(start + mine, start + mine + share)] for start in starts),
        num_workers=workers,
        pin_memory=workers > 0,
        worker_init_fn=ignore_signals,
    )
    return iter(fabric.setup_dataloaders(loader, use_distributed_sampler=False))  # type: ignore[arg-type]


def training_slices(run: Run, stage: Stage) -> TrainingSlices:
    """The images of a stage by their number; stages and seeds see them in orders of their own."""
    config = run.config.train
    seed = 2 * config.seed + stage.number
    return TrainingSlices(
        run.store,
        run.config.data,
        config.size,
        seed,
        config.balance,
        config.foreground_bias,
        stage.settings.mask_weights,
    )


def step(
    run: Run, stage: Stage, source: torch.Tensor, target: torch.Tensor, mask_weights: torch.Tensor | None = None
) -> Terms | None:
    """One update of both networks; the unweighted terms of their losses, detached. None when the step was skipped.

    It is skipped, in every process, when a gradient is not finite: weights and batch statistics stay as they were.
    Raises DataError after `train.max_bad_steps` of these in a row.
    """
    config = run.config.train
    batch = [images for images in (source, target, mask_weights) if images is not None]
    if config.cuda_graph and run.fabric.device.type == "cuda" and run.fabric.world_size == 1 and not stage.replay:
        stage.replay = recording(run, stage, batch)
    draw_from(config.seed, stage.number, stage.images, run.fabric.global_rank)  # dropout
    terms, norms, before = stage.replay(*batch) if stage.replay else gradients(run, stage, *batch)
    steps: list[tuple[torch.nn.Module, _FabricOptimizer]] = [(stage.generator, stage.optimizer)]
    if stage.settings.adversarial_weight:
        steps.append((stage.discriminator, stage.discriminator_optimizer))
    # Told as GradScaler tells it, the device passes over an update by itself, and is not waited for until all of
    # the step is under way.
    found_inf = (~torch.isfinite(torch.stack(norms)).all()).float()
    for (network, optimizer), norm in zip(steps, norms, strict=True):
        if config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), config.clip_norm, norm)
        optimizer.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.step()
    if not found_inf:
        stage.bad_steps_in_a_row = 0
        if stage.average:
            stage.average.update_parameters(stage.generator.module)
        return {name: term.clone() for name, term in terms.items()}  # the next replay writes over them
    for buffer, value in zip(buffers_of(stage), before, strict=True):
        buffer.copy_(value)
    stage.bad_steps, stage.bad_steps_in_a_row = stage.bad_steps + 1, stage.bad_steps_in_a_row + 1
    if stage.bad_steps_in_a_row >= config.max_bad_steps:
        dataset, numbers = training_slices(run, stage), range(stage.images, stage.images + config.batch_size)
        drawn = [dataset.drawn(number)[:2] for number in numbers]
        raise _diverged(run, stage, "gradient", f"{stage.bad_steps_in_a_row} steps in a row, the last one", drawn)
    return None


def recording(run: Run, stage: Stage, batch: list[torch.Tensor]) -> Replay:
    """`gradients` as a CUDA graph, recorded on this batch; nothing of the stage is changed."""
    before = [buffer.clone() for buffer in buffers_of(stage)]
    try:
        return recorded(partial(gradients, run, stage), *batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise DataError(
            f"train.cuda_graph: a step cannot be recorded on this GPU ({' '.join(str(error).split())[:200]}); "
            "add --set train.cuda_graph=false"
        ) from error
    finally:
        for buffer, value in zip(buffers_of(stage), before, strict=True):
            buffer.copy_(value)


def buffers_of(stage: Stage) -> list[torch.Tensor]:
    """The running statistics of both networks."""
    return [*stage.generator.buffers(), *stage.discriminator.buffers()]


def gradients(run: Run, stage: Stage, *batch: torch.Tensor) -> tuple[Terms, list[torch.Tensor], list[torch.Tensor]]:
    """Leave the gradients of both networks' losses in their parameters.

    Returns the terms, the norm of each network's gradient, and the batch statistics as they were before.
    """
    before = [buffer.clone() for buffer in buffers_of(stage)]
    parts: list[Batch] = list(zip(*(images.chunk(run.config.train.accumulate) for images in batch), strict=True))
    # The discriminator is frozen while the generator steps: no gradient of its own is computed.
    stage.discriminator.requires_grad_(False)
    terms, synthetic = generator_gradient(run, stage, parts)
    stage.discriminator.requires_grad_(True)
    norms = [gradient_norm(stage.generator)]
    if stage.settings.adversarial_weight:
        terms["discriminator"] = discriminator_gradient(run, stage, parts, synthetic)
        norms.append(gradient_norm(stage.discriminator))
    return terms, norms, before


def generator_gradient(run: Run, stage: Stage, parts: list[Batch]) -> tuple[Terms, list[torch.Tensor]]:
    """Leave the gradient of the generator's loss in its parameters; the terms and the synthetic images, detached."""
    stage.optimizer.zero_grad(set_to_none=True)
    means: Terms = {}
    images = []
    for number, (source, target, *mask_weights) in enumerate(parts, 1):
        with run.fabric.no_backward_sync(stage.generator, enabled=number < len(parts)):
            synthetic = stage.generator(source)
            score = None
            if stage.settings.adversarial_weight:
                with run.fabric.autocast():  # the bare network: DDP's would wait for gradients that never come
                    score = stage.discriminator.module(torch.cat([source, synthetic], dim=1))
            weights = losses.pixel_weights(stage.settings, target, run.target_intensity, *mask_weights)
            terms = losses.generator_losses(stage.settings, synthetic, target, score, weights)
            run.fabric.backward(_infectious(losses.total(stage.settings, terms)) / len(parts))
        for name, term in terms.items():
            means[name] = means.get(name, 0) + term.detach() / len(parts)
        images.append(synthetic.detach())
    return means, images


def discriminator_gradient(run: Run, stage: Stage, parts: list[Batch], synthetic: list[torch.Tensor]) -> torch.Tensor:
    """Leave the gradient of the discriminator's loss in its parameters; that loss, detached."""
    stage.discriminator_optimizer.zero_grad(set_to_none=True)
    mean = torch.zeros((), device=run.fabric.device)
    for number, ((source, target, *_), image) in enumerate(zip(parts, synthetic, strict=True), 1):
        with run.fabric.no_backward_sync(stage.discriminator, enabled=number < len(parts)):
            # Two passes, each with batch statistics of its own, as published.
            on_target = stage.discriminator(torch.cat([source, target], dim=1))
            on_synthetic = stage.discriminator(torch.cat([source, image], dim=1))
            loss = losses.discriminator_loss(stage.settings, on_target, on_synthetic)
            run.fabric.backward(_infectious(loss) / len(parts))
        mean = mean + loss.detach() / len(parts)
    return mean


def _infectious(loss: torch.Tensor) -> torch.Tensor:
    """The loss; one that is not finite makes every gradient so, and with it those of all processes."""
    return loss * torch.where(torch.isfinite(loss), 1.0, torch.nan)


def gradient_norm(network: torch.nn.Module) -> torch.Tensor:
    """The Euclidean norm of the gradient; not finite when any part of it is not."""
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])


def set_learning_rate(stage: Stage) -> None:
    """Set the rates of both networks as the schedule has them after the images seen."""
    for optimizer in (stage.optimizer, stage.discriminator_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor(stage.settings, stage.images)


@torch.inference_mode()
def validate(run: Run, stage: Stage) -> None:
    """Log the validation MAE and a panel; keep the network as `best` when it is the best of this stage.

    Each process looks at its share of the slices, which are the same every time. A signal ends it without a result.
    """
    chosen, context = validation_slices(run), run.config.data.context_slices
    network = stage.model.eval()
    errors, looked_at = [0.0] * len(chosen), 0
    for place in range(run.fabric.global_rank, len(chosen), run.fabric.world_size):
        if run.signals:
            break
        source, target = read_slice(run.store, *chosen[place], context)
        errors[place] = float(np.abs(synthesised(run, network, source) - target).mean())
        looked_at += 1
    *errors, count = summed(run.fabric, *errors, looked_at)
    if count == len(chosen):
        bad = [chosen[place] for place in np.flatnonzero(~np.isfinite(errors))]
        if bad:
            raise _diverged(run, stage, "output", "in validation", bad)
        mae = sum(errors) / count * (run.target_intensity.high - run.target_intensity.low) / 2
        is_best, stage.validated_at = mae < stage.best_mae, stage.images
        stage.best_mae = min(mae, stage.best_mae)
        if run.log:
            run.log.numbers(stage.number, stage.images, {"val_mae": mae})
            shown = [read_slice(run.store, *one, context) for one in chosen[:: -(-len(chosen) // PANEL_SLICES)]]
            rows = [(source[context], synthesised(run, network, source)[0], target[0]) for source, target in shown]
            run.log.panel(stage.number, stage.images, rows)
        if run.log and is_best:
            with written_whole(run.folder / "checkpoints" / "best") as temporary:
                header = {**run.header, "stage": stage.number, "images": stage.images, "val_mae": mae}
                checkpoint.save(network, temporary / MODEL, header)
    train_mode(stage)


def validation_slices(run: Run) -> list[tuple[PreparedCase, int]]:
    """The slices that every validation looks at, evenly spread over the validation cases."""
    every = slices_of(run.store, "val", run.config.data.min_foreground) or slices_of(run.store, "val")
    count = min(len(every), run.config.train.validation_slices)
    return [every[i] for i in np.linspace(0, len(every) - 1, count).round().astype(int)]


def synthesised(run: Run, network: torch.nn.Module, source_CHW: np.ndarray) -> np.ndarray:
    """What a network in eval mode makes of one slice: (1, H, W) float32."""
    with run.fabric.autocast():
        # `forward` is never the compiled network, which would be compiled anew for every size of image.
        return network.forward(torch.from_numpy(source_CHW)[None].to(run.fabric.device))[0].float().cpu().numpy()


def save(run: Run, stage: Stage) -> None:
    """Write `checkpoints/last` in the first process; none goes on before it is there."""
    if run.fabric.is_global_zero:
        run_folder.save_last(run.folder, lambda folder: write_stage(stage, run.header, folder))
        if run.log:
            run.log.summarise(peak_memory_mib=peak_memory_mib(run.fabric.device))
    run.fabric.barrier()


def log_steps(run: Run, stage: Stage, found: list[Terms], images_per_s: float) -> str:
    """Log the mean terms of these steps over all processes, the rates and the skipped steps; the terms as words."""
    values: dict[str, float] = {}
    if found:  # else every step was skipped
        means = torch.stack([torch.stack([*terms.values()]) for terms in found]).mean(dim=0)
        sums = summed(run.fabric, *means.tolist())
        values = {name: total / run.fabric.world_size for name, total in zip(found[0], sums, strict=True)}
    if run.log:
        rates = {"learning_rate": stage.optimizer.param_groups[0]["lr"], "images_per_s": images_per_s}
        run.log.numbers(stage.number, stage.images, {**values, **rates, "skipped_steps": stage.bad_steps})
    return "".join(f"{name} {value:.3g} · " for name, value in values.items())


def images_of(config: Config, number: int) -> int:
    """How many images a stage sees."""
    return getattr(config.train, f"stage{number}").num_images


def _due(run: Run, stage: Stage, every_images: int) -> bool:
    """Whether the last step crossed a multiple of `every_images`, or the stage is at its end."""
    return stage.images % every_images < run.config.train.batch_size or stage.images >= stage.settings.num_images


def _diverged(run: Run, stage: Stage, what: str, where: str, slices: list[tuple[PreparedCase, int]]) -> DataError:
    best = run.folder / "checkpoints" / "best" / MODEL
    names = ", ".join(f"{case.name} slice {index}" for case, index in slices)
    return DataError(
        f"{run.folder}: the {what} is not finite after {stage.images} images of stage {stage.number}, {where} on "
        f"{names}; look at these, or lower train.stage{stage.number}.learning_rate in a new --run-dir, perhaps with "
        f"--set train.init_from={best}"
    )


def _counts(store: Prepared) -> dict[str, object]:
    splits = ("train", "val", "test")
    return {
        "data_hash": store.data_hash,
        "num_slices": {split: len(slices_of(store, split)) for split in splits},
        "num_patients": {s: len({case.patient for case in store.cases if case.split == s}) for s in splits},
    }
