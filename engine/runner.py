"""One forward of the decoder over the chunks of a step, packed without padding. Owns nothing but references.

The layers are run in *segments*, between which the batch stays the same. A segment ends where some sequence has a
pruning point: there tokens leave for good, or wait for the rest of their span (engine/pruning.py).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from foveate.engine.attention import attention_backend
from foveate.engine.batch import Batch, BatchBuffers, QuerySpan
from foveate.engine.cache.store import KVStore
from foveate.engine.models.base import Model, Rotary
from foveate.engine.pruning import Lane, Pruning
from foveate.engine.scheduler import Chunk


class Runner:
    """Turns chunks into batches and runs the segments of the model over them."""

    def __init__(self, model: Model, kv: KVStore) -> None:
        self._model = model
        self._n_layers = kv.n_layers
        self._pruning = Pruning(model, kv, self._rows)
        self._buffers = BatchBuffers(kv.n_layers, model.spec.n_pos_axes, kv.block_tokens, model.device)
        self._attention = attention_backend(kv.pages, model.device, model.spec.head_dim**-0.5)

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks' tokens and store their keys and values.

        If that raises, each sequence is as before: any of the chunks may run again. (The slots of their tokens may have
        been written, and are written again then.)

        Returns:
            [m, vocab_size] float32 logits after the sampled rows of each chunk, in order of the chunks.
        """
        pruned = [chunk.sequence for chunk in chunks if not chunk.sequence.request.depth.is_flat]
        before = [(sequence, sequence.cache.waiting, sequence.request.depth.decision) for sequence in pruned]
        try:
            return self._forward(chunks)
        except BaseException:
            for sequence, waiting, decision in before:
                sequence.cache.restore(waiting)
                sequence.request.depth.decision = decision
            raise

    @torch.inference_mode()
    def _forward(self, chunks: Sequence[Chunk]) -> Tensor:
        lanes = [Lane(chunk) for chunk in chunks]
        pages = self._buffers.tables([lane.cache for lane in lanes])
        rotary = self._model.rotary(self._buffers.positions(self._positions(chunks)))
        rows = self._rows(chunks)
        entered = self._entered(chunks)
        starts = {group.layers.start for lane in lanes for group in lane.depth.groups} | entered
        for first, end in pairwise([*sorted(starts), self._n_layers]):
            if not len(rows):
                break  # all wait
            batch = self._batch(lanes)
            watched = end - 1 if any(lane.watches(end) for lane in lanes) else -1
            self._attention.prepare(batch, watched)
            if end == self._n_layers:
                return self._model.logits(self._last(batch, rows, rotary, range(first, end)))
            rows = self._model.run(rows, rotary, self._attention, range(first, end))
            rows, rotary = self._pruning.cross(lanes, end, rows, rotary, pages, self._attention.seen)
            if end in entered:
                self._add(lanes, end, rows)
        return self._model.logits(rows)

    def _batch(self, lanes: Sequence[Lane]) -> Batch:
        """The batch of one segment, without sequences that have no rows in the segment."""
        present = [i for i, lane in enumerate(lanes) if lane.n_rows]
        return self._buffers.batch([_span(lanes[i]) for i in present], present)

    def _last(self, batch: Batch, rows: Tensor, rotary: Rotary, layers: range) -> Tensor:
        """Run the last segment: [m, hidden_size], after the sampled rows.

        The last layer computes keys and values for every row, and everything else for sampled rows only.
        """
        sampled = batch.sampled()
        if len(sampled) == len(rows):  # a step of decoding sequences alone wants every row
            return self._model.run(rows, rotary, self._attention, layers)
        wanted = torch.tensor(sampled, dtype=torch.int64, device=rows.device)
        asking = None if self._attention.joins_layers(len(rows)) else self._buffers.sampled_only(batch)
        if asking is None:
            return self._model.run(rows, rotary, self._attention, layers)[wanted]
        rows = self._model.run(rows, rotary, self._attention, layers[:-1])
        self._attention.prepare(asking)
        return self._model.run(rows, rotary, self._attention, layers[-1:], wanted)

    def _entered(self, chunks: Sequence[Chunk]) -> set[int]:
        """The deeper layers that visual rows enter in this step."""
        has_visual = any(c.start < c.sequence.n_prompt and c.sequence.request.pictures for c in chunks)
        return set(self._model.spec.row_layers[1:]) if has_visual else set()

    def _add(self, lanes: Sequence[Lane], layer: int, rows: Tensor) -> None:
        """Add the visual rows that enter `layer` to the packed rows of all lanes, in place."""
        offset = 0
        for lane in lanes:
            for at, added in lane.sequence.request.added(layer, lane.tokens):
                rows.index_add_(0, offset + at, added.to(rows.dtype))
            offset += lane.n_rows

    def _positions(self, chunks: Sequence[Chunk]) -> Tensor | list[int]:
        """[n_pos_axes, n] int64, or n positions that are equal on every axis."""
        if all(chunk.start >= chunk.sequence.n_prompt for chunk in chunks):  # text
            firsts = (chunk.sequence.output_positions(chunk.start, chunk.stop).start for chunk in chunks)
            pairs = zip(firsts, chunks, strict=True)
            return [first + offset for first, chunk in pairs for offset in chunk.offsets]
        positions = torch.cat([_positions_of(chunk) for chunk in chunks], dim=1)
        assert int(positions.min()) >= 0, "every token in a batch has a position: its image was reduced"
        return positions

    def _rows(self, chunks: Sequence[Chunk]) -> Tensor:
        """[n, hidden_size]: token embeddings for text, reduced rows for visual tokens."""
        token_ids = [i for chunk in chunks for i in chunk.sequence.token_ids[chunk.start : chunk.stop]]
        rows = self._model.embed(self._buffers.token_ids(token_ids))
        offset = 0
        for chunk in chunks:
            pictures = chunk.sequence.request.pictures if chunk.start < chunk.sequence.n_prompt else ()
            for picture in pictures:
                for first, own in picture.within(chunk.start, chunk.stop):
                    assert picture.rows is not None, "a chunk runs only over images that were reduced"
                    at, visual = offset + first - chunk.start, picture.rows[0][own]
                    rows[at : at + len(visual)] = visual
            offset += chunk.stop - chunk.start
        return rows


def _positions_of(chunk: Chunk) -> Tensor:
    """[n_pos_axes, n] int64."""
    if chunk.ancestors is None:
        return chunk.sequence.positions(chunk.start, chunk.stop)
    return chunk.sequence.positions(chunk.start, chunk.start + 1) + torch.tensor(chunk.offsets)


def _span(lane: Lane) -> QuerySpan:
    chunk = lane.chunk
    return QuerySpan(lane.slot, lane.n_rows, lane.n_shared, chunk.n_sampled, chunk.ancestors)
