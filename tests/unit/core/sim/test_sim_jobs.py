"""The job simulator: the chapter's toy, its published traces, costs, failures, wrong sizes."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from intentd.core.errors import InputError, StateError
from intentd.core.jobs import allocator, traces
from intentd.core.jobs.allocator import Progress, job_table, table_of
from intentd.core.jobs.demand import from_tables, linear
from intentd.core.jobs.metrics import Objective, parse_objectives, prediction_error, summarised
from intentd.core.jobs.policy import Costs, JobsPolicy, make, wfq
from intentd.core.jobs.workloads import synthetic
from intentd.core.sim.jobs import (
    Failure,
    Options,
    Pool,
    Snapshot,
    capacity_changes,
    simulate,
    simulate_pools,
)

DATA = Path(os.environ.get("INTENTD_DATA", Path(__file__).parents[4] / ".." / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "pcs").is_dir() or allocator.compiled_kernel() is None,
    reason="no shared traces (INTENTD_DATA), or the job kernel is not built",
)


def toy():
    """Figure 3.1: one GPU, four jobs."""
    return job_table(
        [0.0, 0.0, 1.0, 10.0], [10.0, 8.0, 1.0, 8.0], [1] * 4, [0] * 4, np.array([[0.0, 1.0]])
    )


def test_toy_example_of_figure_3_1():
    fifo = simulate(toy(), make("fifo"), 1)
    np.testing.assert_allclose(fifo.measured.error_percent, 0, atol=1e-9)
    assert fifo.outcome.finish_s.tolist() == [10, 18, 19, 27]
    srsf = simulate(toy(), make("srsf"), 1)
    assert srsf.outcome.finish_s.tolist() == [27, 9, 2, 18]
    assert srsf.measured.jct_s.mean() < fifo.measured.jct_s.mean()
    assert np.abs(srsf.measured.error_percent).mean() == pytest.approx(46, abs=2)


def trace(name):
    scaling = traces.read_scaling((DATA / "pcs" / "scaling.csv").read_text())
    return traces.read_csv((DATA / "pcs" / f"trace_{name}.csv").read_text(), scaling)


def artifact(jobs, name, predictions=0.0):
    options = Options(predictions=predictions, artifact=True)
    return simulate(jobs, make(name, integral=False), 64, options)


# full traces, 64 GPUs: average JCT of AFS in seconds, of SRSF and FIFO over AFS, and the average
# and p99 prediction error of AFS and SRSF, as published where they agree with a rerun
PUBLISHED = {
    "0e4a51": (237_150, 1.064, 9.301, (25.6, 240), (26.6, 314)),
    "2869ce": (60_967, 1.428, 4.857, (9.03, 113.6), (11.17, 241.1)),
    "6c71a0": (101_500, 1.073, 31.52, (17.0, 194), (18.4, 216)),
    "b436b2": (210_250, 1.316, 59.98, (83.8, 771), (86.6, 792)),
}


@needs_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_of_the_traces(name):
    jobs = trace(name)
    afs_s, srsf, fifo, *errors = PUBLISHED[name]
    base = artifact(jobs, "afs", 1.0)
    mean = base.measured.jct_s.mean()
    assert mean == pytest.approx(afs_s, rel=1e-3)
    other = artifact(jobs, "srsf", 1.0)
    assert other.measured.jct_s.mean() / mean == pytest.approx(srsf, rel=1e-3)
    assert artifact(jobs, "fifo").measured.jct_s.mean() / mean == pytest.approx(fifo, rel=1e-3)
    for result, (average, tail) in zip((base, other), errors, strict=True):
        found = np.abs(result.measured.error_percent)
        # published: a sample of 5,000 jobs where there are more; three standard errors of it
        noise = 3 * sampling_error(found) if len(jobs) > 5000 else 0.0
        assert found.mean() == pytest.approx(average, rel=0.01, abs=noise)
        assert np.percentile(found, 99) == pytest.approx(tail, rel=0.01 if noise == 0 else 0.1)


def sampling_error(values):
    share = 5000 / len(values)
    return float(values.std() * np.sqrt((1 - share) / 5000))


@needs_data
def test_fifo_is_predicted_without_error():
    result = artifact(trace("2869ce"), "fifo", 1.0)
    np.testing.assert_allclose(result.measured.error_percent, 0, atol=1e-6)


def test_costs_hold_gpus_without_progress():
    jobs = job_table([0.0, 10.0], [100.0, 1.0], [1, 1], [0, 0], np.array([[0.0, 1.0]]))
    paid = simulate(jobs, make("srsf"), 1, Options(costs=Costs(start_s=0.5, preempt_s=0.25)))
    assert paid.outcome.preemptions.tolist() == [1, 0]
    assert paid.outcome.finish_s.tolist() == [101 + 3 * 0.5 + 0.25, 11.5]


def test_a_resize_costs_too():
    jobs = job_table([0.0, 10.0], [100.0, 10.0], [2, 1], [0, 0], np.arange(3.0)[None, :])
    policy = JobsPolicy("srsf")
    free, paid = (
        simulate(jobs, policy, 2, Options(costs=Costs(resize_s=cost))) for cost in (0.0, 5.0)
    )
    assert free.outcome.resizes[0] == 2
    assert paid.outcome.finish_s[0] == free.outcome.finish_s[0] + 7.5  # once at 1 GPU, once at 2


def test_minimum_runtime_delays_a_preemption():
    jobs = job_table([0.0, 1.0], [100.0, 1.0], [1, 1], [0, 0], np.array([[0.0, 1.0]]))
    protected = Options(costs=Costs(min_runtime_s=20.0))
    assert simulate(jobs, make("srsf"), 1).outcome.start_s[1] == 1
    assert simulate(jobs, make("srsf"), 1, protected).outcome.start_s[1] == 20


def test_a_failure_loses_the_progress_since_the_checkpoint():
    jobs = job_table([0.0], [100.0], [2], [0], np.arange(3.0)[None, :])
    failure = (Failure(at_s=30.0, gpus=2, repair_s=10.0),)
    lost = simulate(jobs, make("fifo"), 2, Options(failures=failure, predictions=0))
    assert lost.outcome.finish_s[0] == 90  # 30 s lost, 10 s without GPUs
    kept = Options(failures=failure, predictions=0, costs=Costs(checkpoint_s=20.0))
    assert simulate(jobs, make("fifo"), 2, kept).outcome.finish_s[0] == 70
    assert capacity_changes(failure).tolist() == [[30, -2], [40, 2]]


def test_wrong_sizes_move_predictions_but_hardly_the_jct():
    jobs = synthetic("workload-1", jobs=600, load=0.8, gpus=64, seed=2)
    policy = wfq(jobs.sizes_gpu_s, T=0.5, W=0.7, zeta=0.5)
    errors, means = [], []
    for percent in (0.0, 10.0, 60.0):
        seen = simulate(jobs, policy, 64, Options(error_percent=percent, seed=4)).measured
        errors.append(np.abs(seen.error_percent).mean())
        means.append(seen.jct_s.mean())
    assert errors[0] < errors[1] < errors[2]
    assert means[2] == pytest.approx(means[0], rel=0.05)


def test_a_snapshot_plays_out_as_the_simulator_predicted():
    jobs = toy()
    now = Snapshot(jobs.take([0, 1]), Progress.fresh(jobs.take([0, 1])), 0.0, 1, make("srsf"))
    assert now.play_out().tolist() == [18, 8]
    later = now.with_job(toy().take([2]))
    assert later.play_out().tolist() == [19, 9, 1]
    stuck = replace(now, jobs=replace(now.jobs, smallest=np.array([1.0, 1.0])), gpus=0.5)
    with pytest.raises(StateError, match="wait for ever"):
        stuck.play_out()


def test_pools_of_two_types_take_the_earlier_finish():
    demands = [
        from_tables({("fast", 1): {1: 100.0, 2: 50.0}, ("slow", 1): {1: 300.0, 2: 150.0}}),
        from_tables({("fast", 1): {1: 100.0, 2: 50.0}, ("slow", 1): {1: 120.0, 2: 60.0}}),
        linear(10.0, 1),
    ]
    pools = [Pool("fast", 2), Pool("slow", 2)]
    tables = [table_of(demands, [0.0, 1.0, 2.0], gpu_type=pool.gpu_type) for pool in pools]
    chosen, outcomes = simulate_pools(tables, wfq([10.0, 100.0], T=1.0, W=1.0, zeta=0.0), pools)
    assert chosen.tolist()[:2] == [0, 1]
    assert sum(len(outcome.finish_s) for outcome in outcomes) == 3
    with pytest.raises(InputError, match="min_gpus"):
        simulate_pools(
            [replace(table, smallest=np.array([3.0, 3.0, 3.0])) for table in tables],
            make("fifo"),
            pools,
        )


def test_what_can_never_run_is_refused():
    jobs = job_table([0.0], [1.0], [8], [0], np.arange(9.0)[None, :], smallest=8.0)
    with pytest.raises(InputError, match=r"jobs\[0\]\.min_gpus"):
        simulate(jobs, make("fifo"), 4)
    with pytest.raises(InputError, match="gpus"):
        simulate(toy(), make("fifo"), 0)
    with pytest.raises(InputError, match="jobs"):
        simulate(toy().take([]), make("fifo"), 1)
    broken = Options(failures=(Failure(0.5, 1, 1e300),), predictions=0)
    assert simulate(toy(), make("fifo"), 1, broken).outcome.finish_s[0] > 1e299
    for change in ({"predictions": 2.0}, {"error_percent": 100.0}):
        with pytest.raises(InputError):
            Options(**change)
    with pytest.raises(InputError, match="failure"):
        Failure(-1.0, 1, 1.0)


def test_objectives():
    jct, tail = parse_objectives("jct:avg,prederr:p99")
    assert (jct.name, tail.name) == ("jct:avg", "prederr:p99")
    measured = simulate(toy(), make("srsf"), 1).measured
    assert jct.of(measured) == pytest.approx(measured.jct_s.mean())
    assert Objective("unfairness").of(measured) >= 0
    assert prediction_error(np.array([3.0]), np.array([2.0])).tolist() == [50]
    assert summarised(np.array([np.nan])) == np.inf
    for text in ("jct:avg", "jct:avg,jct:avg", "speed:avg,jct:avg", "jct:p0,jct:avg", "jct:x,jct"):
        with pytest.raises(InputError):
            parse_objectives(text)


def test_summary_has_the_figures_of_the_command():
    summary = simulate(toy(), make("srsf"), 1, Options(predictions=0)).summary()
    assert summary["avg_pred_err"] is None
    assert summary["jobs"] == 4
    assert summary["makespan_s"] == 27
