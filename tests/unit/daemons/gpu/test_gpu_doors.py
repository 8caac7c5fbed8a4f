"""What users touch: the simulating executor, job files and options, the progress client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from intentd.core.errors import ConfigError, InputError
from intentd.core.jobs.ledger import Ledger
from intentd.core.jobs.placement import Node
from intentd.core.jobs.policy import make
from intentd.core.jobs.predictor import Predictor
from intentd.core.jobs.spec import spec_from_plain
from intentd.daemons.ctl.jobs import _job_fields, read_job
from intentd.daemons.gpu.client.progress import report
from intentd.daemons.gpu.config import GpuConfig
from intentd.daemons.gpu.executors import SimExecutor
from intentd.daemons.gpu.scheduler import Scheduler
from intentd.daemons.gpu.store import JobStore
from intentd.daemons.kit.clock import SystemClock
from intentd.daemons.kit.config import validate


async def test_simulated_jobs_end_when_their_books_say(tmp_path: Path) -> None:
    store, clock = JobStore(tmp_path / "db"), SystemClock()
    ledger = Ledger([Node("n", 2)], policy=make("maxmin"))
    scheduler = Scheduler(ledger, store, Predictor(), clock)
    spec = spec_from_plain({"command": ["x"], "size_gpu_s": 0.2, "max_gpus": 2})
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        scheduler.executor = SimExecutor(
            tasks, clock, scheduler, lambda job: ledger.seconds_left(job, scheduler.now())
        )
        running = tasks.create_task(scheduler.run())
        await scheduler.submit([spec])
        await scheduler.submit([spec, spec])
        async with scheduler.changed:
            await scheduler.changed.wait_for(lambda: scheduler.counts["finished"] == 3)
        running.cancel()
    rows = store.page(states=["finished"], owner="", name="", before=0, limit=9)
    assert [row["id"] for row in rows] == [3, 2, 1]
    store.store.close()


def test_a_job_file_and_options(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("command: [python, train.py]\ndemand: {1: 100, 2: 60}\nname: train\n")
    fields = _job_fields(file=path, name="mine", gpus="1-2")
    assert fields["name"] == "mine"
    assert spec_from_plain(fields).demand == {1: 100.0, 2: 60.0}
    path.write_text("- no\n")
    with pytest.raises(InputError, match="a table of fields"):
        read_job(path)
    path.write_text("a: [\n")
    with pytest.raises(InputError, match="YAML, JSON or TOML"):
        read_job(path)
    with pytest.raises(InputError, match="--gpus"):
        _job_fields(gpus="two")


def test_a_report_is_one_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(1, 10)  # outside of the scheduler: nothing
    path = tmp_path / "progress.json"
    monkeypatch.setenv("INTENTD_PROGRESS", str(path))
    monkeypatch.setenv("INTENTD_EPOCH", "3")
    report(10, 10)
    said = json.loads(path.read_text())
    assert (said["epoch"], said["done"], said["total"]) == (3, 10, 10)
    with pytest.raises(ValueError, match="expected 0 <= done <= total"):
        report(11, 10)


@pytest.mark.parametrize(
    ("jobs", "where"),
    [
        ({"executor": "slurm"}, "jobs.executor"),
        ({"policy": "lottery"}, "jobs.policy"),
        ({"quotas": {"a": 0}}, "jobs.quotas.a"),
        ({"profiles": {"p": [1.0]}}, "jobs.profiles.p"),
        ({"nodes": [{"name": "n", "gpus": 1}, {"name": "n", "gpus": 1}]}, "jobs.nodes[1].name"),
    ],
)
def test_wrong_settings_are_named(jobs: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(GpuConfig, {"jobs": jobs})
    assert caught.value.field == where
