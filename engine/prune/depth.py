"""How deep the tokens of a prompt go: layer groups, the tokens of each group, and the decisions at pruning points.

Counts follow from geometry and budget before anything runs. A method chooses the visual tokens once the tokens of the
*span*, from the first visual token to where the method has seen enough, have passed the layers before the first point.
Until then the tokens of the span wait there. Tokens before the span are in every group, and so is all text.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from foveate.engine.cache.groups import LayerGroup
from foveate.engine.prune.base import Kept, Pruner
from foveate.engine.prune.schedule import kept, mean_share, scaled


@dataclass(frozen=True, slots=True)
class Decision:
    """The choice at each point: stored, so that a prompt that is computed again keeps the same tokens."""

    kept: tuple[Kept, ...]  # by point, numbered among the visual tokens before the point
    members: tuple[list[int], ...]  # by point: tokens of the span that the group behind the point holds, increasing
    key: bytes  # of the members and of the inputs of the choice

    @property
    def mixes(self) -> bool:
        """Whether kept rows took in dropped rows; to repeat that takes all rows of the span together."""
        return any(kept.mix is not None for kept in self.kept)


@dataclass(eq=False, kw_only=True)
class Depth:
    """The layer groups of one request, a `TokenMap` of the cache. The first group holds every token."""

    groups: tuple[LayerGroup, ...] = (LayerGroup(range(1)),)
    pruner: Pruner | None = None  # of several groups
    start: int = 0  # the span: tokens [start, stop) of the prompt
    stop: int = 0
    visual_stop: int = 0  # end of the last visual token's run
    n_newlines: int = 0  # of pictures in tiles that entered whole: in every group, and counted in none
    key: bytes = b""  # what a decision depends on: the prompt up to `stop`, the method and its points
    decision: Decision | None = None

    @property
    def n_layers(self) -> int:
        return self.groups[-1].layers.stop

    @property
    def is_flat(self) -> bool:
        return len(self.groups) == 1

    def count(self, group: int, n: int) -> int:
        """Tokens that a group holds of the first `n`; inside an undecided span, only tokens before the span."""
        if group == 0 or n <= self.start:
            return n
        if n >= self.stop:
            return n - self.groups[group].dropped
        if self.decision is None:
            return self.start
        return self.start + bisect_left(self.decision.members[group - 1], n)

    def tokens(self, group: int, start: int, stop: int) -> list[int]:
        """Tokens of [start, stop) that a group holds, increasing; of an undecided span, none."""
        if group == 0:
            return list(range(start, stop))
        inside = [] if self.decision is None else self.decision.members[group - 1]
        chosen = inside[bisect_left(inside, start) : bisect_left(inside, stop)]
        return [*range(start, min(stop, self.start)), *chosen, *range(max(start, self.stop), stop)]

    def n_known(self, group: int, n: int) -> int:
        """Tokens that a group holds of the first `n`, as far as they are decided."""
        return min(n, self.start) if group and self.decision is None else self.count(group, n)

    def block(self, group: int, token_ids: list[int], first: int, stop: int) -> tuple[list[int], bytes]:
        """Ids of the tokens [first, stop) of a group, and the bytes on which their choice depends.

        Visual tokens of a deeper group have no ids of their own there: the decision names them.
        """
        if group == 0:
            return token_ids[first:stop], b""
        shift = self.groups[group].dropped
        ids = token_ids[first : min(stop, self.start)]
        ids += token_ids[max(first + shift, self.stop) : max(stop + shift, self.stop)]
        return ids, self.decision.key if self.decision is not None and stop > self.start else b""

    def reach(self, group: int, n: int) -> int:
        """Largest sequence length whose tokens in this group fit into the first `n` tokens of the group."""
        if group == 0 or n < self.start:
            return n
        inside = self.stop - self.start - self.groups[group].dropped  # of the span
        if n >= self.start + inside:
            return n + self.groups[group].dropped
        return self.start if self.decision is None else self.decision.members[group - 1][n - self.start]

    def mean(self) -> float:
        """Visual tokens in a layer of the decoder, newlines among them, on average."""
        return sum(n * len(group.layers) for n, group in zip(self.visual(), self.groups, strict=True)) / self.n_layers

    def visual(self) -> list[int]:
        """Visual tokens in each group, newlines among them."""
        return [sum(group.counts) + self.n_newlines for group in self.groups]

    def waits(self, n: int) -> bool:
        """Whether tokens computed from n on wait at the first point until the span is complete."""
        if self.is_flat or n >= self.stop:
            return False
        return self.decision is None or (self.decision.mixes and n < self.visual_stop)

    def resume(self, n: int) -> int:
        """Where to go on when the first n tokens need not be computed: not inside a span that waits."""
        return self.start if n > self.start and self.waits(n) else n


class Decisions:
    """Recent decisions by prompt key: an equal prompt finds its deeper blocks. Evicts the least recently used."""

    def __init__(self, capacity: int = 1024) -> None:
        self._capacity = capacity
        self._known: OrderedDict[bytes, Decision] = OrderedDict()

    def recall(self, depth: Depth) -> None:
        """Set a new request's decision to the stored decision of an equal prompt, if there is one."""
        if depth.key in self._known:
            self._known.move_to_end(depth.key)
            depth.decision = self._known[depth.key]

    def keep(self, depth: Depth) -> None:
        """Remember a decision, if there is one."""
        if depth.decision is not None and depth.key not in self._known:
            self._known[depth.key] = depth.decision
            if len(self._known) > self._capacity:
                self._known.popitem(last=False)


def plan(pruner: Pruner, entered: Sequence[int], allowed: int, n_layers: int) -> tuple[LayerGroup, ...]:
    """The layer groups of a prompt, from what enters the decoder and what a layer may hold on average.

    Args:
        entered: visual tokens per picture.
        allowed: visual tokens in a layer, on average; the method's own schedule is scaled down to that where it holds
            more, and stays where it does not.

    Raises:
        ConfigError: the method's fields do not fit this depth, or no scale is small enough.
    """
    points, n = pruner.points(n_layers), sum(entered)
    if allowed < n and mean_share(points, n_layers) * n > allowed:
        points = scaled(points, n_layers, allowed / n)
    starts, counts = [0], [tuple(entered)]
    for point in points:
        left = tuple(kept(k, point.share) for k in entered)
        if left != counts[-1]:
            starts.append(point.layer)
            counts.append(left)
    layers = [range(start, end) for start, end in pairwise([*starts, n_layers])]
    return tuple(LayerGroup(own, left, n - sum(left)) for own, left in zip(layers, counts, strict=True))


def members(span: Sequence[int], visual: Sequence[int], kept: Kept) -> tuple[list[int], list[int]]:
    """Tokens of a span that remain behind a point, and the visual tokens among them."""
    chosen = [visual[i] for i in kept.keep.tolist()]
    gone = set(visual) - set(chosen)
    return [token for token in span if token not in gone], chosen
