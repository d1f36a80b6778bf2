"""A body of any form costs a bounded multiple of its bytes, and other clients are served meanwhile.

Each row of `BODIES` once took gigabytes, or blocked every other client for seconds, or is a neighbour of such a body.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest

from foveate.server.launch import Launched, launched

MB = 1024 * 1024
BLOCKED_S = 0.05  # that another client may wait
MULTIPLE = 40  # bytes of memory for each byte of a body, up to CEILING
CEILING = 4 * 64 * MB + 64 * MB  # four times limits.body_mb, and what limits.body_values values take


def chat(content: bytes = b'"hi"', more: bytes = b"") -> bytes:
    return b'{"model":"tiny-llava","max_tokens":1,"messages":[{"role":"user","content":' + content + b"}]" + more + b"}"


def many(item: bytes, n_bytes: int) -> bytes:
    """A JSON array of one value many times."""
    return b"[" + item + (b"," + item) * (n_bytes // (len(item) + 1) - 1) + b"]"


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
IMAGE = b'[{"type":"image_url","image_url":{"url":"%s"}}]'
TEXT = b'{"type":"text","text":""}'
# What it is, route, body, status of the answer.
BODIES: list[tuple[str, str, Callable[[], bytes], int]] = [
    ("wrong parts", CHAT, lambda: chat(many(b"1", 4 * MB - 200)), 413),
    ("some wrong parts", CHAT, lambda: chat(many(b"1", 300_000)), 400),
    ("text parts", CHAT, lambda: chat(many(TEXT, 26 * MB)), 413),
    ("some text parts", CHAT, lambda: chat(many(TEXT, 900_000)), 400),
    ("as many text parts as may be", CHAT, lambda: chat(many(TEXT, 2048 * 26)), 200),
    (
        "messages without content",
        CHAT,
        lambda: chat(more=b',"x":' + many(b'{"role":"user","content":""}', 3 * MB)),
        413,
    ),
    ("wrong messages", CHAT, lambda: b'{"model":"tiny-llava","messages":' + many(b"{}", 290_000) + b"}", 400),
    ("stop strings", CHAT, lambda: chat(more=b',"stop":' + many(b'"ab"', 4 * MB - 200)), 413),
    ("some wrong stop strings", CHAT, lambda: chat(more=b',"stop":' + many(b"1", 300_000)), 400),
    ("biases", CHAT, lambda: chat(more=b',"logit_bias":{' + b'"x":1,' * 500_000 + b'"y":2}'), 413),
    (
        "some biases",
        CHAT,
        lambda: chat(more=b',"logit_bias":{%s}' % b",".join(b'"%d":1' % i for i in range(4000))),
        400,
    ),
    ("unknown names", CHAT, lambda: chat(more=b"".join(b',"%d":1' % i for i in range(90_000))), 400),
    ("unknown nested lists", CHAT, lambda: chat(more=b',"x":' + many(b"[[]]", 250_000)), 200),
    ("deep lists", CHAT, lambda: chat(b"[" * 2 * MB + b"]" * 2 * MB), 413),
    ("a long name", CHAT, lambda: chat(more=b',"' + b"n" * 3 * MB + b'":1'), 200),
    ("escapes", CHAT, lambda: chat(b'"' + b"\\u00e9" * (60 * MB // 6) + b'"'), 413),
    ("some escapes", CHAT, lambda: chat(b'"' + b"\\n" * (4 * MB // 2 - 200) + b'"'), 400),
    ("one wide character", CHAT, lambda: chat(b'"' + b"a" * (4 * MB - 200) + "😀".encode() + b'"'), 400),
    ("white space", CHAT, lambda: chat(more=b" " * 60 * MB), 413),
    ("some white space", CHAT, lambda: chat(more=b" " * (4 * MB - 200)), 200),
    ("digits", CHAT, lambda: chat(more=b',"seed":' + b"1" * 4_000_000), 400),
    ("digits of a fraction", CHAT, lambda: chat(more=b',"seed":0.' + b"1" * 4_000_000), 400),
    ("prompts", COMPLETION, lambda: b'{"model":"tiny-llava","prompt":' + many(b'"a"', 4 * MB - 200) + b"}", 413),
    ("token ids", COMPLETION, lambda: b'{"model":"tiny-llava","prompt":' + many(b"5", 40 * MB) + b"}", 413),
    ("some token ids", COMPLETION, lambda: b'{"model":"tiny-llava","prompt":' + many(b'"5"', 790_000) + b"}", 400),
    ("token ids to text", "/detokenize", lambda: b'{"tokens":' + many(b"5", 390_000) + b"}", 400),
    ("some token ids to text", "/detokenize", lambda: b'{"tokens":' + many(b"5", 190_000) + b"}", 200),
    ("a text to count", "/tokenize", lambda: b'{"prompt":"' + b"a " * (2 * MB - 100) + b'"}', 400),
    ("a picture", CHAT, lambda: chat(IMAGE % (b"data:image/png;base64," + b"A" * 8 * MB)), 400),
    ("an escaped picture", CHAT, lambda: chat(IMAGE % (b"data:image/png;base64," + b"\\/" * 12 * MB)), 400),
    ("a picture of escaped quotes", CHAT, lambda: chat(IMAGE % (b"data:" + b'\\"' * 31 * MB)), 400),
    ("many data URLs", CHAT, lambda: chat(many(b'"data:"', 60 * MB)), 413),
    ("a body too large", CHAT, lambda: chat(b'"' + b"a" * 65 * MB + b'"'), 413),
]


@dataclass
class Ticker:
    """Another client: asks again and again for a page that costs nothing, and remembers how long each took."""

    address: tuple[str, int]
    waits: list[float] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask from before the block until after the block."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            time.sleep(0.02)
            yield
            time.sleep(0.02)
        finally:
            self._done.set()
            thread.join()

    def _run(self) -> None:
        with socket.create_connection(self.address) as connection:
            while not self._done.wait(0.001):
                started = time.monotonic()
                connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: h\r\n\r\n")
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(4096)
                self.waits.append(time.monotonic() - started)


@pytest.fixture(scope="module")
def one() -> Iterator[Launched]:
    with launched("tiny-llava", environment={"PYTHONSAFEPATH": "1"}) as server:
        yield server


def address_of(server: Launched) -> tuple[str, int]:
    url = urlsplit(server.url)
    assert url.hostname and url.port
    return url.hostname, url.port


def post(address: tuple[str, int], path: str, body: bytes) -> int:
    """Send a body and return the status of the answer. No client library: it would copy the body."""
    head = f"POST {path} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode())
        connection.sendall(body)
        answer = b""
        while b"\r\n" not in answer:
            answer += connection.recv(65536)
    return int(answer.split()[1])


def peak_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def forget_peak(pid: int) -> int:
    """Make the peak the memory of now, and return it."""
    with open(f"/proc/{pid}/clear_refs", "w") as clear:
        clear.write("5")
    return peak_bytes(pid)


@pytest.mark.parametrize(("path", "make", "status"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
def test_a_costly_body(one: Launched, path: str, make: Callable[[], bytes], status: int) -> None:
    address, body = address_of(one), make()
    assert post(address, CHAT, chat()) == 200
    blocked = []
    # A machine with other work delays every client: by its share of the cores, and now and then by more.
    share = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    for _ in range(5):
        before = forget_peak(one.pid)
        idle, busy = Ticker(address), Ticker(address)
        with idle.asking():
            time.sleep(0.2)
        with busy.asking():
            assert post(address, path, body) == status
        spent = peak_bytes(one.pid) - before
        assert spent < 1 * MB + min(MULTIPLE * len(body), CEILING), f"{spent / MB:.0f} MB of memory"
        blocked.append(max(busy.waits) - max(idle.waits))
        if blocked[-1] < BLOCKED_S * share:
            return
    raise AssertionError(f"another client waited {min(blocked) * 1000:.0f} ms")


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
GET = b"GET /health/live HTTP/1.1\r\nhost: h\r\n"
# What it is, what a connection begins with, and what it repeats without end.
ENDLESS: list[tuple[str, bytes, bytes]] = [
    ("an address", b"GET /", b"a" * 4096),
    ("headers", GET, b"x-h: 1\r\n" * 400),
    ("one header", GET + b"x-h: ", b"a" * 4096),
    ("the name of a header", GET, b"a" * 4096),
    ("headers behind a body", CHUNKED + b"2\r\n{}\r\n0\r\n", b"x-t: 1\r\n" * 400),
    ("one header behind a body", CHUNKED + b"2\r\n{}\r\n0\r\nx-t: ", b"a" * 4096),
    ("headers behind a refused body", CHUNKED.replace(b"json", b"text") + b"2\r\n{}\r\n0\r\n", b"x-t: 1\r\n" * 400),
    ("chunks of one byte", CHUNKED, b"1\r\n{\r\n" * 400),
    ("the length of a chunk", CHUNKED + b"2;x=", b"a" * 4096),
    ("requests before their answers", b"", (HEAD + b"content-length: 2\r\n\r\n{}") * 400),
    ("a body of spaces", CHUNKED, b"1000\r\n" + b" " * 4096 + b"\r\n"),
]


@pytest.mark.parametrize(("start", "again"), [row[1:] for row in ENDLESS], ids=[row[0] for row in ENDLESS])
def test_a_connection_without_end_is_ended(one: Launched, start: bytes, again: bytes) -> None:
    before = forget_peak(one.pid)
    sent = len(start)
    with socket.create_connection(address_of(one)) as connection:
        connection.settimeout(10.0)
        connection.sendall(start)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while sent < 400 * MB:
                connection.sendall(again)
                sent += len(again)
    most = 16 * MB if again[:4] != b"1000" else 400 * MB
    assert sent < most, "kernel buffers hold some megabytes that the server never reads"
    assert peak_bytes(one.pid) - before < CEILING


def test_a_broken_chunk_is_answered(one: Launched) -> None:
    with socket.create_connection(address_of(one)) as connection:
        connection.sendall(CHUNKED + b"zz\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_a_compressed_body_is_refused(one: Launched) -> None:
    with socket.create_connection(address_of(one)) as connection:
        connection.sendall(HEAD + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b..")
        assert connection.recv(65536).startswith(b"HTTP/1.1 415 ")


def test_a_slow_body_holds_nobody_up(one: Launched) -> None:
    body = chat(many(TEXT, 4000))
    with socket.create_connection(address_of(one)) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body))
        for at in range(0, len(body), 200):
            connection.sendall(body[at : at + 200])
            assert post(address_of(one), CHAT, chat()) == 200
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
