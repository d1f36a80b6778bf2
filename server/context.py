"""What every route of the API needs: built once by `create_app`."""

import hashlib
import secrets
import time
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers

from foveate.configs.config import Config
from foveate.engine.common.messages import ModelInfo, SamplingParams
from foveate.server.answer import Engine
from foveate.server.errors import ApiError, not_ready
from foveate.server.logprobs import TokenTexts
from foveate.server.media import Media
from foveate.server.metrics import Metrics
from foveate.server.prompt import Prompter
from foveate.server.protocol import Sampling
from foveate.server.transport import bearer

GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
_COLDEST = 1e-4  # below, dividing logits by the temperature overflows; the answer is the greedy one long before
_SEED_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    config: Config
    engine: Engine
    metrics: Metrics
    prompter: Prompter
    texts: TokenTexts
    media: Media
    name: str  # of the model, as clients say it
    started: int  # seconds since the epoch

    @property
    def body_mb(self) -> int:
        return self.config.limits.body_mb

    @property
    def generating(self) -> frozenset[str]:
        return GENERATING

    def model(self) -> ModelInfo:
        """Raises ApiError 503 before the engine is ready and while it starts again."""
        if self.engine.state != "ready":
            raise not_ready(self.engine.reason)
        return self.engine.model

    def check_name(self, name: str) -> None:
        """Raises ApiError 404 for a model that is not served."""
        if name != self.name:
            raise ApiError(f"no model {name[:100]!r}; this server has {self.name!r}", "model", "model_not_found", 404)

    def salt(self, headers: Headers, cache_salt: str | None) -> bytes:
        """Prefix-cache namespace: prompts of one key never tell anything about those of another."""
        key = bearer(headers) if self.config.server.api_keys else b""
        if not key and cache_salt is None:
            return b""
        return hashlib.sha256(hashlib.sha256(key).digest() + (cache_salt or "").encode()).digest()


def new_id(prefix: str) -> str:
    """Made here, never by a client: an id is what aborts a request."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


def sampling_params(
    request: Sampling, max_tokens: int | None, logprobs: int | None, context: Context, model: ModelInfo
) -> SamplingParams:
    """How tokens are drawn.

    Args:
        max_tokens: what the request asks for; None: as much as context and limits.output_tokens allow.
        logprobs: alternatives per token, 0 for only the chosen one, None for none.
    """
    most = context.config.limits.output_tokens
    if max_tokens is None and most < model.max_context:
        max_tokens = most
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    for param, ids in (("logit_bias", bias), ("stop_token_ids", request.stop_token_ids or [])):
        worst = max(ids, default=0)
        if worst >= model.vocab_size:
            raise ApiError(f"{param}: token {worst} is not in the vocabulary of {model.vocab_size} tokens", param)
    temperature = 1.0 if request.temperature is None else request.temperature
    seed = secrets.randbits(63) if request.seed is None else request.seed & _SEED_MASK
    return SamplingParams(
        temperature=0.0 if temperature < _COLDEST else temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=min(max(request.top_k or 0, 0), model.vocab_size),
        min_p=request.min_p or 0.0,
        seed=seed,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=bias,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        min_tokens=request.min_tokens or 0,
        max_tokens=max_tokens,
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
    )
