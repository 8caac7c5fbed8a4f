"""The turnstile: one change of the books after the other, on disk before anybody acts on it.

Changes wait in a queue; all that wait are applied together, committed in one transaction, and
only then acknowledged; then the books decide, the decision is committed, and its orders go out. If
nobody waits for an acknowledgement both are one transaction. A disk that refuses stops
acknowledgements and decisions, not the jobs; it is tried again every second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from intentd.core.errors import InputError, IntentdError
from intentd.core.jobs.job import HOLDING, OVER, Event, Instruction, Job, Start
from intentd.core.jobs.ledger import Ledger
from intentd.core.jobs.placement import Node
from intentd.core.jobs.predictor import Prediction, Predictor, WhatIf
from intentd.core.jobs.spec import JobSpec
from intentd.core.sim.jobs import Snapshot
from intentd.daemons.gpu.executors import Executor
from intentd.daemons.gpu.history import Reporter
from intentd.daemons.gpu.store import JobStore, plain_of
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.store import StoreError

_log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_BATCH: Final = 512
QUEUE: Final = 10_000
RETRY_S: Final = 1.0
REFRESH_S: Final = 1.0
IDLE_S: Final = 60.0
ISSUED_ALONE: Final = 16  # submissions of one batch that get a play-out each
REISSUED_AT_ONCE: Final = 64
PREDICTED_JOBS: Final = 4000  # with more unfinished ones predictions would hold the loop up


@dataclass(slots=True)
class _Change:
    """apply returns the answer and orders. submitted: jobs it books, withdrawn if not stored."""

    apply: Callable[[Ledger, float], tuple[Any, list[Instruction]]]
    answer: asyncio.Future[Any] | None
    cause: str
    submitted: list[int]


class Scheduler:
    """Owns books, store and predictor. Implements executors.Sink."""

    def __init__(self, ledger: Ledger, store: JobStore, predictor: Predictor, clock: Clock) -> None:
        self.ledger, self.store, self.predictor = ledger, store, predictor
        self.executor: Executor | None = None
        self.counts = {"submitted": 0, "finished": 0, "failed": 0, "cancelled": 0, "starts": 0}
        self.decide_s = 0.0
        self.predict_s = 0.0
        self.history = Reporter()
        self.changed = asyncio.Condition()
        self._clock = clock
        self._offset = clock.wall() - clock.now()
        self._queue: asyncio.Queue[_Change] = asyncio.Queue(QUEUE)
        self._unsaved_jobs: dict[int, tuple[Job, dict[str, Any]]] = {}
        self._unsaved_events: list[Event] = []
        self._facts: dict[str, Any] = {}
        self._orders: list[Instruction] = []
        self._stored = True  # the last commit was
        self._causes: list[str] = []
        self._hit: dict[int, str] = {}  # jobs that lost work, and why: are predicted anew
        self._refreshed_s = 0.0
        self._refreshing = False

    def now(self) -> float:
        """Wall-clock seconds that do not run backwards while the daemon lives."""
        return self._offset + self._clock.now()

    # -- changes in ----------------------------------------------------------------------------

    async def change(
        self, apply: Callable[[Ledger, float], tuple[T, list[Instruction]]], cause: str = ""
    ) -> T:
        """The answer, once the change is on disk. Raises what apply raised, or StoreError."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        await self._queue.put(_Change(apply, answer, cause, []))
        return await answer

    async def submit(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Books all or none; returns once they are on disk and predicted."""
        numbers: list[int] = []

        def book(ledger: Ledger, now: float) -> tuple[list[Job], list[Instruction]]:
            jobs: list[Job] = []
            try:
                for spec in specs:
                    jobs.append(ledger.submit(spec, now))
            except InputError:
                for job in jobs:
                    ledger.withdraw(job.id)
                raise
            numbers.extend(job.id for job in jobs)
            return jobs, []

        answer: asyncio.Future[list[Job]] = asyncio.get_running_loop().create_future()
        await self._queue.put(_Change(book, answer, "", numbers))
        return await answer

    def post(
        self, apply: Callable[[Ledger, float], list[Instruction] | None], cause: str = ""
    ) -> None:
        """A change nobody waits for. The executor cannot outrun the queue: it is bounded by the
        unfinished jobs, so a full queue is a defect and raises."""
        change = _Change(lambda ledger, now: (None, apply(ledger, now) or []), None, cause, [])
        self._queue.put_nowait(change)

    def started(self, job: int, epoch: int) -> None:
        self.post(lambda ledger, now: ledger.started(job, epoch, now))

    def exited(self, job: int, epoch: int, status: int, detail: str) -> None:
        self.post(
            lambda ledger, now: ledger.exited(job, epoch, status, now, detail), f"job {job} ended"
        )

    def lost(self, job: int, epoch: int, why: str, *, began: bool) -> None:
        def lose(ledger: Ledger, now: float) -> None:
            ledger.lost_run(job, epoch, now, why, began=began)
            self._hit.setdefault(job, why)

        self.post(lose, f"job {job}: {why}")

    def progress(self, job: int, epoch: int, done: float, total: float) -> None:
        self.post(
            lambda ledger, now: ledger.progress(job, epoch, done, total, now), "measured progress"
        )

    def node_joined(self, node: str, gpus: int) -> None:
        def join(ledger: Ledger, now: float) -> None:
            known = ledger.nodes.get(node)
            drained = known is not None and known.drained
            gpu_type = known.gpu_type if known is not None else ""
            ledger.node_joined(Node(node, gpus, drained, gpu_type))
            self._remember_nodes()

        self.post(join, f"node {node} joined")

    def node_lost(self, node: str, why: str) -> None:
        def lose(ledger: Ledger, now: float) -> list[Instruction]:
            hit = (job.id for job in ledger.jobs.values() if node in job.devices)
            self._hit.update(dict.fromkeys(hit, f"node {node} lost: {why}"))
            orders = ledger.node_lost(node, now) if node in ledger.nodes else []
            self._remember_nodes()
            return orders

        self.post(lose, f"node {node} lost: {why}")

    def _remember_nodes(self) -> None:
        ledger = self.ledger
        held = {name for job in ledger.jobs.values() for name in job.devices}
        kept = [n for n in ledger.nodes.values() if n.name not in ledger.lost or n.name in held]
        self.set_fact("nodes", {node.name: node.gpus for node in kept})

    # -- the loop ------------------------------------------------------------------------------

    def recover(self) -> None:
        """Takes up what the store says was on its way. Call once, with the executor set."""
        assert self.executor is not None
        for job in list(self.ledger.jobs.values()):
            if job.state not in HOLDING:
                continue
            was_stopped = self.ledger.stop_again(job)
            self.executor.recover(job)
            if was_stopped is not None:
                self.executor.stop(was_stopped)
        self._causes.append("the scheduler was restarted")

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                done = self._apply(await self._take())
                # what an executor tells is stored together with what is decided on it
                awaited = any(change.answer is not None for change, _ in done)
                if awaited or not self._stored:
                    if not await self._commit():
                        self._refuse(done)
                        continue
                    await self._acknowledge(done)
                began = time.perf_counter()
                self._orders += self.ledger.decide(self.now())
                self.decide_s = time.perf_counter() - began
                self._collect()
                if await self._commit():
                    self._refresh(tasks)

    async def _take(self) -> list[_Change]:
        """The next changes, or none when a timer is due."""
        batch: list[_Change] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s()):
                batch.append(await self._queue.get())
        while len(batch) < MAX_BATCH and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return batch

    def _patience_s(self) -> float:
        if self._unsaved_jobs or self._unsaved_events or self._facts:
            return RETRY_S
        due = self.ledger.next_timer()
        now = self.now()
        waits = [IDLE_S]
        if due is not None:
            waits.append(due - now)
        if self._causes and not self._refreshing:
            waits.append(self._refreshed_s + REFRESH_S - now)
        return max(0.005, min(waits))

    def _apply(self, batch: list[_Change]) -> list[tuple[_Change, Any]]:
        """Into the books, in order; those that the books refuse are answered here."""
        now = self.now()
        done: list[tuple[_Change, Any]] = []
        for change in batch:
            try:
                result, orders = change.apply(self.ledger, now)
            except IntentdError as error:
                if change.answer is None:
                    raise  # an executor's event that the books forbid: a defect
                _fail(change.answer, error)
                continue
            self._orders += orders
            done.append((change, result))
            if change.cause:
                self._causes.append(change.cause)
        self._collect()
        return done

    def _collect(self) -> None:
        """What changed in the books, as it is now: an order may change it again later."""
        changed = self.ledger.take_dirty()
        for job, plain in plain_of(changed):
            self._unsaved_jobs[job.id] = (job, plain)
        self._unsaved_events += self.ledger.take_events()

    async def _commit(self) -> bool:
        """Whether all is on disk; if so, what was ordered is carried out."""
        if not (self._unsaved_jobs or self._unsaved_events or self._facts or self._orders):
            return True
        jobs, events, facts = list(self._unsaved_jobs.values()), self._unsaved_events, self._facts
        try:
            await self.store.store.run(lambda _store: self.store.commit(jobs, events, facts))
        except StoreError as error:
            _log.error("cannot store", extra={"error": str(error)})
            self._stored = False
            return False
        self._stored = True
        self._unsaved_jobs, self._unsaved_events, self._facts = {}, [], {}
        for job, plain in jobs:
            if plain["state"] in ("finished", "failed", "cancelled"):
                self._over(job)
        orders, self._orders = self._orders, []
        self._carry_out(orders)
        async with self.changed:
            self.changed.notify_all()
        return True

    def _over(self, job: Job) -> None:
        self.counts[job.state.value] += 1
        self.predictor.finished(job.id, job.ended_s)
        self.history.ended(job.id, job.worked_gpu_s)
        _log.info("job over", extra={"job": job.id, "state": job.state.value, "why": job.detail})

    async def _acknowledge(self, done: list[tuple[_Change, Any]]) -> None:
        fresh = [job for change, jobs in done if change.submitted for job in jobs]
        if fresh:
            self.counts["submitted"] += len(fresh)
            for job in fresh:
                self.history.arrived(self.ledger.arrival(job))
            await self._predict(fresh)
        for change, result in done:
            if change.answer is not None and not change.answer.done():
                change.answer.set_result(result)

    def _refuse(self, done: list[tuple[_Change, Any]]) -> None:
        """The disk refused: jobs that were not acknowledged are not booked; the rest waits in
        memory, and is carried out once it is on disk."""
        text = "; ".join(self.store.store.unready()) or "the store refuses"
        for change, _ in done:
            for job in change.submitted:
                self.ledger.withdraw(job)
                self._unsaved_jobs.pop(job, None)
                self._unsaved_events = [e for e in self._unsaved_events if e.job != job]
            if change.answer is not None:
                _fail(change.answer, StoreError(text))

    def _carry_out(self, orders: list[Instruction]) -> None:
        assert self.executor is not None
        for order in orders:
            job = self.ledger.jobs.get(order.job)
            if isinstance(order, Start):
                assert job is not None
                self.counts["starts"] += 1
                self.executor.start(order, job)
            else:
                self.executor.stop(order)

    # -- predictions ---------------------------------------------------------------------------

    async def _predict(self, fresh: list[Job]) -> None:
        """The first prediction of new jobs; beyond a few at once they are issued together."""
        if len(self.ledger.jobs) > PREDICTED_JOBS:
            return
        began = time.perf_counter()
        issued: list[Prediction] = []
        for job in fresh[:ISSUED_ALONE]:
            snapshot, keys = self.ledger.snapshot(self.now(), upto=job.id, pool=job.pool)
            if keys and keys[-1] == job.id:
                ends = await asyncio.to_thread(snapshot.play_out)
                issued.append(self.predictor.submit(snapshot, keys, ends))
        self.predict_s = time.perf_counter() - began
        self._save_predictions(issued)
        self._causes.append(f"job {fresh[0].id} submitted")

    def _refresh(self, tasks: asyncio.TaskGroup) -> None:
        """Has predictions that moved re-issued, at most once a second, with the first causes. Some
        policies take seconds to play thousands of jobs out: decisions do not wait for it."""
        now = self.now()
        if self._refreshing or not self._causes or now - self._refreshed_s < REFRESH_S:
            return
        known = list(dict.fromkeys(self._causes))
        cause = ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
        self._causes, self._refreshed_s = [], now
        if len(self.ledger.jobs) > PREDICTED_JOBS:
            return
        pools = [self.ledger.snapshot(now, pool=pool) for pool in self.ledger.types]
        frozen = [(_frozen(snapshot), keys) for snapshot, keys in pools if keys]
        # one that does not fit now keeps its cause until it is predicted again
        seen = {job for _, keys in pools for job in keys}
        hit = {job: why for job, why in self._hit.items() if job in seen}
        kept = self._hit.items()
        self._hit = {j: why for j, why in kept if j not in seen and j in self.ledger.jobs}
        self._refreshing = True
        tasks.create_task(self._reissue(frozen, cause, hit), name="predictions")

    async def _reissue(
        self, pools: list[tuple[Snapshot, list[int]]], cause: str, hit: dict[int, str]
    ) -> None:
        try:
            for snapshot, keys in pools:
                ends = await asyncio.to_thread(snapshot.play_out)
                moved = self.predictor.moved(snapshot, keys, hit, ends)
                for at in range(0, len(moved), REISSUED_AT_ONCE):
                    piece = moved[at : at + REISSUED_AT_ONCE]
                    there = [row for row in piece if row.job in self.ledger.jobs]
                    calm = [row for row in there if row.job not in hit]
                    issued = self.predictor.reissue(snapshot.now_s, calm, cause)
                    for row in there:
                        if row.job in hit:
                            why = hit[int(str(row.job))]
                            text = cause if why in cause else f"{why}; {cause}"
                            issued += self.predictor.reissue(snapshot.now_s, [row], text)
                    self._save_predictions(issued)
                    await asyncio.sleep(0)
        finally:
            self._refreshing = False
        if self._causes:
            self.post(lambda ledger, now: None)  # look again

    def _save_predictions(self, predictions: list[Prediction]) -> None:
        """Best effort: a prediction that is not on disk is made again after a restart."""
        if not predictions:
            return
        done = asyncio.ensure_future(
            self.store.store.run(lambda _store: self.store.predicted(predictions))
        )
        done.add_done_callback(_heard)

    async def what_if(
        self, spec: JobSpec, count: int = 1
    ) -> tuple[Prediction, dict[int, float], str]:
        """The prediction of a job not submitted (of count of it, the last to end), by how many
        seconds it delays others, and the GPU type it would run on. Raises InputError for one that
        cannot run now."""
        now, ledger = self.now(), self.ledger
        ledger.check(spec)
        pools = ledger.pools_for(spec) or ledger.types[:1]
        found: list[tuple[WhatIf, str]] = []
        for pool in pools:
            candidate, owner = ledger.candidate(spec, now, pool)
            before, keys = ledger.snapshot(now, pool=pool)
            judge = self.predictor.what_if
            judged = await asyncio.to_thread(judge, before, keys, candidate, owner, count)
            found.append((judged, pool))
        best, pool = min(found, key=lambda item: item[0].prediction.p50_s)
        return best.prediction, {int(str(job)): by for job, by in best.delays_s.items()}, pool

    def set_fact(self, name: str, value: Any) -> None:
        """Stored with the next commit."""
        self._facts[name] = value

    def state_counts(self) -> dict[str, int]:
        return {state.value: n for state, n in self.ledger.counts.items() if state not in OVER}


def _frozen(snapshot: Snapshot) -> Snapshot:
    """With speed tables of its own: the books go on using theirs."""
    jobs = snapshot.jobs
    own = replace(jobs, speeds=jobs.speeds.copy(), efficiency=jobs.efficiency.copy())
    return replace(snapshot, jobs=own)


def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


def _heard(done: asyncio.Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        if not isinstance(error, StoreError):
            raise error
        _log.warning("prediction not stored", extra={"error": str(error)})
