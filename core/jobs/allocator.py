"""The one allocator: a pure function over arrays that daemon, predictor and simulator call.

It is compiled (kernel/*.c, built by setup.py); reference.py is the same in plain Python, held
against it by the tests and taken where the compiled one was not built.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError, StateError
from intentd.core.jobs.demand import DemandFunction, efficiency
from intentd.core.jobs.policy import FREE, NAMES, Costs, JobsPolicy

Array = NDArray[np.float64]
LEASE_GROWTH: Final = 0.02  # of play-outs; as in kernel/kernel.h
BACKENDS: Final = ("compiled", "reference")
DECIDE, PLAY = 0, 1


def compiled_kernel() -> ModuleType | None:
    """The extension module, or None where it was not built."""
    try:
        return importlib.import_module("intentd.core.jobs._kernel")
    except ImportError:
        return None


@functools.cache
def _backend() -> Any:
    kernel = compiled_kernel()
    if kernel is not None:
        return kernel.run
    warnings.warn(
        "the compiled job kernel is not built: using the plain-Python reference, about a hundred "
        "times slower (build it with `make kernel`; it needs a C compiler)",
        RuntimeWarning,
        stacklevel=3,
    )
    return importlib.import_module("intentd.core.jobs.reference").run


def backend_named(name: str) -> Any:
    """The run function of one backend: "compiled" (InputError if not built) or "reference"."""
    if name == "reference":
        return importlib.import_module("intentd.core.jobs.reference").run
    kernel = compiled_kernel()
    if name != "compiled" or kernel is None:
        raise InputError("backend", name, "reference, or compiled after `make kernel`")
    return kernel.run


@dataclass(frozen=True, slots=True)
class JobTable:
    """Jobs in arrival order, as arrays. Index = arrival order everywhere.

    submit_s: rising. work_gpu_s: GPU seconds at the smallest allocation. estimate: estimated over
    true work (1: known). smallest: GPUs a grant takes at least (0: any fraction). largest: GPUs of
    the largest useful grant. table: row of speeds. speeds: (tables, GPUs + 1), rising.
    """

    submit_s: Array
    work_gpu_s: Array
    smallest: Array
    largest: NDArray[np.int32]
    table: NDArray[np.int32]
    speeds: Array
    estimate: Array
    efficiency: Array = field(repr=False)

    def __len__(self) -> int:
        return len(self.submit_s)

    @property
    def sizes_gpu_s(self) -> Array:
        """What classes go by: the estimated sizes."""
        return self.work_gpu_s * self.estimate

    def take(self, index: Any) -> JobTable:
        """The jobs at an index array, mask or slice (which must keep arrival order)."""
        return JobTable(
            self.submit_s[index],
            self.work_gpu_s[index],
            self.smallest[index],
            self.largest[index],
            self.table[index],
            self.speeds,
            self.estimate[index],
            self.efficiency,
        )

    def load(self, gpus: float) -> float:
        """Offered GPU seconds over the GPU seconds there are, if jobs scaled linearly."""
        span = float(self.submit_s[-1] - self.submit_s[0]) if len(self) > 1 else 0.0
        return float(self.work_gpu_s.sum()) / (span * gpus) if span > 0 else math.inf


def job_table(
    submit_s: Sequence[float] | Array,
    work_gpu_s: Sequence[float] | Array,
    largest: Sequence[int] | NDArray[Any],
    table: Sequence[int] | NDArray[Any],
    speeds: Array,
    *,
    smallest: Sequence[float] | Array | float = 0.0,
    estimate: Sequence[float] | Array | float = 1.0,
) -> JobTable:
    """Builds and checks a table. Raises InputError naming the first wrong row."""
    n = len(submit_s)
    submit = np.ascontiguousarray(submit_s, dtype=np.float64)
    work = np.ascontiguousarray(work_gpu_s, dtype=np.float64)
    least = np.ascontiguousarray(np.broadcast_to(smallest, n), dtype=np.float64)
    factor = np.ascontiguousarray(np.broadcast_to(estimate, n), dtype=np.float64)
    top = np.ascontiguousarray(largest, dtype=np.int32)
    row = np.ascontiguousarray(table, dtype=np.int32)
    speeds = np.ascontiguousarray(speeds, dtype=np.float64)
    checks = (
        ("submit_s", submit, np.isfinite(submit), "a finite number of seconds"),
        ("submit_s", submit, np.diff(submit, prepend=-np.inf) >= 0, "times that do not run back"),
        ("service_gpu_s", work, np.isfinite(work) & (work > 0), "a finite number > 0"),
        ("estimate", factor, np.isfinite(factor) & (factor > 0), "a finite number > 0"),
        ("gpus", top, (top >= 1) & (top < speeds.shape[1]), f"1 to {speeds.shape[1] - 1} GPUs"),
        ("min_gpus", least, (least >= 0) & (least <= top), "0 to max GPUs"),
        ("table", row, (row >= 0) & (row < len(speeds)), "a known scaling table"),
    )
    for name, values, holds, expected in checks:
        if not np.all(holds):
            at = int(np.argmin(holds))
            raise InputError(f"jobs[{at}].{name}", values[at].item(), expected)
    effective = np.stack([efficiency(line) for line in speeds])
    return JobTable(submit, work, least, top, row, speeds, factor, effective)


def table_of(
    demands: Sequence[DemandFunction],
    submit_s: Sequence[float],
    *,
    gpu_type: str = "",
    node_gpus: int = 0,
    estimate: Sequence[float] | float = 1.0,
) -> JobTable:
    """A table from demand functions on one GPU type; equal speed rows are shared."""
    rows: dict[bytes, int] = {}
    kept: list[Array] = []
    index: list[int] = []
    width = max((d.largest for d in demands), default=1) + 1
    for demand in demands:
        line = demand.speeds(gpu_type, node_gpus)
        line = np.concatenate([line, np.full(width - len(line), line[-1])])
        key = line.round(12).tobytes()
        if key not in rows:
            rows[key] = len(kept)
            kept.append(line)
        index.append(rows[key])
    return job_table(
        submit_s,
        [d.size_gpu_s for d in demands],
        [d.largest for d in demands],
        index,
        np.stack(kept) if kept else np.zeros((1, width)),
        smallest=np.array([float(d.smallest) for d in demands]),
        estimate=estimate,
    )


@dataclass(slots=True)
class Progress:
    """Where each job of a table stands; the mutable half of a snapshot. Arrays of (jobs,).

    remaining_gpu_s: estimated work left. grant: GPUs held. stall_s: start-up still to go.
    since_s: start of the current run. contention, decisions: sum of the jobs seen active and the
    number of decisions it was summed over (Themis). started: ran before.
    """

    remaining_gpu_s: Array
    grant: Array
    stall_s: Array
    since_s: Array
    contention: Array
    decisions: Array
    started: NDArray[np.uint8]

    @classmethod
    def fresh(cls, jobs: JobTable) -> Progress:
        n = len(jobs)
        return cls(
            jobs.sizes_gpu_s.copy(),
            np.zeros(n),
            np.zeros(n),
            np.zeros(n),
            np.full(n, float(max(n, 1))),
            np.ones(n),
            np.zeros(n, dtype=np.uint8),
        )


@dataclass(frozen=True, slots=True)
class Quotas:
    """GPUs that owners may hold at once. owner: (jobs,) int32, index into gpus, -1 for no quota.

    A job is held until its owner's quota has room for its smallest grant beside those of the
    owner's active jobs (the running first, then by arrival); what these leave of the quota goes to
    the oldest first, up to their largest grants.
    """

    owner: NDArray[np.int32]
    gpus: Array


@dataclass(slots=True)
class Outcome:
    """What a run returns; times in seconds, NaN where it did not happen."""

    finish_s: Array
    start_s: Array
    fair_s: Array  # seconds the job would take at a fair share (section 3.2.2)
    predicted_s: Array  # predicted finish, absolute
    resizes: Array
    preemptions: Array
    grant: Array
    summary: Array  # last time, decisions, integral of active jobs over time, still active
    reviews_s: Array  # (reviews, jobs): predicted finish of the jobs active at a review
    complete: bool


def numbers_of(
    policy: JobsPolicy,
    costs: Costs,
    gpus: float,
    now_s: float,
    width: int,
    *,
    artifact: bool = False,
    seed: int = 0,
    target: int = -1,
    review_every: int = 0,
    lease_growth: float = 0.0,
) -> Array:
    """The scalars of a run, in the order of kernel/module.c."""
    return np.array(
        [
            NAMES.index(policy.name),
            policy.integral,
            artifact,
            policy.zeta,
            policy.delta,
            policy.lease_s,
            costs.start_s,
            costs.resize_s,
            costs.preempt_s,
            costs.min_runtime_s,
            costs.checkpoint_s,
            gpus,
            now_s,
            seed,
            target,
            width,
            review_every,
            lease_growth,
        ],
        dtype=np.float64,
    )


def run(
    mode: int,
    jobs: JobTable,
    policy: JobsPolicy,
    gpus: float,
    *,
    now_s: float = 0.0,
    progress: Progress | None = None,
    costs: Costs = FREE,
    failures: Array | None = None,
    predict: NDArray[np.uint8] | None = None,
    artifact: bool = False,
    seed: int = 0,
    target: int = -1,
    review_every: int = 0,
    quotas: Quotas | None = None,
    lease_growth: float = 0.0,
    backend: str = "",
) -> Outcome:
    """Decides once (DECIDE) or plays to the end (PLAY); the raw door to the kernel.

    progress: the first len(progress) jobs are active at now_s, the others arrive at submit_s.
    failures: (m, 2) rising times and changes of capacity. predict: jobs whose finish is predicted
    at their arrival. review_every: after every so many arrivals the finish of all active jobs is
    predicted anew. target: stop when this job ends. quotas: kept throughout; not together with
    predict and review_every. lease_growth: leases last at least this times the time since now_s, as
    they do in predictions. Raises InputError for what it refuses.
    """
    n, active = len(jobs), 0 if progress is None else len(progress.remaining_gpu_s)
    state = {name: np.zeros(n) for name in ("left", "grant", "stall", "since", "seen", "count")}
    flags = np.zeros((2, n), dtype=np.uint8)
    if progress is not None:
        flags[0, :active] = 1
        flags[1, :active] = progress.started
        state["left"][:active] = progress.remaining_gpu_s
        state["grant"][:active] = progress.grant
        state["stall"][:active] = progress.stall_s
        state["since"][:active] = progress.since_s
        state["seen"][:active] = progress.contention
        state["count"][:active] = progress.decisions
    answers = [np.full(n, np.nan) for _ in range(4)] + [np.zeros(n) for _ in range(3)]
    summary = np.zeros(4)
    reviews = np.full((n // review_every if review_every else 0, n), np.nan)
    arrays = (
        *(jobs.submit_s, jobs.work_gpu_s, jobs.estimate, jobs.smallest, jobs.largest, jobs.table),
        *(jobs.speeds, jobs.efficiency),
        np.asarray(policy.thresholds_gpu_s, dtype=np.float64),
        np.asarray(policy.weights, dtype=np.float64),
        *(flags[0].copy(), *state.values(), flags[1].copy()),
        np.zeros(0) if failures is None else np.ascontiguousarray(failures, np.float64).ravel(),
        np.zeros(n, dtype=np.uint8) if predict is None else predict,
        *answers,
        summary,
        reviews.reshape(-1),
        np.zeros(0, dtype=np.int32) if quotas is None else quotas.owner,
        np.zeros(0) if quotas is None else quotas.gpus,
    )
    numbers = numbers_of(
        policy,
        costs,
        gpus,
        now_s,
        jobs.speeds.shape[1],
        artifact=artifact,
        seed=seed,
        target=target,
        review_every=review_every,
        lease_growth=lease_growth,
    )
    chosen = backend_named(backend) if backend else _backend()
    code = chosen(mode, numbers, arrays)
    finish, start, fair, predicted, resizes, preemptions, grant = answers
    return Outcome(
        *(finish, start, fair, predicted, resizes, preemptions, grant, summary, reviews),
        complete=code == 0,
    )


def allocate(
    jobs: JobTable,
    policy: JobsPolicy,
    gpus: float,
    *,
    now_s: float,
    progress: Progress,
    costs: Costs = FREE,
    backend: str = "",
) -> Array:
    """GPUs for each of the active jobs (all of the table), (jobs,); pure.

    progress.grant and since_s matter only under a minimum runtime.
    """
    outcome = run(
        DECIDE, jobs, policy, gpus, now_s=now_s, progress=progress, costs=costs, backend=backend
    )
    return outcome.grant


def play_out(
    jobs: JobTable,
    policy: JobsPolicy,
    gpus: float,
    *,
    now_s: float,
    progress: Progress,
    costs: Costs = FREE,
    target: int = -1,
    quotas: Quotas | None = None,
) -> Array:
    """Finish times (absolute) of the active jobs if nothing else arrived, NaN if not played.

    target: stop as soon as this one ended; its time is all that is then valid.
    Raises StateError if they can never all run.
    """
    outcome = run(
        PLAY,
        jobs,
        policy,
        gpus,
        now_s=now_s,
        progress=progress,
        costs=costs,
        target=target,
        quotas=quotas,
        lease_growth=LEASE_GROWTH,
    )
    if not outcome.complete:
        raise StateError(f"jobs wait for ever on {gpus:g} GPUs: a minimum above the capacity")
    return outcome.finish_s
