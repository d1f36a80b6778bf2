"""Liveness and readiness. Alive: the event loop runs and the engine process is not given up.

Ready: the engine process gives signs of life, and has finished a step recently or is in a step that is not overlong.
"""

import asyncio
import contextlib
import time

from fastapi import APIRouter
from fastapi.responses import JSONResponse

import foveate
from foveate.engine.common import Failed, Generate, ModelInfo, SamplingParams
from foveate.server.common.engine_api import EngineApi

HEARTBEAT_FRESH_S = 5.0
STEP_FRESH_S = 10.0
PROBE_TIMEOUT_S = 2.0
LONG_STEP_S = 30.0  # a longer step counts as not ready


class Readiness:
    """Reports whether the engine serves requests, with a probe request if necessary. Concurrent calls share a probe."""

    def __init__(self, client: EngineApi) -> None:
        self._client = client
        self._n_probes = 0
        self._probed_at = -STEP_FRESH_S
        self._probe: asyncio.Task[str | None] | None = None

    async def why_not(self) -> str | None:
        """Return None if ready, else the reason in words."""
        client = self._client
        if client.state != "ready":
            return client.reason
        age_s = time.monotonic() - client.heartbeat_at
        if age_s >= HEARTBEAT_FRESH_S:
            return f"no heartbeat of the engine process for {age_s:.0f} s"
        since_step_s = age_s + client.heartbeat.since_step_s if client.heartbeat else 0.0  # a step ran before Ready
        if min(since_step_s, time.monotonic() - self._probed_at) <= STEP_FRESH_S:
            return None
        if client.turn_s > PROBE_TIMEOUT_S:  # a probe would wait for the end of the step in progress
            return (
                None if client.turn_s <= LONG_STEP_S else f"the engine has been in one step for {client.turn_s:.0f} s"
            )
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._run_probe())
        return await asyncio.shield(self._probe)

    async def _run_probe(self) -> str | None:
        self._n_probes += 1
        request = probe_request(f"probe-{self._n_probes}", self._client.model)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S), contextlib.aclosing(self._client.generate(request)) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        return f"the engine failed a probe of one token: {event.message}"
        except TimeoutError:
            return f"the engine did not finish a probe of one token within {PROBE_TIMEOUT_S:.0f} s"
        self._probed_at = time.monotonic()
        return None


def probe_request(request_id: str, model: ModelInfo) -> Generate:
    """Build a request with one ordinary prompt token and one output token.

    The token is from the middle of the vocabulary, because special tokens stand at both ends.
    """
    token_id = model.vocab_size // 2
    if token_id == model.image_token_id:
        token_id -= 1
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    return Generate(id=request_id, prompt_ids=[token_id], sampling=sampling)


def health_router(client: EngineApi) -> APIRouter:
    """Build the probes. /health and /ping, as launchers and SageMaker ask, mean /health/ready.

    A 503 gives the reason. All answer GET and HEAD, and need no key.
    """
    routes = APIRouter(tags=["health"])
    readiness = Readiness(client)

    @routes.get("/version")
    @routes.head("/version", include_in_schema=False)
    async def version() -> JSONResponse:
        return JSONResponse({"version": foveate.__version__})

    @routes.get(
        "/health/live", responses={503: {"description": "The engine process is given up; the server ends soon."}}
    )
    @routes.head("/health/live", include_in_schema=False)
    async def live() -> JSONResponse:
        if client.state == "dead":
            return JSONResponse({"status": "dead", "reason": client.reason}, 503)
        return JSONResponse({"status": "live"})

    async def ready() -> JSONResponse:
        reason = await readiness.why_not()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": reason}, 503, headers={"retry-after": "1"})

    for path in ("/health", "/health/ready", "/ping"):
        responses: dict[int | str, dict[str, str]] = {503: {"description": "The body names the reason."}}
        routes.add_api_route(path, ready, methods=["GET"], responses=responses)
        routes.add_api_route(path, ready, methods=["HEAD"], include_in_schema=False)
    return routes
