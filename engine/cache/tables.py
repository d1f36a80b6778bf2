"""Block tables of the sequences: which blocks hold whose tokens, for one layer group. Host only.

Ownership of a sequence's tokens while its table is open, all half-open and in tokens:

    [0, n_shared)             blocks found by key, possibly shared with others, never written
    [n_shared, n_computed)    its own blocks, holding keys and values
    [n_computed, capacity)    its own blocks, not yet written

`n_shared` is a multiple of the block size, so no block is both shared and written.
"""

from collections.abc import Iterable

from foveate.engine.cache.pool import BlockPool
from foveate.engine.cache.prefix import block_key
from foveate.engine.sequence import Sequence


class BlockTables:
    """Opens, grows and closes tables; finds and registers prefixes."""

    def __init__(self, pool: BlockPool, block_tokens: int, *, group: int = 0, sharing: bool = True) -> None:
        self.pool = pool
        self.block_tokens = block_tokens
        self._group = group
        self._sharing = sharing

    def n_blocks(self, n_tokens: int) -> int:
        """Blocks that hold `n_tokens` tokens."""
        return -(-n_tokens // self.block_tokens)

    def n_found(self, sequence: Sequence) -> int:
        """Tokens that `open` would find computed. Changes nothing."""
        return len(self._find(sequence)) * self.block_tokens

    def open(self, sequence: Sequence, spare: int) -> bool:
        """Give a sequence blocks for all its tokens, the found ones first, and set `n_computed` to what they hold.

        Args:
            spare: blocks that must stay available to others.

        Returns:
            False, with nothing changed, if there are too few.
        """
        assert self._group not in sequence.tables, "a table is opened once"
        found = self._find(sequence)
        for block in found:
            self.pool.share(block)
        missing = self.n_blocks(sequence.n_tokens) - len(found)
        fresh = self.pool.allocate(missing) if missing + spare <= self.pool.n_available else None
        if fresh is None:
            self.pool.release(found)
            return False
        sequence.tables[self._group] = found + fresh
        sequence.n_computed = len(found) * self.block_tokens
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Make room for all tokens of an open sequence; False, with nothing changed, if blocks run out."""
        table = sequence.tables[self._group]
        missing = self.n_blocks(sequence.n_tokens) - len(table)
        if missing <= 0:  # most steps of decoding
            return True
        fresh = self.pool.allocate(missing)
        if fresh is None:
            return False
        table += fresh
        return True

    def register(self, sequence: Sequence, since: int) -> None:
        """Let others find the blocks that became full since `since` tokens were computed, the answer's too."""
        if self._sharing:
            first, n_full = since // self.block_tokens, sequence.n_computed // self.block_tokens
            if first == n_full:
                return
            keys = self._keys(sequence, n_full)
            for i in range(first, n_full):
                self.pool.register(sequence.tables[self._group][i], keys[i])

    def close(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Give the blocks back; a sequence without a table is left alone.

        Args:
            forget: nobody shall find them again, since what they hold is suspect.
        """
        table = sequence.tables.pop(self._group, [])
        sequence.n_computed = 0
        if forget:
            for block in table:
                self.pool.forget(block)
        self.pool.release(table)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Count every block and every reference, given all sequences that may hold one."""
        self.pool.check()
        references = [0] * self.pool.n_total
        for sequence in sequences:
            for block in sequence.tables.get(self._group, []):
                references[block] += 1
        for block, count in enumerate(references):
            held = self.pool.references(block)
            assert held == count, f"block {block} has {held} references, but {count} tables hold it"

    def _find(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the longest computed prefix, short of the last token, whose logits must be computed."""
        found: list[int] = []
        if self._sharing:
            for key in self._keys(sequence, (sequence.n_tokens - 1) // self.block_tokens):
                block = self.pool.lookup(key)
                if block is None:
                    break
                found.append(block)
        return found

    def _keys(self, sequence: Sequence, n: int) -> list[bytes]:
        """Keys of the first `n` blocks. Those known stay: tokens are only appended."""
        keys, size = sequence.block_keys, self.block_tokens
        for i in range(len(keys), n):
            parent = keys[-1] if keys else sequence.request.root_key
            ids = sequence.token_ids[i * size : (i + 1) * size]
            keys.append(block_key(parent, ids, i * size, sequence.request.runs))
        return keys[:n]
