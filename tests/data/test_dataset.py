"""The order in which training sees prepared slices, each augmented."""

import json

import numpy as np
import pytest
import torch

from seresvit.config import AugmentSettings, DataSettings
from seresvit.data.augmentation import apply
from seresvit.data.dataset import TrainingSlices
from seresvit.data.prepared import prepare, read_slice, slices_of
from seresvit.data.volume import DataError

CT = DataSettings(window_hu=(-1000, 1000), flip=False)


def test_every_pass_shows_every_slice_once_in_another_order(manifest):
    dataset = TrainingSlices(prepare(manifest, CT), CT, (10, 12), seed=3)
    passes = [[dataset[n][0].numpy().tobytes() for n in range(8 * e, 8 * e + 8)] for e in range(2)]
    assert len(set(passes[0])) == 8 and set(passes[0]) == set(passes[1]) and passes[0] != passes[1]


def test_the_nth_image_depends_on_seed_and_n_alone(manifest):
    data = CT.model_copy(update={"flip": True, "max_rotation_deg": 10.0, "max_shift": 0.1})
    store = prepare(manifest, data)
    one, other = (TrainingSlices(store, data, (8, 8), seed=5) for _ in range(2))
    order = [13, 2, 40, 7]
    images = [one[n] for n in range(41)]
    for n in order:
        assert all(torch.equal(a, b) for a, b in zip(other[n], images[n], strict=True))
    assert not torch.equal(TrainingSlices(store, data, (8, 8), seed=6)[2][0], images[2][0])


def test_an_image_is_its_slice_under_the_record_that_is_drawn_for_it(manifest):
    augment = AugmentSettings(kind="ct", probability=1)
    data = CT.model_copy(update={"flip": True, "max_shift": 0.1, "augment": augment})
    store = prepare(manifest, data)
    dataset, plain = TrainingSlices(store, data, (8, 8), seed=5), TrainingSlices(store, CT, (8, 8), seed=5)
    for n in range(10):
        case, index, record = dataset.drawn(n)
        expected = apply(json.loads(json.dumps(record)), np.concatenate(read_slice(store, case, index)))
        for image, wanted in zip(dataset[n], expected, strict=True):
            np.testing.assert_array_equal(image.numpy(), wanted)
        assert record["source"].keys() == {"blur", "offset", "noise"}
        assert plain.drawn(n)[:2] == (case, index) and plain.drawn(n)[2]["source"] == {}


def test_slices_without_foreground_are_left_out_of_training(manifest, write_case):
    empty = np.full((4, 10, 12), -1000, np.int16)
    empty[1] = 0
    write_case(manifest.parent, "p1", "low", empty)
    data = CT.model_copy(update={"min_foreground": 0.5})
    store = prepare(manifest, data)
    kept = slices_of(store, "train", 0.5)
    assert [(case.name, index) for case, index in kept if case.patient == "p1"] == [("p1_high", 1)]
    empty[1, 1:] = -1000
    for patient in ("p1", "p2"):
        write_case(manifest.parent, patient, "low", empty)
    with pytest.raises(DataError, match=r"no training slice .* lower data.min_foreground"):
        TrainingSlices(prepare(manifest, data), data, (10, 12), seed=0)
