"""The class of the API's routes: strict bodies, cancellation on disconnect, one count per request."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from foveate.configs.config import LimitsConfig
from foveate.server.common.errors import ApiError
from foveate.server.common.metrics import Metrics
from foveate.server.common.track import Track
from foveate.server.transport.body import ApiRequest
from foveate.server.transport.connection import while_connected
from foveate.server.transport.errors import CLIENT_GONE, from_validation


class ApiRoute(APIRoute):
    """A route that reads bodies strictly, stops when the client disconnects, and counts requests that generate."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field

        def validate(parsed: object) -> object:
            if field is None:
                return parsed
            value, errors = field.validate(parsed, {}, loc=("body",))
            if errors:
                raise RequestValidationError(errors, body=parsed)
            return value

        async def guarded(request: Request) -> Response:
            if request.method != "POST":
                return await handle(request)
            settings: RouteSettings = request.app.state.routes
            track = Track(settings.metrics, self.path) if self.path in settings.generating else None
            with _counted(track):
                bounded = ApiRequest(request, settings.limits, validate)
                await bounded.load()
                bounded.state.track = track
                response = await while_connected(request.receive, handle(bounded))
                if response is None:
                    response = Response(status_code=CLIENT_GONE)
                    if track is not None:
                        track.finish("aborted", "client_disconnected")
                return response

        return guarded


class RouteSettings(Protocol):
    """The members of `app.state.routes` that `ApiRoute` uses."""

    @property
    def metrics(self) -> Metrics: ...
    @property
    def limits(self) -> LimitsConfig: ...
    @property
    def generating(self) -> frozenset[str]: ...


@contextlib.contextmanager
def _counted(track: Track | None) -> Iterator[None]:
    try:
        yield
    except (asyncio.CancelledError, ClientDisconnect) as error:
        if track is not None:
            track.finish("aborted", "client_disconnected" if isinstance(error, ClientDisconnect) else "cancelled")
        raise
    except Exception as error:
        if track is not None:
            track.finish("error", _code(error))
        raise


def _code(error: Exception) -> str:
    match error:
        case ApiError():
            return error.code
        case RequestValidationError():
            return from_validation(error).code
        case HTTPException():
            return "http_error"
    return "internal_error"
