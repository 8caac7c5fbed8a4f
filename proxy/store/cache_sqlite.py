"""The cache's rows in the proxy's own SQLite database."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Sequence
from typing import Final

from intentd.daemons.kit.store import Store
from intentd.proxy.store.cache import ItemRow, KeyRow, Page, VectorSearch

MIGRATION: Final = """
    CREATE TABLE cache_items(
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
        scope TEXT NOT NULL, prompt TEXT NOT NULL, response TEXT NOT NULL, source TEXT NOT NULL,
        model TEXT NOT NULL, put INTEGER NOT NULL, cost_nano INTEGER NOT NULL,
        out_tokens INTEGER NOT NULL, wall_s REAL NOT NULL, expires_wall_s REAL NOT NULL
    ) STRICT;
    CREATE INDEX cache_items_source ON cache_items(owner, source, number);
    CREATE TABLE cache_keys(
        item INTEGER NOT NULL REFERENCES cache_items(number) ON DELETE CASCADE,
        place INTEGER NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL, vector BLOB NOT NULL,
        space TEXT NOT NULL, PRIMARY KEY(item, place)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE cache_kept(name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""
_WITHOUT_TEXTS: Final = (  # texts stay on disk: what is loaded is what the indexes hold
    "SELECT number, id, owner, scope, '' AS prompt, '' AS response, source, model, put, "
    "cost_nano, out_tokens, wall_s, expires_wall_s FROM cache_items "
    "WHERE number > ? ORDER BY number LIMIT ?"
)
_BY_ID: Final = "SELECT * FROM cache_items WHERE id IN (SELECT value FROM json_each(?))"
_OF_OWNERS: Final = (
    "SELECT * FROM cache_items WHERE owner IN (SELECT value FROM json_each(?)) "
    "AND (? IS NULL OR source = ?) AND number > ? ORDER BY number LIMIT ?"
)
_KEYS: Final = (
    "SELECT item, kind, text, x'' AS vector, space FROM cache_keys "
    "WHERE item IN (SELECT value FROM json_each(?)) ORDER BY item, place"
)
_KEYS_WITH_VECTORS: Final = _KEYS.replace("x'' AS vector", "vector")


class SqliteCacheRows:
    """CacheRows on kit.store; one process owns the file."""

    shared = False
    vector_search: VectorSearch | None = None

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(self, items: Sequence[ItemRow], *, replaces: Sequence[str] = ()) -> None:
        def write(store: Store) -> None:
            with store.transaction() as db:
                _remove(db, [*replaces, *(item.item_id for item in items)])
                for item in items:
                    _insert(db, item)

        await self._store.run(write)

    async def remove(self, item_ids: Sequence[str]) -> None:
        def write(store: Store) -> None:
            with store.transaction() as db:
                _remove(db, item_ids)

        await self._store.run(write)

    async def fetch(self, item_ids: Sequence[str]) -> list[ItemRow]:
        def read(store: Store) -> list[ItemRow]:
            rows = store.read(_BY_ID, (json.dumps(list(item_ids)),))
            return _with_keys(store, rows, _KEYS)

        return await self._store.run(read)

    async def find(
        self, owners: Sequence[str], *, source: str | None, after: int, most: int
    ) -> list[ItemRow]:
        given = (json.dumps(list(owners)), source, source, after, most)
        return await self._store.run(
            lambda store: _with_keys(store, store.read(_OF_OWNERS, given), _KEYS)
        )

    async def ids(self, owner: str, source: str) -> list[str]:
        sql = "SELECT id FROM cache_items WHERE owner = ? AND source = ?"
        return await self._store.run(
            lambda store: [row["id"] for row in store.read(sql, (owner, source))]
        )

    async def page(self, after: int, most: int) -> Page:
        def read(store: Store) -> Page:
            rows = store.read(_WITHOUT_TEXTS, (after, most))
            items = tuple(_with_keys(store, rows, _KEYS_WITH_VECTORS))
            upto = items[-1].number if items else after
            return Page(items, (), upto, len(items) == most)

        return await self._store.run(read)

    async def set_vectors(self, rows: Sequence[tuple[str, int, bytes, str]]) -> None:
        def write(store: Store) -> None:
            with store.transaction() as db:
                db.executemany(
                    "UPDATE cache_keys SET vector = ?, space = ? WHERE place = ? AND "
                    "item = (SELECT number FROM cache_items WHERE id = ?)",
                    [(vector, space, place, item_id) for item_id, place, vector, space in rows],
                )

        await self._store.run(write)

    async def keep(self, name: str, value: str) -> None:
        def write(store: Store) -> None:
            with store.transaction() as db:
                db.execute(
                    "INSERT INTO cache_kept(name, value) VALUES (?, ?) "
                    "ON CONFLICT(name) DO UPDATE SET value = excluded.value",
                    (name, value),
                )

        await self._store.run(write)

    async def kept(self) -> dict[str, str]:
        return await self._store.run(
            lambda store: {
                row["name"]: row["value"] for row in store.read("SELECT * FROM cache_kept")
            }
        )


def _remove(db: sqlite3.Connection, item_ids: Sequence[str]) -> None:
    if item_ids:
        db.execute(
            "DELETE FROM cache_items WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(item_ids)),),
        )


def _insert(db: sqlite3.Connection, item: ItemRow) -> None:
    number = db.execute(
        "INSERT INTO cache_items(id, owner, scope, prompt, response, source, model, put, "
        "cost_nano, out_tokens, wall_s, expires_wall_s) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            item.item_id, item.owner, item.scope, item.prompt, item.response, item.source,
            item.model, int(item.put), item.cost_nano, item.out_tokens, item.wall_s,
            item.expires_wall_s,
        ),
    ).lastrowid  # fmt: skip
    db.executemany(
        "INSERT INTO cache_keys(item, place, kind, text, vector, space) VALUES (?, ?, ?, ?, ?, ?)",
        [
            (number, place, key.kind, key.text, key.vector, key.space)
            for place, key in enumerate(item.keys)
        ],
    )


def _with_keys(store: Store, rows: Sequence[sqlite3.Row], keys_sql: str) -> list[ItemRow]:
    """Items in the order of rows, each with its keys."""
    if not rows:
        return []
    found = store.read(keys_sql, (json.dumps([row["number"] for row in rows]),))
    keys = {
        item: tuple(KeyRow(row["kind"], row["text"], row["vector"], row["space"]) for row in group)
        for item, group in itertools.groupby(found, lambda row: int(row["item"]))
    }
    return [
        ItemRow(
            row["id"], row["owner"], row["response"], keys.get(row["number"], ()),
            row["scope"], row["prompt"], row["source"], row["model"], bool(row["put"]),
            row["cost_nano"], row["out_tokens"], row["wall_s"], row["expires_wall_s"],
            row["number"],
        )
        for row in rows
    ]  # fmt: skip
