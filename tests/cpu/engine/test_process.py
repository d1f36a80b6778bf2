"""What the engine process chooses where the user leaves it the choice."""

import os

import pytest
import torch

from foveate.configs.config import ModelConfig
from foveate.configs.errors import ConfigError
from foveate.engine import process


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
