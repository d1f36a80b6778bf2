"""The parts that vision towers share: pixels to patches, records for the reducers, and cuts between layers.

Taps record only what was asked for, at the layers it was asked of.

A cut picture's rows come in places, one per cell that is left, of one or more patches each; a CLS row goes before them
and is never cut. The tower's order of places need not be reading order (windows), but the methods see reading order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from foveate.engine.common import Grid, Kind, Signal, Tower
from foveate.engine.images.preprocess import ImageProcessor
from foveate.engine.vision import LayerCut, TokenTransform, TowerCut, VisualInputs
from foveate.kernels.attention_rows import attention_rows
from foveate.kernels.received import received
from foveate.kernels.vision_attention import vision_attention

_OF_ATTENTION = frozenset({"cls_row", "cls_cat", "recv", "logits", "keys", "keys_cat", "values", "cls_values", "qk"})
_PAD = 8  # columns added for a bias: heads stay a multiple of what kernels like


def normalise(image: Tensor, processor: ImageProcessor) -> Tensor:
    """uint8 [height, width, 3] -> float32, rescaled and normalised as the processor says."""
    mean = torch.tensor(processor.mean, device=image.device)
    std = torch.tensor(processor.std, device=image.device)
    return (image.float() * processor.rescale - mean) / std


def patches(pixels: Tensor, size: int, merge: int = 1) -> Tensor:
    """Cut [height, width, 3] into squares of `size` pixels: [n, 3 * size * size], channel first within a row.

    Rows come cell by cell, the `merge` x `merge` patches of a cell next to each other, both in raster order; with
    merge 1 that is plain raster order. Pixels beyond the last whole cell are left out, as a strided convolution does.
    """
    side = size * merge
    rows, cols = pixels.shape[0] // side, pixels.shape[1] // side
    cut = pixels[: rows * side, : cols * side].reshape(rows, merge, size, cols, merge, size, 3)
    return cut.permute(0, 3, 1, 4, 6, 2, 5).reshape(rows * cols * merge * merge, 3 * size * size)


@dataclass(slots=True)
class Taps:
    """Signals of one batch, recorded layer by layer. Rows are those of the tower, packed over all pictures."""

    wanted: frozenset[Signal]  # resolved
    bounds: Sequence[int]  # [n_images + 1] rows of each picture
    has_cls: bool  # whether row bounds[i] is a CLS row
    found: dict[Signal, Tensor] = field(default_factory=dict)  # [n, ...] each; qk [n, 2, heads, d]

    def at(self, layer: int) -> "LayerTaps | None":
        """The recorder of a layer; None: the layer records nothing."""
        kinds = frozenset(s.kind for s in self.wanted if s.layer == layer and s.kind in _OF_ATTENTION)
        return LayerTaps(self, layer, kinds) if kinds else None

    def record_rows(self, layer: int, rows: Tensor) -> None:
        """Record the output rows [n, C] of the layer."""
        signal = Signal("hidden", layer)
        if signal in self.wanted:
            self.found[signal] = rows.float().clone()


@dataclass(frozen=True, slots=True)
class LayerTaps:
    """The recorder of one layer. The layer calls each method once."""

    taps: Taps
    layer: int
    kinds: frozenset[Kind]

    def record_projections(self, raw_keys: Tensor, values: Tensor) -> None:
        """Record the key and value projections [n, heads, d]; keys are not rotated."""
        self._keep("keys", lambda: raw_keys.float().mean(1))
        self._keep("keys_cat", lambda: raw_keys.float().flatten(1))
        self._keep("values", lambda: values.float().clone())
        if self.taps.has_cls:
            self._keep("cls_values", lambda: torch.cat([_likeness(own.float()) for own in self._by_picture(values)]))

    def record_attention(self, q: Tensor, k: Tensor, segments: Sequence[int], scale: float) -> None:
        """Record queries and keys [n, heads, d] as attention sees them.

        Args:
            segments: [n_segments + 1] what attends to what at this layer.
        """
        self._keep("recv", lambda: received(q, k, segments, scale))
        self._keep("qk", lambda: torch.stack([q, k], 1))
        if self.taps.has_cls:
            self._keep("logits", lambda: self._logits(q, k, scale))
            self._keep("cls_row", lambda: self._cls(q, k, scale))
            wide = q.shape[1] * q.shape[2]
            self._keep("cls_cat", lambda: self._cls(q.flatten(1)[:, None], k.flatten(1)[:, None], wide**-0.5))

    def _cls(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        pictures = zip(self._by_picture(q), self._by_picture(k), strict=True)
        return torch.cat([attention_rows(queries[:1], keys, scale)[0] for queries, keys in pictures])

    def _logits(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        # The mean over heads is one product over all their columns.
        pictures = zip(self._by_picture(q.flatten(1)), self._by_picture(k.flatten(1)), strict=True)
        return torch.cat([keys.float() @ queries[0].float() for queries, keys in pictures]) * (scale / q.shape[1])

    def _by_picture(self, rows: Tensor) -> list[Tensor]:
        return [rows[start:end] for start, end in pairwise(self.taps.bounds)]

    def _keep(self, kind: Kind, make: Callable[[], Tensor]) -> None:
        if kind in self.kinds:
            self.taps.found[Signal(kind, self.layer)] = make()


def _likeness(values: Tensor) -> Tensor:
    """[n, heads]: products of values [n, heads, d] with the first, less its product with itself."""
    products = torch.einsum("nhd,hd->nh", values, values[0])
    return products - products[:1]


@dataclass(frozen=True, slots=True)
class Laid:
    """The order of a tower's rows before its first layer."""

    cells: Tensor  # int64 [n] on the CPU: the cell of each place in the tower's order
    attached: tuple[Tensor, ...] = ()  # [n, ...] each: what goes with the places and is cut alike
    lead: int = 0  # rows before the first place
    patches: int = 1  # rows of a place


@dataclass(frozen=True, slots=True)
class _Before:
    """The state that comes back after layers that run on fewer rows."""

    cells: Tensor
    size: Tensor
    attached: tuple[Tensor, ...]
    found: dict[Signal, Tensor]
    spread: Tensor  # [n, k] float32: the reduced places each place is made of
    owner: Tensor  # [n] int64: the reduced place that stands for it in signals


class Cutting:
    """One picture in its tower. `wanted` holds the resolved signals that remain at the end."""

    def __init__(self, cut: TowerCut, wanted: frozenset[Signal], tower: Tower, grid: Grid, laid: Laid) -> None:
        self._cut, self._wanted, self._tower, self._grid = cut, wanted, tower, grid
        self._lead, self._patches = laid.lead, laid.patches
        self.cells, self.attached = laid.cells, laid.attached
        self.size = torch.ones(len(laid.cells))  # cells each place stands for
        self.taps = Taps(wanted | cut.signals, [0, laid.lead + len(laid.cells) * laid.patches], tower.has_cls)
        self._is_weighing = False
        self._before: _Before | None = None

    @property
    def log_size(self) -> Tensor | None:
        """float32 [rows], to be added to the scores of each key; None: nothing."""
        if not self._is_weighing:
            return None
        return torch.cat([torch.zeros(self._lead), self.size.log().repeat_interleave(self._patches)])

    def after(self, layer: int, rows: Tensor) -> Tensor:
        """Take the recorded output rows [n, C] of a layer and return the input rows of the next layer."""
        for step in self._cut.layers:
            if step.layer == layer:
                rows = self._bring_back(rows) if step.comes_back else self._reduce(step, rows)
        return rows

    def finish(self) -> Taps:
        """The taps of the remaining rows, without signals that only the cuts read."""
        self.taps.found = {s: t for s, t in self.taps.found.items() if s in self._wanted}
        return self.taps

    def placed(self, inputs: VisualInputs) -> VisualInputs:
        """The features of the picture, with the cell of each row."""
        places = None if len(self.cells) == self._grid.n_tokens else self.cells.sort().values
        return replace(inputs, places=places, encoded=places)

    def _reduce(self, step: LayerCut, rows: Tensor) -> Tensor:
        order = self.cells.argsort()  # place of each row in reading order
        body = rows[self._lead :].reshape(len(order), -1)[order]
        size = self.size[order]
        taps = {s: self._of_places(t)[order] for s, t in self.taps.found.items() if s.kind != "qk"}
        inputs = VisualInputs(grid=self._grid, proj=body, tower=self._tower, taps=taps, places=self.cells[order])
        transform = step.method.cut(inputs, step.n_rows, step.layer, size)
        assert transform.n_out == step.n_rows, "a cut leaves exactly what was planned"
        mixed, back = transform.mix(body), transform.back
        mass = torch.zeros(step.n_rows).index_add_(0, back[back >= 0], size[back >= 0])
        anchors = order[transform.anchor]
        inner = anchors.argsort()  # back to the tower's order
        if step.will_come_back:
            self._set_aside(order, inner, transform, step.method.spread(body, mixed))
        self._keep(anchors[inner])
        self.size = mass[inner]
        self._is_weighing |= step.method.is_weighing()
        return torch.cat([rows[: self._lead], mixed[inner].reshape(-1, rows.shape[1])])

    def _set_aside(self, order: Tensor, inner: Tensor, transform: TokenTransform, spread: Tensor) -> None:
        """Keep the state in the tower's order. `order` leads to reading order, `inner` back to the tower's order."""
        assert self._before is None, "one method at a time takes rows away for a while"
        rank, place = order.argsort(), inner.argsort()
        owner = place[transform.back.clamp(min=0)][rank]
        spread = spread[rank][:, inner]
        self._before = _Before(self.cells, self.size, self.attached, self.taps.found, spread, owner)
        self.taps.found = {}

    def _bring_back(self, rows: Tensor) -> Tensor:
        before = self._before
        assert before is not None, "rows come back that were taken away"
        body = rows[self._lead :].reshape(len(self.cells), -1)
        inside = {s: self._picked(t, before.owner) for s, t in self.taps.found.items()}
        self.cells, self.size, self.attached, self._before = before.cells, before.size, before.attached, None
        self.taps.found = before.found | inside
        self.taps.bounds = [0, self._lead + len(self.cells) * self._patches]
        whole = (before.spread.to(body.device) @ body.float()).to(rows.dtype)
        return torch.cat([rows[: self._lead], whole.reshape(-1, rows.shape[1])])

    def _keep(self, places: Tensor) -> None:
        self.cells = self.cells[places]
        self.attached = tuple(t[places] for t in self.attached)
        self.taps.found = {s: self._picked(t, places) for s, t in self.taps.found.items()}
        self.taps.bounds = [0, self._lead + len(places) * self._patches]

    def _picked(self, values: Tensor, places: Tensor) -> Tensor:
        """The rows of some places, and the rows before the first place."""
        rows = (self._lead + places[:, None] * self._patches + torch.arange(self._patches)).flatten()
        return values[torch.cat([torch.arange(self._lead), rows])]

    def _of_places(self, values: Tensor) -> Tensor:
        """One row per place: the mean over the patches of the place."""
        rows = values[self._lead :]
        return rows if self._patches == 1 else rows.reshape(-1, self._patches, *rows.shape[1:]).mean(1)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], scale: float, log_size: Tensor | None) -> Tensor:
    """`vision_attention`, the scores of each key raised by its `log_size` [n].

    The bias travels as one more column of queries and keys, so that the same kernels do.
    """
    if log_size is None:
        return vision_attention(q, k, v, segments, scale)
    d = q.shape[-1]
    q, k, v = (functional.pad(x, (0, _PAD)) for x in (q, k, v))
    q[..., d] = 1 / scale
    k[..., d] = log_size.to(k)[:, None]
    return vision_attention(q, k, v, segments, scale)[..., :d]
