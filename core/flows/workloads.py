"""Flow-size distributions: the workloads of the evaluation as data, and files of the user's own.

A CDF is a list of (size, cumulative share) points, linear in size between them (inverse-transform
sampling draws the same law). Standard library only: agents and traffic generators import it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from intentd.core.errors import InputError

MAX_POINTS: Final = 100_000
MAX_SIZE_BYTES: Final = 1e18  # their squares, and sums of those, are far from a float's end
HEADER: Final = "size_bytes,cdf"
_END_TOLERANCE: Final = 1e-9


@dataclass(frozen=True, slots=True)
class SizeCdf:
    """Cumulative distribution of flow sizes.

    sizes_bytes: never falling, 0 to 1e18, the last > 0. shares: never falling, in 0..1, the last 1.
    Two points of the same size are an atom (data mining: 10 % of the flows are exactly 180 B);
    a first share above 0 is an atom too. Raises InputError naming the point.
    """

    sizes_bytes: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_points(self.sizes_bytes, self.shares)

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> SizeCdf:
        """From (size_bytes, cumulative share) pairs."""
        pairs = list(points)
        return cls(
            tuple(float(size) for size, _ in pairs), tuple(float(share) for _, share in pairs)
        )

    def quantile(self, u: float) -> float:
        """Size in bytes below which a share u (0..1) of the flows lies."""
        if not 0.0 <= u <= 1.0:
            raise ValueError(f"u = {u!r} is not in 0..1")
        shares, sizes = self.shares, self.sizes_bytes
        right = bisect_left(shares, u)
        if right == 0:
            return sizes[0]
        if right >= len(shares):
            return sizes[-1]
        low, high = shares[right - 1], shares[right]
        return sizes[right - 1] + (sizes[right] - sizes[right - 1]) * (u - low) / (high - low)

    def share(self, size_bytes: float) -> float:
        """Share of the flows with size <= size_bytes."""
        sizes, shares = self.sizes_bytes, self.shares
        right = bisect_right(sizes, size_bytes)
        if right == 0:
            return 0.0
        if right >= len(sizes):
            return 1.0
        low, high = sizes[right - 1], sizes[right]
        inside = (size_bytes - low) / (high - low)
        return shares[right - 1] + (shares[right] - shares[right - 1]) * inside

    def pieces(
        self, above_bytes: float = -1.0, up_to_bytes: float = math.inf
    ) -> list[tuple[float, float, float]]:
        """(low, high, probability) of each uniform piece with above < size <= up_to.

        Atoms are pieces with low == high. Probabilities are shares of *all* flows.
        """
        rows: list[tuple[float, float, float]] = []

        def add(low: float, high: float, probability: float) -> None:
            if probability <= 0.0:
                return
            if high == low:
                if above_bytes < low <= up_to_bytes:
                    rows.append((low, low, probability))
                return
            left, right = max(low, above_bytes), min(high, up_to_bytes)
            if right > left:
                rows.append((left, right, probability * (right - left) / (high - low)))

        add(self.sizes_bytes[0], self.sizes_bytes[0], self.shares[0])
        for i in range(1, len(self.sizes_bytes)):
            add(
                self.sizes_bytes[i - 1],
                self.sizes_bytes[i],
                self.shares[i] - self.shares[i - 1],
            )
        return rows

    def partial_moment(
        self, power: int, above_bytes: float = -1.0, up_to_bytes: float = math.inf
    ) -> float:
        """E[S^power; above < S <= up_to], power 0, 1 or 2."""
        total = []
        for low, high, probability in self.pieces(above_bytes, up_to_bytes):
            if power == 0:
                value = 1.0
            elif power == 1:
                value = (low + high) / 2.0
            elif power == 2:
                value = (low * low + low * high + high * high) / 3.0
            else:
                raise ValueError(f"power = {power!r} is not 0, 1 or 2")
            total.append(probability * value)
        return math.fsum(total)

    @property
    def mean_bytes(self) -> float:
        return self.partial_moment(1)

    @property
    def second_moment(self) -> float:
        """E[S^2] in bytes^2."""
        return self.partial_moment(2)

    @property
    def c2(self) -> float:
        """Squared coefficient of variation, Var / mean^2."""
        return max(0.0, self.second_moment / self.mean_bytes**2 - 1.0)

    def scale(self, factor: float) -> SizeCdf:
        """Every size multiplied; the shares stay."""
        if not (math.isfinite(factor) and factor > 0):
            raise InputError("scale", factor, "a finite factor > 0")
        return SizeCdf(tuple(size * factor for size in self.sizes_bytes), self.shares)


def _check_points(sizes: Sequence[float], shares: Sequence[float]) -> None:
    if not sizes or len(sizes) != len(shares):
        raise InputError("cdf", f"{len(sizes)} points", "at least one size_bytes,cdf point")
    if len(sizes) > MAX_POINTS:
        raise InputError("cdf", f"{len(sizes)} points", f"at most {MAX_POINTS} points")
    before_size = before_share = 0.0
    for index, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if not 0 <= size <= MAX_SIZE_BYTES:
            most = f"{MAX_SIZE_BYTES:g}"
            raise InputError(
                f"cdf[{index}].size_bytes", size, f"a number of bytes from 0 to {most}"
            )
        if not 0.0 <= share <= 1.0 + _END_TOLERANCE:
            raise InputError(f"cdf[{index}].cdf", share, "a share in 0 to 1")
        if size < before_size:
            raise InputError(
                f"cdf[{index}].size_bytes", size, f"at least the point before ({before_size:g})"
            )
        if share < before_share:
            raise InputError(
                f"cdf[{index}].cdf", share, f"at least the point before ({before_share:g})"
            )
        before_size, before_share = size, share
    if abs(before_share - 1.0) > _END_TOLERANCE:
        raise InputError(f"cdf[{len(shares) - 1}].cdf", before_share, "1 (a CDF ends at 1)")
    if before_size <= 0:
        raise InputError(
            f"cdf[{len(sizes) - 1}].size_bytes", before_size, "a largest size > 0 bytes"
        )


def parse_cdf(text: str, name: str = "cdf") -> SizeCdf:
    """From lines ``size_bytes,cdf``; blank lines, ``#`` comments and that one header may stand.

    Raises InputError with the line: other headers, missing or extra columns, no numbers, NaN,
    negative sizes, sizes or shares that fall, a last share that is not 1, no points at all.
    """
    points: list[tuple[float, float]] = []
    lines: list[int] = []
    first = True
    for number, raw in enumerate(text.lstrip("\ufeff").splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        columns = [column.strip() for column in line.split(",")]
        if first:
            first = False
            if columns == HEADER.split(","):
                continue
        if len(columns) != 2:
            raise InputError(f"{name}: line {number}", line[:80], f"two columns, {HEADER}")
        try:
            points.append((float(columns[0]), float(columns[1])))
        except ValueError:
            expected = f"numbers, or the header {HEADER}" if not points else "numbers"
            raise InputError(f"{name}: line {number}", line[:80], expected) from None
        lines.append(number)
        if len(points) > MAX_POINTS:
            raise InputError(name, f"more than {MAX_POINTS} points", f"at most {MAX_POINTS}")
    if not points:
        raise InputError(name, "no points", f"lines of {HEADER}")
    try:
        return SizeCdf.of(points)
    except InputError as error:
        where = name
        if error.field.startswith("cdf["):
            index, _, column = error.field[4:].partition("].")
            where = f"{name}: line {lines[int(index)]}: {column}"
        raise InputError(where, error.value, error.expected) from None


@dataclass(frozen=True, slots=True)
class Workload:
    """A named size distribution with its source.

    published_thresholds_bytes: class limits of the prototype the dissertation's evaluation ran;
        a preset, not what Algorithm 1 yields (its values differ, its class counts agree).
    """

    name: str
    cdf: SizeCdf
    source: str
    published_thresholds_bytes: tuple[float, ...] = (math.inf,)


def _workload(
    name: str, points: str, source: str, published: tuple[float, ...] = ()
) -> tuple[str, Workload]:
    pairs = [point.split(":") for point in points.split()]
    cdf = SizeCdf.of((float(size), float(share)) for size, share in pairs)
    return name, Workload(name, cdf, source, (*published, math.inf))


WORKLOADS: Final[dict[str, Workload]] = dict(
    (
        _workload(
            "data-mining",
            "180:0 180:.1 216:.2 560:.3 900:.4 1100:.5 1870:.6 3160:.7 10000:.8 400000:.9 "
            "3.16e6:.95 1e8:.98 1e9:1",
            "Greenberg et al., VL2, SIGCOMM 2009; dissertation, section 2.6.1",
            (3400.0, 16176.0, 545316.0, 5159030.0, 129372452.0),
        ),
        _workload(
            "web-search",
            "10000:0 10000:.15 20000:.2 30000:.3 50000:.4 80000:.53 200000:.6 1e6:.7 2e6:.8 "
            "5e6:.9 1e7:.97 3e7:1",
            "Alizadeh et al., DCTCP, SIGCOMM 2010; dissertation, section 2.6.1",
            (113154.0, 5671937.0),
        ),
        _workload(
            "cache",
            "74000:0 145000:.024 148000:.1 348000:.201 468000:.306 585000:.4 718000:.5 "
            "760000:.6 1121000:.7 1454000:.8 2488000:.9 7078000:.96 7985000:.996 46277000:1",
            "Roy et al., Inside the Social Network's (Datacenter) Network, SIGCOMM 2015, cache "
            "followers, sizes x 100; dissertation, section 2.6.1",
            (3072000.0,),
        ),
        _workload(
            "hadoop",
            "279:0 357:.064 644:.45 857:.745 1812:.867 8414:.918 1291443:.951 1929718:.963 "
            "412051140:1",
            "Roy et al., Inside the Social Network's (Datacenter) Network, SIGCOMM 2015, Hadoop",
            (2640.0, 13332.0, 2783837.0),
        ),
        _workload(
            "uniform",
            "5e6:0 15e6:1",
            "U[5 MB, 15 MB], as in the prototype of the dissertation's section 2.6",
        ),
        _workload(
            "uniform-chapter",
            "1e6:0 15e6:1",
            "U[1 MB, 15 MB], as printed in the dissertation's section 2.6.1",
        ),
    )
)


def workload(name: str) -> Workload:
    """By name. Raises InputError listing the names."""
    found = WORKLOADS.get(name)
    if found is None:
        raise InputError("workload", name, f"one of {', '.join(WORKLOADS)}")
    return found
