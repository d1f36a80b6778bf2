"""Write new keys and values into their slots of the paged cache."""

import torch
from torch import Tensor

from foveate.kernels.attention import packed_heads
from foveate.kernels.native import kernels

_COMPILED = {torch.float32: "store_float32", torch.bfloat16: "store_bfloat16"}  # by the dtype of the blocks


def store(key_blocks: Tensor, value_blocks: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write row i of `k` and `v` at slot `slots[i]`, in place, rounded to the dtype of the blocks.

    Args:
        key_blocks: [n_blocks, block_tokens, n_kv_heads, d], contiguous.
        value_blocks: the same shape and dtype.
        k: [n, n_kv_heads, d], keys after RoPE; a view into fused rows is read as it is.
        v: [n, n_kv_heads, d].
        slots: [n] int64, block * block_tokens + offset, all different; -1: the row is there already and not written.
    """
    assert key_blocks.is_contiguous() and value_blocks.is_contiguous(), "blocks are addressed as one flat run of slots"
    compiled = kernels()
    ours = k.device.type == "cpu" and k.dtype == v.dtype == torch.float32 and key_blocks.dtype in _COMPILED
    if compiled is None or not ours:
        return reference(key_blocks, value_blocks, k, v, slots)
    assert key_blocks.shape == value_blocks.shape and key_blocks.dtype == value_blocks.dtype, "one store holds both"
    assert k.shape == v.shape == (len(slots), *key_blocks.shape[2:]), "a key and a value for every slot"
    assert slots.dtype == torch.int64 and slots.is_contiguous(), "slots are read as one run of int64"
    k, v = packed_heads(k), packed_heads(v)
    write = getattr(compiled, _COMPILED[key_blocks.dtype])
    write(
        *(k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), slots.data_ptr()),
        *(key_blocks.data_ptr(), value_blocks.data_ptr(), len(slots), k.shape[1] * k.shape[2]),
    )


def reference(key_blocks: Tensor, value_blocks: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """The definition."""
    new = slots >= 0
    if not new.all():
        k, v, slots = k[new], v[new], slots[new]
    key_blocks.flatten(0, 1).index_copy_(0, slots, k.to(key_blocks.dtype))
    value_blocks.flatten(0, 1).index_copy_(0, slots, v.to(value_blocks.dtype))
