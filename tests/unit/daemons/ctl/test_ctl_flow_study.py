"""intentctl flows classes and sim flows: fixed names and fields."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from intentd.daemons.ctl import flows as flows_commands
from intentd.daemons.ctl import sim as sim_commands

RUNNER = CliRunner()
METRICS = ["mean_s", "p50_s", "p90_s", "p95_s", "p99_s", "p995_s", "p999_s"]


def test_classes_prints_one_document() -> None:
    arguments = ["classes", "--workload", "web-search", "--samples", "20000", "--seed", "3"]
    result = RUNNER.invoke(flows_commands.app, [*arguments, "--json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert list(document) == ["thresholds", "weights", "c2", "samples"]
    assert document["samples"] == 20000
    assert len(document["thresholds"]) == 3
    assert document["thresholds"][-1] is None
    assert math.fsum(document["weights"]) == pytest.approx(1.0)
    assert RUNNER.invoke(flows_commands.app, [*arguments, "--json"]).stdout == result.stdout
    assert "web-search: 3 classes" in RUNNER.invoke(flows_commands.app, arguments).stdout


def test_classes_of_a_file_and_of_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("size_bytes,cdf\n1000,0\n2000,1\n")
    result = RUNNER.invoke(flows_commands.app, ["classes", "--cdf", str(path), "--json"])
    assert json.loads(result.stdout)["thresholds"] == [None]
    arguments = ["classes", "--workload", "cache", "--thresholds", "published", "--json"]
    result = RUNNER.invoke(flows_commands.app, arguments)
    assert json.loads(result.stdout)["thresholds"] == [3072000.0, None]


def test_sim_flows_prints_every_policy_and_metric() -> None:
    arguments = ["flows", "--workload", "cache", "--load", "0.6", "--flows", "400", "--seed", "2"]
    result = RUNNER.invoke(sim_commands.app, [*arguments, "--json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["link_bps"] == 1e10
    assert list(document["policies"]) == sim_commands.ALL_POLICIES.split(",")
    for metrics in document["policies"].values():
        assert list(metrics) == METRICS
        assert all(value > 0 for value in metrics.values())
    text = RUNNER.invoke(sim_commands.app, arguments).stdout
    assert "2d-boost" in text


def test_sim_flows_with_equation_2_1_and_another_rate() -> None:
    arguments = ["flows", "--workload", "cache", "--flows", "300", "--policies", "2d", "--json"]
    plain = json.loads(RUNNER.invoke(sim_commands.app, arguments).stdout)
    exact = [*arguments, "--weights", "virtual-ps", "--rate", "1Gbit"]
    emulated = json.loads(RUNNER.invoke(sim_commands.app, exact).stdout)
    assert emulated["link_bps"] == 1e9
    assert emulated["policies"]["2d"] != plain["policies"]["2d"]
