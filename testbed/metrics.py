"""Figures from records: completion times, ratios, intervals, how busy the bottleneck was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from intentd.testbed.traffic.records import FlowRecord

PERCENTILES: Final = {
    "p50": 50.0,
    "p90": 90.0,
    "p95": 95.0,
    "p99": 99.0,
    "p995": 99.5,
}
METRICS: Final = ("mean", *PERCENTILES)
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_TC_ROOT: Final = 0xFFFFFFFF

Samples = Sequence[tuple[float, Sequence[tuple[int, int, int, int]]]]


def completion_metrics(fct_s: Iterable[float]) -> dict[str, float]:
    """mean and the percentiles of METRICS, in the unit given; {} of nothing."""
    values = np.fromiter(fct_s, dtype=float)
    if values.size == 0:
        return {}
    found = {"mean": float(values.mean())}
    points = np.percentile(values, list(PERCENTILES.values()))
    return found | {name: float(point) for name, point in zip(PERCENTILES, points, strict=True)}


def ratios(above: Mapping[str, float], below: Mapping[str, float]) -> dict[str, float]:
    """above / below per metric that both have."""
    return {name: above[name] / below[name] for name in above if name in below and below[name] > 0}


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); nan for a single value."""
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    freedom = len(values) - 1
    quantile = _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.4 / freedom
    return mean, quantile * math.sqrt(variance / len(values))


def waiting_spans(records: Sequence[FlowRecord]) -> list[tuple[float, float]]:
    """Times in which some flow waited for its turn, merged and in order."""
    spans = sorted((r.arrival_s, r.granted_s) for r in records if r.granted_s > r.arrival_s)
    merged: list[tuple[float, float]] = []
    for begin, end in spans:
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def busy_while_waiting(
    samples: Samples, start_s: float, records: Sequence[FlowRecord], rate_bps: float
) -> dict[str, float]:
    """Share of the bottleneck used in those sample intervals in which some flow waited throughout.

    samples: (clock, [(handle, parent, sent bytes, backlog)]) as the server took them; start_s: the
    clock's value at time 0 of the records. Returns busy_share and observed_s (how long that was).
    HTB lets a burst follow an idle moment, so a single interval may exceed 1; the total may not.
    """
    spans = waiting_spans(records)
    sent = observed = 0.0
    position = 0
    for (t0, before), (t1, after) in itertools.pairwise(samples):
        begin, end = t0 - start_s, t1 - start_s
        while position < len(spans) and spans[position][1] < end:
            position += 1
        if position == len(spans):
            break
        if spans[position][0] <= begin and end <= spans[position][1]:
            moved = _total(after) - _total(before)
            if moved >= 0:
                sent += moved
                observed += end - begin
    share = 8 * sent / (observed * rate_bps) if observed > 0 else math.nan
    return {"busy_share": share, "observed_s": observed}


def _total(classes: Sequence[tuple[int, int, int, int]]) -> int:
    return sum(sent for _, parent, sent, _ in classes if parent == _TC_ROOT)


def handover_s(records: Sequence[FlowRecord]) -> list[float]:
    """How long a class sent nothing between two of its flows although the second one waited.

    From the last byte of a flow to the first byte of the next one, both as the client saw them;
    below zero where the turn was announced early. Only where one flow of a class sends at a time.
    """
    by_class: dict[tuple[int, int], list[FlowRecord]] = {}
    for record in records:
        by_class.setdefault((record.server, record.class_index), []).append(record)
    bubbles: list[float] = []
    for group in by_class.values():
        group.sort(key=lambda record: record.granted_s)
        for before, after in itertools.pairwise(group):
            if after.arrival_s < before.finished_s <= after.finished_s:
                bubbles.append(after.first_byte_s - before.finished_s)
    return bubbles


def floor_s(records: Sequence[FlowRecord], below_bytes: int = 10_000) -> float:
    """Mean completion time of small flows that did not wait: what the path itself costs.

    "Did not wait" is a turn within two milliseconds while nobody else was on the way, so that
    only processes and kernel are measured; nan where no flow is small.
    """
    ordered = sorted(records, key=lambda record: record.arrival_s)
    alone: list[float] = []
    busy_until = -math.inf
    for index, record in enumerate(ordered):
        following = ordered[index + 1].arrival_s if index + 1 < len(ordered) else math.inf
        if (
            record.size_bytes <= below_bytes
            and record.arrival_s >= busy_until
            and record.finished_s <= following
        ):
            alone.append(record.fct_s)
        busy_until = max(busy_until, record.finished_s)
    return math.fsum(alone) / len(alone) if alone else math.nan
