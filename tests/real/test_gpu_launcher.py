"""The launcher as root with real users: jobs run as their owners, nobody reads another's.

It runs under its unit's restrictions: its capabilities and system calls, read-only /usr and /etc.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.gpu import launcher as launcher_module
from intentd.daemons.gpu.hands import LauncherError, LauncherHands, read_own, scope
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users"),
    pytest.mark.skipif(shutil.which("useradd") is None, reason="no useradd"),
]

DROPPED = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")
SYSTEM_PYTHON = "/usr/bin/python3"
UNIT = Path(__file__).parents[2] / "systemd" / "intentd-gpu-launcher.service"
WAIT_S = 30.0


def other_users_python() -> str:
    """A Python that any user may run: ours may lie below /root. The launcher is plain Python."""
    for python in (sys.executable, SYSTEM_PYTHON):
        nobody = (*DROPPED, "--reuid=65534", "--regid=65534", "--clear-groups")
        # by a shell, for setpriv itself still has root's rights when it looks the program up
        command = [*nobody, "sh", "-c", 'exec "$0" -c ""', python]
        with contextlib.suppress(OSError):
            if (
                subprocess.run(command, capture_output=True, timeout=30, check=False).returncode
                == 0
            ):
                return python
    pytest.skip("no Python that other users may run")


def confined() -> list[str]:
    """The command that puts a program under the unit's restrictions; empty where it cannot be."""
    if shutil.which("systemd-analyze") is None or shutil.which("setpriv") is None:
        return []
    bounds = re.search(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.M)
    assert bounds
    held = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in bounds[1].split())
    mounts = "".join(
        f"mount --bind {where} {where} && mount -o remount,bind,ro {where} && "
        for where in ("/usr", "/etc")  # ProtectSystem=full
    )
    sandbox = [sys.executable, str(Path(__file__).with_name("sandbox.py")), str(UNIT)]
    return [
        "unshare", "--mount", "--propagation=private", "sh", "-c",
        f'{mounts}exec setpriv --inh-caps=-all --bounding-set=-all,{held} --no-new-privs "$@"',
        "sh", *sandbox,
    ]  # fmt: skip


class Host:
    """Two users, a daemon's user, and a launcher; removed with the test."""

    def __init__(self, base: Path) -> None:
        self.python = other_users_python()
        mark = f"{os.getpid() % 100_000}"
        self.daemon, self.alice, self.bob = (f"itd{mark}{name}" for name in "dab")
        self.base, self.socket = base / "jobs", base / "run" / "launcher.sock"
        self.code = base / "code"
        self.code.mkdir(mode=0o755)
        for name in ("launcher.py", "supervisor.py"):
            shutil.copy(Path(launcher_module.__file__).with_name(name), self.code / name)
            (self.code / name).chmod(0o644)
        self.made: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        for name in (self.daemon, self.alice, self.bob):
            command = ["useradd", "--no-create-home", "--user-group", name]
            subprocess.run(command, check=True, timeout=60, capture_output=True)
            self.made.append(name)
        self.process = subprocess.Popen(
            [*confined(), self.python, "-I", str(self.code / "launcher.py"), "--user", self.daemon,
             "--base", str(self.base), "--socket", str(self.socket)],
        )  # fmt: skip
        wait(self.socket.exists)

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
        for name in (self.alice, self.bob):
            subprocess.run(["pkill", "-KILL", "-u", name], check=False, timeout=30)
        for name in self.made:
            subprocess.run(["userdel", name], check=False, timeout=60, capture_output=True)

    def run(self, job: int, owner: str, script: str, epoch: int = 1, **env: str) -> Path:
        run = self.base / str(job) / str(epoch)
        spec = {
            "job": job,
            "epoch": epoch,
            "command": ["sh", "-c", script],
            "env": {"PATH": os.defpath, "INTENTD_RUN": str(run), **env},
            "workdir": "",
            "max_output_bytes": 4096,
        }
        outcome = LauncherHands(self.socket).launch(run, owner, spec)
        assert outcome == (0, ""), outcome[1]
        return run

    def as_user(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        who = [*DROPPED, f"--reuid={name}", f"--regid={name}", "--init-groups", *command]
        return subprocess.run(who, capture_output=True, text=True, timeout=30, check=False)


def wait(holds: Any) -> None:
    limit = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture
def host() -> Iterator[Host]:
    """Not in pytest's own directory, which is closed to other users."""
    with tempfile.TemporaryDirectory(prefix="intentd-launcher-") as directory:
        base = Path(directory)
        base.chmod(0o755)
        made = Host(base)
        try:
            made.begin()
            yield made
        finally:
            made.end()


def test_jobs_run_as_their_owners_and_keep_their_secrets(host: Host) -> None:
    script = "id -un; pwd; echo $HOME; cat /proc/self/status | grep NoNewPrivs; sleep 60"
    run = host.run(1, host.alice, script, SECRET="alices")
    output = run.parent / "output.log"
    wait(lambda: output.exists() and "NoNewPrivs" in output.read_text())
    said = output.read_text().split("\n")
    assert said[:3] == [host.alice, str(run.parent), f"/home/{host.alice}"]
    assert said[3].split() == ["NoNewPrivs:", "1"]
    claim = json.loads((run / "claim").read_text())
    child = json.loads((run / "child.json").read_text())
    alice = pwd.getpwnam(host.alice).pw_uid
    for pid in (claim["pid"], child["pid"]):
        assert Path(f"/proc/{pid}").stat().st_uid == alice

    # another user sees neither environment nor output nor directory; the daemon reads what it must
    for path in (output, run / "run.json", Path(f"/proc/{child['pid']}/environ")):
        assert host.as_user(host.bob, "cat", str(path)).returncode != 0, path
    assert host.as_user(host.bob, "ls", str(run)).returncode != 0
    assert host.as_user(host.bob, "kill", str(child["pid"])).returncode != 0
    assert host.as_user(host.daemon, "cat", str(output)).returncode == 0
    assert host.as_user(host.daemon, "cat", str(run / "run.json")).returncode != 0
    assert b"SECRET" not in Path(f"/proc/{claim['pid']}/cmdline").read_bytes()

    hands = LauncherHands(host.socket)
    assert not hands.claim(run, host.alice)  # the supervisor has it
    assert hands.same(claim["pid"], claim["start_ticks"])
    assert not hands.same(claim["pid"], claim["start_ticks"] + 1)
    hands.stop(run, host.alice, {"signal": 15, "grace_s": 5.0, "purpose": "cancel"})
    wait((run / "exit.json").exists)
    assert json.loads((run / "exit.json").read_text())["status"] == -15
    hands.forget(run.parent)
    assert not run.parent.exists()


def test_what_the_launcher_refuses(host: Host) -> None:
    hands = LauncherHands(host.socket)
    run = host.run(1, host.alice, "true")
    wait((run / "exit.json").exists)
    assert hands.claim(host.base / "2" / "1", host.bob)  # nobody can start that any more
    status, text = hands.launch(run.parent / "2", "root", {})
    assert (status, "below 1000" in text) == (-1, True)
    for owner, expected in (
        ("no-such-user", "no such user"),
        ("../x", "not a user's name"),
        (host.bob, "belongs to somebody else"),
    ):
        with pytest.raises(LauncherError, match=expected):
            hands.stop(run, owner, {"signal": 15, "grace_s": 0, "purpose": "x"})
    with pytest.raises(LauncherError, match="not one of start"):
        hands._call({"do": "eat", "owner": host.alice, "job": 1, "epoch": 1})
    with pytest.raises(LauncherError, match=r"bad request|expected"):
        hands._call({"do": "same"})
    # only the daemon's user is heard
    asks = (
        "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "s.sendall(b'{}\\n'); print(s.recv(999).decode())"
    )
    python = host.python
    assert host.as_user(host.bob, python, "-c", asks, str(host.socket)).returncode != 0
    host.socket.chmod(0o666)
    told = host.as_user(host.bob, python, "-c", asks, str(host.socket)).stdout
    assert "is not the scheduler's" in told
    assert (
        "is not the scheduler's"
        not in host.as_user(host.daemon, python, "-c", asks, str(host.socket)).stdout
    )
    with socket.socket(socket.AF_UNIX) as link:  # nonsense does not end it
        link.connect(str(host.socket))
        link.sendall(b"\xff\n")
        assert b"error" in link.recv(1000)


def test_links_that_an_owner_leaves_lead_nowhere(host: Host, tmp_path: Path) -> None:
    first = host.run(1, host.alice, "echo alices secret")
    second = host.run(2, host.bob, "true")
    wait((first / "exit.json").exists)
    wait((second / "exit.json").exists)
    log = second.parent / "output.log"
    log.unlink(missing_ok=True)
    log.symlink_to(first.parent / "output.log")
    os.lchown(log, pwd.getpwnam(host.bob).pw_uid, -1)
    with pytest.raises(OSError, match="symbolic"):
        read_own(log)
    log.unlink()
    os.link(first.parent / "output.log", log)
    with pytest.raises(PermissionError):
        read_own(log)
    log.unlink()
    shutil.rmtree(second)
    second.symlink_to(first)  # a whole run that is another's
    with pytest.raises(PermissionError):
        read_own(second / "exit.json")
    assert b"status" in read_own(first / "exit.json")
    target = tmp_path / "precious"
    target.write_text("kept")
    (first / "stop.json").unlink(missing_ok=True)
    (first / "stop.json").symlink_to(target)
    LauncherHands(host.socket).stop(
        first, host.alice, {"signal": 15, "grace_s": 1.0, "purpose": "x"}
    )
    assert target.read_text() == "kept"


def test_a_lost_supervisor_is_cleaned_up_as_its_owner(host: Host) -> None:
    run = host.run(3, host.alice, "setsid sleep 60 & echo $!; sleep 60")
    output = run.parent / "output.log"
    wait(lambda: output.exists() and output.read_text().strip().isdecimal())
    pid = json.loads((run / "claim").read_text())["pid"]
    os.kill(pid, 9)
    assert LauncherHands(host.socket).kill(run, host.alice) >= 1
    left = int(output.read_text())
    wait(lambda: not Path(f"/proc/{left}/stat").exists() or zombie(left))


def zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def test_scopes_are_asked_for_only_where_systemd_runs() -> None:
    command = scope(Path("/x/jobs/7/3"))
    if not Path("/run/systemd/system").is_dir():
        assert command == []
    else:
        assert command[:2] == ["systemd-run", "--scope"]
        assert "--unit=intentd-job-7-3" in command


class Daemon:
    """The scheduler in multi-user mode."""

    def __init__(self, host: Host, where: Path) -> None:
        self.config = where / "gpu.toml"
        self.config.write_text(
            f'state_dir = "{where}/state"\nrun_dir = "{where}/gpu-run"\n'
            '[controller]\nenabled = false\n[status]\nbind = "127.0.0.1:0"\n'
            f'[jobs]\nlauncher = "{host.socket}"\nlauncher_dir = "{host.base}"\n'
            'nodes = [{ name = "a", gpus = 4 }]\n'
        )
        self.admin = AdminClient(where / "gpu-run" / "gpu.admin.sock", 20.0)
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "intentd.daemons.gpu.daemon", "--config", str(self.config)]
        self.process = subprocess.Popen(command)

        def answers() -> bool:
            assert self.process.poll() is None
            with contextlib.suppress(AdminUnreachableError):
                return bool(self.admin.call("status"))
            return False

        wait(answers)

    def until(self, job: int, state: str) -> dict[str, Any]:
        wait(lambda: self.admin.call("jobs.show", job=job)["state"] == state)
        return self.admin.call("jobs.show", job=job)


def test_the_scheduler_runs_jobs_as_their_owners_through_its_own_death(
    host: Host, tmp_path: Path
) -> None:
    daemon = Daemon(host, tmp_path)
    try:
        submit = {"command": ["sh", "-c", "id -un; echo $EXTRA"], "size_gpu_s": 1.0}

        def made(owner: str, **fields: Any) -> int:
            number: int = daemon.admin.call(
                "jobs.submit", **{**submit, "owner": owner, "env": {"EXTRA": owner}, **fields}
            )["job"]
            return number

        first, second = made(host.alice), made(host.bob)
        for job, owner in ((first, host.alice), (second, host.bob)):
            daemon.until(job, "finished")
            assert daemon.admin.call("jobs.logs", job=job)["text"] == f"{owner}\n{owner}\n"
        for owner in ("root", "no-such-user"):
            with pytest.raises(AdminRefusedError, match="owner"):
                made(owner)
        long = made(host.alice, command=["sleep", "60"])
        claim = host.base / str(long) / "1" / "claim"
        daemon.until(long, "running")
        daemon.process.kill()
        daemon.process.wait(10)
        before = json.loads(claim.read_text())
        daemon.start()
        shown = daemon.until(long, "running")
        assert shown["epoch"] == 1
        assert json.loads(claim.read_text()) == before
        daemon.admin.call("jobs.cancel", job=long)
        assert daemon.until(long, "cancelled")["exit_status"] == -15
    finally:
        daemon.process.terminate()
        assert daemon.process.wait(30) == 0
