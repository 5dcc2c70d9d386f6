"""What serve_load.py works with: a server process, a destination, patients of its own, clients that do not give up."""

import contextlib
import io
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pydicom
import torch
from pydicom.uid import generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage  # type: ignore[attr-defined]

from seresvit.config import ModelSettings, VitSettings
from seresvit.data import phantom, read_volume
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis.predictor import Predictor

WORD = "Qxzjwv"  # in every name, identifier and file name
SLICES, SIZE, BASES = 12, 96, 4
MOST_WAIT_S = 900.0
FINISHED = ("done", "failed", "cancelled")


@dataclass
class Study:
    """One series as files in memory; `base` numbers the patient whose pixels it has."""

    patient: str
    base: int
    files: list[tuple[str, bytes]]
    study_uid: str
    instances: list[str]


@dataclass
class Server:
    """The process under test; it may be killed and started again."""

    folder: Path
    command: list[str]
    url: str = ""
    starts: int = 0
    most_mib: float = 0.0
    process: subprocess.Popen | None = None

    @property
    def served(self) -> Path:
        """Where it keeps everything."""
        return self.folder / "served"

    @property
    def log(self) -> Path:
        """All that it wrote."""
        return self.folder / "log"

    def start(self) -> None:
        """Returns when it answers."""
        before = self.log.stat().st_size if self.log.exists() else 0
        places = {name: self.folder / name for name in ("cwd", "home", "tmp")}
        for place in places.values():
            place.mkdir(exist_ok=True)
        environment = {**os.environ, "HOME": str(places["home"]), "TMPDIR": str(places["tmp"])}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=places["cwd"], env=environment)
        self.starts += 1
        found = waited(lambda: re.search(r"http://\S+", self.log.read_text()[before:]), "the server to start")
        self.url = found[0]
        waited(lambda: answer(self.url + "/health"), "the server to answer")

    def end(self, how: signal.Signals) -> int:
        """Its exit code."""
        assert self.process
        self.note_memory()
        self.process.send_signal(how)
        return self.process.wait(120)

    def note_memory(self) -> None:
        """Keeps the most memory that it ever had."""
        assert self.process
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            self.most_mib = max(self.most_mib, int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024)

    def rows(self, query: str) -> list[tuple]:
        """What its database says, read beside it."""
        with contextlib.closing(sqlite3.connect(f"file:{self.served}/jobs.sqlite?mode=ro", uri=True)) as database:
            return database.execute(query).fetchall()


@dataclass
class Archive:
    """The destination: takes what it is sent and keeps what was in it."""

    port: int
    arrived: list[pydicom.Dataset] = field(default_factory=list)
    server: object = None

    def start(self) -> None:
        """Listens."""

        def store(event: evt.Event) -> int:
            one = event.dataset
            one.file_meta = event.file_meta
            self.arrived.append(one)
            return 0x0000

        entity = AE(ae_title="ARCHIVE")
        entity.add_supported_context(CTImageStorage)
        self.server = entity.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)]
        )

    def stop(self) -> None:
        """Is down."""
        self.server.shutdown()  # type: ignore[attr-defined]

    def instances_of(self, study: Study) -> list[pydicom.Dataset]:
        """All that came of this study, doubles too."""
        return [one for one in self.arrived if one.StudyInstanceUID == study.study_uid]


@dataclass
class Rig:
    """All of it, with the rows of the table and what was broken."""

    server: Server
    archive: Archive
    bases: list[list[pydicom.Dataset]]
    expected: list[np.ndarray]
    dicom_port: int
    rows: list[tuple[str, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    by_dicom: list[Study] = field(default_factory=list)
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    made: int = 0

    def say(self, what: str, found: str) -> None:
        """A row of the table."""
        self.rows.append((what, found))
        print(f"{what}: {found}", flush=True)

    def study(self) -> Study:
        """A new study of a new patient."""
        number, self.made = self.made, self.made + 1
        base, uids, files, instances = number % BASES, [generate_uid() for _ in range(2)], [], []
        for index, source in enumerate(self.bases[base]):
            one = pydicom.Dataset(source)
            one.file_meta = pydicom.Dataset(source.file_meta)
            one.PatientID, one.PatientName = f"{WORD}{number:05d}", f"{WORD}^Patient{number}"
            one.StudyInstanceUID, one.SeriesInstanceUID = uids
            one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            one.AccessionNumber, one.StudyDescription = f"{WORD}{number}", f"{WORD} abdomen"
            instances.append(one.SOPInstanceUID)
            written = io.BytesIO()
            pydicom.dcmwrite(written, one, enforce_file_format=True)
            files.append((f"{WORD}_{number}_{index}.dcm", written.getvalue()))
        return Study(f"{WORD}{number:05d}", base, files, uids[0], instances)


def waited(ask: Callable, what: str, most_s: float = MOST_WAIT_S):
    """The first answer that is true. Ends the program when none comes."""
    until = time.monotonic() + most_s
    while time.monotonic() < until:
        if found := ask():
            return found
        time.sleep(0.05)
    raise SystemExit(f"waited {most_s:g} s in vain for {what}")


def answer(url: str, method: str = "GET", **given) -> httpx.Response | None:
    """The answer, None where there is none, as from a server that was just killed."""
    try:
        return httpx.request(method, url, timeout=120, **given)
    except httpx.TransportError:
        return None


def submitted(rig: Rig, files: list[tuple[str, bytes]]) -> str:
    """The id under which the files were accepted, however often that had to be asked."""
    key = {"Idempotency-Key": str(uuid.uuid4())}
    while True:
        given = answer(rig.server.url + "/api/jobs", "POST", files=[("files", one) for one in files], headers=key)
        if given is not None and given.status_code == 202:
            return given.json()["id"]
        if given is not None and given.status_code != 503:
            rig.broken.append(f"an upload was answered with {given.status_code}")
            return ""
        time.sleep(0.2)


def stored(rig: Rig, study: Study) -> None:
    """Returns when the node has taken every object by C-STORE, sent again where it was killed meanwhile."""
    left = [pydicom.dcmread(io.BytesIO(content)) for _, content in study.files]
    while left:
        entity = AE(ae_title="SCANNER")
        entity.add_requested_context(CTImageStorage)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = 20
        association = entity.associate("127.0.0.1", rig.dicom_port, ae_title="SERESVIT")
        with contextlib.suppress(RuntimeError, ValueError):
            while left and association.is_established:
                status = association.send_c_store(left[0])
                if status.get("Status", 1) != 0:
                    break
                left.pop(0)
        if association.is_established:
            association.release()
        time.sleep(0.2 if left else 0)


@contextlib.contextmanager
def set_up() -> Iterator[Rig]:
    """A server that runs, a destination that listens, patients to send."""
    with tempfile.TemporaryDirectory(prefix="serve-load-") as made:
        folder = Path(made)
        torch.manual_seed(0)
        vit = VitSettings(depth=2, width=32, heads=4, mlp_width=64)
        header = {"data": {"window_hu": [-1024, 2048]}, "train_size": [SIZE, SIZE], "sources": ["110keV"]}
        header |= {
            "target": "70keV",
            "target_intensity": {"kind": "window", "low": -1024.0, "high": 2048.0, "unit": "HU"},
        }
        network = Generator(ModelSettings(base_channels=8, token_grid=(6, 6), vit=vit))
        checkpoint.save(network, folder / "tiny.safetensors", header)
        phantom.simulate(folder / "patients", patients=BASES, slices=SLICES, size=SIZE, kev=(110,))
        patients = sorted((folder / "patients/110keV").iterdir())
        predictor = Predictor(folder / "tiny.safetensors", "cpu")
        with contextlib.ExitStack() as stack:
            ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(2)]
        options = [*("--checkpoint", folder / "tiny.safetensors", "--folder", folder / "served", "--port", 0)]
        options += [*("--device", "cpu", "--most-waiting", 60, "--dicom", f"SERESVIT:{ports[0]}", "--quiet-s", 2)]
        options += ["--send-to", f"ARCHIVE@127.0.0.1:{ports[1]}"]
        server = Server(folder, [sys.executable, "-m", "seresvit", "serve", *map(str, options)])
        bases = [[pydicom.dcmread(path) for path in sorted(patient.iterdir())] for patient in patients]
        expected = []
        for patient, base in zip(patients, bases, strict=True):
            source = read_volume(patient)
            order = [str(one.SOPInstanceUID) for one in source.headers]
            whole = predictor(source).array
            expected.append(np.stack([whole[order.index(str(one.SOPInstanceUID))] for one in base]))
        rig = Rig(server, Archive(ports[1]), bases, expected, ports[0])
        rig.archive.start()
        server.start()
        try:
            yield rig
        finally:
            if server.process and server.process.poll() is None:
                server.process.kill()
                server.process.wait()
            if rig.broken:
                print(server.log.read_text(errors="replace")[-4000:], file=sys.stderr)
            with contextlib.suppress(Exception):
                rig.archive.stop()
