"""Bounds that adapt: coverage, re-issue with a cause, what-if, bounded memory."""

import math
from dataclasses import replace

import numpy as np
import pytest

from intentd.core.errors import InputError, StateError
from intentd.core.jobs import predictor as predictors
from intentd.core.jobs.allocator import JobTable, Progress, job_table
from intentd.core.jobs.policy import make, wfq
from intentd.core.jobs.predictor import CLASSES, Calibrator, Predictor, replay
from intentd.core.jobs.workloads import synthetic
from intentd.core.sim.jobs import Options, Snapshot, simulate


def table(works, submit=None, smallest=1.0) -> JobTable:
    n = len(works)
    submit = submit if submit is not None else [0.0] * n
    return job_table(submit, works, [1] * n, [0] * n, np.array([[0.0, 1.0]]), smallest=smallest)


def snapshot(works, now_s=0.0, name="fifo"):
    jobs = table(works)
    return Snapshot(jobs, Progress.fresh(jobs), now_s, 1, make(name))


@pytest.mark.parametrize("name", ["srsf", "wfq"])
def test_coverage_on_workload_1(name):
    jobs = synthetic("workload-1", jobs=3000, load=0.85, gpus=64, seed=11)
    policy = make("srsf") if name == "srsf" else wfq(jobs.sizes_gpu_s, T=0.3, W=0.7, zeta=0.5)
    outcome = simulate(jobs, policy, 64, Options(review_every=15)).outcome
    seen = replay(jobs, outcome)
    assert 88 <= seen.coverage_percent <= 94
    assert min(seen.thirds_percent) >= 85
    fitted, plain = seen.median_errors()
    assert fitted <= plain + 1e-9
    assert (seen.widths >= 1).all()
    assert math.isfinite(seen.interval_score)


def test_a_predictable_policy_gets_narrow_bounds():
    jobs = synthetic("workload-1", jobs=3000, load=0.8, gpus=64, seed=3)
    outcome = simulate(jobs, make("fifo"), 64, Options(review_every=15)).outcome
    seen = replay(jobs, outcome)
    assert seen.coverage_percent == 100
    assert np.median(seen.widths[1500:]) <= 1.02


def test_replay_learns_nothing_from_the_future():
    jobs = synthetic("workload-1", jobs=400, load=0.9, gpus=64, seed=7)
    outcome = simulate(jobs, make("srsf"), 64, Options(review_every=10)).outcome
    whole = replay(jobs, outcome)
    cut = 200
    later = jobs.submit_s[cut]
    changed = replace(
        outcome,
        finish_s=np.where(outcome.finish_s > later, outcome.finish_s * 3, outcome.finish_s),
        reviews_s=np.where(
            np.arange(len(outcome.reviews_s))[:, None] >= cut // 10, np.nan, outcome.reviews_s
        ),
    )
    again = replay(jobs, changed)
    np.testing.assert_array_equal(whole.upper_s[:cut], again.upper_s[:cut])


def test_calibrator_counts_hits_and_misses_per_class():
    calibrator = Calibrator()
    for step in range(300):
        calibrator.issue(step, 10.0 * step, 10.0 * step + 5, size=5.0 + step % 7)
        calibrator.finished(step, 10.0 * step + (5 if step % 3 else 7))
    stated = calibrator.coverage()
    assert len(stated) == CLASSES
    assert sum(row["results"] for row in stated) == 300
    assert math.isnan(Calibrator().coverage()[0]["kept_percent"])
    bounds = calibrator.issue("new", 3000.0, 3005.0, 6.0)
    assert bounds.p90_s >= 7 - 1e-6  # a third of the jobs took 7
    assert bounds.coverage_percent > 60


def test_a_verdict_is_taken_back_when_it_turns_out_otherwise():
    calibrator = Calibrator()
    bound = calibrator.issue("late", 0.0, 100.0, 50.0).p90_s
    calibrator.review(50.0, {"late": 10 * bound})  # believed to miss
    assert sum(row["kept_percent"] == 0 for row in calibrator.coverage()) == 1
    calibrator.finished("late", 100.0)
    assert sum(row["kept_percent"] == 100 for row in calibrator.coverage()) == 1
    calibrator.issue("early", 100.0, 200.0, 50.0)
    calibrator.review(180.0, {"early": 200.0})  # believed to be kept
    calibrator.finished("early", 1e6)
    assert sorted(row["results"] for row in calibrator.coverage())[-1] == 2
    assert sum(row["kept_percent"] == 50 for row in calibrator.coverage()) == 1


def test_bounds_that_nobody_misses_come_down():
    calibrator = Calibrator()
    widths = []
    for step in range(1000):  # of five sizes, each as long as played out
        size = 10.0 ** (1 + step % 5)
        bounds = calibrator.issue(step, 1e6 * step, 1e6 * step + size, size)
        widths.append(bounds.p90_s / bounds.plain_s)
        calibrator.finished(step, 1e6 * step + size)
    assert max(widths[:30]) > 1.5  # nothing was known of the largest
    assert max(widths[900:]) < 1.02


def test_misuse_is_refused():
    calibrator = Calibrator()
    calibrator.issue("a", 0.0, 1.0, 1.0)
    with pytest.raises(StateError, match="already"):
        calibrator.issue("a", 0.0, 1.0, 1.0)
    for finish, size in ((-1.0, 1.0), (math.inf, 1.0), (1.0, 0.0)):
        with pytest.raises(InputError):
            calibrator.issue("b", 0.0, finish, size)
    calibrator.finished("unknown", 5.0)
    calibrator.review(1.0, {"unknown": 5.0, "a": math.nan})


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(predictors, "HELD", 50)
    calibrator = Calibrator()
    for step in range(1000):
        calibrator.issue(step, float(step), step + 2.0, 1.0 + step % 5)
        assert len(calibrator._keys) <= 100
    calibrator.finished(3, 2000.0)  # forgotten: no effect, no error


def test_predictor_reissues_with_the_cause():
    predictor = Predictor()
    first = predictor.submit(snapshot([100.0]), ["a"])
    assert (first.p50_s, first.cause) == (100, "submitted")
    assert first.p90_s >= first.p50_s
    predictor.submit(snapshot([100.0, 50.0]), ["a", "b"])
    now = snapshot([100.0, 50.0], now_s=0.0)
    assert predictor.refresh(now, ["a", "b"], "nothing new") == []
    slower = replace(now, now_s=500.0)
    changed = predictor.refresh(slower, ["a", "b"], "node n1 lost")
    assert {item.job for item in changed} == {"a", "b"}
    assert all(item.cause == "node n1 lost" for item in changed)
    predictor.finished("a", 600.0)
    assert "a" not in predictor.issued


def test_what_if_says_what_it_does_to_others():
    predictor = Predictor()
    now = snapshot([100.0, 50.0], name="srsf")
    seen = predictor.what_if(now, ["a", "b"], table([10.0]))
    assert seen.prediction.p50_s == 10
    assert seen.delays_s == {"a": 10, "b": 10}
    assert predictor.issued == {}
    alone = predictor.what_if(snapshot([]), [], table([10.0]))
    assert alone.delays_s == {}
    with pytest.raises(InputError):
        predictor.what_if(now, ["a", "b"], table([1.0, 2.0]))
    with pytest.raises(InputError):
        predictor.submit(now, ["a"])
