"""Generations of a daemon's configuration: which one runs, which is known to be good, what became
of the last reload.

A generation is one configuration that ran; its number never falls, also across restarts. It is on
trial from the swap until ``reload.window_s`` have passed; the daemon that was ready before and is
not any more returns to the last good one, which then gets a number of its own. Two files in the
state directory, both mode 0600: ``<role>.good.toml``, the last good file byte for byte, and
``<role>.generation.json``, its number.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from intentd.core.errors import IntentdError
from intentd.daemons.kit.files import write_atomically

_log = logging.getLogger(__name__)

MAX_NUMBER: Final = 2**53

C = TypeVar("C")


class Outcome(enum.Enum):
    """STARTED: no reload yet. TAKEN: it runs, on trial until its window has passed. CONFIRMED: it
    has, in readiness. UNCONFIRMED: it has, but the daemon was unready before the swap and still is.
    REFUSED: nothing changed. RETURNED: readiness was lost, the last good one runs. STUCK: it was
    lost, and the last good one could not be taken either. FALLBACK: the file was wrong at the
    start, the last good one runs."""

    STARTED = "started"
    TAKEN = "taken"
    CONFIRMED = "confirmed"
    UNCONFIRMED = "unconfirmed"
    REFUSED = "refused"
    RETURNED = "returned"
    STUCK = "stuck"
    FALLBACK = "fallback"


class ReturnedError(IntentdError):
    """A reload was taken, and taken back."""


@dataclass(frozen=True, slots=True)
class Generation(Generic[C]):
    """One configuration that ran. source: the file it was read from, byte for byte."""

    number: int
    config: C
    source: bytes


@dataclass(frozen=True, slots=True)
class Change:
    """The last thing that happened to the configuration, for people."""

    outcome: Outcome
    by: str
    wall_s: float
    reason: str = ""


class Generations(Generic[C]):
    """The book of one daemon. running: what it runs. good: what it would return to.

    requests: reloads asked for. verdict: number, outcome and reason of the last trial that ended.
    last: what became of the last reload, and of its trial.
    """

    def __init__(
        self,
        directory: Path,
        role: str,
        config: C,
        source: bytes,
        wall: Callable[[], float],
        refused: str = "",
    ) -> None:
        """refused: why the file did not run at the start, but this, which is the last good one."""
        self._good_path = good_path(directory, role)
        self._number_path = directory / f"{role}.generation.json"
        self._wall = wall
        self._kept = b""  # the digest of what is on disk
        self.failure = ""
        self.running = self.good = Generation(self._first_number(source), config, source)
        self.on_trial = False
        self.requests = 0
        self.verdict: tuple[int, Outcome, str] = (0, Outcome.STARTED, "")
        self.fallback = refused
        outcome = Outcome.FALLBACK if refused else Outcome.STARTED
        self.last = Change(outcome, "start", wall(), refused)

    @property
    def number(self) -> int:
        return self.running.number

    def refused(self, by: str, reason: str) -> None:
        """Nothing changed. A generation on trial stays there."""
        self.requests += 1
        self.last = Change(Outcome.REFUSED, by, self._wall(), reason)

    def taken(self, by: str, config: C, source: bytes) -> int:
        """The swap is done; the new generation's number."""
        self.requests += 1
        self.running = Generation(self.number + 1, config, source)
        self.on_trial = True
        self.fallback = ""
        self.last = Change(Outcome.TAKEN, by, self._wall())
        return self.number

    def passed(self, by: str, *, ready: bool, reason: str = "") -> None:
        """The window of the running generation has passed."""
        if ready:
            self.good = self.running
            self._keep()
        outcome = Outcome.CONFIRMED if ready else Outcome.UNCONFIRMED
        self._judged(outcome, reason)
        if self.last.outcome is Outcome.TAKEN:  # else a later reload was refused: that is news
            self.last = Change(outcome, by, self._wall(), reason)

    def started_well(self) -> None:
        """What the daemon started with has become ready."""
        self.good = self.running
        self._keep()

    def returned(self, by: str, reason: str) -> int:
        """The last good one runs again, as a generation of its own; its number."""
        back = self.good
        text = f"generation {self.number} lost readiness: {reason}; {back.number} runs again"
        self._judged(Outcome.RETURNED, text)
        self.last = Change(Outcome.RETURNED, by, self._wall(), text)
        self.running = self.good = Generation(self.number + 1, back.config, back.source)
        self._keep()
        return self.number

    def stuck(self, by: str, reason: str, why: str) -> None:
        """Readiness was lost and the last good configuration was refused."""
        text = f"generation {self.number} lost readiness: {reason}; {self.good.number} too: {why}"
        self._judged(Outcome.STUCK, text)
        self.last = Change(Outcome.STUCK, by, self._wall(), text)

    def _judged(self, outcome: Outcome, reason: str) -> None:
        self.on_trial = False
        self.verdict = (self.number, outcome, reason)

    def to_plain(self) -> dict[str, Any]:
        """The ``reload`` part of the status document."""
        last = self.last
        return {
            "outcome": last.outcome.value,
            "by": last.by,
            "wall_s": round(last.wall_s, 3),
            "reason": last.reason,
            "on_trial": self.on_trial,
            "fallback": self.fallback,
            "requests": self.requests,
            "good": self.good.number,
            "kept": str(self._good_path) if self._kept else "",
            "not_kept": self.failure,
        }

    # -- on disk -------------------------------------------------------------------------------

    def _first_number(self, source: bytes) -> int:
        """One more than the number kept, unless the very same file ran then."""
        try:
            kept = json.loads(self._number_path.read_bytes())
            number, digest = kept["number"], kept["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return 1
        if type(number) is not int or not 0 < number < MAX_NUMBER:
            return 1
        return number if digest == hashlib.sha256(source).hexdigest() else number + 1

    def _keep(self) -> None:
        """Write the good one down; a disk that refuses is told in status, and tried next time."""
        good = self.good
        digest = hashlib.sha256(good.source).hexdigest()
        record = json.dumps({"number": good.number, "sha256": digest}).encode()
        if record == self._kept:
            return
        try:
            write_atomically(self._good_path, good.source)
            write_atomically(self._number_path, record)
        except OSError as error:
            self.failure = f"{self._good_path}: {error.strerror}"
            _log.error("the good configuration is not kept", extra={"reason": self.failure})
            return
        self._kept, self.failure = record, ""


def good_path(directory: Path, role: str) -> Path:
    """Where a daemon keeps the last configuration it was ready with."""
    return directory / f"{role}.good.toml"
