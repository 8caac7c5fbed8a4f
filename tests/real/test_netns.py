"""Namespaces come up connected, over IPv4, IPv6 and a switch, and leave nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from intentd.testbed import netns

pytestmark = [pytest.mark.real, pytest.mark.netns]


@pytest.fixture(autouse=True)
def _needs_namespaces() -> None:
    reason = netns.unavailable()
    if reason:
        pytest.skip(reason)


def echo(server: netns.Namespace, client: netns.Namespace, family: int, address: str) -> bytes:
    with (
        server.socket(family, socket.SOCK_DGRAM) as answering,
        client.socket(family, socket.SOCK_DGRAM) as asking,
    ):
        answering.settimeout(60)
        asking.settimeout(60)
        answering.bind((address, 0))
        asking.sendto(b"ping", answering.getsockname())
        data, peer = answering.recvfrom(100)
        answering.sendto(data.upper(), peer)
        return asking.recv(100)


def test_pair_speaks_both_families_and_is_gone_afterwards() -> None:
    with netns.Topology() as net:
        left, right = net.namespace("left"), net.namespace("right")
        end, _ = net.pair(left, right)
        assert echo(left, right, socket.AF_INET, end.ipv4) == b"PING"
        assert echo(left, right, socket.AF_INET6, end.ipv6) == b"PING"
        assert (netns.NETNS_DIR / left.full_name).exists()
        prefix = net.prefix
    assert not list(netns.NETNS_DIR.glob(f"{prefix}*"))


def test_star_joins_all_hosts_and_carries_broadcast() -> None:
    with netns.Topology() as net:
        hosts = [net.namespace(f"h{index}") for index in range(3)]
        net.star(hosts)
        ends = [host.interfaces["eth0"] for host in hosts]
        assert echo(hosts[0], hosts[2], socket.AF_INET, ends[0].ipv4) == b"PING"
        assert echo(hosts[1], hosts[2], socket.AF_INET6, ends[1].ipv6) == b"PING"
        with (
            hosts[1].socket(kind=socket.SOCK_DGRAM) as hearing,
            hosts[0].socket(kind=socket.SOCK_DGRAM) as calling,
        ):
            hearing.settimeout(60)
            hearing.bind(("0.0.0.0", 0))
            calling.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            calling.sendto(b"all", ("10.77.1.255", hearing.getsockname()[1]))
            assert hearing.recv(10) == b"all"


def test_processes_run_inside_and_are_killed_at_the_end() -> None:
    with netns.Topology() as net:
        host = net.namespace("host")
        inside = host.run(["readlink", "/proc/self/ns/net"]).stdout.strip()
        assert inside != os.readlink("/proc/self/ns/net")
        with host.entered():
            assert os.readlink("/proc/thread-self/ns/net") == inside
        assert os.readlink("/proc/thread-self/ns/net") != inside
        sleeper = host.popen(["sleep", "60"], stdout=subprocess.DEVNULL)
        assert sleeper.poll() is None
    assert sleeper.returncode == -9


def test_what_a_dead_run_left_is_told_from_what_lives() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = f"tstale-{dead.pid}-abcdef-x"
    subprocess.run(["ip", "netns", "add", left], check=True)
    with netns.Topology("tstale") as net:
        live = net.namespace("live").full_name
        assert netns.remove_stale("tstale") == [left]
        assert (netns.NETNS_DIR / live).exists()


def test_refusals_name_what_was_wrong() -> None:
    with netns.Topology() as net:
        host = net.namespace("host")
        with pytest.raises(netns.NamespaceError, match="used once"):
            net.namespace("host")
        with pytest.raises(netns.NamespaceError, match="nosuch"):
            host.ip("link", "set", "nosuch", "up")
        with pytest.raises(netns.NamespaceError, match="tc qdisc add"):
            host.tc("qdisc", "add", "dev", "lo", "root", "nosuchkind")
    with pytest.raises(netns.NamespaceError, match="prefix"):
        netns.Topology("Bad Name")
