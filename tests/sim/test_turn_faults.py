"""Seeds of the turn protocol's fault simulation; ``intentctl sim faults`` runs more."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from intentd.core.sim.fault_runs import Faults
from intentd.core.sim.faults import run_seed
from intentd.daemons.ctl.sim import app

ALL = Faults(loss=0.3, kill=True, partition=True)

# Seeds that once failed, with what they found.
FOUND = {
    35: "a heartbeat overtaken by a request took an id from its holder that was just given",
    257: "a late repeat of a dead process's request was answered",
    8890: "the next flow of a batch, on an id taken up in a new epoch its peer does not know yet",
    282: "a flow that arrives while its agent is stopped",
}


@pytest.mark.parametrize("seed", sorted(FOUND))
def test_seeds_that_found_something(seed: int) -> None:
    assert run_seed(seed, ALL).violations == []


@pytest.mark.parametrize("seed", range(20_000, 20_040))
def test_all_faults_at_once(seed: int) -> None:
    run = run_seed(seed, ALL)
    assert run.violations == []
    assert run.ordered_starts > 0


@pytest.mark.parametrize(
    "faults", [Faults(loss=0.3), Faults(kill=True), Faults(partition=True)], ids=str
)
def test_each_fault_alone(faults: Faults) -> None:
    for seed in range(8):
        assert run_seed(seed, faults).violations == []


def test_without_faults_no_start_is_degraded() -> None:
    for seed in range(12):
        run = run_seed(seed, Faults())
        assert run.violations == []
        assert run.degraded_starts == {}
        assert run.ordered_starts > 20


def test_a_planned_restart_of_the_sequencer_degrades_no_start() -> None:
    for seed in range(12):
        run = run_seed(seed, Faults(restart=True), trace=True)
        assert run.violations == []
        assert run.degraded_starts == {}
        assert run.ordered_starts > 20
        assert any("resumed" in line for line in run.story)


def test_planned_restarts_among_all_faults() -> None:
    for seed in range(12):
        assert run_seed(seed, dataclasses.replace(ALL, restart=True)).violations == []


def test_a_seed_tells_the_same_story_twice() -> None:
    once, again = (run_seed(7, ALL, trace=True) for _ in range(2))
    assert once == again
    assert any("starts" in line for line in once.story)


def test_the_command_counts_and_replays() -> None:
    outcome = CliRunner().invoke(
        app, ["faults", "--seeds", "3:5", "--loss", "0.3", "--kill", "--jobs", "1", "--json"]
    )
    assert outcome.exit_code == 0, outcome.output
    total = json.loads(outcome.stdout)
    assert total["seeds"] == 2
    for name in ("stalls", "order_violations", "double_starts"):
        assert total[name] == 0
    traced = CliRunner().invoke(app, ["faults", "--seeds", "3:4", "--kill", "--trace", "--json"])
    assert traced.exit_code == 0
    assert "3: " in traced.stderr
