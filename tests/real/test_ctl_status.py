"""intentctl beside a daemon that is not well, and in a real shell."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.waiting import until

from intentd.agent.client import Flows
from intentd.daemons.kit.admin import AdminClient, AdminUnreachableError

pytestmark = [pytest.mark.real]
SRC = Path(__file__).parents[2] / "src"
CTL = [sys.executable, "-m", "intentd.daemons.ctl"]
NO_DEVICE = "domain up: failed: device 'nosuch0' does not exist"


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of commands that find an agent whose domain names a device that is not there."""
    base = tmp_path_factory.mktemp("unready")
    environ = {
        **os.environ,
        "PYTHONPATH": str(SRC),
        "RUNTIME_DIRECTORY": str(base / "run"),
        "STATE_DIRECTORY": str(base / "state"),
        "INTENTD_AGENT__STATUS__BIND": "127.0.0.1:0",
        "INTENTD_AGENT__CONTROLLER__ENABLED": "false",
        "INTENTD_AGENT__DOMAINS": '[{name = "up", default = true, device = "nosuch0"}]',
    }
    with (base / "log").open("wb") as log:
        agent = subprocess.Popen(
            [sys.executable, "-m", "intentd.agent.daemon"], env=environ, stdout=log, stderr=log
        )
    admin = AdminClient(base / "run" / "agent.admin.sock")

    def answers() -> bool:
        assert agent.poll() is None, (base / "log").read_text()
        try:
            return bool(admin.call("ping"))
        except AdminUnreachableError:
            return False

    try:
        until(answers, "the agent answers")
        yield environ
    finally:
        agent.terminate()
        agent.wait(60)


def test_what_is_not_well_is_named_and_the_exit_status_says_it(environ: dict[str, str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("not root: without CAP_NET_ADMIN no device is looked for")
    run = subprocess.run(
        [*CTL, "status"], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stderr) == (4, "")
    assert NO_DEVICE in run.stdout
    run = subprocess.run(
        [*CTL, "status", "--json"], env=environ, capture_output=True, timeout=60, check=False
    )
    assert run.returncode == 4
    daemon = json.loads(run.stdout)["daemons"]["agent"]
    assert (daemon["ready"], daemon["reasons"]) == (False, [NO_DEVICE])
    flows = Flows(str(Path(environ["RUNTIME_DIRECTORY"]) / "agent.sock"), answer_timeout_s=60.0)
    with flows.open(100) as flow:  # it gates all the same
        assert (flow.degraded, flow.error) == ("", "")
    flows.close()


def test_the_doctor_names_the_device_and_top_shows_the_agent(environ: dict[str, str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("not root: without CAP_NET_ADMIN no device is looked for")

    def ctl(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CTL, *words], env=environ, capture_output=True, text=True, timeout=60, check=False
        )

    run = ctl("doctor", "--json")
    assert run.returncode == 4, run.stderr
    wrong = {row["check"]: row["evidence"] for row in json.loads(run.stdout)["checks"]
             if row["holds"] is not True}  # fmt: skip
    assert set(wrong) >= {"ready", "qdisc"}
    assert "nosuch0" in wrong["qdisc"]
    assert set(wrong) <= {"ready", "qdisc", "link"}
    run = ctl("top", "--json")
    (row,) = json.loads(run.stdout)["rows"]
    assert (row["role"], row["doing"]) == ("agent", "0 flows send, 0 wait")
    run = ctl("top", "--iterations", "2", "--interval", "0.1")
    assert (run.returncode, run.stdout.count("0 flows send")) == (4, 2)
    run = ctl("explain", "no-such-thing")
    assert (run.returncode, run.stdout) == (1, "")


@pytest.mark.parametrize("as_json", [True, False])
def test_status_is_shown_again_until_interrupted(environ: dict[str, str], as_json: bool) -> None:
    command = [*CTL, "status", "--watch", "--interval", "0.1", *(["--json"] if as_json else [])]
    watching = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert watching.stdout is not None
        seen = 0
        for line in watching.stdout:
            if as_json:
                assert list(json.loads(line)["daemons"]) == ["agent"]
            seen += as_json or line.startswith("\x1b[H\x1b[2J")
            if seen == 3:
                break
        watching.send_signal(signal.SIGINT)
        watching.stdout.read()
        assert watching.wait(60) == 0
    finally:
        watching.kill()
        watching.communicate()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(tmp_path: Path) -> None:
    typed = {
        "sta": ["status"],
        "policy ro": ["rollback"],
        "flows classes --wor": ["--workload"],
        "nope x": [],
    }
    tool = tmp_path / "intentctl"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m intentd.daemons.ctl "$@"\n')
    tool.chmod(0o755)
    script = "set -e; source <(intentctl completion bash); complete -p intentctl\n" + "".join(
        f"COMP_WORDS=(intentctl {words}); COMP_CWORD={len(words.split())}\n"
        '_intentctl_completion intentctl; echo "${COMPREPLY[@]}"\n'
        for words in typed
    )
    run = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PYTHONPATH": str(SRC), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    registered, *offered = run.stdout.splitlines()
    assert registered == "complete -o default -F _intentctl_completion intentctl"
    assert [line.split() for line in offered] == list(typed.values())
