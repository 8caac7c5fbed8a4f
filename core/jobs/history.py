"""What arrived at a GPU cluster: on the way from the scheduler to the controller, and kept there.

The preference solver needs sizes, demands and arrival times of the recent past (section 3.3.2,
"passively collect job size information"), and to know when that past no longer tells the present.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError
from intentd.core.flows.change import Change
from intentd.core.flows.learning import Learner, LearnSettings
from intentd.core.jobs.allocator import JobTable, job_table
from intentd.core.jobs.demand import MAX_GPUS

Array = NDArray[np.float64]
MAX_ROWS: Final = 1000  # of one report
MAX_TABLE_ENTRIES: Final = 50_000  # speeds of one report
LOAD_JOBS: Final = 1000  # newest jobs the load is taken over


@dataclass(frozen=True, slots=True)
class Arrival:
    """One job as it came. size_gpu_s: as estimated, or as measured once it ended; 0: it never did
    anything and is to be forgotten. speeds: at 0..largest GPUs; empty: linear."""

    job: int
    submit_s: float
    size_gpu_s: float
    smallest: int
    largest: int
    speeds: tuple[float, ...] = ()


def arrivals_to_plain(arrivals: Iterable[Arrival]) -> dict[str, Any]:
    """``{"tables": [[speeds]], "rows": [[job, submit_s, size, min, max, table]]}``; table -1 is
    linear. Takes what fits one report; the caller counts the rows."""
    tables: dict[tuple[float, ...], int] = {}
    rows: list[list[float]] = []
    entries = 0
    for row in arrivals:
        fresh = bool(row.speeds) and row.speeds not in tables
        if len(rows) == MAX_ROWS or (fresh and entries + len(row.speeds) > MAX_TABLE_ENTRIES):
            break
        if fresh:
            tables[row.speeds] = len(tables)
            entries += len(row.speeds)
        at = tables[row.speeds] if row.speeds else -1
        rows.append([row.job, row.submit_s, row.size_gpu_s, row.smallest, row.largest, at])
    return {"tables": [list(speeds) for speeds in tables], "rows": rows}


def arrivals_from_plain(plain: object, where: str = "history") -> list[Arrival]:
    """Inverse of arrivals_to_plain for untrusted input. Raises InputError naming the path."""
    if not isinstance(plain, Mapping):
        raise InputError(where, f"{plain!r:.60}", "a table")
    tables, rows = plain.get("tables", ()), plain.get("rows", ())
    for name, value, most in (("tables", tables, MAX_ROWS), ("rows", rows, MAX_ROWS)):
        if not isinstance(value, (list, tuple)) or len(value) > most:
            raise InputError(f"{where}.{name}", f"{value!r:.60}", f"a list of at most {most}")
    speeds = [_speeds(table, f"{where}.tables[{at}]") for at, table in enumerate(tables)]
    return [_arrival(row, speeds, f"{where}.rows[{at}]") for at, row in enumerate(rows)]


def _speeds(table: object, where: str) -> tuple[float, ...]:
    good = (
        isinstance(table, (list, tuple))
        and 2 <= len(table) <= MAX_GPUS + 1
        and all(_number(value) for value in table)
        and table[0] == 0
        and table[-1] > 0
        and all(a <= b for a, b in pairwise(table))
    )
    if not good:
        raise InputError(where, f"{table!r:.60}", "speeds at 0, 1, ... GPUs, rising from 0")
    assert isinstance(table, (list, tuple))
    return tuple(float(value) for value in table)


def _arrival(row: object, tables: list[tuple[float, ...]], where: str) -> Arrival:
    if not isinstance(row, (list, tuple)) or len(row) != 6 or not all(map(_number, row)):
        raise InputError(where, f"{row!r:.60}", "[job, submit_s, size, min, max, table]")
    job, submit_s, size, smallest, largest, table = row
    speeds = tables[int(table)] if 0 <= table < len(tables) else ()
    good = (
        0 <= job < 2**53
        and size >= 0
        and 1 <= smallest <= largest <= MAX_GPUS
        and -1 <= table < len(tables)
        and (not speeds or largest < len(speeds))
    )
    if not good:
        raise InputError(where, f"{row!r:.60}", "a job, 1 <= min <= max GPUs, a table of the list")
    return Arrival(int(job), float(submit_s), float(size), int(smallest), int(largest), speeds)


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(float(value))  # type: ignore[arg-type]  # checked


@dataclass(frozen=True, slots=True)
class HistorySettings:
    """window_jobs: newest jobs kept. min_jobs: before the first search. grown: a history that has
    so many times the jobs of the last search is worth another. load_moved: and so is a load that
    moved by this factor. false_alarm: chance that one look at an unchanged workload fires."""

    window_jobs: int = 10_000
    min_jobs: int = 200
    grown: float = 4.0
    load_moved: float = 1.5
    false_alarm: float = 1e-7


@dataclass(frozen=True, slots=True)
class Basis:
    """What a search was based on."""

    jobs: int
    load: float


@dataclass(slots=True)
class JobHistory:
    """The recent jobs of one cluster, and whether a search would now see another workload.

    A change of sizes (the test of flows, core/flows/change) forgets the jobs before it.
    """

    gpus: float
    settings: HistorySettings = field(default_factory=HistorySettings)
    changes: int = 0
    last_change: Change | None = None
    _rows: dict[int, Arrival] = field(default_factory=dict)
    _detector: Learner | None = None
    _changed: bool = False
    _forgotten: int = -1  # jobs up to this number came before the last change

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, arrivals: Sequence[Arrival]) -> Change | None:
        """Adds jobs, or what was measured of known ones; a change of the workload if one shows."""
        fresh: list[Arrival] = []
        for row in arrivals:
            if row.job <= self._forgotten:
                continue
            if row.size_gpu_s <= 0:
                self._rows.pop(row.job, None)
                continue
            if row.job not in self._rows:
                fresh.append(row)
            self._rows[row.job] = row
        change = self._observed(fresh)
        if len(self._rows) > self.settings.window_jobs:
            self._keep(self.settings.window_jobs)
        return change

    def _observed(self, fresh: list[Arrival]) -> Change | None:
        if not fresh:
            return None
        if self._detector is None:
            limit = self.settings.window_jobs
            self._detector = Learner(
                LearnSettings(
                    window_flows=limit,
                    keep_flows=limit,
                    max_age_s=math.inf,
                    false_alarm=self.settings.false_alarm,
                )
            )
        fresh.sort(key=lambda row: row.job)
        change = self._detector.observe(np.array([row.size_gpu_s for row in fresh]), now=0.0)
        if change is not None:
            self.changes += 1
            self.last_change, self._changed = change, True
            self._keep(self._detector.flows)
        return change

    def _keep(self, count: int) -> None:
        gone = sorted(self._rows)[: max(0, len(self._rows) - count)]
        for job in gone:
            del self._rows[job]
            self._forgotten = max(self._forgotten, job)

    def table(self) -> JobTable:
        """All jobs kept that the cluster can run, in order of arrival, from time 0."""
        most = int(self.gpus)
        rows = sorted(
            (row for row in self._rows.values() if row.smallest <= most),
            key=lambda row: (row.submit_s, row.job),
        )
        if not rows:
            raise InputError("history", 0, "at least one job")
        tops = [min(row.largest, most) for row in rows]
        width = max(tops) + 1
        tables: dict[tuple[float, ...], int] = {(): 0}
        lines = [np.arange(width, dtype=np.float64)]
        index = []
        for row in rows:
            if row.speeds not in tables:
                tables[row.speeds] = len(lines)
                line = np.array(row.speeds[:width])
                lines.append(np.append(line, np.full(width - len(line), line[-1])))
            index.append(tables[row.speeds])
        submit = np.array([row.submit_s for row in rows])
        return job_table(
            submit - submit[0],
            np.array([row.size_gpu_s for row in rows]),
            tops,
            index,
            np.stack(lines),
            smallest=np.array([float(row.smallest) for row in rows]),
        )

    def sizes(self) -> Array:
        return np.array([row.size_gpu_s for row in self._rows.values()])

    def load(self) -> float | None:
        """GPU seconds offered per GPU second by the newest jobs; None before there are some."""
        newest = sorted(self._rows.values(), key=lambda row: row.submit_s)[-LOAD_JOBS:]
        if len(newest) < 20 or self.gpus <= 0:
            return None
        span = newest[-1].submit_s - newest[0].submit_s
        work = math.fsum(row.size_gpu_s for row in newest)
        return work / (span * self.gpus) if span > 0 else None

    def basis(self) -> Basis:
        return Basis(len(self), self.load() or 0.0)

    def searched(self) -> None:
        """A search took the present history."""
        self._changed = False

    def due(self, last: Basis | None) -> str:
        """Why a search is worth its time, empty if it is not. last: of the front there is."""
        count, limits = len(self), self.settings
        if count < limits.min_jobs:
            return ""
        if last is None:
            return f"bootstrap: {count} jobs known"
        if self._changed and self.last_change is not None:
            seen = self.last_change
            return f"workload changed (divergence {seen.divergence:.2f} over {seen.window} jobs)"
        if count >= limits.grown * last.jobs:
            return f"history grew from {last.jobs} to {count} jobs"
        load = self.load()
        if (
            load
            and last.load > 0
            and not 1 / limits.load_moved < load / last.load < limits.load_moved
        ):
            return f"load moved from {last.load:.2f} to {load:.2f}"
        return ""
