"""A provider's stream on its way to the client: what goes on as it came, and what is read."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from intentd.daemons.kit.clock import ManualClock
from intentd.proxy.adapter.http import Connection, Connections
from intentd.proxy.adapter.native import Event, Upstream, UpstreamError, UpstreamStream
from intentd.proxy.config import ModelSection, UpstreamSection
from intentd.proxy.outgoing import EventStream

WORD = b'data: {"choices":[{"index":0,"delta":{"content":"a \\n word"},"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
DONE = b"data: [DONE]\n\n"
TOLD = b'data: {"choices":[{"delta":{"content":"\\"usage\\":{} \\"error\\""}}]}\n\n'
COMMENT = b": still here\n\n"
NAMED = b'event: x\ndata: {"choices":[]}\n\n'
CRLF = WORD.replace(b"\n\n", b"\r\n\r\n")
TEXT = (WORD, TOLD, COMMENT, WORD, NAMED, CRLF, WORD, END, USAGE, DONE)


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def write(self, data: Any) -> None:
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        pass


class Client(EventStream):
    """The sending side alone, over a transport that keeps what it gets."""

    def __init__(self, *, in_chunks: bool = True) -> None:
        self._in_chunks = in_chunks
        self._transport = Transport()

    @property
    def full(self) -> bool:
        return False

    @property
    def text(self) -> bytes:
        sent = self._transport.sent
        if not self._in_chunks:
            return b"".join(sent)
        bodies = []
        for chunk in sent:
            size, _, rest = chunk.partition(b"\r\n")
            assert int(size, 16) == len(rest) - 2
            assert rest.endswith(b"\r\n")
            bodies.append(rest[:-2])
        return b"".join(bodies)


async def forwarded(
    reads: list[bytes], client: Client, *, directly: bool
) -> tuple[bytes, int, int]:
    """(what the client gets, bytes counted, events that were read with care)."""
    pool = Connections(connect_timeout_s=1, max_connections=1)
    connection = Connection(pool, ("x", 1, False))
    connection.connection_made(Transport())
    connection._phase = connection.CHUNKED
    section = UpstreamSection()
    model = ModelSection(name="m", base_url="http://x/v1")
    upstream = Upstream(model, section, pool, "", ManualClock())
    stream = UpstreamStream(upstream, connection, section, 1e9, 1)
    counted = 0
    read = 0

    def take(events: list[Event]) -> bytes:
        nonlocal counted, read
        counted += sum(len(event.raw) for event in events)
        read += len(events)
        return b"".join(event.raw + b"\n\n" for event in events)

    def passed(size_bytes: int) -> None:
        nonlocal counted
        counted += size_bytes

    task = asyncio.ensure_future(stream.forward(take, client, passed if directly else None))
    try:
        for data in reads:
            await asyncio.sleep(0)
            connection.data_received(data)
        async with asyncio.timeout(20):
            await task
    finally:
        task.cancel()
        connection.close()
        await pool.close()
    return client.text, counted, read


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def framings() -> dict[str, list[bytes]]:
    body = b"".join(TEXT)
    rng = random.Random(1)
    cuts = sorted(rng.sample(range(len(body)), 20))
    odd = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    wire = b"".join(map(chunk, TEXT))
    halves = sorted(rng.sample(range(len(wire)), 20))
    return {
        "a chunk an event": [chunk(one) for one in TEXT],
        "upper case": [b"%X\r\n%b\r\n" % (len(one), one) for one in TEXT],
        "extensions": [b"%x;a=b\r\n%b\r\n" % (len(one), one) for one in TEXT],
        "all at once": [wire],
        "two chunks a read": [chunk(a) + chunk(b) for a, b in zip(*[iter(TEXT)] * 2, strict=True)],
        "two events a chunk": [chunk(a + b) for a, b in zip(*[iter(TEXT)] * 2, strict=True)],
        "events cut": [chunk(one) for one in odd if one],
        "chunks cut": [
            wire[a:b] for a, b in zip([0, *halves], [*halves, len(wire)], strict=True)
        ],
    }  # fmt: skip


@pytest.mark.parametrize("name", framings())
@pytest.mark.parametrize("in_chunks", [True, False])
async def test_the_short_way_changes_nothing(name: str, in_chunks: bool) -> None:
    reads = framings()[name]
    short = await forwarded(reads, Client(in_chunks=in_chunks), directly=True)
    careful = await forwarded(reads, Client(in_chunks=in_chunks), directly=False)
    assert short[:2] == careful[:2]


async def test_only_words_go_the_short_way() -> None:
    _, _, read = await forwarded(
        [chunk(WORD), *map(chunk, TEXT)], Client(), directly=True
    )  # the first is read while nobody is told of it
    assert read == 1 + sum(one not in (WORD, TOLD, COMMENT) for one in TEXT)


@pytest.mark.parametrize(
    "bad",
    [b'data: {"choices":[}\n\n', b'data: {"error":{"message":"no"}}\n\n', b"data: [1]\n\n"],
)
async def test_garbage_is_not_passed_on(bad: bytes) -> None:
    client = Client()
    with pytest.raises(UpstreamError):
        await forwarded([*map(chunk, (WORD, WORD, bad, DONE))], client, directly=True)
    assert client.text == WORD + WORD
