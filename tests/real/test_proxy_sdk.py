"""The official clients and LangChain, unmodified, through the proxy to a scripted provider.

The clients live in an environment of their own (their pins clash with others'):
INTENTD_SDK_PYTHON names its interpreter; ``make test`` makes it of requirements-sdk.txt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.proxy.provider import Provider, Script, running

from intentd.daemons.kit.config import validate
from intentd.daemons.kit.lifecycle import Kit, Tasks
from intentd.proxy.config import ProxyConfig
from intentd.proxy.daemon import ProxyDaemon

PYTHON = os.environ.get("INTENTD_SDK_PYTHON", "")
CLIENTS = Path(__file__).parent / "sdk"

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not PYTHON, reason="INTENTD_SDK_PYTHON names no interpreter with openai"),
]


ARGUMENTS = '{"a": 1, "b": 2}'


class Scripted(Provider):
    """Behaves as the last message asks."""

    def next_script(self) -> Script:
        body = self.requests[-1]
        last = (body.get("messages") or [{}])[-1]
        match last.get("content"):
            case "cut":
                return Script(cut_after=2)
            case "endless":
                return Script(endless=True, event_delay_s=0.01)
            case "json":
                return Script(words=('{"answer":', " 42}"))
            case "short":
                return Script(finish="length")
            case "recall":
                return Script(words=(self.heard(body),))
            case "tool" if body.get("tools"):
                function = {"name": body["tools"][0]["function"]["name"], "arguments": ARGUMENTS}
                call = {"index": 0, "id": "call_1", "type": "function", "function": function}
                return Script(words=(), deltas=({"tool_calls": [call]},), finish="tool_calls")
        if last.get("role") == "tool":
            before = body["messages"][-2]["tool_calls"][0]["id"]
            return Script(words=(f"{before} gave ", str(last["content"])))
        return Script()

    @staticmethod
    def heard(body: dict[str, Any]) -> str:
        """What went before the last message."""
        return " | ".join(str(message["content"]) for message in body["messages"][:-1])


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[tuple[ProxyDaemon, Provider]]:
    async with running(Scripted()) as provider, Tasks() as tasks:
        config: dict[str, Any] = {
            "name": "p",
            "state_dir": tmp_path,
            "run_dir": tmp_path,
            "controller": {"enabled": False},
            "listen": {"bind": "127.0.0.1:0"},
            "models": [
                {"name": "m", "base_url": provider.url, "price_in": "1"},
                {"name": "big", "base_url": provider.url, "price_in": "10"},
            ],
        }
        proxy = ProxyDaemon(validate(ProxyConfig, config), Kit("proxy"))
        try:
            await proxy.start(tasks)
            yield proxy, provider
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await proxy.stop()
            tasks.cancel_all()


async def run(client: str, url: str) -> Any:
    process = await asyncio.create_subprocess_exec(
        PYTHON, str(CLIENTS / client), url, stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0
    return json.loads(out)


async def test_anthropic(site: tuple[ProxyDaemon, Provider]) -> None:
    proxy, _ = site
    assert await run("anthropic_client.py", f"http://{proxy.address}") == {
        "text": "Hello there.",
        "out": 3,
        "stream": "Hello there.",
        "stop": "end_turn",
        "bad_model": "not_found_error",
        "cut": "APIStatusError",
        "tool": ["tool_use", "tool_use", "add", {"a": 1, "b": 2}],
        "tool_stream": ["add", {"a": 1, "b": 2}],
        "tool_result": "call_1 gave 3",
        "counted": True,
        "service_type": ["m", "cost"],
        "cascade_stream": "Hello there.",
    }


async def test_openai(site: tuple[ProxyDaemon, Provider]) -> None:
    proxy, provider = site
    seen = await run("openai_client.py", f"http://{proxy.address}/v1")
    assert seen.pop("request_id").startswith("req_")
    assert seen.pop("models")[:3] == ["m", "big", "cost"]  # then the other service types
    assert seen == {
        "text": "Hello there.",
        "intentd": "m",
        "stream": "Hello there.",
        "usage": 3,
        "several": 2,
        "tool": ["f", ARGUMENTS],
        "tool_stream": ["tool_calls", ARGUMENTS],
        "json": {"answer": 42},
        "embedding": [0.5, 0.25],
        "completion": "Hello there.",
        "service_type": "cost",
        "bad_model": ["NotFoundError", "model", "model_not_found"],
        "bad_field": ["BadRequestError", "max_tokens", None],
        "cut": ["APIError", None, "upstream_cut"],
        "cancelled": True,
    }
    async with asyncio.timeout(10):
        await provider.stopped.wait()


async def test_openai_responses(site: tuple[ProxyDaemon, Provider]) -> None:
    proxy, _ = site
    seen = await run("responses_client.py", f"http://{proxy.address}/v1")
    kinds = seen.pop("kinds")
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert seen == {
        "text": "Hello there.",
        "status": "completed",
        "tokens": 3,
        "intentd": "m",
        "recall": "Say hello | Hello there.",
        "branch": "Say hello | Hello there.",
        "stateless": "",
        "retrieved": "Say hello | Hello there.",
        "items": ["recall"],
        "deleted": ["NotFoundError", "response_id", None],
        "unknown": ["NotFoundError", "previous_response_id", "previous_response_not_found"],
        "stream": "Hello there.",
        "after_stream": "Say hello | Hello there.",
        "tool": ["function_call", "add", ARGUMENTS],
        "tool_result": "call_1 gave 3",
        "tool_stream": ["add", ARGUMENTS],
        "whole_input": "call_1 gave 3",
        "parsed": 42,
        "service_type": "cost",
        "capped": "max_output_tokens",
        "hosted": ["BadRequestError", "tools[0].type", None],
        "cut": ["error", "response.failed"],
    }


async def test_langchain(site: tuple[ProxyDaemon, Provider]) -> None:
    proxy, _ = site
    both = {
        "invoke": "Hello there.",
        "stream": "Hello there.",
        "tool": [["add", {"a": 1, "b": 2}]],
        "tool_stream": [["add", {"a": 1, "b": 2}]],
        "tool_result": "call_1 gave 3",
        "structured": 42,
    }
    seen = await run("langchain_client.py", f"http://{proxy.address}/v1")
    text = seen["responses"].pop("invoke")
    seen["responses"]["invoke"] = text if isinstance(text, str) else text[0]["text"]
    assert seen == {
        "chat": both,
        "responses": both,
        "tokens": 3,
        "embedding": [0.5, 0.25],
        "service_type": "m",
    }
