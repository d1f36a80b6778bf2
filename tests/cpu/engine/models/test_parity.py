"""Our modules against `transformers`: logits of random tiny checkpoints, both through dense attention."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from foveate.engine.common import Grid, Size
from foveate.engine.models.base import Attention, Model
from foveate.engine.models.loader import load_model

torch.set_num_threads(1)


class DenseAttention(Attention):
    """Causal attention over one sequence, written out."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("mhd,nhd->hmn", q, k) * self._scale
        hidden = torch.ones(q.shape[0], q.shape[0], dtype=torch.bool).triu(1)
        return torch.einsum("hmn,nhd->mhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def prepared(model: Model, pictures: list[Image.Image]) -> tuple[list[Tensor], list[Size | None]]:
    """What the server sends for the pictures of a prompt: pixels, and the sizes of those it cuts into tiles."""
    cut = model.processor.is_cut(len(pictures))
    ready = [model.processor.prepare_tiles(p) if cut else model.processor.prepare(p) for p in pictures]
    pixels = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(p.height, p.width, 3) for p in ready]
    return pixels, [(p.height, p.width) if cut else None for p in pictures]


def run(model: Model, prompt: list[int], pictures: list[Image.Image]) -> Tensor:
    """[n, vocab] logits of a prompt with one placeholder per picture."""
    pixels, originals = prepared(model, pictures)
    grids = iter([model.geometry.grid(*p.shape[:2], original) for p, original in zip(pixels, originals, strict=True)])
    seen = iter(model.encode(pixels, frozenset(), originals)) if pixels else iter(())
    segments: list[int | Grid] = []
    rows = []
    for token in prompt:
        if token == model.spec.image_token_id:
            image, grid = next(seen), next(grids)
            assert image.grid == grid.bare and image.proj.shape[0] == grid.bare.n_tokens
            segments.append(grid)
            rows.append(image.unreduced(grid))
        else:
            segments.append(1)
            rows.append(model.embed(torch.tensor([token])))
    positions, _ = model.geometry.lay_out(segments)
    laid_out = torch.cat([torch.tensor([list(axis) for axis in axes]) for axes in positions], 1)
    hidden = model(torch.cat(rows), laid_out, DenseAttention(model.spec.head_dim**-0.5))
    return model.logits(hidden)


def check(tiny: SimpleNamespace, path: Path, sizes: list[tuple[int, int]], seed: int) -> None:
    model = load_model(path, torch.float32, "cpu")
    pictures = [tiny.picture(h, w, seed + i) for i, (h, w) in enumerate(sizes)]
    prompt = tiny.prompt(9, len(sizes), seed)
    ours, theirs = run(model, prompt, pictures), tiny.reference_logits(path, prompt, pictures)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert theirs.std() > 0.1, "the oracle itself says something"
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4


LLAVA = [
    dict(vision="clip", decoder="llama", n_kv_heads=1, tied=False, naming="saved"),
    dict(vision="clip", decoder="qwen2", n_kv_heads=2, tied=True, naming="published", shards=3),
    dict(vision="siglip", decoder="llama", n_kv_heads=4, tied=True, naming="module", bias=True),
    dict(vision="siglip", decoder="qwen2", n_kv_heads=1, tied=False, naming="published"),
    dict(vision="clip", decoder="llama", n_kv_heads=4, naming="published", select=-1, strategy="full"),
    dict(vision="siglip", decoder="llama", n_kv_heads=2, select=2, strategy="default", rope="linear"),
    dict(vision="clip", decoder="llama", n_kv_heads=2, naming="module", select=3, rope="llama3", shards=2),
]


@pytest.mark.parametrize("seed, options", list(enumerate(LLAVA)))
def test_llava(tiny_models, tmp_path, seed, options):
    tiny_models.save_llava(tmp_path, seed=seed, **options)
    check(tiny_models, tmp_path, [[(45, 61)], [], [(20, 33), (64, 30)]][seed % 3], seed)


TILED = [  # pictures that fill their tiles, leave rows or columns of padding, and of one pixel across
    ("llava_next", dict(decoder="llama", n_kv_heads=1, naming="saved"), [(45, 61)]),
    ("llava_next", dict(decoder="mistral", n_kv_heads=2, tied=True, naming="published"), [(80, 33), (40, 200)]),
    ("llava_next", dict(decoder="qwen2", n_kv_heads=4, naming="module", shards=2), [(60, 60), (7, 9), (90, 31)]),
    ("llava_next", dict(decoder="llama"), []),
    ("llava_onevision", dict(n_kv_heads=1, decoder="qwen2", naming="published", shards=2), [(97, 80)]),  # scaled down
    ("llava_onevision", dict(n_kv_heads=2, decoder="qwen2", tied=True, naming="saved"), [(45, 61), (30, 90)]),
    ("llava_onevision", dict(n_kv_heads=4, decoder="qwen2", naming="module"), [(30, 30)]),
    ("llava_onevision", dict(n_kv_heads=2, decoder="llama"), [(30, 71)]),
    ("llava_onevision", dict(n_kv_heads=2, decoder="qwen2", naming="published"), [(200, 91)]),
    ("llava_onevision", dict(n_kv_heads=2, decoder="qwen2"), []),
]


@pytest.mark.parametrize("seed", range(len(TILED)))
def test_tiles(tiny_models, tmp_path, seed):
    family, options, sizes = TILED[seed]
    tiny_models.save_tiled(tmp_path, family=family, seed=seed, **options)
    check(tiny_models, tmp_path, sizes, seed)


QWEN = [
    (dict(n_kv_heads=1, tied=False, naming="saved"), [(24, 40), (56, 33)]),
    (dict(n_kv_heads=2, tied=True, naming="published", shards=2), [(47, 61)]),
    (dict(n_kv_heads=4, tied=False, naming="module"), [(60, 24), (16, 16), (30, 90)]),
    (dict(n_kv_heads=2, tied=True, naming="saved"), []),
]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("seed", range(len(QWEN)))
def test_qwen(tiny_models, tmp_path, family, seed):
    options, sizes = QWEN[seed]
    tiny_models.save_qwen(tmp_path, family=family, seed=seed, **options)
    check(tiny_models, tmp_path, sizes, seed)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_bfloat16_is_no_farther_from_float32_than_transformers_own(tiny_models, tmp_path, kind):
    if kind == "llava":
        tiny_models.save_llava(tmp_path, seed=3)
    else:
        tiny_models.save_qwen(tmp_path, family=kind, seed=3)
    picture, prompt = tiny_models.picture(45, 61, 3), tiny_models.prompt(30, 1, 3)
    exact = tiny_models.reference_logits(tmp_path, prompt, [picture])
    inputs = tiny_models.reference_inputs(tmp_path, prompt, [picture])
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        theirs = tiny_models.load_reference(tmp_path).bfloat16()(**inputs).logits[0].float()
    model = load_model(tmp_path, torch.bfloat16, "cpu")
    ours = run(model, prompt, [picture])
    assert ours.dtype == torch.float32 and model.dtype == torch.bfloat16

    def error(logits: Tensor) -> float:
        return float((logits - exact).pow(2).mean().sqrt() / exact.std())

    room = 0.1 if model.weights == "int16" else 1.25  # hardware without bfloat16 rounds less
    assert error(ours) < room * error(theirs), (error(ours), error(theirs))
