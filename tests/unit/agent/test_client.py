"""The client library: turns in order, and fail open in every way an agent can be missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.agent import app_protocol as wire
from intentd.agent.client import AsyncFlows, Flows, pending_bytes

SRC = str(Path(__file__).parents[3] / "src")
PATIENT = {"answer_timeout_s": 20.0}  # a busy machine is no reason to degrade in these tests


@pytest.fixture
def flows(tmp_path: Path) -> Iterator[Flows]:
    client = Flows(str(tmp_path / "agent.sock"), name="test", **PATIENT)
    yield client
    client.close()


class StandIn:
    """A listener that answers packets as the test says, in place of an agent."""

    def __init__(self, path: Path, answer: Callable[[bytes], list[bytes]]) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._answer = answer
        self.accepted: list[socket.socket] = []
        self.seen: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.accepted.append(connection)
                while packet := connection.recv(1024):
                    self.seen.append(packet)
                    for reply in self._answer(packet):
                        connection.send(reply)

    def close(self) -> None:
        for open_socket in (self._listener, *self.accepted):
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        for open_socket in (self._listener, *self.accepted):
            open_socket.close()


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Callable[[Callable[[bytes], list[bytes]]], StandIn]]:
    with contextlib.ExitStack() as stack:

        def start(answer: Callable[[bytes], list[bytes]]) -> StandIn:
            agent = StandIn(tmp_path / "agent.sock", answer)
            stack.callback(agent.close)
            return agent

        yield start


def kind_of(packet: bytes) -> int:
    return packet[3]


def request_of(packet: bytes) -> int:
    return int.from_bytes(packet[4:8], "big")


# -- with an agent --------------------------------------------------------------------------------


def test_a_flow_gets_its_turn_class_and_number(local_agent: Any, flows: Flows) -> None:
    agent = local_agent()
    with flows.open(100, peer="10.0.0.2") as flow:
        assert (flow.id, flow.class_index, flow.degraded) == (1, 0, "")
        assert agent.call(agent.domain.gate.active) == [1, 0]
    with flows.open(6000, peer=("fd00::1", 80)) as flow:
        assert (flow.id, flow.class_index) == (2, 1)
    agent.until(lambda: agent.domain.meter.finished == 2)
    assert (flows.opened, dict(flows.degraded)) == (2, {})
    assert agent.call(lambda: [a.name for a in agent.socket.connections.values()]) == ["test"]


def test_data_is_sent_and_measured(local_agent: Any, flows: Flows, tcp_pair: Any) -> None:
    agent = local_agent()
    left, right = tcp_pair
    with flows.open(3000, sock=left) as flow:
        flow.send(left, b"x" * 1000)
        flow.send(left, b"y" * 2000)
    assert right.recv(3000, socket.MSG_WAITALL) == b"x" * 1000 + b"y" * 2000
    agent.until(lambda: agent.domain.meter.finished == 1)
    record = agent.call(lambda: agent.shell.find(flow.id))
    assert record.sent_bytes == 3000
    assert record.released * 1e9 <= record.started_ns <= record.ended * 1e9
    assert left.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) >> 2 == 10
    left.shutdown(socket.SHUT_WR)
    assert right.recv(1) == b""  # the agent has kept no duplicate open


def test_send_marks_a_socket_that_open_did_not_know(
    local_agent: Any, flows: Flows, tcp_pair: Any
) -> None:
    agent = local_agent()
    left, _ = tcp_pair
    with flows.open(10) as flow:
        flow.send(left, b"x")
        flow.send(left, b"x")
    assert left.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) >> 2 == 10
    assert agent.call(lambda: agent.shell.counts.marks) == 1  # the second time it had the mark


def test_a_server_marks_without_a_turn(local_agent: Any, flows: Flows, tcp_pair: Any) -> None:
    agent = local_agent()
    left, right = tcp_pair
    assert flows.mark(left, size=100)
    assert flows.mark(right, class_hint=1)
    assert left.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) >> 2 == 10
    assert right.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0
    assert agent.call(lambda: (agent.shell.counts.opened, len(agent.shell.flows))) == (0, 0)
    assert not flows.mark(left, class_hint=9)


def test_threads_share_one_connection_and_take_turns(local_agent: Any, flows: Flows) -> None:
    agent = local_agent()
    sending: set[int] = set()
    most = 0

    def work() -> None:
        nonlocal most
        for _ in range(40):
            with flows.open(100) as flow:
                sending.add(flow.id)
                most = max(most, len(sending))
                sending.discard(flow.id)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert dict(flows.degraded) == {}
    assert most == 1
    agent.until(lambda: agent.domain.meter.finished == 320)
    assert agent.call(lambda: len(agent.socket.connections)) == 1
    assert agent.call(lambda: agent.domain.meter.handover.count) > 0


def test_an_exception_cancels_the_flow(local_agent: Any, flows: Flows) -> None:
    agent = local_agent()
    with pytest.raises(ZeroDivisionError), flows.open(100):
        raise ZeroDivisionError
    agent.until(lambda: agent.domain.meter.cancelled == 1)
    with flows.open(100) as flow:
        assert flow.degraded == ""


def test_a_flow_that_nobody_closed_gives_its_turn_back(local_agent: Any, flows: Flows) -> None:
    agent = local_agent()
    flow = flows.open(100)
    with pytest.warns(ResourceWarning, match="flow 1 was never closed"):
        del flow
    agent.until(lambda: agent.domain.meter.cancelled == 1)

    async def main() -> None:
        aflows = AsyncFlows(str(agent.path), **PATIENT)
        flow = await aflows.open(100)
        with pytest.warns(ResourceWarning, match="flow 2 was never closed"):
            del flow
        aflows.close()

    asyncio.run(main())
    agent.until(lambda: not agent.shell.flows)


def test_what_the_agent_refuses_goes_ahead_and_says_why(local_agent: Any, flows: Flows) -> None:
    agent = local_agent()
    flow = flows.open(100, domain="nowhere")
    assert flow.degraded == "refused"
    assert flow.error.startswith("OPEN.domain: got 'nowhere', expected one of")
    with flows.open(100) as flow:
        assert flow.degraded == ""  # the connection lives
    assert agent.call(lambda: agent.shell.counts.errors) == 1


def test_an_agent_that_is_stopping_counts_as_gone(local_agent: Any, flows: Flows) -> None:
    agent = local_agent()
    agent.shell.stopping = True
    flow = flows.open(100)
    assert (flow.degraded, flow.error) == (
        "closed",
        "agent: got 'stopping', expected that you send at once",
    )


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, {"size": -1}),
        (TypeError, {"size": None}),
        (TypeError, {"size": 1.5}),
        (TypeError, {"size": True}),
        (ValueError, {"size": 2**63}),
        (ValueError, {"size": 1, "peer": "example.org"}),
        (ValueError, {"size": 1, "domain": "x" * 65}),
        (ValueError, {"size": 1, "class_hint": -1}),
    ],
)
def test_wrong_arguments_raise_with_or_without_agent(
    flows: Flows, error: type[Exception], arguments: dict[str, Any]
) -> None:
    with pytest.raises(error):
        flows.open(**arguments)
    with pytest.raises(error):
        AsyncFlows("/nowhere").open(**arguments)


def test_clients_rejoin_a_restarted_agent(local_agent: Any, flows: Flows) -> None:
    agent = local_agent()
    held = flows.open(100)
    agent.stop()
    held.close()
    assert flows.open(100).degraded in ("closed", "absent")
    agent.start()
    deadline = time.monotonic() + 30
    while (flow := flows.open(100)).degraded:
        flow.close()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    flow.close()


def test_a_forked_child_gets_a_connection_of_its_own(local_agent: Any, tmp_path: Path) -> None:
    agent = local_agent()
    script = (
        "import os, sys\n"
        "from intentd.agent.client import Flows\n"
        f"flows = Flows({str(agent.path)!r}, answer_timeout_s=20.0)\n"
        "held = flows.open(100)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    held.close()\n"  # not the child's to finish
        "    flow = flows.open(6000)\n"
        "    os._exit(0 if flow.id == 2 and not flow.degraded else 1)\n"
        "status = os.waitpid(child, 0)[1]\n"
        "assert not status, status\n"
        "held.close()\n"
        "assert not flows.open(100).degraded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": SRC}, timeout=60
    )
    assert done.returncode == 0
    agent.until(lambda: not agent.shell.flows)
    assert agent.call(lambda: agent.shell.counts.opened) == 3


# -- without --------------------------------------------------------------------------------------


def test_no_agent(tmp_path: Path, tcp_pair: Any) -> None:
    told: list[Any] = []
    flows = Flows(str(tmp_path / "agent.sock"), on_degraded=told.append)
    left, right = tcp_pair
    with flows.open(5, sock=left) as flow:
        flow.send(left, b"hello")
    assert right.recv(5) == b"hello"
    assert (flow.degraded, flow.id, flow.bytes_sent) == ("absent", 0, 5)
    assert dict(flows.degraded) == {"absent": 1}
    assert told == [flow]
    flows.close()


def test_an_agent_that_hangs_costs_one_timeout_then_nothing(stand_in: Any, tmp_path: Path) -> None:
    stand_in(lambda packet: [])
    flows = Flows(str(tmp_path / "agent.sock"), answer_timeout_s=0.05)
    first = flows.open(5)
    assert first.degraded == "slow"
    assert first.waited_s >= 0.05
    second = flows.open(5)  # not tried again for a while
    assert (second.degraded, second.waited_s < 0.05) == ("slow", True)
    flows.close()


def test_an_agent_that_forgets_a_queued_flow(stand_in: Any, tmp_path: Path) -> None:
    def queue(packet: bytes) -> list[bytes]:
        if kind_of(packet) != wire.OPEN:
            return []
        return [wire.encode_queued(wire.Queued(request_of(packet), 1, 0, 5, 10))]

    agent = stand_in(queue)
    flows = Flows(str(tmp_path / "agent.sock"), answer_timeout_s=0.05, max_wait_s=0.05)
    assert flows.open(5).degraded == "timeout"
    flows.close()
    deadline = time.monotonic() + 20
    while wire.CANCEL not in map(kind_of, agent.seen):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("reply", [b"garbage", b"\x49\x41\x02\x04" + bytes(36), b"IA\x01\x04"])
def test_an_agent_that_speaks_nonsense(stand_in: Any, tmp_path: Path, reply: bytes) -> None:
    stand_in(lambda packet: [reply])
    flows = Flows(str(tmp_path / "agent.sock"), **PATIENT)
    assert flows.open(5).degraded == "protocol"
    flows.close()


def test_an_agent_that_dies_wakes_all_that_wait(local_agent: Any, flows: Flows) -> None:
    agent = local_agent()
    held = flows.open(100)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(flows.open(100).degraded)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    agent.until(lambda: sum(agent.domain.gate.queue_lengths()) == 4)
    agent.stop()
    for thread in threads:
        thread.join(30)
    assert found == ["closed"] * 4
    held.close()


def test_draining_ends_when_the_receiver_stalls(
    local_agent: Any, flows: Flows, tcp_pair: Any
) -> None:
    agent = local_agent()
    left, _ = tcp_pair
    left.setblocking(False)
    began = time.monotonic()
    with flows.open(10_000_000) as flow:
        with contextlib.suppress(BlockingIOError):
            while True:
                flow.sent(left, left.send(b"x" * 65536))
        assert pending_bytes(left) > 0
    assert time.monotonic() - began >= 0.2
    agent.until(lambda: agent.domain.meter.finished == 1)


def test_pending_bytes_of_what_is_no_connection(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix, socket.socket(type=socket.SOCK_DGRAM) as udp:
        assert pending_bytes(unix) == 0
        assert pending_bytes(udp) == 0
    assert pending_bytes(udp) == 0  # closed


# -- asyncio --------------------------------------------------------------------------------------


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    if request.param == "asyncio":
        return asyncio.run
    uvloop = pytest.importorskip("uvloop")
    return lambda main: asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main)


def test_tasks_take_turns(local_agent: Any, run: Any) -> None:
    agent = local_agent()
    aflows = AsyncFlows(str(agent.path), **PATIENT)
    sending = most = 0

    async def work() -> None:
        nonlocal sending, most
        for _ in range(20):
            async with aflows.open(100, peer="10.0.0.2"):
                sending += 1
                most = max(most, sending)
                await asyncio.sleep(0)
                sending -= 1

    async def main() -> None:
        await asyncio.gather(*(work() for _ in range(10)))
        aflows.close()

    run(main())
    run(main())  # another loop, another connection
    assert most == 1
    assert (aflows.opened, dict(aflows.degraded)) == (400, {})
    agent.until(lambda: agent.domain.meter.finished == 400)


def test_streams_are_marked_sent_and_drained(local_agent: Any, run: Any) -> None:
    agent = local_agent()
    aflows = AsyncFlows(str(agent.path), **PATIENT)

    async def main() -> None:
        received = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.set_result(await reader.read())
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        _, writer = await asyncio.open_connection(host, port)
        async with aflows.open(4000, peer=writer) as flow:
            assert flow.class_index == 0
            await flow.send(writer, b"z" * 4000)
        tos = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_IP, socket.IP_TOS)
        assert tos >> 2 == 10
        writer.close()
        await writer.wait_closed()
        assert await received == b"z" * 4000
        server.close()
        await server.wait_closed()
        aflows.close()

    run(main())
    assert agent.call(lambda: agent.shell.counts.marks) == 1
    agent.until(lambda: agent.domain.meter.finished == 1)


def test_a_cancelled_task_leaves_the_queue(local_agent: Any, run: Any) -> None:
    agent = local_agent()
    aflows = AsyncFlows(str(agent.path), **PATIENT)

    async def main() -> None:
        first = await aflows.open(100)
        waiting = asyncio.create_task(_enter(aflows))
        await _queued(agent, [1, 0])
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await first.close()
        async with aflows.open(100) as flow:
            assert flow.degraded == ""
        aflows.close()

    run(main())


async def _queued(agent: Any, lengths: list[int]) -> None:
    async with asyncio.timeout(30):
        while agent.domain.gate.queue_lengths() != lengths:  # noqa: ASYNC110  another thread's
            await asyncio.sleep(0.002)


async def _enter(aflows: AsyncFlows) -> None:
    async with aflows.open(100):
        pass


def test_async_fails_open(stand_in: Any, tmp_path: Path, run: Any) -> None:
    absent = AsyncFlows(str(tmp_path / "none.sock"))
    slow = AsyncFlows(str(tmp_path / "agent.sock"), answer_timeout_s=0.02)
    stand_in(lambda packet: [])

    async def main() -> None:
        async with absent.open(5) as flow:
            assert flow.degraded == "absent"
        async with slow.open(5) as flow:
            assert flow.degraded == "slow"
        slow.close()

    run(main())


def test_async_agent_death_releases_all(local_agent: Any, run: Any) -> None:
    agent = local_agent()
    aflows = AsyncFlows(str(agent.path), **PATIENT)

    async def main() -> None:
        held = await aflows.open(100)
        waiting = [asyncio.create_task(_degraded(aflows)) for _ in range(3)]
        await _queued(agent, [3, 0])
        await asyncio.to_thread(agent.stop)
        assert await asyncio.gather(*waiting) == ["closed"] * 3
        await held.close()

    run(main())


async def _degraded(aflows: AsyncFlows) -> str:
    async with aflows.open(100) as flow:
        return flow.degraded
