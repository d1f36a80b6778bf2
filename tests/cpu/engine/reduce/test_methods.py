"""Each reducer against a plain transcription of its paper's steps, and its own properties."""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid, Signal, Tower
from foveate.engine.methods import build_reducer
from foveate.engine.primitives.ranking import lattice
from foveate.engine.vision import TokenTransform, VisualInputs

torch.set_num_threads(1)
SEEDS = range(20)
TOWER, BARE = Tower(has_cls=True, depth=3), Tower(has_cls=False, depth=3)


def draw(seed: int) -> tuple[VisualInputs, int]:
    """A picture of random size with every signal, and a budget below its tokens."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    grid = Grid(rng.randint(2, 9), rng.randint(2, 9))
    n, matrix = grid.n_tokens, torch.randn(6, 10, generator=g)
    enc = torch.randn(n, 6, generator=g)
    inputs = VisualInputs(
        grid=grid,
        proj=enc @ matrix,
        enc=enc,
        project=lambda rows: rows @ matrix,
        tower=TOWER,
        taps={
            Signal("cls_row", 2): torch.randn(n, generator=g).softmax(0),
            Signal("keys", 2): torch.randn(n, 7, generator=g),
        },
        seed=seed,
    )
    return inputs, rng.randint(1, n - 1)


def kept(name: str, inputs: VisualInputs, k: int, **params: bool | int | float | str) -> list[int]:
    return build_reducer(name, params).reduce(inputs, k).anchor.tolist()


def rows_of(transform: TokenTransform, inputs: VisualInputs) -> Tensor:
    return transform.apply_to(inputs.proj, inputs.enc, inputs.project)


def blank(grid: Grid, seed: int = 0) -> VisualInputs:
    return VisualInputs(grid=grid, proj=torch.zeros(grid.n_tokens, 2), seed=seed)


# --- random ----------------------------------------------------------------------------------------------------------


def test_random_keeps_each_token_equally_often() -> None:
    n, k, n_draws = 20, 5, 2000
    counts = torch.zeros(n)
    for seed in range(n_draws):
        counts[kept("random", blank(Grid(4, 5), seed), k)] += 1
    expected = n_draws * k / n
    chi2 = ((counts - expected).square() / expected).sum() * (n - 1) / (n - k)  # draws without replacement
    assert chi2 < 43.8, "19 degrees of freedom, p = 0.001"


def test_random_depends_on_picture_and_seed_and_is_nested() -> None:
    grid = Grid(10, 10)
    first = kept("random", blank(grid, 1), 30, seed=2)
    assert first == kept("random", blank(grid, 1), 30, seed=2)
    assert first != kept("random", blank(grid, 2), 30, seed=1)
    assert first != kept("random", blank(grid, 1), 30)
    assert set(kept("random", blank(grid, 1), 12, seed=2)) < set(first)


# --- uniform and pool ------------------------------------------------------------------------------------------------


def plain_lattice(grid: Grid, k: int) -> tuple[int, int]:
    shapes = [(h, w) for h in range(1, grid.rows + 1) for w in range(1, grid.cols + 1) if h * w <= k]
    return min(shapes, key=lambda s: (max(grid.rows / s[0], grid.cols / s[1]), -s[0] * s[1], s[0]))


def plain_uniform(grid: Grid, k: int) -> list[int]:
    h, w = plain_lattice(grid, k)
    chosen = [
        math.floor((i + 0.5) * grid.rows / h) * grid.cols + math.floor((j + 0.5) * grid.cols / w)
        for i in range(h)
        for j in range(w)
    ]
    cells = [divmod(c, grid.cols) for c in range(grid.n_tokens)]
    while len(chosen) < k:
        rest = [c for c in range(grid.n_tokens) if c not in chosen]
        chosen.append(max(rest, key=lambda c: (min(math.dist(cells[c], cells[o]) for o in chosen), -c)))
    return sorted(chosen)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_is_the_plain_rule(seed: int) -> None:
    inputs, k = draw(seed)
    assert kept("uniform", inputs, k) == plain_uniform(inputs.grid, k)
    assert kept("uniform", inputs, k) == kept("uniform", blank(inputs.grid), k), "content does not matter"


@pytest.mark.parametrize("grid", [Grid(8, 8), Grid(12, 12), Grid(6, 10)], ids=str)
def test_uniform_tokens_stay_apart(grid: Grid) -> None:
    for k in range(1, grid.n_tokens):
        cells = [divmod(c, grid.cols) for c in kept("uniform", blank(grid), k)]
        closest = min((math.dist(a, b) for a, b in itertools.combinations(cells, 2)), default=math.inf)
        slack = 1 if k > 9 else 2  # few tokens in a coarse lattice are only even to whole cells
        assert closest >= math.floor(math.sqrt(grid.n_tokens / k)) - slack


def test_lattice_prefers_even_cells_to_a_long_row() -> None:
    assert lattice(Grid(8, 8), 7) == Grid(2, 3)
    assert lattice(Grid(12, 12), 36) == Grid(6, 6)
    assert lattice(Grid(2, 10), 5) == Grid(1, 5)
    assert lattice(Grid(5, 5), 1) == Grid(1, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_pool_is_adaptive_average_pooling(seed: int) -> None:
    inputs, k = draw(seed)
    grid, shape = inputs.grid, plain_lattice(inputs.grid, k)
    transform = build_reducer("pool", {}).reduce(inputs, k)
    assert transform.n_out == shape[0] * shape[1]
    image = inputs.proj.T.reshape(1, -1, grid.rows, grid.cols)
    expected = torch.nn.functional.adaptive_avg_pool2d(image, shape).flatten(2)[0].T
    torch.testing.assert_close(rows_of(transform, inputs), expected)
    assert set(transform.indices.tolist()) == set(range(grid.n_tokens)), "no token is lost"


def test_pool_by_whole_blocks_uses_each_token_once() -> None:
    transform = build_reducer("pool", {}).reduce(blank(Grid(12, 12)), 36)
    assert transform.size.tolist() == [4] * 36
    assert sorted(transform.indices.tolist()) == list(range(144))
    assert transform.anchor[:3].tolist() == [13, 15, 17]  # row 1, the lower right of each 2 x 2 block


# --- fastervlm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_fastervlm_is_argsort(seed: int) -> None:
    inputs, k = draw(seed)
    scores = inputs.cls_row().tolist()
    expected = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])
    assert kept("fastervlm", inputs, k) == expected
    taps = {Signal("recv", 2): inputs.cls_row() + 3}
    received = VisualInputs(grid=inputs.grid, proj=inputs.proj * 0, tower=BARE, taps=taps)
    assert kept("fastervlm", received, k) == expected


# --- divprune --------------------------------------------------------------------------------------------------------


def plain_divprune(rows: Tensor, k: int, start: str = "isolated") -> list[int]:
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows.double().tolist()]
    n = len(unit)
    d = [[1 - sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) for j in range(n)] for i in range(n)]
    if start == "isolated":
        picks = [max(range(n), key=lambda j: (min(d[i][j] for i in range(n) if i != j), -j))]
    else:
        picks = [max(itertools.combinations(range(n), 2), key=lambda p: d[p[0]][p[1]])[0]]
    while len(picks) < k:
        rest = [j for j in range(n) if j not in picks]
        picks.append(max(rest, key=lambda j: (min(d[i][j] for i in picks), -j)))
    return picks


@pytest.mark.parametrize("start", ["isolated", "farthest_pair"])
@pytest.mark.parametrize("seed", SEEDS)
def test_divprune_is_the_greedy_rule(seed: int, start: str) -> None:
    inputs, k = draw(seed)
    assert kept("divprune", inputs, k, start=start) == sorted(plain_divprune(inputs.proj, k, start))


@pytest.mark.parametrize("seed", range(5))
def test_divprune_is_nested_scale_free_and_does_not_see_order(seed: int) -> None:
    inputs, _ = draw(seed)
    n = inputs.grid.n_tokens
    sets = [set(kept("divprune", inputs, k)) for k in range(1, n)]
    assert all(small < large for small, large in itertools.pairwise(sets))
    g = torch.Generator().manual_seed(seed)
    scaled = VisualInputs(grid=inputs.grid, proj=inputs.proj * (torch.rand(n, 1, generator=g) + 0.5))
    order = torch.randperm(n, generator=g)
    shuffled = VisualInputs(grid=inputs.grid, proj=inputs.proj[order])
    for k in (1, n // 2, n - 1):
        assert set(kept("divprune", scaled, k)) == sets[k - 1]
        assert {int(order[i]) for i in kept("divprune", shuffled, k)} == sets[k - 1]


@pytest.mark.parametrize("seed", range(6))
def test_divprune_is_within_half_of_the_best_chord(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    inputs = VisualInputs(grid=Grid(2, 5), proj=torch.randn(10, 3, generator=g))
    unit = torch.nn.functional.normalize(inputs.proj, dim=-1)
    chords = torch.cdist(unit, unit)

    def closest(picks: tuple[int, ...]) -> float:
        return min(float(chords[i, j]) for i, j in itertools.combinations(picks, 2))

    for k in (2, 3, 5):
        best = max(closest(s) for s in itertools.combinations(range(10), k))
        assert closest(tuple(kept("divprune", inputs, k, start="farthest_pair"))) >= best / 2 - 1e-5


def test_divprune_takes_copies_last() -> None:
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    inputs = VisualInputs(grid=Grid(3, 4), proj=torch.cat([rows, rows]))
    assert {i % 6 for i in kept("divprune", inputs, 6)} == set(range(6))


TILED = [
    Grid(4, 6, thumbnail=3, row_cuts=(0, 2, 4), col_cuts=(0, 3, 6)),
    Grid(3, 8, thumbnail=3, row_cuts=(0, 3), col_cuts=(0, 3, 6, 8)),
    Grid(6, 4, thumbnail=2, row_cuts=(0, 3, 6), col_cuts=(0, 4)),
]


@pytest.mark.parametrize("start", ["isolated", "farthest_pair"])
@pytest.mark.parametrize("seed", range(12))
def test_divprune_chooses_from_all_tiles_together(seed: int, start: str) -> None:
    grid, g = TILED[seed % len(TILED)], torch.Generator().manual_seed(seed)
    inputs = VisualInputs(grid=grid, proj=torch.randn(grid.n_tokens, 6, generator=g))
    for k in (1, 2, grid.n_tokens // 4, grid.n_tokens // 2):
        assert kept("divprune", inputs, k, start=start) == sorted(plain_divprune(inputs.proj, k, start))


def test_divprune_keeps_no_token_of_a_crop_that_the_thumbnail_shows_already() -> None:
    grid = TILED[0]
    rows = torch.nn.functional.one_hot(torch.arange(grid.n_tokens) % 9).float() + 0.01  # nine different tokens
    picks = kept("divprune", VisualInputs(grid=grid, proj=rows), 9)
    assert sorted(i % 9 for i in picks) == list(range(9))


# --- visionzip -------------------------------------------------------------------------------------------------------


def plain_visionzip(inputs: VisualInputs, k: int, compat: bool) -> tuple[list[int], Tensor, list[set[int]]]:
    """Anchors, output rows and the sources of each row, step by step from the paper's text."""
    assert inputs.enc is not None and inputs.project is not None
    scores, keys, rows = inputs.cls_row().tolist(), inputs.keys().double(), inputs.enc.double()
    n, n_contextual = len(scores), min(round(k * 10 / 64), k - 1)
    dominant = sorted(range(n), key=lambda i: (-scores[i], i))[: k - n_contextual]
    left = [i for i in range(n) if i not in dominant]
    targets = [left[j * max(1, len(left) // n_contextual)] for j in range(n_contextual)]
    members: dict[int, list[int]] = {t: [] for t in targets}
    for i in left:
        if targets and i not in targets:
            cosines = [float(keys[i] @ keys[t] / keys[i].norm() / keys[t].norm()) for t in targets]
            members[targets[cosines.index(max(cosines))]].append(i)
    out = {i: rows[i] for i in dominant}
    for t, found in members.items():
        if compat:
            out[t] = rows[t] + (rows[found].mean(0) if found else 0)
        else:
            out[t] = rows[[t, *found]].mean(0)
    anchors = sorted(out)
    sources = [{a, *members.get(a, [])} for a in anchors]
    return anchors, inputs.project(torch.stack([out[a] for a in anchors]).float()), sources


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_visionzip_is_the_paper_step_by_step(seed: int, compat: bool) -> None:
    inputs, k = draw(seed)
    anchors, rows, sources = plain_visionzip(inputs, k, compat)
    transform = build_reducer("visionzip", {"compat": compat}).reduce(inputs, k)
    assert transform.anchor.tolist() == anchors
    ends = transform.indptr.tolist()
    found = [set(transform.indices[a:b].tolist()) for a, b in itertools.pairwise(ends)]
    assert found == sources
    torch.testing.assert_close(rows_of(transform, inputs), rows, rtol=1e-4, atol=1e-5)


def test_visionzip_proportions_and_provenance() -> None:
    g = torch.Generator().manual_seed(0)
    grid = Grid(24, 24)
    inputs = VisualInputs(
        grid=grid,
        proj=torch.randn(576, 4, generator=g),
        tower=BARE,
        taps={
            Signal("recv", 2): torch.rand(576, generator=g),
            Signal("keys", 2): torch.randn(576, 8, generator=g),
        },
    )
    for k, n_contextual in ((64, 10), (128, 20), (192, 30)):
        transform = build_reducer("visionzip", {}).reduce(inputs, k)
        assert transform.space == "proj" and transform.n_out == k
        assert int((transform.size > 1).sum()) == n_contextual
        assert int(transform.size.sum()) == 576
        assert sorted(transform.indices.tolist()) == list(range(576)), "every token is in exactly one row"
    released = build_reducer("visionzip", {"compat": True}).reduce(inputs, 64)
    assert released.weights is not None
    owner = torch.arange(64).repeat_interleave(released.indptr.diff())
    sums = torch.zeros(64).index_add_(0, owner, released.weights)
    torch.testing.assert_close(sums, torch.where(released.size > 1, 2.0, 1.0))


def test_visionzip_without_contextual_tokens_is_fastervlm() -> None:
    inputs, k = draw(3)
    transform = build_reducer("visionzip", {"contextual_ratio": 0}).reduce(inputs, k)
    assert transform.weights is None
    assert transform.anchor.tolist() == kept("fastervlm", inputs, k)
