"""A flip and a shift that were made must be told, between contrasts that no line relates."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from seresvit.data.registration import residual


@pytest.mark.parametrize("flip", ["", "left–right", "top–bottom", "half-turn", "first-to-last"])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 0, 0), (0, 3, -2), (0, -5, 6)])
def test_a_flip_and_a_shift_are_told_together(flip, shift):
    target = gaussian_filter(np.random.default_rng(1).normal(size=(12, 64, 60)), 1.5)
    axes = {"": (), "left–right": 2, "top–bottom": 1, "half-turn": (1, 2), "first-to-last": 0}[flip]
    # Another contrast, whose values do not rise with the target's.
    source = np.flip(np.roll(np.cos(20 * target), shift, (0, 1, 2)), axes)
    found = residual(source.astype(np.float32), target.astype(np.float32))
    assert (found.flip, found.shift_zyx) == (flip, shift)


def test_images_that_hold_too_little_are_not_judged():
    assert residual(np.ones((2, 16, 16)), np.ones((2, 16, 16))) is None
