"""Who holds which block. Host only: it moves numbers, never tensors.

Every block is in exactly one of three states:

    free      no references, no key: its contents mean nothing
    cached    no references, a key: its contents can be found again, and go oldest first when blocks run short
    used      at least one reference, with or without a key
"""


class BlockPool:
    """`n_blocks` ref-counted blocks, numbered from 0."""

    def __init__(self, n_blocks: int) -> None:
        assert n_blocks > 0, "a pool has at least one block"
        self._refs = [0] * n_blocks
        self._free = list(range(n_blocks - 1, -1, -1))  # a stack
        self._cached: dict[int, None] = {}  # in order of release: the first is evicted first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def n_total(self) -> int:
        return len(self._refs)

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_cached(self) -> int:
        return len(self._cached)

    @property
    def n_used(self) -> int:
        return self.n_total - self.n_free - self.n_cached

    @property
    def n_available(self) -> int:
        """Blocks that `allocate` can hand out, evicting cached ones."""
        return self.n_free + self.n_cached

    def references(self, block: int) -> int:
        return self._refs[block]

    def allocate(self, n: int) -> list[int] | None:
        """Return `n` blocks with one reference each and no key, or None, changing nothing, if there are fewer."""
        if n > self.n_available:
            return None
        while len(self._free) < n:
            oldest = next(iter(self._cached))
            self.forget(oldest)
        blocks = [self._free.pop() for _ in range(n)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Add a reference to a used or cached block."""
        assert self._refs[block] > 0 or block in self._cached, f"block {block} is free: it has nothing to share"
        self._cached.pop(block, None)
        self._refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop one reference of each. A chain's tail becomes evictable before its head, which it is useless without."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is released more often than shared"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def lookup(self, key: bytes) -> int | None:
        """The used or cached block registered under `key`. Takes no reference."""
        return self._block_of.get(key)

    def register(self, block: int, key: bytes) -> None:
        """Let `key` find a used block. The first block of a key keeps it, and the first key of a block."""
        assert self._refs[block] > 0, f"block {block} is not in use: nobody vouches for its contents"
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def forget(self, block: int) -> None:
        """Take the key of a block away, if it has one; a cached block becomes free."""
        if block in self._key_of:
            del self._block_of[self._key_of.pop(block)]
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def check(self) -> None:
        """Count every block. Any state, linear cost."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, refs in enumerate(self._refs) if refs > 0}
        assert len(free) == self.n_free, "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.n_total, "free + cached + used = total"
        assert len(free | cached | used) == self.n_total, "no block is in two states"
        assert min(self._refs) >= 0, "references are not negative"
        assert cached <= self._key_of.keys() <= cached | used, "cached blocks have a key, free blocks have none"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, "keys and blocks are one to one"
