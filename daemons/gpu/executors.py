"""What carries out the scheduler's orders: real processes of this host, or only time.

An executor says what happened by three calls of its ``Sink`` and never decides. ``local`` starts a
supervisor per run (see ``supervisor``) and finds it again after the daemon's own death; ``sim``
lets a run take as long as its books say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

from intentd.core.jobs.job import Job, Start, State, Stop
from intentd.daemons.gpu.hands import Hands, LauncherError, OwnHands, read_json
from intentd.daemons.kit.clock import Clock

_log = logging.getLogger(__name__)

BACKOFF_S: Final = 2.0
# what reading a file that is its job's own may end in
NONSENSE: Final = (OSError, ValueError, KeyError, TypeError, OverflowError)
PASSED_ON: Final = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "LD_LIBRARY_PATH")


class Sink(Protocol):
    """Who hears what became of runs."""

    def started(self, job: int, epoch: int) -> None: ...

    def exited(self, job: int, epoch: int, status: int, detail: str) -> None: ...

    def lost(self, job: int, epoch: int, why: str, *, began: bool) -> None: ...

    def progress(self, job: int, epoch: int, done: float, total: float) -> None: ...


class NodeSink(Sink, Protocol):
    """Who hears of nodes too, from executors whose nodes come and go."""

    def node_joined(self, node: str, gpus: int) -> None: ...

    def node_lost(self, node: str, why: str) -> None: ...


class Executor(Protocol):
    """Orders in. None of these blocks; none raises for what a job does."""

    def start(self, order: Start, job: Job) -> None: ...

    def stop(self, order: Stop) -> None: ...

    def recover(self, job: Job) -> None:
        """A run that was on its way when the daemon died; tells the sink where it stands."""

    def poll(self) -> None:
        """Called every second or so."""

    def forget(self, job: int) -> None:
        """The job's records are gone: remove its files."""

    def output(self, job: int) -> Path | None:
        """The file its output goes to (see ``supervisor.Output``), which need not be there."""

    async def close(self) -> None:
        """Runs go on."""


class SimExecutor:
    """left_s: seconds a job still needs as it is."""

    def __init__(
        self, tasks: asyncio.TaskGroup, clock: Clock, sink: Sink, left_s: Callable[[Job], float]
    ) -> None:
        self._tasks, self._clock, self._sink, self._left_s = tasks, clock, sink, left_s
        self._runs: dict[tuple[int, int], asyncio.Task[None]] = {}

    def start(self, order: Start, job: Job) -> None:
        self._sink.started(order.job, order.epoch)
        self._play(job)

    def recover(self, job: Job) -> None:
        if job.state is State.CHECKPOINTING:
            self._sink.exited(job.id, job.epoch, -signal.SIGTERM, "")
        else:
            self._sink.started(job.id, job.epoch)
            self._play(job)

    def _play(self, job: Job) -> None:
        key = (job.id, job.epoch)

        async def run() -> None:
            await self._clock.sleep(self._left_s(job))
            self._runs.pop(key, None)
            self._sink.exited(*key, 0, "")

        self._runs[key] = self._tasks.create_task(run(), name=f"job {job.id}")

    def stop(self, order: Stop) -> None:
        task = self._runs.pop((order.job, order.epoch), None)
        if task is not None:
            task.cancel()
            self._sink.exited(order.job, order.epoch, -order.signal, "")

    def poll(self) -> None:
        """Simulated jobs report nothing."""

    def forget(self, job: int) -> None:
        """There are no files."""

    def output(self, job: int) -> Path | None:
        return None

    async def close(self) -> None:
        for task in self._runs.values():
            task.cancel()


class LocalExecutor:
    """base: where runs and outputs lie. offsets: node -> index of its first GPU on this host."""

    def __init__(
        self,
        base: Path,
        sink: Sink,
        offsets: dict[str, int],
        max_output_bytes: int,
        hands: Hands | None = None,
    ) -> None:
        self._hands: Hands = hands or OwnHands()
        self._owners: dict[int, str] = {}
        self._base, self._sink, self._offsets = base, sink, offsets
        self._max_output_bytes = max_output_bytes
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="start")
        self._loop = asyncio.get_running_loop()
        self._watched: dict[tuple[int, int], int] = {}  # run -> pidfd of its supervisor
        self._seen: dict[tuple[int, int], int] = {}
        if hands is None:
            base.mkdir(mode=0o700, exist_ok=True)

    def run_dir(self, job: int, epoch: int) -> Path:
        return self._base / str(job) / str(epoch)

    # -- orders --------------------------------------------------------------------------------

    def start(self, order: Start, job: Job) -> None:
        spec = self._run_spec(order, job)
        self._owners[order.job] = owner = job.spec.owner
        run = self.run_dir(order.job, order.epoch)
        future = self._pool.submit(self._hands.launch, run, owner, spec)
        future.add_done_callback(
            lambda done: self._in_loop(self._launched, order.job, order.epoch, done.result())
        )

    def stop(self, order: Stop) -> None:
        said = {"signal": int(order.signal), "grace_s": order.grace_s, "purpose": order.purpose}
        self._pool.submit(self._pass_on, (order.job, order.epoch), said)

    def _pass_on(self, key: tuple[int, int], said: dict[str, Any]) -> None:
        """On a thread: the disk may be slow."""
        try:
            self._hands.stop(self.run_dir(*key), self._owners.get(key[0], ""), said)
        except (OSError, LauncherError) as error:
            _log.error("cannot pass a stop on", extra={"job": key[0], "error": str(error)})
        self._in_loop(self._wake, key)

    def _wake(self, key: tuple[int, int]) -> None:
        descriptor = self._watched.get(key)
        if descriptor is not None:  # another user's process the launcher wakes
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(descriptor, signal.SIGUSR1)

    def recover(self, job: Job) -> None:
        run = self.run_dir(job.id, job.epoch)
        self._owners[job.id] = job.spec.owner
        if (run / "exit.json").exists():
            self._ended(job.id, job.epoch)
            return
        if self._hands.claim(run, job.spec.owner):
            # whoever was to start it finds the claim taken and does nothing
            self._sink.lost(job.id, job.epoch, "the daemon ended before it started", began=False)
            return
        self._watch(job.id, job.epoch)

    def poll(self) -> None:
        for job, epoch in list(self._watched):
            path = self.run_dir(job, epoch) / "progress.json"
            try:
                stamp = path.lstat().st_mtime_ns
                if stamp == self._seen.get((job, epoch)):
                    continue
                said = read_json(path)
                done, total = float(said["done"]), float(said["total"])
            except NONSENSE:
                continue  # the job's own file: nothing yet, or nonsense
            self._seen[(job, epoch)] = stamp
            self._sink.progress(job, epoch, done, total)

    def forget(self, job: int) -> None:
        self._owners.pop(job, None)
        self._pool.submit(self._hands.forget, self._base / str(job))

    def output(self, job: int) -> Path | None:
        return self._base / str(job) / "output.log"

    async def close(self) -> None:
        await self._loop.run_in_executor(None, self._pool.shutdown)
        for descriptor in self._watched.values():
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        self._watched.clear()

    # -- inside --------------------------------------------------------------------------------

    def _run_spec(self, order: Start, job: Job) -> dict[str, Any]:
        run = self.run_dir(order.job, order.epoch)
        indices = [
            self._offsets[node] + index for node, own in order.devices.items() for index in own
        ]
        text = ",".join(map(str, indices))
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        spec = job.spec
        environment = {
            **passed,
            **spec.env,
            "CUDA_VISIBLE_DEVICES": text,
            "INTENTD_GPU_INDICES": text,
            "INTENTD_GPUS": str(len(indices)),
            "INTENTD_JOB_ID": str(order.job),
            "INTENTD_EPOCH": str(order.epoch),
            "INTENTD_RUN": str(run),
            "INTENTD_PROGRESS": str(run / "progress.json"),
            "INTENTD_TRIALS": str(spec.trials),
        }
        if spec.array_index >= 0:
            environment["INTENTD_ARRAY_INDEX"] = str(spec.array_index)
        return {
            "job": order.job,
            "epoch": order.epoch,
            "command": list(spec.command),
            "env": environment,
            "workdir": spec.workdir or str(self._base / str(order.job)),
            "output": str(self._base / str(order.job) / "output.log"),
            "max_output_bytes": self._max_output_bytes // 2,
        }

    def _in_loop(self, call: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the next daemon recovers
            self._loop.call_soon_threadsafe(call, *args)

    def _launched(self, job: int, epoch: int, outcome: tuple[int, str]) -> None:
        status, error = outcome
        run = self.run_dir(job, epoch)
        if status == 0:
            self._watch(job, epoch)
        elif (run / "exit.json").exists():
            self._ended(job, epoch)
        elif self._claimed(job, run):
            why = f"cannot start a supervisor: {error or f'status {status}'}"
            _log.error("start failed", extra={"job": job, "epoch": epoch, "error": why})
            self._loop.call_later(BACKOFF_S, lambda: self._sink.lost(job, epoch, why, began=False))
        else:
            self._watch(job, epoch)

    def unsupervised(self, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of these runs, (job, epoch), those for which no living process stands."""
        return [run for run in runs if not self._lives(*run)]

    def _lives(self, job: int, epoch: int) -> bool:
        try:
            who = read_json(self.run_dir(job, epoch) / "claim")
            return (job, epoch) in self._watched and self._hands.same(
                who["pid"], who["start_ticks"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _claimed(self, job: int, run: Path) -> bool:
        """Whether nobody can start this run any more. A disk that takes no claim takes no
        supervisor's either."""
        try:
            return self._hands.claim(run, self._owners.get(job, ""))
        except (OSError, LauncherError):
            return True

    def _watch(self, job: int, epoch: int) -> None:
        """Hear of the supervisor's end by its pidfd; the start time tells it from a stranger."""
        try:
            who = read_json(self.run_dir(job, epoch) / "claim")
            if who["who"] == "daemon":
                self._sink.lost(job, epoch, "never started", began=False)
                return
            descriptor = os.pidfd_open(who["pid"])
        except (OSError, ValueError):
            self._ended(job, epoch)
            return
        if not self._hands.same(who["pid"], who["start_ticks"]):
            os.close(descriptor)
            self._ended(job, epoch)
            return
        self._watched[(job, epoch)] = descriptor
        self._loop.add_reader(descriptor, self._supervisor_gone, job, epoch)
        self._sink.started(job, epoch)

    def _supervisor_gone(self, job: int, epoch: int) -> None:
        descriptor = self._watched.pop((job, epoch))
        self._seen.pop((job, epoch), None)
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
        self._ended(job, epoch)

    def _ended(self, job: int, epoch: int) -> None:
        run = self.run_dir(job, epoch)
        with contextlib.suppress(Exception):
            self.poll_one(job, epoch)
        try:
            said = read_json(run / "exit.json")
            status, detail = int(said["status"]), str(said["detail"])
        except NONSENSE:
            future = self._pool.submit(self._hands.kill, run, self._owners.get(job, ""))
            future.add_done_callback(
                lambda done: self._in_loop(self._gone, job, epoch, done.result())
            )
            return
        self._sink.exited(job, epoch, status, detail)

    def _gone(self, job: int, epoch: int, killed: int) -> None:
        why = f"its supervisor is gone ({killed} processes of it ended)"
        self._sink.lost(job, epoch, why, began=True)

    def poll_one(self, job: int, epoch: int) -> None:
        """The last report of a run that ended."""
        said = read_json(self.run_dir(job, epoch) / "progress.json")
        self._sink.progress(job, epoch, float(said["done"]), float(said["total"]))
