"""The search for retrieval heads against attention built in full, and on heads made to look things up."""

import math
from pathlib import Path

import pytest
import torch

from foveate.engine.models.base import Attention
from foveate.engine.models.loader import load_model
from foveate.tune import heads


class Dense(Attention):
    """Causal attention over one sequence, written out, that keeps its weights."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def attend(self, layer, q, k, v):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
        self.weights.append(scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf).softmax(-1))
        return torch.einsum("hij,jhd->ihd", self.weights[-1], v)


def dense(model, ids: list[int]) -> list[torch.Tensor]:
    """[n_heads, n, n] attention of each layer, softmax written out."""
    spec, attention = model.spec, Dense()
    with torch.inference_mode():
        model(model.embed(torch.tensor(ids)), torch.arange(len(ids)).expand(spec.n_pos_axes, -1), attention)
    return attention.weights


@pytest.mark.parametrize(
    ("save", "options", "block", "chunk"),
    [
        ("save_llava", {"n_kv_heads": 2}, 10, 7),
        ("save_llava", {"n_kv_heads": 4, "decoder": "qwen2", "vision": "siglip"}, 7, 512),
        ("save_qwen", {"n_kv_heads": 1}, 5, 6),
    ],
)
def test_scores_are_those_of_full_attention(
    tiny_models, tmp_path: Path, monkeypatch, save: str, options: dict[str, object], block: int, chunk: int
) -> None:
    getattr(tiny_models, save)(tmp_path, seed=block, **options)
    model = load_model(tmp_path, torch.float32, "cpu")
    monkeypatch.setattr(heads, "_CHUNK", chunk)
    words = [i for i in range(3, tiny_models.VOCAB) if i != tiny_models.IMAGE_TOKEN]
    found = heads.find_heads(model, words, seed=3, block=block)

    drawn = torch.randint(len(words), (block,), generator=torch.Generator().manual_seed(3))
    ids = [words[i] for i in drawn.tolist()] * 4
    n, group = 4 * block, model.spec.n_heads // model.spec.n_kv_heads
    for layer, attention in enumerate(dense(model, ids)):
        for name, ahead in (("echo", 0), ("induction", 1)):
            paid = [0.0] * model.spec.n_heads
            for head in range(model.spec.n_heads):
                for i in range(block, n):
                    for j in range(i + 1 - ahead * 0):
                        if j < i + ahead and j % block == (i + ahead) % block and (ahead or j < i):
                            paid[head] += float(attention[head, i, j])
            best = [max(paid[h * group : (h + 1) * group]) / (n - block) for h in range(model.spec.n_kv_heads)]
            assert getattr(found, name)[layer] == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert found.block == block


def test_the_block_fits_the_context(tiny_models, tmp_path: Path) -> None:
    tiny_models.save_llava(tmp_path)
    model = load_model(tmp_path, torch.float32, "cpu")
    assert heads.find_heads(model, range(3, 60), seed=0).block == model.spec.max_context // 4


@pytest.mark.parametrize(("n_layers", "n_heads", "n"), [(2, 2, 1), (10, 10, 14), (4, 25, 14)])
def test_the_best_heads_of_all_layers_are_taken(n_layers: int, n_heads: int, n: int) -> None:
    noise = torch.rand(n_layers, n_heads, generator=torch.Generator().manual_seed(n)).tolist()
    taken = heads._best(noise, heads.INDUCTION_SHARE)
    assert len(taken) == n == max(1, math.floor(0.14 * n_layers * n_heads))
    left = [noise[layer][head] for layer in range(n_layers) for head in range(n_heads) if (layer, head) not in taken]
    assert min(noise[layer][head] for layer, head in taken) >= max(left)
    assert heads._best([[0.5, 0.5], [0.5, 0.5]], 0.5) == [(0, 0), (0, 1)], "ties go to the first"
