"""The viewer of a report: one case as three small NIfTI images, and the scripts that draw them linked."""

import gzip
from base64 import b64encode
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from skimage.transform import downscale_local_mean

from seresvit.data.volume import Unit
from seresvit.evaluation.page import read
from seresvit.evaluation.panels import WINDOWS, CaseImages
from seresvit.evaluation.tissues import WINDOWS_HU

SCRIPTS = ("niivue.js", "linked.js")
# What a page can carry and still be sent: compressed, all three together, before base64 adds a third.
MAX_BYTES = 3_000_000
MAX_SIDE = 256
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# int16 holds HU and grey levels as they are, MR in thousandths of its scale.
STEPS: dict[Unit, float] = {"HU": 1.0, "uint8": 1.0, "arbitrary": 1e-3}


def scripts() -> tuple[str, ...]:
    """The text of NiiVue and of what links its views, in the order in which a page runs them."""
    folder = Path(__file__).parents[1] / "viewer"
    return tuple(read(folder / name, str) for name in SCRIPTS)


def linked_views(
    case: CaseImages, window: tuple[float, float], start: int, most_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """What linked.js reads, and `part`, words for what of the case is left out ("" when it is whole).

    `window` is that of the target, `start` the slice that is shown first. Pixels are averaged until no side is longer
    than MAX_SIDE; then slices far from `start` are left out until all fit into `most_bytes`.
    """
    factor = -(-max(case.target.shape[1:]) // MAX_SIDE)
    arrays = {"source": case.source, "synthetic": case.synthetic, "target": case.target}
    units = {"source": case.source_unit, "synthetic": case.unit, "target": case.unit}
    # What is left over at the right and lower edge is cut, since the mean would take in zeros there.
    rows, columns = (size // factor * factor for size in case.target.shape[1:])
    small = {
        name: downscale_local_mean(array[:, :rows, :columns], (1, factor, factor)) for name, array in arrays.items()
    }
    first, last = 0, len(case.target)
    while True:
        packed = {name: _nifti(array[first:last], units[name], case, factor, first) for name, array in small.items()}
        size = sum(len(data) for data in packed.values())
        if size <= most_bytes or last - first == 1:
            break
        kept = max(1, min(last - first - 1, int((last - first) * most_bytes / size)))
        first = min(max(0, start - kept // 2), len(case.target) - kept)
        last = first + kept
    windows = {name: window if units[name] == case.unit else WINDOWS[units[name]] for name in arrays}
    views = [
        {"name": name, "nifti": b64encode(data).decode(), "window": windows[name], "unit": _unit_words(units[name])}
        for name, data in packed.items()
    ]
    choices = {"as in the images": window, **WINDOWS_HU} if case.unit == "HU" else {}
    return {
        "views": views,
        "slices": list(range(first, last)),
        "positions_mm": [round(float(position), 2) for position in case.positions_mm[first:last]],
        "start": start - first,
        "oriented": case.supine_axial,
        "windows": choices,
        "part": _part(factor, first, last, len(case.target)),
    }


def _nifti(array_ZYX: np.ndarray, unit: Unit, case: CaseImages, factor: int, first: int) -> bytes:
    """A gzipped NIfTI of int16, the same bytes for the same image; its voxel (0, 0, 0) is slice `first` of the case."""
    corner = np.array([(factor - 1) / 2, (factor - 1) / 2, first, 1.0])
    # The viewer shows axial planes: images that lie otherwise, or anywhere, are shown as if they lay so.
    placed = case.affine if case.supine_axial else np.diag([*case.spacing_mm_zyx[::-1], 1.0])
    affine = LPS_TO_RAS @ placed @ np.diag([factor, factor, 1.0, 1.0])
    affine[:, 3] = LPS_TO_RAS @ placed @ corner
    step = STEPS[unit]
    stored = np.clip(np.rint(array_ZYX / step), -32768, 32767).astype(np.int16)
    image = nibabel.Nifti1Image(stored.transpose(2, 1, 0), affine)
    image.header.set_slope_inter(step, 0)
    return gzip.compress(image.to_bytes(), mtime=0)


def _unit_words(unit: Unit) -> str:
    return {"HU": "HU", "uint8": "grey levels", "arbitrary": "of its scale"}[unit]


def _part(factor: int, first: int, last: int, num_slices: int) -> str:
    left_out = []
    if factor > 1:
        left_out.append(f"{factor} × {factor} pixels are averaged into one")
    if last - first < num_slices:
        left_out.append(f"slices {first} to {last - 1} of 0 to {num_slices - 1} are shown")
    return f"To keep the file small, {' and '.join(left_out)}." if left_out else ""
