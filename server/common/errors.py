"""Errors of the API, all in OpenAI's format.

    ApiError      one refusal: status, type, code, path of the wrong field in the request, one sentence
    RequestError  (engine.common.errors) the image processor raises this error; becomes an ApiError
    Failed        (engine.common.messages) the engine's refusal; becomes an ApiError by its code

`transport/errors.py` turns an ApiError into a response.
"""

import logging
import re

import orjson

from foveate.engine.common import Failed

log = logging.getLogger("foveate.server")

MAX_SHOWN = 2000  # characters; the list of all methods fits
VLM_PARAMETER = "invalid_vlm_parameter"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
}
_PRINTABLE = re.compile(r"[^]A-Za-z0-9_.[-]")
_STATUS_OF_FAILED = {
    "invalid_request": 400,
    "invalid_image": 400,
    "invalid_vlm_parameter": 400,
    "context_length_exceeded": 400,
    "queue_full": 429,
    "engine_restarted": 503,
    "not_ready": 503,
    "aborted": 503,
}


class ApiError(Exception):
    """One refused request. Both texts may name what a client wrote, so they are bounded and printable.

    Args:
        message: one sentence with the value, the limit and the remedy.
        param: path of the offending field, e.g. "messages[0].content[1].image_url.url".
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.message = _shown(message)
        self.param = None if param is None else _shown(param)
        self.code = code
        self.status = status

    @property
    def body(self) -> bytes:
        """Return the JSON error object that OpenAI clients parse."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


def unsupported(param: str, why: str) -> ApiError:
    """Return the error for a known field that this server does not support."""
    return ApiError(f"{param}: {why}", param, "unsupported_parameter")


def invalid_vlm(param: str, why: str) -> ApiError:
    """Return the error for a wrong budget field. `param`: path in the body or name of the header."""
    return ApiError(f"{param}: {why}", param, VLM_PARAMETER)


def not_ready(reason: str) -> ApiError:
    return ApiError(f"the model is not ready: {reason}; try again later", None, "not_ready", 503)


def from_failed(failed: Failed, prompt_param: str) -> ApiError:
    """Turn the engine's refusal into an ApiError. The engine calls the prompt "messages" for every route."""
    status = _STATUS_OF_FAILED.get(failed.code, 500)
    if status == 500:
        log.error("request %s failed in the engine: %s: %s", failed.id, failed.code, failed.message)
        return ApiError("the engine failed on this request; the cause is in its log", None, "internal_error", 500)
    param = prompt_param if failed.param == "messages" else failed.param
    return ApiError(failed.message, param, failed.code, status)


def _shown(text: str) -> str:
    """Return one printable line of at most `MAX_SHOWN` characters."""
    line = "".join(char if char.isprintable() else "?" for char in text[:MAX_SHOWN])
    return line if len(text) <= MAX_SHOWN else line[:-3] + "..."


def printable(name: str) -> str:
    """Make a client's text safe for a header."""
    return _PRINTABLE.sub("?", name[:64])
