"""Demand functions: how long a job takes on n GPUs of a type, spread over some nodes.

``demand(n, gpu_type, spread) -> seconds`` (dissertation, sections 3.3 and 3.4) comes from a
measured table, a named profile or the linear law. The scheduler works on its reciprocal, a *speed
table*: progress in GPU seconds per second at 0..n GPUs, equal to the smallest allocation at that
allocation, so that a job's size is ``demand(smallest) * smallest`` GPU seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError
from intentd.core.units import is_finite

Array = NDArray[np.float64]
ANY_TYPE: Final = ""
MAX_GPUS: Final = 4096


def envelope(speeds: Sequence[float] | Array) -> tuple[Array, int]:
    """Monotone envelope of a speed table, and the GPUs after which nothing is gained.

    speeds: at 0..n GPUs. A measurement that slows with more GPUs is replaced by the best one
    before it: nobody has to use the GPUs they hold.
    """
    table = np.maximum.accumulate(np.asarray(speeds, dtype=np.float64))
    return table, int(np.argmax(table >= table[-1]))


def efficiency(speeds: Array, smallest: int = 1) -> Array:
    """Running minimum of speed per GPU, (n + 1,): section 3.3.3 takes zeta as non-increasing.

    Measured tables are not (packing makes 4 GPUs better than 3); a cap is the last allocation
    before the efficiency *first* falls below zeta, as the authors compute it.
    """
    gpus = np.arange(len(speeds), dtype=np.float64)
    gpus[0] = 1.0
    ratio = speeds / gpus
    ratio[: max(smallest, 1)] = ratio[max(smallest, 1)]
    return np.minimum.accumulate(ratio)


@dataclass(frozen=True, slots=True)
class DemandFunction:
    """Seconds of one job by allocation. Build with the functions below; raises InputError.

    seconds: (gpu_type, spread) -> seconds at smallest..largest GPUs; spread 1 is packed on one
        node, the type ANY_TYPE stands for every type that has no entry.
    warnings: what was repaired, in words.
    """

    smallest: int
    seconds: Mapping[tuple[str, int], tuple[float, ...]]
    warnings: tuple[str, ...] = field(default=())

    @property
    def largest(self) -> int:
        return self.smallest + max(len(row) for row in self.seconds.values()) - 1

    @property
    def size_gpu_s(self) -> float:
        """demand(smallest) * smallest on the fastest type that has a packed entry."""
        return self.smallest * min(row[0] for (_, s), row in self.seconds.items() if s == 1)

    def types(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(gpu_type for gpu_type, _ in self.seconds))

    def row(self, gpu_type: str, spread: int) -> tuple[float, ...]:
        """The entry of a type at the nearest spread not above the asked one."""
        name = gpu_type if (gpu_type, 1) in self.seconds else ANY_TYPE
        known = [s for t, s in self.seconds if t == name and s <= spread]
        if not known:
            raise InputError("gpu_type", gpu_type, f"one of {', '.join(self.types())}")
        return self.seconds[(name, max(known))]

    def demand(self, gpus: float, gpu_type: str = ANY_TYPE, spread: int = 1) -> float:
        """Seconds on that many GPUs; infinite below the smallest allocation."""
        if gpus < self.smallest:
            return math.inf
        row = self.row(gpu_type, spread)
        at = min(gpus - self.smallest, len(row) - 1)
        low = int(at)
        if low == at:
            return row[low]
        speed = (1 - at + low) / row[low] + (at - low) / row[low + 1]
        return 1 / speed

    def speeds(self, gpu_type: str = ANY_TYPE, node_gpus: int = 0) -> Array:
        """Speed table at 0..largest GPUs packed as tightly as nodes of node_gpus allow.

        node_gpus 0: one node holds everything. In GPU seconds per second, see the module.
        """
        size = self.size_gpu_s
        table = np.zeros(self.largest + 1)
        for gpus in range(self.smallest, self.largest + 1):
            spread = -(-gpus // node_gpus) if node_gpus else 1
            table[gpus] = size / self.demand(gpus, gpu_type, spread)
        table[: self.smallest] = table[self.smallest] * np.arange(self.smallest) / self.smallest
        return envelope(table)[0]


def linear(size_gpu_s: float, largest: int, smallest: int = 1) -> DemandFunction:
    """A job that scales perfectly up to its largest allocation."""
    _check_range(smallest, largest)
    _check_seconds("size_gpu_s", size_gpu_s)
    row = tuple(size_gpu_s / gpus for gpus in range(smallest, largest + 1))
    return DemandFunction(smallest, {(ANY_TYPE, 1): row})


def from_table(
    table: Mapping[object, object],
    *,
    smallest: int = 1,
    largest: int | None = None,
    gpu_type: str = ANY_TYPE,
    spread: int = 1,
) -> DemandFunction:
    """From measured points ``{gpus: seconds}``; gaps are interpolated in speed.

    Raises InputError for a table that is empty, negative, NaN or lacks the smallest allocation.
    """
    rows = {(gpu_type, spread): table}
    if spread != 1:
        rows[(gpu_type, 1)] = table
    return from_tables(rows, smallest=smallest, largest=largest)


def from_tables(
    tables: Mapping[tuple[str, int], Mapping[object, object]],
    *,
    smallest: int = 1,
    largest: int | None = None,
) -> DemandFunction:
    """From several measured tables, by (gpu_type, spread)."""
    if not tables:
        raise InputError("demand", dict(tables), "at least one table")
    rows: dict[tuple[str, int], tuple[float, ...]] = {}
    warnings: list[str] = []
    for (gpu_type, spread), table in tables.items():
        where = "demand" if gpu_type == ANY_TYPE else f"demand[{gpu_type}]"
        points = _points(table, where)
        if smallest not in points:
            raise InputError(where, sorted(points), f"a table with the minimum of {smallest} GPUs")
        top = largest if largest is not None else max(points)
        _check_range(smallest, top)
        known = np.array(sorted(points), dtype=np.float64)
        speeds = np.array([1 / points[int(gpus)] for gpus in known])
        wanted = np.arange(smallest, top + 1, dtype=np.float64)
        raw = np.interp(wanted, known, speeds)
        repaired, _ = envelope(raw)
        if np.any(repaired > raw * (1 + 1e-12)):
            slow = int(wanted[np.argmax(repaired > raw * (1 + 1e-12))])
            warnings.append(
                f"{where}: slower at {slow} GPUs than at fewer; monotone envelope taken"
            )
        best = int(np.argmax(repaired >= repaired[-1] * (1 - 1e-12)))
        rows[(gpu_type, spread)] = tuple((1 / repaired[: best + 1]).tolist())
    return DemandFunction(smallest, rows, tuple(warnings))


def _points(table: Mapping[object, object], where: str) -> dict[int, float]:
    if not table:
        raise InputError(where, table, "a table {GPUs: seconds} with at least one entry")
    points: dict[int, float] = {}
    for gpus, seconds in table.items():
        try:
            at = int(str(gpus))
        except ValueError:
            at = 0
        if not 1 <= at <= MAX_GPUS:
            raise InputError(where, gpus, f"a number of GPUs from 1 to {MAX_GPUS}")
        points[at] = _check_seconds(f"{where}[{at}]", seconds)
    return points


def _check_seconds(where: str, value: object) -> float:
    if is_finite(value) and value > 0:
        return float(value)
    raise InputError(where, value, "a finite number > 0")


def _check_range(smallest: int, largest: int) -> None:
    if not 1 <= smallest <= MAX_GPUS:
        raise InputError("min_gpus", smallest, f"a number of GPUs from 1 to {MAX_GPUS}")
    if largest < smallest:
        raise InputError("max_gpus", largest, f"at least min_gpus ({smallest})")
    if largest > MAX_GPUS:
        raise InputError("max_gpus", largest, f"at most {MAX_GPUS}")
