"""The cache's vectors in PostgreSQL's own column, where its extension is there."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from benchmarks.local_postgres import Postgres

from intentd.daemons.kit.postgres import Database
from intentd.proxy.cache.semantic import Remote
from intentd.proxy.postgres import vectors
from intentd.proxy.postgres.cache import PostgresCacheRows
from intentd.proxy.postgres.schema import MIGRATIONS
from intentd.proxy.store.cache import ItemRow, KeyRow, NearKey

pytestmark = pytest.mark.real

SPACE = "three"
EVERYTHING: Any = {"kinds": (), "scopes": (), "min_similarity": -1.0, "limit": 9}


@pytest.fixture
def postgres(cluster: Postgres) -> Postgres:
    if not cluster.run("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"):
        pytest.skip("this PostgreSQL has no extension vector (INTENTD_PG_BIN names another)")
    cluster.empty()
    cluster.run("DROP EXTENSION IF EXISTS vector CASCADE")
    return cluster


async def database(postgres: Postgres) -> Database:
    return await Database.open(
        postgres.url, password="", connections=3, timeout_s=10.0, migrations=MIGRATIONS
    )


def packed(*values: float) -> bytes:
    vector = np.array(values)
    return bytes((vector / np.linalg.norm(vector)).astype("<f2").tobytes())


def item(name: str, *keys: KeyRow, owner: str = "key:a", scope: str = "s") -> ItemRow:
    return ItemRow(name, owner, f"answer of {name}", keys, scope, wall_s=1.0)


def test_a_vector_is_spelled_as_pgvector_reads_it() -> None:
    assert vectors.as_text(b"") is None
    assert vectors.as_text(np.array([1.0, -0.5], "<f2").tobytes()) == "[1.0,-0.5]"


async def test_what_one_proxy_stores_the_other_finds_by_the_database(postgres: Postgres) -> None:
    one, two = await database(postgres), await database(postgres)
    try:
        made = await asyncio.gather(vectors.prepare(one), vectors.prepare(two))
        assert all(made)
        rows = PostgresCacheRows(one, made[0])
        search = made[1]
        assert search is not None
        await rows.put(
            [
                item("x", KeyRow("prompt", "x", packed(1, 0, 0), SPACE)),
                item(
                    "y",
                    KeyRow("prompt", "y", packed(0, 1, 0), SPACE),
                    KeyRow("response", "y", packed(1, 1, 0), SPACE),
                ),
                item("late", KeyRow("prompt", "late")),
                item("other", KeyRow("prompt", "o", packed(1, 0, 0), SPACE), owner="key:b"),
                item("old", KeyRow("prompt", "o", packed(1, 0, 0), "another"), scope=""),
            ]
        )
        asked = packed(1, 0.1, 0)

        async def found(**more: Any) -> list[tuple[str, int]]:
            near = await search.nearest(asked, SPACE, ["key:a"], **{**EVERYTHING, **more})
            assert [one.similarity for one in near] == sorted(
                (one.similarity for one in near), reverse=True
            )
            return [(one.item_id, one.place) for one in near]

        assert await found() == [("x", 0), ("y", 1), ("y", 0)]
        assert await found(kinds=("prompt",)) == [("x", 0), ("y", 0)]
        assert await found(min_similarity=0.5, limit=1) == [("x", 0)]
        assert await found(scopes=("",)) == []
        await rows.set_vectors([("late", 0, packed(1, 0.1, 0), SPACE)])
        assert (await found())[0] == ("late", 0)
        await rows.remove(["x"])
        assert ("x", 0) not in await found()
    finally:
        await one.close()
        await two.close()


async def test_vectors_from_before_the_extension_are_taken_over(postgres: Postgres) -> None:
    one = await database(postgres)
    try:
        await PostgresCacheRows(one).put([item("x", KeyRow("prompt", "x", packed(1, 0), SPACE))])
        search = await vectors.prepare(one)
        assert search is not None
        (near,) = await search.nearest(packed(1, 0), SPACE, ["key:a"], **EVERYTHING)
        assert near.item_id == "x"
        assert near.similarity == pytest.approx(1.0)
        # a proxy that does not know the column writes beside it, and is read on the next start
        await PostgresCacheRows(one).put([item("y", KeyRow("prompt", "y", packed(1, 0), SPACE))])
        again = await vectors.prepare(one)
        assert again is not None
        assert len(await again.nearest(packed(1, 0), SPACE, ["key:a"], **EVERYTHING)) == 2
    finally:
        await one.close()


async def test_each_item_is_given_once_and_only_if_it_may_serve() -> None:
    class Fixed:
        async def nearest(self, *_args: Any, **_more: Any) -> list[NearKey]:
            names = ("gone", "a", "a", "b", "c")
            return [NearKey(name, place, 0.9) for place, name in enumerate(names)]

    remote = Remote(Fixed(), {"a": 1, "b": 2, "c": 3}.get)
    found = await remote.nearest(b"", SPACE, [], allowed=lambda number: number != 2, limit=2)
    assert [(one.item, one.place) for one in found] == [(1, 1), (3, 4)]
