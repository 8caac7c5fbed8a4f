"""``intentctl up`` and ``down``: the real suite, restarts, and stopping only what it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.agent import app_protocol as wire
from intentd.daemons.ctl.supervisor import alive
from intentd.daemons.kit.admin import AdminClient, AdminUnreachableError

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0


class Suite:
    """One suite in directories and ports of its own."""

    def __init__(self, directory: Path) -> None:
        # Every worker its own ports; below the ephemeral range, so nothing else takes them.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        self.port_base = 21000 + 100 * worker
        self.run_dir = directory / "run"
        self.environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "RUNTIME_DIRECTORY": str(self.run_dir),
            "STATE_DIRECTORY": str(directory / "state"),
        }
        self.command = [sys.executable, "-m", "intentd.daemons.ctl"]

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=2 * LIMIT_S,
            check=False,
            cwd=ROOT,
        )

    def up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.ctl("up", f"--port-base={self.port_base}", *arguments)

    def record(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.run_dir / "up.json").read_text())
        return document

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < deadline, what
            time.sleep(0.05)


@pytest.fixture
def suite(tmp_path: Path) -> Iterator[Suite]:
    made = Suite(tmp_path)
    yield made
    made.ctl("down")


def test_up_detached_restarts_and_down(suite: Suite) -> None:
    started = suite.up("--detach", "--json")
    assert started.returncode == 0, started.stderr
    addresses = json.loads(started.stdout)["status"]
    assert addresses["controller"] == f"127.0.0.1:{suite.port_base + 1}"
    again = suite.up("--detach")
    assert again.returncode == 1
    assert "runs already" in again.stderr
    status = suite.ctl("status", "--json")
    assert status.returncode == 0, status.stdout + status.stderr
    assert {m["role"] for m in json.loads(status.stdout)["members"]} == {
        "agent", "gpu", "sequencer",
    }  # fmt: skip
    assert suite.ctl("reload", "controller").returncode == 0
    made = json.loads(suite.ctl("jobs", "submit", "--size", "1", "--json", "--", "true").stdout)
    job = str(made["job"])

    def over() -> bool:
        found = json.loads(suite.ctl("jobs", "show", job, "--json").stdout)
        return bool(found["state"] == "finished")

    suite.until(over, "a job of the embedded scheduler ended")
    record = suite.record()
    victim = record["children"]["sequencer"]["pid"]
    os.kill(victim, signal.SIGKILL)
    client = AdminClient(suite.run_dir / "sequencer.admin.sock", 5.0)

    def back() -> bool:
        with contextlib.suppress(AdminUnreachableError):
            found = client.call("status")
            return found["pid"] != victim and found["controller"]["connected"]
        return False

    suite.until(back, "the sequencer came back")
    before = suite.record()["children"]["agent"]["pid"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as application:
        application.connect(str(suite.run_dir / "agent.sock"))
        application.settimeout(60)
        application.send(wire.encode_hello(1, "test"))
        assert application.recv(512)[3] == wire.WELCOME
        restarted = suite.ctl("restart", "agent", "--json")
        assert restarted.returncode == 0, restarted.stderr
        assert json.loads(restarted.stdout)["pid"] != before
        kinds = [application.recv(512)[3] for _ in range(2)]
    assert kinds == [wire.PAUSE, wire.WELCOME]  # the same connection, another agent
    assert "systemctl restart intentd-gpu" in suite.ctl("restart", "gpu", "--run-dir=/none").stderr
    children = {**record["children"], **suite.record()["children"]}
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        down = suite.ctl("down", "--json")
        assert json.loads(down.stdout)["stopped"] == [
            "supervisor", "controller", "sequencer", "agent", "gpu",
        ]  # fmt: skip
        assert not any(alive(child) for child in (*children.values(), record["supervisor"]))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert suite.ctl("status").returncode == 3
    assert "nothing to stop" in suite.ctl("down").stdout


MODEL = """
import sys
from aiohttp import web

async def chat(request):
    words = {"role": "assistant", "content": "Rain is water that falls."}
    usage = {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
    choice = {"index": 0, "message": words, "finish_reason": "stop"}
    return web.json_response({"id": "x", "object": "chat.completion", "created": 1, "model": "m",
                              "choices": [choice], "usage": usage})

app = web.Application()
app.router.add_post("/v1/chat/completions", chat)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[sys.argv.index("--port") + 1]), print=None)
"""


def test_a_live_load_shows_flows_jobs_and_prompts(suite: Suite, tmp_path: Path) -> None:
    program = tmp_path / "model.py"
    program.write_text(MODEL)
    started = suite.up("--detach", "--live", f"--small-model={program}")
    assert started.returncode == 0, started.stderr

    def seen() -> bool:
        flows = json.loads(suite.ctl("flows", "show", "--json").stdout or "{}")
        jobs = json.loads(suite.ctl("jobs", "list", "--json").stdout or "{}")
        spend = json.loads(suite.ctl("prompts", "spend", "--json").stdout or "{}")
        found.update(flows=flows, jobs=jobs, spend=spend)
        finished = [one["finished"] for one in flows.get("domains", [])]
        return bool(sum(finished) > 0 and jobs.get("jobs") and spend.get("rows"))

    found: dict[str, Any] = {}
    suite.until(seen, "all three systems have something to show")
    record = suite.record()
    assert {"model", "live", "proxy"} <= record["children"].keys()
    assert suite.ctl("down").returncode == 0
    assert not any(alive(child) for child in record["children"].values())


def test_down_stops_children_whose_supervisor_was_killed(suite: Suite) -> None:
    assert suite.up("--detach").returncode == 0
    record = suite.record()
    os.kill(record["supervisor"]["pid"], signal.SIGKILL)
    suite.until(lambda: not alive(record["supervisor"]), "the supervisor is gone")
    assert suite.ctl("down").returncode == 0
    assert not any(alive(child) for child in record["children"].values())


def test_ctrl_c_stops_the_suite_in_order(suite: Suite) -> None:
    process = subprocess.Popen(
        [*suite.command, "up", f"--port-base={suite.port_base}"],
        env=suite.environ, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("intentd runs"):
            break
    record = suite.record()
    os.killpg(process.pid, signal.SIGINT)
    lines += process.stderr.readlines()
    assert process.wait(LIMIT_S) == 0
    process.stderr.close()
    assert not any(alive(child) for child in record["children"].values())
    assert sum("lifecycle stopped" in line for line in lines) == 4
    assert not (suite.run_dir / "up.json").exists()


def test_a_wrong_configuration_is_told_and_nothing_stays(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text("nonsense = 1\n")
    result = suite.up("--detach", f"--config-dir={tmp_path}")
    assert result.returncode == 1
    assert "nonsense" in result.stderr
    assert not (suite.run_dir / "up.json").exists()
