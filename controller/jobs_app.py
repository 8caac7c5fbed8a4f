"""Scheduling of GPU jobs: histories in, Pareto fronts searched, the operator's choice out.

The implementation of `controller.application` for jobs (dissertation, section 3.3.2). It begins
with FIFO; once enough jobs are known it has the preference solver search the trade-offs, in a
process of its own, again whenever the workload changed, grew or a timer is due, starting from the
last front. What is applied is the operator's to say: a point, a rule that is followed from front
to front, or a configuration of their own.

One policy goes to all schedulers; with several, the front is that of the one with most jobs.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

from intentd.controller.application import SchedulingApplication
from intentd.controller.config import JobsSection
from intentd.controller.fronts import Front, FrontBook
from intentd.controller.policies import AUTOMATIC, PolicyBook, StoredPolicy
from intentd.controller.search.process import SearchProcess, search_job
from intentd.core.errors import InputError, IntentdError, PolicyError
from intentd.core.jobs.choice import Choice, choice_from_plain, pick
from intentd.core.jobs.history import Arrival, JobHistory, arrivals_from_plain
from intentd.core.jobs.metrics import parse_objectives
from intentd.core.jobs.policy import Costs, JobsPolicy, from_plain, make, to_plain, wfq
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.store import Storage

_log = logging.getLogger(__name__)

APPLICATION: Final = "jobs"
MAX_CLUSTERS: Final = 64
MAX_PENDING: Final = 20_000  # jobs of a cluster that wait for the next computation
RETRY_S: Final = 300.0  # after a search that failed

MemberKey = tuple[str, str]
Workload = dict[MemberKey, list[Arrival]]


@dataclass(slots=True)
class Cluster:
    """One gpu daemon: its GPUs, its past, and what it said last."""

    history: JobHistory
    costs: Costs = field(default_factory=Costs)
    pending: list[Arrival] = field(default_factory=list)
    dropped_jobs: int = 0
    counts: dict[str, Any] = field(default_factory=dict)
    coverage: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Due:
    """A search that is worth its time, and why."""

    member: MemberKey
    reason: str


class JobsApplication(
    SchedulingApplication[Workload, dict[str, float | None], Due | None, JobsPolicy | None]
):
    """on_issue is called in the loop with each policy that was numbered and stored."""

    name: ClassVar[str] = APPLICATION

    def __init__(
        self,
        config: JobsSection,
        clock: Clock,
        store: Storage,
        book: PolicyBook,
        *,
        on_issue: Callable[[StoredPolicy], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._store = store
        self._book = book
        self._fronts = FrontBook(store)
        self._on_issue = on_issue
        self.clusters: dict[MemberKey, Cluster] = {}
        self.process = SearchProcess()
        self.front: Front | None = self._fronts.newest()
        self.choice: Choice | None = self._fronts.choice()
        self.searching = ""
        self.search_error = self.choice_error = ""
        self._objectives = self._fronts.preference() or list(config.objectives)
        self._wanted: dict[str, Any] | None = None
        self._wake = asyncio.Event()
        self._next_timer_s = clock.now() + config.front_interval_s
        age_s = clock.wall() - self.front.made_wall_s if self.front is not None else math.inf
        self._not_before_s = clock.now() + max(0.0, config.rest_s - age_s)
        self._lock = asyncio.Lock()
        self.newest = book.newest(APPLICATION)

    # -- measure -----------------------------------------------------------------------------

    def note_cluster(self, member: MemberKey, capabilities: Mapping[str, Any]) -> bool:
        """A scheduler and the GPUs it announces. True if it is new."""
        gpus = capabilities.get("gpus")
        if isinstance(gpus, bool) or not isinstance(gpus, (int, float)) or not 0 <= gpus <= 1e7:
            raise InputError("capabilities.gpus", f"{gpus!r:.60}", "a number of GPUs")
        known = self.clusters.get(member)
        if known is not None:
            known.history.gpus = float(gpus)
            return False
        if len(self.clusters) >= MAX_CLUSTERS:
            raise InputError("gpu", member[1], f"at most {MAX_CLUSTERS} schedulers")
        self.clusters[member] = Cluster(JobHistory(float(gpus), self._config.history()))
        return True

    def take_report(self, member: MemberKey, body: object) -> None:
        """Queue what a report adds. Raises InputError, whole."""
        cluster = self.clusters.get(member)
        if cluster is None:
            return
        if not isinstance(body, Mapping):
            raise InputError("jobs", f"{body!r:.60}", "a table")
        arrivals = arrivals_from_plain(body.get("history", {}), "jobs.history")
        costs = _costs(body.get("costs") or {})
        room = MAX_PENDING - len(cluster.pending)
        cluster.dropped_jobs += max(0, len(arrivals) - room)
        cluster.pending += arrivals[: max(0, room)]
        cluster.costs = costs
        cluster.counts = dict(body.get("jobs") or {})
        cluster.coverage = list(body.get("coverage") or ())[:64]

    def get_workload_info(self) -> Workload:
        """What arrived since the last call."""
        info = {member: cluster.pending for member, cluster in self.clusters.items()}
        for cluster in self.clusters.values():
            cluster.pending = []
        return {member: rows for member, rows in info.items() if rows}

    def get_class_load(self) -> dict[str, float | None]:
        """Scheduler -> offered share of its GPUs."""
        return {name: cluster.history.load() for (_, name), cluster in self.clusters.items()}

    # -- compute (in a thread) -----------------------------------------------------------------

    def compute_thresholds(self, workload: Workload) -> Due | None:
        """Learns, and says whether a search is worth its time."""
        for member, rows in workload.items():
            cluster = self.clusters.get(member)
            change = cluster.history.take(rows) if cluster is not None else None
            if change is not None:
                _log.info(
                    "workload changed",
                    extra={
                        "scheduler": member[1],
                        "jobs": change.flows,
                        "divergence": round(change.divergence, 3),
                    },
                )
        now = self._clock.now()
        busiest = self._busiest()
        if busiest is None or not self._config.search or now < self._not_before_s:
            return None
        history = self.clusters[busiest].history
        reason = history.due(None if self.front is None else self.front.basis)
        if not reason and now >= self._next_timer_s and len(history) >= self._config.min_jobs:
            reason = "timer"
        return Due(busiest, reason) if reason else None

    def compute_rates(self, load: dict[str, float | None]) -> JobsPolicy | None:
        """The first policy, once there is a scheduler; afterwards fronts and operators decide."""
        return make(self._config.bootstrap) if self.newest is None and load else None

    # -- enforce -------------------------------------------------------------------------------

    async def enforce_thresholds(self, thresholds: Due | None) -> None:
        """Have a search begun; ``run`` does it."""
        if thresholds is not None and not self.searching and self._wanted is None:
            self._wanted = {"reason": thresholds.reason}
            self._wake.set()

    async def enforce_rates(self, rates: JobsPolicy | None) -> None:
        if rates is not None and self._book.hold(APPLICATION) is None:
            await self._issue(rates, author=AUTOMATIC, reason="bootstrap: no front yet", inputs={})

    async def run(self) -> None:
        """Searches, one after the other, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            wanted, self._wanted = self._wanted, None
            if wanted is None:
                continue
            try:
                await self._search(**wanted)
            except IntentdError as error:
                self.search_error = str(error)
                self._not_before_s = self._clock.now() + RETRY_S
                _log.error("search failed", extra={"error": str(error)})
            finally:
                self.searching = ""

    async def _search(self, reason: str, **changed: Any) -> None:
        member = self._busiest()
        if member is None:
            raise InputError("gpu", 0, "a scheduler that reported jobs")
        self.searching = reason
        cluster = self.clusters[member]
        began, basis = self._clock.wall(), cluster.history.basis()
        present = None if self.newest is None else from_plain(self.newest.body)
        job = await asyncio.to_thread(self._job, cluster, present, changed)
        cluster.history.searched()
        now = self._clock.now()
        self._next_timer_s = now + self._config.front_interval_s
        self._not_before_s = now + self._config.rest_s
        document = await self.process.search(job)
        if not document["front"]:
            raise IntentdError("search: no configuration was found")
        document["basis"] = {
            "jobs": basis.jobs, "load": basis.load, "gpus": cluster.history.gpus,
            "scheduler": member[1], "changes": cluster.history.changes,
        }  # fmt: skip
        self.front = await self._store.run(lambda _: self._fronts.add(began, reason, document))
        self.search_error = self.choice_error = ""
        _log.info(
            "front found",
            extra={
                "number": self.front.number,
                "points": len(self.front.points),
                "reason": reason,
                "wall_s": round(document["wall_s"], 1),
            },
        )
        await self._follow()

    def _job(
        self, cluster: Cluster, present: JobsPolicy | None, changed: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The job of the search process, from this history and the last front."""
        warm = [] if self.front is None else [
            self.front.policy(at) for at in range(min(len(self.front.points), 40))
        ]  # fmt: skip
        config = self._config
        settings = {
            "sample_jobs": config.sample_jobs,
            "samples": config.samples,
            "seed": 1 + (0 if self.front is None else self.front.number),
            "evaluations": config.evaluations,
            "seconds": config.seconds,
            "algorithm": config.algorithm,
            "space": config.space,
            "workers": config.workers,
            "predictions": 1.0,
            **changed,
        }
        return search_job(
            cluster.history.table(),
            gpus=cluster.history.gpus,
            objectives=self._objectives,
            present=present,
            warm=warm,
            costs=cluster.costs,
            **settings,
        )

    async def _follow(self) -> None:
        """Choose again by the operator's rule, if there is one and nothing is held."""
        choice = self.choice
        if choice is None or not choice.follow or self._book.hold(APPLICATION) is not None:
            return
        try:
            await self._apply_choice(choice, author=AUTOMATIC)
        except InputError as error:
            self.choice_error = str(error)
            _log.warning("rule not followed", extra={"error": str(error)})

    # -- the operator: section 3.3.2 -------------------------------------------------------------

    async def set_preference(self, objectives: object) -> list[str]:
        """SetPreference. objectives: "jct:avg,prederr:p99" or a list. Kept over restarts."""
        if isinstance(objectives, (list, tuple)):
            objectives = ",".join(map(str, objectives))
        if not isinstance(objectives, str):
            raise InputError(
                "objectives", f"{objectives!r:.60}", "text such as jct:avg,prederr:avg"
            )
        names = [objective.name for objective in parse_objectives(objectives)]
        await self._store.run(lambda _: self._fronts.set_preference(names))
        self._objectives = names
        return names

    def update_front(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """UpdateParetoFront: begins a search now. changed: settings for this once."""
        checked = self._config.checked(changed)
        if self.searching or self._wanted is not None:
            raise InputError("search", self.searching or "about to begin", "none running")
        member = self._busiest()
        known = 0 if member is None else len(self.clusters[member].history)
        if known < 20:
            raise InputError("history", known, "at least 20 jobs, to keep half for the test")
        self._wanted = {"reason": "asked", **checked}
        self.process.done = self.process.total = 0
        self._wake.set()
        return self.progress()

    def cancel_search(self) -> bool:
        """Ends a running search with what it found."""
        self._wanted = None
        return self.process.cancel()

    async def apply(self, args: Mapping[str, Any], *, author: str) -> dict[str, Any]:
        """SetWFQConfig: a choice on the present front, or a configuration. Raises InputError.

        args: ``choice`` (see core/jobs/choice), or ``config`` (a policy, or T, W, zeta, delta);
        ``preview`` true: only say what it would be.
        """
        choice, config = args.get("choice"), args.get("config")
        if (choice is None) == (config is None):
            raise InputError(
                "choice, config", "neither" if choice is None else "both", "one of them"
            )
        if choice is not None:
            chosen = choice_from_plain(choice)
            if args.get("preview"):
                return {"issued": None, **self._chosen(chosen)[1]}
            async with self._lock:
                issued = await self._apply_choice(chosen, author=author)
            return {"issued": issued.to_plain(whole=False)}
        policy = self._configured(config)
        if args.get("preview"):
            return {"issued": None, "config": to_plain(policy)}
        async with self._lock:
            await self._keep_choice(None)
            reason = "set: " + str(args.get("why") or "a configuration of the operator's")[:200]
            issued = await self._issue(policy, author=author, reason=reason, inputs={})
        return {"issued": issued.to_plain(whole=False)}

    def _chosen(self, choice: Choice) -> tuple[JobsPolicy, dict[str, Any]]:
        if self.front is None:
            raise InputError("front", "none", "a front: search one first (update)")
        index = pick(self.front.objectives, choice)
        point = self.front.points[index]
        told = {
            "front": self.front.number,
            "index": index,
            "train": point["train"],
            "test": point["test"],
            "choice": choice.to_plain(),
            "basis": dict(self.front.document["basis"]),
        }
        return replace(self.front.policy(index), integral=True), told

    async def _apply_choice(self, choice: Choice, *, author: str) -> StoredPolicy:
        policy, told = self._chosen(choice)
        values = ", ".join(f"{name} {value:.4g}" for name, value in told["test"].items())
        reason = f"point {told['index']} of front {told['front']}: {values}"
        issued = await self._issue(policy, author=author, reason=reason, inputs=told)
        await self._keep_choice(choice)
        return issued

    async def _keep_choice(self, choice: Choice | None) -> None:
        await self._store.run(lambda _: self._fronts.set_choice(choice))
        self.choice = choice

    def _configured(self, config: object) -> JobsPolicy:
        """A policy from its plain form, or WFQ(T, W, zeta, delta) over the known sizes."""
        if not isinstance(config, Mapping):
            raise InputError("config", f"{config!r:.60}", "a policy, or T, W, zeta, delta")
        if "T" not in config:
            return replace(from_plain(config, "config"), integral=True)
        for name in config:
            if name not in ("T", "W", "zeta", "delta"):
                raise InputError(f"config.{name!s:.40}", config[name], "T, W, zeta or delta")
        member = self._busiest()
        if member is None:
            raise PolicyError("config.T", config["T"], "a history of jobs to cut classes from")
        given = {"W": 0.0, "zeta": 0.0, "delta": 0.1, **config}
        return wfq(self.clusters[member].history.sizes(), **given)

    async def rollback(self, number: int, *, author: str) -> StoredPolicy:
        """Issue an old policy's content anew and hold the automatic ones."""
        async with self._lock:
            stored = await self._store.run(
                lambda _: self._book.rollback(APPLICATION, number, author=author)
            )
            self._issued(stored)
        return stored

    async def release(self) -> bool:
        """Let automatic policies go on."""
        return await self._store.run(lambda _: self._book.release(APPLICATION))

    def prepare(self, config: JobsSection) -> Callable[[], None]:
        """Build what a reloaded section asks for; calling the result swaps. Histories and fronts
        are kept."""
        history = config.history()
        objectives = self._fronts.preference() or list(config.objectives)

        def swap() -> None:
            self._config = config
            self._objectives = objectives
            for cluster in self.clusters.values():
                cluster.history.settings = history

        return swap

    # -- for people ------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        return {
            "searching": self.searching or (self._wanted or {}).get("reason", ""),
            "done": self.process.done,
            "total": self.process.total,
            "error": self.search_error,
        }

    def describe(self) -> dict[str, Any]:
        """As /api/jobs shows it."""
        front = self.front
        return {
            "objectives": list(self._objectives),
            "choice": None if self.choice is None else self.choice.to_plain(),
            "choice_error": self.choice_error,
            "policy": None if self.newest is None else self.newest.to_plain(whole=True),
            "search": self.progress(),
            "front": None
            if front is None
            else {
                "number": front.number,
                "made_wall_s": front.made_wall_s,
                "reason": front.reason,
                "points": len(front.points),
                "basis": front.document["basis"],
            },
            "schedulers": [
                {
                    "name": name,
                    "gpus": cluster.history.gpus,
                    "known_jobs": len(cluster.history),
                    "dropped_jobs": cluster.dropped_jobs,
                    "changes": cluster.history.changes,
                    "load": cluster.history.load(),
                    "jobs": cluster.counts,
                    "coverage": cluster.coverage,
                }
                for (_, name), cluster in sorted(self.clusters.items())
            ],
        }

    def show_front(self) -> dict[str, Any]:
        """The present front whole, with the point in force marked. Raises InputError."""
        front = self.front
        if front is None:
            raise InputError("front", "none", "a front: none was searched yet")
        inputs = {} if self.newest is None else self.newest.inputs
        mine = inputs.get("front") == front.number and self.newest is not None
        return {
            **front.document,
            "number": front.number,
            "made_wall_s": front.made_wall_s,
            "reason": front.reason,
            "in_force": inputs.get("index") if mine else None,
        }

    def seen(self, era: int, number: int, member: str) -> None:
        """A member runs a policy; one this book never issued begins a new era."""
        stored = self._book.seen(APPLICATION, era, number, member)
        if stored is not None:
            self._issued(stored)

    # -- inside ----------------------------------------------------------------------------------

    def _busiest(self) -> MemberKey | None:
        known = [key for key, cluster in self.clusters.items() if len(cluster.history)]
        return max(known, key=lambda key: len(self.clusters[key].history), default=None)

    async def _issue(
        self, policy: JobsPolicy, *, author: str, reason: str, inputs: Mapping[str, Any]
    ) -> StoredPolicy:
        body = to_plain(policy)
        stored = await self._store.run(
            lambda _: self._book.issue(
                APPLICATION, body, inputs=inputs, reason=reason[:1000], author=author
            )
        )
        self._issued(stored)
        return stored

    def _issued(self, stored: StoredPolicy) -> None:
        self.newest = stored
        _log.info(
            "policy issued",
            extra={
                "application": APPLICATION,
                "era": stored.era,
                "number": stored.number,
                "reason": stored.reason,
            },
        )
        self._on_issue(stored)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a jobs policy changes against the one before, one line a fact."""
    if not old:
        return [f"{new['name']}: {len(new['weights'])} classes"]
    lines = []
    if len(old["weights"]) != len(new["weights"]):
        lines.append(f"{len(old['weights'])} -> {len(new['weights'])} classes")
    lines += [
        f"{name} {old.get(name)} -> {value}"
        for name, value in new.items()
        if name != "origin" and old.get(name) != value
    ]
    return lines[:1000]


def _costs(plain: object) -> Costs:
    if not isinstance(plain, Mapping):
        raise InputError("jobs.costs", f"{plain!r:.60}", "a table")
    known = {name: plain[name] for name in Costs.__slots__ if name in plain}
    return Costs(**known)
