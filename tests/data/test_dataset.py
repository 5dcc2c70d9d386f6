"""The order in which training sees prepared slices, each augmented."""

import json

import numpy as np
import pytest
import torch

from seresvit.config import AugmentSettings, ConfigError, DataSettings
from seresvit.data.augmentation import apply
from seresvit.data.dataset import TrainingSlices, check_labels
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


def test_mask_weights_move_with_their_pixels(manifest, write_case):
    """The target holds a value of its own for each label; where no neighbour is mixed in, the weight is the label's."""
    labels = np.kron(np.random.default_rng(2).integers(0, 3, (4, 5, 6)), np.ones((1, 4, 4))).astype(np.uint8)
    for patient in ("p1", "p2"):
        write_case(manifest.parent, patient, "mask", labels)
        write_case(manifest.parent, patient, "low", (labels * 400.0 - 500).astype(np.float32))
        write_case(manifest.parent, patient, "high", (labels * 400.0 - 500).astype(np.float32))
        (manifest.parent / patient / "labels.json").write_text('{"bone": 1, "tumour": 2}')
        row = f"{patient}/low.nii.gz,"
        manifest.write_text(manifest.read_text().replace(row, f"{row}{patient}/mask.nii.gz"))
    data = CT.model_copy(update={"flip": True, "max_rotation_deg": 20.0, "max_shift": 0.1, "max_scale": 0.1})
    store = prepare(manifest, data, masks=True)
    weights = {"tumour": 5.0, "1": 2.0}
    dataset = TrainingSlices(store, data, (16, 16), seed=1, foreground_bias=0.5, mask_weights=weights)
    compared = 0
    for n in range(12):
        _, target, weight = dataset[n]
        assert weight.shape == (1, 16, 16) and weight.dtype == torch.float32
        for value, expected in ((-0.5, 1), (-0.1, 2), (0.3, 5)):
            unmixed = (target - value).abs() < 1e-5
            assert (weight[unmixed] == expected).all()
            compared += int(unmixed.sum())
    assert compared > 0.3 * 12 * 16 * 16
    check_labels(store, weights)
    with pytest.raises(ConfigError, match="no mask of the training cases has a label liver, found bone, tumour"):
        check_labels(store, {"liver": 2.0})
    with pytest.raises(ConfigError, match="no mask at all"):
        check_labels(prepare(manifest, data), weights)


def test_crops_are_drawn_on_foreground_in_their_share(manifest, write_case):
    """One bright pixel in a slice: a crop of odd size that is drawn on it has it in the middle, whatever moved it."""
    images = np.full((4, 40, 50), -1000, np.int16)
    images[:, 22, 31] = 500
    for patient in ("p1", "p2"):
        for modality in ("high", "low"):
            write_case(manifest.parent, patient, modality, images)
    data = CT.model_copy(update={"flip": True})
    store = prepare(manifest, data)
    dataset = TrainingSlices(store, data, (9, 11), seed=1, foreground_bias=0.5)
    other = TrainingSlices(store, data, (9, 11), seed=1, foreground_bias=0.5)
    in_the_middle = []
    for n in range(200):
        source, target = dataset[n]
        assert torch.equal(source, target) and torch.equal(target, other[n][1])
        in_the_middle.append(target[0, 4, 5] > 0)
        assert in_the_middle[-1] or "on_foreground" not in dataset.drawn(n)[2]
    assert np.mean(in_the_middle) == pytest.approx(0.5, abs=0.1)
    plain = [TrainingSlices(store, data, (9, 11), seed=1)[n][1][0, 4, 5] > 0 for n in range(50)]
    assert np.mean(plain) < 0.1
    whole = TrainingSlices(store, data, (40, 50), seed=1, foreground_bias=1.0)
    assert "on_foreground" not in whole.drawn(0)[2]
    record = {**dataset.drawn(0)[2], "on_foreground": 0.5, "flip": False, "corner": [3, 7]}
    empty = np.full((2, 40, 50), -1, np.float32)
    empty[0] = np.arange(2000).reshape(40, 50) / 2000
    np.testing.assert_array_equal(apply(record, empty)[0], empty[:1, 3:12, 7:18])
