"""The server's side of the engine process: start the process, exchange messages, restart the process after a crash.

    starting --Ready--> ready --death or hang--> starting ...      a wrong setting, or a crash loop --> dead

A crash loop is `server.engine_deaths` deaths without `HEALTHY_S` of service in between, however far apart. The first
restart follows at once, each further one after twice the time.

Every request ends in exactly one way: all choices finish, or the request gets one `Failed`. If the caller stops
listening, the client aborts the request.
"""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Literal, NoReturn

import msgspec

from foveate.configs.config import Config
from foveate.engine.common import (
    Abort,
    Delta,
    Failed,
    FromEngine,
    Generate,
    Heartbeat,
    MethodInfo,
    ModelInfo,
    Pulse,
    Ready,
)
from foveate.server.common.engine_api import Event
from foveate.server.engine_process import Death, EngineProcess
from foveate.server.watchdog import CHECK_S, Watchdog

log = logging.getLogger("foveate.server.engine_client")

ENGINE_COMMAND = (sys.executable, "-P", "-m", "foveate.engine.start")
ENGINE_RESTARTED = "engine_restarted"  # code of requests that were in flight or arrived while the engine was down
ABORTED = "aborted"  # code of requests that the end of the drain aborted
HEALTHY_S = 300.0  # of service, after which the deaths before no longer count
BACK_OFF_S = 1.0  # before the second restart
MOST_BACK_OFF_S = 60.0
STOP_GRACE_S = 3.0

State = Literal["starting", "ready", "dead"]

_LIST: msgspec.msgpack.Decoder[list[FromEngine]] = msgspec.msgpack.Decoder(list[FromEngine])
_RAW_LIST: msgspec.msgpack.Decoder[list[msgspec.Raw]] = msgspec.msgpack.Decoder(list[msgspec.Raw])
_ONE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_COUNTERS = (
    "steps",
    "preemptions",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "visual_offered",
    "visual_kept",
    "images_encoded",
    "encoder_hits",
)


class EngineDown(Exception):
    """The engine process stays down. The message gives the reason in one line.

    Args:
        wrong_setting: True if the engine refused a setting or the checkpoint; False after crashes.
    """

    def __init__(self, reason: str, wrong_setting: bool) -> None:
        super().__init__(reason)
        self.wrong_setting = wrong_setting


class EngineClient:
    """Owns the engine process. All methods run in one event loop.

    Attributes:
        state: the client serves requests only in the state "ready".
        restarts: number of restarts of the engine process.
        methods: reduction methods of the engine, from the last `Ready`.
        heartbeat: last heartbeat; its counters continue across restarts.
        heartbeat_at: arrival time of the last heartbeat or pulse, `time.monotonic()`.
    """

    def __init__(self, config: Config, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self.state: State = "starting"
        self.restarts = 0
        self.methods: list[MethodInfo] = []
        self.heartbeat: Heartbeat | None = None
        self.heartbeat_at = 0.0
        self._config = config
        self._command = tuple(command)
        self._model: ModelInfo | None = None
        self._down: EngineDown | None = None
        self._last_death = ""
        self._streams: dict[str, asyncio.Queue[Event]] = {}
        self._counted = dict.fromkeys(_COUNTERS, 0)  # totals of earlier processes
        self._process: EngineProcess | None = None
        self._watchdog: Watchdog | None = None  # of the process
        self._ready_at = self._restarted_at = 0.0  # `time.monotonic()`, of the last process
        self._supervisor: asyncio.Task[None] | None = None
        self._turned = asyncio.Event()  # set and replaced whenever `state` changes

    @property
    def model(self) -> ModelInfo:
        """The model of the last ready engine. Available once `ready()` has returned."""
        assert self._model is not None, "asked for the model before the engine was ready"
        return self._model

    @property
    def reason(self) -> str:
        """Why `state` is not "ready", in words."""
        if self._down is not None:
            return f"the engine process is down: {self._down}"
        if self._last_death:
            return f"the engine process died ({self._last_death}) and is starting again"
        return "the model is being loaded"

    @property
    def turn_s(self) -> float:
        """Seconds since the engine's turn in progress began: a step, or a second of waiting at most."""
        return 0.0 if self._watchdog is None else self._watchdog.turn_s

    async def start(self) -> None:
        """Start the process and return at once; `ready` waits for the model. Raises OSError."""
        assert self._supervisor is None, "started once"
        self._process = await EngineProcess.spawn(self._config, self._command)
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def ready(self) -> None:
        """Wait until the state is "ready". Raises EngineDown if the engine stays down."""
        while self.state == "starting":
            await self._turned.wait()
        if self._down is not None:
            raise self._down

    async def down(self) -> EngineDown:
        """Wait until the engine process is given up. Return why."""
        while self._down is None:
            await self._turned.wait()
        return self._down

    async def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        """Run one request. The iterator ends after the last choice's `finish` or after `Failed`.

        Closing the iterator early, or cancelling the task that reads the iterator, aborts the request in the engine.
        """
        assert request.id not in self._streams, f"request id {request.id!r} is in flight already"
        if self.state != "ready" or self._process is None:
            yield Failed(id=request.id, code=ENGINE_RESTARTED, message=f"{self.reason}; try again later")
            return
        process = self._process
        queue = self._streams[request.id] = asyncio.Queue()
        unfinished = request.n
        process.send(request)
        try:
            while unfinished:
                event = await queue.get()
                if isinstance(event, Failed):
                    unfinished = 0
                elif isinstance(event, Delta) and event.finish is not None:
                    unfinished -= 1
                yield event
        finally:
            # `cut_off` or the death of the process may have removed the stream.
            if self._streams.pop(request.id, None) is not None and unfinished and process is self._process:
                process.send(Abort(request.id))

    def end_choice(self, request_id: str, choice: int) -> None:
        """End one choice of a request in flight. The engine still sends the last `Delta`, which has the usage."""
        if request_id in self._streams and self._process is not None:
            self._process.send(Abort(request_id, choice))

    def cut_off(self, message: str) -> None:
        """Abort every request in flight. Each reader gets `Failed` with the code `ABORTED`."""
        streams, self._streams = self._streams, {}
        for request_id, queue in streams.items():
            if self._process is not None:
                self._process.send(Abort(request_id))
            queue.put_nowait(Failed(id=request_id, code=ABORTED, message=message))

    async def aclose(self, grace_s: float = STOP_GRACE_S) -> None:
        """Stop the process. Requests in flight end with `Failed`. A second call has no effect."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        if self.state == "starting":  # the engine reads no messages while it loads the model
            grace_s = 0.0
        if self._down is None:
            self._give_up(EngineDown("the server is shutting down", wrong_setting=False))
        if self._process is not None:
            process, self._process = self._process, None
            await process.stop(grace_s)

    async def _supervise(self) -> None:
        n_deaths = 0
        most = self._config.server.engine_deaths
        try:
            while True:
                death = await self._life()
                served_s = time.monotonic() - self._ready_at if self.state == "ready" else 0.0
                n_deaths = 1 if served_s >= HEALTHY_S else n_deaths + 1
                self._last_death = death.reason
                if death.final:
                    return self._give_up(EngineDown(death.reason, wrong_setting=True))
                log.error("the engine process died after %.1f s of service: %s", served_s, death.reason)
                if n_deaths >= most:
                    times = f"{n_deaths} times without {HEALTHY_S:.0f} s of service in between"
                    reason = f"it died {times} (server.engine_deaths), last with {death.reason}"
                    return self._give_up(EngineDown(reason, wrong_setting=False))
                back_off_s = min(BACK_OFF_S * 2 ** (n_deaths - 2), MOST_BACK_OFF_S) if n_deaths > 1 else 0.0
                log.error("starting another engine process in %.0f s (death %d of %d)", back_off_s, n_deaths, most)
                await self._bury(back_off_s)
        except Exception as error:  # without a supervisor, requests would never end
            log.exception("the supervisor of the engine process failed")
            self._give_up(EngineDown(f"internal error: {error}", wrong_setting=False))

    async def _life(self) -> Death:
        """Start a process if there is none, and follow it to its end."""
        if self._process is None:
            self.restarts += 1
            self._restarted_at = time.monotonic()
            try:
                self._process = await EngineProcess.spawn(self._config, self._command)
            except OSError as error:  # the machine may have files, memory or processes for it again soon
                return Death(f"it could not be started: {error}", final=False)
        return await self._live(self._process)

    async def _bury(self, back_off_s: float) -> None:
        """Fail what was in flight, free what the dead process held, and wait before the next one."""
        self._turn("starting")
        self._fail_all(f"{self.reason}; send the request again")
        if self.heartbeat is not None:
            self._counted = {name: getattr(self.heartbeat, name) for name in _COUNTERS}
        if self._process is not None:
            await self._process.stop(0)
            self._process = None
        await asyncio.sleep(back_off_s)

    async def _live(self, process: EngineProcess) -> Death:
        """Dispatch events until the process ends, or hangs and is killed."""
        self._watchdog = Watchdog(process.pid, self._config.server)
        waiter = asyncio.create_task(process.wait())
        others = [asyncio.create_task(self._receive(process)), asyncio.create_task(self._watch(process))]
        try:
            await asyncio.wait((waiter, *others), return_when=asyncio.FIRST_COMPLETED)
            for task in others:
                if task.done():
                    task.result()  # these never return; this raises our own bug
            return await waiter
        finally:
            waiter.cancel()
            for task in others:
                task.cancel()
            await asyncio.gather(waiter, *others, return_exceptions=True)

    async def _watch(self, process: EngineProcess) -> NoReturn:
        """Kill the process if it hangs."""
        assert self._watchdog is not None, "made with the process"
        while True:
            await asyncio.sleep(CHECK_S)
            if reason := self._watchdog.verdict():
                process.kill(reason)

    async def _receive(self, process: EngineProcess) -> NoReturn:
        while True:
            for event in _decode(await process.receive()):
                self._handle(event)

    def _handle(self, event: FromEngine) -> None:
        if self._watchdog is not None:
            self._watchdog.heard(event)
        match event:
            case Ready(model=model, methods=methods):
                self._model, self.methods, self._last_death = model, methods, ""
                self.heartbeat_at = self._ready_at = time.monotonic()
                if self.restarts:
                    took_s = self._ready_at - self._restarted_at
                    log.warning("the engine process is ready again after %.1f s (restart %d)", took_s, self.restarts)
                self._turn("ready")
            case Pulse():
                self.heartbeat_at = time.monotonic()
            case Heartbeat():
                sums = {name: getattr(event, name) + self._counted[name] for name in _COUNTERS}
                self.heartbeat, self.heartbeat_at = msgspec.structs.replace(event, **sums), time.monotonic()
            case _:
                queue = self._streams.get(event.id)
                if queue is not None:  # else the request was aborted while this event was in transit
                    queue.put_nowait(event)

    def _give_up(self, down: EngineDown) -> None:
        log.debug("the engine process is given up: %s", down)
        self._down = down
        self._turn("dead")
        self._fail_all(self.reason)

    def _turn(self, state: State) -> None:
        self.state = state
        self._turned.set()
        self._turned = asyncio.Event()

    def _fail_all(self, message: str) -> None:
        streams, self._streams = self._streams, {}
        for request_id, queue in streams.items():
            queue.put_nowait(Failed(id=request_id, code=ENGINE_RESTARTED, message=message))


def _decode(frame: bytes) -> Sequence[FromEngine]:
    """Decode the events of one frame. An event that cannot be decoded is logged and skipped."""
    try:
        return _LIST.decode(frame)
    except msgspec.DecodeError:
        events = []  # one event is broken: decode the events one by one, below
    try:
        for raw in _RAW_LIST.decode(frame):
            try:
                events.append(_ONE.decode(raw))
            except msgspec.DecodeError as error:
                log.error("an event of the engine could not be read: %s", error)
    except msgspec.DecodeError as error:
        log.error("a frame of the engine is not a list: %s", error)
    return events
