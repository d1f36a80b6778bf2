"""The random models: same bytes each time, and prompts of known lengths."""

from dataclasses import replace

import jinja2
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from foveate.configs.config import ModelConfig
from foveate.engine.models.loader import load_model


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_random_model_is_always_the_same_and_loads(bench, small_shape, family, tmp_path, monkeypatch):
    shape = small_shape
    bench.random_model.checkpoint.build(family, tmp_path / "a", shape)
    monkeypatch.setattr(bench.random_model.checkpoint, "_SHARD_BYTES", 40_000)  # other shards, same tensors
    bench.random_model.checkpoint.build(family, tmp_path / "b", shape)
    bench.random_model.checkpoint.build(family, tmp_path / "c", shape, seed=1)
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


def test_an_existing_model_is_left_alone_and_another_is_not(bench, small_shape, tmp_path):
    shape = small_shape
    bench.random_model.checkpoint.build("llava", tmp_path, shape)
    (tmp_path / "config.json").write_text("kept")
    bench.random_model.checkpoint.build("llava", tmp_path, shape)
    assert (tmp_path / "config.json").read_text() == "kept"
    bench.random_model.checkpoint.build("llava", tmp_path, replace(shape, layers=1))
    assert (tmp_path / "config.json").read_text() != "kept"


def test_parameters_come_to_what_the_name_says(bench):
    assert round(bench.random_model.checkpoint.n_parameters("llava") / 1e9, 2) == 0.69
    assert abs(bench.random_model.checkpoint.n_parameters("qwen2_vl") / 1e9 - 0.69) < 0.03


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_prompts_have_exactly_the_tokens_they_should(bench, family, tmp_path):
    bench.random_model.text.write_tokenizer(tmp_path, family, 32_000, 512)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 32_000
    for n in (1, 2, 12, 25, 987):
        for seed in range(5):
            assert len(tokenizer.encode(bench.random_model.text.text_of(n, seed)).ids) == n
    asks = bench.peers.work.Asks()
    text, pictured = asks.about_text(), asks.about_picture()
    assert len(tokenizer.encode(bench.random_model.text.rendered(family, text.text, False)).ids) == 1000
    prompt = bench.random_model.text.rendered(family, pictured.text, True)
    assert len(tokenizer.encode(prompt).ids) == {"llava": 603 - 575, "qwen2_vl": 29}[family]
    assert pictured.seed != text.seed


def test_every_id_but_the_silent_shows_as_text(bench, tmp_path):
    tokenizer = bench.random_model.text.build_tokenizer(32_000)
    shown = [tokenizer.decode([i]) for i in range(bench.random_model.text.N_SILENT, 32_000)]
    assert all(len(text) in (2, 4) and text.isalpha() for text in shown)
    assert len(set(shown)) == len(shown)


def test_the_chat_template_makes_what_the_libraries_are_given(bench):
    for family in ("llava", "qwen2_vl"):
        template = jinja2.Template(bench.random_model.text.chat_template(family), trim_blocks=True)
        content = [{"type": "image"}, {"type": "text", "text": "abcd"}]
        made = template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
        assert made == bench.random_model.text.rendered(family, "abcd", True)
