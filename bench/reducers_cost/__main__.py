"""Cost of a method beside its gain, on the random LLaVA: 576 visual tokens, a decoder of 0.5 B parameters.

    python -m bench.reducers_cost                  every method at 50, 25 and 11 %; then pages that are half blank
    python -m bench.reducers_cost --methods divprune visionzip --ratios 0.25 --pages 0

The bench runs in process with cached features. A reducer's time is the time of its own code and of mixing its rows. The
saved prefill is the decoder's forward of all tokens less the forward of the kept tokens, both with 27 tokens of text. A
column beside it has the time that recording the method's signals adds to the tower. For methods before the tower, the
time is the time of ranking the pixels; for methods inside the tower, the time of their code between the tower's layers.
The tower's own time falls. Pages go through a server: TTFT is measured at the client, and no page comes twice.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import foveate.engine.reduce.methods as family
from bench.limits import fastest
from bench.random_model.checkpoint import build
from bench.reducers_cost.pages import PAGE_RATIO, PAGE_TARGET, SIDE, page, page_table, pages, pixels_of
from bench.report import Json, provenance, table, write
from bench.scaling import decoding, filled
from foveate.configs.errors import ConfigError
from foveate.configs.load import load as load_config
from foveate.engine.common import OF_REQUEST, Grid, Signal, names
from foveate.engine.methods import build_reducer
from foveate.engine.models.base import Model
from foveate.engine.process import load
from foveate.engine.reduce.base import Reducer
from foveate.engine.reduce.cut import EncoderCut, PixelCut, plan
from foveate.engine.runner import Runner
from foveate.engine.scheduler import Chunk
from foveate.engine.vision import RowCut, TokenTransform, VisualInputs

RATIOS = (0.5, 0.25, 0.11)
TEXT_TOKENS = 27
TARGET = 0.10


@dataclass(frozen=True)
class Cost:
    """One method at one budget, seconds."""

    method: str
    ratio: float
    reduce_s: float
    saved_s: float  # of the decoder's prefill
    signals_s: float  # what recording its signals adds to the tower
    tower_s: float | None = None  # of a tower that is cut

    @property
    def share(self) -> float:
        return self.reduce_s / self.saved_s


def prefill_s(model: Model, counts: Sequence[int]) -> dict[int, float]:
    """Seconds of the decoder's forward, by number of visual tokens, with the text and the logits of the last row."""
    most = max(counts) + TEXT_TOKENS
    kv = filled(model.spec, model.dtype, most)
    runner, found = Runner(model, kv), {}
    for n in counts:
        (chunk,) = decoding(model.spec, kv, 1, n + TEXT_TOKENS)
        cache = chunk.sequence.cache
        cache.truncate(cache.n_computed)
        assert cache.grow(), "the pages were there before"
        whole = [Chunk(chunk.sequence, 0, n + TEXT_TOKENS)]
        found[n] = fastest(lambda whole=whole: runner.run(whole), 2)  # type: ignore[misc]
    return found


@dataclass(frozen=True, kw_only=True)
class Clocked(EncoderCut):
    """A method inside the tower, and its time in each call."""

    inner: RowCut
    spent_s: list[float]

    def cut(self, inputs: VisualInputs, k: int, layer: int, size: Tensor) -> TokenTransform:
        started = time.perf_counter()
        transform = self.inner.cut(inputs, k, layer, size)
        self.spent_s.append(time.perf_counter() - started)
        return transform

    def is_weighing(self) -> bool:
        return self.inner.is_weighing()

    def spread(self, rows: Tensor, reduced: Tensor) -> Tensor:
        return self.inner.spread(rows, reduced)


class Costs:
    """One picture, its features with all signals, and the tower's time for each set of signals."""

    def __init__(self, model: Model, reducers: dict[str, Reducer], side: int) -> None:
        self._model, self._picture = model, pixels_of(page(0, side).rotate(45, fillcolor="grey"))
        wanted = frozenset[Signal]().union(*(r.wanted(model.spec.tower) for r in reducers.values()))
        question = model.embed(torch.arange(300, 315))
        (seen,) = model.encode([self._picture], frozenset(s for s in wanted if s.kind not in OF_REQUEST))
        self._seen = replace(seen, question=question, caption=question, pixels=self._picture, seed=1)
        self._tower_s: dict[frozenset[Signal], float] = {}
        self.plain_s = self._tower(frozenset())

    def _tower(self, signals: frozenset[Signal]) -> float:
        if signals not in self._tower_s:
            self._tower_s[signals] = fastest(lambda: self._model.encode([self._picture], signals), 2)
        return self._tower_s[signals]

    def of(self, name: str, reducer: Reducer, ratio: float, saved_s: float) -> Cost:
        grid, budget = self._seen.grid, round(self._seen.n * ratio)
        if isinstance(reducer, PixelCut | EncoderCut):
            return self._cut(Cost(name, ratio, 0.0, saved_s, 0.0), reducer, grid, budget)
        reads = frozenset(s for s in reducer.wanted(self._model.spec.tower) if s.kind not in OF_REQUEST)
        signals_s = self._tower(reads) - self.plain_s
        return Cost(name, ratio, fastest(lambda: _reduced(reducer, self._seen, budget)), saved_s, signals_s)

    def _cut(self, cost: Cost, reducer: Reducer, grid: Grid, budget: int) -> Cost:
        worths = [reducer.worth(self._picture, grid)] if isinstance(reducer, PixelCut) else []
        cut = plan(reducer, self._model.spec.tower, grid, budget, worths).cut
        assert cut is not None, "a budget below all cells cuts"
        spent_s: list[float] = []
        clocked = [replace(c, method=Clocked(inner=c.method, spent_s=spent_s)) for c in cut.layers]
        cut = replace(cut, layers=tuple(clocked))
        tower_s = fastest(lambda: self._model.encode_cut(self._picture, frozenset(), cut), 2)
        if isinstance(reducer, PixelCut):
            return replace(cost, tower_s=tower_s, reduce_s=fastest(lambda: reducer.worth(self._picture, grid)))
        return replace(cost, tower_s=tower_s, reduce_s=sum(spent_s) / 3)  # of three runs


def _reduced(reducer: Reducer, seen: VisualInputs, budget: int) -> Tensor:
    transform = reducer.reduce(seen, budget)
    return transform.apply_to(seen.proj, seen.enc, seen.project)


def methods(model: Model, chosen: Sequence[str]) -> dict[str, Reducer]:
    """Every method that fits this tower, or the chosen methods."""
    found = {}
    for name in chosen or names(family):
        reducer = build_reducer(name, {})
        try:
            reducer.wanted(model.spec.tower)
        except ConfigError:
            continue
        if name != "none":
            found[name] = reducer
    return found


@torch.inference_mode()
def measure(model: Model, chosen: Sequence[str], ratios: Sequence[float], side: int = SIDE) -> tuple[list[Cost], str]:
    """Costs of every method at every budget, and the times of tower and prefill in words.

    Args:
        side: pixels along the edge of the picture that the model reads.
    """
    reducers = methods(model, chosen)
    costs = Costs(model, reducers, side)
    n = model.geometry.grid(side, side).n_tokens
    takes = prefill_s(model, [n, *(round(n * ratio) for ratio in ratios)])
    found = []
    for name, reducer in reducers.items():
        found += [costs.of(name, reducer, r, takes[n] - takes[round(n * r)]) for r in ratios]
        print(f"{name}: {', '.join(f'{1e3 * c.reduce_s:.1f}' for c in found[-len(ratios) :])} ms", flush=True)
    prefills = ", ".join(f"{1e3 * seconds:.0f} ms of {count}" for count, seconds in takes.items())
    said = f"Tower: {1e3 * costs.plain_s:.0f} ms. Prefill of visual tokens and {TEXT_TOKENS} of text: {prefills}."
    return found, said


def cost_table(costs: Sequence[Cost]) -> str:
    """Rows: methods, the dearest first. Columns: the reducer's ms by budget, and their share of the saved prefill."""
    ratios = sorted({cost.ratio for cost in costs}, reverse=True)
    by_name: dict[str, list[Cost]] = {}
    for cost in costs:
        by_name.setdefault(cost.method, []).append(cost)
    rows = []
    for name, own in sorted(by_name.items(), key=lambda item: -max(c.share for c in item[1])):
        told = [f"{1e3 * c.reduce_s:.1f} ({100 * c.share:.1f} %)" for c in own]
        tower = ", ".join("-" if c.tower_s is None else f"{1e3 * c.tower_s:.0f}" for c in own)
        within = "yes" if all(c.share <= TARGET for c in own) else "no"
        rows.append([name, *told, f"{1e3 * own[0].signals_s:.0f}", tower if own[0].tower_s else "-", within])
    header = ["method", *(f"{100 * r:g} %: ms (of saved)" for r in ratios)]
    return table([*header, "signals ms", "cut tower ms", f"<= {TARGET:.0%}"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reducers_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=[], help="only these")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--pages", type=int, default=3, help="half-blank pages per method; 0: none")
    parser.add_argument("--models", type=Path, default=Path(".peers/models"), help="where the random model is or goes")
    args = parser.parse_args()
    made_by, folder = provenance("bench.reducers_cost"), args.models / "llava"
    build("llava", folder)
    model = load(load_config(None, [f"model.path={folder}"]))
    costs, said = measure(model, args.methods, args.ratios)
    sections = [said, cost_table(costs)]
    del model
    found = pages(folder, args.pages) if args.pages else []
    if found:
        why = f"A page of {SIDE} x {SIDE} whose lower half is blank, {PAGE_RATIO:.0%} of the tokens, through the server"
        sections += [f"{why}; the target of what spares the tower is {PAGE_TARGET:.2f} of the full TTFT:"]
        sections += [page_table(found)]
    results: Json = {"costs": [asdict(cost) for cost in costs], "pages": [asdict(one) for one in found]}
    write("reducers_cost", "What methods cost and save", made_by, results, sections)


if __name__ == "__main__":
    main()
