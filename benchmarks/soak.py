"""Memory, files and threads of every daemon of the suite under a light load of all three systems.

``python -m benchmarks.soak --minutes 30 --json`` (root: namespaces). The world and the load are
those of ``benchmarks.chaos``, without a fault. What a daemon keeps up to a bound is full when the
measurement begins, else its filling would be called growth, and growth hide behind it: bounds that
can be configured are small; the GPU scheduler, whose windows hold thousands of jobs, starts on the
store of one that has seen as many. PSS, RSS and anonymous memory (its own alone: PSS also moves
when others come and go that share pages) of each daemon are sampled every few seconds; the slope is
fitted after the warm-up, its 95 % interval widened for the samples' autocorrelation.

The rule: memory is *within noise* when that interval of the PSS reaches down to zero, or the slope
is below half a megabyte an hour. Files and threads must end as the warm-up left them, give or take
the connections that come and go.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.chaos.campaign import Campaign, Options, say
from benchmarks.chaos.members import ended_in_order
from benchmarks.local_postgres import why_not
from benchmarks.proxy_soak import slope
from intentd.core.jobs.job import Job, State, job_to_plain
from intentd.core.jobs.ledger import LEARNED
from intentd.core.jobs.predictor import KEPT_ROWS, Calibrator
from intentd.core.jobs.spec import spec_from_plain
from intentd.daemons.gpu.daemon import STORE_FILE
from intentd.daemons.gpu.store import JobStore
from intentd.testbed import netns

SLOPE_BAR_MB_H: Final = 0.5
FILES_BAR: Final = 8
NEWEST: Final = 4  # conversations whose turns fit into the rows that are kept
EVERY_S: Final = 5.0
# What a daemon keeps on purpose is full within minutes of this load.
SETTINGS: Final = {
    "controller": {
        "flows": {"window_flows": 3000, "keep_flows": 1000},
        "jobs": {"window_jobs": 200},
    },
    "agent": {},
    "gpu": {"output": {"keep_jobs": 50}},
    "proxy": {
        "records": {"recent": 200, "max_rows": 1000},
        "conversations": {"max_rows": 500, "max_messages": 30},
    },
}


class Sample:
    """One look at a process."""

    def __init__(self, pid: int, at_s: float) -> None:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
        self.at_s = at_s
        self.pss_mb = _kilobytes(rollup, "Pss") / 1024
        self.rss_mb = _kilobytes(rollup, "Rss") / 1024
        self.own_mb = _kilobytes(rollup, "Anonymous") / 1024
        self.files = len(os.listdir(f"/proc/{pid}/fd"))
        self.threads = _kilobytes(status, "Threads")


def _kilobytes(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    assert found is not None
    return int(found[1])


class Soak(Campaign):
    """A campaign whose only fault is time."""

    def __init__(self, options: Options, minutes: float, warm_share: float) -> None:
        super().__init__(options)
        self.world.settings = SETTINGS
        self.minutes = minutes
        self.warm_share = warm_share
        self.samples: dict[str, list[Sample]] = {}

    async def _campaign(self, tasks: asyncio.TaskGroup) -> None:
        for member in self.world.of("gpu"):
            await asyncio.to_thread(remembered, member.state_dir)
        await super()._campaign(tasks)

    async def _play(self) -> None:
        for jobs in self.jobs:
            jobs.forgotten = True
        self.users.newest = NEWEST
        began, next_s = time.monotonic(), time.monotonic()
        told = 0
        while (now := time.monotonic()) < began + 60 * self.minutes and not self.interrupted:
            for member in self.world.members:
                with contextlib.suppress(OSError):
                    found = Sample(member.pid, now - began)
                    self.samples.setdefault(member.label, []).append(found)
            if (now - began) // 120 > told:
                told += 1
                sizes = {label: round(rows[-1].pss_mb, 1) for label, rows in self.samples.items()}
                say(f"{(now - began) / 60:.0f} of {self.minutes:g} min, PSS in MB {sizes}")
            next_s += EVERY_S
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))

    def result(self) -> dict[str, Any]:
        daemons = {}
        for label, rows in self.samples.items():
            warm = [row for row in rows if row.at_s >= self.warm_share * 60 * self.minutes]
            daemons[label] = {
                "samples": len(warm),
                "pss_mb": [round(warm[0].pss_mb, 1), round(warm[-1].pss_mb, 1)],
                "pss_slope_mb_h": _slope([(row.at_s, row.pss_mb) for row in warm]),
                "rss_slope_mb_h": _slope([(row.at_s, row.rss_mb) for row in warm]),
                "own_slope_mb_h": _slope([(row.at_s, row.own_mb) for row in warm]),
                "files": [warm[0].files, warm[-1].files, max(row.files for row in warm)],
                "threads": [warm[0].threads, warm[-1].threads],
                "starts": next(m.starts for m in self.world.members if m.label == label),
            }
        return daemons


def _slope(points: list[tuple[float, float]]) -> list[float]:
    """MB an hour: fitted, and its 95 % interval."""
    if len(points) < 8 or statistics.pstdev(y for _, y in points) == 0:
        return [0.0, 0.0, 0.0]
    rise, half = slope([(int(at_s / 3600 * 1e6), mb) for at_s, mb in points])
    return [round(rise, 2), round(rise - half, 2), round(rise + half, 2)]


def remembered(state_dir: Path) -> None:
    """The store of a scheduler that has seen as many jobs and predictions as it remembers."""
    rng, calibrator, jobs = random.Random(0), Calibrator(), []
    for number in range(1, KEPT_ROWS + 1):
        at_s, took_s, size = 3.0 * number, rng.uniform(3, 30), rng.uniform(3, 10)
        calibrator.issue(number, at_s, at_s + took_s, size)
        calibrator.finished(number, at_s + took_s * rng.uniform(0.9, 1.3))
        if number <= LEARNED:
            name = f"before{number}"
            spec = spec_from_plain({"command": ["true"], "name": name, "owner": "root"})
            job = Job(
                number, spec, at_s, size, State.FINISHED,
                started_s=at_s, ended_s=at_s + took_s, worked_gpu_s=size,
            )  # fmt: skip
            jobs.append((job, job_to_plain(job)))
    store = JobStore(state_dir / STORE_FILE)
    facts = {"calibrator": calibrator.state(), "highest_id": KEPT_ROWS}
    store.commit(jobs, [], facts)
    store.store.close()


def judged(daemons: dict[str, Any], violations: list[Any]) -> dict[str, bool]:
    bars = {"nothing lost or stalled": not violations}
    for label, row in daemons.items():
        rise, low, _ = row["pss_slope_mb_h"]
        bars[f"{label}: memory within noise"] = low <= 0 or rise < SLOPE_BAR_MB_H
        first, last, _ = row["files"]
        bars[f"{label}: files and threads"] = (
            last <= first + FILES_BAR and row["threads"][1] <= row["threads"][0] + 2
        )
        bars[f"{label}: one process throughout"] = row["starts"] == 1
    return bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm", type=float, default=0.4, help="share taken for the warm-up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="directory of the logs")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if reason := netns.unavailable() or why_not():
        print(reason, file=sys.stderr)
        return 2
    out = given.out or Path(tempfile.mkdtemp(prefix="soak-"))
    random.seed(given.seed)
    soak = Soak(
        Options(given.seed, (), (), out / "logs", talkers=2, streamers=1), given.minutes, given.warm
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(ended_in_order(soak.run(), soak.enough))
    daemons = soak.result()
    result = {
        "minutes": given.minutes,
        "warm_up_minutes": given.minutes * given.warm,
        "daemons": daemons,
        "load": report["load"],
        "violations": report["violations"],
        "bars": judged(daemons, report["violations"]),
    }
    print(json.dumps(result, indent=None if given.json else 2))
    return 0 if all(result["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
