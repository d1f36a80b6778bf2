"""The reduce family: one image's visual tokens in, a token transform out.

A method is one file with one frozen dataclass, bound to the module's name `METHOD`; its fields are its settings. It
receives tensors of one image and its own fields, never the runner, the scheduler or a config. Most methods implement
`select` alone; one that mixes rows implements `transform`, and `count` where it cannot meet every budget exactly.
CONTRIBUTING.md says how to write one.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common.grid import Grid
from foveate.engine.reduce.sharing import AREA, Split, parts_of, share, tile_parts
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal, Tower
from foveate.engine.vision.transform import TokenTransform, concatenate

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
