"""Write new keys and values into their slots of the paged cache."""

from torch import Tensor


def store(key_blocks: Tensor, value_blocks: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write row i of `k` and `v` at slot `slots[i]`, in place.

    Args:
        key_blocks: [n_blocks, block_tokens, n_kv_heads, d], contiguous.
        value_blocks: the same shape.
        k: [n, n_kv_heads, d], keys after RoPE.
        v: [n, n_kv_heads, d].
        slots: [n] int64, block * block_tokens + offset, all different.
    """
    assert key_blocks.is_contiguous() and value_blocks.is_contiguous(), "blocks are addressed as one flat run of slots"
    key_blocks.flatten(0, 1).index_copy_(0, slots, k.to(key_blocks.dtype))
    value_blocks.flatten(0, 1).index_copy_(0, slots, v.to(value_blocks.dtype))
