"""Run the server: engine first, web stack while it loads, one line when ready, drain on SIGTERM."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from foveate.configs.config import Config
from foveate.configs.errors import ConfigError
from foveate.server.engine_client import EngineClient, EngineDown

if TYPE_CHECKING:  # imported late, see _serve
    from foveate.server.http import HttpServer

log = logging.getLogger("foveate.server")

_ANSWER_S = 1.0  # for requests that were cut off to say so


def bind(host: str, port: int) -> socket.socket:
    """Take the port before anything slow happens. Raises ConfigError."""
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
    """Serve until told to stop; return the exit status: 0 after a signal, 2 a wrong setting, 3 the engine crashed.

    Args:
        config: as `find_model` completed it.
        started: `time.monotonic()` at the start of the program, for the ready line.
    """
    listener = bind(config.server.host, config.server.port)
    logging.basicConfig(level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with contextlib.closing(listener), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, model_dir, listener, started))


async def _serve(config: Config, model_dir: Path, listener: socket.socket, started: float) -> int:
    client = EngineClient(config)
    await client.start()
    try:
        # Half a second of imports, in which the engine process has begun with its own three.
        from foveate.server.http import make_server

        server = make_server(config, client, model_dir)
        with _signals(server, client, config.server.drain_s):
            http = asyncio.create_task(server.serve(sockets=[listener]))
            announced = asyncio.create_task(_announce(config, client, server, listener, started))
            await asyncio.wait((http, announced), return_when=asyncio.FIRST_COMPLETED)
            if announced.done() and announced.result() != 0:
                server.should_exit = True  # nothing is in flight: the client failed all it had
            await http
            announced.cancel()
            if not server.started and not announced.done():
                return 1  # uvicorn's log says why
            with contextlib.suppress(asyncio.CancelledError):
                return await announced
            return 0  # stopped before it was ready
    finally:
        await client.aclose()


async def _announce(
    config: Config, client: EngineClient, server: "HttpServer", listener: socket.socket, started: float
) -> int:
    """Say that it is ready, or why it never will be; return the exit status that would follow."""
    try:
        await client.ready()
    except EngineDown as error:
        print(f"foveate: error: {error}", file=sys.stderr, flush=True)
        return 2 if error.wrong_setting else 3
    from foveate.server.common.errors import ApiError
    from foveate.server.prepare.stages import read_method

    try:
        read_method("budget.method", config.budget.method, client.methods)
    except ApiError as error:
        print(f"foveate: error: {error.message}", file=sys.stderr, flush=True)
        return 2
    while not server.started:  # it is not told when
        await asyncio.sleep(0.01)
    model = client.model
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(
        f"foveate: {config.model.name} ready on http://{shown}:{port} in {time.monotonic() - started:.1f} s "
        f"({model.dtype}, weights in {model.weights}, {model.device} with {model.kernels} kernels, "
        f"{model.n_blocks} blocks of {model.block_tokens} tokens)",
        flush=True,
    )
    return 0


@contextlib.contextmanager
def _signals(server: "HttpServer", client: EngineClient, drain_s: float) -> Iterator[None]:
    """The first SIGTERM or SIGINT drains for `drain_s`; a second one cuts open requests off at once."""
    loop = asyncio.get_running_loop()

    def cut_off() -> None:
        client.cut_off("the server is shutting down; send the request again")
        loop.call_later(_ANSWER_S, setattr, server, "force_exit", True)  # a reader that does not read

    def stop(name: str) -> None:
        if server.should_exit:
            log.warning("%s again: open requests are cut off", name)
            cut_off()
        else:
            log.info("%s: no new connections; open requests may finish (again to cut them off)", name)
            server.should_exit = True
            loop.call_later(drain_s, cut_off)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
