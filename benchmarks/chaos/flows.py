"""Flows of the campaign: applications on two hosts, the receiver, and a watch on every flow."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.chaos.members import Member, drawn
from benchmarks.chaos.world import MAX_WAIT_S, World
from intentd.testbed.playing import python_env

RATE_PER_S: Final = 15.0
ROOT: Final = Path(__file__).parents[2]
_HEAD: Final = struct.Struct("!Q")
# Beyond max_wait: the client's own grace, and a machine that is short of processors.
START_SLACK_S: Final = 5.0
# TCP waits twice as long after each loss: a link that was cut for seconds is found again late.
COMPLETE_S: Final = 90.0


@dataclass
class Open:
    host: str
    arrived_s: float
    started_s: float = 0.0


@dataclass(eq=False)
class Flows:
    """run() starts an application on each of two hosts, again whenever it dies."""

    world: World
    seed: int
    open: dict[int, Open] = field(default_factory=dict)
    finished: int = 0
    arrived: int = 0
    abandoned: int = 0
    restarted: int = 0
    longest_wait_s: float = 0.0
    longest_s: float = 0.0
    degraded: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    apps: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    killed: set[int] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _target: tuple[str, int] = ("", 0)

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        sock = self.world.spaces["sink"].socket()
        sock.bind((self.world.ip("sink"), 0))
        self._target = sock.getsockname()
        self._server = await asyncio.start_server(self._receive, sock=sock, limit=1 << 18)
        for index, member in enumerate(self.world.of("agent")):
            tasks.create_task(self._keep(member, index), name=f"flows of {member.name}")

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A head with the size, so many bytes, a head back; again and again."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                (left,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                while left:
                    data = await reader.read(min(left, 1 << 18))
                    if not data:
                        return
                    left -= len(data)
                writer.write(_HEAD.pack(0))
                await writer.drain()
        writer.transport.abort()

    async def _keep(self, member: Member, index: int) -> None:
        lives = 0
        while not self.over.is_set():
            first = (lives * 2 + index) * 10_000_000
            seed = drawn(self.seed, "app", member.name, lives).randrange(1 << 31)
            words = [
                sys.executable, "-m", "benchmarks.chaos.flow_app", self._target[0],
                str(self._target[1]), str(RATE_PER_S), str(seed), str(first), str(MAX_WAIT_S * 4),
            ]  # fmt: skip
            env = python_env() | {"INTENTD_SOCKET": str(member.run_dir / "agent.sock")}
            with (self.world.logs / f"app-{member.name}.log").open("ab") as log:
                app = await asyncio.create_subprocess_exec(
                    *self.world.spaces[member.name].command(words),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env=env,
                    cwd=ROOT,
                )
            self.apps[member.name] = app
            assert app.stdout is not None
            try:
                async for line in app.stdout:
                    self._note(member.name, line.decode().split())
            finally:
                if app.returncode is None:
                    app.kill()
                await app.wait()
            gone = [number for number, flow in self.open.items() if flow.host == member.name]
            for number in gone:  # they died with their application
                del self.open[number]
            self.abandoned += len(gone)
            if app.pid not in self.killed and not self.over.is_set():
                self.wrong.append(f"the application on {member.name} ended: {app.returncode}")
                return
            lives += 1

    def _note(self, host: str, words: list[str]) -> None:
        now, kind, number = self.world.clock.now(), words[0], int(words[1])
        if kind == "a":
            self.arrived += 1
            self.open[number] = Open(host, now)
            return
        flow = self.open.get(number)
        if flow is None:  # told as stalled
            return
        if kind == "s":
            flow.started_s = now
            waited_s = float(words[2])
            self.degraded[words[3]] += 1
            if self.world.clock.paused_since(flow.arrived_s):
                return
            self.longest_wait_s = max(self.longest_wait_s, waited_s)
            if waited_s > MAX_WAIT_S + START_SLACK_S:
                self.wrong.append(f"flow {number} of {host} waited {waited_s:.1f} s: {words[3]}")
        elif kind == "b":
            self.restarted += 1
            flow.arrived_s, flow.started_s = now, 0.0
        else:
            self.finished += 1
            self.longest_s = max(self.longest_s, now - flow.arrived_s)
            del self.open[number]

    def stalled(self) -> list[str]:
        """Flows that should have started, or ended, by now; each is told once."""
        now, found = self.world.clock.now(), []
        for number, flow in list(self.open.items()):
            waiting = not flow.started_s
            since_s = now - (flow.arrived_s if waiting else flow.started_s)
            if since_s > (MAX_WAIT_S + START_SLACK_S + 20 if waiting else COMPLETE_S):
                what = "started" if waiting else "ended"
                found.append(f"flow {number} of {flow.host} has not {what} after {since_s:.0f} s")
                del self.open[number]
        return found

    async def finish(self) -> list[str]:
        """No more arrivals matter; those under way end."""
        until_s = self.world.clock.now() + COMPLETE_S
        waited = set(self.open)
        while self.world.clock.now() < until_s:
            if not waited & set(self.open):
                break
            await asyncio.sleep(0.2)
        left = waited & set(self.open)
        self.over.set()
        for app in self.apps.values():
            if app.returncode is None:
                app.kill()
        return [f"flow {number} never ended" for number in left]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
