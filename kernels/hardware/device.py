"""What callers ask of a device, so that they never branch on hardware themselves."""

import logging

import torch
from torch import Tensor

from foveate.kernels.cpu.levels import LEVELS, level, machine
from foveate.kernels.cpu.memory import Arena, keep_freed
from foveate.kernels.cpu.weights import FORMS, Form

log = logging.getLogger("foveate.kernels.device")

_BFLOAT16 = ("avx512_bf16", "amx")  # the levels that multiply bfloat16


def find(name: str) -> torch.device | None:
    """The device "cpu" or "cuda"; for "auto" CUDA where there is one, else the CPU. None: torch sees no such device."""
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    return torch.device(name) if has_cuda or name != "cuda" else None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16. Elsewhere torch emulates it, a hundred times slower than float32.

    Of a CPU the answer is yes only where such an instruction has run; no where the C++ that tries it is missing.
    """
    return device.type != "cpu" or machine() in _BFLOAT16


def prepare(device: torch.device, n_threads: int) -> None:
    """Set the process up for serving from a device, after the model has been loaded.

    Args:
        n_threads: of the operations on the CPU; without effect on CUDA.
    """
    if device.type != "cpu":
        return
    torch.set_num_threads(n_threads)
    keep_freed()  # not before: what loading frees is given back
    if level() != LEVELS[-1]:
        log.info("CPU kernels run at level %s; levels: %s", level(), ", ".join(LEVELS))


def describe(device: torch.device) -> str:
    """The kernels that run on a device: the level in force on the CPU, "torch" on CUDA."""
    return level() if device.type == "cpu" else "torch"


def is_lost(error: BaseException) -> bool:
    """Whether an error says that this process cannot use its device any more.

    An error of a CUDA kernel stays: every later call raises the same error. Too little memory is no such error.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and str(error).startswith(("CUDA error", "CUDA driver error", "cuDNN error"))
    )


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None on the CPU, whose memory belongs to other programs too."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def empty_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor for the pages of a cache.

    On the CPU in huge pages: what a step reads lies scattered, and every small page costs a walk of the tables.
    """
    return Arena().empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def packed_forms(device: torch.device) -> tuple[Form, ...]:
    """The forms that a matrix can be packed in on a device; on CUDA a matrix is always a plain tensor."""
    return FORMS if device.type == "cpu" else ()


def packs(device: torch.device) -> bool:
    """Whether products with packed matrices are faster there than torch's with plain tensors."""
    return device.type == "cpu" and level() != "reference"


def rounded_form() -> Form:
    """The form of 16 bits for products whose inputs may be rounded to 16 bits too.

    It is bfloat16, or int16 where the level in force multiplies no bfloat16.
    """
    return "bfloat16" if level() in (*_BFLOAT16, "reference") else "int16"
