"""Random LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision checkpoints."""

from pathlib import Path

from tiny_models.common import IMAGE_TOKEN, TEXT, random_model
from tiny_models.naming import LLAVA_NAMES, published_llava, write

LLAVA_SIDE = 30  # pixels; 4 patches of 7 and two pixels that the convolution drops
_ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
}


def save_llava(
    directory: Path,
    *,
    vision: str = "clip",
    decoder: str = "llama",
    n_kv_heads: int = 2,
    tied: bool = False,
    seed: int = 0,
    naming: str = "saved",
    select: int = -2,
    strategy: str = "",
    rope: str = "default",
    shards: int = 1,
    bias: bool = False,
) -> None:
    """A LLaVA of 2 decoder layers, 4 heads of 8, and a tower of 3 layers over 4 x 4 patches.

    Args:
        naming: "saved" (as transformers writes), "published" (the hub's names and sparse config), "module" (the
            attribute paths of transformers 5).
        strategy: of feature selection; default: "default" for CLIP and "full" for SigLIP.
        bias: Llama's attention_bias and mlp_bias.
    """
    import transformers as t

    clip = vision == "clip"
    tower = t.CLIPVisionConfig if clip else t.SiglipVisionConfig
    text = t.LlamaConfig if decoder == "llama" else t.Qwen2Config
    extra = {"attention_bias": bias, "mlp_bias": bias} if decoder == "llama" else {}
    config = t.LlavaConfig(
        vision_config=tower(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=LLAVA_SIDE,
            patch_size=7,
        ),
        text_config=text(
            **TEXT,
            num_key_value_heads=n_kv_heads,
            rope_parameters={"rope_type": rope, "rope_theta": 1e4} | _ROPES[rope],
            **extra,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=select,
        vision_feature_select_strategy=strategy or ("default" if clip else "full"),
        image_seq_length=16,
        tie_word_embeddings=tied,
    )
    model = random_model(t.LlavaForConditionalGeneration, config, seed)
    size = {"height": LLAVA_SIDE, "width": LLAVA_SIDE}
    processor = {"image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor", "size": size}
    if clip:
        processor["crop_size"] = size
    convert = published_llava if naming == "published" else None
    write(model, directory, LLAVA_NAMES[naming], convert, shards, processor)


def save_tiled(
    directory: Path,
    *,
    family: str = "llava_next",
    decoder: str = "llama",
    n_kv_heads: int = 2,
    tied: bool = False,
    seed: int = 0,
    naming: str = "saved",
    shards: int = 1,
) -> None:
    """A LLaVA-NeXT on CLIP or a LLaVA-OneVision on SigLIP, with decoder and tower as `save_llava` makes them.

    A picture is cut into up to 1 x 3, 2 x 2 or 3 x 1 tiles, for OneVision 3 x 3, of which it reads about 2.
    """
    import transformers as t

    old = family == "llava_next"
    tower = t.CLIPVisionConfig if old else t.SiglipVisionConfig
    text = {"llama": t.LlamaConfig, "mistral": t.MistralConfig, "qwen2": t.Qwen2Config}[decoder]
    sizes = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)] if old else [(i, j) for i in (1, 2, 3) for j in (1, 2, 3)]
    pinpoints = [[LLAVA_SIDE * i, LLAVA_SIDE * j] for i, j in sizes]
    config = (t.LlavaNextConfig if old else t.LlavaOnevisionConfig)(
        vision_config=tower(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=LLAVA_SIDE,
            patch_size=7,
            **({} if old else {"vision_use_head": False}),
        ),
        text_config=text(
            **TEXT,
            num_key_value_heads=n_kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            **({"sliding_window": None} if decoder == "mistral" else {}),
        ),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=tied,
        **({} if old else {"vision_aspect_ratio": "anyres_max_2", "video_token_index": IMAGE_TOKEN + 1}),
    )
    model = random_model(
        t.LlavaNextForConditionalGeneration if old else t.LlavaOnevisionForConditionalGeneration, config, seed
    )
    size = {"height": LLAVA_SIDE, "width": LLAVA_SIDE}
    kind = f"{'LlavaNext' if old else 'LlavaOnevision'}ImageProcessor"
    processor = {"image_processor_type": kind, "size": size, "image_grid_pinpoints": pinpoints}
    if old:
        processor["crop_size"] = size
    convert = published_llava if naming == "published" else None
    write(model, directory, LLAVA_NAMES[naming], convert, shards, processor)
