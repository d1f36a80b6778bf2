"""Strict loading, defaults of sparse configs, signals and positions."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from foveate.engine.common import CELLS, ENC, Grid, ModelError, Section, Signal
from foveate.engine.geometry import config as d
from foveate.engine.geometry.base import families, load_geometry
from foveate.engine.models.loader import load_model

torch.set_num_threads(1)


def _all(model):
    """Everything a tower gives, of its first and last layer."""
    kinds = ("recv", "logits", "keys", "keys_cat", "values", "qk", "hidden", "saliency")
    kinds += ("cls_row", "cls_cat", "cls_values") if model.spec.tower.has_cls else ()
    return frozenset({model.spec.tower.resolve(Signal(k, i)) for k in kinds for i in (0, -1)} | {ENC, CELLS})


def _edit(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _edit_config(path, **values):
    config = json.loads((path / "config.json").read_text())
    for key, value in values.items():
        *parents, last = key.split("__")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    (path / "config.json").write_text(json.dumps(config))


def test_families_are_the_files():
    assert families() == ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen2_vl"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("language_model.model.layers.1.self_attn.k_proj.weight"), "k_proj.weight is missing"),
        (lambda t: t.pop("vision_tower.encoder.layers.0.mlp.fc1.bias"), "mlp.fc1.bias is missing"),
        (lambda t: t.pop("language_model.lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected tensor extra"),
        (lambda t: t.update({"language_model.model.layers.7.mlp.up_proj.weight": torch.zeros(2)}), "layers.7"),
        (lambda t: t.update({"language_model.model.norm.weight": torch.zeros(5)}), "norm.weight has shape .5."),
        (lambda t: t.update({"language_model.model.layers.0.self_attn.v_proj.weight": torch.zeros(5, 32)}), "v_proj"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(97, 32)}), "two names"),
    ],
)
def test_strict(tiny_models, tmp_path, change, message):
    tiny_models.save_llava(tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["language_model.model.layers.1.mlp.up_proj.weight", "vision_tower.extra"])
def test_quantized_matrices_are_refused_without_any_word_of_the_config(tiny_models, tmp_path, stored, name):
    tiny_models.save_llava(tmp_path)
    _edit(tmp_path, lambda t: t.update({name: torch.zeros(48, 32).to(stored)}))
    with pytest.raises(ModelError, match=f"{name} is stored as .*quantized.*original checkpoint"):
        load_model(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize("stored", [torch.float64, torch.float16])
def test_other_floats_and_old_index_tables_are_read(tiny_models, tmp_path, stored):
    tiny_models.save_llava(tmp_path)

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(stored)
        tensors["vision_tower.embeddings.position_ids"] = torch.arange(17)

    _edit(tmp_path, change)
    assert load_model(tmp_path, torch.float32, "cpu").n_parameters > 0


def test_a_shard_that_is_missing_or_a_pointer_is_named(tiny_models, tmp_path):
    tiny_models.save_llava(tmp_path, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="model-00002-of-00002.safetensors: the file is a pointer of Git LFS"):
        load_model(tmp_path, torch.float32, "cpu")
    shard.unlink()
    with pytest.raises(ModelError, match="model-00002-of-00002.safetensors: the file is missing"):
        load_model(tmp_path, torch.float32, "cpu")


def test_one_file_of_weights_wins_over_an_old_index(tiny_models, tmp_path):
    tiny_models.save_llava(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert load_model(tmp_path, torch.float32, "cpu").n_parameters > 0
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="neither model.safetensors nor .*only model.fp16.safetensors"):
        load_model(tmp_path, torch.float32, "cpu")


def test_tied_head_saved_again(tiny_models, tmp_path):
    tiny_models.save_qwen(tmp_path, tied=True)
    _edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(tmp_path, torch.float32, "cpu").lm_head is None
    _edit(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ModelError, match="tie_word_embeddings is true, but lm_head.weight differs"):
        load_model(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; there are llava, llava_next, llava_onevision, "),
        ({"text_config__model_type": "gemma"}, "gemma"),
        ({"text_config__hidden_act": "relu"}, "relu"),
        ({"text_config__use_sliding_window": True}, "use_sliding_window"),
        ({"text_config__num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"text_config__rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"text_config__vocab_size": "many"}, "vocab_size is 'many'"),
        ({"vision_config__model_type": "dinov2"}, "dinov2"),
        ({"vision_config__hidden_act": "mish"}, "mish"),
        ({"vision_feature_layer": [-2, -5]}, r"\[-2, -5\]"),
        ({"vision_feature_layer": -9}, "vision_feature_layer -9"),
        ({"vision_feature_select_strategy": "cls"}, "'cls'"),
        ({"vision_config__image_size": 28}, "28 x 28"),
    ],
)
def test_unsupported_settings_are_named(tiny_models, tmp_path, values, message):
    tiny_models.save_llava(tmp_path)
    _edit_config(tmp_path, **values)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, torch.float32, "cpu")


def test_missing_files_are_named(tiny_models, tmp_path):
    with pytest.raises(ModelError, match="config.json"):
        load_model(tmp_path, torch.float32, "cpu")
    tiny_models.save_llava(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(ModelError, match="model.safetensors"):
        load_model(tmp_path, torch.float32, "cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="neither model.safetensors nor"):
        load_model(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize(
    "read, kind",
    [
        (d.read_llama, "llama"),
        (d.read_mistral, "mistral"),
        (d.read_qwen2, "qwen2"),
        (d.read_qwen2_vl, "qwen2_vl_text"),
        (d.read_qwen2_vl, "qwen2_5_vl_text"),
    ],
)
def test_defaults_are_those_of_transformers(read, kind):
    """An empty text config means the same to both."""
    values = {"sliding_window": None} if kind == "mistral" else {}  # a window is the one default we do not do
    theirs, ours = AutoConfig.for_model(kind), read(Section(values, "config", ModelError))
    assert (ours.vocab_size, ours.hidden_size) == (theirs.vocab_size, theirs.hidden_size)
    assert (ours.intermediate_size, ours.n_layers) == (theirs.intermediate_size, theirs.num_hidden_layers)
    assert (ours.n_heads, ours.n_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (ours.max_context, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


def _pixels(tiny, sizes):
    images = [tiny.picture(h, w, i) for i, (h, w) in enumerate(sizes)]
    raw = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(p.height, p.width, 3) for p in images]
    return images, raw


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_llava_signals(tiny_models, tmp_path, vision):
    tiny_models.save_llava(tmp_path, vision=vision, select=-2)
    model, oracle = load_model(tmp_path, torch.float32, "cpu"), tiny_models.load_reference(tmp_path, "eager")
    images, raw = _pixels(tiny_models, [(30, 30), (30, 30)])
    got = model.encode(raw, _all(model))
    values = tiny_models.reference_inputs(tmp_path, [90, 90], images)["pixel_values"]
    tower = oracle.model.vision_tower
    keys, values_, queries = [], [], []
    tower.encoder.layers[1].self_attn.v_proj.register_forward_hook(lambda m, i, out: values_.append(out))
    tower.encoder.layers[1].self_attn.q_proj.register_forward_hook(lambda m, i, out: queries.append(out))
    tower.encoder.layers[1].self_attn.k_proj.register_forward_hook(lambda m, i, out: keys.append(out))
    with torch.no_grad():
        seen = tower(values, output_attentions=True, output_hidden_states=True)
    skipped = int(vision == "clip")
    for i, one in enumerate(got):
        weights = seen.attentions[1][i].mean(0)
        assert one.grid == Grid(4, 4)
        assert torch.allclose(one.recv(), weights.mean(0)[skipped:], atol=1e-6)
        assert torch.allclose(one.recv(0), seen.attentions[0][i].mean((0, 1))[skipped:], atol=1e-6)
        assert torch.allclose(one.full(-1), weights[skipped:, skipped:], atol=1e-6)
        assert torch.allclose(
            one.rows(0, torch.tensor([3])), seen.attentions[0][i].mean(0)[3 + skipped, skipped:][None]
        )
        assert torch.allclose(one.keys(), keys[0][i].view(-1, 3, 8).mean(1)[skipped:], atol=1e-5)
        assert torch.allclose(one.keys_cat(), keys[0][i][skipped:], atol=1e-5)
        assert torch.allclose(one.values().flatten(1), values_[0][i][skipped:], atol=1e-5)
        assert torch.allclose(one.hidden(0), seen.hidden_states[1][i, skipped:], atol=1e-5)
        assert torch.allclose(one.hidden(-1), one.enc) and torch.equal(one.cells, one.enc)
        assert torch.allclose(one.enc, seen.hidden_states[-2][i, skipped:], atol=1e-5)
        assert torch.allclose(one.project(one.enc), one.proj, atol=1e-6)
        if vision == "clip":
            assert torch.allclose(one.cls_row(), weights[0, 1:], atol=1e-6)
            assert torch.equal(one.saliency(), one.cls_row())
            scores = torch.einsum("hd,nhd->hn", queries[0][i, 0].view(3, 8), keys[0][i].view(-1, 3, 8)) / 8**0.5
            assert torch.allclose(scores.softmax(-1).mean(0)[1:], one.cls_row(), atol=1e-6)
            assert torch.allclose(one.logits(), scores.mean(0)[1:], atol=1e-5)
            own = values_[0][i].view(-1, 3, 8)
            alike = torch.einsum("hd,nhd->hn", own[0], own).softmax(-1)
            ours = torch.cat([torch.zeros(1, 3), one.cls_values()]).softmax(0)
            assert torch.allclose(ours.T, alike, atol=1e-6)
            wide = (queries[0][i, 0] @ keys[0][i].T / 24**0.5).softmax(-1)
            assert torch.allclose(one.cls_cat(), wide[1:], atol=1e-6)
            assert torch.allclose(one.cls, seen.hidden_states[-2][i, 0], atol=1e-5)
        else:
            assert torch.equal(one.saliency(), one.recv()) and one.cls is None
            assert torch.equal(one.logits(), one.recv().log())
    assert model.spec.tower.has_cls == (vision == "clip")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_signals(tiny_models, tmp_path, family):
    tiny_models.save_qwen(tmp_path, family=family)
    model, oracle = load_model(tmp_path, torch.float32, "cpu"), tiny_models.load_reference(tmp_path, "eager")
    images, raw = _pixels(tiny_models, [(32, 56), (40, 40)])
    layer = 2 if family == "qwen2_vl" else 1  # the last with full attention
    got = model.encode(raw, _all(model) | {Signal("keys", layer), Signal("values", layer)})
    seen = {}
    attn = oracle.model.visual.blocks[layer].attn
    attn.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(rows=args[0], angles=kwargs["position_embeddings"]),
        with_kwargs=True,
    )
    for image, one in zip(images, got, strict=True):
        inputs = tiny_models.reference_inputs(tmp_path, [90], [image])
        seen.clear()
        with torch.no_grad():
            oracle.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
            q, k, v = attn.qkv(seen["rows"]).view(-1, 3, 3, 8).unbind(1)
        keys = k.mean(1).view(-1, 4, 8).mean(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *seen["angles"])
        scores = torch.einsum("mhd,nhd->hmn", q, k) * 8**-0.5
        weights = scores.softmax(-1).mean((0, 1)).view(-1, 4).mean(1)
        order = torch.arange(one.grid.n_tokens)
        if family == "qwen2_5_vl":
            order, _ = get_vision_window_index(inputs["image_grid_thw"], 2, 24, 4)
        assert torch.allclose(one.recv()[order], weights, atol=1e-6)
        assert torch.equal(one.logits(), one.recv().log()), "ranks as attention received, of merged patches too"
        assert torch.allclose(one.full(-1).mean(0), one.recv(), atol=1e-6)
        assert torch.allclose(one.keys(layer)[order], keys, atol=1e-5)
        assert torch.allclose(one.values(layer)[order], v.view(-1, 4, 3, 8).mean(1), atol=1e-5)
        assert torch.allclose(one.project(one.cells), one.proj, atol=1e-6)
        assert one.enc is None and one.cls is None


def test_only_what_is_asked_for(tiny_models, tmp_path):
    tiny_models.save_llava(tmp_path)
    model = load_model(tmp_path, torch.float32, "cpu")
    _, raw = _pixels(tiny_models, [(30, 30)])
    (one,) = model.encode(raw, frozenset({Signal("keys", 1)}))
    assert set(one.taps) == {Signal("keys", 1)}
    assert all(x is None for x in (one.enc, one.cls, one.cells, one.project))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_batch_of_pictures_is_each_alone(tiny_models, tmp_path, family):
    tiny_models.save_qwen(tmp_path, family=family)
    model = load_model(tmp_path, torch.float32, "cpu")
    _, raw = _pixels(tiny_models, [(32, 56), (16, 16), (40, 40)])
    assert [model.geometry.n_patches(*x.shape[:2]) for x in raw] == [112, 16, 100]
    for pixels, one in zip(raw, model.encode(raw, _all(model)), strict=True):
        (alone,) = model.encode([pixels], _all(model))
        assert alone.grid == one.grid == model.geometry.grid(*pixels.shape[:2])
        assert torch.allclose(one.proj, alone.proj, atol=1e-5) and torch.allclose(one.cells, alone.cells, atol=1e-5)
        for signal, values in one.taps.items():
            assert torch.allclose(values, alone.taps[signal], atol=1e-5)


def test_mrope_layout_is_get_rope_index(tiny_models, tmp_path):
    tiny_models.save_qwen(tmp_path)
    model, oracle = load_model(tmp_path, torch.float32, "cpu"), tiny_models.load_reference(tmp_path)
    grids = [Grid(3, 7), Grid(5, 2), Grid(1, 1)]
    segments = [4, grids[0], 2, grids[1], 1, grids[2], 5]
    ours, following = model.geometry.lay_out(segments)
    kinds = torch.cat([torch.full((s.n_tokens if isinstance(s, Grid) else s,), isinstance(s, Grid)) for s in segments])
    thw = torch.tensor([[1, 2 * g.rows, 2 * g.cols] for g in grids])
    theirs, delta = oracle.model.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.int64), kinds[None].int(), image_grid_thw=thw
    )
    laid_out = torch.cat([torch.stack([torch.tensor(axis) for axis in segment]) for segment in ours], 1)
    assert torch.equal(laid_out, theirs[:, 0])
    assert following == len(kinds) + delta.item()


def test_llava_layout_counts(tiny_models, tmp_path):
    tiny_models.save_llava(tmp_path)
    positions, following = load_geometry(tmp_path).lay_out([2, Grid(4, 4), 3])
    assert [[len(axis) for axis in axes] for axes in positions] == [[2], [16], [3]]
    assert [at for (axis,) in positions for at in axis] == list(range(21)) and following == 21


def test_eos_from_generation_config(tiny_models, tmp_path):
    tiny_models.save_llava(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert load_model(tmp_path, torch.float32, "cpu").spec.eos_ids == (5, 7)
    (tmp_path / "generation_config.json").unlink()
    assert load_model(tmp_path, torch.float32, "cpu").spec.eos_ids == (2,)


def test_spec_and_dtype(tiny_models, tmp_path):
    tiny_models.save_qwen(tmp_path, n_kv_heads=1)
    model = load_model(tmp_path, torch.bfloat16, "cpu")
    spec = model.spec
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert (spec.family, spec.n_heads, spec.n_kv_heads, spec.head_dim) == ("qwen2_vl", 4, 1, 8)
    assert (spec.n_pos_axes, spec.max_context, spec.image_token_id) == (3, 512, 90)
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_loading_imports_nothing_slow(tiny_models, tmp_path):
    """Readiness has six seconds: transformers alone would take five, sympy and torch._dynamo as long."""
    tiny_models.save_qwen(tmp_path)
    code = (
        "import sys, torch; from pathlib import Path; from foveate.engine.models.loader import load_model\n"
        f"load_model(Path({str(tmp_path)!r}), torch.bfloat16, 'cpu')\n"
        "print([m for m in ('transformers', 'torch._dynamo', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
