"""intentctl flows classes and sim flows: fixed names and fields, bad input."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from intentd.daemons.ctl import flows as flows_commands
from intentd.daemons.ctl import sim as sim_commands

RUNNER = CliRunner()
METRICS = ["mean_s", "p50_s", "p90_s", "p95_s", "p99_s", "p995_s", "p999_s"]
CACHE_ARGUMENTS = ["--workload", "cache", "--flows", "300", "--policies", "fifo"]


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--flows", "10"], "--workload, --cdf: got 'neither'"),
        (["--workload", "cache", "--cdf", "x"], "--workload, --cdf: got 'both'"),
        (["--workload", "vl2"], "workload: got 'vl2'"),
        (["--cdf", "/nonexistent/sizes.csv"], "--cdf: got '/nonexistent/sizes.csv'"),
        ([*CACHE_ARGUMENTS, "--load", "nan"], "load: got nan"),
        ([*CACHE_ARGUMENTS, "--load", "0"], "load: got 0.0"),
        ([*CACHE_ARGUMENTS, "--load", "7"], "load: got 7.0"),
        ([*CACHE_ARGUMENTS, "--flows", "0"], "flows: got 0"),
        ([*CACHE_ARGUMENTS, "--policies", "2d,magic"], "--policies: got 'magic'"),
        ([*CACHE_ARGUMENTS, "--policies", ","], "--policies"),
        ([*CACHE_ARGUMENTS, "--rate", "fast"], "--rate: got 'fast'"),
        ([*CACHE_ARGUMENTS, "--weights", "equal"], "--weights: got 'equal'"),
        ([*CACHE_ARGUMENTS, "--thresholds", "mine"], "--thresholds: got 'mine'"),
    ],
)
def test_sim_flows_refuses_bad_input(arguments: list[str], says: str) -> None:
    result = RUNNER.invoke(sim_commands.app, ["flows", *arguments])
    assert result.exit_code == 2
    assert f"error: {says}" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no points"),
        ("size,share\n1,1\n", "line 1"),
        ("1,0\n2,.5\n", "expected 1 (a CDF ends at 1)"),
        ("1,0\n2,.9\n3,.8\n4,1\n", "line 3"),
        ("nan,0\n2,1\n", "line 1"),
        ("-5,0\n2,1\n", "line 1"),
    ],
)
def test_bad_cdf_files_are_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    result = RUNNER.invoke(flows_commands.app, ["classes", "--cdf", str(path), "--json"])
    assert result.exit_code == 2
    assert "bad.csv" in result.stderr
    assert says in result.stderr
    path.write_bytes(b"\xff\xfe\x00")
    assert RUNNER.invoke(flows_commands.app, ["classes", "--cdf", str(path)]).exit_code == 2


@pytest.mark.parametrize("option", [["--samples", "0"], ["--samples", "x"], ["--seed", "-1"]])
def test_bad_numbers_are_usage_errors(option: list[str]) -> None:
    result = RUNNER.invoke(flows_commands.app, ["classes", "--workload", "cache", *option])
    assert result.exit_code == 2


def test_a_file_has_no_published_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("1,0\n2,1\n")
    arguments = ["classes", "--cdf", str(path), "--thresholds", "published"]
    result = RUNNER.invoke(flows_commands.app, arguments)
    assert result.exit_code == 2
    assert "no published table" in result.stderr
