"""A request and its pictures, as the engine holds them: what all its choices share.

A *token* is a unit of the sequence the language model reads, a *position* is what it is rotated by, and neither is
derived from the other: after reduction they differ.
"""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.engine.cache.prefix import ImageRun
from foveate.engine.common.grid import Grid
from foveate.engine.common.messages import Image, SamplingParams, VisualUsage
from foveate.engine.prune.depth import Depth
from foveate.engine.reduce.base import Reducer
from foveate.engine.reduce.sharing import AREA, Split
from foveate.engine.vision.inputs import TowerCut
from foveate.engine.vision.signals import Signal

if TYPE_CHECKING:
    from foveate.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of a request and what geometry and budget say of it before it is encoded."""

    image: Image
    grid: Grid
    n_patches: int  # rows the tower has for it
    budget: int  # visual tokens allowed
    positions: Tensor  # [n_pos_axes, grid.n_tokens] int64, unpruned
    cut: TowerCut | None = None  # what the tower leaves out
    after: Reducer | None = None  # what reduces the rows it gives; None: nothing

    @cached_property
    def key(self) -> bytes:
        """Under which the features are found: pictures of equal keys have equal ones."""
        digest = self.image.digest
        return digest if self.cut is None else sha256(digest + self.cut.key).digest()

    @property
    def n_read(self) -> int:
        """Rows the tower reads of it."""
        if self.cut is None or self.cut.cells is None:
            return self.n_patches
        return self.n_patches * len(self.cut.cells) // self.grid.n_tokens


@dataclass(eq=False, kw_only=True)
class Request:
    """What the choices of one request share. Made by `resolve`; `rows` and visual positions by the encode stage.

    Half-open runs of tokens: picture i is tokens [runs[i].start, runs[i].stop), as many as it keeps.
    """

    id: str
    sampling: SamplingParams  # max_tokens resolved
    stop_ids: frozenset[int]  # tokens that end a choice
    n_choices: int
    prompt_ids: list[int]  # expanded: each image's placeholder repeated as often as tokens are kept
    pictures: list[Picture]
    runs: list[ImageRun]
    positions: Tensor  # [n_pos_axes, n_prompt] int64; of visual tokens -1 until their image is reduced
    next_pos: int  # of the first generated token, on every axis
    root_key: bytes  # parent of the first block's key
    visual: VisualUsage
    signals: frozenset[Signal] = frozenset()  # what the reducer reads, resolved
    depth: Depth = field(default_factory=Depth)  # which of its tokens reach which layer
    split: Split = AREA  # how a tiled picture's budget is shared among its tiles
    question_ids: list[int] = field(default_factory=list)  # what the user asks, for a reducer that reads it
    explains: bool = False  # whether the answer says which tokens survived

    kept: list[list[int]] = field(init=False)  # tokens of each picture that survived, if it explains
    anchors: list[Tensor] = field(init=False)  # per picture: the offered token whose place each kept one has
    rows: list[Tensor | None] = field(init=False)  # [kept, hidden_size] per picture, while some choice needs them
    sequences: list["Sequence"] = field(default_factory=list)
    arrived: float = 0.0  # monotonic seconds, when added
    encode_s: float = 0.0  # of the tower's batches that its pictures were in
    reduce_s: float = 0.0  # of the reduction of its pictures
    encoder_hits: int = 0  # pictures whose features were in the cache when first asked for

    def __post_init__(self) -> None:
        self.rows = [None] * len(self.pictures)
        self.kept = [[] for _ in self.pictures]
        self.anchors = [torch.zeros(0, dtype=torch.int64) for _ in self.pictures]
        assert len(self.prompt_ids) == self.positions.shape[1], "every prompt token has a position"

    @cached_property
    def cells(self) -> dict[int, tuple[int, int]]:
        """Visual tokens, in order, and of each its picture and its place among those offered; newlines are text."""
        found: dict[int, tuple[int, int]] = {}
        for i, (run, picture) in enumerate(zip(self.runs, self.pictures, strict=True)):
            of_pixels = set(picture.grid.tokens())
            for token, offered in enumerate(self.anchors[i].tolist(), run.start):
                if offered in of_pixels:
                    found[token] = (i, offered)
        return found

    def is_reduced(self, i: int) -> bool:
        """Whether picture `i` was reduced once; its positions stay, its rows may have gone since."""
        return int(self.positions[0, self.runs[i].start]) >= 0

    def place(self, i: int, rows: Tensor, anchor: Tensor) -> None:
        """Take the reduced rows of picture `i`; each visual token gets the unpruned position of its anchor."""
        run = self.runs[i]
        assert rows.shape[0] == anchor.shape[0] == run.stop - run.start, "a reducer keeps what it announced"
        self.rows[i], self.anchors[i] = rows, anchor.cpu()
        if self.explains:
            self.kept[i] = anchor.tolist()
        self.positions[:, run.start : run.stop] = self.pictures[i].positions[:, self.anchors[i]]

    def drop_rows(self) -> None:
        """Let go of the rows that every choice has computed past; a preempted one asks for them again."""
        depth = self.depth
        if depth.pruner is not None and depth.pruner.reads_inputs and depth.decision is None:
            return  # they are looked at again when it is decided
        for i, run in enumerate(self.runs):
            if self.rows[i] is not None and all(s.n_computed >= run.stop or s.is_finished for s in self.sequences):
                self.rows[i] = None
