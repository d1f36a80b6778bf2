"""How tensors and lists reach C++: as addresses, of values that lie as the kernels read them."""

from array import array
from collections.abc import Sequence

from torch import Tensor


def packed_rows(x: Tensor) -> Tensor:
    """[n, d] whose rows may lie apart but whose values lie side by side: `x` itself, or else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def packed_heads(x: Tensor) -> Tensor:
    """[n, heads, d] whose tokens may lie apart but whose heads lie side by side: `x` itself, or else a copy."""
    _, heads, d = x.shape
    return x if x.stride(2) == 1 and (heads == 1 or x.stride(1) == d) else x.contiguous()


def addresses(rows: Sequence[Tensor]) -> "array[int]":
    """Of the data of each tensor."""
    return array("q", [row.data_ptr() for row in rows])


def address(values: "array[int] | array[float]") -> int:
    """Of the first value; valid while the array lives and keeps its length."""
    return values.buffer_info()[0]
