"""The books of the GPU scheduler: every job, where it stands, and what is to be done next.

A pure state machine: events in (with ``now``), instructions out. The allocation is the one
allocator's (section 3.3), placed on nodes; a change of a job's allocation asks it to checkpoint
and starts it anew (section 3.4). Every run of a job has an epoch; an event that names another
epoch than the job's present one is ignored and counted. GPUs belong to a run until its end was
reported, so that no GPU is given twice and no job runs twice.

Over 600 lines: events, decisions and reasons are one state machine over the same fields.
"""

from __future__ import annotations

import math
import signal
import statistics
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError, StateError
from intentd.core.jobs.allocator import JobTable, Progress, allocate
from intentd.core.jobs.demand import efficiency
from intentd.core.jobs.history import Arrival
from intentd.core.jobs.job import (
    HOLDING,
    OVER,
    TRANSITIONS,
    Event,
    Instruction,
    Job,
    Start,
    State,
    Stop,
)
from intentd.core.jobs.placement import Node, place
from intentd.core.jobs.policy import FREE, Costs, JobsPolicy, make
from intentd.core.jobs.spec import JobSpec, signal_number
from intentd.core.sim.jobs import Snapshot

Array = NDArray[np.float64]
STORY: Final = 12  # events of a job told with an error
LEARNED: Final = 2048  # (owner, name) pairs whose sizes are remembered
LEAST_LEFT: Final = 0.02  # of its size, what a job that outran its estimate is taken to need
LEAST_RATE_S: Final = 0.5  # reports this far apart measure the time per step


@dataclass(frozen=True, slots=True)
class Rules:
    """What bounds a ledger. quotas: owner -> GPUs at once, "*" for those not named; 0: no quota.
    hold_growth_s: a run is not stopped to give it more GPUs before it ran so long."""

    quotas: Mapping[str, int] = field(default_factory=dict)
    default_size_gpu_s: float = 3600.0
    max_jobs: int = 20_000
    hold_growth_s: float = 0.0

    def quota(self, owner: str) -> int:
        return self.quotas.get(owner, self.quotas.get("*", 0)) if self.quotas else 0


@dataclass(slots=True)
class _Line:
    """What a job's demand function gives the allocator; kept, for it never changes."""

    row: int
    smallest: int
    largest: int
    speeds: Array


class _Tables:
    """Speed tables of all jobs, one row for equal ones, padded to one width."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}
        self._kept: list[Array] = []
        self._stacked: tuple[Array, Array] | None = None

    def add(self, speeds: Array) -> int:
        key = speeds.round(12).tobytes()
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = len(self._kept)
            self._kept.append(speeds)
            self._stacked = None
        return row

    def stacked(self) -> tuple[Array, Array]:
        """(tables, width): speeds and efficiencies."""
        if self._stacked is None:
            width = max((len(line) for line in self._kept), default=2)
            rows = [np.append(x, np.full(width - len(x), x[-1])) for x in self._kept]
            speeds = np.ascontiguousarray(rows) if rows else np.zeros((1, width))
            self._stacked = speeds, np.stack([efficiency(line) for line in speeds])
        return self._stacked


class Ledger:
    """See the module. Not thread-safe; every method that takes ``now`` takes seconds that do not
    run backwards."""

    def __init__(
        self,
        nodes: Iterable[Node],
        *,
        policy: JobsPolicy | None = None,
        costs: Costs = FREE,
        rules: Rules | None = None,
    ) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.lost: set[str] = set()
        self.policy = replace(policy or make("fifo"), integral=True)
        self.costs = costs
        self.rules = rules or Rules()
        self.jobs: dict[int, Job] = {}
        self.stale_events = 0
        self.held: dict[int, str] = {}
        self._next_id = 1
        self._lines: dict[int, _Line] = {}
        self._tables = _Tables()
        self._sizes: dict[tuple[str, str], deque[float]] = {}
        self._grants: dict[int, int] = {}
        self._dirty: dict[int, Job] = {}
        self._events: list[Event] = []
        self._story: dict[int, deque[str]] = {}
        self._evict: set[str] = set()
        self._decided_s = -math.inf

    # -- what is there -------------------------------------------------------------------------

    @property
    def total_gpus(self) -> int:
        """Of all nodes that are known, drained and lost ones too."""
        return sum(node.gpus for node in self.nodes.values())

    @property
    def capacity(self) -> int:
        """GPUs that can be given out now."""
        return sum(node.gpus for node in self._usable())

    def _usable(self) -> list[Node]:
        return [n for n in self.nodes.values() if not n.drained and n.name not in self.lost]

    def take_dirty(self) -> list[Job]:
        """The jobs changed since the last call, those over too."""
        dirty = list(self._dirty.values())
        self._dirty.clear()
        return dirty

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # -- events in -----------------------------------------------------------------------------

    def submit(self, spec: JobSpec, now: float, job_id: int | None = None) -> Job:
        """Books a job. Raises InputError for what can never run, and when the books are full."""
        self.check(spec)
        if len(self.jobs) >= self.rules.max_jobs:
            raise InputError("jobs", len(self.jobs), f"at most {self.rules.max_jobs} unfinished")
        number = self._next_id if job_id is None else job_id
        self._next_id = max(self._next_id, number + 1)
        size = spec.function(self.learned_size(spec)).size_gpu_s
        job = Job(number, spec, now, size, changed_s=now)
        self.jobs[number] = job
        self._learn_line(job)
        self._note(job, now, "submitted")
        return job

    def check(self, spec: JobSpec) -> None:
        """Raises InputError for a job this cluster or its owner's quota can never run."""
        if spec.min_gpus > self.total_gpus:
            expected = f"at most the cluster's {self.total_gpus} GPUs"
            raise InputError("min_gpus", spec.min_gpus, expected)
        quota = self.rules.quota(spec.owner)
        if quota and spec.min_gpus > quota:
            raise InputError(
                "min_gpus", spec.min_gpus, f"at most the quota of {spec.owner}: {quota} GPUs"
            )

    def withdraw(self, job_id: int) -> None:
        """Forgets a job that could not be stored and was not acknowledged."""
        self._dirty.pop(job_id, None)
        self._events = [event for event in self._events if event.job != job_id]
        self._drop(job_id)

    def restore(self, job: Job) -> None:
        """Takes a job from the store, as it stood."""
        self._next_id = max(self._next_id, job.id + 1)
        if job.state in OVER:
            return
        self.jobs[job.id] = job
        self._learn_line(job)

    def reserve_ids(self, highest: int) -> None:
        """Ids up to highest were given out before."""
        self._next_id = max(self._next_id, highest + 1)

    def started(self, job_id: int, epoch: int, now: float) -> None:
        """The run began."""
        job = self._present(job_id, epoch)
        if job is None or job.state is not State.STARTING:
            return
        self._move(job, State.RUNNING, now, f"runs on {_places(job)}")

    def exited(self, job_id: int, epoch: int, status: int, now: float, detail: str = "") -> None:
        """The run ended; status as a shell's, negative: of that signal.

        After a checkpoint signal the job starts again, whatever its status, unless it is 0 and
        all steps were reported: programs that save and leave say 0 as those that are done do.
        """
        job = self._present(job_id, epoch)
        if job is None or job.state not in HOLDING:
            return
        self._advance(job, now)
        stopped = job.state is State.CHECKPOINTING
        complete = status == 0 and (not stopped or 0 < job.steps[1] <= job.reported)
        job.exit_status = status
        self._release(job, now)
        if complete:
            self.learn(job.spec.owner, job.spec.name, job.worked_gpu_s)
            self._over(job, State.FINISHED, now, "finished")
        elif not stopped:
            self._over(job, State.FAILED, now, detail or _ending(status))
        elif self._ended_on_purpose(job, now):
            return
        elif job.purpose == "node lost":
            self._again(job, now, "a node was lost")
        else:
            job.saved_gpu_s = job.done_gpu_s
            self._move(job, State.PENDING, now, f"saved to {job.purpose}")

    def lost_run(self, job_id: int, epoch: int, now: float, why: str, *, began: bool) -> None:
        """The run is gone without an exit status. began False: it never did anything."""
        job = self._present(job_id, epoch)
        if job is None or job.state not in HOLDING:
            return
        self._advance(job, now)
        self._release(job, now)
        if not self._ended_on_purpose(job, now):
            if began:
                self._again(job, now, why)
            else:
                self._move(job, State.PENDING, now, why)

    def progress(self, job_id: int, epoch: int, done: float, total: float, now: float) -> None:
        """The run reports steps; two reports of one run measure the time per step."""
        job = self._present(job_id, epoch)
        if job is None or not (0 <= done <= total and total > 0 and math.isfinite(total)):
            return
        self._advance(job, now)
        before, steps = job.steps
        if job.step_s <= 0 or steps != total or done < before:  # the first of this run
            job.done_gpu_s = job.size_gpu_s * done / total
            job.steps, job.step_s = (done, total), now
            job.reported = done
        elif done > before and now - job.step_s >= LEAST_RATE_S:
            line = self._lines[job.id]
            speed = float(line.speeds[min(job.gpus, line.largest)])
            # what is left at the measured rate, as work at the smallest allocation's speed
            step_s = (now - job.step_s) / (done - before)
            job.done_gpu_s = job.size_gpu_s - (total - done) * step_s * speed
            job.reported = done
        self._dirty[job.id] = job

    def cancel(self, job_id: int, now: float, why: str = "asked") -> list[Instruction]:
        """Ends a job; a second cancel changes nothing. Raises InputError if it is unknown."""
        job = self.jobs.get(job_id)
        if job is None:
            raise InputError("job", job_id, "an unfinished job")
        if job.state in HOLDING:
            if job.purpose == "cancel":
                return []
            return [self._stop(job, "cancel", now, f"cancel: {why}")]
        self._over(job, State.CANCELLED, now, f"cancelled: {why}")
        return []

    def drain(self, name: str, now: float, *, evict: bool = False) -> None:
        """Nothing new starts on the node; with evict what runs there is moved."""
        self.nodes[name] = replace(self._node(name), drained=True)
        if evict:
            self._evict.add(name)

    def undrain(self, name: str) -> None:
        self.nodes[name] = replace(self._node(name), drained=False)
        self._evict.discard(name)

    def node_lost(self, name: str, now: float) -> list[Instruction]:
        """Jobs wholly there go back to their last checkpoint; what is left of others is ended."""
        self._node(name)
        if name in self.lost:
            return []
        self.lost.add(name)
        orders: list[Instruction] = []
        for job in list(self.jobs.values()):
            if job.state not in HOLDING or name not in job.devices:
                continue
            self._advance(job, now)
            if all(node in self.lost for node in job.devices):
                self._release(job, now)
                if not self._ended_on_purpose(job, now):
                    self._again(job, now, f"node {name} lost")
            elif job.purpose not in ("cancel", "time limit"):
                orders.append(self._stop(job, "node lost", now, f"node {name} lost"))
        return orders

    def node_joined(self, node: Node) -> None:
        self.nodes[node.name] = node
        self.lost.discard(node.name)

    def set_policy(self, policy: JobsPolicy) -> None:
        """From the next decision on; whole GPUs, whatever it says."""
        self.policy = replace(policy, integral=True)

    # -- decisions -----------------------------------------------------------------------------

    def decide(self, now: float) -> list[Instruction]:
        """What is to be done so that every job has what the policy gives it."""
        orders: list[Instruction] = []
        self._decided_s = now
        for job in self.jobs.values():
            if job.state is State.SUBMITTED:
                self._move(job, State.PENDING, now, "")
            elif job.state in HOLDING:
                self._advance(job, now)
        for job in list(self.jobs.values()):
            limit = job.spec.time_limit_s
            over = limit and job.state in HOLDING and job.ran_s >= limit - 1e-9
            if over and job.purpose not in ("time limit", "cancel"):
                orders.append(self._stop(job, "time limit", now, "time limit"))
            elif job.state in HOLDING and not job.purpose and self._evict & job.devices.keys():
                orders.append(self._stop(job, "drain", now, "its node is drained"))
        pinned = [job for job in self.jobs.values() if self._is_pinned(job)]
        room = {node.name: node for node in self._usable()}
        for job in pinned:
            for name, held in job.placement.items():
                if name in room:
                    room[name] = replace(room[name], gpus=room[name].gpus - held)
        able = self._able(sum(node.gpus for node in room.values()), {job.id for job in pinned})
        wanted = self._grant(able, room, now)
        return orders + self._carry_out(able, wanted, now)

    def next_timer(self) -> float | None:
        """When to decide again if nothing happens: leases, time limits, growth held back."""
        times: list[float] = []
        lease_s = self.policy.lease_s
        for job in self.jobs.values():
            if job.state not in HOLDING or job.purpose:
                continue
            if lease_s:
                times.append(self._decided_s + lease_s)
            if job.spec.time_limit_s:
                times.append(job.changed_s + job.spec.time_limit_s - job.ran_s)
            grown = job.run_since_s + self.rules.hold_growth_s
            if self._grants.get(job.id, 0) > job.gpus and grown > self._decided_s:
                times.append(grown)
        return min(times) if times else None

    def _is_pinned(self, job: Job) -> bool:
        """Runs where nothing new starts, or ends for good: keeps what it has until it ended."""
        if job.state not in HOLDING:
            return False
        if job.purpose in ("cancel", "time limit"):
            return True
        return any(n in self.lost or self.nodes[n].drained for n in job.devices)

    def _able(self, capacity: int, pinned: set[int]) -> list[tuple[Job, int]]:
        """Jobs the allocator sees, in arrival order, each with its largest grant; notes why the
        others are held."""
        self.held.clear()
        left: dict[str, int] = {}
        for number in pinned:
            owner = self.jobs[number].spec.owner
            left[owner] = left.get(owner, self.rules.quota(owner)) - self.jobs[number].gpus
        able: list[tuple[Job, int]] = []
        counted: dict[int, int] = {}
        # runs first: a quota must not stop one job of an owner for another
        for job in sorted(self.jobs.values(), key=lambda job: (job.state not in HOLDING, job.id)):
            if job.id in pinned:
                continue
            smallest, owner = job.spec.min_gpus, job.spec.owner
            if smallest > capacity:
                text = f"needs at least {smallest} GPUs, {capacity} can be given out now"
                self.held[job.id] = text
                continue
            quota = self.rules.quota(owner)
            if quota and left.setdefault(owner, quota) < smallest:
                used = quota - left[owner]
                text = (
                    f"quota of {owner}: {quota} GPUs, {used} in use or promised, needs {smallest}"
                )
                self.held[job.id] = text
                continue
            if quota:
                left[owner] -= smallest
            counted[job.id] = smallest
        for job in self.jobs.values():
            if job.id in counted:
                most = self._lines[job.id].largest
                if self.rules.quota(job.spec.owner):
                    extra = min(left[job.spec.owner], most - counted[job.id])
                    left[job.spec.owner] -= max(extra, 0)
                    most = counted[job.id] + max(extra, 0)
                able.append((job, min(most, max(capacity, 1))))
        return able

    def _grant(
        self, able: list[tuple[Job, int]], room: Mapping[str, Node], now: float
    ) -> dict[int, dict[str, int]]:
        """job -> placement, as the policy would have it."""
        self._grants = {}
        if not able:
            return {}
        for job, _ in able:
            job.contention += len(able)
            job.decisions += 1
        capacity = sum(node.gpus for node in room.values())
        grants = allocate(
            self._table(able),
            self.policy,
            float(capacity),
            now_s=now,
            progress=self._progress([job for job, _ in able], now),
            costs=self.costs,
        )
        chosen: dict[int, int] = {}
        for (job, _), grant in zip(able, np.floor(grants + 1e-9).astype(int).tolist(), strict=True):
            if grant >= job.spec.min_gpus:
                chosen[job.id] = int(grant)
        self._grants = dict(chosen)
        for job, _ in able:
            early = now < job.run_since_s + self.rules.hold_growth_s
            if job.state in HOLDING and not job.purpose and early:
                grown = chosen.get(job.id, 0)
                chosen[job.id] = min(grown, job.gpus) if grown else 0
        present: dict[Hashable, dict[str, int]] = {
            job.id: job.placement for job, _ in able if job.state in HOLDING
        }
        placed = place({j: n for j, n in chosen.items() if n}, room, present)
        return {int(str(job)): where for job, where in placed.items()}

    def _carry_out(
        self, able: list[tuple[Job, int]], wanted: Mapping[int, Mapping[str, int]], now: float
    ) -> list[Instruction]:
        """Stops first; a job starts only on GPUs that nobody holds any more."""
        orders: list[Instruction] = []
        for job, _ in able:
            if job.state not in HOLDING or job.purpose:
                continue
            where = dict(wanted.get(job.id, {}))
            if where == job.placement:
                continue
            if where:
                job.resized += 1
                to = sum(where.values())
                orders.append(self._stop(job, "resize", now, f"{job.gpus} -> {to} GPUs"))
            else:
                job.preempted += 1
                orders.append(self._stop(job, "preempt", now, "its GPUs go to other jobs"))
        free = self.free_devices()
        for job, _ in able:
            where = dict(wanted.get(job.id, {}))
            if job.state is not State.PENDING or not where:
                continue
            if any(len(free[name]) < count for name, count in where.items()):
                continue
            job.devices = {name: tuple(free[name][:count]) for name, count in where.items()}
            for name, count in where.items():
                del free[name][:count]
            orders.append(self._start(job, now))
        return orders

    def free_devices(self) -> dict[str, list[int]]:
        """Indices nobody holds on nodes that take new jobs."""
        free = {node.name: list(range(node.gpus)) for node in self._usable()}
        for job in self.jobs.values():
            for name, indices in job.devices.items():
                if name in free:
                    taken = set(indices)
                    free[name] = [index for index in free[name] if index not in taken]
        return free

    def _start(self, job: Job, now: float) -> Start:
        job.epoch += 1
        job.purpose = ""
        cost = self.costs.start_s + (self.costs.preempt_s if job.epoch > 1 else 0.0)
        job.run_since_s = job.changed_s = now
        job.stall_until_s = now + cost
        job.step_s = job.reported = 0.0
        if math.isnan(job.started_s):
            job.started_s = now
        self._move(job, State.STARTING, now, f"on {_places(job)}")
        return Start(job.id, job.epoch, dict(job.devices))

    def _stop(self, job: Job, purpose: str, now: float, text: str) -> Stop:
        lost = purpose == "node lost"
        job.purpose = purpose
        if job.state is State.CHECKPOINTING:
            self._note(job, now, text)
        else:
            self._move(job, State.CHECKPOINTING, now, text)
        number = int(signal.SIGKILL) if lost else signal_number(job.spec)
        return Stop(job.id, job.epoch, number, 0.0 if lost else job.spec.grace_s, purpose)

    def stop_again(self, job: Job) -> Stop | None:
        """The stop a job was given, for an executor that may not have heard it."""
        if job.state is not State.CHECKPOINTING:
            return None
        lost = job.purpose == "node lost"
        number = int(signal.SIGKILL) if lost else signal_number(job.spec)
        return Stop(job.id, job.epoch, number, 0.0 if lost else job.spec.grace_s, job.purpose)

    # -- predictions and reasons ---------------------------------------------------------------

    def snapshot(
        self, now: float, candidate: JobSpec | None = None, *, upto: int | None = None
    ) -> tuple[Snapshot, list[int]]:
        """What a prediction starts from, and the ids of its jobs; a candidate comes last, as 0.
        upto: as if jobs with larger ids had not come yet.

        All that fit, quotas left aside; a job that runs and ends for good is left out, its GPUs
        are free soon.
        """
        capacity = self.capacity
        rows = [
            (job, min(self._lines[job.id].largest, capacity))
            for job in self.jobs.values()
            if job.spec.min_gpus <= capacity
            and job.purpose not in ("cancel", "time limit")
            and (upto is None or job.id <= upto)
        ]
        if candidate is not None:
            self.check(candidate)
            if candidate.min_gpus > capacity:
                raise InputError("min_gpus", candidate.min_gpus, f"at most {capacity} GPUs now")
            size = candidate.function(self.learned_size(candidate)).size_gpu_s
            job = Job(0, candidate, now, size, changed_s=now)
            self._learn_line(job)
            rows.append((job, min(self._lines[0].largest, capacity)))
        for job, _ in rows:
            if job.state in HOLDING:
                self._advance(job, now)
        progress = self._progress([job for job, _ in rows], now)
        table = self._table(rows)
        self._lines.pop(0, None)
        keys = [job.id for job, _ in rows]
        return Snapshot(table, progress, now, float(capacity), self.policy, self.costs), keys

    def reason(self, job_id: int) -> dict[str, Any]:
        """Why the job is where it is: one sentence and the numbers behind it."""
        job = self.jobs[job_id]
        active = [other for other in self.jobs.values() if other.state in HOLDING]
        numbers: dict[str, Any] = {
            "min_gpus": job.spec.min_gpus,
            "max_gpus": self._lines[job_id].largest,
            "size_gpu_s": job.size_gpu_s,
            "left_gpu_s": self.left(job),
            "capacity_gpus": self.capacity,
            "held_gpus": sum(other.gpus for other in active),
            "free_gpus": sum(len(x) for x in self.free_devices().values()),
            "granted_gpus": self._grants.get(job_id, 0),
            "policy": self.policy.name,
            "class": self.policy.class_of(job.size_gpu_s),
            "class_weight": self.policy.weights[self.policy.class_of(job.size_gpu_s)],
            "ahead": sum(
                1
                for other in self.jobs.values()
                if other.id < job_id
                and self.policy.class_of(other.size_gpu_s) == self.policy.class_of(job.size_gpu_s)
            ),
            "quota_gpus": self.rules.quota(job.spec.owner),
            "epoch": job.epoch,
        }
        return {"state": job.state.value, "text": self._reason_text(job, numbers), **numbers}

    def _reason_text(self, job: Job, numbers: Mapping[str, Any]) -> str:
        if job.state in HOLDING:
            doing = {State.CHECKPOINTING: f"ends to {job.purpose}"}.get(job.state, job.state.value)
            return f"{doing} on {job.gpus} GPUs ({_places(job)})"
        if job.id in self.held:
            return self.held[job.id]
        if numbers["granted_gpus"]:
            return (
                f"granted {numbers['granted_gpus']} GPUs, waits for running jobs to let go: "
                f"{numbers['free_gpus']} of {numbers['capacity_gpus']} are free"
            )
        return (
            f"needs {job.spec.min_gpus} GPUs, {numbers['free_gpus']} of {numbers['capacity_gpus']} "
            f"are free; {numbers['ahead']} jobs of class {numbers['class']} are ahead of it"
        )

    def left(self, job: Job) -> float:
        """Estimated GPU seconds still to do."""
        return max(job.size_gpu_s - job.done_gpu_s, LEAST_LEFT * job.size_gpu_s)

    def seconds_left(self, job: Job, now: float) -> float:
        """Until the job ends on what it holds; infinite if it holds nothing."""
        line = self._lines[job.id]
        speed = float(line.speeds[min(job.gpus, line.largest)])
        stall_s = max(0.0, job.stall_until_s - now)
        return stall_s + self.left(job) / speed if speed > 0 else math.inf

    def learned_size(self, spec: JobSpec) -> float:
        """Median size of the last finished jobs of this owner and name, else the default."""
        known = self._sizes.get((spec.owner, spec.name))
        return statistics.median(known) if known else self.rules.default_size_gpu_s

    def learn(self, owner: str, name: str, size_gpu_s: float) -> None:
        """A job of that name did so much work."""
        if size_gpu_s <= 0:
            return
        if (owner, name) not in self._sizes and len(self._sizes) >= LEARNED:
            del self._sizes[next(iter(self._sizes))]
        self._sizes.setdefault((owner, name), deque(maxlen=16)).append(size_gpu_s)

    def arrival(self, job: Job) -> Arrival:
        """What the controller is told of a job."""
        line = self._lines.get(job.id)
        if line is None:
            function = job.spec.function(job.size_gpu_s)
            line = _Line(0, function.smallest, function.largest, function.speeds())
        linear = np.array_equal(line.speeds, np.arange(len(line.speeds)))
        speeds = () if linear else tuple(line.speeds.tolist())
        return Arrival(job.id, job.submitted_s, job.size_gpu_s, line.smallest, line.largest, speeds)

    # -- inside --------------------------------------------------------------------------------

    def _node(self, name: str) -> Node:
        if name not in self.nodes:
            raise InputError("node", name, f"one of {', '.join(self.nodes) or 'none'}")
        return self.nodes[name]

    def _present(self, job_id: int, epoch: int) -> Job | None:
        job = self.jobs.get(job_id)
        if job is None or job.epoch != epoch:
            self.stale_events += 1
            return None
        return job

    def _learn_line(self, job: Job) -> None:
        function = job.spec.function(job.size_gpu_s)
        per_node = max((node.gpus for node in self.nodes.values()), default=0)
        speeds = function.speeds(node_gpus=per_node)
        row = self._tables.add(speeds)
        self._lines[job.id] = _Line(row, function.smallest, function.largest, speeds)

    def _table(self, rows: list[tuple[Job, int]]) -> JobTable:
        speeds, effective = self._tables.stacked()
        lines = [self._lines[job.id] for job, _ in rows]
        submitted = np.maximum.accumulate(
            np.array([job.submitted_s for job, _ in rows], dtype=np.float64)
        )
        return JobTable(
            submitted,
            np.array([job.size_gpu_s for job, _ in rows], dtype=np.float64),
            np.array([line.smallest for line in lines], dtype=np.float64),
            np.array([most for _, most in rows], dtype=np.int32),
            np.array([line.row for line in lines], dtype=np.int32),
            speeds,
            np.ones(len(rows)),
            effective,
        )

    def _progress(self, jobs: list[Job], now: float) -> Progress:
        def column(values: Iterable[float]) -> Array:
            return np.array(list(values), dtype=np.float64)

        running = [job.state in HOLDING for job in jobs]
        pairs = list(zip(jobs, running, strict=True))
        return Progress(
            column(self.left(job) for job in jobs),
            column(job.gpus if runs else 0 for job, runs in pairs),
            column(max(0.0, job.stall_until_s - now) if runs else 0 for job, runs in pairs),
            column(job.run_since_s if runs else 0 for job, runs in pairs),
            column(job.contention or float(len(jobs)) for job in jobs),
            column(job.decisions or 1.0 for job in jobs),
            np.array([job.epoch > 0 for job in jobs], dtype=np.uint8),
        )

    def _advance(self, job: Job, now: float) -> None:
        """Books the work of a run up to now."""
        passed = now - job.changed_s
        if passed <= 0:
            return
        if job.state in (State.STARTING, State.RUNNING):
            worked = max(0.0, now - max(job.changed_s, job.stall_until_s))
            line = self._lines[job.id]
            work = worked * float(line.speeds[min(job.gpus, line.largest)])
            job.done_gpu_s += work
            job.worked_gpu_s += work
            job.ran_s += passed
        job.changed_s = now

    def _release(self, job: Job, now: float) -> None:
        if self.costs.checkpoint_s and job.gpus:
            line = self._lines[job.id]
            lost = self.costs.checkpoint_s * float(line.speeds[min(job.gpus, line.largest)])
            job.saved_gpu_s = max(job.saved_gpu_s, job.done_gpu_s - lost)
        job.devices = {}
        job.changed_s = now

    def _ended_on_purpose(self, job: Job, now: float) -> bool:
        """Whether this end of the run was to be the job's end."""
        if job.purpose == "cancel":
            self._over(job, State.CANCELLED, now, "cancelled")
        elif job.purpose == "time limit":
            limit = job.spec.time_limit_s
            self._over(job, State.FAILED, now, f"time limit of {limit:g} s reached")
        else:
            return False
        return True

    def _again(self, job: Job, now: float, why: str) -> None:
        """Back to the last checkpoint, as often as it may."""
        job.lost += 1
        job.done_gpu_s = job.saved_gpu_s
        if job.lost > job.spec.retries:
            text = f"{why}; lost {job.lost} times, retries {job.spec.retries}"
            self._over(job, State.FAILED, now, text)
        else:
            self._move(job, State.PENDING, now, f"{why}; retry {job.lost} of {job.spec.retries}")

    def _over(self, job: Job, state: State, now: float, text: str) -> None:
        job.ended_s, job.detail = now, text
        self._move(job, state, now, text)
        self._drop(job.id)

    def _move(self, job: Job, state: State, now: float, text: str) -> None:
        if state not in TRANSITIONS[job.state]:
            story = "; ".join(self._story.get(job.id, ()))
            raise StateError(f"job {job.id}: {job.state.value} -> {state.value}; before: {story}")
        job.state = state
        if state not in HOLDING:
            job.purpose = ""
        self._note(job, now, text)

    def _note(self, job: Job, now: float, text: str) -> None:
        self._dirty[job.id] = job
        state = job.state.value
        self._events.append(Event(job.id, now, state, job.epoch, text))
        self._story.setdefault(job.id, deque(maxlen=STORY)).append(f"{state}@{now:g} {text}")

    def _drop(self, job_id: int) -> None:
        self.jobs.pop(job_id, None)
        self._lines.pop(job_id, None)
        self._story.pop(job_id, None)
        self._grants.pop(job_id, None)
        self.held.pop(job_id, None)


def _places(job: Job) -> str:
    return ", ".join(f"{name}:{len(at)}" for name, at in job.devices.items())


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
