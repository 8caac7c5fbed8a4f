"""The faults: what each does to the world, for how long, and how it is taken back.

``draw`` makes fault number N of a seed without the ones before it, so that any of them can be
played alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.chaos.flows import Flows
from benchmarks.chaos.members import drawn
from benchmarks.chaos.provider import MODES, PROVIDERS, Providers
from benchmarks.chaos.world import MEMBERS, RAY, RAY_GPUS, World
from benchmarks.ray_faults import processes
from intentd.daemons.gpu import ray_cluster

KINDS: Final = {
    "kill": 6, "stop": 4, "cut": 4, "freeze": 3, "delay": 3, "break": 2, "fins": 2, "down": 4,
    "disk": 3, "clock": 3, "boot": 2, "postgres": 3, "postgres disk": 1, "provider": 3, "app": 2,
    "job": 3, "ray": 4,
}  # fmt: skip
"""Kind -> how often, relative to the others. "ray" only where there is one."""
LINKS: Final = (
    "s>c", "h1>c", "h2>c", "g>c", "p1>c", "p2>c", "h1>s", "h2>s", "p1>db", "p2>db",
    *(f"{proxy}>{name}" for proxy in ("p1", "p2") for name in PROVIDERS),
)  # fmt: skip
OVERLAP: Final = 0.2
_NAMES: Final = tuple(name for _, name in MEMBERS)
_RESTORED_S: Final = 10.0
_NOTICED_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class Fault:
    """kind at target for hold_s; detail: what exactly. beside: together with the next one."""

    number: int
    kind: str
    target: str
    detail: str
    hold_s: float
    beside: bool

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        detail = f" {self.detail}" if self.detail else ""
        return f"{self.number} {self.kind} {self.target}{detail} {self.hold_s:.1f} s"


def draw(seed: int, number: int, kinds: Sequence[str]) -> Fault:
    rng = drawn(seed, "fault", number)
    kind = rng.choices(kinds, [KINDS.get(kind, 3) for kind in kinds])[0]
    target, detail = _aim(kind, rng)
    return Fault(number, kind, target, detail, rng.uniform(0.3, 3.0), rng.random() < OVERLAP)


def _aim(kind: str, rng: random.Random) -> tuple[str, str]:
    """Target and detail."""
    match kind:
        case "kill" | "stop" | "disk":
            return rng.choice(_NAMES), ""
        case "down":
            return rng.choice((*_NAMES, "provider")), ""
        case "cut" | "freeze" | "break":
            return rng.choice(LINKS), ""
        case "delay":
            return rng.choice(LINKS), f"{rng.choice((20, 100, 500))} ms"
        case "fins":
            return "fins", rng.choice(("loss .3", "loss 1", "repeat 1", "late .2"))
        case "clock":
            return rng.choice(_NAMES), f"{rng.choice((-86400, -3600, -30, 30, 3600, 86400)):+d}"
        case "boot":
            # One with flows or jobs shares its clock with them: hosts boot as a whole.
            return rng.choice(("c", "s", "p1", "p2")), str(rng.choice((-300, 3600, 8640000)))
        case "postgres":
            return "postgres", rng.choice(("crash", "kill", "restart", "stop"))
        case "postgres disk":
            return "postgres", ""
        case "provider":
            return rng.choice((*PROVIDERS, "both")), rng.choice([mode for mode in MODES if mode])
        case "app":
            return rng.choice(("h1", "h2")), ""
        case "job":
            return "g", rng.choice(("command", "supervisor"))
        case "ray":
            return RAY, rng.choice(("daemon", "driver", "slot", "raylet", "head"))
    raise ValueError(kind)


@dataclass(eq=False)
class Faults:
    """Carries them out. Each comes back only when it was taken back. crashed: jobs killed by it."""

    world: World
    flows: Flows
    providers: Providers
    wrong: list[str]
    crashed: set[int] = field(default_factory=set)

    async def inject(self, fault: Fault) -> None:
        action: Callable[[Fault], Any] = getattr(self, "_" + fault.kind.replace(" ", "_"))
        await action(fault)

    async def _kill(self, fault: Fault) -> None:
        await self._killed(fault.target)

    async def _killed(self, name: str) -> None:
        """An agent's host gets its devices back before the agent does."""
        member = self.world.member(name)
        agent = member.role == "agent"
        if agent:
            member.hold.clear()
        try:
            process = member.process
            member.signal(signal.SIGKILL)
            if agent and process is not None:
                await process.wait()
                await self._restored(name)
        finally:
            member.hold.set()

    async def _restored(self, name: str) -> None:
        found, until_s = self.world.found_qdiscs[name], self.world.clock.now() + _RESTORED_S
        while await asyncio.to_thread(self.world.qdiscs, name) != found:
            if self.world.clock.now() > until_s:
                self.wrong.append(f"{name}: qdiscs not restored {_RESTORED_S:.0f} s after kill -9")
                return
            await asyncio.sleep(0.1)

    async def _stop(self, fault: Fault) -> None:
        member = self.world.member(fault.target)
        pid = member.pid
        member.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.hold_s)
        finally:
            if member.pid == pid:
                member.signal(signal.SIGCONT)

    async def _cut(self, fault: Fault) -> None:
        link = self.world.tcp[fault.target]
        link.cut = True
        link.break_off()
        await asyncio.sleep(fault.hold_s)
        link.heal()

    async def _freeze(self, fault: Fault) -> None:
        link = self.world.tcp[fault.target]
        link.freeze()
        await asyncio.sleep(fault.hold_s)
        link.heal()

    async def _break(self, fault: Fault) -> None:
        self.world.tcp[fault.target].break_off()

    async def _delay(self, fault: Fault) -> None:
        link = self.world.tcp[fault.target]
        link.delay_s = float(fault.detail.split()[0]) / 1000
        await asyncio.sleep(fault.hold_s)
        link.heal()

    async def _fins(self, fault: Fault) -> None:
        link = self.world.fins
        assert link is not None
        what, amount = fault.detail.split()
        setattr(link, {"late": "late_s"}.get(what, what), float(amount))
        await asyncio.sleep(fault.hold_s)
        link.heal()

    async def _down(self, fault: Fault) -> None:
        space = self.world.spaces[fault.target]
        await asyncio.to_thread(space.ip, "link", "set", "eth0", "down")
        try:
            await asyncio.sleep(fault.hold_s)
        finally:
            await asyncio.to_thread(space.ip, "link", "set", "eth0", "up")

    async def _disk(self, fault: Fault) -> None:
        await self._filled(self.world.member(fault.target).state_dir, fault.hold_s)

    async def _postgres_disk(self, fault: Fault) -> None:
        """What the server then does about it: it may end itself; it is started again."""
        assert self.world.postgres is not None
        await self._filled(self.world.postgres.base, fault.hold_s)
        if await asyncio.to_thread(self.world.postgres.ended):
            await asyncio.to_thread(self.world.postgres.start)

    async def _filled(self, where: Path, hold_s: float) -> None:
        ballast = where / "ballast"
        await asyncio.to_thread(_fill, ballast)
        try:
            await asyncio.sleep(hold_s)
        finally:
            ballast.unlink(missing_ok=True)

    async def _clock(self, fault: Fault) -> None:
        """It jumps, and after a while it is set right: two jumps."""
        member = self.world.member(fault.target)
        member.set_clock(int(fault.detail))
        await asyncio.sleep(fault.hold_s)
        member.set_clock(0)

    async def _boot(self, fault: Fault) -> None:
        """Its host's monotonic clock is another one from now on."""
        self.world.member(fault.target).offset_s = int(fault.detail)
        await self._killed(fault.target)

    async def _postgres(self, fault: Fault) -> None:
        postgres = self.world.postgres
        assert postgres is not None
        if fault.detail == "stop":
            pids = await asyncio.to_thread(postgres.pids)
            _signal(pids, signal.SIGSTOP)
            try:
                await asyncio.sleep(fault.hold_s)
            finally:
                _signal(pids, signal.SIGCONT)
            return
        number = {
            "crash": signal.SIGQUIT, "kill": signal.SIGKILL, "restart": signal.SIGINT,
        }[fault.detail]  # fmt: skip
        await asyncio.to_thread(postgres.stop, number)
        try:
            await asyncio.sleep(fault.hold_s)
        finally:
            await asyncio.to_thread(postgres.start)

    async def _provider(self, fault: Fault) -> None:
        names = PROVIDERS if fault.target == "both" else (fault.target,)
        for name in names:
            self.providers.mode[name] = fault.detail
        await asyncio.sleep(fault.hold_s)
        for name in names:
            self.providers.mode.pop(name, None)

    async def _app(self, fault: Fault) -> None:
        app = self.flows.apps.get(fault.target)
        if app is not None and app.returncode is None:
            self.flows.killed.add(app.pid)
            app.kill()

    async def _job(self, fault: Fault) -> None:
        """kill -9 of what runs one of the jobs, or of the one who watches over it.

        The first is the job's own failure, as if it had crashed; the second is not.
        """
        found = await asyncio.to_thread(_supervisors, self.world.root)
        if fault.detail == "command":
            found = {pid: job for parent, job in found.items() for pid in _children(parent)}
        if found:
            pid = drawn(fault.number, "victim").choice(sorted(found))
            if fault.detail == "command":
                self.crashed.add(found[pid])
            _signal([pid], signal.SIGKILL)

    async def _ray(self, fault: Fault) -> None:
        """kill -9 of one of the processes a Ray cluster consists of."""
        member = self.world.member(RAY)
        if fault.detail == "daemon":
            await self._killed(RAY)
        elif fault.detail == "driver":
            status = await member.status()
            if status is not None and status["detail"]["ray"]["driver"]:
                _signal([status["detail"]["ray"]["driver"]], signal.SIGKILL)
        else:
            pids = await asyncio.to_thread(_ray_pids, member.state_dir, fault.detail)
            if pids:
                victim = drawn(fault.number, "victim").choice(sorted(pids))
                _signal([victim], signal.SIGKILL)
        await asyncio.sleep(fault.hold_s)
        if fault.detail in ("raylet", "head"):
            await self._noticed()

    async def _noticed(self) -> None:
        """Ray needs seconds to see what died: until then everything would pass for whole."""
        until_s = self.world.clock.now() + _NOTICED_S
        while self.world.clock.now() < until_s:
            status = await self.world.member(RAY).status()
            if status is None or not status["ready"]:
                return
            if status["detail"]["gpus"]["usable"] < RAY_GPUS:
                return
            await asyncio.sleep(0.1)


def kinds_here(*, ray: bool) -> list[str]:
    """What can be done on this machine."""
    without = {"" if ray else "ray", "" if shutil.which("cc") else "clock"}
    return [kind for kind in KINDS if kind not in without]


def _ray_pids(state: Path, what: str) -> list[int]:
    """Processes of the cluster that keeps its files there."""
    if what == "head":
        said = ray_cluster.running(state / "ray")
        own = said["temp_dir"].encode() if said is not None else b"\0none"
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes()
                if b"/gcs_server\0" in line and own in line:
                    found.append(int(path.parent.name))
        return found
    with contextlib.suppress(OSError, KeyError):
        return processes(state)[what]
    return []


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _fill(path: Path) -> None:
    """Until not a byte is left."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass


def _supervisors(root: Path) -> dict[int, int]:
    """Of jobs that run now: process -> job."""
    found = {}
    for claim in root.glob("gpu-*/state/jobs/*/*/claim"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            pid = int(json.loads(claim.read_text())["pid"])
            if str(claim.parent).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[pid] = int(claim.parent.parent.name)
    return found


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
