"""The agent's side of turns on real sockets: FIN datagrams and the link, also from strangers."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from intentd.agent import turns
from intentd.agent.config import FinSection, SequencerSection
from intentd.agent.turns import FinPort, SequencerLink
from intentd.core.errors import IntentdError
from intentd.core.flows.fin import Fin, FinSigner
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.member import Broadcast
from intentd.daemons.kit.keys import KeyFileError, new_curve_keys, new_fin_key, write_curve_keys
from intentd.daemons.kit.zap import secure_server

KEY = new_fin_key()
RUNS = (wire.Run(0, 5, 2),)


def port(section: FinSection, heard: list[Fin], name: str = "a") -> FinPort:
    return FinPort(section, (KEY,), name=name, boot=7, on_fin=heard.append)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  the kernel delivers
            await asyncio.sleep(0.002)


async def test_a_fin_is_heard_and_forgeries_are_dropped() -> None:
    heard: list[Fin] = []
    receiving = port(FinSection(bind="127.0.0.1:0"), heard, "receiver")
    sending = port(FinSection(bind="127.0.0.1:0"), [], "sender")
    receiving.start()
    sending.start()
    rng = random.Random(1)
    stranger = FinSigner.from_domain_key(new_fin_key(), "sender", 7)
    good = FinSigner.from_domain_key(KEY, "other", 7).sign(1, 2, RUNS)
    with socket.socket(type=socket.SOCK_DGRAM) as raw:
        for index in range(2000):
            datagram = bytearray(rng.choice((good, stranger.sign(1, 2, RUNS))))
            if index % 2:
                datagram = bytearray(rng.randbytes(rng.randrange(2000)))
            else:
                datagram[rng.randrange(len(datagram))] ^= rng.randrange(1, 256)
            raw.sendto(datagram, receiving.address)
            if index % 50 == 0:
                await asyncio.sleep(0)
    sending.send(Broadcast(1, 2, RUNS), [receiving.address])
    await until(lambda: heard)
    assert [(fin.domain_id, fin.epoch, fin.runs) for fin in heard] == [(1, 2, RUNS)]
    assert receiving.verifier.accepted == 1
    dropped = receiving.verifier.dropped
    assert dropped["malformed"] > 0
    assert dropped["forged"] > 0
    assert sending.counts == {"sent": 1}
    receiving.stop()
    sending.stop()


async def test_multicast_groups_are_joined() -> None:
    heard: list[Fin] = []
    section = FinSection(bind="0.0.0.0:0", interface="127.0.0.1")
    receiving = port(section, heard, "receiver")
    group = f"239.77.7.7:{receiving.address[1]}"
    sending = port(section, [], "sender")
    receiving.start()
    try:
        receiving.join(group)
        sending.join(group)
    except IntentdError as error:
        pytest.skip(f"no multicast on loopback here: {error}")
    receiving.join("127.0.0.1:1")  # nothing to join
    sending.send(Broadcast(1, 2, RUNS), [("239.77.7.7", receiving.address[1])])
    await until(lambda: heard)
    receiving.stop()
    sending.start()
    sending.stop()


async def test_a_port_in_use_and_a_target_out_of_reach_are_told() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(IntentdError, match=r"fin\.bind: 127\.0\.0\.1:\d+: Address already"):
            port(FinSection(bind=f"127.0.0.1:{taken.getsockname()[1]}"), [])
    sending = port(FinSection(bind="127.0.0.1:0"), [])
    sending.start()
    sending.send(Broadcast(1, 2, RUNS), [("255.255.255.255", 9)])  # not from loopback
    assert sum(sending.counts.values()) == 1
    sending.stop()


def test_a_fin_key_that_is_missing_is_told_even_while_nothing_needs_it(tmp_path: Path) -> None:
    made = turns.Turns(name="a", boot=1, now=lambda: 0.0, released=lambda domain, releases: None)
    with pytest.raises(KeyFileError, match="expected a readable key file"):
        made.set_domains([], FinSection(key_file=str(tmp_path / "none")))


async def test_wrong_keys_are_told_and_the_link_recovers_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "REOPEN_S", 0.05)
    server = new_curve_keys()
    write_curve_keys(tmp_path / "server", server)
    write_curve_keys(tmp_path / "agent", new_curve_keys())
    context: Any = zmq.Context(1)
    router = context.socket(zmq.ROUTER)
    number = router.bind_to_random_port("tcp://127.0.0.1")
    section = SequencerSection(
        endpoint=f"tcp://127.0.0.1:{number}",
        key_file=str(tmp_path / "agent"),
        server_key_file=str(tmp_path / "server.pub"),
    )
    keys = turns._keys_of(section)
    link = SequencerLink(
        context, section, keys, on_message=lambda m: None, on_connected=lambda up: None
    )
    link.start()
    await until(lambda: link.last_error)
    assert link.last_error == "sequencer.key_file: set here, but the other side has no keys"
    router.close(linger=0)
    mended = context.socket(zmq.ROUTER)
    secure_server(mended, server)
    await until(lambda: _bound(mended, number))
    await until(lambda: link.connected)
    assert link.last_error == ""
    mended.close(linger=0)
    link.stop()
    context.destroy(linger=0)


def _bound(router: Any, number: int) -> bool:
    """The closed socket leaves its port a moment later, in libzmq's own thread."""
    try:
        router.bind(f"tcp://127.0.0.1:{number}")
    except zmq.ZMQError:
        return False
    return True


async def test_the_link_tells_up_and_down_and_drops_nonsense() -> None:
    context: Any = zmq.Context(1)
    router = context.socket(zmq.ROUTER)
    number = router.bind_to_random_port("tcp://127.0.0.1")
    got: list[Any] = []
    states: list[bool] = []
    link = SequencerLink(
        context,
        SequencerSection(endpoint=f"tcp://127.0.0.1:{number}"),
        None,
        on_message=got.append,
        on_connected=states.append,
    )
    link.start()
    await until(lambda: states == [True])
    link.send(wire.Probe(1, 2, 0, 3))
    peer, frame = await asyncio.to_thread(router.recv_multipart)
    assert wire.decode(frame) == wire.Probe(1, 2, 0, 3)
    for nonsense in ([b""], [b"\xff" * 40], [b"two", b"parts"], [b"\x13\x02" + bytes(20)]):
        router.send_multipart([peer, *nonsense])
    beat = wire.Beat(1, 2, 9)
    router.send_multipart([peer, wire.encode(beat)])
    await until(lambda: got)
    assert got == [beat]
    assert link.counts["malformed"] == 4
    router.close(linger=0)
    await until(lambda: states == [True, False])
    link.stop()
    context.destroy(linger=0)
