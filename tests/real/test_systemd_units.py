"""The units: exposure, syntax, and every daemon at work under its own restrictions (the launcher's
are those of its own tests)."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from intentd.agent.client import Flows
from intentd.daemons.ctl.daemon import daemon_class
from intentd.daemons.kit.admin import AdminClient

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "systemd").glob("*.service"))
CALENDAR_S = 60

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to drop privileges")


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def settings(unit: Path) -> dict[str, str]:
    lines = [line for line in unit.read_text().splitlines() if "=" in line and line[0] != "#"]
    return dict(line.split("=", 1) for line in lines)


def test_there_is_a_unit_for_every_daemon() -> None:
    assert [unit.stem for unit in UNITS] == [
        "intentd-agent", "intentd-controller", "intentd-gpu-launcher", "intentd-gpu",
        "intentd-proxy", "intentd-ray", "intentd-sequencer",
    ]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_no_outage_is_so_long_that_a_daemon_stays_down(unit: Path) -> None:
    own = settings(unit)
    assert own["Restart"] == "on-failure"
    assert own["StartLimitIntervalSec"] == "0"
    assert int(own["RestartSec"]) >= 2
    if unit.stem != "intentd-ray":
        assert own["RestartPreventExitStatus"] == "2"


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_exposure_is_at_most_two(unit: Path) -> None:
    result = tool(
        "systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(unit)
    )
    match = re.search(r"exposure level for .*: ([0-9.]+)", result.stdout)
    assert match, result.stdout + result.stderr
    # The launcher becomes other users, and what it starts keeps its sandbox.
    most = 4.3 if unit.stem == "intentd-gpu-launcher" else 2.0
    assert float(match.group(1)) <= most
    assert result.returncode == 0 or most > 2.0


@needs_systemd
def test_multi_user_mode_tightens_the_scheduler(tmp_path: Path) -> None:
    """The unit with its drop-in, as systemd would merge them."""
    unit = (ROOT / "systemd" / "intentd-gpu.service").read_text().split("[Install]")[0]
    more = (ROOT / "systemd" / "intentd-gpu-multi-user.conf").read_text().split("[Service]")[1]
    merged = tmp_path / "intentd-gpu.service"
    merged.write_text(unit + more)
    result = tool("systemd-analyze", "security", "--offline=true", "--no-pager", str(merged))
    match = re.search(r"exposure level for .*: ([0-9.]+)", result.stdout)
    assert match, result.stdout + result.stderr
    assert float(match.group(1)) <= 1.4


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_unit_is_well_formed(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/intentd/bin/", "/bin/true "))
    result = tool("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy))
    complaints = [line for line in result.stderr.splitlines() if unit.name in line]
    assert not complaints


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_units_say_what_they_must(unit: Path) -> None:
    role = unit.stem.removeprefix("intentd-")
    found = settings(unit)
    if role in ("gpu", "gpu-launcher"):  # jobs go on when these stop
        assert found["KillMode"] == "process"
        assert "PrivateTmp" not in found
        assert "RemoveIPC" not in found
    if role == "gpu-launcher":
        assert found["CapabilityBoundingSet"] == (
            "CAP_SETUID CAP_SETGID CAP_CHOWN CAP_FOWNER CAP_FSETID"
        )
    if role in ("gpu-launcher", "ray"):  # not our frame
        return
    assert found["Type"] == "notify"
    assert found["ExecReload"].endswith(f"intentctl reload --confirm {role}")
    assert found["WatchdogSec"]
    most = int(found["FileDescriptorStoreMax"])
    assert f"FDSTORE={most}" in unit.read_text()
    longest_s = daemon_class(role).config_model().drain_timeout_s
    assert float(found["TimeoutStopSec"]) >= longest_s + 20
    assert float(found["TimeoutStartSec"]) > daemon_class(role).config_model().reload.window_s
    if role == "agent":
        assert most >= daemon_class(role).config_model().socket.max_connections + 8
    assert found["CapabilityBoundingSet"] == ("CAP_NET_ADMIN" if role == "agent" else "")
    assert found["AmbientCapabilities"] == found["CapabilityBoundingSet"]
    assert ("ExecStopPost" in found) == (role == "agent")
    # libzmq's threads set again what they inherit, and RestrictRealtime= would refuse real time.
    real_time = {
        "CPUSchedulingPolicy": "rr",
        "CPUSchedulingPriority": "10",
        "LimitRTTIME": "10s",
    }
    hurried = role in ("agent", "sequencer")
    assert {name: found.get(name) for name in real_time} == (
        real_time if hurried else dict.fromkeys(real_time)
    )
    assert "CPUSchedulingResetOnFork" not in found
    assert ("RestrictRealtime" in found) != hurried


@needs_root
@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers")
def test_user_and_directories(tmp_path: Path) -> None:
    for name, command in (
        ("sysusers", ["systemd-sysusers"]),
        ("tmpfiles", ["systemd-tmpfiles", "--create"]),
    ):
        folder = tmp_path / "usr" / "lib" / f"{name}.d"
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "systemd" / f"intentd.{name}.conf", folder / "intentd.conf")
        (tmp_path / "etc").mkdir(exist_ok=True)
        result = tool(*command, f"--root={tmp_path}", f"{folder}/intentd.conf")
        assert result.returncode == 0, result.stderr
    assert "intentd:" in (tmp_path / "etc" / "passwd").read_text()
    assert (tmp_path / "run" / "intentd").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "etc" / "intentd").stat().st_mode & 0o777 == 0o750


DROPPED = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs")


def another_user_can_read() -> bool:
    """Whether this Python and this tree lie where an unprivileged user may read them.

    If not (a Python under /root), the daemon stays uid 0, but without any capability.
    """
    code = f"import os; os.listdir({sys.base_prefix!r}); open({str(ROOT / 'setup.cfg')!r}).close()"
    user = ("--reuid=65534", "--regid=65534", "--clear-groups")
    return tool(*DROPPED, *user, sys.executable, "-c", code).returncode == 0


def scheduled(found: dict[str, str]) -> list[str]:
    """The command that gives a program its unit's real-time scheduling; nothing if it has none."""
    if "CPUSchedulingPolicy" not in found:
        return []
    chrt = ["chrt", "--rr", found["CPUSchedulingPriority"]]
    return chrt if shutil.which("chrt") and tool(*chrt, "true").returncode == 0 else []


def ready(manager: socket.socket) -> bool:
    try:
        return b"READY=1" in manager.recv(4096)
    except TimeoutError:
        return False


DAEMONS = {
    "toy": ("agent", [str(Path(__file__).with_name("kit_daemon.py"))]),
    "controller": ("controller", ["-c", "from intentd.controller.daemon import main; main()"]),
    "sequencer": (
        "sequencer", ["-c", "from intentd.daemons.sequencer.daemon import main; main()"],
    ),
    "agent": ("agent", ["-c", "from intentd.agent.daemon import main; main()"]),
    "proxy": ("proxy", ["-c", "from intentd.proxy.daemon import main; main()"]),
    "gpu": ("gpu", ["-c", "from intentd.daemons.gpu.daemon import main; main()"]),
}  # fmt: skip


def ask(url: str, document: Any = None) -> str:
    data = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(url, data, method="GET" if data is None else "PUT")
    with urllib.request.urlopen(request, timeout=CALENDAR_S) as answer:
        return str(answer.read().decode())


def a_flow_has_its_turn(run: Path, _status: dict[str, Any]) -> None:
    with Flows(str(run / "agent.sock")).open(size=1000, peer="127.0.0.1") as flow:
        assert flow.degraded == ""


def a_policy_is_set_and_shown(run: Path, status: dict[str, Any]) -> None:
    admin = AdminClient(run / "controller.admin.sock")
    given = admin.call("policy_set", document={"daily": "2.50"}, application="prompts")
    assert given["issued"]["number"] == 1
    assert "Policies" in ask(f"http://{status['status_address']}/console/policies")


def a_job_runs(run: Path, _status: dict[str, Any]) -> None:
    admin = AdminClient(run / "gpu.admin.sock")
    job = admin.call("jobs.submit", command=["true"], size_gpu_s=1)["job"]
    deadline = time.monotonic() + CALENDAR_S
    while (shown := admin.call("jobs.show", job=job))["state"] != "finished":
        assert time.monotonic() < deadline, shown
        time.sleep(0.05)


def an_object_is_kept(_run: Path, status: dict[str, Any]) -> None:
    url = f"http://{status['detail']['api']}/v1/cache"
    put = {"object": {"prompt": "Open when?", "response": "9 to 17."}, "source": "desk"}
    ask(url, {**put, "keys": [["prompt", "Open when?"]]})
    assert "9 to 17" in ask(f"{url}?source=desk")


# What a daemon is for, in small, under its unit's restrictions.
WORK = {
    "agent": a_flow_has_its_turn,
    "controller": a_policy_is_set_and_shown,
    "gpu": a_job_runs,
    "proxy": an_object_is_kept,
}


@needs_root
@needs_systemd
@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemon_runs_under_the_units_restrictions(name: str, tmp_path: Path) -> None:
    """No capabilities, another user where possible, read-only files, no writable code, seccomp."""
    role, program = DAEMONS[name]
    writable = [tmp_path / "state", tmp_path / "run"]
    another = another_user_can_read()
    for folder in writable:
        folder.mkdir()
        if another:
            os.chown(folder, 65534, 65534)
    for parent in (tmp_path, *tmp_path.parents):
        if str(parent) != "/" and parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)
    mounts = "".join(f"mount --bind {folder} {folder} && " for folder in writable)
    mounts += "mount -o remount,bind,ro / && "
    mounts += "".join(f"mount -o remount,bind,rw {folder} && " for folder in writable)
    privileges = " ".join(DROPPED)
    if another:
        privileges += " --reuid=65534 --regid=65534 --clear-groups"
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    (tmp_path / "notify").chmod(0o777)
    manager.settimeout(0.2)
    unit = ROOT / "systemd" / f"intentd-{role}.service"
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "STATE_DIRECTORY": str(writable[0]),
        "RUNTIME_DIRECTORY": str(writable[1]),
        f"INTENTD_{role.upper()}__STATUS__BIND": "127.0.0.1:0",
    }
    environ |= {
        "controller": {"INTENTD_CONTROLLER__HUB__BIND": "tcp://127.0.0.1:0"},
        "sequencer": {
            "INTENTD_SEQUENCER__TURNS__BIND": "tcp://127.0.0.1:0",
            "INTENTD_SEQUENCER__FIN__BIND": "127.0.0.1:0",
        },
        "agent": {"INTENTD_AGENT__FIN__BIND": "127.0.0.1:0"},
        "proxy": {"INTENTD_PROXY__LISTEN__BIND": "127.0.0.1:0"},
        "gpu": {"INTENTD_GPU__JOBS__NODES": '[{name = "here", gpus = 1}]'},
    }[name if name != "toy" else "sequencer"]
    if role != "controller":
        environ[f"INTENTD_{role.upper()}__CONTROLLER__ENDPOINT"] = "tcp://127.0.0.1:9"
    real_time = scheduled(settings(unit))
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*real_time, "unshare", "--mount", "--propagation=private", "sh", "-c",
             f'{mounts}exec {privileges} "$@"', "sh",
             sys.executable, str(Path(__file__).with_name("sandbox.py")), str(unit),
             sys.executable, *program],
            env=environ, stderr=stderr,
        )  # fmt: skip
    try:
        while not ready(manager):
            assert process.poll() is None, log.read_text()
        status = AdminClient(writable[1] / f"{role}.admin.sock").call("status")
        assert status["role"] == role
        kernel = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^CapEff:\s+0+$", kernel, re.M)
        assert re.search(r"^NoNewPrivs:\s+1$", kernel, re.M)
        assert re.search(r"^Seccomp:\s+2$", kernel, re.M)
        threads = [int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir()]
        policies = {os.sched_getscheduler(thread) for thread in threads}
        assert policies == {os.SCHED_RR if real_time else os.SCHED_OTHER}
        if name in WORK:
            WORK[name](writable[1], status)
        process.terminate()
        assert process.wait(CALENDAR_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        manager.close()
    assert "sandbox: no_new_privs" in log.read_text()
