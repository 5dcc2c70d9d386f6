"""The queue: exactly what was accepted, in order, whatever kills the process between any two steps."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from seresvit.config import ConfigError
from seresvit.serving.jobs import MOST_ATTEMPTS, Cancelled, Jobs, QueueFull


def image(path):
    (path / "0001.dcm").write_bytes(b"pixels")


def reopened(jobs):
    """As after a crash: the same folder, by another process."""
    jobs.close()
    after = Jobs(jobs.folder, jobs.most_waiting, jobs.keep_s)
    after.recover()
    return after


def finished(jobs, state="done"):
    job = jobs.submit("m", image)
    assert jobs.take().id == job.id
    jobs.finish(job.id, state)
    return job


def test_a_job_goes_its_way(jobs):
    job = jobs.submit("model", image)
    assert len(job.id) == 32 and job.state == "queued" and (job.source / "0001.dcm").read_bytes() == b"pixels"
    assert jobs.get(job.id) == job and jobs.get("0" * 32) is None
    running = jobs.take()
    assert (running.id, running.state, running.attempts) == (job.id, "running", 1) and jobs.take() is None
    jobs.report(job.id, 3, 8)
    assert (jobs.get(job.id).done, jobs.get(job.id).total) == (3, 8)
    jobs.finish(job.id, "done", "", ["an odd image"])
    end = jobs.get(job.id)
    assert (end.state, end.done, end.warnings) == ("done", 3, ("an odd image",)) and end.finished >= end.started


def test_first_come_first_served_and_the_queue_is_bounded(jobs):
    ids = [jobs.submit("m", image).id for _ in range(3)]
    with pytest.raises(QueueFull, match="3 jobs wait"):
        jobs.submit("m", lambda path: pytest.fail("asked for images that nobody will take"))
    assert [jobs.position(one) for one in ids] == [0, 1, 2]
    assert [jobs.take().id for _ in ids] == ids


def test_images_that_are_still_coming_take_a_place(jobs):
    arrived, go_on = threading.Semaphore(0), threading.Event()

    def slow(path):
        image(path)
        arrived.release()
        assert go_on.wait(20)

    threads = [threading.Thread(target=jobs.submit, args=("m", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert all(arrived.acquire(timeout=20) for _ in threads)
    with pytest.raises(QueueFull):
        jobs.submit("m", image)
    go_on.set()
    for thread in threads:
        thread.join()
    assert jobs.count("queued") == 3


def test_images_that_do_not_come_leave_nothing(jobs):
    def broken(path):
        image(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        jobs.submit("m", broken)
    assert jobs.count("queued") == 0 and not list((jobs.folder / "jobs").iterdir())


def test_one_key_is_one_job_also_at_the_same_time(jobs):
    first = jobs.submit("m", image, "dicom", "series")
    assert jobs.submit("m", image, "dicom", "series").id == first.id
    together, found = threading.Barrier(2), []

    def both(path):
        image(path)
        together.wait(20)

    threads = [threading.Thread(target=lambda: found.append(jobs.submit("m", both, "dicom", "other").id)) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and len(set(found)) == 1 and jobs.count("queued") == 2
    assert len(list((jobs.folder / "jobs").iterdir())) == 2


def test_cancel(jobs):
    waiting, running = jobs.submit("m", image), None
    assert jobs.cancel(waiting.id) and jobs.get(waiting.id).state == "cancelled" and not waiting.folder.exists()
    assert jobs.take() is None and not jobs.cancel(waiting.id) and not jobs.cancel("0" * 32)
    running = jobs.submit("m", image)
    jobs.take()
    jobs.report(running.id, 0, 1)
    assert jobs.cancel(running.id)
    with pytest.raises(Cancelled):
        jobs.report(running.id, 1, 1)
    jobs.finish(running.id, "cancelled", "cancelled")
    assert not running.folder.exists()


def test_cancelled_too_late_to_be_stopped_is_cancelled_all_the_same(jobs):
    job = jobs.submit("m", image)
    jobs.take()
    jobs.cancel(job.id)
    jobs.finish(job.id, "done")
    assert jobs.get(job.id).state == "cancelled" and not job.folder.exists() and not jobs.unannounced()


def test_what_comes_after_a_crash_does_not_overtake_what_it_cut_short(jobs):
    cut = jobs.submit("m", image)
    jobs.take()
    jobs = reopened(jobs)
    later = jobs.submit("m", image)
    assert [jobs.position(one.id) for one in (cut, later)] == [0, 1] and jobs.take().id == cut.id
    jobs.close()


def test_what_a_crash_cut_short_waits_again_behind_the_others_and_not_for_ever(jobs):
    cut, other = jobs.submit("m", image), jobs.submit("m", image)
    assert jobs.take().id == cut.id
    for attempt in range(1, MOST_ATTEMPTS):
        jobs = reopened(jobs)
        assert jobs.get(cut.id).state == "queued" and jobs.get(cut.id).attempts == attempt
        if attempt == 1:
            assert jobs.position(cut.id) == 1 and jobs.take().id == other.id
            jobs.finish(other.id, "done")
        assert jobs.take().id == cut.id
    jobs = reopened(jobs)
    assert jobs.get(cut.id).state == "failed" and "not tried again" in jobs.get(cut.id).message
    assert jobs.get(other.id).state == "done"
    jobs.close()


def test_a_server_that_is_stopped_does_not_count_as_a_crash(jobs):
    job = jobs.submit("m", image)
    for _ in range(5):
        assert jobs.take().id == job.id
        jobs.put_back(job.id)
        jobs = reopened(jobs)
    assert jobs.get(job.id).attempts == 0 and jobs.take().id == job.id
    jobs.close()


def test_a_crash_does_not_undo_a_cancellation(jobs):
    job = jobs.submit("m", image)
    jobs.take()
    jobs.cancel(job.id)
    jobs = reopened(jobs)
    assert jobs.get(job.id).state == "cancelled" and not job.folder.exists()
    jobs.close()


def test_recover_removes_what_belongs_to_no_job(jobs):
    job = jobs.submit("m", image)
    (jobs.folder / "jobs" / ("a" * 32) / "source").mkdir(parents=True)
    (job.folder / ".writing-x").mkdir()
    jobs = reopened(jobs)
    assert [path.name for path in (jobs.folder / "jobs").iterdir()] == [job.id]
    assert [path.name for path in job.folder.iterdir()] == ["source"]
    jobs.close()


def test_results_are_kept_for_a_time_unless_still_needed(jobs):
    old = finished(jobs)
    waiting = jobs.submit("m", image)
    soon = datetime.now(UTC) + timedelta(seconds=jobs.keep_s - 60)
    late = soon + timedelta(seconds=120)
    assert soon.isoformat() < jobs.expires(jobs.get(old.id)) < late.isoformat()
    assert jobs.erase_old(soon) == 0
    jobs.needed_by.append(lambda job: True)
    assert jobs.erase_old(late) == 0 and old.folder.exists()
    jobs.needed_by.clear()
    assert jobs.erase_old(late) == 1 and jobs.get(old.id) is None and not old.folder.exists()
    assert jobs.get(waiting.id).state == "queued" and not jobs.erase(waiting.id)


def test_who_waits_for_results_is_told_of_each(jobs):
    job = finished(jobs)
    finished(jobs, "failed")
    jobs = reopened(jobs)
    assert [one.id for one in jobs.unannounced()] == [job.id]
    jobs.announced(job.id)
    assert not jobs.unannounced()
    jobs.close()


def test_a_folder_is_one_servers(jobs):
    with pytest.raises(ConfigError, match="another server works in it"):
        Jobs(jobs.folder)


ENDLESS = """
import sys
from pathlib import Path
from seresvit.serving.jobs import Jobs
jobs = Jobs(Path(sys.argv[1]), most_waiting=10**6)
while True:
    job = jobs.submit("m", lambda path: (path / "1.dcm").write_bytes(b"pixels"), key=str(jobs.count("queued")))
    print(job.id, flush=True)
"""


def test_what_was_accepted_is_there_after_a_kill(tmp_path):
    accepted = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path], stdout=subprocess.PIPE, text=True)
        accepted += [process.stdout.readline().strip() for _ in range(3)]
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        accepted += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait()
    jobs = Jobs(tmp_path)
    jobs.recover()
    there = [job.id for job in jobs.in_state("queued")]
    # The last of each process may have been accepted and not yet said.
    assert set(accepted) <= set(there) and len(there) <= len(accepted) + 3
    assert {path.name for path in (tmp_path / "jobs").iterdir()} == set(there)
    assert all((jobs.get(one).source / "1.dcm").read_bytes() == b"pixels" for one in there)
    jobs.close()
