"""Write new keys and values into their slots of the paged cache."""

from torch import Tensor

from foveate.kernels.hardware.dispatch import choose


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
    choose(reference, k.device, k.dtype, v.dtype, key_blocks.dtype)(key_blocks, value_blocks, k, v, slots)


def reference(key_blocks: Tensor, value_blocks: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """The definition."""
    new = slots >= 0
    if not new.all():
        k, v, slots = k[new], v[new], slots[new]
    key_blocks.flatten(0, 1).index_copy_(0, slots, k.to(key_blocks.dtype))
    value_blocks.flatten(0, 1).index_copy_(0, slots, v.to(value_blocks.dtype))
