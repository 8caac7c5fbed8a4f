"""The board: flows of free classes start by looking, and the agent's order stays what it was."""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.agent import app_protocol as wire
from intentd.agent import client as library
from intentd.agent.board import BOARD_BYTES, Board
from intentd.agent.client import AsyncFlows, Flows
from intentd.agent.domain import Domain
from intentd.agent.marking import mark
from intentd.agent.shell import CLAIM_S, GateShell
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.core.flows.turn.domain import DomainGate

INF = float("inf")
PATIENT = {"answer_timeout_s": 20.0}


@pytest.fixture
def flows(tmp_path: Path) -> Iterator[Flows]:
    client = Flows(str(tmp_path / "agent.sock"), name="test", **PATIENT)
    yield client
    client.close()


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.close()


def held(policy: DomainPolicy) -> Domain:
    return Domain(policy.domain, policy, DomainGate(policy, name="test", boot=1))


def test_reader_sees_what_the_agent_wrote(
    board: Board, policy_of_two: Callable[..., DomainPolicy]
) -> None:
    domain = held(policy_of_two(early_fin_bytes=700))
    domain.mark_with((3, 4), shaped=True)
    other = held(policy_of_two("down"))
    board.publish([other, domain], "up", routed=False)
    reader = library.Board(board.fd)
    assert reader.start(1, 5000, b"", has_peer=True) == (0, 10, 3, 700, 10**9)
    assert reader.start(2, 5001, b"up", has_peer=False) == (1, 0, 4, 700, 10**9)
    assert reader.start(3, 5001, b"down", has_peer=False) == (1, 0, 0, 0, 10**9)
    assert reader.start(4, 1, b"elsewhere", has_peer=False) is None


def test_peers_that_choose_the_domain_must_ask(
    board: Board, policy_of_two: Callable[..., DomainPolicy]
) -> None:
    board.publish([held(policy_of_two())], "up", routed=True)
    reader = library.Board(board.fd)
    assert reader.start(1, 1, b"", has_peer=True) is None
    assert reader.start(1, 1, b"", has_peer=False) is not None


def test_a_class_is_taken_once_until_the_agent_has_answered(
    board: Board, policy_of_two: Callable[..., DomainPolicy]
) -> None:
    domain = held(policy_of_two())
    board.publish([domain], "up", routed=False)
    reader = library.Board(board.fd)
    assert reader.start(1, 1, b"", has_peer=False) is not None
    assert reader.start(2, 1, b"", has_peer=False) is None
    domain.gate.arrive(7, 1, now=1.0, started=True)
    board.show(domain)
    reader.settled(1)
    assert reader.start(2, 1, b"", has_peer=False) is None
    domain.gate.finish(7, now=2.0)
    board.show(domain)
    assert reader.start(2, 1, b"", has_peer=False) is not None


def opened(board: Board) -> library.Board:
    """As an application gets it."""
    fd = board.descriptor()
    try:
        return library.Board(fd)
    finally:
        os.close(fd)


def test_one_program_claims_a_free_class_and_the_others_ask(
    board: Board, policy_of_two: Callable[..., DomainPolicy]
) -> None:
    domain = held(policy_of_two())
    board.publish([domain], "up", routed=False)
    one, other, third = opened(board), opened(board), opened(board)
    assert one.start(1, 1, b"", has_peer=False) is not None
    assert other.start(1, 1, b"", has_peer=False) is None
    assert other.start(2, 5001, b"", has_peer=False) is not None  # another class
    assert board.claimed(domain, 0)
    one.settled(1)
    assert not board.claimed(domain, 0)
    assert other.start(3, 1, b"", has_peer=False) is not None
    del other  # it died
    assert third.start(1, 1, b"", has_peer=False) is not None


def test_the_agent_sees_who_has_claimed_before_a_flow_that_asked_starts(
    board: Board, policy_of_two: Callable[..., DomainPolicy]
) -> None:
    domain = held(policy_of_two())
    board.publish([domain], "up", routed=False)
    one, other = opened(board), opened(board)
    assert one.start(1, 1, b"", has_peer=False) is not None
    assert board.take(domain, 0)
    assert not board.take(domain, 0)  # shown as taken already
    assert not board.take(domain, 1)
    assert other.start(1, 5001, b"", has_peer=False) is None


class Peer:
    """An application as the shell sees it."""

    def __init__(self, number: int) -> None:
        self.number, self.pid, self.uid, self.gid, self.name = number, number, 0, 0, ""
        self.flows: dict[int, Any] = {}
        self.got: list[Any] = []

    def send(self, packet: bytes, fd: int | None = None) -> None:
        self.got.append(wire.decode_reply(packet))

    def reasons(self) -> list[str]:
        return [reply.reason for reply in self.got if isinstance(reply, wire.Grant)]


class Claimed:
    """A shell whose class 0 an application has claimed, when another asks for it."""

    def __init__(self, board: Board, policy: DomainPolicy) -> None:
        self.now = 100.0
        self.woken: list[float] = []
        self.shell = GateShell(
            now=lambda: self.now, mark=mark, woken=self.woken.append, board=board
        )
        self.domain = held(policy)
        self.shell.set_domains([self.domain], [], policy.domain)
        self.starter: library.Board | None = opened(board)
        assert self.starter.start(1, 1, b"", has_peer=False) is not None
        self.asks, self.starts = Peer(1), Peer(2)
        self.shell.message(self.asks, wire.Open(1, 1), None)
        assert self.asks.reasons() == []

    def tick(self, seconds: float) -> None:
        self.now += seconds
        assert min(self.woken) <= self.now
        self.shell.tick()


@pytest.fixture
def claimed(board: Board, policy_of_two: Callable[..., DomainPolicy]) -> Claimed:
    return Claimed(board, policy_of_two())


def test_without_descriptors_an_application_goes_without_a_board(
    claimed: Claimed, monkeypatch: pytest.MonkeyPatch, board: Board
) -> None:
    def full() -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(board, "descriptor", full)
    claimed.shell.message(claimed.starts, wire.Hello(1, "p"), None)
    assert claimed.starts.got[-1].flags & wire.WELCOME_BOARD == 0


def test_who_asks_waits_for_who_has_started_and_both_are_in_order(claimed: Claimed) -> None:
    claimed.tick(0.05)
    claimed.shell.message(claimed.starts, wire.Open(1, 1, flags=wire.STARTED), None)
    assert claimed.starts.reasons() == [""]
    claimed.tick(0.05)
    assert claimed.asks.reasons() == []
    claimed.shell.message(claimed.starts, wire.Done(1, 1), None)
    assert claimed.asks.reasons() == [""]


def test_a_claim_without_a_flow_holds_nobody_up(claimed: Claimed) -> None:
    claimed.starter = None  # its program died
    claimed.tick(0.05)
    assert claimed.asks.reasons() == [""]


def test_a_claim_is_not_waited_for_for_ever(claimed: Claimed) -> None:
    claimed.tick(CLAIM_S)
    assert claimed.asks.reasons() == [""]
    claimed.shell.message(claimed.starts, wire.Open(1, 1, flags=wire.STARTED), None)
    assert claimed.starts.reasons() == ["raced"]


def test_who_claimed_and_asks_after_all_takes_its_place_in_the_queue(claimed: Claimed) -> None:
    assert claimed.starter is not None
    claimed.starter.settled(1)
    claimed.shell.message(claimed.starts, wire.Open(1, 1), None)
    assert (claimed.asks.reasons(), claimed.starts.reasons()) == ([""], [])


def test_nobody_starts_while_the_agent_writes_or_after_it_left(
    board: Board, policy_of_two: Callable[..., DomainPolicy]
) -> None:
    board.publish([held(policy_of_two())], "up", routed=False)
    reader = library.Board(board.fd)
    board._generations[1] += 1
    assert reader.start(1, 1, b"", has_peer=False) is None
    board._generations[1] += 1
    assert reader.start(1, 1, b"", has_peer=False) is not None
    reader.settled(1)
    board.withdraw()
    assert reader.start(2, 1, b"", has_peer=False) is None


@pytest.mark.parametrize("fields", [{"dispatch": "empty_class"}, {"sequencing": "global"}])
def test_classes_where_size_alone_does_not_decide_are_never_free(
    board: Board, fields: dict[str, Any]
) -> None:
    sequencing = fields.pop("sequencing", "local")
    classes = (
        ClassPolicy(5000.0, 0.6, sequencing=sequencing),
        ClassPolicy(INF, 0.4, sequencing=sequencing),
    )
    board.publish([held(DomainPolicy("up", 1e9, classes, **fields))], "up", routed=False)
    reader = library.Board(board.fd)
    assert reader.start(1, 1, b"", has_peer=False) is None


def test_where_hosts_take_turns_only_small_flows_start(board: Board) -> None:
    classes = (ClassPolicy(5000.0, 0.6, sequencing="global"), ClassPolicy(INF, 0.4))
    policy = DomainPolicy("up", 1e9, classes, local_below_bytes=1000)
    board.publish([held(policy)], "up", routed=False)
    reader = library.Board(board.fd)
    assert reader.start(1, 1001, b"", has_peer=False) is None
    assert reader.start(2, 1000, b"", has_peer=False) is not None
    assert reader.start(3, 5001, b"", has_peer=False) is not None


def test_applications_cannot_write_shrink_or_grow_it(board: Board) -> None:
    fd = board.descriptor()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, BOARD_BYTES, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    for size in (10, BOARD_BYTES + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


@pytest.mark.parametrize("content", [b"", b"IABD", struct.pack("=II", 0x49414244, 2) + bytes(96)])
def test_another_kind_of_board_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "board"
    path.write_bytes(content)
    welcome = struct.pack("!HBBIQII", 0x4941, 1, 2, 0, 7, 4, 10)
    assert library.received_board(welcome, [os.open(path, os.O_RDONLY)]) is None


def test_second_flow_starts_without_asking(local_agent: Any, flows: Flows) -> None:
    agent = local_agent(board=True)
    flows.open(100).close()  # the answer brings the board
    agent.until(lambda: not agent.shell.flows)
    with flows.open(100) as flow:
        assert flow.id == 0
        assert (flow.class_index, flow.dscp, flow.degraded) == (0, 10, "")
        agent.until(lambda: agent.domain.gate.active() == [1, 0])
        assert agent.domain.gate.starts == {"": 2}
    agent.until(lambda: not agent.shell.flows)
    assert agent.domain.meter.finished == 2


def test_a_busy_class_is_waited_for(local_agent: Any, flows: Flows) -> None:
    agent = local_agent(board=True)
    flows.open(100).close()
    first = flows.open(100)
    agent.until(lambda: agent.domain.gate.active() == [1, 0])
    started = threading.Event()
    second = []

    def open_second() -> None:
        second.append(flows.open(100))
        started.set()

    thread = threading.Thread(target=open_second)
    thread.start()
    agent.until(lambda: agent.domain.gate.queue_lengths() == [1, 0])
    assert not started.is_set()
    first.close()
    thread.join(30)
    assert second[0].degraded == ""
    assert second[0].id
    second[0].close()
    agent.until(lambda: not agent.shell.flows)
    assert agent.domain.gate.starts == {"": 3}


def test_two_applications_at_once_start_one_after_the_other(
    local_agent: Any, flows: Flows, tmp_path: Path
) -> None:
    agent = local_agent(board=True)
    other = Flows(str(tmp_path / "agent.sock"), name="other", **PATIENT)
    for client in (flows, other):
        client.open(100).close()
    agent.until(lambda: not agent.shell.flows)
    hold, held_up = threading.Event(), threading.Event()

    def stop_reading() -> None:
        held_up.set()
        hold.wait(30)

    agent.loop.call_soon_threadsafe(stop_reading)
    held_up.wait(30)
    mine = flows.open(100)  # has started, and has not reached the agent
    theirs: list[library.Flow] = []
    thread = threading.Thread(target=lambda: theirs.append(other.open(100)))
    thread.start()
    hold.set()
    agent.until(lambda: agent.domain.gate.queue_lengths() == [1, 0])
    assert agent.domain.gate.active() == [1, 0]
    mine.close()
    thread.join(30)
    theirs[0].close()
    agent.until(lambda: not agent.shell.flows)
    assert agent.domain.gate.starts == {"": 4}
    assert flows.degraded + other.degraded == {}
    other.close()


def test_answers_nobody_waited_for_do_not_pile_up(local_agent: Any, flows: Flows) -> None:
    agent = local_agent(board=True)
    for _ in range(500):
        flows.open(100).close()
    agent.until(lambda: not agent.shell.flows)
    flows.open(100).close()
    assert flows.degraded == {}
    assert flows._connection is not None
    assert len(flows._connection._replies) <= 1
    agent.until(lambda: agent.domain.gate.starts == {"": 501})


def test_agent_gone_since_the_board_was_read(local_agent: Any, flows: Flows) -> None:
    agent = local_agent(board=True)
    flows.open(100).close()
    agent.until(lambda: not agent.shell.flows)
    agent.stop()
    with flows.open(100) as flow:
        assert flow.degraded in ("closed", "absent")


def test_tasks_of_a_loop_start_by_the_board(local_agent: Any, tmp_path: Path) -> None:
    agent = local_agent(board=True)
    aflows = AsyncFlows(str(tmp_path / "agent.sock"), name="test", **PATIENT)

    async def main() -> tuple[int, int]:
        async with aflows.open(100):
            pass
        await asyncio.to_thread(agent.until, lambda: not agent.shell.flows)
        async with aflows.open(100) as flow:
            before = flow.id
            await asyncio.to_thread(agent.until, lambda: agent.domain.gate.active() == [1, 0])
            await asyncio.sleep(0)  # the reader's turn
            await asyncio.sleep(0)
            after = flow.id
        aflows.close()
        return before, after

    before, after = asyncio.run(main())
    assert before == 0
    assert after
    agent.until(lambda: not agent.shell.flows)
    assert agent.domain.gate.starts == {"": 2}
