"""The compiled allocator equals the reference, and every policy keeps what it promises."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.jobs import allocator
from intentd.core.jobs.allocator import JobTable, Progress, Quotas, job_table
from intentd.core.jobs.policy import NAMES, Costs, JobsPolicy, make, wfq

needs_kernel = pytest.mark.skipif(
    allocator.compiled_kernel() is None, reason="the job kernel is not built (make kernel)"
)
STATES = 10_000


def random_speeds(rng, tables, width):
    speeds = np.zeros((tables, width))
    for row in range(1, tables):
        gains = np.concatenate([[0, 1.0], rng.uniform(0, 1, width - 2) * rng.uniform(0.3, 1)])
        speeds[row] = np.cumsum(gains)
    speeds[0] = np.arange(width)
    return speeds


def random_jobs(rng, gangs):
    n, width = int(rng.integers(1, 40)), 12
    largest = rng.integers(1, width, n)
    smallest = np.zeros(n)
    if gangs:
        smallest = np.minimum(rng.choice([0, 1, 1, 2, 4], n), largest).astype(float)
    submit, sizes = np.sort(rng.integers(0, 5000, n)).astype(float), np.exp(rng.normal(6, 2, n))
    if rng.integers(4) == 0:  # many equal ones, whose order is that of arrival
        submit, sizes = np.floor(submit / 1000) * 1000, 100.0 * rng.integers(1, 4, n)
    return job_table(
        submit,
        sizes,
        largest,
        rng.integers(0, 4, n),
        random_speeds(rng, 4, width),
        smallest=smallest,
        estimate=rng.uniform(0.5, 2, n) if rng.integers(2) else 1.0,
    )


def random_policy(rng, name, sizes):
    integral = bool(rng.integers(2))
    if name != "wfq":
        return JobsPolicy(name, integral=integral, lease_s=[0.0, 600.0][int(rng.integers(2))])
    zeta, delta = float(rng.uniform(0, 1)), float(rng.uniform(0.01, 0.9))
    if rng.integers(2):
        spread, steep = float(rng.uniform(0.05, 5)), float(rng.uniform(-3, 3))
        return wfq(sizes, T=spread, W=steep, zeta=zeta, delta=delta, integral=integral)
    limits = [*sorted(set(rng.choice(sizes, int(rng.integers(0, 5))).tolist())), math.inf]
    weights = tuple(rng.uniform(0.01, 1, len(limits)).tolist())
    return JobsPolicy("wfq", tuple(limits), weights, zeta=zeta, delta=delta, integral=integral)


def random_state(rng, name):
    jobs = random_jobs(rng, gangs=bool(rng.integers(2)))
    gpus = float(rng.integers(4, 40))
    progress = Progress.fresh(jobs)
    progress.remaining_gpu_s *= rng.uniform(0.01, 1, len(jobs))
    progress.contention = rng.uniform(1, 30, len(jobs))
    costs = Costs()
    if rng.integers(3) == 0:
        costs = Costs(*rng.uniform(0, 50, 3).tolist(), min_runtime_s=300.0)
        held = rng.uniform(size=len(jobs)) < 0.3
        grant = np.where(held, np.minimum(jobs.largest, np.maximum(jobs.smallest, 1)), 0.0)
        while grant.sum() > gpus:
            grant[np.argmax(grant)] = 0
        progress.grant = grant
        progress.since_s = 5000 - rng.uniform(0, 600, len(jobs))
    return jobs, random_policy(rng, name, jobs.sizes_gpu_s), gpus, progress, costs


@needs_kernel
@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_reference_on_random_states(name):
    rng = np.random.default_rng(NAMES.index(name))
    for _ in range(STATES // len(NAMES) + 1):
        jobs, policy, gpus, progress, costs = random_state(rng, name)
        compiled, plain = (
            allocator.allocate(
                jobs, policy, gpus, now_s=5000.0, progress=progress, costs=costs, backend=backend
            )
            for backend in allocator.BACKENDS
        )
        np.testing.assert_allclose(compiled, plain, atol=1e-9, rtol=0)
        assert compiled.sum() <= gpus + 1e-6


@needs_kernel
@pytest.mark.parametrize("name", NAMES)
def test_compiled_event_loop_equals_reference(name):
    rng = np.random.default_rng(100 + NAMES.index(name))
    for turn in range(25):
        jobs, policy, _, _, costs = random_state(rng, name)
        failures = np.array([[900.0, -3], [2000.0, 3], [2500.0, -2], [4000.0, 2]])
        runs = [
            allocator.run(
                allocator.PLAY,
                jobs,
                policy,
                16.0,
                costs=costs,
                failures=failures if turn % 2 else None,
                predict=(np.arange(len(jobs)) % 2).astype(np.uint8),
                artifact=turn % 3 == 0,
                review_every=turn % 4,
                seed=turn,
                lease_growth=0.02 * (turn % 2),
                backend=backend,
            )
            for backend in allocator.BACKENDS
        ]
        for field in ("finish_s", "start_s", "fair_s", "predicted_s", "resizes", "preemptions"):
            compiled, plain = (getattr(run, field) for run in runs)
            np.testing.assert_allclose(compiled, plain, rtol=1e-9, atol=1e-6, err_msg=field)
        np.testing.assert_allclose(runs[0].reviews_s, runs[1].reviews_s, rtol=1e-9, atol=1e-6)
        assert runs[0].complete
        assert runs[1].complete


def linear_jobs(largest, work=None, smallest=0.0, submit=None) -> JobTable:
    n = len(largest)
    return job_table(
        submit if submit is not None else np.arange(n, dtype=float),
        work if work is not None else np.full(n, 100.0),
        largest,
        np.zeros(n, dtype=int),
        np.arange(65, dtype=float)[None, :],
        smallest=smallest,
    )


def decide(jobs, policy, gpus, progress=None, costs=Costs()):  # frozen
    progress = progress or Progress.fresh(jobs)
    grants = allocator.allocate(jobs, policy, gpus, now_s=1e4, progress=progress, costs=costs)
    return grants.tolist()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(NAMES))
def test_every_policy_conserves_work_and_respects_demands(seed, name):
    rng = np.random.default_rng(seed)
    jobs = random_jobs(rng, gangs=False)
    policy = random_policy(rng, name, jobs.sizes_gpu_s)
    gpus = float(rng.integers(1, 40))
    grants = np.array(decide(jobs, policy, gpus))
    assert grants.sum() == pytest.approx(min(gpus, jobs.largest.sum()))
    assert (grants <= jobs.largest + 1e-9).all()
    if policy.integral:
        np.testing.assert_allclose(grants, np.round(grants), atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(NAMES))
def test_gangs_run_whole_or_not_at_all(seed, name):
    rng = np.random.default_rng(seed)
    jobs = random_jobs(rng, gangs=True)
    policy = random_policy(rng, name, jobs.sizes_gpu_s)
    grants = np.array(decide(jobs, policy, 16.0))
    assert ((grants == 0) | (grants >= jobs.smallest - 1e-9)).all()
    assert grants.sum() <= 16 + 1e-9


def test_fifo_serves_in_arrival_order_and_backfills():
    assert decide(linear_jobs([4, 8, 8]), make("fifo"), 10) == [4, 6, 0]


def test_fifo_skips_a_gang_that_does_not_fit():
    jobs = linear_jobs([4, 8, 2], smallest=np.array([1.0, 8.0, 1.0]))
    assert decide(jobs, make("fifo"), 10) == [4, 0, 2]


def test_srsf_prefers_the_smallest_remaining_service():
    assert decide(linear_jobs([4, 4, 4], [900.0, 50.0, 100.0]), make("srsf"), 6) == [0, 4, 2]


def test_afs_gives_every_job_a_gpu_first_when_it_can():
    grants = decide(linear_jobs([8, 8, 8], [300.0, 200.0, 100.0]), make("afs"), 9)
    assert min(grants) >= 1
    assert sum(grants) == 9


def test_afs_runs_the_shortest_when_jobs_outnumber_gpus():
    jobs = linear_jobs([2, 2, 2, 2], [400.0, 100.0, 300.0, 200.0])
    assert decide(jobs, make("afs"), 2) == [0, 1, 0, 1]


def test_maxmin_shares_equally_up_to_demand():
    assert decide(linear_jobs([1, 8, 8]), make("maxmin", integral=False), 9) == [1, 4, 4]


def test_themis_serves_the_most_delayed_first():
    jobs = linear_jobs([4, 4], [100.0, 100.0], submit=np.array([0.0, 9999.0]))
    assert decide(jobs, make("themis"), 4) == [4, 0]


def test_a_predictions_leases_grow_and_its_ends_hardly_move():
    rng = np.random.default_rng(4)
    jobs = linear_jobs(rng.integers(1, 9, 80), np.exp(rng.normal(9, 1.5, 80)), submit=np.zeros(80))
    progress = Progress.fresh(jobs)

    def ends(growth):
        return allocator.run(
            allocator.PLAY, jobs, make("themis"), 16.0, progress=progress, lease_growth=growth
        )

    exact, grown = ends(0.0), ends(allocator.LEASE_GROWTH)
    assert grown.summary[1] < exact.summary[1]  # decisions
    np.testing.assert_allclose(grown.finish_s, exact.finish_s, rtol=0.1)
    told = allocator.play_out(jobs, make("themis"), 16.0, now_s=0.0, progress=progress)
    np.testing.assert_array_equal(told, grown.finish_s)


def two_classes(weights, zeta=0.0, integral=True):
    return JobsPolicy("wfq", (150.0, math.inf), weights, zeta=zeta, integral=integral)


def test_wfq_splits_by_weight_and_hands_on_what_a_class_cannot_use():
    jobs = linear_jobs([8, 8, 8], [100.0, 1000.0, 1000.0])
    assert decide(jobs, two_classes((0.75, 0.25)), 16) == [8, 8, 0]
    assert decide(jobs, two_classes((0.25, 0.75)), 16) == [4, 8, 4]


def test_wfq_gives_each_busy_class_at_least_one_gpu():
    jobs = linear_jobs([8, 8], [100.0, 1000.0])
    assert decide(jobs, two_classes((0.999, 0.001)), 8) == [7, 1]
    assert sum(decide(jobs, two_classes((0.999, 0.001), integral=False), 8)) == pytest.approx(8)


def test_wfq_caps_by_efficiency_then_relaxes_the_cap():
    speeds = np.array([[0, 1, 1.9, 2.7, 3.2, 3.6, 3.9, 4.1, 4.2]])
    jobs = job_table([0.0, 1.0], [100.0, 100.0], [8, 8], [0, 0], speeds)
    strict = JobsPolicy("wfq", zeta=0.9, delta=0.05)
    assert decide(jobs, strict, 6) == [3, 3]  # efficiency .9 at 3, .8 at 4
    assert decide(jobs, JobsPolicy("wfq", zeta=0.0), 6) == [6, 0]
    assert decide(jobs, strict, 9) == [5, 4]  # relaxed to .7: 5 GPUs at .72


def test_a_protected_job_keeps_its_smallest_grant():
    jobs = linear_jobs([4, 4], [100.0, 10.0])
    progress = Progress.fresh(jobs)
    progress.grant = np.array([4.0, 0.0])
    progress.since_s = np.array([9_900.0, 0.0])
    assert decide(jobs, make("srsf"), 4, progress) == [0, 4]
    assert decide(jobs, make("srsf"), 4, progress, Costs(min_runtime_s=300.0)) == [1, 3]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("jobs[1].submit_s", {"submit_s": [5.0, 4.0]}),
        ("jobs[0].service_gpu_s", {"work_gpu_s": [math.nan, 1.0]}),
        ("jobs[1].service_gpu_s", {"work_gpu_s": [1.0, -1.0]}),
        ("jobs[0].gpus", {"largest": [0, 1]}),
        ("jobs[0].gpus", {"largest": [9, 1]}),
        ("jobs[1].min_gpus", {"smallest": [0.0, 5.0]}),
        ("jobs[0].table", {"table": [3, 0]}),
        ("jobs[0].estimate", {"estimate": [0.0, 1.0]}),
    ],
)
def test_a_wrong_table_is_one_clear_error(field, change):
    columns = {
        "submit_s": [0.0, 1.0],
        "work_gpu_s": [1.0, 1.0],
        "largest": [2, 2],
        "table": [0, 0],
        "speeds": np.arange(5.0)[None, :],
    } | change
    with pytest.raises(InputError) as caught:
        job_table(**columns)
    assert caught.value.field == field


@needs_kernel
def test_the_kernel_refuses_arrays_that_do_not_belong_together():
    kernel = allocator.compiled_kernel()
    with pytest.raises(ValueError, match="arrays"):
        kernel.run(0, np.zeros(17), ())
    jobs = linear_jobs([1, 1])
    numbers = allocator.numbers_of(make("fifo"), Costs(), 4, 0.0, 65)
    wrong = tuple(np.zeros(1) for _ in range(31))
    with pytest.raises(ValueError, match="length"):
        kernel.run(0, numbers, wrong)
    with pytest.raises(ValueError, match="numbers"):
        kernel.run(0, np.zeros(3), wrong)
    assert len(jobs) == 2


def test_an_unknown_backend_is_refused():
    with pytest.raises(InputError):
        allocator.backend_named("fortran")


def random_quotas(rng, jobs):
    """Of up to three owners; a quota holds the largest minimum, so that every job can run."""
    count = int(rng.integers(1, 4))
    owner = rng.integers(-1, count, len(jobs)).astype(np.int32)
    least = np.maximum(1.0, np.ceil(jobs.smallest))
    quota = [
        max([1.0, *least[owner == at].tolist()]) + float(rng.integers(0, 6)) for at in range(count)
    ]
    return Quotas(owner, np.array(quota))


@needs_kernel
@pytest.mark.parametrize("name", NAMES)
def test_quotas_hold_and_compiled_equals_reference(name):
    rng = np.random.default_rng(200 + NAMES.index(name))
    for _ in range(150):
        jobs, policy, gpus, progress, costs = random_state(rng, name)
        quotas = random_quotas(rng, jobs)
        compiled, plain = (
            allocator.run(
                allocator.DECIDE,
                jobs,
                policy,
                gpus,
                now_s=5000.0,
                progress=progress,
                costs=costs,
                quotas=quotas,
                backend=backend,
            ).grant
            for backend in allocator.BACKENDS
        )
        np.testing.assert_allclose(compiled, plain, atol=1e-9, rtol=0)
        for owner, limit in enumerate(quotas.gpus):
            assert compiled[quotas.owner == owner].sum() <= limit + 1e-6
    for _ in range(25):
        jobs, policy, _, _, costs = random_state(rng, name)
        quotas = random_quotas(rng, jobs)
        runs = [
            allocator.run(
                allocator.PLAY, jobs, policy, 16.0, costs=costs, quotas=quotas, backend=backend
            )
            for backend in allocator.BACKENDS
        ]
        np.testing.assert_allclose(runs[0].finish_s, runs[1].finish_s, rtol=1e-9, atol=1e-6)
        assert runs[0].complete
        assert runs[1].complete


@pytest.mark.parametrize("backend", allocator.BACKENDS)
def test_a_quota_serialises_an_owners_jobs(backend):
    if backend == "compiled" and allocator.compiled_kernel() is None:
        pytest.skip("the job kernel is not built (make kernel)")
    jobs = linear_jobs([4, 4, 4], work=np.full(3, 100.0), smallest=np.ones(3))

    def ends(owner, quota):
        outcome = allocator.run(
            allocator.PLAY,
            jobs,
            make("fifo"),
            16.0,
            progress=Progress.fresh(jobs),
            quotas=Quotas(np.array(owner, dtype=np.int32), np.array(quota)),
            backend=backend,
        )
        return outcome.finish_s.tolist(), outcome.complete

    assert ends([0, 0, -1], [1.0]) == ([100.0, 200.0, 25.0], True)
    assert ends([0, 0, 1], [4.0, 2.0])[0] == pytest.approx([100 / 3, 100 / 3 + 200 / 12, 50.0])
    assert ends([0, -1, -1], [0.5])[1] is False  # never: the books refuse such a job


def test_quotas_and_predictions_inside_a_run_are_refused():
    jobs = linear_jobs([1])
    quotas = Quotas(np.zeros(1, dtype=np.int32), np.ones(1))
    for backend in allocator.BACKENDS if allocator.compiled_kernel() else ("reference",):
        with pytest.raises(ValueError, match="quotas and predictions"):
            allocator.run(
                allocator.PLAY,
                jobs,
                make("fifo"),
                4.0,
                predict=np.ones(1, dtype=np.uint8),
                quotas=quotas,
                backend=backend,
            )
