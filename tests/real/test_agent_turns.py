"""Two agents and a sequencer as processes: one order, with FINs, without, and without sequencer."""

from __future__ import annotations

import os
import signal
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
from intentd.daemons.kit.admin import AdminClient, AdminUnreachableError
from intentd.daemons.kit.keys import new_fin_key, write_fin_key

pytestmark = [pytest.mark.real]
SRC = Path(__file__).parents[2] / "src"
ENV = {**os.environ, "PYTHONPATH": str(SRC)}
TIMEOUT_S = 60.0

COMMON = """
state_dir = "{base}/state"
run_dir = "{base}/run"
name = "{name}"
drain_timeout_s = 0.2
[status]
enabled = false
[controller]
enabled = false
"""
AGENT = """
[fin]
bind = "127.0.0.1:{port}"
key_file = "{key}"
[[domains]]
name = "up"
[domains.sequencer]
endpoint = "{endpoint}"
fin_addresses = [{targets}]
[domains.policy]
max_wait_s = 30.0
classes = [{{ threshold_bytes = inf, weight = 1, sequencing = "global" }}]
"""


def free_port(kind: int) -> int:
    with socket.socket(type=kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    def __init__(self, base: Path, module: str, text: str) -> None:
        base.mkdir()
        self.base = base
        self.module = module
        (base / "config.toml").write_text(COMMON.format(base=base, name=base.name) + text)
        role = module.rpartition(".")[0].rpartition(".")[2]
        self.admin = AdminClient(base / "run" / f"{role}.admin.sock")
        self.process: subprocess.Popen[bytes] | None = None
        self.env = dict(ENV)

    def start(self) -> None:
        with (self.base / "log").open("ab") as log:
            command = [sys.executable, "-m", self.module, "--config", self.base / "config.toml"]
            self.process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(TIMEOUT_S) == 0, (self.base / "log").read_text()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                if condition(self.admin.call("status")["detail"]):
                    return
            except AdminUnreachableError:
                pass
            assert time.monotonic() < deadline, (self.base / "log").read_text()
            time.sleep(0.01)


class Waits:
    """A flow that waits for its turn in a thread of its own."""

    def __init__(self, client: Flows) -> None:
        self._mark: list[str] = []
        self._thread = threading.Thread(target=self._open, args=(client,))
        self._thread.start()

    def _open(self, client: Flows) -> None:
        with client.open(1000) as flow:
            self._mark.append(flow.degraded)

    def mark(self) -> str:
        """Why it started; "" in its turn."""
        self._thread.join(TIMEOUT_S)
        return self._mark[0]


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[tuple[Process, list[Process], list[Flows]]]:
    write_fin_key(tmp_path / "fin.key", new_fin_key())
    endpoint = f"tcp://127.0.0.1:{free_port(socket.SOCK_STREAM)}"
    ports = [free_port(socket.SOCK_DGRAM) for _ in range(2)]
    turns = f'[turns]\nbind = "{endpoint}"\nlease_s = 2\nrecover_s = 2\npause_s = 60\n'
    turns += f'[fin]\nbind = "127.0.0.1:0"\nkey_file = "{tmp_path}/fin.key"\n'
    sequencer = Process(tmp_path / "seq", "intentd.daemons.sequencer.daemon", turns)
    targets = ", ".join(f'"127.0.0.1:{port}"' for port in ports)
    agents = [
        Process(
            tmp_path / f"agent{index}",
            "intentd.agent.daemon",
            AGENT.format(port=port, key=tmp_path / "fin.key", endpoint=endpoint, targets=targets),
        )
        for index, port in enumerate(ports)
    ]
    clients = [
        Flows(str(agent.base / "run" / "agent.sock"), answer_timeout_s=60.0) for agent in agents
    ]
    processes = [sequencer, *agents]
    try:
        for process in processes:
            process.start()
        for agent in agents:
            agent.until(lambda detail: detail["domains"]["up"]["turns"]["state"] == "member")
        yield sequencer, agents, clients
    finally:
        for client in clients:
            client.close()
        for process in processes:
            process.kill()


class Order:
    """How many flows of both hosts send at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sending = 0
        self.most = 0
        self.degraded: list[str] = []

    def work(self, flows: Flows, count: int) -> None:
        for _ in range(count):
            with flows.open(1000) as flow:
                with self.lock:
                    if flow.degraded:
                        self.degraded.append(flow.degraded)
                    self.sending += 1
                    self.most = max(self.most, self.sending)
                with self.lock:
                    self.sending -= 1

    def run(self, clients: list[Flows], count: int) -> None:
        threads = [
            threading.Thread(target=self.work, args=(client, count))
            for client in clients
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)


def test_flows_of_two_hosts_take_turns(
    suite: tuple[Process, list[Process], list[Flows]],
) -> None:
    _, agents, clients = suite
    order = Order()
    order.run(clients, 20)
    ordered = not order.degraded
    assert order.most == 1 or not ordered  # a lease may run out on a machine that stands still
    for agent in agents:
        agent.until(lambda detail: detail["domains"]["up"]["finished"] == 60)
        detail = agent.admin.call("status")["detail"]
        assert detail["turns"]["fin"]["accepted"] > 0
        assert detail["turns"]["links"][0]["connected"]
        assert detail["turns"]["fin"]["dropped"]["forged"] == 0


def test_without_the_sequencer_order_is_local_and_comes_back(
    suite: tuple[Process, list[Process], list[Flows]],
) -> None:
    sequencer, agents, clients = suite
    assert sequencer.process is not None
    sequencer.process.send_signal(signal.SIGKILL)
    sequencer.process.wait()
    for agent in agents:
        agent.until(lambda detail: detail["domains"]["up"]["turns"]["state"] == "away")
    for client in clients:
        with client.open(1000) as flow:
            assert flow.degraded == "fallback"
    sequencer.start()
    for agent, client in zip(agents, clients, strict=True):
        agent.until(lambda detail: detail["domains"]["up"]["turns"]["state"] == "member")
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            with client.open(1000) as flow:
                if not flow.degraded:
                    break
            assert time.monotonic() < deadline


def test_a_planned_restart_of_the_sequencer_keeps_the_turns(
    suite: tuple[Process, list[Process], list[Flows]], tmp_path: Path
) -> None:
    """As under a service manager: who holds a turn keeps it, who waits starts in order, by a FIN
    that comes while the sequencer is away, or when it is back."""
    sequencer, agents, clients = suite
    sequencer.until(lambda detail: not detail["recovering"])
    epoch = sequencer.admin.call("status")["detail"]["epoch"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        sequencer.env |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "FDSTORE": "8"}
        sequencer.stop()  # from here on it has a manager
        sequencer.start()
        sequencer.until(lambda detail: detail["resumed"])
        assert sequencer.admin.call("status")["detail"]["epoch"] == epoch
        for agent in agents:
            agent.until(lambda detail: detail["domains"]["up"]["turns"]["state"] == "member")
        held = clients[0].open(1000)
        waits = Waits(clients[1])
        agents[1].until(lambda detail: detail["domains"]["up"]["classes"][0]["waiting"] == 1)
        sequencer.stop()
        held.close()
        assert waits.mark() == held.degraded == ""
        late = Waits(clients[0])
        sequencer.start()
        assert late.mark() == ""
        assert sequencer.admin.call("status")["detail"]["epoch"] == epoch
        for agent in agents:
            (member,) = agent.admin.call("status")["detail"]["domains"].values()
            assert not member["degraded"], member
        assert sequencer.process is not None
        sequencer.process.kill()
        sequencer.process.wait()
        sequencer.start()
        sequencer.until(lambda detail: not detail["resumed"] and detail["epoch"] > epoch)


def test_a_killed_agents_turn_passes_on_when_its_lease_ends(
    suite: tuple[Process, list[Process], list[Flows]],
) -> None:
    _, agents, clients = suite
    held = clients[0].open(1000)
    assert held.degraded == ""
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(clients[1].open(1000)))
    waiting.start()
    agents[1].until(lambda detail: detail["domains"]["up"]["classes"][0]["waiting"] == 1)
    agents[0].kill()
    waiting.join(TIMEOUT_S)
    assert [flow.degraded for flow in found] == ["lease"]
    assert found[0].waited_s < 30
    held.close()
    found[0].close()
