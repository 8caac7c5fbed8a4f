"""Batches of prompts by several models, feedback on answers, and what is kept of requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.unit.proxy.provider import Script

from intentd.proxy.feedback import Feedback
from intentd.proxy.metrics import MAX_SERIES, ProxyMetrics


def two(site: Any) -> list[dict[str, Any]]:
    return [site.model("m"), site.model("big", price_in="9", price_out="90")]


async def test_prompts_by_models_and_types(site: Any) -> None:
    await site.start(models=two(site))
    site.provider.words_for = lambda sent: (sent["model"], " ", sent["messages"][-1]["content"])
    status, answer, _ = await site.post(
        "/v1/batch",
        {
            "prompts": ["p0", {"prompt": "p1", "system": "Be brief"}],
            "models": ["m", "big"],
            "service_types": ["cost"],
            "max_tokens": 20,
            "params": {"temperature": 0},
        },
    )
    assert status == 200, answer
    assert [(r["prompt"], r.get("model", r.get("service_type")), r["response"])
            for r in answer["results"]] == [
        (0, "m", "up-m p0"), (0, "big", "up-big p0"), (0, "cost", "up-m p0"),
        (1, "m", "up-m p1"), (1, "big", "up-big p1"), (1, "cost", "up-m p1"),
    ]  # fmt: skip
    assert answer["cost_nano"] == sum(r["metadata"]["cost_nano"] for r in answer["results"])
    assert answer["summary"]["big"]["answered"] == 2
    assert answer["summary"]["big"]["cost_nano"] > answer["summary"]["m"]["cost_nano"]
    systems = [sent["messages"][0]["role"] for sent in site.provider.requests]
    assert systems.count("system") == 3
    assert all(sent["temperature"] == 0 for sent in site.provider.requests)
    # every one is a request of its own: read, rated, regenerated
    name = answer["results"][3]["id"]
    assert (await site.get(f"/v1/requests/{name}"))[1]["path"] == "/v1/batch"
    assert (await site.post("/v1/feedback", {"id": name, "rating": "good"}))[0] == 200
    assert (await site.post("/v1/regenerate", {"id": name}))[1]["response"] == "up-m p1"


async def test_concurrency_is_bounded_and_a_failure_stays_its_own(site: Any) -> None:
    await site.start(batch={"concurrency": 3}, upstream={"attempts": 1, "backoff_s": 0.001})
    site.provider.scripts = [Script(delay_s=0.01) for _ in range(5)] + [Script(status=500)]
    body = {"prompts": [f"p{n}" for n in range(9)], "models": ["m"], "concurrency": 50}
    _, answer, _ = await site.post("/v1/batch", body)
    assert site.provider.most_open == 3
    failed = [r for r in answer["results"] if "error" in r]
    assert len(failed) == 1
    assert failed[0]["error"]["code"] == "no_answer"
    assert failed[0]["metadata"]["models"][0]["outcome"] == "status"
    assert answer["summary"]["m"]["failed"] == 1


async def test_a_budget_ends_a_batch_request_by_request(site: Any) -> None:
    proxy = await site.start(keys={"required": True})
    grants = {"budgets": [{"unit": "requests", "limit": "3"}]}
    made = await proxy.admin("keys.new", {"name": "a", "tenant": "t", "grants": grants})
    headers = {"Authorization": f"Bearer {made['secret']}"}
    body = {"prompts": ["p"] * 5, "models": ["m"], "concurrency": 1}
    _, answer, _ = await site.post("/v1/batch", body, headers=headers)
    codes = [r.get("error", {}).get("code") for r in answer["results"]]
    assert codes == [None, None, None, "insufficient_quota", "insufficient_quota"]
    assert len(site.provider.requests) == 3


async def test_a_batch_keeps_to_the_keys_rate(site: Any) -> None:
    proxy = await site.start(keys={"required": True})
    grants = {"rate": {"per_second": 200.0, "burst": 2.0}}
    made = await proxy.admin("keys.new", {"name": "a", "tenant": "t", "grants": grants})
    headers = {"Authorization": f"Bearer {made['secret']}"}
    body = {"prompts": ["p"] * 6, "models": ["m"]}
    _, answer, _ = await site.post("/v1/batch", body, headers=headers)
    assert answer["summary"]["m"]["answered"] == 6


async def test_a_batch_as_it_comes_and_a_client_that_leaves(site: Any) -> None:
    await site.start()
    body = {"prompts": ["p0", "p1"], "models": ["m"], "stream": True}
    async with site.session.post(f"{site.url}/v1/batch", json=body) as response:
        lines = [json.loads(line) for line in (await response.text()).splitlines()]
    assert sorted(line["number"] for line in lines[:-1]) == [0, 1]
    assert lines[-1]["done"] is True
    site.provider.default = Script(hang=True)
    site.provider.started.clear()
    asked = asyncio.create_task(site.post("/v1/batch", {**body, "stream": False}))
    async with asyncio.timeout(5):
        await site.provider.started.wait()
        asked.cancel()
        await site.provider.stopped.wait()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": ["x", 3]}, "prompts[1]"),
        ({"prompts": [{"prompt": "x", "model": "m"}]}, "prompts[0].model"),
        ({"prompts": ["x"] * 2000}, "prompts"),
        ({"models": []}, "models"),
        ({"models": "m"}, "models"),
        ({"models": ["m", "m"]}, "models[1]"),
        ({"models": None, "service_types": [3]}, "service_types[0]"),
        ({"params": {"messages": []}}, "params.messages"),
        ({"options": 3}, "options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"concurrency": 0}, "concurrency"),
        ({"stream": "yes"}, "stream"),
        ({"secret": 1}, "secret"),
    ],
)
async def test_wrong_batches_are_named(site: Any, fields: dict[str, Any], param: str) -> None:
    await site.start()
    body = {"prompts": ["x"], "models": ["m"], **fields}
    status, answer, _ = await site.post("/v1/batch", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert site.provider.requests == []


async def test_unknown_models_and_types_of_a_batch(site: Any) -> None:
    await site.start()
    body = {"prompts": ["x"], "models": ["m", "none"], "service_types": ["psychic"]}
    _, answer, _ = await site.post("/v1/batch", body)
    assert [r.get("error", {}).get("param") for r in answer["results"]] == [
        None, "model", "service_type",
    ]  # fmt: skip


async def test_feedback_is_kept_counted_and_passed_on(site: Any) -> None:
    proxy = await site.start()
    heard: list[Feedback] = []

    def broken(_feedback: Feedback) -> None:
        raise ValueError

    proxy.api.feedback.subscribers += [broken, heard.append]
    _, answer, _ = await site.post("/v1/request", {"prompt": "x", "service_type": "cost"})
    name = answer["id"]
    for rating in ("good", "bad"):
        body = {"id": name, "rating": rating, "comment": "well"}
        assert (await site.post("/v1/feedback", body))[1] == {"id": name, "rating": rating}
    _, kept, _ = await site.get(f"/v1/requests/{name}")
    assert (kept["feedback"]["rating"], kept["feedback"]["comment"]) == ("bad", "well")
    await site.post("/v1/regenerate", {"id": name})
    assert [(word.kind, word.good) for word in heard] == [
        ("rated", True), ("rated", False), ("regenerated", False),
    ]  # fmt: skip
    assert heard[0].document["model"] == "m"
    assert proxy.api.metrics.feedback == {
        ("m", "cost", "good"): 1, ("m", "cost", "bad"): 1, ("m", "cost", "regenerated"): 1,
    }  # fmt: skip
    # on disk
    await proxy.stop()
    site.proxies.remove(proxy)
    await site.start()
    assert (await site.get(f"/v1/requests/{name}"))[1]["feedback"]["rating"] == "bad"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"rating": "good"}, 400, "id"),
        ({"id": "x", "rating": 5}, 400, "rating"),
        ({"id": "x", "rating": "good", "comment": "x" * 3000}, 400, "comment"),
        ({"id": "x", "rating": "good", "stars": 5}, 400, "stars"),
        ({"id": "x", "rating": "good"}, 404, "id"),
    ],
)
async def test_wrong_feedback_is_named(
    site: Any, body: dict[str, Any], status: int, param: str
) -> None:
    await site.start()
    got, answer, _ = await site.post("/v1/feedback", body)
    assert (got, answer["error"]["param"]) == (status, param)


async def test_a_request_without_an_answer_is_in_the_log(site: Any) -> None:
    await site.start(upstream={"attempts": 1, "backoff_s": 0.001})
    site.provider.default = Script(status=500)
    body = {"prompt": "x", "service_type": "cost"}
    _, _, headers = await site.post("/v1/request", body, headers={"X-Request-Id": "mine"})
    assert headers["X-Request-Id"] == "mine"
    _, kept, _ = await site.get("/v1/requests/mine")
    assert (kept["outcome"], kept["status"], kept["models"][0]["outcome"]) == (
        "no_answer", 502, "status",
    )  # fmt: skip


async def test_conversations_are_listed_page_by_page(site: Any) -> None:
    await site.start()
    for name in ("c", "a", "b", "a"):
        body = {"prompt": "x", "service_type": "cost", "conversation": name}
        await site.post("/v1/request", body)
    _, page, _ = await site.get("/v1/conversations?limit=2")
    assert [(row["conversation"], row["messages"]) for row in page["data"]] == [("a", 2), ("b", 1)]
    assert page["has_more"] is True
    _, page, _ = await site.get("/v1/conversations?limit=2&after=b")
    assert [row["conversation"] for row in page["data"]] == ["c"]
    assert page["has_more"] is False
    for wrong in ("0", "x", "1001", "%C2%B2"):
        assert (await site.get(f"/v1/conversations?limit={wrong}"))[0] == 400


async def test_labels_are_ours(site: Any) -> None:
    """Neither a client nor a provider can make a series."""
    proxy = await site.start()
    error = {"message": "no", "type": "x", "code": "made up by the provider"}
    site.provider.scripts = [Script(status=400, error=error)]
    _, answer, _ = await site.chat()
    assert answer["error"]["code"] == error["code"]
    await site.chat(model="nobody")
    assert [key[2] for key in proxy.api.metrics.requests] == ["upstream_request"]


def test_series_are_bounded() -> None:
    metrics = ProxyMetrics(dict)
    for number in range(MAX_SERIES + 50):
        metrics.finished(f"m{number}", "fixed", "ok", 0.1)
    assert len(metrics.requests) == MAX_SERIES + 1
    assert metrics.requests["other", "other", "ok"] == 50
