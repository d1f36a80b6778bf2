"""From uint8 pixels to the rows a patch embedding multiplies."""

import torch
from torch import Tensor

from foveate.engine.images.preprocess import ImageProcessor


def normalise(image: Tensor, processor: ImageProcessor) -> Tensor:
    """uint8 [height, width, 3] -> float32, rescaled and normalised as the processor says."""
    mean = torch.tensor(processor.mean, device=image.device)
    std = torch.tensor(processor.std, device=image.device)
    return (image.float() * processor.rescale - mean) / std


def patches(pixels: Tensor, size: int, merge: int = 1) -> Tensor:
    """Cut [height, width, 3] into squares of `size` pixels: [n, 3 * size * size], channel first within a row.

    Rows come cell by cell, the `merge` x `merge` patches of a cell next to each other, both in raster order; with
    merge 1 that is plain raster order. Pixels beyond the last whole cell are left out, as a strided convolution does.
    """
    side = size * merge
    rows, cols = pixels.shape[0] // side, pixels.shape[1] // side
    cut = pixels[: rows * side, : cols * side].reshape(rows, merge, size, cols, merge, size, 3)
    return cut.permute(0, 3, 1, 4, 6, 2, 5).reshape(rows * cols * merge * merge, 3 * size * size)
