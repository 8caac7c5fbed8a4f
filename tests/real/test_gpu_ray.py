"""intentd-gpu on a real Ray of two nodes: what is killed, what goes on, what comes back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed (intentd[gpu-ray])")

from benchmarks.ray_faults import processes
from benchmarks.ray_lab import OVER, Lab

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]
SETTINGS = """policy = "maxmin"
[ray]
lease_s = 3
lost_after_s = 5
[costs]
hold_growth_s = 0.5
"""


@pytest.fixture(scope="module")
def lab() -> Any:
    """One Ray for all tests of this file."""
    it = Lab({"a": 2, "b": 2}, SETTINGS)
    try:
        asyncio.run(it.start())
        yield it
    finally:
        it.close()


async def eventually(ask: Callable[[], Awaitable[Any]], timeout_s: float = 120.0) -> Any:
    """Asks another process until it says something."""
    async with asyncio.timeout(timeout_s):
        while not (found := await ask()):  # noqa: ASYNC110  the only way to hear of it
            await asyncio.sleep(0.05)
    return found


@pytest.fixture(autouse=True)
async def whole(lab: Lab) -> None:
    """Every test begins with an idle, whole cluster."""

    async def look() -> bool:
        status = (await lab.ask("status"))["detail"]
        idle = not status["gpus"]["held"] and status["gpus"]["usable"] == lab.gpus
        there = len(processes(lab.state)["slot"]) == lab.gpus
        return bool(idle and there and status["ray"]["connected"])

    await eventually(look)


async def until(lab: Lab, job: int, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        shown = await lab.ask("jobs.show", job=job)
        return shown if holds(shown) else None

    found: dict[str, Any] = await eventually(look)
    return found


async def over(lab: Lab, job: int) -> dict[str, Any]:
    return await until(lab, job, lambda shown: shown["state"] in OVER)


async def saved(lab: Lab, name: str) -> float:
    """Waits until the job has saved something; how much."""

    async def look() -> list[tuple[str, int, float, float, int]]:
        return [row for row in lab.runs(name) if row[0] == "saved"]

    rows = await eventually(look)
    return float(rows[-1][3])


def check(lab: Lab, name: str) -> list[float]:
    """Never two runs at a time; each began with what was saved. The starts."""
    assert not (lab.work / name / "twice").exists()
    known, starts = {0.0}, []
    for kind, _, _, done, _ in lab.runs(name):
        if kind == "start":
            assert done in known
            starts.append(done)
        elif kind in ("saving", "saved"):
            known.add(done)
    return starts


async def test_the_daemon_and_its_driver_may_die_and_runs_go_on(lab: Lab) -> None:
    jobs = {}
    for at in range(3):
        name = f"calm-{at}"
        gpus = 2 if at == 2 else 1
        work = random.Random(at).uniform(4, 5) * gpus
        made = await lab.submit(name, work, min_gpus=gpus, max_gpus=gpus)
        jobs[made["job"]] = name
    first = min(jobs)
    for job in jobs:
        await until(lab, job, lambda shown: shown["state"] == "running")
    lab.end(signal.SIGKILL)
    status = await lab.start(whole=False)
    again = await until(lab, first, lambda shown: bool(shown["predicted"]))
    assert "the scheduler was restarted" in again["predicted"]["cause"]

    async def driver() -> int:
        pid: int = (await lab.ask("status"))["detail"]["ray"]["driver"]
        return pid

    os.kill(await eventually(driver), signal.SIGKILL)
    for job, name in jobs.items():
        shown = await over(lab, job)
        assert (shown["state"], shown["epoch"], shown["lost"]) == ("finished", 1, 0), shown
        assert check(lab, name) == [0.0]
    assert status["boot"] == (await lab.ask("status"))["boot"]


async def test_a_killed_slot_costs_what_was_not_saved(lab: Lab) -> None:
    made = await lab.submit("slot", 16.0, min_gpus=2, max_gpus=2)
    assert await saved(lab, "slot") > 0
    for pid in processes(lab.state)["slot"]:
        os.kill(pid, signal.SIGKILL)
    shown = await over(lab, made["job"])
    assert (shown["state"], shown["lost"], shown["epoch"]) == ("finished", 1, 2)
    assert any("was lost" in told["cause"] for told in shown["predictions"])
    starts = check(lab, "slot")
    assert len(starts) == 2
    assert starts[1] > 0


async def test_a_lost_node_is_noticed_and_its_job_goes_on_elsewhere(lab: Lab) -> None:
    made = await lab.submit("node", 32.0, min_gpus=4, max_gpus=4)  # a gang over both
    await saved(lab, "node")
    os.kill(processes(lab.state)["raylet"][0], signal.SIGKILL)
    shown = await until(lab, made["job"], lambda shown: shown["lost"] > 0)
    shown = await over(lab, made["job"])
    assert shown["state"] == "finished"
    assert any("lost: nothing heard for" in told["cause"] for told in shown["predictions"])
    assert check(lab, "node")[1] > 0


async def test_a_resize_saves_and_loses_nothing(lab: Lab) -> None:
    elastic = await lab.submit("elastic", 16.0, max_gpus=4)
    await until(lab, elastic["job"], lambda shown: shown["state"] == "running")
    other = await lab.submit("other", 3.0, max_gpus=4)
    shown = await over(lab, elastic["job"])
    assert (await over(lab, other["job"]))["state"] == "finished"
    assert shown["state"] == "finished"
    assert shown["resized"] >= 1
    assert shown["lost"] == 0
    assert len(check(lab, "elastic")) >= 2


async def test_output_failure_and_a_deaf_job(lab: Lab) -> None:
    loud = await lab.ask(
        "jobs.submit", command=["sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exit 3"], size_gpu_s=1
    )
    deaf = await lab.ask(
        "jobs.submit",
        command=["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"],
        size_gpu_s=1,
        grace_s=0.3,
    )
    absent = await lab.ask("jobs.submit", command=["no-such-program"], size_gpu_s=1)
    failed = await over(lab, loud["job"])
    assert (failed["state"], failed["detail"]) == ("failed", "exit status 3")
    assert "cannot run 'no-such-program'" in (await over(lab, absent["job"]))["detail"]
    await until(lab, deaf["job"], lambda shown: shown["state"] == "running")
    await lab.ask("jobs.cancel", job=deaf["job"])
    ended = await over(lab, deaf["job"])
    assert (ended["state"], ended["exit_status"]) == ("cancelled", -9)

    async def output() -> str:
        text: str = (await lab.ask("jobs.logs", job=loud["job"]))["text"]
        return text

    assert (await eventually(output)).strip() in {"0", "1"}
