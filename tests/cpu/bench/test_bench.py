"""The benches' own parts: the random model, the arithmetic of prompts, ratios and floors, a pool of random contents."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from foveate.configs.config import ModelConfig
from foveate.engine.models.loader import load_model

_FOLDER = Path(__file__).parents[3] / "bench"
_SMALL = {
    "hidden": 64,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "inner": 96,
    "vocab": 1100,
    "context": 512,
    "tower_hidden": 32,
    "tower_layers": 3,
    "tower_heads": 2,
    "tower_inner": 64,
    "side": 56,
}


@pytest.fixture(scope="module")
def bench():
    """The benches' modules. Not through sys.path: the repository's root there would show `transformers` our kernels."""
    if "bench" not in sys.modules:
        where = {"submodule_search_locations": [str(_FOLDER)]}
        spec = importlib.util.spec_from_file_location("bench", _FOLDER / "__init__.py", **where)
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
    names = (
        "random_model",
        "random_config",
        "random_text",
        "peer_table",
        "peer_work",
        "limits",
        "scaling",
        "peers",
        "reducers_cost",
    )
    return SimpleNamespace(**{name: importlib.import_module(f"bench.{name}") for name in names})


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_random_model_is_always_the_same_and_loads(bench, family, tmp_path, monkeypatch):
    shape = bench.random_config.Shape(**_SMALL)
    bench.random_model.build(family, tmp_path / "a", shape)
    monkeypatch.setattr(bench.random_model, "_SHARD_BYTES", 40_000)  # other shards, same tensors
    bench.random_model.build(family, tmp_path / "b", shape)
    bench.random_model.build(family, tmp_path / "c", shape, seed=1)
    a, b, c = (
        {name: tensor for file in (tmp_path / x).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for x in "abc"
    )
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > len(list((tmp_path / "a").glob("*.safetensors")))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    assert all(tensor.dtype == torch.bfloat16 for tensor in a.values())
    model = load_model(tmp_path / "a", torch.float32, "cpu", ModelConfig())
    (seen,) = model.encode([torch.randint(0, 256, (56, 56, 3), dtype=torch.uint8)], frozenset())
    assert torch.isfinite(seen.proj).all()
    assert 0.1 < seen.proj.std() < 10, "activations stay of order one"


def test_an_existing_model_is_left_alone_and_another_is_not(bench, tmp_path):
    shape = bench.random_config.Shape(**_SMALL)
    bench.random_model.build("llava", tmp_path, shape)
    (tmp_path / "config.json").write_text("kept")
    bench.random_model.build("llava", tmp_path, shape)
    assert (tmp_path / "config.json").read_text() == "kept"
    bench.random_model.build("llava", tmp_path, replace(shape, layers=1))
    assert (tmp_path / "config.json").read_text() != "kept"


def test_parameters_come_to_what_the_name_says(bench):
    assert round(bench.random_model.n_parameters("llava") / 1e9, 2) == 0.69
    assert abs(bench.random_model.n_parameters("qwen2_vl") / 1e9 - 0.69) < 0.03


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_prompts_have_exactly_the_tokens_they_should(bench, family, tmp_path):
    bench.random_text.write_tokenizer(tmp_path, family, 32_000, 512)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 32_000
    for n in (1, 2, 12, 25, 987):
        for seed in range(5):
            assert len(tokenizer.encode(bench.random_text.text_of(n, seed)).ids) == n
    asks = bench.peer_work.Asks()
    text, pictured = asks.about_text(), asks.about_picture()
    assert len(tokenizer.encode(bench.random_text.rendered(family, text.text, False)).ids) == 1000
    prompt = bench.random_text.rendered(family, pictured.text, True)
    assert len(tokenizer.encode(prompt).ids) == {"llava": 603 - 575, "qwen2_vl": 29}[family]
    assert pictured.seed != text.seed


def test_every_id_but_the_silent_shows_as_text(bench, tmp_path):
    tokenizer = bench.random_text.build_tokenizer(32_000)
    shown = [tokenizer.decode([i]) for i in range(bench.random_text.N_SILENT, 32_000)]
    assert all(len(text) in (2, 4) and text.isalpha() for text in shown)
    assert len(set(shown)) == len(shown)


def test_the_chat_template_makes_what_the_libraries_are_given(bench):
    for family in ("llava", "qwen2_vl"):
        template = jinja2.Template(bench.random_text.chat_template(family), trim_blocks=True)
        content = [{"type": "image"}, {"type": "text", "text": "abcd"}]
        made = template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
        assert made == bench.random_text.rendered(family, "abcd", True)


def _row(bench, name, form="", **measured):
    row = bench.peer_table.Row(bench.peer_table.Variant(name, "ours" if "ours" in name else "vllm", form))
    for measure, values in measured.items():
        for value in values:
            row.add(measure, value)
    return row


def test_ratios_are_of_medians_and_only_of_what_was_measured(bench):
    rows = {
        "ours 16 bit": _row(bench, "ours 16 bit", "bf16", tpot_s=[0.03, 9.0, 0.04], tokens_per_s=[40.0]),
        "vllm": _row(bench, "vllm", tpot_s=[0.1, 0.08, 0.09], tokens_per_s=[20.0]),
    }
    found = {ratio.name: ratio for ratio in bench.peer_table.ratios(rows)}
    assert found.keys() == {"TPOT, ours / vLLM", "tok/s of 8, ours / vLLM"}
    tpot, rate = found["TPOT, ours / vLLM"], found["tok/s of 8, ours / vLLM"]
    assert tpot.value == pytest.approx(0.04 / 0.09) and tpot.met
    assert rate.value == pytest.approx(2.0) and rate.met
    assert not replace(rate, value=1.89).met and not replace(tpot, value=0.51).met
    assert "| 0.44 | <= 0.50 | yes |" in bench.peer_table.ratio_table([tpot])


def test_costs_and_shares_agree_with_sums_by_hand(bench):
    shape = bench.random_config.Shape()
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
    row = _row(bench, "ours bf16", "bf16", tpot_s=[0.025], encode_s=[need.tower_flops / 1e12 * 1.5])
    shares = {r.name: r for r in bench.peer_table.shares(row, limits, need, need, 1.0)}
    assert shares["ours bf16: bytes per token / read bandwidth"].value == pytest.approx(0.8)
    assert shares["ours bf16: tower / its GEMM floor"].value == pytest.approx(1.5)


def test_a_scaling_cell_runs_on_a_pool_of_random_contents(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.scaling, "_CELL_S", 0.0)
    bench.random_model.build("llava", tmp_path, bench.random_config.Shape(**_SMALL))
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


def test_variants_are_chosen_by_how_they_begin(bench):
    assert [v.name for v in bench.peers.chosen("ours int,vllm")] == ["ours int8", "ours int4", "vllm"]
    assert len(bench.peers.chosen("")) == len(bench.peers.VARIANTS)
    with pytest.raises(SystemExit, match="there are ours 16 bit"):
        bench.peers.chosen("mine")


def test_what_methods_cost_is_measured_where_they_act(bench, tmp_path):
    bench.random_model.build("llava", tmp_path, bench.random_config.Shape(**_SMALL))
    model = load_model(tmp_path, torch.float32, "cpu", ModelConfig())
    names = ["divprune", "evit", "pixelprune", "none"]
    found, said = bench.reducers_cost.measure(model, names, (0.5, 0.25), side=56)
    assert [(cost.method, cost.ratio) for cost in found] == [(m, r) for m in names[:3] for r in (0.5, 0.25)]
    assert all(cost.reduce_s > 0 for cost in found)
    assert [cost.tower_s is None for cost in found] == [True, True, False, False, False, False]
    assert "ms of 16" in said and "ms of 4" in said
    line = bench.reducers_cost.Cost("divprune", 0.25, 0.02, 0.1, 0.005)
    assert "| divprune | 20.0 (20.0 %) | 5 | - | no |" in bench.reducers_cost.cost_table([line])


def test_a_half_blank_page_is_half_blank(bench):
    pixels = bench.reducers_cost.pixels_of(bench.reducers_cost.page(3))
    assert (pixels[168:] == 255).all()
    cells = pixels[:168].view(12, 14, 24, 14, 3).transpose(1, 2).flatten(2)
    assert ((cells < 255).any(-1)).all(), "every cell of the upper half shows something"
    assert not torch.equal(pixels, bench.reducers_cost.pixels_of(bench.reducers_cost.page(4)))
