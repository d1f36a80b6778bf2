"""A composition of methods, `pixelprune+divprune`: each reduces what the one before leaves."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from foveate.engine.common.grid import Grid
from foveate.engine.reduce.base import Reducer
from foveate.engine.reduce.sharing import AREA, Split
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal, Tower
from foveate.engine.vision.transform import TokenTransform


class Step(NamedTuple):
    budget: int
    n_left: int  # at most the budget


@dataclass(frozen=True, kw_only=True)
class Chain(Reducer):
    """Stages in order. Each keeps its stated share of what it is given; one that states none takes an even step.

    Even in ratio: from n tokens to k in two stages goes over sqrt(n * k). The last stage meets the budget, and no stage
    goes below it. A tiled picture is reduced tile by tile in the first stage and as one in the others.
    """

    tile_aware: ClassVar[bool] = True

    stages: tuple[Reducer, ...]
    keeps: tuple[float | None, ...]  # of all stages; the last one's is None

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset[Signal]().union(*(stage.needs(tower) for stage in self.stages))

    def wanted(self, tower: Tower) -> frozenset[Signal]:
        return frozenset[Signal]().union(*(stage.wanted(tower) for stage in self.stages))

    def reads_question(self) -> bool:
        return any(stage.reads_question() for stage in self.stages)

    def count(self, grid: Grid, budget: int) -> int:
        n = 0
        for step in self.plan(grid, budget):
            n = step.n_left
        return n

    def plan(self, grid: Grid, budget: int, n_rows: int | None = None) -> Iterator[Step]:
        """What each stage is allowed and leaves, of all tokens or of the `n_rows` that an earlier stage left."""
        n, is_whole = (grid.n_tokens, True) if n_rows is None else (n_rows, False)
        if budget >= n:
            yield from [Step(n, n)] * len(self.stages)
            return
        for i, (stage, keep) in enumerate(zip(self.stages, self.keeps, strict=True)):
            is_last = i == len(self.stages) - 1
            if stage.restores and not is_last:  # here is no tower to spare
                yield Step(n, n)
                continue
            wished = round(n * keep) if keep is not None else round(n * (budget / n) ** (1 / (len(self.stages) - i)))
            wished = budget if is_last else min(max(wished, budget), n)
            n, is_whole = stage.total(grid, wished) if is_whole else min(wished, n), False
            yield Step(wished, n)

    def reduce(self, inputs: VisualInputs, budget: int, split: Split = AREA) -> TokenTransform:
        whole = TokenTransform.identity(inputs.n)
        n_rows = None if inputs.places is None else inputs.n
        for stage, step in zip(self.stages, self.plan(inputs.grid, budget, n_rows), strict=True):
            transform = stage.reduce(inputs, step.budget, split)
            inputs = inputs.take(transform) if not transform.is_identity else inputs
            whole = transform if whole.is_identity else whole.then(transform)
        return whole
