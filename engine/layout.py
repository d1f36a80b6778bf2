"""From a prompt with a placeholder per picture to the tokens the decoder reads and their positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor

from foveate.engine.cache.prefix import ImageRun
from foveate.engine.common.grid import Grid
from foveate.engine.geometry.base import Geometry, Positions
from foveate.engine.request import Picture


@dataclass(frozen=True, slots=True)
class Layout:
    """A pruned prompt."""

    token_ids: list[int]  # each image's placeholder repeated as often as it keeps tokens
    positions: Tensor  # [n_pos_axes, n_prompt] int64: text keeps its own, visual tokens (-1 here) get theirs later
    next_pos: int  # of the token that follows


def lay_out(ids: list[int], geometry: Geometry, pictures: Sequence[Picture], keys: Sequence[bytes]) -> Layout:
    """Lay a prompt out, and tell each picture where its tokens are: its `runs` and unpruned `positions`.

    Args:
        ids: with one placeholder per picture.
        keys: of each picture, what its kept rows depend on.
    """
    placeholder = geometry.spec.image_token_id
    segments: list[int | Grid] = []
    token_ids: list[int] = []
    of_pictures = zip(pictures, keys, strict=True)
    for is_visual, group in groupby(ids, placeholder.__eq__):
        tokens = list(group)
        if not is_visual:
            segments.append(len(tokens))
            token_ids += tokens
            continue
        for picture, key in islice(of_pictures, len(tokens)):
            start = len(token_ids)
            picture.runs = (ImageRun(start, start + picture.n_kept, key),)
            segments.append(picture.grid)
            token_ids += [placeholder] * picture.n_kept
    laid_out, next_pos = geometry.lay_out(segments)
    parts: list[Tensor] = []
    following = iter(pictures)
    for segment, positions in zip(segments, laid_out, strict=True):
        at = _tensor(positions)
        if isinstance(segment, Grid):
            picture = next(following)
            picture.positions, at = at, torch.full((len(positions), picture.n_kept), -1)
        parts.append(at)
    return Layout(token_ids, torch.cat(parts, dim=1), next_pos)


def _tensor(positions: Positions) -> Tensor:
    """[n_pos_axes, n] int64: the one place where positions become a tensor."""
    axes = [torch.arange(p.start, p.stop) if isinstance(p, range) else torch.tensor(p) for p in positions]
    return torch.stack(axes)
