"""Many cases one after another: read, worked on and written at the same time, shared out among processes."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from queue import SimpleQueue
from typing import TypeVar

import torch

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")

# Memory that a slice takes on its way through the network, as full-size float32 maps of `base_channels`.
LIVE_MAPS = 8


def overlapped(
    items: Sequence[Item],
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Made],
    write: Callable[[Item, Made], None],
    expected: tuple[type[Exception], ...],
) -> Iterator[tuple[Item, Exception | None]]:
    """Each item, in order, once it is written, and the error among `expected` that one of its three steps met.

    `work` runs here; while it does, one thread reads the next item and another writes the one before. So no more than
    three are in memory. Any other error ends the iteration.
    """
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        reading = [reader.submit(read, items[0])] if items else []
        writing: list[tuple[Item, Future[None]]] = []
        for number, item in enumerate(items):
            current = reading.pop()
            if number + 1 < len(items):
                reading.append(reader.submit(read, items[number + 1]))
            error: Exception | None = None
            try:
                made = work(item, current.result())
            except expected as raised:
                error = raised
            if writing:
                yield writing[0][0], _outcome(writing.pop()[1], expected)
            if error is None:
                writing.append((item, writer.submit(write, item, made)))
            else:
                yield item, error
        if writing:
            yield writing[0][0], _outcome(writing.pop()[1], expected)


def followed(
    make: Callable[[Callable[[Item, int], None]], Made],
    write: Callable[[Item | None, Iterator[int] | None, Callable[[], Made]], None],
) -> Made:
    """What `make` returns, once it is written: made here piece by piece, while a thread writes the pieces there are.

    `make` calls what it is given with the unfinished thing and how many of its pieces are there. `write` gets that
    thing, the numbers of its pieces as they come, and a function that waits for what `make` returns. Where `make` never
    calls, `write` follows it, with None for the first two. What one of them raises ends the other, and is raised once
    both have ended.
    """
    counts, made, writing = SimpleQueue[int](), Future[Made](), list[Future[None]]()

    def arriving() -> Iterator[int]:
        there = 0
        while count := counts.get():
            yield from range(there, count)
            there = count
        made.result()  # raises what ended the making

    with ThreadPoolExecutor(1, "write") as writer, _short_turns():

        def follow(item: Item, count: int) -> None:
            if not writing:
                writing.append(writer.submit(write, item, arriving(), made.result))
            if writing[0].done():
                writing[0].result()
            counts.put(count)

        try:
            made.set_result(make(follow))
        except BaseException as error:  # also Ctrl-C: the writer removes what is half-written
            made.set_exception(error)
            raise
        finally:
            counts.put(0)
        if not writing:
            write(None, None, made.result)
        for written in writing:
            written.result()
    return made.result()


@contextmanager
def _short_turns() -> Iterator[None]:
    """Python's threads take turns of 0.5 ms, not 5: each step of the network waits for one while another writes."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(usual_s)


def _outcome(writing: Future[None], expected: tuple[type[Exception], ...]) -> Exception | None:
    try:
        writing.result()
    except expected as raised:
        return raised
    return None


def slices_at_a_time(shape_yx: tuple[int, int], base_channels: int, device: torch.device) -> int:
    """How many slices half of the device's memory holds on their way through the network, at least one.

    By the memory that the device has, not by what is free, so that a machine gives the same numbers every time.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, memory // 2 // (LIVE_MAPS * base_channels * shape_yx[0] * shape_yx[1] * 4))


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many torchrun started; (0, 1) without it.

    Clusters set variables of these names for purposes of their own, too.
    """
    if not torch.distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Return when all of torchrun's processes have come here: it would end the others when one leaves with an error."""
    if rank_and_size()[1] > 1:
        with suppress(RuntimeError):  # one that was killed never comes
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
