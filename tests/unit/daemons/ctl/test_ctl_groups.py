"""intentctl policy, domains, flows and explain, against a daemon that says what the test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.ctl import main as tool
from intentd.daemons.ctl.output import ExitCode

CLASS = {
    "threshold_bytes": None,
    "weight": 1.0,
    "mpl": 1,
    "order": "fifo",
    "sequencing": "local",
    "dscp": 3,
}
ROW = {
    "application": "flows",
    "era": 7,
    "number": 2,
    "issued_wall_s": 1.7e9,
    "author": "automatic",
    "reason": "up: changed",
    "copy_of": None,
    "changes": ["up: 1 -> 2 classes", "up: x"],
}
WHOLE = ROW | {
    "inputs": {"domains": {"up": {"flows": 900, "load": None}}},
    "body": {"domains": [{"domain": "up", "name": "2d", "rate_bps": 1e9, "classes": [CLASS]}]},
    "run_by": ["agent/a"],
    "refused_by": [{"member": "agent/b", "reason": "no"}],
}
DOMAIN = {
    "domain": "up",
    "rate_bps": 1e9,
    "policy": "2d",
    "pinned": True,
    "classes": 3,
    "load": None,
    "learning": "settled",
    "window_flows": 5,
    "observed_flows": 9,
    "last_change": {"ago_s": 61.0},
    "agents": {"agent/a": {"shaping": "", "reason": ""}},
}
FLOWS = {
    "domain": "up",
    "policy": "2d",
    "rate_bps": 1e9,
    "load": 0.5,
    "arrivals": 9,
    "finished": 8,
    "degraded": {"timeout": 1},
    "classes": [
        CLASS
        | {
            "index": 0,
            "load": 0.5,
            "waiting": 1,
            "active": 1,
            "fct_s": {"count": 8, "mean_s": 0.001, "p50_s": 0.001},
        }
    ],
}


Said = Any  # see conftest
Out = Callable[[], tuple[str, str]]


@pytest.mark.parametrize(
    ("argv", "command", "answer", "shown"),
    [
        (["policy", "list"], "policy_list", {"era": 7, "held": None, "policies": [ROW]}, "(+1)"),
        (["policy", "show", "2"], "policy_show", WHOLE, "refused by agent/b: no"),
        (["policy", "set", "--domain", "up"], "policy_set", {"issued": ROW}, "issued policy 2"),
        (["policy", "set", "--domain", "up"], "policy_set", {"issued": None}, "stays as it is"),
        (["policy", "rollback", "1"], "policy_rollback", {"issued": ROW}, "up: 1 -> 2 classes"),
        (["policy", "release"], "policy_release", {"released": False}, "nothing was held"),
        (["domains"], "domains", {"domains": [DOMAIN]}, "2d (pinned)"),
        (["flows"], "flows", {"domains": [FLOWS]}, "degraded starts: timeout 1"),
    ],
)
def test_a_table_for_people_and_one_document_for_programs(
    said: Said, out: Out, argv: list[str], command: str, answer: dict[str, Any], shown: str
) -> None:
    said.serve("controller")
    said.answers[command] = answer
    assert tool.main(argv) == ExitCode.OK
    assert shown in out()[0]
    assert tool.main([*argv, "--json"]) == ExitCode.OK
    assert json.loads(out()[0]) == answer
    assert [asked[:2] for asked in said.asked] == [("controller", command)] * 2


def test_what_a_daemon_refuses_is_bad_input_and_no_daemon_is_three(said: Said, out: Out) -> None:
    assert tool.main(["domains"]) == ExitCode.UNREACHABLE
    assert tool.main(["explain", "1"]) == ExitCode.UNREACHABLE
    out()
    said.serve("controller")
    said.answers["policy_set"] = "weight: got 0.9, expected weights that sum to 1"
    assert tool.main(["policy", "set", "--domain", "up", "--json"]) == ExitCode.USAGE
    assert out() == ("", "intentctl: weight: got 0.9, expected weights that sum to 1\n")


def test_settings_of_set_are_read_as_toml(said: Said, tmp_path: Path) -> None:
    said.serve("controller")
    said.answers["policy_set"] = {"issued": None}
    file = tmp_path / "up.toml"
    file.write_text('domain = "up"\nmpl = [1]\n')
    options = ["--set", "mpl=[2, 1]", "--set", "policy=2d-boost", "--reset"]
    assert tool.main(["policy", "set", str(file), *options]) == ExitCode.OK
    [(_, _, args)] = said.asked
    expected = {"domain": "up", "mpl": [2, 1], "policy": "2d-boost", "reset": True}
    assert args["document"] == expected


@pytest.mark.parametrize(
    ("arguments", "content", "text"),
    [
        ([], None, "FILE, --domain: got 'neither'"),
        (["--domain", "up", "--set", "x"], None, "--set: got 'x', expected key=value"),
        (["FILE"], None, "expected a readable text file"),
        (["FILE"], "a = [", "expected TOML or a JSON object"),
        (["FILE"], "{", "expected TOML or a JSON object"),
        (["FILE", "--set", "mpl=[1]"], "domains = []", "no options beside a file"),
    ],
)
def test_documents_that_are_no_policy(
    said: Said, out: Out, tmp_path: Path, arguments: list[str], content: str | None, text: str
) -> None:
    file = tmp_path / "f"
    if content is not None:
        file.write_text(content)
    argv = [str(file) if argument == "FILE" else argument for argument in arguments]
    assert tool.main(["policy", "set", *argv]) == ExitCode.USAGE
    assert text in out()[1]
    assert said.asked == []


def test_both_spellings_of_explain_say_the_same(said: Said, out: Out) -> None:
    said.serve("controller")  # explains nothing, and is not blamed
    said.serve("agent")
    story = {"flow": 4, "mark": {"dscp": 3}, "peer": None, "because": ["size"], "alternatives": []}
    said.answers["explain"] = story
    assert tool.main(["flows", "explain", "4"]) == ExitCode.OK
    assert out()[0] == "flow: 4\nmark: dscp 3\nbecause:\n  - size\n"
    assert tool.main(["explain", "4", "--role", "agent"]) == ExitCode.OK
    assert out()[0] == "flow: 4\nmark: dscp 3\nbecause:\n  - size\n"
    assert tool.main(["flows", "explain", "4", "--json"]) == ExitCode.OK
    assert json.loads(out()[0]) == story


def test_explain_of_what_nobody_knows(said: Said, out: Out) -> None:
    for role in ("controller", "agent"):
        said.serve(role)
    assert tool.main(["explain", "4"]) == ExitCode.FAILED
    assert out()[1] == "intentctl: nobody knows '4'\n"
    said.answers["explain"] = "flow: got 4, expected an open flow"
    assert tool.main(["explain", "4", "--role", "agent"]) == ExitCode.FAILED
    assert out()[1] == "intentctl: nobody knows '4'; agent: flow: got 4, expected an open flow\n"
    assert tool.main(["explain", "4", "--role", "cook"]) == ExitCode.USAGE
