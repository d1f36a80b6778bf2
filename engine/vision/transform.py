"""The one output of every reducer: which sums of rows enter the language model, and what they stand for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Space = Literal["proj", "enc"]


@dataclass(frozen=True, kw_only=True)
class TokenTransform:
    """`out = W @ rows`, plus what positions and accounting need.

    W is sparse, in CSR (pure selection: one index per row, `weights` None), or dense and signed (`matrix`; then
    `indptr` is all zeros, `indices` empty, and `back_map` says which row stands for which). Rows come in reading order
    of their anchors. All tensors are on the CPU, where the scheduler lays out positions; `apply` carries them over.
    """

    n_in: int
    indptr: Tensor  # [n_out + 1] int64
    indices: Tensor  # [nnz] int64, < n_in
    anchor: Tensor  # [n_out] int64, the source row that lends its position, strictly increasing
    size: Tensor  # [n_out] int64, how many source rows the row stands for
    weights: Tensor | None = None  # [nnz] float32
    space: Space = "proj"  # the rows W acts on
    matrix: Tensor | None = None  # [n_out, n_in] float32
    back_map: Tensor | None = None  # [n_in] int64, with `matrix`
    before: "TokenTransform | None" = None  # an enc-space transform that mixes, applied and projected first

    @property
    def n_out(self) -> int:
        return self.anchor.shape[0]

    @property
    def is_selection(self) -> bool:
        return self.weights is None and self.matrix is None and self.before is None

    @property
    def is_identity(self) -> bool:
        return self.is_selection and self.n_out == self.n_in

    @property
    def owner(self) -> Tensor:
        """[nnz] int64: the output row of each term."""
        return torch.repeat_interleave(torch.arange(self.n_out), self.indptr.diff())

    @property
    def back(self) -> Tensor:
        """[n_in] int64: the output row that stands for each source row, -1 where it was dropped.

        An anchor's is its own; of several others it is the one with the largest weight, the first of equal ones.
        """
        if self.back_map is not None:
            return self.back_map
        out = torch.full((self.n_in,), -1)
        owner, indices = self.owner, self.indices
        if self.weights is not None:
            order = torch.sort(self.weights, stable=True, descending=True).indices.flip(0)  # the heaviest is last
            ranks = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
            best = torch.full((self.n_in,), -1).scatter_reduce_(0, indices, ranks, "amax")
            mine = best[indices] == ranks
            owner, indices = owner[mine], indices[mine]
        return out.index_copy_(0, indices, owner).index_copy_(0, self.anchor, torch.arange(self.n_out))

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

    @classmethod
    def merging(
        cls, owner: Tensor, anchor: Tensor, weights: Tensor | None = None, space: Space = "proj"
    ) -> "TokenTransform":
        """Each source row goes into one output row, or none.

        Args:
            owner: [n_in] int64, output row of each source row; -1 drops it. Every output row has a source.
            anchor: [n_out] int64, strictly increasing.
            weights: [n_in] float32, what each source row weighs; None: the plain mean.
        """
        owner, anchor = owner.cpu(), anchor.cpu()
        kept = (owner >= 0).nonzero()[:, 0]
        indices = kept[torch.sort(owner[kept], stable=True).indices]
        size = torch.bincount(owner[kept], minlength=anchor.shape[0])
        term = 1.0 / size[owner[indices]] if weights is None else weights.float().cpu()[indices]
        return cls(
            n_in=owner.shape[0],
            indptr=starts(size),
            indices=indices,
            weights=term,
            anchor=anchor,
            size=size,
            space=space,
        )

    @classmethod
    def dense(cls, matrix: Tensor, anchor: Tensor, back: Tensor, space: Space = "proj") -> "TokenTransform":
        """A signed W [n_out, n_in] that mixes many rows into many.

        Args:
            back: [n_in] int64, which output row stands for each source row, -1 for none; anchors' are set here.
        """
        n_out, n_in = matrix.shape
        anchor = anchor.cpu()
        back = back.cpu().index_copy(0, anchor, torch.arange(n_out))
        return cls(
            n_in=n_in,
            indptr=torch.zeros(n_out + 1, dtype=torch.int64),
            indices=torch.zeros(0, dtype=torch.int64),
            anchor=anchor,
            size=torch.bincount(back[back >= 0], minlength=n_out),
            matrix=matrix.float().cpu(),
            back_map=back,
            space=space,
        )

    def mix(self, rows: Tensor) -> Tensor:
        """W @ rows: [n_in, D] -> [n_out, D] in the dtype of `rows`, summed in float32."""
        if self.matrix is not None:
            return (self.matrix.to(rows.device) @ rows.float()).to(rows.dtype)
        picked = rows[self.indices.to(rows.device)]
        if self.weights is None:
            return picked
        terms = picked.float() * self.weights.to(rows.device)[:, None]
        out = terms.new_zeros(self.n_out, rows.shape[1]).index_add_(0, self.owner.to(rows.device), terms)
        return out.to(rows.dtype)

    def apply_to(self, proj: Tensor, enc: Tensor | None, project: Callable[[Tensor], Tensor] | None) -> Tensor:
        """[n_out, D] rows for the language model in the dtype of `proj`; the identity returns `proj` itself."""
        if self.before is not None:
            return self.mix(self.before.apply_to(proj, enc, project))
        if self.is_identity:
            return proj
        if self.space == "proj" or self.is_selection:
            return self.mix(proj)
        assert enc is not None and project is not None, "an enc-space transform needs encoder rows"
        return project(self.mix(enc))

    def carry(self, rows: Tensor) -> Tensor:
        """[n_in, D] -> [n_out, D]: the same sums of other rows of the picture, in whatever space it mixes."""
        return self.mix(rows if self.before is None else self.before.carry(rows))

    def then(self, second: "TokenTransform") -> "TokenTransform":
        """This transform, and `second` over its rows, as one: W2 @ W1 with anchors, sizes and backs composed."""
        assert second.n_in == self.n_out, "the second transform acts on what the first leaves"
        anchor = self.anchor[second.anchor]
        if self.is_selection and second.is_selection:
            return TokenTransform.selection(anchor, self.n_in)
        back, forth = self.back, second.back
        back = torch.where(back < 0, back, forth[back.clamp(min=0)])
        size = torch.bincount(back[back >= 0], minlength=second.n_out)
        mixes_both = not self.is_selection and not second.is_selection
        if self.before is not None or second.before is not None or (mixes_both and self.space != second.space):
            assert second.before is None, "only the first of two transforms acts on encoder rows"
            return replace(second, n_in=self.n_in, anchor=anchor, size=size, back_map=back, before=self)
        matrix = second.to_matrix() @ self.to_matrix()
        space = second.space if self.is_selection else self.space
        whole = replace(TokenTransform.dense(matrix, anchor, back, space), size=size)
        if self.matrix is not None or second.matrix is not None:
            return whole
        terms = matrix.nonzero()
        indptr = starts(torch.bincount(terms[:, 0], minlength=second.n_out))
        return replace(whole, matrix=None, indptr=indptr, indices=terms[:, 1], weights=matrix[terms[:, 0], terms[:, 1]])

    def to_matrix(self) -> Tensor:
        """W as [n_out, n_in] float32."""
        if self.matrix is not None:
            return self.matrix
        weights = torch.ones(len(self.indices)) if self.weights is None else self.weights
        return torch.zeros(self.n_out, self.n_in).index_put_((self.owner, self.indices), weights, accumulate=True)


def starts(size: Tensor) -> Tensor:
    """[n + 1] int64: where each of n runs of the given sizes starts, and where the last ends."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), size.cumsum(0)])


def concatenate(parts: Sequence[tuple[Sequence[int], TokenTransform]], n_in: int) -> TokenTransform:
    """One transform of a picture from those of disjoint parts of it.

    Args:
        parts: the part's tokens of the picture, increasing, and its transform over them. All mix in the same space.
        n_in: tokens of the picture; those in no part are dropped.
    """
    anchors = torch.cat([torch.tensor(tokens)[t.anchor] for tokens, t in parts])
    order = torch.sort(anchors).indices
    if all(t.is_selection for _, t in parts):
        return TokenTransform.selection(anchors[order], n_in)
    spaces = {t.space for _, t in parts if not t.is_selection}
    assert len(spaces) == 1 and all(t.before is None for _, t in parts), "a method mixes the tiles' rows in one space"
    matrix, back = torch.zeros(len(anchors), n_in), torch.full((n_in,), -1)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
    first = 0
    for tokens, t in parts:
        mine, columns = place[first : first + t.n_out], torch.tensor(tokens)
        matrix[mine[:, None], columns] = t.to_matrix()
        back[columns] = torch.where(t.back < 0, t.back, mine[t.back.clamp(min=0)])
        first += t.n_out
    return TokenTransform.dense(matrix, anchors[order], back, spaces.pop())
