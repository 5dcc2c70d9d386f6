"""The DICOM node: takes CT and MR objects by C-STORE, commits itself to them, and makes a job of every silent series.

Who may connect is decided twice: by address before a byte is read, by AE title and address before an association is
accepted. Nothing that a peer sends can take more memory, disk or time than the settings allow.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from pydicom import uid
from pydicom.pixels import get_decoder
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse_messages import N_ACTION_RSP
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification  # type: ignore[attr-defined]
from pynetdicom.transport import AssociationServer, RequestHandler, ThreadedAssociationServer

from seresvit.config import ConfigError
from seresvit.data.dicom import tolerant
from seresvit.serving import commitment
from seresvit.serving.delivery import Deliveries
from seresvit.serving.jobs import Jobs
from seresvit.serving.peers import Accepted, Peer, Tls, accepted_from, node_from, quieten, tls_from
from seresvit.serving.spool import Refused, Spool
from seresvit.synthesis.predictor import Predictor

STORED_CLASSES = (
    *(uid.CTImageStorage, uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage),
    *(uid.MRImageStorage, uid.EnhancedMRImageStorage, uid.LegacyConvertedEnhancedMRImageStorage),
)
NATIVE = (
    *(uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian),
    uid.DeflatedExplicitVRLittleEndian,
)
COMPRESSED = (
    *(uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1),
    *(uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless, uid.JPEG2000),
    *(uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K),
)
# Reject: permanently, by the service user, since the calling AE title is not recognised (PS3.8, 9.3.4).
NOT_RECOGNISED = (0x01, 0x01, 0x03)
# The largest PDU that is no data is an association request: 128 contexts with all their syntaxes.
LEAST_PDU = 2**20
# Connections that are still to say who they are, besides the associations.
MOST_UNDECIDED = 8
POLL_S, ERASE_EVERY_S = 0.5, 60.0
# A node that is to be told of a storage commitment has no longer to answer.
MOST_REPORT_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeSettings:
    """The options of the node; see `docs/serving.md`."""

    aet: str
    port: int
    accepted: tuple[Accepted, ...]
    quiet_s: float = 10.0
    tls: Tls | None = None
    most_associations: int = 10
    most_pdu_bytes: int = 2**17
    most_object_bytes: int = 2**31
    least_free_bytes: int = 2**31
    timeout_s: float = 60.0

    @property
    def host(self) -> str:
        """This machine alone, unless others are accepted."""
        if all(one.network.is_loopback for one in self.accepted):
            return "127.0.0.1"
        return "::" if any(one.network.version == 6 for one in self.accepted) else "0.0.0.0"


def node_settings(
    dicom: str,
    accept: list[str] | None = None,
    quiet_s: float = 10.0,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_ca: Path | None = None,
) -> NodeSettings:
    """What the options of the command line say. Raises ConfigError for one that cannot be meant."""
    aet, port = node_from(dicom)
    if quiet_s <= 0:
        raise ConfigError(f"--quiet-s {quiet_s:g}: expected seconds, more than 0")
    return NodeSettings(aet, port, accepted_from(accept or []), quiet_s, tls_from(tls_cert, tls_key, tls_ca))


def models_by_modality(predictors: Mapping[str, Predictor]) -> dict[str, str]:
    """The name of the checkpoint for each modality: the first that takes one image, for CT in HU, for MR in others.

    Raises ConfigError when none does.
    """
    models: dict[str, str] = {}
    for name, predictor in predictors.items():
        if len(predictor.data.channels) <= 1 and predictor.data.intensity.source != "uint8":
            models.setdefault("CT" if predictor.data.intensity.source == "window" else "MR", name)
    if not models:
        raise ConfigError("--dicom: no checkpoint takes a single CT or MR series; give one that does")
    return models


def transfer_syntaxes() -> list[str]:
    """All that the reader decodes."""
    return [*NATIVE, *(syntax for syntax in COMPRESSED if get_decoder(syntax).is_available)]


class Node:
    """A node that listens; `spool` counts what came, `answers` holds reports of storage commitment that wait."""

    def __init__(self, settings: NodeSettings, spool: Spool, deliveries: Deliveries | None):
        """Ready to serve; `start_node` starts it."""
        self.settings, self.spool, self.deliveries = settings, spool, deliveries
        self.answers = commitment.Answers(spool.jobs.database)
        self._reports: MutableMapping[Association, commitment.Report] = WeakKeyDictionary()
        self._sending: MutableMapping[Association, set[str]] = WeakKeyDictionary()
        self.server: AssociationServer | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.server_address[1] if self.server else self.settings.port

    # ---------------------------------------------------------------------------------------------- handlers

    def requested(self, event: evt.Event) -> None:
        """Rejects whoever is not accepted."""
        association: Any = event.assoc
        caller, address = association.requestor.primitive.calling_ae_title, association.requestor.address
        if not any(one.admits(address, caller) for one in self.settings.accepted):
            log.warning("an association was refused: %s is not accepted from %s", caller, address)
            association.acse.send_reject(*NOT_RECOGNISED)
            association.kill()

    def stored(self, event: evt.Event) -> int:
        """Success once the object is safe, else why it is not taken."""
        request: Any = event.request
        _wire(event.assoc).allowance = self.settings.most_object_bytes
        try:
            # Not `encoded_dataset`, which copies.
            header = b"\0" * 128 + b"DICM" + encode_file_meta(event.file_meta)
            parts = [header, request.DataSet.getbuffer() if request.DataSet else b""]
            series = self.spool.take(parts, str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID))
        except Refused as error:
            log.warning("an object was refused (0x%04X): %s", error.status, error)
            return error.status
        self._sending.setdefault(event.assoc, set()).add(series)
        return 0x0000

    def asked(self, event: evt.Event) -> tuple[int, None]:
        """Takes a request for storage commitment; the report follows."""
        try:
            transaction, references = commitment.asked(event.action_information)
        except Exception:  # whatever damaged sequences raise
            return 0x0115, None  # invalid argument value
        reasons = [(*one, self.spool.missing(*one)) for one in references]
        failed = [one for one in reasons if one[2]]
        report = commitment.Report(transaction, [(a, b) for a, b, reason in reasons if not reason], failed)
        peer = self._return_address(event.assoc)
        if peer:
            self.answers.keep(peer, report)
            self.spool.jobs.database.close()  # this thread's connection
        else:
            self._reports[event.assoc] = report
        return 0x0000, None

    def sent(self, event: evt.Event) -> None:
        """When a request for storage commitment is answered, and not before, its report may go the same way."""
        if isinstance(event.message, N_ACTION_RSP) and (report := self._reports.pop(event.assoc, None)):
            threading.Thread(target=self._report_here, args=(event.assoc, report), daemon=True).start()

    def reported(self, event: evt.Event) -> tuple[int, None]:
        """Takes the report of a destination that was asked to commit itself."""
        try:
            known = self.deliveries is not None and self.deliveries.committed(
                commitment.answered(event.event_information)
            )
        except Exception:  # whatever damaged sequences raise
            known = False
        self.spool.jobs.database.close()  # this thread's connection
        return (0x0000 if known else 0x0110), None

    def released(self, event: evt.Event) -> None:
        """Forgets an association that had its say."""
        self._reports.pop(event.assoc, None)
        self._sending.pop(event.assoc, None)

    def cut_short(self, event: evt.Event) -> None:
        """Forgets an association that had not; what it sent may not be all."""
        self._reports.pop(event.assoc, None)
        self.spool.broke_off(self._sending.pop(event.assoc, ()))

    def _return_address(self, association: Association) -> Peer | None:
        caller, address = association.requestor.ae_title, association.requestor.address
        ports = [one.port for one in self.settings.accepted if one.port and one.admits(address, caller)]
        return Peer(caller, address.removeprefix("::ffff:"), ports[0]) if ports else None

    @staticmethod
    def _report_here(association: Association, report: commitment.Report) -> None:
        if not commitment.send(association, report):
            log.warning("a storage commitment report was not taken; give the port of that node: --accept AET@HOST:PORT")

    # ----------------------------------------------------------------------------------------------- work

    def work(self, stopping: threading.Event, keep_s: float) -> None:
        """Jobs of silent series, and the end of what is old, until `stopping`."""
        erased = time.monotonic()

        def step() -> None:
            nonlocal erased
            self.spool.decide()
            if time.monotonic() - erased > ERASE_EVERY_S:
                self.spool.erase_old(keep_s)
                erased = time.monotonic()

        self._repeat(step, stopping)

    def report(self, stopping: threading.Event) -> None:
        """Reports of storage commitment that are due, until `stopping`; a node that is not there takes time."""
        settings = self.settings
        timeout_s = min(settings.timeout_s, MOST_REPORT_S)
        self._repeat(lambda: self.answers.send_due(settings.aet, timeout_s, settings.tls), stopping)

    def _repeat(self, step: Callable[[], None], stopping: threading.Event) -> None:
        while not stopping.wait(min(POLL_S, self.settings.quiet_s / 2)):
            try:
                step()
            except Exception as error:  # it must go on with the next
                log.error("the DICOM node failed at something and goes on: %s", type(error).__name__)
        self.spool.jobs.database.close()


class _Server(ThreadedAssociationServer):
    """pynetdicom's, for accepted addresses only; a TLS handshake or a slow peer keeps no other waiting."""

    daemon_threads = True

    def __init__(self, node: Node, *given: Any, **named: Any):
        self.node = node
        super().__init__(*given, **named)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        settings = self.node.settings
        known = any(one.admits(client_address[0]) for one in settings.accepted)
        if not known:
            log.warning("a connection from %s was closed: no such address is accepted", client_address[0])
        return known and len(self.active_associations) < settings.most_associations + MOST_UNDECIDED

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        accepting: socket.socket = self.socket  # type: ignore[assignment]
        connection, address = accepting.accept()
        connection.settimeout(self.node.settings.timeout_s)
        if self.ssl_context:
            connection = self.ssl_context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        if self.ssl_context:
            try:
                request.do_handshake()
            except OSError as error:
                reason = getattr(error, "reason", None) or "no handshake"
                log.warning("a connection from %s was closed: TLS: %s", client_address[0], reason)
                self.shutdown_request(request)
                return
        super().process_request_thread(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.error("a connection from %s was closed: an error in the DICOM node", client_address[0])


class _Handler(RequestHandler):
    """pynetdicom's, with a wire that takes only so much."""

    def _create_association(self) -> Association:
        association = super()._create_association()
        settings = self.server.node.settings  # type: ignore[attr-defined]
        wire = _wire(association)
        wire.allowance, read = settings.most_object_bytes, wire.recv

        def bounded(count: int) -> bytearray:
            """pynetdicom takes the length that a PDU claims as it is, and objects as long as they come."""
            wire.allowance -= count
            if count > max(settings.most_pdu_bytes, LEAST_PDU) or wire.allowance < 0:
                raise OSError("more than is allowed")
            return read(count)

        wire.recv = bounded
        return association


def _wire(association: Association) -> Any:
    return association.dul.socket


@contextmanager
def start_node(
    settings: NodeSettings,
    jobs: Jobs,
    models: Mapping[str, str],
    deliveries: Deliveries | None = None,
) -> Iterator[Node]:
    """The node while the block runs, listening; on leaving, all associations are ended and what came stays on disk.

    `models` names the checkpoint for each modality. Raises ConfigError when the port cannot be had.
    """
    quieten()
    spool = Spool(jobs.folder / "spool", jobs, models, settings.quiet_s, settings.least_free_bytes)
    if deliveries:
        spool.superseded.append(deliveries.withdraw)
    node, stopping = Node(settings, spool, deliveries), threading.Event()
    entity = AE(ae_title=settings.aet)
    entity.require_called_aet = True
    entity.maximum_associations, entity.maximum_pdu_size = settings.most_associations, settings.most_pdu_bytes
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = settings.timeout_s
    entity.add_supported_context(Verification)
    for sop_class in STORED_CLASSES:
        entity.add_supported_context(sop_class, transfer_syntaxes())
    # As provider for what came, and as user whom a destination reports to.
    entity.add_supported_context(StorageCommitmentPushModel, list(NATIVE[:2]), scu_role=True, scp_role=True)
    handlers = [
        (evt.EVT_REQUESTED, node.requested),
        (evt.EVT_C_STORE, node.stored),
        (evt.EVT_N_ACTION, node.asked),
        (evt.EVT_N_EVENT_REPORT, node.reported),
        (evt.EVT_DIMSE_SENT, node.sent),
        (evt.EVT_RELEASED, node.released),
        (evt.EVT_ABORTED, node.cut_short),
    ]
    context = settings.tls.server() if settings.tls else None
    with ExitStack() as stack:
        stack.enter_context(tolerant())
        try:
            server = entity.make_server(
                (settings.host, settings.port),
                ssl_context=context,
                evt_handlers=handlers,  # type: ignore[arg-type]
                server_class=partial(_Server, node),  # type: ignore[arg-type]
                request_handler=_Handler,
            )
        except OSError as error:
            raise ConfigError(
                f"--dicom {settings.aet}:{settings.port}: {error.strerror}; choose another port"
            ) from None
        node.server = server
        entity._servers.append(server)
        threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="dicom-node"),
            threading.Thread(target=node.work, args=(stopping, jobs.keep_s), name="dicom-node-work"),
            threading.Thread(target=node.report, args=(stopping,), name="dicom-node-reports"),
        ]
        for thread in threads:
            thread.start()
        log.info("DICOM node %s listens on %s, port %d", settings.aet, settings.host, node.port)
        try:
            yield node
        finally:
            stopping.set()
            server.shutdown()  # before the associations, so that none begins after their end
            for association in server.active_associations:
                association.abort()
            for thread in threads:
                thread.join()
