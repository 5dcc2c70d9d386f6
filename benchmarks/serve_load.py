"""Load and faults: a real server under many uploads, kills, a destination that is down, malformed and damaged input.

One process of `seresvit serve` with a tiny network and a DICOM node, on loopback; this process is its clients and its
destination. Every study bears a word that stands nowhere else, by which it is found where it should not be. Prints a
table and what was broken; exits 1 when anything was.

    python benchmarks/serve_load.py
    python benchmarks/serve_load.py --uploads 5 --kills 2 --down-s 5 --malformed 50 --damaged 50
"""

import argparse
import contextlib
import io
import json
import random
import signal
import socket
import sys
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from pydicom.uid import JPEG2000Lossless, RLELossless
from serve_rig import FINISHED, SLICES, WORD, Rig, Study, answer, set_up, stored, submitted, waited

# Of pydicom's own test images, grey ones of the JPEG family that cannot be made here.
JPEGS = ("MR_small_jpeg_ls_lossless.dcm", "JPEGLSNearLossless_16.dcm", "JPGExtended.dcm", "JPEG-lossy.dcm")


def check_result(rig: Rig, study: Study, datasets: list[pydicom.Dataset], where: str) -> None:
    """That these are the synthetic slices of this very study, each once."""
    found = {one.SOPInstanceUID: one for one in datasets}
    sources = [one.SourceImageSequence[0].ReferencedSOPInstanceUID for one in found.values()]
    if sorted(sources) != sorted(study.instances) or {one.PatientID for one in found.values()} != {study.patient}:
        rig.broken.append(f"{where}: {len(found)} slices of {len(set(sources))} sources, not this study's {SLICES}")
        return
    ordered = sorted(
        found.values(), key=lambda one: study.instances.index(one.SourceImageSequence[0].ReferencedSOPInstanceUID)
    )
    array = np.stack([one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in ordered])
    if np.abs(array - rig.expected[study.base]).max() > 1.0:
        rig.broken.append(f"{where}: pixels are not those of this patient")


def check_download(rig: Rig, study: Study, job_id: str) -> None:
    """That an accepted upload gave its own result."""

    def ended() -> dict | None:
        given = answer(f"{rig.server.url}/api/jobs/{job_id}")
        return given.json() if given is not None and given.json().get("state") in FINISHED else None

    status = waited(ended, "a job to end")
    given = answer(f"{rig.server.url}/api/jobs/{job_id}/result") if status["state"] == "done" else None
    if given is None or given.status_code != 200:
        rig.broken.append(f"job {job_id}: {status['state']}: {status['message']}")
        return
    with zipfile.ZipFile(io.BytesIO(given.content)) as archive:
        slices = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    check_result(rig, study, slices, f"job {job_id}")


def uploads(rig: Rig, count: int) -> None:
    """All at the same time."""
    studies = [rig.study() for _ in range(count)]
    together, taken_s = threading.Barrier(count), []

    def one(study: Study) -> str:
        together.wait()
        started_s = time.monotonic()
        job_id = submitted(rig, study.files)
        taken_s.append(time.monotonic() - started_s)
        return job_id

    started_s = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        ids = list(pool.map(one, studies))
    for study, job_id in zip(studies, ids, strict=True):
        check_download(rig, study, job_id)
    median, most = np.median(taken_s), max(taken_s)
    rig.say(
        f"{count} concurrent uploads of {SLICES} slices",
        f"{len(set(ids))} accepted, in {median:.1f} s (median) to {most:.1f} s; "
        f"all results right after {time.monotonic() - started_s:.0f} s",
    )


def kills(rig: Rig, count: int) -> None:
    """SIGKILL while a job is at work and uploads and C-STORE go on."""
    studies, by_dicom = [rig.study() for _ in range(3 * count)], [rig.study() for _ in range(count)]
    killed = at_work = 0

    def running() -> bool:
        return rig.server.rows("SELECT COUNT(*) FROM jobs WHERE state='running'")[0][0] > 0

    accepted_before = rig.server.rows("SELECT COUNT(*) FROM jobs WHERE origin='rest'")[0][0]
    with ThreadPoolExecutor(6) as pool:
        ids = [pool.submit(submitted, rig, study.files) for study in studies]
        sent = [pool.submit(stored, rig, study) for study in by_dicom]
        while killed < count:
            waited(lambda: running() or all(one.done() for one in [*ids, *sent]), "work")
            if not running():
                break
            time.sleep(rig.dice.uniform(0, 0.3))
            rig.server.end(signal.SIGKILL)
            killed, at_work = killed + 1, at_work + running()
            rig.server.start()
        found = [one.result() for one in ids]
        for one in sent:
            one.result()
    for study, job_id in zip(studies, found, strict=True):
        check_download(rig, study, job_id)
    rig.by_dicom += by_dicom
    check_delivered(rig, by_dicom)
    there = rig.server.rows("SELECT COUNT(*) FROM jobs WHERE origin='rest'")[0][0] - accepted_before
    failed = rig.server.rows("SELECT COUNT(*) FROM jobs WHERE state='failed'")[0][0]
    if there != len(found):
        rig.broken.append(f"{len(found)} uploads in the kills are {there} jobs")
    rig.say(
        f"{killed} × SIGKILL, {at_work} of them at work on a job",
        f"{len(found)} uploads, sent again until accepted, are {there} jobs with the right results; "
        f"{len(by_dicom)} series by C-STORE delivered; {failed} failed",
    )


def check_delivered(rig: Rig, studies: list[Study]) -> None:
    """Waits until the destination has every study, whole, and checks that it is each once."""
    for study in studies:
        waited(
            lambda study=study: len({one.SOPInstanceUID for one in rig.archive.instances_of(study)}) == SLICES,
            "a delivery",
        )
    for study in studies:
        check_result(rig, study, rig.archive.instances_of(study), "the destination")


def outage(rig: Rig, down_s: float) -> None:
    """The destination is down while studies come, and comes back."""
    studies = [rig.study() for _ in range(10)]
    rig.archive.stop()
    down_at_s = time.monotonic()
    for study in studies:
        stored(rig, study)
    time.sleep(max(0.0, down_s - (time.monotonic() - down_at_s)))
    early = sum(bool(rig.archive.instances_of(study)) for study in studies)
    rig.archive.start()
    up_at_s = time.monotonic()
    check_delivered(rig, studies)
    rig.by_dicom += studies
    rig.say(
        f"destination down for {up_at_s - down_at_s:.0f} s, {len(studies)} series by C-STORE meanwhile",
        f"{early} there before, all {len(studies)} whole {time.monotonic() - up_at_s:.0f} s after it came back",
    )


def malformed(rig: Rig, count: int) -> None:
    """Requests that no client makes, each in bytes of its own."""
    content = rig.study().files[0][1]

    def ask(number: int) -> str:
        given = raw_answer(rig.server.url, odd_request(random.Random(number), number, content))
        status = given.split(b" ", 2)[1].decode("latin-1") if given.startswith(b"HTTP/1.1 ") else "no answer"
        check_told(rig, given, f"malformed request {number}")
        if status == "500":
            rig.broken.append(f"malformed request {number} was answered with 500")
        return status

    started_s = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(pool.map(ask, range(count)))
    listed = ", ".join(f"{times} × {status}" for status, times in sorted(statuses.items()))
    rig.say(f"{count} malformed requests", f"{listed}; {time.monotonic() - started_s:.0f} s")


def odd_request(dice: random.Random, number: int, content: bytes) -> bytes:
    """The bytes of a request that is not as it should be: in a few of its parts, in some of its bytes, or in all."""
    if number % 10 == 0:
        return dice.randbytes(dice.randrange(1, 300))

    def mostly(right, *others):
        return right if dice.random() < 0.75 else dice.choice(others)

    name = dice.choice(["a.dcm", "../../x", "/etc/x", "a.zip", "a.nii.gz", "\0", f"{WORD}.dcm", "x" * 5000])
    part = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = part + dice.choice([content, content[:900], b"PK\3\4", b"", dice.randbytes(500)]) + b"\r\n--x--\r\n"
    path = mostly("/api/jobs", "/api/jobs/../../etc", f"/api/jobs/{WORD}", "/static/..%2f..%2fx", "/%00", "*", "")
    method = mostly("POST", "GET", "DELETE", "PUT", "PATCH", "TRACE", WORD)
    kind = mostly("multipart/form-data; boundary=x", "multipart/form-data", "text/plain", "a" * 3000, "")
    length = mostly(len(body), 0, 7, len(body) - 9, len(body) + 9, 10**15, -1)
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
    whole = bytearray(head.encode() + b"Connection: close\r\n\r\n" + body)
    for _ in range(dice.randrange(1, 5) if number % 2 else 0):
        at = dice.randrange(min(len(whole), 400 if dice.random() < 0.7 else len(whole)))
        whole[at : at + dice.randrange(4)] = dice.choice([b"", b"\r\n", b"\0", b"\xff", dice.randbytes(8), b"--x"])
    return bytes(whole)


def raw_answer(url: str, request: bytes) -> bytes:
    """All that comes back, until the server or 8 silent seconds end it."""
    taken = b""
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 80), timeout=10) as connection:
        connection.settimeout(8)
        with contextlib.suppress(OSError):
            connection.sendall(request)
        with contextlib.suppress(OSError):
            while piece := connection.recv(2**16):
                taken += piece
    return taken


def check_told(rig: Rig, told: bytes, where: str) -> None:
    """That an answer has nothing of the server's inside."""
    for inside in (b"Traceback", b'File "', b"site-packages", str(rig.server.folder).encode()):
        if inside in told:
            rig.broken.append(f"{where}: the answer tells {inside.decode()}")


def damaged(rig: Rig, count: int) -> None:
    """DICOM files with bytes hit, cut or put in, each a job; six of eight compressed."""
    originals = [pydicom.dcmread(io.BytesIO(rig.study().files[0][1])) for _ in range(4)]
    originals[1].compress(RLELossless, generate_instance_uid=False)
    originals[3].compress(JPEG2000Lossless, generate_instance_uid=False)
    originals += [pydicom.dcmread(str(get_testdata_file(name))) for name in JPEGS]
    wholes = []
    for one in originals:
        one.PatientName = one.PatientID = WORD
        written = io.BytesIO()
        pydicom.dcmwrite(written, one, enforce_file_format=True)
        wholes.append(written.getvalue())
    accepted_ids: list[str] = []
    answers: Counter[str] = Counter()

    def send(number: int) -> None:
        dice = random.Random(number)
        raw = bytearray(wholes[number % len(wholes)])
        for _ in range(dice.randrange(1, 6)):
            raw[dice.randrange(min(len(raw), 1500) if dice.random() < 0.7 else len(raw))] = dice.randrange(256)
        if number % 5 == 0:
            del raw[dice.randrange(len(raw)) :]
        if number % 7 == 0:
            at = dice.randrange(len(raw) + 1)
            raw[at:at] = dice.randbytes(dice.randrange(64))
        job_id = submitted(rig, [(f"{WORD}{number}.dcm", bytes(raw))])
        if job_id:
            accepted_ids.append(job_id)

    started_s = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(count)))
    for job_id in accepted_ids:

        def ended(job_id: str = job_id) -> dict | None:
            given = answer(f"{rig.server.url}/api/jobs/{job_id}")
            return given.json() if given is not None and given.json().get("state") in FINISHED else None

        status = waited(ended, "a damaged file's job to end")
        answers[status["state"]] += 1
        check_told(rig, json.dumps(status).encode(), f"damaged file, job {job_id}")
        if "error of the server" in status["message"]:
            rig.broken.append(f"damaged file, job {job_id}: an error of the server")
        if len(status["message"].splitlines()) > 1:
            rig.broken.append(f"damaged file, job {job_id}: more than a line")
    listed = ", ".join(f"{times} {state}" for state, times in sorted(answers.items()))
    rig.say(f"{count} damaged DICOM files", f"{listed}; {time.monotonic() - started_s:.0f} s")


def aftermath(rig: Rig, starts: int) -> None:
    """What must hold at the end: nothing crashed, nothing doubled, nothing outside, nothing told."""
    server = rig.server
    if server.process is None or server.process.poll() is not None or server.starts != starts:
        rig.broken.append("the server ended without being killed")
    metrics = answer(server.url + "/metrics")
    metrics_text = metrics.text if metrics is not None else ""
    sent_twice = len(rig.archive.arrived) - len({one.SOPInstanceUID for one in rig.archive.arrived})
    jobs = server.rows("SELECT COUNT(*) FROM jobs WHERE origin='dicom'")[0][0]
    series = len({one.SeriesInstanceUID for one in rig.archive.arrived})
    if not len(rig.by_dicom) == jobs == series:
        rig.broken.append(f"{len(rig.by_dicom)} series came by C-STORE, {jobs} jobs, {series} synthetic series arrived")
    rig.say(
        "series by C-STORE → jobs → series at the destination",
        f"{len(rig.by_dicom)} → {jobs} → {series}; {sent_twice} objects sent again after a kill, under the same UID",
    )
    code = server.end(signal.SIGTERM)
    if code != 0:
        rig.broken.append(f"SIGTERM: exit code {code}")
    log = server.log.read_text(errors="replace")
    for name, told in (("log", log), ("metrics", metrics_text)):
        uids = [uid for study in rig.by_dicom for uid in (study.study_uid, *study.instances)]
        if WORD.lower() in told.lower() or any(uid in told for uid in uids):
            rig.broken.append(f"the {name} names a patient or a study")
        if "Traceback" in told:
            rig.broken.append(f"the {name} has a traceback")
    known = {row[0] for row in server.rows("SELECT job_id FROM jobs WHERE state != 'cancelled'")}
    if strays := {path.name for path in (server.served / "jobs").iterdir()} - known:
        rig.broken.append(f"{len(strays)} folders belong to no job")
    outside = [
        path for place in ("cwd", "home", "tmp") for path in (server.folder / place).rglob("*") if path.is_file()
    ]
    if outside:
        rig.broken.append(f"{len(outside)} files outside the folder, such as {outside[0].relative_to(server.folder)}")
    errors = sum(" ERROR " in line for line in log.splitlines())
    rig.say(
        "log", f"{len(log.splitlines())} lines, {errors} errors; no name, identifier or UID of a patient sought found"
    )
    rig.say("files outside the server's folder", str(len(outside)))
    rig.say("most memory of the server", f"{server.most_mib:.0f} MiB")


def main() -> None:
    """Runs all parts and prints the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--uploads", type=int, default=50)
    words.add_argument("--kills", type=int, default=10)
    words.add_argument("--down-s", type=float, default=60.0)
    words.add_argument("--malformed", type=int, default=1000)
    words.add_argument("--damaged", type=int, default=1000)
    asked = words.parse_args()
    with set_up() as rig:
        uploads(rig, asked.uploads)
        kills(rig, asked.kills)
        starts = rig.server.starts
        outage(rig, asked.down_s)
        malformed(rig, asked.malformed)
        damaged(rig, asked.damaged)
        aftermath(rig, starts)
        print("\n| fault | found |\n|---|---|")
        for what, found in rig.rows:
            print(f"| {what} | {found} |")
        for fault in dict.fromkeys(rig.broken):
            print(f"BROKEN: {fault}")
        sys.exit(1 if rig.broken else 0)


if __name__ == "__main__":
    main()
