"""The state that several proxies share in PostgreSQL, and the lease by which each is alive."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import asyncpg

from intentd.core.errors import InputError
from intentd.daemons.kit.claims import Claim
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.config import database_password
from intentd.daemons.kit.postgres import Database
from intentd.daemons.kit.postgres_store import numbered
from intentd.daemons.kit.store import StoreError
from intentd.proxy import proof
from intentd.proxy.config import ProxyConfig
from intentd.proxy.postgres.cache import PostgresCacheRows
from intentd.proxy.postgres.conversations import CHANNEL, SharedConversations, take_tickets
from intentd.proxy.postgres.feedback import SharedFeedback
from intentd.proxy.postgres.ledger import SharedLedger, settle_abandoned
from intentd.proxy.postgres.rates import SharedRates
from intentd.proxy.postgres.schema import MIGRATIONS
from intentd.proxy.postgres.vectors import DatabaseVectors, prepare
from intentd.proxy.store.base import KeyRow

_log = logging.getLogger(__name__)

KEYS_CHANNEL: Final = "intentd_keys"
LEFT_FILE: Final = "unwritten.json"
KEYS_LOCK: Final = 0x696E746B6579
FORGET_PROXIES: Final = "DELETE FROM proxies WHERE seen < clock_timestamp() - interval '30 days'"
_SEEN: Final = (
    "INSERT INTO proxies AS p(owner, name, seen) VALUES ($1, $2, clock_timestamp()) "
    "ON CONFLICT(owner) DO UPDATE SET seen = clock_timestamp()"
)
# One taken by another proxy at this moment is left to it.
_DEAD: Final = (
    "SELECT owner FROM proxies p WHERE owner <> $1 "
    "AND seen < clock_timestamp() - $2 * interval '1 second' "
    "AND (EXISTS (SELECT 1 FROM reservations r WHERE r.owner = p.owner) "
    "OR EXISTS (SELECT 1 FROM tickets t WHERE t.owner = p.owner)) FOR UPDATE SKIP LOCKED"
)
_WRITE_KEY: Final = (
    "INSERT INTO keys(id, hash, name, tenant, created_wall_s, expires_wall_s, revoked, grants, "
    "version) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, "
    "(SELECT coalesce(max(version), 0) + 1 FROM keys)) ON CONFLICT(id) DO UPDATE SET "
    "expires_wall_s = excluded.expires_wall_s, revoked = excluded.revoked, "
    "grants = excluded.grants, version = excluded.version WHERE keys.hash = excluded.hash "
    "RETURNING version"
)

_RECEIPTS: Final = (
    "SELECT count(*), coalesce(sum((document::json ->> 'cost_nano')::bigint), 0) "
    "FROM requests WHERE wall_s >= $1"
)


class SharedKeys:
    """The table of keys; a store.base.KeyTable. version: of the rows loaded last."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.version = 0

    async def load(self) -> list[KeyRow]:
        rows = await self._database.read("SELECT * FROM keys")
        self.version = max((row["version"] for row in rows), default=0)
        return [
            KeyRow(
                row["id"], row["hash"], row["name"], row["tenant"], row["created_wall_s"],
                row["expires_wall_s"], row["revoked"], row["grants"],
            )
            for row in rows
        ]  # fmt: skip

    async def newer(self) -> bool:
        """Whether another proxy changed a key since. Raises StoreError."""
        (row,) = await self._database.read("SELECT coalesce(max(version), 0) AS v FROM keys")
        return bool(row["v"] != self.version)

    async def write(self, row: KeyRow) -> None:
        try:
            async with self._database.transaction() as db:
                # One at a time, so that versions become visible in their order.
                await db.execute("SELECT pg_advisory_xact_lock($1)", KEYS_LOCK)
                version = await db.fetchval(
                    _WRITE_KEY, row.key_id, row.hashed, row.name, row.tenant, row.created_wall_s,
                    row.expires_wall_s, row.revoked, row.grants,
                )  # fmt: skip
                if version is None:
                    raise InputError("name", row.name, "a name no key has")
                await db.execute(f"NOTIFY {KEYS_CHANNEL}")
        except asyncpg.UniqueViolationError:
            raise InputError("name", row.name, "a name no key has") from None


class SharedState:
    """Everything of store.base.State in one database."""

    def __init__(
        self,
        database: Database,
        config: ProxyConfig,
        clock: Clock,
        boot: str,
        vector_search: DatabaseVectors | None = None,
    ) -> None:
        self.database = database
        self._clock = clock
        self._owner = boot
        self._name = config.name
        self._lease_s = config.store.lease_s
        self.books = SharedLedger(
            database,
            clock,
            owner=boot,
            name=config.name,
            max_rows=config.records.max_rows,
            left_file=config.state_dir / LEFT_FILE,
        )
        self.turns = SharedConversations(database, clock, config.conversations, boot)
        self.rates = SharedRates(database)
        self.key_table = SharedKeys(database)
        self.feedback_rows = SharedFeedback(database, config.records.max_rows)
        self.cache_rows = PostgresCacheRows(database, vector_search)
        self._seen_s: float | None = None
        self._steady_since_s = 0.0
        self._keys_changed = asyncio.Event()

    @classmethod
    async def open(cls, config: ProxyConfig, clock: Clock, boot: str) -> SharedState:
        """Raises StoreError when the database is away, ConfigError."""
        section = config.store
        database = await Database.open(
            section.url,
            password=database_password(section.password_env),
            connections=section.connections + 3,  # the ledger and turns do not wait
            timeout_s=section.timeout_s,
            migrations=MIGRATIONS,
        )
        try:
            return cls(database, config, clock, boot, await prepare(database))
        except BaseException:
            await database.close()
            raise

    async def start(
        self, tasks: asyncio.TaskGroup, reload_keys: Callable[[], Awaitable[None]]
    ) -> None:
        await self.books.open()
        await self._tick(reload_keys)
        tasks.create_task(self.books.run(), name="ledger")
        tasks.create_task(self.turns.accepting.run(), name="conversations: accept")
        tasks.create_task(self.turns.run_handing(), name="conversations: hand on")
        tasks.create_task(self.turns.run_purging(), name="conversations: purge")
        tasks.create_task(self.rates.grouped.run(), name="rates")
        tasks.create_task(self._run(reload_keys), name="lease")

    async def close(self) -> None:
        await self.turns.close()
        await self.books.close()
        await self.database.close()

    def reload(self, config: ProxyConfig) -> None:
        self.turns.section = config.conversations
        self.books.max_rows = self.feedback_rows.max_rows = config.records.max_rows

    async def prove(self) -> list[Claim]:
        """The books of all proxies against the receipts, at one moment. Raises StoreError."""
        await self.books.flush()
        day, since_s = proof.since(self._clock.wall())
        async with self.database.transaction() as db:
            await db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            return proof.claims_of(
                await db.fetch(proof.ACCOUNTS),
                await db.fetch(proof.RESERVATIONS),
                await db.fetchrow(numbered(proof.SPEND), day),
                await db.fetchrow(_RECEIPTS, since_s),
            )

    def unready(self) -> list[str]:
        return [self.database.failure] if self.database.failure else []

    # -- inside --------------------------------------------------------------------------------

    async def _run(self, reload_keys: Callable[[], Awaitable[None]]) -> None:
        """Say that we live, look for those who do not, hear what was missed."""
        every_s = min(2.0, self._lease_s / 5)
        while True:
            try:
                async with asyncio.timeout(every_s):
                    await self._keys_changed.wait()
                self._keys_changed.clear()
                await reload_keys()
                continue
            except TimeoutError:
                pass
            except StoreError:
                continue  # the tick asks for the version again
            try:
                await self._tick(reload_keys)
            except StoreError as error:
                _log.debug("the database is away", extra={"reason": str(error)})

    async def _tick(self, reload_keys: Callable[[], Awaitable[None]]) -> None:
        """Raises StoreError."""
        async with self.database.transaction() as db:
            await db.execute(_SEEN, self._owner, self._name)
        now_s = self._clock.now()
        # Who was itself asleep or cut off, or comes back to a database that was away, sees
        # everybody's lease run out: only a full lease of its own without a gap lets it judge.
        if self._seen_s is None or now_s - self._seen_s > self._lease_s / 2:
            self._steady_since_s = now_s
        self._seen_s = now_s
        await self.database.listen(
            {CHANNEL: self.turns.noticed, KEYS_CHANNEL: lambda _: self._keys_changed.set()}
        )
        if await self.key_table.newer():
            await reload_keys()
        await self.turns.look()
        if now_s - self._steady_since_s >= self._lease_s:
            await self._bury()

    async def _bury(self) -> None:
        """Take over from the dead: their turns pass on, their reservations settle in full."""
        async with self.database.transaction() as db:
            dead = [row["owner"] for row in await db.fetch(_DEAD, self._owner, self._lease_s)]
            tickets = reservations = 0
            for owner in dead:
                tickets += await take_tickets(db, owner)
                reservations += await settle_abandoned(db, owner)
            await db.execute(FORGET_PROXIES)
        if dead:
            self.books.recovered += reservations
            _log.warning(
                "took over from proxies not heard of",
                extra={"proxies": dead, "tickets": tickets, "reservations": reservations},
            )
