"""The shared primitives, each against a plain definition and its properties."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid, Signal, Tower, signals
from foveate.engine.primitives import greedy as greedy
from foveate.engine.primitives import math as maths
from foveate.engine.primitives import merge as merge

torch.set_num_threads(1)
SEEDS = range(8)


def rows(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


# --- bipartite matching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_bipartite_merges_the_closest_pairs(seed: int) -> None:
    n = 5 + seed
    x = rows(n, 6, seed)
    unit = torch.nn.functional.normalize(x, dim=-1)
    for r in (0, 1, n // 2, n):
        into = merge.bipartite(x, r)
        best = {a: max(range(1, n, 2), key=lambda b, a=a: (float(unit[a] @ unit[b]), -b)) for a in range(0, n, 2)}
        ranked = sorted(best, key=lambda a: (-float(unit[a] @ unit[best[a]]), a))[: min(r, n // 2)]
        assert into.tolist() == [best[i] if i in ranked else i for i in range(n)]


@pytest.mark.parametrize("seed", SEEDS)
def test_merging_keeps_mass_and_provenance(seed: int) -> None:
    x = rows(11, 6, seed)
    size = torch.randint(1, 5, (11,), generator=torch.Generator().manual_seed(seed))
    into = merge.bipartite(x, 4)
    plain, weighted = merge.merge_into(into), merge.merge_into(into, size)
    assert plain.n_out == weighted.n_out == 7
    assert int(plain.size.sum()) == 11 and sorted(plain.indices.tolist()) == list(range(11))
    for row, anchor in enumerate(plain.anchor.tolist()):
        members = (into == anchor).nonzero()[:, 0]
        torch.testing.assert_close(plain.mix(x)[row], x[members].mean(0))
        mass = size[members].float()
        torch.testing.assert_close(weighted.mix(x)[row], (x[members] * mass[:, None]).sum(0) / mass.sum())
    assert torch.equal(plain.anchor[plain.back], into)


# --- greedy selection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_farthest_is_greedy_max_min_and_nested(seed: int) -> None:
    distance = torch.cdist(rows(9, 3, seed), rows(9, 3, seed))
    first = torch.tensor([seed])
    picks = greedy.farthest(distance[seed], lambda j: distance[j][0], first, 8).tolist()
    chosen = [seed]
    for pick in picks:
        rest = [j for j in range(9) if j not in chosen]
        assert pick == max(rest, key=lambda j: (min(float(distance[i, j]) for i in chosen), -j))
        chosen.append(pick)
    assert sorted(chosen) == list(range(9))


@pytest.mark.parametrize("seed", SEEDS)
def test_coverage_is_within_its_bound(seed: int) -> None:
    worth = rows(7, 8, seed).abs()
    picks = greedy.coverage(worth, 3).tolist()
    value = float(worth[:, picks].amax(1).sum())
    best = max(float(worth[:, list(s)].amax(1).sum()) for s in itertools.combinations(range(8), 3))
    assert value >= (1 - 1 / math.e) * best
    values = [0.0, *(float(worth[:, picks[: i + 1]].amax(1).sum()) for i in range(3))]
    gains = [after - before for before, after in itertools.pairwise(values)]
    assert gains == sorted(gains, reverse=True), "a submodular gain never grows"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("extra", [False, True])
def test_coverage_picks_what_adding_up_all_gains_would(seed: int, extra: bool) -> None:
    worth, bonus = rows(50, 40, seed).abs(), rows(1, 40, seed + 1)[0] if extra else torch.zeros(40)
    chosen: list[int] = []
    best = torch.zeros(50)
    for _ in range(25):
        gains = (worth - best[:, None]).clamp(min=0).double().sum(0) + bonus
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
        best = torch.maximum(best, worth[:, chosen[-1]])
    assert greedy.coverage(worth, 25, bonus if extra else None).tolist() == chosen
    assert greedy.coverage(torch.ones(3, 5), 5).tolist() == [0, 1, 2, 3, 4]


def test_determinants_run_out_of_rank_without_repeating() -> None:
    x = torch.nn.functional.normalize(rows(10, 3, 0), dim=-1)
    quality = torch.rand(10, generator=torch.Generator().manual_seed(1))
    picks = greedy.determinantal(x @ x.T, quality, 10).tolist()
    assert sorted(picks) == list(range(10))
    rest = picks[3:]
    assert rest == sorted(rest, key=lambda i: -float(quality[i])), "beyond the rank, by quality"
    assert greedy.determinantal(torch.ones(5, 5), torch.zeros(5), 5).tolist() == [0, 1, 2, 3, 4]


def test_quota_union_fills_exactly() -> None:
    a, b = torch.tensor([9.0, 8, 1, 0, 0, 0]), torch.tensor([0.0, 5, 4, 3, 2, 1])
    parts = [greedy.Quota(a, 1), greedy.Quota(b, 9)]
    assert greedy.quota_union(parts, 3).tolist() == [0, 1, 2]
    spread = greedy.Quota(a, 1, lambda rows: torch.tensor([5, 4, 1]))
    assert greedy.quota_union([spread, greedy.Quota(b, 9)], 3).tolist() == [0, 1, 4], "what spreads too far is cut"
    assert greedy.neighbours(Grid(2, 3), torch.tensor([2])).tolist() == [5, 1]


# --- density-peak clusters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_clusters_are_found_where_they_are(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    middles = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    truth = torch.randint(0, 3, (30,), generator=g)
    truth[:3] = torch.arange(3)
    found = merge.dpc_knn(middles[truth] + torch.randn(30, 2, generator=g) * 0.3, 3, 5, seed)
    assert len(set(truth[found.centres].tolist())) == 3
    assert torch.equal(truth[found.centres][found.owner], truth)
    assert (found.centres.diff() > 0).all() and torch.equal(found.owner[found.centres], torch.arange(3))
    again = merge.dpc_knn(torch.ones(6, 2), 4, 3, seed)
    assert len(again.centres) == 4 and set(again.owner.tolist()) == {0, 1, 2, 3}


def test_select_and_merge_drops_what_goes_nowhere() -> None:
    into = torch.tensor([0, 2, 2, -1, 2, 5])
    made = merge.select_and_merge(torch.tensor([0, 5]), torch.tensor([2]), into)
    assert made.anchor.tolist() == [0, 2, 5] and made.size.tolist() == [1, 3, 1]
    assert made.back.tolist() == [0, 1, 1, -1, 1, 2]
    assert merge.nearest(torch.tensor([[1.0, 0], [0, 1], [1, 0.1]]), torch.tensor([0, 1])).tolist() == [0, 1, 0]


# --- Sinkhorn and largest remainder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_transport_meets_its_marginals(seed: int) -> None:
    cost = rows(6, 4, seed).abs()
    u, v = torch.full((6,), 1 / 6), torch.full((4,), 1 / 4)
    plan = maths.sinkhorn(cost, u, v, 0.1)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(0), v, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plan.sum(1), u, rtol=0.1, atol=1e-2)


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 20)), min_size=1, max_size=7), st.floats(0, 1))
def test_largest_remainder_is_exact_within_caps(parts: list[tuple[float, int]], share: float) -> None:
    weights, caps = [w for w, _ in parts], [c for _, c in parts]
    total = int(share * sum(caps))
    got = maths.largest_remainder(weights, total, caps)
    assert sum(got) == total and all(0 <= n <= cap for n, cap in zip(got, caps, strict=True))
    for i, j in itertools.permutations(range(len(parts)), 2):
        if weights[i] >= weights[j] and got[i] < caps[i]:
            assert got[i] >= got[j] - 1, "only its cap keeps a heavier part behind"


def test_largest_remainder_by_hand() -> None:
    assert maths.largest_remainder([5, 3, 2], 7, [9, 9, 9]) == [4, 2, 1]
    assert maths.largest_remainder([6, 3, 1], 9, [9, 9, 9]) == [5, 3, 1]
    assert maths.largest_remainder([8, 1, 1], 10, [4, 9, 9]) == [4, 3, 3]
    assert maths.largest_remainder([0, 1], 3, [9, 2]) == [1, 2]


# --- windowed cosine, DCT, pooling, components -----------------------------------------------------------------------


@pytest.mark.parametrize("side", [2, 3])
def test_window_cosine_is_the_mean_of_pairs(side: int) -> None:
    grid, x = Grid(7, 5), rows(35, 4, 1)
    unit = torch.nn.functional.normalize(x, dim=-1)
    found = maths.window_cosine(x, grid, side)
    assert found.shape == (7 // side, 5 // side)
    for y, z in itertools.product(range(found.shape[0]), range(found.shape[1])):
        cells = [(y * side + a) * 5 + z * side + b for a in range(side) for b in range(side)]
        pairs = [float(unit[i] @ unit[j]) for i, j in itertools.permutations(cells, 2)]
        assert float(found[y, z]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5, 24])
def test_dct_is_orthonormal_and_low_pass_keeps_low_frequencies(n: int) -> None:
    torch.testing.assert_close(maths.dct(n) @ maths.dct(n).T, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(maths.low_pass(n, n), torch.eye(n, dtype=torch.float64))
    m = max(1, n // 2)
    torch.testing.assert_close(maths.low_pass(n, m).sum(1), torch.full((m,), math.sqrt(n / m), dtype=torch.float64))


@pytest.mark.parametrize(("n", "m"), [(7, 3), (8, 4), (5, 5), (9, 1)])
def test_pool_blocks_are_torchs(n: int, m: int) -> None:
    block, cell = maths.pool_blocks(n, m)
    x = torch.arange(n, dtype=torch.float32) ** 2
    means = torch.zeros(m).index_add_(0, block, x[cell]) / torch.bincount(block)
    torch.testing.assert_close(means, torch.nn.functional.adaptive_avg_pool1d(x[None], m)[0])


@pytest.mark.parametrize("seed", range(20))
def test_components_are_a_flood_fill(seed: int) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    height, width = rng.randint(1, 9), rng.randint(1, 9)
    right = torch.rand(height, width - 1, generator=g) < 0.6
    down = torch.rand(height - 1, width, generator=g) < 0.6
    labels = [-1] * (height * width)
    for start in range(height * width):
        queue = [start] if labels[start] < 0 else []
        while queue:
            cell = queue.pop()
            labels[cell] = start
            y, x = divmod(cell, width)
            joined = [(y, x + 1, x + 1 < width and right[y, x]), (y, x - 1, x > 0 and right[y, x - 1])]
            joined += [(y + 1, x, y + 1 < height and down[y, x]), (y - 1, x, y > 0 and down[y - 1, x])]
            queue += [v * width + u for v, u, is_joined in joined if is_joined and labels[v * width + u] < 0]
    assert maths.components(right, down).tolist() == labels


# --- signals and saliency --------------------------------------------------------------------------------------------


def test_layers_resolve_against_the_tower() -> None:
    tower = Tower(has_cls=True, depth=23)
    assert [tower.layer(i) for i in (0, -1, 22, -23, 0.0, 1.0, 0.36, 0.5)] == [0, 22, 22, 0, 0, 22, 8, 11]
    for wrong in (23, -24, 1.5, -0.1):
        with pytest.raises(ConfigError, match="layer"):
            tower.layer(wrong)
    assert tower.resolve(signals.saliency()) == Signal("cls_row", 22)
    bare = Tower(has_cls=False, depth=32, full_layers=(7, 15, 23, 31))
    assert bare.resolve(signals.saliency(-1)) == Signal("recv", 31)
    assert bare.resolve(signals.recv(11)) == Signal("recv", 15), "the nearest with full attention, the deeper of two"
    assert bare.resolve(signals.logits(11)) == Signal("recv", 15), "of which inputs take the logarithm"
    assert tower.resolve(signals.logits()) == Signal("logits", 22)
    assert tower.resolve(signals.cls_values(3)) == Signal("cls_values", 3)
    assert bare.resolve(signals.keys(11)) == Signal("keys", 11), "keys are the layer's own, windows or not"
    with pytest.raises(ConfigError, match="no CLS row"):
        bare.resolve(signals.cls_row())
    with pytest.raises(ConfigError, match="no CLS row"):
        bare.resolve(signals.cls_values())
