"""The setting `model.weights`: what each matrix becomes, and what that costs in accuracy."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.configs.config import ModelConfig
from foveate.configs.errors import ConfigError
from foveate.engine.models.base import Attention, Model
from foveate.engine.models.loader import load_model
from foveate.engine.models.parts.layers import Matrix
from foveate.engine.models.weights import WeightPlan
from foveate.kernels.cpu.levels import machine
from foveate.kernels.cpu.weights import PackedWeight, unpack
from foveate.kernels.linear import linear

pytestmark = pytest.mark.skipif(machine() == "reference", reason="the CPU kernels were not built")
CPU = torch.device("cpu")


def held(model: Model) -> dict[str, str]:
    """Form of every matrix by its path."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            assert isinstance(module.weight, PackedWeight)
            found[name] = module.weight.form
    return found


class DenseAttention(Attention):
    """Causal attention over one sequence, in float32."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True)
        return out.transpose(0, 1)


def logits(model: Model, n: int = 24) -> Tensor:
    """Of a text prompt, attended densely in float32."""
    noise = torch.Generator().manual_seed(5)
    rows = model.embed(torch.randint(3, 80, (n,), generator=noise))
    positions = torch.arange(n)[None].expand(model.spec.n_pos_axes, n)
    return model.logits(model.forward(rows, positions, DenseAttention()))


def to_bfloat16(path) -> None:
    file = path / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file)


def test_a_bfloat16_checkpoint_is_held_in_bfloat16_without_loss(tiny_models, tmp_path):
    tiny_models.save_llava(tmp_path)
    to_bfloat16(tmp_path)
    auto = load_model(tmp_path, torch.float32, "cpu")
    wide = load_model(tmp_path, torch.float32, "cpu", ModelConfig(weights="fp32"))
    assert auto.weights == "bf16" and set(held(auto).values()) == {"bfloat16"}
    assert wide.weights == "fp32" and set(held(wide).values()) == {"float32"}
    torch.testing.assert_close(logits(auto), logits(wide), rtol=1e-5, atol=1e-5)


def test_a_float32_checkpoint_stays_so(tiny_models, tmp_path):
    tiny_models.save_qwen(tmp_path)
    assert set(held(load_model(tmp_path, torch.float32, "cpu")).values()) == {"float32"}


@pytest.mark.parametrize(("at", "form"), [("avx2", "int16"), ("avx512", "int16"), ("avx512_bf16", "bfloat16")])
@pytest.mark.parametrize("weights", ["auto", "bf16", "int16", "int8"])
def test_rounding_to_bfloat16_where_none_is_multiplied(tiny_models, monkeypatch, tmp_path, weights, at, form):
    """16-bit integers take its place, unless another form is asked for; what int8 leaves out is held alike."""
    tiny_models.save_qwen(tmp_path)
    monkeypatch.setattr("foveate.kernels.hardware.device.level", lambda: at)
    wide = {"bf16": "bfloat16", "int16": "int16"}.get(weights, form)
    forms = held(load_model(tmp_path, torch.bfloat16, "cpu", ModelConfig(weights=weights)))
    decoder = {name for name in forms if name.startswith("language_model.layers.")}
    assert {forms[name] for name in decoder} == {"int8" if weights == "int8" else wide}
    assert {form for name, form in forms.items() if name not in decoder and name != "lm_head"} == {wide}


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("parts", [(), ("head",), ("head", "embeddings", "tower")])
def test_what_is_quantized(tiny_models, tmp_path, weights, parts):
    tiny_models.save_llava(tmp_path)
    model = load_model(tmp_path, torch.float32, "cpu", ModelConfig(weights=weights, quantize=parts))
    forms = held(model)
    assert model.weights == weights
    for name, form in forms.items():
        if name.startswith("language_model.layers."):
            assert form == weights
        else:
            role = {"lm_head": "head", "language_model.embed_tokens": "embeddings"}.get(name, "tower")
            assert form == ("int8" if role in parts else "float32"), name


def test_a_tied_embedding_is_the_head(tiny_models, tmp_path):
    tiny_models.save_qwen(tmp_path, tied=True)
    model = load_model(tmp_path, torch.float32, "cpu", ModelConfig(weights="int8"))
    assert held(model)["language_model.embed_tokens"] == "int8"
    table = model.get_submodule("language_model.embed_tokens").weight
    ids = torch.tensor([3, 0, 96, 3])
    assert torch.equal(model.embed(ids), unpack(table)[ids])
    rows = torch.randn(2, 32)
    assert torch.equal(model.logits(rows), linear(model.get_submodule("language_model.norm")(rows), table))


def test_quantization_error_of_a_random_model(tiny_models, tmp_path):
    """A step of int4 is 127 / 8 of one of int8, and rounding errors are in proportion to the step."""
    tiny_models.save_llava(tmp_path, decoder="qwen2")
    exact = logits(load_model(tmp_path, torch.float32, "cpu"))

    def error(weights: str) -> float:
        rough = logits(load_model(tmp_path, torch.float32, "cpu", ModelConfig(weights=weights)))
        return float((rough - exact).norm() / exact.norm())

    assert 0 < error("int8") < 0.05
    assert 4 < error("int4") / error("int8") < 32


def test_quantized_weights_are_refused_on_cuda():
    with pytest.raises(ConfigError, match="model.weights: int8 runs on the CPU only"):
        WeightPlan.make(ModelConfig(weights="int8"), torch.bfloat16, torch.device("cuda"), torch.bfloat16)


def test_parts_are_checked():
    with pytest.raises(ConfigError, match="model.quantize: 'heads' is none of head, embeddings, tower"):
        ModelConfig(quantize=("heads",))


def test_parameters_are_counted_once(tiny_models, tmp_path):
    tiny_models.save_qwen(tmp_path, tied=True)
    expected = sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values())
    assert load_model(tmp_path, torch.float32, "cpu", ModelConfig(weights="int4")).n_parameters == expected
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
