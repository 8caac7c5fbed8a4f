"""The proxy's state, opened as the configuration says: SQLite for one process, or PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from intentd.core.errors import IntentdError
from intentd.core.prompts.limits import Rate, RateLimiter
from intentd.daemons.kit.claims import Claim
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.store import Store
from intentd.proxy.config import ProxyConfig
from intentd.proxy.conversations import Conversations
from intentd.proxy.ledger import Ledger
from intentd.proxy.proof import prove_books, since
from intentd.proxy.store.base import State
from intentd.proxy.store.cache_sqlite import SqliteCacheRows
from intentd.proxy.store.sqlite import MIGRATIONS, SqliteFeedback, SqliteKeys

STORE_FILE: Final = "proxy.sqlite"
PROBE_S: Final = 2.0


class LocalRates:
    """Request rates of one process; a store.base.Rates."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._limiters: dict[Rate, RateLimiter] = {}

    async def take(self, scope: str, rate: Rate) -> float:
        limiter = self._limiters.get(rate)
        if limiter is None:
            limiter = self._limiters[rate] = RateLimiter(rate)
        return limiter.take(scope, now=self._clock.now())


class EmbeddedState:
    """One process that owns one SQLite file."""

    def __init__(self, path: Path, config: ProxyConfig, clock: Clock) -> None:
        """Open, migrate, settle what a killed process left. Raises StoreError."""
        self.store = Store(path, MIGRATIONS)
        self._clock = clock
        self.books = Ledger(self.store, clock, max_rows=config.records.max_rows)
        self.books.open()
        self.turns = Conversations(self.store, clock, config.conversations)
        self.rates = LocalRates(clock)
        self.key_table = SqliteKeys(self.store)
        self.feedback_rows = SqliteFeedback(self.store, config.records.max_rows)
        self.cache_rows = SqliteCacheRows(self.store)

    async def start(
        self, tasks: asyncio.TaskGroup, _reload_keys: Callable[[], Awaitable[None]]
    ) -> None:
        tasks.create_task(self.books.run(), name="ledger")
        tasks.create_task(self.turns.accepting.run(), name="conversations")
        tasks.create_task(self.turns.run_purging(), name="conversations: purge")
        tasks.create_task(self._probe(), name="store probe")

    async def close(self) -> None:
        await self.books.close()
        self.store.close()

    def reload(self, config: ProxyConfig) -> None:
        self.turns.section = config.conversations
        self.books.max_rows = self.feedback_rows.max_rows = config.records.max_rows

    def unready(self) -> list[str]:
        return self.store.unready()

    async def prove(self) -> list[Claim]:
        """The books against the receipts, on disk. Raises StoreError."""
        await self.books.flush()
        return await prove_books(self.store, *since(self._clock.wall()))

    async def _probe(self) -> None:
        """A store that failed is tried again, so that readiness comes back by itself."""
        while True:
            await self._clock.sleep(PROBE_S)
            if self.store.unready():
                await self.store.run(lambda it: it.probe())


async def open_state(config: ProxyConfig, clock: Clock, boot: str) -> State:
    """Raises StoreError, ConfigError."""
    if config.store.url:
        try:  # only those who share a state need its driver
            from intentd.proxy.postgres.state import SharedState
        except ModuleNotFoundError as error:
            raise IntentdError(
                f"store.url: {error.name} is missing (pip install 'intentd[proxy-postgres]')"
            ) from None
        return await SharedState.open(config, clock, boot)
    return EmbeddedState(config.state_dir / STORE_FILE, config, clock)
