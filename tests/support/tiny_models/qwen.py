"""Random Qwen2-VL and Qwen2.5-VL checkpoints."""

from pathlib import Path
from typing import Any

from tiny_models.common import IMAGE_TOKEN, TEXT, random_model
from tiny_models.naming import QWEN_NAMES, published_qwen, write

QWEN_PATCH = 4


def save_qwen(
    directory: Path,
    *,
    family: str = "qwen2_vl",
    n_kv_heads: int = 2,
    tied: bool = False,
    seed: int = 0,
    naming: str = "saved",
    shards: int = 1,
) -> None:
    """A Qwen2-VL or Qwen2.5-VL of 2 decoder layers, 4 heads of 8, and a tower of 3 blocks over patches of 4."""
    import transformers as t

    old = family == "qwen2_vl"
    vision: dict[str, Any] = {"depth": 3, "num_heads": 3, "patch_size": QWEN_PATCH}
    if old:
        vision |= {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40, "fullatt_block_indexes": [1]}
        vision |= {"window_size": 24}  # 3 cells: 4, 5 or 7 cells along an edge leave cut windows
    rope = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [2, 1, 1]}
    make = t.Qwen2VLConfig if old else t.Qwen2_5_VLConfig
    config = make(
        vision_config=vision,
        text_config=TEXT | {"num_key_value_heads": n_kv_heads, "rope_parameters": rope},
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3,
        tie_word_embeddings=tied,
    )
    model = random_model(
        t.Qwen2VLForConditionalGeneration if old else t.Qwen2_5_VLForConditionalGeneration, config, seed
    )
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": QWEN_PATCH,
        "merge_size": 2,
        "min_pixels": 16 * 16,
        "max_pixels": 64 * 64,
    }
    convert = published_qwen if naming == "published" else None
    write(model, directory, QWEN_NAMES[naming], convert, shards, processor)
