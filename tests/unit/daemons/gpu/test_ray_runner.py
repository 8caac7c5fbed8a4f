"""The process beside a slot: what it starts, it ends; no Ray here."""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.gpu import ray_runner


class Runner:
    def __init__(self, scratch: Path) -> None:
        scratch.mkdir()
        ours, theirs = socket.socketpair()
        source = inspect.getsource(ray_runner)
        with theirs:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", source, str(scratch)],
                stdin=theirs,
                stdout=theirs,
                check=True,
                timeout=60,
            )
        ours.settimeout(60)
        self.socket = ours
        self.lines = ours.makefile("r", encoding="ascii")

    def say(self, **message: Any) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def start(self, run: str, *command: str, workdir: str = "/") -> None:
        order = {"run": run, "command": list(command), "env": {"PATH": os.environ["PATH"]}}
        self.say(start={**order, "workdir": workdir, "make_workdir": False})

    def until(self, kind: str) -> dict[str, Any]:
        for line in self.lines:
            said: dict[str, Any] = json.loads(line)
            if said["kind"] == kind:
                return said
        raise AssertionError(f"ended without {kind}")


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    it = Runner(tmp_path / "scratch")
    yield it
    it.lines.close()
    it.socket.close()


def gone(pid: int) -> bool:
    """Within ten seconds; a process that ended may wait for its parent to hear of it."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True
        if stat.rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.01)
    return False


def test_a_run_from_start_to_end_with_its_output(runner: Runner) -> None:
    runner.start("7.1", "sh", "-c", "echo out; echo $INTENTD_RUN >&2; exit 3")
    assert runner.until("started")["run"] == "7.1"
    assert runner.until("output")["text"].startswith("out\n")
    ended = runner.until("exited")
    assert (ended["run"], ended["status"]) == ("7.1", 3)
    runner.start("8.1", "no-such-program")
    assert "cannot run 'no-such-program'" in runner.until("exited")["detail"]


def test_a_stop_its_grace_and_a_stop_before_the_start(runner: Runner) -> None:
    runner.start("1.1", "sleep", "60")
    runner.until("started")
    runner.say(stop=["1.1", signal.SIGTERM, 30.0])
    assert runner.until("exited")["status"] == -signal.SIGTERM
    runner.start("2.1", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done")
    runner.until("output")
    runner.say(stop=["2.1", signal.SIGTERM, 0.1])
    assert runner.until("exited")["status"] == -signal.SIGKILL
    runner.say(stop=["3.1", signal.SIGTERM, 1.0])
    runner.start("3.1", "true")
    assert runner.until("refused")["why"] == "stopped before its start"


def test_one_command_at_a_time(runner: Runner) -> None:
    runner.start("1.1", "sleep", "60")
    runner.start("2.1", "true")
    assert runner.until("refused")["why"] == "another run is here"


def test_what_cannot_run_says_why_and_the_next_runs(runner: Runner, tmp_path: Path) -> None:
    runner.start("7.1", "no-such-program")
    assert runner.until("started")["pid"] == 0
    ended = runner.until("exited")
    assert ended["status"] == 127
    assert "cannot run 'no-such-program' in /: No such file" in ended["detail"]
    runner.start("7.2", "true", workdir=str(tmp_path / "nowhere"))
    assert "nowhere: No such file" in runner.until("exited")["detail"]
    runner.start("7.3", "true")
    assert runner.until("exited")["status"] == 0


def test_a_waiting_child_that_was_killed_is_no_run_that_failed(runner: Runner) -> None:
    runner.start("7.1", "sleep", "60")
    pid = runner.until("started")["pid"]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    children = Path(f"/proc/{parent}/task/{parent}/children")
    until = time.monotonic() + 30
    while len(known := children.read_text().split()) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    (waiting,) = {int(child) for child in known} - {pid}
    runner.say(stop=["7.1", int(signal.SIGKILL), 0])
    assert runner.until("exited")["status"] == -signal.SIGKILL
    os.kill(waiting, signal.SIGKILL)
    runner.start("7.2", "true")
    assert runner.until("exited")["status"] == 0


def test_what_left_its_session_is_ended_with_the_command(runner: Runner, tmp_path: Path) -> None:
    told = tmp_path / "pid"
    runner.start("1.1", "sh", "-c", f"setsid sh -c 'echo $$ > {told}; exec sleep 60' & sleep 0.5")
    runner.until("exited")
    assert gone(int(told.read_text()))


def test_without_a_slot_or_a_lease_nothing_goes_on(tmp_path: Path) -> None:
    for end in ("closed", "lease"):
        runner = Runner(tmp_path / end)
        runner.start("1.1", "sleep", "60")
        pid = runner.until("started")["pid"]
        if end == "closed":
            runner.socket.shutdown(socket.SHUT_WR)
        else:
            runner.say(beat=0.2)
        assert gone(pid)
        assert runner.lines.read() == ""
        assert not (tmp_path / end).exists()
        runner.lines.close()
        runner.socket.close()
