"""Reload: parse, validate, build, swap, confirm. Whoever asks for it learns what became of it.

A configuration is refused whole, or taken whole and then on trial (``generations``). A defect of
ours met on the way is a refusal too: a reload never ends a daemon that works.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel

from intentd.core.errors import ConfigError, IntentdError
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.config import CommonConfig
from intentd.daemons.kit.generations import Generations, Outcome, ReturnedError
from intentd.daemons.kit.metrics import Metrics
from intentd.daemons.kit.systemd import Notifier

_log = logging.getLogger(__name__)

POLL_S: Final = 0.1
# what names the process itself
FIXED: Final = (
    "name", "host", "state_dir", "run_dir", "admin", "status.bind", "status.enabled",
    "status.tls_cert_file", "status.tls_key_file", "status.origin",
)  # fmt: skip

C = TypeVar("C", bound=CommonConfig)


class Reloader(Generic[C]):
    """Reloads of one daemon, one at a time.

    read: the file's bytes and the configuration in them. swap: makes the daemon run a
    configuration, or raises and leaves it as it was. unready: why it is not ready. told: what
    became of a trial that was not passed.
    fixed: dotted paths of settings that need a restart.
    """

    def __init__(
        self,
        generations: Generations[C],
        *,
        clock: Clock,
        metrics: Metrics,
        notifier: Notifier,
        fixed: tuple[str, ...],
        read: Callable[[], tuple[C, bytes]],
        swap: Callable[[C], Awaitable[None]],
        unready: Callable[[], list[str]],
        told: Callable[[str], Awaitable[None]],
    ) -> None:
        self.generations = generations
        self._clock = clock
        self._metrics = metrics
        self._notifier = notifier
        self._fixed = fixed
        self._read = read
        self._swap = swap
        self._unready = unready
        self._told = told
        self._lock = asyncio.Lock()
        self._trial: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._was_ready = False

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """The daemon runs; keep what it runs as soon as it is ready."""
        self._tasks = tasks
        self._metrics.generation.set(self.generations.number)
        self._watching = tasks.create_task(self._watch_start(), name="reload-start")

    async def reload(self, by: str, *, confirm: bool = False) -> dict[str, Any]:
        """Take the file as it is now. Raises IntentdError with the reason when it is refused.

        confirm: wait for the end of its trial, and raise ReturnedError if it did not pass.
        """
        async with self._lock:
            number = await self._take(by)
        if confirm:
            await self._confirmed(number)
        return {"generation": number, "on_trial": self.generations.on_trial}

    def stop(self) -> None:
        """Watch no longer: another configuration is there, or the daemon is about to end."""
        for task in (self._trial, self._watching):
            if task is not None:
                task.cancel()

    async def _take(self, by: str) -> int:
        book = self.generations
        was_ready = not self._unready() or (book.on_trial and self._was_ready)
        self._notifier.reloading()
        try:
            config, source = self._read()
            refuse_fixed(book.running.config, config, (*FIXED, *self._fixed))
            await self._change(config)
        except Exception as error:
            reason = _reason(error)
            self._metrics.reloads.labels("refused").inc()
            book.refused(by, reason)
            defect = None if isinstance(error, IntentdError) else error
            _log.error("reload refused", extra={"error": reason}, exc_info=defect)
            self._notifier.ready(f"reload refused: {reason}")
            if defect is not None:
                self._metrics.errors.labels("reload").inc()
                raise IntentdError(reason) from error
            raise
        except BaseException:
            self._notifier.ready("reload broken off")
            raise
        self.stop()
        number = book.taken(by, config, source)
        self._metrics.reloads.labels("applied").inc()
        self._metrics.generation.set(number)
        _log.info("reloaded", extra={"generation": number})
        self._notifier.ready(f"{config.role} {config.name} runs generation {number}")
        self._was_ready = was_ready
        self._trial = self._tasks.create_task(self._try(by), name="reload-trial")
        return number

    async def _change(self, config: C) -> None:
        """Swap; a defect on the way may have left parts of it, so the old one is taken anew."""
        running = self.generations.running.config
        try:
            await self._swap(config)
        except IntentdError:
            raise
        except Exception:
            try:
                await self._swap(running)
            except Exception:  # noqa: BLE001  the first defect is what is told
                _log.exception("the running configuration was not taken anew")
            raise

    # -- the trial -----------------------------------------------------------------------------

    async def _try(self, by: str) -> None:
        """Watch readiness until the window has passed; return to the last good when it is lost."""
        section = self.generations.running.config.reload
        ends_s = self._clock.now() + section.window_s
        unready_since_s: float | None = None
        while True:
            now, reasons = self._clock.now(), self._unready()
            if not reasons:
                unready_since_s = None
            elif unready_since_s is None:
                unready_since_s = now
            if now >= ends_s:
                break
            if self._was_ready and unready_since_s is not None:
                if now - unready_since_s >= section.grace_s:
                    break
            elif not reasons:
                self._was_ready = True  # a daemon that it has mended has to stay so
            await self._clock.sleep(min(POLL_S, max(0.0, ends_s - now)))
        async with self._lock:
            if self._trial is asyncio.current_task():
                await self._judge(by, section.window_s, reasons)

    async def _judge(self, by: str, window_s: float, reasons: list[str]) -> None:
        book = self.generations
        text = "; ".join(reasons)
        if not reasons or not self._was_ready or not window_s:
            book.passed(by, ready=not reasons, reason=text)
            _log.info("reload kept", extra={"generation": book.number, "unready": text})
            return
        self._notifier.reloading()
        try:
            await self._change(book.good.config)
        except Exception as error:  # noqa: BLE001  a reload never ends a daemon
            book.stuck(by, text, _reason(error))
            self._metrics.reloads.labels("stuck").inc()
            _log.exception("cannot return to the last good configuration", extra={"lost": text})
        else:
            number = book.returned(by, text)
            self._metrics.reloads.labels("returned").inc()
            self._metrics.generation.set(number)
            _log.error("reload taken back", extra={"generation": number, "lost": text})
        self._notifier.ready(book.last.reason)
        await self._told(book.last.reason)

    async def _confirmed(self, number: int) -> None:
        """Wait for the end of a generation's trial. Raises ReturnedError."""
        book = self.generations
        while book.on_trial and book.number == number:
            await self._clock.sleep(POLL_S)
        judged, outcome, reason = book.verdict
        if judged != number:
            raise ReturnedError(f"generation {number}: {book.number} was loaded before it had time")
        if outcome is not Outcome.CONFIRMED:
            raise ReturnedError(f"{outcome.value}: {reason}")

    async def _watch_start(self) -> None:
        while self._unready():
            await self._clock.sleep(POLL_S)
        self.generations.started_well()


def refuse_fixed(running: BaseModel, wanted: BaseModel, paths: tuple[str, ...]) -> None:
    """Settings that cannot change under a running process. Raises ConfigError."""
    for path in paths:
        changed = _first_change(setting(running, path), setting(wanted, path), path)
        if changed is not None:
            raise ConfigError(*changed, "the value it started with: restart")


def _first_change(before: Any, after: Any, path: str) -> tuple[str, Any] | None:
    """Path and value of the first setting that differs, as deep as sections go."""
    if before == after:
        return None
    if isinstance(before, BaseModel) and type(before) is type(after):
        for name in type(before).model_fields:
            found = _first_change(getattr(before, name), getattr(after, name), f"{path}.{name}")
            if found is not None:
                return found
    return path, "changed" if isinstance(after, (BaseModel, tuple, dict)) else after


def setting(config: BaseModel, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, IntentdError):
        return str(error)
    return f"internal error: {type(error).__name__}: {error}"
