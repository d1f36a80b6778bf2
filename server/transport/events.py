"""Responses as streams of server-sent events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from fastapi import Response
from starlette.types import Receive, Scope, Send

from foveate.server.common.errors import ApiError
from foveate.server.common.track import Track
from foveate.server.transport.connection import cancel, gone

log = logging.getLogger("foveate.server")

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A stream of server-sent events that ends as soon as the client disconnects.

    An error becomes a separate event. [DONE] is always the last event.

    Args:
        events: encoded events. The iterator itself marks `track` as a success.
        close: always called, even if the client disconnects before the first event.
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
        watcher = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            await cancel(sender, watcher)
            await self._events.aclose()
            await self._close()
            self._track.finish("aborted", "client_disconnected")

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while (event := await self._next()) is not None:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _next(self) -> bytes | None:
        """Return the next event, which may be an error event. None after the last event."""
        try:
            return await anext(self._events, None)
        except ApiError as error:
            failure = error
        except Exception:  # the status has been sent, so the general handler cannot answer
            log.exception("a stream failed")
            failure = ApiError("internal error of the server; the cause is in its log", None, "internal_error", 500)
        self._track.finish("error", failure.code)
        self._track.error = failure
        return b"data: " + failure.body + b"\n\n"
