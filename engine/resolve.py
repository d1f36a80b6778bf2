"""From the message `Generate` to a `Request`: every count and every check that needs no tensor of the model.

All of a request's own mistakes end here, before it holds anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import msgspec
import torch

from foveate.configs.errors import ConfigError
from foveate.engine.cache.groups import LayerGroup
from foveate.engine.cache.prefix import decision_key, image_key, root_key
from foveate.engine.common import (
    PIXELS,
    BudgetError,
    Generate,
    Grid,
    Image,
    ImageError,
    ImageUsage,
    RequestError,
    SamplingParams,
    Signal,
    TooLongError,
    Tower,
    VisualBudget,
    VisualUsage,
    saliency,
)
from foveate.engine.geometry.base import Geometry, ModelSpec
from foveate.engine.methods import build, build_pruner, build_split
from foveate.engine.prune.depth import Depth, plan
from foveate.engine.reduce.base import Part, Reducer, Split
from foveate.engine.reduce.budget import split
from foveate.engine.reduce.cut import Offer, plan_all
from foveate.engine.request import Picture, Request, lay_out

POSITION_SCHEME = "keep"  # original positions survive reduction
_ANSWER_TOKENS = 256  # `auto` compresses pictures until so many are free for the answer, if the request wants so many
_LEAST_SHARE = 0.25  # of what the text leaves: pictures are compressed below this share only to fit at all


@dataclass(frozen=True, slots=True)
class Room:
    """How long a sequence may get, prompt and answer together."""

    context: int  # tokens, by the model or model.max_context
    pool: int  # tokens, by the KV pool when it serves this sequence alone

    @property
    def n_tokens(self) -> int:
        return min(self.context, self.pool)


def resolve(generate: Generate, geometry: Geometry, dtype: str, room: Room) -> Request:
    """Check a request and fix its budget.

    Args:
        dtype: of the stored keys and values.

    Raises:
        RequestError: a count, an id or a setting is wrong; one of its subclasses for budget, length and pictures.
    """
    spec = geometry.spec
    _check(generate, spec)
    pictures = _pictures(generate, geometry)
    n_text = len(generate.prompt_ids) - len(pictures)
    way = _split(generate.visual.split)
    budgets = _budgets(generate, pictures, way, room.n_tokens - n_text - 1)  # one token to answer with
    reducer = _reducer(generate) if pictures else None
    if reducer is not None:
        _plan(generate, reducer, geometry, pictures, budgets)
    _check_length(n_text, pictures, room)
    keys = [_rows_key(generate, reducer, picture) for picture in pictures]
    layout = lay_out(generate.prompt_ids, geometry, pictures, keys)
    root = _root_key(generate, dtype)
    depth = _depth(generate, pictures, layout.token_ids, sum(budgets), root, spec.n_layers)
    return Request(
        id=generate.id,
        sampling=_sampling(generate.sampling, room.n_tokens - len(layout.token_ids)),
        stop_ids=_stop_ids(generate.sampling, spec),
        n_choices=generate.n,
        prompt_ids=layout.token_ids,
        pictures=pictures,
        positions=layout.positions,
        next_pos=layout.next_pos,
        root_key=root,
        visual=_usage(generate, pictures, depth),
        signals=_signals(reducer, pictures, way, spec.tower) if reducer else frozenset(),
        depth=depth,
        split=way,
        question_ids=generate.question_ids,
        explains=generate.explain == "kept_map",
    )


def _stop_ids(sampling: SamplingParams, spec: ModelSpec) -> frozenset[int]:
    return frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else spec.eos_ids)


def _check(generate: Generate, spec: ModelSpec) -> None:
    ids, sampling = generate.prompt_ids, generate.sampling
    if not ids:
        raise RequestError("the prompt is empty; send at least one token", "messages")
    if min(ids) < 0 or max(ids) >= spec.vocab_size:
        bad = next(i for i in ids if not 0 <= i < spec.vocab_size)
        raise RequestError(f"token {bad} is not in the vocabulary of {spec.vocab_size} tokens", "messages")
    n_places = ids.count(spec.image_token_id)
    if n_places != len(generate.images):
        raise RequestError(
            f"{n_places} image placeholders in the prompt for {len(generate.images)} images; "
            "send images as image_url parts and never type the placeholder as text",
            "messages",
        )
    if generate.n < 1:
        raise RequestError(f"n: {generate.n} choices; ask for at least 1", "n")
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise RequestError(f"max_tokens: {sampling.max_tokens}; ask for at least 1", "max_tokens")
    for param, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        for token in tokens:
            if not 0 <= token < spec.vocab_size:
                raise RequestError(
                    f"{param}: token {token} is not in the vocabulary of {spec.vocab_size} tokens", param
                )


def _check_image(image: Image) -> None:
    if image.height < 1 or image.width < 1 or len(image.pixels) != image.height * image.width * 3:
        raise ImageError(
            f"a picture of {image.height} x {image.width} has {len(image.pixels)} bytes, "
            f"not {max(image.height, 0) * max(image.width, 0) * 3} of RGB",
            "messages",
        )


def _pictures(generate: Generate, geometry: Geometry) -> list[Picture]:
    """The images of a request, checked, with their grids."""
    for image in generate.images:
        _check_image(image)
    return [
        Picture(
            image=image,
            grid=geometry.grid(image.height, image.width, image.original),
            n_patches=geometry.n_patches(image.height, image.width),
            salt=generate.salt,
        )
        for image in generate.images
    ]


def _budgets(generate: Generate, pictures: Sequence[Picture], way: Split, left: int) -> list[int]:
    """Visual tokens each picture may have.

    Args:
        left: tokens that the text and one token of the answer leave. What leaves too little room for the answer is
            compressed, if the request allows it.
    """
    grids = [picture.grid for picture in pictures]
    caps = [_cap(picture.image, picture.grid) for picture in pictures]
    weights = _weights(way, pictures)
    budgets = split(generate.visual, grids, caps, None, weights)
    compresses = generate.visual.fit and generate.visual.method != "none"
    room = _visual_room(generate, left) if compresses else left
    if sum(budgets) > room:
        budgets = split(generate.visual, grids, caps, room, weights)
    return budgets


def _cap(image: Image, grid: Grid) -> int | None:
    """The most visual tokens this image alone may keep: its own count or share, whichever is less."""
    share = None if image.ratio is None else max(1, int(image.ratio * grid.n_tokens + 0.5))
    stated = [cap for cap in (image.tokens, share) if cap is not None]
    return min(stated, default=None)


def _visual_room(generate: Generate, left: int) -> int:
    """Visual tokens beside an answer of useful length. Where the text leaves little, pictures and answer share it."""
    sampling = generate.sampling
    answer = min(sampling.max_tokens or _ANSWER_TOKENS, _ANSWER_TOKENS)
    room = max(left - answer + 1, int((left + 1) * _LEAST_SHARE))
    room = min(room, left - sampling.min_tokens + 1)
    return max(room, min(left, max(generate.visual.floor, len(generate.images))))


def _reducer(generate: Generate) -> Reducer:
    try:
        return build(generate.visual)
    except (ConfigError, TypeError) as error:
        raise BudgetError(f"vlm.visual.method: {error}", "vlm.visual.method") from error


def _split(name: str) -> Split:
    try:
        return build_split(name)
    except ConfigError as error:
        raise BudgetError(f"vlm.visual.split: {error}", "vlm.visual.split") from error


def _weights(way: Split, pictures: Sequence[Picture]) -> list[int]:
    """Weight of each image in a shared budget."""
    cpu = torch.device("cpu")
    wants = way.needs_pixels and len(pictures) > 1
    parts = [
        Part(n_tokens=picture.grid.n_tokens, pixels=picture.pixels(cpu) if wants else None) for picture in pictures
    ]
    return way.weights(parts) if len(parts) > 1 else [part.n_tokens for part in parts]


def _plan(
    generate: Generate, reducer: Reducer, geometry: Geometry, pictures: Sequence[Picture], budgets: Sequence[int]
) -> None:
    """Set each picture's reduction before, inside and after the tower."""
    offers = []
    grids = [picture.grid for picture in pictures]
    for picture, budget in zip(pictures, _entering(generate.visual, grids, budgets), strict=True):
        grid = picture.grid
        can_cut = geometry.can_cut and grid == Grid(grid.rows, grid.cols)  # neither tiles nor newlines
        pixels = partial(picture.pixels, torch.device("cpu")) if can_cut else None
        offers.append(Offer(grid, budget, pixels))
    try:
        ways = plan_all(reducer, geometry.spec.tower, offers, generate.visual.floor if generate.visual.fit else None)
    except ConfigError as error:
        raise BudgetError(f"vlm.visual.method: {error}", "vlm.visual.method") from error
    for picture, way in zip(pictures, ways, strict=True):
        picture.budget, picture.n_kept, picture.cut, picture.after = way.budget, way.n_kept, way.cut, way.after


def _entering(visual: VisualBudget, grids: Sequence[Grid], budgets: Sequence[int]) -> list[int]:
    """Visual tokens of each image that the reducers may keep.

    With a pruner, the budget is the mean number of tokens in a decoder layer. Then all tokens enter if there is no
    reducer, or the share `visual.enter` if set.
    """
    if visual.prune is not None and visual.method == "none":
        return [grid.n_tokens for grid in grids]
    if visual.enter is not None:
        return [max(b, round(visual.enter * grid.n_tokens)) for b, grid in zip(budgets, grids, strict=True)]
    return list(budgets)


def _depth(
    generate: Generate, pictures: Sequence[Picture], prompt_ids: Sequence[int], allowed: int, root: bytes, n_layers: int
) -> Depth:
    """Layer groups with visual token counts. The pruner chooses the tokens later, when the decoder runs."""
    newlines = [picture.is_whole * (picture.grid.n_tokens - picture.grid.bare.n_tokens) for picture in pictures]
    entered = [picture.n_kept - n for picture, n in zip(pictures, newlines, strict=True)]
    runs = [run for picture in pictures for run in picture.runs]
    flat = Depth(groups=(LayerGroup(range(n_layers), tuple(entered)),), n_newlines=sum(newlines))
    if generate.visual.prune is None or not runs:
        return flat
    try:
        pruner = build_pruner(generate.visual.prune)
        groups = plan(pruner, entered, max(1, allowed - sum(newlines)), n_layers)
    except ConfigError as error:
        raise BudgetError(f"vlm.visual.method: {error}", "vlm.visual.method") from error
    if len(groups) == 1:
        return flat
    stop = len(prompt_ids) if pruner.question_aware else runs[-1].stop
    return Depth(
        groups=groups,
        pruner=pruner,
        start=runs[0].start,
        stop=stop,
        visual_stop=runs[-1].stop,
        n_newlines=sum(newlines),
        key=decision_key(root, prompt_ids[:stop], runs, f"{pruner!r} {groups!r}"),
    )


def _signals(reducer: Reducer, pictures: Sequence[Picture], way: Split, tower: Tower) -> frozenset[Signal]:
    """Signals to record for a request, besides the signals that cuts inside the tower read."""
    wanted: frozenset[Signal] = frozenset()
    if any(len(picture.grid.tiles) > 1 for picture in pictures):
        wanted |= {PIXELS} if way.needs_pixels else frozenset()
        wanted |= {tower.resolve(saliency())} if way.needs_attention else frozenset()
    try:
        reducer.wanted(tower)  # refuses what the tower cannot give
        return wanted.union(*(p.after.wanted(tower) for p in pictures if p.after is not None))
    except ConfigError as error:
        raise BudgetError(f"vlm.visual.method: {error}", "vlm.visual.method") from error


def _rows_key(generate: Generate, reducer: Reducer | None, picture: Picture) -> bytes:
    """Key of an image's kept rows."""
    if picture.is_whole:
        return image_key(picture.image.digest, "none", picture.n_kept)
    method = f"{generate.visual.method} {reducer!r}"
    if len(picture.grid.tiles) > 1 or generate.visual.stages:  # equal counts may come of unequal shares or steps
        method += f" {generate.visual.split} {picture.budget}"
    if reducer and reducer.reads_question():  # then only a request with the same question may share them
        method += f" {generate.question_ids} {picture.image.caption_ids}"
    return image_key(picture.image.digest, method, picture.n_kept)


def _root_key(generate: Generate, dtype: str) -> bytes:
    """A request that explains shares with none, so that its pictures are always reduced and their maps known."""
    own = b"explains " + generate.id.encode() if generate.explain else b""
    salts = (generate.salt, generate.prefix_salt, own)
    return root_key(b"".join(sha256(salt).digest() for salt in salts), POSITION_SCHEME, dtype)


def _check_length(n_text: int, pictures: Sequence[Picture], room: Room) -> None:
    n_visual, n_offered = sum(picture.n_kept for picture in pictures), sum(p.grid.n_tokens for p in pictures)
    total = n_text + n_visual + 1
    if total > room.n_tokens:
        prompt = f"{n_text} text tokens"
        if n_offered:
            prompt += f" + {n_visual} visual tokens (of {n_offered} offered)"
        if room.context <= room.pool:
            limit = f"the context of {room.context}; shorten the prompt"
        else:
            limit = f"the KV pool of {room.pool}; shorten the prompt or raise cache.memory_mb"
        if n_offered:
            limit += " or lower vlm.visual.tokens"
        raise TooLongError(f"{prompt} + 1 to answer = {total} tokens, more than {limit}", "messages")


def _sampling(sampling: SamplingParams, left: int) -> SamplingParams:
    """The answer may use what the prompt leaves, and no more. `max_tokens` is an upper bound; `min_tokens` is not."""
    if sampling.min_tokens > left:
        raise TooLongError(
            f"min_tokens: {sampling.min_tokens} is more than the {left} tokens that the prompt leaves in the context; "
            "lower min_tokens or shorten the prompt",
            "min_tokens",
        )
    max_tokens = left if sampling.max_tokens is None else min(sampling.max_tokens, left)
    return msgspec.structs.replace(sampling, max_tokens=max_tokens)


def _usage(generate: Generate, pictures: Sequence[Picture], depth: Depth) -> VisualUsage:
    offered, kept = sum(p.grid.n_tokens for p in pictures), sum(p.n_kept for p in pictures)
    return VisualUsage(
        offered=offered,
        kept=kept,
        mean=depth.mean(),
        layers=[]
        if depth.is_flat
        else [(g.layers.start, n) for g, n in zip(depth.groups, depth.visual(), strict=True)],
        method="none" if depth.is_flat and kept == offered else generate.visual.label,
        per_image=[
            ImageUsage(offered=p.grid.n_tokens, kept=p.n_kept, rows=p.grid.rows, cols=p.grid.cols) for p in pictures
        ],
    )
