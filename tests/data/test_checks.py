"""The rules that hold for one image; those for pairs are tested with the audit."""

import dataclasses

import numpy as np
import pytest

from seresvit.config import DataSettings
from seresvit.data import read_volume
from seresvit.data.checks import of_one_image
from seresvit.data.phantom import simulate

DATA = DataSettings()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patients")
    simulate(folder, patients=1, slices=6, size=64, kev=(110,))
    return folder / "110keV" / "P001"


def test_a_sound_image_is_worth_no_word(source):
    assert of_one_image(read_volume(source), DATA) == []


def test_a_missing_slice_is_told_with_its_place(source):
    sound = read_volume(source)
    kept = [0, 1, 2, 4, 5]
    gap = float(np.diff(sound.positions_mm)[0])
    headers = tuple(sound.headers[k] for k in kept)
    found = dataclasses.replace(sound, array=sound.array[kept], positions_mm=sound.positions_mm[kept], headers=headers)
    (line,) = of_one_image(found, DATA)
    widest = f"gaps from {gap:.2f} to {2 * gap:.2f} mm, the widest after {sound.positions_mm[2]:.2f}"
    assert line == f"even slices: {widest}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"set_aside": ("RS.dcm: RTSTRUCT",)}, "only images: set aside: RS.dcm: RTSTRUCT"),
        ({"array": np.zeros((6, 64, 64), np.float32)}, "an image: constant, every voxel is 0"),
        ({"array": np.full((6, 64, 64), 1000, np.float32)}, "an image: constant"),
    ],
)
def test_other_faults_are_told_once(source, change, words):
    found = of_one_image(dataclasses.replace(read_volume(source), **change), DATA)
    assert [line for line in found if line.startswith(words)] and len(found) == len(set(found)) == 1


def test_values_that_are_no_hu_or_beyond_the_window_are_told(source):
    sound = read_volume(source)
    shifted = dataclasses.replace(sound, array=sound.array + 1024)
    assert any("not HU" in line for line in of_one_image(shifted, DATA))
    narrow = DataSettings(window_hu=(-100, 100))
    assert any("values in the window" in line for line in of_one_image(sound, narrow))
