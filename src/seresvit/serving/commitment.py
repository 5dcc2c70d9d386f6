"""Storage commitment (PS3.4, annex J): what is asked, what is answered, and answers that wait for their addressee."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peewee import AutoField, CharField, FloatField, IntegerField, Model, SqliteDatabase, TextField
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context, build_role
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from seresvit.data.dicom import text_of
from seresvit.serving.peers import Peer, Tls, Unreachable, connected

# The well-known instance to which every request and report refers (PS3.4, J.3.5).
INSTANCE = "1.2.840.10008.1.20.1.1"
REQUEST = 1
ALL_COMMITTED, SOME_FAILED = 1, 2
# An answer that its addressee does not take is given up after this time.
MOST_WAIT_S = 24 * 3600.0
MOST_RETRY_S = 300.0

Reference = tuple[str, str]  # SOP class and instance UID


@dataclass(frozen=True)
class Report:
    """Which objects of a transaction are safe, and which are not, with the FailureReason."""

    transaction: str
    committed: list[Reference]
    failed: list[tuple[str, str, int]]


def context() -> PresentationContext:
    """What a request or a report is sent under."""
    return build_context(StorageCommitmentPushModel, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])


def asked(information: Dataset) -> tuple[str, list[Reference]]:
    """The transaction and the objects of a request. Raises ValueError for one that says neither."""
    transaction = text_of(information, "TransactionUID")
    items = _items(information, "ReferencedSOPSequence")
    if not transaction or not items:
        raise ValueError("a transaction UID and references are needed")
    return transaction, items


def question(transaction: str, references: Iterable[Reference]) -> Dataset:
    """The action information that asks for these objects."""
    information = Dataset()
    information.TransactionUID = transaction
    information.ReferencedSOPSequence = [_reference(*one) for one in references]
    return information


def ask(association: Association, transaction: str, references: Iterable[Reference]) -> bool:
    """Asks the other node to commit itself; whether it will answer."""
    information = question(transaction, references)
    status, _ = association.send_n_action(information, REQUEST, StorageCommitmentPushModel, INSTANCE)
    return bool(status) and status.Status == 0


def answer(report: Report) -> tuple[int, Dataset]:
    """Event type and information of a report."""
    information = question(report.transaction, report.committed)
    if not report.committed:
        del information.ReferencedSOPSequence
    if report.failed:
        information.FailedSOPSequence = [_reference(one, instance) for one, instance, _ in report.failed]
        for item, (_, _, reason) in zip(information.FailedSOPSequence, report.failed, strict=True):
            item.FailureReason = reason
    return (SOME_FAILED if report.failed else ALL_COMMITTED), information


def answered(information: Dataset) -> Report:
    """What a report says."""
    failed = [
        (text_of(item, "ReferencedSOPClassUID"), text_of(item, "ReferencedSOPInstanceUID"), int(reason or 0))
        for item in information.get("FailedSOPSequence") or []
        for reason in [item.get("FailureReason")]
    ]
    return Report(text_of(information, "TransactionUID"), _items(information, "ReferencedSOPSequence"), failed)


def send(association: Association, report: Report) -> bool:
    """Sends a report on this association; whether it was taken."""
    event_type, information = answer(report)
    try:
        status, _ = association.send_n_event_report(information, event_type, StorageCommitmentPushModel, INSTANCE)
    except (RuntimeError, ValueError):  # it was released, or has no context for it
        return False
    return bool(status) and status.Status == 0


def deliver(aet: str, peer: Peer, report: Report, timeout_s: float, tls: Tls | None) -> bool:
    """Sends a report on an association of its own, on which this node is the provider; whether it was taken."""
    role = build_role(StorageCommitmentPushModel, scp_role=True)
    try:
        association = connected(aet, peer, [context()], timeout_s, tls, ext_neg=[role])
    except Unreachable:
        return False
    try:
        return send(association, report)
    finally:
        association.release()


class Answers:
    """Reports for nodes whose port is known, kept in a table until they are taken."""

    def __init__(self, database: SqliteDatabase):
        """Opens the table, or makes it."""
        self._row = _row_of(database)
        database.create_tables([self._row])

    def keep(self, peer: Peer, report: Report) -> None:
        """Returns when the report would survive a crash."""
        said = json.dumps({"committed": report.committed, "failed": report.failed})
        self._row.create(
            transaction_uid=report.transaction, aet=peer.aet, host=peer.host, port=peer.port, said=said, at=time.time()
        )

    def send_due(self, aet: str, timeout_s: float, tls: Tls | None) -> None:
        """Tries every report whose time has come, and forgets what was taken or waited too long."""
        now, next_at = time.time(), self._row.next_at
        # No wait is so long, unless the clock was set back in it.
        for row in list(self._row.select().where((next_at <= now) | (next_at > now + MOST_RETRY_S + 1))):
            said = json.loads(row.said)
            committed = [(one, instance) for one, instance in said["committed"]]
            report = Report(row.transaction_uid, committed, [(a, b, int(c)) for a, b, c in said["failed"]])
            taken = deliver(aet, Peer(row.aet, row.host, row.port), report, timeout_s, tls)
            if taken or time.time() - row.at > MOST_WAIT_S:
                row.delete_instance()
                continue
            row.attempts += 1
            row.next_at = time.time() + min(2.0**row.attempts, MOST_RETRY_S)
            row.save()

    def waiting(self) -> int:
        """How many reports are not yet taken."""
        return int(self._row.select().count())


def _items(information: Dataset, keyword: str) -> list[Reference]:
    return [
        (text_of(item, "ReferencedSOPClassUID"), text_of(item, "ReferencedSOPInstanceUID"))
        for item in information.get(keyword) or []
    ]


def _reference(sop_class: str, sop_instance: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_instance
    return item


def _row_of(opened: SqliteDatabase) -> Any:
    class Row(Model):
        number = AutoField()
        transaction_uid = CharField()
        aet = CharField()
        host = CharField()
        port = IntegerField()
        said = TextField()
        attempts = IntegerField(default=0)
        at = FloatField()
        next_at = FloatField(default=0.0)

        class Meta:
            database = opened
            table_name = "commitment_answers"

    return Row
