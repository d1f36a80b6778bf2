"""One server through what an operator does to it: probes, a killed engine, a drain that runs out of time."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import httpx
import psutil

LONG = {
    "model": "tiny-llava",
    "messages": [{"role": "user", "content": "Describe the picture."}],
    "max_tokens": 1500,
    "ignore_eos": True,
    "stream": True,
}


def until(what: Callable[[], bool], limit_s: float = 90.0) -> float:
    """Wait for `what`; seconds it took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < limit_s, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - began


class Stream(Thread):
    """A long answer being read; `lines` are its events so far."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.lines = url, list[str]()
        self.start()
        until(lambda: len(self.lines) > 2)

    def run(self) -> None:
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=LONG, timeout=60.0) as response:
            self.lines += [f"status {response.status_code}"]
            for line in response.iter_lines():
                self.lines += [line.removeprefix("data: ")] if line else []

    def error(self) -> str:
        """The code of the error that ended it, once it has ended in order."""
        self.join(30.0)
        assert not self.is_alive() and self.lines[-1] == "[DONE]", self.lines[-3:]
        code = json.loads(self.lines[-2])["error"]["code"]
        assert isinstance(code, str)
        return code


def test_probes_death_and_drain(tmp_path: Path) -> None:
    run(tmp_path, _walk)


def test_a_server_that_gives_up_says_why_and_exits_with_3(tmp_path: Path) -> None:
    run(tmp_path, _give_up)


def test_a_client_that_sends_nothing_more_leaves_no_traceback(tmp_path: Path) -> None:
    run(tmp_path, _stall)


def run(tmp_path: Path, walk: Callable[[subprocess.Popen[bytes], Path], None]) -> None:
    log = tmp_path / "log"
    argv = [str(Path(sys.executable).with_name("foveate")), "serve", "--port", "0", "--set", "server.drain_s=0.5"]
    argv += ["--set", "server.engine_deaths=2", "--set", "server.engine_hang_s=3"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "XDG_RUNTIME_DIR": str(tmp_path)}
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        walk(process, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert not list(tmp_path.glob("foveate-*")), "the socket directory was left behind"


def raw_reply(url: str, sent: bytes) -> bytes:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(4096), b""))


def ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for the ready line; the server's address."""
    ready_line = (
        r"foveate: tiny-llava ready on (http://127\.0\.0\.1:\d+) in [\d.]+ s \(\w+, weights in \w+, "
        r"cpu with \w+ kernels, \d+ blocks of 16 tokens\)"
    )
    until(lambda: re.search(ready_line, log.read_text()) is not None or process.poll() is not None)
    found = re.search(ready_line, log.read_text())
    assert found is not None, log.read_text()
    return found[1]


def _stall(process: subprocess.Popen[bytes], log: Path) -> None:
    """The request is cut off with the drain; the server ends on time and in order."""
    host, _, port = ready(process, log).removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15.0) == 0
    assert "Traceback" not in log.read_text(), log.read_text()


def _give_up(process: subprocess.Popen[bytes], log: Path) -> None:
    url = ready(process, log)
    stream = Stream(url)
    (engine,) = psutil.Process(process.pid).children()
    engine.suspend()  # it hangs
    assert stream.error() == "engine_restarted"
    assert "it hung: no event and no CPU time" in log.read_text() and not engine.is_running()
    until(lambda: httpx.get(f"{url}/health/ready", timeout=10.0).status_code == 200)
    (engine,) = psutil.Process(process.pid).children()
    engine.kill()
    until(lambda: "stays down" in log.read_text())
    told = httpx.get(f"{url}/health/ready")
    assert told.status_code == 503 and "died 2 times" in told.json()["reason"]
    assert httpx.get(f"{url}/health/live").status_code == 503
    assert httpx.post(f"{url}/v1/chat/completions", json=LONG).status_code == 503
    assert process.wait(20.0) == 3
    text = log.read_text()
    assert re.search(r"CRITICAL .* stays down: it died 2 times .* exit status 3", text) and "Traceback" not in text, (
        text
    )


def _walk(process: subprocess.Popen[bytes], log: Path) -> None:
    url = ready(process, log)
    assert httpx.get(f"{url}/health/ready").json() == {"status": "ready"}
    said = log.read_text()
    assert "loading weights: 100 %" in said and re.search(r"^  cache +256 MB: \d+ tokens", said, re.MULTILINE)
    broken = raw_reply(url, b"no HTTP\r\n\r\n")
    found = re.search(rb"\r\nx-request-id: ([0-9a-f]{32})\r\n", broken)
    assert broken.startswith(b"HTTP/1.1 400 ") and b'"code":"invalid_http"' in broken and found is not None
    assert f"400 id={found[1].decode()}" in log.read_text()

    stream = Stream(url)
    (engine,) = psutil.Process(process.pid).children()
    engine.kill()
    assert stream.error() == "engine_restarted"
    refused = httpx.get(f"{url}/health/ready")
    assert refused.status_code == 503 and "SIGKILL" in refused.json()["reason"]
    assert httpx.get(f"{url}/health/live").status_code == 200
    early = httpx.post(f"{url}/v1/chat/completions", json=LONG)
    line = f"503 POST /v1/chat/completions id={early.headers['x-request-id']} "
    until(lambda: line in log.read_text())  # written once the reply is sent
    assert early.status_code == 503 and int(early.headers["retry-after"]) > 0
    until(lambda: httpx.get(f"{url}/health/ready", timeout=10.0).status_code == 200)
    assert re.search(r"ready again after [\d.]+ s \(restart 1\)", log.read_text()), log.read_text()
    assert "foveate_engine_restarts_total 1.0" in httpx.get(f"{url}/metrics").text

    stream = Stream(url)
    process.send_signal(signal.SIGTERM)
    assert stream.error() == "aborted"
    assert process.wait(15.0) == 0
    assert "Traceback" not in log.read_text(), log.read_text()
