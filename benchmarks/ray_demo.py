"""A local Ray with 16 simulated GPUs, 40 mixed jobs, and a daemon that is killed half way.

    make demo-jobs        (python -m benchmarks.ray_demo [--jobs 40])

Prints for each job when it was said to be done and when it was. Takes about three minutes, ends by
itself and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import statistics
from typing import Any

from benchmarks.ray_lab import OVER, Lab, say
from intentd.core.jobs.policy import wfq

NODES = {"left": 8, "right": 8}
SETTINGS = """
[costs]
start_s = 0.1
preempt_s = 0.1
hold_growth_s = 5
"""
SUBLINEAR = (0.0, 1.0, 1.9, 2.6, 3.2, 3.7, 4.1, 4.4, 4.6)
ARRIVE_S = 75.0


def mixed(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Small single-GPU jobs, elastic ones, gangs, and models that scale badly."""
    jobs = []
    for number in range(count):
        kind = rng.choices(("single", "elastic", "gang", "sublinear"), (4, 3, 1, 2))[0]
        least, most = {"single": (1, 1), "gang": (4, 4)}.get(kind, (1, rng.choice((2, 4, 8))))
        work = rng.uniform(6, 14) * (1 if kind == "single" else most**0.8) * least**0.2
        jobs.append({"kind": kind, "name": f"{kind}-{number}", "work": work, "gpus": (least, most)})
    return jobs


async def submit(lab: Lab, job: dict[str, Any]) -> int:
    least, most = job["gpus"]
    fields: dict[str, Any] = {"min_gpus": least, "max_gpus": most}
    arguments: tuple[str, ...] = ()
    if job["kind"] == "sublinear":
        speeds = SUBLINEAR[: most + 1]
        fields["demand"] = {str(n): job["work"] / speeds[n] for n in range(1, most + 1)}
        arguments = ("--speeds", ",".join(map(str, speeds)))
    made = await lab.submit(job["name"], job["work"], arguments=arguments, **fields)
    return int(made["job"])


async def demo(count: int, seed: int) -> int:
    rng = random.Random(seed)
    jobs = mixed(count, rng)
    sizes = [job["work"] for job in jobs]
    lab = Lab(NODES, SETTINGS, wfq(sizes, T=0.5, W=0.3, zeta=0.5))
    try:
        say("starting Ray, 16 simulated GPUs on two nodes, and intentd-gpu ...")
        await lab.start()
        say(f"submitting {count} jobs over {ARRIVE_S:g} s; the daemon is killed half way")
        numbers = {}
        for at, job in enumerate(jobs):
            if at == count // 2:
                lab.end(signal.SIGKILL)
                say("kill -9 of the daemon; starting it again ...")
                await lab.start(whole=False)
            numbers[await submit(lab, job)] = job
            await asyncio.sleep(rng.expovariate(count / ARRIVE_S))
        say("all submitted; waiting for the last ...")
        await lab.until(lambda rows: all(row["state"] in OVER for row in rows), 900)
        return await table(lab, numbers)
    finally:
        say("cleaning up")
        lab.close()


async def table(lab: Lab, numbers: dict[int, dict[str, Any]]) -> int:
    """Prints it; exit status 0 if every job finished."""
    print(f"{'job':16} GPUs   runs      said (P90)         took    error  latest cause")
    errors, kept, bad = [], 0, 0
    for number, job in numbers.items():
        shown = await lab.ask("jobs.show", job=number)
        bad += shown["state"] != "finished"
        submitted, predictions = shown["submitted_s"], shown["predictions"]
        took = (shown["ended_s"] or 0) - submitted
        said, upper = (predictions[0][name] - submitted for name in ("p50_s", "p90_s"))
        error = 100 * (took - said) / said
        errors.append(abs(error))
        kept += took <= upper
        least, most = job["gpus"]
        print(
            f"{job['name']:16} {least}-{most} {shown['epoch']:>6} {said:>9.1f} ({upper:6.1f}) s"
            f" {took:>7.1f} s {error:>+7.1f}%  {predictions[-1]['cause'][:48]}"
        )
    status = (await lab.ask("status"))["detail"]
    effect = status["ray"]["effect_s"]["start"]
    print(
        f"median error {statistics.median(errors):.1f} % of the first prediction; "
        f"{kept} of {len(errors)} within the first P90; not finished: {bad}"
    )
    if effect:
        p50, p99 = (1000 * effect[name] for name in ("p50", "p99"))
        print(f"decision to process: p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    return asyncio.run(demo(arguments.jobs, arguments.seed))


if __name__ == "__main__":
    raise SystemExit(main())
