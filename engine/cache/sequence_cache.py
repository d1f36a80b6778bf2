"""The cache of one sequence: which token lies in which slot, for each layer group. The single owner of this knowledge.

A group's tokens are counted on their own. Ownership of the slots of an open cache, half-open, per group:

    [0, n_shared)            blocks found by key, possibly shared with other sequences, never written
    [n_shared, n_held)       own blocks that hold keys and values
    [n_held, capacity)       own blocks, not yet written

`n_shared` is a multiple of the block size. `n_shared` may pass `n_held` where a deeper group lacks tokens that a
shallower group has: the tokens between are computed again, but not stored again.

Token i of a group lies in slot i of its table until `evict` compacts the group; no other module relies on either rule.
Host only but for two copies of slots, which the store carries out: eviction moves slots together, and a block that
other sequences can read is copied before its first write.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate.engine.cache.groups import LayerGroup, TokenMap, Waiting
from foveate.engine.cache.pool import Block, BlockPool
from foveate.engine.cache.prefix import ImageRun, block_key, group_key


class SlotStore(Protocol):
    """The tensors behind the slots."""

    def copy_slots(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy keys and values of slots `source` to slots `target`; both hold flat slot numbers, and may overlap."""


@dataclass(frozen=True, slots=True)
class CacheSpace:
    """Pool, store and settings that the caches of all sequences share."""

    pool: BlockPool
    store: SlotStore
    block_tokens: int
    sharing: bool = True  # whether full blocks are found again by key

    def n_blocks(self, n_tokens: int) -> int:
        """Blocks that hold `n_tokens` tokens."""
        return -(-n_tokens // self.block_tokens)

    def check(self, caches: Iterable["SequenceCache"]) -> None:
        """Count every page and every reference, given all caches that may be open."""
        references: dict[Block, int] = {}
        for cache in caches:
            cache.check()
            for block in cache.blocks():
                references[block] = references.get(block, 0) + 1
        self.pool.check(list(references))
        for block, count in references.items():
            assert block.references == count, f"a block has {block.references} references, but {count} tables hold it"


@dataclass(slots=True)
class _Table:
    """The blocks of one layer group."""

    group: LayerGroup
    blocks: list[Block] = field(default_factory=list)
    n_shared: int = 0
    n_reached: int = 0  # tokens of the sequence that the layers of the group have computed: none of a span that waits
    n_paged: int = 0  # blocks whose pages stand in the page tensor
    held: list[int] | None = None  # tokens by slot, once some were evicted; None: as the token map says
    is_altered: bool = False  # tokens computed from now on see less than their block key would say


class SequenceCache:
    """Blocks, block keys and waiting rows of one sequence.

    Args:
        space: the pool and the store.
        token_ids: of the sequence, prompt and output; a live list, to which the sequence appends.
        token_map: which tokens each layer group holds.
        root_key: parent of the first block's key.
        runs: visual tokens of the prompt.

    Attributes:
        n_computed: tokens of the sequence whose keys and values need not be computed any more.
        version: grows whenever a block of a table changes.
    """

    def __init__(
        self,
        space: CacheSpace,
        token_ids: list[int],
        token_map: TokenMap,
        root_key: bytes,
        runs: Sequence[ImageRun],
    ) -> None:
        self._space, self._pool, self._size = space, space.pool, space.block_tokens
        self._token_ids, self._map, self._root_key, self._runs = token_ids, token_map, root_key, runs
        self._tables: list[_Table] = []
        self._keys: list[list[bytes]] = [[] for _ in token_map.groups]  # of full blocks; they outlive `close`
        self._pages: Tensor | None = None
        self.n_computed = 0
        self._waiting: Waiting | None = None
        self.version = 0
        self._may_share_next = False  # whether the next token's block may be one that other sequences read or find
        self._peak_tokens = 0  # before the last call that let tokens go
        self._n_roomy = 0  # a sequence of so many tokens has room in blocks that no other sequence reads

    @property
    def is_open(self) -> bool:
        return bool(self._tables)

    @property
    def waiting(self) -> Waiting | None:
        """Rows before the first pruning point of an undecided prompt."""
        return self._waiting

    def put_aside(self, rows: Waiting) -> None:
        """Let further rows of the span wait, behind those that wait already."""
        self._waiting = rows if self._waiting is None else self._waiting.joined(rows)

    def take_up(self) -> None:
        """The span is decided: no row waits any more."""
        self._waiting = None

    def restore(self, rows: Waiting | None) -> None:
        """Let the rows wait that waited before a forward, which failed."""
        self._waiting = rows

    def n_found(self) -> int:
        """Tokens that `open` would find computed. Changes nothing."""
        return self._find()[1]

    def open(self, spare: int = 0) -> bool:
        """Take blocks for all tokens, the found ones first, and set `n_computed` to what the found blocks hold.

        Args:
            spare: pages that must stay available to others.

        Returns:
            False, with nothing changed, if there are too few pages.
        """
        assert not self.is_open, "a cache is opened once"
        found, n_computed = self._find()
        for block in chain(*found):
            self._pool.share(block)
        self._tables = [
            _Table(group, list(blocks), len(blocks) * self._size, n_computed)
            for group, blocks in zip(self._map.groups, found, strict=True)
        ]
        self.n_computed = n_computed
        if self._n_missing() + spare > self._pool.n_available or not self.grow():
            self._pool.release(list(chain(*found)))
            self._tables, self.n_computed = [], 0
            return False
        return True

    def grow(self) -> bool:
        """Make room for all tokens, in blocks that no other sequence reads; False, with nothing changed, if pages run
        out."""
        if len(self._token_ids) <= self._n_roomy:
            return True
        if self._n_missing() > self._pool.n_available:
            return False
        for g, table in enumerate(self._tables):
            if self._may_share_next:
                self._own_next(g, table)
            lacking = self._n_blocks_wanted(g, table) - len(table.blocks)
            if lacking > 0:  # in most steps of decoding no block is missing
                table.blocks += self._allocate(lacking, len(table.group.layers))
                self.version += 1
        self._may_share_next = False
        self._n_roomy = self._room()
        return True

    def commit(self, n: int) -> None:
        """The next `n` tokens are computed: their keys and values are stored. Other sequences find the full blocks."""
        assert self.is_open and n >= 0 and self.n_computed + n <= len(self._token_ids), "what is computed is there"
        self.n_computed += n
        for g, table in enumerate(self._tables):
            first, table.n_reached = table.n_reached, self.n_computed
            if g and self._waiting is not None:
                table.n_reached = min(self.n_computed, self._map.start)
            if table.held is not None:
                table.held += self._map.tokens(g, first, table.n_reached)
            elif self._space.sharing and not table.is_altered:
                self._register(g, table, self._map.count(g, first) // self._size)

    def truncate(self, n: int) -> None:
        """Forget the last `n` computed tokens. Blocks that then hold nothing go back; shared blocks do not change.

        A cut into a span whose rows were mixed forgets the whole span: only all of its rows together repeat a mix.
        """
        assert self.is_open and 0 <= n <= self.n_computed, "only computed tokens can be forgotten"
        left, self._peak_tokens = self.n_computed - n, self.peak_tokens()
        if self._waiting is None:
            left = self._map.resume(left)
        for g, table in enumerate(self._tables):
            table.n_reached = min(left, table.n_reached)
            if table.held is not None:
                del table.held[bisect_left(table.held, left) :]
            n_held = self.n_held(g)
            self._trim(table, n_held)
            del self._keys[g][n_held // self._size :]
        self.n_computed, self._may_share_next, self._n_roomy = left, True, 0
        if self._waiting is not None:
            n_waiting = max(0, left - self._map.start)
            self._waiting = self._waiting.first(n_waiting) if n_waiting else None

    def shorten(self, n: int) -> None:
        """The sequence keeps its first `n` tokens, and other tokens may follow; the cache may be closed.

        Computed tokens behind them are forgotten, and so are keys of blocks, which the search makes ahead of
        computation.
        """
        if self.is_open and n < self.n_computed:
            self.truncate(self.n_computed - n)
        for g, keys in enumerate(self._keys):
            del keys[self._map.n_known(g, n) // self._size :]
        self._n_roomy = 0

    def evict(self, group: int, tokens: Sequence[int]) -> bool:
        """Drop computed tokens of one layer group; the slots behind them move up, and whole blocks go back.

        Blocks that other sequences can read are copied first, so such an eviction takes pages before it gives any.
        This sequence registers no block of the group again from the first evicted token on. Tokens computed later see
        less in this group, so what deeper groups hold of those tokens is not found by key either.

        Args:
            tokens: increasing, each held by the group.

        Returns:
            False, with nothing changed, if there are too few pages for those copies.
        """
        assert self.is_open, "a closed cache holds nothing"
        assert self._waiting is None, "a span that waits is read whole when it is decided"
        if not tokens:
            return True
        self._peak_tokens = self.peak_tokens()
        table = self._tables[group]
        held = self._held(group)
        gone = set(tokens)
        assert len(gone) == len(tokens) and gone <= set(held), "only tokens that the group holds can be evicted"
        kept = [slot for slot, token in enumerate(held) if token not in gone]
        first = next(slot for slot, token in enumerate(held) if token in gone) // self._size
        n_left = self._space.n_blocks(len(kept))
        copied = sum(block.references > 1 for block in table.blocks[first:n_left])
        returned = sum(block.references == 1 for block in table.blocks[n_left:])
        if (copied - returned) * len(table.group.layers) > self._pool.n_available:
            return False
        self._compact(table, kept, first)
        table.held = [held[slot] for slot in kept]
        self.version += 1
        self._alter(group + 1)
        return True

    def close(self, *, forget: bool = False) -> None:
        """Give all blocks back and hold nothing, as before `open`; a closed cache stays closed.

        Args:
            forget: the contents are suspect, so no sequence finds the blocks again.
        """
        self._peak_tokens = self.peak_tokens()
        tables, self._tables = self._tables, []
        self.n_computed, self._waiting, self._pages, self._n_roomy = 0, None, None, 0
        self.version += 1
        for table in tables:
            if forget:
                for block in table.blocks:
                    self._pool.forget(block)
            self._pool.release(table.blocks)

    def n_held(self, group: int) -> int:
        """Tokens whose keys and values a layer group holds."""
        table = self._tables[group]
        return self._map.count(group, table.n_reached) if table.held is None else len(table.held)

    def n_shared(self, group: int) -> int:
        """Slots of a group that are never written."""
        return self._tables[group].n_shared

    def first_slot(self, group: int, token: int) -> int:
        """The slot of a token that the group holds or will hold next; tokens of a chunk follow each other in slots."""
        table = self._tables[group]
        if table.held is None:
            return self._map.count(group, token)
        if token < table.n_reached:
            return bisect_left(table.held, token)
        return len(table.held) + self._map.count(group, token) - self._map.count(group, table.n_reached)

    def peak_tokens(self) -> int:
        """Most tokens that the cache has held, as if every layer held the same: the mean over layers, rounded up."""
        held = sum(self.n_held(g) * len(table.group.layers) for g, table in enumerate(self._tables))
        return max(self._peak_tokens, -(-held // self._map.n_layers))

    def widest(self) -> int:
        """Blocks of the longest table."""
        return max(len(table.blocks) for table in self._tables)

    def blocks(self) -> list[Block]:
        """All blocks that the cache holds a reference of, group by group."""
        return [block for table in self._tables for block in table.blocks]

    def pages(self) -> Tensor:
        """[n_layers, n] int32, n >= `widest()`: the page of each block in each layer.

        Where a group has fewer blocks, the last entries of its layers mean nothing. The tensor is kept and extended.
        """
        known, widest = self._pages, self.widest()
        if known is None or known.shape[1] < widest:
            wider = torch.zeros(self._map.n_layers, max(16, 2 * widest), dtype=torch.int32)
            if known is not None:
                wider[:, : known.shape[1]] = known
            else:
                for table in self._tables:
                    table.n_paged = 0
            known = self._pages = wider
        for table in self._tables:
            since, layers = table.n_paged, table.group.layers
            if since < len(table.blocks):
                pages = torch.tensor([block.pages for block in table.blocks[since:]], dtype=torch.int32)
                known[layers.start : layers.stop, since : len(table.blocks)] = pages.T
                table.n_paged = len(table.blocks)
        return known

    def check(self) -> None:
        """Assert the invariants of this cache alone. Linear in blocks."""
        for g, table in enumerate(self._tables):
            assert all(len(block.pages) == len(table.group.layers) for block in table.blocks), "a page for every layer"
            assert table.n_shared % self._size == 0, "no block is both shared and written"
            assert self.n_held(g) <= len(table.blocks) * self._size, "every held token has a slot"
            assert table.n_shared <= len(table.blocks) * self._size, "shared slots lie in blocks"

    def _compact(self, table: _Table, kept: Sequence[int], first: int) -> None:
        """Move the kept slots together from block `first` on, in blocks that nobody else reads."""
        source = self._flat(table, np.array(kept[first * self._size :], dtype=np.int64))
        self._trim(table, len(kept))
        for i in range(first, len(table.blocks)):
            self._own(table, i)
        self._copy(source, self._flat(table, np.arange(first * self._size, len(kept))))
        table.n_shared = min(table.n_shared, first * self._size)
        table.n_paged = min(table.n_paged, first)

    def _alter(self, first: int) -> None:
        """From group `first` on, future tokens differ from the contents of blocks found by key."""
        for g, table in enumerate(self._tables[first:], first):
            table.is_altered = True
            self._trim(table, self.n_held(g))
        self._may_share_next, self._n_roomy = True, 0

    def _held(self, group: int) -> list[int]:
        """Tokens of a group by slot."""
        table = self._tables[group]
        return self._map.tokens(group, 0, table.n_reached) if table.held is None else table.held

    def _n_blocks_wanted(self, group: int, table: _Table) -> int:
        """Blocks for all tokens of the sequence."""
        n = self._map.count(group, len(self._token_ids))
        if table.held is not None:
            n += len(table.held) - self._map.count(group, table.n_reached)
        return self._space.n_blocks(n)

    def _room(self) -> int:
        """Largest sequence length that surely fits the tables."""
        if any(table.held is not None for table in self._tables):
            return len(self._token_ids)
        return min(self._map.reach(g, len(table.blocks) * self._size) for g, table in enumerate(self._tables))

    def _n_missing(self) -> int:
        """Pages that `grow` takes."""
        total = 0
        for g, table in enumerate(self._tables):
            blocks = max(0, self._n_blocks_wanted(g, table) - len(table.blocks))
            if self._may_share_next and (i := self._written_next(g, table)) is not None:
                blocks += table.blocks[i].references > 1
            total += blocks * len(table.group.layers)
        return total

    def _written_next(self, group: int, table: _Table) -> int | None:
        """The block that the next token goes into, if that block holds tokens already."""
        slot = max(self.n_held(group), table.n_shared)
        return slot // self._size if slot % self._size else None

    def _own_next(self, group: int, table: _Table) -> None:
        """Make the next token's block the sequence's own: `truncate` may leave one that others can read or find."""
        i = self._written_next(group, table)
        if i is None:
            return
        block = table.blocks[i]
        self._own(table, i)
        if table.blocks[i] is not block:
            self._copy(self._slots_of(block), self._slots_of(table.blocks[i]))

    def _slots_of(self, block: Block) -> NDArray[np.int64]:
        """[n_layers of the group, block_tokens] slot numbers over all pages."""
        slots: NDArray[np.int64] = np.array(block.pages, dtype=np.int64)[:, None] * self._size + np.arange(self._size)
        return slots

    def _own(self, table: _Table, i: int) -> None:
        """Ensure that no other sequence reads or finds block `i` of a table; a new block has no contents yet."""
        block = table.blocks[i]
        if block.references == 1:
            self._pool.forget(block)
            return
        self._pool.release([block])
        (table.blocks[i],) = self._allocate(1, len(table.group.layers))
        table.n_paged = min(table.n_paged, i)
        self.version += 1

    def _allocate(self, n: int, depth: int) -> list[Block]:
        fresh = self._pool.allocate(n, depth)
        assert fresh is not None, "the pages were counted"
        return fresh

    def _trim(self, table: _Table, n_held: int) -> None:
        """Give back the blocks behind the first `n_held` slots."""
        n = self._space.n_blocks(n_held)
        table.n_shared = min(table.n_shared, n_held // self._size * self._size)
        if n < len(table.blocks):
            self._pool.release(table.blocks[n:])
            del table.blocks[n:]
            table.n_paged = min(table.n_paged, n)
            self.version += 1

    def _flat(self, table: _Table, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n_layers of the group, n] slot numbers over all pages, of slots of the table."""
        pages = np.array([block.pages for block in table.blocks], dtype=np.int64).reshape(-1, len(table.group.layers))
        flat: NDArray[np.int64] = pages[places // self._size].T * self._size + places % self._size
        return flat

    def _copy(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        moved = source != target
        if moved.any():
            self._space.store.copy_slots(source[moved], target[moved])

    def _register(self, group: int, table: _Table, first: int) -> None:
        """Let other sequences find the full blocks from block `first` on, blocks of the answer too."""
        n_full = self.n_held(group) // self._size
        if first < n_full:
            keys = self._block_keys(group, n_full)
            for i in range(first, n_full):
                self._pool.register(table.blocks[i], keys[i])

    def _find(self) -> tuple[list[list[Block]], int]:
        """Per group, the blocks found by key, and the number of tokens that need not be computed.

        The search stops before the last token of the sequence, whose logits must be computed.
        """
        n = n_most = len(self._token_ids) - 1
        found: list[list[Block]] = []
        for g in range(len(self._map.groups)):
            found.append([])
            if self._space.sharing:
                for key in self._block_keys(g, self._map.n_known(g, n_most) // self._size):
                    block = self._pool.lookup(key)
                    if block is None:
                        break
                    found[g].append(block)
            n = min(n, self._map.reach(g, len(found[g]) * self._size))
        return found, self._map.resume(n)

    def _block_keys(self, group: int, n: int) -> list[bytes]:
        """Keys of the first `n` blocks of a group; known keys stay, because tokens are only appended."""
        keys, size = self._keys[group], self._size
        for i in range(len(keys), n):
            parent = keys[-1] if keys else group_key(self._root_key, self._map.groups[group].layers)
            ids, decided = self._map.block(group, self._token_ids, i * size, (i + 1) * size)
            keys.append(block_key(parent, ids, i * size, self._runs if group == 0 else (), decided))
        return keys[:n]
