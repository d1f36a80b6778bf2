"""One run of the engine process: sockets, stdin, stderr and exit.

Every run has a new process and a new directory. So a message for a dead process never reaches the next process.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from foveate.configs.config import Config
from foveate.engine.common import Shutdown, ToEngine
from foveate.server.report import PROGRESS, LoadProgress

WRONG_SETTING = 2  # exit status: a setting or the checkpoint is wrong; a restart would not help
_SOCKET_PATH_LIMIT = 100  # bytes; the kernel's limit is 107
_ENCODER = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class Death:
    """The end of a process."""

    reason: str  # one line
    final: bool  # a restart would end in the same way


class EngineProcess:
    """A running engine. `spawn` creates it. Call `stop` once, even after the process died."""

    def __init__(self, process: Process, directory: Path, context: zmq.asyncio.Context) -> None:
        self.pid = process.pid
        self._process = process
        self._directory = directory
        self._context = context
        self._push = context.socket(zmq.PUSH)
        self._pull = context.socket(zmq.PULL)
        for socket, name in ((self._push, "to_engine"), (self._pull, "from_engine")):
            socket.set_hwm(0)  # a slow peer blocks neither side; the requests in flight bound the queues
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"ipc://{directory}/{name}")
        self._outbox: asyncio.Queue[ToEngine] = asyncio.Queue()
        self._error_line = ""
        self._tasks = [asyncio.create_task(self._send_all()), asyncio.create_task(self._read_stderr())]

    @classmethod
    async def spawn(cls, config: Config, command: Sequence[str]) -> "EngineProcess":
        """Start `command DIRECTORY` with the configuration on stdin.

        The process gets its own session. Otherwise Ctrl-C in a terminal would end the engine while the server drains.

        Raises:
            OSError: the command cannot be started.
        """
        directory = _private_directory()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                str(directory),
                stdin=PIPE,
                stdout=DEVNULL,
                stderr=PIPE,
                env={"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONSAFEPATH": "1"},  # see design.md, section 5
                start_new_session=True,
            )
        except OSError:
            shutil.rmtree(directory)
            raise
        engine = cls(process, directory, zmq.asyncio.Context())
        assert process.stdin is not None, "stdin is a pipe"
        process.stdin.write(_ENCODER.encode(config))
        process.stdin.close()
        return engine

    def send(self, message: ToEngine) -> None:
        """Queue a message; messages keep their order. Never blocks, so a cancelled task can still abort its request."""
        self._outbox.put_nowait(message)

    async def receive(self) -> bytes:
        """Wait for the next list of events, encoded."""
        frame = await self._pull.recv()
        assert isinstance(frame, bytes), "received with copy=True"
        return frame

    async def wait(self) -> Death:
        """Wait until the process ends."""
        status = await self._process.wait()
        # The whole stderr has been read, unless a child of the process still holds the pipe.
        await asyncio.wait([self._tasks[1]], timeout=0.5)
        if status == WRONG_SETTING:
            return Death(self._error_line or "it refused its settings", final=True)
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return Death(f"{how}: {self._error_line}" if self._error_line else how, final=False)

    async def stop(self, grace_s: float) -> None:
        """End the process: send `Shutdown`, wait `grace_s`, kill. Then free the sockets and the directory."""
        if self._process.returncode is None and grace_s > 0:
            self.send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # the process may have just ended
                self._process.kill()
            await self._process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _send_all(self) -> None:
        while True:
            await self._push.send(_ENCODER.encode(await self._outbox.get()))

    async def _read_stderr(self) -> None:
        """Copy stderr to our stderr. Keep the line `error: ...` as the reason of the process's death."""
        assert self._process.stderr is not None, "stderr is a pipe"
        progress = LoadProgress()
        while chunk := await _line(self._process.stderr):
            text = chunk.decode(errors="replace").rstrip()
            if text.startswith("error: "):
                self._error_line = text.removeprefix("error: ")
            elif text.startswith(PROGRESS):
                progress.show(text)
            else:
                print(text, file=sys.stderr, flush=True)


async def _line(stream: asyncio.StreamReader) -> bytes:
    """Return the next line, or the buffered part of an overlong line. Empty at the end."""
    try:
        return await stream.readuntil()
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.read(error.consumed)


def _private_directory() -> Path:
    """Create a directory that only this user can enter, with a path short enough for a Unix socket."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    if (
        not os.access(base, os.W_OK)
        or len(os.fsencode(base)) + len("/foveate-12345678/from_engine") > _SOCKET_PATH_LIMIT
    ):
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="foveate-", dir=base))  # mode 0700
