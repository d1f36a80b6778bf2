"""Speaks the engine's side of the protocol, without an engine. Run as `fake_engine.py JOURNAL DIRECTORY`.

Every message received is appended to JOURNAL as one line. How it behaves follows from the configuration's model.name
and from the first prompt id of a request.
"""

import os
import sys
import time
from pathlib import Path

import msgspec
import zmq

from foveate.configs.config import Config
from foveate.engine.common import (
    Abort,
    Accepted,
    Delta,
    Failed,
    FromEngine,
    Generate,
    Heartbeat,
    ModelInfo,
    Pulse,
    Ready,
    ToEngine,
    Usage,
    VisualUsage,
)

ANSWER, HANG, DIE, REFUSE, GARBAGE, BUSY, STUCK = range(7)  # what a first prompt id asks for

MODEL = ModelInfo(
    family="fake", max_context=128, vocab_size=100, image_token_id=50, n_parameters=1,
    dtype="float32", weights="fp32", kernels="avx2", device="cpu", block_tokens=16, n_blocks=64,
)  # fmt: skip
BEAT = Heartbeat(
    since_step_s=0.0, running=1, waiting=2, free_blocks=40, cached_blocks=8, used_blocks=16, total_blocks=64, steps=10,
    preemptions=1, prompt_tokens=3, cached_tokens=1, output_tokens=5, visual_offered=4, visual_kept=2,
    images_encoded=1, encoder_hits=2,
)  # fmt: skip
USAGE = Usage(
    cached_tokens=1, output_tokens=2, encoder_hits=0, preemptions=0, queue_s=0.0, encode_s=0.0, reduce_s=0.0,
    prefill_s=0.0, decode_s=0.0, peak_kv_tokens=3,
)  # fmt: skip


def reply(request: Generate) -> list[FromEngine]:
    accepted = Accepted(id=request.id, prompt_tokens=len(request.prompt_ids), visual=VisualUsage())
    kind = request.prompt_ids[0]
    if kind == HANG:
        return [accepted]
    if kind == REFUSE:
        return [Failed(id=request.id, code="context_length_exceeded", message="too long", param="messages")]
    events: list[FromEngine] = [Delta(id="aborted long ago", choice=0, token_ids=[1]), accepted]
    for choice in range(request.n):
        events.append(Delta(id=request.id, choice=choice, token_ids=[7]))
        events.append(Delta(id=request.id, choice=choice, token_ids=[8], finish="stop", usage=USAGE))
    return events


def work(seconds: float) -> None:
    """Use the CPU and send nothing."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def main() -> int:
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Config)
    journal, directory = Path(sys.argv[1]), Path(sys.argv[2])
    if config.model.name == "crash":
        os.abort()
    if config.model.name == "refuse":
        print("a warning of some library\nerror: model.path: no such thing", file=sys.stderr)
        return 2
    assert os.environ["PYTHONSAFEPATH"] == "1" and directory.stat().st_mode & 0o777 == 0o700
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(f"ipc://{directory}/to_engine")
    outbox.connect(f"ipc://{directory}/from_engine")
    send = lambda events: outbox.send(msgspec.msgpack.encode(events))  # noqa: E731
    time.sleep(1.0 if config.model.name == "slow" else 0.05)
    if config.model.name == "busy load":
        work(4.5)
    send([Ready(model=MODEL), BEAT])
    parent = os.getppid()
    while os.getppid() == parent:
        if not inbox.poll(100):
            continue
        message = msgspec.msgpack.decode(inbox.recv(), type=ToEngine)
        with journal.open("a") as out:
            print(type(message).__name__, getattr(message, "id", ""), file=out)
        if isinstance(message, Generate):
            if message.prompt_ids[0] == DIE:
                os._exit(7)
            for second in range(60 if message.prompt_ids[0] == STUCK else 0):
                send([Pulse(turns=1, turn_s=second)])
                time.sleep(1)
            work(4.5 if message.prompt_ids[0] == BUSY else 0)
            if message.prompt_ids[0] == GARBAGE:
                send([{"type": "Novelty"}, *reply(message)])
                outbox.send(b"\xc1 not msgpack")
            else:
                send(reply(message))
        elif not isinstance(message, Abort):
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
