"""What stands before every request: whose it is, what is written down of it, and that no error gets out as it is."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seresvit.serving.worker import what_happened

log = logging.getLogger("seresvit.serving")

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# The page has no other source than this server; NiiVue holds the letters that it draws as data.
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """ASGI middleware.

    Refuses a request for a host of another name than `hosts` (a site that had its own name point here would else read
    what this server holds), and one by which another site's page would change something. Times and counts by route,
    method and status in `registry`, and logs these alone.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], registry: CollectorRegistry):
        self.app, self.hosts = app, hosts
        labels = ("method", "route", "status")
        self.requests = Counter("seresvit_requests", "Requests answered", labels, registry=registry)
        self.seconds = Histogram("seresvit_request_seconds", "Time to answer", ("route",), registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_s, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            if refusal := self._refusal(scope):
                await refusal(scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        except Exception as error:
            log.error("%s %s: %s", *_named(scope), what_happened(error))
            if not status:
                detail = "an error of the server, not of the request; its log says where"
                await JSONResponse({"detail": detail}, 500)(scope, receive, answer)
        finally:
            method, route = _named(scope)
            elapsed_s = time.monotonic() - started_s
            self.requests.labels(method, route, str(status)).inc()
            self.seconds.labels(route).observe(elapsed_s)
            log.info("%s %s %d %.0f ms", method, route, status, elapsed_s * 1000)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        name = _host_name(headers.get("host", ""))
        if self.hosts and name not in self.hosts:
            return JSONResponse({"detail": f"ask for one of {', '.join(self.hosts)}, not for another host"}, 403)
        is_change = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if is_change and headers.get("sec-fetch-site", "") in ("cross-site", "same-site"):
            return JSONResponse({"detail": "another site's page may not change anything here"}, 403)
        return None


def _host_name(host: str) -> str:
    """The host of a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()


def _named(scope: Scope) -> tuple[str, str]:
    """Method and route of a request; what it asked for beyond that may be anything, and is not written down."""
    route: Any = scope.get("route")
    method = scope["method"] if scope["method"] in METHODS else "other"
    return method, getattr(route, "path", "none")
