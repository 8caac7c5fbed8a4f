"""What stands beside the proxy in its benchmark: a cheap provider and a bare pass-through.

``python -m benchmarks.proxy_peers provider [--delay-ms 50] [--chunk-ms 5]`` and ``... bare URL``
print their port.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from typing import Any

import uvloop

ANSWER = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"' + b"Some words of an answer. " * 12 + b'"},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":120,'
    b'"completion_tokens":60,"total_tokens":180}}'
)
CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
)
FINISH = CHUNK.replace(b'{"content":" word"}', b"{}").replace(b"null}]", b'"stop"}]')
USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[],"usage":{"prompt_tokens":120,"completion_tokens":60,"total_tokens":180}}\n\n'
)
CHUNKS_A_STREAM = 200
CHUNK_INTERVAL_S = 0.005
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Provider(asyncio.Protocol):
    """HTTP/1.1 by hand, so that the provider's own cost stays small."""

    def __init__(self, delay_s: float, chunk_s: float) -> None:
        self.delay_s = delay_s
        self.chunk_s = chunk_s
        self.data = b""
        self.transport: Any = None
        self.head = (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(ANSWER)
        )

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        while True:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return
            found = _LENGTH.search(self.data, 0, end)
            total = end + 4 + (int(found.group(1)) if found else 0)
            if len(self.data) < total:
                return
            body, self.data = self.data[end + 4 : total], self.data[total:]
            loop = asyncio.get_running_loop()
            if b'"stream":true' in body:
                self.transport.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n"
                )
                self.chunk(CHUNKS_A_STREAM)
            elif self.delay_s:
                loop.call_later(self.delay_s, self.transport.write, self.head + ANSWER)
            else:
                self.transport.write(self.head + ANSWER)

    def chunk(self, left: int) -> None:
        if self.transport.is_closing():
            return
        if left:
            self.transport.write(chunked(CHUNK))
            asyncio.get_running_loop().call_later(self.chunk_s, self.chunk, left - 1)
        else:
            self.transport.write(
                chunked(FINISH) + chunked(USAGE) + chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"
            )


async def serve_provider(delay_s: float, chunk_s: float) -> None:
    server = await asyncio.get_running_loop().create_server(
        lambda: Provider(delay_s, chunk_s), "127.0.0.1", 0, backlog=4096
    )
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def serve_bare(url: str) -> None:
    """The plain way to write a pass-through with aiohttp, uvloop and orjson: no keys, no books."""
    import aiohttp
    import orjson
    from aiohttp import web

    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def chat(request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        async with session.post(
            f"{url}/chat/completions",
            data=orjson.dumps(body),
            headers={"Content-Type": "application/json", "Authorization": "Bearer x"},
        ) as upstream:
            if not body.get("stream"):
                return web.Response(
                    body=await upstream.read(),
                    status=upstream.status,
                    content_type="application/json",
                )
            response = web.StreamResponse(status=upstream.status)
            response.content_type = "text/event-stream"
            await response.prepare(request)
            async for data in upstream.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    announce(runner.addresses[0][1])
    await asyncio.Event().wait()


def announce(port: int) -> None:
    print(port, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    provider = commands.add_parser("provider")
    provider.add_argument("--delay-ms", type=float, default=0.0)
    provider.add_argument("--chunk-ms", type=float, default=CHUNK_INTERVAL_S * 1e3)
    bare = commands.add_parser("bare")
    bare.add_argument("url")
    given = parser.parse_args()
    parent = os.getppid()

    async def run() -> None:
        async def end_with_parent() -> None:
            while os.getppid() == parent:  # noqa: ASYNC110  the kernel tells only by asking
                await asyncio.sleep(1)
            os._exit(0)

        watch = asyncio.ensure_future(end_with_parent())
        if given.command == "provider":
            await serve_provider(given.delay_ms / 1e3, given.chunk_ms / 1e3)
        else:
            await serve_bare(given.url)
        await watch

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
