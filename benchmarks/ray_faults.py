"""kill -9 of the daemon, its driver, a slot or a raylet of a real Ray, round after round.

    python -m benchmarks.ray_faults --rounds 30 --json

Elastic jobs and gangs over two nodes run all the while. Afterwards: every job finished, no job had
two runs at a time (each holds a lock), every run began with what the last one had saved, and the
prediction of each job that lost work was issued anew with the cause. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.ray_lab import OVER, Lab, say

KINDS = ("daemon", "driver", "slot", "raylet")
NODES = {"a": 2, "b": 2}
SETTINGS = """policy = "maxmin"
[ray]
lease_s = 5
lost_after_s = 8
[costs]
hold_growth_s = 2
"""
ACTIVE = 4
RECOVER_S = 90.0


def processes(state: Path) -> dict[str, list[int]]:
    """Raylets that have slots, and the slots, of the cluster of the daemon with that state."""
    temp = json.loads((state / "ray" / "cluster.json").read_text())["temp_dir"]
    parents: dict[int, int] = {}
    raylets, slots = set(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        pid = int(entry.name)
        parents[pid] = int(stat.rpartition(")")[2].split()[1])
        if b"/raylet/raylet\0" in line and temp.encode() in line:
            raylets.add(pid)
        elif line.startswith(b"ray::Slot"):
            slots.append(pid)
    own = [pid for pid in slots if parents[pid] in raylets]
    return {"slot": own, "raylet": sorted({parents[pid] for pid in own})}


class Rounds:
    """One cluster, many deaths."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.lab = Lab(NODES, SETTINGS)
        self.names: dict[int, str] = {}
        self.recovered: dict[str, list[float]] = {kind: [] for kind in KINDS}

    async def feed(self) -> None:
        """So many unfinished jobs, every fifth a gang over both nodes."""
        active = [row for row in await self.lab.jobs() if row["state"] not in OVER]
        for _ in range(ACTIVE - len(active)):
            name = f"job{len(self.names)}"
            gang = len(self.names) % 5 == 4
            least = 3 if gang else 1
            most = least if gang else self.rng.choice((1, 2, 4))
            made = await self.lab.submit(
                name,
                self.rng.uniform(6, 14) * most,
                min_gpus=least,
                max_gpus=most,
                retries=100,
                grace_s=5,
            )
            self.names[made["job"]] = name

    async def round(self, kind: str) -> None:
        lab = self.lab
        await self.feed()
        await lab.until(lambda rows: any(row["state"] == "running" for row in rows), RECOVER_S)
        await asyncio.sleep(self.rng.uniform(0.2, 2.5))
        before = await lab.ask("status")
        began = time.monotonic()
        if kind == "daemon":
            lab.end(signal.SIGKILL)
            await lab.start()
        elif kind == "driver":
            os.kill(before["detail"]["ray"]["driver"], signal.SIGKILL)
        else:
            os.kill(self.rng.choice(processes(lab.state)[kind]), signal.SIGKILL)
        await self.whole(kind, before)
        self.recovered[kind].append(time.monotonic() - began)

    async def whole(self, kind: str, before: dict[str, Any]) -> None:
        """Until the cluster is as it was."""
        gone = kind not in ("slot", "raylet")
        async with asyncio.timeout(RECOVER_S):
            while True:
                found = processes(self.lab.state)
                status = (await self.lab.ask("status"))["detail"]
                ray = status["ray"]
                gone = gone or len(found["slot"]) < self.lab.gpus
                fresh = kind != "driver" or ray["driver"] != before["detail"]["ray"]["driver"]
                usable = status["gpus"]["usable"] == self.lab.gpus
                whole = usable and ray["connected"] and len(found["slot"]) == self.lab.gpus
                if gone and fresh and whole:
                    return
                await asyncio.sleep(0.1)

    async def finish(self) -> list[str]:
        """Waits for all jobs; what was wrong."""
        lab = self.lab
        await lab.until(lambda rows: all(row["state"] in OVER for row in rows), 300)
        wrong = []
        for job, name in self.names.items():
            shown = await lab.ask("jobs.show", job=job)
            if shown["state"] != "finished":
                wrong.append(f"{name}: {shown['state']}: {shown['detail']}")
            if (lab.work / name / "twice").exists():
                wrong.append(f"{name}: ran twice at a time")
            saved, saving, epochs = 0.0, 0.0, []
            for kind, epoch, _, done, _ in lab.runs(name):
                if kind == "start":
                    epochs.append(epoch)
                    if min(abs(done - saved), abs(done - saving)) > 1e-5:
                        wrong.append(f"{name}: run {epoch} began with {done:g}, saved {saved:g}")
                    saved = saving = done  # whichever of the two it was
                elif kind == "saved":
                    saved = done
                elif kind == "saving":  # may have been killed after it was saved
                    saving = done
            if epochs != sorted(set(epochs)):
                wrong.append(f"{name}: runs {epochs}")
            causes = [p["cause"] for p in shown["predictions"]]
            if shown["lost"] and not any("lost" in cause for cause in causes):
                wrong.append(f"{name}: lost {shown['lost']} times, predictions say {causes}")
        return wrong


async def measure(rounds: int, seed: int) -> dict[str, Any]:
    it = Rounds(seed)
    try:
        await it.lab.start()
        for number in range(rounds):
            kind = KINDS[number % len(KINDS)]
            await it.round(kind)
            say(f"round {number + 1} of {rounds}: {kind}, whole in {it.recovered[kind][-1]:.1f} s")
        wrong = await it.finish()
        rows = await it.lab.jobs()
        shown = [await it.lab.ask("jobs.show", job=job) for job in it.names]
        return {
            "rounds": rounds,
            "jobs": len(rows),
            "lost_runs": sum(row["lost"] for row in shown),
            "resized": sum(row["resized"] for row in shown),
            "wrong": wrong,
            "recovered_s": {
                kind: {"median": round(statistics.median(x), 2), "max": round(max(x), 2)}
                for kind, x in it.recovered.items()
                if x
            },
        }
    finally:
        it.lab.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = asyncio.run(measure(arguments.rounds, arguments.seed))
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=2))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
