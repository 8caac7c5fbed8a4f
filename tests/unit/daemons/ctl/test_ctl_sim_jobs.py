"""intentctl sim jobs and intentctl pareto: outputs, files, and one error for bad input."""

import json

import pytest
from typer.testing import CliRunner

from intentd.core.errors import InputError
from intentd.daemons.ctl import pareto, sim

SMALL = ["--workload", "workload-1", "--jobs", "60", "--gpus", "64"]
KEYS = [
    "jobs",
    "avg_jct_s",
    "p50_jct_s",
    "p90_jct_s",
    "p99_jct_s",
    "avg_pred_err",
    "p99_pred_err",
    "signed_pred_err",
    "coverage_p90",
    "avg_unfairness",
    "p99_unfairness",
    "makespan_s",
    "wall_s",
]


def run(app, *arguments):
    return CliRunner().invoke(app, [str(item) for item in arguments])


@pytest.mark.parametrize(
    "options",
    [
        ["--policy", "fifo"],
        ["--policy", "srsf", "--artifact"],
        ["--policy", "afs", "--size-error", "30"],
        ["--policy", "themis", "--fractional"],
        ["--policy", "maxmin", "--start-s", "5", "--preempt-s", "9"],
        ["--T", "0.5", "--W", "0.7", "--zeta", "0.5", "--delta", "0.1"],
        ["--thresholds", "100000,900000", "--weights", "3,2,1"],
    ],
)
def test_every_policy_gives_the_documented_figures(options):
    result = run(sim.app, "jobs", *SMALL, *options, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert set(KEYS) <= set(document)
    assert document["jobs"] == 60


def test_without_predictions_there_are_no_errors():
    document = json.loads(run(sim.app, "jobs", *SMALL, "--no-predict", "--json").stdout)
    assert document["avg_pred_err"] is None
    assert document["coverage_p90"] is None


def test_table_and_per_job_file(tmp_path):
    path = tmp_path / "jobs.csv"
    result = run(sim.app, "jobs", *SMALL, "--per-job", path)
    assert result.exit_code == 0
    assert "avg_jct_s" in result.stdout
    lines = path.read_text().splitlines()
    assert len(lines) == 61
    assert lines[0].startswith("job_id,submit_s,start_s,finish_s,predicted_s,p90_s")


def test_a_trace_with_its_scaling_beside_it(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("job_id,submit_s,service_gpu_s,gpus,model\n0,0,100,2,A\n1,1,10,1,A\n")
    (tmp_path / "scaling.csv").write_text("model,gpus,speedup\nA,1,1\nA,2,0.9\n")
    result = run(sim.app, "jobs", "--trace", trace, "--gpus", "4", "--policy", "fifo", "--json")
    assert json.loads(result.stdout)["makespan_s"] == 100  # best on one GPU
    assert "envelope" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--workload", "workload-1", "--trace", "x.csv"],
        ["--workload", "workload-9"],
        ["--trace", "/nowhere.csv"],
        [*SMALL, "--policy", "lottery"],
        [*SMALL, "--policy", "fifo", "--T", "1"],
        [*SMALL, "--T", "-1"],
        [*SMALL, "--zeta", "2"],
        [*SMALL, "--thresholds", "5"],
        [*SMALL, "--thresholds", "5", "--weights", "1,0"],
        [*SMALL, "--thresholds", "x", "--weights", "1,1"],
        [*SMALL, "--config", "/nowhere.json"],
        [*SMALL, "--per-job", "/nowhere/x.csv"],
        [*SMALL, "--predictions", "3"],
        [*SMALL, "--size-error", "100"],
        [*SMALL, "--start-s", "-1"],
        ["--workload", "workload-1", "--jobs", "5", "--gpus", "0"],
        ["--workload", "workload-1", "--jobs", "5", "--load", "nan"],
    ],
)
def test_bad_input_is_one_error(options):
    result = run(sim.app, "jobs", *options)
    assert isinstance(result.exception, InputError)


def test_search_writes_a_result_that_show_and_sim_read(tmp_path):
    pytest.importorskip("pymoo", reason="the controller extra is not installed")
    out, chart = tmp_path / "front.json", tmp_path / "front.html"
    options = ["--evaluations", "75", "--workers", "1", "--samples", "1", "--out", out]
    result = run(pareto.app, "search", *SMALL, *options, "--chart", chart, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["evaluations"] == 75
    assert {"config", "train", "test"} <= set(document["front"][0])
    assert document["settings"]["source"]["workload"] == "workload-1"
    assert "<svg" in chart.read_text()
    shown = run(pareto.app, "show", out)
    assert "Pareto-optimal" in shown.stdout
    assert json.loads(run(pareto.app, "show", out, "--json").stdout)["front"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(document["front"][0]))
    assert run(sim.app, "jobs", *SMALL, "--config", config, "--json").exit_code == 0
    again = run(pareto.app, "search", *SMALL, *options[:-2], "--warm", out, "--json")
    assert json.loads(again.stdout)["settings"]["warm"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        [*SMALL, "--objectives", "speed:avg,jct:avg"],
        [*SMALL, "--objectives", "jct:avg"],
        [*SMALL, "--algorithm", "luck"],
        [*SMALL, "--space", "outer"],
        [*SMALL, "--seconds", "-1"],
        [*SMALL, "--samples", "0"],
        [*SMALL, "--workers", "0"],
        [*SMALL, "--warm", "/nowhere.json"],
    ],
)
def test_bad_search_input_is_one_error(options):
    pytest.importorskip("pymoo", reason="the controller extra is not installed")
    result = run(pareto.app, "search", *options)
    assert isinstance(result.exception, InputError)
