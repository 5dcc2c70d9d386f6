"""What runs the network: torch, OpenVINO or ONNX Runtime; and whether what it gives is what torch gives in float32.

A backend is a function from a batch (B, C, H, W) float32 in [-1, 1] to (B, C_out, H, W) float32. Plain torch in float32
is the reference of all others.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seresvit import __version__
from seresvit.config import ConfigError
from seresvit.data.intensity import Intensity
from seresvit.data.volume import DataError
from seresvit.model.cuda_graph import recorded
from seresvit.model.generator import Generator
from seresvit.model.precision import has_bf16
from seresvit.synthesis.export import CARRIERS, SOURCE, adding, folded, library, traced, write_onnx

Run = Callable[[torch.Tensor], torch.Tensor]

# Each with the precision of its convolutions and matrix products.
PRECISIONS = {
    "torch": "float32",
    "torch-fp16": "float16",
    "torch-bf16": "bfloat16",
    "torch-compiled": "float32",
    "torch-compiled-bf16": "bfloat16",
    "openvino": "float32",
    "openvino-bf16": "bfloat16",
    "onnxruntime": "float32",
}
# The largest mean and the largest single difference from torch in float32 that a slice may have, in HU; in another unit
# the same share of the target's range as of 4000 HU.
MEAN_HU, LARGEST_HU, RANGE_HU = 0.5, 10.0, 4000.0


@dataclass(frozen=True)
class Backend:
    """One way to run one network on one machine."""

    name: str
    version: str
    run: Run


def fastest_first(device: torch.device) -> list[str]:
    """The backends that `auto` tries, those that are installed and that this machine's processor has arithmetic for.

    The order is a rule and not a race, so that a study gives the same image today and tomorrow;
    `benchmarks/predict_speed.py` says whether it holds on a machine. Compiled torch is not among them: it compiles for
    longer than most studies take.
    """
    if device.type == "cuda":
        names = ["torch-fp16", "torch-bf16", "torch"]
    else:
        names = ["openvino-bf16", "torch-bf16", "openvino", "onnxruntime", "torch"]
    return [name for name in names if _installed(name) and (has_bf16(device) or PRECISIONS[name] != "bfloat16")]


def _installed(name: str) -> bool:
    runtime = name.removesuffix("-bf16")
    return name.startswith("torch") or all(importlib.util.find_spec(module) for module in ("onnx", runtime))


def check(name: str, device: torch.device, norm_statistics: str) -> None:
    """Raises ConfigError for a backend that is unknown, not installed, or not for this device or normalisation."""
    if name != "auto" and name not in PRECISIONS:
        raise ConfigError(f"--backend {name}: expected auto, {', '.join(PRECISIONS)}")
    if norm_statistics == "image" and name not in ("auto", "torch"):
        raise ConfigError(f"--backend {name}: --norm-statistics image needs --backend torch")
    if name.startswith(("openvino", "onnxruntime")):
        library("onnx")
        library(name.removesuffix("-bf16"))
        if device.type != "cpu":
            raise ConfigError(f"--backend {name}: runs on the CPU; add --device cpu, or use --backend torch-bf16")
    if name == "torch-fp16" and device.type != "cuda":
        raise ConfigError(f"--backend {name}: needs a GPU; use --backend torch-bf16")
    if name == "openvino-bf16" and not _openvino_has_bf16():
        raise ConfigError(f"--backend {name}: this processor has no bfloat16 arithmetic; use --backend openvino")


def _openvino_has_bf16() -> bool:
    return "BF16" in library("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def started(name: str, network: Generator, device: torch.device, checkpoint_sha256: str) -> Backend:
    """The backend of that name, ready to run `network`, which is left as it is.

    Raises ConfigError without the extra, DataError for a network that cannot be exported.
    """
    threads = torch.get_num_threads()
    if name == "openvino" or name == "openvino-bf16":
        openvino = library("openvino")
        model = exported(network, checkpoint_sha256, PRECISIONS[name])
        # What is bfloat16 in the graph stays so; the hint "bf16" would round the carriers too.
        precision = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        cached = {"CACHE_DIR": str(cache_folder() / "openvino"), "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(model, "CPU", precision | cached)
        run: Run = lambda source_BCHW: torch.from_numpy(compiled(source_BCHW.numpy())[0])  # noqa: E731
        return Backend(name, f"openvino {openvino.__version__}", run)
    if name == "onnxruntime":
        onnxruntime = library("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(exported(network, checkpoint_sha256), options)
        run = lambda source_BCHW: torch.from_numpy(session.run(None, {SOURCE: source_BCHW.numpy()})[0])  # noqa: E731
        return Backend(name, f"onnxruntime {onnxruntime.__version__}", run)
    return Backend(name, f"torch {torch.__version__}", _torch_run(name, network, device))


def together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What is recorded of several checkpoints that were averaged, each with a backend of its own; one is as it is.

    Different names are joined by "+", parity is the worst of all, and `member_backends` tells which checkpoint, in the
    order of `members`, ran on what.
    """
    if len(records) == 1:
        return records[0]
    joined = {
        key: "+".join(dict.fromkeys(str(record[key]) for record in records))
        for key in ("backend", "precision", "backend_version")
    }
    parities = [record["parity"] for record in records if record["parity"]]
    worst = {key: max(parity[key] for parity in parities) for key in parities[0]} if parities else None
    dropped = dict.fromkeys(line for record in records for line in record["dropped"])
    told = {"parity": worst, "dropped": list(dropped), "member_backends": [record["backend"] for record in records]}
    return joined | told


def _torch_run(name: str, network: Generator, device: torch.device) -> Run:
    if name == "torch":
        return torch.inference_mode()(lambda source_BCHW: network(source_BCHW))
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(PRECISIONS[name])
    net = folded(network)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if half:
        for layer in adding(net):
            layer.to(half)
        for address, module in list(net.named_modules()):
            if re.fullmatch(CARRIERS, address):
                net.set_submodule(address, InFloat32(module))
    call: Callable[[torch.Tensor], torch.Tensor] = net
    if name.startswith("torch-compiled"):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "torch"))
        call = torch.compile(net)

    @torch.inference_mode()
    def run(source_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
            return call(source_BCHW.contiguous(memory_format=torch.channels_last)).float()

    return replayed(run) if device.type == "cuda" else run


def replayed(run: Run) -> Run:
    """`run` as a CUDA graph, recorded for the first batch, and anew for other sizes of images and larger batches."""
    replay: Run | None = None
    most, size = 0, torch.Size()

    @torch.inference_mode()
    def replay_batch(source_BCHW: torch.Tensor) -> torch.Tensor:
        nonlocal replay, most, size
        count = len(source_BCHW)
        if replay is None or source_BCHW.shape[1:] != size or count > most:
            replay = None  # its memory first
            replay, most, size = recorded(run, source_BCHW), count, source_BCHW.shape[1:]
        # The last batch of a study is filled up with copies of its last slice.
        filling_BCHW = source_BCHW[-1:].expand(most - count, -1, -1, -1)
        return replay(torch.cat([source_BCHW, filling_BCHW]))[:count].clone()

    return replay_batch


class InFloat32(nn.Module):
    """The module outside of autocast."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """What the module gives for the features in float32."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return self.module(x_BCHW.float())


def exported(network: Generator, checkpoint_sha256: str, precision: str = "float32") -> Path:
    """The network as ONNX in the cache folder, written when it is not yet there."""
    path = cache_folder() / f"{checkpoint_sha256[:16]}-{precision}-{__version__}-torch{torch.__version__}.onnx"
    if not path.is_file():
        write_onnx(traced(network, checkpoint_sha256, precision), path)
    return path


def cache_folder() -> Path:
    """Where exported and compiled networks are kept from one run to the next; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seresvit"


def parity(backend: Backend, network: Generator, source_BCHW: torch.Tensor, target: Intensity) -> dict[str, float]:
    """`mean` (of the worst slice) and `largest` difference from torch in float32, in the target's unit.

    Raises DataError when one of them is more than a backend may have.
    """
    with torch.inference_mode():
        apart_BCHW = (backend.run(source_BCHW) - network(source_BCHW)).abs() * ((target.high - target.low) / 2)
    mean, largest = float(apart_BCHW.mean(dim=(1, 2, 3)).max()), float(apart_BCHW.max())
    share = 1.0 if target.unit == "HU" else (target.high - target.low) / RANGE_HU
    if not (mean <= MEAN_HU * share and largest <= LARGEST_HU * share):  # not a number fails too
        unit = target.unit if target.unit == "HU" else "of its values"
        raise DataError(
            f"differs from torch in float32 by {mean:.3g} {unit} in the mean and {largest:.3g} at most, "
            f"more than {MEAN_HU * share:.3g} and {LARGEST_HU * share:.3g}"
        )
    return {"mean": mean, "largest": largest}
