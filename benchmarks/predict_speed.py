"""Prediction speed, memory and agreement: every backend against the network as the published code runs it.

The reference is that code's way: eager, float32, default memory layout, one slice at a time. Weights are random, by a
fixed seed; the norms then take the statistics of noise and the head is made steep, so that values are as large as a
trained network's. Differences in HU (of a window of 3072 HU) are those of this network: in bfloat16 and int8 they are
hundreds of times those of a trained one (docs/prediction.md), in float32 much the same. Variants take turns in every
round, so that a machine that slows down slows all of them; large matrix products, which set the ceiling, stand among
them.

    python benchmarks/predict_speed.py --sizes 256,512 --batches 1,8,32 --rounds 10 --study 40
    python benchmarks/predict_speed.py --tiny --sizes 64 --batches 1,3 --rounds 3
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from seresvit.config import FusionSettings, ModelSettings, VitSettings
from seresvit.data import phantom
from seresvit.data.intensity import Intensity
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.model.precision import has_bf16
from seresvit.synthesis import backends
from seresvit.synthesis.export import library, sha256_of, traced, write_onnx
from seresvit.synthesis.quantise import quantised
from seresvit.training.processes import peak_memory_mib

WINDOW = Intensity("window", -1024.0, 2048.0, "HU")
EAGER, EAGER_CONCAT, INT8 = "eager, slice by slice", "torch, concat", "openvino-int8"
TINY = {"base_channels": 8, "vit": VitSettings(depth=2, width=32, heads=4, mlp_width=64)}
Table = list[list[str]]


def network(tiny: bool, kind: str = "se") -> Generator:
    """The network of the paper, or a tiny one, on the CPU in eval mode."""
    torch.manual_seed(0)
    settings = ModelSettings(token_grid=(16, 16), fusion=FusionSettings(kind=kind), **(TINY if tiny else {}))
    net = Generator(settings).train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net(torch.rand(1, 1, 256, 256) * 2 - 1)
        net.head.conv.weight *= 0.5 / net.head.conv.weight.std() / net.head.conv.weight[0].numel() ** 0.5
    return net.eval()


def saved(folder: Path, tiny: bool) -> Path:
    """A checkpoint of that network, as `seresvit predict` takes it."""
    header = {"data": {"window_hu": [-1024, 2048]}, "target_intensity": WINDOW.as_dict(), "target": "70keV"}
    checkpoint.save(network(tiny), folder / "model.safetensors", {**header, "sources": ["110keV"]})
    return folder / "model.safetensors"


def runner(variant: str, path: Path, device: torch.device, tiny: bool) -> backends.Run:
    """What a variant does with a batch."""
    if variant == EAGER_CONCAT:
        return backends.started("torch", network(tiny, "concat").to(device), device, "").run
    net = checkpoint.load(path, device)
    if variant == INT8:
        return int8_runner(net, path)
    if variant == EAGER:
        one = backends.started("torch", net, device, "").run
        return lambda source_BCHW: torch.cat([one(slice_1CHW) for slice_1CHW in source_BCHW.split(1)])
    return backends.started(variant, net, device, sha256_of(path)).run


def int8_runner(net: Generator, path: Path) -> backends.Run:
    """OpenVINO on the network in int8, scaled by noise like that which is timed; its error is noise's, too."""
    file, openvino = path.with_suffix(".int8.onnx"), library("openvino")
    if not file.is_file():
        noise = np.random.default_rng(0).uniform(-1, 1, (4, 1, 1, 256, 256)).astype(np.float32)
        write_onnx(quantised(traced(net, ""), list(noise)), file)
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", threads)
    return lambda source_BCHW: torch.from_numpy(compiled(source_BCHW.numpy())[0])


def matrix_product(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], object]:
    """A product of two large square matrices, which is as fast as this device gets."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    return lambda: a @ a


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each call, (rounds,), in an order that is drawn anew each round; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in np.random.default_rng(number).permutation(list(calls)):
            started_s = time.perf_counter()
            calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started_s)
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}


def flops_a_slice(size: int, tiny: bool) -> int:
    """FLOPs of convolutions and matrix products for one image; a multiply-add is two."""
    settings = ModelSettings(token_grid=(16, 16), **(TINY if tiny else {}))
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        Generator(settings).eval()(torch.empty(1, 1, size, size))
    return counter.get_total_flops()


def compared(asked: argparse.Namespace, path: Path, device: torch.device, size: int, batch: int) -> Table:
    """One row a variant; and what the SE gate costs, on stdout."""
    source_BCHW = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(1)).to(device) * 2 - 1
    runs, mib = {}, {}
    for name in (EAGER, *[EAGER_CONCAT] * ("torch" in asked.backends), *asked.backends):
        if device.type == "cpu":
            runs[name], mib[name] = runner(name, path, device, asked.tiny), alone_mib(asked, name, path, size, batch)
            continue
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runs[name] = runner(name, path, device, asked.tiny)
        runs[name](source_BCHW)
        mib[name] = str((torch.cuda.max_memory_allocated() - before) // 2**20)
    calls: dict[str, Callable[[], object]] = {name: (lambda run=run: run(source_BCHW)) for name, run in runs.items()}
    side = 512 if asked.tiny else 4096 if device.type == "cuda" else 2048
    products = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if has_bf16(device) else {})
    products |= {"float16": torch.float16} if device.type == "cuda" else {}
    calls |= {f"product {name}": matrix_product(device, dtype, side) for name, dtype in products.items()}
    seconds, expected = timed(calls, asked.rounds), runs[EAGER](source_BCHW)
    ceiling = {name: 2 * side**3 / float(np.median(seconds[f"product {name}"])) for name in products}
    print(f"{size}², batch {batch}: ceiling " + ", ".join(f"{n} {c / 1e9:.0f} GFLOP/s" for n, c in ceiling.items()))
    if "torch" in seconds:
        apart_ms = 1e3 * (seconds["torch"] - seconds[EAGER_CONCAT]) / batch
        print(f"{size}², batch {batch}: SE takes {interval(apart_ms)} ms a slice more than concat")
    rows, flops = [], flops_a_slice(size, asked.tiny)
    for name in runs:
        rate, faster = batch / seconds[name], seconds[EAGER] / seconds[name]
        precision = backends.PRECISIONS.get(name, "int8" if name == INT8 else "float32")
        share = f"{np.median(rate) * flops / ceiling[precision]:.0%}" if precision in ceiling else "–"
        apart_hu = (runs[name](source_BCHW) - expected).abs().mean(dim=(1, 2, 3)).max() * (3072 / 2)
        row = [
            f"{np.median(rate):.2f}",
            f"{rate.min():.2f} to {rate.max():.2f}",
            f"{1e3 * batch / np.median(rate):.0f}",
        ]
        row += [interval(faster), share, "–" if name == EAGER_CONCAT else f"{apart_hu:.2g}"]
        rows.append([f"{size}²", str(batch), name, *row, mib[name]])
        print(" · ".join(rows[-1]), flush=True)  # in case that it is stopped before the table
    return rows


def interval(values: np.ndarray) -> str:
    """The median and its 95 % bootstrap interval."""
    medians = np.median(np.random.default_rng(0).choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return f"{np.median(values):.2f} ({low:.2f} to {high:.2f})"


def alone_mib(asked: argparse.Namespace, variant: str, path: Path, size: int, batch: int) -> str:
    """The peak memory of a process that runs one batch of one variant twice."""
    words = ["--memory", variant, str(path), str(size), str(batch), "--device", "cpu", *["--tiny"] * asked.tiny]
    command = [sys.executable, __file__, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def peak_mib(asked: argparse.Namespace) -> int:
    """What `alone_mib` asks of a process of its own."""
    variant, path, size, batch = asked.memory[0], Path(asked.memory[1]), *map(int, asked.memory[2:])
    device = torch.device(asked.device)
    run = runner(variant, path, device, asked.tiny)
    for _ in range(2):
        run(torch.rand(batch, 1, size, size, device=device))
    return peak_memory_mib(device)


def studies(asked: argparse.Namespace, path: Path, folder: Path, size: int) -> Table:
    """Seconds of the whole command for one simulated DICOM series: with an empty cache, and the fastest of two more."""
    phantom.simulate(folder / "dicom", patients=1, slices=asked.study, size=size, kev=(110,))
    rows = []
    for backend in ("auto", *(name for name in asked.backends if name != INT8)):
        out = folder / f"{backend}-{size}"
        words = ["predict", path, folder / "dicom/110keV/P001", out, "--backend", backend, "--device", asked.device]
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / f"cache-{backend}-{size}")}
        taken = []
        for _ in range(3):
            started_s = time.perf_counter()
            command = [sys.executable, "-m", "seresvit", *map(str, words)]
            subprocess.run(command, env=environment, check=True, capture_output=True)
            taken.append(time.perf_counter() - started_s)
        rows.append([f"{size}²", str(asked.study), backend, f"{taken[0]:.1f}", f"{min(taken[1:]):.1f}"])
    return rows


def print_table(heads: str, rows: Table) -> None:
    """Markdown."""
    print(f"\n| {heads} |\n" + "|---" * len(heads.split("|")) + "|")
    print("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="256")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--backends", help=f"comma-separated, also {INT8}; default: torch and what auto tries")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of every backend; default: torch's, which OMP_NUM_THREADS decides")
    parser.add_argument("--study", type=int, default=0, help="slices of a whole study, disk to disk; 0: none")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
        os.environ["OMP_NUM_THREADS"] = str(asked.threads)  # for the processes that are started
    if asked.memory:
        print(peak_mib(asked))
        return
    device = torch.device(asked.device)
    default = dict.fromkeys(("torch", *reversed(backends.fastest_first(device))))
    asked.backends = asked.backends.split(",") if asked.backends else list(default)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {device.type} {machine}, {torch.get_num_threads()} threads\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        path, sizes = saved(folder, asked.tiny), [int(size) for size in asked.sizes.split(",")]
        pairs = [(size, int(batch)) for size in sizes for batch in asked.batches.split(",")]
        rows = [row for size, batch in pairs for row in compared(asked, path, device, size, batch)]
        heads = "size | batch | variant | slices/s | range | ms a batch | times eager (95 %) | of ceiling"
        print_table(f"{heads} | mean apart, HU | peak MiB", rows)
        if asked.study:
            rows = [row for size in sizes for row in studies(asked, path, folder, size)]
            print_table("size | slices | backend | first run, s | later runs, s", rows)


if __name__ == "__main__":
    main()
