"""The rules of a method's settings and of a composition's stages, over descriptions of methods.

The server refuses a wrong method by these rules when it reads a request, the engine when it builds one; each says so in
its own words. Imports no torch.
"""

import math
from typing import Literal

from foveate.engine.common.messages import FieldInfo, MethodInfo

Value = bool | int | float | str
STAGES = ("pixels", "encoder", "tokens", "decoder")  # in the order in which a picture passes them
Misplaced = Literal["order", "decoder", "grid", "left"]


def setting(field: FieldInfo, value: Value) -> Value | None:
    """The value as the field holds it: an int is a fine float, a bool is no number.

    Returns:
        None: the value is of another type, is not one of the legal words, or is no finite number.
    """
    if field.type == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    is_legal = f'"{value}"' in field.type.split(" | ") if '"' in field.type else type(value).__name__ == field.type
    return value if is_legal else None


def is_share(value: Value) -> bool:
    """Whether a stage may keep this share of its tokens: a number above 0 and up to 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def states_share(index: int, n_stages: int) -> bool:
    """Whether a stage may state a share: every one but the last, which keeps what the budget allows."""
    return index < n_stages - 1


def misplaced(before: MethodInfo, after: MethodInfo) -> Misplaced | None:
    """Why one method cannot follow another in a composition; None: it can.

    Returns:
        "order": it acts on an earlier stage of a picture's way.
        "decoder": both act inside the decoder.
        "grid": it needs the whole grid, and a method of its own stage stands before it.
        "left": it needs the whole grid, of which the stage before leaves a part.
    """
    if STAGES.index(after.stage) < STAGES.index(before.stage):
        return "order"
    if before.stage == "decoder":
        return "decoder"
    if after.first_only and after.stage == before.stage:
        return "grid"
    return "left" if after.first_only and not before.restores else None
