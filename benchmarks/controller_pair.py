"""How long nobody leads when the leader of two controllers is lost, with a member attached.

``python -m benchmarks.controller_pair --rounds 50 --json``: a private PostgreSQL, two controllers
as processes, one member on the kit's link, and an operator who sets a policy as fast as the leader
takes them, at both controllers all the time. Round by round the leader is killed (SIGKILL), stopped
and woken after another leads (SIGSTOP, SIGCONT), or its way to the database is cut: closed, or gone
silent without a sign. A gap runs from the fault to the first policy of the next leader that the
member applied. Numbers are counted from every line "policy issued" of every life of both
controllers, from what the member got, and from the database. Bars: no gap over 5 s, no number
twice.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from benchmarks.local_postgres import Postgres, why_not
from intentd.core.messages import NumberedPolicy, PolicyAck
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError
from intentd.daemons.kit.config import ControllerSection, DaemonConfig
from intentd.daemons.kit.lifecycle import Kit, Tasks
from intentd.daemons.kit.link import MemberLink

FAULTS = ("kill", "stop", "close", "silence")
BAR_S = 5.0
LIMIT_S = 60.0
PAUSE_S = 0.02  # between two policies of the operator


class Wire:
    """A controller's way to the database: a socket of its own that can be cut and mended."""

    def __init__(self, directory: Path, server: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self._server = str(server / ".s.PGSQL.5432")
        self._open = True
        self._moves = asyncio.Event()
        self._moves.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._accept: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"postgresql://intentd@/postgres?host={self.directory}"

    async def start(self) -> None:
        path = str(self.directory / ".s.PGSQL.5432")
        self._accept = await asyncio.start_unix_server(self._joined, path)

    def cut(self, *, silently: bool) -> None:
        """silently: nothing moves any more and nobody is told, as when a cable is pulled."""
        if silently:
            self._moves.clear()
            return
        self._open = False
        for writer in self._writers:
            writer.close()

    def mend(self) -> None:
        self._open = True
        self._moves.set()

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_unix_connection(self._server)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._writers -= {writer, far_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._moves.wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    def stop(self) -> None:
        if self._accept is not None:
            self._accept.close()
        self.cut(silently=False)
        self._moves.set()


class ControllerProcess:
    """One of the two, over its lives."""

    def __init__(self, where: Path, name: str, url: str, lease_s: float) -> None:
        self.name = name
        self.hub = f"ipc://{where / name}.hub"
        self.log = where / f"{name}.log"
        state, run = where / f"{name}-state", where / f"{name}-run"
        self._config = where / f"{name}.toml"
        self._config.write_text(
            f'name = "{name}"\nstate_dir = "{state}"\nrun_dir = "{run}"\ndrain_timeout_s = 1\n'
            f'[log]\nformat = "json"\n[status]\nbind = "127.0.0.1:0"\n'
            f'[hub]\nbind = "{self.hub}"\n[store]\nurl = "{url}"\nlease_s = {lease_s}\n'
        )
        self.admin = AdminClient(run / "controller.admin.sock", timeout_s=10)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "intentd.controller.daemon"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--config", str(self._config)], stderr=log, env=dict(os.environ)
            )

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        if number is signal.SIGKILL:
            self._process.wait()

    def ended(self) -> int:
        """Its exit status, waited for."""
        assert self._process is not None
        return self._process.wait(120)

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGKILL)

    async def state(self) -> str:
        try:
            status = await self.admin.acall("status")
        except (AdminUnreachableError, AdminRefusedError):
            return "down"
        return str(status["detail"].get("leadership", {}).get("state", "starting"))

    def issued(self) -> list[tuple[int, int, str]]:
        """(era, number, life) of every policy this one says it issued."""
        rows = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if said.get("message") == "policy issued":
                    rows.append((said["era"], said["number"], self.name))
        return rows


class _AgentConfig(DaemonConfig):
    role = "agent"


class PairLab:
    """Two controllers on one database, a member of both, and an operator at each."""

    def __init__(self, where: Path, postgres: Postgres, *, lease_s: float = 2.0) -> None:
        self.postgres = postgres
        self.wires = [Wire(where / f"w{at}", postgres.base) for at in (0, 1)]
        self.controllers = [
            ControllerProcess(where, f"c{at}", wire.url, lease_s)
            for at, wire in enumerate(self.wires)
        ]
        section = ControllerSection(endpoint=",".join(one.hub for one in self.controllers))
        config = _AgentConfig(name="m", state_dir=where, run_dir=where, controller=section)
        self.got: list[tuple[int, int, float]] = []  # era, number, when
        self.bodies: dict[tuple[int, int], str] = {}
        self.twice = 0
        self.refused: collections.Counter[str] = collections.Counter()
        self.link = MemberLink(
            config,
            Kit("agent"),
            on_policy=self._apply,
            collect_report=dict,
            capabilities=lambda: {"domains": ["eth0"]},
        )

    def _apply(self, policy: NumberedPolicy) -> PolicyAck:
        pair, body = (policy.era, policy.number), json.dumps(policy.body, sort_keys=True)
        self.twice += self.bodies.setdefault(pair, body) != body
        self.got.append((*pair, time.monotonic()))
        return PolicyAck(policy.application, *pair, True, "")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[PairLab]:
        try:
            async with Tasks() as tasks:
                for wire in self.wires:
                    await wire.start()
                for controller in self.controllers:
                    controller.start()
                try:
                    await self.link.start(tasks)
                    for controller in self.controllers:
                        tasks.create_task(self._operate(controller))
                    yield self
                finally:
                    for controller in self.controllers:
                        controller.end()
                    await self.link.stop()
                    for wire in self.wires:
                        wire.stop()
                    tasks.cancel_all()
        except* asyncio.CancelledError:
            pass

    async def _operate(self, controller: ControllerProcess) -> None:
        """Set one policy after the other; one that is stopped finds the last one when it wakes."""
        level = 1
        while True:
            level = level % 50 + 1  # another policy each time
            try:
                await controller.admin.acall(
                    "policy_set",
                    document={"domain": "eth0", "max_wait": level},
                    author=controller.name,
                )
            except AdminUnreachableError:
                self.refused["unreachable"] += 1
            except AdminRefusedError as error:
                self.refused["term over" if "is over" in str(error) else error.code] += 1
            await asyncio.sleep(PAUSE_S)

    async def settled(self) -> int:
        """Wait until one leads and the other stands by; which one leads."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                states = [await one.state() for one in self.controllers]
                if sorted(states) == ["leading", "standby"]:
                    leader = states.index("leading")
                    known = len(self.got)
                    await _until(lambda known=known: len(self.got) > known)  # type: ignore[misc]
                    return leader
                await asyncio.sleep(0.05)

    async def round(self, fault: str) -> float:
        """One fault at the leader; the gap in seconds. Everything is whole again on return."""
        at = await self.settled()
        leader, other, wire = self.controllers[at], self.controllers[1 - at], self.wires[at]
        began_s = time.monotonic()
        match fault:
            case "kill":
                leader.send(signal.SIGKILL)
            case "stop":
                leader.send(signal.SIGSTOP)
            case "close":
                wire.cut(silently=False)
            case "silence":
                wire.cut(silently=True)
        # What the member applies until the other leads may still be of the old leader.
        async with asyncio.timeout(LIMIT_S):
            while await other.state() != "leading":  # noqa: ASYNC110  it is another process's
                await asyncio.sleep(0.01)
        author = f"SELECT coalesce(min(number), 0) FROM {_TABLE} WHERE author = '{other.name}'"
        after = f" AND issued_wall_s >= {time.time() - (time.monotonic() - began_s)}"
        first = 0
        async with asyncio.timeout(LIMIT_S):
            while not first:
                first = int((await asyncio.to_thread(self.postgres.run, author + after))[0][0])
        await _until(lambda: any(number >= first for _, number, _ in self.got))
        gap_s = min(when for _, number, when in self.got if number >= first) - began_s
        match fault:
            case "kill":
                leader.start()
            case "stop":
                leader.send(signal.SIGCONT)
            case _:
                wire.mend()
        return gap_s

    def used_twice(self) -> tuple[int, int]:
        """(numbers of which two policies are known, policies issued by all lives together)."""
        issued = [pair for one in self.controllers for pair in one.issued()]
        told = collections.Counter(row[:2] for row in issued)
        rows = self.postgres.run(f"SELECT count(*), count(DISTINCT (era, number)) FROM {_TABLE}")
        kept, distinct = map(int, rows[0])
        return sum(n > 1 for n in told.values()) + self.twice + kept - distinct, len(told)


_TABLE = "intentd_controller.policies"


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():  # noqa: ASYNC110  what is waited for comes from several places
            await asyncio.sleep(0.005)


async def measure(rounds: int, faults: tuple[str, ...], seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    order = [faults[at % len(faults)] for at in range(rounds)]
    rng.shuffle(order)
    gaps: dict[str, list[float]] = {fault: [] for fault in faults}
    postgres = Postgres()
    try:
        with tempfile.TemporaryDirectory(prefix="pair-", dir="/tmp") as where:
            lab = PairLab(Path(where), postgres)
            async with lab.running():
                for at, fault in enumerate(order):
                    gap_s = await lab.round(fault)
                    gaps[fault].append(gap_s)
                    print(f"round {at + 1} of {rounds}: {fault}: {gap_s:.2f} s", file=sys.stderr)
                await lab.settled()
                twice, issued = await asyncio.to_thread(lab.used_twice)
                refused = dict(lab.refused)
    finally:
        postgres.close()
    every = [gap for row in gaps.values() for gap in row]
    return {
        "benchmark": "controller_pair",
        "rounds": rounds,
        "gap_s": {"p50": statistics.median(every), "max": max(every)},
        "by_fault": {
            fault: {"rounds": len(row), "p50_s": statistics.median(row), "max_s": max(row)}
            for fault, row in gaps.items()
            if row
        },
        "policies_issued": issued,
        "numbers_used_twice": twice,
        "refused": refused,
        "bar_s": BAR_S,
        "met": max(every) <= BAR_S and twice == 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if reason := why_not():
        print(f"controller_pair: {reason}", file=sys.stderr)
        return 2
    faults = tuple(options.faults.split(","))
    if unknown := [fault for fault in faults if fault not in FAULTS]:
        parser.error(f"--faults: got {unknown[0]!r}, expected some of {', '.join(FAULTS)}")
    result = asyncio.run(measure(options.rounds, faults, options.seed))
    if options.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=1))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
