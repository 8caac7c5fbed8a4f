"""A member's end of the control link: a ZeroMQ DEALER to the controller's hub (``hub``).

A member of several controllers (a pair) greets them all; only the one that leads answers, and its
line is kept. When that one is cut off or owes an answer, the others are asked again.

A member says Hello, gets Welcome, reports on a timer and receives whole numbered policies, each
answered with an ack. Every report is answered with Welcome, so both sides know the other lives; a
member that hears nothing for three intervals, or is told it is unknown, greets again. The last
policy of each application is kept in the member's state directory and applied again at start.

Queues are bounded (``codec.QUEUE`` messages each way and peer). A full one drops the message and
counts it: the next report repairs it, for reports are cumulative and policies are sent again until
acked.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
import logging
from collections.abc import Awaitable, Callable, Container
from pathlib import Path
from typing import Any, Final

import zmq

import intentd
from intentd.core.errors import ConfigError, IntentdError, WireError
from intentd.core.messages import (
    APPLICATIONS,
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
from intentd.daemons.kit.codec import MAX_MESSAGE_BYTES, decode, encode, policy_order
from intentd.daemons.kit.config import ControllerSection, DaemonConfig
from intentd.daemons.kit.files import write_atomically
from intentd.daemons.kit.keys import (
    CurveKeys,
    read_curve_keys,
    read_curve_publics,
)
from intentd.daemons.kit.lifecycle import Kit
from intentd.daemons.kit.line import Line

_log = logging.getLogger(__name__)

SILENCE_INTERVALS: Final = 3
# Of several controllers: before the others are asked too; before all are asked again.
ANSWER_S: Final = 1.0
GREET_AGAIN_S: Final = 2.0
GOODBYE_LINGER_MS: Final = 200
MAX_QUESTIONS: Final = 8  # answered at a time


class LinkState(enum.Enum):
    """OFF: disabled or stopped. GREETING: Hello sent. JOINED: the controller answers."""

    OFF = "off"
    GREETING = "greeting"
    JOINED = "joined"


OnQuestion = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
# our own pair, and the keys of the other side: one, or two while it is rotated
ClientKeys = tuple[CurveKeys, tuple[bytes, ...]]
OnPolicy = Callable[[NumberedPolicy], PolicyAck | Awaitable[PolicyAck]]


class MemberLink:
    """A member's end. on_policy applies a policy and says what became of it; an InputError it
    raises is a refusal too. collect_report returns the body of the next report. on_question
    answers what the controller asks, by subject; an IntentdError it raises is told."""

    def __init__(
        self,
        config: DaemonConfig,
        kit: Kit,
        *,
        on_policy: OnPolicy,
        collect_report: Callable[[], dict[str, Any]],
        capabilities: Callable[[], dict[str, Any]] = dict,
        on_question: OnQuestion | None = None,
    ) -> None:
        self._on_question = on_question
        self._tasks: asyncio.TaskGroup | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._config = config
        self._section = config.controller
        self._kit = kit
        self._on_policy = on_policy
        self._collect_report = collect_report
        self._capabilities = capabilities
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._lines: dict[str, Line] = {}  # endpoint -> a connection, or one that is tried
        self._joined: Line | None = None  # where the controller answers
        self._asked_s: float | None = None  # since when it owes an answer
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
        self._keys: ClientKeys | None = None
        self._server: dict[str, int] = {}  # endpoint -> which of the controller's keys is tried
        self._running: list[asyncio.Task[None]] = []
        kit.link = self

    # -- for the daemon ----------------------------------------------------------------------

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Apply the policies kept from the last run, then connect. Raises IntentdError."""
        self._tasks = tasks
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
        for task in (*self._running, *self._answering):
            task.cancel()
        self._running.clear()
        if self._joined is not None and self._state is LinkState.JOINED:
            self._joined.stream.send([encode(Goodbye(self._kit.boot))])
            self._joined.stop(linger_ms=GOODBYE_LINGER_MS)
        self._close()
        self._enter(LinkState.OFF)
        if self._context is not None:
            context, self._context = self._context, None
            await asyncio.get_running_loop().run_in_executor(None, context.term)

    def reconfigure(self, section: ControllerSection) -> None:
        """Take a changed section: connected anew, then swapped. Raises IntentdError and changes
        nothing."""
        keys = _client_keys(section) if section.enabled else None
        if section == self._section and self._same_connection(keys):
            self._keys = keys
            return
        if section.enabled != self._section.enabled:
            raise ConfigError("controller.enabled", section.enabled, "a restart to change it")
        self._server.clear()
        fresh = self._connect(section, keys) if self._lines else None
        self._keys, self._section = keys, section
        if fresh is not None:
            self._close()
            self._use(fresh)
            self._enter(LinkState.GREETING)
            self._news.set()

    def _same_connection(self, keys: ClientKeys | None) -> bool:
        """Whether what stands would be made the same; if so, each server key keeps its place."""
        if keys is None or self._keys is None:
            return keys is self._keys
        used = {endpoint: self._keys[1][index] for endpoint, index in self._server.items()}
        used |= {end: self._keys[1][0] for end in self._lines if end not in used}
        if keys[0] != self._keys[0] or not set(used.values()) <= set(keys[1]):
            return False
        self._server = {endpoint: keys[1].index(key) for endpoint, key in used.items()}
        return True

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
            "endpoint": self._joined.endpoint if self._joined else self._section.endpoint,
            "connected": self.connected,
            "state": self._state.value,
            "since_s": round(self._kit.clock.now() - self._since_s, 3),
            "encrypted": bool(self._section.key_file),
            "reports": self._sequence,
            "last_error": self._last_error,
        }

    # -- connection --------------------------------------------------------------------------

    def _open(self) -> None:
        """Have a line to every endpoint."""
        self._use(self._connect(self._section, self._keys, but=self._lines))

    def _connect(
        self,
        section: ControllerSection,
        keys: ClientKeys | None,
        but: Container[str] = (),
    ) -> list[Line]:
        """Lines to the endpoints but these, not read yet. Raises IntentdError."""
        if self._context is None:
            self._context = zmq.Context(1)
        made: list[Line] = []
        try:
            for endpoint in section.endpoints:
                if endpoint not in but:
                    line = Line(
                        self._context,
                        endpoint,
                        section,
                        keys and (keys[0], keys[1][self._server.get(endpoint, 0)]),
                        on_message=self._received,
                        on_refused=self._no_handshake,
                        on_cut=self._cut,
                    )
                    made.append(line)
        except BaseException:
            for line in made:
                line.stop()
            raise
        return made

    def _use(self, lines: list[Line]) -> None:
        for line in lines:
            self._lines[line.endpoint] = line
            line.start()

    def _close(self) -> None:
        for line in self._lines.values():
            line.stop()
        self._lines.clear()
        self._joined = None

    def _keep_only(self, line: Line) -> None:
        """Of several lines keep the one whose controller answers."""
        for endpoint, other in list(self._lines.items()):
            if other is not line:
                del self._lines[endpoint]
                other.stop()

    def _cut(self, line: Line) -> None:
        """The connection ended: of several controllers, another may lead now."""
        if line is self._joined and self._several:
            self._last_error = "connection ended"
            self._enter(LinkState.GREETING)
            self._news.set()

    def _no_handshake(self, line: Line, reason: str, final: bool) -> None:
        self._refuse(f"controller.{reason}" if "key_file" in reason else reason)
        several = self._keys is not None and len(self._keys[1]) > 1
        if several and self._keys is not None and not final:  # its key is being rotated
            tried = self._server.get(line.endpoint, 0)
            self._server[line.endpoint] = (tried + 1) % len(self._keys[1])
            if line is self._joined:
                self._enter(LinkState.GREETING)
                self._news.set()
        line.shut_out = line.shut_out or final or several
        if line.shut_out and all(other.shut_out for other in self._lines.values()):
            self._news.set()

    @property
    def _several(self) -> bool:
        return len(self._section.endpoints) > 1

    @property
    def _shut_out(self) -> bool:
        """Whether no line will connect any more."""
        return bool(self._lines) and all(line.shut_out for line in self._lines.values())

    async def _run(self) -> None:
        """Greet, report while answered, and greet again; for ever."""
        wait_s = self._section.backoff_min_s
        while True:
            self._enter(LinkState.GREETING)
            self._joined = None
            self._open()
            self._say_hello()
            most_s = self._section.backoff_max_s
            if self._several:  # a greeting may end at one that was about to lead no more
                most_s = min(most_s, GREET_AGAIN_S)
            limit_s = most_s * self._kit.rng.uniform(0.75, 1.25)
            if not await self._answered(limit_s):
                nobody = not (self._refused or self._shut_out)
                if not nobody:
                    self._refused = False
                    await self._kit.clock.sleep(wait_s * self._kit.rng.uniform(0.5, 1.5))
                    wait_s = min(2 * wait_s, self._section.backoff_max_s)
                if nobody or self._shut_out:  # a fresh socket also looks the name up again
                    self._close()
                    self._open()
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
        while self._state is LinkState.GREETING and not (self._refused or self._shut_out):
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
                self._asked_s = self._asked_s or now
                self._save_again()
                due = now + self._interval_s * self._kit.rng.uniform(0.95, 1.05)
            await self._wait(min(due, self._ask_others(now, due)) - now)

    def _ask_others(self, now: float, due: float) -> float:
        """Greet the other controllers when this one owes an answer; when to look again.

        The member stays where it is until another one welcomes it.
        """
        if not self._several or self._asked_s is None or len(self._lines) > 1:
            return due
        if now < self._asked_s + ANSWER_S:
            return self._asked_s + ANSWER_S
        self._open()
        for line in self._lines.values():
            if line is not self._joined:
                self._send(self._hello(), line)
        return due

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
            endpoint = self._joined.endpoint if self._joined else ""
            _log.info("controller answers", extra={"endpoint": endpoint})
        elif was is LinkState.JOINED and state is LinkState.GREETING:
            _log.warning(
                "controller away: keeping the last policy",
                extra={"endpoint": self._section.endpoint, "error": self._last_error},
            )

    # -- messages ----------------------------------------------------------------------------

    def _send(self, message: Message, line: Line | None = None) -> None:
        """To the controller that answers, or on this line."""
        line = line or self._joined
        kind = type(message).__name__.lower()
        try:
            data = encode(message)
        except (WireError, ValueError, TypeError, OverflowError) as error:
            self._kit.metrics.link_dropped.labels("unencodable").inc()
            _log.error("message not sent", extra={"type": kind, "error": str(error)})
            return
        if line is not None and line.stream.send([data]):
            self._kit.metrics.link_messages.labels("out", kind).inc()
        else:
            self._kit.metrics.link_dropped.labels("queue_full").inc()

    def _say_hello(self) -> None:
        for line in self._lines.values():
            self._send(self._hello(), line)

    def _hello(self) -> Hello:
        config = self._config
        return Hello(
            role=config.role,
            host=config.host,
            name=config.name,
            version=intentd.__version__,
            boot=self._kit.boot,
            policies=self.policies(),
            capabilities={
                **self._capabilities(),
                **({"answers": True} if self._on_question is not None else {}),
            },
        )

    def _say_report(self) -> None:
        self._sequence += 1
        body = {
            **self._collect_report(),
            "wall_s": self._kit.clock.wall(),
            "unready": [reason[:MAX_TEXT] for reason in self._kit.unready()[:MAX_REASONS]],
        }
        if changes := self._kit.changes.to_plain():
            body["changes"] = changes
        self._send(Report(self._kit.boot, self._sequence, self.policies(), body))

    def _received(self, line: Line, parts: list[bytes]) -> None:
        try:
            if len(parts) != 1:
                raise WireError(f"message: got {len(parts)} parts, expected 1")
            message = decode(parts[0])
            if not isinstance(message, (Welcome, NumberedPolicy, Refusal, Question)):
                raise WireError(f"{type(message).__name__}: not a message to a member")
        except WireError as error:
            self._kit.metrics.link_dropped.labels("malformed").inc()
            self._last_error = str(error)
            self._send(Refusal(str(error)[:MAX_TEXT]), line)
            return
        kind = type(message).__name__.lower()
        self._kit.metrics.link_messages.labels("in", kind).inc()
        if line is self._joined or self._joined is None:
            self._heard_s = self._kit.clock.now()
            self._asked_s = None
        if isinstance(message, Welcome):
            self._welcomed(line, message)
        elif isinstance(message, NumberedPolicy):
            self._offered(message)
        elif isinstance(message, Question):
            self._asked(message)
        elif line is self._joined or self._joined is None:
            self._refuse(message.reason)
            self._refused = self._state is LinkState.GREETING
            self._enter(LinkState.GREETING)
            self._news.set()

    def _refuse(self, reason: str) -> None:
        if reason != self._last_error:  # once a reason, not once a message
            endpoint = self._section.endpoint
            _log.warning("controller refuses", extra={"endpoint": endpoint, "reason": reason})
        self._last_error = reason

    def _welcomed(self, line: Line, message: Welcome) -> None:
        if not 0.01 <= message.report_interval_s <= 3600:
            self._kit.metrics.link_dropped.labels("malformed").inc()
            return
        self._interval_s = message.report_interval_s
        if line is not self._joined:
            self._joined = line
            self._heard_s, self._asked_s = self._kit.clock.now(), None
            self._report_now = True
            self._enter(LinkState.JOINED)
        elif self._state is LinkState.JOINED and message.boot != self._hub_boot:
            self._last_error = "another controller answers"
            self._enter(LinkState.GREETING)
        else:
            self._enter(LinkState.JOINED)
        self._keep_only(line)
        self._hub_boot = message.boot
        self._news.set()

    # -- questions ---------------------------------------------------------------------------

    def _asked(self, question: Question) -> None:
        if self._on_question is None or self._tasks is None:
            self._send(Answer(question.number, error="this member answers no questions"))
        elif len(self._answering) >= MAX_QUESTIONS:
            self._send(Answer(question.number, error=f"busy with {MAX_QUESTIONS} questions"))
        else:
            task = self._tasks.create_task(
                self._answer(self._on_question, question), name="link-question"
            )
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(self, on_question: OnQuestion, question: Question) -> None:
        try:
            answer = Answer(question.number, await on_question(question.subject, question.body))
            encode(answer)
        except (IntentdError, WireError, TypeError, ValueError, OverflowError) as error:
            answer = Answer(question.number, error=str(error)[:MAX_TEXT] or type(error).__name__)
        except Exception as error:  # noqa: BLE001  a question must not end the daemon
            self._kit.metrics.errors.labels("question").inc()
            _log.exception("question could not be answered", extra={"subject": question.subject})
            answer = Answer(question.number, error=f"internal error: {type(error).__name__}")
        self._send(answer)

    # -- policies ----------------------------------------------------------------------------

    def _offered(self, policy: NumberedPolicy) -> None:
        """Keep the newest of each application for _apply_all."""
        if policy.application in self._pending and policy_order(policy) <= policy_order(
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
        if running is not None and policy_order(policy) <= policy_order(running):
            same = policy_order(policy) == policy_order(running)
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


def _ids(policy: NumberedPolicy) -> dict[str, Any]:
    return {"application": policy.application, "era": policy.era, "number": policy.number}


def _client_keys(section: ControllerSection) -> ClientKeys | None:
    if not section.key_file:
        return None
    own = read_curve_keys(Path(section.key_file))
    return own, read_curve_publics(Path(section.server_key_file))
