"""The interface through which the server uses the engine."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from foveate.engine.common import Accepted, Delta, Failed, Generate, Heartbeat, MethodInfo, ModelInfo

Event = Accepted | Delta | Failed


class EngineApi(Protocol):
    """The members of `engine_client.EngineClient` that the routes use."""

    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def model(self) -> ModelInfo: ...
    @property
    def methods(self) -> Sequence[MethodInfo]: ...
    @property
    def heartbeat(self) -> Heartbeat | None: ...
    @property
    def heartbeat_at(self) -> float: ...
    @property
    def turn_s(self) -> float: ...
    @property
    def restarts(self) -> int: ...

    def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        """Run one request. Closing the generator before its end aborts the request in the engine."""
        ...

    def end_choice(self, request_id: str, choice: int) -> None:
        """End one choice normally: the engine still sends the last `Delta` of the choice."""
        ...
