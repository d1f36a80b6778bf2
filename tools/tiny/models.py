"""Architectures of the bundled models and the other files of their Hugging Face directories."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from tiny.tokenizer import END, TURN_END

Model = LlavaForConditionalGeneration | Qwen2VLForConditionalGeneration

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LLAVA_SIDE, LLAVA_PATCH = 168, 14
QWEN_PATCH, QWEN_MERGE, QWEN_TEMPORAL = 8, 2, 2
QWEN_PIXELS = (72 * 256, 88 * 256)  # a merged token covers 16 x 16 pixels

DECODER = {
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
}


def build_llava(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Build a small LLaVA-1.5: CLIP tower with CLS token (second-to-last layer), two-layer projector, Llama."""
    ids = tokenizer.convert_tokens_to_ids
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=LLAVA_SIDE,
        patch_size=LLAVA_PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        **DECODER,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=ids(TURN_END),
        pad_token_id=ids(END),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids("<image>"),
        image_seq_length=(LLAVA_SIDE // LLAVA_PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def build_qwen(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """Build a small Qwen2-VL: tower with 2 x 2 merging, and a decoder with M-RoPE and LLaVA's dimensions."""
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            **DECODER,
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": ids(TURN_END),
            "pad_token_id": ids(END),
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": DECODER["hidden_size"],
            "mlp_ratio": 3,
            "num_heads": 4,
            "patch_size": QWEN_PATCH,
            "spatial_merge_size": QWEN_MERGE,
            "temporal_patch_size": QWEN_TEMPORAL,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def _sinusoids(side: int, width: int) -> torch.Tensor:
    """Return 2-D sine and cosine features of a square grid in raster order: [side * side, width]."""
    frequencies = 10 ** torch.linspace(0, -1.2, width // 4)
    waves = torch.arange(side)[:, None] * frequencies
    axis = torch.cat((waves.sin(), waves.cos()), dim=1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=-1).reshape(side * side, width)


def build(family: str, tokenizer: PreTrainedTokenizerFast) -> Model:
    """Build an initialised "llava" or "qwen2_vl" model. Both token forms of a word start with the same embedding."""
    model: Model = build_llava(tokenizer) if family == "llava" else build_qwen(tokenizer)
    table = model.get_input_embeddings().weight
    vocabulary = tokenizer.get_vocab()
    with torch.no_grad():
        nn.init.normal_(table, std=table.shape[1] ** -0.5)
        for piece, index in vocabulary.items():
            if piece.startswith("Ġ") and piece[1:] in vocabulary:
                table[index] = 0.8 * table[vocabulary[piece[1:]]] + 0.6 * table[index]
        if family == "llava":  # patches learn their neighbours faster than with random position embeddings
            places = model.model.vision_tower.embeddings.position_embedding.weight
            places[1:] = 0.5 * _sinusoids(LLAVA_SIDE // LLAVA_PATCH, places.shape[1])
    return model


def decoder_of(model: Model) -> nn.Module:
    """Return the text decoder without its head."""
    decoder: nn.Module = model.model.language_model
    return decoder


def copy_decoder(source: Model, target: Model) -> None:
    """Copy the decoder weights of `source` to `target`. Biases that `source` lacks become zero."""
    weights = decoder_of(source).state_dict()
    missing, unexpected = decoder_of(target).load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith(".bias") for name in missing), (missing, unexpected)
    for name, parameter in decoder_of(target).named_parameters():
        if name in missing:
            nn.init.zeros_(parameter)


def _image_processor(family: str) -> dict[str, object]:
    common = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
    }
    if family == "llava":
        side = {"height": LLAVA_SIDE, "width": LLAVA_SIDE}
        return {
            **common,
            "image_processor_type": "CLIPImageProcessor",
            "size": side,
            "do_center_crop": False,
            "crop_size": side,
        }
    return {
        **common,
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": QWEN_PIXELS[0], "longest_edge": QWEN_PIXELS[1]},
        "min_pixels": QWEN_PIXELS[0],
        "max_pixels": QWEN_PIXELS[1],
        "patch_size": QWEN_PATCH,
        "temporal_patch_size": QWEN_TEMPORAL,
        "merge_size": QWEN_MERGE,
    }


def save(model: Model, family: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16 and all other files of a Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = build(family, tokenizer)
    stored.load_state_dict(model.state_dict())
    stored.to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    stored.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # by default only the owner can read the file
    tokenizer.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the only name that old and new transformers both accept
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")
    processor: dict[str, object] = {"processor_class": "Qwen2VLProcessor"}
    if family == "llava":
        processor = {
            "processor_class": "LlavaProcessor",
            "patch_size": LLAVA_PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        }
    processor_class = processor["processor_class"]
    images = {"processor_class": processor_class, **_image_processor(family)}
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
