"""Controller and GPU scheduler as processes: history, search, the operator's choice, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.ctl import main as tool
from intentd.daemons.kit.admin import AdminClient, AdminRefusedError, AdminUnreachableError

pytestmark = pytest.mark.real

WAIT_S = 60.0
ROOT = Path(__file__).parents[2]


class Process:
    """One daemon of the test's."""

    def __init__(self, where: Path, role: str, module: str, settings: str) -> None:
        self.where, self.role, self.module = where, role, module
        self.config = where / f"{role}.toml"
        self.config.write_text(
            f'name = "{role}1"\nstate_dir = "{where}/{role}"\nrun_dir = "{where}/run"\n'
            f'[status]\nbind = "127.0.0.1:0"\n{settings}'
        )
        self.admin = AdminClient(where / "run" / f"{role}.admin.sock", timeout_s=20)
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self.process = self._spawn()
        await until(self._answers)

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self.module, "--config", str(self.config)]
        with (self.where / f"{self.role}.log").open("ab") as log:
            return subprocess.Popen(command, stderr=log, env=dict(os.environ))

    def _answers(self) -> bool:
        assert self.process is not None
        log = (self.where / f"{self.role}.log").read_text()
        assert self.process.poll() is None, log
        try:
            return bool(self.admin.call("ready")["ready"])
        except AdminUnreachableError:
            return False

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(30)
        self.process = None
        return status


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110  the state is in another process
            await asyncio.sleep(0.05)


@pytest.fixture
async def suite(tmp_path: Path) -> AsyncIterator[tuple[Process, Process]]:
    hub = f"ipc://{tmp_path}/hub"
    controller = Process(
        tmp_path,
        "controller",
        "intentd.controller.daemon",
        f'[hub]\nbind = "{hub}"\nreport_interval_s = 0.2\n'
        "[jobs]\nhistory_interval_s = 0.1\nmin_jobs = 60\nevaluations = 80\nseconds = 30\n"
        "samples = 1\nsample_jobs = 60\n",
    )
    gpu = Process(
        tmp_path,
        "gpu",
        "intentd.daemons.gpu.daemon",
        f'[controller]\nendpoint = "{hub}"\nbackoff_min_s = 0.05\nbackoff_max_s = 0.5\n'
        '[jobs]\nexecutor = "sim"\npolicy = "maxmin"\nnodes = [{ name = "a", gpus = 8 }]\n',
    )
    try:
        await controller.start()
        await gpu.start()
        yield controller, gpu
    finally:
        for daemon in (gpu, controller):
            if daemon.process is not None:
                daemon.process.kill()
                daemon.process.wait(10)


def in_force(gpu: Process) -> dict[str, Any]:
    policy: dict[str, Any] = gpu.admin.call("status")["detail"]["policy"]
    return policy


def number(gpu: Process) -> list[int]:
    found: list[int] = gpu.admin.call("status")["policies"].get("jobs", [])
    return found


def ctl(where: Path, *words: str) -> Any:
    """intentctl in this process: a start of its own a call would be most of the test."""
    said = io.StringIO()
    before = os.environ.get("RUNTIME_DIRECTORY")
    os.environ["RUNTIME_DIRECTORY"] = str(where / "run")
    try:
        with contextlib.redirect_stdout(said):
            code = tool.main([*words, "--json"])
    finally:
        if before is None:
            del os.environ["RUNTIME_DIRECTORY"]
        else:
            os.environ["RUNTIME_DIRECTORY"] = before
    assert code == 0, said.getvalue()
    return json.loads(said.getvalue())


async def test_from_fifo_to_the_operators_choice_and_back(
    suite: tuple[Process, Process], tmp_path: Path
) -> None:
    controller, gpu = suite
    await until(lambda: in_force(gpu)["name"] == "fifo")  # bootstrap goes before the configured one
    first = number(gpu)
    with pytest.raises(AdminRefusedError, match="history"):
        controller.admin.call("pareto_update")
    with pytest.raises(AdminRefusedError, match="none was searched yet"):
        controller.admin.call("pareto_show")
    rng = random.Random(3)
    for _ in range(80):
        size = rng.choice((0.02, 0.05, 1.0)) * rng.uniform(0.5, 2)
        gpu.admin.call(
            "jobs.submit", command=["x"], max_gpus=rng.choice((1, 2, 4)), size_gpu_s=size
        )
    await until(lambda: controller.admin.call("pareto_status")["front"] is not None)
    told = controller.admin.call("pareto_status")
    assert told["front"]["reason"].startswith("bootstrap: ")
    assert told["schedulers"][0]["known_jobs"] >= 60
    assert told["policy"]["number"] == first[1], "a front changes nothing until somebody chooses"
    front = controller.admin.call("pareto_show")
    assert set(front["present"]["test"]) == {"jct:avg", "prederr:avg"}
    assert ctl(tmp_path, "pareto", "show")["number"] == front["number"]

    preview = ctl(tmp_path, "pareto", "apply", "--prefer", "jct:avg", "--preview")
    assert preview["issued"] is None
    assert number(gpu) == first
    issued = ctl(tmp_path, "pareto", "apply", "--prefer", "jct:avg", "--follow")["issued"]
    assert issued["reason"].startswith(f"point {preview['index']} of front {front['number']}: ")
    await until(lambda: number(gpu) == [issued["era"], issued["number"]])
    assert in_force(gpu)["name"] == "wfq"
    assert controller.admin.call("pareto_show")["in_force"] == preview["index"]

    # hot, and kept: without a controller after kill -9
    controller.end(signal.SIGTERM)
    gpu.end(signal.SIGKILL)
    await gpu.start()
    assert number(gpu) == [issued["era"], issued["number"]]
    assert in_force(gpu)["name"] == "wfq"

    # a controller that knows nothing of the jobs any more is told again
    await controller.start()
    await until(lambda: controller.admin.call("pareto_status")["schedulers"] != [])
    await until(lambda: controller.admin.call("pareto_status")["schedulers"][0]["known_jobs"] >= 60)
    assert controller.admin.call("pareto_status")["choice"]["follow"]

    # another preference, another front: the rule is followed to it
    ctl(tmp_path, "pareto", "set", "jct:p90,unfairness:avg")
    assert not ctl(tmp_path, "pareto", "update", "--evaluations", "75", "--wait")["error"]
    later = controller.admin.call("pareto_status")
    assert later["front"]["number"] == front["number"] + 1
    assert "objective: got 'jct:avg'" in later["choice_error"]

    # by file, refusals, rollback, release
    own = tmp_path / "front.json"
    own.write_text(json.dumps(front))
    filed = ctl(tmp_path, "pareto", "apply", str(own), "--index", "0")["issued"]
    assert filed["reason"] == "set: point 0 of front.json"
    with pytest.raises(AdminRefusedError, match=r"weights\[0\]"):
        controller.admin.call("pareto_apply", config={"name": "wfq", "weights": [-1]})
    with pytest.raises(AdminRefusedError, match="index: got 999"):
        controller.admin.call("pareto_apply", choice={"index": 999})
    with pytest.raises(AdminRefusedError, match="objectives: got 'jtc:avg"):
        controller.admin.call("pareto_set", objectives="jtc:avg,prederr:avg")
    ctl(tmp_path, "policy", "rollback", str(first[1]), "--application", "jobs")
    await until(lambda: in_force(gpu)["name"] == "fifo")
    page = ctl(tmp_path, "policy", "list", "--application", "jobs")
    assert page["held"]["number"] == first[1]
    assert len(page["policies"]) >= 4
    assert ctl(tmp_path, "policy", "release", "--application", "jobs") == {"released": True}
    own_wfq = ctl(tmp_path, "pareto", "apply", "--T", "0.5", "--W", "0.7")["issued"]
    await until(lambda: number(gpu) == [own_wfq["era"], own_wfq["number"]])


async def test_a_search_is_cancelled_and_dies_with_the_controller(
    suite: tuple[Process, Process], tmp_path: Path
) -> None:
    controller, gpu = suite
    controller.end(signal.SIGTERM)
    controller.config.write_text(controller.config.read_text() + "search = false\n")
    await controller.start()
    for at in range(40):
        gpu.admin.call("jobs.submit", command=["x"], max_gpus=2, size_gpu_s=0.1 + at % 7)
    await until(
        lambda: (
            [r["known_jobs"] for r in controller.admin.call("pareto_status")["schedulers"]] == [40]
        )
    )

    def searching() -> dict[str, Any]:
        told: dict[str, Any] = controller.admin.call("pareto_status")["search"]
        return told

    controller.admin.call("pareto_update", evaluations=100_000, seconds=3000)
    with pytest.raises(AdminRefusedError, match="none running"):
        controller.admin.call("pareto_update")
    await until(lambda: searching()["done"] > 0)
    assert controller.admin.call("pareto_cancel") == {"cancelled": True}
    await until(lambda: controller.admin.call("pareto_status")["front"] is not None)
    assert controller.admin.call("pareto_show")["cancelled"]
    controller.admin.call("pareto_update", evaluations=100_000, seconds=3000)
    await until(lambda: searching()["done"] > 0)
    assert controller.process is not None
    [child] = children(controller.process.pid)
    controller.end(signal.SIGKILL)
    await until(lambda: not Path(f"/proc/{child}/cmdline").exists() or not searcher(child))


def children(pid: int) -> list[int]:
    own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in own if searcher(int(child))]


def searcher(pid: int) -> bool:
    try:
        return b"search.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
