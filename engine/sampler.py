"""From logits to tokens, one row per sequence, in one batch.

The law of a row, in this order: raw logits, + logit_bias, stop tokens masked until min_tokens, repetition / presence /
frequency penalties, / temperature, min-p, top-k, top-p. Temperature 0 takes the largest after the penalties, ties to
the lowest id.

The draw is argmax(logit + Gumbel noise), and the noise is a function of (seed, choice, output index, token) alone. So
a token never depends on its batch neighbours, on preemption, or on whether the row was speculated.

Log-probabilities come from the raw logits, before bias, penalties and temperature.

Unused settings cost nothing: a row without bias, mask or penalty is not copied, a greedy one is read once,
and no vocabulary is sorted (`kernels/draw.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.engine.common import SamplingParams, TokenLogprob
from foveate.kernels.draw import Law, draw
from foveate.kernels.largest import largest


@dataclass(eq=False, slots=True)
class Draw:
    """Sampling state of one row. Lives as long as the sequence, so each token is counted once."""

    params: SamplingParams
    choice: int
    token_ids: Sequence[int]  # prompt and output so far; only ever appended to
    n_prompt: int
    stop_ids: frozenset[int]  # masked until min_tokens are out

    _seen: "_Seen | None" = field(init=False, default=None)  # where penalties ask for it

    @property
    def index(self) -> int:
        """Index of the next output token."""
        return len(self.token_ids) - self.n_prompt

    @property
    def adjusts(self) -> bool:
        """Whether bias, mask or penalties change the logits."""
        p = self.params
        penalised = p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty
        return bool(penalised or p.logit_bias or (self.stop_ids and self.index < p.min_tokens))

    @property
    def law(self) -> Law:
        """Sampling law of the next token."""
        p = self.params
        name = f"{p.seed}/{self.choice}/{self.index}".encode()
        digest = blake2b(name, digest_size=12).digest()
        key = (int.from_bytes(digest[:4]), int.from_bytes(digest[4:8]), int.from_bytes(digest[8:]))
        return Law(p.temperature, p.top_k, p.top_p, p.min_p, key)

    def seen(self, device: torch.device) -> "_Seen":
        """The tokens so far, counted."""
        seen, self._seen = self._seen or _Seen(device), None  # counted anew if counting raises half-way
        seen.catch_up(self.token_ids, self.n_prompt)
        self._seen = seen
        return seen


class _Seen:
    """The different tokens of a sequence in order of first appearance, and how often each is in the output."""

    def __init__(self, device: torch.device) -> None:
        self.n = 0  # different tokens
        self._n_read = 0
        self._place: dict[int, int] = {}
        self._ids = torch.zeros(256, dtype=torch.int64, device=device)
        self._counts = torch.zeros(256, dtype=torch.float32, device=device)

    @property
    def ids(self) -> Tensor:
        """[n] int64."""
        return self._ids[: self.n]

    @property
    def counts(self) -> Tensor:
        """[n] float32, of the output only."""
        return self._counts[: self.n]

    def catch_up(self, token_ids: Sequence[int], n_prompt: int) -> None:
        """Count the tokens that came since the last call."""
        if self._n_read < n_prompt:  # at once
            fresh = token_ids[self._n_read : n_prompt]
            self._append([i for i in dict.fromkeys(fresh) if i not in self._place])
            self._n_read += len(fresh)
        for token_id in token_ids[self._n_read :]:
            if token_id not in self._place:
                self._append([token_id])
            self._counts[self._place[token_id]] += 1
        self._n_read = len(token_ids)

    def _append(self, ids: list[int]) -> None:
        total = self.n + len(ids)
        if total > len(self._ids):
            pad = (0, 2 * total - len(self._ids))
            self._ids, self._counts = (torch.nn.functional.pad(x, pad) for x in (self._ids, self._counts))
        self._ids[self.n : total] = torch.tensor(ids, dtype=torch.int64)
        self._place.update(zip(ids, range(self.n, total), strict=True))
        self.n = total


class Drawn(NamedTuple):
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
    rows = list(logits.unbind())
    chosen, finite = largest(rows)
    adjusted = [i for i, row in enumerate(draws) if finite[i] and row.adjusts]
    for i in adjusted:
        rows[i] = _adjust(rows[i].clone(), draws[i])
    hot = [i for i, row in enumerate(draws) if finite[i] and row.params.temperature > 0]
    cold = [i for i in adjusted if draws[i].params.temperature == 0]
    if cold:
        _put(chosen, cold, largest([rows[i] for i in cold])[0])
    if hot:
        _put(chosen, hot, draw([rows[i] for i in hot], [draws[i].law for i in hot]))
    return [
        Drawn(token_id, _logprob(logits[i], token_id, row.params.logprobs)) if finite[i] else None
        for i, (token_id, row) in enumerate(zip(chosen, draws, strict=True))
    ]


def _put(into: list[int], places: Sequence[int], values: Sequence[int]) -> None:
    for place, value in zip(places, values, strict=True):
        into[place] = value


def _adjust(row: Tensor, draw: Draw) -> Tensor:
    """Apply bias, mask and penalties to [vocab_size] scores in place."""
    params = draw.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    if draw.index < params.min_tokens and draw.stop_ids:
        row[torch.tensor(sorted(draw.stop_ids), device=row.device)] = -torch.inf
    if params.repetition_penalty != 1.0:  # of prompt and output alike, as in Keskar et al., 2019, arXiv:1909.05858
        ids = draw.seen(row.device).ids
        seen = row[ids]
        row[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:  # of the output only, as OpenAI defines them
        seen_tokens = draw.seen(row.device)
        times = seen_tokens.counts
        row[seen_tokens.ids] -= params.presence_penalty * (times > 0) + params.frequency_penalty * times
    return row


def _logprob(logits: Tensor, token_id: int, n_top: int | None) -> TokenLogprob | None:
    if n_top is None:
        return None
    total = logits.logsumexp(-1)
    values, ids = logits.topk(min(n_top, logits.shape[0]))
    top = list(zip(ids.tolist(), (values - total).tolist(), strict=True))
    return TokenLogprob(token_id, float(logits[token_id] - total), top)
