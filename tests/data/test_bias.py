"""N4 against a shading that was planted, which it must take away and nothing else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seresvit.config import DataSettings
from seresvit.data.bias import without_bias
from seresvit.data.volume import DataError, Volume

N4 = DataSettings(n4=True)


@pytest.fixture(scope="module")
def brain() -> Volume:
    """A ball of two tissues in nothing."""
    z, y, x = np.indices((14, 28, 28))
    array = np.random.default_rng(0).normal(np.where((x // 6 + y // 6 + z // 6) % 2, 300, 500), 10)
    array[(z - 7) ** 2 * 3 + (y - 14) ** 2 + (x - 14) ** 2 > 13**2] = 0
    return Volume(array.astype(np.float32), np.eye(4), np.arange(14.0), "arbitrary", Path("T1.nii"), "nifti")


def test_a_planted_shading_is_taken_away_and_the_scale_kept(brain):
    z, y, x = np.indices(brain.array.shape) / 28
    shading = np.exp(0.6 * np.sin(2 * x) + 0.4 * y * y - 0.5 * z)
    shaded = replace(brain, array=(brain.array * shading).astype(np.float32))
    mended = without_bias(shaded, N4)
    inside = brain.array > 0
    left = np.log(mended.array[inside] / brain.array[inside])
    assert left.std() < 0.15 * np.log(shading[inside]).std()
    ratio = np.log(mended.array[inside] / shaded.array[inside])
    assert abs(ratio.mean()) < 1e-4 and (mended.array[~inside] == 0).all() and mended.array.dtype == np.float32
    np.testing.assert_array_equal(without_bias(shaded, N4).array, mended.array)


def test_only_mr_and_only_where_it_is_asked_for(brain):
    assert without_bias(brain, DataSettings()) is brain
    ct = replace(brain, unit="HU")
    assert without_bias(ct, N4) is ct


def test_what_n4_cannot_estimate_is_refused_with_the_remedy(brain):
    for array in (brain.array[:3], brain.array * 0):
        with pytest.raises(DataError, match=r"T1\.nii: N4 .*set data\.n4=false"):
            without_bias(replace(brain, array=array), N4)
