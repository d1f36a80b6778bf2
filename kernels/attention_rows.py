"""Attention of a few queries to a whole picture: the rows that a reducer reads, without the rest of [N, N]."""

import torch
from torch import Tensor

from foveate.kernels.hardware.dispatch import choose


def attention_rows(q_rows: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax attention of a few queries to all keys of one picture, averaged over heads.

    Args:
        q_rows: [r, heads, d].
        k: [n, heads, d].

    Returns:
        float32 [r, n]; each row sums to 1.
    """
    return choose(reference, k.device, q_rows.dtype, k.dtype)(q_rows, k, scale)


def reference(q_rows: Tensor, k: Tensor, scale: float) -> Tensor:
    """The definition."""
    scores = torch.einsum("rhd,nhd->hrn", q_rows.float(), k.float()) * scale
    return scores.softmax(-1).mean(0)
