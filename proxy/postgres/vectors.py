"""pgvector, where the database has it: the cache's vectors in a column, searched by the database.

Every vector is looked at there too: the gate's one threshold counts on the nearest being found,
and an index that is filtered afterwards loses some. The column stands beside the bytes that
proxies with an index of their own read, so a proxy may change from one way to the other.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from typing import Final

from intentd.daemons.kit.postgres import MIGRATION_LOCK, Database
from intentd.daemons.kit.store import StoreError
from intentd.proxy.store.cache import NearKey

_log = logging.getLogger(__name__)

AT_ONCE: Final = 500
_THERE: Final = "SELECT 1 FROM pg_extension WHERE extname = 'vector'"
_OFFERED: Final = "SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"
_HAS_COLUMN: Final = (
    "SELECT 1 FROM pg_attribute WHERE attrelid = 'cache_keys'::regclass "
    "AND attname = 'embedding' AND NOT attisdropped"
)
_TURN: Final = "SELECT pg_advisory_xact_lock($1)"
_COLUMN: Final = "ALTER TABLE cache_keys ADD COLUMN IF NOT EXISTS embedding vector"
_MISSING: Final = (
    "SELECT item, place, vector FROM cache_keys WHERE embedding IS NULL AND vector <> ''::bytea "
    "LIMIT $1"
)
_FILL: Final = (
    "UPDATE cache_keys SET embedding = $1::text::vector "
    "WHERE item = $2 AND place = $3 AND embedding IS NULL"
)
_NEAREST: Final = (
    "SELECT i.id, k.place, 1 - (k.embedding <=> $1::text::vector) AS similarity "
    "FROM cache_keys k JOIN cache_items i ON i.number = k.item "
    "WHERE i.owner = ANY($2::text[]) AND k.space = $3 AND k.embedding IS NOT NULL "
    "AND (cardinality($4::text[]) = 0 OR k.kind = ANY($4::text[])) "
    "AND (cardinality($5::text[]) = 0 OR i.scope = ANY($5::text[])) "
    "AND 1 - (k.embedding <=> $1::text::vector) >= $6 "
    "ORDER BY similarity DESC, i.number LIMIT $7"
)


def as_text(packed: bytes) -> str | None:
    """A vector of float16 as pgvector reads it; None for none."""
    if not packed:
        return None
    values = struct.unpack(f"<{len(packed) // 2}e", packed)
    return f"[{','.join(map(repr, values))}]"


class DatabaseVectors:
    """A store.cache.VectorSearch; `prepare` makes it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def nearest(
        self,
        vector: bytes,
        space: str,
        owners: Sequence[str],
        *,
        kinds: Sequence[str],
        scopes: Sequence[str],
        min_similarity: float,
        limit: int,
    ) -> list[NearKey]:
        rows = await self._database.read(
            _NEAREST, as_text(vector), list(owners), space, list(kinds), list(scopes),
            min_similarity, limit,
        )  # fmt: skip
        return [NearKey(row["id"], row["place"], row["similarity"]) for row in rows]


async def prepare(database: Database) -> DatabaseVectors | None:
    """The search, with the extension made and all vectors in their column; None without it.

    Whoever comes first does the work. Raises StoreError when the database is away.
    """
    if not await database.read(_THERE):
        if not await database.read(_OFFERED):
            return None
        try:
            async with database.transaction() as db:
                await db.execute(_TURN, MIGRATION_LOCK)
                await db.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except StoreError as error:
            await database.read("SELECT 1")  # away, or not allowed
            _log.info("pgvector is there and not to be used", extra={"reason": str(error)})
            return None
    if not await database.read(_HAS_COLUMN):  # altering it waits for all who read it
        async with database.transaction() as db:
            await db.execute(_TURN, MIGRATION_LOCK)
            await db.execute(_COLUMN)
    while await _fill(database):
        pass
    return DatabaseVectors(database)


async def _fill(database: Database) -> int:
    """Some of the vectors that are not in their column yet; how many these were."""
    async with database.transaction() as db:
        await db.execute(_TURN, MIGRATION_LOCK)
        rows = await db.fetch(_MISSING, AT_ONCE)
        await db.executemany(
            _FILL, [(as_text(row["vector"]), row["item"], row["place"]) for row in rows]
        )
    return len(rows)
