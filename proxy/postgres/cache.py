"""The cache's rows in PostgreSQL: each proxy holds its own index and follows what others change.

Numbers of items and of removals come from one sequence, and writers take turns by a lock, so that
numbers become visible in their order: who has read up to a number has seen all below it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from intentd.daemons.kit.postgres import Database
from intentd.proxy.postgres.vectors import as_text
from intentd.proxy.store.cache import ItemRow, KeyRow, Page, VectorSearch

MIGRATION: Final = """
    CREATE SEQUENCE cache_numbers;
    CREATE TABLE cache_items(
        number BIGINT PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
        scope TEXT NOT NULL, prompt TEXT NOT NULL, response TEXT NOT NULL, source TEXT NOT NULL,
        model TEXT NOT NULL, put BOOLEAN NOT NULL, cost_nano BIGINT NOT NULL,
        out_tokens BIGINT NOT NULL, wall_s DOUBLE PRECISION NOT NULL,
        expires_wall_s DOUBLE PRECISION NOT NULL
    );
    CREATE INDEX cache_items_source ON cache_items(owner, source, number);
    CREATE TABLE cache_keys(
        item BIGINT NOT NULL REFERENCES cache_items(number) ON DELETE CASCADE,
        place INT NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL, vector BYTEA NOT NULL,
        space TEXT NOT NULL, PRIMARY KEY(item, place)
    );
    CREATE TABLE cache_removed(
        number BIGINT PRIMARY KEY, id TEXT NOT NULL, wall TIMESTAMPTZ NOT NULL
    );
    CREATE TABLE cache_kept(name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
WRITE_LOCK: Final = 0x696E74636163
# A proxy that was cut off for longer than this reads removals too late; it must start anew.
FORGET: Final = "DELETE FROM cache_removed WHERE wall < clock_timestamp() - interval '7 days'"
FORGET_EVERY: Final = 1000

_ITEM: Final = (
    "number, id, owner, scope, prompt, response, source, model, put, cost_nano, out_tokens, "
    "wall_s, expires_wall_s"
)
_WITHOUT_TEXTS: Final = (
    "SELECT number, id, owner, scope, '' AS prompt, '' AS response, source, model, put, "
    "cost_nano, out_tokens, wall_s, expires_wall_s FROM cache_items "
    "WHERE number > $1 ORDER BY number LIMIT $2"
)
_REMOVED: Final = "SELECT number, id FROM cache_removed WHERE number > $1 ORDER BY number LIMIT $2"
_BY_ID: Final = "SELECT * FROM cache_items WHERE id = ANY($1::text[])"
_OF_OWNERS: Final = (
    "SELECT * FROM cache_items WHERE owner = ANY($1::text[]) "
    "AND ($2::text IS NULL OR source = $2) AND number > $3 ORDER BY number LIMIT $4"
)
_KEYS: Final = (
    "SELECT item, kind, text, ''::bytea AS vector, space FROM cache_keys "
    "WHERE item = ANY($1::bigint[]) ORDER BY item, place"
)
_KEYS_WITH_VECTORS: Final = _KEYS.replace("''::bytea AS vector", "vector")
_INSERT: Final = (
    f"INSERT INTO cache_items({_ITEM}) "  # noqa: S608  a constant of ours
    "VALUES (nextval('cache_numbers'), $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) "
    "RETURNING number"
)
_INSERT_KEY: Final = (
    "INSERT INTO cache_keys(item, place, kind, text, vector, space) VALUES ($1, $2, $3, $4, $5, $6)"
)
_INSERT_KEY_VECTOR: Final = (
    "INSERT INTO cache_keys(item, place, kind, text, vector, space, embedding) "
    "VALUES ($1, $2, $3, $4, $5, $6, $7::text::vector)"
)
_REMOVE: Final = (
    "WITH gone AS (DELETE FROM cache_items WHERE id = ANY($1::text[]) RETURNING id) "
    "INSERT INTO cache_removed(number, id, wall) "
    "SELECT nextval('cache_numbers'), id, clock_timestamp() FROM gone"
)
_SET_VECTOR: Final = (
    "UPDATE cache_keys SET vector = $1, space = $2 WHERE place = $3 AND "
    "item = (SELECT number FROM cache_items WHERE id = $4)"
)
_SET_EMBEDDING: Final = _SET_VECTOR.replace(
    "vector = $1,", "vector = $1, embedding = $5::text::vector,"
)
_KEEP: Final = (
    "INSERT INTO cache_kept(name, value) VALUES ($1, $2) "
    "ON CONFLICT(name) DO UPDATE SET value = excluded.value"
)


class PostgresCacheRows:
    """A store.cache.CacheRows that several proxies write to."""

    shared = True

    def __init__(self, database: Database, vector_search: VectorSearch | None = None) -> None:
        self.vector_search = vector_search
        self._database = database
        self._writes = 0

    async def put(self, items: Sequence[ItemRow], *, replaces: Sequence[str] = ()) -> None:
        async with self._writer() as db:
            await db.execute(_REMOVE, [*replaces, *(item.item_id for item in items)])
            for item in items:
                number = await db.fetchval(
                    _INSERT, item.item_id, item.owner, item.scope, item.prompt, item.response,
                    item.source, item.model, item.put, item.cost_nano, item.out_tokens,
                    item.wall_s, item.expires_wall_s,
                )  # fmt: skip
                rows = [
                    (number, place, key.kind, key.text, key.vector, key.space)
                    for place, key in enumerate(item.keys)
                ]
                if self.vector_search is None:
                    await db.executemany(_INSERT_KEY, rows)
                else:
                    await db.executemany(
                        _INSERT_KEY_VECTOR, [(*row, as_text(row[4])) for row in rows]
                    )

    async def remove(self, item_ids: Sequence[str]) -> None:
        if item_ids:
            async with self._writer() as db:
                await db.execute(_REMOVE, list(item_ids))

    async def fetch(self, item_ids: Sequence[str]) -> list[ItemRow]:
        async with self._database.transaction() as db:
            return await _with_keys(db, await db.fetch(_BY_ID, list(item_ids)), _KEYS)

    async def find(
        self, owners: Sequence[str], *, source: str | None, after: int, most: int
    ) -> list[ItemRow]:
        async with self._database.transaction() as db:
            rows = await db.fetch(_OF_OWNERS, list(owners), source, after, most)
            return await _with_keys(db, rows, _KEYS)

    async def ids(self, owner: str, source: str) -> list[str]:
        sql = "SELECT id FROM cache_items WHERE owner = $1 AND source = $2"
        return [row["id"] for row in await self._database.read(sql, owner, source)]

    async def page(self, after: int, most: int) -> Page:
        """Items and removals up to one number, so that neither runs ahead of the other."""
        async with self._database.transaction() as db:
            await db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            rows = await db.fetch(_WITHOUT_TEXTS, after, most)
            gone = await db.fetch(_REMOVED, after, most)
            more = len(rows) == most or len(gone) == most
            ends = [part[-1]["number"] for part in (rows, gone) if len(part) == most]
            upto = (
                min(ends)
                if ends
                else max((row["number"] for row in (*rows[-1:], *gone[-1:])), default=after)
            )
            rows = [row for row in rows if row["number"] <= upto]
            items = await _with_keys(db, rows, _KEYS_WITH_VECTORS)
        # An id removed and written again since is among the items, and stays.
        here = {item.item_id for item in items}
        removed = tuple(
            row["id"] for row in gone if row["number"] <= upto and row["id"] not in here
        )
        return Page(tuple(items), removed, upto, more)

    async def set_vectors(self, rows: Sequence[tuple[str, int, bytes, str]]) -> None:
        given = [(vector, space, place, item_id) for item_id, place, vector, space in rows]
        async with self._database.transaction() as db:
            if self.vector_search is None:
                await db.executemany(_SET_VECTOR, given)
            else:
                await db.executemany(_SET_EMBEDDING, [(*row, as_text(row[0])) for row in given])

    async def keep(self, name: str, value: str) -> None:
        async with self._database.transaction() as db:
            await db.execute(_KEEP, name, value)

    async def kept(self) -> dict[str, str]:
        rows = await self._database.read("SELECT name, value FROM cache_kept")
        return {row["name"]: row["value"] for row in rows}

    @contextlib.asynccontextmanager
    async def _writer(self) -> AsyncIterator[Any]:
        self._writes += 1
        async with self._database.transaction() as db:
            await db.execute("SELECT pg_advisory_xact_lock($1)", WRITE_LOCK)
            yield db
            if self._writes % FORGET_EVERY == 0:
                await db.execute(FORGET)


async def _with_keys(db: Any, rows: Sequence[Any], keys_sql: str) -> list[ItemRow]:
    """Items in the order of rows, each with its keys."""
    if not rows:
        return []
    found = await db.fetch(keys_sql, [row["number"] for row in rows])
    keys = {
        item: tuple(KeyRow(row["kind"], row["text"], row["vector"], row["space"]) for row in group)
        for item, group in itertools.groupby(found, lambda row: int(row["item"]))
    }
    return [
        ItemRow(
            row["id"], row["owner"], row["response"], keys.get(row["number"], ()),
            row["scope"], row["prompt"], row["source"], row["model"], row["put"],
            row["cost_nano"], row["out_tokens"], row["wall_s"], row["expires_wall_s"],
            row["number"],
        )
        for row in rows
    ]  # fmt: skip
