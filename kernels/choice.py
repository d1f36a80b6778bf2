"""Which version of an operation runs: the fast one, unless the user forces the plain reference."""

import os


def reference_forced() -> bool:
    """Whether `FOVEATE_KERNELS=reference` is set; read at every call, so a test can switch it.

    Raises:
        ValueError: the variable holds anything else but nothing.
    """
    value = os.environ.get("FOVEATE_KERNELS", "")
    if value not in ("", "reference"):
        raise ValueError(f"FOVEATE_KERNELS={value!r}: the only value is 'reference'; unset it for the fast kernels")
    return value == "reference"
