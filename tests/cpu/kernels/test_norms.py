"""RMSNorm, LayerNorm and rotary embedding: every level against the formulas in float64."""

import pytest
import torch
from torch import Tensor

from foveate.kernels.cpu import levels
from foveate.kernels.layer_norm import layer_norm
from foveate.kernels.rms_norm import rms_norm
from foveate.kernels.rotary import rotate

LEVELS = levels.LEVELS[: levels.LEVELS.index(levels.machine()) + 1]
SHAPES = [(0, 8), (1, 1), (1, 7), (5, 33), (130, 896)]


def _inputs(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows beside NaN, a weight and a bias."""
    noise = torch.Generator().manual_seed(n + d)
    wide = torch.full((n, d + 9), torch.nan, dtype=dtype)
    wide[:, 4 : 4 + d] = (3 + torch.randn(n, d, generator=noise) * 2).to(dtype)
    weight, bias = torch.randn(2, d, generator=noise).to(dtype)
    return wide[:, 4 : 4 + d], weight, bias


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "room"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_norms_are_their_formulas(level: str, dtype: torch.dtype, room: float, n: int, d: int) -> None:
    x, weight, bias = _inputs(n, d, dtype)
    wide, before = x.double(), x.clone()
    root = (wide.square().mean(1, keepdim=True) + 1e-5).sqrt()
    centred = wide - wide.mean(1, keepdim=True)
    deviation = (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    with levels.force(level):
        found = rms_norm(x, weight, 1e-5), layer_norm(x, weight, bias, 1e-5)
        across = rms_norm(x.T.contiguous().T, weight, 1e-5), layer_norm(x.T.contiguous().T, weight, bias, 1e-5)
    wanted = wide / root * weight, centred / deviation * weight + bias
    for out, strided, formula in zip(found, across, wanted, strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), formula, rtol=room, atol=room)
        torch.testing.assert_close(strided.double(), formula, rtol=room, atol=room)
    assert torch.equal(x, before)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "heads", "d"), [(0, 1, 4), (1, 1, 2), (3, 5, 6), (70, 3, 80)])
def test_pairs_are_turned_by_their_angle(level: str, dtype: torch.dtype, n: int, heads: int, d: int) -> None:
    noise = torch.Generator().manual_seed(n + d)
    fused = torch.full((n, heads + 2, d), torch.nan, dtype=dtype)
    fused[:, :heads] = torch.randn(n, heads, d, generator=noise).to(dtype)
    x, angles = fused[:, :heads], torch.randn(n, d // 2, generator=noise) * 9
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones(()).double(), angles.double())[:, None]
    with levels.force(level):
        out = rotate(x, angles.cos(), angles.sin())
    assert out.dtype == dtype
    wanted = torch.cat((pairs.real, pairs.imag), dim=-1)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
