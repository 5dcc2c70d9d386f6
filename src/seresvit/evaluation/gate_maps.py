"""Where a fusion weighs which branch, of the few slices that a page shows: pictures for its panels.

A fusion with a map is shown by its map. A gate scales a channel alike at all positions, so that it has no picture; in
its place stands the balance, the transformer's part in the energy of what leaves the fusion. That is a measure of
features, and no attention: behind one and the same gate it differs between positions because the features do.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seresvit.data.geometry import resampled
from seresvit.data.pair import load_pair
from seresvit.data.pairing import Case
from seresvit.data.volume import written_whole
from seresvit.evaluation.gates import network_inputs, on_pixels, read_gates
from seresvit.evaluation.knockouts import fusion_blocks
from seresvit.evaluation.page import read_table
from seresvit.evaluation.ranking import chosen_cases
from seresvit.synthesis.predictor import Predictor

FILE = "gate_maps.npz"
BALANCE, MAP, TRANSFORMER_MAP, CNN_MAP = "balance", "map", "transformer's map", "CNN's map"


@dataclass(frozen=True, eq=False)
class GateMap:
    """One picture: what `shows` names, of this slice and block, (Y, X) float32 on its pixels; NaN where not known."""

    patient: str
    source: str
    slice: int
    block: str
    shows: str
    array: np.ndarray


def gate_maps(predictor: Predictor, groups: list[tuple[Case, ...]], out: Path, examples: list[Any]) -> list[GateMap]:
    """The pictures of every block, of the slices that the evaluation in `out` shows and of the examples.

    Slices are counted and lie as in slices.csv: on the target's grid, whatever grid the network was trained on. Of an
    `out` without evaluation only the examples have pictures, and these only where the network's grid is the target's.
    """
    cases, slices = (read_table(Path(out) / f"{name}.csv") for name in ("cases", "slices"))
    chosen = chosen_cases(cases, slices) if cases is not None and slices is not None else []
    wanted: dict[tuple[str, str], set[int]] = {}
    for case in chosen:
        of_case = wanted.setdefault((case["patient"], case["source"]), set())
        of_case |= {line["slice"] for line in case["slices"]}
    if _on_target(predictor):
        for example in examples:
            wanted.setdefault((example["patient"], example["source"]), set()).add(example["slice"])
    known = {(group[0].patient, "+".join(case.source for case in group)): group for group in groups}
    return [
        GateMap(*of, z, block, shows, array)
        for of, numbers in wanted.items()
        if of in known
        for z, block, shows, array in _of_case(predictor, known[of], sorted(numbers))
    ]


def _on_target(predictor: Predictor) -> bool:
    return predictor.data.resample in ("", "target")


def _of_case(
    predictor: Predictor, group: tuple[Case, ...], numbers: list[int]
) -> list[tuple[int, str, str, np.ndarray]]:
    """Of each of these slices and each block: slice, block, what is shown, and the picture (Y, X)."""
    pair = load_pair(*group, data=predictor.data)
    inputs_ZCHW = network_inputs(predictor, group, pair)
    size_yx = pair.target.array.shape[1:]
    if _on_target(predictor):
        numbers = [z for z in numbers if z < len(inputs_ZCHW)]
        found = read_positions(predictor, inputs_ZCHW[numbers])
        return [
            (z, block, shows, on_pixels(map_ZHW[place], size_yx))
            for place, z in enumerate(numbers)
            for block, (shows, map_ZHW) in found.items()
        ]
    grid = load_pair(*group, data=predictor.data, to_score=True).target
    pictures = []
    for block, (shows, map_ZHW) in read_positions(predictor, inputs_ZCHW).items():
        volume = replace(pair.target, array=on_pixels(map_ZHW, size_yx), unit="arbitrary")
        moved, covered = resampled(volume, grid, "nearest")
        array = np.where(covered, moved.array, np.nan)
        pictures += [(z, block, shows, array[z]) for z in numbers if z < len(array)]
    return pictures


def read_positions(predictor: Predictor, inputs_ZCHW: torch.Tensor) -> dict[str, tuple[str, np.ndarray]]:
    """Block → what is shown of it, and that for every position, (Z, h, w) float32.

    Of a fusion with two maps the transformer's, and the CNN's where the transformer's is 1 everywhere; one with a map
    for every channel counts as two, which are the means of either half. Without a map: the balance.
    """
    positions = {block: (BALANCE, share_ZHW) for block, share_ZHW in read_balances(predictor, inputs_ZCHW).items()}
    for name, map_ZKHW in read_gates(predictor, inputs_ZCHW).items():
        if name.endswith(".map"):
            names = (MAP,) if map_ZKHW.shape[1] == 1 else (TRANSFORMER_MAP, CNN_MAP)
            k = 1 if len(names) == 2 and (map_ZKHW[:, 0] == 1).all() else 0
            positions[name.removesuffix(".map")] = (names[k], map_ZKHW[:, k])
    return positions


def read_balances(predictor: Predictor, inputs_ZCHW: torch.Tensor) -> dict[str, np.ndarray]:
    """Block → (Z, h, w): Σ t² / (Σ t² + Σ c²) at each position, over the transformer's channels t and the CNN's c as
    they leave the fusion; in [0, 1], NaN where all of them are 0."""
    found: dict[str, list[np.ndarray]] = {}

    def note(block: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def hook(module: Any, inputs: Any, x_BCHW: torch.Tensor) -> None:
            energy_B2HW = x_BCHW.float().square().unflatten(1, (2, -1)).sum(dim=2)
            share_BHW = energy_B2HW[:, 0] / energy_B2HW.sum(dim=1)
            found.setdefault(block, []).append(share_BHW.cpu().numpy())

        return hook

    handles = [
        predictor.net.get_submodule(f"{block}.fuse").register_forward_hook(note(block))
        for block in fusion_blocks(predictor.net)
    ]
    try:
        with torch.inference_mode():
            for batch_BCHW in inputs_ZCHW.split(predictor.batch_size):
                predictor.net(batch_BCHW.to(predictor.device))
    finally:
        for handle in handles:
            handle.remove()
    return {block: np.concatenate(batches) for block, batches in found.items()}


# On disk, beside the tables: a few slices, as numbers, so that a page can draw all of them on one scale.


def write_gate_maps(found: list[GateMap], out: Path) -> None:
    """`out`/gate_maps.npz: array "0" … of each picture, float16, and "index", what each is of; none without any."""
    path = Path(out) / FILE
    if not found:
        path.unlink(missing_ok=True)
        return
    index = [[one.patient, one.source, one.slice, one.block, one.shows] for one in found]
    arrays: dict[str, Any] = {str(place): one.array.astype(np.float16) for place, one in enumerate(found)}
    with written_whole(path) as temporary:
        np.savez_compressed(temporary, **arrays, index=np.array(json.dumps(index)))


def read_gate_maps(out: Path) -> list[GateMap]:
    """What `write_gate_maps` wrote; nothing where there is none, or none that can be read."""
    try:
        with np.load(Path(out) / FILE, allow_pickle=False) as stored:
            return [
                GateMap(patient, source, z, block, shows, stored[str(place)].astype(np.float32))
                for place, (patient, source, z, block, shows) in enumerate(json.loads(str(stored["index"])))
            ]
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile):
        return []
