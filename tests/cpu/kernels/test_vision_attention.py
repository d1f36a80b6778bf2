"""Attention of the towers, and the column means and rows the reducers read."""

import random

import pytest
import torch

from foveate.kernels.attention_rows import attention_rows
from foveate.kernels.cpu import levels
from foveate.kernels.received import received
from foveate.kernels.vision_attention import vision_attention

torch.set_num_threads(1)
LEVELS = levels.LEVELS[: levels.LEVELS.index(levels.machine()) + 1]
has_cpu = pytest.mark.skipif(levels.machine() == "reference", reason="the C++ kernels are not here")


def _case(seed, equal=False):
    order, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [25] * 4 if equal else [order.choice((1, 4, 16, 150)) for _ in range(6)]
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    heads, d = order.choice(((1, 8), (3, 16), (4, 20)))
    return cu, d**-0.5, *(torch.randn(cu[-1], heads, d, generator=noise) for _ in range(3))


def _weights(q, k, scale):
    return (torch.einsum("mhd,nhd->hmn", q.double(), k.double()) * scale).softmax(-1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(5))
def test_segments_attend_within_themselves(level, seed):
    cu, scale, q, k, v = _case(seed, equal=seed == 4)
    with levels.force(level):
        out = vision_attention(q, k, v, cu, scale)
    for a, b in zip(cu[:-1], cu[1:], strict=True):
        expected = torch.einsum("hmn,nhd->mhd", _weights(q[a:b], k[a:b], scale), v[a:b].double())
        assert (out[a:b].double() - expected).abs().max() < 1e-5


@has_cpu
@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("d", [16, 24, 30, 64, 72, 80])
def test_fused_rows_and_many_windows(level, n_threads, d):
    """q, k and v as views of one product, next to NaN; a segment's bits are the same alone."""
    order, noise = random.Random(d), torch.Generator().manual_seed(d)
    lengths = [order.choice((1, 4, 16, 64)) for _ in range(40)] + [0, 333, 97]
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    fused = torch.full((cu[-1], 4, 3, d), torch.nan)
    fused[:, :3] = torch.randn(cu[-1], 3, 3, d, generator=noise)
    q, k, v, _ = fused.unbind(1)
    torch.set_num_threads(n_threads)
    try:
        with levels.force(level):
            out = vision_attention(q, k, v, cu, d**-0.5)
            alone = vision_attention(q[cu[-3] : cu[-2]], k[cu[-3] : cu[-2]], v[cu[-3] : cu[-2]], [0, 333], d**-0.5)
    finally:
        torch.set_num_threads(1)
    with levels.force("reference"):
        expected = vision_attention(q, k, v, cu, d**-0.5)
    assert (out - expected).abs().max() < 1e-5
    assert torch.equal(alone, out[cu[-3] : cu[-2]])


def test_other_dtypes():
    cu, scale, q, k, v = _case(3)
    out = vision_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu, scale)
    assert out.dtype == torch.bfloat16
    assert (out - vision_attention(q, k, v, cu, scale)).abs().max() < 5e-2


@pytest.mark.parametrize("seed", range(5))
def test_received_is_the_column_mean(seed):
    cu, scale, q, k, _ = _case(seed)
    got = received(q, k, cu, scale)
    for a, b in zip(cu[:-1], cu[1:], strict=True):
        expected = _weights(q[a:b], k[a:b], scale).mean((0, 1))
        assert torch.allclose(got[a:b].double(), expected, atol=1e-6)
        assert abs(got[a:b].sum().item() - 1) < 1e-5


def test_attention_rows():
    _, scale, q, k, _ = _case(7)
    rows = attention_rows(q[3:5], k, scale)
    assert torch.allclose(rows.double(), _weights(q[3:5], k, scale).mean(0), atol=1e-6)
