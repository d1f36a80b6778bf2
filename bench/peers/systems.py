"""The compared systems. Each is a process: started once, asked in turn, and stopped by a signal while others run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

from bench.peers.work import Ask, Batch, Timing, over_http, png
from bench.random_model.text import rendered
from foveate.server.launch import launched

_READY_S = 900.0  # vLLM compiles at its first start
_WORKER = Path(__file__).with_name("worker.py")


class Unavailable(RuntimeError):
    """The system cannot run here; the message says why."""


class System(ABC):
    """One program under test. As a context manager it runs inside the block."""

    def __init__(self) -> None:
        self.pid = 0

    @abstractmethod
    def start(self) -> None:
        """Load the system and wait until it answers.

        Raises:
            Unavailable: the system does not run here.
        """

    @abstractmethod
    def stop(self) -> None:
        """End the process if it runs."""

    @abstractmethod
    def ask(self, asks: Sequence[Ask], n_tokens: int) -> Batch:
        """Send all requests at once and wait."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self.pid:
            self.thaw()  # a stopped process would not hear that it is to end
        self.stop()

    def freeze(self) -> None:
        """Stop the processes: idle threads that spin would slow the system that is measured."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def peak_bytes(self) -> int:
        """Sum of the peak resident sizes of the processes: at most a little above the true peak of the sum."""
        return sum(_high_water(process.pid) for process in self._family())

    def _family(self) -> list[psutil.Process]:
        root = psutil.Process(self.pid)
        return [root, *root.children(recursive=True)]

    def _signal(self, number: signal.Signals) -> None:
        try:
            family = self._family()
        except psutil.NoSuchProcess:
            return  # its next answer says so
        for process in family if number == signal.SIGSTOP else reversed(family):
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue  # it ended between the listing and the signal


def _high_water(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # it ended between the listing and the reading
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


class Foveate(System):
    """Our server, through `foveate serve`."""

    def __init__(self, model: Path, settings: Sequence[str]) -> None:
        super().__init__()
        self._model, self._settings = model, settings
        self._open = ExitStack()
        self._url = ""

    def start(self) -> None:
        arguments = [word for setting in self._settings for word in ("--set", setting)]
        started = self._open.enter_context(launched(str(self._model), *arguments))
        self.pid, self._url = started.pid, started.url

    def stop(self) -> None:
        self._open.close()

    def ask(self, asks: Sequence[Ask], n_tokens: int) -> Batch:
        return over_http(self._url, self._model.name, asks, n_tokens)


class Process(System):
    """A program in a session of its own, with a log file."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        super().__init__()
        self._command, self._log = list(command), log
        self._environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", **environment}
        self._process: subprocess.Popen[str] | None = None

    def _launch(self) -> subprocess.Popen[str]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            piped = self._stdout(log.fileno())
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=piped,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                text=True,
            )
        self.pid = self._process.pid
        return self._process

    def _stdout(self, log: int) -> int:
        return log

    def _failed(self, what: str) -> Unavailable:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        wrong = [line for line in lines if "Error" in line] or lines
        return Unavailable(f"{what}: {wrong[-1][-300:].strip() if wrong else 'nothing written'} ({self._log.name})")

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        family = self._family()
        self._process.terminate()
        psutil.wait_procs(family, timeout=20.0)
        for process in family:
            if process.is_running():
                process.kill()
        self._process.wait()


class Vllm(Process):
    """vLLM's OpenAI server. The command line looks for a distribution named `vllm`, so this class runs the module."""

    def __init__(self, python: Path, model: Path, dtype: str, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(python), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", model.name, "--port", str(port), "--dtype", dtype]
        command += ["--max-model-len", "4096", "--max-num-seqs", "8", "--skip-mm-profiling"]
        command += ["--kv-cache-memory-bytes", str(2**30)]  # else a share of the machine's memory
        # One of two cores is set aside for the server unless told otherwise.
        super().__init__(command, log, {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"})
        self._url, self._name = f"http://127.0.0.1:{port}", model.name

    def start(self) -> None:
        process = self._launch()
        deadline = time.monotonic() + _READY_S
        while not self._ready():
            if process.poll() is not None:
                raise self._failed(f"vLLM ended with status {process.returncode}")
            if time.monotonic() > deadline:
                self.stop()
                raise self._failed(f"vLLM was not ready after {_READY_S:.0f} s")
            time.sleep(0.5)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self._url}/health", timeout=5.0, trust_env=False).status_code == 200
        except httpx.TransportError:  # not listening yet
            return False

    def ask(self, asks: Sequence[Ask], n_tokens: int) -> Batch:
        return over_http(self._url, self._name, asks, n_tokens)


class Worker(Process):
    """A library behind `worker.py`. `option` is the option of the worker."""

    def __init__(self, kind: str, python: Path, directory: Path, option: str, family: str, work: Path) -> None:
        command = [str(python), "-P", str(_WORKER), kind, str(directory), option]
        super().__init__(command, work / f"{kind}-{directory.name}-{option}.log", {})
        self._kind, self._family_name, self._work = kind, family, work
        self.option = option

    def _stdout(self, log: int) -> int:
        return subprocess.PIPE

    def start(self) -> None:
        self._launch()
        reply = self._read()
        self.option = str(reply["ready"])

    def _read(self) -> dict[str, object]:
        assert self._process is not None and self._process.stdout is not None, "started with a pipe"
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise self._failed(f"{self._kind} ended with status {status}")
        reply: dict[str, object] = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"{self._kind}: {reply['error']}")
        return reply

    def ask(self, asks: Sequence[Ask], n_tokens: int) -> Batch:
        assert self._process is not None and self._process.stdin is not None, "started with a pipe"
        request = {
            "prompts": [rendered(self._family_name, ask.text, ask.picture) for ask in asks],
            "pictures": [self._picture(ask) for ask in asks],
            "n_tokens": n_tokens,
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        reply = self._read()
        answers, wall_s = reply["answers"], reply["wall_s"]
        assert isinstance(answers, list) and isinstance(wall_s, float), "as worker.py writes it"
        timings = tuple(Timing(**answer) for answer in answers)
        if any(timing.output_tokens != n_tokens for timing in timings):
            raise RuntimeError(f"{self._kind}: {n_tokens} tokens were asked for, {timings} came")
        return Batch(timings, wall_s)

    def _picture(self, ask: Ask) -> str | None:
        if not ask.picture:
            return None
        file = self._work / "picture" / f"{ask.seed}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png(ask.seed))
        return str(file)


def own_python() -> Path:
    """The running interpreter, which has `transformers` among the development packages."""
    return Path(sys.executable)
