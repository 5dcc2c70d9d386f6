"""The worker: what it makes is what `seresvit predict` makes, and nothing that a job meets ends it."""

import json
import random
import shutil
import threading

import numpy as np
import pytest

from seresvit.data import phantom, read_volume
from seresvit.serving import worker as working
from seresvit.serving.uploads import Bounds, arrange, numbered
from seresvit.serving.worker import Worker
from seresvit.synthesis.predict import predict_path
from seresvit.synthesis.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint):
    return Predictor(tiny_checkpoint, "cpu")


@pytest.fixture
def worker(jobs, predictor):
    return Worker(jobs, {"tiny": predictor})


def fill_with(folder, rename=lambda name: name):
    def fill(path):
        names = []
        for number, file in enumerate(sorted(folder.iterdir()), 1):
            names.append(rename(file.name))
            shutil.copy(file, path / numbered(number))
        arrange(path, names, Bounds())

    return fill


def worked(worker, fill):
    job = worker.jobs.submit("tiny", fill)
    worker.work(worker.jobs.take(), threading.Event())
    return worker.jobs.get(job.id)


def test_result_is_that_of_predict(worker, predictor, patients, tmp_path):
    ended = []
    worker.on_end.append(lambda *what: ended.append(what))
    job = worked(worker, fill_with(patients / "110keV/P001"))
    assert (job.state, job.message, job.done, job.total) == ("done", "", 3, 3)
    whole = predict_path(predictor, patients / "110keV/P001", tmp_path / "out")
    np.testing.assert_array_equal(read_volume(job.result).array, read_volume(whole).array)
    assert json.loads((job.view / "view.json").read_text())["slices"] == [0, 1, 2]
    assert ended[0][0] == "done" and ended[0][1] > 0


def test_a_fault_is_told_with_the_name_that_the_file_was_given(worker, patients):
    def broken(path):
        fill_with(patients / "110keV/P001")(path)
        with open(path / "000002.dcm", "r+b") as file:
            file.truncate(900)

    job = worked(worker, broken)
    assert job.state == "failed" and job.message.startswith("P001_0002.dcm: ") and str(job.folder) not in job.message


def test_a_missing_slice_is_a_warning(worker, tmp_path):
    phantom.simulate(tmp_path, patients=1, slices=5, size=32, kev=(110,))
    folder = tmp_path / "110keV" / "P001"
    sorted(folder.iterdir())[2].unlink()
    job = worked(worker, fill_with(folder))
    assert job.state == "done" and any(line.startswith("even slices: gaps from") for line in job.warnings)


def test_an_image_of_no_series_fails(worker):
    job = worked(worker, lambda path: (path / "000001").write_text("no image"))
    assert job.state == "failed" and job.message.startswith("no DICOM image found")


def test_damaged_files_are_read_or_refused_in_one_line(worker, patients, caplog):
    dice = random.Random(0)
    whole = (patients / "110keV/P001/P001_0001.dcm").read_bytes()
    for number in range(60):
        raw = bytearray(whole)
        for _ in range(dice.randrange(1, 5)):
            raw[dice.randrange(1500 if number % 3 else len(raw))] = dice.randrange(256)
        job = worked(worker, lambda path, raw=raw: (path / "000001.dcm").write_bytes(raw))
        assert job.state in ("done", "failed") and "error of the server" not in job.message, caplog.text
        assert len(job.message.splitlines()) <= 1 and str(job.folder) not in job.message


def test_time_size_and_model_are_bounded(worker, patients):
    fill = fill_with(patients / "110keV/P001")
    worker.most_s = 0
    assert "longer than 0 minutes" in worked(worker, fill).message
    worker.most_s, worker.most_unpacked = 100, 4 * 3 * 32 * 32 - 1
    assert "at most" in worked(worker, fill).message
    worker.predictors = {}
    assert "no longer served" in worked(worker, fill).message


def test_cancelled_while_at_work(worker, jobs, predictor, patients):
    job = jobs.submit("tiny", fill_with(patients / "110keV/P001"))
    taken = jobs.take()
    report = jobs.report
    jobs.report = lambda *how_far: jobs.cancel(job.id) and report(*how_far)
    worker.work(taken, threading.Event())
    assert jobs.get(job.id).state == "cancelled" and not job.folder.exists()


def test_a_server_that_stops_puts_its_job_back(worker, jobs, patients):
    job = jobs.submit("tiny", fill_with(patients / "110keV/P001"))
    stopping = threading.Event()
    stopping.set()
    worker.work(jobs.take(), stopping)
    assert (jobs.get(job.id).state, jobs.get(job.id).attempts) == ("queued", 0)


@pytest.mark.parametrize("error", [RuntimeError("Hong^Gildong"), MemoryError(), OSError(28, "full")])
def test_any_error_ends_the_job_and_no_more(worker, patients, monkeypatch, caplog, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(working, "predict_image", fail)
    job = worked(worker, fill_with(patients / "110keV/P001"))
    assert job.state == "failed" and "Hong" not in job.message + caplog.text
    if isinstance(error, RuntimeError):
        assert "RuntimeError at test_worker.py:" in caplog.text
    monkeypatch.undo()
    assert worked(worker, fill_with(patients / "110keV/P001")).state == "done"


def test_who_waits_is_told_until_it_is_heard(worker, jobs, patients):
    told, stopping = [], threading.Event()

    def tell(job):
        told.append(job.id)
        if len(told) == 1:
            raise RuntimeError("not now")
        stopping.set()

    worker.on_done.append(tell)
    job = jobs.submit("tiny", fill_with(patients / "110keV/P001"))
    thread = threading.Thread(target=worker.run, args=(stopping,))
    thread.start()
    thread.join(60)
    assert told == [job.id, job.id] and not jobs.unannounced()


def test_a_disk_without_room_for_the_result_is_waited_for(worker, jobs, patients, monkeypatch):
    monkeypatch.setattr(working, "AGAIN_S", 0.01)
    rooms = [0, 3 * 4 * 3 * 32 * 32 - 1]
    jobs.room = lambda: rooms.pop(0) if rooms else 10**9
    job = jobs.submit("tiny", fill_with(patients / "110keV/P001"))
    for state in ("queued", "queued", "done"):
        worker.work(jobs.take(), threading.Event())
        assert jobs.get(job.id).state == state


def test_a_disk_that_is_full_at_the_end_does_not_lose_the_job(worker, jobs, patients, monkeypatch):
    monkeypatch.setattr(working, "AGAIN_S", 0.01)
    finish, failures = jobs.finish, [OSError(28, "full"), OSError(28, "full")]

    def full(*how):
        if failures:
            raise failures.pop()
        finish(*how)

    jobs.finish = full
    assert worked(worker, fill_with(patients / "110keV/P001")).state == "done"
