"""The methods that cut inside the tower, each against its steps, written out plainly, on the rows of one layer."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid, Stage, Tower, VisualBudget
from foveate.engine.methods import build
from foveate.engine.models.parts.tower import attend
from foveate.engine.reduce.cut import Offer, plan_all
from foveate.engine.reduce.methods.evit import EViT
from foveate.engine.reduce.methods.expedite import Expedite
from foveate.engine.reduce.methods.mctf import MCTF
from foveate.engine.reduce.methods.tome import ToMe
from foveate.kernels.vision_attention import vision_attention

torch.set_num_threads(1)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_evit_is_the_paper_step_by_step(pictures, seed: int, compat: bool) -> None:
    inputs, k = pictures.draw("evit", seed)
    reducer = EViT(compat=compat)
    attention = inputs.saliency(reducer.layers(inputs.tower)[-1]).tolist()
    ranked = sorted(range(inputs.n), key=lambda i: (-attention[i], i))
    kept, rest = ranked[: k - 1], ranked[k - 1 :]
    fused = sum(attention[i] * inputs.proj[i] for i in rest) / (1 if compat else sum(attention[i] for i in rest))
    rows = {i: inputs.proj[i] for i in kept} | {rest[0]: fused}
    transform = reducer.reduce(inputs, k)
    assert transform.anchor.tolist() == sorted(rows)
    expected = torch.stack([rows[i] for i in sorted(rows)])
    torch.testing.assert_close(transform.mix(inputs.proj), expected, rtol=1e-4, atol=1e-5)
    assert pictures.kept("evit", inputs, k, fuse=False) == sorted(ranked[:k])


def plain_tome(keys: Tensor, k: int) -> list[list[int]]:
    """Groups of tokens, by destination."""
    groups = [[i] for i in range(len(keys))]
    metric = [key for key in keys.float()]
    while len(groups) > k:
        even, odd = range(0, len(groups), 2), range(1, len(groups), 2)
        found = []
        for a in even:
            scores = [float(torch.nn.functional.cosine_similarity(metric[a], metric[b], dim=0, eps=1e-6)) for b in odd]
            best = max(range(len(scores)), key=lambda j: (scores[j], -j))
            found.append((-scores[best], a, 2 * best + 1))
        into = {a: b for _, a, b in sorted(found)[: min(len(groups) - k, len(groups) // 2)]}
        members = {b: [b, *(a for a in into if into[a] == b)] for b in range(len(groups)) if b not in into}
        size = [len(group) for group in groups]
        metric = [sum(size[i] * metric[i] for i in m) / sum(size[i] for i in m) for m in members.values()]
        groups = [[i for j in m for i in groups[j]] for m in members.values()]
    return groups


@pytest.mark.parametrize("seed", range(20))
def test_tome_is_the_paper_step_by_step(pictures, seed: int) -> None:
    inputs, k = pictures.draw("tome", seed)
    groups = plain_tome(inputs.keys(-1), k)
    transform = ToMe().reduce(inputs, k)
    assert transform.size.tolist() == [len(group) for group in groups]
    for number, group in enumerate(groups):
        assert (transform.back[group] == number).all() and transform.anchor[number] == group[0]
    expected = torch.stack([inputs.proj[group].mean(0) for group in groups])
    torch.testing.assert_close(transform.mix(inputs.proj), expected, rtol=1e-4, atol=1e-5)


def plain_mctf(inputs, k: int, info: float, size_power: float) -> list[tuple[int, list[int], Tensor]]:
    """Destination, members and output row of each group, by destination."""
    rows, worth = [row for row in inputs.proj], inputs.recv(-1).tolist()
    groups, anchors = [[i] for i in range(inputs.n)], list(range(inputs.n))
    while len(groups) > k:
        n, r = len(groups), min(len(groups) - k, len(groups) // 2)
        even, odd = list(range(0, n, 2)), list(range(1, n, 2))
        score = {}
        for a, b in product(even, odd):
            cosine = float(torch.nn.functional.cosine_similarity(rows[a], rows[b], dim=0, eps=1e-6))
            spared = (worth[a] * worth[b]) ** -info * (len(groups[a]) * len(groups[b])) ** -size_power
            score[a, b] = (cosine + 1) / 2 * spared
        into = {}
        drawn = {a: max(odd, key=lambda b: (score[a, b], -b)) for a in even}
        for a in sorted(even, key=lambda a: (-score[a, drawn[a]], a))[: r // 2]:
            into[a] = drawn[a]
        left = [a for a in even if a not in into]
        drawn = {b: max(left, key=lambda a: (score[a, b], -a)) for b in odd}
        for b in sorted(odd, key=lambda b: (-score[drawn[b], b], b))[: r - r // 2]:
            into[b] = drawn[b]
        root = [into.get(into.get(i, i), into.get(i, i)) for i in range(n)]
        ends = sorted(set(root))
        members = [[i for i in range(n) if root[i] == end] for end in ends]
        mass = [worth[i] * len(groups[i]) for i in range(n)]
        rows = [sum(mass[i] * rows[i] for i in m) / sum(mass[i] for i in m) for m in members]
        worth = [sum(worth[i] for i in m) for m in members]
        groups = [[i for j in m for i in groups[j]] for m in members]
        anchors = [anchors[end] for end in ends]
    return sorted(zip(anchors, groups, rows, strict=True), key=lambda group: group[0])


@pytest.mark.parametrize(("info", "size"), [(0.05, 0.025), (0.5, 0.3)])
@pytest.mark.parametrize("seed", range(20))
def test_mctf_is_the_paper_step_by_step(pictures, seed: int, info: float, size: float) -> None:
    inputs, k = pictures.draw("mctf", seed)
    expected = plain_mctf(inputs, k, info, size)
    transform = MCTF(info=info, size=size).reduce(inputs, k)
    assert transform.anchor.tolist() == [anchor for anchor, _, _ in expected]
    for number, (_, group, _) in enumerate(expected):
        assert (transform.back[group] == number).all() and transform.size[number] == len(group)
    rows = torch.stack([row for _, _, row in expected])
    torch.testing.assert_close(transform.mix(inputs.proj), rows, rtol=1e-4, atol=1e-4)


def test_mctf_spares_what_is_looked_at_and_what_is_large(pictures) -> None:
    inputs = pictures.make(MCTF(), Grid(6, 8), "cls", fill=1.0)
    worth = torch.full((48,), 0.01)
    worth[[3, 10, 20, 33]] = 0.5
    inputs = replace(inputs, taps={signal: worth for signal in inputs.taps})
    alone = MCTF(info=0.5).reduce(inputs, 24)
    assert all(int(alone.size[alone.back[token]]) == 1 for token in (3, 10, 20, 33))
    even = replace(inputs, taps={signal: torch.full((48,), 0.01) for signal in inputs.taps})
    big = torch.ones(48).index_fill_(0, torch.tensor([5, 6]), 9.0)
    left = MCTF(size=0.5).cut(even, 24, -1, big)
    assert all(int(left.size[left.back[token]]) == 1 for token in (5, 6))


@pytest.mark.parametrize("seed", range(20))
def test_expedite_is_local_k_means_around_a_lattice(pictures, seed: int) -> None:
    inputs, budget = pictures.draw("expedite", seed)
    grid, method = inputs.grid, Expedite(rounds=2)
    transform = method.reduce(inputs, budget)
    assert transform.n_out == method.count(grid, budget)
    anchors = transform.anchor.tolist()
    rows = len({a // grid.cols for a in anchors})
    cols = len(anchors) // rows
    home = [y * rows // grid.rows * cols + x * cols // grid.cols for y in range(grid.rows) for x in range(grid.cols)]
    owner = [anchors.index(i) if i in anchors else home[i] for i in range(grid.n_tokens)]
    for _ in range(2):
        members = [[i for i in range(grid.n_tokens) if owner[i] == c] for c in range(len(anchors))]
        centres = [inputs.proj[m].mean(0) for m in members]
        for i in range(grid.n_tokens):
            y, x = divmod(home[i], cols)
            near = [c for c in range(len(anchors)) if abs(c // cols - y) <= 1 and abs(c % cols - x) <= 1]
            best = min(near, key=lambda c: float((inputs.proj[i] - centres[c]).square().sum()))
            owner[i] = anchors.index(i) if i in anchors else best
    assert transform.back.tolist() == owner


def test_the_way_back_is_exact_where_every_row_is_its_own_cluster() -> None:
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    spread = Expedite(near=30, sharpness=1000.0).spread(rows, rows)
    torch.testing.assert_close(spread @ rows, rows, rtol=1e-4, atol=1e-4)
    blurred = Expedite().spread(rows, rows[::3])
    torch.testing.assert_close(blurred.sum(1), torch.ones(30))
    assert (blurred > 0).sum(1).max() <= 20


@pytest.mark.parametrize("d", [8, 21, 64])
def test_a_row_of_size_s_counts_as_s_equal_rows(d: int) -> None:
    g = torch.Generator().manual_seed(d)
    q, k, v = (torch.randn(13, 3, d, generator=g) for _ in range(3))
    size = torch.randint(1, 5, (13,), generator=g)
    ours = attend(q, k, v, [0, 6, 13], d**-0.5, size.float().log())
    many = torch.arange(13).repeat_interleave(size)
    cut = [0, int(size[:6].sum()), len(many)]
    theirs = vision_attention(q[many], k[many], v[many], cut, d**-0.5)
    first = size.cumsum(0) - size
    torch.testing.assert_close(ours, theirs[first], rtol=1e-4, atol=1e-5)


def test_layers_and_counts(pictures) -> None:
    cls, qwen = pictures.towers["cls"], pictures.towers["merging"]
    assert EViT().layers(cls) == (6, 12, 17) and EViT().counts(100, 34, 3) == [70, 49, 34]
    assert EViT().layers(qwen) == (7, 15, 23), "only layers with full attention"
    assert ToMe(stop=0.5).layers(cls) == tuple(range(12)) and ToMe().layers(qwen) == (7, 15, 23, 31)
    assert ToMe().counts(100, 40, 6) == [90, 80, 70, 60, 50, 40]
    assert (Expedite().layers(cls), Expedite().back_layer(cls)) == ((6,), 16)
    for method, values in ((EViT, {"layer": 1.5}), (EViT, {"cuts": 0}), (ToMe, {"start": 0.9, "stop": 0.1}),
                           (MCTF, {"info": 1.5}), (MCTF, {"start": 2.0}),
                           (Expedite, {"near": 0}), (Expedite, {"sharpness": -1.0})):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(values))):
            method(**values)


@pytest.mark.parametrize("depth", [4, 12, 16, 24, 27, 32, 40, 48])
def test_evit_splits_any_depth_into_equal_parts(depth: int) -> None:
    """The paper's layers have the indices 3, 6 and 9 of 12: equal steps of depth / (cuts + 1)."""
    tower = Tower(has_cls=True, depth=depth)
    assert EViT().layers(tower) == tuple(round(depth * (i + 1) / 4) for i in range(3))
    assert depth != 12 or EViT().layers(tower) == (3, 6, 9)
    assert EViT(layer=1.0).layers(tower) == (depth - 1,) and EViT(layer=0.0, cuts=1).layers(tower) == (0,)
    assert EViT(layer=0.5, cuts=2).layers(Tower(has_cls=True, depth=13)) == (6, 10)


def test_a_tower_is_cut_as_planned(pictures) -> None:
    def layers(text: list[Stage], budget: int = 16) -> list[tuple[int, int, bool]]:
        reducer = build(VisualBudget(method="+".join(s.method for s in text), stages=text))
        (way,) = plan_all(reducer, pictures.towers["cls"], [Offer(Grid(8, 8), budget, lambda: torch.zeros(0))], 1)
        assert way.n_kept == budget
        return [] if way.cut is None else [(c.layer, c.n_rows, c.comes_back) for c in way.cut.layers]

    one = Stage(method="evit", params={"layer": 0.5, "cuts": 1}, keep=0.6)
    last = Stage(method="divprune")
    assert layers([one, last]) == [(11, 38, False)]
    assert layers([one, last], 64) == []
    half = Stage(method="expedite", keep=0.5)
    assert layers([half, last]) == [(6, 30, False), (16, 64, True)], "five by six clusters"
    late = Stage(method="evit", params={"layer": 0.9, "cuts": 1})
    assert layers([half, late, last]) == [(6, 30, False), (16, 64, True), (20, 32, False)]
    with pytest.raises(ConfigError, match="order of their layers"):
        layers([Stage(method="evit", params={"layer": 0.9}), one, last])
