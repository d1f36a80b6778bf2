"""Attention of the towers, and the column means and rows the reducers read."""

import random

import pytest
import torch

from foveate.kernels.vision_attention import attention_rows, received, vision_attention

torch.set_num_threads(1)


def _case(seed, equal=False):
    order, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [25] * 4 if equal else [order.choice((1, 4, 16, 150)) for _ in range(6)]
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    heads, d = order.choice(((1, 8), (3, 16), (4, 20)))
    return cu, d**-0.5, *(torch.randn(cu[-1], heads, d, generator=noise) for _ in range(3))


def _weights(q, k, scale):
    return (torch.einsum("mhd,nhd->hmn", q.double(), k.double()) * scale).softmax(-1)


@pytest.mark.parametrize("version", ["", "reference"])
@pytest.mark.parametrize("seed", range(5))
def test_segments_attend_within_themselves(monkeypatch, version, seed):
    monkeypatch.setenv("FOVEATE_KERNELS", version)
    cu, scale, q, k, v = _case(seed, equal=seed == 4)
    out = vision_attention(q, k, v, cu, scale)
    for a, b in zip(cu[:-1], cu[1:], strict=True):
        expected = torch.einsum("hmn,nhd->mhd", _weights(q[a:b], k[a:b], scale), v[a:b].double())
        assert (out[a:b].double() - expected).abs().max() < 1e-5


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
