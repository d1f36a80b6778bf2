"""The largest score of each row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.kernels.hardware.dispatch import choose


def largest(rows: Sequence[Tensor]) -> tuple[list[int], list[bool]]:
    """The largest value of each row, of equal ones the lowest index, and whether all values are finite.

    Args:
        rows: [n] float32 each, of one length. Where one is not finite its index means nothing.
    """
    check_rows(rows)
    return choose(reference, rows[0].device, rows[0].dtype)(rows)


def reference(rows: Sequence[Tensor]) -> tuple[list[int], list[bool]]:
    """The definition."""
    scores = torch.stack(list(rows))
    return scores.argmax(-1).tolist(), torch.isfinite(scores).all(-1).tolist()


def check_rows(rows: Sequence[Tensor]) -> None:
    """Assert that rows of scores are as `largest` and `draw` read them."""
    assert rows and all(row.dtype == torch.float32 and row.stride(0) == 1 for row in rows), "rows of packed float32"
    assert all(row.shape == rows[0].shape for row in rows), "rows of one length"
