"""What must survive ``kill -9``: SQLite in WAL mode, numbered migrations.

A write that returned is on disk (synchronous=FULL). A full or failing disk turns readiness false
with the reason; the next write that succeeds clears it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from intentd.core.errors import IntentdError

T = TypeVar("T")
BUSY_TIMEOUT_MS: Final = 5000


class StoreError(IntentdError):
    """The store cannot be opened, read or written; nothing was changed."""


class Rows(Protocol):
    """What a statement brought; a sqlite3.Cursor is one."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Connection(Protocol):
    """Inside a transaction; a sqlite3.Connection is one. Parameters are marked by ``?``."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Rows: ...


class Storage(Protocol):
    """What a role that may keep its tables in SQLite or in PostgreSQL needs of its store.

    The SQL has to be of both: ON CONFLICT instead of OR REPLACE, no implicit row numbers.
    """

    def transaction(self) -> contextlib.AbstractContextManager[Connection]: ...

    def read(self, sql: str, parameters: Sequence[Any] = ..., /) -> Sequence[Any]: ...

    async def run(self, work: Callable[[Any], T]) -> T: ...

    def unready(self) -> list[str]: ...

    def probe(self) -> None: ...

    def close(self) -> None: ...


class Store:
    """One SQLite database. migrations[i] takes the schema from version i to i + 1."""

    def __init__(self, path: Path, migrations: Sequence[str]) -> None:
        """Open, check and migrate. Raises StoreError."""
        self.path = path
        self._lock = threading.RLock()
        self._pool: ThreadPoolExecutor | None = None
        self._failure = ""
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise StoreError(f"{path}: cannot open: {error}") from None
        try:
            self._open(migrations)
        except sqlite3.Error as error:
            self._db.close()
            raise StoreError(f"{path}: {error}: move it away or restore a backup") from None
        except StoreError:
            self._db.close()
            raise

    def _open(self, migrations: Sequence[str]) -> None:
        db = self._db
        db.row_factory = sqlite3.Row
        db.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA foreign_keys=ON")
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise StoreError(f"{self.path}: damaged ({found}): move it away or restore a backup")
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(migrations):
            raise StoreError(
                f"{self.path}: schema version {version}, newer than {len(migrations)}: "
                "upgrade intentd or use another state_dir"
            )
        for number in range(version, len(migrations)):
            script = (
                f"BEGIN IMMEDIATE;\n{migrations[number]};\n"
                f"PRAGMA user_version={number + 1};\nCOMMIT;"
            )
            try:
                db.executescript(script)
            except sqlite3.Error:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @property
    def version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; on return it is on disk. Raises StoreError when the disk refuses."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.OperationalError as error:
                self._failure = f"store {self.path.name}: {error}"
                raise StoreError(self._failure) from error
            self._failure = ""

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Rows of one query. Raises StoreError."""
        with self._lock:
            try:
                return self._db.execute(sql, parameters).fetchall()
            except sqlite3.OperationalError as error:
                raise StoreError(f"store {self.path.name}: {error}") from error

    async def run(self, work: Callable[[Store], T]) -> T:
        """Do blocking work (an fsync takes milliseconds) on the store's own thread, in order."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="store")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, self)

    def unready(self) -> list[str]:
        """Why the last write failed; empty once one succeeded again."""
        return [self._failure] if self._failure else []

    def probe(self) -> None:
        """Try a write that changes nothing, so that a store nobody writes to recovers too."""
        if self._failure:
            with contextlib.suppress(StoreError), self.transaction() as db:
                db.execute(f"PRAGMA user_version={self.version}")

    def backup(self, target: Path) -> None:
        """A consistent copy while in use."""
        with self._lock, contextlib.closing(sqlite3.connect(target)) as copy:
            self._db.backup(copy)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        with self._lock:
            self._db.close()
