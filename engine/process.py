"""The work of the engine process, which `engine/start.py` starts, with the configuration on stdin.

`model.path` is a directory: the server resolves names, because the server needs the model's files too.

The server binds two ZeroMQ sockets in a directory: `to_engine` (one message of `ToEngine` each) and `from_engine` (a
list of `FromEngine` each). Everything is msgspec's msgpack; no pickle, no TCP. Ends on `Shutdown` or, with status 2 and
one line on stderr, when a setting or the checkpoint is wrong.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import msgspec
import torch
import zmq

from foveate.configs.config import Config, ModelConfig
from foveate.configs.errors import ConfigError
from foveate.engine.common import (
    FROM_ENGINE,
    TO_ENGINE,
    Abort,
    DeviceLostError,
    FromEngine,
    Generate,
    ModelError,
    Pulse,
    Ready,
    Shutdown,
    ToEngine,
)
from foveate.engine.engine import Engine
from foveate.engine.methods import describe
from foveate.engine.models.base import Model
from foveate.engine.models.loader import Progress, load_model
from foveate.kernels.hardware import device as hardware

log = logging.getLogger("foveate.engine.process")

_HEARTBEAT_S = 1.0
_PULSE_S = 1.0
_PROGRESS_S = 0.2
_TOO_SMALL_TO_SHARE = 30_000_000  # parameters


def choose_device(config: ModelConfig) -> torch.device:
    """Raises ConfigError: the configuration asks for CUDA and torch sees no device."""
    device = hardware.find(config.device)
    if device is None:
        raise ConfigError("model.device: cuda, but torch sees no CUDA device; use cpu or auto")
    return device


def choose_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it; elsewhere it is emulated, a hundred times slower than float32."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    return torch.bfloat16 if hardware.multiplies_bfloat16(device) else torch.float32


def choose_threads(config: ModelConfig, n_parameters: int) -> int:
    """All cores, or one for a model whose operations are too short to share.

    Threads that wait for each other spin. On an idle machine a tiny model gains nothing from the second core; on one
    whose cores are busy it loses more than tenfold.
    """
    n_cores = len(os.sched_getaffinity(0))
    return config.threads or (1 if n_parameters < _TOO_SMALL_TO_SHARE else n_cores)


def load(config: Config, progress: Progress = lambda done, total: None) -> Model:
    """Raises ConfigError or ModelError."""
    device = choose_device(config.model)
    dtype = choose_dtype(config.model, device)
    model = load_model(Path(config.model.path), dtype, device, config.model, progress)
    hardware.prepare(device, choose_threads(config.model, model.n_parameters))
    asked = (config.model.dtype, config.model.weights)
    log.info("%s on %s: dtype %s, weights %s (set: %s, %s)", config.model.path, device, dtype, model.weights, *asked)
    return model


@dataclass(frozen=True)
class Channel:
    """The two sockets to the server."""

    inbox: zmq.SyncSocket
    outbox: zmq.SyncSocket

    @classmethod
    def connect(cls, directory: Path) -> "Channel":
        context = zmq.Context()
        inbox = context.socket(zmq.PULL)
        outbox = context.socket(zmq.PUSH)
        for socket in (inbox, outbox):
            socket.set_hwm(0)  # no limit: the engine never blocks on a slow server, the server never on a long step
        outbox.setsockopt(zmq.LINGER, 1000)  # ms to hand over the last events when ending
        inbox.connect(f"ipc://{directory}/{TO_ENGINE}")
        outbox.connect(f"ipc://{directory}/{FROM_ENGINE}")
        return cls(inbox, outbox)

    def receive(self, wait_s: float) -> Iterator[ToEngine]:
        """Yield all pending messages, after a wait of up to `wait_s` seconds for the first."""
        if not self.inbox.poll(int(wait_s * 1000)):
            return
        while True:
            try:
                yield _DECODER.decode(self.inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except msgspec.DecodeError:  # a bug of the server; its other requests still count
                log.exception("a message could not be read")

    def send(self, events: Sequence[FromEngine]) -> None:
        if events:
            self.outbox.send(msgspec.msgpack.encode(events))

    def close(self) -> None:
        self.inbox.close()
        self.outbox.close()


_DECODER: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)


class PulseThread:
    """Sends a `Pulse` every second, on a socket of its own: ZeroMQ sockets belong to one thread.

    A heartbeat says what the engine did and comes between two steps. A pulse comes during a step too, so the server can
    tell a long step from a process that hangs.

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
            while not self._ended.wait(_PULSE_S):
                pulse = Pulse(turns=self._turns, turn_s=time.monotonic() - self._began)
                socket.send(msgspec.msgpack.encode([pulse]))


def serve(engine: Engine, channel: Channel, pulse: PulseThread) -> None:
    """Step while there is work and listen in between, until told to stop."""
    beat = time.monotonic()
    while True:
        pulse.turn()
        idle_s = max(0.0, beat - time.monotonic())
        for message in channel.receive(0.0 if engine.has_work else idle_s):
            match message:
                case Generate():
                    engine.add(message)
                case Abort(id=request_id, choice=choice):
                    engine.abort(request_id, choice)
                case Shutdown():
                    return
        channel.send(engine.take_events())  # `Accepted` now, not after the step
        if engine.has_work:
            channel.send(engine.step())
        if time.monotonic() >= beat:
            channel.send([engine.heartbeat()])
            beat = time.monotonic() + _HEARTBEAT_S


class _Reporter:
    """Writes the progress of loading to stderr, which the server reads: a line now and then, and one at the end."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _PROGRESS_S

    def __call__(self, done: int, total: int) -> None:
        if done == total or time.monotonic() >= self._next:
            self._next = time.monotonic() + _PROGRESS_S
            print(f"progress: {done} {total}", file=sys.stderr, flush=True)


def run(directory: Path) -> int:
    """Run the engine between the sockets in `directory`. Return the exit status of the process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Config)
        logging.getLogger().setLevel(config.server.log_level.upper())
        channel = Channel.connect(directory)
        engine = Engine(load(config, _Reporter()), config)
        engine.warm_up()
        channel.send([Ready(model=engine.info(), methods=describe())])
        pulse = PulseThread(directory)
        pulse.start()
        serve(engine, channel, pulse)
    except (ConfigError, ModelError, msgspec.ValidationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DeviceLostError as error:  # another process may use the device again
        log.exception("the engine ends")
        print(f"error: {error}", file=sys.stderr)
        return 1
    pulse.close()
    channel.close()
    return 0
