"""What training images look like: other patients pass, other kinds of image do not."""

import json

import numpy as np
import pytest
import torch

from seresvit.model.familiarity import described, distance, learned, looked_at


def patient(rng, shift=0.0):
    """A bright oval body with a brighter spot below its middle, of the size and noise of that patient."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    body = (y / rng.uniform(0.5, 0.7)) ** 2 + (x / rng.uniform(0.7, 0.9)) ** 2 < 1
    spine = (y - 0.35) ** 2 + x**2 < 0.02
    image = -1 + body * rng.uniform(0.65, 0.75) + spine * rng.uniform(0.5, 0.6) + rng.normal(0, 0.02, body.shape)
    return torch.from_numpy(np.clip(image + shift, -1, 1).astype(np.float32))[None, None]


def gates_of(image, factor=1.0):
    return {"art_1": torch.full((1, 8), 0.5) + factor * 0.1 * image.mean(), "art_1.map": torch.ones(1, 1, 4, 4)}


@pytest.fixture(scope="module")
def record():
    rng = np.random.default_rng(0)
    cases = [(f"P{n}", described(image, gates_of(image))) for n in range(30) for image in [patient(rng)]]
    return json.loads(json.dumps(learned(cases)))


def test_new_patients_are_familiar(record):
    rng = np.random.default_rng(1)
    far = [distance(described(image, gates_of(image)), record)[0] for image in (patient(rng) for _ in range(20))]
    assert np.mean(np.array(far) > 1) <= 0.05


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda image: image.flip(-2), "cell"),
        (lambda image: (image + 0.3).clip(-1, 1), ""),
        (lambda image: -image, ""),
        (lambda image: image * 0.1, ""),
        (lambda image: image[..., 8:24, 8:24], ""),
    ],
    ids=["upside down", "offset", "inverted", "other unit", "zoomed"],
)
def test_other_kinds_of_image_are_not(record, change, where):
    image = change(patient(np.random.default_rng(2)))
    far, name = distance(described(image, gates_of(image)), record)
    assert far > 1 and where in name


def test_gates_count_too(record):
    image = patient(np.random.default_rng(3))
    far, name = distance(described(image, gates_of(image, factor=5.0)), record)
    assert far > 1 and "gate art_1" in name


def test_few_patients_are_no_training_to_compare_with():
    rng = np.random.default_rng(0)
    assert learned([(f"P{n % 4}", described(patient(rng), {})) for n in range(30)]) == {}
    assert (
        looked_at(3) == [0, 1, 2] and looked_at(300)[0] == 0 and looked_at(300)[-1] == 299 and len(looked_at(300)) == 8
    )
