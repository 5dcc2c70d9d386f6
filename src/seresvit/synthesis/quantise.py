"""An exported network in 8-bit integers: smaller, faster where the processor multiplies them, and less exact.

Post-training quantisation: scales come from the values that the network takes on given images; no weight is trained.
What it costs is measured on other slices of those images, and a file that costs too much is not written.
"""

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seresvit.config import ConfigError
from seresvit.data import read_volume
from seresvit.data.intensity import Intensity
from seresvit.data.pair import load_sources
from seresvit.data.pairing import Case, load_channels, read_manifest
from seresvit.data.volume import DataError
from seresvit.synthesis.backends import RANGE_HU
from seresvit.synthesis.export import CARRIERS, SOURCE, Run, check_export, library, traced, write
from seresvit.synthesis.predictor import Predictor

# Slices that scales are taken from, and as many that the error is measured on, spread evenly over the images.
NUM_SLICES = 32
# The largest mean difference from torch in float32, in HU; in another unit the same share of the range as of 4000 HU.
MOST_HU = 2.0


def export_int8(
    source: Path, out: Path, images: Path, tissues_hu: Mapping[str, tuple[float, float]], split: str = "train"
) -> dict[str, float]:
    """Write `export`'s file with convolutions and matrix products in int8; its mean absolute error by tissue.

    `images` is a manifest, of which `split` counts, or one image or series. The error is that against torch in float32,
    in the target's unit: of `all` voxels, and in HU of those whose float32 value lies in each of `tissues_hu`. Raises
    as `export` does, and DataError when the error of `all` is more than MOST_HU.
    """
    check_export(out)
    predictor = Predictor(source, "cpu")
    slices, target = _spread(predictor, images, split)
    float_model = traced(predictor.net, predictor.checkpoint_sha256)
    model, errors = quantised(float_model, slices[::2]), {}

    def check(run: Run) -> None:
        errors.update(_errors(predictor, run, slices[1::2], target, tissues_hu))
        most = MOST_HU if target.unit == "HU" else MOST_HU * (target.high - target.low) / RANGE_HU
        if not errors["all"] <= most:
            found = ", ".join(f"{name} {error:.2f}" for name, error in errors.items())
            raise DataError(f"{out}: int8 is off by {found} {target.unit} in the mean, more than {most:g}; not written")

    write(model, out, check)
    return errors


def _spread(predictor: Predictor, images: Path, split: str) -> tuple[list[np.ndarray], Intensity]:
    """At most 2 · NUM_SLICES inputs (1, C, H, W), evenly spread, and the intensity rule of the target."""
    groups: list[tuple[Case, ...]] = [()]
    if images.suffix == ".csv":
        cases = [case for case in read_manifest(images) if split in ("all", case.split)]
        groups = load_channels(cases, predictor.data.channels)
        groups = groups[:: -(-len(groups) // (2 * NUM_SLICES)) or 1]
    slices: list[np.ndarray] = []
    for group in groups:
        trained = predictor.as_trained(*(load_sources(group, predictor.data) if group else [read_volume(images)]))
        num_slices = len(trained[0].array)
        count = min(num_slices, max(2 * NUM_SLICES // len(groups), 1))
        # The middles of as many equal parts: the ends of a volume show the least of the body.
        wanted = ((np.arange(count) + 0.5) * num_slices / count).astype(int).tolist()
        slices += [one.numpy() for batch in predictor.batches(*trained, of=wanted) for one in batch.split(1)]
    if len(slices) < 2:
        raise ConfigError(f"{images}: int8 needs at least 2 slices, found {len(slices)}; give more images")
    return slices, predictor.target_intensity(trained[0])


def quantised(float_model: Any, slices: list[np.ndarray]) -> Any:
    """The ModelProto with scales for weights (each output channel) and activations (the range in these slices)."""
    onnx, quantization = library("onnx"), library("onnxruntime.quantization")

    kept = re.compile(rf"/({CARRIERS})/")

    class Slices(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(slices)

        def get_next(self) -> dict[str, np.ndarray] | None:
            one = next(self.left, None)
            return None if one is None else {SOURCE: one}

    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "int8.onnx")
        logging.disable(logging.WARNING)  # that ours is not preprocessed, which free sizes forbid
        quantization.quantize_static(
            float_model,
            written,
            Slices(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "ConvTranspose", "MatMul"],
            per_channel=True,
            nodes_to_exclude=[node.name for node in float_model.graph.node if kept.match(node.name)],
        )
        logging.disable(logging.NOTSET)
        model = onnx.load(written)
    facts = {entry.key: entry.value for entry in float_model.metadata_props}
    onnx.helper.set_model_props(model, {**facts, "precision": "int8"})
    return model


def _errors(
    predictor: Predictor,
    run: Run,
    slices: list[np.ndarray],
    target: Intensity,
    tissues_hu: Mapping[str, tuple[float, float]],
) -> dict[str, float]:
    """Mean absolute difference from torch in float32, of all voxels and of each tissue that there is."""
    with torch.inference_mode():
        expected = [target.restore(predictor.net(torch.from_numpy(one)).numpy()).ravel() for one in slices]
    exact = np.concatenate(expected)
    apart = np.abs(np.concatenate([target.restore(run(one)).ravel() for one in slices]) - exact)
    errors = {"all": float(apart.mean())}
    for name, (low, high) in tissues_hu.items() if target.unit == "HU" else ():
        inside = (exact > low) & (exact <= high)
        if inside.any():
            errors[name] = float(apart[inside].mean())
    return errors
