"""ShowUI against its graph, written out plainly, and the properties of the method."""

import dataclasses
import math
import random

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.primitives.math import largest_remainder
from foveate.engine.reduce.methods.showui import ShowUI, distances
from foveate.engine.vision import VisualInputs

SIDE = 4  # pixels along the edge of a cell
STD = (0.26862954, 0.26130258, 0.27577711)


def screen(seed: int, rows: int, cols: int) -> Tensor:
    """Cells of one of three colours, with a little noise: some neighbours are one area, some are not."""
    rng = random.Random(seed)
    colours = [[rng.randrange(250) for _ in range(3)] for _ in range(3)]
    of_cell = torch.tensor([[rng.choice(colours) for _ in range(cols)] for _ in range(rows)])
    noise = torch.randint(0, 3, (rows * SIDE, cols * SIDE, 3), generator=torch.Generator().manual_seed(seed))
    return (of_cell.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1) + noise).to(torch.uint8)


def apart(pixels: Tensor, a: tuple[int, int], b: tuple[int, int]) -> float:
    total = 0.0
    for y in range(SIDE):
        for x in range(SIDE):
            p, q = (pixels[at[0] * SIDE + y, at[1] * SIDE + x].tolist() for at in (a, b))
            total += sum(((u - v) / 255 / std) ** 2 for u, v, std in zip(p, q, STD, strict=True))
    return math.sqrt(total + total) * 28 / SIDE  # over the two equal frames that the preprocessing makes


def graph(pixels: Tensor, rows: int, cols: int, delta: float) -> tuple[list[list[int]], list[float]]:
    """The areas by their first cell, and for each cell its mean distance to its neighbours."""
    edges: dict[int, list[tuple[int, float]]] = {i: [] for i in range(rows * cols)}
    for y in range(rows):
        for x in range(cols):
            for v, u in ((y, x + 1), (y + 1, x)):
                if v < rows and u < cols:
                    d = apart(pixels, (y, x), (v, u))
                    edges[y * cols + x].append((v * cols + u, d))
                    edges[v * cols + u].append((y * cols + x, d))
    areas, seen = [], set()
    for start in range(rows * cols):
        if start not in seen:
            area, todo = {start}, [start]
            while todo:
                more = [j for j, d in edges[todo.pop()] if d < delta and j not in area]
                area.update(more)
                todo += more
            seen |= area
            areas.append(sorted(area))
    return areas, [sum(d for _, d in found) / max(1, len(found)) for found in edges.values()]


def spread(areas: list[list[int]], unlike: list[float], k: int) -> list[int]:
    if k < len(areas):
        means = [sum(unlike[i] for i in area) / len(area) for area in areas]
        best = sorted(range(len(areas)), key=lambda a: (-means[a], a))[:k]
        return sorted(areas[a][0] for a in best)
    spare = [len(area) - 1 for area in areas]
    kept = []
    for area, more in zip(areas, largest_remainder(spare, k - len(areas), spare), strict=True):
        steps = [i * (len(area) - 1) / max(1, more) for i in range(1 + more)]
        kept += [area[int(step + 1e-9)] for step in steps]
    return sorted(kept)


def show(inputs: VisualInputs, pixels: Tensor) -> VisualInputs:
    return dataclasses.replace(inputs, pixels=pixels)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_graph_walked_by_hand(pictures, seed: int) -> None:
    inputs, k = pictures.draw("showui", seed)
    grid = inputs.grid
    pixels = screen(seed, grid.rows, grid.cols)
    delta = (1.0, 1.1, 1.3, 2.1)[seed % 4]
    areas, unlike = graph(pixels, grid.rows, grid.cols, delta)
    for budget in {k, 1, min(len(areas), grid.n_tokens - 1)}:
        assert pictures.kept("showui", show(inputs, pixels), budget, delta=delta) == spread(areas, unlike, budget)


def test_a_plain_screen_is_one_area_and_half_of_it_is_every_other_cell(pictures) -> None:
    inputs = show(pictures.make(ShowUI(), Grid(3, 9), "merging"), torch.full((12, 36, 3), 200, dtype=torch.uint8))
    assert pictures.kept("showui", inputs, 14) == list(range(0, 27, 2))


def test_lone_cells_are_kept_before_a_second_of_any_area(pictures) -> None:
    """The left half plain, the right half a checkerboard."""
    y, x = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    bright = torch.where((x >= 4) & ((y + x) % 2 == 0), 255, 0)
    pixels = bright.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)[..., None].expand(-1, -1, 3).to(torch.uint8)
    inputs = show(pictures.make(ShowUI(), Grid(6, 8), "cls"), pixels)
    areas, _ = graph(pixels, 6, 8, 1.0)
    lone = {area[0] for area in areas if len(area) == 1}
    assert len(areas) == 1 + len(lone) and len(lone) > 20
    kept = pictures.kept("showui", inputs, len(lone) + 3)
    assert lone < set(kept)
    plain = next(area for area in areas if len(area) > 1)
    assert set(kept) - lone == {plain[0], plain[(len(plain) - 1) // 2], plain[-1]}
    assert set(pictures.kept("showui", inputs, len(lone) // 2)) <= lone


def test_a_tiled_picture_has_two_graphs(pictures) -> None:
    grid = Grid(4, 6, thumbnail=2, row_cuts=(0, 2, 4), col_cuts=(0, 3, 6))
    pixels = torch.zeros(4 * SIDE, 6 * SIDE, 3, dtype=torch.uint8)
    inputs = show(pictures.make(ShowUI(), grid, "cls"), pixels)
    assert pictures.kept("showui", inputs, 2) == [0, 4], "one of the thumbnail, one of all crops"
    assert pictures.kept("showui", inputs, 14) == sorted({0, 3, *(4 + i * 23 // 11 for i in range(12))})


def test_what_an_earlier_stage_dropped_is_not_kept(pictures) -> None:
    inputs = show(pictures.make(ShowUI(), Grid(4, 4), "cls"), torch.zeros(16, 16, 3, dtype=torch.uint8))
    left = dataclasses.replace(inputs, proj=inputs.proj[::2], places=torch.arange(0, 16, 2))
    assert ShowUI().reduce(left, 3).anchor.tolist() == [0, 3, 7]


def test_distance_does_not_depend_on_the_size_of_a_cell() -> None:
    small = screen(1, 3, 4)
    large = small.repeat_interleave(7, 0).repeat_interleave(7, 1)
    for one, other in zip(distances(small, Grid(3, 4)), distances(large, Grid(3, 4)), strict=True):
        torch.testing.assert_close(one, other)


def test_cells_of_no_whole_number_of_pixels_are_sampled_alike() -> None:
    pixels = (10 * torch.arange(7, dtype=torch.uint8))[:, None, None].expand(7, 1, 3)
    right, down = distances(pixels, Grid(3, 1))  # rows 0 1, 2 4, 5 6
    step = 10 / 255 * math.sqrt(2 * sum(std**-2 for std in STD)) * 28 / math.sqrt(2)
    assert right.shape == (3, 0)
    torch.testing.assert_close(down, torch.full((2, 1), step * math.sqrt(2**2 + 3**2)))


@pytest.mark.parametrize("seed", range(10))
def test_distances_are_those_between_the_patches_that_qwen2_vl_reads(seed: int) -> None:
    """The norm over a row of the released preprocessing: channels, two frames, 28 x 28 pixels."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3 * 28, 4 * 28, 3), generator=g).to(torch.uint8)
    normalised = (pixels / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(STD)
    frames = normalised.permute(2, 0, 1)[:, None].repeat(1, 2, 1, 1)  # a still picture, repeated in time
    cells = frames.unflatten(3, (4, 28)).unflatten(2, (3, 28)).permute(2, 4, 0, 1, 3, 5).flatten(2)
    right, down = distances(pixels, Grid(3, 4))
    torch.testing.assert_close(right, (cells[:, 1:] - cells[:, :-1]).norm(dim=-1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(down, (cells[1:] - cells[:-1]).norm(dim=-1), rtol=1e-4, atol=1e-3)


def test_cells_between_one_and_two_frames_apart_are_no_area_at_the_default(pictures) -> None:
    """Neighbours one grey level apart: 0.709 over one frame, 1.002 over two; the default is 1."""
    columns = torch.arange(6).repeat_interleave(SIDE)
    pixels = torch.where(columns % 2 == 0, 100, 101)[None, :, None].expand(6 * SIDE, -1, 3).to(torch.uint8)
    one_frame = 1 / 255 * math.sqrt(sum(std**-2 for std in STD)) * 28
    assert one_frame < 1.0 < one_frame * math.sqrt(2)
    kept = pictures.kept("showui", show(pictures.make(ShowUI(), Grid(6, 6), "cls"), pixels), 6)
    assert sorted(cell % 6 for cell in kept) == list(range(6)), "one of each column"
