"""The cache of a proxy in process: exact hits, scope, Cache-Control, put, get, delete, tenancy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.unit.proxy.conftest import Site
from tests.unit.proxy.provider import Script

EXACT = [
    {
        "name": "fixed",
        "stages": [{"cache": "exact"}, {"context": "all"}, {"model": "one"}, {"store": "prompt"}],
    }
]
OFF = {"semantic": "off"}


async def ask(site: Site, prompt: str = "Say hello", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    status, body, headers = await site.chat(messages=messages, **fields)
    assert status == 200, body
    told: dict[str, Any] = body["intentd"]["cache"]
    assert headers["X-Intentd-Cache"] == told["result"]
    return {**told, "text": body["choices"][0]["message"]["content"], "body": body}


async def test_the_same_prompt_is_answered_once(site: Site) -> None:
    await site.start(service_types=EXACT, cache=OFF)
    first = await ask(site)
    again = await ask(site, "  Say   hello ")
    assert (first["result"], again["result"]) == ("miss", "exact")
    assert first["text"] == again["text"] == "Hello there."
    assert len(site.provider.requests) == 1
    assert again["body"]["intentd"]["cost_nano"] == 0
    assert again["body"]["intentd"]["avoided_nano"] > 0
    assert again["body"]["model"] == "m"
    assert (await ask(site, "Say Hello"))["result"] == "miss", "case can matter"


async def test_a_stream_is_stored_and_served_as_one(site: Site) -> None:
    await site.start(service_types=EXACT, cache=OFF)
    await site.stream()
    events = await site.stream()
    assert len(site.provider.requests) == 1
    assert "Hello there." in events[0]
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [
            {"role": "system", "content": "In French"}, {"role": "user", "content": "x"}
        ]},
        {"temperature": 0.3},
        {"response_format": {"type": "json_object"}},
        {"messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "x"},
        ]},
        {"user": "somebody else"},
    ],
)  # fmt: skip
async def test_what_shapes_an_answer_is_in_its_scope(site: Site, other: dict[str, Any]) -> None:
    await site.start(service_types=EXACT, cache=OFF)
    x = [{"role": "user", "content": "x"}]
    for fields, calls in (({}, 1), (other, 2), (other, 2), ({}, 2)):
        await site.chat(**{"messages": x, **fields})
        assert len(site.provider.requests) == calls


async def test_cache_control(site: Site) -> None:
    await site.start(service_types=EXACT, cache=OFF)

    async def control(text: str) -> dict[str, Any]:
        return await ask(site, headers={"Cache-Control": text})

    assert (await control("no-store"))["result"] == "miss"
    assert (await control("no-store"))["result"] == "miss"
    assert (await ask(site))["result"] == "miss"
    assert (await control("no-cache"))["reason"] == "no-cache"
    assert (await control("max-age=100"))["result"] == "exact"
    assert (await control("max-age=0"))["result"] == "miss"
    assert (await control("only-if-cached, max-age=60"))["result"] == "exact"
    calls = len(site.provider.requests)
    messages = [{"role": "user", "content": "never asked"}]
    status, body, _ = await site.chat(
        messages=messages, headers={"Cache-Control": "only-if-cached"}
    )
    assert (status, "only-if-cached" in body["error"]["message"]) == (504, True)
    status, body, _ = await site.chat(headers={"Cache-Control": "max-age=-1"})
    assert status == 400
    assert len(site.provider.requests) == calls


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": [{"role": "user", "content": "what is the weather in Oslo"}]}, "time_bound"),
        ({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "what is it"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]},
         "not_text"),
    ],
)  # fmt: skip
async def test_what_must_not_be_shared_bypasses(
    site: Site, fields: dict[str, Any], reason: str
) -> None:
    await site.start(service_types=EXACT, cache=OFF)
    for _ in range(2):
        status, body, _ = await site.chat(**fields)
        assert (status, body["intentd"]["cache"]["reason"]) == (200, reason)
    assert len(site.provider.requests) == 2
    status, body, _ = await site.chat(n=2)
    assert (status, len(body["choices"])) == (200, 2)


async def test_an_answer_that_is_not_whole_is_not_kept(site: Site) -> None:
    site.provider.default = Script(no_finish=True)
    await site.start(service_types=EXACT, cache=OFF)
    site.provider.scripts = [Script(words=())]
    await ask(site)
    assert (await ask(site))["result"] == "miss", "an empty answer"
    site.provider.scripts = [Script(status=400)]
    status, _, _ = await site.chat(messages=[{"role": "user", "content": "bad"}])
    assert status == 400
    assert (await ask(site, "bad"))["result"] == "miss"


async def test_keys_do_not_see_each_others_answers_unless_told(site: Site) -> None:
    proxy = await site.start(service_types=EXACT, cache=OFF)
    args = {"tenant": "class"}
    secrets = [(await proxy.admin("keys.new", {"name": n, **args}))["secret"] for n in "ab"]

    async def by(secret: str) -> str:
        result: str = (await ask(site, headers={"Authorization": f"Bearer {secret}"}))["result"]
        return result

    assert [await by(secrets[0]), await by(secrets[1]), await by(secrets[0])] == [
        "miss", "miss", "exact"
    ]  # fmt: skip


async def test_a_tenant_may_share(site: Site) -> None:
    proxy = await site.start(service_types=EXACT, cache={**OFF, "sharing": "tenant"})
    results = []
    for name, tenant in (("a", "t"), ("b", "t"), ("c", "u")):
        made = await proxy.admin("keys.new", {"name": name, "tenant": tenant})
        headers = {"Authorization": f"Bearer {made['secret']}"}
        results.append((await ask(site, headers=headers))["result"])
    assert results == ["miss", "exact", "miss"]


async def put(site: Site, **body: Any) -> tuple[int, dict[str, Any]]:
    async with site.session.put(site.url + "/v1/cache", json=body) as response:
        return response.status, await response.json()


async def delete(site: Site, query: str) -> tuple[int, dict[str, Any]]:
    async with site.session.delete(site.url + f"/v1/cache{query}") as response:
        return response.status, await response.json()


async def test_put_with_typed_keys_serves_its_prompt_and_goes_by_source(site: Site) -> None:
    await site.start(service_types=EXACT, cache=OFF)
    status, body = await put(
        site,
        object={"prompt": "Opening hours?", "response": "9 to 17."},
        keys=[["prompt", "Opening hours?"], {"type": "response", "key": "9 to 17."}],
        source="hours.txt",
    )
    assert (status, len(body["items"][0]["keys"])) == (200, 2)
    hit = await ask(site, "Opening hours?")
    assert (hit["result"], hit["text"], hit["source"]) == ("exact", "9 to 17.", "hours.txt")
    assert hit["body"]["model"] == "cache"
    name = hit["body"]["intentd"]["request_id"]
    assert (await site.get(f"/v1/requests/{name}"))[1]["outcome"] == "ok"
    assert (await site.post("/v1/feedback", {"id": name, "rating": "bad"}))[0] == 200
    assert (await ask(site, "Opening hours?"))["result"] == "exact", "it is the application's"
    status, page, _ = await site.get("/v1/cache?source=hours.txt")
    assert [item["response"] for item in page["data"]] == ["9 to 17."]
    item_id = page["data"][0]["id"]
    assert (await site.get(f"/v1/cache/{item_id}"))[1]["prompt"] == "Opening hours?"
    assert await delete(site, "?source=hours.txt") == (200, {"deleted": 1})
    assert (await site.get(f"/v1/cache/{item_id}"))[0] == 404
    assert (await ask(site, "Opening hours?"))["result"] == "miss"


async def test_a_faq_put_without_keys_is_cut_into_its_pairs(site: Site) -> None:
    site.provider.words_for = lambda body: (
        ("QUESTIONS:\n- When is it open?\nKEYWORDS: opening, hours\nSUMMARY: Hours.\n",)
        if "You index a text" in str(body)
        else ("model",)
    )
    await site.start(service_types=EXACT, cache=OFF)
    document = "Q: When do you open?\nA: At 9.\n\nQ: Where are you?\nA: In Oslo, Norway.\n"
    status, body = await put(site, object=document, source="faq.md")
    assert (status, body["kind"], body["pieces"], body["keys_by_model"]) == (200, "faq", 2, 2)
    kinds = {kind for item in body["items"] for kind, _ in item["keys"]}
    assert kinds >= {"prompt", "chunk", "question", "keywords", "summary", "facts", "document"}
    assert body["cost_nano"] > 0
    assert (await ask(site, "Where are you?"))["text"] == "In Oslo, Norway."
    status, body = await put(site, object=document.replace("9", "10"), source="faq.md")
    assert (await ask(site, "When do you open?"))["text"] == "At 10."
    page = (await site.get("/v1/cache?source=faq.md"))[1]
    assert len(page["data"]) == 2, "a document takes the place of the same source"
    site.provider.scripts = [Script(status=500)] * 20
    status, body = await put(site, object="Some prose. It names Oslo in 1999.", source="p")
    assert (status, body["keys_by_model"]) == (200, 0)
    assert body["failure"]
    assert ["summary", "Some prose."] in body["items"][0]["keys"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "object"),
        ({"object": 1}, "object"),
        ({"object": {"response": ""}}, "object.response"),
        ({"object": {"response": "r", "document": "d"}}, "object"),
        ({"object": {"answer": "r"}}, "object.answer"),
        ({"object": "x", "keys": [["prompt"]]}, "keys[0]"),
        ({"object": "x", "keys": [["title", "a"]]}, "keys[0].type"),
        ({"object": "x", "kind": "poem"}, "kind"),
        ({"object": "x", "model": "nobody"}, "model"),
        ({"object": "x", "ttl_s": -1}, "ttl_s"),
        ({"object": "x", "share": "world"}, "share"),
        ({"object": "x", "share": "tenant"}, "share"),
        ({"object": "x", "colour": "red"}, "colour"),
        ({"object": "x" * 700_000}, "object.document"),
    ],
)
async def test_a_wrong_put_names_the_field(site: Site, body: dict[str, Any], param: str) -> None:
    await site.start(cache=OFF)
    status, answer = await put(site, **body)
    assert (status in (400, 403), answer["error"]["param"]) == (True, param)


async def test_a_wrong_get_or_delete_names_the_field(site: Site) -> None:
    await site.start(cache=OFF)
    for query, status, param in (
        ("?key=a", 501, "key"),
        ("?limit=0", 400, "limit"),
        ("?type=prompt", 400, "type"),
        ("?limit=1&limit=2", 400, "limit"),
        ("?colour=red", 400, "colour"),
    ):
        got, body, _ = await site.get("/v1/cache" + query)
        assert (got, body["error"]["param"]) == (status, param)
    assert (await delete(site, ""))[0] == 400
    assert (await delete(site, "?all=true")) == (200, {"deleted": 0})


async def test_a_proxy_without_a_cache_says_so(site: Site) -> None:
    await site.start(cache={"enabled": False})
    assert (await site.get("/v1/cache"))[0] == 404
    status, body, _ = await site.chat(model="latency")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    status, body, _ = await site.chat(intentd={"options": {"cache": "exact"}})
    assert (status, body["error"]["param"]) == (400, "options.cache")


async def test_time_to_live_and_the_bound_on_items(site: Site) -> None:
    proxy = await site.start(service_types=EXACT, cache={**OFF, "max_items": 2})
    await put(site, object={"prompt": "p", "response": "r"})
    for prompt in ("a", "b", "a"):
        assert (await ask(site, prompt))["result"] == "miss", "b took the place of a"
    assert (await ask(site, "p"))["result"] == "exact", "put objects never go"
    status, _ = await put(site, object={"prompt": "p2", "response": "r"})
    assert status == 200
    status, body = await put(site, object={"prompt": "p3", "response": "r"})
    assert (status, body["error"]["code"]) == (507, "cache_full")
    page = await proxy.admin("cache.stats", {})
    assert (page["items"], page["put_items"]) == (2, 2)


async def test_a_bad_mark_forgets_the_answer(site: Site) -> None:
    await site.start(service_types=EXACT, cache=OFF)
    await ask(site)
    hit = await ask(site)
    assert hit["result"] == "exact"
    name = hit["body"]["intentd"]["request_id"]
    status, _, _ = await site.post("/v1/feedback", {"id": name, "rating": "bad"})
    assert status == 200
    assert (await ask(site))["result"] == "miss"


async def test_latency_answers_fast_and_has_a_better_one_ready(site: Site) -> None:
    models = [site.model("m"), site.model("dear", price_in="50", price_out="100")]
    site.provider.words_for = lambda body: (body["model"],)
    proxy = await site.start(models=models, cache=OFF)
    status, body, _ = await site.post("/v1/request", {"prompt": "Why?", "service_type": "latency"})
    assert (status, body["response"]) == (200, "up-m")
    await prefetched(proxy, 1)
    status, better, _ = await site.post("/v1/regenerate", {"id": body["id"]})
    assert (better["response"], better["metadata"]["cache"]["result"]) == ("up-dear", "exact")
    assert len(site.provider.requests) == 2
    status, body, _ = await site.post("/v1/request", {"prompt": "Why?", "service_type": "latency"})
    assert body["response"] == "up-dear"


async def test_followups_are_ready_in_the_conversation(site: Site) -> None:
    chat = {
        "name": "chat",
        "stages": [
            {"cache": "exact"}, {"context": [{"last_k": 5}]}, {"model": "one", "models": "m"},
            {"store": "prompt"}, {"prefetch": "followups"},
        ],
    }  # fmt: skip
    site.provider.words_for = lambda body: (
        ("1. Who made it?\n2. When was it made?",) if "most likely" in str(body) else ("Answer.",)
    )
    proxy = await site.start(service_types=[chat], cache=OFF)
    request = {"prompt": "What is it?", "service_type": "chat", "conversation": "c"}
    _, body, _ = await site.post("/v1/request", request)
    await prefetched(proxy, 1)
    _, told, _ = await site.get(f"/v1/requests/{body['id']}")
    assert told["followups"] == ["Who made it?", "When was it made?"]
    calls = len(site.provider.requests)
    assert calls == 4
    _, body, _ = await site.post("/v1/request", {**request, "prompt": "When was it made?"})
    assert body["metadata"]["cache"]["result"] == "exact"
    elsewhere = {**request, "prompt": "Who made it?", "conversation": "other"}
    _, body, _ = await site.post("/v1/request", elsewhere)
    assert body["metadata"]["cache"]["result"] == "miss", "it was answered in another conversation"


async def prefetched(proxy: Any, count: int) -> None:
    async with asyncio.timeout(20):
        metrics = proxy._cache.cache.metrics
        while metrics.prefetches.get("done", 0) < count:  # noqa: ASYNC110  a counter, no event
            await asyncio.sleep(0.01)


async def test_a_restart_keeps_answers_and_objects(site: Site, tmp_path: Path) -> None:
    proxy = await site.start(service_types=EXACT, cache=OFF)
    await ask(site)
    await put(site, object={"prompt": "p", "response": "r"})
    await proxy.stop()
    site.proxies.clear()
    await site.start(service_types=EXACT, cache=OFF)
    assert (await ask(site))["result"] == "exact"
    assert (await ask(site, "p"))["text"] == "r"
    assert len(site.provider.requests) == 1
