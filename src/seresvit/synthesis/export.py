"""A checkpoint as one file for other runtimes: ONNX, or OpenVINO's .xml and .bin.

The file takes any batch, height and width: reflected padding, cropping and the resizing of the position grid are in its
graph. It carries the intensity rules and the whole header of the checkpoint, so that nothing else is needed to use it.
It is compared with torch before it is written, and not written when it differs.
"""

import hashlib
import importlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from seresvit.config import ConfigError, DataSettings
from seresvit.data.volume import DataError, written_whole
from seresvit.model import checkpoint
from seresvit.model.generator import Generator

Run = Callable[[np.ndarray], np.ndarray]

SOURCE, SYNTHETIC = "source", "synthetic"
# The largest share of the output's own largest value by which a file may differ from torch, both in float32.
AGREEMENT = 1e-4
OPSET = 18
# The layers that pass the image on or scale it rather than adding to it, about a twentieth of all work; `.` is a dot in
# the names of modules and a slash in those of the graph. They stay in float32. In bfloat16 those that pass it on cost
# several HU, and the gates more than all the layers that add: an error of 0.2 % in a gate is 0.2 % of what it lets
# through, at every pixel alike.
CARRIERS = r"stem|encode|decode|head|art_\d.fuse|art_\d.compress.skip"


def export(source: Path, out: Path) -> None:
    """Write the network of the checkpoint `source` as `out`: .onnx, or .xml with its .bin beside it.

    Input `source` (B, C_in, H, W) float32 in [-1, 1], output `synthetic` (B, C_out, H, W); B from 1, H and W from 2.
    Raises ConfigError for another suffix or without the extra, CheckpointError for an unusable checkpoint, and
    DataError when the file would not give what torch gives.
    """
    check_export(out)
    network = checkpoint.load(source)
    write(traced(network, sha256_of(source)), out, lambda run: verify(network, run, out))


def check_export(out: Path) -> None:
    """Raises ConfigError for a name that tells no format, and without the extra."""
    if out.suffix not in (".onnx", ".xml"):
        raise ConfigError(f"{out}: expected a name that ends in .onnx or .xml")
    for name in ("onnx", "openvino" if out.suffix == ".xml" else "onnxruntime"):
        library(name)


def write(onnx_model: Any, out: Path, check: Callable[[Run], None]) -> None:
    """Write an onnx.ModelProto as `out`, when `check` finds no fault with what it gives in that format's runtime."""
    if out.suffix == ".onnx":
        session = library("onnxruntime").InferenceSession(onnx_model.SerializeToString())
        check(lambda source_BCHW: session.run(None, {SOURCE: source_BCHW})[0])
        write_onnx(onnx_model, out)
        return
    openvino = library("openvino")
    core = openvino.Core()
    model = core.read_model(io.BytesIO(onnx_model.SerializeToString()))
    for entry in onnx_model.metadata_props:
        model.set_rt_info(entry.value, ["seresvit", entry.key])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    check(lambda source_BCHW: compiled(source_BCHW)[0])
    # The .xml, which people open, comes last: it is there only when its weights are.
    with written_whole(out) as temporary, written_whole(out.with_suffix(".bin")) as temporary_bin:
        openvino.save_model(model, temporary, compress_to_fp16=False)
        os.replace(temporary.with_suffix(".bin"), temporary_bin)


def write_onnx(model: Any, out: Path) -> None:
    """Write an onnx.ModelProto, whole or not at all."""
    with written_whole(out) as temporary:
        temporary.write_bytes(model.SerializeToString())


def sha256_of(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library(name: str) -> Any:
    """The module of the extra `export` with that name. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f'{name} is not installed; pip install "seresvit[export]"') from None


def folded(network: Generator) -> Generator:
    """A copy of a network in eval mode whose batch norms are part of the convolutions before them.

    Instance and group norm depend on the image and stay.
    """
    copy = deepcopy(network)
    for layers in copy.modules():
        norm, conv = getattr(layers, "norm", None), getattr(layers, "conv", None)
        if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
            layers.conv = fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, nn.ConvTranspose2d))
            layers.norm = nn.Identity()
    return copy


def adding(network: nn.Module) -> list[nn.Module]:
    """The convolutions and matrix products that are not CARRIERS: what may be computed in fewer bits."""
    products = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
    layers = network.named_modules()
    return [layer for name, layer in layers if isinstance(layer, products) and not re.match(CARRIERS, name)]


def in_bfloat16(network: Generator) -> Generator:
    """The network, changed in place: what is `adding` multiplies in bfloat16 and takes and gives float32.

    The casts are part of the graph, where a runtime finds them that knows of carriers nothing.
    """
    for layer in adding(network):
        layer.bfloat16()
        layer.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
        layer.register_forward_hook(lambda _, given, product: product.float())
    return network


def traced(network: Generator, checkpoint_sha256: str, precision: str = "float32") -> Any:
    """The network as an onnx.ModelProto: batch norm folded, batch, height and width free, metadata inside.

    In `precision` "bfloat16" it is `in_bfloat16`, which OpenVINO runs and ONNX Runtime does not.
    By torch's tracing exporter: the newer one takes ten times as long for the same graph and two more libraries.
    """
    onnx = library("onnx")
    stride, buffer = network.settings.stride, io.BytesIO()
    # No size is a multiple of the stride, no token grid the learned one and no two sizes are equal.
    example_BCHW = torch.zeros(2, network.settings.in_channels, 2 * stride + 3, 3 * stride + 5)
    copy = folded(network).cpu()
    free = {0: "batch", 2: "height", 3: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is the older exporter, and of its optional constant folding
        torch.onnx.export(
            in_bfloat16(copy) if precision == "bfloat16" else copy,
            (example_BCHW,),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            input_names=[SOURCE],
            output_names=[SYNTHETIC],
            dynamic_axes={SOURCE: free, SYNTHETIC: free},
            opset_version=OPSET,
        )
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, {**metadata(network, checkpoint_sha256), "precision": precision})
    return model


def metadata(network: Generator, checkpoint_sha256: str) -> dict[str, str]:
    """What a file says of itself: plain text, or JSON where it is more than a word.

    `intensity_source` and `intensity_target` are the rules between the image's own unit and [-1, 1]: `low` and `high`
    become -1 and 1. Those of an MR source are each volume's own, found as `seresvit` (the header) says.
    """
    header, data = network.header, DataSettings.model_validate(network.header.get("data", {}))
    target = header.get("target_intensity") or _rule(data.intensity.target, data)
    return {
        "seresvit": json.dumps(header),
        "intensity_source": json.dumps(_rule(data.intensity.source, data)),
        "intensity_target": json.dumps(target),
        "target": header.get("target", ""),
        "channels": json.dumps({"sources": data.channels, "context_slices": data.context_slices}),
        "input": "source: (batch, channels, height, width) float32 in [-1, 1]; height and width from 2 pixels",
        "output": "synthetic: (batch, channels, height, width) float32 in [-1, 1]",
        "checkpoint_sha256": checkpoint_sha256,
        "precision": "float32",
    }


def _rule(kind: str, data: DataSettings) -> dict[str, Any]:
    """An intensity rule as `Intensity.as_dict` has it where its bounds are fixed, else with what they are taken by."""
    if kind == "window":
        return {"kind": kind, "low": data.window_hu[0], "high": data.window_hu[1], "unit": "HU"}
    if kind == "uint8":
        return {"kind": kind, "low": 0.0, "high": 255.0, "unit": "uint8"}
    limit = "zscore_limit" if kind == "zscore" else "percentile"
    return {"kind": kind, limit: getattr(data, limit)}


def verify(network: Generator, run: Run, out: Path) -> None:
    """Compares `run` (array → array) with the network in torch, on the learned size and on unequal and small ones.

    Raises DataError for the first that differs by more than AGREEMENT of the output's largest value.
    """
    stride, rows_columns = network.settings.stride, network.settings.token_grid or (4, 4)
    learned = [stride * side for side in rows_columns]
    generator = torch.Generator().manual_seed(0)
    for size in ([1, *learned], [3, stride + 5, 2 * stride - 3], [2, 3 * stride, 2 * stride], [1, 3, 2 * stride + 1]):
        batch, height, width = size
        shape = (batch, network.settings.in_channels, height, width)
        source_BCHW = torch.rand(shape, generator=generator) * 2 - 1
        with torch.inference_mode():
            expected = network(source_BCHW).numpy()
        found = run(source_BCHW.numpy())
        if found.shape != expected.shape:
            raise DataError(f"{out}: gives {list(found.shape)} for {list(shape)}; nothing was written")
        difference, allowed = np.abs(found - expected).max(), AGREEMENT * np.abs(expected).max()
        if not difference <= allowed:
            raise DataError(
                f"{out}: differs from torch by {difference:.2g} for {batch} images of {height}×{width}, "
                f"more than {allowed:.2g}; nothing was written"
            )
