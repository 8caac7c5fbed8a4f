"""A provider for tests that bills what it does and can fail in every way, over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Script:
    """How the next calls behave; fields combine.

    status, retry_after: an error. delay_s: before the first byte. cut_after: events or bytes after
    which the connection breaks. garbage: not JSON. drip_s: between bytes. hang: never answers.
    """

    status: int = 200
    retry_after: str = ""
    error: dict[str, Any] | None = None
    delay_s: float = 0.0
    cut_after: int | None = None
    garbage: bool = False
    garbage_event: int | None = None
    error_event: int | None = None
    drip_s: float = 0.0
    hang: bool = False
    words: tuple[str, ...] = ("Hello", " there", ".")
    event_delay_s: float = 0.0
    no_usage: bool = False
    no_done: bool = False
    no_finish: bool = False
    endless: bool = False
    gate: asyncio.Event | None = None
    raw: bytes | None = None
    deltas: tuple[dict[str, Any], ...] = ()
    finish: str = "stop"


@dataclass
class Provider:
    """Its own books: bill_tokens is what it would charge for."""

    scripts: list[Script] = field(default_factory=list)
    default: Script = field(default_factory=Script)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bill_in: int = 0
    bill_out: int = 0
    open_calls: int = 0
    most_open: int = 0
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    # What to answer, where it depends on the request.
    words_for: Callable[[dict[str, Any]], tuple[str, ...]] | None = None

    def next_script(self) -> Script:
        return self.scripts.pop(0) if self.scripts else self.default

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        script = self.next_script()
        self.open_calls += 1
        self.most_open = max(self.most_open, self.open_calls)
        self.started.set()
        try:
            return await self._answer(request, body, script)
        except (asyncio.CancelledError, ConnectionError):
            self.stopped.set()
            raise
        finally:
            self.open_calls -= 1

    async def _answer(
        self, request: web.Request, body: dict[str, Any], script: Script
    ) -> web.StreamResponse:
        if script.hang:
            await asyncio.Event().wait()
        if script.gate is not None:
            await script.gate.wait()
        if script.delay_s:
            await asyncio.sleep(script.delay_s)
        if script.status != 200:
            headers = {"Retry-After": script.retry_after} if script.retry_after else {}
            error = script.error or {"message": "scripted failure", "type": "x", "code": None}
            return web.json_response({"error": error}, status=script.status, headers=headers)
        if script.raw is not None:
            return web.Response(body=script.raw, content_type="application/json")
        if request.path.endswith("/embeddings"):
            return self._embeddings(body)
        in_tokens = len(json.dumps(body.get("messages") or body.get("prompt")).split())
        cap = body.get("max_tokens") or body.get("max_completion_tokens") or 10**9
        words = (self.words_for(body) if self.words_for else script.words)[:cap]
        self.bill_in += in_tokens
        usage = {
            "prompt_tokens": in_tokens,
            "completion_tokens": len(words) * (body.get("n") or 1),
            "total_tokens": in_tokens + len(words),
        }
        if body.get("stream"):
            return await self._stream(request, body, script, words, usage)
        self.bill_out += usage["completion_tokens"]
        return await self._whole(request, body, script, words, usage)

    def _embeddings(self, body: dict[str, Any]) -> web.Response:
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        self.bill_in += len(texts)
        data = [
            {"object": "embedding", "index": i, "embedding": [0.5, 0.25]} for i in range(len(texts))
        ]
        return web.json_response(
            {"object": "list", "data": data, "model": body["model"],
             "usage": {"prompt_tokens": len(texts), "total_tokens": len(texts)}}
        )  # fmt: skip

    async def _whole(
        self,
        request: web.Request,
        body: dict[str, Any],
        script: Script,
        words: tuple[str, ...],
        usage: dict[str, int],
    ) -> web.StreamResponse:
        text = "".join(words)
        message = {"role": "assistant", "content": text or None}
        for delta in script.deltas:
            message |= delta
        choices = [
            {"index": i, "message": message,
             "finish_reason": script.finish, "text": text, "logprobs": None}
            for i in range(body.get("n") or 1)
        ]  # fmt: skip
        document: dict[str, Any] = {
            "id": "c1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": choices,
        }  # fmt: skip
        if not script.no_usage:
            document["usage"] = usage
        data = b"<html>" if script.garbage else json.dumps(document).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(data)
        await response.prepare(request)
        if script.drip_s:
            for number in range(len(data)):
                await response.write(data[number : number + 1])
                await asyncio.sleep(script.drip_s)
        if script.cut_after is not None:
            await response.write(data[: script.cut_after])
            assert request.transport is not None
            request.transport.abort()
            raise ConnectionResetError
        await response.write(data)
        return response

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        script: Script,
        words: tuple[str, ...],
        usage: dict[str, int],
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for sent, text in enumerate(self._events(body, script, words, usage)):
            if script.cut_after is not None and sent == script.cut_after:
                await asyncio.sleep(0.01)  # what was written goes out first
                assert request.transport is not None
                request.transport.abort()
                raise ConnectionResetError
            if script.drip_s:
                for number in range(len(text)):
                    await response.write(text[number : number + 1])
                    await asyncio.sleep(script.drip_s)
            else:
                await response.write(text)
            self.bill_out += text.startswith(b'data: {"id"') and b'"content"' in text
            if script.event_delay_s:
                await asyncio.sleep(script.event_delay_s)
        return response

    def _events(
        self,
        body: dict[str, Any],
        script: Script,
        words: tuple[str, ...],
        usage: dict[str, int],
    ) -> Any:
        def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
            document = {
                "id": "c1", "object": "chat.completion.chunk", "created": 1,
                "model": body["model"],
                "choices": [{"index": 0, "delta": delta, "text": delta.get("content", ""),
                             "finish_reason": finish}],
            }  # fmt: skip
            return b"data: " + json.dumps(document).encode() + b"\n\n"

        for delta in script.deltas:
            yield chunk(delta)
        number = 0
        while True:
            for word in words:
                if number == script.garbage_event:
                    yield b"data: {broken\n\n"
                if number == script.error_event:
                    yield b'data: {"error": {"message": "overloaded"}}\n\n'
                yield chunk({"content": word})
                number += 1
            if not script.endless:
                break
        if not script.no_finish:
            yield chunk({}, script.finish)
        if (body.get("stream_options") or {}).get("include_usage") and not script.no_usage:
            last = {
                "id": "c1", "object": "chat.completion.chunk", "created": 1,
                "model": body["model"], "choices": [], "usage": usage,
            }  # fmt: skip
            yield b"data: " + json.dumps(last).encode() + b"\n\n"
        if not script.no_done:
            yield b"data: [DONE]\n\n"


@asynccontextmanager
async def running(provider: Provider | None = None) -> AsyncIterator[Provider]:
    """A provider on a free port of loopback."""
    provider = provider or Provider()
    app = web.Application(client_max_size=64 << 20)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        app.router.add_post(path, provider.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    provider.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield provider
    finally:
        await runner.cleanup()
