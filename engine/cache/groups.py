"""Layer groups of a sequence, and the tokens that each group holds: the cache's view of a prompt."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Consecutive decoder layers that hold the same tokens of a sequence, hence share a block table."""

    layers: range
    counts: tuple[int, ...] = ()  # visual tokens that the group holds, per picture
    dropped: int = 0  # visual tokens of the prompt that the group lacks


class TokenMap(Protocol):
    """Which tokens of a sequence each layer group holds. Group 0 holds every token.

    The tokens [start, stop) are the *span*. While nothing is decided, deeper groups hold no token of the span.
    """

    @property
    def groups(self) -> tuple[LayerGroup, ...]: ...

    @property
    def start(self) -> int: ...

    @property
    def n_layers(self) -> int: ...

    def count(self, group: int, n: int) -> int:
        """Tokens that a group holds of the first `n` tokens of the sequence."""

    def tokens(self, group: int, start: int, stop: int) -> list[int]:
        """Tokens of [start, stop) that a group holds, increasing."""

    def n_known(self, group: int, n: int) -> int:
        """Decided tokens that a group holds of the first `n`. Block keys cover only decided tokens."""

    def reach(self, group: int, n: int) -> int:
        """Largest sequence length whose tokens in this group fit into the first `n` tokens of the group."""

    def resume(self, n: int) -> int:
        """Where computation goes on when the first `n` tokens are found in the cache."""

    def block(self, group: int, token_ids: list[int], first: int, stop: int) -> tuple[list[int], bytes]:
        """Ids of the tokens [first, stop) of a group, and the bytes on which their choice depends."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Rows of a span's tokens that wait before the first pruning point, from the start of the span."""

    rows: Tensor  # [n, hidden_size], input of the layer of the point
    q: Tensor  # [n, n_heads, d] of the layer before
    lse: Tensor  # [n, n_heads], log-sum-exp of the attention scores of the layer before

    def joined(self, later: "Waiting") -> "Waiting":
        """These rows and the rows that follow them."""
        pairs = ((self.rows, later.rows), (self.q, later.q), (self.lse, later.lse))
        return Waiting(*(torch.cat(pair) for pair in pairs))

    def first(self, n: int) -> "Waiting":
        """The first `n` rows, copied: a view would keep all of them alive."""
        return Waiting(self.rows[:n].clone(), self.q[:n].clone(), self.lse[:n].clone())
