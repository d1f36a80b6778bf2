"""The definition of pruning inside the decoder: a dense run in which those who left are masked, from their layer on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from foveate.engine.models.base import Attention, Model, Rotary
from foveate.engine.prune.base import Kept
from foveate.engine.prune.probe import Probe, View, Which
from foveate.engine.request import Request


@dataclass
class Layer:
    """What one layer saw: all tokens, those that had left included."""

    entering: Tensor
    left: Tensor  # what it made of it
    q: Tensor
    k: Tensor
    rotary: Rotary


@dataclass
class Run:
    logits: Tensor  # [n, vocab] of all tokens; of one that left it means nothing
    layers: list[Layer]
    present: list[list[int]]  # by layer


class _Masked(Attention):
    """Attention in which the tokens that left are no keys, except a row's own."""

    def __init__(self, present: Sequence[int], scale: float, seen: list[tuple[Tensor, Tensor]]) -> None:
        self._present, self._scale, self._seen = present, scale, seen

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._seen.append((q, k))
        group, n = q.shape[1] // k.shape[1], q.shape[0]
        visible = torch.zeros(n, n, dtype=torch.bool)
        visible[:, torch.tensor(self._present)] = True
        visible = visible.tril() | torch.eye(n, dtype=torch.bool)  # a row sees itself, so that no row is empty
        scores = torch.einsum("mhd,nhd->hmn", q, k.repeat_interleave(group, 1)) * self._scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("hmn,nhd->mhd", weights, v.repeat_interleave(group, 1))


def run(model: Model, request: Request, rows: Sequence[Tensor | None], ids: Sequence[int], positions: Tensor) -> Run:
    """Prompt and answer in one go.

    Args:
        rows: reduced rows of each picture.
        ids: [n] prompt and answer.
        positions: [n_pos_axes, n].
    """
    depth, n, scale = request.depth, len(ids), model.spec.head_dim**-0.5
    x = model.embed(torch.tensor(ids)).clone()
    for picture, visual in zip(request.pictures, rows, strict=True):
        assert visual is not None
        x[torch.tensor(list(picture.tokens()))] = visual
    is_visual = request.cells
    present = list(range(n))
    layers, everyone = [], []
    for i, group in enumerate(depth.groups):
        if i:
            assert depth.decision is not None, "the engine has decided"
            kept, inside = depth.decision.kept[i - 1], depth.decision.members[i - 1]
            sources = [t for t in present if t in is_visual]
            present = [*range(depth.start), *inside, *range(depth.stop, n)]
            targets = [t for t in present if t in is_visual]
            assert targets == [sources[j] for j in kept.keep.tolist()], "members are what the points left"
            if kept.mix is not None:
                x = x.clone()
                x[torch.tensor(targets)] = kept.mix @ x[torch.tensor(sources)]
        at = positions
        if i and depth.pruner is not None and depth.pruner.compact and model.spec.n_pos_axes == 1:
            at = torch.zeros_like(positions)
            at[0, torch.tensor(present)] = torch.arange(len(present))
        for layer in group.layers:
            seen: list[tuple[Tensor, Tensor]] = []
            rotary = model.rotary(at)
            entering = x
            x = model.run(x, rotary, _Masked(present, scale, seen), range(layer, layer + 1))
            layers.append(Layer(entering, x, *seen[0], rotary))
            everyone.append(present)
    return Run(model.logits(x), layers, everyone)


def choices(model: Model, request: Request, rows: Sequence[Tensor | None], dense: Run) -> list[Kept]:
    """What the method chooses at each point when it is shown the oracle's own queries and keys."""
    depth, pruner, chosen = request.depth, request.depth.pruner, []
    assert pruner is not None
    picture = {t: i for t, (i, _) in request.cells.items()}
    for before, group in pairwise(depth.groups):
        layer = group.layers.start
        here = dense.present[layer - 1]
        span = torch.tensor([t for t in here if depth.start <= t < depth.stop])
        early = torch.arange(depth.start)
        visual = [t for t in span.tolist() if t in picture]
        if sum(group.counts) == 0:
            chosen.append(Kept(torch.zeros(0, dtype=torch.int64)))
            continue

        def view(which: Which, layer: int = layer, span: Tensor = span, early: Tensor = early) -> View:
            rotary = dense.layers[layer - 1].rotary
            q, k = dense.layers[layer - 1].q, dense.layers[layer - 1].k
            if which == "this":  # rotated as they were when they came here
                q, k = model.project(layer, dense.layers[layer - 1].left, rotary)
            rows = torch.cat([early, span])
            return View(q[span], k[rows], rotary.cos[span], rotary.sin[span], model.spec.head_dim**-0.5)

        def inputs(span: Tensor = span) -> Tensor:
            return dense.layers[0].entering[span]

        place = {t: i for i, t in enumerate(span.tolist())}
        chosen.append(
            pruner.select(
                Probe(
                    layer=layer, n_layers=depth.n_layers, rows=dense.layers[layer - 1].left[span],
                    visual=torch.tensor([place[t] for t in visual]),
                    picture=torch.tensor([picture[t] for t in visual]),
                    cell=torch.tensor([request.cells[t][1] for t in visual]),
                    grids=[p.grid for p in request.pictures], entered=list(depth.groups[0].counts),
                    seed=int.from_bytes(request.runs[0].key[:8]) & (2**63 - 1), views=view, inputs=inputs,
                ),
                group.counts,
            )
        )  # fmt: skip
        assert before.layers.stop == layer
    return chosen
