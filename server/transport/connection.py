"""Detect disconnected clients."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Response
from starlette.types import Receive


async def gone(receive: Receive) -> None:
    """Return when the client disconnects. Read the request's body first."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response | None:
    """Run `work`. If the client disconnects, cancel `work` and return None. Read the request's body first."""
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(gone(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        await cancel(worker, watcher)
