"""The version for CUDA is torch's own kernel, so it runs on the CPU too."""

import pytest
import torch

from foveate.kernels.cuda.vision_attention import run
from foveate.kernels.vision_attention import reference


@pytest.mark.parametrize("lengths", [[25, 25, 25, 25], [7], [1, 64, 16, 64, 1, 9]])
@pytest.mark.parametrize(("dtype", "room"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_agrees_with_the_definition(lengths: list[int], dtype: torch.dtype, room: float) -> None:
    """q, k and v as views of one product, next to NaN."""
    noise, cu = torch.Generator().manual_seed(len(lengths)), [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    fused = torch.full((cu[-1], 4, 3, 20), torch.nan, dtype=dtype)
    fused[:, :3] = torch.randn(cu[-1], 3, 3, 20, generator=noise).to(dtype)
    q, k, v, _ = fused.unbind(1)
    out = run(q, k, v, cu, 20**-0.5)
    assert out.dtype == dtype
    assert (out - reference(q, k, v, cu, 20**-0.5)).abs().max() < room
