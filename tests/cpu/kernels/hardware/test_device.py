"""What callers may ask of a device."""

import subprocess
import sys

import pytest
import torch

from foveate.kernels.cpu.levels import LEVELS, force, machine
from foveate.kernels.hardware import device as hardware

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RUNNABLE = LEVELS[: LEVELS.index(machine()) + 1]


@pytest.mark.parametrize("present", [False, True])
def test_auto_is_cuda_where_there_is_one(present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert hardware.find("auto") == (CUDA if present else CPU)
    assert hardware.find("cuda") == (CUDA if present else None)
    assert hardware.find("cpu") == CPU


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16_is_what_has_run_here(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what is forced: a lower level changes our kernels and not the processor."""
    monkeypatch.setattr(hardware, "machine", lambda: level)
    monkeypatch.setattr(hardware, "level", lambda: "avx2")
    assert hardware.multiplies_bfloat16(CPU) == (level in ("avx512_bf16", "amx"))
    assert hardware.multiplies_bfloat16(CUDA)
    assert hardware.rounded_form() == "int16", "our kernels run at the level that is forced"


@pytest.mark.parametrize("level", RUNNABLE)
def test_the_cpu_packs_unless_it_runs_the_reference(level: str) -> None:
    with force(level):
        assert hardware.packs(CPU) == (level != "reference")
        assert hardware.describe(CPU) == level
        assert (hardware.packs(CUDA), hardware.describe(CUDA)) == (False, "torch")
    assert hardware.packed_forms(CPU) and not hardware.packed_forms(CUDA)


def test_pages_are_as_they_are_asked_for() -> None:
    pages = hardware.empty_pages((3, 4, 2, 8), torch.bfloat16, CPU)
    assert pages.shape == (3, 4, 2, 8) and pages.dtype == torch.bfloat16 and pages.is_contiguous()
    assert hardware.empty_pages((2, 5), torch.float32, torch.device("meta")).device.type == "meta"
    assert hardware.free_bytes(CPU) is None


@pytest.mark.parametrize("level", RUNNABLE)
def test_a_process_is_prepared_with_its_threads(level: str) -> None:
    """In a process of its own: memory that is kept stays kept."""
    program = (
        "import logging, torch; logging.basicConfig(level=logging.INFO)\n"
        "from foveate.kernels.hardware.device import prepare\n"
        "prepare(torch.device('cpu'), 3); print(torch.get_num_threads())\n"
        "prepare(torch.device('cuda'), 5); print(torch.get_num_threads())"
    )
    with force(level):
        done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "3"]
    assert (f"CPU kernels run at level {level}" in done.stderr) == (level != LEVELS[-1])
