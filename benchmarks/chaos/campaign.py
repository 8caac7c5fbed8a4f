"""Plays faults into the running suite, one after the other, and checks what has to hold."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.chaos.faults import Fault, Faults, draw
from benchmarks.chaos.flows import Flows
from benchmarks.chaos.jobs import Jobs
from benchmarks.chaos.members import Member
from benchmarks.chaos.prompts import Users
from benchmarks.chaos.provider import Providers
from benchmarks.chaos.world import RAY_GPUS, World
from intentd.daemons.kit.admin import AdminRefusedError, AdminUnreachableError

APPLICATIONS: Final = ("flows", "jobs", "prompts")
FOLLOWS: Final = {"agent": ("flows",), "gpu": ("jobs",), "proxy": ("prompts",)}
START_S: Final = 300.0
# No prompt answered for so long while nothing is wrong: they stall.
SILENT_S: Final = 60.0
TELL_S: Final = 10.0
_LOOK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Options:
    """only: numbers of the faults to play, in their order; a seed's faults are always the same."""

    seed: int
    only: Sequence[int]
    kinds: Sequence[str]
    logs: Path
    talkers: int = 3
    streamers: int = 3
    pause_s: float = 0.3
    warm_s: float = 3.0
    job_gpu_s: tuple[float, float] = (3.0, 10.0)
    minutes: float = 0.0
    recover_s: float = 60.0
    ray: bool = False


@dataclass
class Violation:
    """after: the fault that was the last one when it came to light."""

    what: str
    after: int
    text: str


@dataclass
class Row:
    """One fault and what it took until everything was as it should be; None: it never was."""

    fault: Fault
    took_s: float
    recovered_s: float | None
    late: str = ""


@dataclass(eq=False)
class Campaign:
    options: Options
    rows: list[Row] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    policies: dict[tuple[str, int, int], tuple[Any, ...]] = field(default_factory=dict)
    faults_wrong: list[str] = field(default_factory=list)
    operated: int = 0
    interrupted: bool = False
    _last: int = -1
    _seen: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.world = World(self.options.logs, self.options.seed, ray=self.options.ray)

    def enough(self) -> None:
        """No further fault: come to the end and judge."""
        self.interrupted = True

    async def run(self) -> dict[str, Any]:
        """The whole of it; the report, as plain data."""
        options, world = self.options, self.world
        self.providers = Providers(random.Random(options.seed))
        self.users = Users(world, self.providers, options.seed)
        self.flows = Flows(world, options.seed)
        began = time.monotonic()
        try:
            await asyncio.to_thread(world.build)
            world.provider_targets = await self.providers.start(
                world.spaces["provider"], world.ip("provider")
            )
            await world.configure()
            self.jobs = [
                Jobs(
                    member,
                    world.root / "work" / member.name,
                    options.seed,
                    world.clock,
                    options.job_gpu_s,
                )
                for member in world.of("gpu")
            ]
            self.faults = Faults(world, self.flows, self.providers, self.faults_wrong)
            async with asyncio.TaskGroup() as tasks:
                await self._campaign(tasks)
        finally:
            await self.users.close()
            await self.flows.close()
            await self.providers.close()
            await world.close()
        return self.report(time.monotonic() - began)

    async def _campaign(self, tasks: asyncio.TaskGroup) -> None:
        options = self.options
        self.world.start(tasks)
        await self._settled(START_S)
        await self.flows.start(tasks)
        self.users.start(tasks, options.talkers, options.streamers)
        for jobs in self.jobs:
            tasks.create_task(jobs.run(), name=f"jobs of {jobs.member.name}")
        patience = tasks.create_task(self.world.clock.run(), name="patience")
        watch = tasks.create_task(self._watch(), name="watch")
        operator = tasks.create_task(self._operate(), name="operator")
        await asyncio.sleep(options.warm_s)
        await self._play()
        operator.cancel()
        say("the last fault is over: everything comes to its end")
        await self._end()
        watch.cancel()
        patience.cancel()

    async def _play(self) -> None:
        """One after the other; some together with the next."""
        drawn = [
            draw(self.options.seed, number, self.options.kinds) for number in self.options.only
        ]
        index, began = 0, time.monotonic()
        while index < len(drawn):
            if self.interrupted:
                return
            if self.options.minutes and time.monotonic() - began > 60 * self.options.minutes:
                say(f"{self.options.minutes:g} minutes are over")
                return
            group = [drawn[index]]
            if drawn[index].beside and index + 1 < len(drawn):
                other = drawn[index + 1]
                if _apart(group[0], other):
                    group.append(other)
            index += len(group)
            await self._together(group)
            await asyncio.sleep(self.options.pause_s)

    async def _together(self, group: Sequence[Fault]) -> None:
        self._last = group[-1].number
        began = self.world.clock.now()
        try:
            async with asyncio.timeout(120):
                await asyncio.gather(*(self.faults.inject(fault) for fault in group))
        except TimeoutError:
            self._violated("machinery", f"{group[0]} could not be taken back")
        healed = self.world.clock.now()
        late = await self._settled(self.options.recover_s) or await self._served(healed)
        recovered_s = None if late else self.world.clock.now() - healed
        for fault in group:
            self.rows.append(Row(fault, healed - began, recovered_s, late))
        what = " with ".join(map(str, group))
        came = late or f"whole after {recovered_s:.1f} s"
        done = len(self.rows)
        say(f"{done}/{len(self.options.only)}: {what}: {came}")
        if late:
            self._violated("members", f"after {what}: {late}")
            await self._again()

    async def _again(self) -> None:
        """Members that did not come back are killed, so that the campaign can go on."""
        for member in self.world.members:
            if await self._why_not(member, {}):
                member.signal(9)
        late = await self._settled(self.options.recover_s)
        if late:
            raise RuntimeError(f"not even a restart helps: {late}")

    # -- what has to hold -----------------------------------------------------------------------

    def _violated(self, what: str, text: str) -> None:
        self.violations.append(Violation(what, self._last, text))
        say(f"VIOLATION of {what}, after fault {self._last} of seed {self.options.seed}: {text}")

    async def _settled(self, timeout_s: float) -> str:
        """Until every member is ready, joined and on the newest policies; else what is not."""
        began_s = self.world.clock.now()
        deadline = began_s + timeout_s
        waiting = list(self.world.members)
        told_s = self.world.clock.now() + TELL_S
        newest: dict[str, list[int]] = {}
        why = ""
        while True:
            newest = await self._newest()
            still = []
            for member in waiting:
                why = await self._why_not(member, newest)
                if why:
                    still = waiting[waiting.index(member) :]
                    break
            if not still:
                return ""
            if self.world.clock.now() > deadline:
                return why
            if self.world.clock.now() > told_s:
                told_s += TELL_S
                say(f"waiting: {why}")
            # The more there is to wait for, the less does looking take from the relays here.
            await asyncio.sleep(min(1.0, max(_LOOK_S, (self.world.clock.now() - began_s) / 10)))

    async def _served(self, healed_s: float) -> str:
        """Until a prompt was answered that came after; else since when there was none."""
        until_s = self.world.clock.now() + SILENT_S
        while self.users.last_ok_s < healed_s:
            if self.world.clock.now() > until_s:
                return f"no prompt was answered for {SILENT_S:.0f} s"
            await asyncio.sleep(_LOOK_S)
        return ""

    async def _newest(self) -> dict[str, list[int]]:
        found = {}
        with contextlib.suppress(AdminUnreachableError, AdminRefusedError):
            member = self.world.member("c")
            if member.pid and not member.frozen:
                for name in APPLICATIONS:
                    page = await member.ask("policy_list", application=name, limit=20)
                    for row in page["policies"]:
                        self._remember(name, row)
                    if page["policies"]:
                        first = page["policies"][0]
                        found[name] = [first["era"], first["number"]]
        return found

    def _remember(self, name: str, row: dict[str, Any]) -> None:
        """A number is used once: what it names never changes."""
        key = (name, row["era"], row["number"])
        # A clock that jumps back may issue a later policy at an earlier time; the rest stays.
        what = (row["issued_wall_s"], row["author"], row["reason"])
        known = self.policies.setdefault(key, what)
        if known != what:
            self._violated("policies", f"{name} {row['era']}.{row['number']} is {known} and {what}")
            self.policies[key] = what

    async def _why_not(self, member: Member, newest: dict[str, list[int]]) -> str:
        """Why a member is not whole; "" when it is."""
        if member.gave_up:
            return f"{member.label}: {member.gave_up}"
        status = await member.status()
        if status is None:
            return f"{member.label} does not answer"
        if not status["ready"]:
            return f"{member.label} is not ready: {status['reasons']}"
        link = status["controller"]
        if link is not None and not link["connected"]:
            return f"{member.label} is not joined: {link['last_error']}"
        for name in FOLLOWS.get(member.role, ()):
            wanted, runs = newest.get(name), status["policies"].get(name)
            if wanted is not None and runs != wanted:
                return f"{member.label} runs {name} {runs}, the newest is {wanted}"
            if runs is not None:
                if runs < member.newest.get(name, runs):
                    self._violated("policies", f"{member.label} went back to {name} {runs}")
                member.newest[name] = runs
        ray = status["detail"].get("ray")
        if ray is not None:
            gpus = status["detail"]["gpus"]
            if not ray["connected"] or gpus["usable"] < RAY_GPUS:
                return f"{member.label}: Ray is not whole: {gpus} {ray}"
        if member.role == "agent":
            for domain in status["detail"]["domains"].values():
                tc = domain["tc"]
                if tc["state"] != "shaped":
                    return f"{member.label} does not shape: {tc}"
        return ""

    async def _watch(self) -> None:
        """Throughout."""
        while True:
            await asyncio.sleep(1.0)
            for text in self.flows.stalled():
                self._violated("flows", text)
            for name, source in (
                ("flows", self.flows.wrong), ("prompts", self.users.wrong),
                ("qdiscs", self.faults_wrong), ("money", self.users.over_budget()),
            ):  # fmt: skip
                for text in source[self._seen.get(name, 0) :]:
                    self._violated(name, text)
                self._seen[name] = len(source)

    async def _operate(self) -> None:
        """An operator who rolls policies back and lets them go again, now and then."""
        rng = random.Random(f"{self.options.seed}/operator")
        member = self.world.member("c")
        while True:
            await asyncio.sleep(rng.uniform(6, 12))
            name = rng.choice(("flows", "prompts"))
            era = max((era for _, era, _ in self.policies), default=0)
            known = sorted(key[2] for key in self.policies if key[:2] == (name, era))
            if len(known) < 2 or not member.pid or member.frozen:
                continue
            with contextlib.suppress(AdminUnreachableError, AdminRefusedError):
                await member.ask(
                    "policy_rollback", application=name, number=rng.choice(known), author="chaos"
                )
                self.operated += 1
                await asyncio.sleep(rng.uniform(1, 4))
                await member.ask("policy_release", application=name)

    async def _end(self) -> None:
        """No more faults: what was promised has to be there."""
        late = await self._settled(self.options.recover_s)
        if late:
            self._violated("members", f"at the end: {late}")
        for text in await self.flows.finish():
            self._violated("flows", text)
        self.users.over.set()
        for judged in await asyncio.gather(*(self._finished(jobs) for jobs in self.jobs)):
            for text in judged:
                self._violated("jobs", text)
        await asyncio.sleep(1.0)
        for what, judge in (
            ("prompts", self.users.judge_conversations), ("money", self.users.judge_money),
        ):  # fmt: skip
            try:
                found = await judge()
            except (AdminUnreachableError, AdminRefusedError, OSError) as error:
                found = [f"cannot be judged: {error}"]
            for text in found:
                self._violated(what, text)
        (self.options.logs / "users.log").write_text("\n".join(self.users.errors) + "\n")
        await self.world.stop()
        for name, found_qdisc in self.world.found_qdiscs.items():
            left = await asyncio.to_thread(self.world.qdiscs, name)
            if left != found_qdisc:
                self._violated("qdiscs", f"{name}: {left!r}, found were {found_qdisc!r}")

    async def _finished(self, jobs: Jobs) -> list[str]:
        """Only jobs of the local executor are crashed."""
        return await jobs.finish(self.faults.crashed if jobs.member.name == "g" else set())

    # -- the report -----------------------------------------------------------------------------

    def report(self, took_s: float) -> dict[str, Any]:
        kinds: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            kinds.setdefault(row.fault.kind, {"rows": []})["rows"].append(row)
        for kind in kinds.values():
            rows = kind.pop("rows")
            times = [row.recovered_s for row in rows if row.recovered_s is not None]
            kind |= {
                "faults": len(rows),
                "beside_another": sum(row.fault.beside for row in rows),
                "recovered_p50_s": round(statistics.median(times), 2) if times else None,
                "recovered_max_s": round(max(times), 2) if times else None,
                "never": sum(row.recovered_s is None for row in rows),
            }
        flows, users = self.flows, self.users
        return {
            "seed": self.options.seed,
            "faults": len(self.rows),
            "seconds": round(took_s, 1),
            "drawn_from": list(self.options.kinds),
            "ray": self.options.ray,
            "recover_bound_s": self.options.recover_s,
            "paused_s": round(self.world.clock.lost_s, 1),
            "kinds": dict(sorted(kinds.items())),
            "violations": [vars(violation) for violation in self.violations],
            "load": {
                "flows": {
                    "arrived": flows.arrived, "finished": flows.finished,
                    "died_with_their_application": flows.abandoned,
                    "sent_again": flows.restarted,
                    "longest_wait_s": round(flows.longest_wait_s, 2),
                    "longest_s": round(flows.longest_s, 1),
                    "started": dict(flows.degraded),
                },
                "jobs": {
                    "accepted": sum(len(jobs.accepted) for jobs in self.jobs),
                    "not_accepted": sum(len(jobs.unheard) for jobs in self.jobs),
                    "crashed_and_failed": sum(jobs.failed for jobs in self.jobs),
                    "runs_beyond_the_first": sum(jobs.lost_runs for jobs in self.jobs),
                },
                "prompts": dict(sorted(users.counts.items())),
                "conversations": len(users.acked),
                "keys": len(users.keys),
                "billed_nano": sum(self.providers.nano.values()),
                "calls_without_cap": self.providers.without_cap,
                "rolled_back": self.operated,
                "policies": {
                    name: sum(1 for key in self.policies if key[0] == name)
                    for name in APPLICATIONS
                },
            },
            "starts": {member.label: member.starts for member in self.world.members},
            "rows": [
                row.fault.to_plain()
                | {
                    "took_s": round(row.took_s, 2),
                    "recovered_s": None
                    if row.recovered_s is None
                    else round(row.recovered_s, 2),
                    "late": row.late,
                }
                for row in self.rows
            ],
        }  # fmt: skip


def _apart(one: Fault, other: Fault) -> bool:
    """Two faults of one thing cannot be taken back apart from each other."""
    single = {one.kind, other.kind}
    return (
        one.target != other.target
        and not single <= {"postgres", "postgres disk"}
        and ("both" not in (one.target, other.target) or single != {"provider"})
    )


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
