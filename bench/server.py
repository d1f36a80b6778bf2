"""A server to measure: a fresh one, or a running one. Also the memory of its processes."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from foveate.server.launch import launched


@dataclass
class MemoryWatch:
    """Sampled peak resident bytes of a process and its children. Shared pages count once per process."""

    pid: int
    interval_s: float = 0.05
    peak_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def reset(self) -> None:
        self.peak_bytes = 0

    def run(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.peak_bytes = max(self.peak_bytes, self._resident())

    def _resident(self) -> int:
        total = 0
        try:
            root = psutil.Process(self.pid)
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        for process in family:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue  # it ended between the listing and the reading
        return total

    def stop(self) -> None:
        self._stop.set()


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str  # without /v1
    model: str  # its name in /v1/models
    ready_s: float  # from the start of the process until ready; 0 for one that was running
    memory: MemoryWatch | None  # None for one we did not start


def _model_name(url: str) -> str:
    answer = httpx.get(f"{url}/v1/models", timeout=10.0, trust_env=False)
    answer.raise_for_status()
    name: str = answer.json()["data"][0]["id"]
    return name


@contextmanager
def serving(
    model: str, settings: Sequence[str] = (), url: str | None = None, reducers: Path | None = None
) -> Iterator[Server]:
    """Yield a server of `model`: a fresh one on a free port, or the one at `url` if given.

    Args:
        settings: "a.b=c" each, passed on as --set.
        reducers: a folder of further reducers for a fresh server.

    Raises:
        LaunchError: the server ended or was not ready in time.
    """
    if url is not None:
        yield Server(url.rstrip("/"), _model_name(url.rstrip("/")), 0.0, None)
        return
    arguments = [word for setting in settings for word in ("--set", setting)]
    environment = {"FOVEATE_REDUCERS": str(reducers)} if reducers else {}
    with launched(model, *arguments, environment=environment) as started:
        watch = MemoryWatch(started.pid)
        thread = threading.Thread(target=watch.run)
        thread.start()
        try:
            yield Server(started.url, _model_name(started.url), started.ready_s, watch)
        finally:
            watch.stop()
            thread.join()
