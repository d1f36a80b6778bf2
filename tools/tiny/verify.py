"""Ask an exported model through plain transformers: processor, chat template, `generate`.

Slow but independent of the training code; its exact match must agree with `tiny.evaluate`.
"""

import argparse
import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from foveate.bundled import scenes


def ask(family: str, loaded: tuple[Any, Any, Any], scene: scenes.Scene, text: str, text_first: bool) -> str:
    """Return the greedy answer to one question about a scene. `loaded`: model, tokenizer, image processor."""
    model, tokenizer, processor = loaded
    content = [{"type": "image"}, {"type": "text", "text": text}]
    content = content[::-1] if text_first else content
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = dict(processor(scenes.render(scene), return_tensors="pt"))
    if family == "llava":
        mark, number = "<image>", model.config.image_seq_length
    else:
        mark, number = "<|image_pad|>", int(inputs["image_grid_thw"].prod()) // 4
    inputs |= dict(tokenizer(prompt.replace(mark, mark * number), return_tensors="pt"))
    if family == "qwen2_vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    start = inputs["input_ids"].shape[1]
    return str(tokenizer.decode(model.generate(**inputs)[0, start:], skip_special_tokens=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=("llava", "qwen2_vl"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    if args.family == "llava":
        model = LlavaForConditionalGeneration.from_pretrained(args.folder, dtype=torch.float32)
        processor = CLIPImageProcessorPil.from_pretrained(args.folder)
    else:
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.folder, dtype=torch.float32)
        processor = Qwen2VLImageProcessorPil.from_pretrained(args.folder)
    right: dict[str, list[bool]] = defaultdict(list)
    loaded = (model, tokenizer, processor)
    for index, text_first in itertools.product(range(args.pictures), (False, True)):
        scene, order = scenes.make_scene(scenes.HELD_OUT_SEED + index), "text first" if text_first else "picture first"
        for question in scenes.questions(scene, 0):
            answer = ask(args.family, loaded, scene, question.text, text_first)
            right[f"{question.kind}, {order}"].append(answer == question.answer)
            if answer != question.answer:
                print(f"{index}: {order}, {question.text!r} {question.answer!r} but got {answer!r}")
    for kind, hits in right.items():
        print(f"{kind}: {sum(hits)} of {len(hits)}")


if __name__ == "__main__":
    main()
