"""Costs and shares of the machine's limits, against sums by hand."""

import pytest


def test_costs_and_shares_agree_with_sums_by_hand(bench, row):
    shape = bench.random_model.shape.Shape()
    tower = bench.limits.llava_cost(shape, 27).tower_flops
    need = bench.limits.cost(shape, 603, tower, n_outputs=0)
    per_layer = 896 * 1152 + 896 * 896 + 3 * 896 * 4864
    values, kv = 24 * per_layer + 32_000 * 896, 603 * 24 * 2 * 128 * 2
    assert need.token_bytes["bf16"] == 2 * values + kv
    assert need.token_bytes["int8"] == pytest.approx(values * (1 + 4 / 128) + kv)
    assert 0.9 < need.decoder_flops / (2 * 24 * per_layer * 603) < 1.1
    assert bench.limits.cost(shape, 1000).tower_flops == 0
    a_layer = 4 * 1024**2 + 2 * 1024 * 4096
    assert 1.0 < tower / (2 * 23 * a_layer * 577) < 1.15, "attention and the projector come on top"
    qwen = bench.limits.qwen_cost(shape, 27)
    assert 1.0 < qwen.tower_flops / (2 * 24 * a_layer * 576) < 1.15
    assert qwen.decoder_flops == bench.limits.cost(shape, 27 + 144).decoder_flops
    limits = bench.limits.Limits({"float32": 1e12}, need.token_bytes["bf16"] / 0.02, "hand")
    row = row("ours bf16", "bf16", tpot_s=[0.025], encode_s=[need.tower_flops / 1e12 * 1.5])
    shares = {r.name: r for r in bench.peers.table.shares(row, limits, need, need, 1.0)}
    assert shares["ours bf16: bytes per token / read bandwidth"].value == pytest.approx(0.8)
    assert shares["ours bf16: tower / its GEMM floor"].value == pytest.approx(1.5)
