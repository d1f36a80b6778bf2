"""What the engine process chooses where the user leaves it the choice, and its signs of life."""

import os
import time
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from foveate.configs.config import ModelConfig
from foveate.configs.errors import ConfigError
from foveate.engine import process
from foveate.engine.common import FromEngine, Pulse


def test_threads() -> None:
    n_cores = len(os.sched_getaffinity(0))
    assert process.choose_threads(ModelConfig(), 3_000_000) == 1, "a tiny model's operations are too short to share"
    assert process.choose_threads(ModelConfig(), 7_000_000_000) == n_cores
    assert process.choose_threads(ModelConfig(threads=3), 3_000_000) == 3, "a stated number is final"


@pytest.mark.parametrize(("machine", "native"), [("reference", False), ("avx512", False), ("amx", True)])
def test_dtype(machine: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.kernels.hardware.device.machine", lambda: machine)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert process.choose_dtype(ModelConfig(), cpu) == (torch.bfloat16 if native else torch.float32)
    assert process.choose_dtype(ModelConfig(), cuda) == torch.bfloat16
    assert process.choose_dtype(ModelConfig(dtype="bfloat16"), cpu) == torch.bfloat16
    assert process.choose_dtype(ModelConfig(dtype="float32"), cuda) == torch.float32


def test_device() -> None:
    assert process.choose_device(ModelConfig(device="cpu")) == torch.device("cpu")
    if torch.cuda.is_available():
        assert process.choose_device(ModelConfig()) == torch.device("cuda")
    else:
        assert process.choose_device(ModelConfig()) == torch.device("cpu")
        with pytest.raises(ConfigError, match=r"^model\.device: cuda, but torch sees no CUDA device"):
            process.choose_device(ModelConfig(device="cuda"))


def test_a_pulse_during_a_step_says_how_long_the_step_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_PULSE_S", 0.05)
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
        inbox.bind(f"ipc://{tmp_path}/from_engine")
        thread = process.PulseThread(tmp_path)
        thread.turn()
        thread.start()
        time.sleep(0.5)  # the main thread is in a step
        found: list[FromEngine] = []
        while inbox.poll(0):
            found += msgspec.msgpack.decode(inbox.recv(), type=list[FromEngine])
        thread.close()
    pulses = [event for event in found if isinstance(event, Pulse)]
    assert len(pulses) >= 3 and {event.turns for event in pulses} == {1}
    assert [event.turn_s for event in pulses] == sorted(event.turn_s for event in pulses) and pulses[-1].turn_s > 0.1
