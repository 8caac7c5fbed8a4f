"""Bounded summaries of many numbers: histogram, reservoir, percentile. Standard library only.

Agents keep these on their path, so nothing here imports numpy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from intentd.core.errors import InputError

MIN_INDEX: Final = -1024  # 2^-64 at 16 buckets an octave
MAX_INDEX: Final = 1280  # 2^80
MAX_COUNT: Final = 2**63 - 1
_PLAIN_FIELDS: Final = ("per_octave", "zeros", "buckets", "sum", "min", "max")


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile (0..1) of an ascending sequence, linear between ranks (as numpy's default).

    Raises ValueError if the sequence is empty or q leaves 0..1.
    """
    if not ordered:
        raise ValueError("percentile of nothing")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q = {q!r} is not in 0..1")
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    if below + 1 >= len(ordered):
        return float(ordered[-1])
    low, high = float(ordered[below]), float(ordered[below + 1])
    return low + (high - low) * (position - below)


class LogHistogram:
    """Counts in log-spaced buckets: bucket i holds values in [2^(i/per_octave), 2^((i+1)/..)).

    Sixteen buckets an octave bound the relative error of a quantile by 4.4 %. Values are >= 0;
    zero has a bucket of its own; the ends clamp. At most MAX_INDEX - MIN_INDEX + 1 buckets exist,
    so memory is bounded. Histograms of the same per_octave merge exactly.
    """

    __slots__ = ("_buckets", "_scale", "count", "max", "min", "per_octave", "sum", "zeros")

    def __init__(self, per_octave: int = 16) -> None:
        if not 1 <= per_octave <= 64:
            raise ValueError(f"per_octave = {per_octave!r} is not in 1..64")
        self.per_octave = per_octave
        self._scale = per_octave / math.log(2.0)
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.zeros = 0
        self.sum = 0.0
        self.min = math.inf
        self.max = 0.0

    def add(self, value: float) -> None:
        """Count one value. Raises ValueError unless it is finite and >= 0."""
        if not 0.0 <= value < math.inf:
            raise ValueError(f"histogram value {value!r} is not a finite number >= 0")
        self.count += 1
        self.sum += value
        if value > self.max:
            self.max = value
        if value < self.min:
            self.min = value
        if value == 0.0:
            self.zeros += 1
            return
        index = math.floor(math.log(value) * self._scale)
        index = MIN_INDEX if index < MIN_INDEX else min(index, MAX_INDEX)
        self._buckets[index] = self._buckets.get(index, 0) + 1

    def merge(self, other: LogHistogram) -> None:
        """Add another's counts. Raises ValueError if its buckets differ."""
        if other.per_octave != self.per_octave:
            raise ValueError(
                f"cannot merge {other.per_octave} buckets an octave into {self.per_octave}"
            )
        for index, n in other._buckets.items():
            self._buckets[index] = self._buckets.get(index, 0) + n
        self.count += other.count
        self.zeros += other.zeros
        self.sum += other.sum
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)

    @property
    def mean(self) -> float:
        """Exact mean of what was added; 0 when empty."""
        return self.sum / self.count if self.count else 0.0

    def quantile(self, q: float) -> float:
        """The q-quantile, geometric inside a bucket, kept within min and max; 0 when empty."""
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q = {q!r} is not in 0..1")
        if not self.count:
            return 0.0
        wanted = q * self.count
        if wanted <= self.zeros and self.zeros:
            return 0.0
        seen = float(self.zeros)
        for index, n in sorted(self._buckets.items()):
            if seen + n >= wanted:
                inside = (wanted - seen) / n
                value = math.pow(2.0, (index + inside) / self.per_octave)
                return min(max(value, self.min), self.max)
            seen += n
        return self.max

    def share_up_to(self, value: float) -> float:
        """Share of the counts <= value, linear inside a bucket's logarithm; 0 when empty."""
        if not self.count or value < 0:
            return 0.0
        if value >= self.max:
            return 1.0
        below = float(self.zeros)
        if value > 0.0:
            position = math.log(value) * self._scale
            for index, n in self._buckets.items():
                below += n * min(max(position - index, 0.0), 1.0)
        return below / self.count

    def buckets(self) -> list[tuple[float, float, int]]:
        """(low, high, count) of each bucket in use, ascending; zeros as (0, 0, n)."""
        rows = [(0.0, 0.0, self.zeros)] if self.zeros else []
        for index, n in sorted(self._buckets.items()):
            low, high = (math.pow(2.0, (index + i) / self.per_octave) for i in (0, 1))
            rows.append((low, high, n))
        return rows

    def to_plain(self) -> dict[str, Any]:
        """As types every encoder knows; see from_plain."""
        return {
            "per_octave": self.per_octave,
            "zeros": self.zeros,
            "buckets": [[index, n] for index, n in sorted(self._buckets.items())],
            "sum": self.sum,
            "min": self.min if self.count else 0.0,
            "max": self.max,
        }

    @classmethod
    def from_plain(cls, plain: object, field: str = "histogram") -> LogHistogram:
        """Inverse of to_plain for untrusted input. Raises InputError naming what is wrong."""
        if not isinstance(plain, Mapping):
            raise InputError(field, _short(plain), "a histogram (a map)")
        for name in plain:
            if name not in _PLAIN_FIELDS:
                raise InputError(f"{field}.{name!s:.40}", "", f"one of {', '.join(_PLAIN_FIELDS)}")
        per_octave = plain.get("per_octave")
        if type(per_octave) is not int or not 1 <= per_octave <= 64:
            raise InputError(f"{field}.per_octave", _short(per_octave), "an integer 1 to 64")
        histogram = cls(per_octave)
        histogram.zeros = _count(plain.get("zeros", 0), f"{field}.zeros")
        rows = plain.get("buckets")
        if not isinstance(rows, (list, tuple)) or len(rows) > MAX_INDEX - MIN_INDEX + 1:
            raise InputError(f"{field}.buckets", _short(rows), "a list of [index, count]")
        total = histogram.zeros
        for row in rows:
            if not isinstance(row, (list, tuple)) or len(row) != 2:
                raise InputError(f"{field}.buckets", _short(row), "[index, count]")
            index, n = row
            if type(index) is not int or not MIN_INDEX <= index <= MAX_INDEX:
                expected = f"an index {MIN_INDEX} to {MAX_INDEX}"
                raise InputError(f"{field}.buckets", _short(index), expected)
            if index in histogram._buckets:
                raise InputError(f"{field}.buckets", index, "each index once")
            count = _count(n, f"{field}.buckets[{index}]")
            if count:
                histogram._buckets[index] = count
            total += count
        histogram.count = total
        histogram.sum = _finite(plain.get("sum", 0.0), f"{field}.sum")
        low = _finite(plain.get("min", 0.0), f"{field}.min")
        histogram.max = _finite(plain.get("max", 0.0), f"{field}.max")
        if low > histogram.max:
            raise InputError(f"{field}.min", low, f"at most max ({histogram.max:g})")
        histogram.min = low if total else math.inf
        return histogram


class Reservoir:
    """A uniform sample of at most `capacity` of all values offered (Vitter's Algorithm R).

    The random source is passed in, so a run repeats from its seed.
    """

    __slots__ = ("_rng", "_values", "capacity", "offered")

    def __init__(self, capacity: int, rng: random.Random) -> None:
        if capacity < 1:
            raise ValueError(f"capacity = {capacity!r} is not >= 1")
        self.capacity = capacity
        self.offered = 0
        self._rng = rng
        self._values: list[float] = []

    def add(self, value: float) -> None:
        self.offered += 1
        if len(self._values) < self.capacity:
            self._values.append(value)
            return
        slot = int(self._rng.random() * self.offered)
        if slot < self.capacity:
            self._values[slot] = value

    def extend(self, values: Iterable[float]) -> None:
        for value in values:
            self.add(value)

    def values(self) -> list[float]:
        """A copy, in no particular order."""
        return list(self._values)

    def clear(self) -> None:
        """Forget everything, as if nothing had been offered."""
        self._values.clear()
        self.offered = 0

    def __len__(self) -> int:
        return len(self._values)


def _short(value: object) -> str:
    return f"{value!r:.60}"


def _count(value: object, field: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise InputError(field, _short(value), "a count >= 0")
    return value


def _finite(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(field, _short(value), "a finite number >= 0")
    if not 0 <= value < math.inf:
        raise InputError(field, _short(value), "a finite number >= 0")
    return float(value)
