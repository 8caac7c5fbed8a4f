"""Histories of jobs: told, kept, and when they no longer tell the present; choices on a front."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from intentd.core.errors import InputError
from intentd.core.jobs.choice import Choice, choice_from_plain, pick
from intentd.core.jobs.history import (
    MAX_ROWS,
    Arrival,
    Basis,
    HistorySettings,
    JobHistory,
    arrivals_from_plain,
    arrivals_to_plain,
)
from intentd.daemons.gpu.history import KEPT, Reporter


def draw(count: int, *, mean: float = 100.0, first: int = 1, gap: float = 10.0) -> list[Arrival]:
    rng = np.random.default_rng(first)
    sizes = rng.lognormal(np.log(mean), 1.0, count)
    return [
        Arrival(first + at, (first + at) * gap, float(size), 1, 4) for at, size in enumerate(sizes)
    ]


def test_the_way_to_the_controller_and_back() -> None:
    rows = [
        Arrival(1, 0.0, 5.0, 1, 2, (0.0, 1.0, 1.5)),
        Arrival(2, 1.0, 6.0, 2, 8),
        Arrival(3, 1.0, 6.0, 1, 2, (0.0, 1.0, 1.5)),
    ]
    plain = arrivals_to_plain(rows)
    assert len(plain["tables"]) == 1
    assert arrivals_from_plain(plain) == rows
    assert len(arrivals_to_plain(draw(MAX_ROWS + 5))["rows"]) == MAX_ROWS


@pytest.mark.parametrize(
    ("plain", "field"),
    [
        ([], "history"),
        ({"rows": 3}, "history.rows"),
        ({"rows": [[1, 0, 5, 1, 2]]}, "history.rows[0]"),
        ({"rows": [[1, 0, float("nan"), 1, 2, -1]]}, "history.rows[0]"),
        ({"rows": [[1, 0, -5, 1, 2, -1]]}, "history.rows[0]"),
        ({"rows": [[1, 0, 5, 3, 2, -1]]}, "history.rows[0]"),
        ({"rows": [[1, 0, 5, 1, 2, 0]]}, "history.rows[0]"),
        ({"rows": [[1, 0, 5, 1, 9, 0]], "tables": [[0, 1, 2]]}, "history.rows[0]"),
        ({"tables": [[0, 2, 1]]}, "history.tables[0]"),
        ({"tables": [["x", 1]]}, "history.tables[0]"),
    ],
)
def test_nonsense_is_named(plain: object, field: str) -> None:
    with pytest.raises(InputError) as caught:
        arrivals_from_plain(plain)
    assert caught.value.field == field


def test_a_table_fits_the_cluster_and_starts_at_zero() -> None:
    history = JobHistory(4.0)
    history.take(
        [
            Arrival(7, 50.0, 10.0, 1, 8),
            Arrival(8, 60.0, 10.0, 5, 8),
            Arrival(9, 55.0, 20.0, 1, 2, (0.0, 1.0, 1.2)),
        ]
    )
    table = history.table()
    assert table.submit_s.tolist() == [0.0, 5.0]
    assert table.largest.tolist() == [4, 2]
    assert table.speeds[table.table[1]].tolist() == [0.0, 1.0, 1.2, 1.2, 1.2]
    history.take([Arrival(9, 55.0, 0.0, 1, 2), Arrival(7, 50.0, 12.0, 1, 8)])
    assert history.table().work_gpu_s.tolist() == [12.0]  # measured; the other never ran


def test_a_change_forgets_what_came_before_and_is_a_reason_to_search() -> None:
    history = JobHistory(8.0, HistorySettings(min_jobs=100))
    assert history.take(draw(50)) is None
    assert history.due(None) == ""
    assert history.take(draw(550, first=51)) is None
    assert history.due(None) == "bootstrap: 600 jobs known"
    history.searched()
    last = history.basis()
    assert history.due(last) == ""
    for first in range(601, 1001, 50):
        history.take(draw(50, mean=3000.0, first=first))
    assert history.changes == 1
    assert len(history) < 450
    assert history.due(last).startswith("workload changed (divergence ")
    history.take(
        [Arrival(5, 5.0, 100.0, 1, 1)]
    )  # told again after a reconnection: before the change
    assert 5 not in history._rows


def test_growth_and_load_are_reasons_too() -> None:
    history = JobHistory(8.0)
    history.take(draw(1000))
    assert history.due(Basis(200, history.load() or 0.0)).startswith("history grew from 200")
    load = history.load()
    assert load == pytest.approx(100 * np.exp(0.5) / 80, rel=0.2)
    assert history.due(Basis(900, 2 * load)).startswith(f"load moved from {2 * load:.2f} to")


def test_bounded() -> None:
    history = JobHistory(8.0, HistorySettings(window_jobs=300))
    history.take(draw(1000))
    assert len(history) == 300
    reporter = Reporter()
    for row in draw(KEPT + 10):
        reporter.arrived(row)
    assert len(reporter) == KEPT


def test_reports_repeat_the_last_one_and_begin_again_after_a_greeting() -> None:
    reporter = Reporter()

    def told() -> list[int]:
        return [int(row[0]) for row in reporter.report()["rows"]]

    assert told() == []
    rows = draw(3)
    reporter.arrived(rows[0])
    reporter.arrived(rows[1])
    assert told() == [1, 2]
    reporter.arrived(rows[2])
    assert told() == [1, 2, 3]
    assert told() == [3]
    assert told() == []
    reporter.ended(1, 7.0)
    assert reporter.report()["rows"] == [[1, rows[0].submit_s, 7.0, 1, 4, -1]]
    reporter.greeted()
    assert told() == [2, 3, 1]
    for row in draw(1500, first=10):
        reporter.arrived(row)
    reporter.greeted()
    first, second = told(), told()
    assert first + second == [2, 3, 1, *range(10, 1510)]


FRONT = [
    {"jct:avg": 100.0, "prederr:avg": 40.0},
    {"jct:avg": 130.0, "prederr:avg": 8.0},
    {"jct:avg": 300.0, "prederr:avg": 0.5},
]


def test_choices() -> None:
    assert pick(FRONT, Choice(index=2)) == 2
    assert pick(FRONT, Choice(prefer="jct:avg")) == 0
    assert pick(FRONT, Choice(prefer="balanced")) == 1
    assert pick(FRONT, Choice(at_most={"prederr:avg": 10.0})) == 1
    assert pick(FRONT, Choice(prefer="prederr:avg", at_most={"jct:avg": 150.0})) == 1
    for choice, field in (
        (Choice(index=3), "index"),
        (Choice(prefer="jct:p99"), "objective"),
        (Choice(at_most={"prederr:avg": 0.1}), "at_most"),
    ):
        with pytest.raises(InputError) as caught:
            pick(FRONT, choice)
        assert caught.value.field == field
    with pytest.raises(InputError, match="front"):
        pick([], Choice(index=0))


@pytest.mark.parametrize(
    "plain",
    [
        3,
        {},
        {"index": -1},
        {"index": 0, "prefer": "jct:avg"},
        {"index": 0, "follow": True},
        {"prefer": 5},
        {"at_most": {"jct:avg": "x"}},
        {"at_most": [1]},
        {"prefers": "jct:avg"},
    ],
)
def test_bad_choices(plain: object) -> None:
    with pytest.raises(InputError, match="choice"):
        choice_from_plain(plain)


def test_a_choice_survives_the_disk() -> None:
    choice = Choice(prefer="jct:avg", at_most={"prederr:avg": 5.0}, follow=True)
    assert choice_from_plain(choice.to_plain()) == choice
    assert replace(choice, follow=False) != choice
