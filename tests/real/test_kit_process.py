"""The daemon frame as a process: signals, readiness, reload, crashes, memory, the watchdog."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import until

from intentd.daemons.kit.admin import AdminClient, AdminRefusedError

pytestmark = pytest.mark.real

SCRIPT = Path(__file__).with_name("kit_daemon.py")
LIMIT_S = 60.0


class Process:
    """One toy daemon under a service manager's socket."""

    def __init__(self, directory: Path, config: str = "", **environ: str) -> None:
        self.directory = directory
        self.config = directory / "toy.toml"
        self.write(config)
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(directory / "notify"))
        self.manager.settimeout(LIMIT_S)
        self.log_path = directory / "log"
        self.environ = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
            "NOTIFY_SOCKET": str(directory / "notify"),
            "STATE_DIRECTORY": str(directory / "state"),
            "RUNTIME_DIRECTORY": str(directory / "run"),
            "INTENTD_AGENT__STATUS__BIND": "127.0.0.1:0",
            "INTENTD_AGENT__CONTROLLER__ENDPOINT": "tcp://127.0.0.1:9",
            **environ,
        }
        self.admin = AdminClient(directory / "run" / "agent.admin.sock", LIMIT_S)

    def write(self, config: str) -> None:
        self.config.write_text(config)

    def start(self) -> Process:
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--config", str(self.config)],
                env=self.environ,
                stderr=log,
            )
        return self

    def notified(self, field: str) -> dict[str, str]:
        """The next notification that has a field, as a map."""
        while True:
            lines = self.manager.recv(4096).decode().split("\n")
            message = dict(line.split("=", 1) for line in lines)
            if field in message:
                return message

    def ready(self) -> Process:
        assert self.notified("READY")["MAINPID"] == str(self.popen.pid)
        return self

    def ready_status(self) -> str:
        return self.notified("READY")["STATUS"]

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self) -> int:
        return self.popen.wait(LIMIT_S)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def until_logged(self, text: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while text not in self.log:
            assert time.monotonic() < deadline, f"{text!r} never logged:\n{self.log}"
            time.sleep(0.01)

    @property
    def mark(self) -> Path:
        return self.directory / "state" / "mark"


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path)
    yield made
    with contextlib.suppress(AttributeError):
        made.popen.kill()
        made.popen.wait()
    made.manager.close()


def run(process: Process, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=process.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_orderly(process: Process, number: signal.Signals) -> None:
    process.start().ready()
    assert process.mark.exists()
    status = process.admin.call("status")
    assert status["ready"]
    assert status["pid"] == process.popen.pid
    assert status["controller"]["connected"] is False
    with urllib.request.urlopen(f"http://{status['status_address']}/readyz", timeout=60) as answer:
        assert json.load(answer) == {"ready": True, "reasons": []}
    process.signal(number)
    process.notified("STOPPING")
    assert process.wait() == 0
    assert not process.mark.exists()
    assert not process.admin.path.exists()
    assert "stopped" in process.log


def test_a_second_signal_exits_at_once(process: Process) -> None:
    process.write("drain_timeout_s = 600\n[toy]\ndrain_s = 600\n")
    process.start().ready()
    process.signal(signal.SIGTERM)
    process.notified("STOPPING")
    assert process.admin.call("ready") == {"ready": False, "reasons": ["stopping"]}
    process.signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


def test_draining_ends_at_the_deadline(process: Process) -> None:
    process.write('drain_timeout_s = "50ms"\n[toy]\ndrain_s = 600\n')
    process.start().ready()
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert "drain deadline passed" in process.log
    assert not process.mark.exists()


def test_reload_swaps_or_keeps_the_old(process: Process) -> None:
    process.start().ready()
    process.write('[toy]\ngreeting = "salut"\n')
    process.signal(signal.SIGHUP)
    reloading = process.notified("RELOADING")
    assert 0 < int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    process.ready()
    assert process.admin.call("status")["detail"] == {"greeting": "salut"}
    for text, reason in (
        ('[toy]\ngreting = "x"\n', "toy.greting: got 'x', expected a known field: did you mean"),
        ('[toy]\ngreeting = "forbidden"\n', "toy.greeting: got 'forbidden', expected something"),
        ('name = "other"\n', "name: got 'other', expected the value it started with: restart"),
        ("[", "expected a TOML file"),
        ('[toy]\ngreeting = "defect"\n', "internal error: ZeroDivisionError"),
    ):
        process.write(text)
        with pytest.raises(AdminRefusedError) as caught:
            process.admin.call("reload")
        assert reason in str(caught.value)
        assert "reload refused" in process.ready_status()
    status = process.admin.call("status")
    assert (status["detail"], status["generation"]) == ({"greeting": "salut"}, 2)
    metrics = process.admin.call("metrics")["text"]
    assert 'intentd_reloads_total{outcome="refused"} 5.0' in metrics
    assert 'intentd_reloads_total{outcome="applied"} 1.0' in metrics


def test_a_reload_that_loses_readiness_is_taken_back(process: Process) -> None:
    process.start().ready()
    process.write('[reload]\ngrace_s = 0\n[toy]\ngreeting = "salut"\nunready = "it broke"\n')
    process.signal(signal.SIGHUP)
    process.notified("RELOADING")
    process.notified("RELOADING")  # and back
    told = process.ready_status()
    assert told == "generation 2 lost readiness: it broke; 1 runs again"
    status = process.admin.call("status")
    assert status["detail"] == {"greeting": "hello"}
    assert (status["generation"], status["ready"]) == (3, True)
    shown = status["reload"]
    assert (shown["outcome"], shown["by"], shown["reason"]) == ("returned", "SIGHUP", told)
    with pytest.raises(AdminRefusedError, match="generation 4 lost readiness: it broke; 3 runs"):
        process.admin.call("reload", confirm=True)
    process.write('[reload]\nwindow_s = 0\n[toy]\ngreeting = "salut"\n')
    assert process.admin.call("reload", confirm=True) == {"generation": 6, "on_trial": False}
    process.signal(signal.SIGKILL)
    process.wait()
    process.start()
    while process.notified("READY")["MAINPID"] != str(process.popen.pid):
        pass
    assert process.admin.call("status")["generation"] == 6
    kept = process.directory / "state" / "agent.good.toml"
    assert kept.read_bytes() == process.config.read_bytes()


def test_the_outcome_of_a_signal_is_in_status(process: Process) -> None:
    process.start().ready()
    process.write('[toy]\ngreeting = "defect"\n')
    process.signal(signal.SIGHUP)
    process.notified("RELOADING")
    assert "internal error: ZeroDivisionError" in process.ready_status()
    shown = process.admin.call("status")["reload"]
    assert (shown["outcome"], shown["by"]) == ("refused", "SIGHUP")
    assert "a programmer error" in shown["reason"]
    assert process.popen.poll() is None


def test_usr1_writes_the_state_into_the_log(process: Process) -> None:
    process.environ["INTENTD_AGENT__LOG__FORMAT"] = "json"
    process.start().ready()
    process.signal(signal.SIGUSR1)
    process.until_logged('"message": "state"')
    entry = next(e for e in map(json.loads, process.log.splitlines()) if e["message"] == "state")
    state = json.loads(entry["state"])
    assert state["dump"] == {"greeting": "hello"}
    assert {"watchdog", "link"} <= set(state["tasks"])


@pytest.mark.parametrize(
    ("command", "text"), [("crash", "ZeroDivisionError"), ("crash-callback", "IndexError")]
)
def test_a_programmer_error_ends_the_daemon_and_undoes_the_host(
    process: Process, command: str, text: str
) -> None:
    process.start().ready()
    process.admin.call(command)
    assert process.wait() == 1
    assert "Traceback" in process.log
    assert text in process.log
    assert not process.mark.exists()


def test_the_watchdog_starves_when_the_loop_hangs(process: Process) -> None:
    process.environ["WATCHDOG_USEC"] = "200000"
    process.start().ready()
    process.notified("WATCHDOG")
    process.admin.call("hang", seconds=0.5)
    status = process.admin.call("status")
    process.notified("WATCHDOG")
    lag = process.admin.call("status")["loop_lag_s"]["max"]
    assert max(lag, status["loop_lag_s"]["max"]) >= 0.3


def test_one_daemon_a_run_directory(process: Process) -> None:
    process.start().ready()
    second = run(process)
    assert second.returncode == 1
    assert f"is held by process {process.popen.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    assert process.admin.call("ping")["pid"] == process.popen.pid


def test_after_kill_9_the_next_one_starts(process: Process) -> None:
    process.start().ready()
    process.signal(signal.SIGKILL)
    process.wait()
    assert process.admin.path.exists()
    process.start().ready()
    assert process.admin.call("ping")["pid"] == process.popen.pid


def test_a_port_in_use_is_one_clear_error(process: Process) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process.environ["INTENTD_AGENT__STATUS__BIND"] = f"127.0.0.1:{port}"
        result = run(process)
    assert result.returncode == 1
    assert f"status.bind: 127.0.0.1:{port} is not available: in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_check_config_lists_every_error(process: Process) -> None:
    process.write('naem = "x"\n[toy]\ndrain_s = -1\n[log]\nlevel = "loud"\n')
    result = run(process, "--config", str(process.config), "--check-config")
    assert result.returncode == 2
    for text in ("naem: got 'x'", "did you mean name?", "toy.drain_s: got -1", "log.level"):
        assert text in result.stderr
    process.write("")
    assert run(process, "--config", str(process.config), "--check-config").returncode == 0
    assert run(process, "--version").stdout.startswith("intentd ")
    assert run(process, "--nonsense").returncode == 2


def pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss line")


def test_the_frame_leaves_room_for_a_role(process: Process) -> None:
    """Link, status endpoint and admin socket together: a role may add 10 MB and stay under 60."""
    process.start().ready()
    process.admin.call("metrics")
    assert pss_bytes(process.popen.pid) < 50e6


def test_tokens_reload(process: Process) -> None:
    process.start().ready()
    address = process.admin.call("status")["status_address"]
    process.write(f'[status]\ntokens = ["{hashlib.sha256(b"t").hexdigest()}"]\n')
    process.admin.call("reload")
    with urllib.request.urlopen(f"http://{address}/status", timeout=60) as answer:
        document: dict[str, Any] = json.load(answer)
    assert document["role"] == "agent"


def test_a_wrong_file_at_the_start_runs_the_last_good_one_and_says_so(process: Process) -> None:
    process.write('[toy]\ngreeting = "good"\n')
    process.start().ready()
    kept = process.directory / "state" / "agent.good.toml"
    until(kept.exists, "the good file is kept")
    number = process.admin.call("status")["generation"]
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    process.write('[toy]\ngreting = "bad"\n[broken')
    strict = run(process, "--config", str(process.config), "--strict")
    assert strict.returncode == 2
    assert run(process, "--config", str(process.config), "--check-config").returncode == 2
    process.start().ready()
    shown = process.admin.call("status")
    assert (shown["detail"]["greeting"], shown["generation"]) == ("good", number)
    assert shown["reload"]["outcome"] == "fallback"
    assert "expected a TOML file" in shown["reload"]["fallback"]
    assert shown["ready"]
    text = process.admin.call("metrics")["text"]
    assert 'intentd_reloads_total{outcome="fallback"} 1.0' in text
    assert "runs the last good configuration" in process.log
    process.write('[toy]\ngreeting = "mended"\n')
    process.admin.call("reload")
    shown = process.admin.call("status")
    assert (shown["detail"]["greeting"], shown["reload"]["fallback"]) == ("mended", "")
    kept.unlink()
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    kept.unlink(missing_ok=True)
    process.write("[broken")
    process.start()
    assert process.wait() == 2
