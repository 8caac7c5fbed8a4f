"""intentctl itself: groups that load alone, exit codes, keys, configuration, completion."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from intentd.core.errors import InputError, IntentdError
from intentd.daemons.ctl import main as tool
from intentd.daemons.ctl.output import ExitCode, exit_code_of, print_json, print_table
from intentd.daemons.ctl.status import code_of
from intentd.daemons.ctl.supervisor import Layout, alive, identify, read_record
from intentd.daemons.kit.admin import AdminRefusedError, AdminUnreachableError


@pytest.fixture(autouse=True)
def _private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("up", "down", "status", "keys", "check-config", "reload", "completion", "flows"):
        assert f"  {name} " in shown
    assert tool.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("intentd ")


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    root = typer.main.get_command(tool.app)

    def walk(words: tuple[str, ...], command: Any) -> list[tuple[str, ...]]:
        names = command.list_commands(None) if hasattr(command, "list_commands") else ()
        inner = [walk((*words, name), command.get_command(None, name)) for name in names]
        return [words, *(line for lines in inner for line in lines)]

    commands = walk((), root)
    assert ("prompts", "keys", "new") in commands
    for words in commands:
        assert tool.main([*words, "--help"]) == 0, words
        assert "Usage: intentctl" in capsys.readouterr().out, words


def test_unknown_commands_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["nope"]) == ExitCode.USAGE
    assert tool.main(["keys", "nope"]) == ExitCode.USAGE
    assert "nope" in capsys.readouterr().err


def test_a_group_whose_extra_is_missing_says_so_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "intentd.daemons.ctl.keys", raising=False)
    monkeypatch.setitem(tool.GROUPS, "keys", "ctl")

    def missing(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {name}", name="zmq.backend")

    monkeypatch.setattr(tool.importlib, "import_module", missing)
    assert tool.main(["keys", "new", "--kind", "fin", "x"]) == ExitCode.FAILED
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "intentctl keys: not available: zmq.backend is not installed (pip install 'intentd[ctl]')"
    ]


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "k"
    assert tool.main(["keys", "new", str(path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert tool.main(["keys", "show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["public"] == made["public"]
    assert tool.main(["keys", "new", str(path)]) == ExitCode.FAILED
    assert "never overwritten" in capsys.readouterr().err
    assert tool.main(["keys", "fin", str(tmp_path / "f")]) == 0
    assert tool.main(["keys", "show", str(tmp_path / "f")]) == ExitCode.USAGE
    assert "0600" not in (tmp_path / "f").read_text()


def test_nobody_there_is_three(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["status"]) == ExitCode.UNREACHABLE
    assert tool.main(["reload", "agent"]) == ExitCode.UNREACHABLE
    assert tool.main(["explain", "flow-1"]) == ExitCode.UNREACHABLE
    assert tool.main(["status", "--json"]) == ExitCode.UNREACHABLE
    assert json.loads(capsys.readouterr().out) == {"daemons": {}, "unreachable": {}, "members": []}


def test_check_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('nam = "x"\n')
    assert tool.main(["check-config", "agent", str(path), "--json"]) == ExitCode.USAGE
    answer = json.loads(capsys.readouterr().out)
    assert answer["errors"] == ["nam: got 'x', expected a known field: did you mean name?"]
    path.write_text('name = "x"\n')
    assert tool.main(["check-config", "agent", str(path)]) == 0
    assert tool.main(["check-config", "cook"]) == ExitCode.USAGE


def test_config_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["config", "agent", "--json"]) == 0
    rows = {row["path"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["controller.endpoint"]["default"] == '"tcp://127.0.0.1:7400"'
    assert all(row["description"] for row in rows.values())
    assert tool.main(["config", "agent", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| setting |")
    assert tool.main(["config", "agent"]) == 0
    assert "drain_timeout_s" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["completion", shell]) == 0
    assert "_INTENTCTL_COMPLETE" in capsys.readouterr().out


def test_completion_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_INTENTCTL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "intentctl check")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert tool.main([]) == 0
    assert capsys.readouterr().out.split() == ["check-config"]


def test_exit_codes() -> None:
    assert exit_code_of(AdminUnreachableError("x")) == 3
    assert exit_code_of(AdminRefusedError("x")) == 1
    assert exit_code_of(AdminRefusedError("x", "bad_request")) == 2
    assert exit_code_of(InputError("a", 1, "b")) == 2
    assert exit_code_of(IntentdError("x")) == 1


def test_json_is_one_document_without_infinities(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("inf"), "b": (1, float("nan")), 3: "x"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, None], "3": "x"}
    print_table(("one", "two"), [(1, None), ("x" * 200, "y")], title="t")
    assert "x" * 200 in capsys.readouterr().out


def status_of(**changes: object) -> dict[str, object]:
    return {"ready": True, "controller": {"connected": True}, **changes}


def test_status_codes() -> None:
    member = {"connected": True, "refused": {}}
    good = {"daemons": {"agent": status_of()}, "unreachable": {}, "members": [member]}
    assert code_of(good) == ExitCode.OK
    assert code_of({**good, "daemons": {}}) == ExitCode.UNREACHABLE
    for worse in (
        {"daemons": {"agent": status_of(ready=False)}},
        {"daemons": {"agent": status_of(controller={"connected": False})}},
        {"unreachable": {"agent": "gone"}},
        {"members": [{"connected": False, "refused": {}}]},
        {"members": [{"connected": True, "refused": {"flows": {"reason": "x"}}}]},
    ):
        assert code_of({**good, **worse}) == ExitCode.DEGRADED


def test_a_recorded_process_is_the_same_only_with_its_start(tmp_path: Path) -> None:
    import os

    me = identify(os.getpid())
    assert alive(me)
    assert not alive({"pid": os.getpid(), "start": "1"})
    with pytest.raises(ProcessLookupError):
        identify(2**22 + 1)
    record = tmp_path / "up.json"
    assert read_record(record) is None
    for content in ("", "[]", '{"supervisor": {"pid": 1, "start": "x"}}', '{"supervisor": 3}'):
        record.write_text(content)
        assert read_record(record) is None
    record.write_text(json.dumps({"supervisor": me, "children": {"agent": me}}))
    assert read_record(record) is not None


def test_the_layout_of_a_suite(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "r", tmp_path / "s", tmp_path, 9000)
    layout.prepare()
    assert layout.environment("controller")["INTENTD_CONTROLLER__HUB__BIND"] == (
        "tcp://127.0.0.1:9000"
    )
    assert layout.environment("agent")["INTENTD_AGENT__FIN__BIND"] == "127.0.0.1:9030"
    (tmp_path / "agent.toml").write_text("")
    assert set(layout.environment("agent")) == {
        "INTENTD_AGENT__STATE_DIR", "INTENTD_AGENT__RUN_DIR",
    }  # fmt: skip
