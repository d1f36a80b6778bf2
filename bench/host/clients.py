"""Cheap streaming clients for bench.host: plain sockets on one thread; events are counted, not parsed."""

import json
import selectors
import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

_WARM_EVENTS = 16  # of each stream, before the window opens
_SHARE = 0.75  # of the events a stream may have, where it closes; tokens without text have none
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Window:
    """The requests of all clients."""

    url: str
    model: str
    n_clients: int
    n_tokens: int
    temperature: float
    top_p: float


def _open(work: Window, number: int) -> socket.socket:
    address = urlsplit(work.url)
    body = json.dumps(
        {
            "model": work.model,
            "messages": [{"role": "user", "content": f"What is number {number} here?"}],
            "max_tokens": work.n_tokens,
            "temperature": work.temperature,
            "top_p": work.top_p,
            "seed": number,
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    connection = socket.create_connection((address.hostname or "", address.port or 80), timeout=_TIMEOUT_S)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def stream_all(work: Window, parent: Connection) -> None:
    """Stream all answers and send the number of events so far to `parent` three times.

    The first time is when all streams run, the second before the first stream ends, and the third at the end.

    Raises:
        RuntimeError: a stream ended before the second time.
    """
    counts: dict[socket.socket, int] = {}
    with selectors.DefaultSelector() as selector:
        for number in range(work.n_clients):
            connection = _open(work, number)
            counts[connection] = 0
            selector.register(connection, selectors.EVENT_READ)
        marks = [
            lambda: min(counts.values()) >= _WARM_EVENTS,
            lambda: max(counts.values()) >= _SHARE * work.n_tokens,
        ]
        while selector.get_map():
            for key, _ in selector.select(_TIMEOUT_S):
                assert isinstance(key.fileobj, socket.socket), "only sockets are registered"
                data = key.fileobj.recv(65536)
                counts[key.fileobj] += data.count(b"data: {")
                if not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
            if not selector.get_map() and marks:
                raise RuntimeError(f"the streams ended early, after {sorted(counts.values())} events")
            while marks and marks[0]():
                parent.send(sum(counts.values()))
                marks.pop(0)
    parent.send(sum(counts.values()))
