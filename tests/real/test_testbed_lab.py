"""Short experiments with the real daemons: namespaces with HTB as root, the loopback else."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.waiting import until

from intentd.testbed import netns, suite
from intentd.testbed.experiments import faults, overall
from intentd.testbed.experiments.options import Options
from intentd.testbed.lab import DOMAIN, PREFIX, Lab, Scenario, Setup
from intentd.testbed.playing import PlayError, python_env
from intentd.testbed.policies import policy_for, scaled_workload
from intentd.testbed.report import write_report
from intentd.testbed.results import save
from intentd.testbed.traffic.trace import poisson

pytestmark = pytest.mark.real


@pytest.fixture
def namespaces() -> None:
    reason = netns.unavailable()
    if reason:
        pytest.skip(reason)


def quiet(_: str) -> None:
    pass


async def play_two_policies(setup: Setup, directory: Path) -> list[str]:
    source = scaled_workload("web-search", scale=0.05)
    trace = poisson(source, load=0.3, rate_bps=1e9, duration_s=1.0, seed=1)
    async with Lab(setup, directory, quiet) as lab:
        names = [space.full_name for host in lab.servers if (space := host.namespace)]
        for name in ("2d", "ps"):
            policy = policy_for(name, [source], domain=DOMAIN, rate_bps=1e9, load=0.3)
            run = await lab.run(Scenario(name, "web-search", 0.3, 1, trace, policy))
            assert run.stalled == 0
            assert run.finished == len(trace)
            # none but where a crowded machine keeps a flow from ending for a quarter of a second
            assert run.degraded.keys() <= {"early_fin"}
            assert len(run.thresholds) == len(policy.classes)
            assert bool(run.simulator) == setup.namespaces
        if lab.suite is not None and setup.namespaces:
            shaped = await lab.qdiscs()
            assert shaped != lab.before
            await lab.suite.stop_all()
            assert await lab.qdiscs() == lab.before
    return names


@pytest.mark.netns
async def test_real_daemons_in_namespaces(namespaces: None, tmp_path: Path) -> None:
    """Policies arrive, flows are gated and shaped, and all is undone."""
    names = await play_two_policies(Setup(), tmp_path)
    assert names
    assert not [name for name in names if (netns.NETNS_DIR / name).exists()]
    logs = {path.name for path in (tmp_path / "suite").glob("*.log")}
    assert logs >= {"controller-controller.log", "sequencer-sequencer.log", "agent-client0.log"}
    for path in (tmp_path / "suite").glob("*.log"):
        assert "Traceback" not in path.read_text(), path


@pytest.mark.netns
async def test_gate_in_the_client_needs_no_daemons(namespaces: None, tmp_path: Path) -> None:
    await play_two_policies(Setup(gate="local", ipv6=True), tmp_path)


@pytest.mark.netns
async def test_a_daemon_that_cannot_start_is_told_and_nothing_stays(
    namespaces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(suite.MODULES, "agent", "intentd.agent.no_such_daemon")
    with pytest.raises(PlayError, match=r"agent client0 is not ready(.|\n)*no_such_daemon"):
        async with Lab(Setup(), tmp_path, quiet):
            pass
    left = [path.name for path in netns.NETNS_DIR.glob(f"{PREFIX}-*")]
    assert not left


async def test_overall_on_the_loopback_says_that_it_is_not_shaped(tmp_path: Path) -> None:
    options = Options(
        workloads=("cache",),
        policies=("2d", "fifo"),
        loads=(0.3,),
        duration_s=0.7,
        seeds=1,
        scale=0.05,
        namespaces=False,
    )
    results = await overall.run(options, tmp_path, quiet)
    save(results, tmp_path)
    assert "not shaped" in write_report(tmp_path).read_text()
    assert [run.label for run in results.runs] == ["2d", "fifo"]
    assert all(run.stalled == 0 and not run.simulator for run in results.runs)
    assert results.checks == []


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "intentd.daemons.ctl", "testbed", *arguments],
        capture_output=True,
        text=True,
        env=python_env(),
        timeout=60,
        check=False,
    )


def test_the_command_runs_an_experiment_and_draws_it_again(tmp_path: Path) -> None:
    words = "run overall --workload cache --policies ps --load 0.3 --duration 500ms --seeds 1"
    words += f" --scale 0.05 --loopback --gate local --repeats 0 --out {tmp_path} --json"
    done = call(*words.split())
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["runs"][0]["policy"] == "ps"
    assert document["runs"][0]["stalled"] == 0
    report = Path(document["report"])
    report.unlink()
    done = call("report", document["directory"])
    assert (done.returncode, done.stdout.strip()) == (0, str(report))
    assert report.exists()


def players(directory: Path) -> list[int]:
    """Processes, of any command line, that work in a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(directory).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_a_terminated_run_takes_its_processes_with_it(tmp_path: Path) -> None:
    words = "run overall --workload cache --policies ps --load 0.3 --duration 60s --seeds 1"
    words += f" --loopback --gate local --repeats 0 --out {tmp_path}"
    running = subprocess.Popen(
        [sys.executable, "-m", "intentd.daemons.ctl", "testbed", *words.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=python_env(),
    )
    try:
        assert running.stderr is not None
        assert any(" flows" in line for line in running.stderr)
        assert len(players(tmp_path)) > 1
        running.terminate()
        running.stderr.read()
        assert running.wait(60) == 128 + signal.SIGTERM
        until(lambda: not players(tmp_path), "the processes of the run are gone")
    finally:
        running.kill()
        running.communicate()


def test_the_command_refuses_what_it_does_not_know() -> None:
    done = call("run", "nothing")
    assert done.returncode == 2
    assert "one of overall" in done.stderr


@pytest.mark.netns
async def test_every_flow_completes_when_daemons_are_killed(
    namespaces: None, tmp_path: Path
) -> None:
    """The fault experiment, short: a client's agent, then the one that shapes, die by kill -9."""
    options = Options(rounds=3, duration_s=7.0, rate_bps=2e8, scale=0.1)
    results = await faults.run(options, tmp_path, quiet)
    missed = [check for check in results.checks[1:] if not check.holds]
    assert missed == [], results.notes
    assert results.runs[0].finished == results.runs[0].flows
