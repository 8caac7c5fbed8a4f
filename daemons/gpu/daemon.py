"""intentd-gpu: GPUs for jobs, with a finish time for each (dissertation, chapter 3)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import pwd
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from intentd.core.errors import ConfigError, InputError, PolicyError
from intentd.core.jobs.job import OVER, Instruction, Job, State
from intentd.core.jobs.ledger import Ledger
from intentd.core.jobs.placement import Node
from intentd.core.jobs.policy import Costs, from_plain, make, to_plain
from intentd.core.jobs.predictor import Predictor
from intentd.core.messages import NumberedPolicy, PolicyAck
from intentd.daemons.gpu import questions
from intentd.daemons.gpu.api import Api, answer_to
from intentd.daemons.gpu.config import GpuConfig
from intentd.daemons.gpu.executors import Executor, LocalExecutor, SimExecutor
from intentd.daemons.gpu.hands import LauncherHands
from intentd.daemons.gpu.history import KEPT
from intentd.daemons.gpu.metrics import GpuCollector
from intentd.daemons.gpu.ray_executor import RayExecutor, RaySettings
from intentd.daemons.gpu.scheduler import Scheduler
from intentd.daemons.gpu.service import Caller, Service
from intentd.daemons.gpu.store import JobStore
from intentd.daemons.kit.admin import AdminRefusedError, peer_uid
from intentd.daemons.kit.claims import Claim
from intentd.daemons.kit.lifecycle import Daemon, Kit, run_daemon
from intentd.daemons.kit.link import MemberLink
from intentd.daemons.kit.store import Store, StoreError

if TYPE_CHECKING:
    from aiohttp import web

_log = logging.getLogger(__name__)

STORE_FILE: Final = "gpu.sqlite"
POLL_S: Final = 1.0
PRUNE_S: Final = 60.0
LEARNED_FROM: Final = 2000

PROOF_LOOKS: Final = 10
PROOF_PAUSE_S: Final = 0.1


class GpuDaemon(Daemon[GpuConfig]):
    """One process that owns the books of one cluster; the jobs live in processes of their own."""

    role: ClassVar[str] = "gpu"
    config_model = GpuConfig
    audited: ClassVar[frozenset[str]] = frozenset({"jobs.cancel", "jobs.drain"})
    fixed: ClassVar[tuple[str, ...]] = (
        "jobs.executor",
        "jobs.nodes",
        "jobs.policy",
        "jobs.launcher",
        "jobs.launcher_dir",
        "ray",
        "output.max_bytes",
        "controller.enabled",
    )

    def __init__(self, config: GpuConfig, kit: Kit) -> None:
        super().__init__(config, kit)
        self.service: Service | None = None
        self.scheduler: Scheduler | None = None
        self._store: JobStore | None = None
        self._link: MemberLink | None = None
        self._executor: Executor | None = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        config, kit = self.config, self.kit
        self._store = store = JobStore(config.state_dir / STORE_FILE)
        ledger = Ledger(
            [] if config.jobs.executor == "ray" and config.ray.address else config.jobs.placement(),
            policy=make(config.jobs.policy),
            costs=config.costs.costs(),
            rules=config.jobs.rules(config.costs.hold_growth_s),
        )
        self.scheduler = scheduler = Scheduler(ledger, store, Predictor(), kit.clock)
        self._restore(scheduler, store)
        self._executor = scheduler.executor = self._make_executor(tasks, scheduler)
        kit.metrics.registry.register(GpuCollector(self.status))
        self._link = MemberLink(
            config,
            kit,
            on_policy=self._on_policy,
            collect_report=lambda: {"jobs": self._report()},
            capabilities=self._greet,
            on_question=self._on_question,
        )
        await self._link.start(tasks)
        scheduler.recover()
        if isinstance(self._executor, RayExecutor):
            self._executor.begin(tasks)
        tasks.create_task(scheduler.run(), name="scheduler")
        tasks.create_task(self._poll_for_ever(scheduler, store), name="poll")
        self.service = Service(
            scheduler, config.jobs.profiles, multi_user=bool(config.jobs.launcher)
        )
        _log.info(
            "scheduling",
            extra={"gpus": ledger.total_gpus, "unfinished": len(ledger.jobs)},
        )

    async def reload(self, config: GpuConfig) -> None:
        """Quotas, profiles, costs, bounds; nodes and executor need a restart."""
        scheduler = self.scheduler
        assert scheduler is not None, "before start"
        costs, rules = config.costs.costs(), config.jobs.rules(config.costs.hold_growth_s)
        service = Service(scheduler, config.jobs.profiles, multi_user=bool(config.jobs.launcher))

        def take(ledger: Ledger, now: float) -> list[Instruction]:
            ledger.costs, ledger.rules = costs, rules
            return []

        if self._link is not None:
            self._link.reconfigure(config.controller)
        scheduler.post(take, "configuration reloaded")
        self.service = service

    async def stop(self) -> None:
        """Jobs go on: the next daemon takes them up again."""
        if self._link is not None:
            await self._link.stop()
        if self._executor is not None:
            await self._executor.close()
        if self._store is not None and self.scheduler is not None:
            keep = self._keep_calibration(self.scheduler, self._store)
            await self._store.store.run(keep)
        if self._store is not None:
            self._store.store.close()

    def unready(self) -> list[str]:
        reasons = self._link.unready() if self._link is not None else []
        if self._store is not None:
            reasons = [*reasons, *self._store.store.unready()]
        if isinstance(self._executor, RayExecutor):
            reasons = [*reasons, *self._executor.unready()]
        return reasons

    def status(self) -> dict[str, Any]:
        scheduler = self.scheduler
        if scheduler is None:
            return {}
        ledger = scheduler.ledger
        held = sum(job.gpus for job in ledger.jobs.values())
        ray = self._executor.status() if isinstance(self._executor, RayExecutor) else None
        return {
            "executor": self.config.jobs.executor,
            **({"ray": ray} if ray is not None else {}),
            "policy": {**to_plain(ledger.policy)},
            "jobs": scheduler.state_counts(),
            "counts": dict(scheduler.counts),
            "gpus": {"total": ledger.total_gpus, "usable": ledger.capacity, "held": held},
            "coverage": [
                {**row, "kept_percent": None if math.isnan(row["kept_percent"]) else kept}
                for row in scheduler.predictor.calibrator.coverage()
                for kept in (row["kept_percent"],)
            ],
            "decide_s": scheduler.decide_s,
            "predict_s": scheduler.predict_s,
            "stale_events": ledger.stale_events,
        }

    def add_routes(self, app: web.Application) -> None:
        Api(lambda: self.service, self.kit.changes).add_routes(app)

    async def admin(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        group, _, name = command.partition(".")
        if group != "jobs":
            return await super().admin(command, args)
        if self.service is None:
            raise AdminRefusedError("the scheduler is starting", "starting")
        try:
            return await answer_to(self.service, name, args, caller_of(peer_uid.get()))
        except InputError as error:
            raise AdminRefusedError(str(error), "bad_request") from None

    async def prove(self) -> list[Claim]:
        """The queue is the store's, and what runs has a process."""
        if self.scheduler is None or self._store is None:
            return []
        ledger, store = self.scheduler.ledger, self._store
        for _ in range(PROOF_LOOKS):  # a change is in memory for a moment before it is stored
            rows = await store.store.run(lambda _store: store.unfinished())
            stored = {job.id: (job.state, job.epoch) for job in rows}
            mine = {j.id: (j.state, j.epoch) for j in ledger.jobs.values() if j.state not in OVER}
            wrong = sorted(i for i in mine | stored if mine.get(i) != stored.get(i))
            if not wrong:
                break
            await self.kit.clock.sleep(PROOF_PAUSE_S)
        found = f"{len(mine)} jobs" if not wrong else f"differ: {_shown(wrong)}"
        cure = "restart intentd-gpu: it takes the store's word" if wrong else ""
        claims = [Claim("gpu-queue", "the queue is what the store holds", not wrong, found, cure)]
        if isinstance(self._executor, LocalExecutor):
            runs = [(j.id, j.epoch) for j in ledger.jobs.values() if j.state is State.RUNNING]
            lost = [job for job, _ in self._executor.unsupervised(runs)]
            found = f"{len(runs)} running" if not lost else f"no process: {_shown(lost)}"
            cure = "restart intentd-gpu: lost runs are started again from checkpoints"
            statement = "every running job has a living supervisor"
            claims.append(Claim("gpu-processes", statement, not lost, found, cure if lost else ""))
        return claims

    # -- inside --------------------------------------------------------------------------------

    def _restore(self, scheduler: Scheduler, store: JobStore) -> None:
        ledger = scheduler.ledger
        facts = store.facts()
        if self.config.jobs.executor == "ray":
            self._restore_nodes(ledger, store, facts.get("nodes", {}))
        for name in facts.get("drained", []):
            if name in ledger.nodes:
                ledger.drain(name, scheduler.now())
        for owner, name, size in store.finished_sizes(LEARNED_FROM):
            ledger.learn(owner, name, size)
        ledger.reserve_ids(store.highest_id())
        for job in store.unfinished():
            for node in job.devices:
                if node not in ledger.nodes:
                    raise ConfigError("jobs.nodes", node, f"the node job {job.id} runs on")
            ledger.restore(job)
        if not scheduler.predictor.calibrator.restore(facts.get("calibrator")):
            _log.info("predictions are calibrated anew", extra={"known": "calibrator" in facts})
        for job in store.newest(KEPT):
            scheduler.history.arrived(ledger.arrival(job))
            if job.state in OVER:
                scheduler.history.ended(job.id, job.worked_gpu_s)

    @staticmethod
    def _restore_nodes(ledger: Ledger, store: JobStore, known: dict[str, int]) -> None:
        """Nodes of a cluster come by themselves; until then those seen last are taken as there."""
        ledger.lost.update(name for name in ledger.nodes if name not in known)
        for name, gpus in known.items():
            before = ledger.nodes.get(name)
            gpu_type = before.gpu_type if before is not None else ""
            ledger.node_joined(Node(name, gpus, gpu_type=gpu_type))
        for job in store.unfinished():
            for name, indices in job.devices.items():
                if name not in ledger.nodes:
                    ledger.node_joined(Node(name, max(indices) + 1))

    def _ray_settings(self) -> RaySettings:
        config = self.config.ray
        state = self.config.state_dir
        short = hashlib.blake2s(str(state).encode(), digest_size=5).hexdigest()
        return RaySettings(
            address=config.address,
            namespace=config.namespace,
            local={} if config.address else {n.name: n.gpus for n in self.config.jobs.nodes},
            directory=state / "ray",
            temp_dir=config.temp_dir or f"/tmp/iray-{short}",  # noqa: S108  Ray makes it, 0700 by name
            work_dir=Path(config.work_dir) if config.work_dir else state / "jobs",
            object_store_bytes=config.object_store,
            heartbeat_s=config.heartbeat_s,
            lease_s=config.lease_s,
            lost_after_s=config.lost_after_s,
        )

    def _make_executor(self, tasks: asyncio.TaskGroup, scheduler: Scheduler) -> Executor:
        ledger = scheduler.ledger
        if self.config.jobs.executor == "sim":

            def left_s(job: Job) -> float:
                return ledger.seconds_left(job, scheduler.now())

            return SimExecutor(tasks, self.kit.clock, scheduler, left_s)
        base = self.config.state_dir / "jobs"
        bound = self.config.output.max_bytes
        if self.config.jobs.executor == "ray":
            present = [name for name in ledger.nodes if name not in ledger.lost]
            settings = self._ray_settings()
            return RayExecutor(base, scheduler, self.kit.clock, settings, bound, present)
        offsets, at = {}, 0
        for node in ledger.nodes.values():
            offsets[node.name] = at
            at += node.gpus
        jobs = self.config.jobs
        if not jobs.launcher:
            return LocalExecutor(base, scheduler, offsets, bound)
        hands = LauncherHands(Path(jobs.launcher))
        return LocalExecutor(jobs.launcher_dir, scheduler, offsets, bound, hands)

    async def _poll_for_ever(self, scheduler: Scheduler, store: JobStore) -> None:
        """Progress, the store's recovery, and the records that are too old."""
        next_prune_s = 0.0
        while True:
            await self.kit.clock.sleep(POLL_S)
            assert self._executor is not None
            self._executor.poll()
            if store.store.unready():
                await store.store.run(lambda it: it.probe())
            if self.kit.clock.now() >= next_prune_s and not store.store.unready():
                next_prune_s = self.kit.clock.now() + PRUNE_S
                for job in await store.store.run(self._prune):
                    self._executor.forget(job)
                await store.store.run(self._keep_calibration(scheduler, store))

    @staticmethod
    def _keep_calibration(scheduler: Scheduler, store: JobStore) -> Callable[[Store], None]:
        """Best effort: what a minute taught may be lost."""
        state = scheduler.predictor.calibrator.state()

        def keep(_store: Store) -> None:
            with contextlib.suppress(StoreError):
                store.commit([], [], {"calibrator": state})

        return keep

    def _prune(self, _store: Store) -> list[int]:
        return self._store.prune(self.config.output.keep_jobs) if self._store is not None else []

    async def _on_question(self, subject: str, body: dict[str, Any]) -> dict[str, Any]:
        if self.service is None:
            raise InputError("jobs", "starting", "a scheduler that runs")
        return await questions.answer(self.service, subject, body)

    def _on_policy(self, policy: NumberedPolicy) -> PolicyAck:
        """The controller's choice of a policy for the jobs application."""
        number = (policy.application, policy.era, policy.number)
        if policy.application != "jobs":
            return PolicyAck(*number, applied=True)
        try:
            chosen = from_plain(policy.body)
        except PolicyError as error:
            return PolicyAck(*number, applied=False, reason=str(error))
        scheduler = self.scheduler
        if scheduler is None:
            return PolicyAck(*number, applied=False, reason="starting")

        def take(ledger: Ledger, now: float) -> list[Instruction]:
            ledger.set_policy(chosen)
            return []

        scheduler.post(take, f"policy {policy.era}.{policy.number} applied")
        return PolicyAck(*number, applied=True)

    def _greet(self) -> dict[str, Any]:
        """What a controller is told first; it may be one that knows nothing yet."""
        scheduler = self.scheduler
        assert scheduler is not None
        scheduler.history.greeted()
        return {"gpus": scheduler.ledger.total_gpus, "executor": self.config.jobs.executor}

    def _report(self) -> dict[str, Any]:
        """What the controller learns from."""
        scheduler = self.scheduler
        if scheduler is None:
            return {}
        status, costs = self.status(), scheduler.ledger.costs
        return {
            "gpus": scheduler.ledger.total_gpus,
            "jobs": status["jobs"],
            "counts": status["counts"],
            "coverage": status["coverage"],
            "costs": {name: getattr(costs, name) for name in Costs.__slots__},
            "history": scheduler.history.report(),
        }


def _shown(jobs: Sequence[int]) -> str:
    return ", ".join(f"job {job}" for job in jobs[:10]) + (" ..." if len(jobs) > 10 else "")


def caller_of(uid: int) -> Caller:
    """The user behind a connection. Root and the daemon's own user are trusted."""
    try:
        name = pwd.getpwuid(uid).pw_name if uid >= 0 else ""
    except KeyError:
        name = f"uid-{uid}"
    return Caller(name, trusted=uid in (0, os.geteuid()))


def main() -> int:
    return run_daemon(GpuDaemon)


if __name__ == "__main__":
    raise SystemExit(main())
