"""What users said of answers, in PostgreSQL; a store.base.FeedbackTable."""

from __future__ import annotations

from typing import Final

from intentd.daemons.kit.postgres import Database
from intentd.proxy.store.base import FeedbackRow

MIGRATION: Final = """
    CREATE TABLE feedback(
        key TEXT NOT NULL, id TEXT NOT NULL, good BOOLEAN NOT NULL, comment TEXT NOT NULL,
        wall_s DOUBLE PRECISION NOT NULL, PRIMARY KEY(key, id)
    );
    CREATE INDEX feedback_wall ON feedback(wall_s);
    """
_WRITE: Final = (
    "INSERT INTO feedback(key, id, good, comment, wall_s) VALUES ($1, $2, $3, $4, $5) "
    "ON CONFLICT(key, id) DO UPDATE SET good = excluded.good, comment = excluded.comment, "
    "wall_s = excluded.wall_s"
)
_PRUNE: Final = (
    "DELETE FROM feedback WHERE wall_s < "
    "(SELECT wall_s FROM feedback ORDER BY wall_s DESC LIMIT 1 OFFSET $1)"
)


class SharedFeedback:
    """Rows of all proxies."""

    def __init__(self, database: Database, max_rows: int) -> None:
        self.max_rows = max_rows
        self._database = database

    async def write(self, row: FeedbackRow) -> None:
        async with self._database.transaction() as db:
            await db.execute(_WRITE, row.key_id, row.request_id, row.good, row.comment, row.wall_s)
            await db.execute(_PRUNE, self.max_rows)

    async def find(self, key_id: str, request_id: str) -> FeedbackRow | None:
        rows = await self._database.read(
            "SELECT good, comment, wall_s FROM feedback WHERE key = $1 AND id = $2",
            key_id,
            request_id,
        )
        if not rows:
            return None
        (row,) = rows
        return FeedbackRow(key_id, request_id, row["good"], row["comment"], row["wall_s"])
