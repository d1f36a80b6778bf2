"""The batch of one forward: packed rows of several sequences, and where their keys and values lie.

The tensors of a batch are views of buffers that are allocated once and filled in place. Their addresses therefore stay
the same from step to step, and a CUDA graph may hold them. A buffer that gets too small is replaced by one twice the
size. Filling the buffers for the next batch overwrites the batch before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate.engine.cache.sequence_cache import SequenceCache


class QuerySpan(NamedTuple):
    """The rows of one sequence in a batch: its newest tokens in one layer group, which follow each other in slots."""

    first_slot: int
    n_rows: int
    n_shared: int  # slots that are never written
    n_sampled: int = 0  # the last rows, after which logits are wanted; several where drafts are verified
    ancestors: Tensor | None = None  # bool [n_rows, n_rows], row = query, True = visible; None: the causal rule

    @property
    def n_keys(self) -> int:
        return self.first_slot + self.n_rows


@dataclass(frozen=True, slots=True)
class Batch:
    """What attention reads of one batch, on the device of the model.

    Sequence s has the rows [queries[s], queries[s + 1]), its newest tokens, and attends to `lengths[s]` keys, the new
    ones included; key j lies in block `tables[layer, s, j // block_tokens]`.
    """

    slots: Tensor  # [n_layers, n_rows] int64, where each row's key and value go; -1: they are stored already
    tables: Tensor  # [n_layers, n_sequences, n_blocks] int32; entries behind a sequence's blocks mean nothing
    queries: Tensor  # [n_sequences + 1] int32, on the host
    lengths: Tensor  # [n_sequences] int32, on the host
    spans: Sequence[QuerySpan]
    ancestors: Sequence[Tensor | None] | None  # per sequence, as in `QuerySpan`; None: the causal rule for all

    def sampled(self) -> list[int]:
        """Rows after which logits are wanted, increasing."""
        ends = accumulate(span.n_rows for span in self.spans)
        return [
            row
            for end, span in zip(ends, self.spans, strict=True)
            for row in range(end - span.n_sampled, end)
        ]  # fmt: skip


class _Buffer:
    """An integer tensor that is filled on the host and read on the device; one tensor where the two are the same.

    The views of the last shape are kept: most steps ask for that shape again, and a view costs microseconds.

    Attributes:
        array: the entries that the last call of `host` gave, as an array.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._allocate(shape, dtype)

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._host = torch.zeros(*shape, dtype=dtype)
        self._there = self._host.to(self._device)  # the same tensor on a CPU
        self._look(self._host.shape)

    def _look(self, shape: Sequence[int]) -> None:
        """Make the views of the first entries along each axis."""
        place = tuple(slice(n) for n in shape)
        self._shape = tuple(shape)
        self._host_view, self._view = self._host[place], self._there[place]
        self.array: NDArray[np.int64] = self._host_view.numpy()

    def host(self, *shape: int) -> Tensor:
        """The first entries along each axis, to be filled. What they held is lost where the buffer has to grow."""
        if shape != self._shape:
            sizes = self._host.shape
            if any(n > size for n, size in zip(shape, sizes, strict=True)):
                grown = [size if n <= size else max(n, 2 * size) for n, size in zip(shape, sizes, strict=True)]
                self._allocate(grown, self._host.dtype)
            self._look(shape)
        return self._host_view

    def take(self, values: Tensor) -> Tensor:
        """The first entries along each axis on the device, filled with values that are there already."""
        self.host(*values.shape)  # room for the values
        return self._view.copy_(values)

    @property
    def address(self) -> int:
        return self._host.data_ptr()

    def rows(self) -> tuple[NDArray[np.int32], int]:
        """The whole buffer of three axes on the host with the last two made one, and the length of the last axis."""
        whole: NDArray[np.int32] = self._host.flatten(1).numpy()
        return whole, self._host.shape[2]

    def send(self) -> Tensor:
        """On the device, the entries that the last call of `host` gave."""
        if self._there is not self._host:
            self._view.copy_(self._host_view)
        return self._view


class BatchBuffers:
    """Builds batches and owns their tensors.

    Args:
        n_layers: of the decoder.
        n_pos_axes: 1 for RoPE, 3 for M-RoPE.
        block_tokens: slots of a block.
        device: where the batches are read.
    """

    def __init__(self, n_layers: int, n_pos_axes: int, block_tokens: int, device: torch.device) -> None:
        self._n_layers, self._n_pos_axes, self._block_tokens = n_layers, n_pos_axes, block_tokens
        host = torch.device("cpu")
        self._token_ids = _Buffer((64,), torch.int64, device)
        self._positions = _Buffer((n_pos_axes, 64), torch.int64, device)
        self._slots = _Buffer((n_layers, 64), torch.int64, device)
        self._tables = _Buffer((n_layers, 8, 16), torch.int32, device)
        self._queries, self._lengths = _Buffer((9,), torch.int32, host), _Buffer((8,), torch.int32, host)
        self._tables_present = _Buffer((n_layers, 8, 16), torch.int32, device)  # without sequences that are left out
        self._tables_sampled = _Buffer((n_layers, 8, 16), torch.int32, device)  # these three: of `sampled_only`
        self._queries_sampled = _Buffer((9,), torch.int32, host)
        self._lengths_sampled = _Buffer((8,), torch.int32, host)
        self._written: list[tuple[SequenceCache, int]] = []  # by place: the cache whose tables stand there, and version
        self._sent = torch.zeros(n_layers, 0, 0, dtype=torch.int32)  # the tables of this step on the device

    def token_ids(self, ids: Sequence[int]) -> Tensor:
        """[n] int64."""
        self._token_ids.host(len(ids))
        self._token_ids.array[:] = ids
        return self._token_ids.send()

    def positions(self, values: Sequence[int] | Tensor) -> Tensor:
        """[n_pos_axes, n] int64, from such a tensor or from n positions that are equal on every axis."""
        n = values.shape[1] if isinstance(values, Tensor) else len(values)
        self._positions.host(self._n_pos_axes, n)
        self._positions.array[:] = values
        return self._positions.send()

    def tables(self, caches: Sequence[SequenceCache]) -> Tensor:
        """[n_layers, n_sequences, n_blocks] int32: the block tables of a step, which all its batches read.

        Tables that the step before wrote in the same place and that have not changed since are not written again.
        """
        widths, before = [cache.widest() for cache in caches], self._tables.address
        host = self._tables.host(self._n_layers, len(caches), max(widths))
        known = self._written if self._tables.address == before else []
        # Entries behind these places may go stale, so only these count as written.
        wanted = [(cache, cache.version) for cache in caches]
        if known != wanted:  # caches are compared by identity
            self._written = []  # nothing is known if an error ends this
            for i, (cache, width) in enumerate(zip(caches, widths, strict=True)):
                if known[i : i + 1] != wanted[i : i + 1]:
                    host[:, i, :width] = cache.pages()[:, :width]
            self._written = wanted
        self._sent = self._tables.send()
        return self._sent

    def batch(self, spans: Sequence[QuerySpan], places: Sequence[int]) -> Batch:
        """The batch of one segment of the layers.

        Args:
            spans: of the sequences that have rows in the segment.
            places: of these sequences in the last call of `tables`, increasing.
        """
        n, tables = len(spans), self._sent
        if n < tables.shape[1]:
            tables = self._tables_present.take(_of(tables, places))
        queries, lengths = self._queries.host(n + 1), self._lengths.host(n)
        self._queries.array[:] = [0, *accumulate([span.n_rows for span in spans])]
        self._lengths.array[:] = [span.n_keys for span in spans]
        trees = [span.ancestors for span in spans]
        return Batch(
            slots=self._fill_slots(spans, places),
            tables=tables,
            queries=queries,
            lengths=lengths,
            spans=spans,
            ancestors=trees if any(tree is not None for tree in trees) else None,
        )

    def sampled_only(self, batch: Batch) -> Batch | None:
        """The batch in which only the sampled rows ask; None where a part of a draft tree would have to ask alone.

        Its tensors lie in buffers of their own: `batch` stays as it is.
        """
        asking = [s for s, span in enumerate(batch.spans) if span.n_sampled]
        spans = [batch.spans[s] for s in asking]
        if any(span.ancestors is not None and span.n_sampled < span.n_rows for span in spans):
            return None
        queries = self._queries_sampled.host(len(spans) + 1)
        lengths = self._lengths_sampled.host(len(spans))
        self._queries_sampled.array[:] = [0, *accumulate([span.n_sampled for span in spans])]
        self._lengths_sampled.array[:] = [span.n_keys for span in spans]
        return Batch(
            slots=batch.slots,
            tables=self._tables_sampled.take(_of(batch.tables, asking)),
            queries=queries,
            lengths=lengths,
            spans=spans,
            ancestors=None if batch.ancestors is None else [span.ancestors for span in spans],
        )

    def _fill_slots(self, spans: Sequence[QuerySpan], places: Sequence[int]) -> Tensor:
        """[n_layers, n_rows] int64. In numpy: torch takes several microseconds for an operation on a few values."""
        at = np.array([slot for span in spans for slot in range(span.first_slot, span.n_keys)])
        pages, width = self._tables.rows()
        first = np.array(places) * width
        if len(at) > len(spans):  # else each sequence has one row
            first = np.repeat(first, [span.n_rows for span in spans])
        block, offset = np.divmod(at, self._block_tokens)
        self._slots.host(self._n_layers, len(at))
        slots = self._slots.array
        np.multiply(pages.take(first + block, axis=1), self._block_tokens, out=slots, dtype=np.int64)
        slots += offset
        if any(span.n_shared > span.first_slot for span in spans):
            slots[:, at < np.repeat([span.n_shared for span in spans], [span.n_rows for span in spans])] = -1
        return self._slots.send()


def _of(tables: Tensor, sequences: Sequence[int]) -> Tensor:
    """[n_layers, n, n_blocks]: the tables of some sequences, copied."""
    return tables[:, torch.tensor(sequences, dtype=torch.int64, device=tables.device)]
