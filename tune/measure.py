"""Measure agreement and cost of a method and ratio on one part of the pairs. No pair is asked twice for one point."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

from foveate.tune.asking import Asked, Asker, LayerCost, Outcome
from foveate.tune.data import SEARCH
from foveate.tune.state import State

_STEP = 64  # pairs between two looks at the number of changed answers
REDUCER, SCHEDULE, SIGMOID, BOTH = "reducer", "g-search", "p-sigmoid", "both"


class Reference(msgspec.Struct, frozen=True):
    """The unpruned answers to one part of the pairs."""

    token_ids: list[tuple[int, ...]]
    right: int | None  # answers equal to the user's answers; None unless each pair has one


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over some pairs under one method and ratio."""

    changed: list[int]  # places, within the part, of the pairs whose answers differ from the unpruned ones
    asked: int
    right: int | None  # answers equal to the user's answers; None unless each pair has one
    offered: int  # visual tokens without pruning
    entering: int  # visual tokens that enter the decoder
    layers: list[int]  # visual tokens in each layer
    flops: int  # prefill FLOPs in the decoder's layers
    flops_unpruned: int

    def __add__(self, other: "Tally") -> "Tally":
        mine, theirs = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        numbers = {name: mine[name] + theirs[name] for name in mine if name not in ("changed", "right", "layers")}
        known = self.right is not None and other.right is not None
        right = mine["right"] + theirs["right"] if known else None
        layers = [a + b for a, b in zip(self.layers, other.layers, strict=True)]
        return Tally(changed=self.changed + other.changed, right=right, layers=layers, **numbers)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One point of the frontier. Shares are relative to the unpruned model on the same pairs."""

    kind: str  # REDUCER, SCHEDULE, SIGMOID or BOTH
    method: str  # as `budget.method`
    ratio: float  # as `budget.ratio`
    same: int  # answers equal to the unpruned ones, token by token
    asked: int  # fewer than the part has, if too many answers changed
    spread: float  # squared deviations of a picture's changed answers from the mean share, summed over pictures
    right: int | None  # answers equal to the user's answers; None unless each pair has one
    entering: float  # share of visual tokens that enter the decoder
    layers: list[float]  # share of visual tokens in each layer
    flops: float  # share of prefill FLOPs in the decoder's layers

    @property
    def misses(self) -> int:
        """Changed answers."""
        return self.asked - self.same

    @property
    def agreement(self) -> float:
        return self.same / self.asked

    @property
    def cost(self) -> float:
        """Visual token-layers."""
        return sum(self.layers) / len(self.layers)

    def holds(self, agreement: float) -> bool:
        """Return whether the agreement on the measured pairs reaches `agreement`."""
        return self.same >= agreement * self.asked - 1e-9


def design_effect(points: Iterable[Measured]) -> float:
    """Return how much more the number of changed answers varies over pictures than with independent answers.

    The pooled ratio of both variances, at least 1 (Kish, 1965). A picture that is hard to read changes several answers.
    """
    known = list(points)
    independent = sum(p.misses * p.agreement for p in known)
    return max(1.0, sum(p.spread for p in known) / independent) if independent else 1.0


class Bench:
    """Measures points on parts of the pairs.

    Args:
        parts: pairs by the name of the part.
        told: called with a line of text for each new measurement.
    """

    def __init__(
        self,
        asker: Asker,
        parts: dict[str, list[Asked]],
        state: State,
        max_tokens: int,
        told: Callable[[str], None],
    ) -> None:
        self.asker = asker
        self.parts = parts
        self.n_layers = asker.model.spec.n_layers
        self._state = state
        self._max_tokens = max_tokens
        self._told = told
        self._references: dict[str, Reference] = {}
        self._seen: dict[tuple[str, float], Measured] = {}  # by method and ratio

    def reference(self, part: str) -> Reference:
        """Return the unpruned answers of a part."""
        if part not in self._references:
            key = f"{part} reference"
            known = self._state.get(key, Reference)
            if known is None:
                outcomes = self.asker.ask(self.parts[part], "none", 1.0, self._max_tokens)
                known = Reference([o.token_ids for o in outcomes], self._right(self.parts[part], outcomes))
                self._state.put(key, known)
                self._told(f"unpruned answers to {len(outcomes)} pairs ({part})")
            self._references[part] = known
        return self._references[part]

    def measure(self, kind: str, method: str, ratio: float, part: str = SEARCH, most: int | None = None) -> Measured:
        """Measure one point, or read the point from the state.

        Args:
            most: changed answers that are of interest. With more, the measurement stops early. None: ask every pair.
        """
        n, total, fresh = len(self.parts[part]), None, False
        for start in range(0, n, _STEP):
            if total is not None and most is not None and len(total.changed) > most:
                break
            key = f"{part} {method} {ratio:.6f} {start}"
            tally = self._state.get(key, Tally)
            if tally is None:
                tally, fresh = self._ask(part, start, method, ratio), True
                self._state.put(key, tally)
            total = tally if total is None else total + tally
        assert total is not None, "every part has a pair"
        found = Measured(
            kind=kind, method=method, ratio=ratio, same=total.asked - len(total.changed), asked=total.asked,
            spread=self._spread(part, total), right=total.right,
            entering=total.entering / total.offered,
            layers=[layer / total.offered for layer in total.layers],
            flops=total.flops / total.flops_unpruned,
        )  # fmt: skip
        if fresh:
            self._told(f"{method} at {ratio:.3g}: {100 * found.agreement:.1f} % of {found.asked} ({part})")
        if part == SEARCH:
            self._seen[method, ratio] = found
        return found

    @property
    def seen(self) -> list[Measured]:
        """Points of the part "search", in order of their first measurement."""
        return list(self._seen.values())

    def _ask(self, part: str, start: int, method: str, ratio: float) -> Tally:
        asked = self.parts[part][start : start + _STEP]
        token_ids = self.reference(part).token_ids[start : start + _STEP]
        outcomes = self.asker.ask(asked, method, ratio, self._max_tokens)
        answers = enumerate(zip(outcomes, token_ids, strict=True), start)
        by_layer = [o.by_layer(self.n_layers) for o in outcomes]
        flops, unpruned = _flops(self.asker.layer, outcomes, by_layer)
        return Tally(
            changed=[i for i, (outcome, ids) in answers if outcome.token_ids != ids],
            asked=len(outcomes),
            right=self._right(asked, outcomes),
            offered=sum(o.visual.offered for o in outcomes),
            entering=sum(o.visual.kept for o in outcomes),
            layers=[sum(layer) for layer in zip(*by_layer, strict=True)],
            flops=flops,
            flops_unpruned=unpruned,
        )

    def _spread(self, part: str, total: Tally) -> float:
        pictures = [one.image.digest for one in self.parts[part][: total.asked]]
        changed, share = Counter(pictures[i] for i in total.changed), len(total.changed) / total.asked
        return sum((changed[picture] - share * n) ** 2 for picture, n in Counter(pictures).items())

    def value(self, key: str, kind: type[msgspec.Struct], make: Callable[[], msgspec.Struct]) -> msgspec.Struct:
        """Return a value from the state. Compute and store a missing value."""
        found = self._state.get(key, kind)
        if found is None:
            found = make()
            self._state.put(key, found)
            self._told(key)
        return found

    def _right(self, asked: Sequence[Asked], outcomes: Sequence[Outcome]) -> int | None:
        answers = [one.answer for one in asked]
        if any(answer is None for answer in answers):
            return None
        texts = [self.asker.text(o.token_ids) for o in outcomes]
        return sum(text == (answer or "").strip() for text, answer in zip(texts, answers, strict=True))


def _flops(layer: LayerCost, outcomes: Sequence[Outcome], by_layer: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the prefill FLOPs in the decoder's layers, as spent and without pruning."""
    spent = sum(layer.prefill_flops(o.n_text + n) for o, layers in zip(outcomes, by_layer, strict=True) for n in layers)
    full = sum(
        len(layers) * layer.prefill_flops(o.n_text + o.visual.offered)
        for o, layers in zip(outcomes, by_layer, strict=True)
    )
    return spent, full
