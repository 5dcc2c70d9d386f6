"""The REST interface, the page's files, health and metrics.

Errors are `{"detail": one line}`. Nothing of a patient stands in an address, a log or a metric: jobs go by random
ids, uploads by numbers, and of a request only its route is written down.
"""

import errno
import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import anyio
import peewee
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from seresvit import __version__
from seresvit.data.pairing import image_hash
from seresvit.data.volume import DISK_FULL, DataError
from seresvit.serving.guard import Guard
from seresvit.serving.jobs import FINISHED, Job, Jobs, QueueFull, State
from seresvit.serving.results import Format, result_file
from seresvit.serving.uploads import MIB, Bounds, Malformed, Receiver, TooLarge, arrange, as_given
from seresvit.serving.views import PAGE_FILES, VIEW
from seresvit.serving.worker import Worker
from seresvit.synthesis.predict import RECORD
from seresvit.synthesis.predictor import Predictor

# An upload may pause and last this long, and what follows on a refusal is read that far, so that the refusal arrives.
MOST_PAUSE_S, MOST_UPLOAD_S = 60.0, 3600.0
MOST_DRAINED, MOST_DRAIN_S = 16 * MIB, 5.0
RETRY_S = 15
FULL = "the server's disk is full; try again later"
MOST_KEY = 200
KEY_SAYS = (
    "any word of the client's own: the same again, with the same images and model, gives the job that there is, as "
    "after an answer that was lost"
)
JOB_SECONDS = (1, 3, 10, 30, 100, 300, 1000, 3600)


@dataclass(frozen=True)
class Served:
    """All that the interface answers from."""

    jobs: Jobs
    predictors: Mapping[str, Predictor]
    worker: Worker
    bounds: Bounds = field(default_factory=Bounds)
    token: str = ""
    # Host names by which it may be asked for; none: by any.
    hosts: tuple[str, ...] = ()
    # Why it is not ready, in a line each; further numbers for the metrics, by name and what they count.
    faults: Callable[[], list[str]] = list
    numbers: Callable[[], dict[tuple[str, str], float]] = dict


class Error(BaseModel):
    """What went wrong, in one line."""

    detail: str


class Model(BaseModel):
    """A network that may be chosen, and what it was trained on."""

    name: str
    target: str
    sources: list[str]
    unit: str
    channels: list[str]
    context_slices: int
    sha256: str


class Status(BaseModel):
    """A job as it is now. `position` counts the jobs before it; `num_slices` and `unit` are known when it is done."""

    id: str
    model: str
    state: State
    done: int
    total: int
    position: int
    message: str
    warnings: list[str]
    created: str
    started: str
    finished: str
    expires: str
    num_slices: int | None
    unit: str | None
    target: str


class Health(BaseModel):
    """Whether work is taken and done, and if not, why."""

    status: str
    reasons: list[str]
    version: str


ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": Error, "description": "no token, or a wrong one"},
    403: {"model": Error, "description": "another site's page asks"},
    404: {"model": Error, "description": "there is no such job or file"},
    409: {"model": Error, "description": "not in this state, or not in this format"},
    422: {"model": Error, "description": "a value that cannot be"},
    507: {"model": Error, "description": "the disk is full"},
}
SUBMIT_ERRORS: dict[int | str, dict[str, Any]] = {
    **{code: ERRORS[code] for code in (401, 403, 422, 507)},
    400: {"model": Error, "description": "the body or a file in it is damaged"},
    408: {"model": Error, "description": "the upload paused, or lasted, for too long"},
    413: {"model": Error, "description": "too large, or too many files"},
    503: {"model": Error, "description": "the queue is full"},
}
BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


def make_app(served: Served) -> FastAPI:
    """The web application of these jobs."""
    registry = CollectorRegistry()
    registry.register(_Numbers(served))
    job_seconds = Histogram(
        "seresvit_job_seconds", "Time at work on a job", ("state",), registry=registry, buckets=JOB_SECONDS
    )
    served.worker.on_end.append(lambda state, elapsed_s: job_seconds.labels(state).observe(elapsed_s))
    app = FastAPI(title="SE-ResViT", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, hosts=served.hosts, registry=registry)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(DataError, _refused)
    app.add_exception_handler(peewee.OperationalError, _unwritten)
    bearer = HTTPBearer(auto_error=False, description="the token of the server, where it has one")

    def authorise(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if not (given and secrets.compare_digest(given.credentials.encode(), served.token.encode())):
            raise HTTPException(401, "give the server's token", {"WWW-Authenticate": "Bearer"})

    # Without a token nothing of it stands in the document either.
    authorised = [Depends(authorise)] if served.token else []
    app.include_router(_jobs_of(served), dependencies=authorised)
    app.include_router(_results_of(served), dependencies=authorised)
    _add_page(app)

    @app.get("/health", responses={503: {"model": Health, "description": "no work is taken or done"}})
    def health(response: Response) -> Health:
        """Whether work is taken and done."""
        reasons = [*served.faults(), *_full_disk(served)]
        response.status_code = 503 if reasons else 200
        return Health(status="not ready" if reasons else "ready", reasons=reasons, version=__version__)

    @app.get("/metrics", dependencies=authorised, responses={401: ERRORS[401]}, response_class=Response)
    def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _form(names: list[str]) -> dict[str, Any]:
    """What the document says of the body of a submission, which is read as it comes."""
    model = {"type": "string", "enum": names, "description": "may be left out where one is served"}
    files = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "format": "binary"},
        "description": "DICOM files of one series, one zip of them, or one NIfTI, MHA or NRRD file",
    }
    schema = {"type": "object", "required": ["files"], "properties": {"model": model, "files": files}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE_FILES["index.html"])

    @app.get("/static/{file}", include_in_schema=False)
    def static(file: str) -> FileResponse:
        if file not in PAGE_FILES:
            raise HTTPException(404, "there is no such file")
        return FileResponse(PAGE_FILES[file], headers={"Cache-Control": "no-cache"})


def _jobs_of(served: Served) -> APIRouter:
    router, jobs = APIRouter(prefix="/api"), served.jobs
    # A few more than may wait, so that they are told that the queue is full.
    uploading = anyio.CapacityLimiter(jobs.most_waiting + 8)

    @router.get("/models", responses={401: ERRORS[401]})
    def models() -> list[Model]:
        """The networks that may be chosen."""
        return [_model(name, predictor) for name, predictor in served.predictors.items()]

    @router.post("/jobs", status_code=202, responses=SUBMIT_ERRORS, openapi_extra=_form(list(served.predictors)))
    async def submit(
        request: Request,
        response: Response,
        idempotency_key: Annotated[str | None, Header(max_length=MOST_KEY, description=KEY_SAYS)] = None,
    ) -> Status:
        """Give images; the answer says where to ask for the result."""
        body = _Body(request)
        try:
            submission = _submission(served, request, body, idempotency_key)
            status = await anyio.to_thread.run_sync(submission, limiter=uploading)
        except Exception as error:
            if (answer := _as_answer(error)) is error:
                raise
            raise answer from None
        finally:
            await body.drain()
        served.worker.woken.set()
        response.headers["Location"] = f"/api/jobs/{status.id}"
        return status

    @router.get("/jobs/{job_id}", responses={code: ERRORS[code] for code in (401, 404)})
    def status(job_id: str) -> Status:
        """How far a job is."""
        return _status(served, _known(served, job_id))

    @router.delete(
        "/jobs/{job_id}", status_code=204, responses={code: ERRORS[code] for code in (401, 403, 404, 409, 507)}
    )
    def remove(job_id: str) -> None:
        """Cancel a job that waits or is at work; erase one that is finished."""
        job = _known(served, job_id)
        if not jobs.cancel(job.id) and not jobs.erase(job.id) and jobs.get(job.id):
            raise HTTPException(409, "the result is still on its way to its destination; erase it when it is there")

    return router


def _results_of(served: Served) -> APIRouter:
    router = APIRouter(prefix="/api")

    @router.get("/jobs/{job_id}/result", responses={**ERRORS, **BINARY}, response_class=FileResponse)
    def result(job_id: str, format: Format = "native") -> FileResponse:
        """The synthetic image as one file: a zip of DICOM, a NIfTI, or the format of the source."""
        job = _finished(served, job_id)
        try:
            file = result_file(job, format)
        except (DataError, FileNotFoundError) as error:
            _known(served, job_id)  # not erased meanwhile
            raise HTTPException(409, as_given(str(error), job.folder)) from None
        return FileResponse(file, media_type="application/octet-stream", filename=file.name)

    @router.get("/jobs/{job_id}/view", responses={code: ERRORS[code] for code in (401, 404, 409)})
    def view(job_id: str) -> dict[str, Any]:
        """What the page shows beside the images: positions, windows, gates of every slice."""
        return json.loads((_finished(served, job_id).view / VIEW).read_text(encoding="utf-8"))

    @router.get("/jobs/{job_id}/view/{file}", responses={**ERRORS, **BINARY}, response_class=FileResponse)
    def view_file(job_id: str, file: str) -> FileResponse:
        """One of the images that the view names."""
        job = _finished(served, job_id)
        named = [
            image["file"] for image in json.loads((job.view / VIEW).read_text(encoding="utf-8"))["images"].values()
        ]
        if file not in named:
            raise HTTPException(404, "there is no such image")
        return FileResponse(job.view / file, media_type="application/gzip")

    return router


def _known(served: Served, job_id: str) -> Job:
    """The job, or 404: what was given never becomes a path."""
    if (job := served.jobs.get(job_id)) is None:
        raise HTTPException(404, "there is no such job; results are erased after a time")
    return job


def _finished(served: Served, job_id: str) -> Job:
    if (job := _known(served, job_id)).state != "done":
        raise HTTPException(409, f"the job is {job.state}; there is no result")
    return job


class _Body:
    """The body of a request, piece by piece."""

    def __init__(self, request: Request):
        self.stream, self.ended = request.stream(), False

    async def next(self) -> bytes:
        """The next bytes, none at its end."""
        with anyio.fail_after(MOST_PAUSE_S):
            async for piece in self.stream:
                if piece:
                    return piece
        self.ended = True
        return b""

    async def drain(self) -> None:
        """Reads on for a while: a client that is cut off while it sends does not see the answer."""
        drained = 0
        with suppress(Exception), anyio.move_on_after(MOST_DRAIN_S):
            while not self.ended and drained < MOST_DRAINED:
                drained += len(await self.next())


def _submission(served: Served, request: Request, body: _Body, key: str | None) -> Callable[[], Status]:
    """What submits the job of a request and gives its status, called in a thread; the event loop reads the body."""
    bounds, fields = served.bounds, dict[str, str]()

    def fill(folder: Path) -> None:
        receiver = Receiver(request.headers.get("content-type", ""), folder, bounds)
        until_s = time.monotonic() + MOST_UPLOAD_S
        try:
            while piece := anyio.from_thread.run(body.next):
                receiver.feed(piece)
                if time.monotonic() > until_s:
                    raise TimeoutError
            receiver.finish()
        finally:
            receiver.stop()
        fields.update(receiver.fields)
        _chosen(served, fields)
        arrange(folder, receiver.names, bounds)

    def said(folder: Path) -> str:
        # With the images, lest a client that uses a word twice be given another patient's result.
        parts = [key, _chosen(served, fields), image_hash(folder)]
        return f"rest:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"

    def submit() -> Status:
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > bounds.most_bytes:
            raise TooLarge(f"larger than {bounds.most_bytes // MIB} MiB, the most that is taken at once")
        if _full_disk(served):
            raise OSError(errno.ENOSPC, "the disk is full")
        return _status(served, served.jobs.submit(lambda: _chosen(served, fields), fill, key=said if key else None))

    return submit


def _chosen(served: Served, fields: dict[str, str]) -> str:
    """The model that a form names, or the only one. Raises DataError for another."""
    names = list(served.predictors)
    name = fields.get("model") or (names[0] if len(names) == 1 else "")
    if name not in names:
        raise DataError(f"model: choose one of {', '.join(names)}")
    return name


def _as_answer(error: Exception) -> Exception:
    """The answer to what went wrong with a submission; the error itself where it is the server's."""
    if isinstance(error, QueueFull):
        return HTTPException(503, str(error), {"Retry-After": str(RETRY_S)})
    if isinstance(error, ClientDisconnect):
        return HTTPException(400, "the upload was broken off")
    if isinstance(error, TimeoutError):
        return HTTPException(408, "the upload paused, or lasted, for too long; send it again")
    if isinstance(error, TooLarge | Malformed):
        return HTTPException(413 if isinstance(error, TooLarge) else 400, str(error))
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return HTTPException(507, FULL)
    return error


def _full_disk(served: Served) -> list[str]:
    return ["the disk is full: nothing is taken"] if served.jobs.room() < 0 else []


def _model(name: str, predictor: Predictor) -> Model:
    return Model(
        name=name,
        target=predictor.target_name,
        sources=list(predictor.header.get("sources", [])),
        unit=predictor.header.get("target_intensity", {}).get("unit", ""),
        channels=list(predictor.data.channels),
        context_slices=predictor.data.context_slices,
        sha256=predictor.checkpoint_sha256,
    )


def _status(served: Served, job: Job) -> Status:
    predictor = served.predictors.get(job.checkpoint)
    num_slices = unit = None
    if job.state == "done":
        with suppress(OSError):  # erased at this very moment
            num_slices = json.loads((job.result / RECORD).read_text(encoding="utf-8"))["num_slices"]
            unit = json.loads((job.view / VIEW).read_text(encoding="utf-8"))["unit"]
    return Status(
        id=job.id,
        model=job.checkpoint,
        state=job.state,
        done=job.done,
        total=job.total,
        position=served.jobs.position(job.id),
        message=job.message,
        warnings=list(job.warnings),
        created=job.created,
        started=job.started,
        finished=job.finished,
        expires=served.jobs.expires(job),
        num_slices=num_slices,
        unit=unit,
        target=predictor.target_name if predictor else "",
    )


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("query", "path", "body"))
    return JSONResponse({"detail": f"{where}: {first['msg']}" if where else first["msg"]}, 422)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": " ".join(str(error).split())}, 422)


async def _unwritten(request: Request, error: Exception) -> JSONResponse:
    if "full" not in str(error):
        raise error
    return JSONResponse({"detail": FULL}, 507)


class _Numbers:
    """What is counted when it is asked for."""

    def __init__(self, served: Served):
        self.served = served

    def collect(self) -> Iterator[GaugeMetricFamily]:
        in_state = GaugeMetricFamily("seresvit_jobs", "Jobs that are kept, by state", labels=["state"])
        states: tuple[State, ...] = ("queued", "running", *FINISHED)
        for state in states:
            in_state.add_metric([state], self.served.jobs.count(state))
        yield in_state
        free = shutil.disk_usage(self.served.jobs.folder).free
        yield GaugeMetricFamily("seresvit_free_bytes", "Free bytes on the disk of the jobs", free)
        for (name, what), number in self.served.numbers().items():
            yield GaugeMetricFamily(f"seresvit_{name}", what, number)
