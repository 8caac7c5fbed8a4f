"""Results survive the disk, the report draws itself from the directory alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from intentd.core.errors import InputError
from intentd.testbed.experiments import overall
from intentd.testbed.experiments.options import Options
from intentd.testbed.experiments.overall import checks
from intentd.testbed.metrics import METRICS
from intentd.testbed.published import PUBLISHED
from intentd.testbed.replay import read_completions, write_completions
from intentd.testbed.report import render, text_table, write_report
from intentd.testbed.results import (
    Check,
    Results,
    Run,
    Series,
    Table,
    keep,
    kernel_over_simulator,
    load,
    over_seeds,
    paired,
    save,
)
from intentd.testbed.runner import (
    check,
    completion_rows,
    heeded,
    new_directory,
    run_experiment,
    summary,
)
from intentd.testbed.traffic.records import FlowRecord, write_records


def run(label: str, seed: int, factor: float, workload: str = "cache") -> Run:
    kernel = {name: factor * (index + 1) * 1e-3 for index, name in enumerate(METRICS)}
    return Run(
        label=label,
        workload=workload,
        load=0.8,
        seed=seed,
        gate="agent",
        rate_bps=1e9,
        flows=100,
        finished=100,
        stalled=0,
        kernel=kernel,
        simulator={name: value / 1.05 for name, value in kernel.items()},
        busy_share=0.98,
        busy_observed_s=4.0,
        floor_s=0.3e-3,
        weights=[0.9, 0.1],
        thresholds=[1000.0, None],
    )


def results() -> Results:
    found = Results("overall", "A <title>", "about", published=["overall"])
    for seed in (1, 2):
        found.runs += [run("2d", seed, 1.0 * seed), run("ps", seed, 1.5 * seed)]
    return found


def test_means_over_seeds_and_pairs_of_the_same_trace() -> None:
    found = results()
    assert over_seeds(found.select("cache", 0.8, "2d"))["mean"][0] == pytest.approx(1.5e-3)
    ratio = paired(found, "cache", 0.8, "ps", "2d", "kernel")
    assert ratio["p99"] == (pytest.approx(1.5), pytest.approx(0.0))
    assert kernel_over_simulator(found.runs)["p50"][0] == pytest.approx(1.05)


def test_checks_of_overall_hold_and_miss() -> None:
    found = results()
    assert all(check.holds for check in checks(found))
    for measured in found.runs:  # both policies alike, so that their ratio stays
        measured.simulator = {name: value / 1.2 for name, value in measured.kernel.items()}
    missed = [check for check in checks(found) if not check.holds]
    assert all(check.value <= 0.2 for check in missed)
    assert [check.figure.split(" at ")[1].split(",")[0] for check in missed] == [
        "p90",
        "p95",
        "p99",
        "p995",
    ]  # at the mean, 1 ms, the floor of .3 ms is more than the difference


def test_a_check_without_a_value_does_not_hold() -> None:
    assert not Check("never measured", math.nan, "<=", 1.0).holds


def test_results_survive_the_disk(tmp_path: Path) -> None:
    found = results()
    found.checks.append(Check("nothing", math.nan, "<=", 1.0))
    found.tables.append(Table("t", ["a"], [[1.5], ["x"]], "note"))
    found.series.append(Series("s", "x", "y", {"line": [[0.0, 1.0], [1.0, 2.0]]}, step=True))
    save(found, tmp_path)
    back = load(tmp_path)
    assert back.runs == found.runs
    assert back.series == found.series
    assert math.isnan(back.checks[0].value)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("workload,load,label,seed,gate,source,mean,p50")
    assert len(lines) == 1 + 2 * len(found.runs)
    keep(back, run("fifo", 1, 2.0), tmp_path)
    assert load(tmp_path).labels("cache") == ["2d", "ps", "fifo"]


def test_a_directory_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        load(tmp_path)
    (tmp_path / "results.json").write_text('{"experiment": 1}')
    with pytest.raises(InputError, match="results of an experiment"):
        write_report(tmp_path)


def test_report_is_one_page_with_pictures_inside(tmp_path: Path) -> None:
    found = results()
    flows = tmp_path / "flows"
    flows.mkdir()
    for measured in found.runs:
        measured.records = f"flows/{measured.label}-{measured.seed}.csv"
        times = [0.001 * (index + 1) for index in range(50)]
        write_records(
            tmp_path / measured.records,
            [FlowRecord(i, 0, 0, 10, 0, 0.0, 0.0, 0.0, 0.0, time) for i, time in enumerate(times)],
        )
        write_completions((tmp_path / measured.records).with_suffix(".sim.csv"), times)
    found.series.append(Series("classes", "s", "n", {"a": [[0, 1]], "b": [[0, 2]]}, step=True))
    found.checks = [Check("good", 1.0, "<=", 2.0), Check("bad", 3.0, "<=", 2.0)]
    save(found, tmp_path)
    page = write_report(tmp_path).read_text()
    assert page.count('src="data:image/png;base64,') == 3  # CDF, bars, series
    assert "A &lt;title&gt;" in page
    assert "<script" not in page
    assert "http" not in page
    assert 'class="good">holds' in page
    assert 'class="bad">missed' in page
    for figure in PUBLISHED["overall"]:
        assert figure.source in page
    assert "kernel / simulator" in page


def test_report_without_records_still_has_its_tables(tmp_path: Path) -> None:
    page = render(results(), tmp_path)
    assert "Normalised to 2d" in page


def test_completions_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.sim.csv"
    assert read_completions(path) == []
    write_completions(path, [0.25, 1.5])
    assert read_completions(path) == [0.25, 1.5]


def test_summary_is_plain_and_complete(tmp_path: Path) -> None:
    document = summary(results(), tmp_path)
    assert [row["policy"] for row in document["runs"]] == ["2d", "ps"]
    assert document["runs"][0]["kernel"]["mean_s"] == pytest.approx(1.5e-3)
    assert [row[2] for row in completion_rows(results())] == ["2d", "ps"]


def test_directories_are_never_used_twice(tmp_path: Path) -> None:
    first, second = new_directory("overall", tmp_path), new_directory("overall", tmp_path)
    assert first != second
    assert first.name.startswith("overall-")


def test_text_table_pads() -> None:
    text = text_table(["name", "x"], [["a", 1.23456], ["long name", 2.0]])
    assert text.splitlines() == ["name           x", "a          1.235", "long name      2"]


async def test_what_was_measured_before_a_crash_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(_options: Options, directory: Path, _progress: Any) -> Results:
        keep(Results("overall", "Half of it", "about"), run("2d", 1, 1.0), directory)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(overall, "run", crash)
    options = Options(gate="local", namespaces=False)
    with pytest.raises(OSError, match="No space"):
        await run_experiment("overall", options, tmp_path, lambda _text: None)
    found = load(tmp_path)
    assert len(found.runs) == 1
    assert "Ended early, with 1 runs: OSError: [Errno 28] No space" in found.notes[-1]
    assert "Half of it" in (tmp_path / "report.html").read_text()


def test_all_leaves_out_what_one_does_not_take_and_says_so() -> None:
    options = Options(policies=("2d",), seeds=2, namespaces=False)
    left_out = check("all", options)
    assert any("not taken by downlink" in text for text in left_out)
    assert heeded("downlink", options).policies == ()
    assert heeded("overall", options) == options
