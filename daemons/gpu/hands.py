"""How the local executor touches runs: by itself (single-user), or through the launcher as each
job's owner (multi-user). Everything here may block for some milliseconds: call it on a thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from intentd.core.errors import IntentdError
from intentd.daemons.gpu import supervisor

START_TIMEOUT_S: Final = 60.0
MAX_FILE_BYTES: Final = 1 << 20
MAX_ANSWER_BYTES: Final = 1 << 20


class LauncherError(IntentdError):
    """The launcher does not answer, or refuses."""


class Hands(Protocol):
    """run: the directory of one run, base/JOB/EPOCH."""

    def launch(self, run: Path, owner: str, spec: Mapping[str, Any]) -> tuple[int, str]:
        """Status of the supervisor's first half, and what went wrong before it."""

    def stop(self, run: Path, owner: str, said: Mapping[str, Any]) -> None:
        """Leaves a stop for the supervisor and wakes it if it runs. Raises OSError."""

    def claim(self, run: Path, owner: str) -> bool:
        """Whether nobody can start this run any more. Raises OSError."""

    def same(self, pid: int, start_ticks: int) -> bool:
        """Whether that process is still the same one."""

    def kill(self, run: Path, owner: str) -> int:
        """Kills every process whose environment names this run, until there is none."""

    def forget(self, job: Path) -> None:
        """Removes a job's files."""


class OwnHands:
    """Runs are processes of the daemon's own user."""

    def launch(self, run: Path, owner: str, spec: Mapping[str, Any]) -> tuple[int, str]:
        try:
            run.mkdir(mode=0o700, parents=True, exist_ok=True)
            supervisor.write_whole(run / "run.json", dict(spec))
            (run / "run.json").chmod(0o600)
            plain = [sys.executable, "-I", "-S", supervisor.__file__, str(run)]
            status = 1
            for command in ([*scope(run), *plain], plain):
                status = _run(command)
                if status in (0, supervisor.CLAIMED, supervisor.CANNOT_RUN) or command == plain:
                    break
        except (OSError, subprocess.SubprocessError) as error:
            return -1, str(error)
        return status, ""

    def stop(self, run: Path, owner: str, said: Mapping[str, Any]) -> None:
        run.mkdir(parents=True, exist_ok=True)
        supervisor.write_whole(run / "stop.json", dict(said))

    def claim(self, run: Path, owner: str) -> bool:
        run.mkdir(parents=True, exist_ok=True)
        return supervisor.claim(run, "daemon")

    def same(self, pid: int, start_ticks: int) -> bool:
        try:
            return supervisor.start_ticks(pid) == start_ticks
        except OSError:
            return False

    def kill(self, run: Path, owner: str) -> int:
        return kill_marked(run)

    def forget(self, job: Path) -> None:
        shutil.rmtree(job, ignore_errors=True)


class LauncherHands:
    """Runs are processes of their owners, started by ``intentd-gpu-launcher`` at a socket."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def launch(self, run: Path, owner: str, spec: Mapping[str, Any]) -> tuple[int, str]:
        try:
            return int(self._ask("start", run, owner, spec=dict(spec))["status"]), ""
        except (OSError, LauncherError) as error:
            return -1, str(error)

    def stop(self, run: Path, owner: str, said: Mapping[str, Any]) -> None:
        self._ask("stop", run, owner, said=dict(said))

    def claim(self, run: Path, owner: str) -> bool:
        return bool(self._ask("claim", run, owner)["claimed"])

    def same(self, pid: int, start_ticks: int) -> bool:
        with contextlib.suppress(OSError, LauncherError):
            return bool(self._call({"do": "same", "pid": pid, "start_ticks": start_ticks})["same"])
        return True  # not known: the pidfd says when it ends

    def kill(self, run: Path, owner: str) -> int:
        with contextlib.suppress(OSError, LauncherError):
            return int(self._ask("kill", run, owner)["killed"])
        return 0

    def forget(self, job: Path) -> None:
        with contextlib.suppress(OSError, LauncherError, KeyError):
            owner = pwd.getpwuid(job.lstat().st_uid).pw_name
            self._call({"do": "forget", "job": int(job.name), "owner": owner})

    def _ask(self, do: str, run: Path, owner: str, **more: Any) -> dict[str, Any]:
        place = {"job": int(run.parent.name), "epoch": int(run.name), "owner": owner}
        return self._call({"do": do, **place, **more})

    def _call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(START_TIMEOUT_S)
            try:
                link.connect(str(self._path))
                link.sendall(json.dumps(dict(request)).encode() + b"\n")
                data = b""
                while not data.endswith(b"\n") and len(data) < MAX_ANSWER_BYTES:
                    piece = link.recv(1 << 16)
                    if not piece:
                        break
                    data += piece
            except OSError as error:
                raise LauncherError(f"launcher at {self._path}: {error}") from None
        try:
            answer: dict[str, Any] = json.loads(data)
        except ValueError:
            raise LauncherError(f"launcher at {self._path}: closed without an answer") from None
        if "error" in answer:
            raise LauncherError(f"launcher: {answer['error']}")
        return answer


def scope(run: Path) -> list[str]:
    """The command that gives a run a scope of its own, so that the end of the daemon's unit does
    not take it along; nothing where systemd does not run, or may not be asked."""
    job, epoch = run.parent.name, run.name
    unit = f"--unit=intentd-job-{job}-{epoch}"
    command = ["systemd-run", "--scope", "--quiet", "--collect", unit]
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemd-run") is None:
        return []
    if os.geteuid() == 0:
        return [*command, "--slice=intentd-jobs.slice", "--"]
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    if own and Path(own, "systemd", "private").exists():
        return [command[0], "--user", *command[1:], "--"]
    return []  # a system unit's user: KillMode=process lets its jobs go on


def read_own(path: Path, limit: int = MAX_FILE_BYTES, offset: int = 0) -> bytes:
    """A piece of a file of a job (``open_own``). Raises OSError."""
    descriptor = open_own(path)
    try:
        return os.pread(descriptor, limit, offset)
    finally:
        os.close(descriptor)


def open_own(path: Path) -> int:
    """A descriptor for reading a file of a job. Its owner may have put anything there: only a plain
    file that belongs to whom the job's directory belongs to is opened. Raises OSError.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)
        above = (where for where in path.parents if where.parent.name == "jobs")
        mine = all(where.lstat().st_uid == found.st_uid for where in above)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or not mine:
            raise PermissionError(f"{path}: not a plain file of the job's owner")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_json(path: Path) -> dict[str, Any]:
    """Raises OSError, ValueError."""
    try:
        value = json.loads(read_own(path))
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not an object")
    return value


def _run(command: list[str]) -> int:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    return done.returncode


def kill_marked(run: Path) -> int:
    """See Hands.kill; of what this user may read and signal."""
    mark = f"INTENTD_RUN={run}".encode()
    killed = 0
    for _ in range(10):
        found = False
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                if mark in environment:
                    os.kill(int(entry.name), signal.SIGKILL)
                    found, killed = True, killed + 1
            except OSError:
                continue
        if not found:
            break
    return killed
