"""Kept conversations: bounds in bytes and age, and no more read than is looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.core.prompts.context import filters_from_plain, newest_needed
from intentd.core.prompts.effects import Message
from intentd.daemons.kit.clock import ManualClock
from intentd.daemons.kit.store import Store
from intentd.proxy.config import ConversationsSection
from intentd.proxy.conversations import Conversations
from intentd.proxy.store.base import Turn
from intentd.proxy.store.sqlite import MIGRATIONS


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "db", MIGRATIONS)
    yield opened
    opened.close()


async def fill(kept: Conversations, count: int, size: int = 10) -> None:
    for number in range(1, count + 1):
        image = ({"role": "user", "content": "x" * size}, {"role": "assistant", "content": "r"})
        message = Message(f"p{number}", "r", image, message_id=f"m{number}")
        await kept.append(Turn("k", "c", number), message, ())


async def prompts(kept: Conversations, **wanted: Any) -> list[str]:
    return [message.prompt for message in await kept.load("k", "c", **wanted)]


async def test_the_oldest_go_when_there_are_too_many_bytes(store: Store) -> None:
    kept = Conversations(store, ManualClock(), ConversationsSection(max_bytes=3500))
    await fill(kept, 6, 1000)
    assert await prompts(kept) == ["p4", "p5", "p6"]
    big = Message("p7", "r" * 9000, message_id="m7")
    await kept.append(Turn("k", "c", 7), big, ())
    assert await prompts(kept) == ["p7"]  # what was just said stays whatever its size


async def test_what_is_too_old_is_gone(store: Store) -> None:
    clock = ManualClock()
    kept = Conversations(store, clock, ConversationsSection(max_age_s=100.0))
    await fill(kept, 1)
    clock.advance(99.0)
    assert await prompts(kept) == ["p1"]
    clock.advance(2.0)
    assert await prompts(kept) == []


async def test_only_the_newest_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Conversations(store, ManualClock(), ConversationsSection())
    await fill(kept, 6)
    asked: list[Any] = []
    read = store.read

    def seen(sql: str, parameters: Any = ()) -> Any:
        rows = read(sql, parameters)
        asked.append(len(rows))
        return rows

    monkeypatch.setattr(store, "read", seen)
    assert await prompts(kept, newest=0) == []
    assert await prompts(kept, newest=2) == ["p5", "p6"]
    assert await prompts(kept, newest=2, without=("m6",)) == ["p4", "p5"]
    assert asked == [2, 3]
    assert await kept.count("k", "c") == 6


@pytest.mark.parametrize(
    ("plain", "count"),
    [
        ("none", 0),
        ("all", None),
        ({"last_k": 5}, 5),
        ([{"last_k": 4}, "smart_context"], 4),
        (["smart_context", {"last_k": 4}], None),
        ([[{"last_k": 4}, "smart_context"], [{"last_k": 7}]], 7),
        ([["summarize"], [{"last_k": 1}]], None),
    ],
)
def test_what_filters_look_at(plain: Any, count: int | None) -> None:
    assert newest_needed(filters_from_plain(plain, "context")) == count


async def test_a_type_without_context_reads_none_of_it(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.start()
    for number in range(8):
        body = {"prompt": f"p{number}", "service_type": "usage_based", "conversation": "c"}
        assert (await site.post("/v1/request", body))[0] == 200
    turns = site.proxy.api.driver.conversations
    loaded: list[int] = []
    load = turns.load

    async def seen(*wanted: Any, **named: Any) -> Any:
        found = await load(*wanted, **named)
        loaded.append(len(found))
        return found

    monkeypatch.setattr(turns, "load", seen)
    for name in ("cost", "usage_based"):
        body = {"prompt": "hi", "service_type": name, "conversation": "c"}
        _, answer, _ = await site.post("/v1/request", body)
        assert answer["metadata"]["context"]["available"] in (8, 9)
    assert loaded == [0, 5]


async def test_what_is_prefetched_has_a_receipt(site: Any) -> None:
    models = [site.model("m"), site.model("big", price_in="9", price_out="9")]
    await site.start(models=models)
    _, answer, _ = await site.post("/v1/request", {"prompt": "x", "service_type": "latency"})

    async def proved() -> list[str]:
        (claim,) = [one for one in await site.proxy.prove() if one.check == "ledger-receipts"]
        return claim.evidence.split()

    async with asyncio.timeout(10):
        while True:
            said = await proved()  # "N nano-dollars on 2 receipts, N booked"
            if said[3] == "2":
                break
            await asyncio.sleep(0.005)
    assert said[0] == said[5]
    assert int(said[0]) > answer["metadata"]["cost_nano"]
