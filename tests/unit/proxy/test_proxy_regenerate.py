"""Answers given again: one chain a turn, at its place, one after the other, within its bounds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.unit.proxy.provider import Script

from intentd.core.prompts.effects import Message
from intentd.core.prompts.request import Request
from intentd.daemons.kit.clock import ManualClock
from intentd.daemons.kit.store import Store
from intentd.proxy import native
from intentd.proxy.config import ConversationsSection
from intentd.proxy.conversations import Conversations
from intentd.proxy.dialects import openai_chat
from intentd.proxy.errors import ApiError
from intentd.proxy.store.base import Turn
from intentd.proxy.store.sqlite import MIGRATIONS


def pool(site: Any) -> list[dict[str, Any]]:
    return [
        site.model("tiny", price_in="0.1", price_out="0.1"),
        site.model("mid", price_in="1", price_out="1"),
        site.model("big", price_in="10", price_out="10"),
    ]


async def ask(site: Any, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "service_type": "usage_based", "conversation": "c", **fields}
    status, answer, _ = await site.post("/v1/request", body)
    assert status == 200, answer
    return dict(answer)


async def again(site: Any, request_id: str, **fields: Any) -> dict[str, Any]:
    status, answer, _ = await site.post("/v1/regenerate", {"id": request_id, **fields})
    assert status == 200, answer
    return dict(answer)


async def page(site: Any) -> list[tuple[str, str]]:
    _, found, _ = await site.get("/v1/conversations/c")
    return [(message["id"], message["prompt"]) for message in found["messages"]]


async def test_a_turn_stays_at_its_place(site: Any) -> None:
    await site.start(models=pool(site))
    site.provider.words_for = lambda body: (f"re {body['messages'][-1]['content']}",)
    one, two, three = [await ask(site, prompt) for prompt in ("one", "two", "three")]
    better = await again(site, two["id"])
    sent = [message["content"] for message in site.provider.requests[-1]["messages"]]
    assert sent == ["one", "re one", "two"]  # what came later is not its context
    assert await page(site) == [
        (one["id"], "one"), (better["id"], "two"), (three["id"], "three"),
    ]  # fmt: skip


async def test_the_same_id_twice_goes_on_from_the_best_answer(site: Any) -> None:
    await site.start(models=pool(site))
    site.provider.words_for = lambda body: (f"said by {body['model']}",)
    first = await ask(site, "one")
    found = [await again(site, first["id"]) for _ in range(3)]
    assert [one["metadata"]["model"] for one in found] == ["mid", "big", "big"]
    assert found[1]["metadata"]["regenerates"] == found[0]["id"]
    for body in site.provider.requests:
        assert "said by" not in str(body["messages"])
    assert await page(site) == [(found[2]["id"], "one")]
    last = await again(site, found[0]["id"], service_type="cost")  # one in the middle
    assert last["metadata"]["model"] == "big"
    assert await page(site) == [(last["id"], "one")]


async def test_a_double_click_makes_one_turn(site: Any) -> None:
    await site.start(models=pool(site))
    first = await ask(site, "one", conversation=None)
    kept = await ask(site, "one")
    await asyncio.gather(*(again(site, kept["id"]) for _ in range(2)))
    assert [prompt for _, prompt in await page(site)] == ["one"]
    found = await asyncio.gather(*(again(site, first["id"]) for _ in range(2)))
    assert sorted(one["metadata"]["model"] for one in found) == ["big", "mid"]


async def test_a_forgotten_turn_does_not_come_back(site: Any) -> None:
    await site.start(models=pool(site))
    first = await ask(site, "one")
    async with site.session.delete(site.url + "/v1/conversations/c") as response:
        assert response.status == 200
    await again(site, first["id"])
    assert await page(site) == []


async def test_an_answer_that_joined_nothing_gets_its_place_later(tmp_path: Path) -> None:
    store = Store(tmp_path / "db", MIGRATIONS)
    kept = Conversations(store, ManualClock(), ConversationsSection())
    for number in (1, 3):
        message = Message(f"p{number}", "r", message_id=f"m{number}")
        await kept.append(Turn("k", "c", number), message, ())
    await kept.append(Turn("k", "c", 4), Message("p2", "r", message_id="m4"), ("m2",), 2)
    assert [one.prompt for one in await kept.load("k", "c")] == ["p1", "p2", "p3"]
    assert [one.prompt for one in await kept.load("k", "c", before=2)] == ["p1"]
    store.close()


def test_the_memory_counts_images_tools_and_systems() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:" + "x" * 1_000_000}}
    big = ({"role": "user", "content": [image]},)
    for request in (
        Request("p", turn=big),
        Request("p", system=big),
        Request("p", params={"tools": [{"function": {"parameters": {"x": "y" * 1_000_000}}}]}),
        Request("p", history=(Message("a", "b", big),)),
    ):
        turn = native.Remembered("k", native.Asked("cost", request, {}), ("r",), ("m",))
        assert 1_000_000 < turn.size_bytes < 1_010_000
    memory = native.Memory(1000)
    for number in range(100):
        asked = native.Asked("cost", Request("p", turn=big), {})
        memory.keep(native.Remembered("k", asked, (f"r{number}", f"s{number}"), ("m", "m")))
    assert 60_000_000 < memory.size_bytes <= native.MAX_REMEMBERED_BYTES
    assert memory.find("r99", "k") is memory.find("s99", "k")
    with pytest.raises(ApiError):
        memory.find("s0", "k")
    with pytest.raises(ApiError):
        memory.find("r99", "other")


# -- the bounds of one request ---------------------------------------------------------------------


def cascade(body: dict[str, Any]) -> tuple[str, ...]:
    return ("2",) if "rate the answer" in str(body["messages"]) else ("I am ", str(body["model"]))


async def test_a_dear_model_without_a_budget_leaves_the_cheap_answer(site: Any) -> None:
    models = pool(site)
    models[2]["max_output_tokens"] = 4096
    await site.start(models=models)
    site.provider.words_for = cascade
    grants = {"budgets": [{"unit": "dollars", "limit": "0.01"}]}
    made = await site.proxy.admin("keys.new", {"name": "alice", "grants": grants})
    auth = {"Authorization": f"Bearer {made['secret']}"}
    body = {"prompt": "one", "service_type": "model_selector"}
    status, answer, _ = await site.post("/v1/request", body, headers=auth)
    assert (status, answer["response"]) == (200, "I am up-mid"), answer
    (note,) = [one for one in answer["metadata"]["context"]["decisions"] if "stands" in one]
    assert note.startswith("model: big failed, the first answer stands: budget key:alice")
    assert not any(body["model"] == "up-big" for body in site.provider.requests)
    body = {"prompt": "one", "service_type": "quality"}  # nothing cheaper has answered
    status, answer, _ = await site.post("/v1/request", body, headers=auth)
    assert (status, answer["error"]["code"]) == (429, "insufficient_quota")


async def test_attempts_are_of_the_whole_request(site: Any) -> None:
    await site.start(models=pool(site), upstream={
        "attempts": 3, "backoff_s": 0.001, "retry_share": 1.0, "cooldown_failures": 100,
    })  # fmt: skip
    site.provider.default = Script(status=500)
    status, _, headers = await site.post(
        "/v1/request", {"prompt": "x", "service_type": "model_selector"}
    )
    assert status == 502
    assert len(site.provider.requests) == 4  # two steps, two repeats
    _, kept, _ = await site.get(f"/v1/requests/{headers['X-Intentd-Request-Id']}")
    assert len(kept["models"]) == 4


async def test_a_rate_limit_is_named_and_waited_for_exactly(site: Any) -> None:
    await site.start(models=pool(site), upstream={"attempts": 3, "max_retry_after_s": 0.5})
    site.provider.default = Script(status=429, retry_after="7")
    for body in ({"model": "tiny"}, {"model": "tiny"}, {"model": "cost"}):
        status, answer, headers = await site.chat(**body)
        assert status == 429, answer
        assert 1 <= int(headers["Retry-After"]) <= 7
        assert "failed repeatedly" not in answer["error"]["message"]
    for name in ("mid", "big"):
        assert site.proxy.api.engine.models[name].health.in_a_row == 0


async def test_reloads_count_the_calls_that_run(site: Any) -> None:
    models = [site.model("m", max_concurrency=1)]
    proxy = await site.start(models=models)
    gate = asyncio.Event()
    site.provider.default = Script(gate=gate)
    first = asyncio.create_task(site.chat())
    await site.provider.started.wait()
    await proxy.reload(site.config(models=models))
    assert proxy.api.engine.models["m"].places.taken == 1
    second = asyncio.create_task(site.chat())
    gate.set()
    assert [(await one)[0] for one in (first, second)] == [200, 200]
    assert site.provider.most_open == 1
    assert proxy.api.engine.models["m"].places.taken == 0


# -- chats that passed as they are -----------------------------------------------------------------


async def test_a_chat_that_passed_can_be_answered_better(site: Any) -> None:
    await site.start(models=pool(site))
    site.provider.words_for = lambda body: (f"said by {body['model']}",)
    status, answer, headers = await site.chat(model="tiny")
    assert status == 200, answer
    first = headers["X-Intentd-Request-Id"]
    same = await again(site, first, service_type="fixed")
    assert same["metadata"]["model"] == "tiny"
    _, _, headers = await site.chat(model="tiny")
    better = await again(site, headers["X-Intentd-Request-Id"])
    assert (better["response"], better["metadata"]["service_type"]) == ("said by up-big", "quality")
    assert better["metadata"]["regenerates"] == headers["X-Intentd-Request-Id"]
    assert site.provider.requests[-1]["messages"] == site.provider.requests[-2]["messages"]
    _, _, headers = await site.chat(model="mid")
    cheap = await again(site, headers["X-Intentd-Request-Id"], service_type="cost")
    assert cheap["metadata"]["model"] == "mid"  # never cheaper than what answered
    _, _, headers = await site.chat(model="tiny", n=2)
    wanted = {"id": headers["X-Intentd-Request-Id"]}
    status, answer, _ = await site.post("/v1/regenerate", wanted)
    assert (status, answer["error"]["param"]) == (400, "n")
    status, answer, _ = await site.post("/v1/regenerate", {"id": "req_none"})
    assert status == 404
    assert "/v1/request" in answer["error"]["message"]


def test_bodies_of_passed_chats_are_held_within_bounds() -> None:
    memory = native.Memory(100)
    raw = b'{"model": "m", "messages": [{"role": "user", "content": "%s"}]}' % (b"x" * 500_000)
    for number in range(60):
        memory.keep_passed(f"r{number}", "k", "m", raw, openai_chat.read_chat)
    assert 15_000_000 < memory.passed_bytes <= native.MAX_PASSED_BYTES
    for number in range(200):
        memory.keep_passed(f"s{number}", "k", "m", raw[:0], openai_chat.read_chat)
    assert memory.passed_bytes == 100 * native.FLAT_BYTES
    memory.keep_passed("big", "k", "m", raw * 3, openai_chat.read_chat)
    memory.keep_passed("last", "k", "m", raw, openai_chat.read_chat)
    for name, key in (("r59", "k"), ("big", "k"), ("last", "other")):
        with pytest.raises(ApiError):
            memory.find(name, key)
    assert memory.find("last", "k").asked.options == {"model": "m"}
    assert memory.passed_bytes == 99 * native.FLAT_BYTES
    assert memory.find("last", "k") is memory.find("last", "k")
