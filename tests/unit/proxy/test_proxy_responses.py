"""OpenAI's /v1/responses in front of a provider that speaks chat."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.unit.proxy.provider import Script

from intentd.core.errors import InputError
from intentd.core.prompts.counting import TokenRatio

TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}
FUNCTION = {"name": "add", "parameters": {"type": "object"}, "strict": True}
CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


async def respond(site: Any, **fields: Any) -> tuple[int, dict[str, Any], Any]:
    answer: tuple[int, dict[str, Any], Any] = await site.post(
        "/v1/responses", {"model": "m", "input": "Hi", **fields}
    )
    return answer


async def stream(site: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "m", "input": "Hi", "stream": True, **fields}
    async with site.session.post(f"{site.url}/v1/responses", json=body) as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    events = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n", 1)
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_everything_is_translated(site: Any) -> None:
    await site.start()
    status, answer, headers = await respond(
        site,
        instructions="Be kind",
        input=[
            {"role": "user", "content": [
                {"type": "input_text", "text": "See"},
                {"type": "input_image", "image_url": "http://x/y.png", "detail": "low"},
            ]},
            {"type": "reasoning", "summary": []},
            {"type": "message", "role": "assistant", "content": [
                {"type": "output_text", "text": "I do"}]},
            {"type": "function_call", "call_id": "c0", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c0", "output": "7"},
            {"role": "user", "content": "and?"},
        ],
        tools=[TOOL],
        tool_choice={"type": "function", "name": "add"},
        text={"format": {"type": "json_schema", "name": "s", "schema": {}}, "verbosity": "low"},
        reasoning={"effort": "low"},
        top_logprobs=2,
        max_output_tokens=50,
        temperature=0.5,
        metadata={"a": "b"},
        store=False,
    )  # fmt: skip
    assert status == 200, answer
    assert answer["output"][0]["content"][0]["text"] == "Hello there."
    assert answer["usage"]["output_tokens"] == 3
    assert (answer["metadata"], answer["max_output_tokens"], answer["store"]) == (
        {"a": "b"}, 50, False,
    )  # fmt: skip
    assert answer["intentd"]["cost_nano"] == int(headers["X-Intentd-Cost-Nano"]) > 0
    (sent,) = site.provider.requests
    image = {"type": "image_url", "image_url": {"url": "http://x/y.png", "detail": "low"}}
    assert sent == {
        "model": "up-m",
        "temperature": 0.5,
        "max_tokens": 50,
        "messages": [
            {"role": "system", "content": "Be kind"},
            {"role": "user", "content": [{"type": "text", "text": "See"}, image]},
            {"role": "assistant", "content": "I do", "tool_calls": [
                {"id": "c0", "type": "function", "function": {"name": "add", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c0", "content": "7"},
            {"role": "user", "content": "and?"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
        "verbosity": "low",
        "reasoning_effort": "low",
        "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip


async def test_the_cap_has_the_models_own_name(site: Any) -> None:
    await site.start(models=[site.model("m", max_tokens_field="max_completion_tokens")])
    await respond(site, max_output_tokens=50, store=False)
    await respond(site, max_output_tokens=60)
    body = {"model": "m", "max_tokens": 70, "messages": [{"role": "user", "content": "x"}]}
    await site.post("/v1/messages", body)
    assert [sent["max_completion_tokens"] for sent in site.provider.requests] == [50, 60, 70]
    assert all("max_tokens" not in sent for sent in site.provider.requests)


async def test_a_stream(site: Any) -> None:
    await site.start()
    events = await stream(site)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    last = events[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == "Hello there."
    assert last["usage"]["output_tokens"] == 3
    assert last["id"] == events[0]["response"]["id"]
    assert last["intentd"]["cost_nano"] > 0


async def test_a_cascade_streams_what_it_accepts(site: Any) -> None:
    await site.start(models=[site.model("m"), site.model("big", price_in="9")])
    events = await stream(site, model="model_selector")
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello there."
    assert events[-1]["response"]["intentd"]["selection"]["threshold"] == 8.0


async def test_a_stream_of_text_refusal_and_calls(site: Any) -> None:
    await site.start()
    second = {**CALL, "index": 1, "id": "c2"}
    more = {"index": 0, "function": {"arguments": "x"}}
    parts = (
        {"content": "Well"},
        {"refusal": "no"},
        {"tool_calls": [CALL, second]},
        {"tool_calls": [more]},
    )
    site.provider.scripts = [Script(words=(), deltas=parts, finish="tool_calls")]
    events = await stream(site, tools=[TOOL])
    message, first, last = events[-1]["response"]["output"]
    assert [part["type"] for part in message["content"]] == ["output_text", "refusal"]
    assert (first["call_id"], first["arguments"], first["status"]) == ("c1", "{}x", "completed")
    assert (last["call_id"], last["arguments"]) == ("c2", "{}")
    done = [event["item"]["type"] for event in events if event["type"].endswith("item.done")]
    assert done == ["message", "function_call", "function_call"]


@pytest.mark.parametrize("stored", [True, False])
async def test_a_broken_stream_is_said_to_have_failed(site: Any, stored: bool) -> None:
    await site.start()
    site.provider.scripts = [Script(cut_after=2)]
    events = await stream(site, store=stored)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    name = events[-1]["response"]["id"]
    assert (await respond(site, previous_response_id=name))[0] == 404


async def test_going_on_branching_and_forgetting(site: Any) -> None:
    await site.start()
    heard: list[list[Any]] = []

    def words(body: dict[str, Any]) -> tuple[str, ...]:
        heard.append([message["content"] for message in body["messages"]])
        return (f"answer {len(heard)}",)

    site.provider.words_for = words
    history = [
        {"role": "user", "content": "q0"},
        {"role": "assistant", "content": "a0"},
        {"role": "user", "content": "q1"},
    ]
    ids = [(await respond(site, input=history))[1]["id"]]
    for prompt in ("q2", "q3"):
        answer = (await respond(site, input=prompt, previous_response_id=ids[-1]))[1]
        ids.append(answer["id"])
    assert heard[-1] == ["q0", "a0", "q1", "answer 1", "q2", "answer 2", "q3"]
    # From the middle: another branch, which does not see q3 and is not seen by it.
    branch = (await respond(site, input="q4", previous_response_id=ids[1]))[1]
    assert heard[-1] == ["q0", "a0", "q1", "answer 1", "q2", "answer 2", "q4"]
    await respond(site, input="q5", previous_response_id=branch["id"])
    assert heard[-1][-3:] == ["q4", "answer 4", "q5"]
    await respond(site, input="q6", previous_response_id=ids[2])
    assert heard[-1][-3:] == ["q3", "answer 3", "q6"]
    # Read only: nothing is added.
    await respond(site, input="q7", previous_response_id=ids[2], store=False)
    assert heard[-1][-3:] == ["q3", "answer 3", "q7"]

    _, kept, _ = await site.get(f"/v1/responses/{ids[1]}")
    assert kept["output"][0]["content"][0]["text"] == "answer 2"
    assert kept["usage"]["output_tokens"] > 0
    _, items, _ = await site.get(f"/v1/responses/{ids[1]}/input_items")
    assert items["data"][0]["content"] == [{"type": "input_text", "text": "q2"}]
    async with site.session.delete(f"{site.url}/v1/responses/{ids[2]}") as response:
        assert (await response.json())["deleted"] is True
    assert (await site.get(f"/v1/responses/{ids[2]}"))[0] == 404
    status, answer, _ = await respond(site, previous_response_id=ids[2])
    assert (status, answer["error"]["code"]) == (404, "previous_response_not_found")
    # and it is a conversation like others
    assert (await site.get("/v1/conversations"))[1]["data"][0]["messages"] > 0


async def test_tool_results_go_with_their_calls(site: Any) -> None:
    """Even where the service type sends no context, and when a later turn sends only the last."""
    await site.start()
    called = Script(words=(), deltas=({"tool_calls": [CALL]},), finish="tool_calls")
    site.provider.scripts = [called, Script(), Script()]
    options = {"intentd": {"options": {"context": [{"last_k": 1}]}}}
    name = (await respond(site, tools=[TOOL], **options))[1]["id"]
    result = {"type": "function_call_output", "call_id": "c1", "output": "3"}
    for context in ([{"last_k": 0}], [{"last_k": 1}]):
        options = {"intentd": {"options": {"context": context}}}
        name = (
            await respond(
                site, input=[result] if context[0]["last_k"] == 0 else "next",
                previous_response_id=name, tools=[TOOL], **options,
            )
        )[1]["id"]  # fmt: skip
    roles = [[one["role"] for one in sent["messages"]] for sent in site.provider.requests]
    assert roles[1] == ["user", "assistant", "tool"]
    assert roles[2] == ["user", "assistant", "tool", "assistant", "user"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "pope", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "video"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
         "input[0].content[0].image_url"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]},
         "input[0].arguments"),
        ({"instructions": 3}, "instructions"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"store": "yes"}, "store"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"conversation": {"id": "a b"}}, "conversation"),
        ({"conversation": "c", "previous_response_id": "resp_x"}, "conversation"),
        ({"service_type": "psychic"}, "service_type"),
        ({"model": "none"}, "model"),
        ({"model": "none", "store": False}, "model"),
    ],
)  # fmt: skip
async def test_wrong_requests_are_named(site: Any, fields: dict[str, Any], param: str) -> None:
    await site.start()
    status, answer, _ = await respond(site, **fields)
    assert status in (400, 404), answer
    assert answer["error"]["param"] == param
    assert site.provider.requests == []


async def test_a_named_conversation(site: Any) -> None:
    await site.start()
    await respond(site, conversation={"id": "c1"})
    await respond(site, input="again", conversation="c1")
    assert [len(sent["messages"]) for sent in site.provider.requests] == [1, 3]


# -- Anthropic's messages by service type, and its token counts ----------------------------------


def message(**fields: Any) -> dict[str, Any]:
    return {"max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}], **fields}


async def test_messages_by_service_type(site: Any) -> None:
    models = [site.model(name, price_in=price) for name, price in (("m", "1"), ("big", "9"))]
    await site.start(models=models)
    _, answer, _ = await site.post("/v1/messages", message(model="quality"))
    assert (answer["model"], answer["intentd"]["service_type"]) == ("big", "quality")
    assert answer["content"][0]["text"] == "Hello there."
    body = message(model="m", intentd={"conversation": "c1"})
    await site.post("/v1/messages", body)
    await site.post("/v1/messages", body)
    assert len(site.provider.requests[-1]["messages"]) == 3
    # A cascade that accepts: what came whole is streamed as one piece.
    site.provider.words_for = lambda sent: ("9",) if "rate the answer" in str(sent) else ("Fine.",)
    async with site.session.post(
        f"{site.url}/v1/messages", json=message(model="model_selector", stream=True)
    ) as response:
        text = await response.text()
    assert text.count("event: message_stop") == 1
    assert '"text":"Fine."' in text


async def test_tokens_are_counted_by_what_was_counted(site: Any) -> None:
    await site.start()
    path = "/v1/messages/count_tokens"
    body = {"model": "m", "messages": [{"role": "user", "content": "word " * 400}]}
    _, first, _ = await site.post(path, body)
    assert 400 <= first["input_tokens"] <= 600
    for _ in range(40):  # this provider counts words, about five bytes each
        await site.post("/v1/messages", {**body, "max_tokens": 5})
    _, learned, _ = await site.post(path, body)
    counted = site.provider.bill_in // 40
    assert abs(learned["input_tokens"] - counted) <= counted * 0.02
    assert learned["intentd"]["learned_from"] == 40
    assert (await site.post(path, {**body, "model": "cost"}))[0] == 200
    for wrong, word in (({"model": "none"}, "model"), ({"stream": True}, "stream")):
        status, answer, _ = await site.post(path, {**body, **wrong})
        assert status in (400, 404)
        assert answer["error"]["message"].startswith(word)


def test_a_ratio_forgets_and_refuses() -> None:
    ratio = TokenRatio()
    assert (ratio.count(400), ratio.count(0)) == (100, 1)
    ratio.learn(0, 5)
    assert ratio.requests == 0
    for _ in range(100):
        ratio.learn(20_000, 10_000)
    for _ in range(400):
        ratio.learn(60_000, 10_000)
    assert 5.8 < ratio.bytes_per_token < 6
    with pytest.raises(InputError):
        ratio.count(-1)
