"""Jobs of the campaign: short ones that save, arriving all the time; and what became of each."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import intentd
from benchmarks.chaos.members import Member, Patience, drawn
from intentd.daemons.kit.admin import AdminRefusedError, AdminUnreachableError

OVER: Final = ("finished", "failed", "cancelled")
ACTIVE: Final = 4
FINISH_S: Final = 180.0
SOURCE: Final = str(Path(intentd.__file__).resolve().parents[1])


@dataclass(eq=False)
class Jobs:
    """Submits to one scheduler daemon and remembers what it was promised.

    forgotten: the daemon is set to forget jobs that are over; their own notes say what became of
    them.
    """

    member: Member
    work: Path
    seed: int
    clock: Patience
    work_gpu_s: tuple[float, float] = (3.0, 10.0)
    accepted: dict[int, str] = field(default_factory=dict)
    unheard: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    lost_runs: int = 0
    failed: int = 0
    forgotten: bool = False

    async def run(self) -> None:
        """Keeps a few unfinished jobs there, until it is over."""
        rng = drawn(self.seed, "jobs", self.member.name)
        self.work.mkdir(parents=True)
        while not self.over.is_set():
            with contextlib.suppress(AdminUnreachableError, AdminRefusedError):
                rows = await self.rows()
                active = sum(row["state"] not in OVER for row in rows)
                for _ in range(ACTIVE - active):
                    await self.submit(rng.uniform(*self.work_gpu_s), rng.choice((1, 2, 4)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.over.wait()

    async def rows(self) -> list[dict[str, Any]]:
        if self.member.frozen or not self.member.pid:
            raise AdminUnreachableError("it does not run")
        page = await self.member.ask("jobs.list", limit=10_000)
        rows: list[dict[str, Any]] = page["jobs"]
        return rows

    async def submit(self, work_gpu_s: float, most: int) -> None:
        name = f"job{len(self.accepted) + len(self.unheard)}"
        where = self.work / name
        where.mkdir()
        try:
            made = await self.member.ask(
                "jobs.submit",
                name=name,
                command=[
                    sys.executable, "-S", str(Path(__file__).with_name("job.py")),
                    f"{work_gpu_s:.3f}",
                ],
                workdir=str(where),
                env={"PYTHONPATH": SOURCE},
                size_gpu_s=work_gpu_s,
                max_gpus=most,
                retries=100,
                grace_s=5,
            )  # fmt: skip
        except (AdminUnreachableError, AdminRefusedError):
            self.unheard.append(name)
            raise
        self.accepted[made["job"]] = name

    async def finish(self, crashed: set[int]) -> list[str]:
        """Waits until all are over; what was lost, or ran twice, or from a wrong point.

        crashed: jobs whose command was killed, which may have failed by that.
        """
        self.over.set()
        until_s = self.clock.now() + FINISH_S
        rows: list[dict[str, Any]] = []
        while self.clock.now() < until_s:
            with contextlib.suppress(AdminUnreachableError, AdminRefusedError):
                rows = await self.rows()
                if rows and all(row["state"] in OVER for row in rows):
                    break
            await asyncio.sleep(0.5)
        by_number = {row["job"]: row for row in rows}
        wrong = []
        for number, name in self.accepted.items():
            row = by_number.get(number)
            if row is None and self.forgotten:
                wrong += self._runs(name)
            elif row is None:
                wrong.append(f"{name}: job {number} was accepted and is gone")
            elif row["state"] == "failed" and number in crashed:
                self.failed += 1
                wrong += self._runs(name, ended=False)
            elif row["state"] != "finished":
                wrong.append(f"{name}: {row['state']}: {row.get('detail', '')}")
            else:
                wrong += self._runs(name)
        return wrong

    def _runs(self, name: str, *, ended: bool = True) -> list[str]:
        where = self.work / name
        wrong = []
        if (where / "twice").exists():
            wrong.append(f"{name}: ran twice at a time")
        path = where / "runs"
        rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        saved = saving = 0.0
        epochs = []
        for kind, epoch, done in ((r[0], int(r[1]), float(r[2])) for r in rows if len(r) == 3):
            if kind == "start":
                epochs.append(epoch)
                if min(abs(done - saved), abs(done - saving)) > 1e-5:
                    wrong.append(f"{name}: run {epoch} began with {done:g}, {saved:g} was saved")
            elif kind == "saved":
                saved = done
            elif kind == "saving":  # may have been killed after it was saved
                saving = done
        if epochs != sorted(set(epochs)):
            wrong.append(f"{name}: runs {epochs}, expected growing")
        if ended and not any(row[0] == "end" for row in rows):
            wrong.append(f"{name}: finished, and never came to its end")
        self.lost_runs += max(0, len(epochs) - 1)
        return wrong
