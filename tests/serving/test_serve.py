"""The server as a process: who may come in, what a kill leaves, what it writes down."""

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pydicom
import pytest

from seresvit.config import ConfigError
from seresvit.serving.serve import ServeSettings, checked_token, is_loopback, load

TOKEN = "0123456789abcdef0123"


class Server:
    """A process of `seresvit serve` on a free port of this machine; what it says is in `said`."""

    def __init__(self, checkpoint, folder, *options):
        self.command = [sys.executable, "-m", "seresvit", "serve", "--checkpoint", checkpoint]
        self.command += ["--folder", folder, "--port", "0", *options]
        self.said, self.folder = folder.with_name("said"), folder
        self.start()

    def start(self):
        start = self.said.stat().st_size if self.said.exists() else 0
        with open(self.said, "ab") as said:
            self.process = subprocess.Popen([*map(str, self.command)], stdout=said, stderr=said, cwd=self.folder.parent)
        for _ in range(600):
            if found := re.search(r"(https?)://[\w.]+:(\d+)", self.said.read_text()[start:]):
                self.url = f"{found[1]}://127.0.0.1:{found[2]}"
                return
            if self.process.poll() is not None:
                raise AssertionError(self.said.read_text())
            time.sleep(0.1)
        raise AssertionError("the server does not start")

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(60)


@pytest.fixture
def server(tiny_checkpoint, tmp_path):
    started = []

    def start(*options):
        started.append(Server(tiny_checkpoint, tmp_path / "served", *options))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            one.process.kill()
        one.process.wait()


def study(patients, name="P001"):
    return [("files", (file.name, file.read_bytes())) for file in sorted((patients / "110keV" / name).iterdir())]


def waited_for(url, job_id, **given):
    for _ in range(600):
        status = httpx.get(f"{url}/api/jobs/{job_id}", **given).json()
        if status["state"] not in ("queued", "running"):
            return status
        time.sleep(0.1)
    raise AssertionError(status)


def test_a_kill_loses_no_job_and_doubles_none(server, patients):
    one = server()
    sent = [httpx.post(f"{one.url}/api/jobs", files=study(patients)).json()["id"] for _ in range(6)]
    for _ in range(3):
        running = None
        while not running:  # at work on something
            running = [job for job in sent if httpx.get(f"{one.url}/api/jobs/{job}").json()["state"] == "running"]
            if all(httpx.get(f"{one.url}/api/jobs/{job}").json()["state"] == "done" for job in sent):
                break
        one.stop(signal.SIGKILL)
        one.start()
    assert {waited_for(one.url, job)["state"] for job in sent} == {"done"}
    results = [httpx.get(f"{one.url}/api/jobs/{job}/result?format=nifti").content for job in sent]
    assert len({result[10:] for result in results}) == 1  # beyond the time in gzip's header
    assert {path.name for path in (one.folder / "jobs").iterdir()} == set(sent)
    assert not list(one.folder.rglob(".writing-*"))


def test_a_signal_stops_it_and_what_waits_goes_on_later(server, patients):
    one = server()
    job = httpx.post(f"{one.url}/api/jobs", files=study(patients)).json()["id"]
    assert one.stop() == 0
    one.start()
    assert waited_for(one.url, job)["state"] == "done"
    assert one.stop(signal.SIGINT) == 0
    assert "Traceback" not in one.said.read_text()


def test_results_are_erased_when_their_time_is_over(server, patients):
    one = server("--keep-hours", "0.0005")  # 1.8 s
    job = httpx.post(f"{one.url}/api/jobs", files=study(patients)).json()["id"]
    for _ in range(300):
        if httpx.get(f"{one.url}/api/jobs/{job}").status_code == 404 and not list((one.folder / "jobs").iterdir()):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it is still there")
    assert one.stop() == 0  # which writes what the log of the database holds
    assert job.encode() not in (one.folder / "jobs.sqlite").read_bytes()


def test_nothing_that_identifies_is_written_down(server, patients):
    one = server()
    header = pydicom.dcmread(next((patients / "110keV/P001").iterdir()))
    named = [("files", (f"{header.PatientName}_{name}", content)) for _, (name, content) in study(patients)]
    waited_for(one.url, httpx.post(f"{one.url}/api/jobs", files=named).json()["id"])
    broken = [("files", (name, content[: len(content) // 2])) for _, (name, content) in named]
    status = waited_for(one.url, httpx.post(f"{one.url}/api/jobs", files=broken).json()["id"])
    assert status["state"] == "failed" and str(header.PatientName) in status["message"]  # told to whoever sent it
    httpx.get(f"{one.url}/{header.PatientID}?name={header.PatientName}")
    with socket.create_connection(("127.0.0.1", httpx.URL(one.url).port)) as raw:
        raw.sendall(f"{header.PatientID} / HTTP/9\r\n{header.PatientName}\r\n\r\n".encode())
        raw.recv(1000)
    told = httpx.get(f"{one.url}/metrics").text + one.said.read_text()
    uids = [header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID]
    assert "POST /api/jobs 202" in told
    assert not [word for word in [str(header.PatientName), header.PatientID, *uids] if word in told]


def test_token(server, patients, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    one = server("--token-file", tmp_path / "token", "--host", "0.0.0.0")
    assert httpx.get(f"{one.url}/api/models").status_code == 401
    assert httpx.post(f"{one.url}/api/jobs", files=study(patients)).status_code == 401
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    job = httpx.post(f"{one.url}/api/jobs", files=study(patients), headers=bearer).json()["id"]
    assert waited_for(one.url, job, headers=bearer)["state"] == "done"
    assert TOKEN not in one.said.read_text()


def test_mutual_tls(server, patients, certificates):
    certificate, key, authority = certificates("server")
    options = ["--tls-cert", certificate, "--tls-key", key, "--tls-clients", authority]
    one = server("--host", "0.0.0.0", *options)
    trusted = ssl.create_default_context(cafile=authority)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{one.url}/health", verify=trusted)
    stranger = ssl.create_default_context(cafile=authority)
    stranger.load_cert_chain(*certificates("stranger", "another")[:2])
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{one.url}/health", verify=stranger)
    trusted.load_cert_chain(*certificates("client")[:2])
    job = httpx.post(f"{one.url}/api/jobs", files=study(patients), verify=trusted).json()["id"]
    assert waited_for(one.url, job, verify=trusted)["state"] == "done"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "anyone in the network could come in"),
        ({"host": "::"}, "anyone in the network could come in"),
        ({"host": "192.168.1.7"}, "anyone in the network could come in"),
        ({"host": "host.example"}, "anyone in the network could come in"),
        ({"host": "localhost.example"}, "anyone in the network could come in"),
        ({"host": "0.0.0.0", "tls_cert": Path("c"), "tls_key": Path("k")}, "anyone in the network could come in"),
        ({"tls_cert": Path("c")}, "TLS needs both"),
        ({"tls_clients": Path("c")}, "needs them too"),
        ({"token_file": Path("nothing")}, "cannot be read"),
    ],
)
def test_refused_at_start(options, message):
    with pytest.raises(ConfigError, match=message):
        checked_token(ServeSettings((), Path("f"), **options))


@pytest.mark.parametrize("text", ["", "short", "sixteen letters 1", "0123456789abcde\n0123456789abcdef", "é" * 20])
def test_a_token_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "token").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="at least 16"):
        checked_token(ServeSettings((), Path("f"), token_file=tmp_path / "token"))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", 1), ("127.9.9.9", 1), ("::1", 1), ("localhost", 1), ("0.0.0.0", 0), ("::", 0), ("10.0.0.1", 0)],
)
def test_loopback(host, loopback):
    assert is_loopback(host) == bool(loopback)


def test_command_refuses_in_one_line(seresvit, tiny_checkpoint, tmp_path, certificates):
    def refused(*options):
        ended = seresvit("serve", "--checkpoint", tiny_checkpoint, "--folder", tmp_path / "served", *options)
        assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended
        return ended.stderr

    assert "anyone in the network" in refused("--host", "0.0.0.0")
    assert "give --dicom" in refused("--port", 0, "--send-to", "PACS@127.0.0.1:104")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another" in refused("--port", taken.getsockname()[1])
    certificate, _, other = certificates("server")
    assert "no certificate and key that fit" in refused("--port", 0, "--tls-cert", certificate, "--tls-key", other)
    assert "is called tiny too" in refused("--port", 0, "--checkpoint", tiny_checkpoint)


def test_models_are_called_by_their_files_or_runs(tiny_checkpoint, tmp_path):
    best = tmp_path / "dect" / "checkpoints" / "best" / "model.safetensors"
    best.parent.mkdir(parents=True)
    os.link(tiny_checkpoint, best)
    assert list(load([tiny_checkpoint, best], "cpu")) == ["tiny", "dect"]
