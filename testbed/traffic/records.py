"""What became of each flow: one record a flow, written as CSV by the clients."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from intentd.core.errors import InputError
from intentd.testbed.traffic.trace import TraceFlow


@dataclass(frozen=True, slots=True)
class FlowRecord:
    """One finished flow; times in seconds from the start of the run, on the monotonic clock.

    index: its place in the trace. due_s: when it should have arrived; arrival_s: when the client
    asked for its turn; granted_s: when the turn came; first_byte_s, finished_s: when the first and
    the last byte were there.
    degraded: "" if the turn was ordered, else the reason. A flow that never finished has no record.
    """

    index: int
    host: int
    server: int
    size_bytes: int
    class_index: int
    due_s: float
    arrival_s: float
    granted_s: float
    first_byte_s: float
    finished_s: float
    degraded: str = ""

    @property
    def fct_s(self) -> float:
        """Flow completion time: arrival to last byte."""
        return self.finished_s - self.arrival_s

    @property
    def wait_s(self) -> float:
        return self.granted_s - self.arrival_s


_NAMES = tuple(spec.name for spec in fields(FlowRecord))


def write_records(path: Path, records: Iterable[FlowRecord]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_NAMES)
        for record in records:
            writer.writerow([f"{v:.9f}" if isinstance(v, float) else v for v in astuple(record)])


def read_records(path: Path) -> list[FlowRecord]:
    """Raises InputError naming the line."""
    records: list[FlowRecord] = []
    with path.open(newline="") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header is None or tuple(header) != _NAMES:
            raise InputError(f"{path}:1", header, ",".join(_NAMES))
        for number, row in enumerate(reader, start=2):
            try:
                index, host, server, size, cls = (int(cell) for cell in row[:5])
                due, arrival, granted, first, finished = (float(cell) for cell in row[5:10])
                records.append(
                    FlowRecord(
                        index,
                        host,
                        server,
                        size,
                        cls,
                        due,
                        arrival,
                        granted,
                        first,
                        finished,
                        row[10],
                    )
                )
            except (ValueError, IndexError):
                raise InputError(f"{path}:{number}", row, ",".join(_NAMES)) from None
    return records


def as_trace(records: Sequence[FlowRecord]) -> list[TraceFlow]:
    """The arrivals as they really happened: what the simulator replays."""
    return [
        TraceFlow(record.arrival_s, record.size_bytes, record.host, record.server)
        for record in sorted(records, key=lambda record: (record.arrival_s, record.index))
    ]
