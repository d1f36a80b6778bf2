"""Draw a token of each row of scores: temperature, min-p, top-k, top-p and Gumbel noise."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.kernels.hardware.dispatch import choose
from foveate.kernels.largest import check_rows


class Law(NamedTuple):
    """How one row is drawn. Its noise is a function of `key` and the token alone."""

    temperature: float  # above 0
    top_k: int  # 0: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    key: tuple[int, int, int]  # 32 bits each


def draw(rows: Sequence[Tensor], laws: Sequence[Law]) -> list[int]:
    """Draw one token per row: the largest of score / temperature + noise among what min-p, top-k and top-p leave.

    Args:
        rows: [n] float32 each, of one length, no NaN and not all of it -inf.
    """
    assert len(rows) == len(laws), "one law per row"
    check_rows(rows)
    return choose(reference, rows[0].device, rows[0].dtype)(rows, laws)


def reference(rows: Sequence[Tensor], laws: Sequence[Law]) -> list[int]:
    """The definition, in float64 with a stable sort."""
    scores = torch.stack(list(rows)).double()
    scores /= _column([law.temperature for law in laws], scores)
    narrow = [i for i, law in enumerate(laws) if law.top_p < 1 or law.top_k > 0 or law.min_p > 0]
    if narrow:
        scores[narrow] = truncate(scores[narrow], [laws[i] for i in narrow])
    return (scores + gumbel([law.key for law in laws], scores.shape[1], scores.device)).argmax(-1).tolist()


def truncate(scores: Tensor, laws: Sequence[Law]) -> Tensor:
    """Set what min-p, top-k and top-p cut off to -inf; at least the most likely token stays, ties to the lowest id.

    Args:
        scores: [h, vocab_size] float64, after temperature.
    """
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    keep = ordered >= ordered[:, :1] + _column([law.min_p for law in laws], scores).log()
    keep &= rank < _column([law.top_k or scores.shape[1] for law in laws], scores)
    probs = ordered.masked_fill(~keep, -torch.inf).softmax(-1)
    before = probs.cumsum(-1) - probs  # mass of the tokens ahead; 1 may be reached early by rounding
    keep &= before < _column([law.top_p if law.top_p < 1 else torch.inf for law in laws], scores)
    keep[:, 0] = True
    return scores.masked_fill(~torch.zeros_like(keep).scatter_(-1, ids, keep), -torch.inf)


def gumbel(keys: Sequence[tuple[int, int, int]], n: int, device: torch.device) -> Tensor:
    """[h, n] float64 standard Gumbel noise, row r a function of `keys[r]` alone.

    Counter-based: token t's word is a keyed hash of t, so nothing is drawn in sequence. 32 random bits per word.
    """
    key = torch.tensor(keys, device=device)  # [h, 3] int64
    token = torch.arange(n, device=device)
    word = _mix((token + key[:, 0:1]) & _MASK)
    word = _mix(word ^ key[:, 1:2])
    word = _mix((word + key[:, 2:3]) & _MASK)
    uniform = (word.double() + 0.5) / 2**32  # in (0, 1), never an end
    return -(-uniform.log()).log()


_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that spreads every bit. Held in int64, with factors below 2^31: nothing overflows."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
