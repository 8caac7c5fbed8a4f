"""Carries the scheduler's orders out on a Ray cluster, through a driver in a child process.

The daemon never imports ray. A driver that ends or falls silent is replaced; the new one is told
every run that should be there and says what became of each. A start that the old one had not
confirmed is not repeated: what is not there is lost, and ordered anew under the next epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from intentd.core.errors import ConfigError
from intentd.core.jobs.job import Job, Start, State, Stop
from intentd.core.stats import percentile
from intentd.daemons.gpu import ray_cluster, supervisor
from intentd.daemons.gpu.executors import PASSED_ON, NodeSink
from intentd.daemons.kit.clock import Clock

_log = logging.getLogger(__name__)

LINE_BYTES: Final = 1 << 24
SILENT_S: Final = 60.0  # a driver that says nothing for so long is replaced
BACKOFF_S: Final = (1.0, 30.0)
LOCAL_BACKOFF_S: Final = 4.0  # at most, where the cluster is one that this host starts again
UNSENT_S: Final = 60.0  # a start that no driver could take is given back
EFFECTS: Final = 4096
OPEN_OUTPUTS: Final = 64


@dataclass(frozen=True, slots=True)
class RaySettings:
    """local: name -> simulated GPUs of a cluster on this host; empty: address is of another's."""

    address: str
    namespace: str
    local: dict[str, int]
    directory: Path
    temp_dir: str
    work_dir: Path
    object_store_bytes: int
    heartbeat_s: float
    lease_s: float
    lost_after_s: float


@dataclass(slots=True)
class _Run:
    """message: its start, until a driver took it and ended, or confirmed it. began: it is known
    to have."""

    devices: dict[str, list[int]]
    message: dict[str, Any] | None
    decided_s: float
    ordered_s: float
    sent: bool = False
    began: bool = False
    stop: tuple[int, float] | None = None
    stopped_s: float = 0.0


class RayExecutor:
    """Implements executors.Executor. base: where outputs lie."""

    def __init__(
        self,
        base: Path,
        sink: NodeSink,
        clock: Clock,
        settings: RaySettings,
        max_output_bytes: int,
        known: list[str],
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("jobs.executor", "ray", "the package ray: intentd[gpu-ray]")
        self._base, self._sink, self._clock, self._settings = base, sink, clock, settings
        self._max_output_bytes = max_output_bytes
        self._nodes = set(known)
        self._runs: dict[tuple[int, int], _Run] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._connected = False
        self._heard_s = clock.now()
        self._why = "starting"
        self._restarts = 0
        self._closing = False
        self._outputs: dict[int, supervisor.Output] = {}
        self._effects: dict[str, deque[float]] = {
            kind: deque(maxlen=EFFECTS) for kind in ("start", "stop")
        }
        self._task: asyncio.Task[None] | None = None
        base.mkdir(mode=0o700, exist_ok=True)
        settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Starts to keep a driver. After the runs of the store were given to ``recover``."""
        self._task = tasks.create_task(self._keep_a_driver(), name="ray driver")

    # -- orders --------------------------------------------------------------------------------

    def start(self, order: Start, job: Job) -> None:
        devices = {node: list(indices) for node, indices in order.devices.items()}
        spec = job.spec
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment = {
            **passed,
            **spec.env,
            "INTENTD_GPUS": str(order.gpus),
            "INTENTD_JOB_ID": str(order.job),
            "INTENTD_EPOCH": str(order.epoch),
            "INTENTD_TRIALS": str(spec.trials),
        }
        if spec.array_index >= 0:
            environment["INTENTD_ARRAY_INDEX"] = str(spec.array_index)
        message = {
            "kind": "start",
            "job": order.job,
            "epoch": order.epoch,
            "devices": devices,
            "order": {
                "command": list(spec.command),
                "env": environment,
                "workdir": spec.workdir or str(self._settings.work_dir / str(order.job)),
                "make_workdir": not spec.workdir,
            },
        }
        run = _Run(devices, message, job.run_since_s, self._clock.now())
        self._runs[(order.job, order.epoch)] = run
        if self._connected:
            self._say(message)
            run.sent = True

    def stop(self, order: Stop) -> None:
        run = self._runs.get((order.job, order.epoch))
        if run is None:
            return
        run.stop, run.stopped_s = (int(order.signal), order.grace_s), time.time()
        if self._connected:
            self._say(
                {
                    "kind": "stop",
                    "job": order.job,
                    "epoch": order.epoch,
                    "signal": int(order.signal),
                    "grace_s": order.grace_s,
                }
            )

    def recover(self, job: Job) -> None:
        devices = {node: list(indices) for node, indices in job.devices.items()}
        began = job.state is not State.STARTING
        run = _Run(devices, None, job.run_since_s, self._clock.now(), sent=True, began=began)
        self._runs[(job.id, job.epoch)] = run

    def poll(self) -> None:
        now = self._clock.now()
        if self._process is not None and now - self._heard_s > SILENT_S:
            _log.error("driver is silent", extra={"silent_s": now - self._heard_s})
            self._kill_driver()
        for (job, epoch), run in list(self._runs.items()):
            if not run.sent and now - run.ordered_s > UNSENT_S:
                del self._runs[(job, epoch)]
                self._sink.lost(job, epoch, f"no Ray cluster: {self._why}", began=False)

    def forget(self, job: int) -> None:
        self._outputs.pop(job, None)
        shutil.rmtree(self._base / str(job), ignore_errors=True)

    def output(self, job: int) -> Path | None:
        return self._base / str(job) / "output.log"

    async def close(self) -> None:
        """The driver goes; slots and runs stay."""
        self._closing = True
        if self._connected:
            self._say({"kind": "bye"})
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), 2.0)
        self._kill_driver()
        if self._task is not None:
            self._task.cancel()

    def unready(self) -> list[str]:
        return [] if self._connected else [f"ray: {self._why}"]

    def status(self) -> dict[str, Any]:
        """``effect_s``: from a decision to its process, from a stop to its signal."""

        def of(values: deque[float]) -> dict[str, float] | None:
            ordered = sorted(values)
            if not ordered:
                return None
            return {f"p{p}": round(percentile(ordered, p / 100), 5) for p in (50, 90, 99)}

        return {
            "connected": self._connected,
            "why": "" if self._connected else self._why,
            "driver": self._process.pid if self._process is not None else 0,
            "driver_restarts": max(0, self._restarts - 1),
            "nodes": sorted(self._nodes),
            "effect_s": {kind: of(values) for kind, values in self._effects.items()},
        }

    # -- the driver ----------------------------------------------------------------------------

    async def _keep_a_driver(self) -> None:
        wait_s, most_s = BACKOFF_S
        if self._settings.local:
            most_s = LOCAL_BACKOFF_S
        while not self._is_closing():
            began = self._clock.now()
            try:
                await self._drive()
            except (OSError, subprocess.SubprocessError) as error:
                self._why = f"cannot start the driver: {error}"
            self._connected, self._writer, self._process = False, None, None
            self._lose_unconfirmed()
            if self._is_closing():
                return
            long_lived = self._clock.now() - began > 60.0
            wait_s = BACKOFF_S[0] if long_lived else min(2 * wait_s, most_s)
            _log.warning("driver ended", extra={"why": self._why, "again_in_s": wait_s})
            await self._clock.sleep(wait_s)

    async def _drive(self) -> None:
        """One driver, from its start to its end."""
        settings = self._settings
        address = settings.address
        if settings.local:
            address = await asyncio.get_running_loop().run_in_executor(None, self._local_cluster)
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **ray_cluster.QUIET}
        if settings.local:
            environment.update(ray_cluster.token(settings.directory))
        with theirs, (settings.directory / "driver.log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "intentd.daemons.gpu.ray_driver",
                str(theirs.fileno()),
                str(os.getpid()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                env=environment,
            )
        self._restarts += 1
        self._heard_s = self._clock.now()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        hello = {
            "kind": "hello",
            "term": self._next_term(),
            "address": address,
            "namespace": settings.namespace,
            "heartbeat_s": settings.heartbeat_s,
            "lease_s": settings.lease_s,
            "lost_after_s": settings.lost_after_s,
            "nodes": sorted(self._nodes),
        }
        self._say(hello)
        self._why = "connecting"
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                self._hear(json.loads(line))
        self._connected = False
        self._writer.close()
        self._kill_driver()
        status = await self._process.wait()
        if self._why in ("", "connecting"):
            self._why = f"the driver ended with status {status}"

    def _local_cluster(self) -> str:
        """On a thread: the address of the local cluster, started if it does not run."""
        settings = self._settings
        wanted = {
            "nodes": settings.local,
            "temp_dir": settings.temp_dir,
            "object_store_bytes": settings.object_store_bytes,
        }
        known = ray_cluster.running(settings.directory)
        if known is None:
            _log.info("starting a local Ray cluster", extra={"nodes": len(settings.local)})
            module = ["-m", "intentd.daemons.gpu.ray_cluster", str(settings.directory)]
            with (settings.directory / "cluster.log").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, *module, json.dumps(wanted)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # it outlives the daemon, as a unit of its own would
                )
            while (known := ray_cluster.running(settings.directory)) is None:
                if process.poll() is not None:
                    raise OSError(f"no local cluster: see {settings.directory}/cluster.log")
                time.sleep(0.1)
        return str(known["address"])

    def _is_closing(self) -> bool:
        return self._closing

    def _kill_driver(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    def _next_term(self) -> int:
        """Larger than any before, also of daemons before this one."""
        path = self._settings.directory / "term"
        try:
            before = int(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            before = 0
        term = max(before + 1, time.time_ns() // 1_000_000)
        supervisor.write_whole(path, term)
        return term

    def _say(self, message: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(json.dumps(message).encode("ascii") + b"\n")

    # -- what it says --------------------------------------------------------------------------

    def _hear(self, message: dict[str, Any]) -> None:
        self._heard_s = self._clock.now()
        kind = message["kind"]
        if kind in ("started", "exited", "lost", "progress"):
            self._hear_of_run(kind, message)
        elif kind == "output":
            self._write_output(int(message["job"]), message["text"])
        elif kind == "signalled":
            job, _, epoch = message["run"].partition(".")
            run = self._runs.get((int(job), int(epoch)))
            if run is not None and run.stopped_s:
                self._effects["stop"].append(max(0.0, message["at_s"] - run.stopped_s))
        elif kind == "connected":
            self._connect()
        elif kind == "node_joined":
            self._nodes.add(message["node"])
            self._sink.node_joined(message["node"], int(message["gpus"]))
        elif kind == "node_lost":
            self._nodes.discard(message["node"])
            self._sink.node_lost(message["node"], message["why"])
        elif kind == "refused":
            self._why = message["why"]

    def _connect(self) -> None:
        """Everything that should be there; then what waited."""
        self._connected, self._why = True, ""
        _log.info("driver connected", extra={"runs": len(self._runs)})
        for (job, epoch), run in self._runs.items():
            if run.sent:
                self._say(
                    {
                        "kind": "adopt",
                        "job": job,
                        "epoch": epoch,
                        "devices": run.devices,
                        "began": run.began,
                        "stop": run.stop,
                    }
                )
        self._say({"kind": "all"})
        for (job, epoch), run in list(self._runs.items()):
            if run.sent:
                continue
            if run.stop is not None:
                del self._runs[(job, epoch)]
                self._sink.lost(job, epoch, "stopped before its start", began=False)
            elif run.message is not None:
                self._say(run.message)
                run.sent = True

    def _lose_unconfirmed(self) -> None:
        """Starts that the driver that ended took and did not confirm: whether they happened is
        found out by adoption, as for every other run."""
        for run in self._runs.values():
            if run.sent:
                run.message = None

    def _hear_of_run(self, kind: str, message: dict[str, Any]) -> None:
        key = (int(message["job"]), int(message["epoch"]))
        run = self._runs.get(key)
        if run is None:
            return
        if kind == "progress":
            self._sink.progress(*key, float(message["done"]), float(message["total"]))
        elif kind == "started":
            if run.message is not None:
                self._effects["start"].append(max(0.0, message["at_s"] - run.decided_s))
                run.message = None
            run.began = True
            self._sink.started(*key)
        else:
            del self._runs[key]
            if kind == "exited":
                self._sink.exited(*key, int(message["status"]), str(message["detail"]))
            else:
                self._sink.lost(*key, str(message["why"]), began=bool(message["began"]))

    def _write_output(self, job: int, text: str) -> None:
        output = self._outputs.get(job)
        try:
            if output is None:
                while len(self._outputs) >= OPEN_OUTPUTS:
                    self._outputs.pop(next(iter(self._outputs))).close()
                where = self._base / str(job)
                where.mkdir(mode=0o700, exist_ok=True)
                path = where / "output.log"
                output = supervisor.Output(path, self._max_output_bytes // 2)
                self._outputs[job] = output
            output.write(text.encode("latin-1"))
        except OSError as error:
            _log.warning("output not kept", extra={"job": job, "error": str(error)})
