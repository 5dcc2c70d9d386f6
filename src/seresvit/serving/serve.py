"""`seresvit serve`: settings checked, and everything started and stopped: web, worker, node, eraser of old results."""

import ipaddress
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from seresvit.config import ConfigError
from seresvit.serving.api import Served, make_app
from seresvit.serving.delivery import Deliveries, Destination, Sending
from seresvit.serving.jobs import Jobs
from seresvit.serving.node import NodeSettings, models_by_modality, node_settings, start_node
from seresvit.serving.peers import peer_from
from seresvit.serving.stow import stow_from
from seresvit.serving.uploads import MIB, Bounds
from seresvit.serving.worker import Worker, what_happened
from seresvit.synthesis.predictor import Predictor

log = logging.getLogger("seresvit.serving")

LEAST_TOKEN = 16
ERASE_EVERY_S = 60.0
# How long a stopping server waits for requests, and then for the batch that the network is at.
GRACE_S, WORKER_GRACE_S = 5, 60.0
MOST_CONNECTIONS = 512
# How often an image is in memory at most while it is worked on, and room for all else.
COPIES = 8
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServeSettings:
    """The options of `seresvit serve`; see `docs/serving.md`."""

    checkpoints: tuple[Path, ...]
    folder: Path
    host: str = "127.0.0.1"
    port: int = 8080
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_clients: Path | None = None
    device: str = "auto"
    backend: str = "torch"
    keep_hours: float = 24.0
    most_waiting: int = 50
    most_upload_mib: int = 2048
    most_unpacked_mib: int = 8192
    most_minutes: float = 60.0
    dicom: str | None = None
    accept: tuple[str, ...] = ()
    send_to: tuple[str, ...] = ()
    stow: str | None = None
    stow_credentials_file: Path | None = None
    commit: bool = False
    quiet_s: float = 10.0
    dicom_tls_cert: Path | None = None
    dicom_tls_key: Path | None = None
    dicom_tls_ca: Path | None = None


def serve(settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; what is then at work goes on at the next start.

    Raises ConfigError for settings that cannot be meant, and CheckpointError for an unusable checkpoint.
    """
    token, dicom = checked_token(settings), dicom_settings(settings)
    quiet_logs()
    os.umask(0o077)
    with ExitStack() as stack:
        listening = stack.enter_context(_listening(settings))
        predictors = load(settings.checkpoints, settings.device, settings.backend)
        jobs = Jobs(settings.folder, settings.most_waiting, settings.keep_hours * 3600)
        stack.callback(jobs.close)
        jobs.recover()
        most_unpacked = settings.most_unpacked_mib * MIB
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        worker = Worker(jobs, predictors, settings.most_minutes * 60, min(most_unpacked, memory // COPIES))
        stopping = threading.Event()
        threads = [
            threading.Thread(target=worker.run, args=(stopping,), name="worker", daemon=True),
            threading.Thread(target=_erase, args=(jobs, stopping), name="eraser", daemon=True),
        ]
        served = Served(
            jobs,
            predictors,
            worker,
            Bounds(settings.most_upload_mib * MIB, most_unpacked),
            token,
            (*LOOPBACK_NAMES, settings.host) if is_loopback(settings.host) else (),
            faults=lambda: [
                f"the {one.name} has ended; start the server again" for one in threads if not one.is_alive()
            ],
            numbers=stack.enter_context(_dicom(settings, dicom, jobs, predictors, worker)),
        )
        for thread in threads:
            thread.start()
        address, port = listening.getsockname()[:2]
        scheme = "https" if settings.tls_cert else "http"
        say(f"SE-ResViT on {scheme}://{f'[{address}]' if ':' in address else address}:{port}")
        try:
            _run_web(settings, served, listening)
        finally:
            stopping.set()
            worker.woken.set()
            for thread in threads:
                thread.join(WORKER_GRACE_S)


def checked_token(settings: ServeSettings) -> str:
    """The token that requests must bear, "" for none.

    Raises ConfigError where anyone in the network could come in: a host that is not this machine's own loopback needs
    a token, or certificates of those who may come (`tls_clients`).
    """
    if bool(settings.tls_cert) != bool(settings.tls_key) or (settings.tls_clients and not settings.tls_cert):
        raise ConfigError("--tls-cert, --tls-key: TLS needs both, --tls-clients needs them too; give the PEM files")
    token = ""
    if settings.token_file:
        try:
            token = settings.token_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            raise ConfigError(
                f"--token-file {settings.token_file}: cannot be read; check its path and rights"
            ) from None
        if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(
                f"--token-file {settings.token_file}: expected one line of at least {LEAST_TOKEN} letters and digits; "
                "make one with: openssl rand -hex 32"
            )
    if not is_loopback(settings.host) and not (token or settings.tls_clients):
        raise ConfigError(
            f"--host {settings.host}: anyone in the network could come in; give --token-file, or --tls-cert, --tls-key "
            "and --tls-clients, or stay on 127.0.0.1"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether what listens there is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(checkpoints: Sequence[Path], device: str = "auto", backend: str = "torch") -> dict[str, Predictor]:
    """The networks by the names of their files, without suffix; raises ConfigError for one name twice."""
    predictors: dict[str, Predictor] = {}
    for path in checkpoints:
        # Best checkpoints of all runs are called model.safetensors: their runs' names tell them apart.
        name = path.stem
        if path.stem == "model" and path.absolute().parent.name in ("best", "last"):
            name = path.absolute().parents[2].name
        if name in predictors:
            raise ConfigError(f"--checkpoint {path}: another is called {name} too; rename one of the files")
        predictor = Predictor(path, device, backend=backend)
        if len(predictor.data.channels) > 1:
            raise ConfigError(
                f"--checkpoint {path}: takes {len(predictor.data.channels)} images at once; serve gives one"
            )
        predictors[name] = predictor
    if not predictors:
        raise ConfigError("--checkpoint: give at least one")
    return predictors


def quiet_logs() -> None:
    """Our own log on stderr, and nobody else's: what libraries warn of may name a patient."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    root, own = logging.getLogger(), logging.getLogger("seresvit")
    root.handlers, own.handlers = [logging.NullHandler()], [handler]
    own.setLevel(logging.INFO)
    own.propagate = False
    server = logging.getLogger("uvicorn")
    server.handlers, server.propagate = [handler], False
    server.setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    threading.excepthook = lambda args: log.error(
        "thread %s: %s", args.thread.name if args.thread else "", what_happened(args.exc_value or SystemExit())
    )


class _Formatter(logging.Formatter):
    """Of an error only its kind and place."""

    def formatException(self, ei: object) -> str:  # noqa: N802
        error = ei[1] if isinstance(ei, tuple) else None
        return what_happened(error) if isinstance(error, BaseException) else ""

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return ""


@contextmanager
def _listening(settings: ServeSettings) -> Iterator[socket.socket]:
    """A socket that is bound, before anything takes time; raises ConfigError when it cannot be."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {settings.host} --port {settings.port}: {reason}; choose another") from None
    with listening:
        yield listening


def dicom_settings(settings: ServeSettings) -> tuple[NodeSettings, list[Destination]] | None:
    """What the options of the node say, None where there is to be none; raises ConfigError."""
    if not settings.dicom:
        if settings.send_to or settings.stow or settings.accept:
            raise ConfigError("--send-to, --stow, --accept: these are for the DICOM node; give --dicom AET:PORT")
        return None
    node = node_settings(
        settings.dicom,
        list(settings.accept),
        settings.quiet_s,
        settings.dicom_tls_cert,
        settings.dicom_tls_key,
        settings.dicom_tls_ca,
    )
    destinations: list[Destination] = [peer_from(one) for one in settings.send_to]
    if settings.stow:
        credentials = os.environ.get("SERESVIT_STOW_CREDENTIALS", "")
        if settings.stow_credentials_file:
            credentials = settings.stow_credentials_file.read_text("utf-8")
        destinations.append(stow_from(settings.stow, credentials))
    return node, destinations


@contextmanager
def _dicom(
    settings: ServeSettings,
    dicom: tuple[NodeSettings, list[Destination]] | None,
    jobs: Jobs,
    predictors: dict[str, Predictor],
    worker: Worker,
) -> Iterator[Callable[[], dict[tuple[str, str], float]]]:
    """The DICOM node and its deliveries, where they are asked for, and their numbers."""
    if dicom is None:
        yield dict
        return
    node, destinations = dicom
    deliveries = Deliveries(jobs, destinations, Sending(node.aet, tls=node.tls, commit=settings.commit))
    worker.on_done.append(deliveries.announce)
    models = models_by_modality(predictors)
    with deliveries.started(), start_node(node, jobs, models, deliveries) as started:
        yield lambda: {
            ("waiting_deliveries", "Series that a destination does not have yet"): deliveries.waiting(),
            ("waiting_series", "Series that came by DICOM and are no jobs yet"): started.spool.waiting(),
            ("received_objects", "DICOM objects taken since the start"): started.spool.received,
            ("refused_objects", "DICOM objects not taken since the start"): started.spool.refused,
        }


def _erase(jobs: Jobs, stopping: threading.Event) -> None:
    while not stopping.is_set():
        try:
            if erased := jobs.erase_old():
                log.info("%d old jobs erased", erased)
        except Exception as error:  # it must go on
            log.error("eraser: %s", what_happened(error))
        stopping.wait(min(ERASE_EVERY_S, max(jobs.keep_s / 4, 0.1)))


def _run_web(settings: ServeSettings, served: Served, listening: socket.socket) -> None:
    """Answers requests until a signal says otherwise."""
    try:
        config = uvicorn.Config(
            make_app(served),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_S,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            ssl_ca_certs=str(settings.tls_clients) if settings.tls_clients else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_clients else ssl.CERT_NONE,
        )
        config.load()
    except (OSError, ssl.SSLError):
        raise ConfigError(
            "--tls-cert, --tls-key, --tls-clients: no certificate and key that fit; give PEM files"
        ) from None
    # It raises again, when all is stopped, the signal that stopped it; for us that is no reason to die of it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listening])
