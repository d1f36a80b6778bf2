"""Block tables of the sequences: which blocks hold whose tokens, in each of their layer groups. Host only.

A group's tokens are counted on their own: token i of the group lies in slot i of its table. Ownership while tables are
open, half-open and in tokens of the group:

    [0, n_shared)             blocks found by key, possibly shared with others, never written
    [n_shared, n_computed)    its own blocks, holding keys and values
    [n_computed, capacity)    its own blocks, not yet written

`n_shared` is a multiple of the block size, so no block is both shared and written. It may pass `n_computed` where a
deeper group lacks what a shallower one has: those tokens are computed again, but not stored again.
"""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from foveate.engine.cache.pool import Block, BlockPool
from foveate.engine.cache.prefix import block_key, group_key
from foveate.engine.depth import Depth
from foveate.engine.sequence import Sequence


class BlockTables:
    """Opens, grows and closes tables; finds and registers prefixes."""

    def __init__(self, pool: BlockPool, block_tokens: int, *, sharing: bool = True) -> None:
        self.pool = pool
        self.block_tokens = block_tokens
        self._sharing = sharing

    def n_blocks(self, n_tokens: int) -> int:
        """Blocks that hold `n_tokens` tokens."""
        return -(-n_tokens // self.block_tokens)

    def n_pages(self, depth: Depth, n_tokens: int) -> int:
        """Pages that the first `n_tokens` tokens of a sequence take, its prompt being among them."""
        return sum(self.n_blocks(depth.count(g, n_tokens)) * len(group.layers) for g, group in enumerate(depth.groups))

    def n_found(self, sequence: Sequence) -> int:
        """Tokens that `open` would find computed. Changes nothing."""
        return self._find(sequence)[1]

    def open(self, sequence: Sequence, spare: int) -> bool:
        """Give a sequence blocks for all its tokens, the found ones first, and set `n_computed` to what they hold.

        Args:
            spare: pages that must stay available to others.

        Returns:
            False, with nothing changed, if there are too few.
        """
        assert not sequence.tables, "tables are opened once"
        found, n_computed = self._find(sequence)
        for block in chain(*found):
            self.pool.share(block)
        sequence.tables = [list(blocks) for blocks in found]
        if self._missing(sequence) + spare > self.pool.n_available or not self.grow(sequence):
            self.pool.release(list(chain(*found)))
            sequence.tables = []
            return False
        sequence.n_shared = [len(blocks) * self.block_tokens for blocks in found]
        sequence.n_computed = n_computed
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Make room for all tokens of an open sequence; False, with nothing changed, if pages run out."""
        if self._missing(sequence) > self.pool.n_available:
            return False
        depth = sequence.request.depth
        for g, (group, table) in enumerate(zip(depth.groups, sequence.tables, strict=True)):
            lacking = self.n_blocks(depth.count(g, sequence.n_tokens)) - len(table)
            if lacking > 0:  # in most steps of decoding it is not
                fresh = self.pool.allocate(lacking, len(group.layers))
                assert fresh is not None, "the pages were counted"
                table += fresh
        return True

    def pages(self, sequence: Sequence) -> Tensor:
        """[n_layers, n] int32, n at least the blocks of the longest table: the page of each block in each layer.

        Where a group has fewer, its layers' last entries mean nothing. Kept with the sequence, and extended.
        """
        depth, tables, known = sequence.request.depth, sequence.tables, sequence.pages
        longest = len(tables[0])
        if known is None or known.shape[1] < longest:
            wider = torch.zeros(depth.n_layers, max(16, 2 * longest), dtype=torch.int32)
            if known is not None:
                wider[:, : known.shape[1]] = known
            known = sequence.pages = wider
        for g, (group, table) in enumerate(zip(depth.groups, tables, strict=True)):
            since = sequence.n_paged.get(g, 0)
            if since < len(table):
                pages = torch.tensor([block.pages for block in table[since:]], dtype=torch.int32)
                known[group.layers.start : group.layers.stop, since : len(table)] = pages.T
                sequence.n_paged[g] = len(table)
        return known

    def register(self, sequence: Sequence, since: int) -> None:
        """Let others find the blocks that became full since `since` tokens were computed, the answer's too."""
        if not self._sharing:
            return
        depth = sequence.request.depth
        for g, table in enumerate(sequence.tables):
            first = depth.count(g, min(since, depth.start)) if g and since < depth.stop else depth.count(g, since)
            first, n_full = first // self.block_tokens, sequence.n_in(g) // self.block_tokens
            if first < n_full:
                keys = self._keys(sequence, g, n_full)
                for i in range(first, n_full):
                    self.pool.register(table[i], keys[i])

    def close(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Give the blocks back; a sequence without tables is left alone.

        Args:
            forget: nobody shall find them again, since what they hold is suspect.
        """
        tables = sequence.tables
        sequence.rewind()
        for table in tables:
            if forget:
                for block in table:
                    self.pool.forget(block)
            self.pool.release(table)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Count every page and every reference, given all sequences that may hold one."""
        references: dict[Block, int] = {}
        for sequence in sequences:
            for g, table in enumerate(sequence.tables):
                for block in table:
                    references[block] = references.get(block, 0) + 1
                    assert len(block.pages) == len(sequence.request.depth.groups[g].layers), "a page for every layer"
        self.pool.check(list(references))
        for block, count in references.items():
            assert block.references == count, f"a block has {block.references} references, but {count} tables hold it"

    def _missing(self, sequence: Sequence) -> int:
        """Pages that a sequence still lacks for all its tokens."""
        depth, total = sequence.request.depth, 0
        for g, (group, table) in enumerate(zip(depth.groups, sequence.tables, strict=True)):
            total += max(0, self.n_blocks(depth.count(g, sequence.n_tokens)) - len(table)) * len(group.layers)
        return total

    def _find(self, sequence: Sequence) -> tuple[list[list[Block]], int]:
        """Per group, the blocks that hold its longest computed prefix, short of the last token, whose logits must be
        computed; and how many tokens of the sequence they make it unnecessary to compute."""
        depth = sequence.request.depth
        n = n_most = sequence.n_tokens - 1
        found: list[list[Block]] = []
        for g in range(len(depth.groups)):
            found.append([])
            if self._sharing:
                for key in self._keys(sequence, g, self._n_known(depth, g, n_most) // self.block_tokens):
                    block = self.pool.lookup(key)
                    if block is None:
                        break
                    found[g].append(block)
            n = min(n, depth.reach(g, len(found[g]) * self.block_tokens))
        return found, depth.resume(n)

    @staticmethod
    def _n_known(depth: Depth, group: int, n: int) -> int:
        """Tokens of a group among the first n, as far as it is decided which."""
        return min(n, depth.start) if group and depth.decision is None else depth.count(group, n)

    def _keys(self, sequence: Sequence, group: int, n: int) -> list[bytes]:
        """Keys of the first `n` blocks of a group. Those known stay: tokens are only appended.

        In a deeper group a block inside the span or behind it holds what was decided.
        """
        request, size = sequence.request, self.block_tokens
        depth, keys = request.depth, sequence.block_keys.setdefault(group, [])
        for i in range(len(keys), n):
            parent = keys[-1] if keys else group_key(request.root_key, depth.groups[group].layers)
            first, stop = i * size, (i + 1) * size
            if group == 0:
                keys.append(block_key(parent, sequence.token_ids[first:stop], first, request.runs))
                continue
            shift = depth.groups[group].dropped
            ids = sequence.token_ids[first : min(stop, depth.start)]
            ids += sequence.token_ids[max(first + shift, depth.stop) : max(stop + shift, depth.stop)]
            decided = depth.decision.key if depth.decision is not None and stop > depth.start else b""
            keys.append(block_key(parent, ids, first, (), decided))
        return keys[:n]
