"""The books of the GPU scheduler: every job, where it stands, and what is to be done next.

A pure state machine: events in (with ``now``), instructions out. The allocation is the one
allocator's (section 3.3), placed on nodes; a change of a job's allocation asks it to checkpoint
and starts it anew (section 3.4). Every run of a job has an epoch; an event that names another
epoch than the job's present one is ignored and counted. GPUs belong to a run until its end was
reported, so that no GPU is given twice and no job runs twice.

Over 600 lines: events, decisions and reasons are one state machine over the same fields, whose
invariants (no GPU twice, one run at a time) a reader must see whole. What stands on its own is
elsewhere: job.py (states, instructions), columns.py (arrays), spec.py, demand.py, placement.py.
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
from intentd.core.jobs.allocator import JobTable, Quotas, allocate
from intentd.core.jobs.columns import Columns, SpeedTables
from intentd.core.jobs.demand import ANY_TYPE
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
SIZES_KEPT: Final = 16  # of each
LEAST_LEFT: Final = 0.02  # of its size, what a job that outran its estimate is taken to need
PLAYED_JOBS: Final = 2000  # with more unfinished ones a pool is chosen by its work, not played out
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
    """What a job's demand function gives the allocator in its pool; kept, for it never changes."""

    row: int
    smallest: int
    largest: int
    speeds: Array


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
        self.types = list(dict.fromkeys(node.gpu_type for node in self.nodes.values())) or [""]
        self.lost: set[str] = set()
        self.policy = replace(policy or make("fifo"), integral=True)
        self.costs = costs
        self.jobs: dict[int, Job] = {}
        self.counts: dict[State, int] = dict.fromkeys(State, 0)
        self.stale_events = 0
        self.held: dict[int, int] = {}  # by their owner's quota: how much of it was in use
        self._rules = rules or Rules()
        self._holding: dict[int, Job] = {}
        self._fresh: dict[int, Job] = {}
        self._next_id = 1
        self._lines: dict[int, _Line] = {}
        self._tables = SpeedTables()
        self._columns = Columns()
        self._changed: set[int] = set()  # jobs whose row in the columns is not up to date
        self._owners: dict[str, int] = {}
        self._sizes: dict[tuple[str, str], tuple[float, ...]] = {}
        self._grants: dict[int, int] = {}
        self._room: dict[str, int] = {}
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

    def _usable(self, gpu_type: str | None = None) -> list[Node]:
        return [
            n
            for n in self.nodes.values()
            if not n.drained
            and n.name not in self.lost
            and (gpu_type is None or n.gpu_type == gpu_type)
        ]

    def pool_capacity(self, gpu_type: str) -> int:
        """GPUs of a type that can be given out now."""
        return sum(node.gpus for node in self._usable(gpu_type))

    @property
    def rules(self) -> Rules:
        return self._rules

    @rules.setter
    def rules(self, rules: Rules) -> None:
        self._rules = rules
        self._owners.clear()
        self._changed.update(self.jobs)

    def take_dirty(self) -> list[Job]:
        """The jobs changed since the last call, those over too."""
        dirty = list(self._dirty.values())
        for job in dirty:
            if job.id in self.jobs:
                at = self._columns.at(job.id)
                job.contention = float(self._columns.contention[at])
                job.decisions = float(self._columns.decisions[at])
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
        job.pool = self._pool_for(job, now)
        self._book(job)
        self._note(job, now, "submitted")
        return job

    def check(self, spec: JobSpec) -> None:
        """Raises InputError for a job this cluster or its owner's quota can never run."""
        for name in spec.gpu_types:
            if name not in self.types:
                raise InputError("gpu_types", name, f"one of {', '.join(filter(None, self.types))}")
        usable = self._types_of(spec)
        if not usable:
            known = ", ".join(spec.function(1.0).types())
            raise InputError("demand", known, f"an entry for one of {', '.join(self.types)}")
        most = max(
            sum(node.gpus for node in self.nodes.values() if node.gpu_type == name)
            for name in usable
        )
        if spec.min_gpus > most:
            where = "the cluster's" if len(self.types) == 1 else "one type's"
            raise InputError("min_gpus", spec.min_gpus, f"at most {where} {most} GPUs")
        quota = self.rules.quota(spec.owner)
        if quota and spec.min_gpus > quota:
            raise InputError(
                "min_gpus", spec.min_gpus, f"at most the quota of {spec.owner}: {quota} GPUs"
            )

    def withdraw(self, job_id: int) -> None:
        """Forgets a job that could not be stored and was not acknowledged."""
        self._dirty.pop(job_id, None)
        self._events = [event for event in self._events if event.job != job_id]
        if job_id in self.jobs:
            self.counts[self.jobs[job_id].state] -= 1
        self._drop(job_id)

    def restore(self, job: Job) -> None:
        """Takes a job from the store, as it stood."""
        self._next_id = max(self._next_id, job.id + 1)
        if job.state in OVER:
            return
        held = [self.nodes[name].gpu_type for name in job.devices if name in self.nodes]
        if held:
            job.pool = held[0]
        elif job.pool not in self._types_of(job.spec):
            job.pool = self._pool_for(job, job.changed_s)
        self._book(job)

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
        for job in list(self._holding.values()):
            if name not in job.devices:
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
        if node.gpu_type not in self.types:
            self.types.append(node.gpu_type)
        for job in self.jobs.values():  # may use more GPUs now than there were
            if job.pool == node.gpu_type and self._lines[job.id].largest < job.spec.max_gpus:
                self._learn_line(job)
                self._changed.add(job.id)
        self.lost.discard(node.name)

    def set_policy(self, policy: JobsPolicy) -> None:
        """From the next decision on; whole GPUs, whatever it says."""
        self.policy = replace(policy, integral=True)

    # -- decisions -----------------------------------------------------------------------------

    def decide(self, now: float) -> list[Instruction]:
        """What is to be done so that every job has what the policy gives it."""
        orders: list[Instruction] = []
        self._decided_s = now
        for job in list(self._fresh.values()):
            self._move(job, State.PENDING, now, "")
        for job in list(self._holding.values()):
            self._advance(job, now)
            limit = job.spec.time_limit_s
            over = limit and job.ran_s >= limit - 1e-9
            if over and job.purpose not in ("time limit", "cancel"):
                orders.append(self._stop(job, "time limit", now, "time limit"))
            elif not job.purpose and self._evict & job.devices.keys():
                orders.append(self._stop(job, "drain", now, "its node is drained"))
        pinned = {job.id for job in self._holding.values() if self._is_pinned(job)}
        room = {node.name: node for node in self._usable()}
        for number in pinned:
            for name, held in self.jobs[number].placement.items():
                if name in room:
                    room[name] = replace(room[name], gpus=room[name].gpus - held)
        self._room = {
            name: sum(node.gpus for node in room.values() if node.gpu_type == name)
            for name in self.types
        }
        self._settle(now)
        wanted = self._grant(pinned, room, now)
        return orders + self._carry_out(pinned, wanted, now)

    def next_timer(self) -> float | None:
        """When to decide again if nothing happens: leases, time limits, growth held back."""
        times: list[float] = []
        lease_s = self.policy.lease_s
        for job in self._holding.values():
            if job.purpose:
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
        if job.purpose in ("cancel", "time limit"):
            return True
        return any(n in self.lost or self.nodes[n].drained for n in job.devices)

    def _settle(self, now: float) -> None:
        """Brings the columns up to date; a job that waits where it can no longer run moves."""
        self._settle_rows()
        if len(self.types) > 1:
            for pool, name in enumerate(self.types):
                rows = self._columns.rows(pool)
                stuck = rows[self._columns.smallest[rows] > self._room.get(name, 0)]
                for number in self._columns.ids[stuck].tolist():
                    self._move_pool(self.jobs[number], now)

    def _move_pool(self, job: Job, now: float) -> None:
        if job.state in HOLDING:
            return
        able = [n for n in self._types_of(job.spec) if self._room.get(n, 0) >= job.spec.min_gpus]
        if able and job.pool not in able:
            job.pool = self._pool_for(job, now, able)
            self._learn_line(job)
            self._write(job)
            self._dirty[job.id] = job

    def _caps(self, pinned: set[int]) -> NDArray[np.int32]:
        """Largest grant of each row within its owner's quota, 0 for a job that is held by it: the
        smallest grants first (the running before the waiting), what is left to the oldest."""
        columns = self._columns
        most = columns.largest.copy()
        self.held.clear()
        if not self.rules.quotas:
            return most
        names = list(self._owners)
        left = np.array([self.rules.quota(name) for name in names] or [0], dtype=np.int64)
        for number in pinned:
            at = self._owners.get(self.jobs[number].spec.owner)
            if at is not None:
                left[at] -= self.jobs[number].gpus
        capacity = np.array([self._room.get(name, 0) for name in self.types])
        rows = columns.rows()
        rows = rows[columns.owner[rows] >= 0]
        rows = rows[columns.smallest[rows] <= capacity[columns.pool[rows]]]
        if pinned:
            rows = rows[~np.isin(columns.ids[rows], list(pinned))]
        rows = rows[np.argsort(columns.grant[rows] <= 0, kind="stable")]
        owners = columns.owner[rows]
        for owner in np.unique(owners).tolist():
            able, held, rest = _within(columns.smallest, rows[owners == owner], int(left[owner]))
            used = self.rules.quota(names[owner]) - rest
            self.held.update(dict.fromkeys(columns.ids[held].tolist(), used))
            most[held] = 0
            able.sort()
            wish = columns.largest[able] - columns.smallest[able]
            before = np.cumsum(wish) - wish
            most[able] = columns.smallest[able] + np.clip(rest - before, 0, wish)
        return most

    def _grant(
        self, pinned: set[int], room: Mapping[str, Node], now: float
    ) -> dict[int, dict[str, int]]:
        """job -> placement, as the policy would have it, pool by pool."""
        columns = self._columns
        most = self._caps(pinned)
        self._grants = {}
        wanted: dict[int, dict[str, int]] = {}
        fixed = [columns.at(number) for number in pinned]
        for pool, name in enumerate(self.types):
            capacity = self._room.get(name, 0)
            rows = columns.rows(pool)
            rows = rows[(columns.smallest[rows] <= capacity) & (most[rows] > 0)]
            if fixed:
                rows = rows[~np.isin(rows, fixed)]
            if not len(rows):
                continue
            columns.contention[rows] += len(rows)
            columns.decisions[rows] += 1
            grants = allocate(
                columns.table_of(rows, np.minimum(most[rows], max(capacity, 1)), self._tables),
                self.policy.for_type(name),
                float(capacity),
                now_s=now,
                progress=columns.progress_of(rows, now),
                costs=self.costs,
            )
            whole = np.floor(grants + 1e-9).astype(np.int64)
            given = np.flatnonzero((whole > 0) & (whole >= columns.smallest[rows]))
            chosen = dict(
                zip(columns.ids[rows[given]].tolist(), whole[given].tolist(), strict=True)
            )
            own = {n: node for n, node in room.items() if node.gpu_type == name}
            wanted |= self._placed(chosen, own, set(columns.ids[rows].tolist()), now)
        return wanted

    def _placed(
        self, chosen: dict[int, int], room: Mapping[str, Node], members: set[int], now: float
    ) -> dict[int, dict[str, int]]:
        self._grants.update(chosen)
        present: dict[Hashable, dict[str, int]] = {}
        for job in self._holding.values():
            if job.id not in members:
                continue
            present[job.id] = job.placement
            early = now < job.run_since_s + self.rules.hold_growth_s
            if not job.purpose and early and chosen.get(job.id, 0) > job.gpus:
                chosen[job.id] = job.gpus
        placed = place({j: n for j, n in chosen.items() if n}, room, present)
        return {int(str(job)): where for job, where in placed.items()}

    def _carry_out(
        self, pinned: set[int], wanted: Mapping[int, Mapping[str, int]], now: float
    ) -> list[Instruction]:
        """Stops first; a job starts only on GPUs that nobody holds any more."""
        orders: list[Instruction] = []
        for number in sorted(self._holding):
            job = self._holding[number]
            if job.purpose or number in pinned:
                continue
            where = dict(wanted.get(number, {}))
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
        for number in sorted(wanted):
            job, where = self.jobs[number], dict(wanted[number])
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
        for job in self._holding.values():
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
        self,
        now: float,
        candidate: JobSpec | None = None,
        *,
        upto: int | None = None,
        pool: str | None = None,
    ) -> tuple[Snapshot, list[int]]:
        """What a prediction starts from in one pool of equal GPUs, and the ids of its jobs; a
        candidate comes last, as 0. upto: as if jobs with larger ids had not come yet. pool: None
        for the first.

        All that fit; a job that runs and ends for good is left out, its GPUs are free soon.
        """
        name = self.types[0] if pool is None else pool
        if candidate is not None:
            self._owner(candidate.owner)  # may be new: its quota belongs to the snapshot's
        capacity = self.pool_capacity(name)
        for job in self._holding.values():
            self._advance(job, now)
        self._settle_rows()
        columns = self._columns
        rows = columns.rows(self.types.index(name))
        rows = rows[columns.smallest[rows] <= capacity]
        if upto is not None:
            rows = rows[columns.ids[rows] <= upto]
        quotas = self._quotas(rows)
        if quotas is not None:  # a quota lowered below what a job needs: nobody knows when it ends
            limits = np.append(quotas.gpus, np.inf)[quotas.owner]
            rows = rows[columns.smallest[rows] <= limits]
        ending = [j.id for j in self._holding.values() if j.purpose in ("cancel", "time limit")]
        if ending:
            rows = rows[~np.isin(columns.ids[rows], ending)]
        found = Snapshot(
            columns.table_of(rows, np.minimum(columns.largest[rows], capacity), self._tables),
            columns.progress_of(rows, now),
            now,
            float(capacity),
            self.policy.for_type(name),
            self.costs,
            self._quotas(rows),
        )
        keys: list[int] = columns.ids[rows].tolist()
        if candidate is None:
            return found, keys
        return found.with_job(*self.candidate(candidate, now, name)), [*keys, 0]

    def candidate(self, candidate: JobSpec, now: float, pool: str) -> tuple[JobTable, int]:
        """A job that has just come, for Snapshot.with_job and Predictor.what_if: its table, whose
        speeds are those of all, and its owner's quota."""
        self.check(candidate)
        capacity = self.pool_capacity(pool)
        if candidate.min_gpus > capacity:
            raise InputError("min_gpus", candidate.min_gpus, f"at most {capacity} GPUs now")
        size = candidate.function(self.learned_size(candidate)).size_gpu_s
        line = self._line(candidate, size, pool)
        self._tables.release(line.row)  # nobody else can take the row before this returns
        one = JobTable(
            np.array([now]),
            np.array([size]),
            np.array([float(line.smallest)]),
            np.array([min(line.largest, capacity)], dtype=np.int32),
            np.array([line.row], dtype=np.int32),
            self._tables.speeds.copy(),
            np.ones(1),
            self._tables.efficiency.copy(),
        )
        return one, self._owner(candidate.owner)

    def _quotas(self, rows: NDArray[np.int64]) -> Quotas | None:
        if not self.rules.quotas:
            return None
        limits = [float(self.rules.quota(name)) for name in self._owners]
        return Quotas(self._columns.owner[rows], np.array(limits or [0.0]))

    def pools_for(self, spec: JobSpec) -> list[str]:
        """GPU types that could run a job now."""
        return [n for n in self._types_of(spec) if self.pool_capacity(n) >= spec.min_gpus]

    def _types_of(self, spec: JobSpec) -> list[str]:
        """GPU types that a job may use and has a demand for."""
        known = spec.function(1.0).types() if spec.demand_by else (ANY_TYPE,)
        return [
            name
            for name in self.types
            if (not spec.gpu_types or name in spec.gpu_types)
            and (ANY_TYPE in known or name in known)
        ]

    def _pool_for(self, job: Job, now: float, able: list[str] | None = None) -> str:
        """The pool that predicts the earliest finish (sections 3.3.3 and 3.7); with very many
        jobs the one with the least work a speed."""
        names = able if able is not None else self.pools_for(job.spec) or self._types_of(job.spec)
        if len(names) <= 1:
            return names[0] if names else self.types[0]
        return min(names, key=lambda name: self._finish_in(job, name, now))

    def _finish_in(self, job: Job, pool: str, now: float) -> float:
        line = self._line(job.spec, job.size_gpu_s, pool)
        self._tables.release(line.row)
        capacity = self.pool_capacity(pool)
        speed = float(line.speeds[min(line.largest, max(capacity, 1))])
        if speed <= 0 or capacity < job.spec.min_gpus:
            return math.inf
        if len(self.jobs) <= PLAYED_JOBS:
            snapshot, _ = self.snapshot(now, job.spec, pool=pool)
            return float(snapshot.play_out()[-1])
        rows = self._columns.rows(self.types.index(pool))
        return float(self._columns.left_gpu_s[rows].sum()) / capacity + job.size_gpu_s / speed

    def reason(self, job_id: int) -> dict[str, Any]:
        """Why the job is where it is: one sentence and the numbers behind it."""
        job, columns = self.jobs[job_id], self._columns
        self._settle_rows()
        policy = self.policy.for_type(job.pool)
        mine = policy.class_of(job.size_gpu_s)
        rows = columns.rows(self.types.index(job.pool))
        before = rows[columns.ids[rows] < job_id]
        limits = np.asarray(policy.thresholds_gpu_s if policy.name == "wfq" else (math.inf,))
        classes = np.searchsorted(limits, columns.size_gpu_s[before], side="left")
        free = self.free_devices()
        numbers: dict[str, Any] = {
            "min_gpus": job.spec.min_gpus,
            "max_gpus": self._lines[job_id].largest,
            "size_gpu_s": job.size_gpu_s,
            "left_gpu_s": self.left(job),
            "gpu_type": job.pool,
            "capacity_gpus": self.pool_capacity(job.pool),
            "held_gpus": sum(j.gpus for j in self._holding.values() if j.pool == job.pool),
            "free_gpus": sum(
                len(at) for name, at in free.items() if self.nodes[name].gpu_type == job.pool
            ),
            "granted_gpus": self._grants.get(job_id, 0),
            "policy": policy.name,
            "class": mine,
            "class_weight": policy.weights[mine],
            "ahead": int(np.count_nonzero(classes == mine)),
            "ahead_gpu_s": float(columns.left_gpu_s[before[classes == mine]].sum()),
            "quota_gpus": self.rules.quota(job.spec.owner),
            "quota_used_gpus": sum(
                j.gpus for j in self._holding.values() if j.spec.owner == job.spec.owner
            ),
            "epoch": job.epoch,
        }
        return {"state": job.state.value, "text": self._reason_text(job, numbers), **numbers}

    def _reason_text(self, job: Job, numbers: Mapping[str, Any]) -> str:
        if job.state in HOLDING:
            doing = {State.CHECKPOINTING: f"ends to {job.purpose}"}.get(job.state, job.state.value)
            return f"{doing} on {job.gpus} GPUs ({_places(job)})"
        room = self._room.get(job.pool, numbers["capacity_gpus"])
        if job.spec.min_gpus > room:
            return f"needs at least {job.spec.min_gpus} GPUs, {room} can be given out now"
        if job.id in self.held:
            return (
                f"quota of {job.spec.owner}: {numbers['quota_gpus']} GPUs, {self.held[job.id]} in "
                f"use or promised, needs {job.spec.min_gpus}"
            )
        of_type = f" {job.pool}" if job.pool else ""
        if numbers["granted_gpus"]:
            return (
                f"granted {numbers['granted_gpus']} GPUs, waits for running jobs to let go: "
                f"{numbers['free_gpus']} of {numbers['capacity_gpus']}{of_type} are free"
            )
        return (
            f"needs {job.spec.min_gpus} GPUs, {numbers['free_gpus']} of "
            f"{numbers['capacity_gpus']}{of_type} are free; {numbers['ahead']} jobs of class "
            f"{numbers['class']} are ahead of it"
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
        known = self._sizes.pop((owner, name), ())
        if len(self._sizes) >= LEARNED:  # the one not heard of for longest
            del self._sizes[next(iter(self._sizes))]
        self._sizes[(owner, name)] = (*known[1 - SIZES_KEPT :], size_gpu_s)

    def arrival(self, job: Job) -> Arrival:
        """What the controller is told of a job."""
        line = self._lines.get(job.id)
        if line is None:
            line = self._line(job.spec, job.size_gpu_s, job.pool or self.types[0])
            self._tables.release(line.row)
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

    def _book(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.counts[job.state] += 1
        if job.state in HOLDING:
            self._holding[job.id] = job
        elif job.state is State.SUBMITTED:
            self._fresh[job.id] = job
        at = self._columns.add(job.id)
        self._learn_line(job)
        self._columns.contention[at] = job.contention
        self._columns.decisions[at] = job.decisions
        self._write(job)

    def _line(self, spec: JobSpec, size_gpu_s: float, pool: str) -> _Line:
        """Of a job in a pool; its table is held until it is released."""
        function = spec.function(size_gpu_s)
        nodes = [node.gpus for node in self.nodes.values() if node.gpu_type == pool]
        speeds = function.speeds(pool, max(nodes, default=0))
        speeds = speeds[: max(sum(nodes), function.smallest) + 1]  # more can never be given
        largest = min(function.largest, len(speeds) - 1)
        return _Line(self._tables.take(speeds), function.smallest, largest, speeds)

    def _learn_line(self, job: Job) -> None:
        before = self._lines.pop(job.id, None)
        if before is not None:
            self._tables.release(before.row)
        self._lines[job.id] = self._line(job.spec, job.size_gpu_s, job.pool)

    def _owner(self, name: str) -> int:
        """Index of an owner's quota, -1 if none binds it."""
        if not self.rules.quota(name):
            return -1
        return self._owners.setdefault(name, len(self._owners))

    def _write(self, job: Job) -> None:
        """What the columns say of a job."""
        columns, line = self._columns, self._lines[job.id]
        at = columns.at(job.id)
        columns.submit_s[at] = job.submitted_s
        columns.size_gpu_s[at] = job.size_gpu_s
        columns.left_gpu_s[at] = self.left(job)
        columns.smallest[at], columns.largest[at] = line.smallest, line.largest
        columns.table[at] = line.row
        columns.pool[at] = self.types.index(job.pool)
        columns.owner[at] = self._owner(job.spec.owner)
        columns.grant[at] = job.gpus if job.state in HOLDING else 0
        columns.stall_until_s[at] = job.stall_until_s
        columns.since_s[at] = job.run_since_s
        columns.started[at] = job.epoch > 0

    def _settle_rows(self) -> None:
        for number in [*self._changed, *self._holding]:
            if number in self.jobs:
                self._write(self.jobs[number])
        self._changed.clear()

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
        self.counts[job.state] -= 1
        self.counts[state] += 1
        job.state = state
        self._fresh.pop(job.id, None)
        if state in HOLDING:
            self._holding[job.id] = job
        else:
            self._holding.pop(job.id, None)
            job.purpose = ""
        self._note(job, now, text)

    def _note(self, job: Job, now: float, text: str) -> None:
        self._dirty[job.id] = job
        self._changed.add(job.id)
        state = job.state.value
        self._events.append(Event(job.id, now, state, job.epoch, text))
        self._story.setdefault(job.id, deque(maxlen=STORY)).append(f"{state}@{now:g} {text}")

    def _drop(self, job_id: int) -> None:
        self.jobs.pop(job_id, None)
        for kept in (self._story, self._grants, self.held, self._holding, self._fresh):
            kept.pop(job_id, None)
        line = self._lines.pop(job_id, None)
        if line is not None:
            self._tables.release(line.row)
        self._columns.drop(job_id)
        self._changed.discard(job_id)


def _within(
    smallest: Array, rows: NDArray[np.int64], left: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Who gets its smallest grant out of what is left of a quota, each in its turn, who does not,
    and what then is left. A turn of numpy serves a run of rows, not one."""
    able, held = [], []
    while len(rows):
        fits = smallest[rows] <= left  # one that does not will not later either
        held.append(rows[~fits])
        rows = rows[fits]
        sums = np.cumsum(smallest[rows], dtype=np.int64)
        served = int(np.searchsorted(sums, left, side="right"))
        if served:
            able.append(rows[:served])
            left -= int(sums[served - 1])
            rows = rows[served:]
    empty = rows[:0]
    return np.concatenate([empty, *able]), np.concatenate([empty, *held]), left


def _places(job: Job) -> str:
    return ", ".join(f"{name}:{len(at)}" for name, at in job.devices.items())


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
