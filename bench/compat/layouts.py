"""Checkpoint layouts: random small checkpoints as the hub or `transformers` writes them, against `transformers`."""

import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pictures

from foveate.configs.config import CacheConfig, Config
from foveate.engine.common import Delta, Failed, Generate, TokenLogprob
from foveate.engine.engine import Engine
from foveate.engine.images.preprocess import ImageProcessor
from foveate.engine.models.loader import load_model

tiny: Any = importlib.import_module("tiny_models")  # of tests/support: writers of checkpoints, and the reference

N_TOKENS = 32
SIZES = [(60, 45), (33, 80)]  # two pictures, height and width
NAMES = {
    "published": "names and config of the hub",
    "saved": "as transformers 4 saves",
    "module": "as transformers 5 names modules",
}
Save = Callable[..., None]


@dataclass(frozen=True)
class Layout:
    """One layout, compared in float32."""

    name: str
    tokens_equal: bool
    error: float  # largest difference of log-probabilities over the largest log-probability


def layouts() -> dict[str, Save]:
    """Name -> writer of the checkpoint."""
    found: dict[str, Save] = {}
    for naming, said in NAMES.items():
        for vision, decoder in (("clip", "llama"), ("siglip", "qwen2")):
            made = partial(tiny.save_llava, vision=vision, decoder=decoder, naming=naming, shards=2)
            found[f"LLaVA-1.5, {vision} + {decoder}, {said}"] = made
        for decoder in ("llama", "mistral"):
            made = partial(tiny.save_tiled, family="llava_next", decoder=decoder, naming=naming)
            found[f"LLaVA-NeXT, {decoder}, {said}"] = made
        made = partial(tiny.save_tiled, family="llava_onevision", decoder="qwen2", naming=naming)
        found[f"LLaVA-OneVision, {said}"] = made
        for family, title in (("qwen2_vl", "Qwen2-VL"), ("qwen2_5_vl", "Qwen2.5-VL")):
            for tied in (False, True):
                made = partial(tiny.save_qwen, family=family, naming=naming, tied=tied)
                found[f"{title}, {'tied' if tied else 'own'} head, {said}"] = made
    return found


def _nest_processor(path: Path) -> None:
    """As `transformers` 5 saves: the settings inside processor_config.json. An old file with other settings stays."""
    old = path / "preprocessor_config.json"
    settings = json.loads(old.read_text())
    (path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    old.write_text(json.dumps(settings | {"image_mean": [0.0] * 3, "image_std": [9.0] * 3}))


def _forget_processor_type(path: Path) -> None:
    file = path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    del settings["image_processor_type"]
    file.write_text(json.dumps(settings))


# Name -> writer of the checkpoint, and what is done to its files after the reference has read them.
REWRITTEN: dict[str, tuple[Save, Callable[[Path], None]]] = {
    "LLaVA-1.5, nested processor_config.json beside an old preprocessor_config.json": (
        tiny.save_llava,
        _nest_processor,
    ),
    "Qwen2-VL, without image_processor_type": (tiny.save_qwen, _forget_processor_type),
}


def compare(name: str, save: Save, seed: int, rewrite: Callable[[Path], None] | None = None) -> Layout:
    """Load one layout, run the whole engine, and compare tokens and log-probabilities with `transformers`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save(path, seed=seed)
        pictures = [tiny.picture(height, width, seed + i) for i, (height, width) in enumerate(SIZES)]
        prompt = tiny.prompt(19, len(SIZES), seed)
        expected = tiny.reference_greedy(path, prompt, pictures, N_TOKENS)
        full = tiny.reference_logits(path, prompt + expected, pictures)
        if rewrite is not None:
            rewrite(path)
        answered = _answer(path, prompt, pictures)
    theirs = full[-N_TOKENS - 1 : -1].log_softmax(-1)
    error = float((tiny.logprobs(answered, N_TOKENS) - theirs).abs().max() / theirs.abs().max())
    return Layout(name, [token.token_id for token in answered] == expected, error)


def _answer(path: Path, prompt: list[int], pictures: Sequence[Pictures.Image]) -> list[TokenLogprob]:
    engine = Engine(load_model(path, torch.float32, "cpu"), Config(cache=CacheConfig(memory_mb=4)))
    images, sampling = tiny.sent(ImageProcessor.load(path), pictures), tiny.greedy(N_TOKENS)
    engine.add(Generate(id="asked", prompt_ids=prompt, images=images, sampling=sampling))
    found: list[TokenLogprob] = []
    while engine.has_work:
        for event in engine.step():
            assert not isinstance(event, Failed), event.message
            found += (event.logprobs or []) if isinstance(event, Delta) else []
    return found
