"""One forward of the decoder over the chunks of a step, packed without padding. Owns nothing but references.

The layers are run in *segments*, between which the batch stays the same. A segment ends where some sequence has a
pruning point: there tokens leave for good, or wait for the rest of their span (engine/pruning.py).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from foveate.engine.cache.store import KVStore
from foveate.engine.cache.tables import BlockTables
from foveate.engine.models.base import CachedAttend, Model, Rotary
from foveate.engine.pruning import Lane, Pruning
from foveate.engine.scheduler import Chunk
from foveate.kernels.attention import AttentionBatch, paged_attention
from foveate.kernels.decoder import MOST_ROWS, Cache
from foveate.kernels.store import store

_PAGES_STEP = 16  # block tables are as wide as a multiple of this, so that they are seldom made anew


class PagedAttention(CachedAttend):
    """The model's `attend` for the layers of one segment: stores new keys and values, and attends over the cache.

    Attributes:
        keys, values: the pages.
        batch: block tables of all layers.
        slots: [n_layers, n] int64, where each row's key and value go.
        scale: multiplies the dot products.
        watched: a layer whose queries and log-sum-exp are wanted afterwards, or -1.
        seen: those, [n, n_heads, d] and [n, n_heads].
    """

    def __init__(self, kv: KVStore, batch: AttentionBatch, slots: Tensor, scale: float, watched: int = -1) -> None:
        self._kv = kv
        self.keys, self.values, self.batch, self.slots, self.scale = kv.keys, kv.values, batch, slots, scale
        self.watched = watched
        self.seen: tuple[Tensor, Tensor] | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store(self.keys, self.values, k, v, self.slots[layer])
        out, lse = paged_attention(q, self.keys, self.values, self.batch, scale=self.scale, layer=layer)
        if layer == self.watched:
            self.seen = q, lse
        return out

    def of_last(self, rows: Sequence[int]) -> "PagedAttention":
        """The same where only these rows ask, each the last one of its sequence."""
        spans, asked = self.batch.spans(), set(rows)
        asking = [i for i, (_, end, _) in enumerate(spans) if end - 1 in asked]
        pages = self.batch.block_tables
        few = AttentionBatch(
            cu_queries=range(len(asking) + 1),
            kv_lengths=[spans[i][2] for i in asking],
            block_tables=pages[:, torch.tensor(asking, dtype=torch.int64, device=pages.device)],
        )
        return PagedAttention(self._kv, few, self.slots, self.scale)

    @property
    def cache(self) -> Cache | None:
        """None where a layer is watched."""
        return None if self.watched >= 0 else Cache(self.keys, self.values, self.batch, self.slots, self.scale)


class Runner:
    """Turns chunks into tensors, and the model's `attend` into the paged cache."""

    def __init__(self, model: Model, kv: KVStore, tables: BlockTables) -> None:
        self._model = model
        self._kv = kv
        self._device = model.device  # of a module it is looked up among all its parameters
        self._scale = model.spec.head_dim**-0.5
        self._pruning = Pruning(model, kv, self._rows)
        self._pages = _Pages(kv.n_layers, tables)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks' tokens and store their keys and values.

        Returns:
            [m, vocab_size] float32 logits after the last token of each chunk that samples, in order of the chunks.
        """
        lanes = [Lane(chunk) for chunk in chunks]
        tables = self._pages.of(chunks)
        pages = tables.to(self._device)
        positions = self._positions(chunks).to(self._device)
        rows = self._rows(chunks)
        rotary = self._model.rotary(positions)
        starts = {group.layers.start for lane in lanes for group in lane.depth.groups}
        for first, end in pairwise([*sorted(starts), self._kv.n_layers]):
            if not len(rows):
                break  # all wait
            watched = end - 1 if any(lane.watches(end) for lane in lanes) else -1
            attend = self._attention(lanes, tables, pages, watched)
            if end == self._kv.n_layers:
                return self._model.logits(self._last(lanes, rows, rotary, attend, range(first, end)))
            rows = self._model.run(rows, rotary, attend, range(first, end))
            rows, rotary = self._pruning.cross(lanes, end, rows, rotary, pages, attend.seen)
        return self._model.logits(rows)

    def _last(
        self, lanes: Sequence[Lane], rows: Tensor, rotary: Rotary, attend: PagedAttention, layers: range
    ) -> Tensor:
        """Run the last segment: [m, hidden_size], after the last tokens of sequences that sample.

        The last layer makes keys and values of every row, and the rest only of those.
        """
        ends = accumulate(lane.n_rows for lane in lanes)
        asked = [end - 1 for end, lane in zip(ends, lanes, strict=True) if lane.chunk.samples]
        if len(asked) == len(rows):  # a step of decoding ones alone wants every row
            return self._model.run(rows, rotary, attend, layers)
        wanted = torch.tensor(asked, dtype=torch.int64, device=rows.device)
        if len(rows) <= MOST_ROWS:  # all layers are one call, which is worth more
            return self._model.run(rows, rotary, attend, layers)[wanted]
        rows = self._model.run(rows, rotary, attend, layers[:-1])
        return self._model.run(rows, rotary, attend.of_last(asked), layers[-1:], wanted)

    def _positions(self, chunks: Sequence[Chunk]) -> Tensor:
        """[n_pos_axes, n] int64."""
        if all(chunk.start >= chunk.sequence.n_prompt for chunk in chunks):  # text, equal on every axis
            at = [i for chunk in chunks for i in chunk.sequence.output_positions(chunk.start, chunk.stop)]
            return torch.tensor(at).expand(self._model.spec.n_pos_axes, -1)
        positions = torch.cat([chunk.sequence.positions(chunk.start, chunk.stop) for chunk in chunks], dim=1)
        assert int(positions.min()) >= 0, "every token in a batch has a position: its image was reduced"
        return positions

    def _attention(self, lanes: Sequence[Lane], tables: Tensor, pages: Tensor, watched: int) -> PagedAttention:
        """For a segment; sequences without rows in it are left out.

        Args:
            tables, pages: [n_layers, n_seqs, max_blocks] int32 of the lanes, on the host and on the device.
        """
        size = self._kv.block_tokens
        present = [(i, lane) for i, lane in enumerate(lanes) if lane.n_rows]
        if len(present) < len(lanes):
            pages = pages[:, torch.tensor([i for i, _ in present], device=pages.device)]
        # In numpy: arrays of a few values, each of whose operations costs torch several microseconds.
        counts = [lane.n_rows for _, lane in present]
        at = np.array([j for _, lane in present for j in range(lane.at, lane.at + lane.n_rows)])
        first_page = np.repeat(np.array([i * tables.shape[2] for i, _ in present]), counts)
        slots = tables.flatten(1).numpy().take(first_page + at // size, axis=1).astype(np.int64)
        slots *= size
        slots += at % size
        if any(lane.n_shared > lane.at for _, lane in present):
            slots[:, at < np.repeat(np.array([lane.n_shared for _, lane in present]), counts)] = -1
        batch = AttentionBatch(
            cu_queries=[0, *accumulate(counts)],
            kv_lengths=[lane.at + lane.n_rows for _, lane in present],
            block_tables=pages,
        )
        return PagedAttention(self._kv, batch, torch.from_numpy(slots).to(self._device), self._scale, watched)

    def _rows(self, chunks: Sequence[Chunk]) -> Tensor:
        """[n, hidden_size]: token embeddings, and in the place of visual tokens the reduced rows."""
        token_ids = [i for chunk in chunks for i in chunk.sequence.token_ids[chunk.start : chunk.stop]]
        rows = self._model.embed(torch.tensor(token_ids, device=self._device))
        offset = 0
        for chunk in chunks:
            request = chunk.sequence.request
            pictures = zip(request.runs, request.rows, strict=True) if chunk.start < chunk.sequence.n_prompt else ()
            for run, visual in pictures:
                start, stop = max(run.start, chunk.start), min(run.stop, chunk.stop)
                if start < stop:
                    assert visual is not None, "a chunk runs only over images that were reduced"
                    at = offset + start - chunk.start
                    rows[at : at + stop - start] = visual[start - run.start : stop - run.start]
            offset += chunk.stop - chunk.start
        return rows


class _Pages:
    """Block tables of a step's sequences side by side, kept for the next step: of most nothing changes."""

    def __init__(self, n_layers: int, tables: BlockTables) -> None:
        self._tables = tables
        self._held: list[tuple[Tensor, dict[int, int]]] = []  # by sequence: its pages and how many those are
        self._pages = torch.zeros(n_layers, 0, 0, dtype=torch.int32)

    def of(self, chunks: Sequence[Chunk]) -> Tensor:
        """[n_layers, n_seqs, max_blocks] int32, on the host; entries beyond a sequence's blocks mean nothing.

        Written over by the next call.
        """
        pages = [self._tables.pages(chunk.sequence) for chunk in chunks]
        widths = [len(chunk.sequence.tables[0]) for chunk in chunks]
        widest = -(-max(widths) // _PAGES_STEP) * _PAGES_STEP
        if self._pages.shape[1:] != (len(chunks), widest):
            self._pages = torch.zeros(self._pages.shape[0], len(chunks), widest, dtype=torch.int32)
            self._held = []
        held = [(table, chunk.sequence.n_paged.copy()) for table, chunk in zip(pages, chunks, strict=True)]
        for i, (table, counts) in enumerate(held):
            if not self._held or self._held[i][0] is not table or self._held[i][1] != counts:
                self._pages[:, i, : widths[i]] = table[:, : widths[i]]
        self._held = held
        return self._pages
