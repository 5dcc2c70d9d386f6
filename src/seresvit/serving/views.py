"""What the page shows of a finished job: small NIfTI images, the gates of every slice, and the page's own files."""

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from skimage.transform import downscale_local_mean

from seresvit.data.nifti import FLIP_XY
from seresvit.data.volume import Unit, Volume, written_whole
from seresvit.evaluation.gates import BRANCHES, highest_gate, read_gates
from seresvit.evaluation.tissues import BODY_ABOVE_HU, WINDOWS_HU
from seresvit.model.fusion import record_gates
from seresvit.synthesis.predictor import Predictor

VIEW = "view.json"
# What the server gives out under /static/, and the page itself as index.html.
PAGE_FILES: dict[str, Path] = {
    **{path.name: path for path in sorted((Path(__file__).parent / "page").iterdir()) if path.is_file()},
    "niivue.js": Path(__file__).parents[1] / "viewer" / "niivue.js",
}

MAX_SIDE = 512
# A browser keeps both images, two bytes a voxel, in its memory.
MAX_VOXELS = 512 * 512 * 800
WINDOWS: dict[str, tuple[float, float]] = {
    "soft_tissue": WINDOWS_HU["soft tissue"],
    "lung": WINDOWS_HU["lung"],
    "bone": WINDOWS_HU["bone"],
    "pe": (-250.0, 450.0),
}
# Grey levels of an image without HU: its values without the lowest and highest hundredth.
PERCENTILES = (1, 99)
# Ends of the colours of a difference.
LIMITS = (10, 25, 50, 100, 200, 500, 1000)
# Values of one image repeat, so that little is gained by packing harder.
PACKED = 3


def write_views(
    predictor: Predictor,
    sources: tuple[Volume, ...],
    synthetic: Volume,
    folder: Path,
    gates: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Writes `folder`, whole or not at all, and returns what its view.json says.

    `source.nii.gz` is the first of the sources, `synthetic.nii.gz` on the same grid; `difference` tells the unit and
    the ends of the colours of synthetic minus source, where both have one unit that means something. Pixels are
    averaged where a side is longer than MAX_SIDE or the image has more than MAX_VOXELS voxels; `averaged` says how many
    become one. `gates` are those that `hearing` heard; without them the network is asked again.
    """
    source = sources[0]
    factor = _averaged(synthetic.array.shape)
    volumes = {"source": source, "synthetic": synthetic}
    arrays = {name: _small(volume.array, factor) for name, volume in volumes.items()}
    told: dict[str, Any] = {
        "slices": list(range(len(synthetic.array))),
        "positions_mm": [round(float(position), 2) for position in source.positions_mm],
        "unit": synthetic.unit,
        "target": predictor.target_name,
        "format": source.format,
        "oriented": is_axial(source),
        "averaged": factor,
        "windows": WINDOWS if "HU" in (source.unit, synthetic.unit) else {},
        "images": {
            name: {"file": f"{name}.nii.gz", "unit": volumes[name].unit, "window": _window(array, volumes[name].unit)}
            for name, array in arrays.items()
        },
        **_shares(predictor, gates_of(predictor, sources) if gates is None else gates),
    }
    if source.unit == synthetic.unit and source.unit != "arbitrary":
        body = arrays["source"] > (BODY_ABOVE_HU if source.unit == "HU" else 0)
        limit = _limit((arrays["synthetic"] - arrays["source"])[body])
        told["difference"] = {"unit": source.unit, "window": (-limit, limit)}
    with written_whole(folder) as temporary:
        temporary.mkdir()
        for name, array in arrays.items():
            (temporary / f"{name}.nii.gz").write_bytes(_nifti(array, volumes[name].unit, source, factor))
        (temporary / VIEW).write_text(json.dumps(told), encoding="utf-8")
    return told


@contextmanager
def hearing(predictor: Predictor) -> Iterator[Callable[[int], dict[str, np.ndarray] | None]]:
    """Within the block, or after it: a function that gives the gates of the last slices which the network predicted.

    It gives None where something else than the network itself predicted them, such as another backend.
    """
    passes: list[dict[str, np.ndarray]] = []

    def note(_module: object, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        passes.append({name: _kept(name, value.float().cpu().numpy()) for name, value in gates.items()})
        sizes.append(len(inputs[0]))

    def last(num_slices: int) -> dict[str, np.ndarray] | None:
        first = len(sizes)
        while first and sum(sizes[first:]) < num_slices:
            first -= 1
        if predictor.names != ["torch"] or sum(sizes[first:]) != num_slices:
            return None
        return {name: np.concatenate([one[name] for one in passes[first:]]) for name in passes[-1]}

    sizes: list[int] = []
    with record_gates(predictor.net) as gates:
        handle = predictor.net.register_forward_hook(note)
        try:
            yield last
        finally:
            handle.remove()


def gates_of(predictor: Predictor, sources: tuple[Volume, ...]) -> dict[str, np.ndarray]:
    """ "art_1" → gates (Z, 2C) and "art_1.map" → means of maps (Z, K) of every slice; a pass through the network."""
    batches: dict[str, list[np.ndarray]] = {}
    for batch_BCHW in predictor.batches(*predictor.as_trained(*sources)):
        for name, value in read_gates(predictor, batch_BCHW).items():
            batches.setdefault(name, []).append(_kept(name, value))
    return {name: np.concatenate(values) for name, values in batches.items()}


def _kept(name: str, value: np.ndarray) -> np.ndarray:
    return value.mean(axis=(2, 3)) if name.endswith(".map") else value


def is_axial(volume: Volume) -> bool:
    """Whether rows run to the patient's left and columns to the back, so that the sides of the image can be named."""
    rightward, downward = (volume.affine[:3, :2] / np.linalg.norm(volume.affine[:3, :2], axis=0)).T
    return volume.format != "png" and bool(rightward[0] > 0.9 and downward[1] > 0.9)


def _shares(predictor: Predictor, gates: dict[str, np.ndarray]) -> dict[str, Any]:
    """The transformer and the CNN share of each block with channel gates, a number a slice."""
    shares = {}
    for block, gate_ZC in gates.items():
        if not block.endswith(".map"):
            halves = np.split(gate_ZC, 2, axis=1)
            shares[block] = {
                branch: half.mean(axis=1, dtype=np.float64).round(5).tolist()
                for branch, half in zip(BRANCHES, halves, strict=True)
            }
    return {
        "fusion": predictor.net.settings.fusion.kind,
        "highest_gate": highest_gate(predictor),
        "gates": shares,
        "maps": any(name.endswith(".map") for name in gates),
    }


def _averaged(shape_zyx: tuple[int, ...]) -> int:
    """How many pixels, along rows and columns each, become one."""
    factor = -(-max(shape_zyx[1:]) // MAX_SIDE)
    while np.prod(shape_zyx, dtype=np.int64) > MAX_VOXELS * factor**2:
        factor += 1
    return factor


def _small(array_ZYX: np.ndarray, factor: int) -> np.ndarray:
    if factor == 1:
        return array_ZYX
    # What is left over at the right and lower edge is cut, since the mean would take in zeros there.
    rows, columns = (size // factor * factor for size in array_ZYX.shape[1:])
    return downscale_local_mean(array_ZYX[:, :rows, :columns], (1, factor, factor)).astype(np.float32)


def _limit(differences: np.ndarray) -> int:
    """How far the colours of a difference reach; what lies around the body, such as padding, has no say in it."""
    reached = float(np.percentile(np.abs(differences), 95)) if differences.size else 0.0
    return next((limit for limit in LIMITS if limit >= reached), LIMITS[-1])


def _window(array_ZYX: np.ndarray, unit: Unit) -> tuple[float, float]:
    """The grey levels with which an image is shown first."""
    if unit == "HU":
        return WINDOWS["soft_tissue"]
    if unit == "uint8":
        return 0.0, 255.0
    low, high = np.percentile(array_ZYX, PERCENTILES)
    return float(low), float(high) if high > low else float(low) + 1.0


def _nifti(array_ZYX: np.ndarray, unit: Unit, source: Volume, factor: int) -> bytes:
    """A gzipped NIfTI of int16, the same bytes for the same image; voxel (x, y, z) is column x, row y of slice z."""
    # The viewer shows axial planes: images that lie otherwise, or anywhere, are shown as if they lay so.
    placed = source.affine if is_axial(source) else np.diag([*source.spacing_mm_zyx[::-1], 1.0])
    affine = FLIP_XY @ placed @ np.diag([factor, factor, 1.0, 1.0])
    affine[:, 3] = FLIP_XY @ placed @ [(factor - 1) / 2, (factor - 1) / 2, 0.0, 1.0]
    # HU and grey levels are stored as they are; of a scale without a unit, the largest value takes the largest integer.
    largest = float(np.abs(array_ZYX).max())
    step = largest / 32767 if unit == "arbitrary" and largest > 0 else 1.0
    stored = np.clip(np.rint(array_ZYX / step), -32768, 32767).astype(np.int16)
    image = nibabel.Nifti1Image(stored.transpose(2, 1, 0), affine)
    image.header.set_slope_inter(step, 0)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), PACKED, mtime=0)
