"""Attention of a prompt at a pruning point, computed in pieces: never a whole [heads, N, N] tensor.

The engine fills a `Probe` per prompt and point. Its rows are the present tokens, in order, from the
first visual token to the end of the prompt (to the last visual token for a method that does not read the question).
Tokens before the first picture cannot see a picture, so they serve as keys and never as queries.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from foveate.engine.common import Grid

_MAX_SCORES = 2**21  # float32 at once: some stay in a processor's cache, and few passes fill a device
Which = Literal["before", "this"]


@dataclass(frozen=True)
class View:
    """Queries and keys of one layer, of the tokens that were present in it."""

    q: Tensor  # [n, n_heads, d] float, rotated: of the probe's rows
    k: Tensor  # [m + n, n_kv_heads, d] float, rotated: of the m earlier tokens and of the probe's rows
    cos: Tensor  # [n, d / 2] float32: how the probe's rows are rotated
    sin: Tensor
    scale: float
    lse: Tensor | None = None  # [n, n_heads] float32: log-sum-exp of the scores over all keys seen; None: not computed

    @property
    def m(self) -> int:
        return self.k.shape[0] - self.q.shape[0]

    def normaliser(self, rows: Tensor) -> Tensor:
        """[R, n_heads] float32, the log-sum-exp of rows [R] int64; computed, for these alone, where it is not given."""
        return self._lse(rows, 1.0) if self.lse is None else self.lse[rows]

    @cached_property
    def plain(self) -> "View":
        """Queries and keys of the probe's rows before rotation, without earlier tokens. Exact except for rounding."""
        cos, sin = self.cos, -self.sin
        own = _rotated(self.k[self.m :], cos, sin)
        return View(_rotated(self.q, cos, sin), own, torch.ones_like(cos), torch.zeros_like(sin), self.scale)

    @cached_property
    def _keys(self) -> Tensor:
        """[n_kv_heads, d, m + n] float32"""
        return self.k.float().permute(1, 2, 0).contiguous()

    def _products(self, rows: Tensor, keys: Tensor, scale: float) -> Tensor:
        """[n_heads, R, C] float32, scaled, of query rows and keys [n_kv_heads, d, C]."""
        n_kv_heads, head_dim, n_cols = keys.shape
        q = (self.q[rows].float() * scale).transpose(0, 1).reshape(n_kv_heads, -1, head_dim)  # a group after another
        return torch.bmm(q, keys).view(-1, len(rows), n_cols)

    def scores(self, rows: Tensor, cols: Tensor) -> Tensor:
        """[n_heads, R, C] float32 scaled products of query rows and key columns, both numbered as the probe's rows;
        -inf where a key comes after its query."""
        scores = self._products(rows, self._keys[:, :, self.m + cols], self.scale)
        return scores.masked_fill_(cols[None] > rows[:, None], -torch.inf)

    def blocks(self, rows: Tensor, n_cols: int) -> Iterator[Tensor]:
        """`rows` in pieces whose scores over `n_cols` columns fit the memory allowed."""
        step = max(1, _MAX_SCORES // (self.q.shape[1] * max(1, n_cols)))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]

    def _lse(self, rows: Tensor, temperature: float) -> Tensor:
        cols = torch.arange(self.k.shape[0], device=self.k.device) - self.m
        parts = [torch.empty(0, self.q.shape[1], device=self.k.device)]
        for some in self.blocks(rows, len(cols)):
            ahead, seen = self.m + int(some.min()) + 1, self.m + int(some.max()) + 1
            scores = self._products(some, self._keys[:, :, :seen], self.scale / temperature)
            scores[:, :, ahead:].masked_fill_(cols[ahead:seen] > some[:, None], -torch.inf)
            parts.append(scores.logsumexp(-1).T)
        return torch.cat(parts)

    def propagate(self, weights: Tensor, temperature: float) -> Tensor:
        """[n_heads, n] float32: `weights` [n_heads, n] of the rows, sent along their attention: sum_i w_i A[i, j]."""
        n, device = self.q.shape[0], self.q.device
        cols, out = torch.arange(n, device=device), torch.zeros(self.q.shape[1], n, device=device)
        lse = self._sharp(temperature)
        for rows in self.blocks(cols, n):
            first, seen = int(rows[0]), int(rows[-1]) + 1
            a = self._products(rows, self._keys[:, :, self.m : self.m + seen], self.scale / temperature)
            a[:, :, first:].masked_fill_(cols[first:seen] > rows[:, None], -torch.inf)
            a.sub_(lse[rows].T[:, :, None]).exp_()
            out[:, :seen] += torch.bmm(weights[:, None, rows], a)[:, 0]
        return out

    def _sharp(self, temperature: float) -> Tensor:
        if temperature == 1.0 and self.lse is not None:
            return self.lse
        known = self.__dict__.setdefault("_sharpened", {})
        if temperature not in known:
            known[temperature] = self._lse(torch.arange(self.q.shape[0], device=self.q.device), temperature)
        sharp: Tensor = known[temperature]
        return sharp


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half].float(), x[..., half:].float()
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One prompt at one pruning point, before `layer` runs."""

    layer: int
    n_layers: int
    rows: Tensor  # [n, D] entering the layer
    visual: Tensor  # [V] int64, increasing: which rows are visual tokens; the others are text
    picture: Tensor  # [V] int64: the picture each is of, from 0
    cell: Tensor  # [V] int64: its place among its picture's offered tokens
    grids: Sequence[Grid]  # of the pictures, as offered
    entered: Sequence[int]  # visual tokens of each picture that entered the decoder
    seed: int  # derived from the pictures' contents
    views: Callable[[Which], View]  # of the layer before, whose attention was computed, or of this one, ahead of it
    inputs: Callable[[], Tensor]  # [n, D]: the rows as they entered the first layer

    @property
    def n(self) -> int:
        return self.rows.shape[0]

    @property
    def last(self) -> Tensor:
        """[1]: the last token of the prompt."""
        return torch.tensor([self.n - 1], device=self.rows.device)

    @cached_property
    def question(self) -> Tensor:
        """[Q] int64: the text after the last visual token; the last token if no text follows."""
        return torch.arange(min(int(self.visual[-1]) + 1, self.n - 1), self.n, device=self.rows.device)

    @cached_property
    def text(self) -> Tensor:
        """[n - V] int64: all rows that are text."""
        is_text = torch.ones(self.n, dtype=torch.bool, device=self.rows.device).index_fill(0, self.visual, False)
        return is_text.nonzero()[:, 0]

    def attention(
        self,
        rows: Tensor,
        which: Which = "before",
        *,
        over: Literal["all", "visual"] = "all",
        rotated: bool = True,
        per_head: bool = False,
    ) -> Tensor:
        """Attention that `rows` pay to the visual tokens, float32 [R, V], the mean over heads, or [n_heads, R, V].

        Args:
            over: the softmax is taken over all keys a row sees, or over the visual ones alone.
            rotated: False: with queries and keys before RoPE; then `over` must be "visual".
        """
        assert rotated or over == "visual", "without rotation earlier keys are not known"
        view = self.views(which) if rotated else self.views(which).plain
        n_heads, n_visual = view.q.shape[1], len(self.visual)
        parts = [view.q.new_empty((n_heads, 0, n_visual) if per_head else (0, n_visual), dtype=torch.float32)]
        for some in view.blocks(rows, n_visual):
            scores = view.scores(some, self.visual)
            if over == "visual":
                lse = scores.logsumexp(-1, keepdim=True)
                a = torch.where(lse.isfinite(), (scores - lse).exp(), 0.0)  # a row before every picture sees none
            else:
                a = scores.sub_(view.normaliser(some).T[:, :, None]).exp_()
            parts.append(a if per_head else a.mean(0))
        return torch.cat(parts, dim=-2)

    def received(self, rows: Tensor, which: Which = "before") -> Tensor:
        """[V] float32: attention the visual tokens get from `rows`, a mean over heads and rows; in pieces."""
        total = torch.zeros(len(self.visual), device=self.rows.device)
        for some in self.views(which).blocks(rows, len(self.visual)):
            total += self.attention(some, which).sum(0)
        return total / max(1, len(rows))

    def keys(self, which: Which = "before") -> Tensor:
        """[V, d] float32: the visual tokens' keys, rotated, a mean over heads."""
        view = self.views(which)
        return view.k[view.m + self.visual].float().mean(1)
