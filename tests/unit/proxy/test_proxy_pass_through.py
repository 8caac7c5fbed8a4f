"""What passes through the proxy, over real sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.unit.proxy.provider import Script


async def test_answer_with_metadata(site: Any) -> None:
    await site.start()
    status, answer, headers = await site.chat(temperature=0.5, headers={"X-Request-Id": "mine-1"})
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "Hello there."
    sent = site.provider.requests[0]
    assert sent["model"] == "up-m"
    assert sent["temperature"] == 0.5
    meta = answer["intentd"]
    assert meta["client_request_id"] == headers["X-Request-Id"] == "mine-1"
    assert meta["request_id"] == headers["X-Intentd-Request-Id"] != "mine-1"
    assert meta["service_type"] == "fixed"
    usage = answer["usage"]
    cost = usage["prompt_tokens"] * 1000 + usage["completion_tokens"] * 10_000
    assert meta["cost_nano"] == cost == int(headers["X-Intentd-Cost-Nano"])
    assert meta["models"][0]["outcome"] == "ok"
    assert not meta["estimated"]
    assert headers["X-Intentd-Model"] == "m"
    status, found, _ = await site.get("/v1/requests/mine-1")
    assert status == 200
    assert found["cost_nano"] == cost
    assert found["outcome"] == "ok"


async def test_no_headers_of_the_client_reach_the_provider(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", "secret-of-operator")
    await site.start(models=[site.model("m", api_key_env="PROVIDER_KEY")])
    await site.chat(headers={"Authorization": "Bearer client", "Cookie": "a=b", "X-Other": "1"})
    sent = site.provider.headers[0]
    assert sent["Authorization"] == "Bearer secret-of-operator"
    assert "Cookie" not in sent
    assert "X-Other" not in sent


async def test_stream_hides_the_usage_it_asked_for(site: Any) -> None:
    await site.start()
    events = await site.stream()
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello there."
    assert all(chunk["choices"] for chunk in chunks)
    assert site.provider.requests[0]["stream_options"] == {"include_usage": True}


async def test_stream_usage_chunk_carries_metadata(site: Any) -> None:
    await site.start()
    events = await site.stream(stream_options={"include_usage": True})
    last = json.loads(events[-2])
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["intentd"]["cost_nano"] > 0
    status, found, _ = await site.get(f"/v1/requests/{last['intentd']['request_id']}")
    assert status == 200
    assert found["latency_ms"]["first_token"] > 0


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (Script(cut_after=2), "upstream_cut"),
        (Script(no_done=True, no_finish=True), "upstream_cut"),
        (Script(garbage_event=2), "upstream_garbage"),
        (Script(error_event=2), "upstream_status"),
    ],
)
async def test_broken_stream_ends_in_an_error(site: Any, script: Script, code: str) -> None:
    await site.start()
    site.provider.scripts = [script]
    events = await site.stream()
    assert events[-1] != "[DONE]"
    error = json.loads(events[-1])["error"]
    assert error["code"] == code
    assert "".join(
        json.loads(event)["choices"][0]["delta"]["content"] for event in events[:-1]
    ) in ("Hello there", "Hello there.")
    request_id = error["message"].rpartition("(request ")[2].rstrip(")")
    _, found, _ = await site.get(f"/v1/requests/{request_id}")
    assert found["outcome"] == code
    assert found["estimated"]


async def test_stream_without_done_but_finished_is_whole(site: Any) -> None:
    await site.start()
    site.provider.scripts = [Script(no_done=True)]
    assert (await site.stream())[-1] == "[DONE]"


async def test_slow_drip_does_not_count_as_alive(site: Any) -> None:
    await site.start(upstream={"idle_timeout_s": 0.2, "retry_share": 0})
    site.provider.scripts = [Script(words=("a", "b" * 4000), drip_s=0.001)]
    events = await site.stream()
    assert json.loads(events[-1])["error"]["code"] == "upstream_timeout"


async def test_client_that_leaves_stops_the_provider(site: Any) -> None:
    await site.start()
    site.provider.scripts = [Script(endless=True, event_delay_s=0.01)]
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
    async with site.session.post(f"{site.url}/v1/chat/completions", json=body) as response:
        await response.content.readany()
        response.close()
    async with asyncio.timeout(10):
        await site.provider.stopped.wait()
        await site.proxy.api.idle.wait()
    assert site.proxy.api.metrics.requests == {("m", "fixed", "left"): 1}


async def test_client_that_leaves_before_the_answer_stops_the_provider(site: Any) -> None:
    await site.start()
    site.provider.scripts = [Script(hang=True)]
    task = asyncio.ensure_future(site.chat())
    async with asyncio.timeout(10):
        await site.provider.started.wait()
        task.cancel()
        await site.provider.stopped.wait()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "script",
    [
        Script(status=500),
        Script(status=429, retry_after="0.01"),
        Script(garbage=True),
        Script(cut_after=20),
        Script(raw=b'{"error": {"message": "busy"}}'),
        Script(raw=b"[1, 2]"),
        Script(status=401),
    ],
)
async def test_failure_is_retried(site: Any, script: Script) -> None:
    await site.start()
    site.provider.scripts = [script]
    status, answer, headers = await site.chat()
    assert status == 200
    assert headers["X-Intentd-Attempts"] == "2"
    assert [step["outcome"] for step in answer["intentd"]["models"]][-1] == "ok"


async def test_stream_is_retried_before_its_first_event(site: Any) -> None:
    await site.start()
    site.provider.scripts = [Script(status=503), Script(error_event=0), Script()]
    events = await site.stream()
    assert events[-1] == "[DONE]"
    assert len(site.provider.requests) == 3


async def test_fallback_before_the_first_token(site: Any) -> None:
    await site.start(
        models=[site.model("m", fallbacks=["b"], base_url="http://127.0.0.1:1/v1"), site.model("b")]
    )
    status, answer, headers = await site.chat()
    assert status == 200
    assert headers["X-Intentd-Model"] == "b"
    assert [step["outcome"] for step in answer["intentd"]["models"]] == ["refused", "ok"]
    assert answer["intentd"]["models"][0]["cost_nano"] == 0


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (Script(status=500), 502, "upstream_status"),
        (Script(status=429, retry_after="30"), 429, "upstream_rate_limited"),
        (Script(garbage=True), 502, "upstream_garbage"),
        (Script(hang=True), 504, "upstream_timeout"),
        (Script(drip_s=0.05), 504, "upstream_timeout"),
    ],
)
async def test_lasting_failure_is_said(site: Any, script: Script, status: int, code: str) -> None:
    await site.start(upstream={"attempts": 2, "backoff_s": 0.001, "first_token_timeout_s": 0.2})
    site.provider.default = script
    got, answer, headers = await site.chat()
    assert (got, answer["error"]["code"]) == (status, code)
    if status == 429:
        assert headers["Retry-After"] == "30"


async def test_the_providers_own_refusal_reaches_the_client(site: Any) -> None:
    await site.start()
    error = {"message": "temperature is too high", "param": "temperature", "code": "bad"}
    site.provider.scripts = [Script(status=400, error=error)]
    status, answer, _ = await site.chat()
    assert status == 400
    assert answer["error"]["message"] == "temperature is too high"
    assert answer["error"]["param"] == "temperature"
    assert len(site.provider.requests) == 1


async def test_cooldown_and_probe(site: Any) -> None:
    await site.start(upstream={"attempts": 1, "cooldown_failures": 2, "cooldown_s": 60.0})
    site.provider.default = Script(status=500)
    for _ in range(2):
        await site.chat()
    asked = len(site.provider.requests)
    status, answer, headers = await site.chat()
    assert (status, answer["error"]["code"]) == (503, "upstream_cooldown")
    assert int(headers["Retry-After"]) > 30
    assert len(site.provider.requests) == asked
    assert site.proxy.unready() == ["every model cools down"]
    site.provider.default = Script()
    site.proxy.api.engine.models["m"].health.open_until = 0.0
    assert (await site.chat())[0] == 200
    assert site.proxy.unready() == []


async def test_concurrency_limit_is_kept_in_order(site: Any) -> None:
    await site.start(models=[site.model("m", max_concurrency=2)])
    site.provider.default = Script(delay_s=0.01)
    results = await asyncio.gather(*(site.chat() for _ in range(10)))
    assert [result[0] for result in results] == [200] * 10
    assert site.provider.most_open == 2
    assert site.proxy.api.engine.models["m"].places.taken == 0


async def test_waiting_places_are_bounded(site: Any) -> None:
    await site.start(
        models=[site.model("m", max_concurrency=1)],
        upstream={"max_waiting": 1, "total_timeout_s": 60},
    )
    gate = asyncio.Event()
    site.provider.default = Script(gate=gate)
    first = asyncio.ensure_future(site.chat())
    await site.provider.started.wait()
    second = asyncio.ensure_future(site.chat())
    while not site.proxy.api.engine.models["m"].places._queue:  # noqa: ASYNC110  no event for it
        await asyncio.sleep(0)
    assert (await site.chat())[0] == 429
    gate.set()
    assert [(await first)[0], (await second)[0]] == [200, 200]


async def test_completions_and_embeddings(site: Any) -> None:
    await site.start()
    status, answer, _ = await site.post(
        "/v1/completions", {"model": "m", "prompt": ["a", "b"], "max_tokens": 2}
    )
    assert status == 200
    assert answer["choices"][0]["text"] == "Hello there"
    status, answer, _ = await site.post("/v1/embeddings", {"model": "m", "input": ["a", "b"]})
    assert status == 200
    assert len(answer["data"]) == 2
    assert answer["intentd"]["cost_nano"] == 2000


async def test_models(site: Any) -> None:
    await site.start(models=[site.model("m"), site.model("org/big:70b")])
    _, listed, _ = await site.get("/v1/models")
    assert [row["id"] for row in listed["data"]][:3] == ["m", "org/big:70b", "cost"]
    owners = {row["id"]: row["owned_by"] for row in listed["data"]}
    assert (owners["m"], owners["quality"]) == ("intentd", "intentd:service_type")
    assert (await site.get("/v1/models/cost"))[1]["owned_by"] == "intentd:service_type"
    status, one, _ = await site.get("/v1/models/org/big:70b")
    assert (status, one["id"]) == (200, "org/big:70b")
    assert (await site.get("/v1/models/none"))[0] == 404


async def test_drain_finishes_what_runs(site: Any) -> None:
    proxy = await site.start()
    gate = asyncio.Event()
    site.provider.default = Script(gate=gate)
    first = asyncio.ensure_future(site.chat())
    await site.provider.started.wait()
    draining = asyncio.ensure_future(proxy.drain(10.0))
    while not proxy.api.draining:  # noqa: ASYNC110  no event for it
        await asyncio.sleep(0)
    assert not draining.done()
    gate.set()
    assert (await first)[0] == 200
    await draining
