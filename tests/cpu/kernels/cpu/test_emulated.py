"""The kernels for AVX-512, BF16 and AMX on any machine with AVX2: the same C++ sources, compiled with the intrinsics of
`emulated/immintrin.h` in place of the processor's, called through the same Python functions.

What this proves is that the sources are right, given that an instruction does what its manual says; that the machine
does is for the probe, and for the other tests of kernels where they run on such a machine.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from foveate.kernels.attention import AttentionBatch, paged_attention
from foveate.kernels.attention import reference as attention_reference
from foveate.kernels.cpu import levels
from foveate.kernels.cpu import linear as cpu_linear
from foveate.kernels.cpu.weights import INTEGERS, Form, unpack
from foveate.kernels.linear import Activation, linear
from foveate.kernels.linear import reference as linear_reference
from foveate.kernels.pack import pack
from foveate.kernels.vision_attention import reference as vision_reference
from foveate.kernels.vision_attention import vision_attention

SOURCES = Path(levels.__file__).parent
EMULATED = Path(__file__).parent / "emulated"
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = "-O0 -std=c++17 -fno-math-errno -fno-trapping-math -fPIC -Wno-psabi -Wno-ignored-attributes".split()
LEVELS = levels.LEVELS[levels.LEVELS.index("avx512") :]

pytestmark = [
    pytest.mark.skipif(levels.machine() == "reference", reason="the C++ kernels are not here, or no AVX2"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER}"),
]


def _compile(source: Path) -> Path:
    """Not optimized: that would take longer than the tests then do."""
    include = [EMULATED, Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]
    target = source.with_suffix(".o")
    command = [COMPILER, *FLAGS, *(f"-I{path}" for path in include), "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} does not compile with the emulated intrinsics:\n{done.stderr}"
    return target


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module `_cpu` built from the sources of today, each for AVX2."""
    folder = tmp_path_factory.mktemp("kernels")
    for source in SOURCES.glob("*.[ch]*"):
        text = re.sub(r"#pragma GCC target\([^)]*\)", '#pragma GCC target("avx2,fma,f16c")', source.read_text())
        (folder / source.name).write_text(text)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(_compile, sorted(folder.glob("*.cpp"), key=lambda path: "module" not in path.name)))
    library = folder / "_cpu.so"
    subprocess.run([COMPILER, "-shared", "-Wl,-Bsymbolic", "-o", library, *objects], check=True)
    spec = importlib.util.spec_from_file_location("_cpu", library)
    assert spec is not None and spec.loader is not None, "a path makes a spec"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if address := levels._max_threads():
        module.use_openmp(address)
    module.__dict__["distrust_linear"] = _distrust  # else a wrong kernel would not be the one tested
    return module


def _distrust(index: int) -> None:
    raise AssertionError(f"linear layers at {levels.LEVELS[index]} differ from those at avx2")


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest, emulated: ModuleType) -> Iterator[str]:
    """The C++ kernels at this level, wherever they are called from."""
    cpu_linear._verify.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels, "_module", lambda: emulated)
        patch.setattr(levels, "machine", lambda: LEVELS[-1])
        with levels.force(request.param):
            yield request.param
    levels._forget()
    cpu_linear._verify.cache_clear()  # what was found here says nothing about the machine


CASES: list[tuple[Form, bool, Activation, int, int, int]] = [  # form, round_inputs, activation, m, n, k
    ("float32", False, "none", 1, 40, 33),
    ("float32", False, "gelu", 30, 17, 70),
    ("bfloat16", False, "none", 1, 96, 515),
    ("bfloat16", False, "silu_gate", 13, 74, 300),
    *(("bfloat16", True, "none", m, 100, 1100) for m in (1, 2, 5, 16, 33)),
    ("bfloat16", True, "silu_gate", 7, 120, 90),
    ("bfloat16", True, "quick_gelu", 100, 50, 31),
    *((form, False, "none", m, 100, 1100) for form in INTEGERS for m in (1, 2, 16, 33)),
    ("int8", False, "silu_gate", 7, 122, 500),
    ("int4", False, "silu", 100, 50, 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_linear(
    quantized: Callable[..., Tensor], level: str, case: tuple[Form, bool, Activation, int, int, int]
) -> None:
    form, round_inputs, activation, m, n, k = case
    torch.manual_seed(m * n + k)
    gated = activation == "silu_gate"
    weight = pack(torch.randn(n, k), form, gated=gated, round_inputs=round_inputs)
    x, bias = torch.full((m, k + 3), torch.nan)[:, :k], torch.randn(n)
    x.copy_(torch.randn(m, k) * torch.logspace(-1, 1, m)[:, None])
    residual = torch.randn(m, n // 2 if gated else n)
    out = linear(x, weight, bias, activation=activation, residual=residual)
    rounds = weight.round_inputs and level in LEVELS[1:]  # what the caller allows, and some levels do
    seen = x.bfloat16().float() if rounds else quantized(x, form)
    wanted = linear_reference(seen, weight, bias, activation=activation, residual=residual)
    # An error of float32 sums, beside which a wrong product or a rounding that is not allowed stands out.
    room = 4e-7 * k**0.5 * (seen.abs() @ unpack(weight).abs().T).amax(1, keepdim=True)
    if gated:
        room = room * (1 + wanted.abs().amax(1, keepdim=True))
    assert bool(((out - wanted).abs() <= room + 1e-5).all()), (out - wanted).abs().max().item()
    alone = linear(x[m // 2 :][:1], weight, bias, activation=activation, residual=residual[m // 2 :][:1])
    assert torch.equal(alone[0], out[m // 2]), "a row does not depend on the others"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group, d", [(1, 24), (4, 64), (7, 16), (2, 128)])
def test_paged_attention(level: str, stored: torch.dtype, group: int, d: int) -> None:
    torch.manual_seed(group * d)
    queries, lengths, block_tokens, kv_heads = [1, 9, 1, 40], [1, 9, 130, 77], 16, 2
    blocks = [-(-length // block_tokens) for length in lengths]
    order = torch.randperm(sum(blocks) + 1).tolist()
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    keys, values = (torch.full((len(order), block_tokens, kv_heads, d), torch.nan).to(stored) for _ in "kv")
    for s, length in enumerate(lengths):
        for block in range(blocks[s]):
            tables[s, block] = slot = order.pop()
            rows = min(block_tokens, length - block * block_tokens)
            keys[slot, :rows], values[slot, :rows] = torch.randn(2, rows, kv_heads, d).to(stored)
    starts = [sum(queries[:s]) for s in range(len(queries) + 1)]
    q = torch.randn(starts[-1], group * kv_heads, d)
    tree = torch.eye(9, dtype=torch.bool) | (torch.rand(9, 9) < 0.5)
    masks = [None, tree, None, None]
    batch = AttentionBatch(starts, lengths, tables)
    out, lse = paged_attention(q, keys, values, batch, scale=d**-0.5, tree_mask=masks)
    wanted, wanted_lse = attention_reference(q, keys, values, batch, d**-0.5, masks)
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lse, wanted_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("d", [16, 80])
def test_vision_attention(level: str, d: int) -> None:
    torch.manual_seed(d)
    q, k, v = torch.randn(150, 3, 3, d).unbind(1)
    segments = [0, 1, 50, 150]
    out = vision_attention(q, k, v, segments, d**-0.5)
    torch.testing.assert_close(out, vision_reference(q, k, v, segments, d**-0.5), atol=2e-5, rtol=1e-4)
