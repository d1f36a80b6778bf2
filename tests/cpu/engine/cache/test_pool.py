"""The block pool against a naive model, and prefix keys."""

import random

import pytest

from foveate.engine.cache.pool import Block, BlockPool
from foveate.engine.cache.prefix import ImageRun, block_key, image_key, root_key


class NaivePool:
    """What the pool should do, in the dullest way."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.refs: dict[Block, int] = {}  # of the blocks there are
        self.lru: list[Block] = []
        self.keys: dict[Block, bytes] = {}

    @property
    def n_free(self) -> int:
        return self.n_pages - sum(len(block.pages) for block in self.refs)

    @property
    def n_cached(self) -> int:
        return sum(len(block.pages) for block in self.lru)

    def take(self, blocks: list[Block]) -> None:
        """`blocks` were allocated: of free pages, or else of those of the oldest cached blocks."""
        wanted = sum(len(block.pages) for block in blocks)
        while self.n_free < wanted:
            self.drop(self.lru[0])
        held = {page for block in self.refs for page in block.pages}
        for block in blocks:
            assert not held & set(block.pages), "only free or evicted pages are handed out"
            self.refs[block] = 1
            held |= set(block.pages)

    def drop(self, block: Block) -> None:
        self.lru.remove(block)
        self.keys.pop(block)
        del self.refs[block]

    def release(self, blocks: list[Block]) -> None:
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0 and block in self.keys:
                self.lru.append(block)
            elif self.refs[block] == 0:
                del self.refs[block]


@pytest.mark.parametrize("seed", range(4))
def test_pool_matches_the_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    pool, naive = BlockPool(61), NaivePool(61)
    tables: list[list[Block]] = []

    def used() -> list[Block]:
        return [block for block, refs in naive.refs.items() if refs]

    for i in range(8000):
        match rng.choice(["allocate", "allocate", "share", "release", "release", "register", "forget"]):
            case "allocate":
                n, depth = rng.randrange(6), rng.randrange(1, 5)
                blocks = pool.allocate(n, depth)
                if blocks is None:
                    assert n * depth > naive.n_free + naive.n_cached, "refuses only what is not there"
                else:
                    assert [len(block.pages) for block in blocks] == [depth] * n
                    naive.take(blocks)
                    tables.append(blocks)
            case "share" if naive.keys:
                block, key = rng.choice(list(naive.keys.items()))
                assert pool.lookup(key) is block
                pool.share(block)
                naive.refs[block] += 1
                naive.lru = [b for b in naive.lru if b is not block]
                tables.append([block])
            case "release" if tables:
                blocks = tables.pop(rng.randrange(len(tables)))
                pool.release(blocks)
                naive.release(blocks)
            case "register" if any(tables):
                block = rng.choice([b for table in tables for b in table])
                key = bytes([rng.randrange(40)])
                pool.register(block, key)
                if block not in naive.keys and key not in naive.keys.values():
                    naive.keys[block] = key
            case "forget" if i % 5 == 0 and naive.refs:
                block = rng.choice(list(naive.refs))
                pool.forget(block)
                if block in naive.lru:
                    naive.drop(block)
                else:
                    naive.keys.pop(block, None)
        assert (pool.n_free, pool.n_cached) == (naive.n_free, naive.n_cached)
        if i % 20 == 0:
            pool.check(used())
    for table in tables:
        pool.release(table)
    pool.check([])
    assert pool.n_used == 0 and pool.n_available == pool.n_total


def test_a_failed_allocation_changes_nothing() -> None:
    pool = BlockPool(8)
    held = pool.allocate(3, 2)
    assert held is not None and pool.allocate(1, 3) is None
    assert (pool.n_free, pool.n_used) == (2, 6)


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    pool = BlockPool(3)
    chain = pool.allocate(3)
    assert chain is not None
    for block, key in zip(chain, (b"a", b"b", b"c"), strict=True):
        pool.register(block, key)
    pool.release(chain)
    [fresh] = pool.allocate(1) or []
    assert fresh.pages == chain[2].pages
    assert pool.lookup(b"a") is chain[0] and pool.lookup(b"c") is None


def test_pages_of_a_deep_block_serve_shallow_ones() -> None:
    """So a prompt whose deeper layers hold less leaves room for others, whatever their layers."""
    pool = BlockPool(12)
    deep = pool.allocate(1, 12)
    assert deep is not None
    pool.release(deep)
    assert pool.allocate(2, 5) is not None and pool.allocate(1, 2) is not None and pool.n_free == 0


def test_pages_of_a_layer_lie_side_by_side() -> None:
    """Those of a whole prompt, also where pages came back in any order."""
    pool = BlockPool(40)
    held = [pool.allocate(1, 2) for _ in range(20)]
    for i in random.Random(0).sample(range(20), 20):
        pool.release(held[i] or [])
    blocks = pool.allocate(8, 5) or []
    for layer in range(5):
        pages = [block.pages[layer] for block in blocks]
        assert pages == list(range(pages[0], pages[0] + 8))


@pytest.mark.parametrize("misuse", ["release twice", "share free", "register free"])
def test_misuse_is_our_bug(misuse: str) -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1) or []
    pool.release(blocks)
    with pytest.raises(AssertionError):
        match misuse:
            case "release twice":
                pool.release(blocks)
            case "share free":
                pool.share(blocks[0])
            case "register free":
                pool.register(blocks[0], b"k")


def _chain(ids: list[int], runs: list[ImageRun], root: bytes, size: int = 4) -> list[bytes]:
    keys: list[bytes] = []
    for i in range(len(ids) // size):
        keys.append(block_key(keys[-1] if keys else root, ids[i * size : (i + 1) * size], i * size, runs))
    return keys


def test_keys_cover_what_keys_and_values_depend_on() -> None:
    root = root_key(b"", "keep", "float32")
    red, blue = image_key(b"r" * 32, "none", 5), image_key(b"b" * 32, "none", 5)
    ids = [1, 2, 3, 9, 9, 9, 9, 9, 4, 5, 6, 7]
    base = _chain(ids, [ImageRun(3, 8, red)], root)
    assert base == _chain(ids, [ImageRun(3, 8, red)], root), "equal contents, equal keys"
    variants = {
        "another image": _chain(ids, [ImageRun(3, 8, blue)], root),
        "another offset": _chain(ids, [ImageRun(2, 7, red)], root),
        "no image": _chain(ids, [], root),
        "another tenant": _chain(ids, [ImageRun(3, 8, red)], root_key(b"x", "keep", "float32")),
        "another scheme": _chain(ids, [ImageRun(3, 8, red)], root_key(b"", "compact", "float32")),
        "another dtype": _chain(ids, [ImageRun(3, 8, red)], root_key(b"", "keep", "bfloat16")),
        "another first token": _chain([0, *ids[1:]], [ImageRun(3, 8, red)], root),
    }
    for name, keys in variants.items():
        assert not set(keys) & set(base), f"{name}: the first block differs and all after it"
    later = _chain([*ids[:-1], 0], [ImageRun(3, 8, red)], root)
    assert later[:2] == base[:2] and later[2] != base[2], "a later token leaves earlier blocks alone"
    assert len({k for keys in [base, *variants.values()] for k in keys}) == 3 * 8


def test_image_keys_tell_methods_settings_and_counts_apart() -> None:
    keys = {
        image_key(d * 32, m, k) for d in (b"a", b"b") for m in ("none", "pool Pool()", "pool Pool(x=1)") for k in (1, 2)
    }
    assert len(keys) == 12
    assert root_key(b"ab", "c", "d") != root_key(b"a", "bc", "d"), "parts do not run into each other"
