"""One run of the engine process: sockets, stdin, stderr and exit.

Every run has a new process and a new directory. So a message for a dead process never reaches the next process.
"""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from foveate.configs.config import Config
from foveate.engine.common import FROM_ENGINE, TO_ENGINE, Shutdown, ToEngine
from foveate.server.report import PROGRESS, LoadProgress
from foveate.server.socket_directory import SocketDirectory

WRONG_SETTING = 2  # exit status: a setting or the checkpoint is wrong; a restart would not help
_ENCODER = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class Death:
    """The end of a process."""

    reason: str  # one line
    final: bool  # a restart would end in the same way


class EngineProcess:
    """A running engine. `spawn` creates it. Call `stop` in the end, even after the process died."""

    def __init__(self, process: Process, directory: SocketDirectory, lifeline: int) -> None:
        self.pid = process.pid
        self._process = process
        self._directory = directory
        self._lifeline = lifeline
        self._is_released = False  # directory and lifeline
        context = self._context = zmq.asyncio.Context()
        self._push = context.socket(zmq.PUSH)
        self._pull = context.socket(zmq.PULL)
        for socket, name in ((self._push, TO_ENGINE), (self._pull, FROM_ENGINE)):
            socket.set_hwm(0)  # a slow peer blocks neither side; the requests in flight bound the queues
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"ipc://{directory.path}/{name}")
        self._outbox: asyncio.Queue[ToEngine] = asyncio.Queue()
        self._error_line = ""
        self._kill_reason = ""
        self._tasks = [asyncio.create_task(self._send_all()), asyncio.create_task(self._read_stderr())]

    @classmethod
    async def spawn(cls, config: Config, command: Sequence[str]) -> "EngineProcess":
        """Start `command DIRECTORY LIFELINE` with the configuration on stdin.

        LIFELINE is the reading end of a pipe whose other end this process holds open until it ends. The process gets
        its own session. Otherwise Ctrl-C in a terminal would end the engine while the server drains.

        Raises:
            OSError: the command cannot be started.
        """
        directory = SocketDirectory()
        read_end, lifeline = os.pipe()  # not inherited, except by `pass_fds`
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                str(directory.path),
                str(read_end),
                stdin=PIPE,
                stdout=DEVNULL,
                stderr=PIPE,
                env={"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONSAFEPATH": "1"},  # see design.md, section 5
                start_new_session=True,
                pass_fds=(read_end,),
            )
        except BaseException:
            os.close(lifeline)
            directory.remove()
            raise
        finally:
            os.close(read_end)
        engine = cls(process, directory, lifeline)
        assert process.stdin is not None, "stdin is a pipe"
        with contextlib.suppress(
            OSError, RuntimeError
        ):  # uvloop's RuntimeError: the process has ended; `wait` says why
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
        if self._kill_reason:
            return Death(self._kill_reason, final=False)
        if status == WRONG_SETTING:
            return Death(self._error_line or "it refused its settings", final=True)
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return Death(f"{how}: {self._error_line}" if self._error_line else how, final=False)

    def kill(self, reason: str) -> None:
        """End the process at once, even if it is stopped. `wait` gives the reason, in one line."""
        self._kill_reason = reason
        with contextlib.suppress(ProcessLookupError):  # the process may have just ended
            self._process.kill()

    async def stop(self, grace_s: float) -> None:
        """End the process: send `Shutdown`, wait `grace_s`, kill. Then free the sockets and the directory.

        After a cancelled call, another one goes on.
        """
        if self._process.returncode is None and grace_s > 0:
            self.send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        if self._process.returncode is None:
            self.kill("it was told to stop")
            await self._process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)
        if not self._is_released:
            self._is_released = True
            self._directory.remove()
            os.close(self._lifeline)

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
