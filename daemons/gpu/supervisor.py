"""One small process per run of a job; it outlives the daemon. Standard library only.

    python -I supervisor.py RUN_DIRECTORY

It reads ``run.json`` there, claims the run (``claim``, made by link(2): once, by whoever is
first), starts the command in a session of its own, keeps its output within bounds, passes a stop on
(``stop.json``, announced by SIGUSR1; killed after the grace), and leaves ``exit.json`` with the
exit status and the epoch. The process that was started returns when the command runs: status 0, 3
if the run was claimed before, 4 if the command cannot run (``exit.json`` says why).

Whatever the command leaves behind is killed at its end: the supervisor is the subreaper of its
descendants, and the command dies with it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CLAIMED, CANNOT_RUN = 3, 4
CHUNK = 1 << 16
OFFSET_DIGITS = 20
LINGER_S = 1.0  # how long output of what the command left behind is read


def start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot; with the pid it names one process."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(text.rpartition(")")[2].split()[19])


def write_whole(path: Path, value: object) -> None:
    """Readers see the old file or the new one; on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def claim(run: Path, who: str) -> bool:
    """Whether this process is the first to claim the run."""
    mine = run / f".claim.{os.getpid()}"
    me = {"who": who, "pid": os.getpid(), "start_ticks": start_ticks(os.getpid())}
    mine.write_text(json.dumps(me), encoding="utf-8")
    try:
        os.link(mine, run / "claim")
    except FileExistsError:
        return False
    finally:
        mine.unlink()
    return True


def older(path: Path) -> list[tuple[int, Path]]:
    """What an output had written before its present file, oldest first: the offset in bytes since
    the first run's start that each file begins at, and the file."""
    found = []
    for name in os.listdir(path.parent):
        number = name.removeprefix(f"{path.stem}.").removesuffix(".log")
        if name == f"{path.stem}.{number}.log" and number.isascii() and number.isdecimal():
            if len(number) == OFFSET_DIGITS:
                found.append((int(number), path.with_name(name)))
            elif number == "1":  # as versions before offsets named the one older file
                found.append((0, path.with_name(name)))
    return sorted(found)


class Output:
    """Appends to a file. A full one is renamed after the offset it begins at (``older``) and one
    such is kept, so that at most twice max_bytes are, and who reads knows which. What the disk
    refuses is dropped and counted, and the next write tries again: a full disk must not stop the
    job. The first open raises OSError."""

    def __init__(self, path: Path, max_bytes: int, mode: int = 0o600) -> None:
        self.path, self.max_bytes, self.dropped, self._mode = path, max_bytes, 0, mode
        self._file = -1
        self._open()
        before = older(path)
        self._start = before[-1][0] + before[-1][1].lstat().st_size if before else 0

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            if self._file >= 0 and self._size >= self.max_bytes:
                self._rotate()
            if self._file < 0:
                self._open()
            while left:
                written = os.write(self._file, left)
                self._size += written
                left = left[written:]
        except OSError:
            self.dropped += len(left)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self.path, flags, self._mode)
        self._size = os.fstat(self._file).st_size

    def _rotate(self) -> None:
        """Leaves no open file; the offset of the next one is known before it is there."""
        number = f"{self._start:0{OFFSET_DIGITS}}"
        full = self.path.with_name(f"{self.path.stem}.{number}.log")
        os.replace(self.path, full)
        self._start += self._size
        self.close()
        for _, path in older(self.path):
            if path != full:
                path.unlink(missing_ok=True)


class Run:
    """The command of one run, from its start to exit.json."""

    def __init__(self, run: Path, spec: dict[str, object]) -> None:
        self.run, self.spec = run, spec
        self.kill_at = 0.0
        self._stop_text = ""
        most, mode = int(str(spec["max_output_bytes"])), int(str(spec.get("output_mode", 0o600)))
        self.output = Output(Path(str(spec["output"])), most, mode)
        self.reader, self._writer = os.pipe2(os.O_CLOEXEC)
        self._wake_reader, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGHUP,
            signal.SIGUSR1,
            signal.SIGCHLD,
        ):
            signal.signal(number, lambda *_: None)  # wakes the loop; the daemon's stop is a file
        self.child = self._spawn()
        os.close(self._writer)

    def _spawn(self) -> subprocess.Popen[bytes]:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        parent = os.getpid()

        def die_with_me() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        command = self.spec["command"]
        environment = self.spec["env"]
        assert isinstance(command, list)
        assert isinstance(environment, dict)
        return subprocess.Popen(
            command,
            cwd=str(self.spec["workdir"]),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._writer,
            stderr=self._writer,
            start_new_session=True,
            preexec_fn=die_with_me,  # noqa: PLW1509  no other thread exists here
        )

    def loop(self) -> None:
        """Until the command ended; then its leftovers are killed and the end written down."""
        ready = select.poll()
        ready.register(self.reader, select.POLLIN)
        ready.register(self._wake_reader, select.POLLIN)
        linger = 0.0
        open_output = True
        self._read_stop()  # one that came before the signal handlers
        while True:
            status = self.child.poll()
            now = time.monotonic()
            if status is not None and not linger:
                linger = now + LINGER_S
                self._kill_group()
            if status is not None and (not open_output or now >= linger):
                break
            if self.kill_at and now >= self.kill_at and status is None:
                self._kill_group()
                self.kill_at = now + 1.0
            times = [t - now for t in (self.kill_at, linger) if t]
            wait_ms = max(1, int(1000 * min(times))) if times else None
            for descriptor, _ in ready.poll(wait_ms):
                if descriptor == self._wake_reader:
                    os.read(self._wake_reader, CHUNK)
                    self._read_stop()
                    continue
                data = os.read(self.reader, CHUNK)
                if data:
                    self.output.write(data)
                else:
                    open_output = False
                    ready.unregister(self.reader)
        self._kill_adopted()
        self._say(self.child.returncode, "")

    def _read_stop(self) -> None:
        try:
            text = (self.run / "stop.json").read_text(encoding="utf-8")
        except OSError:
            return
        if text == self._stop_text:
            return
        self._stop_text = text
        stop = json.loads(text)
        kill_at = time.monotonic() + float(stop["grace_s"])
        first = not self.kill_at
        if first or kill_at < self.kill_at:
            self.kill_at = kill_at
        if first or stop["signal"] == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, int(stop["signal"]))

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, signal.SIGKILL)

    def _kill_adopted(self) -> None:
        """Descendants that left the session come to the subreaper when their parents end."""
        for _ in range(100):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            if not children:
                return
            for pid in map(int, children):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.005)

    def _say(self, status: int, detail: str) -> None:
        said = {
            "epoch": self.spec["epoch"],
            "status": status,
            "detail": detail,
            "dropped_output_bytes": self.output.dropped,
            "ended_wall_s": time.time(),
        }
        for _ in range(600):  # a full disk: the daemon waits for this file, so try on
            try:
                write_whole(self.run / "exit.json", said)
                return
            except OSError:
                time.sleep(1.0)


def supervise(run: Path, tell: int) -> None:
    """The detached half. tell: a pipe that hears the first status."""
    if not claim(run, "supervisor"):
        os.write(tell, bytes([CLAIMED]))
        return
    spec = json.loads((run / "run.json").read_text(encoding="utf-8"))
    try:
        job = Run(run, spec)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        text = f"cannot run {spec['command'][0]!r} in {spec['workdir']}: {reason}"
        said = {"epoch": spec["epoch"], "status": 127, "detail": text}
        write_whole(run / "exit.json", said)
        os.write(tell, bytes([CANNOT_RUN]))
        return
    child = {"pid": job.child.pid, "start_ticks": start_ticks(job.child.pid)}
    write_whole(run / "child.json", {**child, "epoch": spec["epoch"]})
    os.write(tell, b"\0")
    os.close(tell)
    job.loop()


def main() -> int:
    run = Path(sys.argv[1])
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until Run takes it
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.chdir("/")
        try:
            supervise(run, writer)
        finally:
            os._exit(0)
    os.close(writer)
    said = os.read(reader, 1)
    return said[0] if said else 1


if __name__ == "__main__":
    sys.exit(main())
