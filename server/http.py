"""Our uvicorn server: own signal handling, limits on what is no body, only errors in uvicorn's log."""

import asyncio
import contextlib
import gc
import logging
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from foveate.configs.config import Config
from foveate.server.app import create_app
from foveate.server.common.errors import ApiError
from foveate.server.common.metrics import Metrics
from foveate.server.engine_client import EngineClient
from foveate.server.transport.request_log import log as requests

HEADER_BYTES = 64 * 1024
MAX_PIPELINED = 32  # requests of one connection that wait for the answer to an earlier one
SWITCH_S = 0.001
LEAVE_S = 1.0  # time for requests of ended connections to notice
MAX_UNREAD_BYTES = 256 * 1024 * 1024  # a refused client may send its whole body before it reads the answer


class _Refused(Exception):
    """Ends the parsing of a connection: httptools passes the error on as an error of the parser."""


class BoundedProtocol(HttpToolsProtocol):
    """Limits what a connection sends beside the bodies that the application reads.

    httptools has no limits, and uvicorn's limit applies only to h11. The headers of a request are limited, and so are
    the lines around the chunks of a body, the headers behind the last chunk, a body that goes on after its answer, and
    requests that come before earlier ones are answered.
    """

    _in_head = True
    _n_head_bytes = 0  # address and whole headers of the current request
    _n_other_bytes = 0  # bytes without whole headers or a body in them
    _n_unread_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._n_other_bytes += len(data)
        super().data_received(data)
        if self._n_other_bytes > HEADER_BYTES:
            self._refuse()

    def on_message_begin(self) -> None:
        self._in_head, self._n_head_bytes = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP: with an id and a line in the log, if an answer can still be sent."""
        answerable = self._in_head or not self.cycle.response_started
        if answerable and not self.transport.is_closing():
            self._answer_400(self._why() or msg)
        self.transport.close()

    def _answer_400(self, msg: str) -> None:
        error, request_id = ApiError(msg, None, "invalid_http"), uuid.uuid4().hex
        client = self.client or ("-", 0)
        requests.info("400 id=%s client=%s code=%s error=%r", request_id, client[0], error.code, msg)
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"x-request-id: {request_id}\r\ncontent-length: {len(error.body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + error.body)

    def on_headers_complete(self) -> None:
        self._in_head, self._n_other_bytes = False, 0
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise _Refused

    def on_body(self, body: bytes) -> None:
        # A chunk pays for its lines with its own bytes; a client that sends chunks of one byte runs out of credit.
        self._n_other_bytes = max(0, self._n_other_bytes - 2 * len(body))
        if self.cycle.response_complete:
            self._n_unread_bytes += len(body)
            if self._n_unread_bytes > MAX_UNREAD_BYTES:
                raise _Refused
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._n_head_bytes, self._n_other_bytes = True, 0, 0
        super().on_message_complete()

    def _count_head(self, n_bytes: int) -> None:
        self._n_head_bytes += n_bytes
        if self._n_head_bytes > HEADER_BYTES:
            raise _Refused

    def _why(self) -> str:
        too_long = max(self._n_head_bytes, self._n_other_bytes) > HEADER_BYTES
        what = "headers exceed" if self._in_head else "chunk lines and trailers exceed"
        return f"The request's {what} {HEADER_BYTES} bytes." if too_long else ""

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self.send_400_response("")


class HttpServer(uvicorn.Server):
    """Leaves signals to serve.py. uvicorn would raise the signals again after the drain, before the engine stops."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """After `force_exit` too, end the connections that are left and the application in order.

        uvicorn leaves them to the end of the loop, which cancels them, and each logs a traceback.
        """
        await super().shutdown(sockets)
        if self.force_exit:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            if tasks := self.server_state.tasks:
                await asyncio.wait(tasks, timeout=LEAVE_S)
            await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(config: Config, client: EngineClient, model_dir: Path) -> HttpServer:
    metrics = Metrics(config.model.name)
    debug = config.server.log_level == "debug"
    logging.getLogger("uvicorn.error").setLevel(logging.DEBUG if debug else logging.WARNING)
    settings = uvicorn.Config(
        create_app(config, client, metrics, model_dir),
        loop="none",
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        access_log=False,  # RequestLog writes a line without the query of the URL
        server_header=False,
    )
    # What is loaded by now stays to the end. Walking it takes 50 ms, and a body of many values would start the walk.
    gc.collect()
    gc.freeze()
    # Each time the event loop asks for the global lock, a worker thread keeps the lock for this long (5 ms by default).
    sys.setswitchinterval(SWITCH_S)
    return HttpServer(settings)
