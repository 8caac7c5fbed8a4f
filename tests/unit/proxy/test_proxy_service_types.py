"""Service types, conversations and regenerate over real sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.unit.proxy.conftest import chat_body
from tests.unit.proxy.provider import Script

from intentd.core.errors import ConfigError
from intentd.core.messages import NumberedPolicy
from intentd.daemons.kit.config import validate
from intentd.proxy.config import ProxyConfig

JUDGED = "rate the answer"


def pool(site: Any) -> list[dict[str, Any]]:
    return [
        site.model("tiny", price_in="0.1", price_out="0.1"),
        site.model("mid", price_in="1", price_out="1"),
        site.model("big", price_in="10", price_out="10"),
    ]


def asked(body: dict[str, Any]) -> str:
    return " ".join(str(message["content"]) for message in body["messages"])


def judged_by(score: str) -> Any:
    def words(body: dict[str, Any]) -> tuple[str, ...]:
        return (score,) if JUDGED in asked(body) else ("I am ", str(body["model"]))

    return words


async def ask(site: Any, prompt: str, service_type: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "service_type": service_type, **fields}
    status, answer, _ = await site.post("/v1/request", body)
    assert status == 200, answer
    return dict(answer)


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"model": "cost"}, None),
        ({"model": "anything", "service_type": "cost"}, None),
        ({"model": "tiny", "intentd": {"service_type": "cost"}}, None),
        ({"model": "big"}, {"X-Intentd-Service-Type": "cost"}),
    ],
)
async def test_a_chat_names_a_service_type(
    site: Any, fields: dict[str, Any], headers: dict[str, str] | None
) -> None:
    await site.start(models=pool(site))
    status, answer, got = await site.chat(**fields, headers=headers, temperature=0.3)
    assert status == 200
    assert answer["intentd"]["service_type"] == "cost"
    assert answer["intentd"]["model"] == got["X-Intentd-Model"] == "tiny"
    (sent,) = site.provider.requests
    assert sent["model"] == "up-tiny"
    assert sent["temperature"] == 0.3
    assert sent["max_tokens"] == 1024  # the type's cap goes upstream
    assert "service_type" not in sent
    assert "intentd" not in sent


@pytest.mark.parametrize(("score", "model"), [("9", "mid"), ("3", "big")])
async def test_model_selector_asks_the_dear_model_when_not_content(
    site: Any, score: str, model: str
) -> None:
    await site.start(models=pool(site))
    site.provider.words_for = judged_by(score)
    answer = await ask(site, "Why is the sky blue?", "model_selector")
    assert answer["response"] == f"I am up-{model}"
    meta = answer["metadata"]
    assert meta["selection"]["verifier_score"] == int(score)
    assert meta["selection"]["escalated"] is (model == "big")
    assert [step["purpose"] for step in meta["models"]][:2] == ["answer", "verify"]
    assert meta["cost_nano"] == sum(step["cost_nano"] for step in meta["models"])


async def test_streams_pass_as_they_come(site: Any) -> None:
    await site.start(models=pool(site))
    events = await site.stream(model="cost", stream_options={"include_usage": True})
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert [c["choices"][0]["delta"].get("content") for c in chunks if c["choices"]] == [
        "Hello", " there", ".", None,
    ]  # fmt: skip
    assert chunks[-1]["intentd"]["model"] == "tiny"
    assert chunks[-1]["usage"]["completion_tokens"] == 3


async def test_a_cascade_buffers_until_it_accepts(site: Any) -> None:
    await site.start(models=pool(site))
    site.provider.words_for = judged_by("10")
    events = await site.stream(model="model_selector", stream_options={"include_usage": True})
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["content"] == "I am up-mid"
    assert chunks[1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[2]["usage"]["completion_tokens"] == 2
    assert chunks[2]["intentd"]["selection"]["verifier_score"] == 10


async def test_a_streams_headers_say_what_is_known(site: Any) -> None:
    await site.start(models=pool(site))
    site.provider.words_for = judged_by("2")
    assert site.proxy._on_policy(NumberedPolicy("prompts", 1, 3, 0.0, {})).applied
    body = {**chat_body(model="model_selector", stream=True), "intentd": {"conversation": "c"}}
    for _ in range(2):
        async with site.session.post(site.url + "/v1/chat/completions", json=body) as response:
            assert response.status == 200
            headers = response.headers
            await response.read()
    told = {name: headers.get(f"X-Intentd-{name}") for name in (
        "Service-Type", "Verifier-Score", "Escalated", "Attempts", "Policy", "Context-Messages",
    )}  # fmt: skip
    assert told == {
        "Service-Type": "model_selector", "Verifier-Score": "2", "Escalated": "true",
        "Attempts": "3", "Policy": "1.3", "Context-Messages": "1",
    }  # fmt: skip


async def test_the_time_of_each_stage_is_told(site: Any) -> None:
    await site.start(models=pool(site))
    site.provider.words_for = judged_by("10")
    asked = {"prompt": "x", "service_type": "model_selector", "conversation": "c"}
    _, answer, _ = await site.post("/v1/request", asked)
    times = answer["metadata"]["latency_ms"]
    assert {"answer", "verify", "context"} <= set(times["stages"])
    assert all(took >= 0 for took in times["stages"].values())
    assert sum(times["stages"].values()) <= times["total"] + 1.0


async def test_a_stream_that_breaks_joins_no_conversation(site: Any) -> None:
    await site.start(models=pool(site))
    site.provider.scripts = [Script(cut_after=2)]
    events = await site.stream(model="cost", intentd={"conversation": "c"})
    assert "error" in json.loads(events[-1])
    _, page, _ = await site.get("/v1/conversations/c")
    assert page["messages"] == []


async def test_a_failing_model_is_passed_by(site: Any) -> None:
    await site.start(models=pool(site), upstream={"attempts": 1})
    site.provider.scripts = [Script(status=500)]
    answer = await ask(site, "x", "cost")
    assert [step["outcome"] for step in answer["metadata"]["models"]] == ["status", "ok"]
    assert answer["metadata"]["model"] == "mid"
    site.provider.default = Script(status=500)
    status, error, _ = await site.post("/v1/request", {"prompt": "x", "service_type": "cost"})
    assert (status, error["error"]["code"]) == (502, "no_answer")


async def test_conversations_are_kept_in_order(site: Any) -> None:
    await site.start(models=pool(site))
    site.provider.words_for = lambda body: (f"re {body['messages'][-1]['content']}",)
    await asyncio.gather(
        *(ask(site, f"q{i}", "model_selector", conversation="c", options={"model": "mid"})
          for i in range(12))
    )  # fmt: skip
    _, page, _ = await site.get("/v1/conversations/c")
    prompts = [message["prompt"] for message in page["messages"]]
    answered = [body["messages"][-1]["content"] for body in site.provider.requests]
    assert sorted(prompts) == sorted(f"q{i}" for i in range(12))
    assert prompts == answered  # each saw what came before it
    assert site.provider.most_open == 1
    for place, body in enumerate(site.provider.requests):
        history = [m["content"] for m in body["messages"][:-1] if m["role"] == "user"]
        assert history == prompts[max(0, place - 5) : place]
    _, gone, _ = await delete(site, "/v1/conversations/c")
    assert gone == {"forgotten": 12}
    assert (await site.get("/v1/conversations/c"))[1]["messages"] == []


async def delete(site: Any, path: str) -> tuple[int, Any, Any]:
    async with site.session.delete(site.url + path) as response:
        return response.status, await response.json(), response.headers


async def test_a_chat_in_a_conversation_sends_only_its_turn(site: Any) -> None:
    await site.start()
    await site.chat(headers={"X-Intentd-Conversation": "c"})
    status, answer, _ = await site.chat(
        messages=[{"role": "user", "content": "And now?"}], intentd={"conversation": "c"}
    )
    assert status == 200
    assert [m["content"] for m in site.provider.requests[1]["messages"]] == [
        "Say hello", "Hello there.", "And now?",
    ]  # fmt: skip
    assert answer["intentd"]["context"]["messages"] == 1
    # a history the client sends is the conversation, and is not doubled
    mine = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    await site.chat(messages=mine, intentd={"conversation": "c"})
    assert site.provider.requests[2]["messages"] == mine


async def test_conversations_belong_to_a_key(site: Any) -> None:
    await site.start()
    made = await site.proxy.admin("keys.new", {"name": "alice"})
    alice = {"Authorization": f"Bearer {made['secret']}"}
    await site.chat(headers={**alice, "X-Intentd-Conversation": "c"})
    assert (await site.get("/v1/conversations/c"))[1]["messages"] == []
    assert len((await site.get("/v1/conversations/c", headers=alice))[1]["messages"]) == 1


async def test_conversations_outlive_a_restart(site: Any) -> None:
    proxy = await site.start()
    await site.chat(intentd={"conversation": "c"})
    await proxy.stop()
    site.proxies.clear()
    await site.start()
    await site.chat(intentd={"conversation": "c"})
    assert len(site.provider.requests[1]["messages"]) == 3


async def test_regenerate_goes_up_and_replaces(site: Any) -> None:
    await site.start(models=pool(site))
    site.provider.words_for = lambda body: (f"{body['model']} {len(body['messages'])}",)
    first = await ask(site, "one", "usage_based", conversation="c")
    second = await ask(site, "two", "usage_based", conversation="c")
    assert second["response"] == "up-tiny 3"
    status, better, _ = await site.post("/v1/regenerate", {"id": second["id"]})
    assert status == 200
    assert better["response"] == "up-mid 3"  # dearer, and without the answer it replaces
    assert better["metadata"]["regenerates"] == second["id"]
    status, best, _ = await site.post(
        "/v1/regenerate", {"id": better["id"], "service_type": "quality"}
    )
    assert (status, best["response"]) == (200, "up-big 3")
    _, page, _ = await site.get("/v1/conversations/c")
    assert [(m["id"], m["prompt"]) for m in page["messages"]] == [
        (first["id"], "one"), (best["id"], "two"),
    ]  # fmt: skip
    assert (await site.post("/v1/regenerate", {"id": "none"}))[0] == 404


async def test_own_types_and_quotas(site: Any) -> None:
    await site.start(
        models=pool(site),
        service_types=[
            {
                "name": "class",
                "based_on": "usage_based",
                "models": ["mid"],
                "max_tokens": 50,
                "quotas": [{"unit": "requests", "limit": 2, "period": "day"}],
            }
        ],
    )
    for _ in range(2):
        answer = await ask(site, "x", "class")
    assert answer["metadata"]["model"] == "mid"
    assert site.provider.requests[0]["max_tokens"] == 50
    status, error, _ = await site.post("/v1/request", {"prompt": "x", "service_type": "class"})
    assert (status, error["error"]["code"]) == (429, "insufficient_quota")
    status, error, _ = await site.post(
        "/v1/request", {"prompt": "x", "service_type": "class", "options": {"model": "big"}}
    )
    assert (status, error["error"]["param"]) == (400, "options.model")


async def test_smart_context_drops_what_stands_alone(site: Any) -> None:
    await site.start(models=pool(site))
    site.provider.words_for = lambda body: (
        ("STANDALONE",) if "You decide whether" in asked(body) else ("ok",)
    )
    await ask(site, "one", "smart_context", conversation="c")
    answer = await ask(site, "two", "smart_context", conversation="c")
    assert [step["purpose"] for step in answer["metadata"]["models"]] == [
        "context", "context", "answer",
    ]  # fmt: skip
    assert answer["metadata"]["context"]["messages"] == 0
    assert len(site.provider.requests[-1]["messages"]) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"service_type": "cost"}, "prompt"),
        ({"prompt": "x"}, "service_type"),
        ({"prompt": "x", "service_type": "psychic"}, "service_type"),
        ({"prompt": "x", "service_type": "smart_cache"}, "service_type"),
        ({"prompt": "x", "service_type": "cost", "conversation": "a b"}, "conversation"),
        ({"prompt": "x", "service_type": "cost", "options": {"k": 1}}, "options.k"),
        ({"prompt": "x", "service_type": "cost", "options": {"cache": "exact"}}, "options.cache"),
        ({"prompt": "x", "service_type": "model_selector", "options": {"threshold": 99}},
         "options.threshold"),
        ({"prompt": "x", "service_type": "cost", "options": {"context": {"last_k": -1}}},
         "options.context.last_k"),
        ({"prompt": "x", "service_type": "cost", "params": {"messages": []}}, "params.messages"),
        ({"prompt": "x", "service_type": "cost", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "service_type": "cost", "colour": 1}, "colour"),
    ],
)  # fmt: skip
async def test_wrong_requests_are_named(site: Any, body: dict[str, Any], param: str) -> None:
    await site.start(models=pool(site), cache={"enabled": False})
    status, answer, _ = await site.post("/v1/request", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert site.provider.requests == []


async def test_several_answers_need_fixed(site: Any) -> None:
    await site.start(models=pool(site))
    status, answer, _ = await site.chat(model="cost", n=2)
    assert (status, answer["error"]["param"]) == (400, "n")


@pytest.mark.parametrize(
    ("plain", "path"),
    [
        ({"name": "x"}, "service_types[0]"),
        ({"name": "x", "stages": [{"model": "fast"}]}, "service_types[0].stages[0].model"),
        ({"name": "x", "stages": [{"cache": "exact"}, {"model": "one"}]},
         "service_types[0].stages[0]"),
        ({"name": "x", "based_on": "cost", "quotas": [{"unit": "in_tokens", "limit": 1}]},
         "service_types[0].quotas[0].unit"),
    ],
)  # fmt: skip
def test_own_types_are_checked(plain: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(ProxyConfig, {"service_types": [plain], "cache": {"enabled": False}})
    assert caught.value.field == path


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        ({"cache": "smart"}, "service_types[0].stages[0].cache"),
        ({"prefetch": "followups", "service_type": "psychic"},
         "service_types[0].stages[0].service_type"),
    ],
)  # fmt: skip
def test_own_types_fit_the_cache_there_is(stage: dict[str, Any], path: str) -> None:
    plain = {"name": "x", "stages": [stage, {"model": "fast"}]}
    with pytest.raises(ConfigError) as caught:
        validate(ProxyConfig, {"service_types": [plain], "cache": {"semantic": "off"}})
    assert caught.value.field == path
