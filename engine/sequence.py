"""A request and its choices, as the engine holds them.

A *token* is a unit of the sequence the language model reads, a *position* is what it is rotated by, and neither is
derived from the other: after reduction they differ.
"""

from bisect import bisect_left
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from foveate.engine.cache.pool import Block
from foveate.engine.cache.prefix import ImageRun
from foveate.engine.depth import Depth, Waiting
from foveate.engine.grid import Grid
from foveate.engine.messages import Image, SamplingParams, VisualUsage
from foveate.engine.reduce.base import AREA, Reducer
from foveate.engine.reduce.cut import TowerCut
from foveate.engine.reduce.signals import Signal
from foveate.engine.reduce.split.base import Split
from foveate.engine.sampler import Draw


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


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One choice of one request: 0 <= n_computed < n_tokens, and it wants all of its tokens computed."""

    request: Request
    choice: int
    arrival: int  # order of arrival over all sequences

    token_ids: list[int] = field(init=False)  # prompt and output
    draw: Draw = field(init=False)  # of its next token
    n_computed: int = 0  # tokens that were run; the block tables set it on opening
    tables: list[list[Block]] = field(default_factory=list)  # by layer group, while running
    n_shared: list[int] = field(default_factory=list)  # by layer group: its tokens in blocks that others wrote
    block_keys: dict[int, list[bytes]] = field(default_factory=dict)  # by layer group, of full blocks
    pages: Tensor | None = None  # [n_layers, n] int32, of the blocks; the block tables keep these two
    n_paged: dict[int, int] = field(default_factory=dict)  # by layer group: blocks among `pages`
    waiting: Waiting | None = None  # rows before the first point of a prompt that is pruned inside the decoder
    cached_tokens: int = 0  # prompt tokens found in the cache at the first admission
    peak_kv_tokens: int = 0
    n_preemptions: int = 0
    admitted: float | None = None  # monotonic seconds: first in a batch
    answered: float | None = None  # first token
    finish: str | None = None  # "stop", "length", "abort" or "error"

    def __post_init__(self) -> None:
        request = self.request
        self.token_ids = list(request.prompt_ids)
        self.draw = Draw(request.sampling, self.choice, self.token_ids, self.n_prompt, request.stop_ids)

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def n_output(self) -> int:
        return self.n_tokens - self.n_prompt

    @property
    def n_wanted(self) -> int:
        """Tokens that should be computed: all. One missing is what others call decode; nothing else sets it apart."""
        return self.n_tokens

    @property
    def n_missing(self) -> int:
        return self.n_wanted - self.n_computed

    def n_in(self, group: int) -> int:
        """Tokens whose keys and values a layer group holds in the cache."""
        depth = self.request.depth
        return depth.count(group, self.n_computed if self.waiting is None or group == 0 else depth.start)

    def rewind(self) -> None:
        """Hold nothing, as before the first step."""
        self.n_computed, self.tables, self.n_shared = 0, [], []
        self.pages, self.n_paged, self.waiting = None, {}, None

    @property
    def is_finished(self) -> bool:
        return self.finish is not None

    @property
    def must_wait(self) -> bool:
        """A further choice waits for the first one left to compute the prompt, then finds it in the prefix cache."""
        first = next((s for s in self.request.sequences if s.n_output or not s.is_finished), self)
        return first is not self and not first.n_output

    def output_positions(self, start: int, stop: int) -> range:
        """Positions, the same on every axis, of tokens [start, stop) of the answer."""
        shift = self.request.next_pos - self.n_prompt
        return range(start + shift, stop + shift)

    def positions_of(self, tokens: Many[int]) -> Tensor:
        """[n_pos_axes, n] int64 of any tokens, increasing."""
        n_prompt = bisect_left(tokens, self.n_prompt)
        prompt = self.request.positions[:, torch.tensor(tokens[:n_prompt], dtype=torch.int64)]
        shift = self.request.next_pos - self.n_prompt
        output = torch.tensor([token + shift for token in tokens[n_prompt:]], dtype=torch.int64)
        return torch.cat([prompt, output.expand(prompt.shape[0], -1)], dim=1)

    def positions(self, start: int, stop: int) -> Tensor:
        """[n_pos_axes, stop - start] int64 positions of tokens [start, stop); text runs on from `next_pos`."""
        prompt = self.request.positions[:, start:stop]
        first, last = max(start, self.n_prompt), max(stop, self.n_prompt)
        if first == last:
            return prompt
        output = torch.tensor(self.output_positions(first, last))
        return torch.cat([prompt, output.expand(prompt.shape[0], -1)], dim=1)
