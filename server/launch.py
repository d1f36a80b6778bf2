"""Start `foveate serve` as a process and wait until the server is ready, for demo, benchmarks, tests and notebooks.

with launched("tiny-llava", "--set", "cache.memory_mb=64") as server:
    OpenAI(base_url=f"{server.url}/v1", api_key="none")
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_S = 120.0
STOP_S = 15.0
_LOG_CHARS = 4000
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach the local server


class LaunchError(RuntimeError):
    """The server failed to start or to stop. The message ends with the end of the server's log."""


@dataclass(frozen=True)
class Launched:
    """A ready server."""

    url: str  # without /v1
    pid: int
    ready_s: float  # seconds from the start of the process until ready
    log: Path  # the server's output; deleted with the server

    def written(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def launched(model: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Launched]:
    """Yield a server of `model` on a free local port. At the end, stop the server with SIGTERM.

    Args:
        arguments: arguments of `foveate serve` after the model.
        environment: environment variables to add to this process's environment.

    Raises:
        LaunchError: the server ended early, was not ready in time, or did not stop cleanly.
    """
    port = _free_port()
    script = Path(sys.executable).with_name("foveate")
    command = [str(script), "serve", model, "--port", str(port), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        started = time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
            )
        server = Launched(f"http://127.0.0.1:{port}", process.pid, 0.0, log)
        try:
            _wait_ready(server, process)
            yield Launched(server.url, process.pid, time.monotonic() - started, log)
            process.terminate()
            if process.wait(STOP_S) != 0:
                raise LaunchError(f"SIGTERM ended the server with status {process.returncode}:\n{_tail(server)}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_ready(server: Launched, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_S
    while not _is_ready(server.url):
        if process.poll() is not None:
            raise LaunchError(f"the server ended with status {process.returncode}:\n{_tail(server)}")
        if time.monotonic() > deadline:
            raise LaunchError(f"the server was not ready after {READY_S:.0f} s:\n{_tail(server)}")
        time.sleep(0.05)


def _is_ready(url: str) -> bool:
    try:
        with _DIRECT.open(f"{url}/health/ready", timeout=5.0):
            return True
    except OSError:  # not listening yet, or (subclass HTTPError) the model is still loading
        return False


def _tail(server: Launched) -> str:
    return server.written()[-_LOG_CHARS:]
