"""The reduce family: one image's visual tokens in, a token transform out.

A method is one file with one frozen dataclass, bound to the module's name `METHOD`; its fields are its settings. It
receives tensors of one image and its own fields, never the runner, the scheduler or a config. Most methods implement
`select` alone; one that mixes rows implements `transform`, and `count` where it cannot meet every budget exactly.
CONTRIBUTING.md says how to write one.

Beside the methods' base stand a composition of methods (`Chain`), which is a method too, and the base of the ways to
share one budget over several parts (`Split`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid, Signal, Tower
from foveate.engine.reduce.budget import apportion
from foveate.engine.vision import TokenTransform, VisualInputs, concatenate

StageName = Literal["pixels", "encoder", "tokens"]  # before the tower, inside it, after it
Fits = Literal["any", "cls", "no_cls", "tiles"]  # tiles: also of use without, but made for tiled pictures
Group = Literal[  # the headings of docs/methods.md, in this order
    "baselines",
    "attended and unlike",
    "by attention",
    "by unlikeness or coverage",
    "select and merge",
    "before or inside the tower",
]


@dataclass(frozen=True, kw_only=True)
class Part:
    """An image of a request, or a tile of an image."""

    n_tokens: int  # offered
    pixels: Tensor | None = None  # uint8 [H, W, 3], where the way asks for them
    attention: float | None = None  # of a tile: its share of the thumbnail's attention; of the thumbnail: 1


class Split(ABC):
    """A way of sharing. A file binds its subclass, which has no settings, to `METHOD`."""

    needs_pixels: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False  # of the thumbnail; only within a tiled image

    @abstractmethod
    def weights(self, parts: Sequence[Part]) -> list[int]:
        """What each part weighs, at least 1; the budget is shared in proportion, between 1 and what it offers."""


class Area(Split):
    """In proportion to the visual tokens offered, so every part is seen at one resolution. The default."""

    def weights(self, parts: Sequence[Part]) -> list[int]:
        return [part.n_tokens for part in parts]


AREA = Area()


def share(split: Split, parts: Sequence[Part], grid: Grid, budget: int) -> list[int]:
    """Tokens of each tile of an image, `budget` in all; what is fewer than one for each goes to the first alone."""
    offered = [tile.rows * tile.cols for tile in grid.tiles]
    if budget < len(offered):
        return [budget, *[0] * (len(offered) - 1)]
    return apportion(split.weights(parts), offered, budget)


def tile_parts(grid: Grid) -> list[Part]:
    """The tiles of a tiled image by their geometry alone."""
    return [Part(n_tokens=tile.rows * tile.cols) for tile in grid.tiles]


def parts_of(inputs: VisualInputs, split: Split) -> list[Part]:
    """The tiles of a tiled picture, as `split` wants to see them."""
    parts, tiles = tile_parts(inputs.grid), inputs.grid.tiles
    if split.needs_pixels:
        parts = [replace(p, pixels=inputs.tile_pixels(t)) for p, t in zip(parts, tiles, strict=True)]
    if split.needs_attention and inputs.grid.thumbnail:
        thumb = inputs.of_tile(tiles[0])
        mass = thumb.saliency().double().view(thumb.grid.rows, thumb.grid.cols)
        regions = [float(mass[inputs.thumb_region(tile)].sum()) for tile in tiles[1:]]
        parts = [replace(p, attention=a) for p, a in zip(parts, [sum(regions), *regions], strict=True)]
    return parts


@dataclass(frozen=True, kw_only=True)
class Reducer:
    """Base of the family. Deterministic: scores in float32, ties to the lower index, randomness from `inputs.seed`."""

    source: ClassVar[str] = ""  # the paper, for GET /v1/vlm/methods
    group: ClassVar[Group]  # where docs/methods.md lists the method; every method of methods/ or its base sets one
    question_aware: ClassVar[bool] = False  # reads the question or a caption: its result is never shared across them
    fits: ClassVar[Fits] = "any"  # encoders it is for; others get a 400
    stage: ClassVar[StageName] = "tokens"
    whole_grid: ClassVar[bool] = False  # needs every cell of the picture, so it can only be the first of a composition
    restores: ClassVar[bool] = False  # inside the tower, with a stage after it, it leaves all rows in the end
    tile_aware: ClassVar[bool] = False  # takes a tiled picture whole; others get one tile at a time

    def needs(self, tower: Tower) -> frozenset[Signal]:
        """What must be tapped while the encoder runs, asked for before it does; layers as the fields say."""
        return frozenset()

    def wanted(self, tower: Tower) -> frozenset[Signal]:
        """`needs`, resolved. Raises ConfigError: the tower cannot give it, or is not one the method is for."""
        if self.fits in ("cls", "no_cls") and tower.has_cls != (self.fits == "cls"):
            has = "has a" if tower.has_cls else "has no"
            raise ConfigError(f"this vision tower {has} CLS row, which the method is not for")
        return frozenset(tower.resolve(signal) for signal in self.needs(tower))

    def count(self, grid: Grid, budget: int) -> int:
        """Tokens kept of one tile under `budget`: pure arithmetic, never fewer for a larger budget.

        The scheduler admits by it before anything is encoded. An adaptive method is no exception: where its own rule
        keeps fewer it fills up with the next best, where it keeps more it drops the worst.
        """
        return min(budget, grid.n_tokens)

    def total(self, grid: Grid, budget: int) -> int:
        """Tokens kept of the whole picture: tile by tile where it is tiled, unless the method takes it whole.

        All of them with its newlines, if it has any; fewer without, since a row that is not whole ends nowhere.
        """
        if budget >= grid.n_tokens:
            return grid.n_tokens
        grid = grid.bare
        if len(grid.tiles) == 1 or self.tile_aware or self._meets_every_budget:
            return self.count(grid, budget)
        shares = share(AREA, tile_parts(grid), grid, budget)
        return sum(self.count(t.grid, n) for t, n in zip(grid.tiles, shares, strict=True) if n)

    def reads_question(self) -> bool:
        """Whether the result depends on the question, and so is not shared between requests that ask another."""
        return self.question_aware

    @property
    def _meets_every_budget(self) -> bool:
        return type(self).count is Reducer.count

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        """Return [k] int64 rows to keep, strictly increasing; 0 < k < inputs.n."""
        raise AssertionError(f"{type(self).__name__} implements neither select nor transform")

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        """Return a transform of k rows, k = `count(inputs.grid, budget)` < inputs.n."""
        return TokenTransform.selection(self.select(inputs, k), inputs.n)

    def reduce(self, inputs: VisualInputs, budget: int, split: Split = AREA) -> TokenTransform:
        """Return a transform of exactly `total(inputs.grid, budget)` rows; keep-all is the identity, bit for bit.

        Args:
            split: shares the budget among the tiles of a tiled picture; where the method cannot meet every budget,
                it is by area whatever is asked for, because the count must be known before anything is encoded.

        Raises:
            ImageError: a signal the method ranks by is not finite.
        """
        assert budget > 0, "every image keeps at least one token"
        if inputs.places is not None:  # rows that an earlier stage left: no grid to count by
            assert not self.whole_grid, "a method that needs the whole grid comes first"
            return self._exactly(inputs, min(budget, inputs.n))
        k = self.total(inputs.grid, budget)
        if k >= inputs.n or len(inputs.grid.tiles) == 1 or self.tile_aware:
            return self._exactly(inputs, min(k, inputs.n))
        by = split if self._meets_every_budget else AREA
        shares = share(by, parts_of(inputs, by), inputs.grid, budget)
        parts = [
            (tile.cells(), self._exactly(inputs.of_tile(tile), self.count(tile.grid, n)))
            for tile, n in zip(inputs.grid.tiles, shares, strict=True)
            if n
        ]
        return concatenate(parts, inputs.n)

    def _exactly(self, inputs: VisualInputs, k: int) -> TokenTransform:
        if k == inputs.n:
            return TokenTransform.identity(k)
        transform = self.transform(inputs, k)
        assert transform.n_out == k, "a reducer keeps exactly what it announced: the scheduler admitted by it"
        return transform


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
