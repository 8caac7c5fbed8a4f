"""Who of the controllers on one database leads: a session's advisory lock, and numbered terms.

States: *away* (the database does not answer) -> *standby* (another leads) -> *leading* -> *standby*
or *away*. The lock is held by one connection that is asked something several times a lease; the
server ends that session when it hears nothing for a lease (idle_session_timeout), which frees the
lock of a leader that was killed, stopped or cut off. The leader counts its lease from the moment
before it asked, so it stops leading before the server lets another in. Where clocks or schedulers
break that, terms decide: each leader begins one, in the table, and every write of the store checks
in its own transaction that no later one began. See docs/adr/controllers-in-a-pair.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.postgres import AWAY, migrate, shown
from intentd.daemons.kit.postgres_store import LoopThread, PostgresStore, translated
from intentd.daemons.kit.store import StoreError

_log = logging.getLogger(__name__)

SCHEMA: Final = "intentd_controller"
LEADER_LOCK: Final = 0x6C6561646572  # "leader"
OLDEST: Final = 140_000  # idle_session_timeout came with PostgreSQL 14
BEATS: Final = 4  # a lease
POLL_S: Final = 0.25
RETRY_S: Final = 0.5  # after the database did not answer
# The lock lasts to the end of the transaction and keeps a new term from beginning meanwhile.
FENCE: Final = ("LOCK TABLE terms IN ROW SHARE MODE", "SELECT max(term) FROM terms")
_OWN_MIGRATIONS: Final = (
    """
    CREATE TABLE terms (
        term BIGINT PRIMARY KEY, name TEXT NOT NULL, host TEXT NOT NULL, boot TEXT NOT NULL,
        began TIMESTAMPTZ NOT NULL
    );
    CREATE TABLE controllers (
        name TEXT NOT NULL, host TEXT NOT NULL, hub TEXT NOT NULL, boot TEXT NOT NULL,
        state TEXT NOT NULL, since TIMESTAMPTZ NOT NULL, seen TIMESTAMPTZ NOT NULL,
        PRIMARY KEY (name, host, hub)
    ) WITH (fillfactor = 50);
    """,
)
# Those of this role alone, and no reader's: a backup locks less.
_END_WRITES: Final = """
    SELECT pg_terminate_backend(held.pid) FROM pg_locks AS held
    JOIN pg_stat_activity AS session ON session.pid = held.pid
    WHERE held.locktype = 'relation' AND held.relation = 'terms'::regclass AND held.granted
        AND held.mode = 'RowShareLock' AND session.datname = current_database()
        AND session.usename = current_user AND held.pid <> pg_backend_pid()
"""
_SEEN: Final = """
    WITH mine AS (
        INSERT INTO controllers AS c (name, host, hub, boot, state, since, seen)
        VALUES ($1, $2, $3, $4, $5, now(), now())
        ON CONFLICT (name, host, hub) DO UPDATE
        SET seen = now(), state = excluded.state, boot = excluded.boot,
            since = CASE WHEN (c.state, c.boot) = (excluded.state, excluded.boot)
                THEN c.since ELSE now() END
    )
    SELECT name, host, hub, state, extract(epoch FROM now() - since)::float8 AS since_s,
        extract(epoch FROM now() - seen)::float8 AS seen_s_ago
    FROM controllers
    WHERE (name, host, hub) <> ($1, $2, $3) AND seen > now() - interval '1 day'
    ORDER BY seen DESC LIMIT 8
"""


class LeaderState(enum.Enum):
    """See the module."""

    AWAY = "away"
    STANDBY = "standby"
    LEADING = "leading"


@dataclass(frozen=True, slots=True)
class Me:
    """How this controller is told to the others."""

    name: str
    host: str
    hub: str
    boot: str


class Leadership:
    """One controller's part. Its connection lives on a loop of its own, see PostgresStore."""

    def __init__(
        self,
        url: str,
        *,
        password: str,
        timeout_s: float,
        lease_s: float,
        me: Me,
        clock: Clock,
        migrations: Sequence[str],
    ) -> None:
        self._url = url
        self._password = password
        self._timeout_s = timeout_s
        self.lease_s = lease_s
        self._me = me
        self._clock = clock
        self._migrations = (*_OWN_MIGRATIONS, *map(translated, migrations))
        self._thread = LoopThread("leadership")
        self._connection: Any = None
        self._valid_until_s = 0.0
        self.state = LeaderState.AWAY
        self.since_s = clock.now()
        self.since_wall_s = clock.wall()
        self.reason = "starting"
        self.term = 0
        self.others: list[dict[str, Any]] = []

    @property
    def away(self) -> bool:
        return self.state is LeaderState.AWAY

    def holds(self) -> bool:
        """Whether this controller leads at this moment, as far as it can know without asking."""
        return self.state is LeaderState.LEADING and self._clock.now() < self._valid_until_s

    async def acquire(self) -> PostgresStore:
        """Wait until this controller leads; its store for the term that begins.

        Raises StoreError when the database is not one it can work with.
        """
        return await self._thread.ask(self._acquire())

    async def lost(self) -> str:
        """Wait until it leads no more, and say why. The state is then no longer *leading*."""
        return await self._thread.ask(self._hold())

    async def resign(self) -> None:
        """Let another lead, now."""
        self._enter(LeaderState.AWAY, "resigned")
        await self._thread.ask(self._drop())

    def close(self) -> None:
        """Ends the lock's connection, and its thread."""
        self._enter(LeaderState.AWAY, "stopped")
        self._thread.wait(self._drop())
        self._thread.close()

    def summary(self) -> dict[str, Any]:
        """For the status document."""
        fresh_s = 2 * self.lease_s
        leads = [r for r in self.others if r["state"] == "leading" and r["seen_s_ago"] < fresh_s]
        leader = leads[0] if leads else None
        mine = self.state is LeaderState.LEADING
        return {
            "state": self.state.value,
            "since_s": round(self._clock.now() - self.since_s, 3),
            "since_wall_s": self.since_wall_s,
            "reason": self.reason,
            "term": self.term or None,
            "lease_s": self.lease_s,
            "store": "postgresql",
            "leader": {"name": self._me.name, "host": self._me.host} if mine
            else leader and {"name": leader["name"], "host": leader["host"]},
            "others": [
                {
                    **{name: row[name] for name in ("name", "host", "hub", "state")},
                    "since_s": round(row["since_s"], 3),
                    "seen_s_ago": round(row["seen_s_ago"], 3),
                }
                for row in self.others
            ],
        }  # fmt: skip

    def _enter(self, state: LeaderState, reason: str) -> None:
        self.reason = reason
        if state is not self.state:
            _log.info("leadership", extra={"was": self.state.value, "state": state.value,
                                           "reason": reason})  # fmt: skip
            self.state = state
            self.since_s, self.since_wall_s = self._clock.now(), self._clock.wall()

    # -- in the thread -------------------------------------------------------------------------

    async def _connect(self) -> Any:
        """A session whose transactions the server ends by itself when they are left alone."""
        half_ms = str(round(self.lease_s * 500))
        return await asyncpg.connect(
            self._url,
            password=self._password or None,
            timeout=self._timeout_s,
            server_settings={
                "application_name": f"intentd-controller {self._me.name}"[:63],
                "search_path": SCHEMA,
                "idle_in_transaction_session_timeout": half_ms,
                "tcp_keepalives_idle": "1",
                "tcp_keepalives_interval": "1",
                "tcp_keepalives_count": "3",
            },
        )

    async def _open(self) -> None:
        """Connect, bring the schema to this version, and have the session end when silent."""
        self._connection = await self._connect()
        version = int(await self._connection.fetchval("SHOW server_version_num"))
        if version < OLDEST:
            raise StoreError(f"store.url: PostgreSQL {version // 10000}, expected 14 or newer")
        async with asyncio.timeout(self._timeout_s), self._connection.transaction():
            await self._connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
            await migrate(self._connection, self._migrations)
        lease_ms = round(self.lease_s * 1000)
        await self._connection.execute(f"SET idle_session_timeout = {lease_ms}")
        await self._connection.execute("SET synchronous_commit = off")  # of beats: see _begin_term

    async def _acquire(self) -> PostgresStore:
        while True:
            try:
                if self._connection is None or self._connection.is_closed():
                    await self._open()
                asked_s = self._clock.now()
                async with asyncio.timeout(self._timeout_s):
                    mine = await self._connection.fetchval(
                        "SELECT pg_try_advisory_lock($1)", LEADER_LOCK
                    )
                    if mine:
                        await self._begin_term()
                        self._valid_until_s = asked_s + self.lease_s
                        self._enter(LeaderState.LEADING, "")
                    else:
                        self._enter(LeaderState.STANDBY, "another controller leads")
                async with asyncio.timeout(self.lease_s):  # it says that it leads no longer
                    await self._tell()
                if mine:
                    return PostgresStore(
                        self._thread,
                        self._connect,
                        timeout_s=self._timeout_s,
                        fence=FENCE,
                        term=self.term,
                    )
                await asyncio.sleep(POLL_S)
            except StoreError:
                await self._drop()
                raise
            except (*AWAY, ValueError) as error:
                self._enter(LeaderState.AWAY, shown(error))
                await self._drop()
                await asyncio.sleep(RETRY_S)

    async def _begin_term(self) -> None:
        """Durable before anything is written in it, and after all that is written in the last.

        Every write holds its lock on the table until it ends, so this waits for those on their way;
        not for long: one whose leader stands still between the messages of a statement is ended by
        none of the server's own timeouts, and would keep every later leader away.
        """
        try:
            await self._write_term(patience_s=self.lease_s / BEATS)
        except asyncpg.LockNotAvailableError:
            ended = await self._connection.fetch(_END_WRITES)
            _log.warning("writes of a deposed leader ended", extra={"sessions": len(ended)})
            await self._write_term(patience_s=self.lease_s)

    async def _write_term(self, *, patience_s: float) -> None:
        async with self._connection.transaction():
            await self._connection.execute("SET LOCAL synchronous_commit = on")
            await self._connection.execute(f"SET LOCAL lock_timeout = {round(patience_s * 1000)}")
            await self._connection.execute("LOCK TABLE terms IN EXCLUSIVE MODE")
            self.term = await self._connection.fetchval(
                "INSERT INTO terms SELECT coalesce(max(term), 0) + 1, $1, $2, $3, now() "
                "FROM terms RETURNING term",
                self._me.name, self._me.host, self._me.boot,
            )  # fmt: skip
            await self._connection.execute("DELETE FROM terms WHERE term < $1", self.term - 100)

    async def _tell(self) -> None:
        me = self._me
        rows = await self._connection.fetch(
            _SEEN, me.name, me.host, me.hub, me.boot, self.state.value
        )
        self.others = [dict(row) for row in rows]

    async def _hold(self) -> str:
        reason = ""
        while not reason:
            await asyncio.sleep(self.lease_s / BEATS)
            asked_s = self._clock.now()
            if asked_s >= self._valid_until_s:
                reason = "this process did not run for a lease"
                break
            try:
                async with asyncio.timeout(self._valid_until_s - asked_s):
                    await self._tell()
            except AWAY as error:
                reason = shown(error)
            else:
                self._valid_until_s = asked_s + self.lease_s
        self._enter(LeaderState.AWAY, reason)
        await self._drop()
        return reason

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*AWAY):
                connection.terminate()
