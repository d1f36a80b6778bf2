"""Turn errors into responses in OpenAI's format.

An error that is neither an ApiError nor a refusal of the framework is our own bug. The server logs the error and
answers 500 without internal details.
"""

import logging
from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from foveate.server.common.errors import VLM_PARAMETER, ApiError

log = logging.getLogger("foveate.server")

RETRY_AFTER_S = 1
_PATH_CHARS = 200  # a name in the path is the client's and may have megabytes
CLIENT_GONE = 499  # no client receives this status; it appears in the access log


def response_of(error: ApiError) -> Response:
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    if error.status == 401:
        headers = {"www-authenticate": "Bearer"}
    return Response(error.body, error.status, headers, media_type="application/json")


def path_of(location: Sequence[int | str], body: object, missing: bool) -> str:
    """Turn pydantic's location into the client's path. Union tags are left out, because the body has no union tags."""
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
    """Return pydantic's first error without the wrong value, which may be megabytes."""
    first = error.errors()[0]
    missing = first["type"] == "missing"
    param = path_of(first["loc"], error.body, missing)[:_PATH_CHARS] or None
    message = "this field is required" if missing else str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":  # pydantic's message repeats the value
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
    if isinstance(error, ClientDisconnect):  # the client left while sending the body
        return Response(status_code=CLIENT_GONE)
    refusal = _refusal(error)
    if refusal.status == 500 and not isinstance(error, ApiError):
        log.error("request %s failed", request.state.request_id, exc_info=error)
    request.state.error = refusal  # for the line in the log
    response = response_of(refusal)
    if isinstance(error, HTTPException):
        for name, value in (error.headers or {}).items():
            response.headers[name] = value
    return response


def _refusal(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return from_validation(error)
        case HTTPException():
            return _from_http(error)
    return ApiError("internal error of the server; the cause is in its log", None, "internal_error", 500)


def answer_errors(app: FastAPI) -> None:
    """Make `app` answer every error in OpenAI's format."""
    for kind in (ApiError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer)
