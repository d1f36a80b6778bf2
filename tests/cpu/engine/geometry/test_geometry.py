"""The geometry of a model, read without its weights: counts, grids and positions as plain numbers."""

import subprocess
import sys

import pytest
import torch

from foveate.engine.common import Grid
from foveate.engine.geometry.base import Positions, load_geometry
from foveate.engine.models.loader import load_model


def test_it_is_the_models_own_and_takes_no_weights(tiny_models, tmp_path):
    tiny_models.save_qwen(tmp_path)
    model = load_model(tmp_path, torch.float32, "cpu")
    (tmp_path / "model.safetensors").unlink()
    alone = load_geometry(tmp_path)
    assert alone.spec == model.spec == model.geometry.spec
    assert alone.grid(32, 56) == model.geometry.grid(32, 56) == Grid(4, 7)
    assert alone.n_patches(32, 56) == 112 and alone.can_cut


def test_reading_it_starts_no_torch(tiny_models, tmp_path):
    tiny_models.save_llava(tmp_path)
    code = (
        "import sys; from pathlib import Path; from foveate.engine.geometry.base import load_geometry\n"
        f"geometry = load_geometry(Path({str(tmp_path)!r}))\n"
        "geometry.lay_out([3, geometry.grid(30, 30), 2])\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def values(positions: list[Positions]) -> list[list[list[int]]]:
    return [[list(axis) for axis in axes] for axes in positions]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_of_a_picture_are_its_rows_and_columns(tiny_models, tmp_path, family):
    tiny_models.save_qwen(tmp_path, family=family)
    laid_out, following = load_geometry(tmp_path).lay_out([2, Grid(2, 3), 1])
    assert values(laid_out) == [
        [[0, 1]] * 3,
        [[2] * 6, [2, 2, 2, 3, 3, 3], [2, 3, 4, 2, 3, 4]],
        [[5]] * 3,
    ]
    assert following == 6


def test_the_prompt_without_anything(tiny_models, tmp_path):
    tiny_models.save_llava(tmp_path)
    assert load_geometry(tmp_path).lay_out([]) == ([], 0)
