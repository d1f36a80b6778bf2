"""How deep the tokens of a prompt go: layer groups, which tokens each holds, and what was decided at its points.

Counts follow from geometry and budget before anything runs; which visual tokens they are is decided once the tokens of
the *span*, from the first visual one to where the method has seen enough, have passed the layers before the first
point. Until then these tokens wait there. Tokens before the span are in every group, and so is all text.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from foveate.engine.prune.base import Kept, Pruner
from foveate.engine.prune.schedule import kept, mean_share, scaled


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Consecutive decoder layers that hold the same tokens of a sequence, hence share a block table."""

    layers: range
    counts: tuple[int, ...] = ()  # visual tokens it holds, per picture
    dropped: int = 0  # visual tokens of the prompt that it lacks


@dataclass(frozen=True, slots=True)
class Decision:
    """What left at each point: stored, so that a prompt that is computed again goes the same way."""

    leaves: tuple[Kept, ...]  # by point, the first one's of all visual tokens
    members: tuple[list[int], ...]  # by point: tokens of the span that the group behind it holds, increasing
    key: bytes  # of the members and of what they were chosen by

    @property
    def mixes(self) -> bool:
        """Whether rows were changed, so that it takes all of them together to repeat it."""
        return any(leaves.mix is not None for leaves in self.leaves)


@dataclass(eq=False, kw_only=True)
class Depth:
    """The layer groups of one request. The first holds every token."""

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
        """Tokens that a group holds of the first n; inside an undecided span, of those before it."""
        if group == 0 or n <= self.start:
            return n
        if n >= self.stop:
            return n - self.groups[group].dropped
        if self.decision is None:
            return self.start
        return self.start + bisect_left(self.decision.members[group - 1], n)

    def reach(self, group: int, n: int) -> int:
        """The most tokens of the sequence of which a group needs no more than its first n."""
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

    def kv_tokens(self, n: int) -> int:
        """Tokens in the cache for the first n, as if every layer held the same: the mean over layers, rounded up."""
        held = sum(self.count(i, n) * len(group.layers) for i, group in enumerate(self.groups))
        return -(-held // self.n_layers)


class Decisions:
    """What was decided for prompts lately, so that the same one finds its deeper blocks; the least recently used go."""

    def __init__(self, capacity: int = 1024) -> None:
        self._capacity = capacity
        self._known: OrderedDict[bytes, Decision] = OrderedDict()

    def recall(self, depth: Depth) -> None:
        """Give a new request the decision made for its like."""
        if depth.key in self._known:
            self._known.move_to_end(depth.key)
            depth.decision = self._known[depth.key]

    def keep(self, depth: Depth) -> None:
        """Remember a decision, if there is one."""
        if depth.decision is not None and depth.key not in self._known:
            self._known[depth.key] = depth.decision
            if len(self._known) > self._capacity:
                self._known.popitem(last=False)


@dataclass(slots=True)
class Waiting:
    """Tokens of a span that wait before the first point, since its start."""

    rows: Tensor  # [n, D] entering the layer of the point
    q: Tensor  # [n, n_heads, d] of the layer before
    lse: Tensor  # [n, n_heads]


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


def members(span: Sequence[int], visual: Sequence[int], leaves: Kept) -> tuple[list[int], list[int]]:
    """Tokens of a span that a point leaves, and the visual ones among them."""
    kept = [visual[i] for i in leaves.keep.tolist()]
    gone = set(visual) - set(kept)
    return [token for token in span if token not in gone], kept
