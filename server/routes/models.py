"""GET /v1/models and GET /v1/vlm/methods."""

from dataclasses import asdict

from fastapi import APIRouter, Response

from foveate.engine.common import MethodInfo
from foveate.server.common.replies import (
    Method,
    MethodField,
    MethodList,
    ModelCard,
    ModelList,
    Reply,
    SamplingCard,
    refusals,
)
from foveate.server.routes.context import Context
from foveate.server.transport.route import ApiRoute


def _json(reply: Reply) -> Response:
    return Response(reply.to_json(), media_type="application/json")


def models_router(context: Context) -> APIRouter:
    """Build the routes of the model and the reduction methods. The routes answer 503 until the engine is ready."""
    routes = APIRouter(route_class=ApiRoute, prefix="/v1", tags=["models"], responses={**refusals(401, 503)})

    def card(name: str) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=context.started,
            owned_by="foveate",
            max_model_len=context.model().max_context,
            sampling_defaults=SamplingCard(**asdict(context.preparer.defaults)),
        )

    @routes.get("/models", response_model=ModelList)
    async def models() -> Response:
        return _json(ModelList(object="list", data=[card(name) for name in context.names]))

    @routes.get("/models/{name:path}", response_model=ModelCard, responses={**refusals(404)})
    async def model(name: str) -> Response:
        context.check_name(name)
        return _json(card(name))

    @routes.get("/vlm/methods", response_model=MethodList)
    async def methods() -> Response:
        context.model()
        data = [_method(method) for method in context.engine.methods]
        return _json(MethodList(object="list", default=context.config.budget.method, data=data))

    return routes


def _method(info: MethodInfo) -> Method:
    return Method(
        name=info.name,
        summary=info.summary,
        source=info.source,
        question_aware=info.question_aware,
        shared=info.shared,
        fits=info.fits,
        stage=info.stage,
        first_only=info.first_only,
        fields=[MethodField(name=f.name, type=f.type, default=f.default) for f in info.fields],
    )
