"""The grid of a volume, and files that are written whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seresvit.data import volume as volumes
from seresvit.data.volume import ABANDONED_AFTER_S, DataError, Volume, remove_abandoned, room, same_grid, written_whole

AFFINE = np.array([[0.8, 0, 0, -10], [0, 0.9, 0, -20], [0, 0, 2.5, 30], [0, 0, 0, 1.0]])
VOLUME = Volume(np.zeros((3, 5, 7), np.float32), AFFINE, np.array([30, 32.5, 35]), "HU", Path("a"), "nifti")


def moved(**change):
    affine = AFFINE.copy()
    for place, value in change.items():
        affine[int(place[1]), int(place[2])] = value
    return replace(VOLUME, affine=affine)


def test_spacing_is_in_the_order_of_the_array():
    assert VOLUME.spacing_mm_zyx == pytest.approx((2.5, 0.9, 0.8))


@pytest.mark.parametrize(
    "other, difference",
    [
        (VOLUME, ""),
        (moved(a23=32.5), ""),
        (moved(a03=-10.5), "in-plane origin"),
        (moved(a00=0.7), "pixel spacing"),
        (moved(a00=-0.8), "orientation"),
        (replace(VOLUME, array=np.zeros((3, 7, 5))), "image size"),
    ],
)
def test_what_differs_between_two_grids_is_said(other, difference):
    assert difference in same_grid(VOLUME, other)
    assert bool(same_grid(VOLUME, other)) == bool(difference)


def test_frames_of_reference_count_where_both_are_known():
    one, two = (replace(VOLUME, frame_of_reference=uid) for uid in ("1.2", "1.3"))
    assert same_grid(one, two) == "frame of reference"
    assert same_grid(one, VOLUME) == ""


def test_a_file_or_folder_replaces_what_stood_there_only_at_the_end(tmp_path):
    for path in (tmp_path / "f.txt", tmp_path / "folder"):
        for text in ("first", "second"):
            with written_whole(path) as temporary:
                if path.suffix:
                    temporary.write_text(text)
                else:
                    temporary.mkdir()
                    (temporary / text).write_text(text)
        assert [p.name for p in path.iterdir()] == ["second"] if path.is_dir() else path.read_text() == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.txt", "folder"]


def test_an_error_leaves_the_older_file_and_no_trace(tmp_path):
    (tmp_path / "f.txt").write_text("old")
    with pytest.raises(KeyError), written_whole(tmp_path / "f.txt") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f.txt", "old")]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    script = (
        "import pathlib, sys, time\n"
        "from seresvit.data.volume import written_whole\n"
        "with written_whole(pathlib.Path(sys.argv[1]) / 'case') as temporary:\n"
        "    temporary.mkdir(); (temporary / 'half').write_text('half')\n"
        "    print('written', flush=True); time.sleep(600)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"written\n"
    with written_whole(tmp_path / "mine") as temporary:
        temporary.write_text("whole")
        remove_abandoned(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2 and temporary.exists()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(list(tmp_path.glob(".writing-*/case/half"))) == 1
    remove_abandoned(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_what_has_no_lock_is_removed_a_day_later(tmp_path):
    for name in (".writing-old", ".writing-new"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".writing-old", (time.time() - 2 * ABANDONED_AFTER_S,) * 2)
    remove_abandoned(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".writing-new"]


def test_an_unwritable_place_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written") as error, written_whole(tmp_path / "file" / "out.txt"):
        pass
    assert "out.txt" in str(error.value) and "\n" not in str(error.value)


def tilted(first: int, count: int, lean: float = 0.2):
    """Slices `first`.. of a gantry that leans `lean` mm a mm, as a reader gives them."""
    affine = AFFINE.copy()
    affine[:3, 2] = [0, 2.5 * lean, 2.5]
    affine[:3, 3] += first * affine[:3, 2]
    return replace(
        VOLUME, array=np.zeros((count, 5, 7)), affine=affine, positions_mm=30 + 2.5 * np.arange(count) + 2.5 * first
    )


def test_a_tilted_gantry_is_one_grid_whichever_slice_is_missing():
    whole = tilted(0, 9)
    for part in (tilted(1, 8), tilted(0, 8), tilted(3, 4), tilted(5, 1)):
        assert same_grid(whole, part) == same_grid(part, whole) == ""
    assert "in-plane origin" in same_grid(whole, tilted(1, 8, lean=0.21))
    assert "in-plane origin" in same_grid(whole, moved())
    assert "in-plane origin" in same_grid(whole, replace(tilted(1, 8), affine=whole.affine))


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    rename = os.replace

    def full(source, target):
        if target == tmp_path / "out" and Path(source).name != "replaced":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match="nothing was changed"), written_whole(tmp_path / "out") as temporary:
        temporary.mkdir()
    assert (tmp_path / "out" / "old").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_large_arrays_lie_in_a_file_without_a_name_where_it_has_room(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(volumes, "MOST_IN_MEMORY", 4000)
    small, large = room((10, 10, 10)), room((10, 10, 11))
    assert type(small) is np.ndarray and isinstance(large, np.memmap)
    large[:] = 3.0
    assert large.sum() == 3300 and large.dtype == np.float32 and not list(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert type(room((10, 10, 11))) is np.ndarray
