"""The preference solver: fronts, spaces, budgets, cancelling, warm starts, charts, results."""

import json
import math
import socket
import sys

import numpy as np
import pytest

pytest.importorskip("pymoo", reason="the controller extra is not installed")

from intentd.controller.search import histories
from intentd.controller.search.chart import html_chart, write_chart
from intentd.controller.search.pool import LocalPool, ProcessPool, open_pool
from intentd.controller.search.process import SearchProcess
from intentd.controller.search.solver import Budget, PreferenceSolver, _unbeaten, read_front
from intentd.core.errors import InputError, IntentdError
from intentd.core.jobs.metrics import Objective, parse_objectives
from intentd.core.jobs.policy import JobsPolicy, make
from intentd.core.jobs.search_space import (
    DirectSpace,
    Evaluator,
    WfqSpace,
    evaluate_point,
    hypervolume,
    make_space,
    nondominated,
)
from intentd.core.jobs.workloads import synthetic

PAIR = parse_objectives("jct:avg,prederr:avg")


@pytest.fixture(scope="module")
def found():
    return histories.of_workload("workload-1", jobs=120, load=0.8, gpus=64, seed=5, samples=2)


def solver(found):
    return PreferenceSolver(64, found.train, found.test)


def test_train_and_test_are_apart(found):
    assert len(found.train) == len(found.test) == 2
    assert not np.array_equal(found.train[0].submit_s, found.test[0].submit_s)
    trace = synthetic("workload-1", jobs=300, load=0.8, gpus=64, seed=5)
    split = histories.of_trace(trace, jobs=100, seed=1, samples=2)
    assert set(split.test[0].work_gpu_s) <= set(trace.work_gpu_s[150:])
    assert set(split.train[0].work_gpu_s) <= set(trace.work_gpu_s[:150])
    assert histories.of_trace(trace, jobs=1, seed=1, samples=1, whole=True).test == ()
    with pytest.raises(InputError, match="trace"):
        histories.of_trace(trace.take(slice(0, 15)), jobs=10, seed=1, samples=1)
    with pytest.raises(InputError, match="samples"):
        histories.of_trace(trace, jobs=10, seed=1, samples=0)


@pytest.mark.parametrize("algorithm", ["spea2", "nsga2"])
@pytest.mark.parametrize("space", ["wfq", "direct"])
def test_a_search_finds_trade_offs(found, algorithm, space):
    result = solver(found).update_pareto_front(
        algorithm=algorithm, space=space, budget=Budget(190), workers=1
    )
    assert result.evaluations == 190
    front = np.array([list(point.train.values()) for point in result.front])
    assert (np.diff(front[:, 0]) > 0).all()
    assert (np.diff(front[:, 1]) < 0).all()
    assert front[-1, 1] == pytest.approx(0, abs=1e-6)  # FIFO is in the first population
    assert set(result.front[0].test) == {"jct:avg", "prederr:avg"}


def test_the_same_seed_gives_the_same_front(found):
    runs = [solver(found).update_pareto_front(budget=Budget(80), workers=1) for _ in range(2)]
    assert [p.to_plain() for p in runs[0].front] == [p.to_plain() for p in runs[1].front]


def test_processes_find_what_one_process_finds(found):
    runs = [
        solver(found).update_pareto_front(budget=Budget(30), workers=workers) for workers in (1, 2)
    ]
    np.testing.assert_array_equal(runs[0].values, runs[1].values)


def test_budget_in_seconds_and_cancel(found):
    brief = solver(found).update_pareto_front(budget=Budget(500, 1e-3), workers=1)
    assert 0 < brief.evaluations <= 70  # one batch, without the points that were double
    calls = []

    def stop(done, total, values):
        calls.append((done, total, len(values)))
        return False

    result = solver(found).update_pareto_front(budget=Budget(500), workers=1, progress=stop)
    assert result.cancelled
    assert len(calls) == 1
    assert calls[0][1] == 500
    assert result.front


def test_warm_start_is_never_worse(found):
    cold = solver(found).update_pareto_front(budget=Budget(150), workers=1)
    best = min(point.train["jct:avg"] for point in cold.front)
    start = [point.policy for point in cold.front]
    warm = solver(found).update_pareto_front(budget=Budget(70), workers=1, warm=start, seed=9)
    assert min(point.train["jct:avg"] for point in warm.front) <= best * 1.02
    wfq_front = solver(found).update_pareto_front(
        budget=Budget(70), workers=1, space="wfq", warm=[]
    )
    again = solver(found).update_pareto_front(
        budget=Budget(70), workers=1, space="wfq", warm=[p.policy for p in wfq_front.front]
    )
    assert again.settings["warm"]


def test_both_spaces_keep_what_is_not_clearly_beaten(found):
    seen = []

    def progress(done, total, _values):
        seen.append((done, total))
        return True

    result = PreferenceSolver(64, found.train, found.test, judge=found.judge).update_pareto_front(
        space="both", budget=Budget(150), workers=1, progress=progress
    )
    assert result.evaluations == 150
    assert result.settings["space"] == "both"
    assert result.settings["evaluations"] == 150
    assert result.settings["warm"] == []
    assert {total for _, total in seen} == {150}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    own = [point for point in result.front if point.x]
    kept = [point for point in result.front if not point.x]
    assert own
    assert kept
    assert all("T" in point.policy.origin for point in kept)
    evaluate = Evaluator(found.train, 64, PAIR)
    for point in (own[0], kept[0]):
        assert tuple(point.train.values()) == pytest.approx(evaluate(point.policy))
    for point in kept:
        assert np.isfinite(list(point.test.values())).all()


def test_a_point_gives_way_only_where_it_is_worse_in_every_history():
    values = np.array(
        [
            [[1.0, 5.0], [2.0, 3.0], [1.0, 4.0], [2.0, 4.0]],
            [[1.0, 5.0], [2.0, 3.0], [1.0, 4.0], [2.0, 2.0]],
        ]
    )
    assert _unbeaten(values, 2) == [1, 2, 3]  # the first loses to the third in both
    values[1, 2] = [1.5, 4.0]
    assert _unbeaten(values, 2) == [0, 1, 2, 3]
    values[0, 3] = math.inf
    assert _unbeaten(values, 2) == [0, 1, 2]


def test_result_holds_everything_to_rerun(found):
    result = solver(found).update_pareto_front(budget=Budget(40), workers=1)
    plain = json.loads(json.dumps(result.to_plain()))
    again = read_front(plain)
    assert [point.policy for point in again] == [point.policy for point in result.front]
    assert plain["settings"]["seed"] == 1
    assert plain["settings"]["objectives"] == ["jct:avg", "prederr:avg"]


@pytest.mark.parametrize(
    "plain", [[], {}, {"front": 3}, {"front": [3]}, {"front": [{"train": {}}]}]
)
def test_a_wrong_result_is_refused(plain):
    with pytest.raises(InputError, match=r"front"):
        read_front(plain)


def test_wrong_settings_are_refused(found):
    with pytest.raises(InputError, match="algorithm"):
        solver(found).update_pareto_front(algorithm="luck")
    with pytest.raises(InputError, match="space"):
        solver(found).update_pareto_front(space="outer")
    with pytest.raises(InputError, match="objectives"):
        solver(found).set_preference([Objective("jct")])
    with pytest.raises(InputError, match="history"):
        PreferenceSolver(64, [])
    for budget in ({"evaluations": 0}, {"seconds": 0.0}):
        with pytest.raises(InputError):
            Budget(**budget)
    with pytest.raises(InputError, match="workers"):
        open_pool([], None, workers=0)


def test_an_absent_ray_is_one_clear_error(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="ray"):
        solver(found).update_pareto_front(ray="127.0.0.1:6379")


async def test_an_absent_search_library_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(IntentdError, match=r"pip install 'intentd\[controller\]'"):
        await SearchProcess().search({"evaluations": 1, "seconds": 1})


def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", object())  # is not asked
    with socket.socket() as bound:  # nobody hears there
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(IntentdError, match=rf"no cluster at {address} \(Connection refused\)"):
            open_pool([], None, ray=address)


def test_spaces_stay_in_their_box_and_return_to_it():
    sizes = np.exp(np.random.default_rng(2).normal(5, 2, 300))
    rng = np.random.default_rng(3)
    for name in ("wfq", "direct"):
        space = make_space(name, sizes)
        for _ in range(50):
            policy = space.policy(rng.uniform(space.lower, space.upper))
            assert policy.name == "wfq"
        for x in space.seeds():
            assert (x >= space.lower - 1e-12).all()
            assert (x <= space.upper + 1e-12).all()
    direct = DirectSpace(sizes)
    policy = WfqSpace(sizes).policy(np.array([0.5, 0.7, 0.6, 0.2]))
    near = direct.policy(direct.point(policy))
    assert near.zeta == policy.zeta
    assert len(near.weights) == min(6, len(policy.weights))
    fifo = direct.policy(direct.point(JobsPolicy("wfq")))
    assert len(fifo.weights) == 1


def test_a_point_without_a_policy_is_infinitely_bad(found):
    evaluate = Evaluator(found.train, 64, PAIR)

    def broken(x):
        return make("lottery")

    assert evaluate_point(evaluate, broken, np.zeros(1)).tolist() == [math.inf, math.inf]


def test_fronts_and_hypervolume():
    values = np.array([[1.0, 4.0], [2.0, 2.0], [3.0, 3.0], [4.0, 1.0], [2.0, 2.0], [np.inf, 0.0]])
    assert nondominated(values).tolist() == [0, 1, 3]
    assert hypervolume(values, (5.0, 5.0)) == 4 * 1 + 3 * 2 + 1 * 1
    assert hypervolume(values, (0.5, 0.5)) == 0
    three = np.array([[1.0, 4, 2], [2, 2, 2], [2, 3, 2], [2, 3, 1], [1, 4, 2]])
    assert nondominated(three).tolist() == [0, 1, 3]
    with pytest.raises(InputError):
        hypervolume(np.zeros((2, 3)), (1, 1, 1))


def test_pools_keep_the_order(found):
    space = make_space("wfq", found.train[0].sizes_gpu_s)
    evaluate = Evaluator(found.train, 64, PAIR)
    points = [np.array([t, 0.5, 0.5, 0.1]) for t in (0.2, 0.5, 1.0, 2.0, 3.0)]
    local = LocalPool([evaluate], space).map(points)
    pool = ProcessPool([evaluate], space, 2)
    try:
        np.testing.assert_array_equal(local, pool.map(points))
    finally:
        pool.close()


def test_charts(tmp_path):
    rows = [{"jct": 1.0, "err": 5.0}, {"jct": 2.0, "err": 1.0}]
    page = html_chart(rows, ["<a>", "b"], title="x & y", others={"old": rows}, marked=1)
    assert "x &amp; y" in page
    assert "&lt;a&gt;" in page
    assert page.count("<circle") == 4
    for name in ("front.html", "front.png"):
        write_chart(tmp_path / name, rows, ["a", "b"], title="t", marked=0)
        assert (tmp_path / name).stat().st_size > 500
    with pytest.raises(InputError, match="chart"):
        write_chart(tmp_path / "front.pdf", rows, [], title="t")
    with pytest.raises(InputError, match="front"):
        html_chart([], [], title="t")
