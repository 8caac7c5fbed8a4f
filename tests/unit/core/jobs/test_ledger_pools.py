"""The books with several GPU types, quotas in predictions, nodes that come, and bounded tables."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from intentd.core.errors import InputError
from intentd.core.jobs.columns import Columns, SpeedTables
from intentd.core.jobs.job import Start, State, Stop, job_from_plain, job_to_plain
from intentd.core.jobs.ledger import Ledger, Rules
from intentd.core.jobs.placement import Node
from intentd.core.jobs.policy import Costs, JobsPolicy, make
from intentd.core.jobs.predictor import Calibrator, Predictor
from intentd.core.jobs.search_space import DirectSpace, WfqSpace
from intentd.core.jobs.spec import JobSpec, spec_from_plain, spec_to_plain

FAST_SLOW = (Node("f1", 4, gpu_type="v100"), Node("s1", 4, gpu_type="k80"))


def spec(**fields: Any) -> JobSpec:
    if "demand" not in fields:
        fields.setdefault("size_gpu_s", 100.0)
    return spec_from_plain({"command": ["true"], **fields})


def starts(books: Ledger, now: float) -> dict[int, dict[str, int]]:
    orders = books.decide(now)
    assert not any(isinstance(order, Stop) for order in orders)
    return {
        order.job: {name: len(at) for name, at in order.devices.items()}
        for order in orders
        if isinstance(order, Start)
    }


def test_a_job_goes_where_it_is_done_first() -> None:
    books = Ledger(FAST_SLOW)
    table = {"v100": {"4": 100}, "k80": {"4": 250}}
    for _ in range(4):
        books.submit(spec(min_gpus=4, max_gpus=4, demand=table), 0.0)
        books.decide(0.0)
    # 100, 200 on the fast one; 250 beats 300; 400 beats 500
    assert [books.jobs[job].pool for job in (1, 2, 3, 4)] == ["v100", "v100", "k80", "v100"]
    assert {job.id: list(job.devices) for job in books.jobs.values() if job.devices} == {
        1: ["f1"],
        3: ["s1"],
    }
    snapshot, keys = books.snapshot(0.0, pool="v100")
    assert keys == [1, 2, 4]
    assert snapshot.play_out().tolist() == pytest.approx([100.0, 200.0, 300.0])
    assert books.reason(2)["gpu_type"] == "v100"
    assert "0 of 4 v100 are free" in books.reason(2)["text"]


def test_types_are_checked_at_once() -> None:
    books = Ledger(FAST_SLOW)
    for fields, where in (
        ({"gpu_types": ["h100"]}, "gpu_types"),
        ({"demand": {"h100": {"1": 5}}}, "demand"),
        ({"min_gpus": 5, "max_gpus": 5}, "min_gpus"),  # 8 in all, but 4 of a type
        ({"gpu_types": ["k80"], "demand": {"v100": {"1": 5}}}, "demand"),
    ):
        with pytest.raises(InputError) as caught:
            books.submit(spec(**fields), 0.0)
        assert caught.value.field == where
    job = books.submit(spec(gpu_types=["k80"]), 0.0)
    assert starts(books, 0.0) == {job.id: {"s1": 1}}


@pytest.mark.parametrize(
    ("demand", "where"),
    [
        ({"v100": {}}, "demand.v100"),
        ({"v100": {"1": -1}}, r"demand.v100\[1\]"),
        ({"v100": {"1": math.nan}}, r"demand.v100\[1\]"),
        ({"v100/2": {"2": 5}}, "an entry for v100 on one node"),
        ({"v100/0": {"1": 5}}, "demand"),
        ({"v100": {"1": 5}, "k 80": {"1": 5}}, "demand"),
        ({"v100": {"1": 5}, "k80": 3}, "demand.k80"),
        ({"v100": {"2": 5}}, "minimum of 1"),
    ],
)
def test_a_wrong_table_by_type_is_named(demand: Any, where: str) -> None:
    with pytest.raises(InputError, match=where):
        spec(demand=demand)


def two_weights() -> JobsPolicy:
    by_type = {"v100": (0.75, 0.25), "k80": (0.25, 0.75)}
    return JobsPolicy("wfq", (50.0, math.inf), (0.5, 0.5), weights_by_type=by_type)


def test_one_weight_table_a_type() -> None:
    books = Ledger(FAST_SLOW, policy=two_weights())
    for name in ("v100", "k80"):
        for size in (40.0, 400.0):
            books.submit(spec(gpu_types=[name], size_gpu_s=size, max_gpus=4), 0.0)
    assert starts(books, 0.0) == {1: {"f1": 3}, 2: {"f1": 1}, 3: {"s1": 1}, 4: {"s1": 3}}


def test_a_searched_policy_weighs_every_type_alike() -> None:
    """A search plays all GPUs as one pool and finds one W; other weights are given by hand."""
    sizes = np.array([40.0, 90.0, 400.0, 900.0])
    for space in (WfqSpace(sizes), DirectSpace(sizes)):
        policy = space.policy((space.lower + space.upper) / 2)
        assert policy.weights_by_type == {}
        assert policy.for_type("v100") is policy
        assert policy.for_type("k80") is policy
    steep = replace(two_weights(), weights_by_type={})
    by_hand = DirectSpace(sizes).policy(DirectSpace(sizes).point(two_weights()))
    assert by_hand == DirectSpace(sizes).policy(DirectSpace(sizes).point(steep))  # a warm start


def test_who_waits_moves_when_its_gpus_are_gone() -> None:
    books = Ledger(FAST_SLOW)
    table = {"v100": {"2": 100}, "k80": {"2": 900}}
    job = books.submit(spec(min_gpus=2, max_gpus=2, demand=table), 0.0)
    assert job.pool == "v100"
    books.node_lost("f1", 1.0)
    assert starts(books, 1.0) == {1: {"s1": 2}}
    assert job.pool == "k80"
    assert books.seconds_left(job, 1.0) == pytest.approx(900.0)
    again = job_from_plain(json.loads(json.dumps(job_to_plain(job))))
    assert again.spec == job.spec
    assert spec_from_plain(spec_to_plain(job.spec)) == job.spec
    restored = Ledger(FAST_SLOW)
    restored.restore(again)
    assert restored.jobs[1].pool == "k80"
    assert restored.seconds_left(restored.jobs[1], 1.0) == pytest.approx(900.0)


def test_a_job_over_two_nodes_has_its_own_speed() -> None:
    nodes = [Node("a", 2, gpu_type="x"), Node("b", 2, gpu_type="x")]
    books = Ledger(nodes)
    table = {"x": {"1": 400, "2": 200, "4": 100}, "x/2": {"1": 400, "2": 200, "4": 160}}
    job = books.submit(spec(max_gpus=4, demand=table), 0.0)
    assert starts(books, 0.0) == {1: {"a": 2, "b": 2}}
    assert books.seconds_left(job, 0.0) == pytest.approx(160.0)


def test_quotas_hold_in_predictions_and_what_if() -> None:
    books = Ledger([Node("n", 4)], rules=Rules(quotas={"alice": 1}))
    predictor = Predictor()
    for _ in range(3):
        job = books.submit(spec(owner="alice", max_gpus=4), 0.0)
        snapshot, keys = books.snapshot(0.0, upto=job.id)
        predictor.submit(snapshot, keys)
    assert [round(predictor.issued[job].p50_s) for job in (1, 2, 3)] == [100, 200, 300]
    books.decide(0.0)
    assert "quota of alice: 1 GPUs, 1 in use or promised" in books.reason(2)["text"]
    snapshot, keys = books.snapshot(0.0)
    mine, others = (books.candidate(spec(owner=name), 0.0, "") for name in ("alice", "bob"))
    assert predictor.what_if(snapshot, keys, *mine).prediction.p50_s == pytest.approx(400.0)
    assert predictor.what_if(snapshot, keys, *others).prediction.p50_s == pytest.approx(100.0)
    books.submit(spec(owner="bob", min_gpus=2, max_gpus=2), 0.0)
    books.rules = Rules(quotas={"bob": 1})  # lowered: that job cannot be told when it ends
    snapshot, keys = books.snapshot(0.0)
    assert keys == [1, 2, 3]
    assert np.isfinite(snapshot.play_out()).all()
    books.decide(0.5)
    assert books.reason(4)["text"] == "quota of bob: 1 GPUs, 0 in use or promised, needs 2"
    books.cancel(4, 0.5)
    books.rules = Rules()
    snapshot, _ = books.snapshot(0.0)
    assert snapshot.play_out().max() < 110  # the others grow to 4 GPUs when they may
    assert "quota" not in (books.decide(1.0), books.reason(2)["text"])[1]


def test_the_first_job_of_an_owner_with_a_quota_finds_its_pool() -> None:
    books = Ledger(FAST_SLOW, rules=Rules(quotas={"alice": 1}))
    job = books.submit(spec(owner="alice", max_gpus=2), 0.0)
    assert starts(books, 0.0) == {job.id: {"f1": 1}}


def test_nodes_that_come_later_can_be_used_by_who_waits() -> None:
    books = Ledger([Node("n1", 2)])
    books.submit(spec(max_gpus=8), 0.0)
    books.submit(spec(max_gpus=8), 0.0)
    assert starts(books, 0.0) == {1: {"n1": 2}}
    books.node_joined(Node("n2", 8))
    (stop,) = books.decide(1.0)
    assert isinstance(stop, Stop)
    assert stop.purpose == "resize"
    books.exited(1, 1, 0, 1.0)
    assert starts(books, 1.0) == {1: {"n2": 8}, 2: {"n1": 2}}


def test_tables_and_columns_are_bounded() -> None:
    books = Ledger([Node("n1", 64)])
    for number in range(1, 1001):
        books.submit(spec(demand={"1": 100 + number, "64": 10 + number / 7}), 0.0)
        if number > 50:
            books.cancel(number - 50, 0.0)
    assert len(books._tables) == 50
    assert books._tables.speeds.shape[0] <= 128
    assert len(books._columns) == 50
    assert len(books._columns.ids) <= 256
    assert sum(books.counts.values()) == 1000
    assert books.counts[State.SUBMITTED] == 50


def test_columns_keep_the_order_of_arrival_over_compactions() -> None:
    rng, columns, alive = np.random.default_rng(1), Columns(), []
    for job in range(1, 3000):
        columns.size_gpu_s[columns.add(job)] = job
        alive.append(job)
        while len(alive) > 100:
            columns.drop(alive.pop(int(rng.integers(len(alive)))))
    rows = columns.rows()
    assert columns.ids[rows].tolist() == alive
    assert columns.size_gpu_s[rows].tolist() == alive
    assert [columns.at(job) for job in alive] == rows.tolist()


def test_a_released_table_makes_room_and_equal_ones_are_one() -> None:
    tables = SpeedTables()
    one, two = np.array([0.0, 1.0]), np.array([0.0, 1.0, 1.5])
    first = tables.take(one)
    assert tables.take(one.copy()) == first
    second = tables.take(two)
    assert tables.speeds[first].tolist() == [0.0, 1.0, 1.0]
    tables.release(first)
    assert len(tables) == 2
    tables.release(first)
    assert len(tables) == 1
    assert tables.take(np.array([0.0, 1.0, 1.2])) == first
    assert tables.speeds[second].tolist() == [0.0, 1.0, 1.5]


def test_what_the_calibrator_learned_survives_a_restart() -> None:
    rng = np.random.default_rng(3)

    def teach(calibrator: Calibrator, first: int, count: int) -> list[float]:
        given = []
        for job in range(first, first + count):
            now = 10.0 * job
            size = float(np.exp(4 + job % 5))
            given.append(calibrator.issue(job, now, now + size, size).p90_s)
            calibrator.finished(job, now + size * (1 + 0.5 * float(rng.random())))
        return given

    taught = Calibrator()
    teach(taught, 0, 300)
    again = Calibrator()
    assert again.restore(json.loads(json.dumps(taught.state())))
    rng = np.random.default_rng(4)
    after = teach(taught, 300, 50)
    rng = np.random.default_rng(4)
    assert teach(again, 300, 50) == pytest.approx(after)
    assert again.coverage() == taught.coverage()
    assert not Calibrator().restore(None)
    assert not Calibrator().restore({"another": "version"})
    assert len(taught.state(rows=100)["_keys"]) == 100


def test_predictions_are_reissued_only_for_those_whose_end_moved() -> None:
    books, predictor = Ledger([Node("n", 2)], policy=make("fifo")), Predictor()
    for _ in range(3):
        job = books.submit(spec(min_gpus=1, size_gpu_s=1000.0), 0.0)
        predictor.submit(*books.snapshot(0.0, upto=job.id))
    assert predictor.moved(*books.snapshot(0.0)) == []
    books.nodes["n"] = Node("n", 1)
    moved = predictor.moved(*books.snapshot(0.0))
    assert [row.job for row in moved] == [2, 3]
    told = predictor.reissue(0.0, moved, "a GPU went away")
    assert [(p.job, round(p.p50_s), p.cause) for p in told] == [
        (2, 2000, "a GPU went away"),
        (3, 3000, "a GPU went away"),
    ]


def test_a_started_job_keeps_its_smallest_allocation_for_the_minimum_runtime() -> None:
    books = Ledger([Node("n", 1)], policy=make("srsf"), costs=Costs(min_runtime_s=60.0))
    books.submit(spec(size_gpu_s=1000.0), 0.0)
    assert starts(books, 0.0) == {1: {"n": 1}}
    books.submit(spec(size_gpu_s=5.0), 10.0)  # shorter: SRSF would preempt at once
    assert books.decide(10.0) == []
    snapshot, _ = books.snapshot(10.0)
    assert snapshot.play_out().tolist() == pytest.approx([1005.0, 65.0])
    (stop,) = books.decide(60.0)
    assert isinstance(stop, Stop)
    assert (stop.job, stop.purpose) == (1, "preempt")
