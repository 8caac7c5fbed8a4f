"""The gate shell: messages in, packets out; policies swapped; bounds; explain; report."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from intentd.agent import app_protocol as wire
from intentd.agent.app_protocol import ProtocolError
from intentd.agent.domain import Domain, Route, parse_network
from intentd.agent.marking import mark
from intentd.agent.shell import GateShell
from intentd.core.errors import InputError
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.core.flows.turn.domain import DomainGate

INF = float("inf")


class Peer:
    """An application as the shell sees it; keeps what it was sent."""

    def __init__(self, number: int = 1) -> None:
        self.number, self.pid, self.uid, self.gid = number, 1000 + number, 0, 0
        self.name = ""
        self.flows: dict[int, Any] = {}
        self.got: list[Any] = []

    def send(self, packet: bytes, fd: int | None = None) -> None:
        self.got.append(wire.decode_reply(packet))

    def take(self) -> list[Any]:
        got, self.got = self.got, []
        return got


class Host:
    """A shell with one domain, on a clock that the test moves."""

    def __init__(self, policy: DomainPolicy, **options: Any) -> None:
        self.now = 100.0
        self.woken: list[float] = []
        self.shell = GateShell(now=lambda: self.now, mark=mark, woken=self.woken.append, **options)
        self.domain = self.make(policy)
        self.shell.set_domains([self.domain], [], policy.domain)

    def make(self, policy: DomainPolicy) -> Domain:
        return Domain(policy.domain, policy, DomainGate(policy, name="test", boot=7))

    def say(self, peer: Peer, message: Any, passed: socket.socket | None = None) -> list[Any]:
        self.shell.message(peer, message, passed)
        return peer.take()


@pytest.fixture
def host(policy_of_two: Callable[..., DomainPolicy]) -> Host:
    return Host(policy_of_two(max_wait_s=30.0, early_fin_bytes=65536))


def granted(request: int, flow: int, index: int = 0, reason: str = "", **fields: Any) -> wire.Grant:
    base = {"dscp": 10 if index == 0 else 0, "early_fin_bytes": 65536, "rate_bps": 10**9}
    return wire.Grant(request, flow, index, reason=reason, **{**base, **fields})


def test_a_turn_passes_on(host: Host) -> None:
    a, b = Peer(1), Peer(2)
    assert host.say(a, wire.Open(1, 100)) == [granted(1, 1)]
    assert host.say(b, wire.Open(1, 200)) == [wire.Queued(1, 2, 0, 1, 30001)]
    assert host.say(b, wire.Open(2, 9999)) == [granted(2, 3, 1)]
    host.now += 1.0
    assert host.say(a, wire.Done(1, 100)) == []
    assert b.take() == [granted(1, 2)]
    assert host.domain.meter.finished == 1
    assert host.domain.meter.fct[0].max == 1.0
    assert host.domain.meter.wait[0].max == 1.0


def test_the_grant_leaves_before_the_books_are_kept(
    policy_of_two: Callable[..., DomainPolicy],
) -> None:
    """Somebody waits for a GRANT, then other hosts for the outbox, nobody for a histogram."""
    seen: list[tuple[str, int, int]] = []
    host = Host(policy_of_two(), changed=lambda domain: note("outbox"))

    def note(what: str) -> None:
        meter = host.domain.meter
        counted = sum(histogram.count for histogram in meter.wait.values())
        seen.append((what, counted, meter.finished))

    class Watched(Peer):
        def send(self, packet: bytes, fd: int | None = None) -> None:
            note(type(wire.decode_reply(packet)).__name__)

    a, b = Watched(1), Watched(2)
    host.say(a, wire.Open(1, 100))
    host.say(b, wire.Open(1, 100))
    host.say(a, wire.Done(1, 100))
    assert seen == [
        ("Grant", 0, 0), ("outbox", 0, 0),
        ("outbox", 1, 0), ("Queued", 1, 0),
        ("Grant", 1, 0), ("outbox", 1, 0),
    ]  # fmt: skip
    assert host.domain.meter.wait[0].count == 2
    assert host.domain.meter.finished == 1


def test_announce_hands_the_turn_over_in_order(host: Host) -> None:
    a, b = Peer(1), Peer(2)
    host.say(a, wire.Open(1, 100))
    host.say(b, wire.Open(1, 100))
    host.say(a, wire.Announce(1, 65537))  # more than is left in a hand-over
    assert host.shell.counts.early_announcements == 1
    host.say(a, wire.Announce(1, 50))
    assert b.take()[-1] == granted(1, 2)
    assert host.say(a, wire.Done(1, 100)) == []
    assert dict(host.domain.meter.degraded) == {}
    assert host.domain.describe()["handed_over"] == 1


def test_an_application_that_dies_passes_its_turns_on_at_once(host: Host) -> None:
    a, b = Peer(1), Peer(2)
    host.say(a, wire.Open(1, 100))
    host.say(b, wire.Open(1, 100))
    host.say(a, wire.Open(2, 100))
    host.shell.left(a)
    assert b.take() == [granted(1, 2)]
    assert host.shell.counts.died_holding == 1
    assert list(host.shell.flows) == [2]


def test_cancel_and_done_while_waiting_leave_the_queue(host: Host) -> None:
    a = Peer()
    for request in (1, 2, 3, 4):
        host.say(a, wire.Open(request, 100))
    host.say(a, wire.Cancel(2))
    host.say(a, wire.Done(3, 0))
    host.say(a, wire.Announce(4, 1))  # before its turn: nothing
    assert host.say(a, wire.Done(1, 100)) == [granted(4, 4)]


def test_nobody_waits_beyond_the_longest_wait(host: Host) -> None:
    a = Peer()
    host.say(a, wire.Open(1, 100))
    host.say(a, wire.Open(2, 100))
    assert host.woken == [130.0]
    host.now = 130.0
    host.shell.tick()
    assert a.take() == [granted(2, 2, reason="timeout")]


def test_the_handover_is_measured_from_the_applications_stamps(host: Host) -> None:
    a = Peer()
    host.say(a, wire.Open(1, 100))
    host.say(a, wire.Open(2, 100))
    host.now = 101.0
    host.say(a, wire.Done(1, 100, 100_100_000_000, 100_900_000_000))
    host.now = 102.0
    host.say(a, wire.Done(2, 100, 101_000_000_000, 101_500_000_000))
    assert host.domain.meter.handover.count == 1
    assert host.domain.meter.handover.max == pytest.approx(0.1)


def test_stamps_that_cannot_be_are_not_believed(host: Host) -> None:
    a = Peer()
    host.say(a, wire.Open(1, 100))
    host.say(a, wire.Open(2, 100))
    host.now = 101.0
    host.say(a, wire.Done(1, 100, 1, 2**63))
    assert host.shell.find(1).started_ns == 100_000_000_000
    host.now = 102.0
    host.say(a, wire.Done(2, 100, 5, 4))
    assert host.domain.meter.handover.max == 0.0


def test_peers_choose_the_domain_longest_match_first(host: Host, policy_of_two: Any) -> None:
    near = host.make(policy_of_two("near"))
    far = host.make(policy_of_two("far"))
    networks = {"10.0.0.0/8": "far", "10.1.0.0/16": "near", "fd00::/8": "near"}
    routes = [Route(parse_network(text), name) for text, name in networks.items()]
    host.shell.set_domains([host.domain, near, far], routes, "up")
    a = Peer()
    peers = ["10.1.2.3", "10.2.2.3", "fd00::1", "192.0.2.1", ""]
    for request, peer in enumerate(peers, 1):
        host.say(a, wire.Open(request, 100, peer=peer))
    found = [host.shell.find(flow).domain.name for flow in range(1, 6)]
    assert found == ["near", "far", "near", "up", "up"]
    host.say(a, wire.Open(6, 100, "far", "10.1.2.3"))
    assert host.shell.find(6).domain is far
    host.shell.set_domains([host.domain], routes, "")
    assert [m.reason for m in a.take()] == ["policy", "policy"]  # those that waited there
    assert host.say(a, wire.Open(7, 100, peer="192.0.2.1")) == [
        wire.Grant(7, 7, 0, reason="no_domain")
    ]
    assert host.say(a, wire.Done(7, 100)) == []


def test_flows_of_a_removed_domain_go_on(host: Host) -> None:
    a = Peer()
    host.say(a, wire.Open(1, 100))
    host.say(a, wire.Open(2, 100))
    host.shell.set_domains([], [], "")
    assert [(m.request, m.reason) for m in a.take()] == [(2, "policy")]
    host.say(a, wire.Done(1, 100))
    host.say(a, wire.Done(2, 100))
    assert not host.shell.flows


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (wire.Open(2, 1, "nowhere"), wire.E_UNKNOWN, "OPEN.domain: got 'nowhere', expected one"),
        (wire.Open(1, 1), wire.E_VALUE, "OPEN.request: got 1, expected a number no open flow"),
        (
            wire.Open(2, 1, class_hint=2),
            wire.E_VALUE,
            "OPEN.class_hint: got 2, expected 0 to 1 (domain up has 2 classes)",
        ),
        (wire.Done(9, 0), wire.E_UNKNOWN, "DONE.request: got 9, expected the request of an open"),
        (wire.Cancel(9), wire.E_UNKNOWN, "CANCEL.request: got 9"),
        (wire.Announce(9, 0), wire.E_UNKNOWN, "ANNOUNCE.request: got 9"),
        (wire.Mark(9), wire.E_UNKNOWN, "MARK.request: got 9"),
        (wire.Mark(1), wire.E_SOCKET, "descriptors: got 0, expected one socket with MARK"),
        (wire.Open(2, 1, flags=3), wire.E_SOCKET, "OPEN: got 'no socket', expected one socket"),
        (wire.Stats(1, "nowhere"), wire.E_UNKNOWN, "STATS.domain: got 'nowhere'"),
    ],
)
def test_bad_requests_change_nothing(host: Host, message: Any, code: int, text: str) -> None:
    a = Peer()
    host.say(a, wire.Open(1, 100))
    with pytest.raises(ProtocolError) as caught:
        host.say(a, message)
    assert (caught.value.code, caught.value.request) == (code, message.request)
    assert str(caught.value).startswith(text)
    assert list(host.shell.flows) == [1]
    assert host.domain.meter.arrivals == 1
    assert host.say(a, wire.Open(3, 100))[0].flow == 2  # no number was used up


def test_bounds(policy_of_two: Any) -> None:
    host = Host(policy_of_two(), max_flows=2)
    a = Peer()
    host.say(a, wire.Open(1, 100))
    host.say(a, wire.Open(2, 100))
    with pytest.raises(ProtocolError, match="flows: got 3, expected at most 2 on a connection"):
        host.say(a, wire.Open(3, 100))
    host.shell.stopping = True
    with pytest.raises(ProtocolError, match="agent: got 'stopping'") as caught:
        host.say(Peer(2), wire.Open(1, 100))
    assert caught.value.code == wire.E_STOPPING


def test_hints_are_followed_unless_the_host_forbids(policy_of_two: Any) -> None:
    host = Host(policy_of_two(), honour_hints=True)
    assert host.say(Peer(), wire.Open(1, 100, class_hint=1))[0].class_index == 1
    host = Host(policy_of_two(), honour_hints=False)
    assert host.say(Peer(), wire.Open(1, 100, class_hint=1))[0].class_index == 0


def test_a_policy_swap_loses_nothing(host: Host, policy_of_two: Any) -> None:
    a = Peer()
    for request in (1, 2, 3):
        host.say(a, wire.Open(request, 3000))
    host.domain.meter.done(0, 1.0, 1)
    cut = (ClassPolicy(1000.0, 0.5), ClassPolicy(INF, 0.5, mpl=2))
    wider = dataclasses.replace(host.domain.policy, classes=cut)
    host.shell.set_policy(host.domain, wider, (1, 5))
    assert [(m.request, m.class_index) for m in a.take()] == [(2, 1)]
    assert [host.shell.find(flow).class_index for flow in (1, 2, 3)] == [1, 1, 1]
    assert host.domain.number == (1, 5)
    assert host.domain.meter.fct == {}  # class 0 means something else now
    host.say(a, wire.Done(1, 3000))
    host.say(a, wire.Done(2, 3000))
    host.say(a, wire.Done(3, 3000))
    assert host.domain.meter.finished == 4


def test_hello_and_stats(host: Host) -> None:
    a = Peer()
    assert host.say(a, wire.Hello(0, "fileserver")) == [
        wire.Welcome(0, 0, wire.WELCOME_MARKS, 16384)
    ]
    assert a.name == "fileserver"
    host.shell.connections = lambda: 3
    host.say(a, wire.Open(1, 100))
    host.say(a, wire.Open(2, 100))
    assert host.say(a, wire.Stats(5)) == [wire.StatsReply(5, 2, 0, 0, 1, 1, 3, 2)]


def test_marks_go_onto_the_passed_socket(host: Host) -> None:
    host.domain.mark_with((3, 4), shaped=True)
    a = Peer()
    for family, level, option in (
        (socket.AF_INET, socket.IPPROTO_IP, socket.IP_TOS),
        (socket.AF_INET6, socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
    ):
        with socket.socket(family) as sock:
            flags = wire.GRANT_MARKED | wire.GRANT_SHAPED
            request = int(family)
            grant = host.say(a, wire.Open(request, 100, flags=wire.WANTS_MARK), sock)[0]
            assert (grant.flags, grant.priority, grant.dscp) == (flags, 3, 10)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 3
            assert sock.getsockopt(level, option) >> 2 == 10
            host.say(a, wire.Done(request, 1))
    with socket.socket(socket.AF_INET) as sock:
        only = wire.Open(7, 9999, flags=wire.WANTS_MARK | wire.MARK_ONLY)
        assert host.say(a, only, sock) == [wire.Marked(7, 1, 0, 4)]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 4
    assert host.shell.counts.marks == 3


def test_a_socket_that_cannot_be_marked_is_told(policy_of_two: Any) -> None:
    def refuse(sock: socket.socket, *, priority: int, dscp: int) -> Any:
        raise OSError("no")

    host = Host(policy_of_two())
    host.shell._mark = refuse
    a = Peer()
    with socket.socket() as sock:
        grant = host.say(a, wire.Open(1, 100, flags=wire.WANTS_MARK), sock)[0]
        assert grant.flags == 0
        with pytest.raises(ProtocolError, match="one this agent may mark"):
            host.say(a, wire.Mark(1), sock)
    assert host.shell.counts.mark_failures == 2


def test_explain_tells_what_was_decided_and_why(host: Host) -> None:
    a = Peer()
    host.say(a, wire.Hello(0, "fileserver"))
    host.say(a, wire.Open(1, 100))
    host.say(a, wire.Open(2, 200, peer="10.0.0.2"))
    host.now += 0.5
    host.say(a, wire.Done(1, 100))
    host.now += 0.5
    host.say(a, wire.Done(2, 200))
    told = host.shell.explain(2)
    assert json.dumps(told)
    assert told["application"] == {"name": "fileserver", "pid": 1001, "uid": 0}
    assert (told["waited_s"], told["fct_s"], told["start"]) == (0.5, 1.0, "ordered")
    assert told["because"] == [
        "class 0: size 200 <= threshold 5000",
        "1 flows of the class were ahead and 1 may send at a time, order fifo, sequenced local",
        "the class has 0.600 of the link while all classes are busy",
    ]
    assert [row["not_because"] for row in told["alternatives"]] == [
        "a class before it takes this size"
    ]
    with pytest.raises(InputError, match="flow: got 99, expected an open flow or one of the last"):
        host.shell.explain(99)


def test_explain_forgets_the_oldest(policy_of_two: Any) -> None:
    host = Host(policy_of_two(), recent=3)
    a = Peer()
    for request in range(1, 6):
        host.say(a, wire.Open(request, 100))
        host.say(a, wire.Done(request, 100))
    assert [record.flow for record in host.shell.recent(10)] == [5, 4, 3]
    assert host.shell.find(2) is None


def test_the_report_is_bounded_and_plain(host: Host) -> None:
    a = Peer()
    for request in range(1, 3001):
        host.say(a, wire.Open(request, request))
        host.say(a, wire.Done(request, request))
    host.now += 2.0
    part = host.shell.report()["up"]
    assert json.dumps(part)
    assert (part["arrivals"], part["finished"], part["arrived_bytes"]) == (3000, 3000, 4501500)
    assert len(part["sample"]) == 2000
    assert part["sample"][0] == [2.0, 3000]
    assert part["queue"] == part["active"] == [0, 0]
    assert part["histogram"]["max"] == 3000.0
    assert host.shell.report()["up"]["sample"] == []
    assert host.domain.describe()["classes"][0]["fct_s"]["count"] == 3000
