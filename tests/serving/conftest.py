"""What the tests of the serving room share: a tiny checkpoint, simulated patients, a queue, servers, and the page."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pydicom
import pytest
import torch
import trustme
import uvicorn

from seresvit.config import FusionSettings, ModelSettings, VitSettings
from seresvit.data import phantom
from seresvit.model import checkpoint
from seresvit.model.generator import Generator, start_as_identity
from seresvit.serving.api import Served, make_app
from seresvit.serving.jobs import Jobs
from seresvit.serving.uploads import Bounds
from seresvit.serving.worker import Worker
from seresvit.synthesis.predictor import Predictor

DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")

# What Chromium itself writes of an answer that is an error.
REPORTED = "Failed to load resource"
# A simulated patient for the page.
SIDE, SLICES = 128, 6


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A checkpoint that predicts in milliseconds, and nothing that is worth a look."""
    torch.manual_seed(0)
    vit = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
    network = Generator(ModelSettings(base_channels=4, token_grid=(2, 2), vit=vit))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    header = {
        "data": {"window_hu": [-1024, 2048]},
        "train_size": [32, 32],
        "target_intensity": {"kind": "window", "low": -1024.0, "high": 2048.0, "unit": "HU"},
        "sources": ["110keV"],
        "target": "70keV",
    }
    checkpoint.save(network, path, header)
    return path


@pytest.fixture(scope="session")
def patients(tmp_path_factory):
    """Simulated patients as DICOM: 110keV/P001 and P002, three slices of 32 × 32 each, and 70keV."""
    root = tmp_path_factory.mktemp("patients")
    phantom.simulate(root, patients=2, slices=3, size=32, kev=(70, 110))
    return root


@pytest.fixture
def jobs(tmp_path):
    """A queue of at most three jobs."""
    opened = Jobs(tmp_path / "served", most_waiting=3)
    yield opened
    opened.close()


@pytest.fixture
def certificates(tmp_path):
    """PEM files of `name`, signed by `authority`, for this machine: certificate, key, the authority's certificate."""
    authorities = {}

    def certificate(name, authority="authority"):
        signing = authorities.setdefault(authority, trustme.CA())
        own, key, of_authority = (tmp_path / file for file in (f"{name}.crt", f"{name}.key", f"{authority}.crt"))
        if not own.exists():
            made = signing.issue_cert("localhost", "127.0.0.1", common_name=name)
            made.cert_chain_pems[0].write_to_path(own)
            made.private_key_pem.write_to_path(key)
            signing.cert_pem.write_to_path(of_authority)
        return own, key, of_authority

    return certificate


class Orthanc:
    """A real archive on this machine, with DICOM and DICOMweb; `start` after `stop` finds what was stored before."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.http, self.dicom = one.getsockname()[1], other.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.http}"

    def start(self, **settings):
        self.folder.mkdir(exist_ok=True)
        settings = {
            **{"DicomAet": "ORTHANC", "HttpPort": self.http, "DicomPort": self.dicom, "DicomCheckCalledAet": True},
            **{"RemoteAccessAllowed": False, "AuthenticationEnabled": False, "DicomAlwaysAllowStore": True},
            **{"StorageDirectory": str(self.folder / "db"), "IndexDirectory": str(self.folder / "db")},
            **{"Plugins": [str(DICOMWEB)], "OverwriteInstances": False, **settings},
        }
        (self.folder / "orthanc.json").write_text(json.dumps(settings))
        with open(self.folder / "orthanc.log", "ab") as log:
            self.process = subprocess.Popen(["Orthanc", str(self.folder / "orthanc.json")], stdout=log, stderr=log)
        for _ in range(200):
            with contextlib.suppress(OSError):
                return self.get("system")
            time.sleep(0.1)
        raise AssertionError((self.folder / "orthanc.log").read_text())

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def get(self, path):
        with urllib.request.urlopen(f"{self.address}/{path}", timeout=10) as answer:
            return json.loads(answer.read())

    def post(self, path, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with urllib.request.urlopen(f"{self.address}/{path}", data=data, timeout=30) as answer:
            return json.loads(answer.read())

    def store(self, file):
        return self.post("instances", Path(file).read_bytes())["ID"]

    def qido(self, query):
        """Datasets that DICOMweb finds."""
        found = self.get(f"dicom-web/{query}")
        return [pydicom.Dataset.from_json(one, lambda *_: None) for one in found]

    def metadata(self, path):
        """Headers that DICOMweb gives."""
        return self.qido(f"{path}/metadata")


@pytest.fixture
def orthanc(tmp_path):
    """An archive that the test starts."""
    if not (shutil.which("Orthanc") and DICOMWEB.is_file()):
        pytest.skip("a DICOM server (Debian orthanc, orthanc-dicomweb) is not installed")
    server = Orthanc(tmp_path / "orthanc")
    yield server
    server.stop()


# The page in a browser.


def write_network(path, fusion):
    """A network that nobody trained: it roughly returns its source, and its gates differ between slices."""
    torch.manual_seed(0)
    vit = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
    settings = ModelSettings(
        base_channels=8, token_grid=(2, 2), vit=vit, fusion=FusionSettings(kind=fusion), norm="instance"
    )
    network = Generator(settings)
    start_as_identity(network)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".fuse.gate." in name:
                weight.mul_(3)
    header = {
        "data": {"window_hu": [-1024, 2048]},
        "train_size": [SIDE, SIDE],
        "target_intensity": {"kind": "window", "low": -1626.0, "high": 434.0, "unit": "HU"},
        "sources": ["110keV"],
        "target": "70keV",
        "spacing_mm_yx": [10.0, 10.0],
    }
    checkpoint.save(network, path, header)
    return path


class PageServer:
    """The real server, in threads; `pause_s` is how long the networks take longer for a slice."""

    def __init__(self, folder, predictors, token=""):
        self.folder, self.predictors, self.token = folder, predictors, token
        self.pause_s, self.port = 0.0, 0
        for predictor in predictors.values():
            predictor.batch_size = 1
            predictor.net.register_forward_pre_hook(lambda *_: time.sleep(self.pause_s))
        self.start()

    def start(self):
        self.jobs = Jobs(self.folder, most_waiting=2)
        self.jobs.recover()
        self.worker, self.stopping = Worker(self.jobs, self.predictors), threading.Event()
        served = Served(self.jobs, self.predictors, self.worker, Bounds(most_bytes=20_000_000), self.token)
        config = uvicorn.Config(make_app(served), port=self.port, log_config=None, lifespan="off")
        self.web = uvicorn.Server(config)
        self.threads = [
            threading.Thread(target=self.web.run, daemon=True),
            threading.Thread(target=self.worker.run, args=(self.stopping,), daemon=True),
        ]
        for thread in self.threads:
            thread.start()
        while not self.web.started:
            time.sleep(0.02)
        self.port = self.web.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        """Stops what runs; a job at work waits for the next start."""
        if self.web.should_exit:
            return
        self.web.should_exit = True
        self.stopping.set()
        self.worker.woken.set()
        for thread in self.threads:
            thread.join(30)
        self.jobs.close()

    def job(self, view):
        return self.jobs.get(view.evaluate("location.hash").removeprefix("#"))


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A simulated patient as DICOM: a folder of six slices of 128 × 128."""
    root = tmp_path_factory.mktemp("patient")
    phantom.simulate(root, patients=1, slices=SLICES, size=SIDE, kev=(70, 110))
    return root / "110keV" / "P001"


@pytest.fixture(scope="module")
def predictors(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        fusion: Predictor(write_network(root / f"{fusion}.safetensors", fusion), "cpu")
        for fusion in ("se", "concat", "attention-gate")
    }


@pytest.fixture(scope="module")
def server(predictors, tmp_path_factory):
    running = PageServer(tmp_path_factory.mktemp("served") / "jobs", predictors)
    yield running
    running.stop()


@pytest.fixture
def own_server(predictors, tmp_path):
    """A function that starts a server of this test's own, with `predictors`, which may be stopped and started."""
    started = []

    def start(**options):
        started.append(PageServer(tmp_path / "own", predictors, **options))
        return started[-1]

    yield start
    for running in started:
        running.stop()
        running.pause_s = 0.0


@pytest.fixture(scope="module")
def browsing(chromium):
    """A function that opens a page; what it says on the console, and every request that leaves the server, is kept."""
    contexts = []

    def browse(url, width=1280, language="en-US", ready="#start .choices label", **options):
        context = chromium.new_context(viewport={"width": width, "height": 820}, locale=language, **options)
        contexts.append(context)
        view = context.new_page()
        view.set_default_timeout(20_000)
        view.said = []
        view.on("console", lambda message: view.said.append(message.text))
        view.on("pageerror", lambda error: view.said.append(str(error)))
        view.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else view.said.append(r.url))
        view.goto(f"{url}/")
        view.wait_for_selector(ready)
        return view

    yield browse
    for context in contexts:
        context.close()


@pytest.fixture
def opened(server, browsing):
    """`browsing` of the server at full speed; the test fails when a page says anything."""
    server.pause_s, views = 0.0, []

    def browse(**options):
        views.append(browsing(server.url, **options))
        return views[-1]

    yield browse
    server.pause_s = 0.0
    for view in views:
        said = [line for line in view.said if not line.startswith(REPORTED)]
        view.context.close()
        assert said == []


@pytest.fixture(scope="module")
def finished(server, browsing, patient):
    """A page with the views of a finished job; tests leave slice, window and language as they found them."""
    view = browsing(server.url)
    view.set_input_files("#folder", patient)
    view.click("#start [type=submit]")
    view.wait_for_selector("#viewer[data-ready]")
    yield view
    assert view.said == []
