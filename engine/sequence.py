"""One choice of a request: its tokens, the number of computed tokens, and the draw of the next token."""

import time
from bisect import bisect_left
from collections.abc import Sequence as Many
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from foveate.engine.cache.sequence_cache import CacheSpace, SequenceCache
from foveate.engine.common import Usage
from foveate.engine.request import Request
from foveate.engine.sampler import Draw


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One choice of one request: 0 <= n_computed < n_tokens, and the sequence wants all of its tokens computed."""

    request: Request
    choice: int
    arrival: int  # order of arrival over all sequences
    space: InitVar[CacheSpace]  # where its cache takes blocks

    token_ids: list[int] = field(init=False)  # prompt and output
    draw: Draw = field(init=False)  # of its next token
    cache: SequenceCache = field(init=False)  # which of its tokens lies in which slot
    cached_tokens: int = 0  # prompt tokens found in the cache at the first admission
    n_preemptions: int = 0
    admitted: float | None = None  # monotonic seconds: first in a batch
    answered: float | None = None  # first token
    finish: str | None = None  # "stop", "length", "abort" or "error"

    def __post_init__(self, space: CacheSpace) -> None:
        request = self.request
        self.token_ids = list(request.prompt_ids)
        self.cache = SequenceCache(space, self.token_ids, request.depth, request.root_key, request.runs)
        self.draw = Draw(request.sampling, self.choice, self.token_ids, self.n_prompt, request.stop_ids)

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def n_output(self) -> int:
        return self.n_tokens - self.n_prompt

    @property
    def n_computed(self) -> int:
        """Tokens whose keys and values need not be computed any more."""
        return self.cache.n_computed

    @property
    def n_wanted(self) -> int:
        """Tokens that should be computed: all. A sequence with one missing token decodes; no flag marks decode."""
        return self.n_tokens

    @property
    def n_missing(self) -> int:
        return self.n_wanted - self.n_computed

    @property
    def is_finished(self) -> bool:
        return self.finish is not None

    @property
    def must_wait(self) -> bool:
        """A further choice waits for the first one left to compute the prompt, then finds it in the prefix cache."""
        first = next((s for s in self.request.sequences if s.n_output or not s.is_finished), self)
        return first is not self and not first.n_output

    def output_positions(self, start: int, stop: int) -> range:
        """Positions, the same on every axis, of tokens [start, stop) of the answer."""
        shift = self.request.next_pos - self.n_prompt
        return range(start + shift, stop + shift)

    def positions_of(self, tokens: Many[int]) -> Tensor:
        """[n_pos_axes, n] int64 positions of `tokens`, which increase."""
        n_prompt = bisect_left(tokens, self.n_prompt)
        prompt = self.request.positions[:, torch.tensor(tokens[:n_prompt], dtype=torch.int64)]
        shift = self.request.next_pos - self.n_prompt
        output = torch.tensor([token + shift for token in tokens[n_prompt:]], dtype=torch.int64)
        return torch.cat([prompt, output.expand(prompt.shape[0], -1)], dim=1)

    def positions(self, start: int, stop: int) -> Tensor:
        """[n_pos_axes, stop - start] int64 positions of tokens [start, stop); text runs on from `next_pos`."""
        prompt = self.request.positions[:, start:stop]
        first, last = max(start, self.n_prompt), max(stop, self.n_prompt)
        if first == last:
            return prompt
        output = torch.tensor(self.output_positions(first, last))
        return torch.cat([prompt, output.expand(prompt.shape[0], -1)], dim=1)

    def usage(self) -> Usage:
        """Usage of the choice at its end.

        Queue, prefill and decode add up to the life of the choice. `encode_s` (batches of the tower with its pictures)
        and `reduce_s` lie within the first two.
        """
        now, request = time.monotonic(), self.request
        admitted = self.admitted or now
        answered = self.answered or now
        return Usage(
            cached_tokens=self.cached_tokens,
            output_tokens=self.n_output,
            encoder_hits=request.encoder_hits,
            preemptions=self.n_preemptions,
            queue_s=admitted - request.arrived,
            encode_s=request.encode_s,
            reduce_s=request.reduce_s,
            prefill_s=answered - admitted,
            decode_s=now - answered,
            peak_kv_tokens=self.cache.peak_tokens(),
            kept=[picture.anchors.tolist() for picture in request.pictures] if request.explains else [],
        )
