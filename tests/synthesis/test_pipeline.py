"""Reading, working and writing overlap, in order, and one bad case costs no other."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from seresvit.synthesis.pipeline import followed, overlapped, slices_at_a_time


def test_reading_and_writing_take_no_time_of_their_own():
    def slow(*_):
        time.sleep(0.05)

    started_s = time.monotonic()
    assert len(list(overlapped(range(8), slow, slow, slow, ()))) == 8
    assert time.monotonic() - started_s < 0.7 * 8 * 3 * 0.05  # one after another it would take 8 · 3 · 0.05


def test_results_come_in_order_and_no_more_than_three_are_held():
    held, most, written, lock = set(), [0], [], threading.Lock()

    def read(n):
        with lock:
            held.add(n)
            most[0] = max(most[0], len(held))
        return n

    def write(n, made):
        written.append(made)
        with lock:
            held.discard(n)

    assert list(overlapped(range(20), read, lambda n, x: 10 * x, write, ())) == [(n, None) for n in range(20)]
    assert written == [10 * n for n in range(20)] and most[0] <= 3


@pytest.mark.parametrize("step", range(3))
def test_a_case_that_fails_in_any_step_is_told_and_the_others_are_written(step):
    written = []

    def failing(number):
        def act(n, *_):
            if number == step and n == 1:
                raise ValueError("broken")
            if number == 2:
                written.append(n)

        return act

    outcome = list(overlapped([0, 1, 2, 3], *map(failing, range(3)), (ValueError,)))
    assert [n for n, _ in outcome] == [0, 1, 2, 3] and written == [0, 2, 3]
    assert [str(error) for _, error in outcome if error] == ["broken"] and outcome[1][1] is not None
    with pytest.raises(ValueError, match="broken"):
        list(overlapped([0, 1, 2, 3], *map(failing, range(3)), (KeyError,)))
    assert list(overlapped([], failing(9), failing(9), failing(9), ())) == []


def test_pieces_are_written_while_the_next_are_made():
    written, came = [], [threading.Event() for _ in range(5)]

    def make(follow):
        for count in (2, 5):
            follow("thing", count)
            assert came[count - 1].wait(60)  # written before anything more is made
        return "made"

    def write(thing, arriving, made):
        for number in arriving:
            written.append((thing, number))
            came[number].set()
        written.append(made())

    assert followed(make, write) == "made"
    assert written == [*(("thing", number) for number in range(5)), "made"]


def test_what_is_never_told_in_pieces_is_written_whole():
    written = []
    assert followed(lambda follow: 7, lambda *told: written.append((*told[:2], told[2]()))) == 7
    assert written == [(None, None, 7)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_ends_the_making_ends_the_writing_first(error):
    ended = []

    def make(follow):
        follow("thing", 1)
        raise error("broken")

    def write(thing, arriving, made):
        try:
            list(arriving)
        except BaseException as raised:
            ended.append(raised)
            raise

    with pytest.raises(error, match="broken"):
        followed(make, write)
    assert [str(raised) for raised in ended] == ["broken"]


def test_what_ends_the_writing_ends_the_making():
    made, threads = [], threading.active_count()

    def make(follow):
        for count in range(1, 1000):
            follow("thing", count)
            made.append(count)
            time.sleep(0.01)

    def write(thing, arriving, _):
        next(arriving)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        followed(make, write)
    assert len(made) < 900 and threading.active_count() == threads
    with pytest.raises(OSError, match="disk full"):  # also where it is found only in the end
        followed(lambda follow: follow("thing", 1), write)


def test_larger_images_come_in_smaller_batches_but_never_in_none():
    cpu = torch.device("cpu")
    small, large = (slices_at_a_time((side, side), 64, cpu) for side in (256, 512))
    assert small >= 4 * large >= 4 and slices_at_a_time((100_000, 100_000), 64, cpu) == 1


def test_under_torchrun_each_process_waits_for_the_others(tmp_path):
    script = (
        "import time, os\n"
        "from seresvit.synthesis.pipeline import rank_and_size, wait_for_all\n"
        "rank, size = rank_and_size()\n"
        "time.sleep(1.5 * rank)\n"
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').close()\n"
        "wait_for_all()\n"
        f"assert len(os.listdir({str(tmp_path)!r})) == size == 2\n"
    )
    common = {
        **os.environ,
        "TORCHELASTIC_RUN_ID": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29631",
    }
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env={**common, "RANK": str(rank)}) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
