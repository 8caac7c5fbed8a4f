"""The campaign's providers: they fail as they are told and keep a bill of their own, by key.

A prompt begins with the name of the key it is asked with, and says how many words its answer has,
so that the bill and the user agree without talking. A token that was made is billed, whether or not
anybody was left to read it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

from benchmarks.chaos.world import CAP_TOKENS, PRICE_IN_NANO, PRICE_OUT_NANO
from intentd.testbed.netns import Namespace

PROVIDERS: Final = ("alpha", "beta")
MODES: Final = ("", "slow", "500", "429", "hang", "cut", "garbage")
PAUSE_S: Final = 0.01
NAME: Final = web.AppKey("name", str)


@dataclass
class Asked:
    """One call as a provider saw it."""

    prompt: str
    before: tuple[str, ...]
    began_s: float
    ended_s: float = 0.0


@dataclass(eq=False)
class Providers:
    """mode: by name, one of MODES. calls: of conversations, by their name."""

    rng: random.Random
    mode: dict[str, str] = field(default_factory=dict)
    nano: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    without_cap: int = 0
    calls: dict[str, list[Asked]] = field(default_factory=dict)
    _runners: list[web.AppRunner] = field(default_factory=list)

    async def start(self, space: Namespace, address: str) -> dict[str, tuple[str, int]]:
        """Where each listens."""
        targets = {}
        for name in PROVIDERS:
            app = web.Application()
            app[NAME] = name
            app.router.add_post("/v1/chat/completions", self._handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
            await runner.setup()
            sock = space.socket()
            sock.bind((address, 0))
            await web.SockSite(runner, sock, backlog=256).start()
            targets[name] = sock.getsockname()
            self._runners.append(runner)
        return targets

    async def close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        name = request.app[NAME]
        mode = self.mode.get(name, "")
        if mode == "500":
            return web.json_response({"error": {"message": "down"}}, status=500)
        if mode == "429":
            headers = {"Retry-After": "1"}
            return web.json_response({"error": {"message": "busy"}}, status=429, headers=headers)
        prompts = [str(one["content"]) for one in body["messages"] if one["role"] == "user"]
        prompt = prompts[-1]
        key, _, rest = prompt.partition(" ")
        cap = body.get("max_tokens", 0)
        self.without_cap += cap != CAP_TOKENS
        words = min(int(rest.split(" ", 1)[0]), cap or 1 << 30)
        tokens_in = sum(len(str(one["content"]).split()) for one in body["messages"])
        self.nano[key] += tokens_in * PRICE_IN_NANO
        call = Asked(prompt, tuple(prompts[:-1]), time.monotonic())
        if "conversation" in rest:
            self.calls.setdefault(rest.split(" ")[2], []).append(call)
        if mode == "hang":
            await asyncio.sleep(30)
        await asyncio.sleep(1.5 if mode == "slow" else self.rng.random() * PAUSE_S)
        try:
            if body.get("stream"):
                return await self._stream(request, key, words, tokens_in, mode)
            self.nano[key] += words * PRICE_OUT_NANO
            return self._whole(request, words, tokens_in, mode)
        except OSError:  # nobody is left to read it
            return web.Response()
        finally:
            call.ended_s = time.monotonic()
            self.answered += 1

    def _whole(
        self, request: web.Request, words: int, tokens_in: int, mode: str
    ) -> web.StreamResponse:
        if mode == "garbage":
            return web.Response(text="<html>", content_type="application/json")
        if mode == "cut":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        message = {"role": "assistant", "content": " ".join(["w"] * words)}
        return web.json_response(
            {
                "id": "c", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": _usage(tokens_in, words),
            }
        )  # fmt: skip

    async def _stream(
        self, request: web.Request, key: str, words: int, tokens_in: int, mode: str
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(words):
            if mode == "cut" and number == words // 2:
                assert request.transport is not None
                request.transport.abort()
                return response
            self.nano[key] += PRICE_OUT_NANO
            delta = "{" if mode == "garbage" and number == 1 else _chunk({"content": "w "}, None)
            await response.write(b"data: " + delta.encode() + b"\n\n")
            await asyncio.sleep(0.3 if mode == "slow" else PAUSE_S)
        end = {"id": "c", "choices": [], "usage": _usage(tokens_in, words)}
        last = f"data: {_chunk({}, 'stop')}\n\ndata: {json.dumps(end)}\n\ndata: [DONE]\n\n"
        await response.write(last.encode())
        await response.write_eof()
        return response


def _chunk(delta: dict[str, Any], finish: str | None) -> str:
    return json.dumps(
        {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    )


def _usage(tokens_in: int, tokens_out: int) -> dict[str, int]:
    return {
        "prompt_tokens": tokens_in, "completion_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
    }  # fmt: skip
