"""The audit log: every change asked for by API, console or admin socket, and what became of it; and
what was changed at members, as their reports tell.

Table ``audit`` of the controller's store. An entry is written after the change, and also when it
was refused; prompts, tokens and other secrets are never part of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from intentd.daemons.kit.changes import Change
from intentd.daemons.kit.store import Connection, Storage

KEPT: Final = 100_000
MAX_PAGE: Final = 1000
MAX_TEXT: Final = 500

MIGRATION: Final = """
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT, wall_s REAL NOT NULL, who TEXT NOT NULL,
        via TEXT NOT NULL, action TEXT NOT NULL, about TEXT NOT NULL, before TEXT NOT NULL,
        after TEXT NOT NULL, result TEXT NOT NULL
    ) STRICT;
"""


MEMBERS_MIGRATION: Final = """
    CREATE TABLE audited (
        member TEXT PRIMARY KEY, boot TEXT NOT NULL, number INTEGER NOT NULL
    ) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """who: token, session's token or account. via: api, console or admin; of a daemon's own also
    signal, start or trial. before, after: policy numbers as ERA.NUMBER where a policy changed.
    result: "done", or "refused: why"."""

    who: str
    via: str
    action: str
    about: str = ""
    before: str = ""
    after: str = ""
    result: str = "done"


class AuditLog:
    """Bounded: the oldest entries beyond KEPT are dropped."""

    def __init__(self, store: Storage, wall: Callable[[], float]) -> None:
        self._store = store
        self._wall = wall

    async def add(self, entry: Entry) -> None:
        """On disk when it returns. Raises StoreError."""

        def write(store: Storage) -> None:
            with store.transaction() as db:
                self._insert(db, entry)

        await self._store.run(write)

    def _insert(self, db: Connection, entry: Entry) -> None:
        values = (
            self._wall(),
            entry.who[:128],
            entry.via,
            entry.action[:80],
            entry.about[:MAX_TEXT],
            entry.before,
            entry.after,
            entry.result[:MAX_TEXT],
        )
        rows = db.execute(
            "INSERT INTO audit (wall_s, who, via, action, about, before, after, result) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
            values,
        ).fetchall()
        db.execute("DELETE FROM audit WHERE id <= ?", (rows[0][0] - KEPT,))

    async def add_of_member(self, member: str, boot: str, changes: Sequence[Change]) -> None:
        """What was changed at a member, each once, however often it is reported and whichever
        controller hears of it. Raises StoreError."""

        def write(store: Storage) -> None:
            with store.transaction() as db:
                known = db.execute(
                    "SELECT boot, number FROM audited WHERE member = ?", (member,)
                ).fetchone()
                last = known[1] if known is not None and known[0] == boot else 0
                for change in changes:
                    if change.number > last:
                        about = f"{member} {change.about}".strip()
                        self._insert(
                            db,
                            Entry(change.who, change.via, change.action, about,
                                  result=change.result),
                        )  # fmt: skip
                        last = change.number
                db.execute("DELETE FROM audited WHERE member = ?", (member,))
                db.execute("INSERT INTO audited VALUES (?, ?, ?)", (member, boot, last))

        await self._store.run(write)

    def page(self, limit: int = 100, before: int = 0) -> list[dict[str, Any]]:
        """Newest first; before: only entries with smaller ids."""
        rows = self._store.read(
            "SELECT * FROM audit WHERE id < ? ORDER BY id DESC LIMIT ?",
            (before or 2**62, min(limit, MAX_PAGE)),
        )
        return [dict(row) for row in rows]
