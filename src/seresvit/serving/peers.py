"""Other DICOM nodes: AE titles and addresses as options spell them, TLS, and a pynetdicom that writes no log."""

import ipaddress
import logging
import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pynetdicom import AE, _config
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from seresvit.config import ConfigError

# PS3.5, 6.2: 16 characters of the default repertoire, without backslash and control characters.
AE_TITLE = re.compile(r"[!-\[\]-~](?:[ -\[\]-~]{0,14}[!-\[\]-~])?")
ANY_TITLE = "*"
LOOPBACK = ("127.0.0.0/8", "::1")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Unreachable(Exception):  # noqa: N818
    """A destination that is not there, refuses us, or stopped answering."""


class Untaken(Exception):  # noqa: N818
    """A destination that did not take some objects."""


@dataclass(frozen=True)
class Peer:
    """A node that listens."""

    aet: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.aet}@{self.host}:{self.port}"


@dataclass(frozen=True)
class Accepted:
    """Who may connect: an AE title (or any) from a network; `port` is where that node listens, 0 if unknown."""

    aet: str
    network: Network
    port: int = 0

    def admits(self, address: str, aet: str = "") -> bool:
        """Whether this address, with this AE title where one is given, is meant."""
        found = ipaddress.ip_address(address.partition("%")[0])
        found = getattr(found, "ipv4_mapped", None) or found
        return found in self.network and (not aet or self.aet in (ANY_TITLE, aet))


@dataclass(frozen=True)
class Tls:
    """PEM files: this node's own, and that of the authority which signed theirs (None: not asked for)."""

    certificate: Path
    key: Path
    authority: Path | None = None

    def server(self) -> ssl.SSLContext:
        """For those who connect. Raises ConfigError for unusable files."""
        context = self._loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        if self.authority:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client(self) -> ssl.SSLContext:
        """For connecting: the other's certificate must be signed by the authority and name its host."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not self.authority:
            context.load_default_certs()
        return self._loaded(context)

    def _loaded(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.authority:
                context.load_verify_locations(self.authority)
        except OSError as error:
            names = ", ".join(str(path) for path in (self.certificate, self.key, self.authority) if path)
            reason = "no certificate and key that fit" if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigError(f"--dicom-tls-cert, -key, -ca: {names}: {reason}; give PEM files") from None
        return context


def tls_from(certificate: Path | None, key: Path | None, authority: Path | None) -> Tls | None:
    """What the three options say, None for none of them. Raises ConfigError for some, and for unusable files."""
    if not (certificate or key or authority):
        return None
    if not (certificate and key):
        raise ConfigError("--dicom-tls-cert, --dicom-tls-key: TLS needs both; give the PEM files of this node")
    tls = Tls(certificate, key, authority)
    tls.server()
    return tls


def node_from(text: str) -> tuple[str, int]:
    """AE title and port of `AET:PORT`. Raises ConfigError for anything else."""
    aet, _, port = text.rpartition(":")
    return _title(aet, f"--dicom {text}", "AET:PORT"), _port(port, f"--dicom {text}", "AET:PORT")


def peer_from(text: str) -> Peer:
    """The node of `AET@HOST:PORT`. Raises ConfigError for anything else."""
    option, form = f"--send-to {text}", "AET@HOST:PORT"
    aet, _, address = text.rpartition("@")
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:]+\]", host):
        raise ConfigError(f"{option}: expected {form}, such as PACS@10.0.0.5:104")
    return Peer(_title(aet, option, form), host.strip("[]"), _port(port, option, form))


def accepted_from(texts: Iterable[str]) -> tuple[Accepted, ...]:
    """Who may connect, by `AET@ADDRESS`, `AET@ADDRESS:PORT` or `AET@NETWORK/BITS`; AET may be `*`.

    Nothing given means any AE title of this machine. Raises ConfigError for anything else.
    """
    accepted = []
    for text in texts:
        option, form = f"--accept {text}", "AET@ADDRESS or AET@ADDRESS:PORT"
        aet, _, address = text.rpartition("@")
        bracketed = re.fullmatch(r"\[([^\]]+)\](?::(\d+))?", address)
        host, port = bracketed.groups() if bracketed else (address, None)
        if not bracketed and address.count(":") == 1:
            host, port = address.split(":")
        try:
            network = ipaddress.ip_network(host, strict=False)
        except ValueError:
            raise ConfigError(f"{option}: expected {form} with an IP address or network, not a name") from None
        title = aet if aet == ANY_TITLE else _title(aet, option, form)
        accepted.append(Accepted(title, network, _port(port, option, form) if port else 0))
    return tuple(accepted) or tuple(Accepted(ANY_TITLE, ipaddress.ip_network(one)) for one in LOOPBACK)


def quieten() -> None:
    """Nothing of pynetdicom is logged, nor what the database is told: both name instances, and may name patients."""
    _config.LOG_HANDLER_LEVEL = "none"
    for name in ("pynetdicom", "peewee"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL + 1)
        logger.propagate = False


def connected(
    aet: str, peer: Peer, contexts: list[PresentationContext], timeout_s: float, tls: Tls | None, **given: Any
) -> Association:
    """An association with `peer` for these contexts; `given` goes to `AE.associate`.

    No call on it blocks for longer than `timeout_s`. Raises Unreachable where there is none to be had.
    """
    quieten()
    entity = AE(ae_title=aet)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = timeout_s
    secured = (tls.client(), peer.host) if tls else None
    asked = {"contexts": contexts, "ae_title": peer.aet, "tls_args": secured, **given}
    try:
        association = entity.associate(peer.host, peer.port, **asked)
    except (OSError, RuntimeError, ValueError):  # a name that is not known, an address that is none
        raise Unreachable("there is no such address") from None
    if association.is_rejected:
        raise Unreachable("it refuses this node, or has no room for it now")
    if not association.is_established:
        raise Unreachable("nobody answers there, or they do not take such objects")
    if association.dul.socket and association.dul.socket.socket:
        association.dul.socket.socket.settimeout(timeout_s)  # it has none, and a send could wait for ever
    return association


def _title(text: str, option: str, form: str) -> str:
    if not AE_TITLE.fullmatch(text):
        raise ConfigError(f"{option}: expected {form} with an AE title of up to 16 characters")
    return text


def _port(text: str, option: str, form: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"{option}: expected {form} with a port from 1 to 65535")
    return int(text)
