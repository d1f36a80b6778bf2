"""A run of decoder layers in one call: the bits of the operations one by one, and near the plain torch of each."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveate.engine.models.base import Attention, Rotary
from foveate.engine.models.loader import load_model
from foveate.kernels import decoder
from foveate.kernels.attention import AttentionBatch
from foveate.kernels.cpu import levels
from foveate.kernels.cpu.weights import FORMS, Form
from foveate.kernels.decoder import MOST_ROWS, Cache, Layers, LayerWeights, Product, reference, run_layers
from foveate.kernels.pack import pack

LEVELS = levels.LEVELS[1 : levels.LEVELS.index(levels.machine()) + 1]
N_LAYERS, HIDDEN, INNER, BLOCK = 3, 52, 70, 4

pytestmark = pytest.mark.skipif(not LEVELS, reason="the C++ kernels are not here, or no AVX2")


def _layers(form: Form, heads: int, kv_heads: int, d: int, noise: torch.Generator, biased: bool) -> Layers:
    def product(n: int, k: int, gated: bool = False) -> Product:
        bias = torch.randn(n, generator=noise) / 4 if biased else None
        return Product(pack(torch.randn(n, k, generator=noise) / k**0.5, form, gated=gated), bias)

    def norm() -> Tensor:
        return 1 + torch.randn(HIDDEN, generator=noise) / 8

    wide = (heads + 2 * kv_heads) * d
    layers = [
        LayerWeights(
            norm(),
            product(wide, HIDDEN),
            product(HIDDEN, heads * d),
            norm(),
            product(2 * INNER, HIDDEN, gated=True),
            product(HIDDEN, INNER),
        )
        for _ in range(N_LAYERS)
    ]
    return Layers(layers, heads, kv_heads, d, 1e-6)


def _cache(news: list[int], lengths: list[int], kv_heads: int, d: int, dtype: torch.dtype, seed: int) -> Cache:
    """Pages of one pool in random order, other pages and the slots past a sequence's end poisoned."""
    noise = torch.Generator().manual_seed(seed)
    widths = [-(-length // BLOCK) for length in lengths]
    n_pages = N_LAYERS * sum(widths) + 5
    order = torch.randperm(n_pages, generator=noise).tolist()
    keys, values = (torch.full((n_pages, BLOCK, kv_heads, d), torch.nan, dtype=dtype) for _ in "kv")
    tables = torch.full((N_LAYERS, len(news), max(widths) + 1), 10**6, dtype=torch.int32)
    slots = []
    for layer in range(N_LAYERS):
        for s, (m, length) in enumerate(zip(news, lengths, strict=True)):
            pages = torch.tensor([order.pop() for _ in range(widths[s])])
            tables[layer, s, : widths[s]] = pages
            at = torch.arange(length)
            places = pages[at // BLOCK] * BLOCK + at % BLOCK
            for store in (keys, values):
                past = torch.randn(length - m, kv_heads, d, generator=noise)
                store.flatten(0, 1)[places[: length - m]] = past.to(dtype)
            slots.append(places[length - m :])
    starts = [sum(news[:s]) for s in range(len(news) + 1)]
    batch = AttentionBatch(starts, lengths, tables)
    return Cache(keys, values, batch, torch.cat(slots).view(N_LAYERS, -1), d**-0.5)


def _copy(cache: Cache) -> Cache:
    return replace(cache, keys=cache.keys.clone(), values=cache.values.clone())


def _inputs(n: int, d: int, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    angles = torch.randn(n, d // 2, generator=noise) * 9
    return torch.randn(n, HIDDEN, generator=noise), angles.cos(), angles.sin()


CASES = [  # news, lengths, heads, kv_heads, d, stored
    ([1], [1], 1, 1, 8, torch.float32),
    ([1], [700], 4, 2, 16, torch.float32),
    ([1, 1, 1, 1, 1, 1, 1, 1], [9, 40, 3, 300, 17, 64, 2, 5], 6, 2, 16, torch.bfloat16),
    ([5, 1, 16], [5, 33, 90], 3, 3, 24, torch.float32),
    ([3, 30], [50, 30], 14, 2, 64, torch.float32),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_one_call_has_the_bits_of_its_operations(case, form: Form, n_threads: int, level: str, monkeypatch) -> None:
    news, lengths, heads, kv_heads, d, stored = case
    noise = torch.Generator().manual_seed(len(news) + d)
    layers = _layers(form, heads, kv_heads, d, noise, biased=d != 24)
    cache = _cache(news, lengths, kv_heads, d, stored, seed=d)
    rows, cos, sin = _inputs(sum(news), d, noise)
    before, threads = rows.clone(), torch.get_num_threads()
    with levels.force(level):
        alone = _copy(cache)
        wanted = reference(rows, cos, sin, layers, alone, range(N_LAYERS))
        monkeypatch.setattr(decoder, "rms_norm", None)  # the reference cannot run
        torch.set_num_threads(n_threads)
        got = run_layers(rows, cos, sin, layers, cache, range(N_LAYERS))
        torch.set_num_threads(threads)
    assert got.isfinite().all() and torch.equal(got, wanted)
    assert torch.equal(rows, before), "what entered is not written to"
    for store, other in ((cache.keys, alone.keys), (cache.values, alone.values)):
        assert torch.equal(store.nan_to_num(7), other.nan_to_num(7)), "the same slots hold the same"


@pytest.mark.parametrize("form", FORMS)
def test_it_agrees_with_plain_torch(form: Form) -> None:
    noise = torch.Generator().manual_seed(3)
    layers = _layers(form, 4, 2, 16, noise, biased=True)
    cache = _cache([1, 7], [20, 90], 2, 16, torch.float32, seed=3)
    rows, cos, sin = _inputs(8, 16, noise)
    with levels.force("reference"):
        wanted = run_layers(rows, cos, sin, layers, _copy(cache), range(N_LAYERS))
    got = run_layers(rows, cos, sin, layers, cache, range(N_LAYERS))
    error = (got - wanted).abs().max() / wanted.abs().max()
    assert error < (2e-6 if form in ("float32", "bfloat16") else 2e-2), "int8 inputs move a product by their rounding"


def test_a_run_may_begin_and_end_anywhere() -> None:
    noise = torch.Generator().manual_seed(1)
    layers = _layers("bfloat16", 4, 2, 16, noise, biased=True)
    cache = _cache([1, 2], [20, 9], 2, 16, torch.float32, seed=1)
    rows, cos, sin = _inputs(3, 16, noise)
    whole = run_layers(rows, cos, sin, layers, _copy(cache), range(N_LAYERS))
    parts = rows
    for which in (range(0, 1), range(1, 1), range(1, 3)):
        parts = run_layers(parts, cos, sin, layers, cache, which)
    assert torch.equal(parts, whole)


def test_many_rows_run_one_operation_after_the_other() -> None:
    noise = torch.Generator().manual_seed(2)
    layers, n = _layers("bfloat16", 2, 1, 16, noise, biased=False), MOST_ROWS + 1
    cache = _cache([n], [n], 1, 16, torch.float32, seed=2)
    rows, cos, sin = _inputs(n, 16, noise)
    got = run_layers(rows, cos, sin, layers, _copy(cache), range(N_LAYERS))
    assert torch.equal(got, reference(rows, cos, sin, layers, cache, range(N_LAYERS)))


def test_matrices_of_two_shapes_are_no_decoder() -> None:
    noise = torch.Generator().manual_seed(0)
    good = _layers("float32", 2, 1, 16, noise, biased=False)
    broken = replace(good.layers[1], down=good.layers[1].out)
    with pytest.raises(AssertionError, match="shape"):
        Layers([good.layers[0], broken], 2, 1, 16, 1e-6)


class _Attend(Attention):
    """Over a small cache; `given` says whether a run may use it by itself."""

    def __init__(self, cache: Cache, given: bool) -> None:
        self._cache, self._given, self.calls = cache, given, 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls += 1
        cache = self._cache
        decoder.store(cache.keys, cache.values, k, v, cache.slots[layer])
        return decoder.paged_attention(q, cache.keys, cache.values, cache.batch, scale=cache.scale, layer=layer)[0]

    def run_layers(self, weights: Layers | None, rows: Tensor, rotary: Rotary, layers: range) -> Tensor | None:
        assert weights is not None, "the model holds its layers as the kernels do"
        if not self._given:
            return None
        return decoder.run_layers(rows, rotary.cos, rotary.sin, weights, self._cache, layers)


def test_a_model_calls_back_only_where_it_must(tiny_models, tmp_path) -> None:
    tiny_models.save_llava(tmp_path, decoder="qwen2")
    with levels.force(levels.machine()):
        model = load_model(tmp_path, torch.float32, "cpu")
    spec = model.spec
    cache = _cache([3], [11], spec.n_kv_heads, spec.head_dim, torch.float32, seed=5)
    rows = torch.randn(3, spec.hidden_size, generator=torch.Generator().manual_seed(5))
    cache = replace(
        cache, slots=cache.slots[: spec.n_layers], batch=replace(cache.batch, block_tables=cache.batch.block_tables[:2])
    )
    rotary: Rotary = model.rotary(torch.arange(8, 11)[None])
    free, watched = _Attend(_copy(cache), True), _Attend(cache, False)
    out = [model.run(rows, rotary, attend, range(spec.n_layers)) for attend in (free, watched)]
    assert (free.calls, watched.calls) == (0, spec.n_layers)
    assert torch.equal(out[0], out[1])
