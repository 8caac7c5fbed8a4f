"""Every key of a suite is rotated under load: no member is lost, no FIN refused, no flow stuck."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.agent.client import Flows
from intentd.daemons.ctl.main import main as intentctl
from intentd.daemons.kit import keys
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError
from intentd.daemons.kit.rotation import Step, next_step

pytestmark = pytest.mark.real
SRC = Path(__file__).parents[2] / "src"
ENV = {**os.environ, "PYTHONPATH": str(SRC)}
TIMEOUT_S = 60.0
MODULES = {
    "controller": "intentd.controller.daemon",
    "sequencer": "intentd.daemons.sequencer.daemon",
    "agent": "intentd.agent.daemon",
}
COMMON = """
state_dir = "{base}/{name}/state"
run_dir = "{base}/{name}/run"
name = "{name}"
drain_timeout_s = 0.2
status.enabled = false
"""
LINK = """
[controller]
endpoint = "tcp://127.0.0.1:{hub}"
key_file = "{base}/{name}.key"
server_key_file = "{base}/controller.key.pub"
backoff_min_s = 0.05
"""
CONFIGS = {
    "controller": """
[hub]
bind = "tcp://127.0.0.1:{hub}"
key_file = "{base}/controller.key"
allow_file = "{base}/hub.allow"
report_interval_s = 0.5
[[flows.domains]]
domain = "up"
policy = "fifo"
sequencing = "global"
local_below = 0
""",
    "sequencer": LINK
    + """
[turns]
bind = "tcp://127.0.0.1:{turns}"
key_file = "{base}/sequencer.key"
allow_file = "{base}/turns.allow"
lease_s = 5
recover_s = 5
[fin]
bind = "127.0.0.1:0"
key_file = "{base}/fin.key"
""",
    "agent": LINK
    + """
[fin]
bind = "127.0.0.1:{fin}"
key_file = "{base}/fin.key"
[[domains]]
name = "up"
[domains.sequencer]
endpoint = "tcp://127.0.0.1:{turns}"
key_file = "{base}/{name}.key"
server_key_file = "{base}/sequencer.key.pub"
fin_addresses = [{fins}]
[domains.policy]
max_wait_s = 30.0
classes = [{{ threshold_bytes = inf, weight = 1, sequencing = "global" }}]
""",
}


def free_port(kind: int) -> int:
    with socket.socket(type=kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Suite:
    """Controller, sequencer and two agents, all on CURVE; flows start all the time."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.admins: dict[str, AdminClient] = {}
        self.opened = 0
        self.failures: list[Exception] = []
        self.stopping = threading.Event()
        self.threads: list[threading.Thread] = []
        self.clients: list[Flows] = []
        self.names = ("controller", "sequencer", "agent0", "agent1")
        for name in self.names:
            keys.write_curve_keys(base / f"{name}.key", keys.new_curve_keys())
        keys.write_fin_key(base / "fin.key", keys.new_fin_key())
        publics = {n: keys.read_curve_public(base / f"{n}.key").hex() for n in self.names}
        lines = [f"{publics[n]} {n.rstrip('01')}@{n}\n" for n in self.names[1:]]
        (base / "hub.allow").write_text("".join(lines))
        (base / "turns.allow").write_text("".join(lines[1:]))

    def start(self) -> None:
        fins = [free_port(socket.SOCK_DGRAM) for _ in range(2)]
        values = {
            "base": self.base,
            "hub": free_port(socket.SOCK_STREAM),
            "turns": free_port(socket.SOCK_STREAM),
            "fins": ", ".join(f'"127.0.0.1:{port}"' for port in fins),
        }
        for name in self.names:
            role = name.rstrip("01")
            text = (COMMON + CONFIGS[role]).format(name=name, fin=fins[name == "agent1"], **values)
            folder = self.base / name
            folder.mkdir()
            (folder / "config.toml").write_text(text)
            with (folder / "log").open("wb") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, "-m", MODULES[role], "--config", folder / "config.toml"],
                    env=ENV, stdout=log, stderr=log,
                )  # fmt: skip
            self.admins[name] = AdminClient(folder / "run" / f"{role}.admin.sock")
        self.until_whole()
        for name in ("agent0", "agent1"):
            client = Flows(str(self.base / name / "run" / "agent.sock"), answer_timeout_s=TIMEOUT_S)
            self.clients.append(client)
            self.threads.append(threading.Thread(target=self.work, args=(client,)))
        for thread in self.threads:
            thread.start()

    def work(self, client: Flows) -> None:
        try:
            while not self.stopping.is_set():
                with client.open(1000):
                    self.opened += 1
                self.stopping.wait(0.002)
        except Exception as error:  # noqa: BLE001  whatever it is, the test's end tells it
            self.failures.append(error)

    def stop(self) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(TIMEOUT_S)
        for client in self.clients:
            client.close()
        for process in self.processes.values():
            process.kill()
            process.wait()

    def log(self, name: str) -> str:
        return (self.base / name / "log").read_text()

    def until(self, name: str, condition: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                if condition(self.admins[name].call("status")):
                    return
            except AdminUnreachableError:
                assert self.processes.get(name) is None or self.processes[name].poll() is None
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.02)

    def until_whole(self) -> None:
        """Every member joined, every agent a member at the sequencer, flows going on."""
        before = self.opened
        for name in self.names[1:]:
            self.until(name, lambda status: bool(status["controller"]["connected"]))
        for name in ("agent0", "agent1"):
            self.until(
                name,
                lambda status: status["detail"]["domains"]["up"]["turns"]["state"] == "member",
            )
        self.until("controller", lambda status: status["controller"]["members"] == 3)
        if self.threads:
            deadline = time.monotonic() + TIMEOUT_S
            while self.opened < before + 20 and not self.failures:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def reload(self, *names: str) -> None:
        for name in names:
            self.admins[name].call("reload")
            self.until_whole()


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Suite]:
    made = Suite(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_all_keys_are_rotated_under_load(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    base = suite.base
    # FIN datagrams: all that send or hear them, one after the other.
    for step in Step:
        assert next_step(base / "fin.key") is step
        suite.reload("agent1", "sequencer", "agent0")
    # A member's pair: whoever checks it, the member, whoever checks it.
    lists = [base / "hub.allow", base / "turns.allow"]
    for step in Step:
        assert next_step(base / "agent0.key", lists) is step
        suite.reload(*(["agent0"] if step is Step.SWITCHED else ["controller", "sequencer"]))
    # A server's pair, by the command: its clients, itself, its clients.
    for step in Step:
        assert intentctl(["keys", "rotate", str(base / "controller.key")]) == 0
        assert step.value in capsys.readouterr().out
        suite.reload(*(["controller"] if step is Step.SWITCHED else suite.names[1:]))
    # The sequencer uses its pair both ways: agents know it, and the controller lists it.
    for step in Step:
        assert next_step(base / "sequencer.key", lists[:1]) is step
        others = ["controller", "agent0", "agent1"]
        suite.reload(*(["sequencer"] if step is Step.SWITCHED else others))
    # A newcomer that only knows the old keys would not be let in; those here never noticed.
    assert not suite.failures
    assert all(process.poll() is None for process in suite.processes.values())
    assert "member gone" not in suite.log("controller")
    for name in ("agent0", "agent1"):
        detail = suite.admins[name].call("status")["detail"]
        assert detail["turns"]["fin"]["dropped"]["forged"] == 0
        assert detail["turns"]["fin"]["accepted"] > 0
    assert suite.admins["sequencer"].call("status")["detail"]["fin"]["dropped"]["forged"] == 0


def test_a_reload_with_a_wrong_key_file_changes_nothing(suite: Suite) -> None:
    for name, path in (
        ("controller", "controller.key"),
        ("sequencer", "fin.key"),
        ("agent0", "fin.key"),
    ):
        file = suite.base / path
        good = file.read_text()
        file.write_text("nonsense\n")
        with pytest.raises(AdminRefusedError, match="a line 'intentd-"):
            suite.admins[name].call("reload")
        file.write_text(good)
        suite.until_whole()
    assert not suite.failures
