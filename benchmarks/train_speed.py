"""Training speed and peak memory: our step against a plain one of the same network, and SE against concat.

The plain step is written as the published code has it: eager, float32, default memory layout; generator forward, both
passes of the discriminator, a generator loss through a discriminator whose gradients are computed too, Adam one tensor
at a time. Variants take turns within every round, so that a machine that slows down slows all of them. Printed are the
medians and ranges of images a second, the peak memory of one variant alone (of its process, or on the GPU), and for
pairs of variants the median of the ratios of their step times with its 95 % bootstrap interval.

    python benchmarks/train_speed.py --sizes 256,512 --batches 1,8,32 --rounds 30
    python benchmarks/train_speed.py --tiny --sizes 128 --batches 4
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from seresvit.config import Config, load_config
from seresvit.data.intensity import Intensity
from seresvit.model.discriminator import Discriminator
from seresvit.training.processes import peak_memory_mib, precision_of, start_processes
from seresvit.training.stage import stage_network, start_stage, train_mode
from seresvit.training.train import Run, step

TINY = [
    "model.base_channels=16",
    "model.vit={depth: 4, width: 128, heads: 4, mlp_width: 256}",
    "train.discriminator_channels=16",
]
PAIRS = (
    ("plain", "ours", "plain step / our step"),
    ("ours", "ours, concat", "SE / concat"),
    ("ours, contiguous", "ours", "channels first / channels last"),
)


def settings(variant: str, size: int, batch: int, tiny: bool) -> Config:
    """The settings of a variant: the full-size network of stage 2, or that of configs/tiny.yaml."""
    changes = [
        *(TINY if tiny else []),
        f"model.fusion.kind={'concat' if 'concat' in variant else 'se'}",
        f"train.size={size}",
        f"train.batch_size={batch}",
        f"train.compile={'compiled' in variant}",
        f"train.precision={'32-true' if variant == 'plain' else 'auto'}",
    ]
    return load_config(None, changes)


def stepper(variant: str, size: int, batch: int, tiny: bool) -> Callable[[], object]:
    """A function that does one training step of the variant on a random batch and waits for its end."""
    config = settings(variant, size, batch, tiny)
    fabric = start_processes(config)
    source, target = (torch.rand(batch, 1, size, size, device=fabric.device) * 2 - 1 for _ in range(2))
    if variant == "plain":
        return plain(config, source, target)
    run = Run(config, SimpleNamespace(), None, fabric, {}, Intensity("window", -1024.0, 3071.0, "HU"))
    stage = start_stage(fabric, config, 2, None)
    if "contiguous" in variant:
        for network in (stage.generator.module, stage.discriminator.module):
            network.to(memory_format=torch.contiguous_format)
    train_mode(stage)
    return lambda: step(run, stage, source, target)


def plain(config: Config, source: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
    """The published order of work (`optimize_parameters` of pix2pix, which ResViT kept), eager and in float32."""
    generator = stage_network(config, 2).to(source.device).train()
    discriminator = Discriminator(2, config.train.discriminator_channels).to(source.device).train()
    of_generator, of_discriminator = (
        torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.5, 0.999), foreach=False, fused=False)
        for network in (generator, discriminator)
    )

    def judged(image: torch.Tensor, wanted: float) -> torch.Tensor:
        score = discriminator(torch.cat([source, image], dim=1))
        return F.mse_loss(score, torch.full_like(score, wanted))

    def one_step() -> float:
        synthetic = generator(source)
        of_discriminator.zero_grad()
        ((judged(synthetic.detach(), 0.0) + judged(target, 1.0)) / 2).backward()
        of_discriminator.step()
        of_generator.zero_grad()
        loss = judged(synthetic, 1.0) + 100 * F.l1_loss(synthetic, target)
        loss.backward()
        of_generator.step()
        return loss.item()

    return one_step


def measured(asked: argparse.Namespace, size: int, batch: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Seconds a step of each variant, (rounds,), after two rounds that warm up; and the peak MiB of each.

    A variant without seconds is one that the GPU has no room for beside those before it.
    """
    steppers, mib = {}, {}
    for variant in asked.variants.split(";"):
        if not torch.cuda.is_available():
            steppers[variant] = stepper(variant, size, batch, asked.tiny)
            mib[variant] = alone_mib(variant, size, batch, asked.tiny)
            continue
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            one_step = stepper(variant, size, batch, asked.tiny)
            one_step(), one_step()
            steppers[variant], peak = one_step, torch.cuda.max_memory_allocated()
            mib[variant] = str((peak - before) // 2**20)
        except torch.OutOfMemoryError:
            mib[variant] = "no room"
    seconds: dict[str, list[float]] = {variant: [] for variant in steppers}
    for number in range(asked.rounds + 2):
        for variant in np.random.default_rng(number).permutation(list(steppers)):
            started_s = time.perf_counter()
            steppers[variant]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[variant].append(time.perf_counter() - started_s)
    return {variant: np.array(taken[2:]) for variant, taken in seconds.items()}, mib


def alone_mib(variant: str, size: int, batch: int, tiny: bool) -> str:
    """The peak memory of a process that does two steps of one variant."""
    command = [sys.executable, __file__, "--memory", variant, str(size), str(batch), *["--tiny"] * tiny]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def paired(one: np.ndarray, other: np.ndarray) -> str:
    """The median of the paired ratios one / other, and its 95 % bootstrap interval."""
    ratios = one / other
    medians = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return f"{np.median(ratios):.3f} (95 % {low:.3f} to {high:.3f})"


def main() -> None:
    """Print one row a variant, as Markdown, and the paired comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="256")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=20)
    more = "also 'ours, compiled' and 'ours, contiguous'"
    parser.add_argument("--variants", default="plain;ours;ours, concat", help=more)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory:
        variant, size, batch = asked.memory[0], *map(int, asked.memory[1:])
        one_step = stepper(variant, size, batch, asked.tiny)
        for _ in range(2):
            one_step()
        print(peak_memory_mib(start_processes(settings(variant, size, batch, asked.tiny)).device))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}; our precision {precision_of(load_config(None))}\n")
    print("| size | batch | variant | images/s, median | range | peak MiB |\n" + "|---" * 6 + "|")
    for size in map(int, asked.sizes.split(",")):
        for batch in map(int, asked.batches.split(",")):
            seconds, mib = measured(asked, size, batch)
            for variant, held in mib.items():
                rate = batch / seconds[variant] if variant in seconds else np.array([])
                row = [f"{np.median(rate):.2f}", f"{rate.min():.2f} to {rate.max():.2f}"] if rate.size else ["–", "–"]
                print("| " + " | ".join([str(size), str(batch), variant, *row, held]) + " |", flush=True)
            for one, other, words in PAIRS:
                if {one, other} <= seconds.keys():
                    print(f"{size}, batch {batch}: {words} {paired(seconds[one], seconds[other])}", flush=True)


if __name__ == "__main__":
    main()
