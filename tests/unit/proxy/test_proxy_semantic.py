"""Semantic hits of a proxy in process, with an embeddings model of the pool instead of MiniLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from tests.unit.proxy.conftest import Site

ASKED = {
    "name": "asked",
    "stages": [
        {"cache": "semantic", "min_similarity": 0.8, "limit": 3}, {"context": "all"},
        {"model": "one", "models": "m"}, {"store": ["prompt", "response"]},
    ],
}  # fmt: skip
WORDS = ("card", "renew", "book", "lost", "hours", "open")


def meaning(text: str) -> list[float]:
    """A vector of what a text is about: close for the same words, far for others."""
    low = text.lower()
    vector = [float(word in low) for word in WORDS]
    return [*vector, 0.05 + 0.01 * (len(text) % 3)]


@pytest.fixture
def embeds(monkeypatch: pytest.MonkeyPatch, site: Site) -> Callable[[], int]:
    """The provider's embeddings by meaning; how many texts it embedded."""
    texts: list[str] = []

    def answer(body: dict[str, Any]) -> web.Response:
        texts.extend(body["input"])
        data = [{"index": i, "embedding": meaning(text)} for i, text in enumerate(body["input"])]
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        return web.json_response({"object": "list", "data": data, "usage": usage})

    monkeypatch.setattr(site.provider, "_embeddings", answer)
    return lambda: len(texts)


async def start(site: Site, **cache: Any) -> Any:
    return await site.start(
        models=[site.model("m"), site.model("e", price_in="1")],
        service_types=[ASKED],
        cache={"semantic": "on", "embedder_model": "e", **cache},
    )


async def ask(site: Site, prompt: str, **fields: Any) -> dict[str, Any]:
    headers = fields.pop("headers", None)
    body = {"prompt": prompt, "service_type": "asked", **fields}
    status, answer, _ = await site.post("/v1/request", body, headers=headers)
    assert status == 200, answer
    return {"id": answer["id"], "text": answer["response"], **answer["metadata"]["cache"]}


async def test_other_words_hit_and_other_meanings_do_not(
    site: Site, embeds: Callable[[], int]
) -> None:
    proxy = await start(site)
    assert (await ask(site, "How do I renew my card?"))["result"] == "miss"
    hit = await ask(site, "how do I renew my card please")
    assert (hit["result"], hit["kind"]) == ("semantic", "prompt")
    assert hit["similarity"] > 0.99
    for other, reason in (
        ("How do I renew 3 cards?", "numbers"),
        ("How do I not renew my card?", "negation"),
        ("When do you open?", ""),
    ):
        miss = await ask(site, other, headers={"Cache-Control": "no-store"})
        assert (miss["result"], miss.get("reason", "")) == ("miss", reason)
    assert proxy.api.metrics.cost_nano["e"] > 0, "embeddings are booked"


async def test_a_conversation_and_other_keys_are_other_worlds(
    site: Site, embeds: Callable[[], int]
) -> None:
    proxy = await start(site)
    await ask(site, "How do I renew my card?")
    await ask(site, "Tell me about lost books", conversation="c")
    other = await ask(site, "how do I renew my card please", conversation="c")
    assert other["result"] == "miss"
    made = await proxy.admin("keys.new", {"name": "b"})
    body = {"prompt": "how do I renew my card please", "service_type": "asked"}
    headers = {"Authorization": f"Bearer {made['secret']}"}
    _, answer, _ = await site.post("/v1/request", body, headers=headers)
    assert answer["metadata"]["cache"]["result"] == "miss"


async def test_marks_move_the_threshold_and_a_restart_keeps_it_and_the_vectors(
    site: Site, embeds: Callable[[], int]
) -> None:
    proxy = await start(site, max_false_hit=0.01)
    await ask(site, "How do I renew my card?")
    for _ in range(3):
        hit = await ask(site, "how do I renew my card please")
        assert hit["result"] == "semantic"
        await site.post("/v1/feedback", {"id": hit["id"], "rating": "bad"})
        await site.post("/v1/feedback", {"id": hit["id"], "rating": "bad"})  # counts once
        # the answer that is kept now would be an exact hit
        await site.session.delete(site.url + "/v1/cache?all=true")
        await ask(site, "How do I renew my card?", headers={"Cache-Control": "no-cache"})
    stats = await proxy.admin("cache.stats", {})
    moved = stats["thresholds"]["default"]
    assert moved == pytest.approx(stats["threshold"] + 3 * 0.02 * 0.99)
    await proxy.stop()
    site.proxies.clear()
    count = embeds()
    proxy = await start(site)
    stats = await proxy.admin("cache.stats", {})
    assert stats["vectors"] == 2
    await ask(site, "unrelated hours")
    assert (await proxy.admin("cache.stats", {}))["thresholds"]["default"] == moved
    assert embeds() == count + 1, "nothing is embedded twice"


async def test_get_finds_what_was_put_by_any_of_its_keys(
    site: Site, embeds: Callable[[], int]
) -> None:
    await start(site)
    for name, keys in (
        ("a", [["question", "lost card"], ["keywords", "renew"]]),
        ("b", [["chunk", "open hours"]]),
    ):
        body = {"object": f"text {name}", "keys": keys, "source": name}
        async with site.session.put(site.url + "/v1/cache", json=body) as response:
            assert response.status == 200

    async def found(query: str) -> list[Any]:
        _, page, _ = await site.get(f"/v1/cache?key={query}")
        return [(one["source"], one["type"]) for one in page["data"]]

    assert await found("lost+card&limit=1") == [("a", "question")]
    assert await found("renew&min_similarity=0.9") == [("a", "keywords")]
    assert await found("renew&min_similarity=0.9&source=b") == []
    assert await found("lost+card&type=chunk") == [("b", "chunk")]
    assert len(await found("lost+card")) == 2


async def test_similar_messages_are_chosen_by_the_embedder(
    site: Site, embeds: Callable[[], int]
) -> None:
    await start(site)
    for prompt in ("the lost card", "the opening hours"):
        await ask(site, prompt, conversation="c", options={"cache": "skip"})
    answer = await ask(
        site, "what of the card", conversation="c",
        options={"cache": "skip", "context": {"similar": 0.5}},
    )  # fmt: skip
    assert answer["result"] == "off"
    sent = site.provider.requests[-1]["messages"]
    assert [one["content"] for one in sent][::2] == ["the lost card", "what of the card"]


async def test_an_embedder_that_is_down_is_a_miss(site: Site) -> None:
    await start(site)
    assert (await ask(site, "How do I renew my card?"))["result"] == "miss"
    site.provider._embeddings = lambda body: web.Response(status=500)  # type: ignore[method-assign]  # a broken provider
    assert (await ask(site, "How can I renew my card?"))["result"] == "miss"
    assert (await ask(site, "How do I renew my card?"))["result"] == "exact"
