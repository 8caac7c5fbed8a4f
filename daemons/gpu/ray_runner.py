"""The process beside a Ray slot that starts, stops and watches commands. Standard library only.

    python -I -S ray_runner.py SCRATCH_DIRECTORY     (started by the slot, from its source)

JSON lines on standard input: ``{"start": {run, command, env, workdir, make_workdir}}``,
``{"stop": [RUN, SIGNAL, GRACE_S]}``, ``{"beat": LEASE_S}``; on standard output what became of it:
``started``, ``refused``, ``signalled``, ``exited``, each with its run ("JOB.EPOCH") and the
wall-clock time, and ``output``. One command at a time. A slot is a Ray worker full of threads, in
which forking is slow and may deadlock; this process has one thread and forks in a millisecond.

Nothing a command does outlives the slot: at the end of its input, or ``LEASE_S`` seconds after the
last beat, the runner kills the command and all it left behind and ends. The command dies with the
runner (PR_SET_PDEATHSIG), the runner is the subreaper of its descendants. So a node that is cut
off or frozen ends its runs by itself before they are started elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CHUNK = 1 << 16
LINGER_S = 1.0  # how long output of what the command left behind is read


class Command:
    """One running command."""

    def __init__(self, run: str, process: subprocess.Popen[bytes], reader: int) -> None:
        self.run, self.process, self.reader = run, process, reader
        self.kill_at = 0.0
        self.ended_s = 0.0  # wall clock
        self.linger = 0.0
        self.open_output = True

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Runner:
    """scratch: a directory of its own, for working directories and progress files."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.command: Command | None = None
        self.refused: list[str] = []  # the last runs that were stopped before they started
        self._input = b""
        self._lease_at = 0.0
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._wake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # the slot's end is ours, no signal; not SIG_IGN, which commands would inherit
            signal.signal(number, lambda *_: None)
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def say(self, kind: str, run: str, **more: Any) -> None:
        line = json.dumps({"kind": kind, "run": run, "at_s": time.time(), **more})
        data = line.encode("ascii") + b"\n"
        while data:
            data = data[os.write(1, data) :]

    def loop(self) -> None:
        """Until the input ends or the lease runs out."""
        while True:
            for descriptor, _ in self._poll.poll(self._patience_ms()):
                if descriptor == self._wake:
                    os.read(self._wake, CHUNK)
                elif descriptor == 0:
                    data = os.read(0, CHUNK)
                    if not data:
                        return
                    self._hear(data)
                elif self.command is not None and descriptor == self.command.reader:
                    self._read_output(self.command)
            if self._lease_at and time.monotonic() >= self._lease_at:
                return
            if self.command is not None:
                self._watch(self.command)

    def end(self) -> None:
        """Kills whatever there is."""
        if self.command is not None:
            self.command.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.command.process.wait(10)
        self._kill_adopted()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # -- inside --------------------------------------------------------------------------------

    def _patience_ms(self) -> int | None:
        now = time.monotonic()
        times = [self._lease_at] if self._lease_at else []
        if self.command is not None:
            times += [t for t in (self.command.kill_at, self.command.linger) if t]
        return max(1, int(1000 * (min(times) - now))) if times else None

    def _hear(self, data: bytes) -> None:
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "beat" in said:
                self._lease_at = time.monotonic() + float(said["beat"])
            elif "start" in said:
                self._start(said["start"])
            elif "stop" in said:
                self._stop(*said["stop"])

    def _start(self, order: dict[str, Any]) -> None:
        run = str(order["run"])
        if self.command is not None or run in self.refused:
            why = "stopped before its start" if self.command is None else "another run is here"
            self.say("refused", run, why=why)
            return
        where = self.scratch / run
        environment = {
            **order["env"],
            "INTENTD_RUN": str(where),
            "INTENTD_PROGRESS": str(where / "progress.json"),
        }
        workdir = order["workdir"]
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            where.mkdir(mode=0o700, parents=True, exist_ok=True)
            if order["make_workdir"]:
                Path(workdir).mkdir(mode=0o700, parents=True, exist_ok=True)
            process = self._spawn(order["command"], workdir, environment, writer)
        except (OSError, subprocess.SubprocessError) as error:
            os.close(reader)
            reason = getattr(error, "strerror", None) or str(error)
            text = f"cannot run {order['command'][0]!r} in {workdir}: {reason}"
            self.say("started", run, pid=0)
            self.say("exited", run, status=127, detail=text, ended_s=time.time())
            return
        finally:
            os.close(writer)
        self.command = Command(run, process, reader)
        self._poll.register(reader, select.POLLIN)
        self.say("started", run, pid=process.pid)
        for entry in self.scratch.iterdir():  # of runs before
            if entry != where:
                shutil.rmtree(entry, ignore_errors=True)

    def _spawn(
        self, command: list[str], workdir: str, environment: dict[str, str], writer: int
    ) -> subprocess.Popen[bytes]:
        parent, libc = os.getpid(), self._libc

        def die_with_me() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        return subprocess.Popen(
            command,
            cwd=workdir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            start_new_session=True,
            preexec_fn=die_with_me,  # noqa: PLW1509  no other thread exists here
        )

    def _stop(self, run: str, number: int, grace_s: float) -> None:
        command = self.command
        if command is None or command.run != run:
            self.refused = [*self.refused[-63:], run]
            return
        if command.ended_s:
            return
        kill_at = time.monotonic() + grace_s
        first = not command.kill_at
        if first or kill_at < command.kill_at:
            command.kill_at = kill_at
        if first or number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.process.pid, number)
        self.say("signalled", run)

    def _watch(self, command: Command) -> None:
        now = time.monotonic()
        status = command.process.poll()
        if status is None:
            if command.kill_at and now >= command.kill_at:
                command.kill()
                command.kill_at = now + 1.0
            return
        if not command.linger:
            command.linger, command.ended_s, command.kill_at = now + LINGER_S, time.time(), 0.0
            command.kill()
            self._kill_adopted()
        if command.open_output and now < command.linger:
            return
        if command.open_output:
            self._close_output(command)
        self._kill_adopted()
        self.command = None
        self.say("exited", command.run, status=status, detail="", ended_s=command.ended_s)

    def _read_output(self, command: Command) -> None:
        data = os.read(command.reader, CHUNK)
        if data:
            self.say("output", command.run, text=data.decode("latin-1"))
        else:
            self._close_output(command)

    def _close_output(self, command: Command) -> None:
        command.open_output = False
        self._poll.unregister(command.reader)
        os.close(command.reader)

    def _kill_adopted(self) -> None:
        """Descendants that left the session come to the subreaper when their parents end."""
        command = self.command.process if self.command is not None else None
        for _ in range(200):
            listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            if command is not None and command.poll() is None:
                command.kill()
            left = [pid for pid in map(int, listed) if command is None or pid != command.pid]
            if not left:
                return
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.002)


def main() -> int:
    # no child of the Ray worker, which at its end would kill it before it could clear up
    if os.fork():
        os._exit(0)
    os.setsid()
    runner = Runner(Path(sys.argv[1]))
    try:
        runner.loop()
    finally:
        runner.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
