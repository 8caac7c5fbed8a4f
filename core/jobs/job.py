"""One job of the GPU scheduler: its states, its books, and what is ordered and told about it."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from intentd.core.jobs.spec import (
    MAX_SIZE_GPU_S,
    JobSpec,
    spec_from_plain,
    spec_to_plain,
    within_bounds,
)


class State(enum.Enum):
    """Where a job stands. SUBMITTED: stored, no decision has seen it. CHECKPOINTING: was asked
    to end, holds its GPUs until it did."""

    SUBMITTED = "submitted"
    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    CHECKPOINTING = "checkpointing"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    __hash__ = object.__hash__  # Enum's own is Python and was a fifth of a decision on 10,000 jobs


_S = State
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    _S.SUBMITTED: frozenset({_S.PENDING, _S.CANCELLED}),
    _S.PENDING: frozenset({_S.STARTING, _S.CANCELLED}),
    _S.STARTING: frozenset({_S.RUNNING, _S.CHECKPOINTING, _S.PENDING, _S.FINISHED, _S.FAILED}),
    _S.RUNNING: frozenset({_S.CHECKPOINTING, _S.PENDING, _S.FINISHED, _S.FAILED}),
    _S.CHECKPOINTING: frozenset({_S.PENDING, _S.FINISHED, _S.FAILED, _S.CANCELLED}),
    _S.FINISHED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}
HOLDING: Final = frozenset({_S.STARTING, _S.RUNNING, _S.CHECKPOINTING})
OVER: Final = frozenset({_S.FINISHED, _S.FAILED, _S.CANCELLED})


@dataclass(frozen=True, slots=True)
class Start:
    """Run a job on these devices (node -> indices) under this epoch."""

    job: int
    epoch: int
    devices: Mapping[str, tuple[int, ...]]

    @property
    def gpus(self) -> int:
        return sum(len(indices) for indices in self.devices.values())


@dataclass(frozen=True, slots=True)
class Stop:
    """Send the signal; kill what has not ended after grace_s. purpose: resize, preempt, drain,
    cancel, "time limit" or "node lost"."""

    job: int
    epoch: int
    signal: int
    grace_s: float
    purpose: str


Instruction = Start | Stop


@dataclass(frozen=True, slots=True)
class Event:
    """One change of state of a job, for the record."""

    job: int
    at_s: float
    state: str
    epoch: int
    text: str


@dataclass(slots=True)
class Job:
    """One job's books. done_gpu_s: progress at the smallest allocation's speed; saved_gpu_s: as
    of its last checkpoint. changed_s: the moment done_gpu_s holds for."""

    id: int
    spec: JobSpec
    submitted_s: float
    size_gpu_s: float
    state: State = State.SUBMITTED
    epoch: int = 0
    devices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    done_gpu_s: float = 0.0
    saved_gpu_s: float = 0.0
    changed_s: float = 0.0
    stall_until_s: float = 0.0
    run_since_s: float = 0.0
    ran_s: float = 0.0
    started_s: float = math.nan
    ended_s: float = math.nan
    lost: int = 0
    preempted: int = 0
    resized: int = 0
    contention: float = 0.0
    decisions: float = 0.0
    purpose: str = ""
    detail: str = ""
    exit_status: int | None = None
    # first report of the run (done, total) and its time; the last one's done
    steps: tuple[float, float] = (0.0, 0.0)
    step_s: float = 0.0
    reported: float = 0.0
    worked_gpu_s: float = 0.0
    pool: str = ""  # GPU type it was put on

    @property
    def gpus(self) -> int:
        return sum(len(indices) for indices in self.devices.values())

    @property
    def placement(self) -> dict[str, int]:
        return {node: len(indices) for node, indices in self.devices.items()}


def job_to_plain(job: Job) -> dict[str, Any]:
    plain = {name: getattr(job, name) for name in Job.__slots__ if name != "spec"}
    plain["state"] = job.state.value
    plain["spec"] = spec_to_plain(job.spec)
    plain["devices"] = {node: list(indices) for node, indices in job.devices.items()}
    plain["steps"] = list(job.steps)
    for name in ("started_s", "ended_s"):
        plain[name] = None if math.isnan(plain[name]) else plain[name]
    return plain


def job_from_plain(plain: Mapping[str, Any]) -> Job:
    fields_ = dict(plain)
    fields_["spec"] = spec_from_plain(within_bounds(fields_["spec"]))
    fields_["size_gpu_s"] = min(fields_["size_gpu_s"], MAX_SIZE_GPU_S)
    fields_["state"] = State(fields_["state"])
    fields_["devices"] = {node: tuple(at) for node, at in fields_["devices"].items()}
    fields_["steps"] = tuple(fields_["steps"])
    for name in ("started_s", "ended_s"):
        fields_[name] = math.nan if fields_[name] is None else fields_[name]
    return Job(**fields_)
