"""What `transformers` answers for a checkpoint. Everything is float32."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tiny_models.common import IMAGE_TOKEN


def _tiled_counts(processor: Any, inputs: dict[str, Any]) -> list[int]:
    """Visual tokens of each picture in tiles of 4 x 4 cells, as the processors of `transformers` count them."""
    import transformers as t

    old = isinstance(processor, t.LlavaNextImageProcessorPil)
    counter = object.__new__(t.LlavaNextProcessor if old else t.LlavaOnevisionProcessor)  # it wants no tokenizer here
    counter.image_processor, counter.image_token = processor, "."
    counter.vision_feature_select_strategy = "default" if old else "full"
    counter.patch_size, counter.num_additional_image_tokens = 7, 1
    counter.num_image_tokens, counter.vision_aspect_ratio = 16, "anyres_max_2"
    return [len(counter.replace_image_token(inputs, i)) for i in range(len(inputs["image_sizes"]))]


def load_reference(directory: Path, attention: str = "sdpa") -> torch.nn.Module:
    """The directory through `transformers`, in float32."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    ).eval()


def reference_inputs(directory: Path, prompt_ids: Sequence[int], pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Inputs of `transformers` for a prompt with one placeholder per picture, through its own PIL processors."""
    import transformers as t

    settings = json.loads((directory / "preprocessor_config.json").read_text())
    processor = getattr(t, f"{settings.pop('image_processor_type')}Pil")(**settings)
    images = [list(pictures)] if isinstance(processor, t.LlavaOnevisionImageProcessorPil) else list(pictures)
    inputs = dict(processor(images, return_tensors="pt")) if pictures else {}
    if "image_grid_thw" in inputs:
        counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
    elif "image_sizes" in inputs:
        counts = _tiled_counts(processor, inputs)
    elif pictures:
        config = json.loads((directory / "config.json").read_text())
        skipped = config["vision_feature_select_strategy"] == "default"
        counts = [16 + (settings.get("crop_size") is not None) - skipped] * len(pictures)
    else:
        counts = []
    left = iter(counts)
    ids = [x for token in prompt_ids for x in ([token] * next(left) if token == IMAGE_TOKEN else [token])]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones(1, len(ids), dtype=torch.int64)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    return inputs


def reference_logits(directory: Path, prompt_ids: Sequence[int], pictures: Sequence[Image.Image]) -> Tensor:
    """[n, vocab] float32 of the expanded prompt."""
    with torch.no_grad():
        inputs = reference_inputs(directory, prompt_ids, pictures)
        logits: Tensor = load_reference(directory)(**inputs).logits[0]
    return logits


def reference_greedy(directory: Path, prompt_ids: Sequence[int], pictures: Sequence[Image.Image], n: int) -> list[int]:
    """`n` greedy tokens, none of them stopping the run or the image placeholder."""
    inputs = reference_inputs(directory, prompt_ids, pictures)
    model = load_reference(directory)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=n, do_sample=False, pad_token_id=0, suppress_tokens=[IMAGE_TOKEN])
    return [int(x) for x in ids[0, inputs["input_ids"].shape[1] :]]
