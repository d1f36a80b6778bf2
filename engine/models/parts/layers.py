"""The modules that families are made of: matrices, norms, tables, rotary frequencies.

The loader fills a matrix piece by piece, and the matrix is held as the hardware multiplies it best: on the CPU packed
once, at load, in the form its role asks for (kernels/cpu/weights.py); on CUDA, and where the CPU runs the reference, a
plain tensor in the model's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.kernels.cpu.weights import Form, PackedWeight, rows
from foveate.kernels.layer_norm import layer_norm
from foveate.kernels.linear import Activation, epilogue, linear
from foveate.kernels.pack import pack
from foveate.kernels.rms_norm import rms_norm


@dataclass(frozen=True, slots=True)
class Storage:
    """How one matrix is held."""

    dtype: torch.dtype  # of the model: what activations and cache are in
    device: torch.device
    form: Form | None  # packed so; None: a plain tensor

    def hold(self, pieces: Sequence[Tensor], gated: bool = False) -> PackedWeight | Tensor:
        """The matrix as the model keeps it, from pieces one above the other, which are not referred to afterwards."""
        if self.form is None:
            n_rows = [len(piece) for piece in pieces]
            matrix = torch.empty(sum(n_rows), pieces[0].shape[1], dtype=self.dtype, device=self.device)
            for rows, piece in zip(torch.split(matrix, n_rows), pieces, strict=True):
                rows.copy_(piece)
            return matrix
        rounds = self.form == "bfloat16" and self.dtype == torch.bfloat16
        return pack(pieces, self.form, gated=gated, round_inputs=rounds)


class Matrix(nn.Module):
    """A matrix [n_out, n_in] that the checkpoint may hold in several pieces, one above the other.

    Args:
        pieces: rows of each piece by its name in the checkpoint, in order; it stands there as a sibling of this one.
    """

    def __init__(self, n_in: int, n_out: int, pieces: dict[str, int] | None = None, gated: bool = False) -> None:
        super().__init__()
        self.n_in, self.n_out, self.gated = n_in, n_out, gated
        self.pieces = pieces or {"": n_out}
        self.storage: Storage | None = None  # set by the loader
        self._weight: PackedWeight | Tensor | None = None
        self._arrived: dict[str, Tensor] = {}

    def fill(self, piece: str, rows: Tensor) -> None:
        """Take one piece; the last one completes the matrix."""
        self._arrived[piece] = rows
        if len(self._arrived) == len(self.pieces):
            assert self.storage is not None, "the loader says how a matrix is held before it fills it"
            self._weight = self.storage.hold([self._arrived[name] for name in self.pieces], self.gated)
            self._arrived = {}

    @property
    def weight(self) -> PackedWeight | Tensor:
        assert self._weight is not None, "every piece of a matrix has been filled"
        return self._weight


class Linear(Matrix):
    """x W^T + bias, then an activation, then a residual: one pass where there are kernels for it."""

    def __init__(
        self, n_in: int, n_out: int, bias: bool = True, *, pieces: dict[str, int] | None = None, gated: bool = False
    ) -> None:
        super().__init__(n_in, n_out, pieces, gated)
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor, activation: Activation = "none", residual: Tensor | None = None) -> Tensor:
        return multiply(x, self.weight, self.bias, activation, residual)


class FusedLinear(Linear):
    """Several projections of the same input as one product."""

    def __init__(self, n_in: int, pieces: dict[str, int], bias: bool) -> None:
        super().__init__(n_in, sum(pieces.values()), bias, pieces=pieces)


class GatedLinear(Linear):
    """silu(gate) * up of two projections of the same input."""

    def __init__(self, n_in: int, n_out: int, bias: bool) -> None:
        super().__init__(n_in, 2 * n_out, bias, pieces={"gate_proj": n_out, "up_proj": n_out}, gated=True)

    def forward(self, x: Tensor, activation: Activation = "silu_gate", residual: Tensor | None = None) -> Tensor:
        return super().forward(x, activation, residual)


class Embedding(Matrix):
    """Rows by token id; a tied head multiplies by the same matrix."""

    def forward(self, token_ids: Tensor) -> Tensor:
        if isinstance(self.weight, PackedWeight):
            return rows(self.weight, token_ids)
        return functional.embedding(token_ids, self.weight)


def multiply(
    x: Tensor,
    weight: PackedWeight | Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """[m, n_in] -> [m, n_out], or half of it for a gated product."""
    if isinstance(weight, PackedWeight):
        return linear(x, weight, bias, activation=activation, residual=residual)
    return epilogue(functional.linear(x, weight, bias), activation, residual)


class Conv2d(nn.Conv2d):
    """Without its random start: every weight comes from a checkpoint."""

    def reset_parameters(self) -> None: ...


class Table(nn.Module):
    """Rows that are added as they are, such as learned positions."""

    def __init__(self, n: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, size))


class LayerNorm(nn.Module):
    """Scale rows to mean 0 and variance 1, then by a weight and a bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Scale rows to a mean square of one. Statistics in float32 whatever the dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """[dim / 2] float32 rotary frequencies theta^(-2i/dim)."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
