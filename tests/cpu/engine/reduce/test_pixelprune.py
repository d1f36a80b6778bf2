"""PixelPrune against the paper's scan, written out cell by cell, and the cells that kept cells stand for."""

import pytest
import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid, Stage, VisualBudget
from foveate.engine.methods import build
from foveate.engine.reduce.base import Reducer
from foveate.engine.reduce.cut import Offer, Way, plan_all
from foveate.engine.reduce.methods.pixelprune import PixelPrune, cut_cells

CELL = 4


def page(seed: int, grid: Grid, noise: int = 0) -> Tensor:
    """A few rectangles of one colour each, on a ground; `noise` in grey levels."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    height, width = grid.rows * CELL, grid.cols * CELL
    pixels = torch.full((height, width, 3), draw(0, 256))
    for _ in range(4):
        y, x = draw(0, height), draw(0, width)
        pixels[y : y + draw(1, height + 1), x : x + draw(1, width + 1)] = torch.randint(0, 256, (3,), generator=g)
    pixels += torch.randint(-noise, noise + 1, pixels.shape, generator=g)
    return pixels.clamp(0, 255).to(torch.uint8)


def replay(pixels: Tensor, grid: Grid, tau: float, metric: str, kept: set[int] | None = None):
    """Scan the cells in raster order: (new cells, sums of prediction errors, cells as the new cells predict them)."""
    cells = cut_cells(pixels, grid).long()
    seen: dict[tuple[int, int], Tensor] = {}

    def alike(one: Tensor, other: Tensor) -> bool:
        difference = (one - other).abs().float()
        return bool((difference.max() if metric == "max" else difference.mean()) <= tau)

    new, missed = set(), {}
    for y in range(grid.rows):
        for x in range(grid.cols):
            cell, at = cells[y, x], y * grid.cols + x
            if y == x == 0:
                new.add(0)
                seen[y, x] = cell
                continue
            if x == 0:
                predicted = seen[y - 1, x]
            elif y == 0:
                predicted = seen[y, x - 1]
            else:
                left, up, corner = seen[y, x - 1], seen[y - 1, x], seen[y - 1, x - 1]
                predicted = up if alike(corner, left) and not alike(corner, up) else left
            missed[at] = int((cell - predicted).abs().sum())
            is_new = not alike(cell, predicted) if kept is None else at in kept
            if is_new:
                new.add(at)
            seen[y, x] = cell if is_new else predicted
    return new, missed, torch.stack([seen[y, x] for y in range(grid.rows) for x in range(grid.cols)])


@pytest.mark.parametrize("metric", ["max", "mean"])
@pytest.mark.parametrize("tau, noise", [(0, 0), (2, 1), (6, 4)])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(seed: int, tau: int, noise: int, metric: str) -> None:
    grid = Grid(2 + seed % 7, 1 + seed % 9)
    pixels = page(seed, grid, noise)
    worth = PixelPrune(tau=tau, metric=metric).worth(pixels, grid)
    new, missed, _ = replay(pixels, grid, tau, metric)
    assert worth.n_distinct == len(new)
    order = sorted(range(grid.n_tokens), key=lambda i: (i != 0, i not in new, -missed.get(i, 0), i))
    ours = torch.sort(worth.scores, descending=True, stable=True).indices.tolist()
    assert ours == order


@pytest.mark.parametrize("tau", [0, 5])
def test_kept_cells_tell_all_others_within_tau(tau: int) -> None:
    grid = Grid(9, 12)
    pixels = page(3, grid, noise=tau)
    worth = PixelPrune(tau=tau).worth(pixels, grid)
    kept = set(torch.sort(worth.scores, descending=True, stable=True).indices[: worth.n_distinct].tolist())
    _, _, known = replay(pixels, grid, tau, "max", kept)
    assert (known - cut_cells(pixels, grid).long().flatten(0, 1)).abs().max() <= tau
    assert tau or worth.n_distinct < grid.n_tokens / 2


def test_rectangles_cost_their_corners_and_blank_paper_one_cell() -> None:
    prune, grid = PixelPrune(), Grid(16, 16)
    pixels = torch.full((64, 64, 3), 255, dtype=torch.uint8)
    assert prune.worth(pixels, grid).n_distinct == 1
    pixels[16:48, 16:48] = 30
    assert prune.worth(pixels, grid).n_distinct <= 1 + 4
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert prune.worth(pixels, grid).n_distinct == 256


def test_fewer_pixels_than_cells_and_pixels_left_over() -> None:
    pixels = page(1, Grid(4, 4))
    assert PixelPrune().worth(pixels, Grid(1, 40)).n_distinct >= 1
    assert cut_cells(pixels[:15, :14], Grid(3, 4)).shape == (3, 4, 5 * 3 * 3)
    assert torch.equal(cut_cells(pixels, Grid(4, 4))[1, 2], pixels[4:8, 8:12].flatten())
    with pytest.raises(ConfigError, match=r"tau: 300 is not in 0..255"):
        PixelPrune(tau=300)


def chain(*stages: Stage) -> Reducer:
    return build(VisualBudget(method="+".join(s.method for s in stages), stages=list(stages)))


def ways(pictures, reducer: Reducer, budget: int, pixels: list[Tensor], floor: int | None = 1) -> list[Way]:
    offers = [Offer(Grid(8, 8), budget, lambda p=p: p) for p in pixels]
    return plan_all(reducer, pictures.towers["cls"], offers, floor)


def test_what_is_read_is_known_before_anything_is_encoded(pictures) -> None:
    half = torch.full((32, 32, 3), 255, dtype=torch.uint8)
    half[:16] = torch.randint(0, 256, (16, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    prune, both = PixelPrune(), chain(Stage(method="pixelprune"), Stage(method="divprune"))
    n = prune.worth(half, Grid(8, 8)).n_distinct
    assert 32 <= n <= 34
    for reducer, budget, read, kept in (
        (prune, 64, n, n), (prune, 16, 16, 16), (both, 16, n, 16), (both, 64, n, n),
        (chain(Stage(method="pixelprune", keep=0.4), Stage(method="divprune")), 16, 26, 16),
    ):  # fmt: skip
        (way,) = ways(pictures, reducer, budget, [half])
        assert way.cut is not None and way.cut.cells is not None
        assert (len(way.cut.cells), way.n_kept) == (read, kept)
        assert (way.cut.cells.diff() > 0).all() and not way.cut.layers
    assert ways(pictures, prune, 64, [half], floor=None)[0].cut is None, "asked for in full"
    full, blank = ways(pictures, prune, 64, [half, half * 0], floor=70)
    assert full.n_kept + blank.n_kept == 70, "the floor is met with what repeats"
    noise = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    assert ways(pictures, both, 64, [noise])[0].cut is None, "nothing repeats"


def test_order_of_stages() -> None:
    for names in (("divprune", "pixelprune"), ("pixelprune", "pool"), ("evit", "expedite"), ("tome", "pixelprune")):
        with pytest.raises(ConfigError, match="needs what the stage before"):
            chain(*(Stage(method=name) for name in names))
    chain(Stage(method="pixelprune"), Stage(method="evit"), Stage(method="divprune"))
    chain(Stage(method="expedite"), Stage(method="pool"))
