"""What the pool's callers see of a database that is slow; the real one is in tests/real."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from intentd.daemons.kit.postgres import Database
from intentd.daemons.kit.store import StoreError


class Connection:
    def transaction(self) -> Any:
        return self

    async def start(self) -> None: ...

    async def commit(self) -> None: ...

    async def rollback(self) -> None: ...

    def terminate(self) -> None: ...

    async def fetch(self, sql: str) -> list[str]:
        return [sql]


class SlowPool:
    """One place. A connection takes until ``opened`` to come about, and stays."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.openings = 0
        self._place = asyncio.Lock()
        self._connection: Connection | None = None

    async def acquire(self, *, timeout: float) -> Connection:  # noqa: ASYNC109  asyncpg's
        async with asyncio.timeout(timeout):
            await self._place.acquire()
            try:
                if self._connection is None:
                    self.openings += 1
                    await self.opened.wait()
                    self._connection = Connection()
            except BaseException:
                self._place.release()
                raise
            return self._connection

    async def release(self, connection: Connection) -> None:
        assert connection is self._connection
        self._place.release()


async def _never() -> Any:
    raise AssertionError


async def test_a_connection_that_came_too_late_serves_the_next() -> None:
    pool = SlowPool()
    database = Database(pool, _never, timeout_s=0.2)
    with pytest.raises(StoreError, match="does not answer in time"):
        await database.read("first")
    assert database.failure
    pool.opened.set()
    assert await database.read("second") == ["second"]
    assert (pool.openings, database.failure) == (1, "")


async def test_who_leaves_leaves_no_place_taken() -> None:
    pool = SlowPool()
    database = Database(pool, _never, timeout_s=60.0)
    leaving = [asyncio.ensure_future(database.read("gone")) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    pool.opened.set()
    assert await database.read("next") == ["next"]
    assert pool.openings == 1
