"""GET /metrics."""

from fastapi import APIRouter
from fastapi.responses import Response

from foveate.server.common.engine_api import EngineApi
from foveate.server.common.metrics import CONTENT_TYPE, Metrics


def metrics_router(metrics: Metrics, engine: EngineApi) -> APIRouter:
    """Build the route of the metrics of server and engine."""
    routes = APIRouter(tags=["metrics"])

    @routes.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        model = engine.model if engine.heartbeat is not None else None
        body = metrics.render(engine.heartbeat, model, engine.restarts)
        return Response(body, headers={"content-type": CONTENT_TYPE})

    return routes
