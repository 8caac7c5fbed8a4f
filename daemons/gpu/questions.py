"""What the controller asks of the scheduler for its console: jobs with what was foretold, why they
wait, and what another policy would do to the queue."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from intentd.core.errors import InputError
from intentd.core.jobs.job import OVER
from intentd.core.jobs.policy import JobsPolicy, from_plain
from intentd.core.sim.jobs import Snapshot
from intentd.daemons.gpu.scheduler import PREDICTED_JOBS, Scheduler
from intentd.daemons.gpu.service import Caller, Service

MAX_ROWS: Final = 200
CHANGED_ROWS: Final = 50
NOBODY: Final = Caller("", trusted=False)


async def answer(service: Service, subject: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """One question of the controller. Raises InputError."""
    if subject == "jobs.list":
        return await list_jobs(service, body)
    if subject == "jobs.preview":
        return await preview(service.scheduler, body)
    raise InputError("subject", f"{subject!r:.60}", "jobs.list or jobs.preview")


async def list_jobs(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """body: limit, before, state (a list). Newest first, each with its first prediction."""
    limit = body.get("limit", 50)
    if type(limit) is not int or not 1 <= limit <= MAX_ROWS:
        raise InputError("limit", f"{limit!r:.40}", f"1 to {MAX_ROWS}")
    page = await service.list_jobs({**body, "limit": limit}, NOBODY)
    scheduler = service.scheduler
    numbers = [row["job"] for row in page["jobs"]]
    first = await asyncio.to_thread(scheduler.store.first_predictions, numbers)
    for row in page["jobs"]:
        row["first"] = first.get(row["job"])
        row["labels"] = {}
        live = row["job"] in scheduler.ledger.jobs
        row["why"] = scheduler.ledger.reason(row["job"])["text"] if live else ""
    ledger = scheduler.ledger
    return {
        **page,
        "now_s": scheduler.now(),
        "counts": scheduler.state_counts(),
        "gpus": {
            "total": ledger.total_gpus,
            "usable": ledger.capacity,
            "held": sum(job.gpus for job in ledger.jobs.values()),
        },
        "nodes": service.nodes()["nodes"][:MAX_ROWS],
    }


async def preview(scheduler: Scheduler, body: Mapping[str, Any]) -> dict[str, Any]:
    """body: policy, in plain form. Plays the cluster of now out under it and under the one in
    force; nothing is changed. Raises InputError, PolicyError."""
    policy = replace(from_plain(body.get("policy")), integral=True)
    ledger = scheduler.ledger
    unfinished = sum(job.state not in OVER for job in ledger.jobs.values())
    if unfinished > PREDICTED_JOBS:
        raise InputError("jobs", unfinished, f"at most {PREDICTED_JOBS} unfinished, to play out")
    now = scheduler.now()
    cases = [(pool, *ledger.snapshot(now, pool=pool)) for pool in ledger.types]
    rows: list[dict[str, Any]] = []
    for pool, snapshot, keys in cases:
        if keys:
            found = await asyncio.to_thread(_ends, snapshot, policy, pool)
            rows += [
                {"job": job, "before_s": before, "after_s": after, "gpu_type": pool}
                for job, before, after in zip(keys, *found, strict=True)
                if math.isfinite(before) and math.isfinite(after)
            ]
    return {**_summary(rows, now), "now_s": now, "rows": _named(rows, scheduler)}


def _ends(snapshot: Snapshot, policy: JobsPolicy, pool: str) -> tuple[list[float], list[float]]:
    after = replace(snapshot, policy=policy.for_type(pool)).play_out()
    return snapshot.play_out().tolist(), after.tolist()


def _summary(rows: list[dict[str, Any]], now: float) -> dict[str, Any]:
    """Mean and last finish from now on, and how many jobs end clearly earlier or later."""
    if not rows:
        return {"jobs": 0, "sooner": 0, "later": 0, "before": None, "after": None}
    before = np.array([row["before_s"] for row in rows]) - now
    after = np.array([row["after_s"] for row in rows]) - now
    slack = np.maximum(1.0, 0.01 * before)
    return {
        "jobs": len(rows),
        "sooner": int(np.sum(after < before - slack)),
        "later": int(np.sum(after > before + slack)),
        **{
            name: {
                "mean_s": float(ends.mean()),
                "p90_s": float(np.quantile(ends, 0.9)),
                "last_s": float(ends.max()),
            }
            for name, ends in (("before", before), ("after", after))
        },
    }


def _named(rows: list[dict[str, Any]], scheduler: Scheduler) -> list[dict[str, Any]]:
    """The jobs whose end moves most."""
    rows.sort(key=lambda row: -abs(row["after_s"] - row["before_s"]))
    jobs = scheduler.ledger.jobs
    return [
        {**row, "name": jobs[row["job"]].spec.name, "state": jobs[row["job"]].state.value}
        for row in rows[:CHANGED_ROWS]
        if row["job"] in jobs
    ]
