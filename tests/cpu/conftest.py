"""Random tiny checkpoints on disk, and what `transformers` answers for them.

Test modules cannot import each other (importmode is importlib), so the helpers come as one fixture:

    def test_x(tiny_models, tmp_path):
        tiny_models.save_llava(tmp_path, vision="clip", decoder="llama", n_kv_heads=2)
        logits = tiny_models.reference_logits(tmp_path, prompt_ids, pictures)
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small only lose by more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


IMAGE_TOKEN = 90
VOCAB = 97
LLAVA_SIDE = 30  # pixels; 4 patches of 7 and two pixels that the convolution drops
QWEN_PATCH = 4
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that a wrong mask or rotation shows in the logits; norms and biases too."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "class_embedding" not in name:
                p.add_(torch.randn(p.shape, generator=noise) * 0.2)
            else:
                p.copy_(torch.randn(p.shape, generator=noise) * p[0].numel() ** -0.5 * 1.5)


def _published_qwen(config: dict[str, Any]) -> dict[str, Any]:
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


def _published_llava(config: dict[str, Any]) -> dict[str, Any]:
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


def _publish(directory: Path, convert: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(convert(json.loads(file.read_text()))))


def _rewrite(directory: Path, rules: list[tuple[str, str]], shards: int) -> None:
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


_LLAVA_NAMES = {
    "saved": [],
    "published": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "module": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
    ],
}
_QWEN_NAMES = {
    "saved": [],
    "published": [],
    "module": [(r"^model\.", "model.language_model."), (r"^visual\.", "model.visual.")],
}


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


class TinyModels:
    """Writers of random checkpoints, and `transformers` as the oracle. Everything is float32 and seeded."""

    image_token = IMAGE_TOKEN
    vocab = VOCAB

    @staticmethod
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
                **_TEXT,
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
        torch.manual_seed(seed)
        model = t.LlavaForConditionalGeneration(config)
        _randomise(model, seed)
        model.save_pretrained(directory)
        _rewrite(directory, _LLAVA_NAMES[naming], shards)
        if naming == "published":
            _publish(directory, _published_llava)
        size = {"height": LLAVA_SIDE, "width": LLAVA_SIDE}
        processor = {"image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor", "size": size}
        if clip:
            processor["crop_size"] = size
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))

    @staticmethod
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
                **_TEXT,
                num_key_value_heads=n_kv_heads,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
                **({"sliding_window": None} if decoder == "mistral" else {}),
            ),
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=pinpoints,
            tie_word_embeddings=tied,
            **({} if old else {"vision_aspect_ratio": "anyres_max_2", "video_token_index": IMAGE_TOKEN + 1}),
        )
        torch.manual_seed(seed)
        model = (t.LlavaNextForConditionalGeneration if old else t.LlavaOnevisionForConditionalGeneration)(config)
        _randomise(model, seed)
        model.save_pretrained(directory)
        _rewrite(directory, _LLAVA_NAMES[naming], shards)
        if naming == "published":
            _publish(directory, _published_llava)
        size = {"height": LLAVA_SIDE, "width": LLAVA_SIDE}
        kind = f"{'LlavaNext' if old else 'LlavaOnevision'}ImageProcessor"
        processor = {"image_processor_type": kind, "size": size, "image_grid_pinpoints": pinpoints}
        if old:
            processor["crop_size"] = size
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))

    @staticmethod
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
            text_config=_TEXT | {"num_key_value_heads": n_kv_heads, "rope_parameters": rope},
            image_token_id=IMAGE_TOKEN,
            video_token_id=IMAGE_TOKEN + 1,
            vision_start_token_id=IMAGE_TOKEN + 2,
            vision_end_token_id=IMAGE_TOKEN + 3,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(seed)
        model = (t.Qwen2VLForConditionalGeneration if old else t.Qwen2_5_VLForConditionalGeneration)(config)
        _randomise(model, seed)
        model.save_pretrained(directory)
        _rewrite(directory, _QWEN_NAMES[naming], shards)
        if naming == "published":
            _publish(directory, _published_qwen)
        processor = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": QWEN_PATCH,
            "merge_size": 2,
            "min_pixels": 16 * 16,
            "max_pixels": 64 * 64,
        }
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))

    @staticmethod
    def load_reference(directory: Path, attention: str = "sdpa") -> torch.nn.Module:
        """The directory through `transformers`, in float32."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention
        ).eval()

    @staticmethod
    def reference_inputs(
        directory: Path, prompt_ids: Sequence[int], pictures: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
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

    @classmethod
    def reference_logits(cls, directory: Path, prompt_ids: Sequence[int], pictures: Sequence[Image.Image]) -> Tensor:
        """[n, vocab] float32 of the expanded prompt."""
        with torch.no_grad():
            inputs = cls.reference_inputs(directory, prompt_ids, pictures)
            logits: Tensor = cls.load_reference(directory)(**inputs).logits[0]
        return logits

    @classmethod
    def reference_greedy(
        cls, directory: Path, prompt_ids: Sequence[int], pictures: Sequence[Image.Image], n: int
    ) -> list[int]:
        """`n` greedy tokens, none of them stopping the run or the image placeholder."""
        inputs = cls.reference_inputs(directory, prompt_ids, pictures)
        model = cls.load_reference(directory)
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            ids = model.generate(
                **inputs, max_new_tokens=n, do_sample=False, pad_token_id=0, suppress_tokens=[IMAGE_TOKEN]
            )
        return [int(x) for x in ids[0, inputs["input_ids"].shape[1] :]]

    @staticmethod
    def picture(height: int, width: int, seed: int = 0) -> Image.Image:
        """A smooth random picture: noise alone would hide errors of half a pixel in the resizing."""
        noise = torch.Generator().manual_seed(seed)
        coarse = torch.rand(1, 3, 5, 5, generator=noise)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
        noisy = (smooth * 200 + torch.rand(3, height, width, generator=noise) * 55).byte()
        return Image.fromarray(noisy.permute(1, 2, 0).contiguous().numpy())

    @staticmethod
    def prompt(n: int, n_images: int, seed: int = 0) -> list[int]:
        """`n` random text tokens with one placeholder per picture among them, never first or last."""
        noise = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 90, (n,), generator=noise).tolist()
        for at in sorted(torch.randperm(n - 1, generator=noise)[:n_images].tolist(), reverse=True):
            ids.insert(at + 1, IMAGE_TOKEN)
        return ids


@pytest.fixture(scope="session")
def tiny_models() -> type[TinyModels]:
    """The helpers above."""
    return TinyModels
