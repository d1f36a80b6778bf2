"""Which heads of a decoder look something up: what later methods may spare when they drop cached tokens.

Source: the search of RazorAttention, Tang et al., 2024, arXiv:2407.15891: a block of random tokens, repeated, has no
meaning, so a head that looks at the earlier copy of a token (echo), or at what came after that copy (induction), does
so because it looks things up. No data is needed.
Departs from it: the block is as long as the paper's 2500 tokens or a quarter of the context, whichever is less; the
union of both choices is over all layers (the released code returns from within the loop over layers); where heads
share keys, a key head scores as its best query head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from foveate.engine.models.base import Attention, Model
from foveate.kernels.attention import AttentionBatch, paged_attention

BLOCK = 2500  # tokens
REPEATS = 4
ECHO_SHARE, INDUCTION_SHARE = 0.01, 0.14  # of the heads, at least one each
_CHUNK, _PAGE = 512, 16  # rows at a time, slots of a block


@dataclass(frozen=True, slots=True)
class Heads:
    """Scores of every key head, between 0 and 1, and which heads count as retrieval heads."""

    block: int  # tokens that were repeated
    echo: list[list[float]]  # by layer and key head
    induction: list[list[float]]
    retrieval: list[tuple[int, int]]  # (layer, key head), ascending


@torch.inference_mode()
def find_heads(model: Model, vocabulary: Sequence[int], seed: int, block: int = BLOCK) -> Heads:
    """Run a repeated block of tokens, drawn from `vocabulary` by `seed`, through the decoder, layer by layer."""
    spec = model.spec
    block = min(block, spec.max_context // REPEATS)
    n = REPEATS * block
    noise = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(vocabulary), (block,), generator=noise)
    ids = torch.tensor(vocabulary)[drawn].repeat(REPEATS)
    positions = torch.arange(n).expand(spec.n_pos_axes, n)
    rotary = model.rotary(positions.to(model.device))
    rows = model.embed(ids.to(model.device))
    echo, induction = [], []
    for layer in range(spec.n_layers):
        watching = _Watching(model, n, block)
        parts = []
        for start in range(0, n, _CHUNK):
            some = torch.arange(start, min(start + _CHUNK, n), device=model.device)
            watching.start = start
            parts.append(model.run(rows[some], rotary.take(some), watching, range(layer, layer + 1)))
        rows = torch.cat(parts)
        echo.append(watching.mean(watching.echo))
        induction.append(watching.mean(watching.induction))
    return Heads(block, echo, induction, sorted({*_best(echo, ECHO_SHARE), *_best(induction, INDUCTION_SHARE)}))


class _Watching(Attention):
    """Attention of one layer over a sequence that comes in pieces, and what of it goes to earlier copies.

    A row needs a handful of columns, so a product for each and the log-sum-exp that the kernel gives are enough.
    """

    def __init__(self, model: Model, n: int, block: int) -> None:
        spec = model.spec
        shape = (ceil(n / _PAGE), _PAGE, spec.n_kv_heads, spec.head_dim)
        self._keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._values = torch.zeros_like(self._keys)
        self._pages = torch.arange(shape[0], dtype=torch.int32, device=model.device)[None]
        self._scale, self._block, self._n = spec.head_dim**-0.5, block, n
        self.start = 0  # of the piece
        self.echo = torch.zeros(spec.n_heads)
        self.induction = torch.zeros(spec.n_heads)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.start + len(q)
        keys, values = self._keys.flatten(0, 1), self._values.flatten(0, 1)
        keys[self.start : end], values[self.start : end] = k.to(keys.dtype), v.to(values.dtype)
        batch = AttentionBatch([0, len(q)], [end], self._pages)
        out, lse = paged_attention(q, self._keys, self._values, batch, scale=self._scale)
        for back in range(self._block, end + 1, self._block):
            self.echo += self._paid(q, keys, lse, back)
            self.induction += self._paid(q, keys, lse, back - 1)
        return out

    def mean(self, total: Tensor) -> list[float]:
        """Over the rows that have an earlier copy; of each key head its best query head."""
        rows = self._n - self._block
        best = (total / rows).view(self._keys.shape[2], -1).amax(1)
        return [float(x) for x in best]

    def _paid(self, q: Tensor, keys: Tensor, lse: Tensor, back: int) -> Tensor:
        """[n_heads]: attention that rows with an earlier copy pay to the column `back` before them, summed."""
        first = max(self.start, self._block, back)
        if first >= self.start + len(q):
            return torch.zeros(q.shape[1])
        rows = torch.arange(first, self.start + len(q), device=q.device)
        k = keys[rows - back].float().repeat_interleave(q.shape[1] // keys.shape[1], 1)
        own = rows - self.start
        scores = (q[own].float() * k).sum(-1) * self._scale
        paid: Tensor = (scores - lse[own]).exp().sum(0)
        return paid.cpu()


def _best(scores: Sequence[Sequence[float]], share: float) -> list[tuple[int, int]]:
    """The best heads of all layers together, `share` of them and at least one; ties to the first."""
    ranked = sorted((-score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row))
    return [(layer, head) for _, layer, head in ranked[: max(1, int(share * len(ranked)))]]
