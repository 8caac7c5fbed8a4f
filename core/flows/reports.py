"""What agents report about a domain: checked, and merged into one stream of flow sizes.

A report carries a cumulative histogram of all sizes and an exact sample of the last interval. The
growth of the histogram says how many flows there were; the sample says which. What the sample
lacks (more flows than it holds, or a report that got lost) is filled in from the histogram, so
that every flow counts once and busy agents weigh what they carry.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.core.flows.policy import MAX_CLASSES, MAX_DOMAINS
from intentd.core.stats import LogHistogram

MAX_SAMPLE: Final = 4096  # entries read from one report; agents send at most 2000
MAX_AGE_S: Final = 3600.0
MAX_REASONS: Final = 32
UNKNOWN_SPAN_S: Final = 2.0  # over which flows without a sample are spread
MAX_MERGED: Final = 20_000  # flows of one report and domain that enter the merge


@dataclass(frozen=True, slots=True)
class DomainReport:
    """One agent's measurements of one domain since its boot; the sample since its last report.

    sample: (age_s, size_bytes), newest first. fct, wait: class index -> histogram of seconds.
    degraded: reason -> starts. shaping: what tc does ("shaped", "unshaped", ...), and why.
    """

    histogram: LogHistogram
    sample: tuple[tuple[float, float], ...] = ()
    arrivals: int = 0
    arrived_bytes: float = 0.0
    finished: int = 0
    fct: Mapping[int, LogHistogram] = field(default_factory=dict)
    wait: Mapping[int, LogHistogram] = field(default_factory=dict)
    queue: tuple[int, ...] = ()
    active: tuple[int, ...] = ()
    degraded: Mapping[str, int] = field(default_factory=dict)
    handover: LogHistogram | None = None
    shaping: str = ""
    shaping_reason: str = ""


def domain_reports(body: object) -> dict[str, DomainReport]:
    """The ``flows`` part of a report, every value checked. Raises InputError with its path.

    Fields it does not know are left alone: a newer agent may measure more.
    """
    table = _map(body, "flows")
    if len(table) > MAX_DOMAINS:
        raise InputError("flows", len(table), f"at most {MAX_DOMAINS} domains")
    return {name: _domain(value, f"flows.{name:.64}") for name, value in table.items()}


def _domain(value: object, where: str) -> DomainReport:
    table = _map(value, where)
    shaping = _map(table.get("tc", {}), f"{where}.tc")
    handover = table.get("handover_s")
    return DomainReport(
        histogram=LogHistogram.from_plain(table.get("histogram"), f"{where}.histogram"),
        sample=_sample(table.get("sample", ()), f"{where}.sample"),
        arrivals=int(_number(table.get("arrivals", 0), f"{where}.arrivals")),
        arrived_bytes=_number(table.get("arrived_bytes", 0), f"{where}.arrived_bytes"),
        finished=int(_number(table.get("finished", 0), f"{where}.finished")),
        fct=_per_class(table.get("fct", {}), f"{where}.fct"),
        wait=_per_class(table.get("wait", {}), f"{where}.wait"),
        queue=_counts(table.get("queue", ()), f"{where}.queue"),
        active=_counts(table.get("active", ()), f"{where}.active"),
        degraded={
            reason[:64]: int(_number(count, f"{where}.degraded.{reason:.64}"))
            for reason, count in list(_map(table.get("degraded", {}), f"{where}.degraded").items())[
                :MAX_REASONS
            ]
        },
        handover=None
        if handover is None
        else LogHistogram.from_plain(handover, f"{where}.handover_s"),
        shaping=str(shaping.get("state", ""))[:64],
        shaping_reason=str(shaping.get("reason", ""))[:512],
    )


def new_flows(
    before: LogHistogram | None, report: DomainReport, *, now: float, rng: random.Random
) -> list[tuple[float, float]]:
    """(arrival time, size in bytes) of the flows a report adds to the one before it, in order.

    before: the histogram of this agent's previous report, None for its first one (of a long-lived
    agent the first histogram holds all its past: only the sample is used). At most MAX_MERGED.
    """
    sample = [(now - age, size) for age, size in report.sample]  # newest first
    if before is not None and report.histogram.count < before.count:
        before = LogHistogram(report.histogram.per_octave)  # the agent counts from zero again
    if before is None or before.per_octave != report.histogram.per_octave:
        return _by_time(sample)
    grown = report.histogram.count - before.count
    if len(sample) >= grown:
        return _by_time(sample[:grown])
    missing = _not_sampled(before, report)
    if len(missing) + len(sample) > MAX_MERGED:
        kept = max(1, MAX_MERGED * len(sample) // grown) if sample else 0
        sample = rng.sample(sample, kept)
        missing = rng.sample(missing, min(len(missing), MAX_MERGED - kept))
    # The sample holds the newest flows of an interval: what it lacks came before it, at its pace.
    oldest = min((time for time, _ in sample), default=now)
    span = (now - oldest) * len(missing) / len(sample) if sample else UNKNOWN_SPAN_S
    return _by_time([*sample, *((oldest - rng.random() * span, size) for size in missing)])


def _by_time(newest_first: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Oldest first. Equal times keep their order: sorted by size they would look like a change."""
    rows = newest_first[::-1]
    rows.sort(key=lambda row: row[0])
    return rows


def _not_sampled(before: LogHistogram, report: DomainReport) -> list[float]:
    """Sizes for the histogram's growth less the sample: evenly spaced logarithms in each bucket.

    At most about 4 * MAX_MERGED of them, in proportion.
    """
    sampled = LogHistogram(report.histogram.per_octave)
    for _, size in report.sample:
        sampled.add(size)
    known = {low: count for low, _, count in before.buckets()}
    for low, _, count in sampled.buckets():
        known[low] = known.get(low, 0) + count
    rows = [
        (low, high, count - known.get(low, 0)) for low, high, count in report.histogram.buckets()
    ]
    total = sum(count for _, _, count in rows if count > 0)
    thin = max(1.0, total / (4 * MAX_MERGED))
    sizes: list[float] = []
    for low, high, count in rows:
        shown = math.ceil(count / thin)
        for index in range(shown):
            share = (index + 0.5) / shown
            sizes.append(low * (high / low) ** share if low > 0 else 0.0)
    return [min(size, report.histogram.max) for size in sizes]


def _map(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(where, f"{value!r:.60}", "a map with text keys")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise InputError(where, f"{value!r:.60}", "a finite number >= 0")
    return value


def _rows(value: object, where: str, most: int) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or len(value) > most:
        raise InputError(where, f"{value!r:.60}", f"a list of at most {most}")
    return value


def _counts(value: object, where: str) -> tuple[int, ...]:
    return tuple(int(_number(item, where)) for item in _rows(value, where, MAX_CLASSES))


def _sample(value: object, where: str) -> tuple[tuple[float, float], ...]:
    rows = []
    for index, row in enumerate(_rows(value, where, MAX_SAMPLE)):
        pair = _rows(row, f"{where}[{index}]", 2)
        if len(pair) != 2:
            raise InputError(f"{where}[{index}]", f"{row!r:.60}", "[age_s, size_bytes]")
        age = min(_number(pair[0], f"{where}[{index}][0]"), MAX_AGE_S)
        rows.append((age, float(_number(pair[1], f"{where}[{index}][1]"))))
    return tuple(rows)


def _per_class(value: object, where: str) -> dict[int, LogHistogram]:
    rows = {}
    for name, plain in _map(value, where).items():
        if not name.isdecimal() or not 0 <= int(name) < MAX_CLASSES:
            raise InputError(f"{where}.{name:.20}", name[:20], f"a class 0 to {MAX_CLASSES - 1}")
        rows[int(name)] = LogHistogram.from_plain(plain, f"{where}.{name}")
    return rows
