"""From logits to tokens, one row per sequence, in one batch.

The law of a row, in this order: raw logits, + logit_bias, stop tokens masked until min_tokens, repetition / presence /
frequency penalties, / temperature, min-p, top-k, top-p. Temperature 0 takes the largest after the penalties, ties to
the lowest id.

The draw is argmax(logit + Gumbel noise), and the noise is a function of (seed, choice, output index, token) alone. So
a token never depends on its batch neighbours, on preemption, or on whether the row was speculated.

Log-probabilities are those of the raw logits: the model's own, before bias, penalties and temperature.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from foveate.engine.messages import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row needs to know."""

    params: SamplingParams
    choice: int
    token_ids: Sequence[int]  # prompt and output so far
    n_prompt: int
    stop_ids: frozenset[int]  # masked until min_tokens are out

    @property
    def index(self) -> int:
        """Of the output token to be drawn."""
        return len(self.token_ids) - self.n_prompt


@dataclass(frozen=True, slots=True)
class Drawn:
    token_id: int
    logprob: TokenLogprob | None  # if asked for


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn | None]:
    """Draw one token per row.

    Args:
        logits: [m, vocab_size] float32; not changed.

    Returns:
        a token per row; None where a logit is not finite, which concerns that row alone.
    """
    assert logits.shape[0] == len(draws), "one draw per row"
    if not draws:
        return []
    finite = torch.isfinite(logits).all(-1).tolist()
    scores = logits.clone()
    for row, draw in zip(scores, draws, strict=True):
        _adjust(row, draw)
    chosen = scores.argmax(-1)
    hot = [i for i, draw in enumerate(draws) if draw.params.temperature > 0 and finite[i]]
    if hot:
        chosen[hot] = _draw(scores[hot], [draws[i] for i in hot])
    return [
        Drawn(token_id, _logprob(logits[i], token_id, draw.params.logprobs)) if finite[i] else None
        for i, (token_id, draw) in enumerate(zip(chosen.tolist(), draws, strict=True))
    ]


def _adjust(row: Tensor, draw: Draw) -> None:
    """Apply bias, mask and penalties to [vocab_size] scores in place."""
    params = draw.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    if draw.index < params.min_tokens and draw.stop_ids:
        row[torch.tensor(sorted(draw.stop_ids), device=row.device)] = -torch.inf
    if params.repetition_penalty != 1.0:  # of prompt and output alike, as in Keskar et al., 2019, arXiv:1909.05858
        ids = torch.tensor(sorted(set(draw.token_ids)), device=row.device)
        seen = row[ids]
        row[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:  # of the output only, as OpenAI defines them
        counts = Counter(draw.token_ids[draw.n_prompt :])
        ids = torch.tensor(list(counts), device=row.device, dtype=torch.int64)
        times = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
        row[ids] -= params.presence_penalty + params.frequency_penalty * times


def _draw(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[h, vocab_size] scores of rows with a temperature -> [h] int64 tokens."""
    temperature = torch.tensor([[d.params.temperature] for d in draws], dtype=torch.float64, device=scores.device)
    scores = scores.double() / temperature
    narrow = [i for i, d in enumerate(draws) if d.params.top_p < 1 or d.params.top_k > 0 or d.params.min_p > 0]
    if narrow:
        scores[narrow] = truncate(scores[narrow], [draws[i].params for i in narrow])
    return (scores + gumbel(draws, scores.shape[1], scores.device)).argmax(-1)


def truncate(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Set what min-p, top-k and top-p cut off to -inf; at least the most likely token stays, ties to the lowest id.

    Args:
        scores: [h, vocab_size] float64, after temperature.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    keep = ordered >= ordered[:, :1] + column([p.min_p for p in params]).log()
    keep &= rank < column([p.top_k or scores.shape[1] for p in params])
    probs = ordered.masked_fill(~keep, -torch.inf).softmax(-1)
    before = probs.cumsum(-1) - probs  # mass of the tokens ahead; 1 may be reached early by rounding
    keep &= before < column([p.top_p if p.top_p < 1 else torch.inf for p in params])
    keep[:, 0] = True
    return scores.masked_fill(~torch.zeros_like(keep).scatter_(-1, ids, keep), -torch.inf)


_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that spreads every bit. Held in int64, with factors below 2^31: nothing overflows."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def gumbel(draws: Sequence[Draw], n: int, device: torch.device) -> Tensor:
    """[h, n] float64 standard Gumbel noise, row r a function of (seed, choice, index) of `draws[r]` alone.

    Counter-based: token t's word is a keyed hash of t, so nothing is drawn in sequence. 32 random bits per word.
    """
    keys = []
    for draw in draws:
        name = f"{draw.params.seed}/{draw.choice}/{draw.index}".encode()
        digest = blake2b(name, digest_size=12).digest()
        keys.append([int.from_bytes(digest[i : i + 4]) for i in (0, 4, 8)])
    key = torch.tensor(keys, device=device)  # [h, 3] int64
    token = torch.arange(n, device=device)
    word = _mix((token + key[:, 0:1]) & _MASK)
    word = _mix(word ^ key[:, 1:2])
    word = _mix((word + key[:, 2:3]) & _MASK)
    uniform = (word.double() + 0.5) / 2**32  # in (0, 1), never an end
    return -(-uniform.log()).log()


def _logprob(logits: Tensor, token_id: int, n_top: int | None) -> TokenLogprob | None:
    if n_top is None:
        return None
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n_top, logprobs.shape[0]))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)
