"""One table: operation -> its versions `reference`, `cpu` and `cuda`; and the choice among them for a call.

Each file directly in `kernels/` is an operation. It holds the public function and `reference`, the definition in plain
torch, which runs everywhere. `kernels/cpu/<operation>.py` is its version for the CPU, `kernels/cuda/<operation>.py` the
one for CUDA. A version's file holds

    run     the parameters of `reference`, and the same result up to rounding
    TAKES   for each dtype that the public function passes to `choose`, in that order, the dtypes that `run` takes

The file names are the registration; there is no list to edit. `FOVEATE_KERNELS=reference` forces the reference of every
operation on every device.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch

import foveate.kernels as folder
from foveate.kernels.cpu.levels import forced, level

VERSIONS = ("cpu", "cuda")  # beside the reference; also the names of their folders and of torch's devices
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Versions:
    """The functions that compute one operation, all with the same parameters. None: there is no such version."""

    reference: Callable[..., Any]
    cpu: Callable[..., Any] | None
    cuda: Callable[..., Any] | None


def choose(reference: _Function, device: torch.device, *dtypes: torch.dtype) -> _Function:
    """The version that runs on `device` with tensors of these dtypes: `reference` or one with its parameters.

    A choice is made once; after that a call costs one look-up.

    Raises:
        ValueError: `FOVEATE_KERNELS` holds no level, or one that this machine does not have.
    """
    chosen: _Function = _chosen(reference, device, forced(), dtypes)
    return chosen


def version(device: torch.device) -> str:
    """Which versions of operations run on a device if they take the dtypes: `reference`, `cpu` or `cuda`."""
    kind = device.type
    if forced() == "reference" or kind not in VERSIONS or (kind == "cpu" and level() == "reference"):
        return "reference"
    return kind


def operations() -> list[str]:
    """The operations there are: the names of the files in `kernels/`."""
    modules = pkgutil.iter_modules(folder.__path__)
    return sorted(m.name for m in modules if not m.ispkg and not m.name.startswith("_"))  # `_cpu` is the C++


def table() -> dict[str, Versions]:
    """operation -> its versions, of all operations there are, whether or not a version runs here."""
    return {operation: _versions(operation) for operation in operations()}


def version_of(operation: str, version: str) -> ModuleType | None:
    """The file of a version, `cpu` or `cuda`; None: the operation has no such version."""
    package = importlib.import_module(f"{folder.__name__}.{version}")
    if operation not in {module.name for module in pkgutil.iter_modules(package.__path__)}:
        return None
    return importlib.import_module(f"{package.__name__}.{operation}")


def _versions(operation: str) -> Versions:
    cpu, cuda = (version_of(operation, version) for version in VERSIONS)
    reference = importlib.import_module(f"{folder.__name__}.{operation}").reference
    return Versions(reference, cpu.run if cpu else None, cuda.run if cuda else None)


@cache
def _chosen(
    reference: Callable[..., Any], device: torch.device, forced_level: str, dtypes: tuple[torch.dtype, ...]
) -> Any:
    kind = version(device)
    module = None if kind == "reference" else version_of(reference.__module__.rpartition(".")[2], kind)
    if module is None or not all(dtype in taken for dtype, taken in zip(dtypes, module.TAKES, strict=True)):
        return reference
    return module.run
