"""The Ray actor that holds one GPU and runs commands there. Standard library only, and ray inside.

One detached, named actor per GPU; it is sent to the nodes by value, so that they need Ray and
Python but nothing of this project. What a call takes and gives is described at each method; every
call carries the driver's term, and calls of an earlier driver are refused. State is told whole
(``watch``), so that a lost answer costs nothing.

A run lives as long as its slot (see ``ray_runner``) and as long as the slot hears from its
cluster: from the driver, or, while there is none, from Ray's own centre (the GCS).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

PROTOCOL = 1
KEPT_BYTES = 1 << 20  # output that waits for the driver
PIECE_BYTES = 1 << 18  # of it in one answer
LINE_BYTES = 1 << 21


class StaleTermError(Exception):
    """The call comes from a driver that was replaced."""


class Slot:
    """mark: names this GPU of this cluster in the environment of its processes. runner: source
    of ``ray_runner``. lease_s: how long a run goes on without word from the cluster."""

    def __init__(self, node: str, index: int, mark: str, runner: str, lease_s: float) -> None:
        self.node, self.index, self.mark, self.lease_s = node, index, mark, lease_s
        self.term = 0
        self.run: dict[str, Any] | None = None
        self.version = 0
        self._source = runner
        self._scratch: Path | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._began: asyncio.Future[dict[str, Any]] | None = None
        self._changed = asyncio.Condition()
        self._lock = asyncio.Lock()
        self._output: deque[bytes] = deque()
        self._first = self._kept = 0
        self._heard = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gpu = ""
        self._ray_node = self._name = ""
        self._looking = False

    # -- calls ---------------------------------------------------------------------------------

    async def hello(self, term: int) -> dict[str, Any]:
        """Takes a driver's term; from now on earlier ones are refused. Gives what it is."""
        self._accept(term)
        if self._writer is None:
            await self._start_runner()
        return {
            "protocol": PROTOCOL,
            "node": self.node,
            "index": self.index,
            "gpu": self._gpu,
            "ray_node": self._ray_node,
            "pid": os.getpid(),
            "address": await asyncio.to_thread(_own_address),
            **self._state(),
        }

    async def start(self, term: int, order: dict[str, Any]) -> dict[str, Any]:
        """order: job, epoch, command, env, workdir, make_workdir. Gives {"at_s"}, the moment the
        command ran, or {"refused": why}."""
        self._accept(term)
        async with self._lock:
            self._accept(term)
            if self.run is not None and self.run["state"] in ("starting", "running"):
                return {"refused": f"run {self.run['run']} is here"}
            if self._writer is None:
                await self._start_runner()
            run = f"{order['job']}.{order['epoch']}"
            environment = {**order["env"], "INTENTD_SLOT": self.mark}
            self._began = asyncio.get_running_loop().create_future()
            self.run = {
                "run": run,
                "state": "starting",
                "stopping": False,
                "status": 0,
                "detail": "",
            }
            self._output.clear()
            self._first = self._kept = 0
            self._say({"start": {**order, "run": run, "env": environment}})
            return await self._began

    async def stop(self, term: int, run: str, number: int, grace_s: float) -> dict[str, Any]:
        """Signals the run, kills it after the grace; a run that is not here is never started
        here. Gives {"at_s"}, the moment of the signal's leaving."""
        self._accept(term)
        if self._writer is None:
            await self._start_runner()
        if self.run is not None and self.run["run"] == run:
            self.run["stopping"] = True
        self._say({"stop": [run, number, grace_s]})
        return {"at_s": time.time()}

    async def watch(self, term: int, seen: int, wait_s: float) -> dict[str, Any]:
        """The state when it differs from version ``seen``, or after wait_s."""
        self._accept(term)
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self.version != seen), wait_s)
        self._accept(term)
        return self._state()

    async def taken(self, term: int, upto: int) -> None:
        """Output before the offset has arrived."""
        self._accept(term)
        while self._output and self._first + len(self._output[0]) <= upto:
            piece = self._output.popleft()
            self._first += len(piece)
            self._kept -= len(piece)

    # -- inside --------------------------------------------------------------------------------

    def _accept(self, term: int) -> None:
        if term < self.term:
            raise StaleTermError(f"term {term}: {self.term} is the present one")
        self.term = term
        self._heard = time.monotonic()

    def _state(self) -> dict[str, Any]:
        pieces, size = [], 0
        for piece in self._output:
            if size and size + len(piece) > PIECE_BYTES:
                break
            pieces.append(piece)
            size += len(piece)
        return {
            "version": self.version,
            "run": dict(self.run) if self.run is not None else None,
            "progress": self._progress(),
            "output": (self._first, b"".join(pieces)),
            "port": _free_port(),
        }

    def _progress(self) -> list[float] | None:
        if self.run is None or self._scratch is None or self.run["state"] == "starting":
            return None
        path = self._scratch / str(self.run["run"]) / "progress.json"
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            return [float(said["done"]), float(said["total"])]
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None  # the job's own file: nothing yet, or nonsense

    async def _start_runner(self) -> None:
        import ray

        if not self._ray_node:
            context = ray.get_runtime_context()
            self._ray_node = str(context.get_node_id())
            self._name = str(context.get_actor_name())
            self._gpu = ",".join(str(x) for x in ray.get_gpu_ids())
        # what an earlier slot of this GPU left behind must not run on beside us
        await asyncio.to_thread(kill_marked, f"INTENTD_SLOT={self.mark}")
        self._scratch = Path(tempfile.mkdtemp(prefix="intentd-slot-"))
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-S", "-c", self._source, str(self._scratch)]
        with theirs:
            end = theirs.fileno()
            await asyncio.to_thread(
                subprocess.call, command, stdin=end, stdout=end, stderr=subprocess.DEVNULL
            )
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        for work in (self._hear(reader), self._beat()):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _say(self, message: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(json.dumps(message).encode("ascii") + b"\n")

    async def _beat(self) -> None:
        """Prolongs the runner's lease while the cluster is heard of."""
        writer = self._writer
        while self._writer is writer:
            silent = time.monotonic() - self._heard
            if silent > self.lease_s / 3 and not self._looking:
                self._looking = True
                task = asyncio.create_task(self._look_for_the_centre())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            self._say({"beat": max(0.0, self.lease_s - silent)})
            await asyncio.sleep(min(1.0, self.lease_s / 6))

    async def _look_for_the_centre(self) -> None:
        """Whether Ray's centre counts this slot among the living: a driver that gives a slot up
        has it struck off there first."""
        import ray

        asked = time.monotonic()
        try:
            # a list is always asked of the centre; a single name may come from a cache
            if self._name in await asyncio.to_thread(ray.util.list_named_actors):
                self._heard = max(self._heard, asked)
        except Exception:  # noqa: BLE001  whatever Ray raises, it did not answer
            return
        finally:
            self._looking = False

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        """What the runner says; its end is the end of its run."""
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                await self._heard_of(json.loads(line))
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        await asyncio.to_thread(kill_marked, f"INTENTD_SLOT={self.mark}")
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if self.run is not None and self.run["state"] in ("starting", "running"):
            self.run.update(state="lost", detail="its runner ended")
        if self._began is not None and not self._began.done():
            self._began.set_result({"refused": "its runner ended"})
        await self._change()

    async def _heard_of(self, said: dict[str, Any]) -> None:
        run = self.run
        if run is None or run["run"] != said["run"]:
            return
        match said["kind"]:
            case "started":
                run.update(state="running", started_s=said["at_s"])
                if self._began is not None and not self._began.done():
                    self._began.set_result({"at_s": said["at_s"], "pid": said["pid"]})
            case "refused":
                run["state"] = "refused"
                if self._began is not None and not self._began.done():
                    self._began.set_result({"refused": said["why"]})
            case "exited":
                run.update(
                    state="ended",
                    status=said["status"],
                    detail=said["detail"],
                    ended_s=said["ended_s"],
                )
            case "signalled":
                run["signalled_s"] = said["at_s"]
            case "output":
                data = said["text"].encode("latin-1")
                self._output.append(data)
                self._kept += len(data)
                while self._kept > KEPT_BYTES:
                    dropped = len(self._output.popleft())
                    self._first += dropped
                    self._kept -= dropped
                return  # goes along with the next answer
        await self._change()

    async def _change(self) -> None:
        async with self._changed:
            self.version += 1
            self._changed.notify_all()


def kill_marked(mark: str) -> int:
    """Kills every process whose environment holds the mark, until there is none."""
    wanted, killed = mark.encode(), 0
    for _ in range(20):
        found = False
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
                    found, killed = True, killed + 1
            except OSError:
                continue
        if not found:
            break
        time.sleep(0.005)
    return killed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
