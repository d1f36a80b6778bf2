"""Prompts at a pruning point. The oracle is a small random decoder in plain torch that builds all attention.

Test modules cannot import each other (importmode is importlib), so the helpers come as one fixture:

    def test_x(prompts):
        case = prompts.draw(seed, layer=2)  # pictures of random sizes with text around them
        case.probe  # the probe that a method gets
        case.full("this")  # [H, n, m + n] all attention of the probe's rows
        leaves = prompts.leave("fastv", case, counts, r=0.2)
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate.engine.prune.methods as family
from foveate.engine.common import Grid, load_method
from foveate.engine.prune.base import Kept, Pruner
from foveate.engine.prune.probe import Probe, View, Which

torch.set_num_threads(1)
WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 24, 4, 2, 8, 4
SCALE = HEAD_DIM**-0.5


@cache
def method(name: str) -> type[Pruner]:
    found: type[Pruner] = load_method(family, name)
    return found


class Decoder:
    """Four layers of grouped-query attention and a gate; weights large enough that attention is far from uniform."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(11)
        sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM, "gate": WIDTH}
        self.weights = [
            {name: torch.randn(WIDTH, size, generator=g) * 1.5 / WIDTH**0.5 for name, size in sizes.items()}
            | {"o": torch.randn(HEADS * HEAD_DIM, WIDTH, generator=g) / (HEADS * HEAD_DIM) ** 0.5}
            for _ in range(LAYERS)
        ]

    def angles(self, positions: Tensor) -> Tensor:
        """[N, d / 2]"""
        return positions[:, None] * 10_000.0 ** (-torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Elements i and i + d / 2 are a complex number, rotated by the position's angle."""
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(1), self.angles(positions))[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    def project(self, layer: int, x: Tensor, positions: Tensor, rotated: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        normed = x / x.square().mean(-1, keepdim=True).sqrt()
        weights, n = self.weights[layer], len(x)
        q, k = (normed @ weights["q"]).view(n, HEADS, HEAD_DIM), (normed @ weights["k"]).view(n, KV_HEADS, HEAD_DIM)
        v = (normed @ weights["v"]).view(n, KV_HEADS, HEAD_DIM)
        return (self.rotate(q, positions), self.rotate(k, positions), v) if rotated else (q, k, v)

    def attention(self, layer: int, x: Tensor, positions: Tensor, temperature: float = 1.0) -> Tensor:
        """[H, N, N]: attention of every head, row and column; the definition."""
        q, k, _ = self.project(layer, x, positions)
        scores = torch.stack([q[:, h] @ k[:, h * KV_HEADS // HEADS].T for h in range(HEADS)]) * SCALE / temperature
        return scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf).softmax(-1)

    def run(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        a, v = self.attention(layer, x, positions), self.project(layer, x, positions)[2]
        heads = torch.stack([a[h] @ v[:, h * KV_HEADS // HEADS] for h in range(HEADS)], 1).flatten(1)
        x = x + heads @ self.weights[layer]["o"]
        return x + torch.tanh(x @ self.weights[layer]["gate"])


@dataclass
class Case:
    """A probe and the full attention behind it; `m` earlier tokens, `n` rows."""

    probe: Probe
    full: Callable[[Which], Tensor]  # [H, n, m + n] attention of the rows over all keys
    m: int
    positions: Tensor  # [m + n]
    states: dict[Which, Tensor]  # [m + n, D] entering the layer
    layers: dict[Which, int]

    @property
    def present(self) -> list[int]:
        return torch.bincount(self.probe.picture, minlength=len(self.probe.grids)).tolist()

    def seen(self, which: Which) -> Tensor:
        """[H, n, V]: the columns of visual tokens of the full attention."""
        return self.full(which)[:, :, self.m + self.probe.visual]

    def mine(self, picture: int) -> list[int]:
        return [i for i, p in enumerate(self.probe.picture.tolist()) if p == picture]


class Prompts:
    def __init__(self) -> None:
        self.decoder = Decoder()

    def draw(self, seed: int, *, layer: int = 0, grids: Sequence[Grid] = (), **more: Any) -> Case:
        """A random prompt: 1 to 3 pictures unless given; see `make` for `more`."""
        rng = random.Random(seed)
        layer = layer or rng.randint(1, LAYERS - 1)
        pictures = grids or [Grid(rng.randint(1, 5), rng.randint(1, 6)) for _ in range(rng.randint(1, 3))]
        return self.make(seed, layer, pictures, **more)

    def make(
        self,
        seed: int,
        layer: int,
        grids: Sequence[Grid],
        *,
        left: float = 1.0,  # share of each picture's tokens that is left; the others were dropped at layer 1
        reduced: bool = False,  # the other tokens were dropped before the decoder
        question: int = -1,  # words after the last picture
        other_question: bool = False,  # the same prompt with other words there
        fill: float | None = None,
    ) -> Case:
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        kinds: list[tuple[int, int]] = [(-1, -1)] * rng.randint(0, 4)
        for picture, grid in enumerate(grids):
            cells = sorted(rng.sample(range(grid.n_tokens), max(1, int(left * grid.n_tokens))))
            kinds += [(picture, cell) for cell in (cells if reduced else range(grid.n_tokens))]
            kinds += [(-1, -1)] * (rng.randint(0, 3) if picture + 1 < len(grids) else 0)
        n_words = rng.randint(1, 5) if question < 0 else question
        picture, cell = torch.tensor([*kinds, *[(-1, -1)] * n_words]).T
        x = torch.randn(len(picture), WIDTH, generator=g) if fill is None else torch.full((len(picture), WIDTH), fill)
        if other_question:
            x[len(kinds) :] = torch.randn(n_words, WIDTH, generator=g)
        entered = torch.bincount(picture[picture >= 0], minlength=len(grids)).tolist()
        stays = torch.ones(len(x), dtype=torch.bool)
        if layer > 1 and not reduced:
            for i in range(len(grids)):
                of_it = (picture == i).nonzero()[:, 0]
                leaving = rng.sample(of_it.tolist(), len(of_it) - max(1, int(left * len(of_it))))
                stays[leaving] = False
        first, positions, inputs = int((picture >= 0).nonzero()[0, 0]), torch.arange(len(x)).float(), x
        states = [x]
        for i in range(layer):
            if i == 1:
                x, positions, inputs, picture, cell = (part[stays] for part in (x, positions, inputs, picture, cell))
                states = [x]
            x = self.decoder.run(i, x, positions)
            states.append(x)
        return self._case(layer, states[-2:], positions, first, inputs, picture, cell, grids, entered, seed)

    def _case(
        self,
        layer: int,
        states: Sequence[Tensor],
        positions: Tensor,
        m: int,
        inputs: Tensor,
        picture: Tensor,
        cell: Tensor,
        grids: Sequence[Grid],
        entered: Sequence[int],
        seed: int,
    ) -> Case:
        behind: dict[Which, int] = {"before": layer - 1, "this": layer}
        entering: dict[Which, Tensor] = {"before": states[0], "this": states[1]}

        @cache
        def full(which: Which) -> Tensor:
            return self.decoder.attention(behind[which], entering[which], positions)[:, m:]

        angles, views = self.decoder.angles(positions)[m:], {}
        for which in behind:
            q, k, _ = self.decoder.project(behind[which], entering[which], positions)
            views[which] = View(q[m:], k, angles.cos(), angles.sin(), SCALE)
        if seed % 2:  # as a kernel returns it
            q, k = views["before"].q, views["before"].k.repeat_interleave(HEADS // KV_HEADS, 1)
            scores = torch.einsum("nhd,chd->nhc", q, k) * SCALE
            ahead = torch.arange(len(k))[None] > m + torch.arange(len(q))[:, None]
            lse = scores.masked_fill(ahead[:, None], -torch.inf).logsumexp(-1)
            views["before"] = replace(views["before"], lse=lse)
        visual = (picture[m:] >= 0).nonzero()[:, 0]
        probe = Probe(
            layer=layer,
            n_layers=LAYERS,
            rows=states[1][m:],
            visual=visual,
            picture=picture[m:][visual],
            cell=cell[m:][visual],
            grids=grids,
            entered=entered,
            seed=seed,
            views=views.__getitem__,
            inputs=lambda: inputs[m:],
        )
        return Case(probe, full, m, positions, entering, behind)

    def flat(self, case: Case, lse: float | None) -> Probe:
        """The same probe with queries of 0: all keys get the same attention, or none with a large `lse`."""
        views = {}
        for which in case.layers:
            view = case.probe.views(which)
            given = None if lse is None else torch.full((case.probe.n, HEADS), lse)
            views[which] = View(view.q * 0, view.k, view.cos, view.sin, view.scale, given)
        return replace(case.probe, views=views.__getitem__)

    def counts(self, case: Case, seed: int) -> list[int]:
        """A count for each picture, from none to all; in total at least one and not all."""
        rng, present = random.Random(seed), case.present
        while True:
            counts = [rng.randint(0, n) for n in present]
            if 0 < sum(counts) < sum(present) or sum(present) == 1:
                return counts

    def leave(self, name: str, case: Case, counts: Sequence[int], **fields: Any) -> Kept:
        return method(name)(**fields).select(case.probe, counts)

    def best(self, case: Case, scores: Sequence[float], counts: Sequence[int]) -> list[int]:
        """The definition of the best tokens of each picture: by falling score, then by place."""
        kept = [sorted(case.mine(p), key=lambda i: (-scores[i], i))[:count] for p, count in enumerate(counts)]
        return sorted(i for part in kept for i in part)


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    return Prompts()
