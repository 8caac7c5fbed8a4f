"""Each check of the doctor is made false on purpose, and true again."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

import intentd
from intentd.daemons.ctl import doctor
from intentd.daemons.ctl.output import ExitCode
from intentd.daemons.ctl.policy import flat
from intentd.daemons.ctl.top import doing
from intentd.daemons.kit.keys import (
    new_curve_keys,
    new_fin_key,
    write_curve_keys,
    write_fin_key,
)


def status(role: str, **changed: Any) -> dict[str, Any]:
    link = {"endpoint": "tcp://127.0.0.1:7400", "connected": True, "last_error": ""}
    return {
        "role": role, "name": "h", "host": "h", "version": intentd.__version__, "pid": os.getpid(),
        "started_wall_s": time.time() - 10, "uptime_s": 10.0, "ready": True, "reasons": [],
        "generation": 3, "config_path": "/etc/x.toml",
        "reload": {"outcome": "confirmed", "reason": "", "fallback": ""},
        "policies": {}, "controller": link, "detail": {}, **changed,
    }  # fmt: skip


def member(**changed: Any) -> dict[str, Any]:
    return {
        "role": "agent", "name": "m", "version": intentd.__version__, "connected": True,
        "heard_s_ago": 1.0, "policies": {"flows": [1, 2]}, "refused": {}, "clock_ahead_s": 0.01,
        **changed,
    }  # fmt: skip


class Suite(doctor.Facts):
    """A healthy controller and agent whose words a test changes."""

    def __init__(self, where: Path) -> None:
        super().__init__(where / "nothing-here")
        state, run = where / "state", where / "run"
        state.mkdir(mode=0o700)
        run.mkdir()
        for name in ("hub", "agent"):
            write_curve_keys(where / name, new_curve_keys())
        self.where = where
        self.one = member()
        for role in ("controller", "agent"):
            socket = run / f"{role}.admin.sock"
            socket.touch(mode=0o660)
            self.sockets[role] = socket
            self.status[role] = status(role)
            self.proofs[role] = {"claims": []}
        self.status["controller"]["policies"] = {"flows": [1, 2]}
        self.status["controller"]["detail"] = {"members": [self.one]}
        self.config = {
            "controller": {"state_dir": str(state), "hub": {"key_file": str(where / "hub")}},
            "agent": {
                "state_dir": str(state),
                "controller": {
                    "key_file": str(where / "agent"),
                    "server_key_file": str(where / "hub.pub"),
                },
            },
        }

    def wrong(self) -> dict[str, str]:
        """check -> evidence of what is not true."""
        return {c.check: c.evidence for _, c in doctor.examine(self) if c.holds is not True}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def test_a_healthy_suite_is_proved(suite: Suite) -> None:
    rows = doctor.examine(suite)
    assert suite.wrong() == {}
    assert {claim.check for _, claim in rows} == {
        "answers", "ready", "config", "version", "policy", "clock", "link", "key", "state-dir",
        "socket",
    }  # fmt: skip
    assert doctor.code_of(rows) is ExitCode.OK


@pytest.mark.parametrize(
    ("check", "change", "says"),
    [
        ("ready", {"ready": False, "reasons": ["disk full"]}, "disk full"),
        ("version", {"version": "0.0.1"}, "0.0.1"),
        ("clock", {"uptime_s": 7.0}, "stepped by 3.0"),
        (
            "config",
            {"reload": {"outcome": "refused", "reason": "name: got 1", "fallback": ""}},
            "generation 3: refused: name: got 1",
        ),
        (
            "config",
            {"reload": {"outcome": "fallback", "reason": "x", "fallback": "name: got 1"}},
            "generation 3, the last good one: name: got 1",
        ),
        ("link", {"controller": {"endpoint": "e", "connected": False, "last_error": "x"}}, "e: x"),
    ],
)
def test_what_an_agent_says_is_held_against_it(
    suite: Suite, check: str, change: dict[str, Any], says: str
) -> None:
    suite.status["agent"].update(change)
    assert set(suite.wrong()) == {check}
    assert says in suite.wrong()[check]
    assert doctor.code_of(doctor.examine(suite)) is ExitCode.DEGRADED


@pytest.mark.parametrize(
    ("check", "change", "says"),
    [
        ("policy", {"policies": {"flows": [1, 1]}}, "runs 1.1"),
        ("policy", {"policies": {}, "refused": {"flows": {"reason": "no"}}}, "runs none, refused"),
        ("version", {"version": "9"}, "9"),
        ("clock", {"clock_ahead_s": -2.5}, "-2.500 s"),
        ("link", {"connected": False}, "last heard 1 s ago"),
    ],
)
def test_what_the_controller_knows_of_a_member_is_held_against_it(
    suite: Suite, check: str, change: dict[str, Any], says: str
) -> None:
    suite.one.update(change)
    assert set(suite.wrong()) == {check}
    assert says in suite.wrong()[check]


def test_keys(suite: Suite) -> None:
    key = suite.where / "agent"
    key.chmod(0o640)
    assert "key" in suite.wrong()
    key.chmod(0o600)
    assert suite.wrong() == {}
    other = suite.where / "other"
    write_curve_keys(other, new_curve_keys())
    (suite.where / "agent.pub").write_bytes((suite.where / "other.pub").read_bytes())
    assert "agent.pub is another key" in suite.wrong()["key"]
    (suite.where / "hub.pub").write_bytes((suite.where / "other.pub").read_bytes())
    assert sum(c.check == "key" and not c.holds for _, c in doctor.examine(suite)) == 3
    key.unlink()
    assert "key" in suite.wrong()


def test_a_fin_key(suite: Suite) -> None:
    path = suite.where / "fin.key"
    write_fin_key(path, new_fin_key())
    suite.config["agent"]["fin"] = {"key_file": str(path)}
    assert suite.wrong() == {}
    path.chmod(0o644)
    assert set(suite.wrong()) == {"key"}
    path.write_text("nothing\n")
    assert set(suite.wrong()) == {"key"}


def test_state_directory(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    state = suite.where / "state"
    state.chmod(0o777)
    assert set(suite.wrong()) == {"state-dir"}
    state.chmod(0o700)
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1 << 62)
    assert set(suite.wrong()) == {"state-dir"}
    monkeypatch.undo()
    state.rmdir()
    assert "No such file" in suite.wrong()["state-dir"]


def test_sockets(suite: Suite) -> None:
    suite.sockets["agent"].chmod(0o666)
    assert suite.wrong() == {"socket": "mode 0666"}


def test_a_daemon_that_does_not_answer_cannot_be_asked(suite: Suite) -> None:
    suite.silent["agent"] = "connection refused"
    assert suite.wrong() == {"answers": "connection refused"}
    assert doctor.code_of(doctor.examine(suite)) is ExitCode.UNREACHABLE
    assert doctor.code_of([]) is ExitCode.UNREACHABLE


def test_what_a_daemon_proves_of_itself_counts(suite: Suite) -> None:
    claim = {"check": "qdisc", "statement": "s", "holds": False, "evidence": "e", "cure": "c"}
    suite.proofs["agent"] = {"claims": [claim]}
    assert suite.wrong() == {"qdisc": "e"}


def test_what_daemons_do_now_in_words() -> None:
    rows = [{"active": 2, "waiting": 1}, {"active": 0, "waiting": 4}]
    assert doing("agent", {"domains": {"eth0": {"classes": rows}}}) == "2 flows send, 5 wait"
    assert doing("gpu", {"jobs": {"running": 2, "pending": 0}}) == "2 running"
    assert doing("proxy", {"models": {"a": {"calls": 3}}}) == "3 calls under way, 1 models"
    assert doing("controller", {"leadership": {"state": "standby"}}).startswith("standby, 0 mem")


def test_policies_are_compared_by_setting() -> None:
    one = {"domains": [{"domain": "eth0", "classes": [{"weight": 1.0}]}]}
    assert flat(one) == {
        "domains[eth0].domain": "eth0",
        "domains[eth0].classes[0].weight": 1.0,
    }
    assert flat({"models": [{"name": "m", "cooldown_s": 2}], "x": []}) == {
        "models[m].name": "m",
        "models[m].cooldown_s": 2,
    }
