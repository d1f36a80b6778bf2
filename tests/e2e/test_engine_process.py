"""The engine process as the server starts it: messages over sockets, ends when told to or orphaned."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

import foveate.bundled
from foveate.configs.config import CacheConfig, Config, ModelConfig
from foveate.engine.common import (
    Abort,
    Accepted,
    Delta,
    Failed,
    FromEngine,
    Generate,
    Heartbeat,
    Pulse,
    Ready,
    SamplingParams,
    Shutdown,
    ToEngine,
)

MODEL = foveate.bundled.path("tiny-llava")
CONFIG = Config(model=ModelConfig(path=str(MODEL), threads=1), cache=CacheConfig(memory_mb=16))


def start(directory: Path, stdin: bytes) -> tuple[subprocess.Popen[bytes], int]:
    """An engine process, and the end of its lifeline to hold."""
    read_end, lifeline = os.pipe()
    command = [sys.executable, "-P", "-m", "foveate.engine.start", str(directory), str(read_end)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(read_end,))
    os.close(read_end)
    assert process.stdin is not None
    process.stdin.write(stdin)
    process.stdin.close()
    process.stdin = None
    return process, lifeline


class Link:
    """What the server holds of an engine process."""

    def __init__(self, directory: Path) -> None:
        self.context = zmq.Context()
        self.outbox, self.inbox = self.context.socket(zmq.PUSH), self.context.socket(zmq.PULL)
        self.outbox.bind(f"ipc://{directory}/to_engine")
        self.inbox.bind(f"ipc://{directory}/from_engine")
        self.process, self.lifeline = start(directory, msgspec.msgpack.encode(CONFIG))
        self.events: list[FromEngine] = []

    def send(self, message: ToEngine) -> None:
        self.outbox.send(msgspec.msgpack.encode(message))

    def until(self, kind: type[FromEngine], finish: str | None = None) -> FromEngine:
        """The next event of a kind; the others stay in `events`."""
        for _ in range(1000):
            assert self.inbox.poll(60_000), "the engine says something within a minute"
            fresh = msgspec.msgpack.decode(self.inbox.recv(), type=list[FromEngine])
            self.events += fresh
            for event in fresh:
                if isinstance(event, kind) and (finish is None or getattr(event, "finish", None) == finish):
                    return event
        raise AssertionError(f"no {kind.__name__}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.lifeline)
        self.context.destroy(linger=0)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    link = Link(tmp_path)
    yield link
    link.close()


def test_a_process_lives_answers_and_ends(link: Link) -> None:
    ready = link.until(Ready)
    assert isinstance(ready, Ready) and ready.model.family == "llava" and "divprune" in {m.name for m in ready.methods}
    text = [token for token in range(40, 60) if token != ready.model.image_token_id]

    link.send(Generate(id="a", prompt_ids=text, sampling=SamplingParams(max_tokens=5, ignore_eos=True), n=2))
    first, second = link.until(Delta, finish="length"), link.until(Delta, finish="length") if _ended(link) < 2 else None
    assert isinstance(first, Delta) and (second is None or isinstance(second, Delta))
    told = [e for e in link.events if isinstance(e, Accepted | Delta)]
    assert isinstance(told[0], Accepted) and told[0].prompt_tokens == len(text)
    assert sorted(e.choice for e in told if isinstance(e, Delta)) == [0] * 5 + [1] * 5

    link.send(Generate(id="bad", prompt_ids=[]))
    failed = link.until(Failed)
    assert isinstance(failed, Failed) and failed.id == "bad"

    link.outbox.send(b"\xc1 no message")  # ours never sends such a thing; a bug there must not end the process here
    link.send(Generate(id="b", prompt_ids=text, sampling=SamplingParams(ignore_eos=True)))
    link.until(Delta)
    link.send(Abort("b"))
    aborted = link.until(Delta, finish="abort")
    assert isinstance(aborted, Delta) and aborted.usage is not None
    beat = link.until(Heartbeat)
    assert isinstance(beat, Heartbeat) and beat.used_blocks == 0 and beat.output_tokens >= 11

    link.send(Shutdown())
    assert link.process.wait(10) == 0


def _ended(link: Link) -> int:
    return sum(isinstance(event, Delta) and event.finish is not None for event in link.events)


def test_a_wrong_setting_is_one_line_and_status_2(tmp_path: Path) -> None:
    process, lifeline = start(tmp_path, msgspec.msgpack.encode({"cache": {"block_tokens": 3}}))
    _, stderr = process.communicate(timeout=60)
    os.close(lifeline)
    assert process.returncode == 2
    assert stderr.decode().startswith("error: cache.block_tokens: 3 is not a power of two") and stderr.count(b"\n") == 1


@pytest.mark.parametrize("when", ["import", "ready"])
def test_an_orphan_ends_by_itself(tmp_path: Path, when: str) -> None:
    """The other end of its lifeline is closed; the engine process removes its directory and ends."""
    directory = tmp_path / "sockets"
    directory.mkdir()
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
        inbox.bind(f"ipc://{directory}/from_engine")
        process, lifeline = start(directory, msgspec.msgpack.encode(CONFIG))
        if when == "ready":
            assert inbox.poll(60_000), "the engine is ready"
        os.close(lifeline)
        process.communicate(timeout=20)
        assert process.returncode == 1
        assert not directory.exists()


def test_pulses_come_beside_heartbeats(link: Link) -> None:
    assert isinstance(link.until(Ready), Ready)
    first = link.until(Pulse)
    assert isinstance(first, Pulse) and first.turn_s < 1.5, "an idle turn is short"
    later = [link.until(Pulse) for _ in range(3)]  # a turn without work lasts up to a second, as a pulse does
    assert any(isinstance(pulse, Pulse) and pulse.turns > first.turns for pulse in later)
