"""The control plane's link: members (ZeroMQ DEALER) and the controller's hub (ROUTER).

A member says Hello, gets Welcome, reports on a timer and receives whole numbered policies, each
answered with an ack. Every report is answered with Welcome, so both sides know the other lives; a
member that hears nothing for three intervals, or is told it is unknown, greets again. The last
policy of each application is kept in the member's state directory and applied again at start.

Queues are bounded (QUEUE messages each way and peer). A full one drops the message and counts it:
the next report repairs it, for reports are cumulative and policies are sent again until acked.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgpack
import zmq

import intentd
from intentd.core.errors import ConfigError, InputError, IntentdError, WireError
from intentd.core.messages import (
    APPLICATIONS,
    MAX_TEXT,
    Goodbye,
    Hello,
    Message,
    NumberedPolicy,
    PolicyAck,
    Refusal,
    Report,
    Welcome,
    from_plain,
    to_plain,
)
from intentd.daemons.kit.config import ControllerSection, DaemonConfig, HubSection
from intentd.daemons.kit.files import write_atomically
from intentd.daemons.kit.keys import (
    CurveKeys,
    read_allow_list,
    read_curve_keys,
    read_curve_public,
)
from intentd.daemons.kit.lifecycle import Kit
from intentd.daemons.kit.zap import ZapServer, secure_client, secure_server, user_key
from intentd.daemons.kit.zmqfd import ZmqStream

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 4 << 20
MAX_ITEMS: Final = 1 << 18  # entries of one array or map
QUEUE: Final = 64
SILENCE_INTERVALS: Final = 3
GOODBYE_LINGER_MS: Final = 200
ROLES_OF: Final = {
    "flows": ("agent", "sequencer"),
    "jobs": ("gpu",),
    "prompts": ("proxy",),
}


def encode(message: Message) -> bytes:
    """Raises WireError when the message is larger than a receiver accepts."""
    data: bytes = msgpack.packb(to_plain(message))
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message: {len(data)} bytes, expected at most {MAX_MESSAGE_BYTES}")
    return data


def decode(data: bytes) -> Message:
    """Raises WireError for anything that is not a message of ours."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message: {len(data)} bytes, expected at most {MAX_MESSAGE_BYTES}")
    try:
        plain = msgpack.unpackb(
            data,
            strict_map_key=True,
            max_str_len=MAX_MESSAGE_BYTES,
            max_bin_len=MAX_MESSAGE_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise WireError(f"message: not msgpack within bounds ({error!s:.80})") from None
    return from_plain(plain)


class LinkState(enum.Enum):
    """OFF: disabled or stopped. GREETING: Hello sent. JOINED: the controller answers."""

    OFF = "off"
    GREETING = "greeting"
    JOINED = "joined"


OnPolicy = Callable[[NumberedPolicy], PolicyAck | Awaitable[PolicyAck]]


class MemberLink:
    """A member's end. on_policy applies a policy and says what became of it; an InputError it
    raises is a refusal too. collect_report returns the body of the next report."""

    def __init__(
        self,
        config: DaemonConfig,
        kit: Kit,
        *,
        on_policy: OnPolicy,
        collect_report: Callable[[], dict[str, Any]],
        capabilities: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._config = config
        self._section = config.controller
        self._kit = kit
        self._on_policy = on_policy
        self._collect_report = collect_report
        self._capabilities = capabilities
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._stream: ZmqStream | None = None
        self._applied: dict[str, NumberedPolicy] = {}
        self._pending: dict[str, NumberedPolicy] = {}
        self._unsaved: set[str] = set()
        self._save_failure = ""
        self._news = asyncio.Event()  # something for _run to look at
        self._work = asyncio.Event()  # a policy waits for _apply_all
        self._state = LinkState.OFF
        self._since_s = kit.clock.now()
        self._heard_s = kit.clock.now()
        self._sequence = 0
        self._hub_boot = ""
        self._interval_s = self._section.report_interval_s
        self._last_error = ""
        self._refused = False
        self._report_now = False
        self._keys: tuple[CurveKeys, bytes] | None = None
        self._running: list[asyncio.Task[None]] = []
        kit.link = self

    # -- for the daemon ----------------------------------------------------------------------

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Apply the policies kept from the last run, then connect. Raises IntentdError."""
        for application in APPLICATIONS:
            await self._restore(application)
        self._running.append(tasks.create_task(self._apply_all(), name="link-policies"))
        if self._section.enabled:
            try:
                self._keys = _client_keys(self._section)  # once: files may vanish while we run
                self._open()
            except BaseException:
                await self.stop()
                raise
            self._running.append(tasks.create_task(self._run(), name="link"))

    async def stop(self) -> None:
        """Say goodbye and close."""
        for task in self._running:
            task.cancel()
        self._running.clear()
        if self._stream is not None:
            stream, self._stream = self._stream, None
            if self._state is LinkState.JOINED:
                stream.send([encode(Goodbye(self._kit.boot))])
            stream.stop(linger_ms=GOODBYE_LINGER_MS)
        self._enter(LinkState.OFF)
        if self._context is not None:
            context, self._context = self._context, None
            await asyncio.get_running_loop().run_in_executor(None, context.term)

    def reconfigure(self, section: ControllerSection) -> None:
        """Take a changed section: checked first, then connected anew. Raises IntentdError."""
        if section == self._section:
            return
        if section.enabled != self._section.enabled:
            raise ConfigError("controller.enabled", section.enabled, "a restart to change it")
        self._keys = _client_keys(section)
        self._section = section
        if self._stream is not None:
            self._close()
            self._open()
            self._enter(LinkState.GREETING)
            self._news.set()

    def report_soon(self) -> None:
        """Report now, not at the next interval (something changed)."""
        self._report_now = True
        self._news.set()

    def policies(self) -> dict[str, list[int]]:
        return {name: [policy.era, policy.number] for name, policy in self._applied.items()}

    def applied(self, application: str) -> NumberedPolicy | None:
        return self._applied.get(application)

    @property
    def connected(self) -> bool:
        return self._state is LinkState.JOINED

    def unready(self) -> list[str]:
        """A policy that could not be kept on disk. An absent controller is no reason."""
        return [self._save_failure] if self._save_failure else []

    def summary(self) -> dict[str, Any]:
        """The ``controller`` part of the status document."""
        return {
            "endpoint": self._section.endpoint,
            "connected": self.connected,
            "state": self._state.value,
            "since_s": round(self._kit.clock.now() - self._since_s, 3),
            "encrypted": bool(self._section.key_file),
            "reports": self._sequence,
            "last_error": self._last_error,
        }

    # -- connection --------------------------------------------------------------------------

    def _open(self) -> None:
        section = self._section
        if self._context is None:
            self._context = zmq.Context(1)
        socket = self._context.socket(zmq.DEALER)
        try:
            bound_socket(socket, section.endpoint)
            socket.setsockopt(zmq.RECONNECT_IVL, max(1, int(section.backoff_min_s * 1000)))
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, max(1, int(section.backoff_max_s * 1000)))
            if self._keys is not None:
                secure_client(socket, *self._keys)
            socket.connect(section.endpoint)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise IntentdError(f"controller.endpoint: {section.endpoint}: {error}") from None
        except BaseException:
            socket.close(linger=0)
            raise
        self._stream = ZmqStream(socket, self._received)
        self._stream.start()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.stop()
            self._stream = None

    async def _run(self) -> None:
        """Greet, report while answered, and greet again; for ever."""
        wait_s = self._section.backoff_min_s
        while True:
            self._enter(LinkState.GREETING)
            self._say_hello()
            limit_s = self._section.backoff_max_s * self._kit.rng.uniform(0.75, 1.25)
            if not await self._answered(limit_s):
                if not self._refused:  # nobody there: a fresh socket looks the name up again
                    self._close()
                    self._open()
                    continue
                self._refused = False
                await self._kit.clock.sleep(wait_s * self._kit.rng.uniform(0.5, 1.5))
                wait_s = min(2 * wait_s, self._section.backoff_max_s)
                continue
            joined_s = self._kit.clock.now()
            await self._report_while_answered()
            if self._kit.clock.now() - joined_s > 2 * self._interval_s:
                wait_s = self._section.backoff_min_s
                continue
            # Welcomed and cut off at once, as two members of one name do to each other.
            await self._kit.clock.sleep(wait_s * self._kit.rng.uniform(0.5, 1.5))
            wait_s = min(2 * wait_s, self._section.backoff_max_s)

    async def _answered(self, limit_s: float) -> bool:
        deadline = self._kit.clock.now() + limit_s
        while self._state is LinkState.GREETING and not self._refused:
            left = deadline - self._kit.clock.now()
            if left <= 0:
                return False
            await self._wait(left)
        return self._state is LinkState.JOINED

    async def _report_while_answered(self) -> None:
        """Until silence, a refusal or another controller; the first report goes at once."""
        due = self._kit.clock.now()
        while self._state is LinkState.JOINED:
            now = self._kit.clock.now()
            if now - self._heard_s > SILENCE_INTERVALS * self._interval_s:
                self._last_error = "no answer"
                self._close()
                self._open()
                return
            if now >= due or self._report_now:
                self._report_now = False
                self._say_report()
                self._save_again()
                due = now + self._interval_s * self._kit.rng.uniform(0.95, 1.05)
            await self._wait(due - now)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self._news.wait()
        self._news.clear()

    def _enter(self, state: LinkState) -> None:
        if state is self._state:
            return
        was, self._state = self._state, state
        self._since_s = self._kit.clock.now()
        self._kit.metrics.link_connected.set(float(state is LinkState.JOINED))
        if state is LinkState.JOINED:
            _log.info("controller answers", extra={"endpoint": self._section.endpoint})
        elif was is LinkState.JOINED and state is LinkState.GREETING:
            _log.warning(
                "controller away: keeping the last policy",
                extra={"endpoint": self._section.endpoint, "error": self._last_error},
            )

    # -- messages ----------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        kind = type(message).__name__.lower()
        try:
            data = encode(message)
        except (WireError, ValueError, TypeError, OverflowError) as error:
            self._kit.metrics.link_dropped.labels("unencodable").inc()
            _log.error("message not sent", extra={"type": kind, "error": str(error)})
            return
        if self._stream is not None and self._stream.send([data]):
            self._kit.metrics.link_messages.labels("out", kind).inc()
        else:
            self._kit.metrics.link_dropped.labels("queue_full").inc()

    def _say_hello(self) -> None:
        config = self._config
        self._send(
            Hello(
                role=config.role,
                host=config.host,
                name=config.name,
                version=intentd.__version__,
                boot=self._kit.boot,
                policies=self.policies(),
                capabilities=self._capabilities(),
            )
        )

    def _say_report(self) -> None:
        self._sequence += 1
        self._send(Report(self._kit.boot, self._sequence, self.policies(), self._collect_report()))

    def _received(self, parts: list[bytes]) -> None:
        try:
            if len(parts) != 1:
                raise WireError(f"message: got {len(parts)} parts, expected 1")
            message = decode(parts[0])
            if not isinstance(message, (Welcome, NumberedPolicy, Refusal)):
                raise WireError(f"{type(message).__name__}: not a message to a member")
        except WireError as error:
            self._kit.metrics.link_dropped.labels("malformed").inc()
            self._last_error = str(error)
            self._send(Refusal(str(error)[:MAX_TEXT]))
            return
        kind = type(message).__name__.lower()
        self._kit.metrics.link_messages.labels("in", kind).inc()
        self._heard_s = self._kit.clock.now()
        if isinstance(message, Welcome):
            self._welcomed(message)
        elif isinstance(message, NumberedPolicy):
            self._offered(message)
        else:
            if message.reason != self._last_error:  # once a reason, not once a message
                _log.warning("controller refuses", extra={"reason": message.reason})
            self._last_error = message.reason
            self._refused = self._state is LinkState.GREETING
            self._enter(LinkState.GREETING)
            self._news.set()

    def _welcomed(self, message: Welcome) -> None:
        if not 0.01 <= message.report_interval_s <= 3600:
            self._kit.metrics.link_dropped.labels("malformed").inc()
            return
        self._interval_s = message.report_interval_s
        if self._state is LinkState.JOINED and message.boot != self._hub_boot:
            self._last_error = "another controller answers"
            self._enter(LinkState.GREETING)
        else:
            self._enter(LinkState.JOINED)
        self._hub_boot = message.boot
        self._news.set()

    # -- policies ----------------------------------------------------------------------------

    def _offered(self, policy: NumberedPolicy) -> None:
        """Keep the newest of each application for _apply_all."""
        if policy.application in self._pending and _order(policy) <= _order(
            self._pending[policy.application]
        ):
            return
        self._pending[policy.application] = policy
        self._work.set()

    async def _apply_all(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            for application in list(self._pending):
                policy = self._pending.pop(application)
                ack = await self._apply(policy)
                if self._state is LinkState.JOINED:
                    self._send(ack)

    async def _apply(self, policy: NumberedPolicy) -> PolicyAck:
        running = self._applied.get(policy.application)
        if running is not None and _order(policy) <= _order(running):
            same = _order(policy) == _order(running)
            reason = "" if same else f"runs newer [{running.era}, {running.number}]"
            return PolicyAck(policy.application, policy.era, policy.number, same, reason)
        ack = await self._try(policy)
        if ack.applied:
            self._applied[policy.application] = policy
            self._kit.metrics.link_policy.labels(policy.application).set(policy.number)
            self._unsaved.add(policy.application)
            self._save_again()
            _log.info("policy applied", extra=_ids(policy))
        else:
            _log.error("policy refused", extra={**_ids(policy), "reason": ack.reason})
        return ack

    async def _try(self, policy: NumberedPolicy) -> PolicyAck:
        try:
            answer = self._on_policy(policy)
            return await answer if inspect.isawaitable(answer) else answer
        except IntentdError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  a crash would come back with every restart
            self._kit.metrics.errors.labels("policy").inc()
            _log.exception("policy could not be applied", extra=_ids(policy))
            reason = f"internal error: {type(error).__name__}: {error}"
        return PolicyAck(policy.application, policy.era, policy.number, False, reason[:MAX_TEXT])

    def _file(self, application: str) -> Path:
        return self._config.state_dir / f"{self._config.role}-policy-{application}.msgpack"

    def _save_again(self) -> None:
        """Write what is not yet on disk; a full disk is told and tried again at each report."""
        for application in list(self._unsaved):
            try:
                write_atomically(self._file(application), encode(self._applied[application]))
            except OSError as error:
                self._save_failure = f"policy not kept on disk: {error.strerror}"
                self._kit.metrics.errors.labels("policy_save").inc()
                return
            self._unsaved.discard(application)
        self._save_failure = ""

    async def _restore(self, application: str) -> None:
        path = self._file(application)
        try:
            with path.open("rb") as file:
                policy = decode(file.read(MAX_MESSAGE_BYTES + 1))
            if not isinstance(policy, NumberedPolicy) or policy.application != application:
                raise WireError("not a policy of this application")
        except FileNotFoundError:
            return
        except (OSError, WireError) as error:
            self._kit.metrics.errors.labels("policy_restore").inc()
            _log.error("kept policy ignored", extra={"path": str(path), "error": str(error)})
            return
        ack = await self._try(policy)
        if ack.applied:
            self._applied[application] = policy
            self._kit.metrics.link_policy.labels(application).set(policy.number)
            _log.info("kept policy applied", extra=_ids(policy))
        else:
            self._kit.metrics.errors.labels("policy_restore").inc()
            _log.error("kept policy refused", extra={**_ids(policy), "reason": ack.reason})


def _order(policy: NumberedPolicy | PolicyAck) -> tuple[int, int]:
    return policy.era, policy.number


def _ids(policy: NumberedPolicy) -> dict[str, Any]:
    return {"application": policy.application, "era": policy.era, "number": policy.number}


def _client_keys(section: ControllerSection) -> tuple[CurveKeys, bytes] | None:
    if not section.key_file:
        return None
    return read_curve_keys(Path(section.key_file)), read_curve_public(Path(section.server_key_file))


def bound_socket(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Limits every control-plane socket has."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, QUEUE)
    socket.setsockopt(zmq.RCVHWM, QUEUE)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)


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
        }


def _nothing(*_: Any) -> None:
    """The default callback."""


class HubLink:
    """The controller's end: the table of members and the newest policy of each application.

    Callbacks run in the loop and must not block: on_hello(member), on_report(member, report),
    on_ack(member, ack), on_goodbye(member, reason) when a member leaves, expires or is replaced.
    ``highest_seen`` is the largest [era, number] any member said it runs: a controller whose store
    is older than that starts a new era above it.
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
    ) -> None:
        self._section = section
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
        self._members: dict[tuple[str, str], Member] = {}
        self._by_identity: dict[bytes, Member] = {}
        self._latest: dict[str, NumberedPolicy] = {}
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
        bound_socket(socket, section.bind)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            if section.key_file:
                secure_server(socket, read_curve_keys(Path(section.key_file)))
            socket.bind(section.bind)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            reason = "in use by another process" if error.errno == zmq.EADDRINUSE else str(error)
            raise IntentdError(f"hub.bind: {section.bind} is not available: {reason}") from None
        except BaseException:
            socket.close(linger=0)
            raise
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
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
        """Take new intervals, limits and allow list; the address and key need a restart."""
        for name in ("bind", "key_file"):
            if getattr(section, name) != getattr(self._section, name):
                raise ConfigError(f"hub.{name}", getattr(section, name), "a restart to change it")
        if self._zap is not None:
            self._allowed = read_allow_list(Path(section.allow_file))
            self._zap.allow(self._allowed)
            for member in self.members():
                if member.connected and self._forbidden(member.curve_key, member.role, member.name):
                    self._refuse(member.identity, "this key was revoked", "denied_key")
                    self._remove(member, "key revoked")
        self._section = section

    def publish(self, policy: NumberedPolicy) -> None:
        """Make this the newest policy of its application and send it to the members it is for.

        Raises InputError when it is not newer than the one before.
        """
        before = self._latest.get(policy.application)
        if before is not None and _order(policy) <= _order(before):
            raise InputError(
                "policy.number", [policy.era, policy.number], f"more than {list(_order(before))}"
            )
        encode(policy)  # too large a policy is refused here, whole
        self._latest[policy.application] = policy
        for member in self.members():
            self._send_policies(member)

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
            refused = ack is not None and not ack.applied and _order(ack) == _order(policy)
            if runs >= _order(policy) or refused:
                continue
            sent, sent_s = member.sent.get(application, ((-1, -1), 0.0))
            now = self._kit.clock.now()
            # A report may cross the policy on its way: give the ack one interval.
            if sent < _order(policy) or now - sent_s >= self._section.report_interval_s:
                member.sent[application] = (_order(policy), now)
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


def _plain_numbers(policies: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: list(pair) for name, pair in policies.items()}
