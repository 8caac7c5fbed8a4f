"""The examples as processes, beside a real agent and without one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from intentd.daemons.kit.admin import AdminClient, AdminUnreachableError

pytestmark = [pytest.mark.real]
ROOT = Path(__file__).parents[2]
CONFIG = """
state_dir = "{base}/state"
run_dir = "{base}/run"
drain_timeout_s = 0
status = {{ enabled = false }}
controller = {{ enabled = false }}
[[domains]]
name = "up"
[domains.policy]
classes = [{{ threshold_bytes = 5000, weight = 0.6 }}, {{ threshold_bytes = inf, weight = 0.4 }}]
"""


def environment(base: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "INTENTD_SOCKET": str(base / "run" / "agent.sock"),
    }


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AdminClient]:
    config = tmp_path / "agent.toml"
    config.write_text(CONFIG.format(base=tmp_path))
    command = [sys.executable, "-m", "intentd.agent.daemon", "--config", str(config)]
    process = subprocess.Popen(command, env=environment(tmp_path))
    admin = AdminClient(tmp_path / "run" / "agent.admin.sock")
    deadline = time.monotonic() + 60
    try:
        while True:
            try:
                if admin.call("ready")["ready"]:
                    break
            except AdminUnreachableError:
                assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield admin
    finally:
        process.kill()
        process.wait()


class Example:
    """An example's server; its address is the first line it prints."""

    def __init__(self, base: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(base),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[-1]

    def stop(self) -> str:
        self.process.terminate()
        return self.process.communicate(timeout=60)[1]


def fetch(base: Path, address: str, name: str) -> bytes:
    program = str(ROOT / "examples" / "file_server.py")
    done = subprocess.run(
        [sys.executable, program, "get", address, name],
        env=environment(base),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == (0 if done.stdout else 1)
    return done.stdout


@pytest.mark.parametrize("gated", [True, False])
def test_file_server(gated: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if gated:
        admin = request.getfixturevalue("agent")
    files = tmp_path / "files"
    files.mkdir()
    (files / "small").write_bytes(b"s" * 1000)
    (files / "large").write_bytes(os.urandom(3_000_000))
    program = str(ROOT / "examples" / "file_server.py")
    server = Example(tmp_path, program, "serve", str(files), "--bind", "127.0.0.1:0")
    try:
        for name in ("small", "large"):
            assert fetch(tmp_path, server.address, name) == (files / name).read_bytes()
        assert fetch(tmp_path, server.address, "none") == b""
    finally:
        told = server.stop()
    assert told.count("in turn" if gated else "degraded (absent)") == 2
    if gated:
        classes = admin.call("flows")["domains"]["up"]["classes"]
        assert [row["fct_s"]["count"] for row in classes] == [1, 1]


def test_asyncio_service(agent: AdminClient, tmp_path: Path) -> None:
    server = Example(tmp_path, str(ROOT / "examples/asyncio_service.py"), "--bind", "127.0.0.1:0")
    try:
        for size, index in ((100, "0"), (1_000_000, "1")):
            url = f"http://{server.address}/bytes/{size}"
            with urllib.request.urlopen(url, timeout=60) as answer:
                assert len(answer.read()) == size
                assert answer.headers["X-Intentd-Class"] == index
                assert answer.headers["X-Intentd-Start"] == "ordered"
    finally:
        server.stop()


def test_the_first_flow_of_the_readme(agent: AdminClient, tmp_path: Path) -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("    from intentd"))
    last = next(i for i in range(first, len(lines)) if "flow.send(" in lines[i])
    program = textwrap.dedent(
        """
        import socket
        server = socket.create_server(("127.0.0.1", 0))
        sock = socket.create_connection(server.getsockname())
        data = b"x" * 1000
        """
    ) + textwrap.dedent("\n".join(lines[first : last + 1]))
    done = subprocess.run(
        [sys.executable, "-c", program + "\nprint(flow.degraded or 'in turn')"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "in turn\n", "")
    assert agent.call("explain", id="1")["size_bytes"] == 1000
