"""Writing keys and values into their slots."""

import pytest
import torch

from foveate.kernels.cpu import levels
from foveate.kernels.store import reference, store

LEVELS = levels.LEVELS[: levels.LEVELS.index(levels.machine()) + 1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(("n", "heads", "d"), [(0, 2, 8), (1, 1, 20), (7, 3, 16), (300, 2, 72)])
def test_rows_reach_their_slots_and_nothing_else(level, dtype, n_threads, n, heads, d):
    noise = torch.Generator().manual_seed(n)
    blocks = torch.randn(2, 24, 16, heads, d, generator=noise).to(dtype)
    fused = torch.randn(n, 4, heads, d, generator=noise) * 100
    k, v = fused[:, 1], fused[:, 3]
    slots = torch.randperm(24 * 16, generator=noise)[:n]
    slots[::3] = -1
    expected = blocks.clone()
    reference(*expected, k, v, slots)
    torch.set_num_threads(n_threads)
    try:
        with levels.force(level):
            store(*blocks, k, v, slots)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(blocks, expected)


def test_keys_of_another_dtype():
    blocks, k = torch.zeros(2, 1, 4, 1, 8), torch.ones(1, 1, 8, dtype=torch.bfloat16)
    store(*blocks, k, 2 * k, torch.tensor([3]))
    assert blocks[0].sum() == 8 and blocks[1, 0, 3].sum() == 16


def test_a_row_too_many_is_our_mistake():
    blocks = torch.zeros(2, 1, 4, 1, 8)
    with levels.force(levels.machine()), pytest.raises((AssertionError, RuntimeError, IndexError)):
        store(*blocks, torch.ones(3, 1, 8), torch.ones(3, 1, 8), torch.tensor([0, 1]))
