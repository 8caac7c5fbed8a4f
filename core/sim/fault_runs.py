"""What is asked of a simulation of faults, and what its runs showed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Faults:
    """What may go wrong. loss: share of messages lost while faults last. restart: the sequencer
    is restarted as planned, which by itself is no fault: no start may be degraded by it."""

    loss: float = 0.0
    kill: bool = False
    partition: bool = False
    restart: bool = False

    @property
    def any(self) -> bool:
        return self.loss > 0 or self.kill or self.partition


@dataclass(slots=True)
class FaultRun:
    """What one seed showed. violations: in words, empty when all held."""

    seed: int
    flows: int = 0
    stalls: int = 0
    order_violations: int = 0
    double_starts: int = 0
    repeated_ids: int = 0
    late_starts: int = 0  # degraded although the network had healed RECOVERY_S before they arrived
    ordered_starts: int = 0
    demoted: int = 0
    max_wait_s: float = 0.0
    degraded_starts: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)


def add_up(runs: Iterable[FaultRun]) -> dict[str, Any]:
    """The totals over seeds, JSON-ready."""
    total: dict[str, Any] = {
        "seeds": 0,
        "flows": 0,
        "stalls": 0,
        "order_violations": 0,
        "double_starts": 0,
        "repeated_ids": 0,
        "late_starts": 0,
        "ordered_starts": 0,
        "degraded_starts": {},
        "demoted": 0,
        "max_wait_s": 0.0,
        "failed_seeds": [],
    }
    for run in runs:
        total["seeds"] += 1
        for name in (
            "flows",
            "stalls",
            "order_violations",
            "double_starts",
            "repeated_ids",
            "late_starts",
            "ordered_starts",
            "demoted",
        ):
            total[name] += getattr(run, name)
        for reason, count in run.degraded_starts.items():
            degraded = total["degraded_starts"]
            degraded[reason] = degraded.get(reason, 0) + count
        total["max_wait_s"] = max(total["max_wait_s"], run.max_wait_s)
        if run.violations:
            total["failed_seeds"].append(run.seed)
    return total
