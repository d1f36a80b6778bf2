"""Exact match on held-out scenes, per kind of question.

Teacher forcing is enough: greedy decoding gives exactly the answer if and only if every token of the answer, the
closing one included, is the most likely one after the tokens before it.
"""

import argparse
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from foveate.bundled import scenes
from tiny import data, decode, labels, losses, models, tokenizer
from tiny.models import Model


def _keep(share: str, scene: scenes.Scene, grid: tuple[int, int], seed: int) -> np.ndarray:
    """Return the kept cells: "full", "oracle" (only cells that items touch), "scattered 0.5", "even 0.5", ..."""
    rng = np.random.default_rng(seed)
    total = grid[0] * grid[1]
    if share == "full":
        return np.arange(total)
    if share == "oracle":
        return np.array(sorted(scenes.object_cells(scene, *grid)))
    way, fraction = share.split()
    number = round(float(fraction) * total)
    if way == "even":
        return np.unique((np.arange(number) * total / number).astype(np.int64))
    return np.sort(rng.permutation(total)[:number])


def _samples(recipe: data.Recipe, scene: scenes.Scene, share: str, index: int, text_first: bool) -> list[data.Sample]:
    """Return one held-out image with all its questions, or one sample per question where the text comes first."""
    grid = data.token_grid(recipe.family, scene.size)
    shares, every, asked = labels.coverage(scene, *grid), np.arange(grid[0] * grid[1]), scenes.questions(scene, 0)
    if text_first:
        packed = data.rows_of(scene, asked, shares, every, recipe)
    else:
        packed = [data.pack(scene, asked, shares, every, recipe)]
    return [
        data.Sample(
            pixels=data.pixels(recipe.family, scenes.render(scene)), grid=grid, dense=labels.dense(scene, shares),
            whole=labels.whole(scene), keep=_keep(share, scene, grid, index), **each,
        )
        for each in packed
    ]  # fmt: skip


@torch.no_grad()
def table(
    model: Model,
    family: str,
    tokens: PreTrainedTokenizerFast,
    pictures: int,
    share: str = "full",
    text_first: bool = False,
) -> dict[str, float]:
    """Return the share of exact matches per kind and for "all". Each held-out image has one question of each kind."""
    recipe = data.Recipe(family, tokens)
    right: dict[str, list[bool]] = defaultdict(list)
    groups: dict[tuple[int, int], list[list[data.Sample]]] = defaultdict(list)
    for index in range(pictures):
        scene = scenes.make_scene(scenes.HELD_OUT_SEED + index)
        rows = _samples(recipe, scene, share, index, text_first)
        groups[rows[0].pixels.shape[:2]].append(rows)
    prefix = (recipe.turned if text_first else recipe.layout).prefix
    for samples in groups.values():
        for start in range(0, len(samples), 20):
            some, pad = samples[start : start + 20], tokens.pad_token_id
            arrays = data.collate_rows(some, pad) if text_first else data.collate([each for (each,) in some], pad)
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            seen = losses.look(model, family, batch)
            logits, targets, *_ = decode.answer(model, family, batch, seen, prefix)
            hits = torch.zeros_like(batch["targets"], dtype=torch.bool)
            asked = batch["targets"] != -100
            hits[asked] = logits.argmax(-1) == targets
            for row in range(len(hits)):
                for segment in range(int(batch["segments"][row].max()) + 1):
                    here = (batch["segments"][row] == segment) & asked[row]
                    kind = scenes.KINDS[int(batch["kinds"][row][here][0])]
                    right[kind].append(bool(hits[row][here].all()))
    result = {kind: float(np.mean(right[kind])) for kind in scenes.KINDS}
    return {**result, "all": float(np.mean([value for values in right.values() for value in values]))}


def main() -> None:
    """Print a Markdown table for the model in a Hugging Face directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=("llava", "qwen2_vl"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = tokenizer.build(args.family)
    model = type(models.build(args.family, tokens)).from_pretrained(args.folder, dtype=torch.float32)
    ways = ("full", "oracle", "scattered 0.75", "scattered 0.5", "scattered 0.25", "even 0.5")
    print("| order | visual tokens | " + " | ".join((*scenes.KINDS, "all")) + " |")
    print("|---" * (len(scenes.KINDS) + 3) + "|")
    for text_first, way in itertools.product((False, True), ways):
        cells = table(model, args.family, tokens, args.pictures, way, text_first)
        order = "text first" if text_first else "picture first"
        print(f"| {order} | {way} | " + " | ".join(f"{100 * value:.1f}" for value in cells.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
