"""Tables of the console's charts, from what the applications know. Rows are bounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from intentd.controller.flows_app import Domain
from intentd.core.stats import LogHistogram

SIZE_ROWS: Final = 64
SPEND_ROWS: Final = 100


def merged(histograms: Sequence[LogHistogram]) -> LogHistogram | None:
    """Those of the first one's grain; None when there is nothing in them."""
    whole: LogHistogram | None = None
    for histogram in histograms:
        whole = whole or LogHistogram(histogram.per_octave)
        if histogram.per_octave == whole.per_octave:
            whole.merge(histogram)
    return whole if whole is not None and whole.count else None


def sizes(domain: Domain) -> list[dict[str, float]]:
    """Shares of flows and of bytes up to a size; octaves, or coarser. Sizes of all agents."""
    whole = merged([report.histogram for report in domain.reports.values()])
    if whole is None:
        return []
    buckets = whole.buckets()
    total = sum(count * (low + high) / 2 for low, high, count in buckets) or 1.0
    flows, carried = 0, 0.0
    rows: list[dict[str, float]] = []
    octave = 0.0
    for at, (low, high, count) in enumerate(buckets):
        flows += count
        carried += count * (low + high) / 2
        if high >= 2 * octave or at == len(buckets) - 1:
            octave = high
            rows.append(
                {
                    "size_bytes": min(high, whole.max),
                    "flows": flows / whole.count,
                    "bytes": min(1.0, carried / total),
                }
            )
    return rows[:SIZE_ROWS]


def where_time_goes(domain: Domain) -> list[dict[str, Any]]:
    """Per class: mean seconds of a flow at the gate and on the wire."""
    rows = []
    for index in range(len(domain.policy.classes) if domain.policy is not None else 0):
        reports = domain.reports.values()
        fct = merged([report.fct[index] for report in reports if index in report.fct])
        wait = merged([report.wait[index] for report in reports if index in report.wait])
        if fct is None:
            continue
        waited = wait.mean if wait is not None else 0.0
        rows.append(
            {
                "class": index,
                "flows": fct.count,
                "fct_s": fct.mean,
                "wait_s": min(waited, fct.mean),
                "transfer_s": max(0.0, fct.mean - waited),
            }
        )
    return rows


def front(document: Mapping[str, Any]) -> dict[str, Any]:
    """The Pareto front by its objectives: points with what the held-out half says of them."""
    points = [
        {"index": index, "values": point["test"] or point["train"], "train": point["train"]}
        for index, point in enumerate(document["front"])
    ]
    names = list(points[0]["values"]) if points else []
    present = document.get("present")
    return {
        "number": document["number"],
        "made_wall_s": document["made_wall_s"],
        "reason": document["reason"],
        "basis": document["basis"],
        "objectives": names,
        "points": points,
        "in_force": document["in_force"],
        "present": None if present is None else (present["test"] or present["train"]),
    }


def own_books(books: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of proxies that share their books once only: the first's."""
    known: set[str] = set()
    found = []
    for book in books:
        name = str(book.get("books", ""))
        if not name or name not in known:
            found.append(book)
        known.add(name)
    return found


def spend(books: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Sums over own_books and days: by key, by service type, by model, by day."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for book in books:
        for row in book.get("spend", ()):
            for by in ("key", "service_type", "model", "day"):
                name = str(row[by])
                sums = found.setdefault(by, {}).setdefault(
                    name, {"name": name, "requests": 0, "failed": 0, "tokens": 0, "cost_nano": 0}
                )
                sums["requests"] += row["requests"]
                sums["failed"] += row["failed"]
                sums["tokens"] += row["in_tokens"] + row["out_tokens"]
                sums["cost_nano"] += row["cost_nano"]
    tables = {by: list(rows.values()) for by, rows in found.items()}
    for by, rows in tables.items():
        rows.sort(key=lambda row: row["name"] if by == "day" else -row["cost_nano"])
    return {by: rows[:SPEND_ROWS] for by, rows in tables.items()}
