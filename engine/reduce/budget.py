"""How many visual tokens each image of a request keeps: arithmetic on counts, before anything is encoded."""

from collections.abc import Sequence
from fractions import Fraction

from foveate.engine.common import BudgetError, Grid, TooLongError, VisualBudget


def split(
    visual: VisualBudget,
    grids: Sequence[Grid],
    caps: Sequence[int | None],
    room: int | None,
    weights: Sequence[int] | None = None,
) -> list[int]:
    """Visual tokens of each image.

    The total is the least of `visual.tokens`, the sum of the images' caps (`visual.per_image`, the image's own, what
    it offers) and ratio * offered to the nearest token, halves up; but not below `visual.floor`, itself clamped to
    what is offered. If that exceeds `room`, it is cut down to `room`. Images then share the total in proportion to
    `weights`, each between 1 and its cap, by largest remainder, ties to the earlier image. Largest remainder is
    not quite monotone: one more token in total may cost one image one token (the Alabama paradox), never more.

    Args:
        grids: what each image offers.
        caps: cap of each image alone, None for none.
        room: visual tokens that still fit the context, may be negative; None for no limit.
        weights: of the images, by a way of sharing (`engine/reduce/split`); None: what they offer.

    Raises:
        BudgetError: the budget contradicts itself, or leaves an image without any token.
        TooLongError: the prompt does not fit and may not be compressed enough.
    """
    if not grids:
        return []
    offered = [grid.n_tokens for grid in grids]
    limits = [min(n, visual.per_image or n, cap or n) for n, cap in zip(offered, caps, strict=True)]
    floor = min(visual.floor, sum(offered))
    total = _total(visual, sum(offered), sum(limits), len(grids))
    if room is not None and total > room:
        if not visual.fit or visual.method == "none" or room < max(floor, len(grids)):
            raise TooLongError(_too_long(visual, total, room, floor, len(grids)), "messages")
        total = room
    return apportion(weights or offered, limits, total)


def _total(visual: VisualBudget, offered: int, limit: int, n_images: int) -> int:
    floor = min(visual.floor, offered)
    if visual.tokens is not None and visual.floor > visual.tokens:
        raise BudgetError(
            f"vlm.visual.floor: at least {visual.floor} visual tokens, but vlm.visual.tokens allows {visual.tokens}; "
            "lower the floor or raise the tokens",
            "vlm.visual.floor",
        )
    if floor > limit:
        raise BudgetError(
            f"vlm.visual.floor: at least {floor} visual tokens, but the images' caps sum to {limit}; "
            "lower the floor or raise vlm.visual.per_image",
            "vlm.visual.floor",
        )
    share = int(visual.ratio * offered + 0.5)
    total = max(min(share, limit, offered if visual.tokens is None else visual.tokens), floor)
    if total < n_images:
        param = "vlm.visual.tokens" if total == visual.tokens else "vlm.visual.ratio"
        raise BudgetError(
            f"{param}: {total} visual tokens for {n_images} images leave some with none; "
            f"allow at least {n_images} or send fewer images",
            param,
        )
    if visual.method == "none" and visual.prune is None and total < offered:
        raise BudgetError(
            f"vlm.visual.method: none keeps all {offered} visual tokens, but the budget allows {total}; "
            "choose another method or lift the budget",
            "vlm.visual.method",
        )
    return total


def _too_long(visual: VisualBudget, total: int, room: int, floor: int, n_images: int) -> str:
    if visual.method == "none":
        why = "vlm.visual.method is none"
    elif not visual.fit:
        why = "compression to fit is off"
    elif floor >= n_images:
        why = f"vlm.visual.floor forbids fewer than {floor}"
    else:
        why = f"{n_images} images need at least one each"
    return (
        f"too long by {total - room}: it reads {total} visual tokens, the context has room for "
        f"{max(room, 0)} beside the text and the answer, and {why}; shorten the text, lower max_tokens, "
        "send smaller or fewer images, or allow fewer visual tokens"
    )


def apportion(weights: Sequence[int], caps: Sequence[int], total: int) -> list[int]:
    """Share `total` in proportion to `weights` by largest remainder, each share in [1, its cap].

    Exact: real-valued shares clip(c * weight, 1, cap) that sum to `total` are found first, then rounded down, and what
    is left goes to the largest fractions.
    """
    assert len(weights) <= total <= sum(caps), "the shares' bounds leave room for the total"
    shares = [Fraction(0)] * len(weights)
    free = list(range(len(weights)))
    while free:
        left = total - sum(shares[i] for i in range(len(weights)) if i not in free)
        scale = left / Fraction(sum(weights[i] for i in free))
        wanted = {i: scale * weights[i] for i in free}
        clipped = {i: min(max(share, Fraction(1)), Fraction(caps[i])) for i, share in wanted.items()}
        excess = sum(clipped.values()) - left
        # Settle only one side at a time: shares clipped from above free tokens that may lift the ones from below.
        settled = [i for i in free if excess == 0 or (clipped[i] > wanted[i] if excess > 0 else clipped[i] < wanted[i])]
        for i in settled:
            shares[i] = clipped[i]
        free = [i for i in free if i not in settled]
    floors = [share.numerator // share.denominator for share in shares]
    by_fraction = sorted(range(len(shares)), key=lambda i: (floors[i] - shares[i], i))
    for i in by_fraction[: total - sum(floors)]:
        floors[i] += 1
    return floors
