"""The turnstile with a disk that refuses: one clear error, nothing half done, recovery."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from intentd.core.errors import InputError
from intentd.core.jobs.job import Job, Start, Stop
from intentd.core.jobs.ledger import Ledger
from intentd.core.jobs.placement import Node
from intentd.core.jobs.policy import make
from intentd.core.jobs.predictor import Predictor
from intentd.core.jobs.spec import spec_from_plain
from intentd.daemons.gpu.scheduler import Scheduler
from intentd.daemons.gpu.service import Caller, Service
from intentd.daemons.gpu.store import JobStore
from intentd.daemons.kit.clock import SystemClock
from intentd.daemons.kit.store import StoreError


class Recorder:
    """An executor that only remembers its orders."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def start(self, order: Start, job: Job) -> None:
        self.starts.append(order.job)

    def stop(self, order: Stop) -> None: ...

    def recover(self, job: Job) -> None: ...

    def poll(self) -> None: ...

    def forget(self, job: int) -> None: ...

    def output(self, job: int) -> Path | None:
        return None

    async def close(self) -> None: ...


class Refusing(JobStore):
    """Refuses while told to, as a full disk does."""

    full = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.refused = threading.Event()

    def commit(self, *args: Any) -> None:
        if self.full:
            self.refused.set()
            raise StoreError("store gpu.sqlite: database or disk is full")
        super().commit(*args)


async def test_a_full_disk_refuses_submissions_and_starts_nothing(tmp_path: Path) -> None:
    store, ledger, recorder = Refusing(tmp_path / "db"), Ledger([Node("n", 2)]), Recorder()
    scheduler = Scheduler(ledger, store, Predictor(), SystemClock())
    scheduler.executor = recorder
    spec = spec_from_plain({"command": ["x"], "size_gpu_s": 10})
    running = asyncio.ensure_future(scheduler.run())
    try:
        (first,) = await scheduler.submit([spec])
        store.full = True
        with pytest.raises(StoreError):
            await scheduler.submit([spec])
        assert list(ledger.jobs) == [first.id]
        store.full = False
        (second,) = await scheduler.submit([spec])
        scheduler.started(first.id, 1)
        scheduler.exited(first.id, 1, 0, "")
        async with asyncio.timeout(10), scheduler.changed:
            await scheduler.changed.wait_for(lambda: scheduler.counts["finished"] == 1)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert recorder.starts == [first.id, second.id]
    assert [row["id"] for row in store.page(states=[], owner="", name="", before=0, limit=9)] == [
        second.id,
        first.id,
    ]
    store.store.close()
    again = JobStore(tmp_path / "db")
    assert [job.id for job in again.unfinished()] == [second.id]
    assert again.highest_id() == second.id
    again.store.close()


async def test_an_end_and_what_is_decided_on_it_are_stored_together(tmp_path: Path) -> None:
    store, ledger, recorder = Refusing(tmp_path / "db"), Ledger([Node("n", 1)]), Recorder()
    scheduler = Scheduler(ledger, store, Predictor(), SystemClock())
    scheduler.executor = recorder
    running = asyncio.ensure_future(scheduler.run())
    for _ in range(2):
        await scheduler.submit([spec_from_plain({"command": ["true"], "size_gpu_s": 5})])

    def settled() -> bool:  # the second may be stored as pending after the first was started
        stored = [job.state.value for job in store.unfinished()]
        return recorder.starts == [1] and stored == ["starting", "pending"]

    async with asyncio.timeout(20), scheduler.changed:
        await scheduler.changed.wait_for(settled)
    store.full = True
    scheduler.exited(1, 1, 0, "")
    assert await asyncio.to_thread(store.refused.wait, 20)
    # the books went on, but who reads the disk sees neither the end nor the next start
    assert [job.state.value for job in store.unfinished()] == ["starting", "pending"]
    assert recorder.starts == [1]
    store.full = False
    async with asyncio.timeout(20), scheduler.changed:
        await scheduler.changed.wait_for(lambda: recorder.starts == [1, 2])
    assert [job.state.value for job in store.unfinished()] == ["starting"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    store.store.close()


async def test_arrays_labels_what_if_and_the_calibration_over_a_restart(tmp_path: Path) -> None:
    store, ledger = JobStore(tmp_path / "db"), Ledger([Node("n", 2)])
    scheduler = Scheduler(ledger, store, Predictor(), SystemClock())
    scheduler.executor = Recorder()
    service = Service(scheduler, {})
    me = Caller("me", trusted=False)
    running = asyncio.ensure_future(scheduler.run())
    base = {"command": ["x"], "size_gpu_s": 1000.0}
    try:
        made = await service.submit({**base, "array": 3, "labels": {"team": "a"}}, me)
        await service.submit({**base, "labels": {"team": "b", "big": "yes"}}, me)
        assert made["jobs"] == [1, 2, 3]

        async def listed(**args: Any) -> list[int]:
            return [row["job"] for row in (await service.list_jobs(args, me))["jobs"]]

        assert await listed() == [4, 3, 2, 1]
        assert await listed(label="team=a") == [3, 2, 1]
        assert await listed(label="team=a", limit=2, before=3) == [2, 1]
        assert await listed(label="big") == [4]
        assert await listed(array=2) == [3, 2, 1]
        assert await listed(array=4) == []
        assert (await service.list_jobs({"limit": 4}, me))["next"] == 0
        assert (await service.list_jobs({"limit": 3}, me))["next"] == 2
        assert await listed(label='x"; DROP TABLE jobs') == []
        assert [ledger.jobs[job].spec.array_index for job in (1, 2, 3, 4)] == [0, 1, 2, -1]

        before = len(ledger._tables)
        guess = await service.predict({"size_gpu_s": 10.0, "max_gpus": 2}, me)
        # two run until 1000, two wait until 2000; FIFO: nobody is delayed by one that comes last
        assert guess["predicted"]["in_p50_s"] == pytest.approx(2005, abs=5)
        assert guess["delayed_jobs"] == 0
        several = await service.predict({"size_gpu_s": 10.0, "max_gpus": 2, "array": 5}, me)
        assert several["predicted"]["in_p50_s"] == pytest.approx(2025, abs=5)
        ledger.set_policy(make("srsf"))
        guess = await service.predict({"size_gpu_s": 10.0}, me)
        assert guess["predicted"]["in_p50_s"] == pytest.approx(10, abs=1)
        assert guess["largest_delay_s"] == pytest.approx(10, abs=1)
        assert len(ledger._tables) == before
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    state = scheduler.predictor.calibrator.state()
    store.commit([], [], {"calibrator": state})
    store.store.close()
    again = JobStore(tmp_path / "db")
    calibrator = Predictor().calibrator
    assert calibrator.restore(again.facts()["calibrator"])
    assert calibrator.state() == state
    assert [job.id for job in again.newest(2)] == [3, 4]
    again.store.close()


async def test_how_much_was_done_of_jobs_that_did_not_finish(tmp_path: Path) -> None:
    store, ledger = JobStore(tmp_path / "db"), Ledger([Node("n", 3)])
    scheduler = Scheduler(ledger, store, Predictor(), SystemClock())
    scheduler.executor = Recorder()
    service, me = Service(scheduler, {}), Caller("me", trusted=True)
    running = asyncio.ensure_future(scheduler.run())
    try:
        for _ in range(3):
            await service.submit({"command": ["x"], "size_gpu_s": 1e6}, me)
        for job, status in ((1, 0), (2, 1)):
            scheduler.started(job, 1)
            scheduler.exited(job, 1, status, "")
        await service.cancel({"job": 3}, me)
        scheduler.exited(3, 1, -15, "")
        async with asyncio.timeout(20), scheduler.changed:
            await scheduler.changed.wait_for(lambda: scheduler.counts["cancelled"] == 1)
        rows = (await service.list_jobs({}, me))["jobs"]
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    done = {row["state"]: row["done_percent"] for row in rows}
    assert done == {"finished": 100.0, "failed": 0.0, "cancelled": 0.0}
    for wrong in ({"undo": "false"}, {"evict": 1}, {"speed": 1}):
        with pytest.raises(InputError):
            await service.drain({"node": "n", **wrong}, me)
    assert not ledger.nodes["n"].drained
    store.store.close()


async def test_a_job_that_lost_its_node_is_predicted_anew_with_the_cause(tmp_path: Path) -> None:
    store, ledger = JobStore(tmp_path / "db"), Ledger([Node("a", 2), Node("b", 2)])
    scheduler = Scheduler(ledger, store, Predictor(), SystemClock())
    scheduler.executor = Recorder()
    spec = spec_from_plain({"command": ["x"], "size_gpu_s": 40, "min_gpus": 4, "max_gpus": 4})
    running = asyncio.ensure_future(scheduler.run())
    try:
        (job,) = await scheduler.submit([spec])
        scheduler.started(job.id, 1)
        scheduler.node_lost("b", "nothing heard for 15 s")
        scheduler.lost(job.id, 1, "node b lost", began=True)
        await scheduler.change(lambda _ledger, _now: (None, []))
        assert ledger.jobs[job.id].lost == 1
        scheduler.node_joined("b", 2)
        async with asyncio.timeout(20):
            # another thread writes them
            while not any("lost" in row["cause"] for row in store.predictions(job.id)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    causes = [row["cause"] for row in store.predictions(job.id)]
    assert any("node b lost: nothing heard for 15 s" in cause for cause in causes)
