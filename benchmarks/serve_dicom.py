"""Studies pushed through the DICOM node while the server is killed and the destination is away: what arrives.

A sender pushes simulated studies with DCMTK's storescu and pushes again what was not accepted. Meanwhile the server is
killed (SIGKILL) at random moments and started again, and Orthanc, to which synthetic series go, is killed once and is
away for a minute. At the end every series in Orthanc is held against the study that it belongs to.

    python benchmarks/serve_dicom.py [studies, default 30] [kills, default 10] [seconds without Orthanc, default 60]
"""

import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import torch

from seresvit.config import ModelSettings, VitSettings
from seresvit.data.phantom import simulate
from seresvit.model import checkpoint
from seresvit.model.generator import Generator

SLICES, SIZE = 8, 64
QUIET_S = 2
PATIENCE_S = 300.0
DICOMWEB = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"


def tiny_checkpoint(path: Path) -> Path:
    """A network that predicts in milliseconds: what is tried here is all that stands around it."""
    torch.manual_seed(0)
    network = Generator(
        ModelSettings(base_channels=4, token_grid=(4, 4), vit=VitSettings(depth=1, width=16, heads=2, mlp_width=16))
    )
    intensity = {"kind": "window", "low": -1024.0, "high": 2048.0, "unit": "HU"}
    header = {"data": {"window_hu": [-1024, 2048]}, "train_size": [SIZE, SIZE], "target_intensity": intensity}
    checkpoint.save(network, path, {**header, "sources": ["110keV"], "target": "70keV"})
    return path


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Process:
    """A program that is started, killed and started again; its output goes into one file."""

    def __init__(self, command: list[str], log: Path):
        self.command, self.log = command, log
        self.running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.running = subprocess.Popen(self.command, stdout=log, stderr=log)

    def stop(self, how: int = signal.SIGKILL) -> int:
        assert self.running
        self.running.send_signal(how)
        return self.running.wait(120)


class Archive:
    """Orthanc in a folder of its own."""

    def __init__(self, folder: Path):
        self.http, self.dicom = free_ports(2)
        folder.mkdir()
        settings = {
            **{"DicomAet": "ORTHANC", "HttpPort": self.http, "DicomPort": self.dicom, "DicomAlwaysAllowStore": True},
            **{"RemoteAccessAllowed": False, "AuthenticationEnabled": False, "Plugins": [DICOMWEB]},
            **{"StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db")},
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        self.process = Process(["Orthanc", str(folder / "orthanc.json")], folder / "orthanc.log")

    def series(self) -> list[tuple[str, int]]:
        """Study and number of objects of every series; nothing while it is away."""
        with suppress(OSError):
            address = f"http://127.0.0.1:{self.http}/dicom-web/series"
            with urllib.request.urlopen(address, timeout=10) as answer:
                found = [pydicom.Dataset.from_json(one) for one in json.loads(answer.read())]
            return [(one.StudyInstanceUID, one.NumberOfSeriesRelatedInstances) for one in found]
        return []


def push(port: int, folders: list[Path], repeated: Counter[str]) -> None:
    """Every study until it is accepted, as archives do."""
    for folder in folders:
        command = ["storescu", "-aec", "SYNTH", "127.0.0.1", str(port), *map(str, sorted(folder.iterdir()))]
        while subprocess.run(command, capture_output=True, timeout=120).returncode:
            repeated[folder.name] += 1
            time.sleep(1)
        time.sleep(float(np.random.default_rng(len(repeated)).uniform(0, 2)))


def listening(port: int) -> None:
    for _ in range(1200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)


def kill(server: Process, port: int, kills: int) -> None:
    """At random moments of its work; it is started again at once."""
    random = np.random.default_rng(0)
    for _ in range(kills):
        listening(port)
        time.sleep(random.uniform(0, 8))
        server.stop()
        server.start()


def take_away(archive: Archive, away_s: float) -> None:
    time.sleep(20)
    archive.process.stop()
    time.sleep(away_s)
    archive.process.start()


def main() -> None:
    studies, kills, away_s = (int(word) for word in [*sys.argv[1:], *("30", "10", "60")[len(sys.argv) - 1 :]])
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder, (port,), repeated = Path(name), free_ports(1), Counter[str]()
        simulate(folder / "patients", patients=studies, slices=SLICES, size=SIZE, kev=(110,))
        folders = sorted((folder / "patients" / "110keV").iterdir())
        pushed = {str(pydicom.dcmread(next(one.iterdir())).StudyInstanceUID) for one in folders}
        archive = Archive(folder / "orthanc")
        options = ["--port", "0", "--device", "cpu", "--dicom", f"SYNTH:{port}", "--quiet-s", str(QUIET_S)]
        options += ["--send-to", f"ORTHANC@127.0.0.1:{archive.dicom}", "--folder", str(folder / "served")]
        command = [sys.executable, "-m", "seresvit", "serve", "--checkpoint", str(tiny_checkpoint(folder / "tiny.st"))]
        server = Process([*command, *options], folder / "server.log")
        archive.process.start()
        server.start()
        work = [
            threading.Thread(target=push, args=(port, folders, repeated)),
            threading.Thread(target=kill, args=(server, port, kills)),
            threading.Thread(target=take_away, args=(archive, away_s)),
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        end = time.monotonic() + PATIENCE_S
        while len({study for study, count in archive.series() if count == SLICES}) < studies and time.monotonic() < end:
            time.sleep(1)
        time.sleep(10 * QUIET_S)  # for what should not come any more
        code, found = server.stop(signal.SIGTERM), archive.series()
        archive.process.stop()
        whole = Counter(study for study, count in found if count == SLICES)
        tracebacks = (folder / "server.log").read_text().count("Traceback")
    print(f"| what | of {studies} studies of {SLICES} objects |\n|---|---|")
    for what, number in (
        ("server killed, times", kills),
        ("destination away, s", away_s),
        ("pushes that failed and were repeated", repeated.total()),
        ("studies whose whole synthetic series arrived", len(whole.keys() & pushed)),
        ("of these more than once", sum(count > 1 for count in whole.values())),
        ("series of a part of a study beside it", len(found) - whole.total()),
        ("studies lost", len(pushed - whole.keys())),
        ("series of no study", len({study for study, _ in found} - pushed)),
        ("exit code after SIGTERM", code),
        ("tracebacks in the log", tracebacks),
        ("whole run, s", round(time.monotonic() - started_s)),
    ):
        print(f"| {what} | {number} |")


if __name__ == "__main__":
    main()
