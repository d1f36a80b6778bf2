"""The reduce family: one image's visual tokens in, a token transform out.

A method is one file with one frozen dataclass, bound to the module's name `METHOD`; its fields are its settings. It
receives tensors of one image and its own fields, never the runner, the scheduler or a config. Most methods implement
`select` alone; one that mixes rows implements `transform`, and `count` where it cannot meet every budget exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.engine.grid import Grid

Signal = Literal["cls_attention", "received", "keys", "enc"]


@dataclass(frozen=True, kw_only=True)
class VisualInputs:
    """What the vision tower says about one image, M = grid.n_tokens rows in raster order.

    Encoders that merge patches (Qwen-VL) give each signal per merged token: the mean over its patches. A signal is
    None unless it was asked for (`Reducer.signals`) or the encoder has none.
    """

    grid: Grid
    proj: Tensor  # [M, D] rows as the language model would read them
    enc: Tensor | None = None  # [M, C] rows before the projector, at the select layer; None for merging encoders
    cls: Tensor | None = None  # [C] the CLS row at the select layer, with `enc`
    cls_attention: Tensor | None = None  # [M] float32, softmax attention of CLS to each patch, mean over heads
    received: Tensor | None = None  # [M] float32, attention received: mean over all queries and heads
    keys: Tensor | None = None  # [M, d] float32, key projection averaged over heads
    project: Callable[[Tensor], Tensor] | None = None  # enc rows [n, C] -> [n, D], with `enc`
    seed: int = 0  # from the image digest: the same picture gives the same draw


@dataclass(frozen=True, kw_only=True)
class TokenTransform:
    """`out = W @ rows` with sparse W in CSR, plus what positions and accounting need.

    Pure selection: one index of weight 1 per row (`weights` None). Rows come in reading order of their anchors. All
    tensors are on the CPU, where the scheduler lays out positions; `apply` carries them to the rows.
    """

    n_in: int
    indptr: Tensor  # [n_out + 1] int64
    indices: Tensor  # [nnz] int64, < n_in
    anchor: Tensor  # [n_out] int64, the source row that lends its position, strictly increasing
    size: Tensor  # [n_out] int64, how many source rows the row stands for
    weights: Tensor | None = None  # [nnz] float32
    space: Literal["proj", "enc"] = "proj"  # the rows W acts on

    @property
    def n_out(self) -> int:
        return self.anchor.shape[0]

    @property
    def is_identity(self) -> bool:
        return self.weights is None and self.n_out == self.n_in

    @classmethod
    def identity(cls, n: int) -> "TokenTransform":
        return cls.selection(torch.arange(n), n)

    @classmethod
    def selection(cls, kept: Tensor, n_in: int) -> "TokenTransform":
        """Keep rows `kept` ([k] int64, strictly increasing, any device) of `n_in` as they are."""
        kept = kept.cpu()
        k = kept.shape[0]
        return cls(
            n_in=n_in,
            indptr=torch.arange(k + 1),
            indices=kept,
            anchor=kept,
            size=torch.ones(k, dtype=torch.int64),
        )

    def apply(self, inputs: VisualInputs) -> Tensor:
        """Return [n_out, D] rows for the language model in the dtype of `proj`; identity returns `proj` itself."""
        if self.is_identity:
            return inputs.proj
        if self.space == "proj":
            return self._mix(inputs.proj)
        assert inputs.enc is not None and inputs.project is not None, "an enc-space transform needs encoder rows"
        return inputs.project(self._mix(inputs.enc))

    def _mix(self, rows: Tensor) -> Tensor:
        picked = rows[self.indices.to(rows.device)]
        if self.weights is None:
            return picked
        terms = picked.float() * self.weights.to(rows.device)[:, None]
        owner = torch.repeat_interleave(torch.arange(self.n_out), self.indptr.diff()).to(rows.device)
        out = terms.new_zeros(self.n_out, rows.shape[1]).index_add_(0, owner, terms)
        return out.to(rows.dtype)


@dataclass(frozen=True, kw_only=True)
class Reducer:
    """Base of the family. Deterministic: scores in float32, ties to the lower index, randomness from `inputs.seed`."""

    source: ClassVar[str] = ""  # the paper, for GET /v1/vlm/methods
    question_aware: ClassVar[bool] = False  # a question-aware result is never shared between prompts

    def signals(self, has_cls: bool) -> frozenset[Signal]:
        """What must be tapped while the encoder runs, asked for before it does."""
        return frozenset()

    def count(self, grid: Grid, budget: int) -> int:
        """Tokens kept under `budget`: pure arithmetic, since the scheduler admits by it before anything is encoded."""
        return min(budget, grid.n_tokens)

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        """Return [k] int64 rows to keep, strictly increasing; 0 < k < M."""
        raise AssertionError(f"{type(self).__name__} implements neither select nor transform")

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        """Return a transform of k rows, k = `count(inputs.grid, budget)` < M."""
        return TokenTransform.selection(self.select(inputs, k), inputs.grid.n_tokens)

    def reduce(self, inputs: VisualInputs, budget: int) -> TokenTransform:
        """Return a transform of exactly `count(inputs.grid, budget)` rows; keep-all is the identity, bit for bit.

        Raises:
            ImageError: a signal the method ranks by is not finite.
        """
        n = inputs.grid.n_tokens
        assert budget > 0, "every image keeps at least one token"
        k = self.count(inputs.grid, budget)
        if k == n:
            return TokenTransform.identity(n)
        transform = self.transform(inputs, k)
        assert transform.n_out == k, "a reducer keeps exactly what it announced: the scheduler admitted by it"
        return transform
