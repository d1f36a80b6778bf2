"""Tensor names and configs as the hub publishes them and as `transformers` writes them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def published_qwen(config: dict[str, Any]) -> dict[str, Any]:
    """The flat config of the hub: text fields at the top, `rope_scaling` of type mrope, defaults left out."""
    text = dict(config.pop("text_config"))
    rope = dict(text.pop("rope_parameters"))
    keep = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")
    config |= {k: text[k] for k in (*keep, "num_key_value_heads", "rms_norm_eps", "vocab_size", "eos_token_id")}
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision = dict(config["vision_config"])
    for key in ("rope_parameters", "initializer_range", "model_type", "hidden_act"):
        vision.pop(key)
    config["vision_config"] = vision | {"in_chans": vision.pop("in_channels")}
    return config


def published_llava(config: dict[str, Any]) -> dict[str, Any]:
    """The hub's sparse config: what equals the class default is left out."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    for key in (
        "rms_norm_eps",
        "head_dim",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "pretraining_tp",
        "layer_types",
    ):
        text.pop(key, None)
    for key in ("use_sliding_window", "max_window_layers") if text["model_type"] == "qwen2" else ():
        text.pop(key, None)
    if text["num_key_value_heads"] == text["num_attention_heads"] and text["model_type"] == "llama":
        text.pop("num_key_value_heads")
    for key in ("hidden_act", "layer_norm_eps", "num_channels"):
        vision.pop(key)
    config |= {"text_config": text, "vision_config": vision}
    for key in ("multimodal_projector_bias", "projector_hidden_act", "image_seq_length"):
        config.pop(key, None)
    return config


def write(
    model: Any,
    directory: Path,
    rules: list[tuple[str, str]],
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None,
    shards: int,
    processor: dict[str, Any],
) -> None:
    """Write a checkpoint: tensors renamed by `rules`, the config as `convert` makes it, and the processor."""
    model.save_pretrained(directory)
    rewrite(directory, rules, shards)
    if convert is not None:
        publish(directory, convert)
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))


def publish(directory: Path, convert: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(convert(json.loads(file.read_text()))))


def rewrite(directory: Path, rules: list[tuple[str, str]], shards: int) -> None:
    """Save the tensors again under other names, and with a buffer that old versions saved."""
    tensors = load_file(directory / "model.safetensors")
    for pattern, repl in rules:
        tensors = {re.sub(pattern, repl, name): t for name, t in tensors.items()}
    if rules:
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    groups = [names[i::shards] for i in range(shards)]
    files = (
        [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    )
    for group, file in zip(groups, files, strict=True):
        save_file({n: tensors[n].contiguous() for n in group}, directory / file)
    if shards > 1:
        weight_map = {n: f for group, f in zip(groups, files, strict=True) for n in group}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LLAVA_NAMES = {
    "saved": [],
    "published": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "module": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
    ],
}
QWEN_NAMES = {
    "saved": [],
    "published": [],
    "module": [(r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")],
}
