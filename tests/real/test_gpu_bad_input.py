"""Bad input of every kind over HTTP and intentctl: one clear error, nothing half done, alive."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.daemons.ctl import main as tool
from intentd.daemons.ctl.output import ExitCode
from intentd.daemons.kit.admin import AdminClient, AdminUnreachableError

pytestmark = pytest.mark.real

TOKEN, OPERATOR = "a token", "an operator's token"
TOKEN_HASH = hashlib.sha256(TOKEN.encode()).hexdigest()
OPERATOR_HASH = hashlib.sha256(OPERATOR.encode()).hexdigest()


class Scheduler:
    """A daemon of 8 GPUs of two types under which time passes and nothing runs."""

    def __init__(self, base: Path, state: Path) -> None:
        self.base = base
        self.config = base / "gpu.toml"
        self.config.write_text(
            f'state_dir = "{state}"\nrun_dir = "{base}/run"\n[controller]\nenabled = false\n'
            f'[status]\nbind = "127.0.0.1:0"\n'
            f'tokens = ["{TOKEN_HASH}", "operate:{OPERATOR_HASH}"]\n'
            '[jobs]\nexecutor = "sim"\nquotas = { alice = 2 }\nnodes = [\n'
            '  { name = "a", gpus = 4, gpu_type = "v100" },\n'
            '  { name = "b", gpus = 4, gpu_type = "k80" },\n]\n'
        )
        with (base / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "intentd.daemons.gpu.daemon", "--config", str(self.config)],
                stderr=log,
            )
        self.admin = AdminClient(base / "run" / "gpu.admin.sock", 20.0)
        limit = time.monotonic() + 60
        while True:
            with contextlib.suppress(AdminUnreachableError):
                self.url = "http://" + self.admin.call("status")["status_address"]
                break
            assert self.process.poll() is None, (base / "log").read_text()
            assert time.monotonic() < limit
            time.sleep(0.05)

    def http(
        self, method: str, path: str, body: Any = None, token: str = TOKEN
    ) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path,
            data=data if body is not None else None,
            method=method,
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def jobs(self) -> int:
        return len(self.admin.call("jobs.list")["jobs"])

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scheduler]:
    base = tmp_path_factory.mktemp("bad")
    made = Scheduler(base, base / "state")
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def ctl(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(scheduler.base / "run"))

    def call(*words: str) -> tuple[int, str]:
        code = tool.main(list(words))
        said = capsys.readouterr()
        assert said.out == "" or code == 0
        return code, said.err

    return call


JOB = {"command": ["true"], "size_gpu_s": 1e6}


WRONG_JOBS: list[tuple[dict[str, Any], str]] = [
    ({"min_gpus": 9, "max_gpus": 9}, "min_gpus"),
    ({"min_gpus": 5, "max_gpus": 8}, "min_gpus"),  # 8 in all, 4 of a type
    ({"min_gpus": 3, "max_gpus": 3, "owner": "alice"}, "min_gpus"),
    ({"min_gpus": 3, "max_gpus": 2}, "max_gpus"),
    ({"min_gpus": 0}, "min_gpus"),
    ({"min_gpus": True}, "min_gpus"),
    ({"max_gpus": "many"}, "max_gpus"),
    ({"demand": {}}, "demand"),
    ({"demand": []}, "demand"),
    ({"demand": {"1": -5}}, "demand[1]"),
    ({"demand": {"1": 0}}, "demand[1]"),
    ({"demand": {"1": math.nan}}, "demand[1]"),
    ({"demand": {"1": math.inf}}, "demand[1]"),
    ({"demand": {"0": 5}}, "demand"),
    ({"demand": {"two": 5}}, "demand"),
    ({"demand": {"2": 5}, "max_gpus": 2}, "demand"),
    ({"demand": {"h100": {"1": 5}}}, "demand"),
    ({"demand": {"v100": {"1": -1}}}, "demand.v100[1]"),
    ({"gpu_types": ["h100"]}, "gpu_types"),
    ({"gpu_types": "v100"}, "gpu_types"),
    ({"size_gpu_s": -1}, "size_gpu_s"),
    ({"size_gpu_s": math.nan}, "size_gpu_s"),
    ({"profile": "vgg"}, "profile"),
    ({"speed": 3}, "speed"),
    ({"command": []}, "command"),
    ({"command": "true"}, "command"),
    ({"command": [""]}, "command[0]"),
    ({"name": "no spaces"}, "name"),
    ({"env": {"A B": "c"}}, "env.A B"),
    ({"env": {"INTENTD_EPOCH": "9"}}, "env.INTENTD_EPOCH"),
    ({"workdir": "relative"}, "workdir"),
    ({"workdir": "/no/such/place"}, "workdir"),
    ({"time_limit_s": -1}, "time_limit_s"),
    ({"grace_s": 1e9}, "grace_s"),
    ({"checkpoint_signal": "SIGKILL"}, "checkpoint_signal"),
    ({"retries": -1}, "retries"),
    ({"trials": 0}, "trials"),
    ({"labels": {"a": 1}}, "labels.a"),
    ({"array": 0.5}, "array"),
    ({"array": 100_000}, "array"),
]


@pytest.mark.parametrize(("wrong", "field"), WRONG_JOBS, ids=lambda value: str(value)[:40])
def test_a_wrong_job_over_http(scheduler: Scheduler, wrong: dict[str, Any], field: str) -> None:
    body = {**JOB, **wrong}
    if "demand" in wrong:
        del body["size_gpu_s"]
    for path in ("/api/jobs", "/api/jobs/predict"):
        if path.endswith("predict") and "array" in wrong:
            continue
        code, said = scheduler.http("POST", path, body)
        assert (code, said.get("field")) == (400, field), said
        assert "expected" in said["error"]
    assert scheduler.jobs() == 0


def test_other_wrong_requests_over_http(scheduler: Scheduler) -> None:
    for body in (b"{", b"[]", b"\xff\xff", b"[" * 5000):
        code, said = scheduler.http("POST", "/api/jobs", body)
        assert (code, said["field"]) == (400, "body")
    for path, field in (
        ("/api/jobs?state=nope", "state[0]"),
        ("/api/jobs?limit=0", "limit"),
        ("/api/jobs?limit=x", "limit"),
        ("/api/jobs/x", "job"),
        ("/api/events?after=-1", "after"),
        ("/api/jobs?stat=running", "stat"),
        ("/api/jobs/1?limit=3", "limit"),
        ("/api/nodes?x=1", "x"),
    ):
        code, said = scheduler.http("GET", path)
        assert (code, said["field"]) == (400, field)
    assert scheduler.http("GET", "/api/jobs/77")[0] == 404
    assert scheduler.http("DELETE", "/api/jobs/77")[0] == 404
    code, said = scheduler.http("POST", "/api/nodes/zz/drain", {})
    assert (code, said["field"]) == (400, "node")
    for path, body, field in (
        ("a/drain", {"undo": "false"}, "undo"),
        ("a/drain?evict=yes", {}, "evict"),
        ("a/drain", {"evicted": True}, "evicted"),
    ):
        code, said = scheduler.http("POST", f"/api/nodes/{path}", body)
        assert (code, said["field"]) == (400, field)
    assert not any(node["drained"] for node in scheduler.http("GET", "/api/nodes")[1]["nodes"])
    assert scheduler.jobs() == 0


WRONG_WORDS: list[tuple[list[str], str]] = [
    (["jobs", "submit", "--gpus", "99", "--size", "1", "--", "true"], "min_gpus"),
    (["jobs", "submit", "--gpus", "3-2", "--size", "1", "--", "true"], "max_gpus"),
    (["jobs", "submit", "--gpus", "x", "--size", "1", "--", "true"], "--gpus"),
    (["jobs", "submit", "--demand", ",", "--", "true"], "demand"),
    (["jobs", "submit", "--demand", "1=-5", "--", "true"], "--demand"),
    (["jobs", "submit", "--demand", "1=nan", "--", "true"], "--demand"),
    (["jobs", "submit", "--demand", "2=5", "--gpus", "1-2", "--", "true"], "minimum of 1"),
    (["jobs", "submit", "--size", "-3", "--", "true"], "size"),
    (["jobs", "submit", "--size", "long", "--", "true"], "size"),
    (["jobs", "submit", "--profile", "vgg", "--size", "1", "--", "true"], "profile"),
    (["jobs", "submit", "--size", "1"], "command"),
    (["jobs", "submit", "--env", "X", "--size", "1", "--", "true"], "--env"),
    (["jobs", "predict", "--gpus", "99", "--size", "1"], "min_gpus"),
    (["jobs", "what-if", "--gpus", "4-2", "--size", "1"], "max_gpus"),
    (["jobs", "list", "--state", "nope"], "state[0]"),
    (["jobs", "show", "77"], "77"),
    (["jobs", "cancel", "77"], "77"),
    (["jobs", "explain", "77"], "77"),
    (["jobs", "drain", "zz"], "node"),
    (["pareto", "search", "--workload", "workload-1", "--objectives", "jtc:avg,prederr:avg"],
     "objectives"),
    (["pareto", "search", "--workload", "workload-9"], "workload"),
    (["pareto", "search", "--workload", "workload-1", "--algorithm", "magic"], "algorithm"),
    (["pareto", "apply"], "--index"),
    (["pareto", "apply", "--index", "0", "--T", "1"], "--index"),
    (["pareto", "apply", "--at-most", "prederr"], "--at-most"),
    (["sim", "jobs", "--workload", "workload-1", "--policy", "lottery"], "policy"),
    (["sim", "jobs", "--workload", "workload-1", "--jobs", "10", "--policy", "wfq",
      "--thresholds", "100", "--weights", "1,0"], "weights[1]"),
    (["sim", "jobs", "--workload", "workload-1", "--jobs", "10", "--policy", "wfq",
      "--thresholds", "100", "--weights", "1,-2"], "weights[1]"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "named"), WRONG_WORDS, ids=lambda value: " ".join(value)[:60])
def test_wrong_words(scheduler: Scheduler, ctl: Any, words: list[str], named: str) -> None:
    code, said = ctl(*words)
    assert code in (ExitCode.USAGE, ExitCode.FAILED), said
    assert named in said
    assert len(said.strip().splitlines()) == 1, said
    assert scheduler.jobs() == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("job_id,submit_s,service_gpu_s,gpus,model\n1,0,x,1,m\n", "service_gpu_s"),
        ("job_id,submit_s,service_gpu_s,gpus,model\n1,5,10,1,m\n2,3,10,1,m\n", "submit_s"),
        ("job_id,submit_s,service_gpu_s,gpus,model\n1,0,-10,1,m\n", "service_gpu_s"),
        ("when,what\n1,2\n", "column"),
        ("", "columns"),
    ],
)
def test_wrong_traces(ctl: Any, tmp_path: Path, text: str, named: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    code, said = ctl("sim", "jobs", "--trace", str(trace), "--gpus", "8", "--policy", "fifo")
    assert code in (ExitCode.USAGE, ExitCode.FAILED)
    assert named in said, said


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ("command: [true]\ngpus: 4\n", "gpus"),
        ("- a list\n", "--file"),
        ("command: [x\n", "--file"),
        ("command: [sleep, '1']\ndemand: {1: -4}\n", "demand[1]"),
    ],
)
def test_wrong_job_files(ctl: Any, tmp_path: Path, fields: str, named: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(fields)
    code, said = ctl("jobs", "submit", "-f", str(file))
    assert code in (ExitCode.USAGE, ExitCode.FAILED)
    assert named in said


def test_it_lives_and_takes_a_good_job_after_all_that(scheduler: Scheduler) -> None:
    code, said = scheduler.http("POST", "/api/jobs", JOB)
    assert (code, scheduler.jobs()) == (201, 1)
    assert scheduler.admin.call("jobs.explain", job=said["job"])["gpu_type"] in ("v100", "k80")


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ('[jobs]\npolicy = "lottery"\n', "jobs.policy"),
        ('[jobs]\nexecutor = "slurm"\n', "jobs.executor"),
        ("[jobs]\nquotas = { bob = 0 }\n", "jobs.quotas.bob"),
        ("[jobs]\nprofiles = { vgg = [0, -1] }\n", "jobs.profiles.vgg"),
        ('[jobs]\nnodes = [{ name = "a", gpus = 0 }]\n', "jobs.nodes[0].gpus"),
        ('[jobs]\nexecutor = "sim"\nlauncher = "/run/x"\n', "jobs.launcher"),
        ("[costs]\nstart_s = -1\n", "costs.start_s"),
    ],
)
def test_wrong_configurations(ctl: Any, tmp_path: Path, section: str, named: str) -> None:
    file = tmp_path / "gpu.toml"
    file.write_text(section)
    code, said = ctl("check-config", "gpu", str(file))
    assert code == ExitCode.USAGE
    assert named in said


def test_an_absent_ray_is_one_error(ctl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    words = ("pareto", "search", "--workload", "workload-1", "--jobs", "30", "--evaluations", "5")
    code, said = ctl(*words, "--ray", "127.0.0.1:1")
    assert code in (ExitCode.USAGE, ExitCode.FAILED)
    assert "ray" in said
    assert "Traceback" not in said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a small file system")
def test_a_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    state = tmp_path / "small"
    state.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(state)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("cannot mount a small tmpfs here")
    daemon: Scheduler | None = None
    try:
        daemon = Scheduler(tmp_path, state)
        assert daemon.http("POST", "/api/jobs", JOB)[0] == 201
        with contextlib.suppress(OSError), (state / "filler").open("wb") as filler:
            while True:
                filler.write(b"x" * 4096)
                filler.flush()
        refused: dict[str, Any] = {}
        for _ in range(60):  # until SQLite has used up the pages it has
            code, refused = daemon.http("POST", "/api/jobs", {**JOB, "env": {"A": "x" * 16000}})
            if code == 507:
                break
        assert "full" in refused["error"]
        known = daemon.jobs()
        assert not daemon.admin.call("ready")["ready"]
        (state / "filler").unlink()
        limit = time.monotonic() + 30
        while not daemon.admin.call("ready")["ready"]:
            assert time.monotonic() < limit
            time.sleep(0.1)
        assert daemon.http("POST", "/api/jobs", JOB)[0] == 201
        assert daemon.jobs() == known + 1
        daemon.end()
    finally:
        if daemon is not None and daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait(10)
        subprocess.run(["umount", "-l", str(state)], check=False)


def test_an_operators_token_owns_its_jobs_and_no_others(scheduler: Scheduler) -> None:
    """The last: the others want no jobs."""
    code, said = scheduler.http("POST", "/api/jobs", {**JOB, "owner": "alice"}, OPERATOR)
    assert (code, said["field"]) == (400, "owner")
    made = {}
    for token, owner in ((TOKEN, "alice"), (OPERATOR, "")):
        body = {**JOB, "env": {"SECRET": "x"}, **({"owner": owner} if owner else {})}
        code, said = scheduler.http("POST", "/api/jobs", body, token)
        assert code == 201, said
        made[owner] = said["job"]
    assert scheduler.http("GET", f"/api/jobs/{made['']}")[1]["owner"] == "configured-2"
    for owner, expected in (("alice", 403), ("", 200)):
        path = f"/api/jobs/{made[owner]}"
        assert scheduler.http("GET", f"{path}/logs", None, OPERATOR)[0] == expected
        shown = scheduler.http("GET", path, None, OPERATOR)[1]
        assert shown["spec"]["env"] == {"SECRET": "(hidden)" if expected == 403 else "x"}
        assert scheduler.http("GET", path)[1]["spec"]["env"] == {"SECRET": "x"}
        assert scheduler.http("DELETE", path, None, OPERATOR)[0] == expected
    assert scheduler.http("DELETE", f"/api/jobs/{made['alice']}")[0] == 200
    undo = "/api/nodes/a/drain?undo=true"
    assert scheduler.http("POST", undo, None, OPERATOR)[0] == 200
