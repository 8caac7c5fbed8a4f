"""Responses written by hand say what aiohttp's would: lengths, kept connections, old clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from intentd.proxy.outgoing import EventStream, Gone, WholeResponse, head


@asynccontextmanager
async def serving(handler: Any) -> AsyncIterator[int]:
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def ask(port: int, request: bytes, *, most: int = 1 << 20) -> bytes:
    """What comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(20):
            return await reader.read(most) if most < 1 << 20 else await reader.read()
    finally:
        writer.close()


async def whole(_request: web.BaseRequest) -> web.StreamResponse:
    return WholeResponse(b'{"a":1}', {"X-A": "b"}, 404)


async def events(request: web.BaseRequest) -> web.StreamResponse:
    response = EventStream({"X-A": "b"})
    await response.prepare(request)
    await response.write(b"data: 1\n\n")
    await response.write_eof(b"data: 2\n\n")
    return response


GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


async def test_two_requests_on_one_connection() -> None:
    async with serving(whole) as port:
        first, second = (await ask(port, GET + CLOSE)).split(b'{"a":1}')[:2]
        assert first.startswith(b"HTTP/1.1 404 Not Found\r\nX-A: b\r\n")
        assert b"\r\nContent-Type: application/json\r\n" in first
        assert b"\r\nContent-Length: 7\r\n" in first
        assert b"Connection:" not in first
        assert b"\r\nConnection: close\r\n" in second


async def test_old_clients_and_heads() -> None:
    async with serving(whole) as port:
        old = await ask(port, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + CLOSE)
        assert old.count(b'{"a":1}') == 2
        assert b"\r\nConnection: keep-alive\r\n" in old
        assert (await ask(port, b"GET / HTTP/1.0\r\n\r\n")).endswith(b'{"a":1}')
        headed = await ask(port, CLOSE.replace(b"GET", b"HEAD"))
        assert headed.endswith(b"\r\n\r\n")
        assert b"Content-Length: 7" in headed


async def test_events_in_chunks_or_to_the_end() -> None:
    async with serving(events) as port:
        answer = await ask(port, CLOSE)
        assert answer.endswith(b"\r\n\r\n9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n")
        assert b"\r\nContent-Type: text/event-stream\r\n" in answer
        old = await ask(port, b"GET / HTTP/1.0\r\n\r\n")
        assert old.endswith(b"\r\n\r\ndata: 1\n\ndata: 2\n\n")
        assert b"Transfer-Encoding" not in old


async def test_a_slow_client_holds_the_stream_up() -> None:
    written = 0
    ended = asyncio.Event()

    async def endless(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal written
        response = EventStream({})
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 10_000)
                await asyncio.sleep(0)
                written += 10_000
        except ConnectionError:
            ended.set()
            raise

    async with serving(endless) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await reader.read(100)
        before = -1
        async with asyncio.timeout(60):
            while written != before:
                before = written
                await asyncio.sleep(0.3)  # nobody reads: the sockets' buffers fill up
            assert 0 < written < 100 << 20
            writer.transport.abort()
            await ended.wait()


async def test_a_client_that_left_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def gone(request: web.BaseRequest) -> web.StreamResponse:
        await EventStream({}).prepare(request)
        return Gone()

    async with serving(gone) as port:
        assert (await ask(port, GET)).endswith(b"\r\n\r\n")
    assert [row for row in caplog.records if row.levelname in ("ERROR", "CRITICAL")] == []


def test_no_line_end_gets_into_the_headers() -> None:
    for value in ("a\r\nX-B: c", "a\nX-B: c", "a\rb"):
        with pytest.raises(ValueError, match="line end"):
            head(200, {"X-A": value}, "t", "")
