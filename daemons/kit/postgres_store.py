"""The tables of one role in PostgreSQL behind the calls of ``store.Store``, for one writer a term.

Statements run on a loop in a thread of their own, so that neither a slow database nor a busy daemon
holds up the other; callers wait for them, at most timeout_s. Every transaction checks, in the
database, that its term is still the last one (``fence``): the writes of a leader that was deposed
while it slept are refused whole, whatever it still believes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

import asyncpg

from intentd.daemons.kit.postgres import AWAY, shown
from intentd.daemons.kit.store import StoreError

_log = logging.getLogger(__name__)

T = TypeVar("T")
_TYPES: Final = (
    (re.compile(r"\bINTEGER PRIMARY KEY AUTOINCREMENT\b"), "BIGSERIAL PRIMARY KEY"),
    (re.compile(r"\bINTEGER\b"), "BIGINT"),
    (re.compile(r"\bREAL\b"), "DOUBLE PRECISION"),
    (re.compile(r"\bBLOB\b"), "BYTEA"),
    (re.compile(r"\)\s*STRICT\b"), ")"),
)


class DeposedError(StoreError):
    """Another holds a later term: nothing was written, and nothing will be in this one."""


def translated(migration: str) -> str:
    """A migration written for SQLite, in PostgreSQL's words."""
    for pattern, word in _TYPES:
        migration = pattern.sub(word, migration)
    return migration


def numbered(sql: str) -> str:
    """``?`` as ``$1``, ``$2``, ...; the statements have no ``?`` in texts."""
    parts = sql.split("?")
    return "".join(f"{part}${at}" for at, part in enumerate(parts[:-1], 1)) + parts[-1]


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result, waited for by this thread: work must bound itself in time."""
        return self.begin(work).result()

    async def ask(self, work: Coroutine[Any, Any, T]) -> T:
        """The result, awaited in another loop; cancelling it cancels the work."""
        return await asyncio.wrap_future(self.begin(work))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Rows:
    def __init__(self, rows: list[Any], status: str) -> None:
        self._rows = rows
        count = status.rpartition(" ")[2]
        self.rowcount = int(count) if count.isdecimal() else -1

    def fetchone(self) -> Any:
        return self._rows[0] if self._rows else None

    def fetchall(self) -> list[Any]:
        return self._rows


class PostgresStore:
    """A ``store.Storage``. connect: a fresh connection.

    fence: statements that begin each transaction; the last one tells the newest term, and they keep
    a later one from beginning until the transaction ends.
    """

    def __init__(
        self,
        thread: LoopThread,
        connect: Callable[[], Coroutine[Any, Any, Any]],
        *,
        timeout_s: float,
        fence: Sequence[str],
        term: int,
    ) -> None:
        self._thread = thread
        self._connect = connect
        self._timeout_s = timeout_s
        self._fence = fence
        self._term = term
        self._connection: Any = None
        self._lock = threading.RLock()
        self._pool: ThreadPoolExecutor | None = None
        self._failure = ""
        self._closing = False
        self._asked: Future[Any] | None = None  # what the database has not answered yet

    @contextlib.contextmanager
    def transaction(self) -> Iterator[PostgresStore]:
        """All or nothing, durable on return. Raises StoreError, DeposedError.

        After an error at the commit nobody knows whether it happened: what is written twice must
        be the same, and what must not be is numbered inside the transaction.
        """
        with self._lock:
            try:
                self._do(self._begin())
                try:
                    yield self
                    self._do(self._end("COMMIT"))
                except BaseException:
                    if self._connection is not None:
                        with contextlib.suppress(*AWAY):
                            self._do(self._end("ROLLBACK"))
                    raise
            except AWAY as error:
                self._failure = f"store: {shown(error)}"
                raise StoreError(self._failure) from None
            self._failure = ""

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> _Rows:
        """One statement of the transaction that ``transaction`` opened."""
        return self._do(self._execute(sql, parameters))

    def read(self, sql: str, parameters: Sequence[Any] = (), /) -> Sequence[Any]:
        """Rows of one query. Raises StoreError."""
        with self._lock:
            try:
                return self._do(self._execute(sql, parameters)).fetchall()
            except AWAY as error:
                self._failure = f"store: {shown(error)}"
                raise StoreError(self._failure) from None

    async def run(self, work: Callable[[Any], T]) -> T:
        """Do blocking work on the store's own thread, in order."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="store")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, self)

    def unready(self) -> list[str]:
        return [self._failure] if self._failure else []

    def probe(self) -> None:
        """Try whether the database answers again."""
        if self._failure:
            with contextlib.suppress(StoreError), self.transaction():
                pass

    def close(self) -> None:
        """Ends the connection; the thread is its owner's. What still waits for the database gets
        StoreError now: one that stands still would hold the end of the daemon up."""
        self._closing = True
        asked = self._asked
        if asked is not None:
            asked.cancel()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        with self._lock:
            self._thread.wait(self._drop())

    # -- in the thread -------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        self._asked = asked = self._thread.begin(work)
        if self._closing:
            asked.cancel()
        try:
            return asked.result()
        except CancelledError:
            raise StoreError("store: closed") from None
        finally:
            self._asked = None

    async def _execute(self, sql: str, parameters: Sequence[Any]) -> _Rows:
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._connection is None:
                    self._connection = await self._connect()
                statement = await self._connection.prepare(numbered(sql))
                rows = await statement.fetch(*parameters)
                return _Rows(rows, statement.get_statusmsg())
        except asyncpg.PostgresError as error:
            if self._connection is not None and self._connection.is_closed():
                await self._drop()
            raise error
        except BaseException:
            await self._drop()  # nobody knows what it still waits for
            raise

    async def _begin(self) -> None:
        for attempt in (1, 2):
            try:
                await self._execute("BEGIN", ())
                break
            except AWAY:  # one that was cut while idle is made anew, once
                await self._drop()
                if attempt == 2:
                    raise
        for statement in self._fence:
            row = (await self._execute(statement, ())).fetchone()
        if row is None or row[0] != self._term:
            await self._end("ROLLBACK")
            newest = "none" if row is None else row[0]
            raise DeposedError(f"store: term {self._term} is over: the newest is {newest}")

    async def _end(self, how: str) -> None:
        await self._execute(how, ())

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*AWAY):
                connection.terminate()
