"""Agents as processes: killed, stopped, two at once, without privilege; what the kernel holds."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.real.tc.tools import SRC, Opener, classes, devices, gone, policy, root_qdisc

from intentd.agent.tc.shaper import Shaping
from intentd.testbed import netns

pytestmark = [pytest.mark.real, pytest.mark.netns]
needs_setpriv = pytest.mark.skipif(
    not Path("/usr/bin/setpriv").exists(), reason="setpriv is not installed"
)

AGENT = """
import asyncio, pathlib, sys
from intentd.agent.tc.netlink import has_net_admin
from intentd.agent.tc.shaper import ShapingHost
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
async def main():
    host = ShapingHost(pathlib.Path(sys.argv[1]))
    shaper = host.shaper("eth0", *sys.argv[2:])
    only = (ClassPolicy(float("inf"), 1.0, dscp=10),)
    print("applying", flush=True)
    state = await shaper.apply(DomainPolicy("link", 1e9, only))
    print(state.state.value, host.guard.pid, state.reason, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await host.close()
asyncio.run(main())
"""


def agent(
    node: netns.Namespace, state: Path, *before: str, direction: str = "egress"
) -> tuple[subprocess.Popen[bytes], str]:
    """A process that shapes until its stdin ends, and what it said of its state."""
    process = start_agent(node, state, *before, direction=direction)
    assert process.stdout is not None
    return process, process.stdout.readline().decode().strip()


def start_agent(
    node: netns.Namespace, state: Path, *before: str, direction: str = "egress"
) -> subprocess.Popen[bytes]:
    process = node.popen(
        [*before, sys.executable, "-c", AGENT, str(state), direction],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"applying\n"
    return process


def test_killed_agent_leaves_the_device_as_found(node: netns.Namespace, tmp_path: Path) -> None:
    process, said = agent(node, tmp_path / "tc.json")
    assert said.startswith("shaped ")
    assert root_qdisc(node) == "htb 2d17:"
    guard = int(said.split()[1])
    os.kill(guard, signal.SIGTERM)  # what a service manager sends to the whole group
    process.kill()
    process.wait()
    assert gone(guard)
    assert root_qdisc(node) == "noqueue 0:"
    assert not (tmp_path / "tc.json").exists()


def guards(state: Path) -> list[int]:
    """Processes, dead-man shells or what they became, that carry this state file's name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(state).encode() in words and b"--state" in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("direction", ["egress", "ingress"])
def test_killed_at_any_moment_of_applying(
    node: netns.Namespace, tmp_path: Path, direction: str
) -> None:
    if direction == "ingress":
        if node.ip("link", "add", "probe", "type", "ifb", check=False).returncode:
            pytest.skip("this kernel has no IFB")
        node.ip("link", "del", "probe")
    state = tmp_path / "tc.json"
    links, qdiscs = devices(node), node.tc("qdisc").stdout
    for delay_ms in (0, 50, 70, 90, 110, 130, 150, 200):
        process = start_agent(node, state, direction=direction)
        select.select([], [], [], delay_ms / 1000)  # not a wait for anything: the moment varies
        process.kill()
        process.wait()
        for pid in guards(state):
            assert gone(pid)
        if state.exists():  # recorded, killed before the dead-man was armed: nothing was changed
            done = node.run(
                [sys.executable, "-m", "intentd.agent.tc.restore", "--state", str(state)],
                env={**os.environ, "PYTHONPATH": str(SRC)},
            )
            assert done.returncode == 0, done.stderr
        assert node.tc("qdisc").stdout == qdiscs
        assert devices(node) == links


def test_stopped_agent_restores_and_its_guard_ends(node: netns.Namespace, tmp_path: Path) -> None:
    process, said = agent(node, tmp_path / "tc.json")
    assert said.startswith("shaped ")
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    assert root_qdisc(node) == "noqueue 0:"
    assert gone(int(said.split()[1]))


def test_restore_command_leaves_a_living_agent_alone_then_cleans_up(
    node: netns.Namespace, tmp_path: Path
) -> None:
    state = tmp_path / "tc.json"
    process, said = agent(node, state)
    guard = int(said.split()[1])
    os.kill(guard, signal.SIGKILL)
    command = [sys.executable, "-m", "intentd.agent.tc.restore", "--state", str(state), "--json"]
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    refused = node.run(command, env=env)
    assert refused.returncode == 1
    assert f"pid {process.pid}" in refused.stderr
    process.kill()
    process.wait()
    assert root_qdisc(node) == "htb 2d17:"
    done = node.run(command, env=env)
    assert done.returncode == 0
    assert json.loads(done.stdout)["devices"][0]["outcome"] == "restored"
    assert root_qdisc(node) == "noqueue 0:"
    again = node.run(command, env=env)
    assert (again.returncode, json.loads(again.stdout)) == (0, {"devices": []})
    state.write_text("{}")
    assert node.run(command, env=env).returncode == 2


async def test_next_agent_adopts_what_a_killed_one_left(
    node: netns.Namespace, tmp_path: Path, host_in: Opener
) -> None:
    process, said = agent(node, tmp_path / "tc.json")
    os.kill(int(said.split()[1]), signal.SIGKILL)
    process.kill()
    process.wait()
    shaper = host_in(node).shaper("eth0")
    await shaper.apply(policy(0.5, 0.5))
    assert shaper.status()["changes"] == 5  # in place: two classes, a queue; two filters go
    record = json.loads((tmp_path / "tc.json").read_text())
    assert record["owner"]["pid"] == os.getpid()
    assert record["devices"][0]["kind"] == "noqueue"
    await shaper.restore()
    assert root_qdisc(node) == "noqueue 0:"


@pytest.mark.parametrize("state_file", ["tc.json", "elsewhere/tc.json"])
async def test_second_agent_on_the_host_is_refused_until_the_first_is_gone(
    node: netns.Namespace, tmp_path: Path, host_in: Opener, state_file: str
) -> None:
    process, said = agent(node, tmp_path / state_file)
    assert said.startswith("shaped")
    shaper = host_in(node).shaper("eth0")
    state = await shaper.apply(policy(0.5, 0.5))
    assert (state.state, state.reason) == (
        Shaping.FAILED,
        f"device 'eth0': another agent shapes its egress (pid {process.pid})",
    )
    assert len(classes(node)) == 3
    assert not (tmp_path / "tc.json").exists() or state_file == "tc.json"
    process.kill()
    process.wait()
    assert gone(int(said.split()[1]))
    assert (await shaper.verify()).state is Shaping.SHAPED
    assert len(classes(node)) == 4


@needs_setpriv
async def test_a_user_who_may_not_shape_cannot_claim_a_device(
    node: netns.Namespace, host_in: Opener
) -> None:
    index = int(node.ip("-o", "link", "show", "eth0").stdout.split(":")[0])
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX);"
        f"s.bind('\\0intentd/tc/{index}/egress'); s.listen(1); print('held', flush=True);"
        "sys.stdin.read()"
    )
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    squatter = node.popen(
        [*user, sys.executable, "-I", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == b"held\n"
        state = await host_in(node).shaper("eth0").apply(policy(0.5, 0.5))
        assert (state.state, state.reason) == (Shaping.SHAPED, "")
    finally:
        squatter.kill()
        squatter.communicate()


@needs_setpriv
def test_without_privilege_it_says_so_and_touches_nothing(
    node: netns.Namespace, tmp_path: Path
) -> None:
    process, said = agent(
        node,
        tmp_path / "tc.json",
        "setpriv",
        "--bounding-set=-net_admin",
        "--inh-caps=-net_admin",
    )
    assert said == "unshaped None ordered but unshaped: this process lacks CAP_NET_ADMIN"
    assert root_qdisc(node) == "noqueue 0:"
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
