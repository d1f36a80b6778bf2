"""The bench of what each reducer costs, on a small random model."""

import torch

from foveate.configs.config import ModelConfig
from foveate.engine.models.loader import load_model


def test_what_methods_cost_is_measured_where_they_act(bench, small_shape, tmp_path):
    bench.random_model.checkpoint.build("llava", tmp_path, small_shape)
    model = load_model(tmp_path, torch.float32, "cpu", ModelConfig())
    names = ["divprune", "evit", "pixelprune", "none"]
    found, said = bench.reducers_cost.__main__.measure(model, names, (0.5, 0.25), side=56)
    assert [(cost.method, cost.ratio) for cost in found] == [(m, r) for m in names[:3] for r in (0.5, 0.25)]
    assert all(cost.reduce_s > 0 for cost in found)
    assert [cost.tower_s is None for cost in found] == [True, True, False, False, False, False]
    assert "ms of 16" in said and "ms of 4" in said
    line = bench.reducers_cost.__main__.Cost("divprune", 0.25, 0.02, 0.1, 0.005)
    assert "| divprune | 20.0 (20.0 %) | 5 | - | no |" in bench.reducers_cost.__main__.cost_table([line])


def test_a_half_blank_page_is_half_blank(bench):
    pixels = bench.reducers_cost.pages.pixels_of(bench.reducers_cost.pages.page(3))
    assert (pixels[168:] == 255).all()
    cells = pixels[:168].view(12, 14, 24, 14, 3).transpose(1, 2).flatten(2)
    assert ((cells < 255).any(-1)).all(), "every cell of the upper half shows something"
    assert not torch.equal(pixels, bench.reducers_cost.pages.pixels_of(bench.reducers_cost.pages.page(4)))
