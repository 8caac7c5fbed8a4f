"""Marks on real sockets: both families, order of the options, privilege, what is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from intentd.agent.marking import Marked, check_socket, mark
from intentd.agent.tc.netlink import has_net_admin
from intentd.agent.tc.plan import priority_of
from intentd.core.errors import InputError

pytestmark = pytest.mark.real
SRC = Path(__file__).parents[2] / "src"
needs_privilege = pytest.mark.skipif(not has_net_admin(), reason="needs CAP_NET_ADMIN")


@pytest.fixture(
    params=[
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_INET, socket.SOCK_DGRAM),
        (socket.AF_INET6, socket.SOCK_STREAM),
        (socket.AF_INET6, socket.SOCK_DGRAM),
    ],
    ids=lambda p: f"{p[0].name}-{p[1].name}",
)
def sock(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    with socket.socket(*request.param) as made:
        yield made


def marks(sock: socket.socket) -> tuple[int, int, int]:
    tclass = -1
    if sock.family == socket.AF_INET6:
        tclass = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
    return (
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY),
        sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS),
        tclass,
    )


@needs_privilege
def test_both_marks_hold_and_come_off(sock: socket.socket) -> None:
    check_socket(sock)
    v6 = sock.family == socket.AF_INET6
    assert mark(sock, priority=priority_of(3), dscp=46) == Marked(priority=True)
    assert marks(sock) == (priority_of(3), 46 << 2, 46 << 2 if v6 else -1)
    assert mark(sock, priority=priority_of(3), dscp=46) == Marked(priority=True)
    assert mark(sock, priority=priority_of(1), dscp=10) == Marked(priority=True)
    assert marks(sock) == (priority_of(1), 10 << 2, 10 << 2 if v6 else -1)
    mark(sock, priority=0, dscp=0)
    assert marks(sock) == (0, 0, 0 if v6 else -1)


@needs_privilege
def test_priority_survives_because_it_is_set_last() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority_of(0))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)
        reset = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY)
        assert reset != priority_of(0)  # the trap
        mark(sock, priority=priority_of(0), dscp=46)
        assert marks(sock)[0] == priority_of(0)


def test_ecn_bits_of_the_application_stay() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x2)
        mark(sock, priority=0, dscp=10)
        assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 10 << 2 | 0x2


def test_mapped_peer_gets_the_mark_too() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender,
    ):
        receiver.settimeout(60)
        receiver.bind(("127.0.0.1", 0))
        receiver.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        mark(sender, priority=0, dscp=18)
        sender.sendto(b"x", ("::ffff:127.0.0.1", receiver.getsockname()[1]))
        _, ancillary, _, _ = receiver.recvmsg(10, 100)
        assert ancillary[0][2][0] == 18 << 2


@pytest.mark.parametrize(
    ("family", "kind", "field"),
    [
        (socket.AF_UNIX, socket.SOCK_STREAM, "socket.family"),
        (socket.AF_NETLINK, socket.SOCK_RAW, "socket.family"),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, "socket.family"),
    ],
)
def test_other_families_are_refused_by_name(
    family: int, kind: socket.SocketKind, field: str
) -> None:
    with socket.socket(family, kind) as sock, pytest.raises(InputError) as caught:
        check_socket(sock)
    assert caught.value.field == field
    assert str(caught.value.value).startswith("AF_")


@pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets need root")
def test_raw_sockets_are_refused() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock,
        pytest.raises(InputError, match=r"SOCK_RAW IPPROTO_ICMP.*TCP or UDP"),
    ):
        check_socket(sock)


@pytest.mark.skipif(not Path("/usr/bin/setpriv").exists(), reason="setpriv is not installed")
def test_without_privilege_the_dscp_is_set_alone() -> None:
    code = (
        "import socket; from intentd.agent.marking import *; s = socket.socket();"
        "print(mark(s, priority=0x2D170010, dscp=46).priority,"
        " s.getsockopt(socket.IPPROTO_IP, socket.IP_TOS))"
    )
    drop = ["setpriv", "--bounding-set=-net_admin,-net_raw", "--inh-caps=-net_admin,-net_raw"]
    done = subprocess.run(
        [*(drop if os.geteuid() == 0 else []), sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["False", str(46 << 2)]
