"""The scheduler's unfinished jobs as arrays, so that a decision over 10,000 of them is vectors.

The arrays repeat what the books say of each job; the books write a row when a job changed. Rows
stand in order of arrival; those of jobs that ended are dead until the next compaction.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from intentd.core.jobs.allocator import JobTable, Progress
from intentd.core.jobs.demand import efficiency

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
FLOATS: Final = (
    "submit_s", "size_gpu_s", "left_gpu_s", "smallest", "grant", "stall_until_s", "since_s",
    "contention", "decisions",
)  # fmt: skip
INTEGERS: Final = ("largest", "table", "pool", "owner")


class SpeedTables:
    """Speed tables of the jobs, one row for equal ones; rows nobody uses are used again."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._users: list[int] = []
        self._free: list[int] = []
        self.speeds: Array = np.zeros((16, 2))
        self.efficiency: Array = np.ones((16, 2))

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, speeds: Array) -> int:
        """The row of a table, held until ``release``."""
        key = speeds.round(12).tobytes()
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = self._new(key, speeds)
        self._users[row] += 1
        return row

    def release(self, row: int) -> None:
        self._users[row] -= 1
        if self._users[row] == 0:
            del self._rows[self._keys[row]]
            self._free.append(row)

    def _new(self, key: bytes, speeds: Array) -> int:
        if self._free:
            row = self._free.pop()
        else:
            row = len(self._keys)
            self._keys.append(b"")
            self._users.append(0)
        tall, wide = self.speeds.shape
        if row >= tall or len(speeds) > wide:
            # snapshots keep the arrays they were made with
            shape = (max(2 * tall if row >= tall else tall, row + 1), max(wide, len(speeds)))
            self.speeds = np.pad(
                self.speeds, ((0, shape[0] - tall), (0, shape[1] - wide)), mode="edge"
            )
            self.efficiency = np.stack([efficiency(line) for line in self.speeds])
        line = np.append(speeds, np.full(self.speeds.shape[1] - len(speeds), speeds[-1]))
        self._keys[row] = key
        self.speeds[row] = line
        self.efficiency[row] = efficiency(line)
        return row


class Columns:
    """One row a job. Attributes named in FLOATS and INTEGERS are arrays over the rows; so are
    ``ids``, ``started`` and ``alive``. owner: index of a quota, -1 for none."""

    submit_s: Array
    size_gpu_s: Array
    left_gpu_s: Array
    smallest: Array
    grant: Array
    stall_until_s: Array
    since_s: Array
    contention: Array
    decisions: Array
    largest: NDArray[np.int32]
    table: NDArray[np.int32]
    pool: NDArray[np.int32]
    owner: NDArray[np.int32]

    def __init__(self) -> None:
        self._at: dict[int, int] = {}
        self._end = 0
        self.ids = np.zeros(0, dtype=np.int64)
        self.started = np.zeros(0, dtype=np.uint8)
        self.alive = np.zeros(0, dtype=np.bool_)
        for name in FLOATS:
            setattr(self, name, np.zeros(0))
        for name in INTEGERS:
            setattr(self, name, np.zeros(0, dtype=np.int32))
        self._resize(np.zeros(0, dtype=np.int64), 256)

    def __len__(self) -> int:
        return len(self._at)

    def _arrays(self) -> tuple[str, ...]:
        return ("ids", "started", "alive", *FLOATS, *INTEGERS)

    def _resize(self, kept: Rows, room: int) -> None:
        for name in self._arrays():
            before = getattr(self, name)
            after = np.zeros(room, dtype=before.dtype)
            after[: len(kept)] = before[kept]
            setattr(self, name, after)
        self._end = len(kept)
        self._at = {int(job): at for at, job in enumerate(self.ids[: self._end].tolist())}

    def add(self, job: int) -> int:
        """The row of a new job, at the end. Jobs are added by rising numbers."""
        if self._end == len(self.ids):
            kept = np.flatnonzero(self.alive)
            self._resize(kept, max(256, 2 * (len(kept) + 1)))
        at = self._at[job] = self._end
        self._end += 1
        for name in self._arrays():
            getattr(self, name)[at] = 0
        self.ids[at], self.alive[at] = job, True
        return at

    def drop(self, job: int) -> None:
        at = self._at.pop(job, None)
        if at is not None:
            self.alive[at] = False

    def at(self, job: int) -> int:
        return self._at[job]

    def rows(self, pool: int | None = None) -> Rows:
        """Rows of the jobs there are, or of one pool, in order of arrival."""
        chosen = self.alive[: self._end]
        if pool is not None:
            chosen = chosen & (self.pool[: self._end] == pool)
        return np.flatnonzero(chosen)

    def table_of(self, rows: Rows, largest: NDArray[Any], tables: SpeedTables) -> JobTable:
        """largest: (rows,), the largest grants that count now."""
        return JobTable(
            np.maximum.accumulate(self.submit_s[rows]) if len(rows) else np.zeros(0),
            self.size_gpu_s[rows],
            self.smallest[rows],
            np.ascontiguousarray(largest, dtype=np.int32),
            self.table[rows],
            tables.speeds,
            np.ones(len(rows)),
            tables.efficiency,
        )

    def progress_of(self, rows: Rows, now: float) -> Progress:
        grant = self.grant[rows]
        stall = np.where(grant > 0, np.maximum(self.stall_until_s[rows] - now, 0.0), 0.0)
        contention = self.contention[rows]
        return Progress(
            self.left_gpu_s[rows],
            grant,
            stall,
            np.where(grant > 0, self.since_s[rows], 0.0),
            np.where(contention > 0, contention, float(len(rows))),
            np.maximum(self.decisions[rows], 1.0),
            self.started[rows],
        )
