"""From a prompt with a placeholder per picture to the tokens the decoder reads and their positions."""

import torch
from torch import Tensor

from foveate.engine.common.grid import Grid
from foveate.engine.geometry.base import Geometry, Positions


def expand(ids: list[int], placeholder: int, kept: list[int]) -> tuple[list[int], list[int]]:
    """Repeat each placeholder as often as its image keeps tokens; also where each image then starts."""
    expanded: list[int] = []
    starts: list[int] = []
    counts = iter(kept)
    for token in ids:
        if token == placeholder:
            starts.append(len(expanded))
            expanded += [token] * next(counts)
        else:
            expanded.append(token)
    return expanded, starts


def positions_of(
    ids: list[int], geometry: Geometry, grids: list[Grid], kept: list[int]
) -> tuple[Tensor, list[Tensor], int]:
    """Lay the unpruned prompt out; text keeps its positions, visual tokens (-1 here) get theirs when reduced.

    Returns:
        [n_pos_axes, n_prompt] of the pruned prompt, [n_pos_axes, grid.n_tokens] per image, and the next position.
    """
    segments: list[int | Grid] = []
    images = iter(grids)
    n_text = 0
    for token in [*ids, None]:
        if token is not None and token != geometry.spec.image_token_id:
            n_text += 1
            continue
        if n_text:
            segments.append(n_text)
            n_text = 0
        if token is not None:
            segments.append(next(images))
    laid_out, next_pos = geometry.lay_out(segments)
    counts = iter(kept)
    parts = [
        torch.full((geometry.spec.n_pos_axes, next(counts)), -1) if isinstance(segment, Grid) else tensor_of(positions)
        for segment, positions in zip(segments, laid_out, strict=True)
    ]
    of_images = [tensor_of(p) for segment, p in zip(segments, laid_out, strict=True) if isinstance(segment, Grid)]
    return torch.cat(parts, dim=1), of_images, next_pos


def tensor_of(positions: Positions) -> Tensor:
    """[n_pos_axes, n] int64: the one place where positions become a tensor."""
    axes = [torch.arange(p.start, p.stop) if isinstance(p, range) else torch.tensor(p) for p in positions]
    return torch.stack(axes)
