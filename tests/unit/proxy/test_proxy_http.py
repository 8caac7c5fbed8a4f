"""The client to providers: bodies of every kind, cut anywhere, and answers that are none."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.proxy.adapter.http import (
    BadAnswerError,
    ConnectError,
    Connections,
    CutError,
    Origin,
)

HEAD = b"HTTP/1.1 200 OK\r\n"


class Server:
    """Answers each request with the parts it was given; None closes the connection."""

    def __init__(self) -> None:
        self.answers: list[list[bytes | None]] = []
        self.connections = 0
        self.requests: list[bytes] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                self.requests.append(head + await reader.readexactly(length))
                for part in self.answers.pop(0):
                    if part is None:
                        return
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def served(
    **fields: int,
) -> AsyncIterator[tuple[Server, Callable[[], Awaitable[bytes]], Connections]]:
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    pool = Connections(connect_timeout_s=5, **{"max_connections": 4, **fields})
    origin = Origin(f"http://127.0.0.1:{server.port}/v1")
    head = origin.head("/chat", {"X-A": "b"})

    async def post() -> bytes:
        async with asyncio.timeout(20):
            answer = await pool.post(origin, head, b"{}")
            try:
                parts = []
                while part := await answer.readany():
                    parts.append(part)
            finally:
                answer.release()
            return b"%d " % answer.status + b"".join(parts)

    try:
        yield server, post, pool
    finally:
        await pool.close()
        listener.close()
        await listener.wait_closed()


async def test_the_request_and_a_kept_connection() -> None:
    async with served() as (server, post, _):
        whole = HEAD + b"Content-Length: 2\r\n\r\nhi"
        server.answers = [
            [whole],
            [whole[:20], whole[20:-1], whole[-1:]],
            [HEAD + b"\r\n", b"x", None],
        ]
        assert [await post(), await post(), await post()] == [b"200 hi", b"200 hi", b"200 x"]
        assert server.connections == 1
        assert server.requests[0] == (
            b"POST /v1/chat HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX-A: b\r\nContent-Length: 2\r\n\r\n{}"
            % server.port
        )


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n3;x=y\r\ncde\r\n0\r\nT: r\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"content-length: 5\r\n\r\nabcde",
        b"HTTP/1.1 200\r\nContent-Length:5\r\nConnection: close\r\n\r\nabcde",
    ],
)
async def test_cut_at_every_byte(answer: bytes) -> None:
    async with served(max_connections=200) as (server, post, _):
        for size in (1, 2, 3, 7, 1000):
            server.answers = [[answer[at : at + size] for at in range(0, len(answer), size)]]
            if b"Connection: close" in answer:
                server.answers[0].append(None)
            assert await post() == b"200 abcde"


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([HEAD + b"Content-Length: 3\r\n\r\nab", None], CutError),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", None], CutError),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", None], CutError),
        ([HEAD, None], CutError),
        ([None], CutError),
        ([b"SSH-2.0-x\r\n\r\n"], BadAnswerError),
        ([HEAD + b"Content-Length: x\r\n\r\n"], BadAnswerError),
        ([HEAD + b"Content-Length: -1\r\n\r\n"], BadAnswerError),
        ([HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"], BadAnswerError),
        ([HEAD + b"Transfer-Encoding: gzip\r\n\r\n"], BadAnswerError),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], BadAnswerError),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabcd"], BadAnswerError),
        ([HEAD + b"Content-Length: 1\r\n\r\nabc"], BadAnswerError),
        ([b"HTTP/1.1 101 Switching\r\n\r\n"], BadAnswerError),
        ([b"x" * (80 << 10)], BadAnswerError),
    ],
)
async def test_what_is_no_whole_answer_is_an_error(
    parts: list[bytes | None], error: type[Exception]
) -> None:
    async with served() as (server, post, _):
        server.answers = [parts, [HEAD + b"Content-Length: 2\r\n\r\nhi"]]
        with pytest.raises(error):
            await post()
        assert await post() == b"200 hi"  # on a connection of its own
        assert server.connections == 2


async def test_nobody_listens() -> None:
    pool = Connections(connect_timeout_s=5, max_connections=1)
    origin = Origin("http://127.0.0.1:1/v1")
    for _ in range(3):  # its place is given back each time
        with pytest.raises(ConnectError):
            await pool.post(origin, origin.head("/x", {}), b"")
    await pool.close()


async def test_more_requests_than_connections_wait() -> None:
    async with served(max_connections=2) as (server, post, _):
        server.answers = [[HEAD + b"Content-Length: 2\r\n\r\nhi"] for _ in range(20)]
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(post()) for _ in range(20)]
            await asyncio.sleep(0)
            asked[5].cancel()
            asked[15].cancel()
        assert {task.result() for task in asked if not task.cancelled()} == {b"200 hi"}
        assert server.connections <= 3


async def test_a_slow_reader_stops_the_provider() -> None:
    async with served() as (server, _post, pool):
        body = b"x" * (32 << 20)
        server.answers = [[HEAD + b"Content-Length: %d\r\n\r\n" % len(body), body]]
        origin = Origin(f"http://127.0.0.1:{server.port}")
        answer = await pool.post(origin, origin.head("/x", {}), b"{}")
        got, most = 0, 0
        while part := await answer.readany():
            got += len(part)
            most = max(most, len(part))
        answer.release()
        assert got == len(body)
        assert most < 1 << 20


@given(st.binary(max_size=300), st.integers(0, 2**32))
def test_no_bytes_break_it(noise: bytes, seed: int) -> None:
    """Answered or refused, never anything else; what was accepted is what HTTP says."""
    rng = random.Random(seed)
    starts = (b"", HEAD, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", HEAD + b"Content-Length: ")

    async def run() -> None:
        from intentd.proxy.adapter.http import Connection

        pool = Connections(connect_timeout_s=1, max_connections=1)
        connection = Connection(pool, ("h", 1, False))
        connection.connection_made(_Nowhere())
        asking = asyncio.ensure_future(connection.ask(b"x", b""))
        await asyncio.sleep(0)
        data = rng.choice(starts) + noise
        while data and not connection.closed:
            cut = rng.randrange(1, len(data) + 1)
            connection.data_received(data[:cut])
            data = data[cut:]
        connection.connection_lost(None)
        try:
            await asking
            while await connection.readany():
                pass
        except (CutError, BadAnswerError):
            pass

    asyncio.run(run())


class _Nowhere:
    """A transport that takes everything."""

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def test_headers_cannot_be_smuggled_in() -> None:
    with pytest.raises(ValueError, match="printable"):
        Origin("http://h/v1").head("/x", {"A": "b\r\nC: d"})
    assert Origin("https://h/v1/").head("/x", {}).startswith(b"POST /v1/x HTTP/1.1\r\nHost: h\r\n")
    assert Origin("http://[::1]:80/").host_header == "[::1]"
