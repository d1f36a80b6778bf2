"""Paged attention: the CPU version against the reference, and the reference against attention written out."""

import random

import pytest
import torch

from foveate.kernels.attention import AttentionBatch, paged_attention
from foveate.kernels.cpu import levels
from foveate.kernels.store import store

torch.set_num_threads(1)
LEVELS = levels.LEVELS[: levels.LEVELS.index(levels.machine()) + 1]
has_cpu = pytest.mark.skipif(levels.machine() == "reference", reason="the C++ kernels are not here")


class Case:
    """A random batch over a pool whose blocks are handed out in random order and poisoned with NaN elsewhere."""

    def __init__(
        self, seed, lengths, news, *, n_kv_heads, group, d, block_tokens, dtype=torch.float32, q_dtype=None, trees=False
    ):
        noise, order = torch.Generator().manual_seed(seed), random.Random(seed)
        self.lengths, self.news, self.group, self.scale = lengths, news, group, d**-0.5
        self.k = [torch.randn(n, n_kv_heads, d, generator=noise).to(dtype) for n in lengths]
        self.v = [torch.randn(n, n_kv_heads, d, generator=noise).to(dtype) for n in lengths]
        width = n_kv_heads * group * d  # the queries are a view into fused rows, poisoned beside them
        fused = torch.full((sum(news), width + 24), torch.nan, dtype=q_dtype or dtype)
        fused[:, 8 : 8 + width] = torch.randn(sum(news), width, generator=noise)
        self.q = fused[:, 8 : 8 + width].unflatten(1, (-1, d))
        needed = [-(-n // block_tokens) for n in lengths]
        ids = order.sample(range(sum(needed) + 3), sum(needed))
        pool = (sum(needed) + 3, block_tokens, n_kv_heads, d)
        self.key_blocks = torch.full(pool, torch.nan, dtype=dtype)
        self.value_blocks = torch.full(pool, torch.nan, dtype=dtype)
        # Entries past a sequence's blocks are garbage that must not be followed.
        tables = torch.full((len(lengths), max(needed)), 10**6, dtype=order.choice((torch.int32, torch.int64)))
        for s, n in enumerate(needed):
            mine = torch.tensor([ids.pop() for _ in range(n)])
            tables[s, :n] = mine
            at = torch.arange(lengths[s])
            slots = mine[at // block_tokens] * block_tokens + at % block_tokens
            store(self.key_blocks, self.value_blocks, self.k[s], self.v[s], slots)
        cu = [sum(news[:i]) for i in range(len(news) + 1)]
        self.batch = AttentionBatch(cu, list(lengths), tables)
        self.trees = [_tree(m, order) if trees and order.random() < 0.7 else None for m in news] if trees else None

    def run(self):
        return paged_attention(
            self.q, self.key_blocks, self.value_blocks, self.batch, scale=self.scale, tree_mask=self.trees
        )

    def oracle(self):
        """Every query by itself, over exactly the keys it may see."""
        outs, sums = [], []
        for s, (length, m) in enumerate(zip(self.lengths, self.news, strict=True)):
            start = sum(self.news[:s])
            k, v = (x[s].double().repeat_interleave(self.group, 1) for x in (self.k, self.v))
            for i in range(m):
                seen = list(range(length - m + i + 1))
                if self.trees and self.trees[s] is not None:
                    seen = [j for j in range(length) if j < length - m or self.trees[s][i, j - (length - m)]]
                scores = torch.einsum("hd,nhd->hn", self.q[start + i].double(), k[seen]) * self.scale
                outs.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v[seen]))
                sums.append(scores.logsumexp(-1))
        return torch.stack(outs), torch.stack(sums)


def _tree(m, order):
    """Ancestor mask of a random draft tree."""
    mask = torch.eye(m, dtype=torch.bool)
    for i in range(1, m):
        mask[i] |= mask[order.randrange(i)]
    return mask


def check(case, tolerance=1e-5):
    out, lse = case.run()
    expected, expected_lse = case.oracle()
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    assert (out.double() - expected).abs().max() < tolerance
    assert (lse.double() - expected_lse).abs().max() < tolerance * 10


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("seed", range(4))
def test_definition(level, group, seed):
    order = random.Random(seed * 10 + group)
    lengths = [order.choice((1, 2, 15, 16, 17, order.randint(1, 90))) for _ in range(order.randint(1, 5))]
    news = [order.choice((1, n, order.randint(1, n))) for n in lengths]
    shape = dict(n_kv_heads=order.choice((1, 2, 3)), d=order.choice((8, 20, 64)), block_tokens=2 ** order.randint(0, 5))
    with levels.force(level):
        check(Case(seed, lengths, news, group=group, trees=seed % 2 == 1, **shape))


def random_case(seed, longest):
    order = random.Random(seed)
    edges = (1, 63, 64, 65, 255, 256, 257, order.randint(1, longest), order.randint(1, longest))
    lengths = [order.choice(edges) for _ in range(order.randint(1, 4))]
    news = [order.choice((0, 1, 1, order.randint(1, min(n, 20)), order.randint(1, n))) for n in lengths]
    return Case(
        seed,
        lengths,
        news,
        n_kv_heads=order.choice((1, 2, 3)),
        group=order.choice((1, 2, 3, 4, 5, 6, 7, 8, 12)),
        d=order.choice((8, 16, 20, 24, 40, 64, 72, 80, 128)),
        block_tokens=order.choice((1, 8, 16, 32)),
        dtype=order.choice((torch.float32, torch.bfloat16)),
        q_dtype=torch.float32,
        trees=seed % 3 == 0,
    )


def check_against_reference(case):
    out, lse = case.run()
    with levels.force("reference"):
        expected, expected_lse = case.run()
    if len(out):
        assert (out - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        assert (lse - expected_lse).abs().max() < 1e-5 * max(1, expected_lse.abs().max())


@has_cpu
@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("seed", range(25))
def test_the_cpu_version_is_the_reference(level, n_threads, seed):
    torch.set_num_threads(n_threads)
    try:
        with levels.force(level):
            check_against_reference(random_case(seed, 700))
    finally:
        torch.set_num_threads(1)


@has_cpu
@pytest.mark.parametrize(("length", "new"), [(5000, 1), (4999, 3), (3000, 16), (2100, 64), (2500, 130)])
@pytest.mark.parametrize("trees", [False, True])
def test_long_sequences(length, new, trees):
    case = Case(
        new,
        [length, 70],
        [new, 1],
        n_kv_heads=2,
        group=7,
        d=64,
        block_tokens=16,
        dtype=torch.bfloat16,
        q_dtype=torch.float32,
        trees=trees,
    )
    check_against_reference(case)


@has_cpu
@pytest.mark.parametrize("seed", range(8))
def test_bits_depend_on_nothing_else(seed):
    """Neither on the other sequences of the batch, nor on the number of threads, nor on the place of the blocks."""
    case = random_case(100 + seed, 900)
    together = case.run()
    torch.set_num_threads(2)
    try:
        twice = case.run()
    finally:
        torch.set_num_threads(1)
    for ours, theirs in zip(together, twice, strict=True):
        assert torch.equal(ours, theirs)
    for s, (start, end, length) in enumerate(case.batch.spans()):
        alone = AttentionBatch([0, end - start], [length], case.batch.block_tables[s : s + 1])
        trees = case.trees and [case.trees[s]]
        found = paged_attention(
            case.q[start:end], case.key_blocks, case.value_blocks, alone, scale=case.scale, tree_mask=trees
        )
        for ours, theirs in zip(found, together, strict=True):
            assert torch.equal(ours, theirs[start:end])


@has_cpu
def test_chunks_agree():
    """Many queries at once, a few, or one after the other: the same up to rounding."""
    case = Case(9, [300], [300], n_kv_heads=2, group=4, d=32, block_tokens=16)
    whole, _ = case.run()
    for size in (1, 3, 128):
        for start in range(0, 300, size):
            end = min(300, start + size)
            batch = AttentionBatch([0, end - start], [end], case.batch.block_tables)
            out, _ = paged_attention(case.q[start:end], case.key_blocks, case.value_blocks, batch, scale=case.scale)
            assert (out - whole[start:end]).abs().max() < 2e-6


@has_cpu
def test_large_scores_do_not_overflow():
    case = Case(10, [200, 200], [1, 90], n_kv_heads=1, group=4, d=32, block_tokens=16)
    case.scale *= 300
    out, lse = case.run()
    with levels.force("reference"):
        expected, expected_lse = case.run()
    assert (out - expected).abs().max() < 1e-2 and torch.isfinite(out).all()
    assert ((lse - expected_lse) / expected_lse).abs().max() < 1e-5


def test_bf16_loosely():
    case = Case(0, [19, 3], [4, 1], n_kv_heads=2, group=2, d=16, block_tokens=4, dtype=torch.bfloat16)
    check(case, tolerance=2e-2)


def test_tensors_as_lengths():
    case = Case(1, [9, 30], [2, 30], n_kv_heads=1, group=2, d=8, block_tokens=8)
    batch = case.batch
    case.batch = AttentionBatch(torch.tensor(batch.cu_queries), torch.tensor(batch.kv_lengths), batch.block_tables)
    check(case)


def test_empty_query_run():
    case = Case(2, [9, 5], [0, 5], n_kv_heads=1, group=2, d=8, block_tokens=8)
    check(case)


def test_neighbours_do_not_matter():
    """One sequence's bits are the same alone and in a batch."""
    case = Case(3, [40, 23, 61], [1, 23, 7], n_kv_heads=2, group=4, d=16, block_tokens=8)
    together, _ = case.run()
    for s in range(3):
        start, end = case.batch.cu_queries[s], case.batch.cu_queries[s + 1]
        alone = AttentionBatch([0, end - start], [case.lengths[s]], case.batch.block_tables[s : s + 1])
        out, _ = paged_attention(case.q[start:end], case.key_blocks, case.value_blocks, alone, scale=case.scale)
        assert torch.equal(out, together[start:end])


def test_parts_merge_by_log_sum_exp():
    case = Case(4, [32], [1], n_kv_heads=2, group=2, d=16, block_tokens=8)
    whole, _ = case.run()
    halves = []
    for blocks in (case.batch.block_tables[:, :1], case.batch.block_tables[:, 1:]):
        part = AttentionBatch([0, 1], [8 * blocks.shape[1]], blocks)
        halves.append(paged_attention(case.q, case.key_blocks, case.value_blocks, part, scale=case.scale))
    weights = torch.stack([lse for _, lse in halves]).softmax(0)[..., None]
    merged = sum(w * out for w, (out, _) in zip(weights, halves, strict=True))
    assert (merged - whole).abs().max() < 1e-5


def test_reference_flag_really_switches(monkeypatch):
    case = Case(6, [4], [1], n_kv_heads=1, group=1, d=8, block_tokens=4)
    monkeypatch.setattr("foveate.kernels.cpu.attention.extension", None)
    with levels.force("reference"):
        check(case)
