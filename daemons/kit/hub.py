"""The controller's end of the control link: a ZeroMQ ROUTER and the table of members.

See ``link`` for what is said. Every report is answered with Welcome and with the policies the
member should run and does not; a member that stays silent is counted as gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zmq

from intentd.core.errors import ConfigError, InputError, IntentdError, WireError
from intentd.core.messages import (
    MAX_REASONS,
    MAX_TEXT,
    Answer,
    Goodbye,
    Hello,
    Message,
    NumberedPolicy,
    PolicyAck,
    Question,
    Refusal,
    Report,
    Welcome,
)
from intentd.daemons.kit.codec import decode, encode, limit_socket, policy_order
from intentd.daemons.kit.config import HubSection
from intentd.daemons.kit.keys import CurveKeys, read_allow_list, read_curve_keys
from intentd.daemons.kit.lifecycle import Kit
from intentd.daemons.kit.zap import ZapServer, rekey_server, secure_server, user_key
from intentd.daemons.kit.zmqfd import ZmqStream

_log = logging.getLogger(__name__)

ROLES_OF: Final = {
    "flows": ("agent", "sequencer"),
    "jobs": ("gpu",),
    "prompts": ("proxy",),
}


MAX_QUESTIONS: Final = 64  # without an answer yet


class NoAnswerError(IntentdError):
    """A member was asked and gave no answer: away, too late, or it said why."""


@dataclass
class Member:
    """What the hub knows of one member; the key is (role, name)."""

    role: str
    name: str
    host: str
    version: str
    boot: str
    identity: bytes = field(repr=False)
    capabilities: dict[str, Any]
    policies: dict[str, list[int]]
    joined_s: float
    heard_s: float
    connected: bool = True
    sequence: int = 0
    acks: dict[str, PolicyAck] = field(default_factory=dict)
    last_refusal: str = ""
    curve_key: bytes = b""
    clock_ahead_s: float | None = None  # of this host's, less the way the report took
    unready: list[str] = field(default_factory=list)  # why it is not ready, as it said last
    sent: dict[str, tuple[tuple[int, int], float]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.role, self.name

    def to_plain(self, now: float) -> dict[str, Any]:
        """For status documents."""
        return {
            "role": self.role,
            "name": self.name,
            "host": self.host,
            "version": self.version,
            "boot": self.boot,
            "connected": self.connected,
            "heard_s_ago": round(now - self.heard_s, 3),
            "joined_s_ago": round(now - self.joined_s, 3),
            "reports": self.sequence,
            "policies": self.policies,
            "capabilities": self.capabilities,
            "refused": {
                name: {"policy": [ack.era, ack.number], "reason": ack.reason}
                for name, ack in self.acks.items()
                if not ack.applied
            },
            "last_refusal": self.last_refusal,
            "clock_ahead_s": self.clock_ahead_s,
            "unready": self.unready,
        }


def _nothing(*_: Any) -> None:
    """The default callback."""


class HubLink:
    """The controller's end: the table of members and the newest policy of each application.

    Callbacks run in the loop and must not block: on_hello(member), on_report(member, report),
    on_ack(member, ack), on_goodbye(member, reason) when a member leaves, expires or is replaced.
    ``highest_seen`` is the largest [era, number] any member said it runs: a controller whose store
    is older than that starts a new era above it. While leads() is false nothing is answered: of
    several controllers only one may speak.
    """

    def __init__(
        self,
        section: HubSection,
        kit: Kit,
        *,
        name: str,
        on_hello: Callable[[Member], None] = _nothing,
        on_report: Callable[[Member, Report], None] = _nothing,
        on_ack: Callable[[Member, PolicyAck], None] = _nothing,
        on_goodbye: Callable[[Member, str], None] = _nothing,
        leads: Callable[[], bool] = lambda: True,
    ) -> None:
        self._section = section
        self._leads = leads
        self._kit = kit
        self._name = name
        self._on_hello = on_hello
        self._on_report = on_report
        self._on_ack = on_ack
        self._on_goodbye = on_goodbye
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._stream: ZmqStream | None = None
        self._zap: ZapServer | None = None
        self._allowed: dict[bytes, str] = {}
        self._keys: CurveKeys | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._members: dict[tuple[str, str], Member] = {}
        self._by_identity: dict[bytes, Member] = {}
        self._latest: dict[str, NumberedPolicy] = {}
        self._asked: dict[int, tuple[tuple[str, str], asyncio.Future[dict[str, Any]]]] = {}
        self._questions = 0
        self.highest_seen: dict[str, tuple[int, int]] = {}
        self.endpoint = section.bind
        self._started_s = kit.clock.now()
        kit.link = self

    # -- for the daemon ----------------------------------------------------------------------

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Bind. Raises IntentdError, for example when the port is in use."""
        try:
            self._bind()
        except BaseException:
            await self.stop()
            raise
        tasks.create_task(self._expire_for_ever(), name="hub-expiry")

    def _bind(self) -> None:
        section = self._section
        self._context = zmq.Context(1)
        if section.key_file:
            self._allowed = read_allow_list(Path(section.allow_file))
            self._zap = ZapServer(self._context, self._allowed, self._kit.metrics)
            self._zap.start()
        socket = self._context.socket(zmq.ROUTER)
        limit_socket(socket, section.bind)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            if section.key_file:
                self._keys = read_curve_keys(Path(section.key_file))
                secure_server(socket, self._keys)
            socket.bind(section.bind)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            reason = "in use by another process" if error.errno == zmq.EADDRINUSE else str(error)
            raise IntentdError(f"hub.bind: {section.bind} is not available: {reason}") from None
        except BaseException:
            socket.close(linger=0)
            raise
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._socket = socket
        self._stream = ZmqStream(socket, self._received, frames=True)
        self._stream.start()

    async def stop(self) -> None:
        if self._stream is not None:
            self._stream.stop()
            self._stream = None
        if self._zap is not None:
            self._zap.stop()
            self._zap = None
        if self._context is not None:
            context, self._context = self._context, None
            await asyncio.get_running_loop().run_in_executor(None, context.term)

    def reconfigure(self, section: HubSection) -> None:
        """Take new intervals, limits and allow list. Raises IntentdError, and changes nothing."""
        self.prepare(section)()

    def prepare(self, section: HubSection) -> Callable[[], None]:
        """Check a section and read its files; calling the result swaps. Raises IntentdError."""
        for name in ("bind", "key_file"):
            if getattr(section, name) != getattr(self._section, name):
                raise ConfigError(f"hub.{name}", getattr(section, name), "a restart to change it")
        allowed = read_allow_list(Path(section.allow_file)) if self._zap is not None else None
        keys = read_curve_keys(Path(section.key_file)) if self._zap is not None else None

        def swap() -> None:
            self._section = section
            if self._zap is None or allowed is None:
                return
            if keys is not None and keys != self._keys and self._socket is not None:
                rekey_server(self._socket, keys, self.endpoint)
                self._keys = keys
                _log.info("new CURVE key", extra={"public": keys.public.hex()})
            self._allowed = allowed
            self._zap.allow(allowed)
            for member in self.members():
                if member.connected and self._forbidden(member.curve_key, member.role, member.name):
                    self._refuse(member.identity, "this key was revoked", "denied_key")
                    self._remove(member, "key revoked")

        return swap

    def publish(self, policy: NumberedPolicy) -> None:
        """Make this the newest policy of its application and send it to the members it is for.

        Raises InputError when it is not newer than the one before.
        """
        before = self._latest.get(policy.application)
        if before is not None and policy_order(policy) <= policy_order(before):
            raise InputError(
                "policy.number",
                [policy.era, policy.number],
                f"more than {list(policy_order(before))}",
            )
        encode(policy)  # too large a policy is refused here, whole
        self._latest[policy.application] = policy
        for member in self.members():
            self._send_policies(member)

    async def ask(
        self,
        key: tuple[str, str],
        subject: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float = 5.0,
    ) -> dict[str, Any]:
        """A member's answer to a question. Raises NoAnswerError."""
        name = f"{key[0]}/{key[1]}"
        member = self._members.get(key)
        if member is None or not member.connected:
            raise NoAnswerError(f"{name}: not connected")
        if not member.capabilities.get("answers"):
            raise NoAnswerError(f"{name}: version {member.version} answers no questions")
        if len(self._asked) >= MAX_QUESTIONS:
            raise NoAnswerError(f"{name}: not asked, {MAX_QUESTIONS} questions wait for answers")
        self._questions += 1
        number = self._questions
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[number] = key, future
        try:
            self._send(member.identity, Question(number, subject, body or {}))
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise NoAnswerError(f"{name}: no answer within {timeout_s:g} s") from None
        finally:
            del self._asked[number]

    def _answered(self, member: Member, answer: Answer) -> None:
        key, future = self._asked.get(answer.number, (None, None))
        if future is None or key != member.key or future.done():
            self._kit.metrics.link_dropped.labels("late").inc()
        elif answer.error:
            text = f"{member.role}/{member.name}: {answer.error}"
            future.set_exception(NoAnswerError(text))
        else:
            future.set_result(answer.body)

    def latest(self, application: str) -> NumberedPolicy | None:
        return self._latest.get(application)

    def members(self, role: str | None = None) -> list[Member]:
        """Connected and recently gone members, by role and name."""
        return sorted(
            (m for m in self._members.values() if role is None or m.role == role),
            key=lambda member: member.key,
        )

    def policies(self) -> dict[str, list[int]]:
        return {name: [policy.era, policy.number] for name, policy in self._latest.items()}

    def summary(self) -> dict[str, Any]:
        """The ``controller`` part of the controller's own status document."""
        return {
            "endpoint": self.endpoint,
            "connected": self._stream is not None,
            "since_s": round(self._kit.clock.now() - self._started_s, 3),
            "encrypted": bool(self._section.key_file),
            "members": sum(member.connected for member in self._members.values()),
        }

    # -- messages ----------------------------------------------------------------------------

    def _send(self, identity: bytes, message: Message) -> None:
        kind = type(message).__name__.lower()
        if self._stream is not None and self._stream.send([identity, encode(message)]):
            self._kit.metrics.link_messages.labels("out", kind).inc()
        else:
            self._kit.metrics.link_dropped.labels("queue_full").inc()

    def _refuse(self, identity: bytes, reason: str, counted: str) -> None:
        self._kit.metrics.link_dropped.labels(counted).inc()
        self._send(identity, Refusal(reason[:MAX_TEXT]))

    def _received(self, frames: list[zmq.Frame]) -> None:
        identity = frames[0].bytes
        if not self._leads():
            self._kit.metrics.link_dropped.labels("not_leading").inc()
            return
        try:
            if len(frames) != 2:
                raise WireError(f"message: got {len(frames) - 1} parts, expected 1")
            message = decode(frames[1].bytes)
        except WireError as error:
            self._refuse(identity, str(error), "malformed")
            return
        self._kit.metrics.link_messages.labels("in", type(message).__name__.lower()).inc()
        if isinstance(message, Hello):
            self._greeted(identity, message, user_key(frames[1]))
            return
        member = self._by_identity.get(identity)
        if member is None:
            if not isinstance(message, (Refusal, Goodbye)):
                self._refuse(
                    identity, "say hello first: this controller does not know you", "unknown"
                )
            return
        member.heard_s = self._kit.clock.now()
        if isinstance(message, Report):
            self._reported(member, message)
        elif isinstance(message, PolicyAck):
            self._acked(member, message)
        elif isinstance(message, Answer):
            self._answered(member, message)
        elif isinstance(message, Goodbye):
            self._remove(member, "goodbye")
        elif isinstance(message, Refusal):
            if message.reason != member.last_refusal:
                _log.warning(
                    "member refuses", extra={"member": member.key, "reason": message.reason}
                )
            member.last_refusal = message.reason
        else:
            self._refuse(
                identity, f"{type(message).__name__}: not a message to a controller", "malformed"
            )

    def _greeted(self, identity: bytes, hello: Hello, curve_key: bytes) -> None:
        key = (hello.role, hello.name)
        forbidden = self._forbidden(curve_key, hello.role, hello.name)
        if forbidden:
            self._refuse(identity, forbidden, "forbidden")
            return
        before = self._members.get(key)
        if before is None and len(self._members) >= self._section.max_members:
            self._refuse(identity, f"more than {self._section.max_members} members", "full")
            return
        if before is not None:
            self._by_identity.pop(before.identity, None)
            if before.boot != hello.boot and before.connected and before.identity != identity:
                # A restarted member, or a second one of the same name; either way the newest
                # counts, and the older, if it lives, learns why.
                self._refuse(before.identity, f"replaced by boot {hello.boot}", "replaced")
                self._on_goodbye(before, "replaced")
        now = self._kit.clock.now()
        member = Member(
            hello.role, hello.name, hello.host, hello.version, hello.boot, identity,
            hello.capabilities, _plain_numbers(hello.policies), now, now, curve_key=curve_key,
        )  # fmt: skip
        if before is not None and before.boot == hello.boot:
            member.sequence, member.acks = before.sequence, before.acks
        self._members[key] = self._by_identity[identity] = member
        self._note_seen(member)
        if before is None or before.boot != member.boot or not before.connected:
            _log.info(
                "member joined",
                extra={
                    "member": f"{hello.role}@{hello.name}",
                    "host": hello.host,
                    "boot": hello.boot,
                },
            )
        self._send(identity, self._welcome())
        self._on_hello(member)
        self._send_policies(member)

    def _forbidden(self, curve_key: bytes, role: str, name: str) -> str:
        """Why a key may not speak for this member; empty when it may."""
        if self._zap is None:
            return ""
        permitted = self._allowed.get(curve_key)
        if permitted is None:
            return "this key is not on the allow list"
        if permitted in ("", role, f"{role}@{name}"):
            return ""
        return f"this key is for {permitted}, not for {role}@{name}"

    def _welcome(self) -> Welcome:
        return Welcome(self._name, self._kit.boot, self._section.report_interval_s)

    def _reported(self, member: Member, report: Report) -> None:
        if report.boot != member.boot:
            self._refuse(member.identity, "boot differs: say hello first", "unknown")
            return
        member.policies = _plain_numbers(report.policies)
        self._note_seen(member)
        self._send(member.identity, self._welcome())
        if report.sequence <= member.sequence:
            self._kit.metrics.link_dropped.labels("repeated").inc()
            return
        member.sequence = report.sequence
        wall_s = report.body.pop("wall_s", None)
        if type(wall_s) is float:
            member.clock_ahead_s = wall_s - self._kit.clock.wall()
        member.unready = _reasons(report.body.pop("unready", ()))
        self._on_report(member, report)
        self._send_policies(member)

    def _acked(self, member: Member, ack: PolicyAck) -> None:
        member.acks[ack.application] = ack
        if ack.applied:
            member.policies[ack.application] = [ack.era, ack.number]
        else:
            _log.error(
                "member refused a policy",
                extra={
                    "member": f"{member.role}@{member.name}",
                    "application": ack.application,
                    "policy": [ack.era, ack.number],
                    "reason": ack.reason,
                },
            )
        self._on_ack(member, ack)

    def _send_policies(self, member: Member) -> None:
        """Send what the member should run and does not, unless it refused exactly that."""
        if not member.connected:
            return
        for application, policy in self._latest.items():
            if member.role not in ROLES_OF[application]:
                continue
            runs = tuple(member.policies.get(application, (-1, -1)))
            ack = member.acks.get(application)
            wanted = policy_order(policy)
            refused = ack is not None and not ack.applied and policy_order(ack) == wanted
            if runs >= wanted or refused:
                continue
            sent, sent_s = member.sent.get(application, ((-1, -1), 0.0))
            now = self._kit.clock.now()
            # A report may cross the policy on its way: give the ack one interval.
            if sent < wanted or now - sent_s >= self._section.report_interval_s:
                member.sent[application] = (wanted, now)
                self._send(member.identity, policy)

    def _note_seen(self, member: Member) -> None:
        for application, (era, number) in member.policies.items():
            seen = self.highest_seen.get(application, (-1, -1))
            self.highest_seen[application] = max(seen, (era, number))

    # -- expiry ------------------------------------------------------------------------------

    async def _expire_for_ever(self) -> None:
        while True:
            await self._kit.clock.sleep(self._section.report_interval_s)
            self.expire()

    def expire(self) -> None:
        """Mark silent members as gone; forget those gone for ten times as long."""
        now = self._kit.clock.now()
        limit_s = self._section.expiry_intervals * self._section.report_interval_s
        for member in list(self._members.values()):
            silent_s = now - member.heard_s
            if member.connected and silent_s > limit_s:
                self._remove(member, "silent")
            elif not member.connected and silent_s > 10 * limit_s:
                self._members.pop(member.key, None)

    def _remove(self, member: Member, reason: str) -> None:
        member.connected = False
        self._by_identity.pop(member.identity, None)
        _log.warning(
            "member gone", extra={"member": f"{member.role}@{member.name}", "reason": reason}
        )
        self._on_goodbye(member, reason)


def _reasons(said: object) -> list[str]:
    """What a report says of readiness; anything but text is passed over."""
    if not isinstance(said, list):
        return []
    return [reason[:MAX_TEXT] for reason in said[:MAX_REASONS] if isinstance(reason, str)]


def _plain_numbers(policies: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: list(pair) for name, pair in policies.items()}
