"""How one decode step grows with sequences and context: the runner in process, without HTTP, on the random LLaVA.

    python -m bench.scaling                            weights as `auto` chooses
    python -m bench.scaling --set model.weights=int8 --sequences 1,8 --contexts 1024

Random numbers fill the KV pool instead of a prefill, so a cell takes seconds at any context. Every sequence has its own
blocks, scattered over the pool as in a server that has run for a while. A step is the forward of one new token per
sequence, with logits. The time is the median of several steps. The table leaves out, and names, cells whose pool does
not fit the free memory.
"""

import argparse
import time
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

from bench.limits import cost, read_bandwidth
from bench.random_model.checkpoint import add_arguments, loaded
from bench.random_model.shape import Shape
from bench.report import NO_PLOT, RESULTS, Json, provenance, pyplot, table, write
from foveate.configs.config import CacheConfig
from foveate.engine.cache.groups import LayerGroup
from foveate.engine.cache.pool import BlockPool
from foveate.engine.cache.sequence_cache import CacheSpace
from foveate.engine.cache.store import KVStore
from foveate.engine.common import SamplingParams, VisualUsage
from foveate.engine.geometry.base import ModelSpec
from foveate.engine.models.base import Model
from foveate.engine.prune.depth import Depth
from foveate.engine.request import Request
from foveate.engine.runner import Runner
from foveate.engine.scheduler import Chunk
from foveate.engine.sequence import Sequence

SEQUENCES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (1024, 4096, 16384)
_FREE_SHARE = 0.8  # of the free memory that the pool may take
_CELL_S, _FEWEST, _MOST = 2.0, 3, 40  # steps are timed until both the time and the fewest are reached


@dataclass(frozen=True)
class Cell:
    """One measured step."""

    n_sequences: int
    context: int
    step_s: float
    n_steps: int  # that the median is of

    @property
    def tokens_per_s(self) -> float:
        return self.n_sequences / self.step_s


def token_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token."""
    return 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim * dtype.itemsize


def filled(spec: ModelSpec, dtype: torch.dtype, n_tokens: int, block_tokens: int = 16) -> KVStore:
    """A pool of `n_tokens` with random contents: a stretch of normally distributed numbers, repeated."""
    memory_mb = -(-(n_tokens + block_tokens) * token_bytes(spec, dtype) // 2**20) + 1
    kv = KVStore(spec, CacheConfig(block_tokens=block_tokens, memory_mb=memory_mb), dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for pages in kv.pages:
        pattern = torch.randn(min(64, kv.n_pages), *pages.shape[1:], generator=generator).to(dtype)
        for start in range(0, kv.n_pages, len(pattern)):
            pages[start : start + len(pattern)] = pattern[: kv.n_pages - start]
    return kv


def decoding(spec: ModelSpec, kv: KVStore, n_sequences: int, context: int) -> list[Chunk]:
    """Sequences of `context` tokens. Only the last token is not computed."""
    space, chunks = CacheSpace(_scattered(kv.n_pages), kv, kv.block_tokens), []
    for i in range(n_sequences):
        request = Request(
            id=str(i),
            sampling=SamplingParams(temperature=0.0, max_tokens=1),
            stop_ids=frozenset(),
            n_choices=1,
            prompt_ids=[300 + i] * context,
            pictures=[],
            positions=torch.arange(context).expand(spec.n_pos_axes, -1),
            next_pos=context,
            root_key=b"",
            visual=VisualUsage(),
            depth=Depth(groups=(LayerGroup(range(kv.n_layers)),)),
        )
        sequence = Sequence(request=request, choice=0, arrival=i, space=space)
        assert sequence.cache.open(), "the pool was sized for the largest cell"
        sequence.cache.commit(context - 1)
        chunks.append(Chunk(sequence, context - 1, context))
    return chunks


def _scattered(n_pages: int) -> BlockPool:
    """A pool that hands out its pages in any order, as after long use."""
    pool = BlockPool(n_pages)
    blocks = pool.allocate(n_pages) or []
    for i in torch.randperm(n_pages, generator=torch.Generator().manual_seed(1)).tolist():
        pool.release([blocks[i]])
    return pool


def measure(model: Model, kv: KVStore, n_sequences: int, context: int) -> Cell:
    """Time one step, again and again."""
    runner, chunks = Runner(model, kv), decoding(model.spec, kv, n_sequences, context)
    runner.run(chunks)
    times: list[float] = []
    while len(times) < _FEWEST or (sum(times) < _CELL_S and len(times) < _MOST):
        started = time.perf_counter()
        logits = runner.run(chunks)
        logits.argmax(-1)
        times.append(time.perf_counter() - started)
    assert bool(torch.isfinite(logits).all()), "random keys and values give finite logits"
    return Cell(n_sequences, context, median(times), len(times))


def step_table(cells: Many[Cell]) -> str:
    """Milliseconds per step, and tokens per second in brackets. Rows: contexts. Columns: sequences."""
    by_place = {(cell.context, cell.n_sequences): cell for cell in cells}
    widths = sorted({cell.n_sequences for cell in cells})
    rows = []
    for context in sorted({cell.context for cell in cells}):
        row = [str(context)]
        for n in widths:
            cell = by_place.get((context, n))
            row.append(f"{1e3 * cell.step_s:.1f} ({cell.tokens_per_s:.0f})" if cell else "-")
        rows.append(row)
    return table(["context \\ sequences: ms a step (tokens/s)", *map(str, widths)], rows)


def plot(cells: Many[Cell], file: Path) -> str:
    """Draw step time and throughput over sequences, a line per context. Returns the path, or the reason for no plot."""
    if (plt := pyplot()) is None:
        return NO_PLOT
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for context in sorted({cell.context for cell in cells}):
        line = [cell for cell in cells if cell.context == context]
        n = [cell.n_sequences for cell in line]
        left.plot(n, [1e3 * cell.step_s for cell in line], marker="o", label=f"{context} tokens")
        right.plot(n, [cell.tokens_per_s for cell in line], marker="o", label=f"{context} tokens")
    for axes, what in ((left, "ms a step"), (right, "tokens/s")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(SEQUENCES, [str(n) for n in SEQUENCES])
        axes.set_xlabel("sequences")
        axes.set_ylabel(what)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(title="context")
    figure.savefig(file, dpi=120)
    return f"![step time and throughput]({file.name})"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=_numbers, default=SEQUENCES)
    parser.add_argument("--contexts", type=_numbers, default=CONTEXTS)
    add_arguments(parser)
    args = parser.parse_args()
    made_by = provenance("bench.scaling")
    model = loaded(args)
    read_bytes, _ = read_bandwidth()
    per_token, free = token_bytes(model.spec, model.dtype), psutil.virtual_memory().available * _FREE_SHARE
    places = [(n, context) for context in args.contexts for n in args.sequences]
    fitting = [(n, context) for n, context in places if n * (context + 16) * per_token <= free]
    kv = filled(model.spec, model.dtype, max(n * (context + 16) for n, context in fitting))
    cells = []
    for n, context in fitting:
        cells.append(measure(model, kv, n, context))
        print(f"{n} x {context}: {1e3 * cells[-1].step_s:.1f} ms", flush=True)
    said = f"{args.family}, weights {model.weights}, KV {model.dtype}: {per_token} bytes a token."
    if model.weights in (need := cost(Shape(), 1).token_bytes):
        floor = 1e3 * need[model.weights] / read_bytes
        said += f" Reading the weights once takes {floor:.1f} ms at the {read_bytes / 1e9:.1f} GB/s measured."
    left_out = [f"{n} x {context}" for n, context in places if (n, context) not in fitting]
    if left_out:
        said += f" Left out, the pool being larger than {free / 2**30:.0f} GiB: {', '.join(left_out)}."
    name = "scaling" if not args.set else "-".join(["scaling", *(word.partition("=")[2] for word in args.set)])
    results: Json = {"weights": model.weights, "cells": [asdict(cell) for cell in cells]}
    picture = plot(cells, RESULTS / f"{name}.png")
    write(name, "Batch scaling of a decode step", made_by, results, [said, step_table(cells), picture])


if __name__ == "__main__":
    main()
