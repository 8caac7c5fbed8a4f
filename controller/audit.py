"""The audit log: every change asked for by API, console or admin socket, and what became of it.

Table ``audit`` of the controller's store. An entry is written after the change, and also when it
was refused; prompts, tokens and other secrets are never part of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from intentd.daemons.kit.store import Storage

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


@dataclass(frozen=True, slots=True)
class Entry:
    """who: token, session's token or account. via: api, console or admin. before, after: policy
    numbers as ERA.NUMBER where a policy changed. result: "done", or "refused: why"."""

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

        def write(store: Storage) -> None:
            with store.transaction() as db:
                rows = db.execute(
                    "INSERT INTO audit (wall_s, who, via, action, about, before, after, result) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
                    values,
                ).fetchall()
                db.execute("DELETE FROM audit WHERE id <= ?", (rows[0][0] - KEPT,))

        await self._store.run(write)

    def page(self, limit: int = 100, before: int = 0) -> list[dict[str, Any]]:
        """Newest first; before: only entries with smaller ids."""
        rows = self._store.read(
            "SELECT * FROM audit WHERE id < ? ORDER BY id DESC LIMIT ?",
            (before or 2**62, min(limit, MAX_PAGE)),
        )
        return [dict(row) for row in rows]
