"""The state that all API routes share. `create_app` builds the context once."""

import time
from dataclasses import dataclass

from fastapi import Request

from foveate.configs.config import Config, LimitsConfig
from foveate.engine.common import ModelInfo
from foveate.server.answer.logprobs import TokenTexts
from foveate.server.common.engine_api import EngineApi
from foveate.server.common.errors import ApiError, not_ready
from foveate.server.common.metrics import Metrics
from foveate.server.prepare.media import Media
from foveate.server.prepare.prompt import Prompter
from foveate.server.prepare.request import Preparer, Sender

GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    config: Config
    engine: EngineApi
    metrics: Metrics
    preparer: Preparer
    texts: TokenTexts
    started: int  # seconds since the epoch

    @property
    def name(self) -> str:
        """The model's first name, which replies carry."""
        return self.config.model.name

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that requests may use, the first one first."""
        return (self.config.model.name, *self.config.model.aliases)

    @property
    def prompter(self) -> Prompter:
        return self.preparer.prompter

    @property
    def media(self) -> Media:
        return self.preparer.media

    @property
    def limits(self) -> LimitsConfig:
        return self.config.limits

    @property
    def generating(self) -> frozenset[str]:
        return GENERATING

    def model(self) -> ModelInfo:
        """The model. Raises ApiError 503 before the engine is ready and during a restart of the engine."""
        if self.engine.state != "ready":
            raise not_ready(self.engine.reason)
        return self.engine.model

    def check_name(self, name: str | None) -> None:
        """Raise ApiError 404 if the server does not serve the model. None or an empty name means the served model."""
        if name and name not in self.names and name.rstrip("/") not in self.names:
            known = " or ".join(repr(each) for each in self.names)
            raise ApiError(f"no model {name[:100]!r}; this server has {known}", "model", "model_not_found", 404)


def sender(request: Request) -> Sender:
    """Return the caller and the budget headers of a request."""
    return Sender(request.state.caller, [each for each in request.headers.items() if "vlm" in each[0]])


def now() -> int:
    return int(time.time())
