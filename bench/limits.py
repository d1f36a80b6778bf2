"""Limits of the machine: the rate of matrix products at the model's shapes, and the bandwidth of reading memory.

    python -m bench.limits

Each limit is the best of several tries: a limit is the rate that can be reached, not the usual rate. Reads are timed
over a buffer far larger than the caches, on all cores at once, with a loop in C++ (if there is a compiler), numpy and
torch. `cost` gives the operations and bytes of a request, so that a time can stand beside its limit.
"""

import argparse
import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from os import sched_getaffinity
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional

from bench.random_model.shape import Shape
from bench.report import Json, provenance, table, write
from foveate.kernels.cpu.weights import FORMS, Form
from foveate.kernels.hardware.device import multiplies_bfloat16
from foveate.kernels.linear import linear
from foveate.kernels.pack import pack

BUFFER_BYTES = 1 << 30
_TRIES = 5
_PRODUCT_BYTES = 400e6  # of weights that products of few rows pass over: far more than caches hold
_PRODUCT_ROWS = (1, 2, 4, 8, 16)
_SOURCE = """
#include <cstddef>
#include <cstdint>
typedef uint64_t wide __attribute__((vector_size(32), aligned(32)));
extern "C" __attribute__((target("avx2"))) uint64_t read_all(const uint64_t* at, size_t n, size_t ahead) {
  wide a = {}, b = {}, c = {}, d = {};
  const wide* p = reinterpret_cast<const wide*>(at);
  for (size_t i = 0; i + 4 <= n / 4; i += 4) {
    __builtin_prefetch(reinterpret_cast<const char*>(p + i) + ahead);
    __builtin_prefetch(reinterpret_cast<const char*>(p + i + 2) + ahead);
    a ^= p[i]; b ^= p[i + 1]; c ^= p[i + 2]; d ^= p[i + 3];
  }
  a ^= b ^ c ^ d;
  return a[0] ^ a[1] ^ a[2] ^ a[3];
}
"""


@dataclass(frozen=True)
class Limits:
    """Rates of this machine, with all cores that this process may use."""

    gemm_flops: dict[str, float]  # by dtype, of the shapes of the tower and the decoder together, per second
    read_bytes: float  # per second
    read_by: str  # what reached it

    @property
    def best_flops(self) -> float:
        """Rate of the dtype that multiplies fastest here."""
        return max(self.gemm_flops.values())


@dataclass(frozen=True)
class Cost:
    """Least operations and bytes of one prompt and one output token."""

    tower_flops: float
    decoder_flops: float  # of the prompt
    token_bytes: dict[str, float]  # read per output token of one sequence, by form of the weights


def _linears(shape: Shape) -> list[tuple[int, int]]:
    """(outputs, inputs) of the matrices of one decoder layer, fused as all systems fuse them."""
    wide = shape.hidden + 2 * shape.kv_heads * shape.head_dim
    return [
        (wide, shape.hidden),
        (shape.hidden, shape.hidden),
        (2 * shape.inner, shape.hidden),
        (shape.hidden, shape.inner),
    ]


def decoder_weights(shape: Shape) -> int:
    """Number of values in the decoder's layers, which a step reads once, without the head."""
    return shape.layers * sum(n * k for n, k in _linears(shape))


def _tower_flops(shape: Shape, layers: int, patches: int, patch_values: int) -> int:
    """Operations of the tower's layers and of the patch embedding, each with the given number of values."""
    per_layer = 4 * shape.tower_hidden**2 + 2 * shape.tower_hidden * shape.tower_inner
    layer = 2 * patches * per_layer + 4 * patches**2 * shape.tower_hidden
    return layers * layer + 2 * patches * shape.tower_hidden * patch_values


def llava_cost(shape: Shape, text_tokens: int) -> Cost:
    """Cost of a prompt with a picture. Each patch is one token."""
    cells = (shape.side // shape.patch) ** 2
    projector = 2 * cells * (shape.tower_hidden + shape.hidden) * shape.hidden
    tower = _tower_flops(shape, shape.tower_layers - 1, cells + 1, 3 * shape.patch**2)
    return cost(shape, text_tokens + cells, tower + projector)


def qwen_cost(shape: Shape, text_tokens: int) -> Cost:
    """Cost of a prompt with a picture. Four patches, each two frames deep, are one token."""
    patches, wide = (shape.side // shape.patch) ** 2, 4 * shape.tower_hidden
    merger = 2 * patches // 4 * (wide + shape.hidden) * wide
    tower = _tower_flops(shape, shape.tower_layers, patches, 2 * 3 * shape.patch**2)
    return cost(shape, text_tokens + patches // 4, tower + merger)


def cost(shape: Shape, n: int, tower_flops: int = 0, n_outputs: int = 64) -> Cost:
    """Cost of a prompt of `n` tokens. Without tower operations all of the tokens are text."""
    weights, head = decoder_weights(shape), shape.vocab * shape.hidden
    attention = 4 * shape.layers * shape.hidden * n * (n + 1) / 2
    cached = 2 * shape.layers * shape.kv_heads * shape.head_dim * (n + n_outputs / 2) * 2  # bytes, bfloat16
    int16, int8, int4 = 2 + 4 / 128, 1 + 4 / 128, 0.5 + 4 / 64
    sizes = {"bf16": (2.0, 2.0), "int16": (int16, int16), "int8": (int8, int8), "int4": (int4, int8)}
    return Cost(
        tower_flops=float(tower_flops),
        decoder_flops=2.0 * (weights * n + head) + attention,
        token_bytes={form: weights * layer + head * last + cached for form, (layer, last) in sizes.items()},
    )


def fastest(run: Callable[[], object], tries: int = _TRIES) -> float:
    """Seconds of the fastest of several runs, because other programs only add time. The first run does not count."""
    times = []
    for _ in range(tries + 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def gemm_flops(shape: Shape, dtype: torch.dtype, rows: int = 603) -> float:
    """Rate over the matrices of a tower layer and a decoder layer, in the proportion of a prompt."""
    n = shape.tower_hidden
    tower = [(3 * n, n), (n, n), (shape.tower_inner, n), (n, shape.tower_inner)]
    work, seconds = 0.0, 0.0
    for n_out, n_in in tower + _linears(shape):
        x, weight = torch.randn(rows, n_in).to(dtype), torch.randn(n_out, n_in).to(dtype)
        flops = 2.0 * rows * n_out * n_in
        work, seconds = work + flops, seconds + fastest(partial(functional.linear, x, weight))
    return work / seconds


def _compiled() -> Callable[[int, int, int], int] | None:
    """Returns read_all(address, words, bytes to prefetch ahead), or None without a compiler or without AVX2."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.cpp", Path(folder) / "read.so"
        source.write_text(_SOURCE)
        subprocess.run([compiler, "-O3", "-shared", "-fPIC", source, "-o", library], check=True)
        read = ctypes.CDLL(str(library)).read_all
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], ctypes.c_uint64
    return lambda at, n, ahead: int(read(at, n, ahead))


def read_bandwidth(n_bytes: int = BUFFER_BYTES) -> tuple[float, str]:
    """Bytes per second that all cores read together, and the name of the fastest reader."""
    n_cores = len(sched_getaffinity(0))
    whole = np.ones(n_bytes // 8)
    parts = np.array_split(whole, n_cores)
    tensor = torch.from_numpy(whole)
    readers: dict[str, Callable[[], object]] = {"torch.sum": tensor.sum}
    with ThreadPoolExecutor(n_cores) as pool:

        def each(read: Callable[[np.ndarray], object]) -> object:
            return list(pool.map(read, parts))

        readers["numpy.dot"] = partial(each, lambda part: np.dot(part, part))
        if (read := _compiled()) is not None:
            for ahead in (0, 512, 2048):
                name = f"C++, {ahead} bytes ahead" if ahead else "C++"
                readers[name] = partial(each, partial(_read, read, ahead))
        rates = {name: n_bytes / fastest(reader) for name, reader in readers.items()}
    name = max(rates, key=lambda key: rates[key])
    return rates[name], name


def _read(read: Callable[[int, int, int], int], ahead: int, part: np.ndarray) -> int:
    return read(part.ctypes.data, part.size, ahead)


def product_bytes(shape: Shape, form: Form, rows: int) -> float:
    """Bytes of packed weights per second that our products of `rows` rows read from memory."""
    matrices = [torch.randn(n, k) for n, k in _linears(shape)]
    layers = [[pack(matrix, form) for matrix in matrices]]
    n_bytes = sum(weight.nbytes for weight in layers[0])
    while n_bytes * len(layers) < _PRODUCT_BYTES:
        layers.append([pack(matrix, form) for matrix in matrices])
    inputs = {k: torch.randn(rows, k) for _, k in _linears(shape)}

    def step() -> None:
        for layer in layers:
            for weight in layer:
                linear(inputs[weight.k], weight)

    return n_bytes * len(layers) / fastest(step)


def products_table(shape: Shape, read_bytes: float) -> str:
    """Rates of our products of few rows, and the time of these rows beside the time of one row."""
    lines = []
    for form in FORMS:
        rates = {rows: product_bytes(shape, form, rows) for rows in _PRODUCT_ROWS}
        shown = [f"{rate / 1e9:.1f} ({rates[1] / rate:.2f})" for rate in rates.values()]
        lines.append([form, f"{rates[1] / read_bytes:.2f}", *shown])
    heads = [f"{rows} rows: GB/s (cost)" for rows in _PRODUCT_ROWS]
    return table(["a layer's products", "one row / reading", *heads], lines)


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself. An emulated product is a hundred times slower than float32."""
    return multiplies_bfloat16(torch.device("cpu"))


def measure(shape: Shape) -> Limits:
    """Measure both limits now. Takes about ten seconds on two cores."""
    torch.set_num_threads(len(sched_getaffinity(0)))
    dtypes = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if native_bfloat16() else {})
    read_bytes, read_by = read_bandwidth()
    return Limits({name: gemm_flops(shape, dtype) for name, dtype in dtypes.items()}, read_bytes, read_by)


def middle(several: Sequence[Limits]) -> Limits:
    """The median of each rate."""
    flops = {name: median(limits.gemm_flops[name] for limits in several) for name in several[0].gemm_flops}
    return Limits(flops, median(limits.read_bytes for limits in several), several[-1].read_by)


def limits_table(limits: Limits) -> str:
    rows = [[f"matrix product, {name}", f"{rate / 1e9:.0f} GFLOP/s"] for name, rate in limits.gemm_flops.items()]
    rows.append([f"reading memory ({limits.read_by})", f"{limits.read_bytes / 1e9:.1f} GB/s"])
    return table(["limit of the machine", "rate"], rows)


def needs_table(limits: Limits, cost: Cost) -> str:
    """The floors: times of a prompt and of a token at the limits."""
    times: Sequence[tuple[str, float]] = [
        ("tower, one picture", 1e3 * cost.tower_flops / limits.best_flops),
        ("decoder, the prompt", 1e3 * cost.decoder_flops / limits.best_flops),
        *((f"one token, {form}", 1e3 * n / limits.read_bytes) for form, n in cost.token_bytes.items()),
    ]
    return table(["floor", "ms"], [[name, f"{ms:.1f}"] for name, ms in times])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    made_by, shape = provenance("bench.limits"), Shape()
    limits, need = measure(shape), llava_cost(shape, 27)
    results: Json = {"limits": asdict(limits), "cost": asdict(need)}
    parts = [limits_table(limits), needs_table(limits, need), products_table(shape, limits.read_bytes)]
    write("limits", "Limits of the machine", made_by, results, parts)


if __name__ == "__main__":
    main()
