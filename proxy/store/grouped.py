"""Work done for many at once: what is asked while a group is under way makes the next group."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from intentd.daemons.kit.store import StoreError

T = TypeVar("T")
R = TypeVar("R")
MAX_GROUP: Final = 1000
MAX_WAITING: Final = 20_000


class Grouped(Generic[T, R]):
    """One transaction for everybody who waits, so that a commit's fsync is shared.

    work: takes the items in the order of their ``ask``, returns as many results, or raises
    StoreError for the whole group. run() must be running.
    """

    def __init__(self, work: Callable[[list[T]], Awaitable[list[R]]]) -> None:
        self._work = work
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._wake = asyncio.Event()

    async def ask(self, item: T) -> R:
        """Raises StoreError. Cancelled while its group is under way, the work is still done."""
        if len(self._waiting) >= MAX_WAITING:
            raise StoreError("too many requests wait for the store")
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        self._wake.set()
        return await done

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            group, self._waiting = self._waiting[:MAX_GROUP], self._waiting[MAX_GROUP:]
            if not self._waiting:
                self._wake.clear()
            group = [pair for pair in group if not pair[1].cancelled()]
            if not group:
                continue
            try:
                results = await self._work([item for item, _ in group])
            except StoreError as error:
                for _, done in group:
                    if not done.done():
                        done.set_exception(error)
                continue
            for (_, done), result in zip(group, results, strict=True):
                if not done.done():
                    done.set_result(result)
