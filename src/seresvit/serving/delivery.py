"""Synthetic series of finished DICOM jobs on to where they belong: C-STORE or STOW-RS, until they are there.

One row a job and destination, in the database of the jobs, and one row for every object that the destination has
taken, so that what was interrupted goes on where it stopped. An object that is sent twice all the same is there once:
its UID is the same however often it is computed.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peewee import AutoField, CharField, FloatField, IntegerField, Model, SqliteDatabase
from pydicom import dcmread
from pydicom.filereader import read_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import build_context, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from seresvit.config import ConfigError
from seresvit.data.dicom import tolerant
from seresvit.serving import commitment
from seresvit.serving.jobs import Job, Jobs
from seresvit.serving.peers import Peer, Tls, Unreachable, Untaken, connected
from seresvit.serving.stow import DUPLICATE, Stow, stow

# C-STORE: stored, perhaps with coerced or dropped elements (PS3.4, B.2.3), or there before, and its answer was lost
# (PS3.7, annex C): of ours, two of one UID are the same.
STORED = (0x0000, 0xB000, 0xB006, 0xB007, DUPLICATE)
# Deliveries that nothing more is done about.
CLOSED = ("delivered", "withdrawn")
OUT_OF_RESOURCES = range(0xA700, 0xA800)
# How long a report is waited for on the association that asked for it.
COMMITMENT_HERE_S = 2.0

Destination = Peer | Stow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sending:
    """How it is sent: our AE title, time-outs, TLS for DICOM, whether C-STORE destinations are to commit themselves.

    After a failure the next try is `first_retry_s` away, then twice that, up to `most_retry_s`. A destination that has
    not committed itself after `commitment_s` is asked again.
    """

    aet: str = "SERESVIT"
    timeout_s: float = 30.0
    tls: Tls | None = None
    commit: bool = False
    first_retry_s: float = 2.0
    most_retry_s: float = 300.0
    commitment_s: float = 900.0

    def retry_s(self, attempts: int) -> float:
        """How long to wait after this many failures in a row."""
        return float(min(self.first_retry_s * 2.0 ** min(attempts - 1, 30), self.most_retry_s))


class Deliveries:
    """What is to be delivered; its methods may be called from any thread."""

    def __init__(self, jobs: Jobs, destinations: Sequence[Destination], sending: Sending):
        """Opens the tables, and keeps jobs from being erased before they are delivered."""
        self.jobs, self.sending = jobs, sending
        self.destinations = {str(one): one for one in destinations}
        if len(self.destinations) < len(destinations):
            raise ConfigError("--send-to, --stow: one destination twice; name each once")
        self._row, self._taken = _rows_of(jobs.database)
        jobs.database.create_tables([self._row, self._taken])
        self._new = {name: threading.Event() for name in self.destinations}
        jobs.needed_by.append(self.needs)
        for row in list(self._row.select()):
            if jobs.get(row.job_id) is None:
                self._forget(row)
            elif row.state not in CLOSED and row.destination not in self.destinations:
                log.warning("job %s was to go to %s, which is no destination any more", row.job_id, row.destination)

    def announce(self, job: Job) -> None:
        """Takes a finished job on; again, changes nothing. Jobs that did not come by DICOM stay here."""
        if job.origin != "dicom" or job.state != "done":
            return
        for name, new in self._new.items():
            self._row.insert(job_id=job.id, destination=name).on_conflict_ignore().execute()
            new.set()

    def withdraw(self, job_id: str) -> None:
        """Another job has taken this one's place: where nothing of it was sent yet, nothing will be."""
        begun = self._taken.select(self._taken.delivery)
        with self.jobs.database.atomic("IMMEDIATE"):
            for name in self.destinations:
                self._row.insert(job_id=job_id, destination=name).on_conflict_ignore().execute()
            of_job = (self._row.job_id == job_id) & (self._row.state == "waiting") & self._row.number.not_in(begun)
            if self._row.update(state="withdrawn").where(of_job).execute():
                log.info("job %s is not sent to where nothing of it is yet: another took its place", job_id)

    def needs(self, job: Job) -> bool:
        """Whether a destination still has to get the files of this job, or to be told of it."""
        of_job = self._row.job_id == job.id
        if self._row.select().where(of_job).count():
            return bool(self._open().where(of_job).count())
        is_one = job.origin == "dicom" and job.state == "done" and bool(self.destinations)
        return is_one and any(job.id == one.id for one in self.jobs.unannounced())

    def waiting(self) -> int:
        """How many deliveries are not yet made."""
        return int(self._open().count())

    def states(self, job_id: str) -> dict[str, str]:
        """By destination: waiting, asked (all is sent, nothing yet committed), delivered or withdrawn."""
        return {row.destination: row.state for row in self._row.select().where(self._row.job_id == job_id)}

    def committed(self, report: commitment.Report) -> bool:
        """Takes note of what a destination committed itself to; False for a transaction that is none of ours."""
        row = self._row.get_or_none((self._row.transaction_uid == report.transaction) & (self._row.state == "asked"))
        if row is None or not report.transaction:
            return False
        of_row = self._taken.delivery == row.number
        safe = {instance for _, instance in report.committed} - {instance for _, instance, _ in report.failed}
        lost = [one.name for one in self._taken.select().where(of_row) if one.sop_instance not in safe]
        if lost:
            self._taken.delete().where(of_row & self._taken.name.in_(lost)).execute()
            self._postpone(row, f"it does not answer for {len(lost)} objects")
        else:
            self._done(row)
        return True

    @contextmanager
    def started(self) -> Iterator["Deliveries"]:
        """Delivers, in a thread for each destination, until the block ends."""
        stopping = threading.Event()
        threads = [threading.Thread(target=self.run, args=(name, stopping)) for name in self.destinations]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            stopping.set()
            for new in self._new.values():
                new.set()
            for thread in threads:
                thread.join()

    def run(self, name: str, stopping: threading.Event) -> None:
        """Delivers to one destination, oldest first, until `stopping`."""
        failures = 0
        with tolerant():
            while not stopping.is_set():
                try:
                    failures = self._deliver_next(name, failures, stopping)
                except Exception as error:  # a database that a full disk cannot keep: it goes on when there is room
                    log.error("deliveries to %s wait: %s", name, type(error).__name__)
                    stopping.wait(self.sending.retry_s(3))
        self.jobs.database.close()

    def _deliver_next(self, name: str, failures: int, stopping: threading.Event) -> int:
        """Tries what is due, or waits for it; how often the destination was not reached in a row."""
        self._new[name].clear()
        row = self._due(name)
        if row is None:
            self._new[name].wait(1.0)
            return failures
        try:
            self._deliver(row, stopping)
            if failures:  # it is there again: nobody need wait any longer
                others = (self._row.destination == name) & (self._row.state == "waiting")
                self._row.update(next_at=0.0).where(others).execute()
        except Unreachable as error:
            self._postpone(row, str(error))
            stopping.wait(self.sending.retry_s(failures + 1))  # no other job would get there either
            return failures + 1
        except Untaken as error:
            self._postpone(row, str(error))
        except Exception as error:  # a full disk, a file that is gone: it must not stop the others
            self._postpone(row, type(error).__name__)
            return failures
        return 0

    def _due(self, name: str) -> Any:
        """The delivery to this destination whose turn it is, None for none."""
        now, next_at = time.time(), self._row.next_at
        # No wait is so long, unless the clock was set back in it.
        never = now + max(self.sending.most_retry_s, self.sending.commitment_s) + 1
        due = self._open().where((self._row.destination == name) & ((next_at <= now) | (next_at > never)))
        return due.order_by(next_at, self._row.number).first()

    def _open(self) -> Any:
        here = self._row.destination.in_(list(self.destinations))
        return self._row.select().where(self._row.state.not_in(CLOSED) & here)

    def _deliver(self, row: Any, stopping: threading.Event) -> None:
        job = self.jobs.get(row.job_id)
        if job is None:
            self._forget(row)
            return
        there = {one.name for one in self._taken.select().where(self._taken.delivery == row.number)}
        files = sorted(job.result.glob("*.dcm"))
        if not files:
            raise Untaken("its files are gone from here")
        paths = [path for path in files if path.name not in there]

        def taken(path: Path) -> None:
            meta = read_file_meta_info(path)
            uids = {"sop_class": meta.MediaStorageSOPClassUID, "sop_instance": meta.MediaStorageSOPInstanceUID}
            self._taken.insert(delivery=row.number, name=path.name, **uids).on_conflict_ignore().execute()

        destination = self.destinations[row.destination]
        if isinstance(destination, Stow):
            if stow(destination, paths, taken, self.sending.timeout_s, stopping):
                self._done(row)
        else:
            self._store(row, destination, paths, taken, stopping)

    def _store(
        self, row: Any, peer: Peer, paths: list[Path], taken: Callable[[Path], None], stopping: threading.Event
    ) -> None:
        answered = threading.Event()

        def report(event: evt.Event) -> tuple[int, None]:
            known = self.committed(commitment.answered(event.event_information))
            self.jobs.database.close()  # this thread's connection
            answered.set()
            return (0x0000 if known else 0x0110), None

        contexts = _contexts(paths) + ([commitment.context()] if self.sending.commit else [])
        if not contexts:
            self._done(row)
            return
        handlers = [(evt.EVT_N_EVENT_REPORT, report)]
        association = connected(
            self.sending.aet, peer, contexts, self.sending.timeout_s, self.sending.tls, evt_handlers=handlers
        )
        try:
            if not store(association, paths, taken, stopping):
                return
            if not self.sending.commit:
                self._done(row)
            elif StorageCommitmentPushModel not in [one.abstract_syntax for one in association.accepted_contexts]:
                log.warning("%s offers no storage commitment: what it says it stored counts as delivered", peer)
                self._done(row)
            else:
                self._ask(row, association)
                answered.wait(COMMITMENT_HERE_S)
        finally:
            association.release()

    def _ask(self, row: Any, association: Association) -> None:
        """Asks for storage commitment; the answer comes here or to the node, soon or later."""
        rows = self._taken.select().where(self._taken.delivery == row.number)
        references = [(one.sop_class, one.sop_instance) for one in rows]
        row.transaction_uid, row.state, row.next_at = generate_uid(), "asked", time.time() + self.sending.commitment_s
        row.save()
        if not commitment.ask(association, row.transaction_uid, references):
            raise Unreachable("it does not answer when asked for storage commitment")

    def _done(self, row: Any) -> None:
        self._row.update(state="delivered").where(self._row.number == row.number).execute()
        self._taken.delete().where(self._taken.delivery == row.number).execute()
        log.info("job %s is delivered to %s", row.job_id, row.destination)

    def _postpone(self, row: Any, reason: str) -> None:
        attempts = row.attempts + 1
        retry_s = self.sending.retry_s(attempts)
        change = {"state": "waiting", "attempts": attempts, "next_at": time.time() + retry_s}
        still = (self._row.number == row.number) & self._row.state.not_in(CLOSED)
        self._row.update(change).where(still).execute()
        told = (row.job_id, row.destination, reason, retry_s)
        log.warning("job %s is not yet delivered to %s: %s; tried again in %.0f s", *told)

    def _forget(self, row: Any) -> None:
        self._taken.delete().where(self._taken.delivery == row.number).execute()
        self._row.delete().where(self._row.number == row.number).execute()


def store(
    association: Association, paths: list[Path], taken: Callable[[Path], None], stopping: threading.Event
) -> bool:
    """Sends these files and calls `taken` for each that is stored; False when it was stopped before the last.

    Raises Unreachable and Untaken.
    """
    refused: list[int] = []
    for path in paths:
        if stopping.is_set():
            return False
        try:
            answer = association.send_c_store(dcmread(path))
        except RuntimeError:
            raise Unreachable("it ended the association") from None
        except ValueError:  # no context for this class
            refused.append(0x0122)
            continue
        if not answer:
            raise Unreachable("it stopped answering")
        if answer.Status in STORED:
            taken(path)
        elif answer.Status in OUT_OF_RESOURCES:
            raise Unreachable("it is out of resources")
        else:
            refused.append(answer.Status)
    if refused:
        codes = ", ".join(f"0x{code:04X}" for code in sorted(set(refused)))
        raise Untaken(f"it did not take {len(refused)} of {len(paths)} objects (status {codes})")
    return True


def _contexts(paths: list[Path]) -> list[Any]:
    """One for each class and transfer syntax of these files; what is plain may travel as either plain syntax."""
    plain = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    metas = [read_file_meta_info(path) for path in paths]
    kinds = {
        (meta.MediaStorageSOPClassUID, plain if meta.TransferSyntaxUID in plain else (meta.TransferSyntaxUID,))
        for meta in metas
    }
    return [build_context(sop_class, list(syntaxes)) for sop_class, syntaxes in sorted(kinds)]


def _rows_of(opened: SqliteDatabase) -> tuple[Any, Any]:
    """The tables of deliveries, and of objects that were taken, in this database."""

    class Row(Model):
        number = AutoField()
        job_id = CharField()
        destination = CharField()
        state = CharField(default="waiting")
        attempts = IntegerField(default=0)
        next_at = FloatField(default=0.0)
        transaction_uid = CharField(default="")

        class Meta:
            database = opened
            table_name = "deliveries"
            indexes = ((("job_id", "destination"), True),)

    class Taken(Model):
        delivery = IntegerField()
        name = CharField()
        sop_class = CharField()
        sop_instance = CharField()

        class Meta:
            database = opened
            table_name = "delivered_objects"
            indexes = ((("delivery", "name"), True),)

    return Row, Taken
