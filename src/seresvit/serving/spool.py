"""What the DICOM node received: on disk before it is answered, by series, until a silent series becomes a job.

SPOOL/SERIES/OBJECT.dcm, where both names are hashes of UIDs: they can be found again, and tell no one apart. What was
decided of a series stands beside its objects in `decided.json`; without it, or when other objects came since, the
series is looked at again once it is silent.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset

from seresvit.data.dicom import read_object, text_of, tolerant
from seresvit.data.volume import DISK_FULL, DataError, written_whole
from seresvit.serving.jobs import Job, Jobs

DECIDED = "decided.json"
# C-STORE (PS3.4, B.2.3) and storage commitment (PS3.3, C.14.1.1).
OUT_OF_RESOURCES, NO_MATCH, CANNOT_UNDERSTAND, PROCESSING_FAILURE = 0xA700, 0xA900, 0xC000, 0x0110
NO_SUCH_OBJECT, CLASS_CONFLICT = 0x0112, 0x0119
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Modality")
# An archive may put an object right that it had under a wrong patient; all UIDs stay the same then.
PERSON = ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate")
# A series whose sender was cut short, or in which the server was, waits for the rest so many times as long.
BROKEN_OFF = 6
# A queue that is full is asked again no sooner.
LEAST_RETRY_S = 2.0
# What every object of ours says of itself: see `data/derivation.py`. An anonymiser may have taken some of it away.
OUR_MODEL, OUR_DESCRIPTION, OUR_COMMENTS = "seresvit", "neural network of seresvit", "Synthetic image: computed"

log = logging.getLogger(__name__)


class Refused(Exception):  # noqa: N818
    """An object that is not taken, with the status that says why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Decision:
    """What was made of which objects of a series: a job, or None for a series that is not synthesised."""

    objects: str
    job: str | None


class Spool:
    """The objects that were received, in one folder; its methods may be called from any thread."""

    def __init__(
        self, folder: Path, jobs: Jobs, models: Mapping[str, str], quiet_s: float = 10.0, least_free_bytes: int = 2**31
    ):
        """`models` names the checkpoint for each modality; objects are refused when less than that is free on disk."""
        self.folder, self.jobs, self.models = Path(folder), jobs, dict(models)
        self.quiet_s, self.least_free_bytes = quiet_s, least_free_bytes
        self.received, self.refused = 0, 0
        # Told the id of each job whose place another took.
        self.superseded: list[Callable[[str], None]] = []
        self._lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for unfinished in [*self.folder.glob(".receiving-*"), *self.folder.glob("*/.writing-*")]:
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        # When each series is to be decided on, by the monotonic clock, unless more of it comes.
        self._due = {
            series.name: time.monotonic() + BROKEN_OFF * quiet_s
            for series in self.folder.iterdir()
            if (kept := _decision(series)) is None or kept.objects != _hash(_objects(series))
        }

    def take(self, parts: Iterable[Any], sop_class: str, sop_instance: str) -> str:
        """The name of its series, when the object would survive a loss of power; `parts` are the bytes of its file.

        An object that is there already stays as it is, unless it comes under another patient. Raises Refused.
        """
        try:
            series = self._take(parts, sop_class, sop_instance)
        except OSError as error:
            full = error.errno in DISK_FULL
            self.refused += 1
            raise Refused(
                OUT_OF_RESOURCES if full else PROCESSING_FAILURE, error.strerror or "cannot be written"
            ) from None
        except Refused:
            self.refused += 1
            raise
        self.received += 1
        return series

    def _take(self, parts: Iterable[Any], sop_class: str, sop_instance: str) -> str:
        parts = list(parts)
        if shutil.disk_usage(self.folder).free - sum(map(len, parts)) < self.least_free_bytes:
            raise Refused(OUT_OF_RESOURCES, "the disk is nearly full")
        handle, name = tempfile.mkstemp(prefix=".receiving-", dir=self.folder)
        temporary = Path(name)
        try:
            with open(handle, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            header = _identified(temporary, sop_class, sop_instance)
            series = self.folder / _series_name(header)
            path = series / _object_name(sop_instance)
            with self._lock:
                series.mkdir(exist_ok=True, mode=0o700)
                is_new = not path.exists()
                if not is_new and _person_in(path) != _person(header):
                    if before := _decision(series):
                        _keep(series, Decision("", before.job))  # to be decided again, also after a crash
                    is_new = True
                if is_new:
                    os.replace(temporary, path)
                self._due[series.name] = time.monotonic() + self.quiet_s  # before it can be taken for an old one
            for folder in (series, self.folder):
                _sync(folder)
            return series.name
        finally:
            temporary.unlink(missing_ok=True)

    def broke_off(self, series: Iterable[str]) -> None:
        """The sender of these series was cut short: it will come again, and need not hurry."""
        with self._lock:
            for name in series:
                if name in self._due:
                    self._due[name] = time.monotonic() + BROKEN_OFF * self.quiet_s

    def missing(self, sop_class: str, sop_instance: str) -> int:
        """0 for an object that is here, else the FailureReason of storage commitment."""
        name = _object_name(sop_instance)
        for series in self.folder.iterdir():
            if (path := series / name).is_file():
                try:
                    with tolerant():
                        found = read_object(path, pixels=False)
                except Exception:  # it was read when it came: the disk failed
                    return PROCESSING_FAILURE
                return 0 if text_of(found, "SOPClassUID") == sop_class else CLASS_CONFLICT
        return NO_SUCH_OBJECT

    def waiting(self) -> int:
        """How many series are not yet decided on."""
        return len(self._due)

    def decide(self) -> None:
        """Makes a job of every series that has been silent long enough, unless it is one that is not synthesised."""
        with self._lock:
            silent = [(name, due) for name, due in self._due.items() if due <= time.monotonic()]
        for name, due in silent:
            again = None
            try:
                self._decide(self.folder / name)
            except Exception as error:  # a full queue, a full disk, a damaged file: later, and now the others
                reason: object = error if isinstance(error, DataError) else type(error).__name__
                if isinstance(error, OSError):
                    reason = error.strerror
                log.warning("a series of the DICOM node waits: %s", reason)
                again = time.monotonic() + max(self.quiet_s, LEAST_RETRY_S)
            with self._lock:
                if self._due.get(name) != due:
                    continue  # more of it came
                if again is None:
                    del self._due[name]
                else:
                    self._due[name] = again

    def _decide(self, series: Path) -> None:
        with self._lock:
            objects = _objects(series)
        before, found = _decision(series), _hash(objects)
        if not objects:
            return
        headers = [_header(series / name) for name in objects]
        reason, modality = self._not_synthesised(headers)
        job = None
        if reason:
            log.info("a series of %d objects was received and is not synthesised: %s", len(objects), reason)
        else:
            people = sorted(set(map(_person, headers)))
            job = self._submit(series, objects, people, modality)
            log.info("a series of %d objects is job %s", len(objects), job.id)
        # Before it is written down, since a crash between the two would leave the earlier job at work.
        if before and before.job and job and before.job != job.id:
            if self.jobs.cancel(before.job):
                log.info("job %s is cancelled: more of its series came, and job %s has all", before.job, job.id)
            for tell in self.superseded:
                tell(before.job)
        _keep(series, Decision(found, job.id if job else None))

    def _not_synthesised(self, headers: list[Dataset]) -> tuple[str, str]:
        """Why these objects are no input, "" if they are; and their modality."""
        if any(map(is_ours, headers)):
            return "it is synthetic itself", ""
        if all("LOCALIZER" in text_of(header, "ImageType") for header in headers):
            return "it is a localizer", ""
        modality = text_of(headers[0], "Modality")
        return ("" if modality in self.models else f"no checkpoint takes {modality[:16]}"), modality

    def _submit(self, series: Path, objects: list[str], people: list[str], modality: str) -> Job:
        checkpoint = self.models[modality]
        key = "dicom-" + _hash([checkpoint, series.name, *people, *objects])

        def fill(source: Path) -> None:
            for name in objects:
                _same_file(series / name, source / name)

        job = self.jobs.submit(checkpoint, fill, origin="dicom", key=key)
        if job.state in ("failed", "cancelled") and self.jobs.erase(job.id):
            # Whoever sends a series again whose job failed wants it tried again.
            job = self.jobs.submit(checkpoint, fill, origin="dicom", key=key)
        return job

    def erase_old(self, keep_s: float) -> int:
        """Removes series that were decided on and that nothing was added to for `keep_s`; how many."""
        erased = 0
        for series in self.folder.iterdir():
            with self._lock:
                if series.name in self._due or not series.is_dir():
                    continue
                if time.time() - series.stat().st_mtime >= keep_s:
                    shutil.rmtree(series, ignore_errors=True)
                    erased += 1
        return erased


def is_ours(header: Dataset) -> bool:
    """Whether an object, or what it was derived from, was computed by this package: it must never be a source."""
    try:
        return _is_ours(header)
    except Exception:  # a damaged sequence, which the reader will refuse
        return False


def _is_ours(header: Dataset) -> bool:
    for item in header.get("ContributingEquipmentSequence") or []:
        if text_of(item, "ManufacturerModelName") == OUR_MODEL:
            return True
    groups = [*(header.get("SharedFunctionalGroupsSequence") or [])[:1]]
    groups += (header.get("PerFrameFunctionalGroupsSequence") or [])[:1]
    items = [item for group in groups for item in group.get("DerivationImageSequence") or []]
    said = [text_of(part, "DerivationDescription") for part in (header, *items)]
    return OUR_COMMENTS in text_of(header, "ImageComments") or any(OUR_DESCRIPTION in text for text in said)


def _identified(path: Path, sop_class: str, sop_instance: str) -> Dataset:
    """The header of a received object. Raises Refused for one that is not what its sender says, or no DICOM."""
    try:
        with tolerant():
            header = read_object(path, pixels=False)
            lacks = [keyword for keyword in IDENTITY if not text_of(header, keyword)]
            said = (text_of(header, "SOPClassUID"), text_of(header, "SOPInstanceUID"))
    except Exception:  # as `data/dicom.py` says: parsers of damaged files raise almost anything
        raise Refused(CANNOT_UNDERSTAND, "the data set cannot be read") from None
    if lacks:
        raise Refused(CANNOT_UNDERSTAND, f"{lacks[0]} is missing")
    if said != (sop_class, sop_instance):
        raise Refused(NO_MATCH, "the data set is not the object that the command names")
    return header


def _objects(series: Path) -> list[str]:
    return sorted(path.name for path in series.glob("*.dcm"))


def _decision(series: Path) -> Decision | None:
    try:
        return Decision(**json.loads((series / DECIDED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _keep(series: Path, decision: Decision) -> None:
    with written_whole(series / DECIDED) as path:
        path.write_text(json.dumps(asdict(decision)), encoding="utf-8")


def _header(path: Path) -> Dataset:
    with tolerant():
        return read_object(path, pixels=False)


def _person(header: Dataset) -> str:
    return json.dumps([text_of(header, keyword) for keyword in PERSON])


def _person_in(path: Path) -> str:
    try:
        return _person(_header(path))
    except Exception:  # it was read when it came: the disk failed, and the new copy is better
        return ""


def _series_name(header: Dataset) -> str:
    return _hash([text_of(header, "StudyInstanceUID"), text_of(header, "SeriesInstanceUID")])


def _object_name(sop_instance: str) -> str:
    return f"{_hash([sop_instance])}.dcm"


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _same_file(existing: Path, new: Path) -> None:
    """A second name for the file; a copy where the disk has no such thing."""
    try:
        os.link(existing, new)
    except OSError:
        shutil.copyfile(existing, new)


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
