"""Run the server: start the engine, import the web stack meanwhile, print a ready line, drain on SIGTERM."""

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
from foveate.server.report import banner, report_load, set_up_log

if TYPE_CHECKING:  # _serve imports this module late
    from foveate.server.http import HttpServer

log = logging.getLogger("foveate.server")

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
    """Serve until a signal. Return the exit status: 0 after a signal, 2 for a wrong setting, 3 if the engine crashed.

    Args:
        config: as returned by `find_model`.
        started: `time.monotonic()` at the start of the program, for the ready line.
    """
    listener = bind(config.server.host, config.server.port)
    set_up_log(config)
    with contextlib.closing(listener), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, model_dir, listener, started))


async def _serve(config: Config, model_dir: Path, listener: socket.socket, started: float) -> int:
    client = EngineClient(config)
    await client.start()
    try:
        # These imports take 0.5 s. Meanwhile the engine process runs its own imports, which take 3 s.
        from foveate.server.http import make_server

        server = make_server(config, client, model_dir)
        with _signals(server, client, config.server.drain_s):
            http = asyncio.create_task(server.serve(sockets=[listener]))
            announced = asyncio.create_task(_announce(config, client, server, listener, started))
            load = asyncio.create_task(report_load(client))
            await asyncio.wait((http, announced), return_when=asyncio.FIRST_COMPLETED)
            if announced.done() and announced.result() != 0:
                server.should_exit = True  # the client has already failed all requests in flight
            await http
            load.cancel()
            announced.cancel()
            if not server.started and not announced.done():
                return 1  # uvicorn's log gives the reason
            with contextlib.suppress(asyncio.CancelledError):
                return await announced
            return 0  # stopped before the server was ready
    finally:
        await client.aclose()


async def _announce(
    config: Config, client: EngineClient, server: "HttpServer", listener: socket.socket, started: float
) -> int:
    """Print the ready line or the error of the engine. Return the exit status: 0 if ready, 2 or 3 on an error."""
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
    while not server.started:  # uvicorn sends no notice, so poll
        await asyncio.sleep(0.01)
    model = client.model
    host, port = listener.getsockname()[:2]
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


@contextlib.contextmanager
def _signals(server: "HttpServer", client: EngineClient, drain_s: float) -> Iterator[None]:
    """On the first SIGTERM or SIGINT, drain for `drain_s`. On the second signal, abort open requests at once."""
    loop = asyncio.get_running_loop()

    def cut_off() -> None:
        client.cut_off("the server is shutting down; send the request again")
        loop.call_later(_ANSWER_S, setattr, server, "force_exit", True)  # for clients that do not read

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
