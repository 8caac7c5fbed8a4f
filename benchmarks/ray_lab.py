"""A scheduler daemon with a Ray cluster of its own, for benchmarks; everything ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intentd.core.jobs.policy import JobsPolicy, to_plain
from intentd.core.messages import NumberedPolicy
from intentd.daemons.gpu import ray_cluster
from intentd.daemons.kit.codec import encode

ROOT = Path(__file__).parents[1]
OVER = ("finished", "failed", "cancelled")
START_S = 400.0


class Lab:
    """nodes: name -> GPUs. settings: more lines of the daemon's file. policy: None is FIFO."""

    def __init__(
        self, nodes: dict[str, int], settings: str = "", policy: JobsPolicy | None = None
    ) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="intentd-lab-"))
        self.state = self.base / "state"
        self.state.mkdir(mode=0o700)
        self.work = self.base / "work"
        self.work.mkdir()
        rows = ", ".join(f'{{ name = "{name}", gpus = {gpus} }}' for name, gpus in nodes.items())
        self.config = self.base / "gpu.toml"
        self.config.write_text(
            f'state_dir = "{self.state}"\nrun_dir = "{self.base}/run"\n'
            '[controller]\nenabled = false\n[status]\nbind = "127.0.0.1:0"\n'
            f'[jobs]\nexecutor = "ray"\nnodes = [{rows}]\n{settings}\n'
        )
        if policy is not None:
            kept = NumberedPolicy("jobs", 1, 1, 0.0, to_plain(policy))
            (self.state / "gpu-policy-jobs.msgpack").write_bytes(encode(kept))
        source = ROOT / "src"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(source),
            "RUNTIME_DIRECTORY": str(self.base / "run"),
        }
        self.job_environment = {"PYTHONPATH": str(source)}
        self.process: subprocess.Popen[bytes] | None = None
        self.gpus = sum(nodes.values())

    async def start(self, *, whole: bool = True) -> dict[str, Any]:
        """Starts the daemon; whole: waits until every GPU can be used."""
        with (self.base / "log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220  milliseconds
                [sys.executable, "-m", "intentd.daemons.gpu.daemon", "--config", str(self.config)],
                env=self.environment,
                stderr=log,
            )
        async with asyncio.timeout(START_S):
            while True:
                with contextlib.suppress(OSError):
                    status = await self.ask("status")
                    usable = status["detail"]["gpus"]["usable"] == self.gpus
                    if not whole or (usable and status["detail"]["ray"]["connected"]):
                        return status
                if self.process.poll() is not None:
                    raise SystemExit((self.base / "log").read_text()[-2000:])
                await asyncio.sleep(0.05)

    def end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60)
            self.process = None

    def close(self, *, keep: bool = False) -> None:
        """Ends daemon and cluster, and removes what they wrote."""
        with contextlib.suppress(Exception):
            self.end(signal.SIGKILL)
        ray_cluster.stop(self.state / "ray")
        if not keep:
            shutil.rmtree(self.base, ignore_errors=True)

    async def ask(self, command: str, /, **args: Any) -> dict[str, Any]:
        reader, writer = await asyncio.open_unix_connection(
            str(self.base / "run" / "gpu.admin.sock"), limit=1 << 26
        )
        try:
            writer.write(json.dumps({"command": command, "args": args}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(await reader.readline())
        finally:
            writer.close()
        if not answer["ok"]:
            raise SystemExit(f"{command}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def submit(
        self, name: str, work_gpu_s: float, *, arguments: tuple[str, ...] = (), **fields: Any
    ) -> dict[str, Any]:
        """A job of ``ray_job`` in a directory of its own, named so."""
        where = self.work / name
        where.mkdir()
        job = Path(__file__).with_name("ray_job.py")
        return await self.ask(
            "jobs.submit",
            name=name,
            command=[sys.executable, "-S", str(job), repr(work_gpu_s), *arguments],
            workdir=str(where),
            env=self.job_environment,
            **({} if "demand" in fields else {"size_gpu_s": work_gpu_s}),
            **fields,
        )

    async def jobs(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = (await self.ask("jobs.list", limit=10_000))["jobs"]
        return rows

    async def until(self, holds: Callable[[list[dict[str, Any]]], bool], timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while not holds(await self.jobs()):  # noqa: ASYNC110  another process is asked
                await asyncio.sleep(0.2)

    def runs(self, name: str) -> list[tuple[str, int, float, float, int]]:
        """(kind, epoch, wall clock, work done, GPUs), as the job noted them."""
        path = self.work / name / "runs"
        rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(r[0], int(r[1]), float(r[2]), float(r[3]), int(r[4])) for r in rows]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
