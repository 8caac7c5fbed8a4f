"""The studies of classes and simulator run, and judge what they find."""

import math

import pytest
from benchmarks.classes import study
from benchmarks.simulator import (
    HEURISTICS,
    LOADS,
    STUDY_WORKLOADS,
    Task,
    ratio,
    report,
    run,
    show,
    tasks_of,
)


def test_simulator_study_on_tiny_traces() -> None:
    tasks = [Task("reference", name, 0.8, seed, 400) for name in STUDY_WORKLOADS for seed in (1, 2)]
    tasks += [
        Task("boost", "cache", load, 9, 400, variant)
        for load in LOADS
        for variant in ("learned", "published")
    ]
    tasks.append(Task("weights", "data-mining", 0.8, 1, 400))
    tasks.append(Task("heuristics", "cache", 0.8, 1, 400))
    result = report([run(task) for task in tasks])
    assert len(result["reference"]) == 4 * 4 * 5
    assert len(result["boost"]) == 4
    assert [row["policy"] for row in result["heuristics"]] == list(HEURISTICS)
    assert list(result["weights"]) == ["bytes", "eq-2.1"]
    show(result)
    fifo = [c for c in result["reference"] if (c["policy"], c["workload"]) == ("fifo", "uniform")]
    assert all(cell["ratio"] == 1.0 and cell["within_10_percent"] for cell in fifo)
    assert set(result["cpu_s_per_100k_flows"]) >= {"2d", "2d-boost", "srpt", "eq-2.1"}


def test_full_study_covers_what_it_says() -> None:
    tasks = tasks_of(10, 100_000)
    assert len(tasks) == len(set(tasks)) == 40 + 2 * 80 + 3 + 12
    assert {task.study for task in tasks_of(1, 10, ("weights",))} == {"weights"}
    unseen = {task.seed for task in tasks if task.study == "boost"}
    assert unseen.isdisjoint(task.seed for task in tasks if task.study != "boost")


def test_ratio_of_means_and_its_error() -> None:
    rows = [{"a": {"m": 2.0}, "b": {"m": 1.0}}, {"a": {"m": 4.0}, "b": {"m": 2.0}}]
    assert ratio(rows, "a", "b", "m") == {"ratio": 2.0, "se": 0.0, "median": 2.0, "worst": 2.0}
    assert math.isnan(ratio(rows[:1], "a", "b", "m")["se"])


@pytest.mark.parametrize("name", ["cache", "uniform"])
def test_classes_study(name: str) -> None:
    result = study(name, 5)
    assert result["right_count"] == {"3000": 1.0, "10000": 1.0}
    assert result["worst_off"] < 0.1
