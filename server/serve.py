"""Run the server: start the engine, import the web stack meanwhile, print a ready line, drain on SIGTERM."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from foveate.configs.config import Config
from foveate.configs.errors import ConfigError
from foveate.server import interrupt
from foveate.server.engine_client import EngineClient, EngineDown
from foveate.server.report import banner, report_load, set_up_log

if TYPE_CHECKING:  # _serve imports this module late
    from foveate.server.http import HttpServer

log = logging.getLogger("foveate.server")

TELL_S = 5.0  # time in which /health/ready says why the engine process was given up
_ANSWER_S = 1.0  # time for aborted requests to send their errors


def bind(host: str, port: int) -> socket.socket:
    """Bind the port before any slow work. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"server.host: {host} is not an address of this machine: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        remedy = "; choose another with --port, or 0 for any free one"
        raise ConfigError(f"server.port: cannot listen on {host}:{port}: {error.strerror}{remedy}") from error
    return listener


def run(config: Config, model_dir: Path, started: float) -> int:
    """Serve until a signal, or until the engine process stays down. Leaves SIGINT and SIGTERM ignored.

    Args:
        config: as returned by `find_model`.
        started: `time.monotonic()` at the start of the program, for the ready line.

    Returns:
        the exit status: 0 after a signal to a ready server, 130 after SIGINT and 143 after SIGTERM to a starting one,
        1 if HTTP cannot be served, 2 for a wrong setting, 3 if the engine process is given up.
    """
    listener = bind(config.server.host, config.server.port)
    set_up_log(config)
    with contextlib.closing(listener), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, model_dir, listener, started))


async def _serve(config: Config, model_dir: Path, listener: socket.socket, started: float) -> int:
    client = EngineClient(config)
    stop = _Stop(client, config.server.drain_s)
    with stop.at_signals():
        try:
            await client.start()
            # These imports take 0.5 s. Meanwhile the engine process runs its own imports, which take 3 s.
            from foveate.server.http import make_server

            stop.server = make_server(config, client, model_dir)
            await asyncio.sleep(0)  # for a signal during the imports
            if stop.asked:
                return stop.status
            return await _answer(stop, listener, lambda: _announce(config, stop, listener, started))
        finally:
            await client.aclose()


async def _answer(stop: "_Stop", listener: socket.socket, announce: Callable[[], Awaitable[int]]) -> int:
    """Answer requests until a signal or the end of the engine process. Return the exit status."""
    http = asyncio.create_task(stop.server.serve(sockets=[listener]))
    engine = asyncio.create_task(_follow(stop, announce))
    load = asyncio.create_task(report_load(stop.client))
    await asyncio.wait((http, engine), return_when=asyncio.FIRST_COMPLETED)
    if engine.done():
        stop.cut_off()  # the client has already failed all requests in flight
    await http
    load.cancel()
    if engine.done():
        return engine.result()
    engine.cancel()
    return stop.status if stop.asked else 1  # 1: uvicorn's log gives the reason


async def _follow(stop: "_Stop", announce: Callable[[], Awaitable[int]]) -> int:
    """Return the exit status when the engine process is given up."""
    status = await announce()
    if status:
        return status
    stop.is_ready = True
    down = await stop.client.down()
    stop.status = _status(down)  # even if a signal comes first
    log.critical("the engine process stays down: %s. The server ends with exit status %d", down, stop.status)
    await asyncio.sleep(TELL_S)
    return stop.status


def _status(down: EngineDown) -> int:
    return 2 if down.wrong_setting else 3


async def _announce(config: Config, stop: "_Stop", listener: socket.socket, started: float) -> int:
    """Print the ready line or the error of the engine. Return the exit status: 0 if ready, 2 or 3 on an error."""
    client = stop.client
    host, port = listener.getsockname()[:2]  # now: a signal closes the socket
    try:
        await client.ready()
    except EngineDown as error:
        print(f"foveate: error: {error}", file=sys.stderr, flush=True)
        return _status(error)
    from foveate.server.common.errors import ApiError
    from foveate.server.prepare.stages import read_method

    try:
        read_method("budget.method", config.budget.method, client.methods)
    except ApiError as error:
        print(f"foveate: error: {error.message}", file=sys.stderr, flush=True)
        return 2
    while not stop.server.started:  # uvicorn sends no notice, so poll
        await asyncio.sleep(0.01)
    if stop.asked:  # a signal came first, and has been told
        return 0
    model = client.model
    shown = f"[{host}]" if ":" in host else host
    print(
        f"foveate: {config.model.name} ready on http://{shown}:{port} in {time.monotonic() - started:.1f} s "
        f"({model.dtype}, weights in {model.weights}, {model.device} with {model.kernels} kernels, "
        f"{model.n_blocks} blocks of {model.block_tokens} tokens)",
        *banner(config, model),
        sep="\n",
        flush=True,
    )
    return 0


class _Stop:
    """What SIGTERM and SIGINT do while the event loop runs.

    The first signal ends a server that is not ready, or begins the drain; the second cuts open requests off.

    Attributes:
        asked: whether a signal came.
        is_ready: whether the server has announced itself.
        status: exit status that the first signal gives.
    """

    def __init__(self, client: EngineClient, drain_s: float) -> None:
        self.client = client
        self.asked = False
        self.is_ready = False
        self.status = 0
        self._drain_s = drain_s
        self._server: HttpServer | None = None

    @property
    def server(self) -> "HttpServer":
        assert self._server is not None, "asked for the server before its imports"
        return self._server

    @server.setter
    def server(self, server: "HttpServer") -> None:
        self._server = server

    @contextlib.contextmanager
    def at_signals(self) -> Iterator[None]:
        """Take the signals over from `interrupt`, and ignore them in the end: the process is about to exit."""
        loop = asyncio.get_running_loop()
        for number in interrupt.SIGNALS:  # not `add_signal_handler`: to remove that opens a moment for a traceback
            signal.signal(number, lambda came, _: loop.call_soon_threadsafe(self._signalled, came))
        try:
            yield
        finally:
            for number in interrupt.SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def cut_off(self) -> None:
        """Abort open requests and end the HTTP server."""
        self.client.cut_off("the server is shutting down; send the request again")
        if self._server is not None:
            self._server.should_exit = True
            # for clients that do not read
            asyncio.get_running_loop().call_later(_ANSWER_S, setattr, self._server, "force_exit", True)

    def _signalled(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.asked:
            log.warning("%s again: open requests are cut off", name)
            self.cut_off()
        elif self.is_ready:
            log.info("%s: no new connections; open requests may finish (again to cut them off)", name)
            self.server.should_exit = True
            asyncio.get_running_loop().call_later(self._drain_s, self.cut_off)
        else:
            interrupt.tell(number)
            self.status = interrupt.status(number)
            self.cut_off()
        self.asked = True
