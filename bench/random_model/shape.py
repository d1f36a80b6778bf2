"""The JSON files of the random models, as the hub publishes them: configuration, generation, processors."""

from dataclasses import dataclass

from bench.report import Json

FAMILIES = ("llava", "qwen2_vl")
_MEAN: list[Json] = [0.48145466, 0.4578275, 0.40821073]
_STD: list[Json] = [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model. The defaults are published sizes."""

    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    inner: int = 4864
    vocab: int = 32_000
    context: int = 32_768
    tower_hidden: int = 1024
    tower_layers: int = 24
    tower_heads: int = 16
    tower_inner: int = 4096
    side: int = 336  # pixels
    patch: int = 14

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def configs(family: str, shape: Shape) -> dict[str, dict[str, Json]]:
    """File name without .json -> content."""
    llava = family == "llava"
    return {
        "config": _llava_config(shape) if llava else _qwen_config(shape),
        "generation_config": {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0},
        "preprocessor_config": _llava_pixels(shape) if llava else _qwen_pixels(shape),
        "processor_config": _llava_processor(shape) if llava else {"processor_class": "Qwen2VLProcessor"},
    }


def _decoder_config(shape: Shape) -> dict[str, Json]:
    return {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.inner,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _llava_config(shape: Shape) -> dict[str, Json]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
        "ignore_index": -100,
        "image_token_index": 3,
        "image_seq_length": (shape.side // shape.patch) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_decoder_config(shape)},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": shape.tower_hidden,
            "num_hidden_layers": shape.tower_layers,
            "num_attention_heads": shape.tower_heads,
            "intermediate_size": shape.tower_inner,
            "image_size": shape.side,
            "patch_size": shape.patch,
            "hidden_act": "quick_gelu",
            "projection_dim": 768,
        },
    }


def _qwen_config(shape: Shape) -> dict[str, Json]:
    half = shape.head_dim // 2
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": "bfloat16",
        **_decoder_config(shape),
        "rope_scaling": {"type": "mrope", "mrope_section": [half // 4, 3 * half // 8, 3 * half // 8]},
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
        "vision_token_id": 6,
        "image_token_id": 6,
        "video_token_id": 7,
        "vision_config": {
            "depth": shape.tower_layers,
            "embed_dim": shape.tower_hidden,
            "num_heads": shape.tower_heads,
            "mlp_ratio": shape.tower_inner // shape.tower_hidden,
            "hidden_size": shape.hidden,
            "in_chans": 3,
            "in_channels": 3,
            "patch_size": shape.patch,
            "spatial_patch_size": shape.patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def _common_pixels() -> dict[str, Json]:
    return {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": _MEAN,
        "image_std": _STD,
        "resample": 3,
    }


def _llava_pixels(shape: Shape) -> dict[str, Json]:
    return {
        **_common_pixels(),
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": shape.side},
        "do_center_crop": True,
        "crop_size": {"height": shape.side, "width": shape.side},
    }


def _llava_processor(shape: Shape) -> dict[str, Json]:
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": shape.patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }


def _qwen_pixels(shape: Shape) -> dict[str, Json]:
    least, most = 4 * (2 * shape.patch) ** 2, shape.side**2
    return {
        **_common_pixels(),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "size": {"shortest_edge": least, "longest_edge": most},
        "min_pixels": least,
        "max_pixels": most,
        "patch_size": shape.patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
