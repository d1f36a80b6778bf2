"""Whether the client is still there."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Response
from starlette.types import Receive


async def gone(receive: Receive) -> None:
    """Returns when the client goes. The body of the request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response | None:
    """Run `work`; cancel it and return None if the client goes. The request's body must have been read."""
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(gone(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        await cancel(worker, watcher)
