"""The application socket: descriptors, bounds, credentials, and peers that misbehave."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import random
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from intentd.agent import app_protocol as wire
from intentd.agent.app_socket import AppSocket, SocketInUseError, SocketLimits

FUZZ_PACKETS = 100_000


def connect(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.settimeout(20)
    peer.connect(str(path))
    return peer


def ask(peer: socket.socket, packet: bytes, *fds: int) -> Any:
    """One packet, one reply."""
    if fds:
        rights = array.array("i", fds)
        peer.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    else:
        peer.send(packet)
    return wire.decode_reply(peer.recv(wire.MAX_PACKET))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_defective_packet_costs_one_error_not_the_connection(local_agent: Any) -> None:
    agent = local_agent()
    with connect(agent.path) as peer:
        for packet, text in (
            (b"x", "packet length: got 1"),
            (b"y" * 2000, "packet: got 'more', expected at most 512 bytes"),
            (wire.encode_open(wire.Open(1, 5))[:-1], "OPEN packet length: got 103"),
            (b"IA\x02" + wire.encode_cancel(1)[3:], "version: got 2"),
        ):
            error = ask(peer, packet)
            assert isinstance(error, wire.Error)
            assert error.text.startswith(text)
        assert isinstance(ask(peer, wire.encode_open(wire.Open(1, 5))), wire.Grant)
    agent.until(lambda: not agent.shell.flows)
    assert agent.call(lambda: agent.shell.counts.errors) == 4


def test_only_tcp_and_udp_sockets_are_taken_and_none_is_kept(local_agent: Any) -> None:
    agent = local_agent()
    before = open_descriptors()
    pair = socket.socketpair()
    reading, writing = os.pipe()
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    tcp, udp = socket.socket(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    packet = wire.encode_open(wire.Open(1, 5, flags=wire.WANTS_MARK))
    cancel = wire.encode_cancel(1)
    with connect(agent.path) as peer:
        for fds, text in (
            ((reading,), "descriptor: got 'no socket'"),
            ((pair[0].fileno(),), "socket.family: got 'AF_UNIX'"),
            ((raw.fileno(),), "socket.family: got 'AF_UNIX'"),
            ((tcp.fileno(), udp.fileno()), "descriptors: got 2, expected one socket"),
            (tuple([tcp.fileno()] * 200), "descriptors: got"),
        ):
            error = ask(peer, packet, *fds)
            assert (error.code, error.request) == (wire.E_SOCKET, 1)
            assert error.text.startswith(text)
        error = ask(peer, cancel, tcp.fileno())
        assert error.text == "descriptors: got 1, expected none with this message"
        for sock in (tcp, udp):
            grant = ask(peer, packet, sock.fileno())
            assert grant.flags == wire.GRANT_MARKED
            peer.send(cancel)
    for sock in (*pair, raw, tcp, udp):
        sock.close()
    os.close(reading)
    os.close(writing)
    agent.until(lambda: not agent.shell.connections())
    assert open_descriptors() == before


def test_a_lingering_socket_does_not_stop_the_loop(local_agent: Any, tcp_pair: Any) -> None:
    """Ours may be the last duplicate, and SO_LINGER makes close wait for the peer."""
    agent = local_agent()
    left, _ = tcp_pair
    left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
    left.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            left.send(b"x" * 65536)
    with connect(agent.path) as peer:
        packet = wire.encode_open(wire.Open(1, 5, flags=wire.WANTS_MARK))
        rights = array.array("i", [left.fileno()])
        agent.loop.call_soon_threadsafe(time.sleep, 0.05)  # so that the packet waits for our close
        peer.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
        os.close(left.detach())
        assert isinstance(wire.decode_reply(peer.recv(512)), wire.Grant)
        began = time.monotonic()
        assert isinstance(ask(peer, wire.encode_hello(0, "alive")), wire.Welcome)
        assert time.monotonic() - began < 20


def test_connections_are_bounded_and_the_peer_is_known(local_agent: Any) -> None:
    agent = local_agent(limits=SocketLimits(max_connections=1))
    with connect(agent.path) as first:
        assert isinstance(ask(first, wire.encode_hello(0, "first")), wire.Welcome)
        known = agent.call(lambda: [(a.pid, a.uid) for a in agent.socket.connections.values()])
        assert known == [(os.getpid(), os.getuid())]
        with connect(agent.path) as second:
            error = wire.decode_reply(second.recv(512))
            assert (error.code, error.text) == (wire.E_LIMIT, "connections: 1 are open, the bound")
            assert second.recv(512) == b""
    agent.until(lambda: not agent.socket.connections)
    with connect(agent.path) as third:
        assert isinstance(ask(third, wire.encode_hello(0, "third")), wire.Welcome)


def test_who_may_not_connect_hears_why(local_agent: Any) -> None:
    agent = local_agent()
    agent.socket._allowed = lambda uid, gid: False
    with connect(agent.path) as peer:
        error = wire.decode_reply(peer.recv(512))
        assert error.text.startswith(f"uid {os.getuid()}: expected one this agent serves")


def test_an_application_that_does_not_read_is_cut_off(local_agent: Any) -> None:
    agent = local_agent(limits=SocketLimits(send_backlog=32))
    with connect(agent.path) as peer, connect(agent.path) as other:
        ask(other, wire.encode_open(wire.Open(1, 5)))
        peer.settimeout(20)
        with contextlib.suppress(OSError):
            for request in range(1, 5000):
                peer.send(wire.encode_open(wire.Open(request, 5)))
        agent.until(lambda: len(agent.socket.connections) == 1)
        assert agent.call(lambda: len(agent.shell.flows)) == 1


def test_replies_wait_for_a_slow_reader(local_agent: Any) -> None:
    agent = local_agent()
    with connect(agent.path) as peer:
        for request in range(1, 301):
            peer.send(wire.encode_stats(request))
        seen = [wire.decode_reply(peer.recv(512)).request for _ in range(300)]
        assert seen == list(range(1, 301))


def test_a_second_agent_is_refused_and_a_dead_ones_socket_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"

    class Nobody:
        def left(self, application: Any) -> None: ...

    async def main() -> None:
        first = AppSocket(path, Nobody())
        first.open()
        with pytest.raises(SocketInUseError, match=f"another agent \\(pid {os.getpid()}\\)"):
            AppSocket(path, Nobody()).open()
        first.close()
        assert not path.exists()
        stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stale.bind(str(path))
        stale.close()  # the file of an agent that was killed
        again = AppSocket(path, Nobody())
        again.open()
        again.close()
        path.write_text("not a socket")
        with pytest.raises(SocketInUseError, match="a file that is not a socket is there"):
            AppSocket(path, Nobody()).open()
        assert path.read_text() == "not a socket"
        with path.with_name("agent.sock.lock").open() as lock:  # given back after the failure
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    asyncio.run(main())


def mutated(rng: random.Random) -> bytes:
    """A valid packet, a damaged one, or noise."""
    request = rng.randrange(1, 20)
    size = rng.choice((0, 1, 100, 6000, 2**40))
    packet = rng.choice(
        (
            lambda: wire.encode_open(wire.Open(request, size)),
            lambda: wire.encode_open(wire.Open(request, size, "up", "10.0.0.1", 1)),
            lambda: wire.encode_open(wire.Open(request, size, flags=rng.randrange(4))),
            lambda: wire.encode_done(request, size, rng.getrandbits(64), rng.getrandbits(64)),
            lambda: wire.encode_announce(request, size),
            lambda: wire.encode_cancel(request),
            lambda: wire.encode_mark(request),
            lambda: wire.encode_hello(request, "fuzz"),
            lambda: wire.encode_stats(request, "up"),
        )
    )()
    fate = rng.random()
    if fate < 0.4:
        return packet
    damaged = bytearray(packet)
    if fate < 0.7:
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    elif fate < 0.8:
        del damaged[rng.randrange(1, len(damaged)) :]
    elif fate < 0.9:
        damaged += rng.randbytes(rng.randrange(1, 600))
    else:
        damaged = bytearray(rng.randbytes(rng.randrange(1, 200)))
    return bytes(damaged)


@pytest.mark.timeout(300)
def test_no_packets_crash_leak_or_stall_the_agent(local_agent: Any) -> None:
    """10^5 random and mutated packets, garbage descriptors, clients that close at will."""
    agent = local_agent()
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    before = open_descriptors()
    sockets = [socket.socket(), socket.socket(type=socket.SOCK_DGRAM), *socket.socketpair()]
    garbage = [sock.fileno() for sock in sockets]
    sent = 0
    while sent < FUZZ_PACKETS:
        with connect(agent.path) as peer:
            peer.setblocking(False)
            life = rng.choice((1, 10, 100, 2000))
            for _ in range(life):
                packet = mutated(rng)
                try:
                    if rng.random() < 0.05:
                        fds = array.array("i", rng.choices(garbage, k=rng.randrange(1, 4)))
                        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
                        peer.sendmsg([packet], rights)
                    else:
                        peer.send(packet)
                except BlockingIOError:
                    select_ready(peer)
                    continue
                sent += 1
                if rng.random() < 0.5:
                    drain(peer)
    for sock in sockets:
        sock.close()
    agent.until(lambda: not agent.shell.connections())
    assert agent.call(lambda: (len(agent.shell.flows), len(agent.domain.gate))) == (0, 0)
    assert agent.call(agent.domain.gate.active) == [0, 0]
    assert open_descriptors() == before
    with connect(agent.path) as peer:
        assert isinstance(ask(peer, wire.encode_open(wire.Open(1, 5))), wire.Grant)


def select_ready(peer: socket.socket) -> None:
    """The agent has not read yet, or we have not."""
    drain(peer)
    time.sleep(0)


def drain(peer: socket.socket) -> None:
    try:
        while packet := peer.recv(512):
            wire.decode_reply(packet)
    except BlockingIOError:
        return
