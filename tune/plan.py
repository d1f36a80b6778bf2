"""Run the search in order: horizon, schedule, sigmoid, reducers, reducer and schedule together, choice."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from foveate.tune.heads import Heads, find_heads
from foveate.tune.measure import BOTH, REDUCER, SCHEDULE, SIGMOID, Bench, Measured, sure
from foveate.tune.search import LEVELS, fit_sigmoid, gsearch, horizon, least, table_text, with_tail

_FRONTIER = (24, 16, 8)  # levels measured for each reducer in any case
_DROPS = (1.0, 0.75, 0.5)  # behind a reducer, the schedule drops these shares of its usual drops
_INFORMED = 64  # number of pairs for the mean change of the first token's distribution
_TOP = 20  # most likely tokens compared in this distribution


class Found(msgspec.Struct, frozen=True):
    """Retrieval heads, as stored in the state."""

    block: int
    echo: list[list[float]]
    induction: list[list[float]]
    retrieval: list[tuple[int, int]]


class Changes(msgspec.Struct, frozen=True):
    """Change of the first answer token's distribution if all visual tokens are dropped from a layer on."""

    by_layer: list[float]  # total variation, in [0, 1]; the first entry is layer 1
    n_pairs: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """The results of a run. Points are from the part "search" unless stated otherwise."""

    horizon: int  # first layer from which no visual token is needed
    changes: Changes
    table: list[float]  # share per layer, from G-Search
    schedule: Measured
    sigmoid: Measured
    reducers: list[Measured]  # cheapest passing point of each reducer; keeps all tokens if no point passes
    both: Measured | None  # cheapest point of reducer and schedule together, if tried
    tried: list[Measured]  # on the part "choice", in order; the last point is the choice
    confirmed: Measured  # the choice on the part "held out"
    others: list[Measured]  # other points on the part "held out": schedule, sigmoid, reducers, both
    heads: Found
    points: list[Measured]  # all points in the order of measurement

    @property
    def chosen(self) -> Measured:
        return self.tried[-1]


def run(bench: Bench, agreement: float, methods: Sequence[str], every: int, seed: int, words: Sequence[int]) -> Result:
    """Search, choose and confirm.

    Args:
        methods: reducers, as `budget.method` names them.
        every: the schedule may change at every `every`-th layer.
        words: ordinary token ids, without special tokens.
    """
    bench.reference("search")

    def holds(kind: str, method: str, ratio: float) -> bool:
        return bench.measure(kind, method, ratio).holds(agreement)

    def table_holds(table: Sequence[float]) -> bool:
        return holds(SCHEDULE, schedule_text(table), 1.0)

    first = horizon(bench.n_layers, table_holds)
    table = gsearch(bench.n_layers, every, table_holds)
    schedule = bench.measure(SCHEDULE, schedule_text(table), 1.0)
    fit = fit_sigmoid(table)
    text = f"psigmoid;alpha={fit.alpha:g};beta={fit.beta:g};mean={fit.mean:g}"
    sigmoid = bench.measure(SIGMOID, text, 1.0)
    reducers = [_reducer(bench, method, partial(holds, REDUCER, method)) for method in methods]
    ranked = sorted(reducers, key=lambda point: (point.cost, -point.same))
    together = [point for best in ranked[:2] for point in _both(bench, best, table, partial(holds, BOTH))]
    both = min(together, key=lambda point: point.cost, default=None)
    tried = _choose(bench, agreement)
    chosen = tried[-1]
    confirmed, *others = [
        bench.measure(p.kind, p.method, p.ratio, "held out")
        for p in (chosen, schedule, sigmoid, *reducers, *([both] if both else []))
    ]
    heads = bench.value("heads", Found, lambda: _heads(find_heads(bench.asker.model, words, seed)))
    changes = bench.value("changes", Changes, lambda: _changes(bench))
    assert isinstance(heads, Found) and isinstance(changes, Changes), "kept under their own keys"
    return Result(
        horizon=first, changes=changes, table=table, schedule=schedule, sigmoid=sigmoid, reducers=reducers, both=both,
        tried=tried, confirmed=confirmed, others=others, heads=heads, points=list(bench.seen),
    )  # fmt: skip


def expected_steps(n_layers: int, n_methods: int) -> int:
    """Estimate the number of measurements of a run."""
    return 8 + n_layers.bit_length() + 4 * min(n_layers, 12) + 8 * n_methods + 30 + 6


def schedule_text(table: Sequence[float]) -> str:
    """Format a G-Search schedule for `budget.method`."""
    return f'gsearch;keep="{table_text(table)}"'


def _reducer(bench: Bench, method: str, holds: Callable[[float], bool]) -> Measured:
    """Find the fewest tokens with which a reducer alone passes. The coarse first pass also gives the frontier."""
    coarse = [level for level in _FRONTIER if holds(level / LEVELS)]
    most = min(coarse, default=LEVELS)
    step = _FRONTIER[0] - _FRONTIER[1]
    level = least(most, lambda k: holds(k / LEVELS), low=max(1, most - step + 1))
    return bench.measure(REDUCER, method, level / LEVELS)


def _both(bench: Bench, best: Measured, table: Sequence[float], holds: Callable[[str, float], bool]) -> list[Measured]:
    """Combine a reducer with the schedule and with weaker schedules. For each, find the fewest entering tokens."""
    if table[-1] == 1.0 or best.ratio == 1.0:
        return []
    found: list[Measured] = []
    for drops in _DROPS:
        text = schedule_text([1 - drops * (1 - share) for share in table])
        methods = [f"{best.method};keep={level / LEVELS:g}+{text}" for level in range(LEVELS + 1)]
        level = least(LEVELS, partial(_level_holds, methods, holds), low=round(best.ratio * LEVELS))
        if level < LEVELS:
            found.append(bench.measure(BOTH, methods[level], level / LEVELS))
    return found


def _level_holds(methods: Sequence[str], holds: Callable[[str, float], bool], level: int) -> bool:
    return holds(methods[level], level / LEVELS)


def _choose(bench: Bench, agreement: float) -> list[Measured]:
    """Try passing points on the unseen part "choice", cheapest first, until a point is sure on both parts together.

    The search takes the cheapest of many passing points, and some of these pass by luck. New pairs reject lucky points.
    A point is tried only if its agreement exceeds that of every cheaper point: after a better point has failed, a worse
    point could pass only by luck.
    """
    known = [p for p in bench.seen if p.holds(agreement) and p.cost < 1]
    tried, most = [], 0
    for point in sorted(known, key=lambda p: (p.cost, p.flops, -p.same)):
        if point.same <= most:
            continue
        most = point.same
        tried.append(bench.measure(point.kind, point.method, point.ratio, "choice"))
        if sure(point.same + tried[-1].same, point.asked + tried[-1].asked, agreement):
            return tried
    return [*tried, bench.measure(REDUCER, "none", 1.0, "choice")]


def _heads(found: Heads) -> Found:
    def rounded(rows: list[list[float]]) -> list[list[float]]:
        return [[round(x, 5) for x in row] for row in rows]

    return Found(found.block, rounded(found.echo), rounded(found.induction), found.retrieval)


def _changes(bench: Bench) -> Changes:
    """Measure the change of the first answer token's distribution if all visual tokens are dropped from a layer on."""
    some, n_layers = bench.parts["search"][:_INFORMED], bench.n_layers

    def first(method: str) -> list[dict[int, float]]:
        outcomes = bench.asker.ask(some, method, 1.0, 1, _TOP)
        return [{token: math.exp(logprob) for token, logprob, *_ in o.logprobs[0].top} for o in outcomes]

    full = first("none")
    by_layer = []
    for layer in range(1, n_layers):
        without = first(schedule_text(with_tail([1.0] * n_layers, layer, 0.0)))
        by_layer.append(sum(map(moved, full, without)) / len(some))
    return Changes([round(x, 5) for x in by_layer], len(some))


def moved(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """Return the total variation between two distributions. Tokens outside p's most likely tokens count as one."""
    gone = [(mass, q.get(token, 0.0)) for token, mass in p.items()]
    rest = abs(sum(a for a, _ in gone) - sum(b for _, b in gone))
    return (sum(abs(a - b) for a, b in gone) + rest) / 2
