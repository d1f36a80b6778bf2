"""What a reducer is given, the features of one image and the signals it asked for; and what it takes from the tower.

A `TowerCut` is what one picture loses before and inside its vision tower, as the tower carries it out.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from foveate.engine.common import Grid, ImageError, LayerRef, Signal, Tile, Tower
from foveate.engine.common import signals as named
from foveate.engine.vision.transform import Space, TokenTransform

_HEADS_AT_ONCE = 1 << 22  # scores alive at once in `rows`


@dataclass(frozen=True, kw_only=True)
class VisualInputs:
    """What the vision tower says about one image, and the request about it; n rows in reading order.

    Of a whole picture n is `grid.n_tokens`, and newlines are not among them (`Grid.bare`); after an earlier stage,
    `places` says which tokens are left, and every signal is theirs. Encoders that merge patches (Qwen-VL) give each
    signal per merged token: the mean over its patches. What was not asked for (`Reducer.needs`) is not there.
    """

    grid: Grid
    proj: Tensor  # [n, D] rows as the language model would read them
    added: Mapping[int, Tensor] = field(default_factory=dict)  # by decoder layer: [n, D] added to the rows entering it
    newline: Tensor | None = None  # [D] stands for each newline of the unreduced picture; None: it has none
    tower: Tower = Tower(has_cls=False, depth=1)  # resolves the layers of the accessors below
    taps: Mapping[Signal, Tensor] = field(default_factory=dict)  # by resolved signal; read through the accessors
    enc: Tensor | None = None  # [n, C] rows before the projector; ENC, None for merging encoders
    cls: Tensor | None = None  # [C] the CLS row at the select layer, with `enc`
    cells: Tensor | None = None  # [n, P] what the projector reads; CELLS
    project: Callable[[Tensor], Tensor] | None = None  # rows of `enc` or `cells` [r, .] -> [r, D], with either
    question: Tensor | None = None  # [L, D] rows of the user's question, without template; L may be 0; QUESTION
    caption: Tensor | None = None  # [L, D] rows of the text that goes with this image; L may be 0; CAPTION
    pixels: Tensor | None = None  # uint8 [H, W, 3] of the whole image, prepared; PIXELS
    places: Tensor | None = None  # [n] int64, strictly increasing: the token of the picture each row is; None: all
    encoded: Tensor | None = None  # [m] int64, strictly increasing: the tokens whose rows `qk` holds; None: all
    seed: int = 0  # from the image digest: the same picture gives the same draw

    @property
    def n(self) -> int:
        return self.proj.shape[0]

    @property
    def space(self) -> Space:
        """Where a method mixes that acts before the projector if it can: on `enc` where it is there, else on `proj`."""
        return "proj" if self.enc is None else "enc"

    @property
    def cell_yx(self) -> tuple[Tensor, Tensor]:
        """Row and column of each token on the grid: two int64 [n], on the CPU.

        A cell of a tiled picture's thumbnail stands where the middle of what it shows does.
        """
        at = torch.arange(self.n) if self.places is None else self.places.cpu()
        grid, side = self.grid, max(1, self.grid.thumbnail)
        cell, in_thumbnail = at - grid.n_thumbnail, at < grid.n_thumbnail
        y = torch.where(in_thumbnail, (2 * (at // side) + 1) * grid.rows // (2 * side), cell // grid.cols)
        x = torch.where(in_thumbnail, (2 * (at % side) + 1) * grid.cols // (2 * side), cell % grid.cols)
        return y, x

    def unreduced(self, grid: Grid) -> Tensor:
        """[grid.n_tokens, D]: all rows, with the newlines of `grid`, which is `self.grid` but for them, between."""
        if self.newline is None:
            return self.proj
        rows = self.newline.to(self.proj.dtype).repeat(grid.n_tokens, 1)
        rows[torch.tensor(grid.tokens(), device=rows.device)] = self.proj
        return rows

    def unreduced_added(self, grid: Grid) -> dict[int, Tensor]:
        """`added` of all rows; nothing is added to newlines."""
        if self.newline is None:
            return dict(self.added)
        places = torch.tensor(grid.tokens(), device=self.proj.device)
        return {
            layer: rows.new_zeros(grid.n_tokens, rows.shape[1]).index_copy_(0, places, rows)
            for layer, rows in self.added.items()
        }

    def saliency(self, layer: LayerRef = -1) -> Tensor:
        return self._tap(named.saliency(layer))

    def cls_row(self, layer: LayerRef = -1) -> Tensor:
        return self._tap(named.cls_row(layer))

    def cls_cat(self, layer: LayerRef = -1) -> Tensor:
        return self._tap(named.cls_cat(layer))

    def recv(self, layer: LayerRef = -1) -> Tensor:
        return self._tap(named.recv(layer))

    def logits(self, layer: LayerRef = -1) -> Tensor:
        rows = self._tap(named.logits(layer))
        return rows if self.tower.has_cls else rows.clamp_min(torch.finfo(rows.dtype).tiny).log()

    def keys(self, layer: LayerRef = -1) -> Tensor:
        return self._tap(named.keys(layer))

    def keys_cat(self, layer: LayerRef = -1) -> Tensor:
        return self._tap(named.keys_cat(layer))

    def values(self, layer: LayerRef = -1) -> Tensor:
        return self._tap(named.values(layer))

    def cls_values(self, layer: LayerRef = -1) -> Tensor:
        return self._tap(named.cls_values(layer))

    def hidden(self, layer: LayerRef = -1) -> Tensor:
        return self._tap(named.hidden(layer))

    def rows(self, layer: LayerRef, queries: Tensor) -> Tensor:
        """float32 [r, n]: attention rows of tokens `queries` ([r] int64), mean over heads; asked for as `qk(layer)`.

        Not renormalised: what goes to the CLS row or to dropped tokens is left out (to those dropped inside the tower,
        nothing goes). Streams over queries.

        Raises:
            ImageError: the picture is read in tiles, which do not attend to each other.
        """
        tap = self._tap(named.qk(layer))
        if not tap.numel():
            raise ImageError(
                "the picture is read in tiles, and the method asks for attention between all its tokens; "
                "choose another vlm.visual.method"
            )
        q, k = tap  # [CLS and all tokens, patches of each, heads, d]
        n_extra = k.shape[0] - (self.grid.n_tokens if self.encoded is None else len(self.encoded))
        at = torch.arange(self.n, device=q.device) if self.places is None else self.places.to(q.device)
        at = at if self.encoded is None else torch.searchsorted(self.encoded.to(q.device), at)
        chosen, columns = q[n_extra + at[queries.to(q.device)]], n_extra + at
        per_query = k.shape[0] * k.shape[1] * k.shape[1] * k.shape[2]
        out = [_attend(some, k)[:, columns] for some in chosen.split(max(1, _HEADS_AT_ONCE // per_query))]
        return torch.cat(out) if out else q.new_zeros(0, self.n).float()

    def full(self, layer: LayerRef) -> Tensor:
        """float32 [n, n]: attention of every token to every token, mean over heads; asked for as `qk(layer)`."""
        return self.rows(layer, torch.arange(self.n))

    def _tap(self, signal: Signal) -> Tensor:
        resolved = self.tower.resolve(signal)
        assert resolved in self.taps, f"a method reads only what it needs() names, and {signal} is not there"
        return self.taps[resolved]

    def take(self, transform: TokenTransform) -> "VisualInputs":
        """What a next stage reads: the rows of `transform`, and the signals of their anchors."""
        anchor = transform.anchor.to(self.proj.device)
        in_enc = transform.is_selection or transform.space == "enc"

        def mixed(rows: Tensor | None) -> Tensor | None:
            return None if rows is None or not in_enc else transform.mix(rows)

        return replace(
            self,
            proj=transform.apply_to(self.proj, self.enc, self.project),
            added={layer: transform.carry(rows) for layer, rows in self.added.items()},
            enc=mixed(self.enc),
            cells=mixed(self.cells),
            taps={s: t if s.kind == "qk" else t[anchor] for s, t in self.taps.items()},
            places=transform.anchor if self.places is None else self.places[transform.anchor],
        )

    def of_tile(self, tile: Tile) -> "VisualInputs":
        """One tile of a tiled picture, as a picture of its own."""
        rows = torch.tensor(tile.cells())
        taken = self.take(TokenTransform.selection(rows, self.n))
        return replace(taken, grid=tile.grid, places=None, pixels=self.tile_pixels(tile))

    def thumb_region(self, tile: Tile) -> tuple[slice, slice]:
        """Rows and columns of the thumbnail that show what a crop shows; together the crops' cover it once."""
        side, grid = self.grid.tiles[0], self.grid
        y = [round(side.rows * at / grid.rows) for at in (tile.row0, tile.row0 + tile.rows)]
        x = [round(side.cols * at / grid.cols) for at in (tile.col0, tile.col0 + tile.cols)]
        return slice(y[0], y[1]), slice(x[0], x[1])

    def tile_pixels(self, tile: Tile) -> Tensor | None:
        """What a tile's cells show, out of the stack a tiled picture is prepared as: the thumbnail, then the crops.

        The black around the picture lies evenly at two of its edges and is no cell's.
        """
        if self.pixels is None or not (self.grid.thumbnail or len(self.grid.tiles) > 1):
            return self.pixels
        side, grid = self.pixels.shape[1], self.grid
        if tile.kind == "thumbnail":
            return self.pixels[:side]
        n_rows, n_cols = len(grid.row_cuts) - 1, len(grid.col_cuts) - 1
        density = max(grid.rows / (n_rows * side), grid.cols / (n_cols * side))  # cells per pixel
        rows = _seen(n_rows, side, round(grid.rows / density), tile.tile_row)
        cols = _seen(n_cols, side, round(grid.cols / density), tile.tile_col)
        at = side * (1 + tile.tile_row * n_cols + tile.tile_col)
        return self.pixels[at : at + side][rows, cols]


def _seen(n_tiles: int, side: int, n_pixels: int, tile: int) -> slice:
    """Which of one tile's pixels along an axis lie in a picture of `n_pixels` amid `n_tiles` tiles."""
    start = (n_tiles * side - n_pixels) // 2 - tile * side
    return slice(max(0, start), max(0, min(side, start + n_pixels)))


def _attend(q: Tensor, k: Tensor) -> Tensor:
    """[r, patches, heads, d] and [n, patches, heads, d] -> float32 [r, n], mean over heads and patches."""
    scores = torch.einsum("rphd,nshd->rphns", q.float(), k.float()) * q.shape[-1] ** -0.5
    weights = scores.flatten(-2).softmax(-1).unflatten(-1, (k.shape[0], k.shape[1]))
    out: Tensor = weights.mean((1, 2, 4))
    return out


class RowCut(Protocol):
    """A method that cuts the tower's rows; `EncoderCut` of engine/reduce/cut.py documents each function."""

    @abstractmethod
    def signals_at(self, layer: int) -> frozenset[Signal]: ...

    @abstractmethod
    def is_weighing(self) -> bool: ...

    @abstractmethod
    def cut(self, inputs: VisualInputs, k: int, layer: int, size: Tensor) -> TokenTransform: ...

    @abstractmethod
    def spread(self, rows: Tensor, reduced: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LayerCut:
    """After one layer: rows are mixed into fewer, or all come back."""

    layer: int
    method: RowCut
    n_rows: int
    comes_back: bool  # afterwards there are n_rows again, as before the method began
    will_come_back: bool


@dataclass(frozen=True, slots=True)
class TowerCut:
    """What one picture loses before and inside the tower; known before it is encoded."""

    cells: Tensor | None  # [n] int64, increasing: those the tower reads; None: all
    layers: tuple[LayerCut, ...]  # ascending
    signals: frozenset[Signal]  # read on the way, resolved

    @property
    def key(self) -> bytes:
        """What the tower's rows depend on beside the picture."""
        cells = b"all" if self.cells is None else self.cells.numpy().tobytes()
        return repr([(c.layer, c.method, c.n_rows, c.will_come_back) for c in self.layers]).encode() + cells
