"""The REST interface: what the OpenAPI document promises, and errors in one line that tell nothing of the server."""

import gzip
import io
import itertools
import shutil
import threading
import zipfile

import nibabel
import numpy as np
import peewee
import pydicom
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from seresvit.data import read_volume
from seresvit.serving import api, results
from seresvit.serving.api import Served, make_app
from seresvit.serving.uploads import Bounds
from seresvit.serving.worker import Worker
from seresvit.synthesis.predictor import Predictor

TOKEN = "0123456789abcdef"
# Bytes that the document allows are mostly no images, and unknown fields are left alone.
EXCLUDED = [negative_data_rejection, positive_data_acceptance]
ENDS = ("", "-wal", "-shm")
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint):
    return Predictor(tiny_checkpoint, "cpu")


@pytest.fixture
def served(jobs, predictor):
    """A server whose worker works when it is told to."""
    worker = Worker(jobs, {"tiny": predictor})
    return Served(jobs, worker.predictors, worker, Bounds(most_bytes=300_000, most_unpacked=10**6, most_files=20))


@pytest.fixture
def client(served):
    return TestClient(make_app(served), raise_server_exceptions=False)


def study(patients, name="P001"):
    return [("files", (file.name, file.read_bytes())) for file in sorted((patients / "110keV" / name).iterdir())]


def as_zip(patients):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for _, (name, content) in study(patients):
            archive.writestr(f"study/{name}", content)
    return [("files", ("study.zip", packed.getvalue()))]


def as_nifti(patients, tmp_path):
    volume = read_volume(patients / "110keV/P001")
    nibabel.save(nibabel.Nifti1Image(volume.array.T.astype(np.int16), np.diag([1, 1, 3, 1.0])), tmp_path / "a.nii.gz")
    return [("files", ("a.nii.gz", (tmp_path / "a.nii.gz").read_bytes()))]


def work(served):
    while job := served.jobs.take():
        served.worker.work(job, threading.Event())


def done(client, served, files):
    answer = client.post("/api/jobs", files=files)
    assert answer.status_code == 202, answer.text
    work(served)
    status = client.get(answer.headers["location"]).json()
    assert status["state"] == "done", status
    return status


def test_a_study_goes_its_way(client, served, patients):
    answer = client.post("/api/jobs", files=study(patients), data={"model": "tiny"})
    job = answer.json()
    assert (job["state"], job["position"], job["target"], job["unit"]) == ("queued", 0, "70keV", None)
    where = answer.headers["location"]
    assert where == f"/api/jobs/{job['id']}"
    assert client.get(f"{where}/result").status_code == 409
    second = client.post("/api/jobs", files=as_zip(patients)).json()
    assert second["position"] == 1
    work(served)
    status = client.get(where).json()
    assert (status["state"], status["done"], status["total"]) == ("done", 3, 3)
    assert (status["num_slices"], status["unit"], status["message"]) == (3, "HU", "")
    assert status["expires"] > status["finished"] >= status["started"] >= status["created"]
    view = client.get(f"{where}/view").json()
    assert view["slices"] == [0, 1, 2] and set(view["gates"]) == {"art_1", "art_6"}
    for image in view["images"].values():
        packed = client.get(f"{where}/view/{image['file']}").content
        shown = nibabel.Nifti1Image.from_bytes(gzip.decompress(packed))
        assert shown.shape == (32, 32, 3)
    assert client.delete(where).status_code == 204 and client.get(where).status_code == 404
    assert client.get(f"/api/jobs/{second['id']}").json()["state"] == "done"


def test_result_as_dicom_and_as_nifti_is_one_image(client, served, patients, tmp_path):
    where = f"/api/jobs/{done(client, served, study(patients))['id']}/result"
    native = client.get(where)
    assert native.content == client.get(where, params={"format": "dicom"}).content
    assert 'filename="synthetic.zip"' in native.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(native.content)) as archive:
        archive.extractall(tmp_path)
    series = read_volume(tmp_path / "synthetic")
    first = pydicom.dcmread(tmp_path / "synthetic/SYN_0001.dcm")
    source = pydicom.dcmread(sorted((patients / "110keV/P001").iterdir())[0])
    assert first.PatientID == source.PatientID and first.SeriesInstanceUID != source.SeriesInstanceUID
    (tmp_path / "a.nii.gz").write_bytes(client.get(where, params={"format": "nifti"}).content)
    image = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(image.array, np.rint(series.array))
    np.testing.assert_allclose(image.affine, series.affine, atol=1e-4)


def test_a_nifti_gives_a_nifti(client, served, patients, tmp_path):
    where = f"/api/jobs/{done(client, served, as_nifti(patients, tmp_path))['id']}/result"
    refused = client.get(where, params={"format": "dicom"})
    assert refused.status_code == 409 and "take it as NIfTI" in refused.json()["detail"]
    for format in ("native", "nifti"):
        (tmp_path / "b.nii.gz").write_bytes(client.get(where, params={"format": format}).content)
        assert read_volume(tmp_path / "b.nii.gz").array.shape == (3, 32, 32)


def test_slices_with_gaps_are_no_nifti(client, served, tmp_path, patients):
    shutil.copytree(patients / "110keV/P001", tmp_path / "110keV/P001")
    last = sorted((tmp_path / "110keV/P001").iterdir())[-1]
    header = pydicom.dcmread(last)
    header.ImagePositionPatient[2] += 5
    header.save_as(last)
    where = f"/api/jobs/{done(client, served, study(tmp_path))['id']}/result"
    refused = client.get(where, params={"format": "nifti"})
    assert refused.status_code == 409 and "take the result as DICOM" in refused.json()["detail"]
    assert client.get(where).status_code == 200


def test_models_health_metrics_and_page(client, served, patients):
    done(client, served, study(patients))
    assert client.get("/api/models").json()[0] == {
        **{"name": "tiny", "target": "70keV", "sources": ["110keV"], "unit": "HU", "channels": [], "context_slices": 0},
        "sha256": served.predictors["tiny"].checkpoint_sha256,
    }
    assert client.get("/health").json()["status"] == "ready"
    metrics = client.get("/metrics").text
    assert 'seresvit_jobs{state="done"} 1.0' in metrics
    assert 'seresvit_requests_total{method="POST",route="/api/jobs",status="202"} 1.0' in metrics
    assert 'seresvit_job_seconds_count{state="done"} 1.0' in metrics
    page = client.get("/")
    assert (
        "text/html" in page.headers["content-type"] and "default-src 'self'" in page.headers["content-security-policy"]
    )
    assert client.get("/static/page.js").status_code == 200
    for path in ("/static/nothing", "/static/..%2fapi.py", "/static/%2e%2e/api.py", "/docs", "/redoc"):
        assert client.get(path).status_code == 404


def test_not_ready_says_why(served):
    faulty = TestClient(make_app(Served(**{**vars(served), "faults": lambda: ["the worker has ended"]})))
    answer = faulty.get("/health")
    assert answer.status_code == 503 and answer.json()["reasons"] == ["the worker has ended"]


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}])
def test_without_the_token_nothing_is_told_or_taken(served, patients, given):
    client = TestClient(make_app(Served(**{**vars(served), "token": TOKEN})))
    asked = [("GET", "/api/models"), ("GET", "/metrics"), ("GET", "/api/jobs/x"), ("DELETE", "/api/jobs/x")]
    asked += [("GET", "/api/jobs/x/result"), ("GET", "/api/jobs/x/view"), ("GET", "/api/jobs/x/view/source.nii.gz")]
    for method, path in asked:
        assert client.request(method, path, headers=given).status_code == 401
    assert client.post("/api/jobs", files=study(patients), headers=given).status_code == 401
    assert not list((served.jobs.folder / "jobs").iterdir())
    assert client.get("/").status_code == client.get("/health").status_code == 200
    assert client.get("/api/models", headers=BEARER).status_code == 200


def test_another_sites_page_gets_nothing(served, patients):
    client = TestClient(make_app(Served(**{**vars(served), "hosts": ("localhost", "testserver", "[::1]")})))
    for host in ("evil.example", "evil.example:8080", "", "localhost.evil.example", "[::2]:80"):
        assert client.get("/api/models", headers={"Host": host}).status_code == 403
    for host in ("localhost", "LOCALHOST:8080", "[::1]:9"):
        assert client.get("/api/models", headers={"Host": host}).status_code == 200
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 202), ("none", 202)):
        answer = client.post("/api/jobs", files=study(patients), headers={"Sec-Fetch-Site": site})
        assert answer.status_code == status


def test_what_cannot_be_taken_is_refused_in_one_line(client, served, patients):
    def refused(status, files=None, **given):
        answer = client.post("/api/jobs", files=files, **given)
        assert answer.status_code == status, answer.text
        assert len(answer.json()["detail"].splitlines()) == 1 and set(answer.json()) == {"detail"}
        assert not list((served.jobs.folder / "jobs").iterdir())
        return answer.json()["detail"]

    one = ("files", ("a.dcm", b"x"))
    assert "model: choose one of tiny" in refused(422, [one], data={"model": "../tiny"})
    assert "multipart" in refused(400, content=b"{}", headers={"content-type": "application/json"})
    assert "no file in it" in refused(422, [("files", ("", b""))], data={"model": "tiny"})
    assert "one image file" in refused(422, [one, ("files", ("a.nii", b"x"))])
    assert "damaged" in refused(400, [("files", ("a.zip", b"PK\3\4 no zip"))])
    assert "MiB" in refused(413, [("files", ("a", bytes(300_001)))])
    assert "20 files" in refused(413, [one] * 21)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(10**7))
    assert "in the zip" in refused(413, [("files", ("a.zip", bomb.getvalue()))])

    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    endless = itertools.chain([head], itertools.repeat(bytes(1000), 10**4))
    body = {"content": endless, "headers": {"content-type": "multipart/form-data; boundary=x"}}
    assert "MiB" in refused(413, **body)


def test_the_same_key_again_is_the_same_job(client, served, patients):
    def sent(key):
        return client.post("/api/jobs", files=study(patients), headers={"Idempotency-Key": key}).json()["id"]

    assert sent("mine") == sent("mine") != sent("another") and served.jobs.count("queued") == 2
    assert client.post("/api/jobs", files=study(patients), headers={"Idempotency-Key": "x" * 201}).status_code == 422


def test_the_same_key_for_other_images_is_another_job(client, served, patients):
    files, key = [study(patients, name) for name in ("P001", "P002")], {"Idempotency-Key": "1"}
    first, second = (client.post("/api/jobs", files=one, headers=key).json()["id"] for one in files)
    assert first != second and served.jobs.count("queued") == 2


def test_an_upload_that_takes_too_long_is_ended(client, served, patients, monkeypatch):
    monkeypatch.setattr(api, "MOST_UPLOAD_S", 0.0)
    assert client.post("/api/jobs", files=study(patients)).status_code == 408
    assert not list((served.jobs.folder / "jobs").iterdir())


def test_a_full_queue_and_what_is_cancelled(client, served, patients):
    ids = [client.post("/api/jobs", files=study(patients)).json()["id"] for _ in range(3)]
    full = client.post("/api/jobs", files=study(patients))
    assert full.status_code == 503 and full.headers["retry-after"] and "3 jobs wait" in full.json()["detail"]
    assert client.delete(f"/api/jobs/{ids[1]}").status_code == 204
    assert client.get(f"/api/jobs/{ids[1]}").json()["state"] == "cancelled"
    assert client.post("/api/jobs", files=study(patients)).status_code == 202
    assert client.get(f"/api/jobs/{ids[2]}").json()["position"] == 1


def test_what_a_destination_still_waits_for_is_not_erased(client, served, patients):
    where = f"/api/jobs/{done(client, served, study(patients))['id']}"
    served.jobs.needed_by.append(lambda job: True)
    refused = client.delete(where)
    assert refused.status_code == 409 and "destination" in refused.json()["detail"]
    assert client.get(where).status_code == 200


def test_what_is_erased_while_it_is_downloaded_leaves_nothing(client, served, patients, monkeypatch):
    job, written = done(client, served, study(patients))["id"], results._write_zip

    def erased_meanwhile(folder, file):
        assert client.delete(f"/api/jobs/{job}").status_code == 204
        written(folder, file)

    monkeypatch.setattr(results, "_write_zip", erased_meanwhile)
    assert client.get(f"/api/jobs/{job}/result?format=dicom").status_code == 404
    assert not list((served.jobs.folder / "jobs").iterdir())


def test_a_full_disk_is_said(client, served, patients, monkeypatch):
    monkeypatch.setattr(served.jobs, "room", lambda: -1)
    assert client.post("/api/jobs", files=study(patients)).status_code == 507
    health = client.get("/health")
    assert health.status_code == 503 and "disk is full" in health.json()["reasons"][0]
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(api, "arrange", full)
    assert client.post("/api/jobs", files=study(patients)).status_code == 507
    assert not list((served.jobs.folder / "jobs").iterdir())


def test_a_disk_so_full_that_the_queue_cannot_be_written_is_said(client, served, patients, monkeypatch):
    def full(*_):
        raise peewee.OperationalError("database or disk is full")

    monkeypatch.setattr(served.jobs, "cancel", full)
    job = client.post("/api/jobs", files=study(patients)).json()["id"]
    assert client.delete(f"/api/jobs/{job}").status_code == 507


@pytest.mark.parametrize("job_id", ["..", "%2e%2e", "..%2f..%2flock", "%2fetc%2fpasswd", "%00", "x" * 3000, "0" * 32])
@pytest.mark.parametrize("part", ["", "/result", "/view", "/view/source.nii.gz", "/view/..%2fview.json"])
def test_no_id_becomes_a_path(client, served, patients, job_id, part):
    assert client.get(f"/api/jobs/{job_id}{part}").status_code == 404
    job = done(client, served, study(patients))["id"] if job_id == ".." else "0" * 32
    for name in ("..%2fsource%2f000001.dcm", "view.json", "%2e%2e", "..%2f..%2f..%2fjobs.sqlite"):
        assert client.get(f"/api/jobs/{job}/view/{name}").status_code == 404


def test_an_error_of_the_server_tells_nothing(client, served, patients, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("Hong^Gildong in /secret/path")

    monkeypatch.setattr(api, "arrange", broken)
    answer = client.post("/api/jobs", files=study(patients))
    assert answer.status_code == 500 and answer.json()["detail"].startswith("an error of the server")
    monkeypatch.setattr(served.jobs, "get", broken)
    again = client.get("/api/jobs/Hong^Gildong")
    assert again.status_code == 500 and again.json() == answer.json()
    assert "RuntimeError at test_api.py" in caplog.text
    assert not any(word in caplog.text + answer.text for word in ("Hong", "secret", "Traceback"))


def test_log_and_metrics_name_routes_not_what_was_asked_for(client, served, patients, caplog):
    caplog.set_level("INFO")
    done(client, served, [("files", (f"Hong^Gildong_{name}", content)) for _, (name, content) in study(patients)])
    client.get("/Hong/Gildong?patient=Hong")
    client.get("/api/jobs/Hong/result?format=Hong")
    client.request("HONG", "/api/jobs/Hong")
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("seresvit")]
    told = "".join(logged) + client.get("/metrics").text
    header = pydicom.dcmread(sorted((patients / "110keV/P001").iterdir())[0])
    secrets = ["hong", "P001", str(header.PatientName), header.PatientID, header.StudyInstanceUID]
    assert "GET /api/jobs/{job_id}/result" in told
    assert not [word for word in secrets if word.lower() in told.lower()]


@pytest.mark.parametrize(
    ("mode", "token"),
    [(GenerationMode.POSITIVE, ""), (GenerationMode.POSITIVE, TOKEN), (GenerationMode.NEGATIVE, TOKEN)],
    ids=["allowed", "allowed, token", "not allowed, token"],
)
def test_the_schema_holds_for_whatever_is_asked(jobs, predictor, patients, tmp_path, mode, token):
    """Every route, with values that the document allows and with values that it does not."""
    worker = Worker(jobs, {"tiny": predictor})
    app = make_app(Served(jobs, worker.predictors, worker, Bounds(10**5, 10**5, 10), token))
    client, statuses = TestClient(app, headers=BEARER), set()
    job = client.post("/api/jobs", files=as_nifti(patients, tmp_path)).json()["id"]
    worker.work(jobs.take(), threading.Event())
    jobs.most_waiting = 10**6
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # nothing of it can be wrong: any job may be asked for

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(generation_mode=mode), is_known=st.booleans())
        def ask(case, is_known):
            if is_known and case.method == "GET" and "job_id" in case.path_parameters:
                case.path_parameters["job_id"] = job
            answer = case.call(headers=BEARER if token else None)
            case.validate_response(answer, excluded_checks=EXCLUDED)
            statuses.add(answer.status_code)
            assert answer.status_code not in (500, 501, 502)
            assert b"Traceback" not in answer.content and str(jobs.folder).encode() not in answer.content

        ask()
    assert {200, 404} <= statuses or mode is GenerationMode.NEGATIVE
    assert {path.name for path in jobs.folder.iterdir()} <= {"jobs", "lock", *(f"jobs.sqlite{end}" for end in ENDS)}
