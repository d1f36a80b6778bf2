"""The compiled CPU kernels: which instruction sets they may use here, and on how many threads.

`FOVEATE_KERNELS` forces a level at or below the machine's: reference (plain torch), avx2, avx512, avx512_bf16, amx.
"""

import ctypes
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

LEVELS = ("reference", "avx2", "avx512", "avx512_bf16", "amx")  # ascending; the index is the C++ enum


@cache
def machine() -> str:
    """The highest level whose instructions have really run here; `reference` where the kernels were not built."""
    built = _module()
    return LEVELS[built.probe()] if built else "reference"


@cache
def level() -> str:
    """The level in force: the machine's, unless `FOVEATE_KERNELS` forces a lower one.

    Raises:
        ValueError: the variable holds no level, or one that this machine does not have.
    """
    return _allowed(os.environ.get("FOVEATE_KERNELS", "") or machine())


@cache
def kernels() -> ModuleType | None:
    """The compiled module, set to the level in force; None: run the reference. Tensors are passed as addresses."""
    built, index = _module(), LEVELS.index(level())
    if built is None or index == 0:
        return None
    built.set_level(index)
    return built


def version(device: "torch.device") -> Literal["reference", "cpu", "cuda"]:
    """Which versions of the operations run on a device."""
    if level() == "reference":
        return "reference"
    return "cuda" if device.type == "cuda" else "cpu"


@contextmanager
def force(name: str) -> Iterator[None]:
    """Run at another level inside, as if `FOVEATE_KERNELS` said so. For tests: not safe beside other threads."""
    _allowed(name)
    before = os.environ.get("FOVEATE_KERNELS")
    try:
        os.environ["FOVEATE_KERNELS"] = name
        _forget()
        yield
    finally:
        os.environ.pop("FOVEATE_KERNELS")
        if before is not None:
            os.environ["FOVEATE_KERNELS"] = before
        _forget()


def _forget() -> None:
    level.cache_clear()
    kernels.cache_clear()
    kernels()  # the module holds the level too


def _allowed(name: str) -> str:
    if name not in LEVELS:
        raise ValueError(f"FOVEATE_KERNELS={name!r}: there are {', '.join(LEVELS)}")
    if LEVELS.index(name) > LEVELS.index(machine()):
        raise ValueError(f"FOVEATE_KERNELS={name!r}: this machine runs {machine()}; unset it")
    return name


@cache
def _module() -> ModuleType | None:
    """The compiled module, told where torch keeps its number of threads; None where it was not built."""
    try:
        built = importlib.import_module("foveate.kernels._cpu")
    except ImportError:
        return None
    if address := _max_threads():
        built.use_openmp(address)
    return built


def _max_threads() -> int:
    """Address of omp_get_max_threads in the OpenMP runtime that torch has loaded; 0 where it has none we know."""
    import torch  # its libraries are loaded after this

    if "OpenMP" not in torch.__config__.parallel_info():
        return 0
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp5" in line}
    ours = [path for path in sorted(paths) if "torch" in path] or sorted(paths)
    return (ctypes.cast(ctypes.CDLL(ours[0]).omp_get_max_threads, ctypes.c_void_p).value or 0) if ours else 0
