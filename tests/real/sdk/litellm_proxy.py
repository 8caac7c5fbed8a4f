"""Run by an interpreter that has litellm: python litellm_proxy.py DIRECTORY.

A proxy in this process with models that litellm answers from its own mocks; prints one JSON line
of what a client saw, and the test compares. Not a test module.
"""

import asyncio
import json
import sys
from contextlib import suppress
from pathlib import Path

import aiohttp

from intentd.daemons.kit.config import validate
from intentd.daemons.kit.lifecycle import Kit, Tasks
from intentd.proxy.config import ProxyConfig
from intentd.proxy.daemon import ProxyDaemon


def model(name, **params):
    return {
        "name": name,
        "provider": "litellm",
        "upstream_model": "anthropic/claude-sonnet-4-5",
        "price_in": "3",
        "price_out": "15",
        "params": params,
    }


MODELS = [
    model("good", mock_response="Hello there."),
    model("limited", mock_response="litellm.RateLimitError"),
    model("broken", mock_response="litellm.InternalServerError"),
    model("full", mock_response="litellm.ContextWindowExceededError"),
    model("slow", mock_response="late", mock_timeout=True),
    {**model("falls", mock_response="litellm.InternalServerError"), "fallbacks": ["good"]},
]


async def events(response):
    text = await response.text()
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


async def look(url):
    seen = {}
    async with aiohttp.ClientSession() as session:

        async def chat(name, **fields):
            body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], **fields}
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                return response.status, await response.json()

        _, answer = await chat("good")
        seen["text"] = answer["choices"][0]["message"]["content"]
        seen["cost"] = answer["intentd"]["cost_nano"] > 0
        for name in ("limited", "broken", "full", "slow"):
            status, answer = await chat(name)
            seen[name] = [status, answer["error"]["code"]]
        seen["falls"] = (await chat("falls"))[1]["intentd"]["model"]
        for name in ("mock_response", "vertex_credentials", "fallbacks"):
            status, answer = await chat("good", **{name: "x"})
            seen[name] = [status, answer["error"]["param"]]
        stream = {
            "model": "good",
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with session.post(f"{url}/v1/chat/completions", json=stream) as response:
            *chunks, usage, end = await events(response)
        deltas = [json.loads(chunk)["choices"][0]["delta"].get("content") for chunk in chunks]
        seen["stream"] = "".join(delta or "" for delta in deltas)
        seen["end"] = [json.loads(usage)["intentd"]["model"], end]
        body = {"model": "good", "max_tokens": 9, "messages": stream["messages"]}
        async with session.post(f"{url}/v1/messages", json=body) as response:
            seen["message"] = (await response.json())["content"][0]["text"]
        body = {"model": "broken", "input": "x"}
        async with session.post(f"{url}/v1/responses", json=body) as response:
            seen["response"] = response.status
    return seen


async def main(directory):
    plain = {
        "name": "p",
        "state_dir": directory,
        "run_dir": directory,
        "controller": {"enabled": False},
        "listen": {"bind": "127.0.0.1:0"},
        "upstream": {
            "attempts": 2,
            "backoff_s": 0.001,
            "retry_share": 0,
            "first_token_timeout_s": 3,
        },
        "models": MODELS,
    }
    proxy = ProxyDaemon(validate(ProxyConfig, plain), Kit("proxy"))
    with suppress(asyncio.CancelledError):
        async with Tasks() as tasks:
            assert "litellm" not in sys.modules
            await proxy.start(tasks)
            print(json.dumps(await look(f"http://{proxy.address}")))
            await proxy.stop()
            tasks.cancel_all()


asyncio.run(main(Path(sys.argv[1])))
