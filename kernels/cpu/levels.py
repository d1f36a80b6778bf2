"""The levels of the CPU: which instruction sets its C++ kernels may use here, and on how many threads they run.

`FOVEATE_KERNELS` forces a level at or below the machine's: reference (plain torch, for every operation), avx2, avx512,
avx512_bf16, amx.
"""

import ctypes
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

LEVELS = ("reference", "avx2", "avx512", "avx512_bf16", "amx")  # ascending; the index is the C++ enum


@cache
def machine() -> str:
    """The highest level whose instructions have really run here; `reference` where the C++ was not compiled."""
    module = _module()
    return LEVELS[module.probe()] if module else "reference"


@cache
def forced() -> str:
    """The level that `FOVEATE_KERNELS` asks for; empty: none."""
    return os.environ.get("FOVEATE_KERNELS", "")


@cache
def level() -> str:
    """The level in force: the machine's, unless `FOVEATE_KERNELS` forces a lower one.

    Raises:
        ValueError: the variable holds no level, or one that this machine does not have.
    """
    return _allowed(forced() or machine())


@cache
def extension() -> ModuleType:
    """The extension module `foveate.kernels._cpu`, set to the level in force. Tensors are passed as addresses."""
    module, index = _module(), LEVELS.index(level())
    assert module is not None and index > 0, "the reference runs where there is no C++"
    module.set_level(index)
    return module


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
    for found in (forced, level, extension):
        found.cache_clear()
    if level() != "reference":
        extension()  # the module holds the level too


def _allowed(name: str) -> str:
    if name not in LEVELS:
        raise ValueError(f"FOVEATE_KERNELS={name!r}: there are {', '.join(LEVELS)}")
    if LEVELS.index(name) > LEVELS.index(machine()):
        raise ValueError(f"FOVEATE_KERNELS={name!r}: this machine runs {machine()}; unset it")
    return name


@cache
def _module() -> ModuleType | None:
    """The extension module, told where torch keeps its number of threads; None where it was not compiled."""
    try:
        module = importlib.import_module("foveate.kernels._cpu")
    except ImportError:
        return None
    if address := _max_threads():
        module.use_openmp(address)
    return module


def _max_threads() -> int:
    """Address of omp_get_max_threads in the OpenMP runtime that torch has loaded; 0 where it has none we know."""
    import torch  # its libraries are loaded after this

    if "OpenMP" not in torch.__config__.parallel_info():
        return 0
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp5" in line}
    known = [path for path in sorted(paths) if "torch" in path] or sorted(paths)
    return (ctypes.cast(ctypes.CDLL(known[0]).omp_get_max_threads, ctypes.c_void_p).value or 0) if known else 0
