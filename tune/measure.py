"""Measure agreement and cost of a method and ratio on one part of the pairs. Each point is measured only once."""

import math
from collections.abc import Callable, Sequence

import msgspec

from foveate.tune.asking import Asked, Asker, LayerCost, Outcome
from foveate.tune.state import State

_ONE_SIDED_80 = 0.841621  # quantile of the normal distribution
REDUCER, SCHEDULE, SIGMOID, BOTH = "reducer", "g-search", "p-sigmoid", "both"


class Reference(msgspec.Struct, frozen=True):
    """The unpruned answers to one part of the pairs."""

    token_ids: list[tuple[int, ...]]
    right: int | None  # answers equal to the user's answers; None unless each pair has one


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One point of the frontier. Shares are relative to the unpruned model on the same pairs."""

    kind: str  # REDUCER, SCHEDULE, SIGMOID or BOTH
    method: str  # as `budget.method`
    ratio: float  # as `budget.ratio`
    same: int  # answers equal to the unpruned ones, token by token
    asked: int
    right: int | None  # answers equal to the user's answers; None unless each pair has one
    entering: float  # share of visual tokens that enter the decoder
    layers: list[float]  # share of visual tokens in each layer
    flops: float  # share of prefill FLOPs in the decoder's layers

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


def wilson(same: int, asked: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the confidence interval of a proportion (Wilson, 1927). Default: 95 %, two-sided."""
    p = same / asked
    middle, scale = p + z * z / (2 * asked), 1 + z * z / asked
    spread = z * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def sure(same: int, asked: int, agreement: float) -> bool:
    """Return whether the agreement reaches `agreement` with 80 % confidence.

    If the pairs are too few for this confidence, all answers must agree.
    """
    return same == asked or wilson(same, asked, _ONE_SIDED_80)[0] >= agreement


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
        self.seen: list[Measured] = []  # points of the part "search", in order

    def reference(self, part: str) -> Reference:
        """Return the unpruned answers of a part."""
        if part not in self._references:
            key = f"{part} reference"
            known = self._state.get(key, Reference)
            if known is None:
                outcomes = self.asker.ask(self.parts[part], "none", 1.0, self._max_tokens)
                known = Reference([o.token_ids for o in outcomes], self._right(part, outcomes))
                self._state.put(key, known)
                self._told(f"unpruned answers to {len(outcomes)} pairs ({part})")
            self._references[part] = known
        return self._references[part]

    def measure(self, kind: str, method: str, ratio: float, part: str = "search") -> Measured:
        """Measure one point, or read the point from the state."""
        reference = self.reference(part)
        key = f"{part} {method} {ratio:.6f}"
        found = self._state.get(key, Measured)
        if found is None:
            outcomes = self.asker.ask(self.parts[part], method, ratio, self._max_tokens)
            same = sum(o.token_ids == ids for o, ids in zip(outcomes, reference.token_ids, strict=True))
            offered = sum(o.visual.offered for o in outcomes)
            by_layer = [o.by_layer(self.n_layers) for o in outcomes]
            found = Measured(
                kind=kind, method=method, ratio=ratio, same=same, asked=len(outcomes),
                right=self._right(part, outcomes),
                entering=sum(o.visual.kept for o in outcomes) / offered,
                layers=[sum(layer) / offered for layer in zip(*by_layer, strict=True)],
                flops=_flops_share(self.asker.layer, outcomes, by_layer),
            )  # fmt: skip
            self._state.put(key, found)
            self._told(f"{method} at {ratio:.3g}: {100 * found.agreement:.1f} % of {found.asked} ({part})")
        found = msgspec.structs.replace(found, kind=kind)
        if part == "search" and found not in self.seen:
            self.seen.append(found)
        return found

    def value(self, key: str, kind: type[msgspec.Struct], make: Callable[[], msgspec.Struct]) -> msgspec.Struct:
        """Return a value from the state. Compute and store a missing value."""
        found = self._state.get(key, kind)
        if found is None:
            found = make()
            self._state.put(key, found)
            self._told(key)
        return found

    def _right(self, part: str, outcomes: Sequence[Outcome]) -> int | None:
        answers = [one.answer for one in self.parts[part]]
        if any(answer is None for answer in answers):
            return None
        texts = [self.asker.text(o.token_ids) for o in outcomes]
        return sum(text == (answer or "").strip() for text, answer in zip(texts, answers, strict=True))


def _flops_share(layer: LayerCost, outcomes: Sequence[Outcome], by_layer: Sequence[Sequence[int]]) -> float:
    spent = sum(layer.prefill_flops(o.n_text + n) for o, layers in zip(outcomes, by_layer, strict=True) for n in layers)
    full = sum(
        len(layers) * layer.prefill_flops(o.n_text + o.visual.offered)
        for o, layers in zip(outcomes, by_layer, strict=True)
    )
    return spent / full
