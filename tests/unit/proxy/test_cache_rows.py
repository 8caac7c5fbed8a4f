"""What the cache keeps: rows on SQLite, a store that refuses, another process's items."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from intentd.core.prompts.effects import CacheFound, LookupCache, StoreCache
from intentd.core.prompts.request import Request
from intentd.daemons.kit.clock import SystemClock
from intentd.daemons.kit.store import Store, StoreError
from intentd.proxy.cache.asker import Asker, asker_of
from intentd.proxy.cache.cache import Cache
from intentd.proxy.config_cache import CacheSection
from intentd.proxy.keys import ANONYMOUS, Key
from intentd.proxy.store.cache import ItemRow, KeyRow
from intentd.proxy.store.cache_sqlite import SqliteCacheRows
from intentd.proxy.store.sqlite import MIGRATIONS


class Rows(SqliteCacheRows):
    """Refuses writes while it is broken; shared, as with several processes."""

    shared = True
    broken = False

    async def put(self, items: Sequence[ItemRow], *, replaces: Sequence[str] = ()) -> None:
        if self.broken:
            raise StoreError("disk full")
        await super().put(items, replaces=replaces)


def asker(user: str = "") -> Asker:
    params = {"user": user} if user else {}
    return asker_of(ANONYMOUS, "off", request=Request("x", params=params), ranks={"m": 1, "d": 9})


def cache_on(rows: Rows, **fields: object) -> Cache:
    return Cache(CacheSection(semantic="off", **fields), rows, SystemClock(), None)  # type: ignore[arg-type]  # the test's own fields


async def found(cache: Cache, prompt: str, **fields: object) -> list[str]:
    effect = LookupCache(prompt, exact=True, **fields)  # type: ignore[arg-type]  # as above
    outcome: CacheFound = await cache.lookup(effect, asker())
    return [item.response for item in outcome.items]


def answer(prompt: str, response: str = "r", model: str = "m") -> StoreCache:
    return StoreCache(prompt, response, (("prompt", prompt),), model=model, out_tokens=5)


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Rows]:
    store = Store(tmp_path / "c.sqlite", MIGRATIONS)
    yield Rows(store)
    store.close()


async def test_rows_come_back_as_they_were_put(rows: Rows) -> None:
    keys = (KeyRow("prompt", "p", b"12", "s"), KeyRow("chunk", "c"))
    item = ItemRow("a", "o", "r", keys, "scope", "p", "src", "m", True, 7, 3, 1.5, 9.5)
    await rows.put([item, ItemRow("b", "o", "r2", source="other")])
    (whole,) = await rows.fetch(["a", "nobody"])
    assert (whole.response, whole.keys[0].vector, whole.keys[1].text) == ("r", b"", "c")
    page = await rows.page(0, 1)
    assert (page.more, page.items[0].response, page.items[0].keys) == (True, "", keys)
    page = await rows.page(page.upto, 5)
    assert ([one.item_id for one in page.items], page.more) == (["b"], False)
    await rows.set_vectors([("a", 1, b"34", "s"), ("nobody", 0, b"", "s")])
    assert (await rows.page(0, 1)).items[0].keys[1] == KeyRow("chunk", "c", b"34", "s")
    assert await rows.ids("o", "src") == ["a"]
    assert [one.item_id for one in await rows.find(["o"], source=None, after=0, most=9)] == [
        "a", "b"
    ]  # fmt: skip
    await rows.put([ItemRow("a", "o", "new")], replaces=["b"])
    assert [one.response for one in await rows.fetch(["a", "b"])] == ["new"]
    await rows.remove(["a"])
    await rows.remove([])
    await rows.keep("n", "1")
    await rows.keep("n", "2")
    assert (await rows.kept(), await rows.fetch(["a"])) == ({"n": "2"}, [])


async def test_a_store_that_refuses_loses_no_answer_and_takes_no_put(rows: Rows) -> None:
    cache = cache_on(rows)
    await cache.open()
    running = asyncio.create_task(cache.run())
    rows.broken = True
    assert cache.store(answer("p"), asker()) == ""
    with pytest.raises(Exception, match="disk full"):
        await cache.put([ItemRow("x", "o", "r")], source=None)
    async with asyncio.timeout(20):
        while not cache.metrics.failures.get("store"):  # noqa: ASYNC110  a counter, no event
            await asyncio.sleep(0.01)
    assert await found(cache, "p") == ["r"], "it is served meanwhile"
    rows.broken = False
    await cache.close()
    running.cancel()
    other = cache_on(rows)
    await other.open()
    assert await found(other, "p") == ["r"]


async def test_another_processs_items_are_followed(rows: Rows) -> None:
    one, two = cache_on(rows), cache_on(rows)
    await one.open()
    await two.open()
    one.store(answer("p"), asker())
    await one.close()
    assert await found(two, "p") == []
    await two.follow()
    await two.follow()
    assert (await found(two, "p"), len(two.hot)) == (["r"], 1)


async def test_what_may_serve(rows: Rows) -> None:
    cache = cache_on(rows)
    await cache.open()
    cache.store(answer("p"), asker())
    assert await found(cache, "p", model_floor="m") == ["r"]
    assert await found(cache, "p", model_floor="d") == []
    assert await found(cache, "p", model_floor="gone") == []
    assert await found(cache, "p", max_tokens=4) == []
    assert await found(cache, "p", max_tokens=5) == ["r"]
    cache.store(answer("p", "dear", "d"), asker())
    assert "dearer" in cache.store(answer("p", "cheap"), asker())
    assert await found(cache, "p", model_floor="d") == ["dear"]
    assert cache.store(answer("q", "x" * 2_000_000), asker()) != ""
    assert len(cache.hot) == 1
    own = asker("ann")
    cache.store(answer("u"), own)
    assert await found(cache, "u") == []
    assert (await cache.lookup(LookupCache("u", exact=True), own)).items


def test_owners() -> None:
    key = Key("k", "k", "t")
    assert asker_of(key, "off").readable == ("key:k", "tenant:t", "all")
    assert asker_of(key, "tenant").owner == "tenant:t"
    assert asker_of(key, "all").owner == "all"
    ann = asker_of(key, "off", user="ann")
    assert ann.owner.startswith("key:k/user:")
    assert ann.readable[1:] == ("key:k", "tenant:t", "all")
