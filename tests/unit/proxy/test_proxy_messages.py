"""Anthropic's /v1/messages in front of a provider that speaks OpenAI's chat."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.unit.proxy.provider import Script

TOOL_CALL = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def body(**fields: Any) -> dict[str, Any]:
    return {
        "model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}], **fields,
    }  # fmt: skip


async def stream(site: Any, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    async with site.session.post(
        f"{site.url}/v1/messages", json=body(stream=True, **fields)
    ) as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    events = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n", 1)
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


async def test_a_message(site: Any) -> None:
    await site.start()
    status, answer, headers = await site.post(
        "/v1/messages",
        body(
            system=[{"type": "text", "text": "Be kind", "cache_control": {"type": "ephemeral"}}],
            stop_sequences=["END"],
            temperature=0.2,
            metadata={"user_id": "u"},
        ),
    )
    assert status == 200
    assert answer["content"] == [{"type": "text", "text": "Hello there."}]
    assert (answer["type"], answer["role"], answer["stop_reason"]) == (
        "message", "assistant", "end_turn",
    )  # fmt: skip
    assert answer["usage"]["output_tokens"] == 3
    assert answer["intentd"]["cost_nano"] == int(headers["X-Intentd-Cost-Nano"]) > 0
    (sent,) = site.provider.requests
    assert sent == {
        "model": "up-m",
        "max_tokens": 50,
        "temperature": 0.2,
        "stop": ["END"],
        "messages": [
            {"role": "system", "content": "Be kind"},
            {"role": "user", "content": "Hi"},
        ],
    }


async def test_tools_and_images_both_ways(site: Any) -> None:
    await site.start()
    message = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}
    raw = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    site.provider.scripts = [Script(raw=json.dumps(raw).encode())]
    image = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    status, answer, _ = await site.post(
        "/v1/messages",
        body(
            tools=[{"name": "add", "description": "adds", "input_schema": {"type": "object"}}],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            messages=[
                {"role": "user", "content": [{"type": "image", "source": image}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "See"},
                        {"type": "tool_use", "id": "t0", "name": "add", "input": {"a": 0}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "and?"},
                        {"type": "tool_result", "tool_use_id": "t0", "content": "7"},
                    ],
                },
            ],
        ),
    )
    assert status == 200
    assert answer["stop_reason"] == "tool_use"
    assert answer["content"] == [{"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}]
    sent = site.provider.requests[0]
    function = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert sent["tool_choice"] == "required"
    assert sent["parallel_tool_calls"] is False
    called = {"name": "add", "arguments": '{"a":0}'}
    assert sent["messages"] == [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
        },
        {
            "role": "assistant",
            "content": "See",
            "tool_calls": [{"id": "t0", "type": "function", "function": called}],
        },
        {"role": "tool", "tool_call_id": "t0", "content": "7"},
        {"role": "user", "content": [{"type": "text", "text": "and?"}]},
    ]


async def test_a_stream_of_text(site: Any) -> None:
    await site.start()
    events = await stream(site)
    assert [name for name, _ in events] == [
        "message_start", "content_block_start", *["content_block_delta"] * 3,
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    text = "".join(e["delta"]["text"] for name, e in events if name == "content_block_delta")
    assert text == "Hello there."
    last = events[-2][1]
    assert last["delta"]["stop_reason"] == "end_turn"
    assert last["usage"]["output_tokens"] == 3
    assert last["intentd"]["cost_nano"] > 0


async def test_a_stream_of_tool_calls(site: Any) -> None:
    await site.start()
    parts = [
        {"tool_calls": [{"index": 0, "id": "t1", "function": {"name": "add", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {"tool_calls": [{"index": 1, "id": "t2", "function": {"name": "sub"}}]},
    ]
    site.provider.scripts = [Script(words=(), deltas=tuple(parts))]
    events = await stream(site)
    starts = [e["content_block"] for name, e in events if name == "content_block_start"]
    assert [(block["id"], block["name"]) for block in starts] == [("t1", "add"), ("t2", "sub")]
    deltas = [e for name, e in events if name == "content_block_delta"]
    assert "".join(e["delta"]["partial_json"] for e in deltas) == '{"a": 1}'
    assert {e["index"] for e in deltas} == {0}


async def test_a_broken_stream_ends_in_an_error(site: Any) -> None:
    await site.start()
    site.provider.scripts = [Script(cut_after=2)]
    events = await stream(site)
    assert events[-1][0] == "error"
    assert events[-1][1]["error"]["type"] == "api_error"
    assert "message_stop" not in [name for name, _ in events]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"top_k": 3}, "top_k"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
         "messages[0].content[0].source"),
        ({"system": 3}, "system"),
        ({"tools": [{"name": "x"}]}, "tools[0]"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"service_type": "psychic"}, "service_type"),
    ],
)  # fmt: skip
async def test_errors_are_anthropics_and_name_the_field(
    site: Any, fields: dict[str, Any], word: str
) -> None:
    await site.start()
    status, answer, _ = await site.post("/v1/messages", body(**fields))
    assert status == 400
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"].startswith(word)
    assert site.provider.requests == []
