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


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--T", "1"], "--config"),
        (["--weights", "1"], "--config"),
        (["--zeta", "0"], "--config"),
        (["--policy", "wfq"], "--policy"),
        (["--policy", "srsf", "--delta", ".2"], "--config"),
    ],
)
def test_a_policy_file_and_options_that_say_something_else(tmp_path, options, field):
    config = tmp_path / "config.json"
    config.write_text('{"name": "fifo"}')
    result = run(sim.app, "jobs", *SMALL, "--config", config, *options)
    assert isinstance(result.exception, InputError)
    assert result.exception.field == field
    result = run(sim.app, "jobs", *SMALL, "--config", config, "--policy", "fifo")
    assert "fifo" in result.stdout


@pytest.mark.parametrize(
    ("option", "name"), [("--out", "no/such/x.json"), ("--chart", "x.svg"), ("--chart", "no/x.png")]
)
def test_what_cannot_be_written_is_known_before_a_search(tmp_path, monkeypatch, option, name):
    pytest.importorskip("pymoo", reason="the controller extra is not installed")
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(pareto, "_histories", lambda *_: begun.append(1))
    result = run(pareto.app, "search", *SMALL, option, name)
    assert isinstance(result.exception, InputError)
    assert (result.exception.field, begun) == (option, [])


def test_a_search_is_printed_whatever_becomes_of_its_chart(tmp_path, monkeypatch):
    pytest.importorskip("pymoo", reason="the controller extra is not installed")
    from intentd.controller.search import chart as charts

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(charts, "write_chart", full)
    chart = tmp_path / "front.html"
    chart.write_text("the last one")
    options = ["--evaluations", "10", "--workers", "1", "--samples", "1", "--chart", chart]
    result = run(pareto.app, "search", *SMALL, *options, "--json")
    assert isinstance(result.exception, InputError)
    assert json.loads(result.stdout)["front"]
    assert [path.name for path in tmp_path.iterdir()] == ["front.html"]
    assert chart.read_text() == "the last one"


def test_failures_from_a_file_or_drawn_delay_jobs(tmp_path):
    def mean(*options):
        result = run(sim.app, "jobs", *SMALL, "--policy", "fifo", "--json", *options)
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        return document["avg_jct_s"], document["failures"]

    plain, none = mean()
    file = tmp_path / "failures.csv"
    file.write_text("at_s,gpus,repair_s\n100,60,50000\n")
    assert none == 0
    assert mean("--failures", file)[0] > plain
    assert mean("--failures", file)[1] == 1
    drawn = mean("--mtbf", "6h", "--repair", "2h")
    assert drawn == mean("--mtbf", "6h", "--repair", "2h")
    assert drawn[1] > 0
    assert drawn[0] > plain


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", []),
        ("at_s,gpus\n", []),
        ("at_s,gpus,repair_s\n1,x,3\n", []),
        ("at_s,gpus,repair_s\n1,0,3\n", []),
        ("at_s,gpus,repair_s\n1,1000,3\n", []),
        ("at_s,gpus,repair_s\n-1,1,3\n", []),
        ("at_s,gpus,repair_s\n1,40,9\n2,40,9\n", []),
        ("at_s,gpus,repair_s\n1,1,3\n", ["--mtbf", "1d"]),
        (None, ["--mtbf", "1ms"]),
        (None, ["--mtbf", "0"]),
        (None, ["--repair", "1h"]),
    ],
)
def test_failures_that_cannot_be(tmp_path, text, options):
    file = tmp_path / "failures.csv"
    if text is not None:
        file.write_text(text)
        options = [*options, "--failures", file]
    result = run(sim.app, "jobs", *SMALL, *options)
    assert isinstance(result.exception, InputError)


def test_a_search_records_costs_and_failures(tmp_path):
    pytest.importorskip("pymoo", reason="the controller extra is not installed")
    file = tmp_path / "failures.csv"
    file.write_text("at_s,gpus,repair_s\n100,2,500\n")
    options = ["--evaluations", "10", "--workers", "1", "--samples", "1", "--start-s", "5"]
    result = run(pareto.app, "search", *SMALL, *options, "--failures", file, "--json")
    settings = json.loads(result.stdout)["settings"]
    assert settings["costs"]["start_s"] == 5
    assert settings["failures"] == [{"at_s": 100, "gpus": 2, "repair_s": 500}]
