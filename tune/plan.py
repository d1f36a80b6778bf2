"""Run the search in order: horizon, schedule, sigmoid, reducers, reducer and schedule together, choice."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from foveate.tune.choice import Candidate, candidates, confirm, most_misses
from foveate.tune.confidence import allowed_misses, confirms
from foveate.tune.data import CHOICE, HELD_OUT, SEARCH
from foveate.tune.heads import Heads, find_heads
from foveate.tune.measure import BOTH, REDUCER, SCHEDULE, SIGMOID, Bench, Measured, design_effect
from foveate.tune.search import LEVELS, fit_sigmoid, gsearch, horizon, least, table_text, with_tail

_FRONTIER = (28, 24, 16, 8)  # levels measured for each reducer in any case
_DROPS = (1.0, 0.75, 0.5)  # behind a reducer, the schedule drops these shares of its usual drops
_INFORMED = 64  # number of pairs for the mean change of the first token's distribution
_NEAR = 5  # points that change at most so many times the share that the wish allows show the design effect
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
    target: float  # agreement with which a point holds: the least that the part "held out" confirms
    limit: int  # changed answers on "search" and "choice" that a candidate may have
    effect: float  # design effect of several questions about one picture, for the bounds on the part "held out"
    candidates: list[Candidate]  # cheapest first
    tests: list[Measured]  # candidates on the part "held out", safest first; only the last one can have failed
    confirmed: Measured  # the cheapest confirmed point on the part "held out"; the unpruned model if there is none
    heads: Found
    points: list[Measured]  # all points in the order of measurement

    @property
    def failed(self) -> Measured | None:
        """The test that was not confirmed, if any."""
        return self.tests[-1] if self.tests and self.tests[-1] != self.confirmed else None


def run(bench: Bench, agreement: float, methods: Sequence[str], every: int, seed: int, words: Sequence[int]) -> Result:
    """Search, choose and confirm.

    Args:
        methods: reducers, as `budget.method` names them.
        every: the schedule may change at every `every`-th layer.
        words: ordinary token ids, without special tokens.
    """
    n = {part: len(pairs) for part, pairs in bench.parts.items()}
    target = 1 - allowed_misses(n[HELD_OUT], agreement) / n[HELD_OUT]
    assert agreement <= target <= 1, "the caller gives pairs enough to confirm the agreement"
    bench.reference(SEARCH)
    most = int((1 - target) * n[SEARCH] + 1e-9)

    def holds(kind: str, method: str, ratio: float) -> bool:
        return bench.measure(kind, method, ratio, most=most).holds(target)

    def ask(point: Measured, part: str, most: int) -> Measured:
        return bench.measure(point.kind, point.method, point.ratio, part, most)

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
    limit = most_misses(n[SEARCH] + n[CHOICE], agreement)
    tried = candidates([p for p in bench.seen if p.holds(target)], limit, ask)
    effect = design_effect(p for p in bench.seen if p.misses <= _NEAR * (1 - agreement) * p.asked)

    def passes(point: Measured) -> bool:
        return confirms(point.misses, point.asked, agreement, effect)

    tests = confirm(tried, n[HELD_OUT], ask, passes)
    passed = [p for p in tests if passes(p)]
    confirmed = passed[-1] if passed else bench.measure(REDUCER, "none", 1.0, HELD_OUT)
    heads = bench.value("heads", Found, lambda: _heads(find_heads(bench.asker.model, words, seed)))
    changes = bench.value("changes", Changes, lambda: _changes(bench))
    assert isinstance(heads, Found) and isinstance(changes, Changes), "kept under their own keys"
    return Result(
        horizon=first, changes=changes, table=table, schedule=schedule, sigmoid=sigmoid, reducers=reducers, both=both,
        target=target, limit=limit, effect=effect, candidates=tried, tests=tests, confirmed=confirmed, heads=heads,
        points=bench.seen,
    )  # fmt: skip


def expected_steps(n_layers: int, n_methods: int) -> int:
    """Estimate the number of measurements of a run."""
    return 8 + n_layers.bit_length() + 4 * min(n_layers, 12) + 9 * n_methods + 40


def schedule_text(table: Sequence[float]) -> str:
    """Format a G-Search schedule for `budget.method`."""
    return f'gsearch;keep="{table_text(table)}"'


def _reducer(bench: Bench, method: str, holds: Callable[[float], bool]) -> Measured:
    """Find the fewest tokens with which a reducer alone passes. The coarse first pass also gives the frontier."""
    coarse = [level for level in _FRONTIER if holds(level / LEVELS)]
    most = min(coarse, default=LEVELS)
    below = max((level for level in _FRONTIER if level < most), default=0)
    level = least(most, lambda k: holds(k / LEVELS), low=below + 1)
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


def _heads(found: Heads) -> Found:
    def rounded(rows: list[list[float]]) -> list[list[float]]:
        return [[round(x, 5) for x in row] for row in rows]

    return Found(found.block, rounded(found.echo), rounded(found.induction), found.retrieval)


def _changes(bench: Bench) -> Changes:
    """Measure the change of the first answer token's distribution if all visual tokens are dropped from a layer on."""
    some, n_layers = bench.parts[SEARCH][:_INFORMED], bench.n_layers

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
