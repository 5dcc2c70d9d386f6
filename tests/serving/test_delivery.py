"""Deliveries to Orthanc and to unwilling nodes: all of a series arrives, whatever happens on the way, and once."""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pydicom
import pytest
from pydicom import uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel

from seresvit.config import ConfigError
from seresvit.data import read_volume
from seresvit.data.derived import write_derived
from seresvit.serving import commitment
from seresvit.serving.delivery import Deliveries, Sending
from seresvit.serving.jobs import Jobs
from seresvit.serving.node import NodeSettings, start_node
from seresvit.serving.peers import Peer, accepted_from, tls_from
from seresvit.serving.stow import Stow, stow_from
from seresvit.serving.worker import Worker
from seresvit.synthesis.predictor import Predictor

QUICK = Sending("SYNTH", timeout_s=5, first_retry_s=0.1, most_retry_s=0.4)
CT = uid.CTImageStorage


def until(condition, most_s=20):
    """What `condition` gives as soon as it is true."""
    end = time.monotonic() + most_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
    return found


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def finished(jobs, patients):
    """Makes finished jobs, each with a synthetic series of another simulated patient."""

    def finish(patient="P001", origin="dicom"):
        source = patients / "110keV" / patient
        jobs.submit("tiny", lambda path: shutil.copytree(source, path, dirs_exist_ok=True), origin=origin)
        job = jobs.take()
        write_derived(read_volume(source), job.result, description="Synthetic 70keV", checkpoint_sha256="5e" * 32)
        jobs.finish(job.id, "done")
        return jobs.get(job.id)

    return finish


class Archive:
    """A pynetdicom node that remembers what it was sent, and answers what `answers` says of it."""

    def __init__(self, port=0, tls=None, commits=None):
        self.stored, self.answers, self.commits = [], {}, commits
        entity = AE("PACS")
        entity.add_supported_context(CT)
        if commits is not None:
            entity.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_N_ACTION, self._asked), (evt.EVT_DIMSE_SENT, self._sent)]
        context = tls.server() if tls else None
        self.server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers, ssl_context=context)
        self.peer = Peer("PACS", "127.0.0.1", self.server.server_address[1])

    def _store(self, event):
        instance = event.request.AffectedSOPInstanceUID
        self.stored.append(instance)
        answers = self.answers.get(len(self.stored), 0)
        if answers == "vanish":
            event.assoc.abort()
        return answers if isinstance(answers, int) else 0

    def _asked(self, event):
        transaction, references = commitment.asked(event.action_information)
        event.assoc.report = self.commits(transaction, references)
        return 0x0000, None

    def _sent(self, event):
        report, event.assoc.report = getattr(event.assoc, "report", None), None
        if report:
            threading.Thread(target=commitment.send, args=(event.assoc, report)).start()


@pytest.fixture
def archive():
    """Makes archives, which end with the test."""
    with contextlib.ExitStack() as stack:

        def make(*given, **named):
            made = Archive(*given, **named)
            stack.callback(made.server.shutdown)
            return made

        yield make


def delivered(deliveries, job):
    return until(lambda: set(deliveries.states(job.id).values()) == {"delivered"} and not deliveries.waiting())


def instances_of(job):
    return [str(pydicom.dcmread(path).SOPInstanceUID) for path in sorted(job.result.glob("*.dcm"))]


def errors_of(path):
    found = subprocess.run(["dciodvfy", str(path)], capture_output=True, check=False)
    return [line for line in (found.stdout + found.stderr).decode().splitlines() if line.startswith("Error")]


# --------------------------------------------------------------------------------------------- real archive


@pytest.mark.parametrize("kind", ["C-STORE", "STOW-RS"])
def test_orthanc_has_the_series_and_its_references_lead_to_the_source(jobs, finished, patients, orthanc, kind):
    orthanc.start()
    for file in (patients / "110keV/P001").iterdir():
        orthanc.store(file)
    job = finished()
    peer = Peer("ORTHANC", "127.0.0.1", orthanc.dicom)
    destination = peer if kind == "C-STORE" else stow_from(f"{orthanc.address}/dicom-web/")
    with Deliveries(jobs, [destination], QUICK).started() as deliveries:
        for _ in range(2):  # announced again after a crash
            deliveries.announce(job)
        delivered(deliveries, job)
    source, synthetic = pydicom.dcmread(next((patients / "110keV/P001").iterdir())), instances_of(job)
    found = orthanc.qido(f"studies/{source.StudyInstanceUID}/series?includefield=SeriesDescription")
    assert len(found) == 2
    (ours,) = [series for series in found if series.SeriesInstanceUID != source.SeriesInstanceUID]
    assert ours.SeriesDescription == "Synthetic 70keV" and ours.NumberOfSeriesRelatedInstances == 3
    series = f"studies/{source.StudyInstanceUID}/series/{ours.SeriesInstanceUID}"
    assert sorted(one.SOPInstanceUID for one in orthanc.qido(f"{series}/instances")) == sorted(synthetic)
    referenced = 0
    for dataset in orthanc.metadata(series):
        (reference,) = dataset.SourceImageSequence
        of = orthanc.qido(f"instances?SOPInstanceUID={reference.ReferencedSOPInstanceUID}")
        assert [one.SeriesInstanceUID for one in of] == [source.SeriesInstanceUID]
        referenced += 1
    assert referenced == 3
    if shutil.which("dciodvfy"):
        assert not [error for path in job.result.glob("*.dcm") for error in errors_of(path)]


def test_orthanc_down_and_up_again_gets_all_of_it(jobs, finished, orthanc):
    peer = Peer("ORTHANC", "127.0.0.1", orthanc.dicom)
    both = [peer, stow_from(f"{orthanc.address}/dicom-web")]
    job = finished()
    with Deliveries(jobs, both, QUICK).started() as deliveries:
        deliveries.announce(job)
        until(lambda: all(row.attempts >= 2 for row in deliveries._row.select()))
        assert set(deliveries.states(job.id).values()) == {"waiting"}
    # The server is started anew before the archive is.
    with Deliveries(jobs, both, QUICK).started() as deliveries:
        orthanc.start()
        delivered(deliveries, job)
    assert len(orthanc.get("instances")) == 3


def test_orthanc_commits_itself_to_the_node(jobs, finished, orthanc):
    port = free_port()
    sending = replace(QUICK, commit=True)
    orthanc.start(DicomModalities={"node": ["SYNTH", "127.0.0.1", port]})
    deliveries = Deliveries(jobs, [Peer("ORTHANC", "127.0.0.1", orthanc.dicom)], sending)
    settings = NodeSettings("SYNTH", port, accepted_from(["ORTHANC@127.0.0.1"]), least_free_bytes=0, timeout_s=5)
    job = finished()
    with start_node(settings, jobs, {"CT": "tiny"}, deliveries), deliveries.started():
        deliveries.announce(job)
        delivered(deliveries, job)
        assert deliveries._row.get().transaction_uid


def test_an_archive_that_forwards_all_it_gets_makes_no_circle(jobs, patients, tiny_checkpoint, orthanc, tmp_path):
    port = free_port()
    script = tmp_path / "forward.lua"
    script.write_text("function OnStoredInstance(instanceId) SendToModality(instanceId, 'node') end")
    orthanc.start(DicomModalities={"node": ["SYNTH", "127.0.0.1", port]}, LuaScripts=[str(script)])
    settings = NodeSettings("SYNTH", port, accepted_from([]), quiet_s=1, least_free_bytes=0, timeout_s=5)
    deliveries = Deliveries(jobs, [Peer("ORTHANC", "127.0.0.1", orthanc.dicom)], QUICK)
    worker, stopping = Worker(jobs, {"tiny": Predictor(tiny_checkpoint, "cpu")}), threading.Event()
    worker.on_done.append(deliveries.announce)
    working = threading.Thread(target=worker.run, args=(stopping,))
    with start_node(settings, jobs, {"CT": "tiny"}, deliveries) as node, deliveries.started():
        working.start()
        try:
            for file in sorted((patients / "110keV/P001").iterdir()):
                orthanc.store(file)
            until(lambda: node.spool.received == 6 and not node.spool.waiting(), 60)  # three forth, three back
            (job,) = jobs.in_state("done")
            assert set(deliveries.states(job.id).values()) == {"delivered"}
            assert not jobs.in_state("queued", "running", "failed")
        finally:
            stopping.set()
            working.join()
    assert sorted(one.NumberOfSeriesRelatedInstances for one in orthanc.qido("series")) == [3, 3]


@pytest.mark.skipif(shutil.which("storescp") is None, reason="DCMTK (Debian dcmtk) is not installed")
@pytest.mark.parametrize("secured", [False, True])
def test_dcmtk_receives_what_the_result_holds(jobs, finished, certificates, tmp_path, secured):
    port, ours = free_port(), certificates("node")
    certificate, key, authority = certificates("archive")
    options = ["+tls", key, certificate, "+cf", authority, "-rc"] if secured else []
    (tmp_path / "received").mkdir()
    command = ["storescp", "-aet", "PACS", "-od", tmp_path / "received", "+B", *options, port]
    receiving = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    job = finished()
    sending = replace(QUICK, tls=tls_from(*ours) if secured else None)
    try:
        with Deliveries(jobs, [Peer("PACS", "127.0.0.1", port)], sending).started() as deliveries:
            deliveries.announce(job)
            delivered(deliveries, job)
    finally:
        receiving.kill()
        receiving.wait()
    received = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, (tmp_path / "received").iterdir())}
    sent = [pydicom.dcmread(path) for path in job.result.glob("*.dcm")]
    assert len(received) == len(sent) == 3
    assert all(received[one.SOPInstanceUID] == one for one in sent)


# -------------------------------------------------------------------------------------------------- faults


def test_what_was_taken_is_not_sent_again(jobs, finished, archive):
    unwilling = archive()
    unwilling.answers = {2: 0xA900}
    job = finished()
    with Deliveries(jobs, [unwilling.peer], QUICK).started() as deliveries:
        deliveries.announce(job)
        delivered(deliveries, job)
    one, two, three = instances_of(job)
    assert unwilling.stored == [one, two, three, two]


@pytest.mark.parametrize("answer", [0xA700, "vanish"])
def test_an_archive_that_gives_up_half_way_gets_the_rest_later(jobs, finished, archive, answer):
    weak = archive()
    weak.answers = {2: answer}
    job = finished()
    with Deliveries(jobs, [weak.peer], QUICK).started() as deliveries:
        deliveries.announce(job)
        delivered(deliveries, job)
    one, two, three = instances_of(job)
    assert weak.stored == [one, two, two, three]


@pytest.mark.parametrize("answers", [(0xB000, 0xB006, 0xB007), (0x0111, 0x0111, 0)])
def test_a_warning_counts_as_stored_and_so_does_what_was_there(jobs, finished, archive, answers):
    coercing = archive()
    coercing.answers = dict(enumerate(answers, 1))
    job = finished()
    with Deliveries(jobs, [coercing.peer], QUICK).started() as deliveries:
        deliveries.announce(job)
        delivered(deliveries, job)
    assert coercing.stored == instances_of(job)


def test_a_series_that_is_refused_keeps_no_other_from_its_way(jobs, finished, archive):
    choosy = archive()
    first, second = finished("P001"), finished("P002")
    refused = set(instances_of(first))
    choosy.server.unbind(evt.EVT_C_STORE, choosy._store)
    taken = []

    def store(event):
        instance = str(event.request.AffectedSOPInstanceUID)
        if instance in refused:
            return 0xC000
        taken.append(instance)
        return 0

    choosy.server.bind(evt.EVT_C_STORE, store)
    with Deliveries(jobs, [choosy.peer], QUICK).started() as deliveries:
        deliveries.announce(first)
        deliveries.announce(second)
        until(lambda: deliveries.states(second.id) == {str(choosy.peer): "delivered"})
        assert deliveries.states(first.id) == {str(choosy.peer): "waiting"}
    assert taken == instances_of(second)


def test_a_database_that_cannot_be_written_for_a_while_stops_no_destination(jobs, finished, archive, caplog):
    there = archive()
    deliveries, job = Deliveries(jobs, [there.peer], QUICK), finished()
    deliveries.announce(job)
    jobs.database.execute_sql(
        "create trigger full before insert on delivered_objects begin select raise(fail, ''); end"
    )
    jobs.database.execute_sql("create trigger fuller before update on deliveries begin select raise(fail, ''); end")
    with deliveries.started():
        until(lambda: "wait" in caplog.text)
        for name in ("full", "fuller"):
            jobs.database.execute_sql(f"drop trigger {name}")
        delivered(deliveries, job)
    assert set(there.stored) == set(instances_of(job))


def test_a_clock_that_was_set_back_keeps_nothing_waiting(jobs, finished, archive):
    deliveries, job = Deliveries(jobs, [archive().peer], QUICK), finished()
    deliveries.announce(job)
    deliveries._row.update(next_at=time.time() + 1e8).execute()
    with deliveries.started():
        delivered(deliveries, job)


def test_nothing_is_erased_before_it_is_delivered(jobs, finished, archive):
    port = free_port()
    deliveries = Deliveries(jobs, [Peer("PACS", "127.0.0.1", port)], QUICK)
    job, rest = finished(), finished("P002", origin="rest")
    for one in (job, rest):
        deliveries.announce(one)
    assert deliveries.needs(job) and not deliveries.needs(rest) and deliveries.waiting() == 1
    jobs.keep_s = 0
    assert jobs.erase_old() == 1 and jobs.get(job.id)
    with deliveries.started():
        archive(port)
        delivered(deliveries, job)
    assert jobs.erase_old() == 1
    assert not Deliveries(jobs, [Peer("PACS", "127.0.0.1", port)], QUICK).states(job.id)


def test_what_another_job_takes_the_place_of_is_not_sent_later(jobs, finished, archive):
    port = free_port()
    deliveries = Deliveries(jobs, [Peer("PACS", "127.0.0.1", port)], QUICK)
    announced, ended, begun = finished(), finished(), finished("P002")
    for job in (announced, begun):
        deliveries.announce(job)
    row = deliveries._row.get(job_id=begun.id)
    deliveries._taken.create(delivery=row.number, name="SYN_0001.dcm", sop_class="", sop_instance="")
    for job in (announced, ended, begun):
        deliveries.withdraw(job.id)
    deliveries.announce(ended)
    assert not deliveries.needs(announced) and not deliveries.needs(ended) and deliveries.waiting() == 1
    with deliveries.started():
        there = archive(port)
        delivered(deliveries, begun)
    assert there.stored == instances_of(begun)[1:]


def test_nothing_is_not_said_to_be_delivered(jobs, finished, archive, caplog):
    deliveries, job = Deliveries(jobs, [archive().peer], QUICK), finished()
    shutil.rmtree(job.result)
    deliveries.announce(job)
    with deliveries.started():
        until(lambda: "its files are gone from here" in caplog.text)
    assert set(deliveries.states(job.id).values()) == {"waiting"}


def test_what_ended_just_before_a_crash_is_not_erased_before_it_is_announced(jobs, finished, archive):
    job = finished()
    deliveries = Deliveries(jobs, [archive().peer], QUICK)
    jobs.keep_s = 0
    assert not jobs.erase_old() and not jobs.erase(job.id)
    jobs.announced(job.id)
    assert jobs.erase_old() == 1 and not deliveries.needs(job)


def test_a_destination_that_is_given_no_more_holds_nothing(jobs, finished, archive, caplog):
    job = finished()
    Deliveries(jobs, [Peer("OLD", "127.0.0.1", 104)], QUICK).announce(job)
    jobs.needed_by.clear()
    deliveries = Deliveries(jobs, [archive().peer], QUICK)
    assert "OLD@127.0.0.1:104, which is no destination any more" in caplog.text
    assert not deliveries.needs(job)


def test_a_destination_twice_is_refused(jobs):
    peer = Peer("PACS", "127.0.0.1", 104)
    with pytest.raises(ConfigError, match="twice"):
        Deliveries(jobs, [peer, peer], QUICK)


def test_retries_are_ever_further_apart_up_to_a_limit():
    assert [Sending().retry_s(n) for n in (1, 2, 3, 8, 9, 500)] == [2, 4, 8, 256, 300, 300]


def test_leaving_does_not_wait_for_an_archive_that_is_silent(jobs, finished):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        job = finished()
        peer = Peer("PACS", "127.0.0.1", silent.getsockname()[1])
        with Deliveries(jobs, [peer], replace(QUICK, timeout_s=1)).started() as deliveries:
            deliveries.announce(job)
            time.sleep(0.5)
            leaving = time.monotonic()
        assert time.monotonic() - leaving < 5
    assert deliveries.states(job.id) == {str(peer): "waiting"}


# ------------------------------------------------------------------------------------- storage commitment


def test_only_what_the_archive_answers_for_is_delivered(jobs, finished, archive):
    asked = []

    def commits(transaction, references):
        asked.append(references)
        if len(asked) == 1:
            lost = references[1]
            return commitment.Report(transaction, [references[0], references[2]], [(*lost, 0x0112)])
        return commitment.Report(transaction, references, [])

    honest = archive(commits=commits)
    job = finished()
    with Deliveries(jobs, [honest.peer], replace(QUICK, commit=True)).started() as deliveries:
        deliveries.announce(job)
        delivered(deliveries, job)
    one, two, three = instances_of(job)
    assert honest.stored == [one, two, three, two]
    assert [len(references) for references in asked] == [3, 3]


def test_an_archive_that_never_answers_is_asked_again_and_sent_nothing_twice(jobs, finished, archive):
    asked = []

    def commits(transaction, references):
        asked.append(transaction)
        return commitment.Report(transaction, references, []) if len(asked) > 1 else None

    slow = archive(commits=commits)
    job = finished()
    sending = replace(QUICK, commit=True, commitment_s=0.5)
    with Deliveries(jobs, [slow.peer], sending).started() as deliveries:
        deliveries.announce(job)
        until(lambda: deliveries.states(job.id) == {str(slow.peer): "asked"})
        delivered(deliveries, job)
    assert slow.stored == instances_of(job) and len(set(asked)) == 2


def test_where_no_commitment_is_offered_stored_is_delivered(jobs, finished, archive, caplog):
    plain = archive()
    job = finished()
    with Deliveries(jobs, [plain.peer], replace(QUICK, commit=True)).started() as deliveries:
        deliveries.announce(job)
        delivered(deliveries, job)
    assert "offers no storage commitment" in caplog.text


def test_reports_of_others_change_nothing(jobs, finished, archive):
    deliveries = Deliveries(jobs, [archive().peer], QUICK)
    deliveries.announce(finished())
    assert not deliveries.committed(commitment.Report("1.2.3", [], []))
    assert not deliveries.committed(commitment.Report("", [], []))
    assert deliveries.waiting() == 1


# ---------------------------------------------------------------------------------------------------- TLS


def test_tls_shows_our_certificate_and_asks_for_theirs(jobs, finished, archive, certificates, caplog):
    ours, theirs = tls_from(*certificates("node")), tls_from(*certificates("archive"))
    job = finished()
    secured, stranger = archive(tls=theirs), archive(tls=tls_from(*certificates("thief", authority="another")))
    peers = [secured.peer, stranger.peer]
    with Deliveries(jobs, peers, replace(QUICK, tls=ours, timeout_s=2)).started() as deliveries:
        deliveries.announce(job)
        until(lambda: deliveries.states(job.id)[str(secured.peer)] == "delivered")
        until(lambda: f"{stranger.peer}: nobody answers" in caplog.text)
    assert secured.stored == instances_of(job) and not stranger.stored


# ------------------------------------------------------------------------------------------------ STOW-RS


class Web(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        code, said = self.server.answer(self.path, dict(self.headers), body)
        self.send_response(code)
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *words):
        pass


@pytest.fixture
def web():
    """A DICOMweb server that answers what its `answer` gives, and its URL."""
    server = HTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    yield server, f"http://127.0.0.1:{server.server_address[1]}/dicom-web"
    server.shutdown()
    server.server_close()


def test_stow_sends_again_only_what_was_not_taken(jobs, finished, web):
    server, url = web
    job, seen = finished(), []

    def answer(path, headers, body):
        here = [one for one in instances_of(job) if one.encode() in body]
        seen.append((path, headers.get("Authorization"), here))
        if len(seen) == 1:
            return 503, b""
        taken = here[:2] if len(seen) == 2 else here
        items = [{"00081155": {"vr": "UI", "Value": [one]}} for one in taken]
        return (202 if len(seen) == 2 else 200), json.dumps({"00081199": {"vr": "SQ", "Value": items}}).encode()

    server.answer = answer
    with Deliveries(jobs, [stow_from(url, "clinic:secret word\n")], QUICK).started() as deliveries:
        deliveries.announce(job)
        delivered(deliveries, job)
    one, two, three = instances_of(job)
    assert [here for *_, here in seen] == [[one, two, three], [one, two, three], [three]]
    assert {path for path, *_ in seen} == {"/dicom-web/studies"}
    assert {shown for _, shown, _ in seen} == {"Basic Y2xpbmljOnNlY3JldCB3b3Jk"}


def test_what_a_stow_server_has_is_not_sent_for_ever(jobs, finished, web):
    server, url = web
    job, calls = finished(), []

    def answer(path, headers, body):
        here = [one for one in instances_of(job) if one.encode() in body]
        calls.append(len(here))
        reasons = [{"vr": "US", "Value": [0x0111]}, {"vr": "US", "Value": [0x0110]}, None]
        items = [
            {"00081155": {"vr": "UI", "Value": [one]}, **({"00081197": reason} if reason else {})}
            for one, reason in zip(here, reasons if len(calls) == 1 else reasons[:1] * 2, strict=True)
        ]
        return 409, json.dumps({"00081198": {"vr": "SQ", "Value": items}}).encode()

    server.answer = answer
    with Deliveries(jobs, [stow_from(url)], QUICK).started() as deliveries:
        deliveries.announce(job)
        delivered(deliveries, job)
    assert calls == [3, 2]


@pytest.mark.parametrize("trusted", [True, False])
def test_stow_checks_the_certificate_of_the_server(jobs, finished, certificates, web, monkeypatch, caplog, trusted):
    server, url = web
    certificate, key, authority = certificates("web")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority if trusted else certificates("x", authority="another")[2]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.answer, job = (lambda *_: (200, b"")), finished()
    with Deliveries(jobs, [stow_from(url.replace("http:", "https:"), "token")], QUICK).started() as deliveries:
        deliveries.announce(job)
        if trusted:
            delivered(deliveries, job)
        else:
            until(lambda: "not yet delivered" in caplog.text)
            assert deliveries.waiting()


def test_stow_follows_no_redirection_with_what_it_sends(jobs, finished, web):
    server, url = web
    server.answer = lambda *_: (307, b"")
    job = finished()
    with Deliveries(jobs, [stow_from(url)], QUICK).started() as deliveries:
        deliveries.announce(job)
        until(lambda: deliveries._row.get().attempts)
    assert deliveries.waiting()


@pytest.mark.parametrize(
    ("url", "credentials", "words"),
    [
        ("ftp://pacs/dicom-web", "", "expected a URL"),
        ("pacs/dicom-web", "", "expected a URL"),
        ("https://me:secret@pacs/dicom-web", "", "expected a URL"),
        ("https://pacs/dicom-web?token=secret", "", "expected a URL"),
        ("http://pacs/dicom-web", "secret", "unencrypted"),
    ],
)
def test_stow_addresses_that_cannot_be_meant_are_refused_without_their_secrets(url, credentials, words):
    with pytest.raises(ConfigError, match=words) as error:
        stow_from(url, credentials)
    assert "secret" not in str(error.value)


def test_stow_credentials_are_not_shown():
    assert stow_from("https://pacs/dicom-web/studies", "token") == Stow("https://pacs/dicom-web", "Bearer token")
    assert "token" not in repr(stow_from("https://pacs/dicom-web", "token"))


# --------------------------------------------------------------------------------------------- whole server


class Server:
    """`seresvit serve` as a process."""

    def __init__(self, folder, checkpoint, *options):
        self.command = [sys.executable, "-m", "seresvit", "serve", "--checkpoint", checkpoint, "--folder", folder]
        self.command = [*map(str, self.command), "--port", "0", "--device", "cpu", *map(str, options)]
        self.log = folder.with_suffix(".log")
        self.process = None

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def kill(self, how=signal.SIGKILL):
        os.kill(self.process.pid, how)
        return self.process.wait(60)


@pytest.mark.skipif(shutil.which("storescu") is None, reason="DCMTK (Debian dcmtk) is not installed")
def test_a_study_that_is_pushed_arrives_once_through_any_number_of_kills(patients, tiny_checkpoint, tmp_path, orthanc):
    port = free_port()
    options = ["--dicom", f"SYNTH:{port}", "--send-to", f"ORTHANC@127.0.0.1:{orthanc.dicom}", "--quiet-s", "0.5"]
    server = Server(tmp_path / "served", tiny_checkpoint, *options)

    def echoes():
        echo = subprocess.run(
            ["echoscu", "-aec", "SYNTH", "127.0.0.1", str(port)], capture_output=True, check=False, timeout=30
        )
        return echo.returncode == 0

    def push(patient):
        files = [str(file) for file in sorted((patients / "110keV" / patient).iterdir())]
        subprocess.run(["storescu", "-aec", "SYNTH", "127.0.0.1", str(port), *files], check=True, timeout=60)

    def job_states():
        with contextlib.closing(Jobs(tmp_path / "served")) as jobs:
            return [job.state for job in jobs.in_state("queued", "running", "done", "failed", "cancelled")]

    try:
        server.start()
        until(echoes, 240)
        push("P001")
        server.kill()  # between reception and job
        assert job_states() == []
        server.start()
        until(echoes, 240)
        push("P002")
        until(lambda: "not yet delivered" in server.log.read_text(), 240)
        server.kill()  # between job and delivery
        server.start()
        until(echoes, 240)
        push("P001")
        orthanc.start()
        until(lambda: server.log.read_text().count("is delivered to") == 2, 240)
        assert server.kill(signal.SIGTERM) == 0
    finally:
        if server.process.poll() is None:
            server.kill()
    assert job_states() == ["done", "done"]
    found = orthanc.qido("series?includefield=SeriesDescription")
    assert sorted(one.NumberOfSeriesRelatedInstances for one in found) == [3, 3]
    assert all("Synthetic 70keV" in one.SeriesDescription for one in found)
    log = server.log.read_text()
    of_patient = pydicom.dcmread(next((patients / "110keV/P001").iterdir()))
    identifiers = [of_patient.PatientID, str(of_patient.PatientName), of_patient.StudyInstanceUID]
    assert not [one for one in identifiers if one in log] and "Traceback" not in log


def test_no_log_line_of_a_delivery_names_anyone(jobs, finished, archive, caplog):
    caplog.set_level(logging.DEBUG)
    unwilling = archive()
    unwilling.answers = {1: 0xA900, 5: "vanish"}
    job = finished()
    with Deliveries(jobs, [unwilling.peer], replace(QUICK, commit=True)).started() as deliveries:
        deliveries.announce(job)
        delivered(deliveries, job)
    dataset = pydicom.dcmread(next(job.result.glob("*.dcm")))
    names = [str(dataset.PatientName), dataset.PatientID, dataset.StudyInstanceUID, *instances_of(job)]
    assert "0xA900" in caplog.text and not [name for name in names if name in caplog.text]
