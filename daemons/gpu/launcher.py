"""intentd-gpu-launcher: starts jobs as their owners. Root, small, standard library only.

    intentd-gpu-launcher [--user intentd] [--base /var/lib/intentd/jobs] [--min-uid 1000]
                         [--socket /run/intentd/launcher.sock]

intentd-gpu runs without privileges; what must be done as a job's owner it asks for here, one JSON
object a line and connection: start, stop, claim, kill, forget, same. Only its user and root are
heard (peer credentials). Nothing runs as root, and nobody below --min-uid owns a job.

A job's directory belongs to its owner and, for reading, to the daemon's group: BASE root 0751,
BASE/JOB owner 2750, BASE/JOB/EPOCH alike. The launcher writes nothing into them itself: a child
that became the owner does, so that no link somebody put there can lead root astray.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import grp
import json
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

MAX_REQUEST: Final = 16 << 20
TIMEOUT_S: Final = 60.0
FIELDS: Final = ("job", "epoch", "command", "env", "workdir", "max_output_bytes")
_OWNER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}\Z")
HERE: Final = Path(__file__).resolve().parent


class Refused(Exception):  # noqa: N818  what the daemon is told, no fault of this program
    """A request that is not granted."""


class Launcher:
    """One request after the other, each on a thread; state is on the disk alone."""

    def __init__(self, base: Path, daemon_uid: int, daemon_gid: int, min_uid: int) -> None:
        self.base, self.min_uid = base, min_uid
        self.daemon_uid, self.daemon_gid = daemon_uid, daemon_gid

    def prepare(self) -> None:
        self.base.mkdir(mode=0o751, parents=True, exist_ok=True)
        os.chown(self.base, 0, self.daemon_gid)
        self.base.chmod(0o751)

    def serve(self, listener: socket.socket) -> None:
        """For ever."""
        while True:
            link, _ = listener.accept()
            link.settimeout(TIMEOUT_S)
            threading.Thread(target=self._answer, args=(link,), daemon=True).start()

    def _answer(self, link: socket.socket) -> None:
        with link:
            try:
                request = _receive(link)  # first, or the close would cut the answer off
                credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                peer = struct.unpack("3i", credentials)
                if peer[1] not in (0, self.daemon_uid):
                    raise Refused(f"uid {peer[1]} is not the scheduler's")
                answer = self.handle(request)
            except (Refused, OSError, subprocess.SubprocessError) as error:
                answer = {"error": str(error)}
            except (ValueError, KeyError, TypeError) as error:
                answer = {"error": f"bad request: {error!r:.200}"}
            with contextlib.suppress(OSError):
                link.sendall(json.dumps(answer).encode() + b"\n")

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises Refused."""
        do = request.get("do")
        if do == "same":
            return {"same": _same(int(request["pid"]), int(request["start_ticks"]))}
        account = self._account(request.get("owner"))
        job = _number(request, "job")
        if do == "forget":
            return self._forget(self.base / str(job), account)
        run = self.base / str(job) / str(_number(request, "epoch"))
        if do == "start":
            return self._start(run, account, request["spec"])
        said = request.get("said")
        works: dict[str, Callable[[], dict[str, Any]]] = {
            "stop": lambda: _stop(run, said),
            "claim": lambda: {"claimed": _supervisor().claim(run, "daemon")},
            "kill": lambda: {"killed": _kill(run)},
        }
        if do not in works:
            raise Refused(f"{do!r:.40}: not one of start, stop, claim, kill, forget, same")
        self._directories(run, account)
        return self._as(account, works[do])

    def _account(self, name: object) -> pwd.struct_passwd:
        if not isinstance(name, str) or not _OWNER.match(name):
            raise Refused(f"owner {name!r:.60}: not a user's name")
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            raise Refused(f"owner {name}: no such user on this host") from None
        if account.pw_uid < max(1, self.min_uid):
            raise Refused(f"owner {name}: uid {account.pw_uid} is below {self.min_uid}")
        return account

    def _directories(self, run: Path, account: pwd.struct_passwd) -> None:
        """The job's own by root, in a base that is root's; what lies in it by its owner."""
        job = run.parent
        with contextlib.suppress(FileExistsError):
            job.mkdir(mode=0o700)
            os.chown(job, account.pw_uid, self.daemon_gid)
            job.chmod(0o2750)
        if job.lstat().st_uid != account.pw_uid:
            raise Refused(f"job {job.name}: belongs to somebody else")

        def below() -> dict[str, Any]:
            run.mkdir(mode=0o2750, exist_ok=True)
            return {}

        self._as(account, below)

    def _start(self, run: Path, account: pwd.struct_passwd, spec: object) -> dict[str, Any]:
        if not isinstance(spec, dict) or set(FIELDS) - set(spec):
            raise Refused(f"spec: expected {', '.join(FIELDS)}")
        self._directories(run, account)
        own = {
            "HOME": account.pw_dir,
            "USER": account.pw_name,
            "LOGNAME": account.pw_name,
            "SHELL": account.pw_shell,
        }
        whole = {name: spec[name] for name in FIELDS}
        whole["env"] = {"PATH": os.defpath, **dict(spec["env"]), **own}
        whole["workdir"] = spec["workdir"] or str(run.parent)
        whole["output"] = str(run.parent / "output.log")
        whole["output_mode"] = 0o640
        command = [sys.executable, "-I", "-S", __file__, "--become", account.pw_name, str(run)]
        done = subprocess.run(
            [*_scope(run), *command],
            input=json.dumps(whole).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": os.defpath},
            cwd="/",
            start_new_session=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        text = done.stderr.decode("utf-8", "replace").strip()
        if done.returncode not in (0, 3, 4):
            raise Refused(f"start: status {done.returncode} {text[-300:]}")
        return {"status": done.returncode}

    def _forget(self, job: Path, account: pwd.struct_passwd) -> dict[str, Any]:
        if job.is_symlink() or not job.is_dir():
            return {}
        if job.lstat().st_uid != account.pw_uid:
            raise Refused(f"job {job.name}: belongs to somebody else")

        def empty() -> dict[str, Any]:
            for entry in job.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
            return {}

        self._as(account, empty)
        job.rmdir()
        return {}

    def _as(self, account: pwd.struct_passwd, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Does the work in a child that is that user. Raises Refused with what went wrong."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _become(account, self.daemon_gid)
                said = work()
            except BaseException as error:  # noqa: BLE001  the child tells it and ends
                said = {"error": f"as {account.pw_name}: {error}"}
            with contextlib.suppress(OSError):
                os.write(writer, json.dumps(said).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            data = pipe.read(MAX_REQUEST)
        os.waitpid(child, 0)
        answer: dict[str, Any] = json.loads(data)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer


def _become(account: pwd.struct_passwd, gid: int | None = None) -> None:
    """This process is that user from now on: groups, then group, then user, then checked."""
    os.initgroups(account.pw_name, account.pw_gid)
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    if os.getresuid() != (account.pw_uid,) * 3 or os.geteuid() == 0:
        os._exit(70)
    os.umask(0o027)


def become_and_supervise(owner: str, run: Path) -> NoReturn:
    """The second half of a start: already in the run's scope, still root."""
    spec = json.loads(sys.stdin.buffer.read(MAX_REQUEST))
    _become(pwd.getpwnam(owner))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: what its owner runs stays its owner
    supervisor = _supervisor()
    supervisor.write_whole(run / "run.json", spec)
    (run / "run.json").chmod(0o600)
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.execv(sys.executable, [sys.executable, "-I", "-S", supervisor.__file__, str(run)])  # noqa: S606  no shell is wanted


def _supervisor() -> Any:
    """The supervisor's module, from beside this file: with -I there is no package path."""
    sys.path.insert(0, str(HERE))
    try:
        return __import__("supervisor")
    finally:
        sys.path.remove(str(HERE))


def _stop(run: Path, said: object) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise Refused("said: expected a table")
    supervisor = _supervisor()
    stop = {"signal": int(said["signal"]), "grace_s": float(said["grace_s"])}
    supervisor.write_whole(run / "stop.json", {**stop, "purpose": str(said["purpose"])[:40]})
    with contextlib.suppress(OSError, ValueError, KeyError):
        who = json.loads((run / "claim").read_text(encoding="utf-8"))
        if who["who"] == "supervisor" and _same(int(who["pid"]), int(who["start_ticks"])):
            os.kill(int(who["pid"]), signal.SIGUSR1)
    return {}


def _same(pid: int, start_ticks: int) -> bool:
    try:
        return bool(_supervisor().start_ticks(pid) == start_ticks)
    except (OSError, IndexError, ValueError):
        return False


def _kill(run: Path) -> int:
    mark = f"INTENTD_RUN={run}".encode()
    killed = 0
    for _ in range(10):
        found = False
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
                    found, killed = True, killed + 1
        if not found:
            break
    return killed


def _scope(run: Path) -> list[str]:
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemd-run") is None:
        return []
    unit = f"--unit=intentd-job-{run.parent.name}-{run.name}"
    options = ["--scope", "--quiet", "--collect", "--slice=intentd-jobs.slice", unit]
    return ["systemd-run", *options, "--"]


def _number(request: dict[str, Any], name: str) -> int:
    value = request.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**53:
        raise Refused(f"{name} {value!r:.40}: not a number > 0")
    return value


def _receive(link: socket.socket) -> dict[str, Any]:
    data = bytearray()
    while not data.endswith(b"\n"):
        piece = link.recv(1 << 16)
        if not piece or len(data) > MAX_REQUEST:
            raise Refused("expected one line of JSON")
        data += piece
    request = json.loads(data)
    if not isinstance(request, dict):
        raise Refused("expected one JSON object")
    return request


def _listen(path: Path, gid: int) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    os.chown(path, 0, gid)
    path.chmod(0o660)
    listener.listen(64)
    return listener


def _tell_ready() -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect("\0" + address[1:] if address.startswith("@") else address)
            manager.send(b"READY=1")


def arguments() -> argparse.ArgumentParser:
    """Also what the manual page is made of."""
    parser = argparse.ArgumentParser(
        "intentd-gpu-launcher", description="Starts the jobs of intentd-gpu as their owners."
    )
    base, listener = Path("/var/lib/intentd/jobs"), Path("/run/intentd/launcher.sock")
    parser.add_argument("--user", default="intentd", help="whose requests are heard")
    parser.add_argument("--base", type=Path, default=base, help="where runs and outputs lie")
    parser.add_argument("--socket", type=Path, default=listener, help="where it listens")
    parser.add_argument("--min-uid", type=int, default=1000, help="smallest uid of an owner")
    return parser


def main() -> int:
    if len(sys.argv) == 4 and sys.argv[1] == "--become":
        become_and_supervise(sys.argv[2], Path(sys.argv[3]))
    options = arguments().parse_args()
    if os.geteuid() != 0:
        print("intentd-gpu-launcher: must run as root", file=sys.stderr)
        return 2
    try:
        account = pwd.getpwnam(options.user)
    except KeyError:
        print(f"intentd-gpu-launcher: --user {options.user}: no such user", file=sys.stderr)
        return 2
    launcher = Launcher(options.base, account.pw_uid, account.pw_gid, options.min_uid)
    launcher.prepare()
    listener = _listen(options.socket, grp.getgrgid(account.pw_gid).gr_gid)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    _tell_ready()
    try:
        launcher.serve(listener)
    finally:
        options.socket.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
