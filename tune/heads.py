"""Find the retrieval heads of a decoder. Later methods may keep the cached tokens of these heads.

Source: the search of RazorAttention, Tang et al., 2024, arXiv:2407.15891. A repeated block of random tokens has no
meaning. So a head that attends to the earlier copy of a token (echo), or to the token after the copy (induction), is a
retrieval head. The search needs no data.
Differences from the paper: the block has 2500 tokens or a quarter of the context, whichever is less; the union of both
choices is over all layers (the released code returns inside the loop over layers); if query heads share a key head, the
key head's score is the best score of its query heads.
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
ECHO_SHARE, INDUCTION_SHARE = 0.01, 0.14  # shares of the heads; at least one head each
_CHUNK, _PAGE = 512, 16  # rows per pass, slots per block


@dataclass(frozen=True, slots=True)
class Heads:
    """Scores of every key head, in [0, 1], and the list of retrieval heads."""

    block: int  # number of repeated tokens
    echo: list[list[float]]  # [n_layers][n_kv_heads]
    induction: list[list[float]]
    retrieval: list[tuple[int, int]]  # (layer, key head), ascending


@torch.inference_mode()
def find_heads(model: Model, vocabulary: Sequence[int], seed: int, block: int = BLOCK) -> Heads:
    """Run a repeated block of random tokens through the decoder, layer by layer.

    The tokens are drawn from `vocabulary` with `seed`.
    """
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
    """Attention of one layer over a sequence in pieces. Sums the attention to earlier copies.

    Each row needs only a few columns. So one dot product per column and the kernel's log-sum-exp are enough.
    """

    def __init__(self, model: Model, n: int, block: int) -> None:
        spec = model.spec
        shape = (ceil(n / _PAGE), _PAGE, spec.n_kv_heads, spec.head_dim)
        self._keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._values = torch.zeros_like(self._keys)
        self._pages = torch.arange(shape[0], dtype=torch.int32, device=model.device)[None]
        self._scale, self._block, self._n = spec.head_dim**-0.5, block, n
        self.start = 0  # first row of the piece
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
        """Average over the rows that have an earlier copy. Take the best query head of each key head."""
        rows = self._n - self._block
        best = (total / rows).view(self._keys.shape[2], -1).amax(1)
        return [float(x) for x in best]

    def _paid(self, q: Tensor, keys: Tensor, lse: Tensor, back: int) -> Tensor:
        """Sum the attention of rows with an earlier copy to the column `back` before the row: [n_heads]."""
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
    """Return the best `share` of the heads over all layers, at least one head. Ties go to the first head."""
    ranked = sorted((-score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row))
    return [(layer, head) for _, layer, head in ranked[: max(1, int(share * len(ranked)))]]
