"""A cell of the scaling bench on a pool of random contents."""

import torch

from foveate.configs.config import ModelConfig
from foveate.engine.models.loader import load_model


def test_a_scaling_cell_runs_on_a_pool_of_random_contents(bench, small_shape, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.scaling, "_CELL_S", 0.0)
    bench.random_model.checkpoint.build("llava", tmp_path, small_shape)
    model = load_model(tmp_path, torch.float32, "cpu", ModelConfig())
    kv = bench.scaling.filled(model.spec, model.dtype, 3 * 120)
    assert torch.isfinite(kv.pages.keys).all() and 0.9 < kv.pages.values.std() < 1.1
    chunks = bench.scaling.decoding(model.spec, kv, 3, 101)
    pages = [page for chunk in chunks for block in chunk.sequence.cache.blocks() for page in block.pages]
    assert len(set(pages)) == len(pages) == 3 * 7 * kv.n_layers, "no page belongs to two"
    assert all(chunk.samples for chunk in chunks)
    cell = bench.scaling.measure(model, kv, 3, 101)
    assert cell.step_s > 0 and cell.n_steps == 3
    line = [
        bench.scaling.Cell(n, context, 0.01 * n, 3) for context in (16, 32) for n in (1, 2) if (n, context) != (2, 32)
    ]
    assert "| 32 | 10.0 (100) | - |" in bench.scaling.step_table(line)
