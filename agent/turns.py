"""The agent's network side of the turn protocol: links to sequencers, FIN datagrams.

Bytes in, decoded messages to the domain's gate; the gate's outbox out. What a message means is
``core.flows.turn``'s business. Without a sequencer a domain's gate orders locally, and this module
has nothing to do for it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import zmq

from intentd.agent.config import FinSection, SequencerSection
from intentd.agent.domain import Domain
from intentd.core.errors import IntentdError, WireError
from intentd.core.flows.fin import MAX_BYTES, Fin, FinSigner, FinVerifier
from intentd.core.flows.gate import Release
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.domain import DomainGate, message_domain
from intentd.core.flows.turn.member import Broadcast
from intentd.daemons.kit.config import split_address
from intentd.daemons.kit.handshake import HandshakeWatch
from intentd.daemons.kit.keys import (
    CurveKeys,
    read_curve_keys,
    read_curve_publics,
    read_fin_keys,
)
from intentd.daemons.kit.zap import secure_client
from intentd.daemons.kit.zmqfd import ZmqStream

log = logging.getLogger(__name__)

QUEUE: Final = 4096  # messages each way; a full queue drops, the protocol asks again
RECONNECT_MS: Final = (20, 1000)
REOPEN_S: Final = 1.0  # after a handshake that libzmq does not try again
_DATAGRAMS_A_TURN: Final = 256
_RECEIVE_BUFFER_BYTES: Final = 1 << 20

# our own pair, and the keys of the sequencer: one, or two while it is rotated
LinkKeys = tuple[CurveKeys, tuple[bytes, ...]]
Context = zmq.Context[zmq.Socket[bytes]]
Now = Callable[[], float]
Released = Callable[[Domain, list[Release]], None]


@dataclass(frozen=True, slots=True)
class Sequenced:
    """A domain whose order is global, and where its ids come from."""

    domain: Domain
    gate: DomainGate
    section: SequencerSection


class SequencerLink:
    """One connection to one sequencer, for all domains that it serves."""

    def __init__(
        self,
        context: Context,
        section: SequencerSection,
        keys: LinkKeys | None,
        *,
        on_message: Callable[[wire.Message], None],
        on_connected: Callable[[bool], None],
    ) -> None:
        """Raises IntentdError."""
        self.endpoint = section.endpoint
        self.connected = False
        self.last_error = ""
        self.counts: Counter[str] = Counter()
        self._context = context
        self._on_message = on_message
        self._on_connected = on_connected
        self._keys = keys
        self._server = 0  # which of the sequencer's keys is tried
        self._again: asyncio.TimerHandle | None = None
        self._watch, self._stream = self._open()

    def _open(self) -> tuple[HandshakeWatch, ZmqStream]:
        dealer = self._context.socket(zmq.DEALER)
        watch: HandshakeWatch | None = None
        try:
            # Nothing waits for a connection that is not there: what was said before a restart of
            # the sequencer makes no sense after it.
            dealer.setsockopt(zmq.IMMEDIATE, 1)
            dealer.setsockopt(zmq.SNDHWM, QUEUE)
            dealer.setsockopt(zmq.RCVHWM, QUEUE)
            dealer.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
            dealer.setsockopt(zmq.IPV6, int("[" in self.endpoint))
            dealer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
            dealer.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
            if self._keys is not None:
                secure_client(dealer, self._keys[0], self._keys[1][self._server])
            watch = HandshakeWatch(
                dealer,
                encrypted=self._keys is not None,
                on_link=self._linked,
                on_refused=self._refused,
            )
            dealer.connect(self.endpoint)
        except BaseException as error:
            if watch is not None:
                watch.stop()
            dealer.close(linger=0)
            if isinstance(error, zmq.ZMQError):
                raise IntentdError(f"sequencer.endpoint: {self.endpoint}: {error}") from None
            raise
        return watch, ZmqStream(dealer, self._received)

    def start(self) -> None:
        self._watch.start()
        self._stream.start()

    def stop(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self._watch.stop()
        self._stream.stop(linger_ms=100)

    def send(self, message: wire.Message) -> None:
        sent = self._stream.send([wire.encode(message)])
        self.counts["sent" if sent else "dropped_full"] += 1

    def _received(self, parts: list[bytes]) -> None:
        try:
            if len(parts) != 1:
                raise WireError(f"turn message: got {len(parts)} parts, expected 1")
            message = wire.decode(parts[0])
        except WireError as error:
            self.counts["malformed"] += 1
            log.debug("turn message dropped", extra={"reason": str(error)})
            return
        self.counts["received"] += 1
        self._on_message(message)

    def _linked(self, up: bool) -> None:
        if up == self.connected:
            return
        self.connected = up
        if up:
            self.last_error = ""
        log.log(
            logging.INFO if up else logging.WARNING,
            "sequencer %s",
            "connected" if up else "away: flows fall back to local order",
            extra={"endpoint": self.endpoint},
        )
        self._on_connected(up)

    def _refused(self, reason: str, final: bool) -> None:
        """A handshake failed, such as for wrong keys; told once a reason."""
        reason = f"sequencer.{reason}" if "key_file" in reason else reason
        if reason != self.last_error:
            extra = {"endpoint": self.endpoint, "reason": reason}
            log.warning("sequencer refuses: flows fall back to local order", extra=extra)
        self.last_error = reason
        wait_s = REOPEN_S
        several = self._keys is not None and len(self._keys[1]) > 1
        if several and self._keys is not None and not final:  # its key is being rotated
            self._server = (self._server + 1) % len(self._keys[1])
            wait_s = REOPEN_S if self._server == 0 else 0.0
        if (final or several) and self._again is None:
            self._again = asyncio.get_running_loop().call_later(wait_s, self._reopen)

    def rekey(self, keys: LinkKeys | None) -> None:
        """Take keys read anew: connected again if what stands would be made differently."""
        before, self._keys = self._keys, keys
        if keys is None or before is None or keys == before:
            return
        used = before[1][self._server]
        self._server = keys[1].index(used) if used in keys[1] else 0
        if keys[0] != before[0] or used not in keys[1]:
            if self._again is not None:
                self._again.cancel()
            self._linked(False)
            self._reopen()

    def _reopen(self) -> None:
        self._again = None
        self._watch.stop()
        self._stream.stop()
        self._watch, self._stream = self._open()
        self.start()


class FinPort:
    """The UDP socket that FINs come in on and go out by: broadcast, multicast or unicast."""

    def __init__(
        self,
        section: FinSection,
        keys: tuple[bytes, ...],
        *,
        name: str,
        boot: int,
        on_fin: Callable[[Fin], None],
    ) -> None:
        """Raises IntentdError when the address cannot be bound."""
        host, port = split_address(section.bind, "fin.bind")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.counts: Counter[str] = Counter()
        self.verifier = FinVerifier(keys[0])
        self._signer = FinSigner.from_domain_key(keys[0], name, boot)
        self.set_keys(keys)
        self._interface = section.interface
        self._groups: set[str] = set()
        self._on_fin = on_fin
        self._sock = socket.socket(
            family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            # Agents and sequencer of one host hear the same broadcast.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
            self._sock.bind((host, port))
        except OSError as error:
            self._sock.close()
            raise IntentdError(f"fin.bind: {section.bind}: {error.strerror}") from None
        self.address: tuple[str, int] = self._sock.getsockname()[:2]

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def stop(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def set_keys(self, keys: tuple[bytes, ...]) -> None:
        """Sign with the first from now on, accept what any of them signed."""
        self._signer.set_domain_key(keys[0])
        self.verifier.set_domain_keys(keys)

    def join(self, address: str) -> None:
        """Hear a multicast group; other addresses need nothing. Raises IntentdError."""
        host, _ = split_address(address, "fin_addresses")
        ip = ipaddress.ip_address(host)
        if not ip.is_multicast or host in self._groups:
            return
        try:
            if ip.version == 4:
                local = socket.inet_aton(self._interface or "0.0.0.0")  # noqa: S104  any interface
                self._sock.setsockopt(
                    socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, ip.packed + local
                )
                if self._interface:
                    self._sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, local)
            else:
                group = ip.packed + struct.pack("@I", 0)
                self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
        except OSError as error:
            raise IntentdError(f"fin_addresses: {address}: {error.strerror}") from None
        self._groups.add(host)

    def send(self, item: Broadcast, targets: list[tuple[str, int]]) -> None:
        if not targets:
            return
        datagram = self._signer.sign(item.domain_id, item.epoch, item.runs)
        for target in targets:
            try:
                self._sock.sendto(datagram, target)
            except OSError as error:  # lost like any other datagram: the others ask the sequencer
                self.counts["send_failed"] += 1
                log.debug("FIN not sent", extra={"target": str(target), "reason": str(error)})
            else:
                self.counts["sent"] += 1

    def _readable(self) -> None:
        for _ in range(_DATAGRAMS_A_TURN):
            try:
                datagram = self._sock.recv(MAX_BYTES + 1)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error of an earlier send
                continue
            fin = self.verifier.accept(datagram)
            if fin is not None:
                self._on_fin(fin)


class Turns:
    """All sequenced domains of this agent. ``flush`` sends what a gate has to say."""

    def __init__(self, *, name: str, boot: int, now: Now, released: Released) -> None:
        self._name = name
        self._boot = boot
        self._now = now
        self._released = released
        self._context: Context | None = None
        self._links: dict[tuple[str, str, str], SequencerLink] = {}
        self._fins: FinPort | None = None
        self._fin_section: FinSection | None = None
        self._members: dict[int, Sequenced] = {}
        self._link_of: dict[str, SequencerLink] = {}
        self._targets: dict[str, list[tuple[str, int]]] = {}
        self._unknown_domain = 0

    def set_domains(self, members: list[Sequenced], fin: FinSection) -> None:
        """Serve exactly these domains. Raises IntentdError (keys, addresses) and changes nothing.

        Links that are no longer needed close after their domains have said goodbye.
        """
        # All files are read before anything changes: a wrong one is told, and refuses the whole.
        fin_keys = read_fin_keys(Path(fin.key_file)) if fin.key_file else ()
        link_keys = {_link_key(m.section): _keys_of(m.section) for m in members}
        if fin_keys and members and self._fins is None:
            self._fins = FinPort(
                fin, fin_keys, name=self._name, boot=self._boot, on_fin=self._dispatch
            )
            self._fins.start()
        for member in members:
            for address in member.section.fin_addresses if self._fins is not None else ():
                assert self._fins is not None
                self._fins.join(address)
        links = {_link_key(m.section): self._links.get(_link_key(m.section)) for m in members}
        fresh: list[tuple[str, str, str]] = []
        try:
            for member in members:
                key_of = _link_key(member.section)
                if links[key_of] is None:
                    links[key_of] = self._connect(key_of, member.section, link_keys[key_of])
                    fresh.append(key_of)
        except BaseException:
            for key_of in fresh:
                link = links[key_of]
                assert link is not None
                link.stop()
            raise
        self._swap(members, {k: link for k, link in links.items() if link is not None}, fresh)
        if self._fins is not None and fin_keys:
            self._fins.set_keys(fin_keys)
        for key_of, link in self._links.items():
            link.rekey(link_keys[key_of])

    def _swap(
        self,
        members: list[Sequenced],
        links: dict[tuple[str, str, str], SequencerLink],
        fresh: list[tuple[str, str, str]],
    ) -> None:
        now = self._now()
        before = self._members
        kept = {member.gate.domain_id: member for member in members}
        for domain_id, member in before.items():
            if kept.get(domain_id) is None or kept[domain_id].gate is not member.gate:
                self._released(member.domain, member.gate.goodbye(now=now))
                self.flush(member.domain)
        unused = [link for key, link in self._links.items() if links.get(key) is not link]
        self._members, self._links = kept, links
        self._link_of = {m.domain.name: links[_link_key(m.section)] for m in members}
        self._targets = {
            m.domain.name: [split_address(a, "fin_addresses") for a in m.section.fin_addresses]
            for m in members
        }
        for link in unused:
            link.stop()
        for key in fresh:
            links[key].start()
        for domain_id, member in kept.items():
            link = self._link_of[member.domain.name]
            new = domain_id not in before or before[domain_id].gate is not member.gate
            if link.connected and new:
                self._released(member.domain, member.gate.connected(True, now=now))

    def stop(self) -> None:
        """Say goodbye to the sequencers and close."""
        self._swap([], {}, [])
        if self._fins is not None:
            self._fins.stop()
            self._fins = None
        if self._context is not None:
            context, self._context = self._context, None
            context.destroy(linger=100)

    def flush(self, domain: Domain) -> None:
        """Send the outbox of a domain's gate, if it has a sequencer."""
        link = self._link_of.get(domain.name)
        if link is None:
            return
        gate = domain.gate
        assert isinstance(gate, DomainGate)
        for item in gate.poll_outbox():
            if not isinstance(item, Broadcast):
                link.send(item)
                continue
            # The sequencer hears it on the link, which does not lose; the datagram is for the
            # other agents, whose turn it may be.
            if item.epoch:
                link.send(wire.Finished(item.domain_id, item.epoch, item.runs))
            if self._fins is not None:
                self._fins.send(item, self._targets[domain.name])

    def status(self) -> dict[str, Any]:
        """For the status document."""
        plain: dict[str, Any] = {
            "unknown_domain": self._unknown_domain,
            "links": [
                {
                    "endpoint": link.endpoint,
                    "connected": link.connected,
                    "last_error": link.last_error,
                    **link.counts,
                }
                for link in self._links.values()
            ],
        }
        if self._fins is not None:
            plain["fin"] = {
                "address": "{}:{}".format(*self._fins.address),
                "accepted": self._fins.verifier.accepted,
                "dropped": dict(self._fins.verifier.dropped),
                **self._fins.counts,
            }
        return plain

    def member_status(self, domain: Domain) -> dict[str, Any] | None:
        """State of the domain's membership; None where order is local."""
        gate = domain.gate
        link = self._link_of.get(domain.name)
        if link is None or not isinstance(gate, DomainGate):
            return None
        return {
            "endpoint": link.endpoint,
            "connected": link.connected,
            "state": gate.member.state.value,
            "reason": gate.member.reason,
            "epoch": gate.member.epoch,
            "demoted": gate.demoted,
        }

    def _connect(
        self, key: tuple[str, str, str], section: SequencerSection, keys: LinkKeys | None
    ) -> SequencerLink:
        if self._context is None:
            self._context = zmq.Context(1)
        return SequencerLink(
            self._context,
            section,
            keys,
            on_message=self._dispatch,
            on_connected=lambda up: self._connected(key, up),
        )

    def _connected(self, key: tuple[str, str, str], up: bool) -> None:
        now = self._now()
        for member in list(self._members.values()):
            if _link_key(member.section) == key:
                self._released(member.domain, member.gate.connected(up, now=now))

    def _dispatch(self, message: wire.Message | Fin) -> None:
        member = self._members.get(message_domain(message))
        if member is None:
            self._unknown_domain += 1
            return
        self._released(member.domain, member.gate.handle(message, now=self._now()))


def _keys_of(section: SequencerSection) -> LinkKeys | None:
    """Raises KeyFileError."""
    if not section.key_file:
        return None
    own = read_curve_keys(Path(section.key_file))
    return own, read_curve_publics(Path(section.server_key_file))


def _link_key(section: SequencerSection) -> tuple[str, str, str]:
    return section.endpoint, section.key_file, section.server_key_file
