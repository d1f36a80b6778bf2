"""A request and its pictures, as the engine holds them: what all its choices share.

A *token* is a unit of the sequence the language model reads, a *position* is what it is rotated by, and neither is
derived from the other: after reduction they differ.
"""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import chain, groupby, islice, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.engine.cache.prefix import ImageRun
from foveate.engine.common import Grid, Image, SamplingParams, Signal, VisualUsage
from foveate.engine.geometry.base import Geometry, Positions
from foveate.engine.prune.depth import Depth
from foveate.engine.reduce.base import AREA, Reducer, Split
from foveate.engine.vision import TowerCut

if TYPE_CHECKING:
    from foveate.engine.sequence import Sequence

# [n_kept, hidden_size] of a picture, by the decoder layer they enter: 0 reads them in place of embeddings, a deeper one
# adds them to its input.
LayerRows = Mapping[int, Tensor]


@dataclass(eq=False, kw_only=True)
class Picture:
    """One image of a request, from its grid to its rows.

    `resolve` fills the first three groups of fields, in this order, and nothing changes them afterwards. The encode
    stage fills the last group through `Request.place`. Rows come and go: each time a choice needs them anew, the stage
    gives the same ones.

    Kept tokens stand in one or more runs of the prompt, as the frames of a video do, with text between them. Kept token
    k of the picture is row k of `rows` and `anchors`: those of the first run, then those of the second, and so on.
    """

    # By geometry.
    image: Image
    grid: Grid
    n_patches: int  # rows the tower has for it
    salt: bytes = b""  # of the tenant, whose requests alone share its features

    # By the budget and the method.
    budget: int = 0  # visual tokens allowed
    n_kept: int = 0  # visual tokens it will have
    cut: TowerCut | None = None  # what the tower leaves out
    after: Reducer | None = None  # what reduces the rows it gives; None: nothing

    # By the layout of the prompt.
    runs: tuple[ImageRun, ...] = ()  # ascending, n_kept tokens in all
    positions: Tensor = field(default_factory=lambda: torch.zeros(1, 0).long())  # [n_pos_axes, grid.n_tokens], unpruned

    # By the encode stage.
    rows: LayerRows | None = None  # while some choice needs them
    # [n_kept] int64: the offered token whose place each kept one has; empty until it is reduced for the first time.
    anchors: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @cached_property
    def key(self) -> bytes:
        """Key of the features: pictures with equal keys have equal features and belong to one tenant."""
        cut = b"" if self.cut is None else self.cut.key
        return sha256(sha256(self.salt).digest() + self.image.digest + cut).digest()

    @property
    def n_read(self) -> int:
        """Rows the tower reads of it."""
        if self.cut is None or self.cut.cells is None:
            return self.n_patches
        return self.n_patches * len(self.cut.cells) // self.grid.n_tokens

    @property
    def is_whole(self) -> bool:
        return self.n_kept == self.grid.n_tokens

    @property
    def stop(self) -> int:
        """The first token of the prompt after all of its own."""
        return self.runs[-1].stop

    def pixels(self, device: torch.device) -> Tensor:
        """[height, width, 3] uint8, as prepared."""
        flat = torch.frombuffer(bytearray(self.image.pixels), dtype=torch.uint8)  # a copy: bytes are not writable
        return flat.view(self.image.height, self.image.width, 3).to(device)

    def tokens(self) -> Iterator[int]:
        """Its tokens of the prompt, in order."""
        return chain.from_iterable(range(run.start, run.stop) for run in self.runs)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The picture's tokens in [start, stop) of the prompt, by run: first token and slice of rows."""
        for run in self.runs:
            first, end = max(run.start, start), min(run.stop, stop)
            if first < end:
                row = run.first_row + first - run.start
                yield first, slice(row, row + end - first)


@dataclass(eq=False, kw_only=True)
class Request:
    """What the choices of one request share. Made by `resolve`; visual positions by the encode stage."""

    id: str
    sampling: SamplingParams  # max_tokens resolved
    stop_ids: frozenset[int]  # tokens that end a choice
    n_choices: int
    prompt_ids: list[int]  # expanded: each image's placeholder repeated as often as tokens are kept
    pictures: list[Picture]  # in the order of their runs, which do not interleave
    positions: Tensor  # [n_pos_axes, n_prompt] int64; of visual tokens -1 until their image is reduced
    next_pos: int  # of the first generated token, on every axis
    root_key: bytes  # parent of the first block's key
    visual: VisualUsage
    signals: frozenset[Signal] = frozenset()  # what the reducer reads, resolved
    depth: Depth = field(default_factory=Depth)  # which of its tokens reach which layer
    split: Split = AREA  # how a tiled picture's budget is shared among its tiles
    question_ids: list[int] = field(default_factory=list)  # what the user asks, for a reducer that reads it
    explains: bool = False  # whether the answer says which tokens survived

    sequences: list["Sequence"] = field(default_factory=list)
    arrived: float = 0.0  # monotonic seconds, when added
    encode_s: float = 0.0  # of the tower's batches that its pictures were in
    reduce_s: float = 0.0  # of the reduction of its pictures
    encoder_hits: int = 0  # pictures whose features were in the cache when first asked for

    def __post_init__(self) -> None:
        assert len(self.prompt_ids) == self.positions.shape[1], "every prompt token has a position"
        assert all(a.stop <= b.start for a, b in pairwise(self.runs)), "runs ascend, picture after picture"

    @cached_property
    def runs(self) -> tuple[ImageRun, ...]:
        """Runs of all pictures, ascending."""
        return tuple(run for picture in self.pictures for run in picture.runs)

    @cached_property
    def cells(self) -> dict[int, tuple[int, int]]:
        """Visual token -> (picture, place among the offered tokens), in order; newlines are text.

        Asked for once all pictures are reduced.
        """
        found: dict[int, tuple[int, int]] = {}
        for i, picture in enumerate(self.pictures):
            of_pixels = set(picture.grid.tokens())
            for token, offered in zip(picture.tokens(), picture.anchors.tolist(), strict=True):
                if offered in of_pixels:
                    found[token] = (i, offered)
        return found

    def is_reduced(self, i: int) -> bool:
        """Whether picture `i` was reduced once; its positions stay, its rows may have gone since."""
        return int(self.positions[0, self.pictures[i].runs[0].start]) >= 0

    def place(self, i: int, rows: LayerRows, anchor: Tensor) -> None:
        """Take the reduced rows of picture `i`; each visual token gets the unpruned position of its anchor."""
        picture = self.pictures[i]
        n_rows = {anchor.shape[0], *(own.shape[0] for own in rows.values())}
        assert n_rows == {picture.n_kept}, "a reducer keeps what it announced"
        picture.rows, picture.anchors = rows, anchor.cpu()
        for first, own in picture.within(0, len(self.prompt_ids)):
            at = picture.positions[:, picture.anchors[own]]
            self.positions[:, first : first + at.shape[1]] = at

    def drop_rows(self) -> None:
        """Let go of the rows that every choice has computed past; a preempted one asks for them again."""
        depth = self.depth
        if depth.pruner is not None and depth.pruner.reads_inputs and depth.decision is None:
            return  # they are looked at again when it is decided
        for picture in self.pictures:
            if picture.rows is None:
                continue
            # What waits before a pruning point has yet to pass the deeper layers that rows enter.
            stop = max(picture.stop, depth.stop) if len(picture.rows) > 1 else picture.stop
            if all(s.n_computed >= stop or s.is_finished for s in self.sequences):
                picture.rows = None

    def added(self, layer: int, tokens: Many[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """What visual rows add to the input of a deeper layer, picture by picture.

        Args:
            tokens: of the sequence, those that are present.

        Yields:
            [m] int64, places among the tokens, and [m, hidden_size] to be added there.
        """
        place = {token: i for i, token in enumerate(tokens)}
        for picture in self.pictures:
            found = [(place[token], row) for row, token in enumerate(picture.tokens()) if token in place]
            if found:
                assert picture.rows is not None, "rows stay until every layer they enter has run"
                own = picture.rows[layer]
                at, row = torch.tensor(found, device=own.device).T
                yield at, own[row]


@dataclass(frozen=True, slots=True)
class Layout:
    """A pruned prompt."""

    token_ids: list[int]  # each image's placeholder repeated as often as it keeps tokens
    positions: Tensor  # [n_pos_axes, n_prompt] int64: text keeps its own, visual tokens (-1 here) get theirs later
    next_pos: int  # of the token that follows


def lay_out(ids: list[int], geometry: Geometry, pictures: Many[Picture], keys: Many[bytes]) -> Layout:
    """Lay a prompt out, and tell each picture where its tokens are: its `runs` and unpruned `positions`.

    Args:
        ids: with one placeholder per picture.
        keys: of each picture, what its kept rows depend on.
    """
    placeholder = geometry.spec.image_token_id
    segments: list[int | Grid] = []
    token_ids: list[int] = []
    of_pictures = zip(pictures, keys, strict=True)
    for is_visual, group in groupby(ids, placeholder.__eq__):
        tokens = list(group)
        if not is_visual:
            segments.append(len(tokens))
            token_ids += tokens
            continue
        for picture, key in islice(of_pictures, len(tokens)):
            start = len(token_ids)
            picture.runs = (ImageRun(start, start + picture.n_kept, key),)
            segments.append(picture.grid)
            token_ids += [placeholder] * picture.n_kept
    laid_out, next_pos = geometry.lay_out(segments)
    parts: list[Tensor] = []
    following = iter(pictures)
    for segment, positions in zip(segments, laid_out, strict=True):
        at = _tensor(positions)
        if isinstance(segment, Grid):
            picture = next(following)
            picture.positions, at = at, torch.full((len(positions), picture.n_kept), -1)
        parts.append(at)
    return Layout(token_ids, torch.cat(parts, dim=1), next_pos)


def _tensor(positions: Positions) -> Tensor:
    """[n_pos_axes, n] int64: the one place where positions become a tensor."""
    axes = [torch.arange(p.start, p.stop) if isinstance(p, range) else torch.tensor(p) for p in positions]
    return torch.stack(axes)
