"""Write new keys and values into the paged cache, all rows in one call."""

import torch
from torch import Tensor

from foveate.kernels.cpu.attention import STORED
from foveate.kernels.cpu.layout import packed_heads
from foveate.kernels.cpu.levels import extension

TAKES = ((torch.float32,), (torch.float32,), STORED)  # k, v, the blocks


def run(key_blocks: Tensor, value_blocks: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """As the reference."""
    assert key_blocks.shape == value_blocks.shape and key_blocks.dtype == value_blocks.dtype, "one store holds both"
    assert k.shape == v.shape == (len(slots), *key_blocks.shape[2:]), "a key and a value for every slot"
    assert slots.dtype == torch.int64 and slots.is_contiguous(), "slots are read as one run of int64"
    k, v = packed_heads(k), packed_heads(v)
    write = extension().store_bfloat16 if key_blocks.dtype == torch.bfloat16 else extension().store_float32
    write(
        *(k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), slots.data_ptr()),
        *(key_blocks.data_ptr(), value_blocks.data_ptr(), len(slots), k.shape[1] * k.shape[2]),
    )
