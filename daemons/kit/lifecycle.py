"""One lifecycle for all daemons: configuration, signals, readiness, reload, drain, stop.

``run_daemon(MyDaemon)`` is a daemon's ``main``. Signals belong to this module alone:

- SIGTERM, SIGINT: stop accepting, drain until ``drain_timeout_s``, undo host state, exit 0; a
  second one exits at once;
- SIGHUP: reload (``reloading``); a wrong configuration is refused whole, the old one stays, and
  status says what became of it;
- SIGUSR1: the daemon's state as JSON into the log.

A task that ends in an exception is a programmer error: it is logged with its traceback, what the
daemon did to the host is undone, and the process exits 1.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import secrets
import signal
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

import intentd
from intentd.core.errors import IntentdError
from intentd.daemons.kit.admin import AdminRefusedError, AdminServer, peer_uid
from intentd.daemons.kit.changes import Change, Changes, account_of
from intentd.daemons.kit.claims import Claim
from intentd.daemons.kit.clock import Clock, SystemClock
from intentd.daemons.kit.config import CommonConfig
from intentd.daemons.kit.draining import Drain, timeout_of
from intentd.daemons.kit.files import prepare_directory
from intentd.daemons.kit.generations import Generations
from intentd.daemons.kit.held import Held
from intentd.daemons.kit.locks import LockHeldError, hold_lock
from intentd.daemons.kit.logs import configure_logging
from intentd.daemons.kit.metrics import Metrics
from intentd.daemons.kit.reloading import Reloader
from intentd.daemons.kit.starting import EXIT_OK, Start, start_of
from intentd.daemons.kit.status import StatusServer
from intentd.daemons.kit.systemd import Notifier
from intentd.daemons.kit.tokens import FILE as TOKENS_FILE
from intentd.daemons.kit.tokens import TokenBook
from intentd.daemons.kit.watchdog import Watchdog

if TYPE_CHECKING:
    from aiohttp import web

    from intentd.daemons.kit.hub import HubLink
    from intentd.daemons.kit.link import MemberLink

_log = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 10.0
EXIT_FAILED: Final = 1

C = TypeVar("C", bound=CommonConfig)
T = TypeVar("T")


class Tasks(asyncio.TaskGroup):
    """A TaskGroup that knows its tasks, so that an orderly stop can end those that run for ever."""

    def __init__(self) -> None:
        super().__init__()
        self._running: set[asyncio.Task[Any]] = set()

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        task = super().create_task(coro, name=name, context=context)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def cancel_all(self) -> None:
        for task in list(self._running):
            task.cancel()

    def names(self) -> list[str]:
        return sorted(task.get_name() for task in self._running)


@dataclass
class Kit:
    """What the lifecycle lends a daemon.

    rng is seeded from the system's entropy; simulations and tests pass their own. boot is a random
    64-bit hex that names this run of the process. link is set by the link itself.
    """

    role: str
    clock: Clock = field(default_factory=SystemClock)
    rng: random.Random = field(default_factory=random.Random)
    metrics: Metrics = field(default_factory=Metrics)
    boot: str = field(default_factory=lambda: secrets.token_hex(8))
    config_path: Path | None = None
    notifier: Notifier = field(default_factory=Notifier)
    held: Held = field(default_factory=lambda: Held(Notifier()))
    link: MemberLink | HubLink | None = None
    unready: Callable[[], list[str]] = list  # why it is not ready, once it started
    changes: Changes = field(init=False)
    _stop: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self.changes = Changes(self.clock.wall)

    def request_stop(self, reason: str) -> None:
        """Stop the daemon in order, as SIGTERM would."""
        if self._stop is not None:
            self._stop(reason)


class Daemon(Generic[C]):
    """What a role implements; every method has a default, so a daemon writes what it needs."""

    role: ClassVar[str]
    config_model: ClassVar[type[CommonConfig]]
    fixed: ClassVar[tuple[str, ...]] = ()
    """Dotted paths of settings that a reload cannot change; the lifecycle refuses such a file."""
    audited: ClassVar[frozenset[str]] = frozenset()
    """Admin commands of the role that change something, for the controller's audit log."""

    def __init__(self, config: C, kit: Kit) -> None:
        self.config = config
        self.kit = kit

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Acquire what is needed and start named tasks. Raise IntentdError to give up, clearly."""

    async def reload(self, config: C) -> None:
        """Take a validated configuration: build all of it, then swap. Raise IntentdError to refuse
        it, and then leave everything as it was.

        On return the lifecycle sets ``self.config`` to the new one.
        """

    async def drain(self, deadline_s: float) -> None:
        """Finish what was accepted; the lifecycle stops waiting after deadline_s."""

    async def set_aside(self) -> None:
        """Out of service: refuse new work from now on; what runs goes on. Raises IntentdError."""
        raise AdminRefusedError(f"drain: {self.role} is not drained as a whole", "bad_request")

    def work_left(self) -> dict[str, int]:
        """What still runs, by kind; looked at while out of service."""
        return {}

    async def set_down(self) -> None:
        """Out of service and nothing is left: give host state back."""

    async def take_up(self) -> None:
        """Back into service, from wherever ``set_aside`` and ``set_down`` have led."""

    async def stop(self) -> None:
        """Undo host state. Called once if start() began, also after a crash or a start() that
        raised: must not assume that it finished."""

    def status(self) -> dict[str, Any]:
        """The role's part of the status document (``detail``)."""
        return {}

    def unready(self) -> list[str]:
        """Why this daemon is not ready; empty when it is."""
        return []

    def policies(self) -> dict[str, list[int]]:
        """application -> [era, number] it runs; by default what the link applied."""
        return self.kit.link.policies() if self.kit.link is not None else {}

    async def admin(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        """A role's own admin command. Raise AdminRefusedError for unknown ones."""
        raise AdminRefusedError(
            f"command {command!r:.80}: unknown to {self.role}", "unknown_command"
        )

    async def prove(self) -> list[Claim]:
        """What must be true of this role, looked up now. Changes nothing."""
        return []

    def dump(self) -> dict[str, Any]:
        """State for the log (SIGUSR1); by default the status."""
        return self.status()

    def add_routes(self, app: web.Application) -> None:
        """More HTTP routes on the status endpoint, before it starts."""

    async def note(self, change: Change) -> None:
        """Something was changed: a reload, tokens, a drain. For an audit log."""


def _what(args: dict[str, Any]) -> str:
    """Which thing a command changes, for the audit log."""
    named = (args.get(field) for field in ("name", "job", "node", "owner"))
    return next((str(value)[:128] for value in named if value is not None), "")


class Lifecycle(Generic[C]):
    """Runs one daemon object from start to stop inside the loop."""

    def __init__(
        self,
        daemon_class: type[Daemon[C]],
        start: Start[C],
        kit: Kit,
    ) -> None:
        config = start.config
        self.kit = kit
        self._refused = start.refused
        self.daemon = daemon_class(config, kit)
        self._reloader = Reloader(
            Generations(
                config.state_dir, config.role, config, start.source, kit.clock.wall, start.refused
            ),
            clock=kit.clock,
            metrics=kit.metrics,
            notifier=kit.notifier,
            fixed=daemon_class.fixed,
            read=start.read,
            swap=self._swap,
            unready=self.daemon.unready,
            told=lambda reason: self._note("", "trial", "reload", "", reason),
        )
        self._started_s = kit.clock.now()
        self._started_wall_s = kit.clock.wall()
        self._stopping = asyncio.Event()
        self._stop_reason = ""
        self._crash: BaseException | None = None
        self._begun = False
        self._serving = False
        self._tasks = Tasks()
        self._watchdog = Watchdog(kit.clock, kit.metrics, kit.notifier)
        self._out = Drain(self.daemon, kit.clock)
        self._lock_file: int | None = None
        self._status: StatusServer | None = None
        self._admin: AdminServer | None = None
        kit._stop = self.request_stop

    @property
    def config(self) -> C:
        return self.daemon.config

    def request_stop(self, reason: str) -> None:
        if not self._stopping.is_set():
            self._stop_reason = reason
            self._stopping.set()

    async def run(self) -> int:
        """Exit status of the process."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._callback_failed)
        self._watch_signals(loop)
        failed = False
        try:
            async with self._tasks:
                try:
                    await self._start()
                    await self._stopping.wait()
                    await self._drain()
                finally:
                    await self._undo()
                    self._tasks.cancel_all()
        except* IntentdError as group:
            failed = True
            for error in leaves(group):
                _log.error("cannot go on: %s", error)
        except* Exception as group:  # noqa: BLE001  the last place: log it, exit non-zero
            failed = True
            _log.critical("crashed", exc_info=group)
        finally:
            self._release_lock()
            self.kit.notifier.close()
        if self._crash is not None:
            failed = True
            _log.critical("crashed in a callback", exc_info=self._crash)
        if failed:
            return EXIT_FAILED
        _log.info("stopped")
        return EXIT_OK

    async def _start(self) -> None:
        config, kit = self.config, self.kit
        prepare_directory(config.run_dir, 0o755)
        prepare_directory(config.state_dir, 0o700)
        self._take_lock()
        if config.status.enabled:
            book = TokenBook(config.state_dir / TOKENS_FILE, config.status.tokens, kit.clock.wall)
            self._status = StatusServer(
                config.status_bind,
                book,
                kit.metrics,
                status=self.status,
                unready=self.unready,
                section=config.status,
                held=kit.held,
            )
            self.daemon.add_routes(self._status.app)
            await self._status.start()
        self._admin = AdminServer(
            config.admin_path, config.admin.group, self.handle_admin, kit.metrics
        )
        await self._admin.start(self._tasks)
        self._tasks.create_task(self._watchdog.run(), name="watchdog")
        self._begun = True
        await self.daemon.start(self._tasks)
        kit.held.close_unused()
        self._serving = True
        kit.unready = self.daemon.unready
        self._reloader.start(self._tasks)
        if self._refused:
            await self._tell_fallback()
        kit.metrics.ready.set_function(lambda: float(not self.unready()))
        gc.collect()
        gc.freeze()  # start-up objects live for ever: never scan them again
        kit.notifier.ready(f"{config.role} {config.name} runs")
        _log.info(
            "started",
            extra={
                "version": intentd.__version__,
                "boot": kit.boot,
                "status": self._status.address if self._status else "",
                "admin": str(config.admin_path),
            },
        )

    async def _tell_fallback(self) -> None:
        number = self._reloader.generations.number
        self.kit.metrics.reloads.labels("fallback").inc()
        _log.critical("runs the last good configuration", extra={"refused": self._refused})
        text = f"generation {number}: {self._refused}"
        await self._note("", "start", "start", str(self.kit.config_path), text)

    async def _drain(self) -> None:
        self._serving = False
        self._reloader.stop()
        deadline_s = self.config.drain_timeout_s
        _log.info("stopping", extra={"reason": self._stop_reason, "drain_timeout_s": deadline_s})
        self.kit.notifier.stopping()
        try:
            async with asyncio.timeout(deadline_s):
                await self.daemon.drain(deadline_s)
        except TimeoutError:
            _log.warning("drain deadline passed", extra={"deadline_s": deadline_s})

    async def _undo(self) -> None:
        """Undo host state, each step even if the one before failed; also on the way of a crash."""
        steps: list[Callable[[], Awaitable[None]]] = []
        if self._begun:  # else the host's state may be that of the daemon that holds the lock
            steps.append(self.daemon.stop)
        if self._admin is not None:
            steps.append(self._admin.stop)
        if self._status is not None:
            steps.append(self._status.stop)
        for step in steps:
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await step()
            except TimeoutError:
                _log.error("stop step took too long", extra={"step": step.__qualname__})
            except Exception:  # noqa: BLE001  the next step must still be undone
                self.kit.metrics.errors.labels("stop").inc()
                _log.exception("stop step failed", extra={"step": step.__qualname__})

    # -- signals ---------------------------------------------------------------------------

    def _watch_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._terminate, number)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        loop.add_signal_handler(signal.SIGUSR1, self.log_dump)

    def _terminate(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            _log.warning("second signal: exit at once", extra={"signal": number.name})
            logging.shutdown()
            os._exit(128 + number)
        self.request_stop(number.name)

    def _hang_up(self) -> None:
        if self._serving:
            self._tasks.create_task(self._reload_quietly(), name="reload")

    async def _reload_quietly(self) -> None:
        """What becomes of it is logged, counted, shown in status and noted."""
        try:
            answer = await self.reload("SIGHUP")
        except IntentdError as error:
            await self._note("", "signal", "reload", "", f"refused: {error}")
        else:
            await self._note("", "signal", "reload", "", f"generation {answer['generation']}")

    async def _note(self, who: str, via: str, action: str, about: str, result: str) -> None:
        await self.daemon.note(self.kit.changes.add(who, via, action, about, result))

    def log_dump(self) -> None:
        document = {
            "status": self.status(),
            "dump": self.daemon.dump(),
            "tasks": self._tasks.names(),
        }
        _log.info("state", extra={"state": json.dumps(document, default=str)})

    def _callback_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception in a loop callback is a programmer error and stops the daemon."""
        error = context.get("exception")
        if error is None or "transport" in context or isinstance(error, (OSError, TimeoutError)):
            self.kit.metrics.errors.labels("loop").inc()
            _log.error("loop: %s", context.get("message"), exc_info=error)
            return
        self._crash = error
        self.request_stop("crash in a callback")

    # -- reload ----------------------------------------------------------------------------

    async def reload(self, by: str, *, confirm: bool = False) -> dict[str, Any]:
        """Raises IntentdError with the reason; the old configuration then runs (on)."""
        if not self._serving:
            raise IntentdError("reload: " + "; ".join(self.unready()))
        return await self._reloader.reload(by, confirm=confirm)

    async def _swap(self, config: C) -> None:
        """Hand the new configuration to endpoint and role; both keep the old if either refuses."""
        if self._status is not None:
            self._status.set_tokens(config.status.tokens)
        try:
            await self.daemon.reload(config)
        except BaseException:
            if self._status is not None:
                self._status.set_tokens(self.config.status.tokens)
            raise
        self.daemon.config = config
        configure_logging(
            config.log.level, config.log.format, log_context(config), journal=journal()
        )

    # -- status ----------------------------------------------------------------------------

    def unready(self) -> list[str]:
        if self._stopping.is_set():
            return ["stopping"]
        if not self._serving:
            return ["starting"]
        return [*self._out.unready(), *self.daemon.unready()]

    def status(self) -> dict[str, Any]:
        """The one schema of all daemons; ``detail`` is the role's."""
        config, kit = self.config, self.kit
        reasons = self.unready()
        return {
            "role": config.role,
            "name": config.name,
            "host": config.host,
            "version": intentd.__version__,
            "boot": kit.boot,
            "pid": os.getpid(),
            "started_wall_s": self._started_wall_s,
            "uptime_s": round(kit.clock.now() - self._started_s, 3),
            "ready": not reasons,
            "reasons": reasons,
            "drain": self._out.to_plain(),
            "generation": self._reloader.generations.number,
            "reload": self._reloader.generations.to_plain(),
            "config_path": str(kit.config_path) if kit.config_path else "",
            "status_address": self._status.address if self._status else "",
            "policies": self.daemon.policies(),
            "controller": kit.link.summary() if kit.link is not None else None,
            "loop_lag_s": self._watchdog.summary(),
            "detail": self.daemon.status() if self._serving else {},
        }

    async def handle_admin(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        """Commands every daemon knows; the others go to the role."""
        match command:
            case "ping":
                return {"role": self.config.role, "pid": os.getpid(), "boot": self.kit.boot}
            case "status":
                return self.status()
            case "ready":
                reasons = self.unready()
                return {"ready": not reasons, "reasons": reasons}
            case "reload" | "drain" | "tokens.new" | "tokens.revoke":
                return await self._change(command, args)
            case "tokens":
                return {"tokens": [token.to_plain() for token in self._tokens().all()]}
            case "config":
                return self.config.model_dump(mode="json")
            case "metrics":
                return {"text": self.kit.metrics.render().decode()}
            case "prove":
                claims = [claim.to_plain() for claim in await self.daemon.prove()]
                return {"claims": claims, "wall_s": self.kit.clock.wall()}
            case "dump":
                self.log_dump()
                return self.daemon.dump()
        if command in self.daemon.audited:
            return await self._change(command, args)
        return await self.daemon.admin(command, args)

    async def _change(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        who, about, result = account_of(peer_uid.get()), _what(args), "done"
        try:
            if command == "reload":
                confirm = bool(args.get("confirm", False))
                answer = await self.reload("intentctl", confirm=confirm)
                result = f"generation {answer['generation']}"
            elif command == "drain":
                about = "undo" if args.get("undo") is True else ""
                answer = await self._drain_or_not(args)
            elif command == "tokens.new":
                made, secret = self._tokens().new(
                    args.get("name"), args.get("role"), args.get("expires_wall_s")
                )
                answer = {"token": made.to_plain(), "secret": secret}
            elif command == "tokens.revoke":
                answer = {"token": self._tokens().revoke(args.get("name")).to_plain()}
            else:
                answer = await self.daemon.admin(command, args)
        except IntentdError as error:
            await self._note(who, "admin", command, about, f"refused: {error}")
            raise
        await self._note(who, "admin", command, about, result)
        return answer

    async def _drain_or_not(self, args: dict[str, Any]) -> dict[str, Any]:
        timeout_s = timeout_of(args.get("timeout_s"), self.config.drain_timeout_s)
        if not self._serving:
            raise AdminRefusedError("drain: " + "; ".join(self.unready()))
        if args.get("undo", False):
            return await self._out.undo()
        return await self._out.begin(self._tasks, f"uid {peer_uid.get()}", timeout_s)

    def _tokens(self) -> TokenBook:
        if self._status is None:
            raise AdminRefusedError("status.enabled is false: there is nothing to let in to")
        return self._status.door.book

    # -- one process a role and run directory ------------------------------------------------

    def _take_lock(self) -> None:
        path = self.config.run_dir / f"{self.config.role}.lock"
        try:
            self._lock_file = hold_lock(path)
        except OSError as error:
            raise IntentdError(f"run_dir: cannot open {path}: {error.strerror}") from None
        except LockHeldError as error:
            raise IntentdError(
                f"run_dir: {error}: one {self.config.role} a run directory"
            ) from None

    def _release_lock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The single exceptions in a group."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def log_context(config: CommonConfig) -> dict[str, str]:
    return {"role": config.role, "name": config.name}


def journal() -> bool:
    """Whether standard error is the journal (systemd sets JOURNAL_STREAM to its device:inode)."""
    given = os.environ.get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return given == f"{found.st_dev}:{found.st_ino}"


def run_daemon(daemon_class: type[Daemon[Any]], argv: Sequence[str] | None = None) -> int:
    """Parse arguments and configuration, then run until stopped. Returns the exit status."""
    role = daemon_class.role
    model = daemon_class.config_model
    if model.role != role:
        raise TypeError(f"{model.__name__}.role is {model.role!r}, expected {role!r}")
    start = start_of(role, model, argv)
    if isinstance(start, int):
        return start
    config = start.config
    os.umask(os.umask(0) | 0o027)
    configure_logging(config.log.level, config.log.format, log_context(config), journal=journal())
    notifier = Notifier.from_environment(os.environ)
    held = Held.from_environment(os.environ, notifier)
    kit = Kit(role, config_path=start.path, notifier=notifier, held=held)

    async def main() -> int:
        return await Lifecycle(daemon_class, start, kit).run()

    import uvloop  # not needed to check a configuration

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())
