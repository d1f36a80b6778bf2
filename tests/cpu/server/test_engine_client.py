"""The server's side of the engine process, against a fake that speaks the protocol."""

import asyncio
import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from foveate.configs.config import Config
from foveate.engine.common import Accepted, Delta, Failed, Generate, Heartbeat
from foveate.server import engine_client, watchdog
from foveate.server.engine_client import ABORTED, ENGINE_RESTARTED, EngineClient, EngineDown, Event
from foveate.server.routes.health import Readiness, probe_request

FAKE = Path(__file__).with_name("fake_engine.py")
_spec = importlib.util.spec_from_file_location("fake_engine", FAKE)
assert _spec is not None and _spec.loader is not None
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


@contextlib.asynccontextmanager
async def running(tmp_path: Path, name: str = "", **server: float) -> AsyncIterator[EngineClient]:
    config = replace(Config(), model=replace(Config().model, name=name), server=replace(Config().server, **server))
    client = EngineClient(config, (sys.executable, "-P", str(FAKE), str(tmp_path / "journal")))
    await client.start()
    try:
        yield client
    finally:
        await client.aclose()
        assert not client._streams, "a request was left in the table"


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(15):
            await test()

    asyncio.run(bounded())


def request(kind: int, name: str = "r", n: int = 1) -> Generate:
    return Generate(id=name, prompt_ids=[kind, 3, 4], n=n)


async def collect(client: EngineClient, what: Generate) -> list[Event]:
    return [event async for event in client.generate(what)]


async def journal(tmp_path: Path, until: str) -> list[str]:
    """What the fake received, once it received `until`."""
    while True:
        file = tmp_path / "journal"
        lines = file.read_text().splitlines() if file.exists() else []
        if until in lines:
            return lines
        await asyncio.sleep(0.02)


def test_a_request_ends_when_all_its_choices_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    async def test() -> None:
        async with running(tmp_path) as client:
            assert client.state == "starting" and "loaded" in client.reason
            early = await collect(client, request(fake.ANSWER, "early"))
            assert [type(e) for e in early] == [Failed]
            await client.ready()
            assert client.state == "ready" and client.model == fake.MODEL
            answers = await asyncio.gather(*(collect(client, request(fake.ANSWER, f"r{n}", n)) for n in (1, 3)))
            for n, events in zip((1, 3), answers, strict=True):
                assert isinstance(events[0], Accepted) and {e.id for e in events} == {f"r{n}"}
                assert [e.choice for e in events[1:] if isinstance(e, Delta) and e.finish] == list(range(n))
            refused = await collect(client, request(fake.REFUSE))
            assert [e.code for e in refused if isinstance(e, Failed)] == ["context_length_exceeded"]
        assert client.state == "dead" and "shutting down" in client.reason
        lines = await journal(tmp_path, "Shutdown ")
        assert not [line for line in lines if line.startswith("Abort")]
        assert not list(tmp_path.glob("foveate-*")), "the socket directory was left behind"

    run(test)


def test_a_reader_that_leaves_aborts_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as client:
            await client.ready()
            async with contextlib.aclosing(client.generate(request(fake.HANG, "closed"))) as events:
                async for event in events:
                    assert isinstance(event, Accepted)
                    break
            task = asyncio.create_task(collect(client, request(fake.HANG, "cancelled")))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            outside = asyncio.create_task(collect(client, request(fake.HANG, "outside")))
            await asyncio.sleep(0.05)
            client.cut_off("shutting down")
            client.cut_off("shutting down")
            failed = (await outside)[-1]
            assert isinstance(failed, Failed) and failed.code == ABORTED
        lines = await journal(tmp_path, "Shutdown ")
        aborts = [line for line in lines if line.startswith("Abort")]
        assert aborts == ["Abort closed", "Abort cancelled", "Abort outside"]

    run(test)


def test_sigkill_fails_what_is_in_flight_and_starts_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with running(tmp_path) as client:
            await client.ready()
            while client.heartbeat is None:
                await asyncio.sleep(0.01)
            open_requests = [asyncio.create_task(collect(client, request(fake.HANG, f"r{i}"))) for i in range(5)]
            await asyncio.sleep(0.1)
            assert client._process is not None
            os.kill(client._process.pid, signal.SIGKILL)
            began = time.monotonic()
            for events in await asyncio.gather(*open_requests):
                assert isinstance(events[-1], Failed) and events[-1].code == ENGINE_RESTARTED
                assert "SIGKILL" in events[-1].message
            assert time.monotonic() - began < 1.0
            assert client.state == "starting"
            await client.ready()
            while client.heartbeat.steps == fake.BEAT.steps:
                await asyncio.sleep(0.01)
            assert client.heartbeat.steps == 2 * fake.BEAT.steps, "counters go on over a restart"
            assert client.heartbeat.free_blocks == fake.BEAT.free_blocks
            assert client.restarts == 1 and isinstance((await collect(client, request(fake.ANSWER)))[-1], Delta)

    run(test)
    assert "SIGKILL" in caplog.text and "ready again after" in caplog.text and "(restart 1)" in caplog.text


async def died(client: EngineClient) -> None:
    """Wait until the client has noticed the death of a ready engine."""
    while client.state == "ready":
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("when", ["loading", "idle", "in a request"])
def test_a_stopped_engine_is_killed_and_another_starts(
    tmp_path: Path, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with running(tmp_path, "slow" if when == "loading" else "", engine_hang_s=3.0) as client:
            if when != "loading":
                await client.ready()
            open_request = asyncio.create_task(collect(client, request(fake.HANG, "r")))
            await asyncio.sleep(0.1)
            if when == "idle":
                open_request.cancel()
            assert client._process is not None
            os.kill(client._process.pid, signal.SIGSTOP)
            began = time.monotonic()
            while not client.restarts:
                await asyncio.sleep(0.02)
            assert 2.5 < time.monotonic() - began < 6.0
            await client.ready()
            if when == "in a request":
                failed = (await open_request)[-1]
                assert isinstance(failed, Failed) and failed.code == ENGINE_RESTARTED and "hung" in failed.message
            assert isinstance((await collect(client, request(fake.ANSWER, "again")))[-1], Delta)

    run(test)
    assert "no event and no CPU time" in caplog.text


def test_a_long_load_and_a_long_step_are_no_hang(tmp_path: Path) -> None:
    """Both are silent for longer than the limit, and use the CPU; readiness goes on in the step."""

    async def test() -> None:
        async with running(tmp_path, "busy load", engine_hang_s=3.0) as client:
            await client.ready()
            events = await collect(client, request(fake.BUSY))
            assert isinstance(events[-1], Delta) and client.restarts == 0

    run(test)


def test_a_step_without_an_end_is_killed(tmp_path: Path) -> None:
    """Its pulse goes on."""

    async def test() -> None:
        async with running(tmp_path, engine_hang_s=3.0, engine_step_s=10.0) as client:
            await client.ready()
            readiness = Readiness(client)
            stuck = asyncio.create_task(collect(client, request(fake.STUCK)))
            while client.turn_s < 3.0:
                await asyncio.sleep(0.05)
            assert client.heartbeat is not None
            assert await readiness.why_not() is None, "a long step"
            failed = (await stuck)[-1]
            assert isinstance(failed, Failed) and "one step ran for" in failed.message

    run(test)


def test_a_server_that_was_stopped_itself_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = watchdog.Watchdog(2**22 + 1, replace(Config().server, engine_hang_s=3.0))  # above every process id
    monkeypatch.setattr(dog, "_works", lambda: False)
    now[0] += 100.0
    assert dog.verdict() is None
    for _ in range(2):
        now[0] += 1.0
        assert dog.verdict() is None
    now[0] += 1.0
    assert "no event" in str(dog.verdict())


def test_deaths_during_the_start_open_the_breaker(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, "crash") as client:
            with pytest.raises(EngineDown, match=r"died 3 times without .* service .*, last with signal SIGABRT") as e:
                await client.ready()
            assert not e.value.wrong_setting and client.state == "dead" and client.restarts == 2
            assert await client.down() is e.value
            (failed,) = await collect(client, request(fake.ANSWER))
            assert isinstance(failed, Failed) and "3 times" in failed.message

    run(test)


@pytest.mark.parametrize("apart_s", [0.0, 31.0, 299.0])
def test_deaths_without_healthy_service_open_the_breaker(
    tmp_path: Path, apart_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with running(tmp_path, engine_deaths=3) as client:
            for _ in range(3):
                await client.ready()
                client._ready_at -= apart_s
                assert isinstance((await collect(client, request(fake.DIE)))[-1], Failed)
                await died(client)
            with pytest.raises(EngineDown, match="exit status 7"):
                await client.ready()

    run(test)
    assert caplog.text.count("the engine process died after") == 3
    assert "in 0 s (death 1 of 3)" in caplog.text and "in 1 s (death 2 of 3)" in caplog.text


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_process_that_ends_before_it_reads_its_configuration_is_a_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Killed between its start and the first word to it: the next process starts as after any death."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    create, n_started = asyncio.create_subprocess_exec, [0]

    async def killed(*argv: Any, **how: Any) -> Any:
        process = await create(*argv, **how)
        n_started[0] += 1
        if n_started[0] in (1, 2):
            process.kill()
            await asyncio.sleep(0.2)  # its pipes are closed
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", killed)

    async def test() -> None:
        async with asyncio.timeout(15), running(tmp_path) as client:
            await client.ready()
            assert client.restarts == 2 and isinstance((await collect(client, request(fake.ANSWER)))[-1], Delta)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(test())
    assert not list(tmp_path.glob("foveate-*"))


def test_a_start_that_fails_is_a_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    async def test(failures: int) -> None:
        async with running(tmp_path) as client:
            await client.ready()
            create, left = asyncio.create_subprocess_exec, [failures]

            async def scarce(*argv: Any, **how: Any) -> Any:
                left[0] -= 1
                if left[0] >= 0:
                    raise BlockingIOError("no more processes")
                return await create(*argv, **how)

            with monkeypatch.context() as patch:
                patch.setattr(asyncio, "create_subprocess_exec", scarce)
                assert client._process is not None
                os.kill(client._process.pid, signal.SIGKILL)
                if failures == 1:
                    while client.restarts < 2:
                        await asyncio.sleep(0.02)
                    await client.ready()
                    assert isinstance((await collect(client, request(fake.ANSWER)))[-1], Delta)
                else:
                    down = await client.down()
                    assert not down.wrong_setting and "it could not be started: no more processes" in str(down)

    for failures in (1, 2):
        run(lambda: test(failures))  # noqa: B023
        assert not list(tmp_path.glob("foveate-*"))
    assert "internal error" not in caplog.text


def test_deaths_far_apart_are_forgotten(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, engine_deaths=2) as client:
            for n in range(3):
                await client.ready()
                client._ready_at -= engine_client.HEALTHY_S
                assert isinstance((await collect(client, request(fake.DIE)))[-1], Failed)
                await died(client)
                assert client.state == "starting" and client.restarts <= n + 1
            await client.ready()

    run(test)


def test_a_wrong_setting_is_final_and_says_its_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with running(tmp_path, "refuse") as client:
            with pytest.raises(EngineDown) as caught:
                await client.ready()
            assert caught.value.wrong_setting and str(caught.value) == "model.path: no such thing"
            assert client.restarts == 0

    run(test)
    assert capfd.readouterr().err.splitlines() == ["a warning of some library"]


def test_unreadable_events_are_logged_and_the_rest_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with running(tmp_path) as client:
            await client.ready()
            for i in range(2):
                assert isinstance((await collect(client, request(fake.GARBAGE, f"r{i}")))[-1], Delta)
            assert client.state == "ready"

    run(test)
    assert "Novelty" in caplog.text and "not a list" in caplog.text


def test_readiness(tmp_path: Path) -> None:
    def beat(since_step_s: float) -> Heartbeat:
        values = {name: getattr(fake.BEAT, name) for name in fake.BEAT.__struct_fields__}
        return Heartbeat(**{**values, "since_step_s": since_step_s})

    async def test() -> None:
        async with running(tmp_path) as client:
            readiness = Readiness(client)
            assert await readiness.why_not() == client.reason
            await client.ready()
            assert await readiness.why_not() is None
            client.heartbeat, client.heartbeat_at = beat(60.0), time.monotonic()
            assert await asyncio.gather(*(readiness.why_not() for _ in range(3))) == [None] * 3
            assert [await readiness.why_not()] == [None], "a probe counts as a step"
            lines = await journal(tmp_path, "Generate probe-1")
            assert len([line for line in lines if line.startswith("Generate")]) == 1
            client.heartbeat_at = time.monotonic() - 6
            assert "heartbeat" in str(await readiness.why_not())

    run(test)


def test_the_probe_is_an_ordinary_token() -> None:
    sent = probe_request("p", fake.MODEL)
    assert sent.sampling.max_tokens == 1 and sent.prompt_ids != [fake.MODEL.image_token_id]
    assert 0 < sent.prompt_ids[0] < fake.MODEL.vocab_size
