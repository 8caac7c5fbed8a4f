"""intentd-gpu as a process with real jobs: killed, stopped, asked; no job lost, none run twice."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
TOKEN = "a token"
TOKEN_HASH = hashlib.sha256(TOKEN.encode()).hexdigest()
OVER = {"finished", "failed", "cancelled"}
# a job that notices when it runs twice at a time
CAREFUL = """
exec 9> lock-$INTENTD_JOB_ID
flock -n 9 || echo $INTENTD_JOB_ID >> twice
echo $INTENTD_EPOCH >> starts-$INTENTD_JOB_ID
i=0; while [ $i -lt $1 ]; do sleep 0.1; i=$((i+1)); done
echo done $INTENTD_JOB_ID
"""


class Gpu:
    """One daemon, started and ended by the test; its jobs end with the test too."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.work = base / "work"
        self.work.mkdir()
        self.config = base / "gpu.toml"
        self.config.write_text(
            f'state_dir = "{base}/state"\nrun_dir = "{base}/run"\n'
            "[controller]\nenabled = false\n"
            f'[status]\nbind = "127.0.0.1:0"\ntokens = ["{TOKEN_HASH}"]\n'
            '[jobs]\nnodes = [{ name = "a", gpus = 2 }, { name = "b", gpus = 2 }]\n'
            'policy = "fifo"\nquotas = { alice = 1 }\n'
            "[costs]\nhold_growth_s = 0.3\n"
            "[output]\nmax_bytes = 8192\n"
        )
        self.env = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "RUNTIME_DIRECTORY": str(base / "run"),
        }
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> dict[str, Any]:
        self.process = self._spawn()
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(OSError):
                    return await self.ask("status")
                assert self.process.poll() is None, (self.base / "log").read_text()
                await asyncio.sleep(0.02)

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "intentd.daemons.gpu.daemon", "--config", str(self.config)]
        with (self.base / "log").open("ab") as log:
            return subprocess.Popen(command, env=self.env, stderr=log)

    async def call(self, command: str, /, **args: Any) -> dict[str, Any]:
        reader, writer = await asyncio.open_unix_connection(
            str(self.base / "run" / "gpu.admin.sock"), limit=1 << 24
        )
        try:
            writer.write(json.dumps({"command": command, "args": args}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(await reader.readline())
        finally:
            writer.close()
        return answer

    async def ask(self, command: str, /, **args: Any) -> dict[str, Any]:
        answer = await self.call(command, **args)
        assert answer["ok"], answer
        result: dict[str, Any] = answer["result"]
        return result

    async def submit(self, *command: str, **fields: Any) -> int:
        given = {"size_gpu_s": 1.0, "workdir": str(self.work), "command": list(command), **fields}
        number: int = (await self.ask("jobs.submit", **given))["job"]
        return number

    async def until(self, job: int, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while True:
                shown = await self.ask("jobs.show", job=job)
                if holds(shown):
                    return shown
                await asyncio.sleep(0.02)

    async def over(self, job: int) -> dict[str, Any]:
        return await self.until(job, lambda shown: shown["state"] in OVER)

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(30)
        self.process = None
        return status

    def supervisor_of(self, job: int, epoch: int) -> int:
        claim = self.base / "state" / "jobs" / str(job) / str(epoch) / "claim"
        return int(json.loads(claim.read_text())["pid"])

    def output_bytes(self, job: int) -> int:
        where = self.base / "state" / "jobs" / str(job)
        return sum(path.stat().st_size for path in where.glob("*.log"))

    def end_jobs(self) -> None:
        """Ends the supervisors this test's daemon started; their commands die with them."""
        for claim in (self.base / "state" / "jobs").glob("*/*/claim"):
            pid = int(json.loads(claim.read_text())["pid"])
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes()
                if str(claim.parent).encode() in line:
                    os.kill(pid, signal.SIGKILL)


def alive(pid: str) -> bool:
    """Not even on its way out; an ended process may wait for its new parent to hear of it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


@pytest.fixture
async def gpu(tmp_path: Path) -> AsyncIterator[Gpu]:
    daemon = Gpu(tmp_path)
    try:
        await daemon.start()
        yield daemon
    finally:
        if daemon.process is not None:
            daemon.process.kill()
            daemon.process.wait(10)
        daemon.end_jobs()


async def test_killed_again_and_again_while_jobs_run(gpu: Gpu) -> None:
    rng = random.Random(7)
    jobs: list[int] = []
    for _ in range(4):
        for _ in range(4):
            jobs.append(await gpu.submit("sh", "-c", CAREFUL, "x", str(rng.randint(1, 12))))
        await asyncio.sleep(rng.uniform(0.0, 0.3))
        gpu.end(signal.SIGKILL)
        await gpu.start()
    shown = [await gpu.over(job) for job in jobs]
    assert [row["state"] for row in shown] == ["finished"] * len(jobs)
    assert not (gpu.work / "twice").exists()
    for job, row in zip(jobs, shown, strict=True):
        starts = [int(text) for text in (gpu.work / f"starts-{job}").read_text().split()]
        assert len(starts) == 1, "a run that went on was started again"
        assert row["lost"] == 0
        assert (await gpu.ask("jobs.logs", job=job))["text"] == f"done {job}\n"
    causes = [p["cause"] for row in shown for p in row["predictions"]]
    assert "submitted" in causes


async def test_elastic_jobs_are_resized_through_kills_and_never_run_twice(gpu: Gpu) -> None:
    gpu.end(signal.SIGTERM)
    gpu.env["INTENTD_GPU__JOBS__POLICY"] = "maxmin"
    await gpu.start()
    jobs = [
        await gpu.submit("sh", "-c", CAREFUL, "x", "8", max_gpus=4, size_gpu_s=2.0)
        for _ in range(3)
    ]
    for _ in range(3):
        await asyncio.sleep(0.3)
        gpu.end(signal.SIGKILL)
        await gpu.start()
    shown = [await gpu.over(job) for job in jobs]
    assert [row["state"] for row in shown] == ["finished"] * 3
    assert sum(row["resized"] for row in shown) > 0
    assert not (gpu.work / "twice").exists()
    for job in jobs:
        starts = [int(text) for text in (gpu.work / f"starts-{job}").read_text().split()]
        assert starts == sorted(set(starts))


async def test_a_lost_supervisor_takes_its_command_along_and_the_job_runs_again(gpu: Gpu) -> None:
    job = await gpu.submit(
        "sh", "-c", "echo $$ >> pids; sleep 60 & echo $! >> pids; wait", retries=1
    )
    for epoch in (1, 2):
        await gpu.until(
            job, lambda shown, epoch=epoch: (shown["state"], shown["epoch"]) == ("running", epoch)
        )
        os.kill(gpu.supervisor_of(job, epoch), signal.SIGKILL)
    shown = await gpu.over(job)
    assert shown["state"] == "failed"
    assert "lost 2 times, retries 1" in shown["detail"]
    assert len(pids := (gpu.work / "pids").read_text().split()) == 4
    assert not [pid for pid in pids if alive(pid)]


async def test_the_doctor_sees_a_queue_that_differs_and_a_run_without_supervisor(gpu: Gpu) -> None:
    """Each is broken behind the daemon's back, and mended."""

    async def claims() -> dict[str, tuple[bool, str]]:
        found = (await gpu.ask("prove"))["claims"]
        return {claim["check"]: (claim["holds"], claim["evidence"]) for claim in found}

    job = await gpu.submit("sleep", "60")
    await gpu.until(job, lambda shown: shown["state"] == "running")
    good = {"gpu-queue": (True, "1 jobs"), "gpu-processes": (True, "1 running")}
    assert await claims() == good
    with contextlib.closing(sqlite3.connect(gpu.base / "state" / "gpu.sqlite")) as store:
        for over, holds in ((1, False), (0, True)):
            with store:
                store.execute("UPDATE jobs SET over = ? WHERE id = ?", (over, job))
            assert (await claims())["gpu-queue"] == (
                holds,
                "1 jobs" if holds else f"differ: job {job}",
            )
    claim = gpu.base / "state" / "jobs" / str(job) / "1" / "claim"
    written = claim.read_text()
    who = json.loads(written)
    claim.write_text(json.dumps({**who, "start_ticks": who["start_ticks"] + 1}))  # another process
    assert (await claims())["gpu-processes"] == (False, f"no process: job {job}")
    claim.write_text(written)
    assert await claims() == good


async def test_cancel_time_limit_failure_and_output(gpu: Gpu) -> None:
    deaf = await gpu.submit("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done", grace_s=0.3)
    long = await gpu.submit("sleep", "60", time_limit_s=0.5)
    absent = await gpu.submit("no-such-program")
    loud = await gpu.submit("sh", "-c", "yes loud | head -c 100000; exit 3")
    await gpu.until(deaf, lambda shown: shown["state"] == "running")
    await gpu.ask("jobs.cancel", job=deaf)
    assert (await gpu.over(deaf))["exit_status"] == -9
    assert "time limit of 0.5 s" in (await gpu.over(long))["detail"]
    assert "cannot run 'no-such-program'" in (await gpu.over(absent))["detail"]
    failed = await gpu.over(loud)
    assert (failed["state"], failed["detail"]) == ("failed", "exit status 3")
    assert gpu.output_bytes(loud) <= 8192 + (1 << 16) * 2  # a piece that was read is written whole
    again = await gpu.call("jobs.cancel", job=deaf)
    assert "an unfinished job: it is cancelled" in again["error"]


async def test_progress_is_learned_and_pending_is_explained(gpu: Gpu) -> None:
    code = (
        "import time\nfrom intentd.daemons.gpu.client.progress import report\n"
        "for i in range(101):\n    report(i, 100); time.sleep(0.05)\n"
    )
    environment = {"PYTHONPATH": str(ROOT / "src")}
    job = await gpu.submit(sys.executable, "-c", code, size_gpu_s=1000.0, env=environment)
    shown = await gpu.until(job, lambda shown: shown["predicted"]["in_p50_s"] < 60)
    assert "measured progress" in shown["predicted"]["cause"]
    first = await gpu.submit("sleep", "60", owner="alice")
    second = await gpu.submit("sleep", "60", owner="alice")
    told = await gpu.ask("jobs.explain", job=second)
    assert told["text"] == "quota of alice: 1 GPUs, 1 in use or promised, needs 1"
    for number in (first, second):
        await gpu.ask("jobs.cancel", job=number)
        assert (await gpu.over(number))["state"] == "cancelled"


async def test_http_and_bad_input(gpu: Gpu) -> None:
    status = await gpu.ask("status")
    url = f"http://{status['status_address']}/api"
    holder = {"Authorization": f"Bearer {TOKEN}"}
    async with aiohttp.ClientSession() as session:

        async def call(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
            async with session.request(method, url + path, json=body, headers=headers) as answer:
                return answer.status, await answer.json()

        job = {"command": ["echo", "hi"], "env": {"SECRET": "x"}, "size_gpu_s": 1}
        assert (await call("POST", "/jobs", job))[0] == 401
        code, made = await call("POST", "/jobs", {**job, "array": 3}, **holder)
        assert (code, len(made["jobs"])) == (201, 3)
        assert made["predicted"]["p90_s"] >= made["predicted"]["p50_s"]
        for number in made["jobs"]:
            assert (await gpu.over(number))["state"] == "finished"
        code, shown = await call("GET", f"/jobs/{made['job']}")
        assert shown["spec"]["env"] == {"SECRET": "(hidden)"}
        assert (await call("GET", f"/jobs/{made['job']}/logs"))[0] == 403
        _, logs = await call("GET", f"/jobs/{made['job']}/logs", **holder)
        assert logs["text"] == "hi\n"
        assert len((await call("GET", "/jobs?state=finished&limit=2"))[1]["jobs"]) == 2
        _, guess = await call("POST", "/jobs/predict", {"size_gpu_s": 50}, **holder)
        assert guess["predicted"]["in_p50_s"] == pytest.approx(50, rel=0.01)
        assert set((await call("GET", "/openapi.json"))[1]["paths"]) >= {"/api/jobs", "/api/nodes"}
        for wrong, field in (
            ({"min_gpus": 5, "max_gpus": 5}, "min_gpus"),
            ({"min_gpus": 2, "max_gpus": 1}, "max_gpus"),
            ({"demand": {}}, "demand"),
            ({"demand": {"1": "NaN"}}, "demand[1]"),
            ({"demand": {"2": 1}}, "demand"),
            ({"gpus": 1}, "gpus"),
            ({"owner": "alice", "min_gpus": 2, "max_gpus": 2}, "min_gpus"),
            ({"workdir": "/no/such/place"}, "workdir"),
        ):
            body = {**job, **wrong}
            if "demand" in wrong:
                del body["size_gpu_s"]
            code, said = await call("POST", "/jobs", body, **holder)
            assert (code, said["field"]) == (400, field), said
        assert (await call("GET", "/jobs/999"))[0] == 404
        code, nodes = await call("POST", "/nodes/a/drain", {}, **holder)
        assert nodes["nodes"][0]["drained"]
    gpu.end(signal.SIGKILL)
    await gpu.start()
    assert (await gpu.ask("jobs.nodes"))["nodes"][0]["drained"]
    assert (await gpu.ask("status"))["detail"]["gpus"]["usable"] == 2
    assert gpu.end(signal.SIGTERM) == 0
