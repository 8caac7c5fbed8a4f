"""From a decision to its process on a real Ray, in a minute or two: short jobs one after another.

    python -m benchmarks.ray_effect --json [--gpus 16] [--jobs 200]

What it prints beside: from the submission to the decision, from the decision to the job's own first
step (its interpreter's start) and from its last step to the books. Exit status 1 above the bar.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
from typing import Any

from benchmarks.ray_lab import OVER, Lab, say
from intentd.core.stats import percentile

BAR_S = 0.020
SETTINGS = """policy = "fifo"
[ray]
lease_s = 20
lost_after_s = 30
[costs]
hold_growth_s = 0
"""
WORK_GPU_S, EVERY_S = 0.5, 0.2


def in_ms(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{p}": round(1000 * percentile(ordered, p / 100), 2) for p in (50, 90, 99)}


async def measure(gpus: int, jobs: int) -> dict[str, Any]:
    lab = Lab({"effect": gpus}, SETTINGS)
    try:
        say(f"starting Ray, {gpus} simulated GPUs")
        await lab.start()
        loads = []
        for number in range(jobs):
            await lab.submit(f"job{number}", WORK_GPU_S)
            await asyncio.sleep(EVERY_S)
            loads.append(os.getloadavg()[0])
        await lab.until(lambda rows: all(row["state"] in OVER for row in rows), 300)
        effect = (await lab.ask("status"))["detail"]["ray"]["effect_s"]["start"]
        spans: dict[str, list[float]] = {"to_decision": [], "to_first_step": [], "to_books": []}
        for number in range(jobs):
            events = (await lab.ask("jobs.events", job=number + 1))["events"]
            at = {event["state"]: event["at_s"] for event in events}
            noted = {kind: at_s for kind, _, at_s, _, _ in lab.runs(f"job{number}")}
            spans["to_decision"].append(at["starting"] - at["submitted"])
            spans["to_first_step"].append(noted["start"] - at["starting"])
            spans["to_books"].append(at["finished"] - noted["end"])
        return {
            "gpus": gpus,
            "jobs": jobs,
            "load": round(statistics.median(loads), 1),
            "niceness": os.nice(0),
            "decision_to_process_ms": {name: round(1000 * s, 2) for name, s in effect.items()},
            **{f"{name}_ms": in_ms(values) for name, values in spans.items()},
            "holds": effect["p50"] <= BAR_S,
        }
    finally:
        lab.end(signal.SIGTERM)
        lab.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gpus", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=200)
    arguments = parser.parse_args()
    result = asyncio.run(measure(arguments.gpus, arguments.jobs))
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=2))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
