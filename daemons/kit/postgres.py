"""Connections to PostgreSQL: bounded waits, numbered migrations, notices; an outage is StoreError.

A transaction that returned is durable (PostgreSQL's synchronous_commit). One that failed may, when
the connection broke at its commit, have happened: callers that cannot do a thing twice number it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

import asyncpg

from intentd.daemons.kit.store import StoreError

_log = logging.getLogger(__name__)

MIGRATION_LOCK: Final = 0x696E74656E74  # "intent"
# What a server that is away, starting, stopping or full of connections leads to.
AWAY: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_AWAY_OR_CANCELLED: Final = (*AWAY, asyncio.CancelledError)
_CLASH: Final = asyncpg.IntegrityConstraintViolationError
# A connection may take so many times timeout_s to come about, in the background.
OPENING: Final = 3


class Database:
    """A pool of connections; every use ends within timeout_s."""

    def __init__(self, pool: Any, connect: Callable[[], Awaitable[Any]], timeout_s: float) -> None:
        self._pool = pool
        self._connect = connect
        self.timeout_s = timeout_s
        self.failure = ""
        self._listener: Any = None
        self._giving: set[asyncio.Future[Any]] = set()

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        password: str,
        connections: int,
        timeout_s: float,
        migrations: Sequence[str],
        application_name: str = "intentd-proxy",
    ) -> Database:
        """Connect and migrate. Raises StoreError."""
        settings = {"server_settings": {"application_name": application_name}}
        try:
            pool = await asyncpg.create_pool(
                url,
                password=password or None,
                min_size=0,  # connections are opened when needed, again after an outage
                max_size=connections,
                timeout=OPENING * timeout_s,
                max_inactive_connection_lifetime=300.0,
                **settings,
            )
        except (*AWAY, ValueError) as error:
            raise StoreError(f"store.url: {shown(error)}") from None

        async def connect() -> Any:
            return await asyncpg.connect(
                url, password=password or None, timeout=timeout_s, **settings
            )

        database = cls(pool, connect, timeout_s)
        try:
            await database.migrate(migrations)
        except BaseException:
            await database.close()
            raise
        return database

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        """A connection inside a transaction that is durable on return. Raises StoreError."""
        try:
            async with asyncio.timeout(self.timeout_s):
                connection = await self._acquire()
                try:
                    transaction = connection.transaction()
                    await transaction.start()
                    yield connection
                    await transaction.commit()
                except BaseException as error:
                    if isinstance(error, _AWAY_OR_CANCELLED) and not isinstance(error, _CLASH):
                        # Nobody knows what it still waits for.
                        with contextlib.suppress(asyncpg.InterfaceError):
                            connection.terminate()
                    else:
                        await transaction.rollback()
                    raise
                finally:
                    await self._pool.release(connection)
        except _CLASH:
            raise
        except AWAY as error:
            self.failure = f"store: {shown(error)}"
            raise StoreError(self.failure) from None
        self.failure = ""

    async def _acquire(self) -> Any:
        """A connection that comes too late for its caller is there for the next one: a server so
        slow that opening one takes longer than timeout_s would otherwise never be reached, and be
        kept busy by starting what nobody waits for."""
        opening = asyncio.ensure_future(self._pool.acquire(timeout=OPENING * self.timeout_s))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._came_late)
            raise

    def _came_late(self, opening: asyncio.Future[Any]) -> None:
        if opening.cancelled() or opening.exception() is not None:
            return
        giving = asyncio.ensure_future(self._pool.release(opening.result()))
        self._giving.add(giving)
        giving.add_done_callback(self._given)

    def _given(self, giving: asyncio.Future[Any]) -> None:
        self._giving.discard(giving)
        if not giving.cancelled():
            giving.exception()  # one that could not be given back is closed: nobody has to know

    async def read(self, sql: str, *arguments: Any) -> list[Any]:
        """Rows of one query. Raises StoreError."""
        async with self.transaction() as connection:
            rows: list[Any] = await connection.fetch(sql, *arguments)
            return rows

    async def migrate(self, migrations: Sequence[str]) -> None:
        """Bring the schema to this version, once, whoever comes first. Raises StoreError."""
        async with self.transaction() as connection:
            await migrate(connection, migrations)

    async def listen(self, channels: dict[str, Callable[[str], None]]) -> bool:
        """Keep a connection on which notices come; call again in a while, it checks itself.

        True when notices may have been missed since the last call.
        """
        listener = self._listener
        if listener is not None and not listener.is_closed():
            return False
        self._listener = listener = None
        try:
            async with asyncio.timeout(self.timeout_s):
                listener = await self._connect()
                for channel, take in channels.items():
                    await listener.add_listener(
                        channel, lambda _c, _pid, _channel, text, take=take: take(text)
                    )
        except AWAY as error:
            self.failure = f"store: {shown(error)}"
            if listener is not None:
                listener.terminate()
            return True
        self._listener = listener
        return True

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.terminate()
            self._listener = None
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._pool.close()
        except AWAY:
            self._pool.terminate()


async def migrate(connection: Any, migrations: Sequence[str]) -> None:
    """Bring the schema to this version inside a transaction. Raises StoreError if it is newer."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", MIGRATION_LOCK)
    await connection.execute("CREATE TABLE IF NOT EXISTS schema_version(version INT)")
    version = await connection.fetchval("SELECT max(version) FROM schema_version") or 0
    if version > len(migrations):
        raise StoreError(
            f"store.url: schema version {version}, newer than {len(migrations)}: "
            "upgrade intentd or use another database"
        )
    for number in range(version, len(migrations)):
        await connection.execute(migrations[number])
        await connection.execute("INSERT INTO schema_version VALUES ($1)", number + 1)


def shown(error: Exception) -> str:
    """What happened, without the statement or its values."""
    if isinstance(error, asyncpg.PostgresError):
        return str(error).partition("\n")[0][:200]
    if isinstance(error, TimeoutError):
        return "the database does not answer in time"
    if isinstance(error, OSError):
        return f"the database cannot be reached: {error.strerror or type(error).__name__}"
    return str(error).partition("\n")[0][:200] or type(error).__name__
