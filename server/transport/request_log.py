"""Give each request an id, and write one line about each request. No line holds content, keys or the query of a URL."""

import logging
import re
import time
import uuid
from collections.abc import Iterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveate.server.common.errors import ApiError
from foveate.server.common.track import Track
from foveate.server.transport.errors import CLIENT_GONE
from foveate.server.transport.gate import OPEN_PATHS

log = logging.getLogger("foveate.request")

MAX_TEXT = 200  # characters of a path or an error message in the log
_SOUND_ID = re.compile(r"[\x21-\x7e]{1,128}")
_QUIET_PATHS = OPEN_PATHS | {"/metrics"}  # probes come every second
_URL_DETAILS = re.compile(r"(data:)[^\s,;]*[;,]\S*|([a-z]+://)\S*@|\?\S*=\S*", re.IGNORECASE)


class RequestLog:
    """ASGI middleware, the outermost one: sets X-Request-Id on every reply and logs the request at its end.

    The id is the client's X-Request-Id if that is 1 to 128 printable ASCII characters, else a new one. It is in
    `scope["state"]["request_id"]`. Below, `state["error"]` holds the refusal and `state["track"]` the counts.

    Args:
        lines: whether to log one line per request (`server.log_requests`).
    """

    def __init__(self, app: ASGIApp, lines: bool) -> None:
        self._app = app
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SOUND_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        began, status = time.monotonic(), CLIENT_GONE

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except Exception:
            if status != 500:  # else the error's handler has answered and logged the cause
                raise
        finally:
            if self._lines:
                self._write(scope, status, time.monotonic() - began)

    def _write(self, scope: Scope, status: int, seconds: float) -> None:
        track: Track | None = scope["state"].get("track")
        error: ApiError | None = scope["state"].get("error")
        if error is None and track is not None:
            error = track.error
        if track is not None and track.outcome == "aborted":
            status = CLIENT_GONE
        client = scope.get("client") or ("-", 0)
        words = [
            f"{status} {scope['method']} {one_line(scope['path'])}",
            f"id={scope['state']['request_id']}",
            f"client={one_line(client[0])}",  # a trusted proxy may state any text
            *(() if track is None else _figures(track)),
            f"total={_milliseconds(seconds)}",
        ]
        if error is not None:
            words.append(f"code={error.code} error={one_line(error.message)!r}")
        elif track is not None and track.outcome != "success":
            words.append(f"code={track.code}")
        quiet = scope["path"] in _QUIET_PATHS or scope["method"] == "OPTIONS"
        log.log(logging.DEBUG if quiet else logging.INFO, "%s", " ".join(words))


def one_line(text: str) -> str:
    """Return a client's text for a log: printable, bounded, without the data of a data URL and the query of a URL."""
    short = _URL_DETAILS.sub(lambda found: f"{found[1] or found[2] or '?'}...", text[: 4 * MAX_TEXT])
    return "".join(char if char.isprintable() else "?" for char in short[:MAX_TEXT])


def _figures(track: Track) -> Iterator[str]:
    """Yield what is known of a request that generates: tokens, pictures, budget, times in milliseconds."""
    if track.reply_id:
        yield f"reply={track.reply_id}"
    usage = track.usage
    if usage is not None:
        yield f"finish={track.code}"
        yield f"prompt={usage.prompt_tokens} cached={usage.prompt_tokens_details.cached_tokens}"
    elif track.prompt_tokens:
        yield f"prompt={track.prompt_tokens}"
    if track.first_token_s is not None:
        yield f"output={track.n_tokens if usage is None else usage.completion_tokens}"
    if usage is not None and usage.vlm.visual.per_image:
        visual = usage.vlm.visual
        yield f"pictures={len(visual.per_image)} visual={visual.kept}/{visual.offered}"
    if track.n_pictures:
        yield f"budget={one_line(track.resolved)!r}"
    if usage is not None:
        yield f"queue={usage.vlm.time_ms.queue:.0f}ms"
    if track.first_token_s is not None:
        yield f"ttft={_milliseconds(track.first_token_s)}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f}ms"
