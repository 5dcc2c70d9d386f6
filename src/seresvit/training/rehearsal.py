"""What `train` would do, found out by two real steps of each stage; nothing is kept of them but a picture."""

import math
import time
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from seresvit.config import Config, to_yaml
from seresvit.data.prepared import slices_of
from seresvit.data.volume import written_whole
from seresvit.training.processes import peak_memory_mib, precision_of, start_processes
from seresvit.training.run import pictured
from seresvit.training.stage import start_stage, train_mode
from seresvit.training.train import Run, images_of, load, open_run, step

PICTURE = "first-batch.png"


def rehearse(config: Config, manifest: Path, run_dir: Path) -> str:
    """Settings, networks' sizes, slices, memory and time, as text; `run_dir` then holds a picture of the first batch.

    Raises as `train` would, also for a run folder of other settings.
    """
    fabric = start_processes(config)
    with fabric.rank_zero_first():
        run = open_run(config, manifest, run_dir, fabric)
    lines = [to_yaml(config)]
    total_s = 0.0
    for number in (1, 2):
        if images_of(config, number):
            count, step_s = _rehearsed(run, number)
            stage_s = step_s * math.ceil(images_of(config, number) / config.train.batch_size)
            total_s += stage_s
            lines.append(
                f"stage {number}: {count:,} parameters, {images_of(config, number):,} images, "
                f"{config.train.batch_size / step_s:.2f} images/s, {_words(stage_s)}"
            )
    counts = (f"{len(slices_of(run.store, s, config.data.min_foreground)):,} {s}" for s in ("train", "val"))
    lines.append(
        f"slices: {', '.join(counts)}; precision {precision_of(config)}, {fabric.world_size} × {fabric.device.type}"
    )
    lines.append(f"about {_words(total_s)} without validation; memory {peak_memory_mib(fabric.device):,} MiB a process")
    lines.append(f"first batch, source and target: {run_dir / PICTURE}")
    return "\n".join(lines)


def _rehearsed(run: Run, number: int) -> tuple[int, float]:
    """Parameters of the stage's network, and how long its second step took, in seconds."""
    stage = start_stage(run.fabric, run.config, number, None)
    train_mode(stage)
    step_s = 0.0
    for source, target, *mask_weights in islice(load(run, stage), 2):
        if run.fabric.is_global_zero:
            rows = [
                (*images, *targets) for images, targets in zip(source.cpu().numpy(), target.cpu().numpy(), strict=True)
            ]
            with written_whole(run.folder / PICTURE) as temporary:
                Image.fromarray(pictured(rows)).save(temporary)
        started_s = time.monotonic()
        step(run, stage, source, target, *mask_weights)
        if run.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        step_s = time.monotonic() - started_s
    return sum(parameter.numel() for parameter in stage.generator.parameters()), step_s


def _words(seconds: float) -> str:
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
