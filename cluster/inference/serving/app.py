"""App: the pages and answers of a served model over HTTP."""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.inference.serving.requests import Limits, RefusedError, body_of, json_of, rows_in
from cluster.inference.serving.served import Answer, Rows, Served
from nn_models.errors import UserError

PAGE = Path(__file__).parent / "page.html"
# the page has no part that is not in it, and asks nobody but this server
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
BUSY_RETRY_S = 1
MOST_WAITING = 512  # requests of a replica whose rows are held at once

Endpoint = Callable[[Request], Awaitable[Response]]


class Answering(Protocol):
    """Who answers: a replica."""

    served: Served

    async def answer(self, served: Served, rows: Rows) -> list[Answer] | UserError:
        """To these rows, which `served` has checked; with those of other requests in one pass."""

    async def swap(self, run: str) -> dict[str, Any]:
        """Have all replicas serve another run, and say what it is. Raises UserError where it cannot be served."""


class Measures:
    """What /metrics shows, in Prometheus' words: of all replicas together, by files that they share."""

    def __init__(self) -> None:
        """In a process that has PROMETHEUS_MULTIPROC_DIR."""
        registry = CollectorRegistry()  # it only holds them: what is shown is read from the files
        self.requests = Counter("manta_requests", "Requests to /predict, by status.", ["status"], registry=registry)
        self.seconds = Histogram("manta_request_seconds", "From a request's head to its answer.", registry=registry)
        self.rows = Counter("manta_rows", "Rows that were answered.", registry=registry)
        sizes = [float(1 << power) for power in range(11)]
        self.batches = Histogram("manta_batch_rows", "Rows of one pass.", buckets=sizes, registry=registry)

    def shown(self) -> bytes:
        """The text of /metrics."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)


def site(replica: Answering, *, token: str | None, limits: Limits, measures: Measures) -> Starlette:
    """The ASGI application.

    GET  /         a page to try the model; it holds nothing of the model, and asks for the token where there is one
    GET  /health   {"status": "ok"}: without a token too
    GET  /model    what is served, takes and gives
    POST /model    {"run": path}: serve another run; with a token only
    POST /predict  {"rows": [...]}, a picture, a form with pictures, or a text -> {"predictions": [...]}
    GET  /metrics  counts and times, as Prometheus reads them
    """
    page = PAGE.read_bytes()
    waiting = 0

    def guarded(endpoint: Endpoint, *, always: bool = False) -> Endpoint:
        async def check(request: Request) -> Response:
            _check_sender(request, token)
            if token is None and always:
                fix = "set MANTA_SERVE_TOKEN before manta serve"
                raise RefusedError(403, "authorization", "the server has no token, without which this is closed", fix)
            return await endpoint(request)

        return check

    async def show_page(request: Request) -> Response:
        return Response(page, media_type="text/html", headers=PAGE_HEADERS)

    async def health(request: Request) -> Response:
        return _json({"status": "ok"})

    async def model(request: Request) -> Response:
        return _json({**replica.served.described(), "limits": asdict(limits)})

    async def swap(request: Request) -> Response:
        told = json_of(await _body(request, limits))
        if not isinstance(told, dict) or set(told) != {"run"} or not isinstance(told["run"], str):
            raise RefusedError(422, "body", "names no run", 'send {"run": "PATH"}')
        return _json(await replica.swap(told["run"]))

    async def answered(request: Request) -> Response:
        nonlocal waiting
        if waiting >= MOST_WAITING:
            raise RefusedError(503, "server", f"{waiting} requests are waiting already", "try again in a second")
        waiting += 1
        try:
            content = await _body(request, limits)
            served, kind = replica.served, request.headers.get("content-type", "")
            rows = await rows_in(content, kind, served, limits)
            answers = await replica.answer(served, rows)
        finally:
            waiting -= 1
        if isinstance(answers, UserError):
            raise answers
        measures.rows.inc(len(answers))
        return _json({"run": served.run, "predictions": answers})

    async def predict(request: Request) -> Response:
        began, status = time.perf_counter(), 500
        try:
            _check_sender(request, token)
            response = await answered(request)
            status = response.status_code
            return response
        except (RefusedError, UserError) as error:
            status = error.status if isinstance(error, RefusedError) else 422
            raise
        finally:
            measures.requests.labels(str(status)).inc()
            measures.seconds.observe(time.perf_counter() - began)

    async def metrics(request: Request) -> Response:
        return Response(await asyncio.to_thread(measures.shown), headers={"content-type": CONTENT_TYPE_LATEST})

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/health", health),
            Route("/model", guarded(model)),
            Route("/model", guarded(swap, always=True), methods=["POST"]),
            Route("/predict", predict, methods=["POST"]),
            Route("/metrics", guarded(metrics)),
        ],
        exception_handlers={
            RefusedError: _refused,
            UserError: _unreadable,
            HTTPException: _http_error,
            Exception: _failed,
        },
    )


def _check_sender(request: Request, token: str | None) -> None:
    """Raise RefusedError for who may not ask: without the token, or where there is none, from a web page elsewhere."""
    if token is None:
        # a page of another site may have a name of its own that leads here (DNS rebinding): then that name is asked for
        host = request.headers.get("host", "localhost").rpartition("@")[2]
        name = host.partition("]")[0].strip("[") if host.startswith("[") else host.partition(":")[0]
        if name.lower() != "localhost" and not _is_loopback(name):
            raise RefusedError(403, "host", f"{name[:100]!r} is not a name of loopback", "ask for 127.0.0.1")
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # as long for a wrong token as for the right one
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise RefusedError(401, "authorization", "no token, or a wrong one", "send Authorization: Bearer TOKEN")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _body(request: Request, limits: Limits) -> bytes:
    try:
        async with asyncio.timeout(limits.body_s):
            return await body_of(request, limits)
    except TimeoutError:
        raise RefusedError(408, "body", f"did not come within {limits.body_s:g} s") from None


def _json(content: Any, status: int = 200, **headers: str) -> Response:
    text = to_json(content, inf_nan_mode="null")
    return Response(text, status, headers=headers, media_type="application/json")


def _error(status: int, path: str, message: str, fix: str | None = None, **headers: str) -> Response:
    # the sender may go on sending what nobody reads
    closing = {"connection": "close"} if status in (408, 413) else {}
    told = {"path": path, "message": message, "fix": fix}
    return _json({"error": told}, status, **closing, **headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": str(BUSY_RETRY_S)}}.get(error.status, {})
    return _error(error.status, error.path, error.message, error.fix, **headers)


async def _unreadable(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    problem = error.problems[0]
    return _error(422, problem.path, str(problem.message)[:500], problem.fix)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, request.url.path, error.detail, "see GET /", **(error.headers or {}))


async def _failed(request: Request, error: Exception) -> Response:
    """What nobody foresaw; the error itself goes to the server's log."""
    return _error(500, request.url.path, f"the server failed ({type(error).__name__})", "tell who runs it")
