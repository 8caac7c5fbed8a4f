"""intentctl tc as people run it: offline plans, the kernel's state, restoration, bad input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.core.flows.policy import (
    ClassPolicy,
    DomainPolicy,
    FlowsPolicy,
    domain_to_plain,
    flows_to_plain,
)
from intentd.testbed import netns

pytestmark = [pytest.mark.real, pytest.mark.netns]
SRC = Path(__file__).parents[2] / "src"
CLASSES = (ClassPolicy(1e5, 0.7, dscp=10), ClassPolicy(math.inf, 0.3, dscp=12))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "intentd.daemons.ctl", "tc", *words]


def ctl(*words: str, node: netns.Namespace | None = None) -> subprocess.CompletedProcess[str]:
    argv = command(*words) if node is None else node.command(command(*words))
    return subprocess.run(
        argv,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.json"
    domains = tuple(DomainPolicy(name, 1e9, CLASSES) for name in ("up", "down"))
    path.write_text(json.dumps(flows_to_plain(FlowsPolicy(domains))))
    return path


@pytest.fixture
def node() -> Iterator[netns.Namespace]:
    reason = netns.unavailable()
    if reason:
        pytest.skip(reason)
    with netns.Topology("tctl") as net:
        node, peer = net.namespace("node"), net.namespace("peer")
        net.pair(node, peer)
        yield node


def test_plan_works_offline(policy: Path) -> None:
    done = ctl("plan", "--policy", str(policy), "--domain", "up", "--device", "wan0",
               "--rate", "100Mbit", "--offline", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["rate_bps"] == 1e8
    assert document["against"] == "empty"
    assert document["changes"][0] == "tc qdisc add dev wan0 root handle 2d17: htb default 8"
    assert [c["rate_bps"] for c in document["tree"]["classes"][2:]] == [69_300_000, 29_700_000]


def test_planned_commands_build_the_very_tree(policy: Path, node: netns.Namespace) -> None:
    """The commands, run by the tc tool, leave nothing to change: both mean the same."""
    words = ("--policy", str(policy), "--domain", "up", "--device", "eth0", "--json")
    first = json.loads(ctl("plan", *words, node=node).stdout)
    assert first["against"] == "kernel"
    assert len(first["changes"]) == 1 + 4 + 3 + 4
    for line in first["changes"]:
        node.tc(*line.split()[1:])
    assert json.loads(ctl("plan", *words, node=node).stdout)["changes"] == []
    shown = json.loads(ctl("show", "--device", "eth0", "--json", node=node).stdout)
    assert shown["ours"] is True
    assert [c["role"] for c in shown["classes"]] == ["link", "unmarked", "class 0", "class 1"]
    assert len(shown["filters"]) == 4
    table = ctl("show", "--device", "eth0", node=node)
    assert "2d17:10" in table.stdout


def test_foreign_is_refused_and_shown(policy: Path, node: netns.Namespace) -> None:
    node.tc(*["qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb"])
    done = ctl("plan", "--policy", str(policy), "--domain", "up", "--device", "eth0", "--json",
               node=node)  # fmt: skip
    assert done.returncode == 1
    assert json.loads(done.stdout)["foreign"] == "htb 1:"
    shown = json.loads(ctl("show", "--device", "eth0", "--json", node=node).stdout)
    assert (shown["ours"], shown["classes"]) == (False, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--policy", "{policy}", "--device", "e"), "the file has 2: up, down"),
        (("--policy", "{policy}", "--domain", "x", "--device", "e"), "one of the file's domains"),
        (("--policy", "/no/such", "--domain", "x", "--device", "e"), "a readable JSON file"),
        (("--policy", "{bad}", "--device", "e"), "classes"),
        (("--policy", "{text}", "--device", "e"), "JSON"),
        (("--policy", "{policy}", "--domain", "up", "--device", "e", "--rate", "fast"), "'1Gbit'"),
        (("--policy", "{policy}", "--domain", "up", "--device", "e", "--rate", "0"), "rate_bps"),
        (("--policy", "{policy}", "--domain", "up", "--device", "x" * 16), "1 to 15 bytes"),
    ],
)
def test_bad_input_is_one_clear_line(
    policy: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    plain: dict[str, Any] = domain_to_plain(DomainPolicy("up", 1e9, CLASSES))
    plain["classes"][0]["weight"] = 0.8
    (tmp_path / "bad.json").write_text(json.dumps(plain))
    (tmp_path / "text.json").write_text("{")
    named = {"policy": policy, "bad": tmp_path / "bad.json", "text": tmp_path / "text.json"}
    done = ctl("plan", "--offline", *(word.format_map(named) for word in words))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_show_and_restore_of_what_is_not_there(tmp_path: Path) -> None:
    done = ctl("show", "--device", "nosuch0")
    assert (done.returncode, done.stderr) == (
        2,
        "intentctl: --device: got 'nosuch0', expected a network device of this host\n",
    )
    done = ctl("restore", "--state", str(tmp_path / "none.json"))
    assert (done.returncode, "a file the agent wrote" in done.stderr) == (2, True)
    (tmp_path / "tc.json").write_text('{"version": 9}')
    done = ctl("restore", "--state", str(tmp_path / "tc.json"))
    assert (done.returncode, "the fields" in done.stderr) == (2, True)
