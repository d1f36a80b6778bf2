"""Training batches: images, many packed questions per image, labels, and subsets of the visual tokens.

All questions about an image share its visual tokens: a sequence is [prefix | visual tokens | q1 a1 | q2 a2 | ...].
Each question attends to the prefix, the visual tokens and itself. The positions of each question restart after the
image. The result equals one conversation per question in the layout of the chat template.

Where the text comes before the image, the visual tokens read the question, so each question has a row of its own:
[prefix | q | visual tokens | a]. Rows of one image share the output of its tower.
"""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from foveate.bundled import scenes
from foveate.bundled.scenes import Question, Scene
from tiny import labels, models

QUOTAS = {  # maximum questions of each kind per image; first the kinds that bind two properties
    "binding": {"colour": 3, "shape": 3, "count": 1, "where": 2, "exists": 3, "read": 1, "describe": 1},
    "places": {"colour": 1, "shape": 1, "count": 1, "where": 3, "exists": 1, "read": 1, "describe": 1},
    "even": {"colour": 1, "shape": 1, "count": 1, "where": 1, "exists": 2, "read": 1, "describe": 1},
}
ROOM = 176  # tokens of questions and answers per image
MARK = "<|cut|>"  # placeholder for the visual tokens while a template is split


@dataclass(frozen=True)
class Layout:
    """The text around the parts of a one-question conversation, as token ids.

    Attributes:
        between: between image and question, whichever comes first.
        after: after both, up to the answer.
    """

    prefix: list[int]
    between: list[int]
    after: list[int]
    end: int

    @classmethod
    def of(cls, family: str, tokenizer: PreTrainedTokenizerFast, text_first: bool = False) -> "Layout":
        """Return the layout of the family's chat template."""
        content = [{"type": "image"}, {"type": "text", "text": MARK}]
        message = [{"role": "user", "content": content[::-1] if text_first else content}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        image = "<image>" if family == "llava" else "<|image_pad|>"
        first, second = (MARK, image) if text_first else (image, MARK)
        prefix, rest = text.split(first)
        between, after = rest.split(second)
        ids = [tokenizer(piece, add_special_tokens=False).input_ids for piece in (prefix, between, after)]
        return cls(ids[0], ids[1], ids[2], tokenizer.eos_token_id)


def qwen_size(width: int, height: int) -> tuple[int, int]:
    """Return the (width, height) to which Qwen2-VL's image processor resizes an image."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    factor = models.QWEN_PATCH * models.QWEN_MERGE
    low, high = models.QWEN_PIXELS
    new_height, new_width = smart_resize(height, width, factor, low, high)
    return new_width, new_height


def pixels(family: str, picture: Image.Image) -> np.ndarray:
    """Resize an image like the image processor. Returns uint8 [height, width, 3]."""
    side = (models.LLAVA_SIDE, models.LLAVA_SIDE)
    size = side if family == "llava" else qwen_size(*picture.size)
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def token_grid(family: str, size: tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of visual tokens for an image of `size` (width, height)."""
    if family == "llava":
        return models.LLAVA_SIDE // models.LLAVA_PATCH, models.LLAVA_SIDE // models.LLAVA_PATCH
    width, height = qwen_size(*size)
    factor = models.QWEN_PATCH * models.QWEN_MERGE
    return height // factor, width // factor


def choose(scene: Scene, seed: int, mix: str, describe: float) -> list[Question]:
    """Choose the questions for one image. `describe`: chance of the long description, which then comes first."""
    rng = random.Random(seed)
    asked: list[Question] = []
    pool = scenes.questions(scene, seed, per_kind=3)
    for kind, quota in QUOTAS[mix].items():
        if kind == "describe" and rng.random() > describe:
            continue
        asked += [question for question in pool if question.kind == kind][:quota]
    rng.shuffle(asked)
    return sorted(asked, key=lambda question: question.kind != "describe")


def odd_text(scene: Scene, rng: random.Random) -> Scene:
    """Replace the scene's word, if any, by random letters, so that the model cannot memorize words."""
    if scene.text is None or scene.text.content.isdigit():
        return scene
    content = "".join(rng.choice(labels.CHARS[10:]) for _ in range(rng.randint(3, 5)))
    taken = [item.box for item in scene.objects]
    text = scenes.lay_out_text(rng, content, scene.size, taken, sum(scene.background.tones[0]) < 300)
    free = text is not None and text.region not in {item.region for item in scene.objects}
    return replace(scene, text=text) if free else scene


def item_spans(scene: Scene) -> list[tuple[int, str]]:
    """Return (index, region) of the items in the order of the description. The text has the index len(objects)."""
    spans = [(index, item.region) for index, item in enumerate(scene.objects)]
    if scene.text is not None:
        spans.append((len(scene.objects), scene.text.region))
    return sorted(spans, key=lambda span: scenes.REGIONS.index(span[1]))


@functools.lru_cache(maxsize=50_000)
def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the token ids of a text, and the (start, end) characters of each token."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return encoded.input_ids, encoded.offset_mapping


def looks(scene: Scene, question: Question, text: str, offsets: list[tuple[int, int]]) -> list[list[int]]:
    """Return for each answer token the rows of `coverage` that show the token's item. The closing token has no rows."""
    count = len(scene.objects)
    letters = list(range(count, count + len(scene.text.content))) if scene.text is not None else []
    if question.kind == "read":
        return [[letters[start]] for start, _ in offsets]
    rows: list[list[int]] = []
    about = [row for index in question.about for row in ([index] if index < count else letters)]
    if question.kind != "describe":
        return [about for _ in offsets]
    order, part = item_spans(scene), 0
    written = text.find(f"{scene.text.sort} {scene.text.content}") if scene.text is not None else -1
    if scene.text is not None:
        written += len(scene.text.sort) + 1
    for start, _ in offsets:
        part = text[:start].count(",")
        index = order[part][0]
        if text[start] in ",.":
            rows.append([])
        elif index == count and written <= start < written + len(letters):
            rows.append([letters[start - written]])
        else:
            rows.append([index] if index < count else letters)
    return rows


@dataclass
class Sample:
    """One image with its packed questions, or with one question that comes before the image.

    Arrays have no batch axis. `guides`: (token, cells) pairs. `before`: tokens between the prefix and the image.
    """

    pixels: np.ndarray
    grid: tuple[int, int]
    dense: np.ndarray
    whole: np.ndarray
    ids: list[int]
    segments: list[int]
    positions: list[int]
    targets: list[int]
    kinds: list[int]
    guides: list[tuple[int, np.ndarray]]
    keep: np.ndarray
    before: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """The common settings of all samples in a run."""

    family: str
    tokenizer: PreTrainedTokenizerFast
    mix: str | None = "binding"  # None: no questions
    describe: float = 0.35  # chance of a description per image
    text_first: float = 0.0  # share of the batches in which the text comes before the image
    rows: int = 4  # questions per image there

    @functools.cached_property
    def layout(self) -> Layout:
        return Layout.of(self.family, self.tokenizer)

    @functools.cached_property
    def turned(self) -> Layout:
        return Layout.of(self.family, self.tokenizer, text_first=True)


def _evidence(
    scene: Scene, question: Question, shares: np.ndarray, left: np.ndarray, offsets: list[tuple[int, int]]
) -> tuple[bool, list[tuple[int, np.ndarray]]]:
    """Return whether the kept cells show what the answer needs, and (answer token, cells to look at) pairs."""
    count = len(scene.objects)
    needed = [left[i] >= 0.3 if i < count else left[count:].min() >= 0.45 for i in question.about]
    if not all(needed):
        return question.answer == "no", []
    rows = enumerate(looks(scene, question, question.answer, offsets))
    return True, [(step, shares[where].sum(axis=0) >= 0.25) for step, where in rows if where]


def _left(shares: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return the share of each item that lies in the kept cells."""
    seen: np.ndarray = shares[:, keep].sum(axis=1) / np.maximum(shares.sum(axis=1), 1e-6)
    return seen


def rows_of(
    scene: Scene, asked: list[Question], shares: np.ndarray, keep: np.ndarray, recipe: Recipe
) -> list[dict[str, Any]]:
    """Return one row per question, for the text before the image: tokens before the image, and as in `pack`."""
    layout, found = recipe.turned, []
    for question in asked:
        answer, offsets = encode(recipe.tokenizer, question.answer)
        seen, places = _evidence(scene, question, shares, _left(shares, keep), offsets)
        body, lead = [*answer, layout.end], len(layout.after)
        ids = layout.after + body
        found.append({
            "before": [*encode(recipe.tokenizer, question.text)[0], *layout.between],
            "ids": ids,
            "segments": [0] * len(ids),
            "positions": list(range(len(ids))),
            "targets": [-100] * (lead - 1) + (body if seen else [-100] * len(body)) + [-100],
            "kinds": [scenes.KINDS.index(question.kind)] * len(ids),
            "guides": [(lead - 1 + step, cells) for step, cells in places],
        })  # fmt: skip
    return found


def pack(
    scene: Scene, asked: list[Question], shares: np.ndarray, keep: np.ndarray, recipe: Recipe, room: int | None = None
) -> dict[str, list[int] | list[tuple[int, np.ndarray]]]:
    """Return token lists of the packed questions. An answer is no target if its evidence is outside the kept cells.

    Questions that do not fit in `room` tokens are left out.
    """
    ids: list[int] = []
    layout, tokenizer = recipe.layout, recipe.tokenizer
    out: dict[str, list[int]] = {name: [] for name in ("segments", "positions", "targets", "kinds")}
    guides: list[tuple[int, np.ndarray]] = []
    left = _left(shares, keep)
    for segment, question in enumerate(asked):
        head = [*layout.between, *encode(tokenizer, question.text)[0], *layout.after]
        answer, offsets = encode(tokenizer, question.answer)
        body = [*answer, layout.end]
        if room is not None and len(ids) + len(head) + len(body) > room:
            continue
        first = len(ids) + len(head) - 1  # the position that predicts the first answer token
        seen, places = _evidence(scene, question, shares, left, offsets)
        guides += [(first + step, cells) for step, cells in places]
        ids += head + body
        size = len(head) + len(body)
        out["segments"] += [segment] * size
        out["positions"] += range(size)
        out["targets"] += [-100] * (len(head) - 1) + (body if seen else [-100] * len(body)) + [-100]
        out["kinds"] += [scenes.KINDS.index(question.kind)] * size
    return {"ids": ids, "guides": guides, **out}


def subset(rng: np.random.Generator, occupied: np.ndarray, grid: tuple[int, int], share: float) -> np.ndarray:
    """Draw about `share` of the cells: scattered, blocks, even spacing, biased to items, or items only.

    Returns sorted indices.
    """
    rows, cols = grid
    total = rows * cols
    number = max(6, round(share * total))
    way = rng.choice(["scattered", "blocks", "even", "biased", "oracle"], p=[0.25, 0.1, 0.1, 0.4, 0.15])
    if way == "oracle" or (way == "biased" and rng.random() < 0.3):
        extra = rng.random(total) < (0.0 if way == "oracle" else share * 0.3)
        return np.flatnonzero(occupied | extra)
    score = rng.random(total)
    if way == "blocks":
        blocks = rng.random(((rows + 2) // 3, (cols + 2) // 3))
        score = np.kron(blocks, np.ones((3, 3)))[:rows, :cols].ravel()
    elif way == "even":
        step = total / number
        return np.unique((np.arange(number) * step + rng.random() * step).astype(np.int64).clip(max=total - 1))
    elif way == "biased":
        score = score + occupied * rng.uniform(0.5, 1.0)
    return np.sort(np.argsort(-score)[:number])


def sample(
    recipe: Recipe, seed: int, most: float | None, size: tuple[int, int] | None, text_first: bool = False
) -> list[Sample]:
    """Return the training sample of a seed, or its samples by question where the text comes first.

    `most`: maximum share of kept visual tokens. None: keep all.
    """
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    scene = scenes.make_scene(seed, size)
    if rng.random() < 0.35:
        scene = odd_text(scene, rng)
    grid = token_grid(recipe.family, scene.size)
    shares = labels.coverage(scene, *grid)
    keep = np.arange(grid[0] * grid[1])
    if most is not None:
        occupied = shares.sum(axis=0) > 0.12
        keep = subset(noise, occupied, grid, float(noise.uniform(0.4, 1.0)) * most)
    asked = choose(scene, seed, recipe.mix, recipe.describe) if recipe.mix is not None else []
    if text_first:
        packed = rows_of(scene, rng.sample(asked, min(recipe.rows, len(asked))), shares, keep, recipe)
    else:
        packed = [pack(scene, asked, shares, keep, recipe, ROOM)]
    picture = pixels(recipe.family, scenes.render(scene))
    dense, whole = labels.dense(scene, shares), labels.whole(scene)
    return [Sample(pixels=picture, grid=grid, dense=dense, whole=whole, keep=keep, **each) for each in packed]


def collate(samples: list[Sample], pad: int) -> dict[str, np.ndarray]:
    """Stack samples of one grid. Pad texts, kept cells and guides to the longest."""
    longest = max((len(s.ids) for s in samples), default=0)
    kept, guided = max(len(s.keep) for s in samples), max(1, max(len(s.guides) for s in samples))
    cells, size = samples[0].dense.shape[1], len(samples)
    batch = {
        "pixels": np.stack([s.pixels for s in samples]),
        "dense": np.stack([s.dense for s in samples]),
        "whole": np.stack([s.whole for s in samples]),
        "grid": np.array(samples[0].grid),
        "ids": np.full((size, longest), pad),
        "segments": np.full((size, longest), -1),
        "positions": np.zeros((size, longest), dtype=np.int64),
        "targets": np.full((size, longest), -100),
        "kinds": np.zeros((size, longest), dtype=np.int64),
        "keep": np.zeros((size, kept), dtype=np.int64),
        "kept": np.zeros((size, kept), dtype=bool),
        "guide_at": np.zeros((size, guided), dtype=np.int64),
        "guide_cells": np.zeros((size, guided, cells), dtype=bool),
    }
    for row, s in enumerate(samples):
        for name in ("ids", "segments", "positions", "targets", "kinds"):
            batch[name][row, : len(s.ids)] = getattr(s, name)
        batch["keep"][row, : len(s.keep)], batch["kept"][row, : len(s.keep)] = s.keep, True
        for column, (at, where) in enumerate(s.guides):
            batch["guide_at"][row, column], batch["guide_cells"][row, column] = at, where
    return batch


def collate_rows(pictures: list[list[Sample]], pad: int) -> dict[str, np.ndarray]:
    """Like `collate`, for samples whose text comes first. `owner`: the image of each row; images are stacked once."""
    rows = [row for picture in pictures for row in picture]
    batch = collate(rows, pad)
    counts = [len(picture) for picture in pictures]
    first = np.cumsum([0, *counts[:-1]])
    longest = max(len(row.before) for row in rows)
    return {
        **batch,
        **{name: batch[name][first] for name in ("pixels", "dense", "whole")},
        "owner": np.repeat(np.arange(len(pictures)), counts),
        "before": np.array([row.before + [pad] * (longest - len(row.before)) for row in rows]),
        "n_before": np.array([len(row.before) for row in rows]),
    }


def batches(recipe: Recipe, first_seed: int, size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield endless batches from consecutive seeds.

    In a share `text_first` of the batches the text comes before the image. Of either kind every second batch keeps only
    a subset of the visual tokens.
    """
    seed, rng = first_seed, random.Random(first_seed)
    most: dict[bool, float | None] = {False: None, True: None}
    while True:
        assert seed + size < scenes.HELD_OUT_SEED
        shape = None if recipe.family == "llava" else scenes.make_scene(seed).size
        turned = rng.random() < recipe.text_first
        chosen = [sample(recipe, seed + i, most[turned], shape, turned) for i in range(size)]
        pad = recipe.tokenizer.pad_token_id
        yield collate_rows(chosen, pad) if turned else collate([each for (each,) in chosen], pad)
        seed, most[turned] = seed + size, rng.uniform(0.2, 0.8) if most[turned] is None else None
