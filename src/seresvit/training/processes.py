"""The processes that train together: device and precision of each, what stops them, what they run on."""

import os
import platform
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from seresvit.config import Config, ConfigError
from seresvit.model.precision import has_bf16


class Stopped(KeyboardInterrupt):
    """A signal stopped the run; all is saved, and the same command goes on. `signal` is its number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def start_processes(config: Config) -> Fabric:
    """Fabric on the device of this process; under torchrun joined with all others. Raises ConfigError.

    A step sees `train.batch_size` images whatever the number of processes: each takes its share of them, in
    `train.accumulate` parts.
    """
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if config.train.batch_size % (world * config.train.accumulate):
        raise ConfigError(
            f"train.batch_size is {config.train.batch_size}, the images of one step; set it to a multiple of "
            f"{world * config.train.accumulate} ({world} processes × train.accumulate {config.train.accumulate})"
        )
    # Without broadcast: between the two passes of the discriminator it would change what their backward pass needs.
    # From torch 2.13 on it has another name too, and warns of this one.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    # The time is that for which the others wait while the first process prepares the store.
    together = DDPStrategy(broadcast_buffers=False, timeout=timedelta(hours=12))
    fabric = Fabric(
        accelerator="auto",
        devices=local,
        num_nodes=world // local,
        strategy=together if world > 1 else "auto",
        precision=precision_of(config),
    )
    fabric.launch()
    fabric.seed_everything(config.train.seed, verbose=False)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    return fabric


def precision_of(config: Config) -> Any:
    """Fabric's name for the precision to compute in."""
    if config.train.precision != "auto":
        return config.train.precision
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16-mixed" if has_bf16(device) else "32-true"


@contextmanager
def signals_caught() -> Iterator[list[int]]:
    """A list that the first SIGTERM or SIGINT adds its number to, instead of ending the process as the second does."""
    caught: list[int] = []

    def catch(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(number, handlers[number])

    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # only there can handlers be set
        handlers = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def readers(device: torch.device) -> int:
    """How many processes read images ahead: none where the CPU trains, else this GPU's share of the cores, up to 16."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def ignore_signals(_worker: int = 0) -> None:
    """For a process that reads images: it ends with the one that reads from it, which is told to stop itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def summed(fabric: Fabric, *numbers: float) -> list[float]:
    """The sum over all processes of each number, the same in all of them."""
    if fabric.world_size == 1:
        return [*numbers]
    total = fabric.all_reduce(torch.tensor(numbers), reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total.tolist()


def machine(fabric: Fabric) -> dict[str, Any]:
    """What the processes compute on: no host, no user."""
    on_gpu = fabric.device.type == "cuda"
    return {
        "device": fabric.device.type,
        "device_name": torch.cuda.get_device_name() if on_gpu else _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "processes": fabric.world_size,
    }


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    described = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", described.read_text(encoding="utf-8")) if described.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def peak_memory_mib(device: torch.device) -> int:
    """The most memory held at a time by this process: of its GPU, else of the system."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # of this process alone; getrusage counts what the one that started it held, too
        held = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        return int(held[1]) // 2**10 if held else 0
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
