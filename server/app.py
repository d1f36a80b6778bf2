"""The web application: routes, keys, errors. One `Context` holds all state; there are no globals."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import JsonValue
from starlette.types import ASGIApp

import foveate
from foveate.configs.config import Config, ServerConfig
from foveate.engine.images.preprocess import ImageProcessor
from foveate.server.answer.logprobs import TokenTexts
from foveate.server.common.metrics import Metrics
from foveate.server.common.protocol import ChatRequest, CompletionRequest
from foveate.server.common.replies import ChatReply, TextReply, refusals
from foveate.server.engine_client import EngineClient
from foveate.server.prepare.defaults import SamplingDefaults
from foveate.server.prepare.media import Fetch, Media
from foveate.server.prepare.prompt import Prompter
from foveate.server.prepare.request import Preparer
from foveate.server.routes.chat import answer_chat
from foveate.server.routes.completions import answer_completion
from foveate.server.routes.context import Context, now
from foveate.server.routes.health import health_router
from foveate.server.routes.metrics import metrics_router
from foveate.server.routes.models import models_router
from foveate.server.routes.tokenize import tokens_router
from foveate.server.transport.cors import with_cors
from foveate.server.transport.errors import answer_errors
from foveate.server.transport.gate import Gate
from foveate.server.transport.request_log import RequestLog
from foveate.server.transport.route import ApiRoute

log = logging.getLogger("foveate.server")


class _App(FastAPI):
    """An application whose own middleware stands outside FastAPI's, so that an answer 500 passes through it, too."""

    settings: ServerConfig

    def build_middleware_stack(self) -> ASGIApp:
        gate = Gate(super().build_middleware_stack(), self.settings)
        return RequestLog(with_cors(gate, self.settings.cors_origins), self.settings.log_requests)


def create_app(config: Config, client: EngineClient, counts: Metrics, model_dir: Path) -> FastAPI:
    """Create the application. `client` may become ready later.

    Args:
        config: as returned by `find_model`. Clients name the model by `model.name` or one of `model.aliases`.
        model_dir: directory with the files of tokenizer, chat template and image processor.

    Raises:
        ConfigError: one of the model's files is missing or broken, or a sampling default is out of range.
    """
    fetch = _fetcher(config)
    media = Media(ImageProcessor.load(model_dir), config.limits, config.server.decode_workers, fetch)
    defaults = SamplingDefaults.load(model_dir, config.model)
    log.info("sampling of requests that leave it out: %s (model.generation_config)", defaults)
    context = _context(config, client, counts, Preparer(config, Prompter.load(model_dir), media, defaults))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        media.close()
        if fetch is not None:
            await fetch.aclose()

    # No /docs page: the page would load scripts from a third-party server.
    app = _App(title="Foveate", version=foveate.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.routes = context
    for router in (_generating(context), models_router(context), tokens_router(context)):
        app.include_router(router)
    app.include_router(health_router(client))
    app.include_router(metrics_router(counts, client))
    app.settings = config.server
    answer_errors(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _context(config: Config, client: EngineClient, counts: Metrics, preparer: Preparer) -> Context:
    return Context(
        config=config,
        engine=client,
        metrics=counts,
        preparer=preparer,
        texts=TokenTexts(preparer.prompter.tokenizer),
        started=now(),
    )


def _fetcher(config: Config) -> Fetch | None:
    if not config.server.image_urls:
        return None
    from foveate.server.fetch import Fetcher  # late: httpx takes 0.1 s to import, and few servers need httpx

    return Fetcher(config.limits, config.server.image_url_hosts)


def _generating(context: Context) -> APIRouter:
    routes = APIRouter(
        route_class=ApiRoute, tags=["generate"], responses={**refusals(400, 401, 404, 413, 415, 429, 500, 503)}
    )

    @routes.post("/v1/chat/completions", response_model=ChatReply)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await answer_chat(context, request, body)

    @routes.post("/v1/completions", response_model=TextReply)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await answer_completion(context, request, body)

    return routes


def _openapi(app: FastAPI) -> dict[str, JsonValue]:
    """Return FastAPI's schema without the 422 of every route: this server answers 400 in OpenAI's format instead."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
