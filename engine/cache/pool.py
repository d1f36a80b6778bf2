"""Who holds which pages. Host only: it moves numbers, never tensors.

A *page* is `block_tokens` slots of one layer; a *block* is one page for each layer of a group, shared, found and
released as a whole. Pages are all alike, so blocks of groups of any depth come from one pool without fragments.
Every page is free or belongs to a block in exactly one of two states:

    cached    no references, a key: its contents can be found again, and go oldest first when pages run short
    used      at least one reference, with or without a key
"""

from collections.abc import Sequence


class Block:
    """Pages by layer of its group, first to last."""

    __slots__ = ("key", "pages", "references")

    def __init__(self, pages: list[int]) -> None:
        self.pages = pages
        self.references = 1
        self.key: bytes | None = None


class BlockPool:
    """`n_pages` pages, numbered from 0."""

    def __init__(self, n_pages: int) -> None:
        assert n_pages > 0, "a pool has at least one page"
        self._n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))  # a stack
        self._cached: dict[Block, None] = {}  # in order of release: the first is evicted first
        self._n_cached = 0  # pages
        self._block_of: dict[bytes, Block] = {}

    @property
    def n_total(self) -> int:
        return self._n_pages

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_cached(self) -> int:
        return self._n_cached

    @property
    def n_used(self) -> int:
        return self.n_total - self.n_free - self.n_cached

    @property
    def n_available(self) -> int:
        """Pages that `allocate` can hand out, evicting cached blocks."""
        return self.n_free + self.n_cached

    def allocate(self, n: int, depth: int = 1) -> list[Block] | None:
        """Return `n` blocks of `depth` pages with one reference each and no key, or None, changing nothing, if there
        are too few pages.

        Pages of one layer lie side by side where they can: attention reads them one after the other.
        """
        if n * depth > self.n_available:
            return None
        while len(self._free) < n * depth:
            self.forget(next(iter(self._cached)))
        left = len(self._free) - n * depth
        pages = sorted(self._free[left:])
        del self._free[left:]
        return [Block(pages[i::n]) for i in range(n)]

    def share(self, block: Block) -> None:
        """Add a reference to a used or cached block."""
        assert block.references > 0 or block in self._cached, "this block is free: it has nothing to share"
        if block in self._cached:
            del self._cached[block]
            self._n_cached -= len(block.pages)
        block.references += 1

    def release(self, blocks: Sequence[Block]) -> None:
        """Drop one reference of each. A chain's tail becomes evictable before its head, which it is useless without."""
        for block in reversed(blocks):
            assert block.references > 0, "a block is released more often than shared"
            block.references -= 1
            if block.references == 0:
                if block.key is not None:
                    self._cached[block] = None
                    self._n_cached += len(block.pages)
                else:
                    self._free += block.pages[::-1]

    def lookup(self, key: bytes) -> Block | None:
        """The used or cached block registered under `key`. Takes no reference."""
        return self._block_of.get(key)

    def register(self, block: Block, key: bytes) -> None:
        """Let `key` find a used block. The first block of a key keeps it, and the first key of a block."""
        assert block.references > 0, "this block is not in use: nobody vouches for its contents"
        if key not in self._block_of and block.key is None:
            block.key = key
            self._block_of[key] = block

    def forget(self, block: Block) -> None:
        """Take the key of a block away, if it has one; the pages of a cached block become free."""
        if block.key is not None:
            del self._block_of[block.key]
            block.key = None
        if block in self._cached:
            del self._cached[block]
            self._n_cached -= len(block.pages)
            self._free += block.pages[::-1]

    def check(self, used: Sequence[Block]) -> None:
        """Count every page, given every block in use once. Any state, linear cost."""
        free, cached = set(self._free), [page for block in self._cached for page in block.pages]
        held = [page for block in used for page in block.pages]
        assert len(free) == self.n_free, "a page is free twice"
        assert len(cached) == self.n_cached, "cached pages are counted as they come and go"
        assert len(free) + len(cached) + len(held) == self.n_total, "free + cached + used = total"
        assert len(free | set(cached) | set(held)) == self.n_total, "no page is in two states"
        assert all(block.references > 0 for block in used), "a used block has a reference"
        assert all(block.references == 0 and block.key is not None for block in self._cached), "a cached one has a key"
        keyed = {block.key: block for block in [*self._cached, *used] if block.key is not None}
        assert keyed == self._block_of, "keys and blocks are one to one"
