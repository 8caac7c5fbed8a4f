"""Connections that go from one server to the next: idle ones, busy ones, half-open ones."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio
from aiohttp import web

from intentd.daemons.kit.held import Held
from intentd.daemons.kit.holder import FdHolder
from intentd.daemons.kit.systemd import Notifier
from intentd.proxy.handover import Connection, Server

REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"


class Site:
    """A server on a port, and a manager that holds what it is given."""

    def __init__(self, directory: Path) -> None:
        self.holder = FdHolder(directory / "notify")
        loop = asyncio.get_running_loop()
        loop.add_reader(self.holder.socket.fileno(), self.holder.receive)
        self.held = Held(Notifier(str(directory / "notify")), 64)
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.writers: list[asyncio.StreamWriter] = []
        self.server = self.make("first")

    def make(self, name: str) -> Server:
        async def answer(request: web.BaseRequest) -> web.Response:
            body = await request.text()
            await self.may_answer.wait()
            return web.Response(text=f"{name}: {body}")

        return Server(answer)

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        listening = await asyncio.get_running_loop().create_server(self.server, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        self.writers.append(writer)
        while not self.server.connections:  # noqa: ASYNC110  accepted by a callback
            await asyncio.sleep(0)
        listening.close()
        return reader, writer

    async def hand_over(self) -> int:
        return await asyncio.wait_for(self.server.hand_over(self.held, "one"), 60)

    async def next_server(self) -> Server:
        made = self.make("second")
        await made.adopt([*self.holder.fds])
        self.holder._held.clear()
        return made

    async def close(self) -> None:
        for writer in self.writers:
            writer.close()
        await self.server.shutdown(1.0)
        asyncio.get_running_loop().remove_reader(self.holder.socket.fileno())
        self.holder.close()


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    yield made
    await made.close()


async def text_of(reader: asyncio.StreamReader) -> str:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    assert head.startswith(b"HTTP/1.1 200"), head
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
    return (await reader.readexactly(length)).decode()


async def test_a_connection_between_requests_goes_on_with_the_next_server(site: Site) -> None:
    reader, writer = await site.open()
    writer.write(REQUEST)
    assert await text_of(reader) == "first: hi"
    assert await site.hand_over() == 1
    writer.write(REQUEST)  # nobody is there
    following = await site.next_server()
    assert await text_of(reader) == "second: hi"
    await following.shutdown(1.0)


async def test_what_runs_is_answered_and_what_follows_waits(site: Site) -> None:
    reader, writer = await site.open()
    site.may_answer.clear()
    writer.write(REQUEST)
    while not site.server.requests_count:  # noqa: ASYNC110  a counter of aiohttp's
        await asyncio.sleep(0.01)
    handing = asyncio.ensure_future(site.hand_over())
    await asyncio.sleep(0.05)
    writer.write(REQUEST)  # sent before the answer to the first
    assert not handing.done()
    site.may_answer.set()
    assert await handing == 1
    assert await text_of(reader) == "first: hi"
    following = await site.next_server()
    assert await text_of(reader) == "second: hi"
    await following.shutdown(1.0)


async def test_a_body_under_way_is_waited_for(site: Site) -> None:
    reader, writer = await site.open()
    writer.write(REQUEST[:-1])
    while not site.server.requests_count:  # noqa: ASYNC110  a counter of aiohttp's
        await asyncio.sleep(0.01)
    handing = asyncio.ensure_future(site.hand_over())
    await asyncio.sleep(0.05)
    writer.write(REQUEST[-1:])
    assert await text_of(reader) == "first: hi"
    assert await handing == 1


async def test_a_head_that_never_ends_holds_nobody_up(site: Site) -> None:
    reader, writer = await site.open()
    writer.write(REQUEST[:20])
    connection: Any = site.server.connections[0]
    while not connection._begun:  # noqa: ASYNC110  what a callback has read
        await asyncio.sleep(0.01)
    assert await site.hand_over() == 0
    assert site.holder.fds == []
    assert not reader.at_eof()


def _connections() -> int:
    """How many there are; slots of aiohttp leave no room for a weak reference."""
    return sum(type(one) is Connection for one in gc.get_objects())


async def test_a_connection_that_ended_is_forgotten_without_a_collector(site: Site) -> None:
    gc.disable()
    try:
        reader, writer = await site.open()
        writer.write(REQUEST)
        assert await text_of(reader) == "first: hi"
        assert _connections() == 1
        writer.transport.abort()
        async with asyncio.timeout(60):
            while _connections():  # noqa: ASYNC110  nobody is told of what is no more
                await asyncio.sleep(0.01)
    finally:
        gc.enable()
