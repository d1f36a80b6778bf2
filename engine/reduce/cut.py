"""Cuts before and inside the vision tower: the base classes of such methods, and the plan for a request's stages.

A method of stage `pixels` ranks the cells of the prepared picture before anything is encoded, and the tower reads only
the kept cells. A method of stage `encoder` mixes the tower's rows after chosen layers. Both are reducers like any
other: where a model cannot cut its tower (tiled pictures, towers of other shapes), the methods act after the tower.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import PIXELS, Grid, LayerRef, Signal, Tower, saliency
from foveate.engine.primitives.ranking import top
from foveate.engine.reduce.base import Chain, Group, Reducer, StageName
from foveate.engine.vision import LayerCut, TokenTransform, TowerCut, VisualInputs


class Worth(NamedTuple):
    """The rank of the cells of one picture, before the picture is encoded."""

    scores: Tensor  # [n_tokens] int64 on the CPU: the higher, the longer it is kept
    n_distinct: int  # cells that say something new, at least 1; the others are kept only to meet a count


@dataclass(frozen=True, kw_only=True)
class PixelCut(Reducer):
    """Base of the methods of stage `pixels`. A method implements `worth`."""

    group: ClassVar[Group] = "before or inside the tower"
    stage: ClassVar[StageName] = "pixels"
    tile_aware: ClassVar[bool] = True

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({PIXELS})

    def worth(self, pixels: Tensor, grid: Grid) -> Worth:
        """Rank the cells of one tile, uint8 [H, W, 3]."""
        raise AssertionError(f"{type(self).__name__} does not say what a cell is worth")

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        scores = torch.zeros(inputs.grid.bare.n_tokens, dtype=torch.int64)
        for tile in inputs.grid.tiles:
            pixels = inputs.tile_pixels(tile)
            assert pixels is not None, "a method that reads pixels asks for them"
            scores[torch.tensor(tile.cells())] = self.worth(pixels, tile.grid).scores
        return top(scores if inputs.places is None else scores[inputs.places.cpu()], k)


@dataclass(frozen=True, kw_only=True)
class EncoderCut(Reducer):
    """Base of the methods of stage `encoder`. A method implements `layers` and `cut`."""

    group: ClassVar[Group] = "before or inside the tower"
    stage: ClassVar[StageName] = "encoder"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        """Behind the tower the method acts once, by the signals of the last of its layers."""
        return self.signals_at(self.layers(tower)[-1])

    def layers(self, tower: Tower) -> tuple[int, ...]:
        """The layers after which it cuts, ascending; of a tower with windows, layers with full attention."""
        raise AssertionError(f"{type(self).__name__} does not say where it cuts")

    def back_layer(self, tower: Tower) -> int:
        """The layer after which all rows come back, not before the last of `layers`."""
        raise AssertionError(f"{type(self).__name__} does not bring its rows back")

    def signals_at(self, layer: int) -> frozenset[Signal]:
        """The signals that `cut` reads of a layer."""
        return frozenset()

    def counts(self, n: int, k: int, n_layers: int) -> list[int]:
        """Rows left after each of the layers, from n to k: even steps in ratio."""
        return [*(round(n * (k / n) ** ((i + 1) / n_layers)) for i in range(n_layers - 1)), k]

    def is_weighing(self) -> bool:
        """Whether attention in the layers that follow counts a merged row as often as rows went into it."""
        return False

    def cut(self, inputs: VisualInputs, k: int, layer: int, size: Tensor) -> TokenTransform:
        """Return a transform of k rows, 0 < k < inputs.n.

        Args:
            inputs: the rows a layer leaves as `proj`, the patches of a cell side by side, and its signals.
            size: float32 [n], the cells each row stands for.
        """
        raise AssertionError(f"{type(self).__name__} does not cut")

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        return self.cut(inputs, k, self.layers(inputs.tower)[-1], torch.ones(inputs.n))

    def spread(self, rows: Tensor, reduced: Tensor) -> Tensor:
        """[n, k] float32: the reduced rows each of the n rows is made of when they come back."""
        raise AssertionError(f"{type(self).__name__} does not bring its rows back")


def whole_layer(tower: Tower, layer: LayerRef) -> int:
    """The layer itself, or the nearest one with full attention."""
    return int(tower.resolve(saliency(layer)).layer)


class Offer(NamedTuple):
    """One picture of a request."""

    grid: Grid
    budget: int
    pixels: Callable[[], Tensor] | None  # uint8 [H, W, 3], prepared; None: the model cannot cut its tower for it


class Way(NamedTuple):
    """How one picture is reduced before, inside and after the tower."""

    budget: int
    cut: TowerCut | None  # None: the tower runs as it is
    after: Reducer | None  # what then reduces; None: nothing
    n_kept: int


def plan_all(reducer: Reducer, tower: Tower, offers: Sequence[Offer], floor: int | None) -> list[Way]:
    """How each picture of a request is reduced before, inside and after the tower.

    Args:
        floor: tokens to be kept in all, or as many as the budgets allow, even if they only repeat others, which else
            use nothing up; None: all that the budgets allow.

    Raises:
        ConfigError: stages of the encoder do not come in the order of their layers, or a layer is not there.
    """
    stages = reducer.stages if isinstance(reducer, Chain) else (reducer,)
    first = [stage for stage in stages if isinstance(stage, PixelCut)]
    worths = [[stage.worth(o.pixels(), o.grid) for stage in first] if o.pixels else [] for o in offers]
    budgets = [o.budget for o in offers]
    if floor is not None:
        budgets = [min([b, *(worth.n_distinct for worth in own)]) for b, own in zip(budgets, worths, strict=True)]
        lack = min(floor, sum(o.budget for o in offers)) - sum(budgets)
        for i, offer in enumerate(offers):
            more = max(0, min(lack, offer.budget - budgets[i]))
            budgets[i], lack = budgets[i] + more, lack - more
    return [
        plan(reducer, tower, offer.grid, budget, own)
        if offer.pixels
        else Way(budget, None, reducer, reducer.total(offer.grid, budget))
        for offer, budget, own in zip(offers, budgets, worths, strict=True)
    ]


def plan(reducer: Reducer, tower: Tower, grid: Grid, budget: int, worths: Sequence[Worth]) -> Way:
    """Share a budget out over what acts before, inside and after a tower that can be cut.

    A stage of pixels that states no share keeps all that is distinct; any other one without takes an even step.

    Args:
        worths: by the stages of pixels, which come first.

    Raises:
        ConfigError: as `plan_all`.
    """
    stages, keeps = (reducer.stages, reducer.keeps) if isinstance(reducer, Chain) else ((reducer,), (None,))
    n_cut = sum(stage.stage != "tokens" for stage in stages)
    if not n_cut or budget >= grid.n_tokens:
        return Way(budget, None, reducer, reducer.total(grid, budget))
    n, cells = grid.n_tokens, None
    for i, worth in enumerate(worths):
        n = _share(n, budget, keeps[i], len(stages) - i, min(n, worth.n_distinct))
        cells = _best(worth, cells, n)
    layers: list[LayerCut] = []
    for i, stage in enumerate(stages):
        if isinstance(stage, EncoderCut):
            k = _share(n, budget, keeps[i], len(stages) - i, None)
            k = stage.count(grid, k) if stage.whole_grid else k
            back = stage.restores and i < len(stages) - 1
            layers += _cuts(stage, tower, n, k, back)
            n = n if back else k
    if any(after.layer < before.layer for before, after in pairwise(layers)):
        raise ConfigError("the stages inside the vision tower do not come in the order of their layers")
    needs = frozenset[Signal]().union(*(c.method.signals_at(c.layer) for c in layers if not c.comes_back))
    cells = None if cells is None or len(cells) == grid.n_tokens else cells
    cut = TowerCut(cells, tuple(layers), frozenset(tower.resolve(signal) for signal in needs))
    after = _rest(stages[n_cut:], keeps[n_cut:])
    kept = n if after is None else after.total(grid, budget) if n == grid.n_tokens else min(budget, n)
    return Way(budget, cut if layers or cells is not None else None, after, kept)


def _share(n: int, budget: int, keep: float | None, n_stages: int, own: int | None) -> int:
    """Rows that one stage leaves of n: its share, its own wish, or an even step. The last stage meets the budget."""
    if n_stages == 1:
        return min(n, budget)
    if keep is not None:
        wished = round(n * keep)
    else:
        wished = round(n * (budget / n) ** (1 / n_stages)) if own is None else own
    return min(n, max(wished, budget))


def _best(worth: Worth, among: Tensor | None, k: int) -> Tensor:
    if among is None:
        return top(worth.scores, k)
    return among[top(worth.scores[among], k)]


def _cuts(stage: EncoderCut, tower: Tower, n: int, k: int, back: bool) -> Iterator[LayerCut]:
    if k == n:
        return
    layers = stage.layers(tower)
    left = n
    for layer, count in zip(layers, stage.counts(n, k, len(layers)), strict=True):
        if count < left:
            yield LayerCut(layer, stage, count, comes_back=False, will_come_back=back)
            left = count
    if back:
        yield LayerCut(stage.back_layer(tower), stage, n, comes_back=True, will_come_back=False)


def _rest(stages: tuple[Reducer, ...], keeps: tuple[float | None, ...]) -> Reducer | None:
    if len(stages) < 2:
        return stages[0] if stages else None
    return Chain(stages=stages, keeps=keeps)
