"""Out of service and back: a daemon that takes no new work while it goes on to live.

SERVING -> DRAINING (new work is refused, what runs goes on) -> DRAINED (nothing is left, host state
is given back) -> SERVING. Any of them may return to SERVING; a restart does too, for nothing of it
is kept on disk. While it lasts ``/readyz`` says so, so that whoever spreads work looks elsewhere.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from typing import Any, Final, Protocol

from intentd.core.errors import InputError
from intentd.daemons.kit.clock import Clock

_log = logging.getLogger(__name__)

POLL_S: Final = 0.05
MAX_TIMEOUT_S: Final = 3600.0


class DrainState(enum.Enum):
    SERVING = "serving"
    DRAINING = "draining"
    DRAINED = "drained"


class Drainable(Protocol):
    """What a role implements to be drained; see ``lifecycle.Daemon``."""

    async def set_aside(self) -> None: ...
    def work_left(self) -> dict[str, int]: ...
    async def set_down(self) -> None: ...
    async def take_up(self) -> None: ...


class Drain:
    """One daemon's way out of service. Tasks belong to the daemon's group."""

    def __init__(self, daemon: Drainable, clock: Clock) -> None:
        self.state = DrainState.SERVING
        self._daemon = daemon
        self._clock = clock
        self._by = ""
        self._since_wall_s = 0.0
        self._lock = asyncio.Lock()
        self._waiting: asyncio.Task[None] | None = None

    async def begin(self, tasks: asyncio.TaskGroup, by: str, timeout_s: float) -> dict[str, Any]:
        """Take no new work, and wait at most timeout_s for what runs. Going on after that: it
        stays out of service, and is drained when the last piece ends. The answer says what is left.
        """
        async with self._lock:
            if self.state is DrainState.SERVING:
                await self._daemon.set_aside()
                self.state, self._by = DrainState.DRAINING, by
                self._since_wall_s = self._clock.wall()
                _log.info("draining", extra={"by": by, "left": self._daemon.work_left()})
                self._waiting = tasks.create_task(self._wait(), name="drain")
            waiting = self._waiting
        if waiting is not None:
            await asyncio.wait((waiting,), timeout=timeout_s)
        return self.to_plain()

    async def undo(self) -> dict[str, Any]:
        """Back into service."""
        async with self._lock:
            if self._waiting is not None:
                self._waiting.cancel()
                await asyncio.wait((self._waiting,))
                self._waiting = None
            if self.state is not DrainState.SERVING:
                await self._daemon.take_up()
                self.state, self._by = DrainState.SERVING, ""
                _log.info("in service again")
        return self.to_plain()

    def unready(self) -> list[str]:
        if self.state is DrainState.SERVING:
            return []
        return [f"{self.state.value} by {self._by}"]

    def to_plain(self) -> dict[str, Any]:
        """The ``drain`` part of the status document."""
        serving = self.state is DrainState.SERVING
        return {
            "state": self.state.value,
            "by": self._by,
            "since_wall_s": None if serving else round(self._since_wall_s, 3),
            "left": {} if serving else {k: n for k, n in self._daemon.work_left().items() if n},
        }

    async def _wait(self) -> None:
        while any(self._daemon.work_left().values()):
            await self._clock.sleep(POLL_S)
        await self._daemon.set_down()
        self.state = DrainState.DRAINED
        _log.info("drained", extra={"by": self._by})


def timeout_of(value: object, default: float) -> float:
    """The bound of an admin command. Raises InputError."""
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 <= value <= MAX_TIMEOUT_S:  # type: ignore[operator]  # a number by now
        raise InputError("timeout_s", value, f"0 to {MAX_TIMEOUT_S:g} seconds")
    return float(value)  # type: ignore[arg-type]  # as above
