"""HTTP below the API: bounded strict JSON bodies, server-sent events, disconnects, keys, and one count per request."""

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any, Protocol

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveate.server.errors import CLIENT_GONE, ApiError, from_validation
from foveate.server.metrics import Metrics, Outcome

log = logging.getLogger("foveate.server")

DONE = b"data: [DONE]\n\n"
_PARSE_IN_THREAD = 1024 * 1024
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Track:
    """Counts one request: once received, once finished, whatever happens between."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._metrics = metrics
        self._started = time.monotonic()
        self._finished = False
        self._last: dict[int, float] = {}  # when each choice had its last token
        metrics.received(route)

    def tokens(self, choice: int, n_tokens: int) -> None:
        """`choice` got tokens just now."""
        now = time.monotonic()
        if not self._last:
            self._metrics.first_token(now - self._started)
        elif choice in self._last and n_tokens:
            gap = (now - self._last[choice]) / n_tokens
            for _ in range(n_tokens):
                self._metrics.token_gap(gap)
        self._last[choice] = now

    def finish(self, outcome: Outcome, code: str) -> None:
        """Only the first call counts."""
        if not self._finished:
            self._finished = True
            self._metrics.finished(outcome, code)
            self._metrics.latency(time.monotonic() - self._started)


class EventStream(Response):
    """A stream of server-sent events that ends as soon as the client goes.

    An error becomes an event of its own; [DONE] comes last in every case.

    Args:
        events: encoded events. They mark `track` a success themselves.
        close: called in every case, even if the client went before the first event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        track: Track,
        close: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(None, 200, {**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._track = track
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            await _cancel(sender, watcher)
            await self._events.aclose()
            await self._close()
            self._track.finish("aborted", "client_disconnected")

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while (event := await self._next()) is not None:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _next(self) -> bytes | None:
        """The next event, an error among them; None after the last."""
        try:
            return await anext(self._events, None)
        except ApiError as error:
            failure = error
        except Exception:  # the status is sent already, so the general handler comes too late
            log.exception("a stream failed")
            failure = ApiError("internal error of the server; the cause is in its log", None, "internal_error", 500)
        self._track.finish("error", failure.code)
        return b"data: " + failure.body + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response | None:
    """Run `work`; cancel it and return None if the client goes. The request's body must have been read."""
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        await _cancel(worker, watcher)


class ApiRequest(Request):
    """Reads a body within `limit_mb`, and JSON strictly."""

    def __init__(self, request: Request, limit_mb: int) -> None:
        super().__init__(request.scope, request.receive)
        self._limit_mb = limit_mb
        self._whole: bytes | None = None
        self._parsed: object = None

    async def body(self) -> bytes:
        """Raises ApiError 413 as soon as the body is known to be too large."""
        if self._whole is None:
            declared = self.headers.get("content-length", "0")
            limit = self._limit_mb * 1024 * 1024
            too_large = ApiError(f"the body is larger than limits.body_mb {self._limit_mb}", None, "too_large", 413)
            if declared.isdecimal() and int(declared[:20]) > limit:
                raise too_large
            body = bytearray()
            async for chunk in self.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
            self._whole = bytes(body)
        return self._whole

    async def load(self) -> None:
        """Read and parse the body ahead of FastAPI, which would hide what is wrong with it."""
        body = await self.body()
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError("send the body with Content-Type: application/json", None, "unsupported_media_type", 415)
        self._parsed = await asyncio.to_thread(parse, body) if len(body) > _PARSE_IN_THREAD else parse(body)

    async def json(self) -> object:
        return self._parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ApiError("the body is no unambiguous JSON: a key stands twice in one object", None, "invalid_json")
    return found


def parse(body: bytes) -> object:
    """JSON as the standard has it.

    Raises:
        ApiError: it is broken, nested too deeply, holds NaN, lone surrogates or the same key twice.
    """
    try:
        orjson.loads(body)  # strict about all but keys that stand twice
        return json.loads(body, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ApiError("the body is not valid JSON", None, "invalid_json") from None


class ApiRoute(APIRoute):
    """A route that reads bodies strictly, stops when the client goes, and counts itself if it generates."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            if request.method != "POST":
                return await handle(request)
            settings: RouteSettings = request.app.state.routes
            track = Track(settings.metrics, self.path) if self.path in settings.generating else None
            with _counted(track):
                bounded = ApiRequest(request, settings.body_mb)
                await bounded.load()
                bounded.state.track = track
                response = await while_connected(request.receive, handle(bounded))
                if response is None:
                    response = Response(status_code=CLIENT_GONE)
                    if track is not None:
                        track.finish("aborted", "client_disconnected")
                return response

        return guarded


class RouteSettings(Protocol):
    """What `ApiRoute` finds in `app.state.routes`."""

    @property
    def metrics(self) -> Metrics: ...
    @property
    def body_mb(self) -> int: ...
    @property
    def generating(self) -> frozenset[str]: ...


@contextlib.contextmanager
def _counted(track: Track | None) -> Iterator[None]:
    try:
        yield
    except (asyncio.CancelledError, ClientDisconnect) as error:
        if track is not None:
            track.finish("aborted", "client_disconnected" if isinstance(error, ClientDisconnect) else "cancelled")
        raise
    except Exception as error:
        if track is not None:
            track.finish("error", _code(error))
        raise


def _code(error: Exception) -> str:
    match error:
        case ApiError():
            return error.code
        case RequestValidationError():
            return from_validation(error).code
        case HTTPException():
            return "http_error"
    return "internal_error"


class Gate:
    """ASGI middleware: every path but /health/ needs a key when there are keys; X-Request-Id goes back as it came."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        answer = _with_request_id(send, headers.get("x-request-id", ""))
        if self._keys and not scope["path"].startswith("/health/") and not self._knows(bearer(headers)):
            response = ApiError("missing or wrong API key", None, "invalid_api_key", 401).response()
            response.headers["www-authenticate"] = "Bearer"
            return await response(scope, receive, answer)
        return await self._app(scope, receive, answer)

    def _knows(self, key: bytes) -> bool:
        # Every key is compared, and each in constant time: how long it takes says nothing.
        return sum(hmac.compare_digest(key, known) for known in self._keys) > 0


def bearer(headers: Headers) -> bytes:
    """The key of an Authorization header; empty without one."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode() if scheme.lower() == "bearer" else b""


def _with_request_id(send: Send, request_id: str) -> Callable[[Message], Awaitable[None]]:
    if not _REQUEST_ID.fullmatch(request_id):
        return send

    async def tagged(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["x-request-id"] = request_id
        await send(message)

    return tagged
