"""A ZeroMQ socket by its edge-triggered descriptor: nothing is left lying."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop
import zmq

from intentd.daemons.kit.zmqfd import ZmqStream

Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context() -> Iterator[Context]:
    made: Context = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_every_message_of_a_flood_arrives_in_order(context: Context, factory: Any) -> None:
    total = 5000

    async def scenario() -> list[int]:
        done = asyncio.Event()
        seen: list[int] = []
        server = context.socket(zmq.ROUTER)
        server.setsockopt(zmq.RCVHWM, 0)
        server.setsockopt(zmq.SNDHWM, 0)  # a router drops what a full queue cannot take
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client = context.socket(zmq.DEALER)
        client.setsockopt(zmq.SNDHWM, 0)
        client.setsockopt(zmq.RCVHWM, 0)
        client.connect(f"tcp://127.0.0.1:{port}")
        echo = ZmqStream(server, lambda parts: echo.send(parts) and None, max_batch=7)

        def received(parts: list[bytes]) -> None:
            seen.append(int(parts[0]))
            if len(seen) == total:
                done.set()

        stream = ZmqStream(client, received, max_batch=7)
        echo.start()
        stream.start()
        for number in range(total):
            assert stream.send([b"%d" % number])
        async with asyncio.timeout(60):
            await done.wait()
        stream.stop()
        echo.stop()
        assert not stream.active
        return seen

    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(scenario()) == list(range(total))


async def test_single_messages_with_idle_between(context: Context) -> None:
    """The edge that a send swallows must not lose the answer."""
    answers: asyncio.Queue[bytes] = asyncio.Queue()
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    left.bind("inproc://x")
    right.connect("inproc://x")
    server = ZmqStream(left, lambda parts: server.send(parts) and None)
    client = ZmqStream(right, lambda parts: answers.put_nowait(parts[0]))
    server.start()
    client.start()
    for number in range(300):
        client.send([b"%d" % number])
        if number % 3 == 0:
            await asyncio.sleep(0)
        async with asyncio.timeout(30):
            assert await answers.get() == b"%d" % number
    client.stop()
    server.stop()


async def test_a_full_queue_and_an_unknown_peer_are_told(context: Context) -> None:
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.SNDHWM, 2)
    dealer.connect("tcp://127.0.0.1:9")
    stream = ZmqStream(dealer, lambda parts: None)
    stream.start()
    assert [stream.send([b"x"]) for _ in range(3)] == [True, True, False]
    stream.stop()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    stream = ZmqStream(router, lambda parts: None)
    assert not stream.send([b"nobody", b"x"])
    stream.stop()


async def test_a_handler_may_stop_its_stream(context: Context) -> None:
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    left.bind("inproc://y")
    right.connect("inproc://y")
    seen: list[bytes] = []
    stopped = asyncio.Event()

    def received(parts: list[bytes]) -> None:
        seen.append(parts[0])
        stream.stop()
        stopped.set()

    stream = ZmqStream(left, received)
    for _ in range(3):
        right.send(b"x")
    stream.start()
    async with asyncio.timeout(30):
        await stopped.wait()
    await asyncio.sleep(0)
    assert seen == [b"x"]
    right.close(linger=0)
