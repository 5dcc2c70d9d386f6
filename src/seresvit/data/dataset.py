"""The order in which training sees prepared slices, each augmented.

Which slice comes n-th, and how it is augmented, is a pure function of (seed, n). So the position of the loader is one
integer, the number of images seen, and a resumed run goes on exactly where it stopped.
"""

import functools
from collections import Counter

import numpy as np
import torch
from torch.utils.data import Dataset

from seresvit.config import ConfigError, DataSettings
from seresvit.data.augmentation import Record, apply, draw
from seresvit.data.prepared import Prepared, PreparedCase, read_labels, read_slice, slices_of
from seresvit.data.volume import DataError


class TrainingSlices(Dataset):
    """`dataset[n]` is the n-th image that training sees: (source (C, H, W), target (1, H, W)), float32 in [-1, 1].

    With `mask_weights` the weight of every pixel, (1, H, W) float32, is the third (see `weights_of`).

    n counts on beyond one pass: pass e shows every slice once, in an order drawn from (seed, e). With `balance` or
    `foreground_bias` (see `shares_of`) it shows each as often as its share says, rounded up or down at random. The
    latter is also the share of crops whose centre lies on foreground (see `augmentation.draw`).
    """

    def __init__(
        self,
        store: Prepared,
        data: DataSettings,
        size: tuple[int, int],
        seed: int,
        balance: bool = False,
        foreground_bias: float = 0.0,
        mask_weights: dict[str, float] | None = None,
    ):
        """Raises DataError when the train split has no slice to show."""
        self.store, self.data, self.size, self.seed = store, data, size, seed
        self.foreground_bias, self.mask_weights = foreground_bias, mask_weights
        self.slices = slices_of(store, "train", data.min_foreground)
        if not self.slices:
            raise DataError(
                f"{store.folder}: no training slice (of {len(slices_of(store, 'train'))}) shows a foreground of "
                f"{data.min_foreground:.0%}; lower data.min_foreground or audit with more training patients"
            )

        self.up_to = np.cumsum(shares_of(self.slices, balance, foreground_bias)) if balance or foreground_bias else None

    def __getitem__(self, n: int) -> tuple[torch.Tensor, ...]:
        case, index, record = self.drawn(n)
        pair_CHW = np.concatenate(read_slice(self.store, case, index, self.data.context_slices))
        if not self.mask_weights:
            return tuple(map(torch.from_numpy, apply(record, pair_CHW)))
        source_CHW, target_CHW, labels_1HW = apply(record, pair_CHW, read_labels(self.store, case, index))
        weights_1HW = weights_of(self.mask_weights, case.label_names)[labels_1HW]
        return tuple(map(torch.from_numpy, (source_CHW, target_CHW, weights_1HW)))

    def drawn(self, n: int) -> tuple[PreparedCase, int, Record]:
        """What the n-th image is, without reading it: case, slice, and the record of its augmentation."""
        epoch, place = divmod(n, len(self.slices))
        chosen = _order(self.seed, epoch, len(self.slices))[place]
        if self.up_to is not None:  # systematic sampling: one draw from every n-th part of the whole
            offset = np.random.default_rng([self.seed, 2, epoch]).random()
            chosen = np.searchsorted(self.up_to[:-1], (chosen + offset) / len(self.slices), side="right")
        case, index = self.slices[chosen]
        height, width = case.shape[-2:]
        rng = np.random.default_rng([self.seed, 1, n])
        return case, index, draw(self.data, (height, width), self.size, rng, self.foreground_bias)


def shares_of(slices: list[tuple[PreparedCase, int]], balance: bool, foreground_bias: float) -> np.ndarray:
    """How often each slice is to be shown, in sum 1.

    With `balance` sources have equal shares, and within a source its patients, and within a patient the slices. The
    share `foreground_bias` of the whole is dealt out in proportion to the foreground besides.
    """
    shares = np.ones(len(slices))
    if balance:
        sources = [tuple(case.sources) for case, _ in slices]
        patients = [(source, case.patient) for source, (case, _) in zip(sources, slices, strict=True)]
        patients_of = Counter(source for source, _ in set(patients))
        slices_of_patient = Counter(patients)
        shares = np.array([1 / patients_of[one[0]] / slices_of_patient[one] for one in patients])
    shares /= shares.sum()
    foreground = shares * [case.foreground[index] for case, index in slices]
    if foreground.any():
        shares = (1 - foreground_bias) * shares + foreground_bias * foreground / foreground.sum()
    return shares


def weights_of(mask_weights: dict[str, float], label_names: dict[str, int]) -> np.ndarray:
    """The weight of every label 0 to 255, (256,) float32: what `mask_weights` says of its name or number, else 1."""
    weights = np.ones(256, np.float32)
    for name, value in label_names.items():
        weights[value] = mask_weights.get(name, mask_weights.get(str(value), 1.0))
    return weights


def check_labels(store: Prepared, mask_weights: dict[str, float]) -> None:
    """Raises ConfigError when `mask_weights` names a label that no mask of a training case has."""
    found = {name: value for c in store.cases if c.split == "train" for name, value in c.label_names.items()}
    for name in mask_weights:
        if name not in found and name not in map(str, found.values()):
            raise ConfigError(
                f"mask_weights: no mask of the training cases has a label {name}, found "
                f"{', '.join(found) or 'no mask at all'}; name one of these, or give the manifest masks"
            )


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)
