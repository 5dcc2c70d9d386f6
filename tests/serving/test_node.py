"""The DICOM node against DCMTK, Orthanc and pynetdicom: what is sent becomes one job, and nobody else may send."""

import contextlib
import errno
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pynetdicom import AE, build_context, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

from seresvit.config import ConfigError, IntensitySettings
from seresvit.data import read_volume
from seresvit.data.derived import write_derived
from seresvit.data.dicom import tolerant
from seresvit.serving import commitment
from seresvit.serving.node import NodeSettings, models_by_modality, node_settings, start_node, transfer_syntaxes
from seresvit.serving.peers import Peer, Tls, accepted_from, node_from, peer_from, tls_from
from seresvit.serving.spool import Spool, is_ours
from seresvit.serving.worker import Worker
from seresvit.synthesis.predictor import Predictor

dcmtk = pytest.mark.skipif(shutil.which("storescu") is None, reason="DCMTK (Debian dcmtk) is not installed")
MODELS = {"CT": "tiny"}
CT = uid.CTImageStorage


@pytest.fixture
def settings():
    """A node on a free port, whose series are silent after a moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return NodeSettings("SYNTH", port, accepted_from([]), quiet_s=0.5, least_free_bytes=0, timeout_s=5)


@pytest.fixture
def series(patients, tmp_path):
    """A copy of a simulated series."""
    return Path(shutil.copytree(patients / "110keV/P001", tmp_path / "series"))


@pytest.fixture
def node(settings, jobs):
    """It listens."""
    with start_node(settings, jobs, MODELS) as started:
        yield started


def files_of(folder):
    return sorted(map(str, Path(folder).iterdir()))


def until(condition, most_s=15):
    """What `condition` gives as soon as it is true."""
    end = time.monotonic() + most_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
    return found


def tool(*words, check=True):
    return subprocess.run([str(word) for word in words], capture_output=True, check=check, text=True, timeout=60)


def storescu(settings, files, *options, check=True, called=None):
    return tool("storescu", *options, "-aec", called or settings.aet, "127.0.0.1", settings.port, *files, check=check)


@contextlib.contextmanager
def association(settings, *classes, calling="SENDER", called=None, syntaxes=(uid.ExplicitVRLittleEndian,), **given):
    """Of a pynetdicom client; gives None where it is refused."""
    entity = AE(calling)
    contexts = [build_context(one, list(syntaxes)) for one in classes or (CT,)]
    asked = entity.associate("127.0.0.1", settings.port, contexts, ae_title=called or settings.aet, **given)
    try:
        yield asked if asked.is_established else None
    finally:
        asked.release() if asked.is_established else asked.abort()


def one_job(jobs, objects=3):
    """The job of so many objects; on a slow machine one of fewer may come before it, and is cancelled."""
    return until(lambda: [job for job in jobs.in_state("queued") if len(list(job.source.glob("*"))) == objects])[0]


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (node_from, "SYNTH"),
        (node_from, "SYNTH:0"),
        (node_from, "SEVENTEENLETTERS_:104"),
        (node_from, "BACK\\SLASH:104"),
        (node_from, " SPACE:104"),
        (peer_from, "PACS@host"),
        (peer_from, "PACS@ho st:104"),
        (peer_from, "host:104"),
        (lambda text: accepted_from([text]), "PACS@a.host"),
        (lambda text: accepted_from([text]), "PACS"),
        (lambda text: accepted_from([text]), "PACS@10.0.0.1:99999"),
        (lambda text: accepted_from([text]), "@10.0.0.1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(parse, text):
    with pytest.raises(ConfigError, match="expected"):
        parse(text)


def test_options_are_understood():
    assert node_from("SYNTH:11112") == ("SYNTH", 11112)
    assert peer_from("MY PACS@pacs.hospital:104") == Peer("MY PACS", "pacs.hospital", 104)
    assert peer_from("P@[fe80::1]:104").host == "fe80::1"
    one, many, six = accepted_from(["CT1@10.0.0.5:4242", "*@192.168.0.0/16", "CT2@[fd00::1]:104"])
    assert one.admits("10.0.0.5") and one.admits("10.0.0.5", "CT1") and one.port == 4242
    assert not one.admits("10.0.0.6", "CT1") and not one.admits("10.0.0.5", "CT2")
    assert one.admits("::ffff:10.0.0.5", "CT1")
    assert many.admits("192.168.3.4", "ANYONE") and not many.admits("192.169.3.4", "ANYONE")
    assert six.admits("fd00::1", "CT2") and six.port == 104


def test_others_than_this_machine_are_served_only_when_named():
    assert node_settings("SYNTH:104").host == "127.0.0.1"
    assert node_settings("SYNTH:104", ["CT1@127.0.0.1"]).host == "127.0.0.1"
    assert node_settings("SYNTH:104", ["CT1@10.0.0.5"]).host == "0.0.0.0"
    assert node_settings("SYNTH:104", ["CT1@fd00::1"]).host == "::"
    with pytest.raises(ConfigError, match="quiet"):
        node_settings("SYNTH:104", quiet_s=0)


def test_the_checkpoint_of_a_modality_is_the_first_that_takes_it(tiny_checkpoint):
    predictor = Predictor(tiny_checkpoint, "cpu")
    assert models_by_modality({"a": predictor, "b": predictor}) == {"CT": "a"}
    of_mr = Predictor(tiny_checkpoint, "cpu")
    of_mr.data = of_mr.data.model_copy(update={"intensity": IntensitySettings(source="percentile")})
    assert models_by_modality({"a": predictor, "b": of_mr}) == {"CT": "a", "MR": "b"}
    several = Predictor(tiny_checkpoint, "cpu")
    several.data = several.data.model_copy(update={"channels": ["110keV", "90keV"]})
    with pytest.raises(ConfigError, match="single"):
        models_by_modality({"a": several})


# ------------------------------------------------------------------------------------------------ received


@dcmtk
def test_a_series_that_falls_silent_is_one_job_however_often_it_is_sent(jobs, settings, series):
    with start_node(settings, jobs, MODELS) as node:
        tool("echoscu", "-aec", "SYNTH", "127.0.0.1", settings.port)
        for _ in range(2):
            storescu(settings, files_of(series))
        job = one_job(jobs)
        assert (job.origin, job.checkpoint) == ("dicom", "tiny")
        np.testing.assert_array_equal(read_volume(job.source).array, read_volume(series).array)
        storescu(settings, reversed(files_of(series)))
        until(lambda: not node.spool.waiting())
    # And again, when the server has been started anew.
    with start_node(settings, jobs, MODELS) as node:
        assert not node.spool.waiting()
        storescu(settings, files_of(series))
        assert node.spool.waiting() == 1
        until(lambda: not node.spool.waiting())
    assert [found.id for found in jobs.in_state("queued")] == [job.id]
    assert node.spool.received == 3 and not node.spool.refused


COMMANDS = {
    "-xi": ("dcmconv", "+ti"),
    "-xb": ("dcmconv", "+tb"),
    "-xd": ("dcmconv", "+td"),
    "-xr": ("dcmcrle",),
    "-xs": ("dcmcjpeg", "+e1"),
    "-xt": ("dcmcjpls",),
}


@dcmtk
@pytest.mark.parametrize("option", COMMANDS)
def test_all_that_the_reader_decodes_is_taken(jobs, settings, series, tmp_path, option):
    (tmp_path / "converted").mkdir()
    for file in series.iterdir():
        tool(*COMMANDS[option], file, tmp_path / "converted" / file.name)
    found = {pydicom.dcmread(file).file_meta.TransferSyntaxUID for file in (tmp_path / "converted").iterdir()}
    assert found <= set(transfer_syntaxes()) - {uid.ExplicitVRLittleEndian}
    with start_node(settings, jobs, MODELS):
        storescu(settings, files_of(tmp_path / "converted"), option)
        job = one_job(jobs)
    stored = {pydicom.dcmread(file).file_meta.TransferSyntaxUID for file in job.source.iterdir()}
    assert stored == found
    np.testing.assert_array_equal(read_volume(job.source).array, read_volume(series).array)


def test_jpeg_2000_is_taken_too(jobs, settings, series):
    with start_node(settings, jobs, MODELS), association(settings, syntaxes=[uid.JPEG2000Lossless]) as sender:
        for file in series.iterdir():
            dataset = pydicom.dcmread(file)
            dataset.compress(uid.JPEG2000Lossless, generate_instance_uid=False)
            assert sender.send_c_store(dataset).Status == 0
        np.testing.assert_array_equal(read_volume(one_job(jobs).source).array, read_volume(series).array)


def test_an_mr_goes_to_the_checkpoint_that_takes_it(jobs, settings, series):
    with (
        start_node(settings, jobs, {"CT": "of ct", "MR": "of mr"}),
        association(settings, uid.MRImageStorage) as sender,
    ):
        for file in files_of(series):
            dataset = pydicom.dcmread(file)
            dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = uid.MRImageStorage
            dataset.Modality = "MR"
            assert sender.send_c_store(dataset).Status == 0
        assert one_job(jobs).checkpoint == "of mr"


def test_every_class_is_accepted_in_every_syntax(node, settings):
    classes = [getattr(uid, f"{one}ImageStorage") for one in ("CT", "EnhancedCT", "MR", "EnhancedMR")]
    offered = [(one, syntax) for one in classes for syntax in transfer_syntaxes()]
    contexts = [build_context(one, [syntax]) for one, syntax in offered]
    sender = AE("SENDER").associate("127.0.0.1", settings.port, contexts, ae_title=settings.aet)
    accepted = [(one.abstract_syntax, one.transfer_syntax[0]) for one in sender.accepted_contexts]
    sender.release()
    assert sorted(accepted) == sorted(offered) and len(offered) == 64


def enhanced(datasets):
    """One enhanced CT of these slices, as small as the reader takes it."""
    one = pydicom.Dataset()
    one.update(datasets[0])
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        del one[keyword]
    one.file_meta = datasets[0].file_meta
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = uid.EnhancedCTImageStorage
    one.NumberOfFrames, one.PixelData = len(datasets), b"".join(slice_.PixelData for slice_ in datasets)

    def group(**items):
        made = pydicom.Dataset()
        for name, keywords in items.items():
            item = pydicom.Dataset()
            for of, keyword in keywords:
                item[keyword] = of[keyword]
            setattr(made, name, [item])
        return made

    first = datasets[0]
    one.SharedFunctionalGroupsSequence = [
        group(
            PlaneOrientationSequence=[(first, "ImageOrientationPatient")],
            PixelMeasuresSequence=[(first, "PixelSpacing"), (first, "SliceThickness")],
        )
    ]
    one.PerFrameFunctionalGroupsSequence = [
        group(PlanePositionSequence=[(of, "ImagePositionPatient")]) for of in datasets
    ]
    return one


def test_enhanced_objects_are_synthesised_and_the_result_is_no_source(jobs, settings, series, tiny_checkpoint):
    before = read_volume(series)
    dataset = enhanced([pydicom.dcmread(file) for file in series.iterdir()])
    with start_node(settings, jobs, MODELS) as node, association(settings, uid.EnhancedCTImageStorage) as sender:
        assert sender.send_c_store(dataset).Status == 0
        job = one_job(jobs, 1)
        np.testing.assert_array_equal(read_volume(job.source).array, before.array)
        Worker(jobs, {"tiny": Predictor(tiny_checkpoint, "cpu")}).work(jobs.take(), threading.Event())
        assert jobs.get(job.id).state == "done"
        (synthetic,) = job.result.glob("*.dcm")
        assert is_ours(pydicom.dcmread(synthetic)) and sender.send_c_store(synthetic).Status == 0
        until(lambda: not node.spool.waiting())
    assert not jobs.count("queued")


def test_objects_that_are_no_one_volume_fail_with_a_line(jobs, settings, series, tiny_checkpoint):
    datasets = [pydicom.dcmread(file) for file in files_of(series)]
    datasets[1].PixelSpacing = [5, 5]
    with start_node(settings, jobs, MODELS), association(settings) as sender:
        for dataset in datasets:
            sender.send_c_store(dataset)
        job = one_job(jobs)
        Worker(jobs, {"tiny": Predictor(tiny_checkpoint, "cpu")}).work(jobs.take(), threading.Event())
    failed = jobs.get(job.id)
    assert failed.state == "failed" and "PixelSpacing must be the same in all slices" in failed.message
    assert str(jobs.folder) not in failed.message


def test_what_came_before_a_crash_becomes_a_job_after_it(jobs, settings, series):
    slow = replace(settings, quiet_s=1000)
    with start_node(slow, jobs, MODELS) as node, association(settings) as sender:
        for file in files_of(series):
            assert sender.send_c_store(pydicom.dcmread(file)).Status == 0
        assert node.spool.waiting() == 1
    (jobs.folder / "spool" / ".receiving-half").write_bytes(b"half an object")
    with start_node(settings, jobs, MODELS):
        one_job(jobs)
    assert not list((jobs.folder / "spool").glob(".*"))


@pytest.mark.parametrize("how", ["abort", "cut"])
def test_a_sender_that_was_cut_short_has_time_to_come_again(jobs, settings, series, how):
    first, *others = [pydicom.dcmread(file) for file in files_of(series)]
    with start_node(settings, jobs, MODELS):
        with association(settings) as sender:
            sender.send_c_store(first)
            if how == "abort":
                sender.abort()
            else:
                sender.dul.socket.socket.shutdown(socket.SHUT_RDWR)
        time.sleep(3 * settings.quiet_s)
        assert not jobs.count("queued")
        with association(settings) as sender:
            for dataset in others:
                sender.send_c_store(dataset)
        one_job(jobs)
    until(lambda: jobs.count("queued") == 1)


def test_a_sender_that_never_comes_again_leaves_a_job_of_what_there_is(jobs, settings, series):
    with start_node(settings, jobs, MODELS):
        with association(settings) as sender:
            sender.send_c_store(pydicom.dcmread(files_of(series)[0]))
            sender.abort()
        one_job(jobs, 1)


def test_slices_that_come_later_make_a_job_of_all_and_end_the_first(jobs, settings, series):
    first, *others = files_of(series)
    told = []
    with start_node(settings, jobs, MODELS) as node, association(settings) as sender:
        node.spool.superseded.append(told.append)
        sender.send_c_store(pydicom.dcmread(first))
        early = one_job(jobs, 1)
        for file in others:
            sender.send_c_store(pydicom.dcmread(file))
        until(lambda: jobs.get(early.id).state == "cancelled")
        one_job(jobs)
    assert jobs.count("queued") == 1 and early.id in told


def test_a_series_that_comes_under_another_patient_is_another_job(jobs, settings, series):
    with start_node(settings, jobs, MODELS) as node:
        for patient in ("P001", "P001", "P002"):
            with association(settings) as sender:
                for file in files_of(series):
                    dataset = pydicom.dcmread(file)
                    dataset.PatientID = patient
                    assert sender.send_c_store(dataset).Status == 0
            until(lambda: not node.spool.waiting())
        assert read_volume(one_job(jobs).source).patient == "P002"
    (earlier,) = jobs.in_state("cancelled")
    assert jobs.count("queued") == 1 and earlier.id != one_job(jobs).id


def test_a_series_that_cannot_be_decided_on_keeps_no_other_waiting(jobs, settings, patients):
    spool, due = Spool(jobs.folder / "spool", jobs, MODELS, 0.0, 0), []
    for patient in ("P001", "P002"):
        dataset = pydicom.dcmread(files_of(patients / "110keV" / patient)[0])
        raw = Path(dataset.filename).read_bytes()
        due.append(spool.take([raw], dataset.SOPClassUID, dataset.SOPInstanceUID))
    next((spool.folder / due[0]).glob("*.dcm")).write_bytes(b"a disk that failed")
    spool.decide()
    assert jobs.count("queued") == 1 and spool.waiting() == 1


def test_a_series_whose_job_failed_is_tried_again_when_it_is_sent_again(jobs, settings, series):
    with start_node(settings, jobs, MODELS), association(settings) as sender:
        files = [pydicom.dcmread(file) for file in files_of(series)]
        for dataset in files:
            sender.send_c_store(dataset)
        failed = one_job(jobs)
        jobs.take()
        jobs.finish(failed.id, "failed", "no memory")
        sender.send_c_store(files[0])
        again = one_job(jobs)
    assert again.id != failed.id and jobs.get(failed.id) is None


def test_a_full_queue_keeps_series_waiting_and_loses_none(jobs, settings, series):
    jobs.most_waiting = 0
    with start_node(settings, jobs, MODELS) as node, association(settings) as sender:
        for file in files_of(series):
            sender.send_c_store(pydicom.dcmread(file))
        time.sleep(1)
        assert node.spool.waiting() == 1 and not jobs.count("queued")
        jobs.most_waiting = 3
        one_job(jobs)


def test_what_is_synthetic_or_no_input_is_kept_and_not_synthesised(jobs, settings, series, tmp_path):
    source = read_volume(series)
    synthetic = write_derived(source, tmp_path / "ours", description="x", checkpoint_sha256="5e" * 32)
    assert all(is_ours(pydicom.dcmread(file)) for file in synthetic)
    datasets = [pydicom.dcmread(synthetic[0])]
    for keyword, value in (("Modality", "MR"), ("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])):
        dataset = pydicom.dcmread(files_of(series)[0])
        setattr(dataset, keyword, value)
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = uid.generate_uid(), uid.generate_uid()
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        datasets.append(dataset)
    with start_node(settings, jobs, MODELS) as node, association(settings) as sender:
        for dataset in datasets:
            assert sender.send_c_store(dataset).Status == 0
        until(lambda: not node.spool.waiting())
        assert [node.spool.missing(CT, one.SOPInstanceUID) for one in datasets] == [0, 0, 0]
        assert not jobs.count("queued")
        assert node.spool.erase_old(3600) == 0
        assert node.spool.erase_old(0) == 3
        assert node.spool.missing(CT, datasets[0].SOPInstanceUID) == 0x0112


def test_our_mark_is_known_wherever_it_stands(series, tmp_path):
    path = write_derived(read_volume(series), tmp_path / "ours", description="x", checkpoint_sha256="5e" * 32)[0]
    dataset = pydicom.dcmread(path)
    marks = ("ContributingEquipmentSequence", "DerivationDescription", "ImageComments")
    for kept in marks:
        less = pydicom.dcmread(path)
        for keyword in set(marks) - {kept}:
            del less[keyword]
        assert is_ours(less)
    for keyword in marks:
        del dataset[keyword]
    assert not is_ours(dataset)


# ------------------------------------------------------------------------------------------------- refused


@dcmtk
def test_only_accepted_titles_and_addresses_are_served(jobs, settings, series):
    strict = replace(settings, accepted=accepted_from(["CT1@127.0.0.1"]))
    with start_node(strict, jobs, MODELS) as node:
        assert (
            "Calling AE Title Not Recognized" in storescu(strict, files_of(series), "-aet", "CT2", check=False).stderr
        )
        refused = storescu(strict, files_of(series), "-aet", "CT1", called="OTHER", check=False)
        assert "Called AE Title Not Recognized" in refused.stderr
        assert not node.spool.received
        storescu(strict, files_of(series), "-aet", "CT1")
        assert node.spool.received == 3
    elsewhere = replace(settings, accepted=accepted_from(["CT1@10.11.12.13"]))
    with start_node(elsewhere, jobs, MODELS) as node:
        assert storescu(elsewhere, files_of(series), "-aet", "CT1", check=False).returncode != 0
        assert not node.spool.received


def test_a_nearly_full_disk_refuses_with_out_of_resources(jobs, settings, series):
    full = replace(settings, least_free_bytes=2**60)
    with start_node(full, jobs, MODELS) as node, association(full) as sender:
        assert sender.send_c_store(pydicom.dcmread(files_of(series)[0])).Status == 0xA700
        assert node.spool.refused == 1 and not list(node.spool.folder.iterdir())


def sent_raw(sender, data, instance):
    """The status with which these bytes are answered, as the data set of a CT image of that UID."""
    request = C_STORE()
    request.MessageID, request.Priority, request.DataSet = 7, 2, BytesIO(data)
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = CT, instance
    sender._reactor_checkpoint.clear()
    until(lambda: sender._is_paused)
    sender.dimse.send_msg(request, sender.accepted_contexts[0].context_id)
    _, response = sender.dimse.get_msg(block=True)
    sender._reactor_checkpoint.set()
    return response.Status


def raw(path):
    """The bytes of a data set without the header of its file, and its UID."""
    whole = Path(path).read_bytes()
    return whole[144 + int.from_bytes(whole[140:144], "little") :], str(pydicom.dcmread(path).SOPInstanceUID)


@pytest.mark.parametrize(("code", "status"), [(errno.ENOSPC, 0xA700), (errno.EIO, 0x0110)])
def test_a_disk_that_fails_is_never_answered_with_success(jobs, settings, series, monkeypatch, code, status):
    dataset = pydicom.dcmread(files_of(series)[0])
    with start_node(settings, jobs, MODELS) as node, association(settings) as sender:
        with monkeypatch.context() as broken:

            def fsync(handle):
                raise OSError(code, "broken")

            broken.setattr("seresvit.serving.spool.os.fsync", fsync)
            assert sender.send_c_store(dataset).Status == status
        assert not list(node.spool.folder.iterdir()) and not node.spool.waiting()
        assert sender.send_c_store(dataset).Status == 0


def test_objects_that_are_not_what_they_are_said_to_be_are_refused(jobs, settings, series):
    data, instance = raw(files_of(series)[0])
    with start_node(settings, jobs, MODELS) as node, association(settings) as sender:
        assert sent_raw(sender, data, "1.2.3") == 0xA900
        assert sent_raw(sender, b"no DICOM at all" * 100, instance) == 0xC000
        assert sent_raw(sender, b"\0", instance) == 0xC000
        assert sent_raw(sender, data, instance) == 0x0000
        assert (node.spool.received, node.spool.refused) == (1, 3)


def test_damaged_objects_are_answered_and_stop_nothing(jobs, settings, series, caplog):
    data, instance = raw(files_of(series)[0])
    random, statuses = np.random.default_rng(0), set()
    with start_node(settings, jobs, MODELS) as node, association(settings) as sender:
        for _ in range(100):
            hit = bytearray(data)
            for at in random.integers(0, 1500, 3):
                hit[at] = random.integers(256)
            statuses.add(sent_raw(sender, bytes(hit), instance))
            shutil.rmtree(next((path for path in node.spool.folder.iterdir()), "none"), ignore_errors=True)
        assert statuses == {0x0000, 0xA900, 0xC000}
        for file in files_of(series):
            assert sent_raw(sender, *raw(file)) == 0x0000
        until(lambda: not node.spool.waiting())
    assert "failed at something" not in caplog.text and jobs.count("queued")


def test_what_a_peer_sends_is_bounded(jobs, settings, series):
    small = replace(settings, most_object_bytes=2**16, timeout_s=1)
    with start_node(small, jobs, MODELS) as node:
        with socket.create_connection(("127.0.0.1", settings.port)) as peer:
            peer.sendall(b"\x01\x00\xff\xff\xff\xff" + b"x" * 1000)  # a PDU of 4 GiB, it says
            peer.settimeout(5)
            assert peer.recv(100) in (b"", b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x00")
        with association(small) as sender:
            dataset = pydicom.dcmread(files_of(series)[0])
            dataset.PixelData = bytes(2**17)
            assert not sender.send_c_store(dataset)  # the association is ended
        with socket.create_connection(("127.0.0.1", settings.port)) as silent:
            silent.settimeout(5)
            silent.sendall(b"\x01\x00")  # and nothing more
            with association(small) as sender:
                assert sender.send_c_store(pydicom.dcmread(files_of(series)[0])).Status == 0
            assert silent.recv(100) == b""
        assert node.spool.received == 1


# A thread of pynetdicom ends with some of these; the node goes on without it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_malformed_requests_stop_nothing(jobs, settings):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        heard = []
        entity = AE("SENDER")
        entity.acse_timeout = 1
        thread = threading.Thread(target=lambda: heard.append(listening.accept()[0].recv(2**16)))
        thread.start()
        entity.associate("127.0.0.1", listening.getsockname()[1], [build_context(CT)], ae_title="SYNTH")
        thread.join()
    random, before = np.random.default_rng(0), threading.active_count()
    with start_node(replace(settings, timeout_s=1, most_associations=50), jobs, MODELS):
        for number in range(60):
            sent = bytearray(heard[0])
            for at in random.integers(0, len(sent), 4):
                sent[at] = random.integers(256)
            if number % 4 == 0:
                sent = sent[: random.integers(len(sent))]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", settings.port)) as peer:
                peer.sendall(bytes(sent))
                peer.settimeout(0.05)
                peer.recv(100)
                peer.sendall(b"\x04\x00\x00\x00\x00\x20" + random.bytes(100))
        with association(settings, Verification) as sender:
            assert sender.send_c_echo().Status == 0
    until(lambda: threading.active_count() <= before)


def test_more_associations_than_allowed_are_refused(jobs, settings):
    with start_node(replace(settings, most_associations=2), jobs, MODELS), contextlib.ExitStack() as stack:
        opened = [stack.enter_context(association(settings, Verification)) for _ in range(4)]
        assert [one is not None for one in opened] == [True, True, False, False]


def test_a_taken_port_is_said(jobs, settings):
    with (
        start_node(settings, jobs, MODELS),
        pytest.raises(ConfigError, match="choose another port"),
        start_node(settings, jobs, MODELS),
    ):
        pass


def test_leaving_ends_every_thread(jobs, settings):
    before = set(threading.enumerate())
    with start_node(settings, jobs, MODELS), association(settings) as sender:
        assert sender
        with association(settings) as other:
            assert other
            break_off = time.monotonic()
    until(lambda: set(threading.enumerate()) <= before)
    assert time.monotonic() - break_off < 10
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", settings.port))


def test_no_log_line_names_anyone(jobs, settings, series, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    secret = "SECRETNAME"
    datasets = [pydicom.dcmread(file) for file in files_of(series)]
    with tolerant():
        for dataset in datasets:
            dataset.PatientName, dataset.PatientID, dataset.AccessionNumber = secret, secret, secret
            dataset.PatientBirthDate = secret
    with start_node(settings, jobs, MODELS) as node, association(settings, CT, StorageCommitmentPushModel) as sender:
        for dataset in datasets:
            assert sender.send_c_store(dataset).Status == 0
        one_job(jobs)
        dataset.SeriesInstanceUID = ""
        assert sender.send_c_store(dataset).Status == 0xC000
        commitment.ask(sender, "1.2.3", [(CT, datasets[0].SOPInstanceUID)])
        node.spool.erase_old(0)
    written = "\n".join([caplog.text, *capfd.readouterr()])
    assert "is job" in written and "was refused" in written
    names = [secret, datasets[0].SOPInstanceUID, datasets[0].StudyInstanceUID, "1.2.3"]
    assert not [name for name in names if name in written]


# ----------------------------------------------------------------------------------------------------- TLS


@dcmtk
def test_tls_asks_for_a_certificate_of_the_authority(jobs, settings, series, certificates):
    tls = tls_from(*certificates("node"))
    secured = replace(settings, tls=tls, timeout_s=2)
    own, other = certificates("client"), certificates("stranger", authority="another")

    def options(certificate, key, authority):
        return ["+tls", key, certificate, "+cf", certificates("node")[2]]

    with start_node(secured, jobs, MODELS) as node:
        with socket.create_connection(("127.0.0.1", settings.port)):  # who never greets keeps no other waiting
            storescu(secured, files_of(series), *options(*own))
        assert node.spool.received == 3
        assert storescu(secured, files_of(series), *options(*other), check=False).returncode != 0
        assert storescu(secured, files_of(series), check=False).returncode != 0
        assert node.spool.received == 3


def test_unusable_certificates_are_said(certificates, tmp_path):
    certificate, key, authority = certificates("node")
    assert tls_from(None, None, None) is None
    for given, words in (
        ((certificate, None, None), "needs both"),
        ((certificate, tmp_path / "none.pem", None), "No such file"),
        ((certificate, certificates("client")[1], None), "fit"),
        ((certificate, key, key), "PEM"),
    ):
        with pytest.raises(ConfigError, match=words):
            tls_from(*given)
    assert tls_from(certificate, key, authority) == Tls(certificate, key, authority)


# ----------------------------------------------------------------------------------------- storage commitment


@pytest.mark.parametrize("own_association", [True, False])
def test_commitment_to_what_came_and_to_nothing_else(jobs, settings, series, own_association):
    reports, taken = [], threading.Event()

    def report(event):
        reports.append((event.event_type, commitment.answered(event.event_information)))
        taken.set()
        return 0x0000, None

    entity = AE("SENDER")
    entity.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
    listening = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, report)])
    port = listening.server_address[1]
    if own_association:
        settings = replace(settings, accepted=accepted_from([f"SENDER@127.0.0.1:{port}"]))
    handlers = {"evt_handlers": [] if own_association else [(evt.EVT_N_EVENT_REPORT, report)]}
    files = [pydicom.dcmread(file) for file in files_of(series)]
    here = [(CT, str(file.SOPInstanceUID)) for file in files]
    try:
        with (
            start_node(settings, jobs, MODELS) as node,
            association(settings, CT, StorageCommitmentPushModel, **handlers) as sender,
        ):
            for file in files:
                sender.send_c_store(file)
            assert commitment.ask(sender, "1.2.3", here)
            assert taken.wait(10)
            until(lambda: not node.answers.waiting())
            assert reports == [(1, commitment.Report("1.2.3", here, []))]
            taken.clear()
            wrong_class, absent = (uid.MRImageStorage, here[0][1]), (CT, "1.2.3.4")
            assert commitment.ask(sender, "1.2.4", [here[1], wrong_class, absent])
            assert taken.wait(10)
            failed = [(*wrong_class, 0x0119), (*absent, 0x0112)]
            assert reports[1] == (2, commitment.Report("1.2.4", [here[1]], failed))
    finally:
        listening.shutdown()


def test_a_report_waits_until_its_addressee_is_there(jobs, settings, series):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = replace(settings, accepted=accepted_from([f"SENDER@127.0.0.1:{port}"]))
    with start_node(settings, jobs, MODELS) as node:
        with association(settings, CT, StorageCommitmentPushModel) as sender:
            commitment.ask(sender, "1.2.3", [(CT, "1.2.3.4")])
        time.sleep(1)
        assert node.answers.waiting() == 1
    taken = threading.Event()

    def report(event):
        taken.set()
        return 0x0000, None

    entity = AE("SENDER")
    entity.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
    listening = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, report)])
    try:
        with start_node(settings, jobs, MODELS) as node:
            assert taken.wait(15)
            until(lambda: not node.answers.waiting())
    finally:
        listening.shutdown()


def test_orthanc_gets_a_commitment(jobs, settings, series, orthanc):
    """Orthanc sends its instances to the node and asks, on an association of its own each, and hears from it there."""
    settings = replace(settings, accepted=accepted_from([f"ORTHANC@127.0.0.1:{orthanc.dicom}"]))
    orthanc.start(DicomModalities={"node": [settings.aet, "127.0.0.1", settings.port]})
    instances = [orthanc.store(file) for file in files_of(series)]
    with start_node(settings, jobs, MODELS) as node:
        orthanc.post("modalities/node/store", instances)
        assert node.spool.received == 3
        transaction = orthanc.post("modalities/node/storage-commitment", {"Resources": instances})["ID"]
        found = until(lambda: (r := orthanc.get(f"storage-commitment/{transaction}"))["Status"] != "Pending" and r)
        assert found["Status"] == "Success" and len(found["Success"]) == 3
    assert os.listdir(jobs.folder / "spool")
