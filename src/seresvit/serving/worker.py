"""One job after another: read, check, predict, show; what went wrong becomes one line of the job, never an end of work.

The network stands behind the Predictor, and files behind `predict_image`: here is only what a job adds to these.
"""

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping

import torch

from seresvit.data import read_volume
from seresvit.data.checks import of_one_image
from seresvit.data.volume import DataError
from seresvit.model.familiarity import looked_at
from seresvit.serving.jobs import Cancelled, Job, Jobs, State
from seresvit.serving.uploads import as_given, image_in
from seresvit.serving.views import hearing, write_views
from seresvit.synthesis.predict import RECORD, Asked, predict_image
from seresvit.synthesis.predictor import Predictor

log = logging.getLogger("seresvit.serving")

# How long a worker without work waits before it looks again.
PAUSE_S = 0.25
AGAIN_S = 5.0
# How much of the memory of its image a job takes on the disk at most: result, view and a download, in 16 bits each.
ON_DISK = 3


class Stopping(Exception):  # noqa: N818
    """The server is being stopped; the job will go on at its next start."""


class NoRoom(Exception):  # noqa: N818
    """The disk cannot take the result now."""


class Worker:
    """Works on the jobs of a queue, one at a time, so that the device's memory holds what it holds for one."""

    def __init__(
        self,
        jobs: Jobs,
        predictors: Mapping[str, Predictor],
        most_s: float = 3600.0,
        most_unpacked: int = 2**33,
    ):
        """`most_s` is how long a job may take, `most_unpacked` how many bytes of memory its image."""
        self.jobs, self.predictors = jobs, predictors
        self.most_s, self.most_unpacked = most_s, most_unpacked
        # Called with each job that is done; called again after a crash between its end and theirs.
        self.on_done: list[Callable[[Job], None]] = []
        # Told the state and the seconds of each job that ends.
        self.on_end: list[Callable[[str, float], None]] = []
        self.woken = threading.Event()

    def run(self, stopping: threading.Event) -> None:
        """Works until `stopping` is set; a job that is then at work waits again."""
        while not stopping.is_set():
            try:
                self._announce()
                job = self.jobs.take()
                if job is not None:
                    self.work(job, stopping)
                    continue
            except Exception as error:  # such as a full disk: the queue goes on when there is room again
                log.error("worker: %s", what_happened(error))
                stopping.wait(AGAIN_S)
            self.woken.wait(PAUSE_S)
            self.woken.clear()

    def work(self, job: Job, stopping: threading.Event) -> None:
        """Brings a running job to its end."""
        started_s = time.monotonic()
        state: State = "failed"
        message, warnings = "", list[str]()
        try:
            warnings = self._synthesise(job, started_s, stopping)
            state = "done"
        except Stopping:
            self.jobs.put_back(job.id)
            log.info("job %s: put back", job.id)
            return
        except NoRoom:
            self.jobs.put_back(job.id)
            log.error("job %s: waits, the disk is full", job.id)
            stopping.wait(AGAIN_S)
            return
        except Cancelled:
            state, message = "cancelled", "cancelled"
        except DataError as error:
            message = as_given(str(error), job.folder)
        except (MemoryError, torch.OutOfMemoryError):
            message = "the image is larger than this machine's memory can work on; give fewer slices"
        except Exception as error:
            message = "an error of the server, not of the image; its log says where"
            log.error("job %s: %s", job.id, what_happened(error))
        while True:
            try:
                self.jobs.finish(job.id, state, message, warnings)
                break
            except Exception as error:  # not known to have ended, it would never end
                log.error("job %s: %s", job.id, what_happened(error))
                if stopping.wait(AGAIN_S):
                    return
        elapsed_s = time.monotonic() - started_s
        log.info("job %s: %s after %.1f s", job.id, state, elapsed_s)
        for tell in self.on_end:
            tell(state, elapsed_s)

    def _synthesise(self, job: Job, started_s: float, stopping: threading.Event) -> list[str]:
        """Result and view of the job on disk; its warnings."""
        predictor = self.predictors.get(job.checkpoint)
        if predictor is None:
            raise DataError(f"the model {job.checkpoint} is no longer served; choose another")
        self.jobs.report(job.id, 0, 0)
        source = image_in(job.source)
        shape = read_volume(source, pixels=False).array.shape
        needed = 4 * shape[0] * shape[1] * shape[2]
        if needed > self.most_unpacked:
            raise DataError(f"{shape} voxels take {needed} bytes; this server takes {self.most_unpacked} at most")
        if self.jobs.room() < ON_DISK * needed:
            raise NoRoom
        # Before it predicts, the network looks at a few slices for the doubts; these do not count.
        total = shape[0]
        seen = -len(looked_at(total)) if predictor.header.get("familiarity") else 0

        def watch(num_slices: int) -> None:
            nonlocal seen
            if stopping.is_set():
                raise Stopping
            if time.monotonic() - started_s > self.most_s:
                raise DataError(f"took longer than {self.most_s / 60:g} minutes, which is all a job gets here")
            self.jobs.report(job.id, max(0, min(seen, total)), total)
            seen += num_slices

        predictor.watch = watch
        try:
            with hearing(predictor) as heard:
                volume, synthetic = predict_image(predictor, source, job.result, Asked())
            write_views(predictor, (volume,), synthetic, job.view, heard(total))
        finally:
            predictor.watch = lambda num_slices: None
        self.jobs.report(job.id, total, total)
        doubts = json.loads((job.result / RECORD).read_text(encoding="utf-8"))["doubts"]
        return [as_given(line, job.folder) for line in (*doubts, *of_one_image(volume, predictor.data))]

    def _announce(self) -> None:
        for job in self.jobs.unannounced():
            try:
                for tell in self.on_done:
                    tell(job)
                self.jobs.announced(job.id)
            except Exception as error:  # told again in a while; the others need not wait for it
                log.error("job %s: %s", job.id, what_happened(error))


def what_happened(error: BaseException) -> str:
    """The kind of an error and where it was raised, without its words, which may name a patient."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places or 'an unknown place'}"
