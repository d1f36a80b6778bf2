"""Random pictures and prompts."""

import torch
from PIL import Image

from tiny_models.common import IMAGE_TOKEN


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random picture: noise alone would hide errors of half a pixel in the resizing."""
    noise = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=noise)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    noisy = (smooth * 200 + torch.rand(3, height, width, generator=noise) * 55).byte()
    return Image.fromarray(noisy.permute(1, 2, 0).contiguous().numpy())


def prompt(n: int, n_images: int, seed: int = 0) -> list[int]:
    """`n` random text tokens with one placeholder per picture among them, never first or last."""
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (n,), generator=noise).tolist()
    for at in sorted(torch.randperm(n - 1, generator=noise)[:n_images].tolist(), reverse=True):
        ids.insert(at + 1, IMAGE_TOKEN)
    return ids
