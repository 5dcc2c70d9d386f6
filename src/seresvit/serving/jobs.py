"""The queue of what is to be synthesised: on disk before it is accepted, and there again after a crash.

A job is a row of `jobs.sqlite` and a folder `jobs/ID` with `source/`, `result/` and `view/`. Its files are on disk
before the row says so, and the row goes before its folder: what a crash leaves is a folder without a row, which
`recover` removes. One process opens a folder at a time.
"""

import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from peewee import (
    AutoField,
    BooleanField,
    CharField,
    IntegerField,
    IntegrityError,
    Model,
    SqliteDatabase,
    TextField,
    fn,
)

from seresvit.config import ConfigError
from seresvit.data.volume import DataError

State = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED: tuple[State, ...] = ("done", "failed", "cancelled")
# A job at which the server was killed this often is taken to be what kills it. It is many, since a job that is first in
# the queue when a server starts is what any kill soon after hits; and others go before it.
MOST_ATTEMPTS = 10
# What must stay free on the disk for the queue to be written.
LEAST_FREE = 2**28
# The beginning of a folder's name that is being removed.
REMOVED = ".removed-"


class QueueFull(DataError):  # noqa: N818
    """As many jobs wait as may."""


class Cancelled(DataError):  # noqa: N818
    """The job's owner wants it no more."""


@dataclass(frozen=True)
class Job:
    """A job as it was when it was asked for; times are ISO 8601 in UTC, "" for what has not happened."""

    id: str
    origin: str
    checkpoint: str
    state: State
    done: int
    total: int
    message: str
    warnings: tuple[str, ...]
    attempts: int
    created: str
    started: str
    finished: str
    folder: Path

    @property
    def source(self) -> Path:
        """The images as they were given."""
        return self.folder / "source"

    @property
    def result(self) -> Path:
        """What `predict_path` wrote."""
        return self.folder / "result"

    @property
    def view(self) -> Path:
        """What the page shows."""
        return self.folder / "view"


class Jobs:
    """All jobs of one folder; its methods may be called from any thread."""

    def __init__(self, folder: Path, most_waiting: int = 50, keep_s: float = 24 * 3600.0):
        """Opens the folder, or makes it. Raises ConfigError where another process has it open."""
        self.folder = Path(folder).absolute()
        self.most_waiting, self.keep_s = most_waiting, keep_s
        try:
            (self.folder / "jobs").mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = FileLock(self.folder / "lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"--folder {folder}: another server works in it; give each a folder of its own") from None
        except OSError as error:
            raise ConfigError(f"--folder {folder}: cannot be written ({error.strerror}); choose another") from None
        pragmas = {"journal_mode": "wal", "synchronous": "full", "secure_delete": "on"}
        self.database = SqliteDatabase(str(self.folder / "jobs.sqlite"), pragmas=pragmas, timeout=30)
        self._row = _row_of(self.database)
        self.database.create_tables([self._row])
        # Asked before a job is erased: whoever still needs its files says so.
        self.needed_by: list[Callable[[Job], bool]] = []
        self._receiving, self._counting = 0, threading.Lock()
        self._progress: dict[str, tuple[int, int]] = {}

    def close(self) -> None:
        """Lets another process open the folder."""
        self.database.close()
        self._lock.release()

    def room(self) -> int:
        """How many bytes the disk has room for, beside what the queue needs for itself."""
        return shutil.disk_usage(self.folder).free - LEAST_FREE

    def submit(
        self,
        checkpoint: str | Callable[[], str],
        fill: Callable[[Path], object],
        origin: str = "rest",
        key: str | Callable[[Path], str] | None = None,
    ) -> Job:
        """The job, queued, once `fill` has put its images into the folder that it is given, and they are on disk.

        `checkpoint` may be what gives its name once the images are there, `key` what gives it of the folder that they
        are in. A `key` that a job has already gives that job. Raises QueueFull before `fill` is called, and whatever
        `fill` raises; then nothing is left of it.
        """
        if isinstance(key, str) and (known := self._row.get_or_none(self._row.key == key)):
            return self._job(known)
        with self._room():
            job_id = secrets.token_hex(16)
            folder = self._folder_of(job_id)
            try:
                (folder / "source").mkdir(parents=True, mode=0o700)
                fill(folder / "source")
                _sync(folder)
                key = key(folder / "source") if callable(key) else key
                name = checkpoint if isinstance(checkpoint, str) else checkpoint()
                now = _now()
                row = self._row.create(
                    job_id=job_id, key=key or None, origin=origin, checkpoint=name, created=now, queued=now
                )
            except IntegrityError:  # the same key, before or at the same time
                shutil.rmtree(folder, ignore_errors=True)
                return self._job(self._row.get(self._row.key == key))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return self._job(row)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """A place in the queue for a job whose images are still coming."""
        with self._counting:
            waiting = self.count("queued") + self._receiving
            if waiting >= self.most_waiting:
                raise QueueFull(f"{waiting} jobs wait, no more may; try again later")
            self._receiving += 1
        try:
            yield
        finally:
            with self._counting:
                self._receiving -= 1

    def get(self, job_id: str) -> Job | None:
        """The job, None where there is none of this id."""
        row = self._row.get_or_none(self._row.job_id == job_id)
        return self._job(row) if row else None

    def in_state(self, *states: State) -> list[Job]:
        """All jobs in one of these states, oldest first."""
        rows = self._row.select().where(self._row.state.in_(states)).order_by(self._row.number)
        return [self._job(row) for row in rows]

    def count(self, *states: State) -> int:
        """How many jobs are in one of these states."""
        return int(self._row.select().where(self._row.state.in_(states)).count())

    def position(self, job_id: str) -> int:
        """How many jobs will start before this one; 0 for one that does not wait."""
        row = self._row.get_or_none(self._row.job_id == job_id)
        if row is None or row.state != "queued":
            return 0
        queued, number = self._row.queued, self._row.number
        before = (queued < row.queued) | ((queued == row.queued) & (number < row.number))
        return int(self._row.select(fn.COUNT()).where((self._row.state == "queued") & before).scalar())

    def take(self) -> Job | None:
        """The job that has waited longest, now running; None where none waits."""
        with self.database.atomic("IMMEDIATE"):
            waiting = self._row.select().where(self._row.state == "queued")
            row = waiting.order_by(self._row.queued, self._row.number).first()
            if row is None:
                return None
            row.state, row.attempts, row.started = "running", row.attempts + 1, _now()
            row.save()
        return self._job(row)

    def report(self, job_id: str, done: int, total: int) -> None:
        """Keeps how far a running job is, until the server ends. Raises Cancelled when it is to stop."""
        self._progress[job_id] = (done, total)
        row = self._row.get_or_none(self._row.job_id == job_id)
        if row is None or row.cancelling:
            raise Cancelled("cancelled")

    def finish(self, job_id: str, state: State, message: str = "", warnings: Iterable[str] = ()) -> None:
        """Writes how a running job ended; what it wrote must be whole. One that was cancelled loses its files."""
        self._sync_result(job_id)
        with self.database.atomic("IMMEDIATE"):
            row = self._row.get_or_none((self._row.job_id == job_id) & (self._row.state == "running"))
            if row is None:
                return
            if row.cancelling:  # since its last report
                state, message = "cancelled", "cancelled"
            row.state, row.message, row.warnings = state, message, json.dumps(list(warnings))
            (row.done, row.total), row.finished = self._progress.pop(job_id, (0, 0)), _now()
            row.save()
        if state == "cancelled":
            self._remove(job_id)

    def put_back(self, job_id: str) -> None:
        """A running job waits again, as if it had not been taken: the server is being stopped."""
        self._progress.pop(job_id, None)
        here = (self._row.job_id == job_id) & (self._row.state == "running")
        self._row.update(state="queued", attempts=self._row.attempts - 1, started="").where(here).execute()

    def cancel(self, job_id: str) -> bool:
        """A waiting job is cancelled, a running one will be at its next report; False for any other."""
        with self.database.atomic("IMMEDIATE"):
            row = self._row.get_or_none(self._row.job_id == job_id)
            if row is None or row.state in FINISHED:
                return False
            if row.state == "queued":
                row.state, row.message, row.finished = "cancelled", "cancelled", _now()
            row.cancelling = row.state == "running"
            row.save()
        if row.state == "cancelled":
            self._remove(job_id)
        return True

    def erase(self, job_id: str) -> bool:
        """Forgets a finished job and removes its files; False where it is not finished or its files are needed."""
        job = self.get(job_id)
        if job is None or job.state not in FINISHED or any(needs(job) for needs in self.needed_by):
            return False
        self._row.delete().where(self._row.job_id == job_id).execute()
        self._remove(job.id)
        return True

    def expires(self, job: Job) -> str:
        """When a finished job is erased, ISO 8601; "" for one that is not finished."""
        if not job.finished:
            return ""
        return (datetime.fromisoformat(job.finished) + timedelta(seconds=self.keep_s)).isoformat()

    def erase_old(self, now: datetime | None = None) -> int:
        """Erases what has been finished for `keep_s`; how many jobs that were."""
        until = (now or datetime.now(UTC)) - timedelta(seconds=self.keep_s)
        old = [job for job in self.in_state(*FINISHED) if datetime.fromisoformat(job.finished) <= until]
        return sum(self.erase(job.id) for job in old)

    def unannounced(self) -> list[Job]:
        """Jobs that are done, of which `announced` was not yet said."""
        rows = self._row.select().where((self._row.state == "done") & ~self._row.announced)
        return [self._job(row) for row in rows.order_by(self._row.number)]

    def announced(self, job_id: str) -> None:
        """Whoever waits for this job to be done knows that it is."""
        self._row.update(announced=True).where(self._row.job_id == job_id).execute()

    def recover(self) -> None:
        """At start, before any work: jobs that a crash cut short wait again, behind those that wait, lest one that ends
        the server be its only work; and files that belong to none go.

        One that was cut short `MOST_ATTEMPTS` times fails instead; one that was to be cancelled is.
        """
        for job in self.in_state("running"):
            if self._row.get(self._row.job_id == job.id).cancelling:
                self.finish(job.id, "cancelled", "cancelled")
            elif job.attempts >= MOST_ATTEMPTS:
                message = f"the server ended {job.attempts} times while it worked on this; it is not tried again"
                self.finish(job.id, "failed", message)
            else:
                again = self._row.update(state="queued", queued=_now(), started="")
                again.where(self._row.job_id == job.id).execute()
                shutil.rmtree(job.view, ignore_errors=True)
        known = {row.job_id for row in self._row.select().where(self._row.state != "cancelled")}
        for folder in (self.folder / "jobs").iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                for unfinished in folder.glob(".writing-*"):
                    shutil.rmtree(unfinished, ignore_errors=True)

    def _remove(self, job_id: str) -> None:
        """The files of a job, also while a download is made of them: what that writes has no place to go to."""
        gone = self.folder / "jobs" / f"{REMOVED}{job_id}"
        with suppress(OSError):
            self._folder_of(job_id).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _sync_result(self, job_id: str) -> None:
        for part in (self._folder_of(job_id) / "result", self._folder_of(job_id) / "view"):
            if part.is_dir():
                _sync(part)

    def _folder_of(self, job_id: str) -> Path:
        return self.folder / "jobs" / job_id

    def _job(self, row: Any) -> Job:
        done, total = self._progress.get(row.job_id, (row.done, row.total))
        return Job(
            id=row.job_id,
            origin=row.origin,
            checkpoint=row.checkpoint,
            state=row.state,
            done=done,
            total=total,
            message=row.message,
            warnings=tuple(json.loads(row.warnings)),
            attempts=row.attempts,
            created=row.created,
            started=row.started,
            finished=row.finished,
            folder=self._folder_of(row.job_id),
        )


def _row_of(opened: SqliteDatabase) -> Any:
    """The table of jobs in this database."""

    class Row(Model):
        number = AutoField()
        job_id = CharField(unique=True)
        key = CharField(null=True, unique=True)
        origin = CharField()
        checkpoint = CharField()
        state = CharField(default="queued", index=True)
        cancelling = BooleanField(default=False)
        announced = BooleanField(default=False)
        done = IntegerField(default=0)
        total = IntegerField(default=0)
        message = TextField(default="")
        warnings = TextField(default="[]")
        attempts = IntegerField(default=0)
        created = CharField()
        # What decides whose turn it is.
        queued = CharField()
        started = CharField(default="")
        finished = CharField(default="")

        class Meta:
            database = opened
            table_name = "jobs"

    return Row


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _sync(folder: Path) -> None:
    """Returns when all below `folder`, its own name included, would survive a loss of power."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        if path.is_symlink():
            continue
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
