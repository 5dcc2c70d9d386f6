"""STOW-RS (PS3.18, 10.5): objects to a DICOMweb server."""

import base64
import ipaddress
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydicom.filereader import read_file_meta_info

from seresvit.config import ConfigError
from seresvit.serving.peers import Unreachable, Untaken

# Servers bound the size of a request; a larger object goes alone.
BATCH_BYTES = 32 * 2**20
PIECE = 2**18
REFERENCED, FAILED, INSTANCE, REASON = "00081199", "00081198", "00081155", "00081197"
# The reason of those who refuse an object that they have.
DUPLICATE = 0x0111
# The answers that are about the objects; any other is about the server, or about us.
ABOUT_OBJECTS = (200, 202, 400, 409, 413, 415)


@dataclass(frozen=True)
class Stow:
    """A DICOMweb server: the URL to which `/studies` is added, and the header's value, "" for no credentials."""

    url: str
    authorization: str = field(default="", repr=False)

    def __str__(self) -> str:
        return self.url


def stow_from(url: str, credentials: str = "") -> Stow:
    """The server of this URL; `credentials` are `USER:PASSWORD`, or a bearer token.

    Raises ConfigError for anything but a plain http or https URL, and for credentials that would travel unencrypted.
    """
    try:
        parsed = httpx.URL(url)
        usable = parsed.scheme in ("http", "https") and parsed.host and not (parsed.userinfo or parsed.query)
    except httpx.InvalidURL:
        usable = False
    if not usable:
        shown = url.partition("?")[0].rpartition("@")[2]
        raise ConfigError(f"--stow {shown}: expected a URL such as https://HOST/dicom-web, without user or query")
    credentials = credentials.strip()
    if credentials and parsed.scheme == "http" and not _is_loopback(parsed.host):
        raise ConfigError(f"--stow {url}: credentials would travel unencrypted; use https")
    if ":" in credentials:
        authorization = "Basic " + base64.b64encode(credentials.encode()).decode()
    else:
        authorization = f"Bearer {credentials}" if credentials else ""
    return Stow(url.rstrip("/").removesuffix("/studies"), authorization)


def stow(
    to: Stow, paths: list[Path], taken: Callable[[Path], None], timeout_s: float, stopping: threading.Event
) -> bool:
    """Sends these files and calls `taken` for each that the server has; False when it was stopped before the last.

    Raises Unreachable and Untaken.
    """
    headers = {"Accept": "application/dicom+json"} | ({"Authorization": to.authorization} if to.authorization else {})
    left = 0
    with httpx.Client(headers=headers, timeout=timeout_s, verify=ssl.create_default_context()) as client:
        for batch in _batches(paths):
            if stopping.is_set():
                return False
            has = _sent(client, f"{to.url}/studies", batch)
            for path in batch:
                if str(read_file_meta_info(path).MediaStorageSOPInstanceUID) in has or "*" in has:
                    taken(path)
                else:
                    left += 1
    if left:
        raise Untaken(f"it did not take {left} of {len(paths)} objects")
    return True


def _sent(client: httpx.Client, url: str, batch: list[Path]) -> set[str]:
    """The SOP Instance UIDs that the server says it has; {"*"} for all."""
    boundary = uuid.uuid4().hex
    begin = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    end = f"--{boundary}--\r\n".encode()

    def body() -> Iterator[bytes]:
        for path in batch:
            yield begin
            with open(path, "rb") as file:
                while piece := file.read(PIECE):
                    yield piece
            yield b"\r\n"
        yield end

    size = sum(len(begin) + path.stat().st_size + 2 for path in batch) + len(end)
    kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
    try:
        answer = client.post(url, content=body(), headers={"Content-Type": kind, "Content-Length": str(size)})
    except httpx.HTTPError as error:
        raise Unreachable(type(error).__name__) from None  # its text may hold the address with what is sent
    if answer.status_code not in ABOUT_OBJECTS:
        raise Unreachable(f"it answers {answer.status_code}")
    if answer.status_code in (200, 202, 409):
        try:
            said = _record(answer.json())
            items = said.get(REFERENCED, {}).get("Value", [])
            failed = said.get(FAILED, {}).get("Value", [])
            had = [item for item in failed if item.get(REASON, {}).get("Value") == [DUPLICATE]]
            return {item[INSTANCE]["Value"][0] for item in [*items, *had]}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return {"*"} if answer.status_code == 200 else set()
    return set()


def _record(said: Any) -> dict[str, Any]:
    return said[0] if isinstance(said, list) else said


def _batches(paths: list[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in paths:
        if batch and size + path.stat().st_size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += path.stat().st_size
    if batch:
        yield batch


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
