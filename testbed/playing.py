"""Plays one trace through real processes: servers, clients, and what they wrote afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import intentd
from intentd.core.errors import IntentdError
from intentd.testbed.metrics import Samples
from intentd.testbed.netns import Namespace
from intentd.testbed.traffic import client as client_process
from intentd.testbed.traffic import server as server_process
from intentd.testbed.traffic.client import ClientPlan
from intentd.testbed.traffic.records import FlowRecord, read_records
from intentd.testbed.traffic.server import ServerPlan
from intentd.testbed.traffic.trace import TraceFlow, write_trace

READY_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0
NICE: Final = -15
REALTIME_PRIORITY: Final = 10
_START_AFTER_S: Final = 0.2

Progress = Callable[[str], None]


class PlayError(IntentdError):
    """A process of the testbed failed; the text carries its last words."""


@dataclass(frozen=True, slots=True)
class Host:
    """Where processes run: a namespace, or this very machine (namespace None)."""

    name: str
    ipv4: str = "127.0.0.1"
    ipv6: str = "::1"
    device: str = ""
    namespace: Namespace | None = None

    def command(self, argv: Sequence[str]) -> list[str]:
        return list(argv) if self.namespace is None else self.namespace.command(argv)


@dataclass(frozen=True, slots=True)
class PlayPlan:
    """One run. clients[i] plays the trace's host i; servers[j] answers as its server j.

    gates: one table a client host, see ``traffic.gate.make_gate``. sampled: names of the servers
    whose device counters are sampled.
    """

    trace: Sequence[TraceFlow]
    clients: Sequence[Host]
    servers: Sequence[Host]
    gates: Sequence[dict[str, Any]]
    mark: str = "priority"
    pool: int = 32
    mode: str = "open"
    concurrency: int = 8
    drain_s: float = 60.0
    ipv6: bool = False
    sampled: Sequence[str] = ()


@dataclass(slots=True)
class Played:
    """What came of it. start_s: the monotonic clock at time 0 of the records."""

    records: list[FlowRecord]
    start_s: float
    samples: dict[str, Samples] = field(default_factory=dict)
    summaries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stalled(self) -> list[int]:
        return sorted(index for summary in self.summaries for index in summary["stalled"])


def python_env() -> dict[str, str]:
    """The environment for our own processes: they import the intentd that runs here."""
    root = str(Path(intentd.__file__).resolve().parent.parent)
    rest = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{rest}" if rest else root}


def favour(pid: int) -> None:
    """Let a process of the testbed go before what else runs here; without the right, not.

    Flows finish in fractions of a millisecond: a queue for the processor would be all one measures.
    Everyone of the testbed gets the agent's class (SCHED_RR, as in its unit) at one priority: the
    kernel then wakes each where none of the others runs. With the agents alone in it, they take the
    processor of the server that answers the very flow they were told of (floor .60 instead of
    .28 ms); with nobody in it, turns pass late (mean 1.26 instead of 1.01 times the simulator's).
    """
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(REALTIME_PRIORITY))


def module_command(host: Host, module: str, *words: str) -> list[str]:
    return host.command([sys.executable, "-m", module, *words])


@contextlib.asynccontextmanager
async def running(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child with pipes for input and output; its errors go to log. Ended by pid at the end."""
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=dict(env) if env is not None else python_env(),
            limit=1 << 24,
        )
    favour(process.pid)
    try:
        yield process
    finally:
        await stop(process)


async def stop(process: asyncio.subprocess.Process, timeout_s: float = STOP_TIMEOUT_S) -> None:
    """End of input, then SIGTERM, then SIGKILL; waits until it is gone."""
    if process.stdin is not None:
        process.stdin.close()
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        if number is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await process.wait()


async def play(plan: PlayPlan, directory: Path, progress: Progress) -> Played:
    """Run the plan; everything written stays in directory. Raises PlayError.

    A flow that never finished is no error here: ``Played.stalled`` names it.
    """
    await asyncio.to_thread(_prepare, directory, plan.trace)
    log = directory / "processes.log"
    async with contextlib.AsyncExitStack() as stack:
        servers: list[tuple[str, int]] = []
        started: list[asyncio.subprocess.Process] = []
        for host in plan.servers:
            process, port = await _start_server(stack, plan, host, directory, log)
            started.append(process)
            servers.append((host.ipv6 if plan.ipv6 else host.ipv4, port))
        clients = [
            await _start_client(stack, plan, number, host, servers, directory, log)
            for number, host in enumerate(plan.clients)
        ]
        for process in clients:
            await _expect(process, "ready", log)
        start = time.monotonic() + _START_AFTER_S
        for process in clients:
            assert process.stdin is not None
            process.stdin.write(f"go {start!r}\n".encode())
        done = [0] * len(clients)
        total = len(plan.trace)

        async def follow(number: int) -> dict[str, Any]:
            async for words in _lines(clients[number]):
                if words[0] == "progress":
                    done[number] = int(words[1])
                    progress(f"{sum(done)}/{total} flows")
                elif words[0] == "done":
                    summary: dict[str, Any] = json.loads(" ".join(words[1:]))
                    return summary
            raise PlayError(f"client {number} ended early: {_tail(log)}")

        summaries = await asyncio.gather(*(follow(number) for number in range(len(clients))))
        for process in started:
            await stop(process)
    records = [
        record
        for number in range(len(clients))
        for record in read_records(directory / f"records-{number}.csv")
    ]
    samples = {
        name: json.loads((directory / f"samples-{name}.json").read_text()) for name in plan.sampled
    }
    return Played(records, start, samples, list(summaries))


def _prepare(directory: Path, trace: Sequence[TraceFlow]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_trace(directory / "trace.csv", trace)


async def _start_server(
    stack: contextlib.AsyncExitStack, plan: PlayPlan, host: Host, directory: Path, log: Path
) -> tuple[asyncio.subprocess.Process, int]:
    sampled = host.name in plan.sampled
    path = directory / f"server-{host.name}.json"
    server_process.write_plan(
        ServerPlan(
            addresses=[(host.ipv6 if plan.ipv6 else host.ipv4, 0)],
            device=host.device if sampled else "",
            samples_path=str(directory / f"samples-{host.name}.json") if sampled else "",
            mark=plan.mark,
        ),
        path,
    )
    process = await stack.enter_async_context(
        running(module_command(host, server_process.__name__, str(path)), log)
    )
    words = await _expect(process, "ready", log)
    return process, int(words[1])


async def _start_client(
    stack: contextlib.AsyncExitStack,
    plan: PlayPlan,
    number: int,
    host: Host,
    servers: list[tuple[str, int]],
    directory: Path,
    log: Path,
) -> asyncio.subprocess.Process:
    path = directory / f"client-{number}.json"
    client_process.write_plan(
        ClientPlan(
            gate=plan.gates[number],
            servers=servers,
            trace_path=str(directory / "trace.csv"),
            records_path=str(directory / f"records-{number}.csv"),
            host=number,
            pool=plan.pool,
            mode=plan.mode,
            concurrency=plan.concurrency,
            drain_s=plan.drain_s,
        ),
        path,
    )
    return await stack.enter_async_context(
        running(module_command(host, client_process.__name__, str(path)), log)
    )


async def _lines(process: asyncio.subprocess.Process) -> AsyncIterator[list[str]]:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        words = line.decode().split()
        if words:
            yield words


async def _expect(process: asyncio.subprocess.Process, word: str, log: Path) -> list[str]:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            async for words in _lines(process):
                if words[0] == word:
                    return words
    except TimeoutError:
        raise PlayError(f"no {word!r} within {READY_TIMEOUT_S:g} s: {_tail(log)}") from None
    raise PlayError(f"ended before {word!r}: {_tail(log)}")


def _tail(log: Path, size_bytes: int = 2000) -> str:
    return log.read_bytes()[-size_bytes:].decode(errors="replace").strip() or "(it said nothing)"
