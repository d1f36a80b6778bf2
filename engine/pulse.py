"""Signs of life of the engine process, sent beside the main thread.

A heartbeat says what the engine did and comes between two steps. A pulse comes during a step too, so the server can
tell a long step from a process that hangs.
"""

import time
from pathlib import Path
from threading import Event, Thread

import msgspec
import zmq

from foveate.engine.common import FROM_ENGINE, Pulse

PULSE_S = 1.0


class PulseThread:
    """Sends a `Pulse` every second, on a socket of its own: ZeroMQ sockets belong to one thread.

    Args:
        directory: where the server has bound its sockets.
    """

    def __init__(self, directory: Path) -> None:
        self._address = f"ipc://{directory}/{FROM_ENGINE}"
        self._turns = 0
        self._began = time.monotonic()
        self._ended = Event()
        self._thread = Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def turn(self) -> None:
        """Say that the main thread begins a turn."""
        self._turns += 1
        self._began = time.monotonic()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._address)
            while not self._ended.wait(PULSE_S):
                pulse = Pulse(turns=self._turns, turn_s=time.monotonic() - self._began)
                socket.send(msgspec.msgpack.encode([pulse]))
