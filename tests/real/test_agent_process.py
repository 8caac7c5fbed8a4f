"""The agent as a process: signals, applications that die, kill -9, restart, bad configuration."""

from __future__ import annotations

import json
import os
import shutil
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
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError
from intentd.testbed import netns

pytestmark = [pytest.mark.real]
SRC = Path(__file__).parents[2] / "src"
PYTHON = [sys.executable, "-m", "intentd.agent.daemon"]
ENV = {**os.environ, "PYTHONPATH": str(SRC)}
READY_TIMEOUT_S = 60

CONFIG = """
state_dir = "{base}/state"
run_dir = "{base}/run"
drain_timeout_s = 0.3
[status]
bind = "127.0.0.1:0"
[controller]
enabled = false
[[domains]]
name = "up"
default = true
{domain}
[domains.policy]
classes = [
  {{ threshold_bytes = 5000, weight = 0.6, dscp = 10 }},
  {{ threshold_bytes = inf, weight = 0.4, dscp = 18 }},
]
"""


class Agent:
    """One agent process and its files."""

    def __init__(self, base: Path, prefix: tuple[str, ...] = (), domain: str = "") -> None:
        self.base = base
        self.prefix = prefix
        self.config = base / "agent.toml"
        self.config.write_text(CONFIG.format(base=base, domain=domain))
        self.path = base / "run" / "agent.sock"
        self.admin = AdminClient(base / "run" / "agent.admin.sock")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.base / "log").open("ab") as log:
            command = [*self.prefix, *PYTHON, "--config", str(self.config)]
            self.process = subprocess.Popen(command, env=ENV, stdout=log, stderr=log)
        self.until(lambda: bool(self.admin.call("ready")["ready"]))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                if condition():
                    return
            except AdminUnreachableError:
                assert self.process is None or self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def log(self) -> str:
        return (self.base / "log").read_text()

    def signal(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(READY_TIMEOUT_S)

    def detail(self) -> dict[str, Any]:
        detail: dict[str, Any] = self.admin.call("status")["detail"]
        return detail

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path)
    made.start()
    yield made
    made.close()


@pytest.fixture
def flows(agent: Agent) -> Iterator[Flows]:
    client = Flows(str(agent.path), answer_timeout_s=60.0)
    yield client
    client.close()


def rejoined(flows: Flows) -> bool:
    flow = flows.open(100)
    flow.close()
    return not flow.degraded


def test_one_life_told_by_status_flows_explain_and_metrics(agent: Agent, flows: Flows) -> None:
    for _ in range(20):
        with flows.open(100, peer="10.0.0.1"):
            pass
    assert flows.open(100, domain="nowhere").degraded == "refused"
    agent.until(lambda: agent.detail()["domains"]["up"]["finished"] == 20)
    detail = agent.detail()
    assert (detail["applications"], detail["app_errors"]) == (1, 1)
    assert detail["domains"]["up"]["tc"]["state"] == "unshaped"
    told = agent.admin.call("flows", domain="up")
    classes = told["domains"]["up"]["classes"]
    assert [row["weight"] for row in classes] == [0.6, 0.4]
    assert classes[0]["fct_s"]["count"] == 20
    number = told["recent"][0]["flow"]
    assert agent.admin.call("explain", flow=number)["start"] == "ordered"
    with pytest.raises(AdminRefusedError, match="flow: got 999, expected an open flow or one of"):
        agent.admin.call("explain", flow=999)
    with pytest.raises(AdminRefusedError, match="flow: got 'x', expected the number of a flow"):
        agent.admin.call("explain", flow="x")
    with pytest.raises(AdminRefusedError, match="domain: got 'nowhere', expected one of up"):
        agent.admin.call("flows", domain="nowhere")
    assert agent.admin.call("domains")["domains"][0]["name"] == "up"
    text = agent.admin.call("metrics")["text"]
    assert 'intentd_agent_finished_total{domain="up"} 20.0' in text
    assert agent.signal(signal.SIGTERM) == 0
    assert not agent.path.exists()


def test_a_second_agent_is_refused(agent: Agent) -> None:
    second = subprocess.run(
        [*PYTHON, "--config", str(agent.config)], env=ENV, capture_output=True, timeout=60
    )
    assert second.returncode == 1
    assert b"one agent a run directory" in second.stderr
    assert agent.detail()["applications"] == 0


def test_an_application_killed_with_the_turn_passes_it_on(agent: Agent, flows: Flows) -> None:
    script = (
        "import sys, time\n"
        "from intentd.agent.client import Flows\n"
        f"flow = Flows({str(agent.path)!r}, answer_timeout_s=60.0).open(100)\n"
        "print(flow.degraded or 'ordered', flush=True)\n"
        "time.sleep(600)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], env=ENV, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ordered\n"
        found: list[Any] = []
        waiting = threading.Thread(target=lambda: found.append(flows.open(100)))
        waiting.start()
        agent.until(lambda: agent.detail()["domains"]["up"]["classes"][0]["waiting"] == 1)
        holder.kill()
        waiting.join(60)
        assert [flow.degraded for flow in found] == [""]
        found[0].close()
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    text = agent.admin.call("metrics")["text"]
    assert "intentd_agent_flows_died_holding_total 1.0" in text


def test_sigterm_lets_those_that_wait_go_and_refuses_new_ones(agent: Agent, flows: Flows) -> None:
    held = flows.open(100)
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(flows.open(100).degraded))
    waiting.start()
    agent.until(lambda: agent.detail()["domains"]["up"]["classes"][0]["waiting"] == 1)
    assert agent.process is not None
    agent.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 60
    while (flow := flows.open(100)).degraded not in ("refused", "closed", "absent"):
        assert time.monotonic() < deadline
        flow.cancel()
    assert agent.process.wait(READY_TIMEOUT_S) == 0
    waiting.join(60)
    assert found == ["closed"]  # the holder did not finish within the drain time
    held.close()


def test_kill_and_restart(agent: Agent, flows: Flows) -> None:
    held = flows.open(100)
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(flows.open(100).degraded))
    waiting.start()
    agent.until(lambda: agent.detail()["domains"]["up"]["classes"][0]["waiting"] == 1)
    agent.signal(signal.SIGKILL)
    waiting.join(60)
    assert found == ["closed"]
    assert flows.open(100).degraded in ("closed", "absent")
    held.close()
    agent.start()
    agent.until(lambda: rejoined(flows))


def test_a_reload_swaps_domains_or_refuses_whole(agent: Agent, flows: Flows) -> None:
    held = flows.open(100)
    good = agent.config.read_text()
    agent.config.write_text(good + '[[domains]]\nname = "lab"\npeers = ["10.9.0.0/16"]\n')
    agent.admin.call("reload")
    assert sorted(agent.detail()["domains"]) == ["lab", "up"]
    with flows.open(100, peer="10.9.1.1") as flow:
        assert flow.degraded == ""
    agent.until(lambda: agent.detail()["domains"]["lab"]["finished"] == 1)
    assert agent.detail()["domains"]["up"]["classes"][0]["active"] == 1  # kept over the reload
    for bad, text in (
        ('[[domains]]\nname = "up"\n', r"domains\[1\].name: got 'up', expected a name used once"),
        ('[[domains]]\nname = "x"\npeers = ["10.0.0.300"]\n', r"domains\[1\].peers\[0\]: got"),
        ('[[domains]]\nname = "x"\ndefault = true\n', "at most one default domain"),
        ('[[domains]]\nname = "x"\n[domains.policy]\nclasses = []\n', "policy.classes"),
        (
            "[socket]\nmax_connections = 7\n",
            r"socket.max_connections: got 7, expected the value it started",
        ),
        ("[socket]\nmax = 7\n", "socket.max: got 7, expected a known field|expected one of"),
    ):
        agent.config.write_text(good + bad)
        with pytest.raises(AdminRefusedError, match=text):
            agent.admin.call("reload")
        assert sorted(agent.detail()["domains"]) == ["lab", "up"]
    held.close()


def test_memory_and_imports(agent: Agent, flows: Flows) -> None:
    for _ in range(500):
        flows.open(100).close()
    assert agent.process is not None
    maps = Path(f"/proc/{agent.process.pid}/maps").read_text()
    assert "numpy" not in maps
    rollup = Path(f"/proc/{agent.process.pid}/smaps_rollup").read_text()
    pss_kb = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    assert pss_kb < 60 * 1024


@pytest.fixture
def node(tmp_path: Path) -> Iterator[netns.Namespace]:
    reason = netns.unavailable()
    if reason:
        pytest.skip(reason)
    with netns.Topology("tagt") as net:
        node, peer = net.namespace("node"), net.namespace("peer")
        net.pair(node, peer)
        yield node


def qdisc(node: netns.Namespace, device: str) -> str:
    return node.tc("qdisc", "show", "dev", device).stdout


@pytest.mark.netns
def test_marks_shapes_and_gives_back_after_kill(node: netns.Namespace, tmp_path: Path) -> None:
    """IPv4 and IPv6, by the C client, over the shaped device; then kill -9."""
    built = tmp_path / "send_file"
    source = SRC.parent / "examples" / "c_client"
    subprocess.run(
        ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-o", str(built)]
        + [str(source / name) for name in ("send_file.c", "intentd_flow.c")],
        check=True,
        timeout=60,
    )
    interface = node.interfaces["eth0"]
    found = qdisc(node, interface.device)
    agent = Agent(tmp_path, tuple(node.command([])), f'device = "{interface.device}"')
    agent.start()
    try:
        state = agent.detail()["domains"]["up"]["tc"]
        if state["state"] != "shaped":
            pytest.skip(f"this kernel does not shape: {state['reason']}")
        assert "htb" in qdisc(node, interface.device)
        for family, address in (
            (socket.AF_INET, interface.ipv4),
            (socket.AF_INET6, interface.ipv6),
        ):
            rows = send_file(node, built, agent.path, family, address, 4000, 3)
            rows += send_file(node, built, agent.path, family, address, 100_000, 1)
            assert [row["class"] for row in rows] == [0, 0, 0, 1]
            assert [row["start"] for row in rows] == [0] * 4
            assert all(row["marked"] for row in rows)
            assert all(row["so_priority"] == row["priority"] > 0 for row in rows)
            assert rows[0]["priority"] != rows[3]["priority"]
            assert [row["dscp"] for row in rows] == [10, 10, 10, 18]
        agent.until(lambda: agent.detail()["domains"]["up"]["finished"] == 8)
        agent.signal(signal.SIGKILL)
        agent.process = None
        agent.until(lambda: qdisc(node, interface.device) == found)
        agent.start()
        assert "htb" in qdisc(node, interface.device)
        assert agent.signal(signal.SIGTERM) == 0
        assert qdisc(node, interface.device) == found
    finally:
        agent.close()


def test_without_the_capability_flows_are_ordered_and_marked_not_shaped(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to run the agent without CAP_NET_ADMIN")
    prefix = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    agent = Agent(tmp_path, prefix, 'device = "lo"')
    agent.start()
    flows = Flows(str(agent.path), answer_timeout_s=60.0)
    try:
        tc = agent.detail()["domains"]["up"]["tc"]
        assert tc["state"] == "unshaped"
        assert "CAP_NET_ADMIN" in tc["reason"]
        with socket.socket() as sock, flows.open(100, sock=sock) as flow:
            assert (flow.degraded, flow.marked, flow.priority) == ("", True, 0)
            assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) >> 2 == 10
    finally:
        flows.close()
        agent.close()


def send_file(
    node: netns.Namespace,
    program: Path,
    agent: Path,
    family: int,
    address: str,
    size: int,
    count: int,
) -> list[dict[str, Any]]:
    """Run the C client in the namespace against a listener there."""
    with node.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen()
        listener.settimeout(60)
        taken = threading.Thread(target=swallow, args=(listener,))
        taken.start()
        done = subprocess.run(
            node.command(
                [str(program), address, str(listener.getsockname()[1]), str(size), str(count)]
            ),
            env={**ENV, "INTENTD_SOCKET": str(agent)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        taken.join(60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def swallow(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        while connection.recv(1 << 16):
            pass


def test_the_c_client_fails_open(tmp_path: Path) -> None:
    built = tmp_path / "send_file"
    source = SRC.parent / "examples" / "c_client"
    subprocess.run(["make", "-s", "-C", str(source), f"OUT={built}"], check=True, timeout=60)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = threading.Thread(target=swallow, args=(listener,))
        taken.start()
        done = subprocess.run(
            [str(built), "127.0.0.1", str(listener.getsockname()[1]), "1000"],
            env={**ENV, "INTENTD_SOCKET": str(tmp_path / "none.sock")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        taken.join(60)
    assert done.returncode == 0
    assert json.loads(done.stdout)["start"] == 101  # INTENTD_ABSENT
