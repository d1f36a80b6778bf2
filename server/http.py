"""Our uvicorn server: own signal handling, a limit on header bytes, only errors in uvicorn's log."""

import contextlib
import logging
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


class BoundedHeaders(HttpToolsProtocol):
    """Limits the header bytes of a request. httptools has no limit; uvicorn's limit applies only to h11."""

    _n_header_bytes = 0
    _in_headers = True

    def data_received(self, data: bytes) -> None:
        self._n_header_bytes += len(data)
        super().data_received(data)  # resets the count where a head or a message ends
        if self._in_headers and self._n_header_bytes > HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's headers exceed {HEADER_BYTES} bytes.")

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, before there is a request: with an id and a line in the log as every refusal."""
        error, request_id = ApiError(msg, None, "invalid_http"), uuid.uuid4().hex
        client = self.client or ("-", 0)
        requests.info("400 id=%s client=%s code=%s error=%r", request_id, client[0], error.code, msg)
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"x-request-id: {request_id}\r\ncontent-length: {len(error.body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + error.body)
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._in_headers, self._n_header_bytes = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_headers, self._n_header_bytes = True, 0
        super().on_message_complete()


class HttpServer(uvicorn.Server):
    """Leaves signals to serve.py. uvicorn would raise the signals again after the drain, before the engine stops."""

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
        http=BoundedHeaders,
        ws="none",
        log_config=None,
        access_log=False,  # RequestLog writes a line without the query of the URL
        server_header=False,
    )
    return HttpServer(settings)
