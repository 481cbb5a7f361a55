"""Serve a model over HTTP: `trbert serve`.

    POST /predict                   {"inputs": "a text"}, as text-embeddings-inference
    POST /v2/models/NAME/infer      the Open Inference Protocol, version 2
    GET  /health, /metrics, /info, /docs

Takes requests within limits, writes a line about each, without its texts, and stops when told.
Source: docs/serving.md.
"""

import asyncio
import contextlib
import logging
import resource
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.inference.predictor import TRBert
from trbert_jax.io import streams
from trbert_jax.serving.batching import FullError
from trbert_jax.serving.service import Limits, Metrics, make_app

logger = logging.getLogger("trbert_jax.serving")

IDLE = 65  # seconds after which a connection without a request is closed; load balancers keep them for 60
_DISCARDED = 16  # times the largest body, read and dropped of one that is too large
MOST_FILES = 65536  # connections


# Errors -------------------------------------------------------------------------------------------


def _error(status: int, type_: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message, "error_type": type_}, status, headers)


def _error_handler(status: int, type_: str) -> Callable[[Request, Any], Response]:
    def handle(request: Request, error: Any) -> Response:
        headers, code, message = dict[str, str](), status, str(error)
        if isinstance(error, FullError):
            headers["Retry-After"] = str(error.retry_after)
        elif isinstance(error, RequestValidationError):
            first = error.errors()[0]
            where = [str(part) for part in first["loc"] if part != "body"]
            message = f"{'.'.join(where[:1]) or 'the body'}: {first['msg']}"
            if first["type"] == "json_invalid":
                code, message = 400, "the body is not JSON"
            elif where[:1] == ["inputs"]:
                message = "inputs: expected a text or question, or a list of them; see /docs"
        elif isinstance(error, HTTPException):
            code, message = error.status_code, error.detail  # 400 also for JSON that is nested too deeply
            headers |= error.headers or {}
        return _error(code, type_, message, headers)

    return handle


# Exception, its status, and its type in the answer.
ERRORS: tuple[tuple[type[Exception], int, str], ...] = (
    (UserError, 422, "validation"),
    (RequestValidationError, 422, "validation"),
    (FullError, 429, "overloaded"),
    (HTTPException, 400, "request"),
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class _Guard:
    """Receives a request whole, within limits of size and time; logs and counts it. ASGI middleware."""

    def __init__(self, app: Any, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._receiving = 0  # requests whose bodies are being received

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), [0]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        id = headers.get("x-request-id", "")[:64]
        id = id if id.isascii() and id.isprintable() and id else uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = id

        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            body = await self._receive(headers, scope["method"], receive)
            if isinstance(body, Response):
                await body(scope, receive, respond)
            elif body is not None:
                await self._app(scope, _replayed(body, receive), respond)
        except Exception as error:
            logger.error("request failed", extra={"fields": {"id": id}}, exc_info=error)
            if not status[0]:
                failed = _error(500, "backend", "internal error; the log has more")
                await failed(scope, receive, respond)
        finally:
            route = scope.get("route")
            path = route.path if route else "other"
            seconds = time.perf_counter() - start
            self._metrics.requests.labels(path, status[0]).inc()
            self._metrics.seconds.labels(path).observe(seconds)
            if path not in _QUIET or status[0] != 200:
                logger.info(
                    "request",
                    extra={
                        "fields": {
                            "id": id,
                            "path": path,
                            "status": status[0],
                            "ms": round(1000 * seconds, 2),
                        }
                    },
                )

    async def _receive(self, headers: Mapping[str, str], method: str, receive: Receive) -> Any:
        """Returns the body, a response that refuses it, or None if the client has left."""
        limits = self._limits
        if method != "POST":
            return b""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return _error(415, "request", f"content-type is {kind or 'missing'}; expected application/json")
        too_large = _error(
            413, "request", f"the body is larger than {limits.body} bytes", {"Connection": "close"}
        )
        if self._receiving >= 2 * limits.waiting:
            return _error(429, "overloaded", "too many requests at once", {"Retry-After": "1"})
        self._receiving += 1
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(limits.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limits.body:
                        parts.clear()  # and reads on: a client that still sends sees no answer
                    if size > _DISCARDED * limits.body or not message.get("more_body"):
                        return too_large if size > limits.body else b"".join(parts)
        except TimeoutError:
            if size > limits.body:
                return too_large
            closed = {"Connection": "close"}
            return _error(408, "request", f"the body took longer than {limits.timeout:g} s", closed)
        finally:
            self._receiving -= 1


_QUIET = ("/health", "/metrics", "/v2/health/ready", "/v2/health/live")  # not logged while all is well


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives the body, and then waits for the client to leave."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return messages.pop() if messages else await receive()

    return replay


# The server ---------------------------------------------------------------------------------------


class _Protocol(H11Protocol):
    """Closes connections that never send a request."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )


def guarded_app(
    model: TRBert, name: str, options: Mapping[str, Any], limits: Limits, failed: Callable[[Exception], None]
) -> FastAPI:
    """Returns the ASGI application, with limits and errors in JSON; arguments as of `make_app`."""
    app, metrics = make_app(model, name, options, limits, failed)
    for kind, status, type_ in ERRORS:
        app.add_exception_handler(kind, _error_handler(status, type_))
    app.add_middleware(_Guard, limits=limits, metrics=metrics)
    return app


def serve(
    model: TRBert,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    **options: Any,
) -> None:
    """Serves a model until SIGTERM or Ctrl-C; then answers the requests that it has, and returns.

    `name` is the model's in the Open Inference Protocol; port 0 takes a free one; `options` are those of
    `TRBert.predict`. Writes a line of JSON to standard error for each request. Raises `UserError` for a bad
    option, or an address that cannot be used.
    """
    limits, errors = limits or Limits(), list[Exception]()
    model.check_use(model.answers_questions)
    model.require_tokenizer()

    def failed(error: Exception) -> None:
        errors.append(error)
        server.should_exit = True

    app = guarded_app(model, name, options, limits, failed)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host}:{port}: {error}; choose --host and --port") from error
    handler = logging.StreamHandler()
    handler.setFormatter(streams.JsonLines())
    logger.handlers, logger.propagate = [handler], False
    config = uvicorn.Config(
        app,
        http=_Protocol,
        log_config=None,
        access_log=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=int(limits.timeout) + 1,
        server_header=False,
    )
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    streams.say(f"{name} at {address} ({address}/docs describes the requests)", "info")
    server = uvicorn.Server(config)
    # Uvicorn raises the signal again that it has stopped for.
    with contextlib.suppress(PreemptedError, KeyboardInterrupt):
        server.run(sockets=[listener])
    if errors:
        raise errors[0]
    logger.info("stopped")
