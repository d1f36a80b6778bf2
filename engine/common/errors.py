"""Errors of the engine.

    ConfigError (configs.errors)      a setting is wrong: the process ends with one line
    EngineError                       everything the engine raises on purpose
    ├── ModelError                    a checkpoint cannot be loaded (names the tensor or the file)
    ├── DeviceLostError               the device fails everything from now on: the process ends, another starts
    └── RequestError                  one request cannot be served; no other request notices
        ├── BudgetError               its budget contradicts itself or the picture
        ├── TooLongError              its prompt does not fit the context or the KV pool
        ├── ImageError                its picture cannot be used
        └── QueueFullError            too many requests wait already; later it can

An `assert` that fails is our own bug, never the user's.
"""


class EngineError(Exception):
    """Base of what the engine raises on purpose."""


class ModelError(EngineError):
    """A checkpoint cannot be loaded."""


class DeviceLostError(EngineError):
    """The device fails every operation from now on; only another process can use the device again."""


class RequestError(EngineError):
    """One request cannot be served.

    Args:
        message: one sentence with the value, the limit and the remedy.
        param: the request's own name for the offending field, e.g. "messages" or "vlm.visual.tokens".
    """

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def too_long(message: str) -> str:
    """Return the message of a prompt that is too long. Client libraries look for one or the other phrase in it."""
    return f"the prompt is too long for the maximum context length: {message}"


class BudgetError(RequestError):
    """The budget contradicts itself or the picture."""

    code = "invalid_vlm_parameter"


class TooLongError(RequestError):
    """The prompt does not fit the context or the KV pool. The message begins as `too_long` says."""

    code = "context_length_exceeded"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(too_long(message), param)


class ImageError(RequestError):
    """The picture cannot be used."""

    code = "invalid_image"


class QueueFullError(RequestError):
    """Too many requests wait already; the same request can be served later."""

    code = "queue_full"
