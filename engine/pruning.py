"""Pruning points between two segments of the decoder: tokens leave for good, or wait for the rest of their span.

A `Lane` follows one chunk through the layers. At a pruning point, a lane with an undecided span stores the span's rows.
The lane with the last chunk of the span takes all stored rows, decides, and continues with the kept tokens. After the
decision, a lane drops the tokens that the next group does not hold.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256

import torch
from torch import Tensor

from foveate.engine.cache.groups import Waiting
from foveate.engine.cache.store import KVStore
from foveate.engine.models.base import Model, Rotary
from foveate.engine.prune.base import Kept
from foveate.engine.prune.depth import Decision, members
from foveate.engine.prune.probe import Probe, View, Which
from foveate.engine.scheduler import Chunk

Seen = tuple[Tensor, Tensor]  # queries and log-sum-exp of the layer just run


class Lane:
    """One chunk on its way through the layers.

    Attributes:
        group: index of the current layer group.
        tokens: present tokens of the sequence, increasing.
        slot: slot of the first present token in the group; the other tokens follow.
        n_shared: slots of the group that are never written.
    """

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.sequence = chunk.sequence
        self.cache = chunk.sequence.cache
        self.depth = chunk.sequence.request.depth
        assert chunk.ancestors is None or chunk.start >= self.depth.stop, "drafts follow the prompt"
        self.group = 0
        self.tokens: Sequence[int] = range(chunk.start, chunk.stop)
        self.slot = self.cache.first_slot(0, chunk.start)
        self.waits = not self.depth.is_flat and (
            self.cache.waiting is not None
            or (chunk.stop > self.depth.start and self.depth.waits(max(chunk.start, self.depth.start)))
        )
        self.completes = self.waits and chunk.stop >= self.depth.stop
        self.visual: list[int] = []  # present of the span, while it is decided
        self.choices: list[Kept] = []  # decided so far
        self.members: list[list[int]] = []

    @property
    def n_rows(self) -> int:
        return len(self.tokens)

    @property
    def n_shared(self) -> int:
        return self.cache.n_shared(self.group)

    def enters(self, layer: int) -> bool:
        """Whether the lane's next group begins with this layer."""
        groups = self.depth.groups
        return self.group + 1 < len(groups) and groups[self.group + 1].layers.start == layer

    def enter_group(self) -> None:
        """Find the slots of the present tokens in the group that the lane has just entered."""
        self.slot = self.cache.first_slot(self.group, self.tokens[0]) if self.tokens else 0

    def watches(self, layer: int) -> bool:
        """Whether the layer before this one must record its queries and log-sum-exp."""
        return self.waits and self.enters(layer) and (self.completes or self.group == 0)

    def where(self, low: int, high: int) -> tuple[int, int]:
        """Range of the lane's rows that hold tokens [low, high)."""
        inside = [i for i, token in enumerate(self.tokens) if low <= token < high]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


class Pruning:
    """Crosses pruning points.

    Args:
        embed: returns the rows of chunks at the input of the first layer.
    """

    def __init__(self, model: Model, kv: KVStore, embed: Callable[[Sequence[Chunk]], Tensor]) -> None:
        self._model = model
        self._kv = kv
        self._embed = embed

    def cross(
        self, lanes: Sequence[Lane], layer: int, rows: Tensor, rotary: Rotary, pages: Tensor, seen: Seen | None
    ) -> tuple[Tensor, Rotary]:
        """Take the packed rows of all lanes over the boundary before `layer`.

        Args:
            pages: [n_layers, n_lanes, max_blocks] of the lanes' tables.
            seen: queries and log-sum-exp of the layer before, if a lane watches that layer.
        """
        n_before = [lane.n_rows for lane in lanes]
        entering = [lane.enters(layer) for lane in lanes]
        if not any(entering):
            return rows, rotary
        out: list[tuple[Tensor, Rotary]] = []
        stop = 0
        for i, lane in enumerate(lanes):
            start, stop = stop, stop + n_before[i]
            own, own_rotary = rows[start:stop], Rotary(rotary.cos[start:stop], rotary.sin[start:stop])
            if not entering[i]:
                out.append((own, own_rotary))
            elif lane.waits:
                own_seen = None if seen is None else (seen[0][start:stop], seen[1][start:stop])
                out.append(self._wait(lane, layer, own, own_rotary, pages[:, i], own_seen))
            else:
                out.append(self._flow(lane, own, own_rotary))
        cos, sin = (torch.cat([t[k] for _, t in out]) for k in (0, 1))
        return torch.cat([r for r, _ in out]), Rotary(cos, sin)

    def _flow(self, lane: Lane, rows: Tensor, rotary: Rotary) -> tuple[Tensor, Rotary]:
        """Enter the next group with the tokens that a decision kept or that lie outside the span."""
        depth, before = lane.depth, lane.tokens
        lane.group += 1
        if before and before[0] < depth.stop and before[-1] >= depth.start:
            decision = depth.decision
            assert decision is not None, "a lane that does not wait is decided"
            inside = set(decision.members[lane.group - 1])
            lane.tokens = [t for t in before if not depth.start <= t < depth.stop or t in inside]
        lane.enter_group()
        if len(lane.tokens) < len(before):
            present = set(lane.tokens)
            index = torch.tensor([i for i, t in enumerate(before) if t in present], device=rows.device)
            rows, rotary = rows[index.long()], rotary.take(index.long())
        return rows, self._rotary(lane, lane.tokens) if self._is_compact(lane) else rotary

    def _wait(
        self, lane: Lane, layer: int, rows: Tensor, rotary: Rotary, pages: Tensor, seen: Seen | None
    ) -> tuple[Tensor, Rotary]:
        """Store the span's rows, or take all stored rows and decide."""
        depth = lane.depth
        low, high = lane.where(depth.start, depth.stop)
        if not lane.completes and lane.group == 0:
            assert seen is not None, "what a waiting lane needs was watched"
            own = Waiting(*(t[low:high].clone() for t in (rows, *seen)))  # a view would keep the whole batch
            lane.cache.put_aside(own)
            lane.tokens = [t for t in lane.tokens if t < depth.start]
        if not lane.completes:
            lane.group += 1
            n = lane.n_rows  # tokens before every picture: rotated alike in all groups
            return rows[:n], Rotary(rotary.cos[:n], rotary.sin[:n])
        assert seen is not None, "what a deciding lane needs was watched"
        return self._decide(lane, layer, rows, pages, Waiting(rows[low:high], seen[0][low:high], seen[1][low:high]))

    def _decide(self, lane: Lane, layer: int, rows: Tensor, pages: Tensor, span: Waiting) -> tuple[Tensor, Rotary]:
        depth, sequence = lane.depth, lane.sequence
        low, high = lane.where(depth.start, depth.stop)
        early, late = lane.tokens[:low], lane.tokens[high:]
        if lane.group == 0:
            if lane.cache.waiting is not None:
                span = lane.cache.waiting.joined(span)
            present: Sequence[int] = range(depth.start, depth.stop)
            lane.visual = list(sequence.request.cells)
        else:
            present = lane.members[-1]
        choice = self._choice(lane, layer, present, rows[:low], pages, span)
        lane.group += 1
        kept, lane.visual = members(present, lane.visual, choice)
        place = {token: i for i, token in enumerate(present)}
        inside = span.rows[torch.tensor([place[t] for t in kept], dtype=torch.int64, device=rows.device)]
        if choice.mix is not None and len(choice.keep):
            inside = self._mixed(lane, choice, present, kept, span.rows, inside)
        lane.choices.append(choice)
        lane.members.append(kept)
        lane.tokens = [*early, *kept, *late]
        lane.enter_group()
        if lane.group == len(depth.groups) - 1:
            self._settle(lane)
        return torch.cat([rows[:low], inside, rows[high:]]), self._rotary(lane, lane.tokens)

    def _choice(
        self, lane: Lane, layer: int, present: Sequence[int], early: Tensor, pages: Tensor, span: Waiting
    ) -> Kept:
        """Visual tokens kept at the point: a stored decision, none if the counts are 0, or the method's choice."""
        depth = lane.depth
        if depth.decision is not None:
            return depth.decision.kept[lane.group]
        pruner, counts = depth.pruner, depth.groups[lane.group + 1].counts
        assert pruner is not None, "several groups come of a method"
        if sum(counts) == 0:
            return Kept(torch.zeros(0, dtype=torch.int64))
        choice = pruner.select(self._probe(lane, layer, present, early, pages, span), counts)
        assert len(choice.keep) == sum(counts), "a method keeps what was announced"
        return Kept(choice.keep.cpu(), choice.mix)

    def _mixed(
        self, lane: Lane, choice: Kept, present: Sequence[int], kept: Sequence[int], rows: Tensor, inside: Tensor
    ) -> Tensor:
        """The kept rows with those of visual tokens mixed."""
        assert choice.mix is not None, "only then"
        is_visual = lane.sequence.request.cells
        sources = torch.tensor([i for i, t in enumerate(present) if t in is_visual], device=rows.device)
        targets = torch.tensor([i for i, t in enumerate(kept) if t in is_visual], device=rows.device)
        mixed = choice.mix.to(rows.device) @ rows[sources].float()
        return inside.index_copy(0, targets, mixed.to(inside.dtype))

    def _settle(self, lane: Lane) -> None:
        """All points are decided: keep it for every choice, and for later."""
        lane.cache.take_up()
        depth = lane.depth
        if depth.decision is None:
            key = sha256(depth.key)
            for tokens in lane.members:
                key.update(repr(tokens).encode())
            depth.decision = Decision(tuple(lane.choices), tuple(lane.members), key.digest())

    def _probe(
        self, lane: Lane, layer: int, present: Sequence[int], early: Tensor, pages: Tensor, span: Waiting
    ) -> Probe:
        request = lane.sequence.request
        place = {token: i for i, token in enumerate(present)}
        told = [(place[t], *request.cells[t]) for t in lane.visual]
        visual, picture, cell = torch.tensor(told, device=span.rows.device).T
        cos, sin = self._rotary(lane, present)
        views: dict[Which, View] = {}

        def view(which: Which) -> View:
            if which not in views:
                q, k, lse = span.q, self._before(lane, layer, pages, len(present)), span.lse
                if which == "this":
                    q, k = self._this(lane, layer, early, pages, span.rows, Rotary(cos, sin))
                kept_lse = lse if which == "before" else None
                views[which] = View(q, k, cos, sin, self._model.spec.head_dim**-0.5, kept_lse)
            return views[which]

        def inputs() -> Tensor:
            whole = self._embed([Chunk(lane.sequence, lane.depth.start, lane.depth.stop)])
            return whole[torch.tensor([t - lane.depth.start for t in present])]

        return Probe(
            layer=layer,
            n_layers=self._kv.n_layers,
            rows=span.rows,
            visual=visual,
            picture=picture,
            cell=cell,
            grids=[picture.grid for picture in request.pictures],
            entered=lane.depth.groups[0].counts,
            seed=int.from_bytes(request.runs[0].key[:8]) & (2**63 - 1),
            views=view,
            inputs=inputs,
        )

    def _before(self, lane: Lane, layer: int, pages: Tensor, n: int) -> Tensor:
        """Keys of the layer before: tokens before the span, then the span's `n` present tokens."""
        return self._kv.keys_of(pages[layer - 1], lane.cache.first_slot(lane.group, lane.depth.start) + n)

    def _this(
        self, lane: Lane, layer: int, early: Tensor, pages: Tensor, rows: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        """Queries of the span's rows, and keys of earlier tokens and the span, before the layer runs."""
        q, k = self._model.project(layer, rows, rotary)
        n_cached = lane.cache.first_slot(lane.group + 1, min(lane.chunk.start, lane.depth.start))
        cached = self._kv.keys_of(pages[layer], n_cached)
        parts = [cached.to(k.dtype)]
        if len(early):
            parts.append(self._model.project(layer, early, self._rotary(lane, lane.tokens[: len(early)]))[1])
        return q, torch.cat([*parts, k])

    def _is_compact(self, lane: Lane) -> bool:
        pruner = lane.depth.pruner
        return pruner is not None and pruner.compact and self._model.spec.n_pos_axes == 1

    def _rotary(self, lane: Lane, tokens: Sequence[int]) -> Rotary:
        """Rotary values of tokens in the lane's group."""
        sequence, depth = lane.sequence, lane.depth
        if not tokens:
            some = self._model.rotary(torch.zeros(self._model.spec.n_pos_axes, 1, dtype=torch.int64))
            return Rotary(some.cos[:0], some.sin[:0])
        if lane.group and self._is_compact(lane):
            first = min(tokens[0], depth.start) if lane.waits else depth.count(lane.group, tokens[0])
            branches = lane.chunk.ancestors is not None
            positions = first + torch.tensor(lane.chunk.offsets if branches else range(len(tokens)))[None]
        else:
            positions = sequence.positions_of(tokens)
        return self._model.rotary(positions.to(self._model.device))
