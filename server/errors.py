"""Errors of the API, all in OpenAI's shape.

    ApiError      one HTTP answer: status, type, code, the request's own name of what is wrong, one sentence
    RequestError  (engine.errors) raised by the image processor; becomes an ApiError
    Failed        (engine.messages) the engine's refusal; becomes an ApiError by its code

Whatever else escapes a handler is our own bug: logged, and answered with a 500 that says nothing of the inside.
"""

import logging
from collections.abc import Sequence

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from foveate.engine.common.messages import Failed

log = logging.getLogger("foveate.server")

VLM_PARAMETER = "invalid_vlm_parameter"
RETRY_AFTER_S = 1
CLIENT_GONE = 499  # nobody reads it; the access log does
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
}
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
    """One refused request.

    Args:
        message: one sentence with the value, the limit and the remedy.
        param: path of the offending field, e.g. "messages[0].content[1].image_url.url".
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status

    @property
    def body(self) -> bytes:
        """The JSON object that clients of OpenAI parse."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})

    def response(self) -> Response:
        headers = {"retry-after": str(RETRY_AFTER_S)} if self.status in (429, 503) else None
        return Response(self.body, self.status, headers, media_type="application/json")


def unsupported(param: str, why: str) -> ApiError:
    """A field that this server knows and does not honour."""
    return ApiError(f"{param}: {why}", param, "unsupported_parameter")


def invalid_vlm(param: str, why: str) -> ApiError:
    """A wrong budget; `param` is the body's path or the header's name."""
    return ApiError(f"{param}: {why}", param, VLM_PARAMETER)


def not_ready(reason: str) -> ApiError:
    return ApiError(f"the model is not ready: {reason}; try again later", None, "not_ready", 503)


def from_failed(failed: Failed, prompt_param: str) -> ApiError:
    """The HTTP face of an engine's refusal; the engine calls the prompt "messages" whatever the route."""
    status = _STATUS_OF_FAILED.get(failed.code, 500)
    if status == 500:
        log.error("request %s failed in the engine: %s: %s", failed.id, failed.code, failed.message)
        return ApiError("the engine failed on this request; the cause is in its log", None, "internal_error", 500)
    param = prompt_param if failed.param == "messages" else failed.param
    return ApiError(failed.message, param, failed.code, status)


def path_of(location: Sequence[int | str], body: object, missing: bool) -> str:
    """Pydantic's location as a client would write it: the tags of unions, which the body does not hold, left out."""
    path, here = "", body
    steps = list(location[1:] if location and location[0] in ("body", "path", "query", "header") else location)
    for number, step in enumerate(steps):
        if isinstance(step, int) and isinstance(here, list) and step < len(here):
            path, here = f"{path}[{step}]", here[step]
        elif isinstance(step, str) and isinstance(here, dict) and step in here:
            path, here = f"{path}.{step}" if path else step, here[step]
        elif missing and number == len(steps) - 1:
            path = f"{path}.{step}" if path else str(step)
    return path


def from_validation(error: RequestValidationError) -> ApiError:
    """The first complaint of pydantic; never the offending value, which may be megabytes."""
    first = error.errors()[0]
    missing = first["type"] == "missing"
    param = path_of(first["loc"], error.body, missing) or None
    message = "this field is required" if missing else str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":  # pydantic's own text repeats the value
        message = (
            f"expected {first['ctx']['discriminator'].strip(chr(39))} to be one of {first['ctx']['expected_tags']}"
        )
    code = "missing_required_parameter" if missing else "invalid_value"
    if param is not None and (param == "vlm" or ".vlm." in f".{param}"):
        code = VLM_PARAMETER
    return ApiError(f"{param or 'body'}: {message}", param, code)


def _from_http(error: HTTPException) -> ApiError:
    codes = {404: "not_found", 405: "method_not_allowed"}
    return ApiError(str(error.detail), None, codes.get(error.status_code, "http_error"), error.status_code)


async def _answer(request: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            return error.response()
        case RequestValidationError():
            return from_validation(error).response()
        case HTTPException():
            response = _from_http(error).response()
            for name, value in (error.headers or {}).items():
                response.headers[name] = value
            return response
        case ClientDisconnect():  # in the middle of its body
            return Response(status_code=CLIENT_GONE)
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return ApiError("internal error of the server; the cause is in its log", None, "internal_error", 500).response()


def install(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's shape."""
    for kind in (ApiError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer)
