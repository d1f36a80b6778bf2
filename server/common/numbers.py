"""Numbers as clients send them: "5", 5.0 and "5.0" where 5 is meant, "25%" where a share is meant.

Each function returns the number, or a value that is none unchanged: the field's own type then refuses that value.
"""

import re

_MAX_CHARS = 40
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def number(value: object) -> object:
    """Turn a text that spells a number into this number."""
    if type(value) is not str or len(value) > _MAX_CHARS:
        return value
    text = value.strip()
    found = _NUMBER.fullmatch(text)
    if found is None:
        return value
    return float(text) if found[1] or found[2] else int(text)


def integer(value: object) -> object:
    """Like `number`, and turn a whole float into an integer."""
    if type(value) is int:
        return value
    found = number(value)
    return int(found) if isinstance(found, float) and found.is_integer() else found


def share(value: object) -> object:
    """Like `number`, and turn a percentage such as "25%" into a share."""
    if isinstance(value, str) and value.rstrip().endswith("%"):
        found = number(value.rstrip()[:-1])
        return found / 100 if isinstance(found, int | float) else value
    return number(value)
