"""The members of a campaign: the daemons as processes, each kept alive as systemd would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError
from intentd.testbed.netns import Namespace
from intentd.testbed.playing import python_env

MODULES: Final = {
    "controller": "intentd.controller.daemon",
    "sequencer": "intentd.daemons.sequencer.daemon",
    "agent": "intentd.agent.daemon",
    "gpu": "intentd.daemons.gpu.daemon",
    "proxy": "intentd.proxy.daemon",
}
# As RestartSec= and its steps in a unit, shorter: a campaign has many deaths.
BACKOFF_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
STEADY_S: Final = 10.0
STOP_TIMEOUT_S: Final = 20.0
EXIT_USAGE: Final = 2
LOOK_S: Final = 0.5
LATE_S: Final = 0.25
PAUSE_S: Final = 3.0
T = TypeVar("T")
CLOCK_SOURCE: Final = Path(__file__).with_name("clock.c")


def build_clock(where: Path) -> str:
    """The library that lies about the time of day; "" where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return ""
    made = where / "clock.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-o", made, CLOCK_SOURCE], check=True, timeout=60
    )
    return str(made)


@dataclass(eq=False)
class Member:
    """One daemon. hold: not started again while set. offset_s: of its monotonic clock at starts.

    clock: library to preload, "" for none.
    """

    role: str
    name: str
    space: Namespace | None
    base: Path
    log: Path
    process: asyncio.subprocess.Process | None = None
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    starts: int = 0
    gave_up: str = ""
    frozen: bool = False
    exits: list[int] = field(default_factory=list)
    offset_s: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    newest: dict[str, list[int]] = field(default_factory=dict)
    stopping: bool = False
    clock: str = ""

    def __post_init__(self) -> None:
        self.hold.set()

    @property
    def label(self) -> str:
        return f"{self.role}-{self.name}"

    @property
    def config(self) -> Path:
        return self.base / f"{self.role}.toml"

    @property
    def run_dir(self) -> Path:
        return self.base / "run"

    @property
    def state_dir(self) -> Path:
        return self.base / "state"

    @property
    def clock_file(self) -> Path:
        return self.base / "clock"

    @property
    def pid(self) -> int:
        """0 while it does not run."""
        process = self.process
        return process.pid if process is not None and process.returncode is None else 0

    async def ask(self, command: str, /, *, timeout_s: float = 5.0, **args: Any) -> dict[str, Any]:
        """Raises AdminUnreachableError or AdminRefusedError."""
        client = AdminClient(self.run_dir / f"{self.role}.admin.sock", timeout_s=timeout_s)
        return await client.acall(command, **args)

    async def status(self) -> dict[str, Any] | None:
        """None while it does not answer, or another process of it still does."""
        if not self.pid or self.frozen:
            return None
        with contextlib.suppress(AdminUnreachableError, AdminRefusedError):
            found = await self.ask("status", timeout_s=3.0)
            return found if found["pid"] == self.pid else None
        return None

    def command(self) -> list[str]:
        words = [sys.executable, "-m", MODULES[self.role], "--config", str(self.config)]
        if self.offset_s:
            words = ["unshare", "--time", "--monotonic", str(self.offset_s), *words]
        return self.space.command(words) if self.space is not None else words

    def set_clock(self, offset_s: int) -> None:
        """Of the wall clock, as the running process sees it at once."""
        with self.clock_file.open("r+b" if self.clock_file.exists() else "wb") as file:
            file.write(struct.pack("=q", offset_s))

    def _env(self) -> dict[str, str]:
        env = python_env() | {"RUNTIME_DIRECTORY": str(self.run_dir)} | self.environment
        if self.clock:
            if not self.clock_file.exists():
                self.set_clock(0)
            env |= {"LD_PRELOAD": self.clock, "CHAOS_CLOCK": str(self.clock_file)}
        return env

    async def keep(self) -> None:
        """Start it again whenever it ends, with growing pauses; until it is stopped."""
        deaths = 0
        while not self.stopping:
            await self.hold.wait()
            began = time.monotonic()
            with self.log.open("ab") as log:
                log.write(f"-- start {self.starts + 1}\n".encode())
                self.process = await asyncio.create_subprocess_exec(
                    *self.command(),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._env(),
                )
            self.starts += 1
            status = await self.process.wait()
            self.frozen = False
            self.exits.append(status)
            if self.stopping:
                return
            if status == EXIT_USAGE:
                self.gave_up = f"exit status {status}: systemd would not start it again"
                return
            deaths = 0 if time.monotonic() - began > STEADY_S else deaths + 1
            await asyncio.sleep(BACKOFF_S[min(deaths, len(BACKOFF_S) - 1)])

    def signal(self, number: signal.Signals) -> None:
        """Nothing happens to one that does not run."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            if number in (signal.SIGSTOP, signal.SIGCONT):
                self.frozen = number == signal.SIGSTOP

    async def stop(self) -> None:
        """In order; by SIGKILL if it does not listen."""
        self.stopping = True
        self.hold.set()
        self.signal(signal.SIGCONT)
        for number in (signal.SIGTERM, signal.SIGKILL):
            process = self.process
            if process is None or process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()


class Patience:
    """The clock that members are judged by: it stands while this process was stopped or starved.

    A machine that was paused for a minute says nothing about who was late; nor does one on which
    the relays, which every link passes and which live in this process, were late themselves.
    """

    def __init__(self) -> None:
        self.lost_s = 0.0
        self._paused_at_s = -1e9

    def now(self) -> float:
        return time.monotonic() - self.lost_s

    def paused_since(self, at_s: float) -> bool:
        """Whether there was a pause after that moment of this clock."""
        return self._paused_at_s >= at_s - LOOK_S

    async def run(self) -> None:
        """Watches how late it is itself."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(LOOK_S)
            gap_s = time.monotonic() - before - LOOK_S
            if gap_s > PAUSE_S:
                self._paused_at_s = self.now() - gap_s
            if gap_s > LATE_S:
                self.lost_s += gap_s


async def ended_in_order(work: Coroutine[Any, Any, T], enough: Callable[[], None]) -> T:
    """A first SIGTERM or SIGINT says that it is enough, a second cancels; nothing stays behind."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    asked = False

    def signalled() -> None:
        nonlocal asked
        if asked:
            task.cancel()
        asked = True
        enough()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    return await work


def drawn(seed: int, *words: object) -> random.Random:
    """Chance of its own for each purpose, so that one fault can be drawn without the others."""
    return random.Random("/".join(str(word) for word in (seed, *words)))
