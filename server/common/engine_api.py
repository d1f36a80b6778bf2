"""What the server needs of the engine, however it is reached."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from foveate.engine.common import Accepted, Delta, Failed, Generate, Heartbeat, MethodInfo, ModelInfo

Event = Accepted | Delta | Failed


class EngineApi(Protocol):
    """`engine_client.EngineClient`, as the routes see it."""

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
    def restarts(self) -> int: ...

    def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        """An async generator; closing the generator before its end aborts the request in the engine."""
        ...

    def end_choice(self, request_id: str, choice: int) -> None:
        """The choice ends as if by itself: its last `Delta` still comes."""
        ...
