"""The process beside a Ray slot that starts, stops and watches commands. Standard library only.

    python -I -S ray_runner.py SCRATCH_DIRECTORY     (started by the slot, from its source)

JSON lines on standard input: ``{"start": {run, command, env, workdir, make_workdir}}``,
``{"stop": [RUN, SIGNAL, GRACE_S]}``, ``{"beat": LEASE_S}``; on standard output what became of it:
``started``, ``refused``, ``signalled``, ``exited``, each with its run ("JOB.EPOCH") and the
wall-clock time, and ``output``. One command at a time. A slot is a Ray worker full of threads, in
which forking is slow and may deadlock; this process has one thread, and forks ahead: a child waits
to become the next command, which then costs an exec.

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
import socket
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CHUNK = 1 << 16
LINGER_S = 1.0  # how long output of what the command left behind is read
HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GOING = b"+"  # a child's word that it has its order


class Child:
    """A child that waits to become a command: the fork and what comes before an exec lie behind
    it. reader: where the command's output can be read."""

    def __init__(self, libc: ctypes.CDLL) -> None:
        ours, theirs = socket.socketpair()
        self.reader, writer = os.pipe2(os.O_CLOEXEC)
        self.status: int | None = None
        self._link = ours
        parent = os.getpid()
        try:
            self.pid = os.fork()
        except OSError:
            ours.close()
            os.close(self.reader)
            raise
        finally:
            if os.getpid() == parent:
                os.close(writer)
                theirs.close()
        if self.pid == 0:
            try:
                ours.close()
                self._wait_for_order(theirs, writer, parent, libc)
            finally:
                os._exit(127)

    def become(self, command: list[str], workdir: str, environment: dict[str, str]) -> None:
        """Returns when the command runs. Raises OSError, ConnectionError if the child was gone
        before it had its order; then there is no child any more."""
        order = {"command": command, "workdir": workdir, "env": environment}
        answer = b""
        with self._link as link, contextlib.suppress(ConnectionError):
            link.sendall(json.dumps(order).encode("ascii") + b"\n")
            while piece := link.recv(CHUNK):
                answer += piece
        if answer == GOING:  # and then the exec closed the other end
            return
        self.discard()
        if not answer:
            raise ConnectionError(0, "it was killed")
        raise OSError(0, answer.removeprefix(GOING).decode("utf-8", "replace"))

    def poll(self) -> int | None:
        """The status once it has ended, as subprocess says it."""
        if self.status is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def discard(self) -> None:
        """Ends one that did not become a command."""
        self._link.close()
        os.close(self.reader)
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    @staticmethod
    def _wait_for_order(link: socket.socket, writer: int, parent: int, libc: ctypes.CDLL) -> None:
        """In the child. Returns only if there is no order, or it cannot be carried out."""
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            return
        signal.set_wakeup_fd(-1)
        for number in (*HEARD, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        line = b""
        while not line.endswith(b"\n"):
            piece = link.recv(CHUNK)
            if not piece:
                return
            line += piece
        order = json.loads(line)
        link.sendall(GOING)
        try:
            os.chdir(order["workdir"])
            os.execvpe(order["command"][0], order["command"], order["env"])  # noqa: S606  no shell
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            link.sendall(reason.encode("utf-8", "replace"))


class Command:
    """One running command."""

    def __init__(self, run: str, process: Child) -> None:
        self.run, self.process, self.reader = run, process, process.reader
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
        self._next: Child | None = None
        self._input = b""
        self._lease_at = 0.0
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._wake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in HEARD:
            # the slot's end is ours, no signal
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
        self._prepare()
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
        if self._next is not None:
            self._next.discard()
            self._next = None
        if self.command is not None:
            self.command.kill()
            until = time.monotonic() + 10
            while self.command.process.poll() is None and time.monotonic() < until:
                time.sleep(0.002)
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
        try:
            where.mkdir(mode=0o700, parents=True, exist_ok=True)
            if order["make_workdir"]:
                Path(workdir).mkdir(mode=0o700, parents=True, exist_ok=True)
            process = self._launch(order["command"], workdir, environment)
        except OSError as error:
            text = f"cannot run {order['command'][0]!r} in {workdir}: {error.strerror or error}"
            self.say("started", run, pid=0)
            self.say("exited", run, status=127, detail=text, ended_s=time.time())
            self._prepare()
            return
        self.command = Command(run, process)
        self._poll.register(process.reader, select.POLLIN)
        self.say("started", run, pid=process.pid)
        self._prepare()
        for entry in self.scratch.iterdir():  # of runs before
            if entry != where:
                shutil.rmtree(entry, ignore_errors=True)

    def _prepare(self) -> None:
        """Without a process to spare there is none: the next start will say so."""
        if self._next is None:
            with contextlib.suppress(OSError):
                self._next = Child(self._libc)

    def _launch(self, command: list[str], workdir: str, environment: dict[str, str]) -> Child:
        child, self._next = self._next or Child(self._libc), None
        try:
            child.become(command, workdir, environment)
        except ConnectionError:  # somebody killed it while it waited
            child = Child(self._libc)
            child.become(command, workdir, environment)
        return child

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
                os.kill(command.pid, signal.SIGKILL)
            kept = {child.pid for child in (command, self._next) if child is not None}
            left = [pid for pid in map(int, listed) if pid not in kept]
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
