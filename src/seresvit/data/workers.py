"""Processes that work on one case each, and end with the process that they work for."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.forkserver import ensure_running
from typing import Any

from seresvit.data.volume import DataError


@contextmanager
def mapping(count: int, module: str, died: str) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map`, or its like that works in `count` processes; what has not begun when the block ends is left undone.

    Workers are copies of one process that has imported `module` and the readers of images, so that each begins at once.
    Raises DataError, with the text `died`, when one of them is killed, as for lack of memory.
    """
    if count <= 1:
        yield map
        return
    # Never a copy of this process, which may hold torch, its threads and a GPU.
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    context.set_forkserver_preload([module, "seresvit.data.dicom", "seresvit.data.nifti"])
    if server:
        with _interrupts_ignored():
            ensure_running()
    pool = ProcessPoolExecutor(count, context, _begin)
    try:
        with _interrupts_held():
            # Not at the first case: an interrupt in the middle of a start leaves a worker that nobody knows.
            for started in [pool.submit(time.sleep, 0.05) for _ in range(count)]:
                started.result()
        yield pool.map
    except BrokenProcessPool:
        raise DataError(died) from None
    except BaseException:
        # None is waited for, who may be busy for long.
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process that starts here ignores Ctrl-C from its first moment, as do its copies: this one ends them."""
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def _begin() -> None:
    """One thread of computation, no word of Ctrl-C, and an end together with the process that it works for."""
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
