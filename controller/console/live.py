"""Server-sent events: tells open pages that there may be something new; they fetch it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from intentd.core.errors import NotLeadingError
from intentd.daemons.kit.status import json_response

MAX_LISTENERS: Final = 32
TICK_S: Final = 2.0
LIFETIME_S: Final = 3600.0  # then the browser comes again, with its credentials


class Live:
    """Bounded: more listeners get 503, and their pages ask every ten seconds instead."""

    def __init__(self, news: Callable[[], dict[str, Any]]) -> None:
        self._news = news
        self._stopping = asyncio.Event()
        self.listeners = 0

    async def stop(self, _app: web.Application) -> None:
        self._stopping.set()

    async def serve(
        self, request: web.Request, permitted: Callable[[web.Request], Awaitable[bool]]
    ) -> web.StreamResponse:
        """permitted: asked at each tick, for sessions end."""
        if self.listeners >= MAX_LISTENERS:
            refused = json_response({"error": f"more than {MAX_LISTENERS} listeners"}, 503)
            refused.headers["Retry-After"] = "10"
            return refused
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        self.listeners += 1
        try:
            await response.prepare(request)
            await response.write(b"retry: 3000\n\n")
            for _ in range(int(LIFETIME_S / TICK_S)):
                if self._stopping.is_set() or not await permitted(request):
                    break
                try:
                    data = json.dumps(self._news(), default=str)
                except NotLeadingError:
                    break  # the page comes again; by then this one may lead
                await response.write(f"event: news\ndata: {data}\n\n".encode())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._stopping.wait()
        except ConnectionError:
            pass  # the page was closed
        finally:
            self.listeners -= 1
        return response
