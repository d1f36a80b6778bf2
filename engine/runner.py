"""One forward of the decoder over the chunks of a step, packed without padding. Owns nothing but references."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from foveate.engine.cache.store import KVStore
from foveate.engine.models.base import Model
from foveate.engine.scheduler import Chunk
from foveate.kernels.attention import AttentionBatch, paged_attention
from foveate.kernels.store import store


class Runner:
    """Turns chunks into tensors, and the model's `attend` into the paged cache."""

    def __init__(self, model: Model, kv: KVStore) -> None:
        self._model = model
        self._kv = kv
        self._scale = model.spec.head_dim**-0.5

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks' tokens and store their keys and values.

        Returns:
            [m, vocab_size] float32 logits after the last token of each chunk that samples, in order of the chunks.
        """
        device = self._model.device
        batches = {group.id: self._batch(chunks, group.id) for group in self._kv.groups}
        slots = {group.id: self._slots(chunks, group.id).to(device) for group in self._kv.groups}
        group_of = {layer: group.id for group in self._kv.groups for layer in group.layers}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._kv.layer(layer)
            group = group_of[layer]
            store(keys, values, k, v, slots[group])
            out, _ = paged_attention(q, keys, values, batches[group], scale=self._scale)
            return out

        hidden = self._model(self._rows(chunks), self._positions(chunks).to(device), attend)
        ends = accumulate(chunk.stop - chunk.start for chunk in chunks)
        wanted = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.samples]
        if len(wanted) < len(hidden):  # a step of decoding ones alone wants every row
            hidden = hidden[torch.tensor(wanted, dtype=torch.int64, device=device)]
        return self._model.logits(hidden)

    def _positions(self, chunks: Sequence[Chunk]) -> Tensor:
        """[n_pos_axes, n] int64."""
        if all(chunk.start >= chunk.sequence.n_prompt for chunk in chunks):  # text, equal on every axis
            at = [i for chunk in chunks for i in chunk.sequence.output_positions(chunk.start, chunk.stop)]
            return torch.tensor(at).expand(self._model.spec.n_pos_axes, -1)
        positions = torch.cat([chunk.sequence.positions(chunk.start, chunk.stop) for chunk in chunks], dim=1)
        assert int(positions.min()) >= 0, "every token in a batch has a position: its image was reduced"
        return positions

    def _rows(self, chunks: Sequence[Chunk]) -> Tensor:
        """[n, hidden_size]: token embeddings, and in the place of visual tokens the reduced rows."""
        token_ids = [i for chunk in chunks for i in chunk.sequence.token_ids[chunk.start : chunk.stop]]
        rows = self._model.embed(torch.tensor(token_ids, device=self._model.device))
        offset = 0
        for chunk in chunks:
            request = chunk.sequence.request
            for run, visual in zip(request.runs, request.rows, strict=True):
                start, stop = max(run.start, chunk.start), min(run.stop, chunk.stop)
                if start < stop:
                    assert visual is not None, "a chunk runs only over images that were reduced"
                    at = offset + start - chunk.start
                    rows[at : at + stop - start] = visual[start - run.start : stop - run.start]
            offset += chunk.stop - chunk.start
        return rows

    def _slots(self, chunks: Sequence[Chunk], group: int) -> Tensor:
        """[n] int64: where each token's key and value go, block * block_tokens + offset."""
        size = self._kv.block_tokens
        slots: list[int] = []
        for chunk in chunks:
            table = chunk.sequence.tables[group]
            slots += [table[i // size] * size + i % size for i in range(chunk.start, chunk.stop)]
        return torch.tensor(slots)

    def _batch(self, chunks: Sequence[Chunk], group: int) -> AttentionBatch:
        lengths = (chunk.stop - chunk.start for chunk in chunks)
        size = self._kv.block_tokens
        tables = [chunk.sequence.tables[group][: -(-chunk.stop // size)] for chunk in chunks]
        width = max(len(table) for table in tables)
        padded = [table + [0] * (width - len(table)) for table in tables]
        return AttentionBatch(
            cu_queries=list(accumulate(lengths, initial=0)),  # on the host: each layer's kernel reads them there
            kv_lengths=[chunk.stop for chunk in chunks],
            block_tables=torch.tensor(padded, dtype=torch.int32, device=self._model.device),
        )
