"""What the tests of the serving room share: a tiny checkpoint, simulated patients, a queue."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pydicom
import pytest
import torch
import trustme

from seresvit.config import ModelSettings, VitSettings
from seresvit.data import phantom
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.serving.jobs import Jobs

DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


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
