"""The books of the GPU scheduler against a naive model of who holds which GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from intentd.core.errors import InputError, StateError
from intentd.core.jobs.job import (
    HOLDING,
    OVER,
    TRANSITIONS,
    Instruction,
    Start,
    State,
    Stop,
    job_from_plain,
    job_to_plain,
)
from intentd.core.jobs.ledger import LEARNED, Ledger, Rules
from intentd.core.jobs.placement import Node
from intentd.core.jobs.policy import Costs, make
from intentd.core.jobs.predictor import Predictor
from intentd.core.jobs.spec import JobSpec, spec_from_plain, spec_to_plain


def spec(**fields: Any) -> JobSpec:
    return spec_from_plain({"command": ["true"], "size_gpu_s": 100.0, **fields})


def ledger(gpus: int = 4, **settings_: Any) -> Ledger:
    return Ledger([Node("n1", gpus)], **settings_)


def test_a_job_starts_runs_and_finishes() -> None:
    books = ledger()
    job = books.submit(spec(max_gpus=2), 0.0)
    assert books.decide(0.0) == [Start(1, 1, {"n1": (0, 1)})]
    books.started(1, 1, 0.5)
    books.exited(1, 1, 0, 50.0)
    assert job.state is State.FINISHED
    assert [event.state for event in books.take_events()] == [
        *("submitted", "pending", "starting", "running", "finished")
    ]
    assert books.take_dirty() == [job]
    assert not books.jobs


def test_a_resize_stops_then_starts_on_gpus_nobody_holds() -> None:
    books = ledger(policy=make("maxmin"))
    books.submit(spec(max_gpus=4), 0.0)
    assert books.decide(0.0) == [Start(1, 1, {"n1": (0, 1, 2, 3)})]
    books.started(1, 1, 0.0)
    books.submit(spec(max_gpus=4), 10.0)
    assert books.decide(10.0) == [Stop(1, 1, 15, 30.0, "resize")]
    assert books.decide(11.0) == []  # neither asked twice nor started on held GPUs
    assert "waits for running jobs" in books.reason(2)["text"]
    books.exited(1, 1, 0, 12.0)
    starts = books.decide(12.0)
    assert {
        (order.job, order.epoch, order.gpus) for order in starts if isinstance(order, Start)
    } == {
        (1, 2, 2),
        (2, 1, 2),
    }
    assert books.jobs[1].done_gpu_s == pytest.approx(40.0)


def test_events_of_another_epoch_are_ignored() -> None:
    books = ledger()
    books.submit(spec(), 0.0)
    books.decide(0.0)
    books.exited(1, 7, 0, 1.0)
    books.exited(9, 1, 0, 1.0)
    assert books.stale_events == 2
    assert books.jobs[1].state is State.STARTING


def test_a_lost_node_sends_jobs_back_to_their_checkpoint_as_often_as_they_may() -> None:
    books = Ledger([Node("n1", 1), Node("n2", 1)])
    job = books.submit(spec(retries=1), 0.0)
    (start,) = books.decide(0.0)
    assert isinstance(start, Start)
    (where,) = start.devices
    books.started(1, 1, 0.0)
    assert books.node_lost(where, 10.0) == []
    assert (job.state, job.done_gpu_s, job.lost) == (State.PENDING, 0.0, 1)
    (again,) = books.decide(10.0)
    assert isinstance(again, Start)
    assert again.epoch == 2
    assert again.devices.keys() != {where}
    books.lost_run(1, 2, 20.0, "its supervisor is gone", began=True)
    assert job.state is State.FAILED
    assert "retries 1" in job.detail


def test_half_a_job_on_a_surviving_node_is_ended_before_it_starts_again() -> None:
    books = Ledger([Node("n1", 2), Node("n2", 2)])
    books.submit(spec(min_gpus=4, max_gpus=4), 0.0)
    books.decide(0.0)
    books.started(1, 1, 0.0)
    (order,) = books.node_lost("n1", 5.0)
    assert isinstance(order, Stop)
    assert (order.signal, order.grace_s) == (9, 0.0)
    assert books.decide(5.0) == []
    books.exited(1, 1, -9, 6.0)
    assert books.decide(6.0) == []
    assert "needs at least 4 GPUs, 2 can be given out now" in books.reason(1)["text"]
    books.node_joined(Node("n1", 2))
    assert [type(order) for order in books.decide(7.0)] == [Start]


def test_time_limit_cancel_and_quota() -> None:
    books = ledger(rules=Rules(quotas={"alice": 2}))
    job = books.submit(spec(owner="alice", min_gpus=2, max_gpus=2, time_limit_s=5), 0.0)
    books.submit(spec(owner="alice"), 0.0)
    books.decide(0.0)
    assert books.reason(2)["text"] == "quota of alice: 2 GPUs, 2 in use or promised, needs 1"
    books.started(1, 1, 0.0)
    assert books.next_timer() == pytest.approx(5.0)
    (stop,) = books.decide(5.0)
    assert isinstance(stop, Stop)
    assert stop.purpose == "time limit"
    books.exited(1, 1, 0, 6.0)
    assert (job.state, job.detail) == (State.FAILED, "time limit of 5 s reached")
    assert books.cancel(2, 7.0) == []
    assert books.take_dirty()[-1].state is State.CANCELLED
    assert not books.jobs
    with pytest.raises(InputError, match="quota of alice"):
        books.submit(spec(owner="alice", min_gpus=3, max_gpus=3), 8.0)
    with pytest.raises(InputError, match="at most the cluster's 4 GPUs"):
        books.submit(spec(min_gpus=5, max_gpus=5), 8.0)


def test_a_quota_serves_smaller_jobs_past_one_that_does_not_fit() -> None:
    books = ledger(16, rules=Rules(quotas={"alice": 7}))
    sizes = [(4, 4), (6, 8), (1, 4), (3, 3), (1, 2), (2, 2), (1, 1)]
    for least, most in sizes:
        books.submit(spec(owner="alice", min_gpus=least, max_gpus=most), 0.0)
    books.submit(spec(owner="bob", max_gpus=8), 0.0)
    started = {order.job: len(order.devices["n1"]) for order in books.decide(0.0)}  # type: ignore[union-attr]
    # 4 and 1, then 1 past the 3 that does not fit, then 1 past the 2; nothing is left to grow by
    assert started == {1: 4, 3: 1, 5: 1, 7: 1, 8: 8}
    assert sorted(books.held) == [2, 4, 6]
    assert books.reason(4)["text"] == "quota of alice: 7 GPUs, 7 in use or promised, needs 3"
    for number in (1, 5, 7):
        books.exited(number, 1, 0, 1.0)
    # what runs keeps its place; 1 + 6 fit together, so the 3 and the 2 wait
    assert {o.job: o.devices for o in books.decide(1.0) if isinstance(o, Start)}.keys() == {2}
    assert sorted(books.held) == [4, 6]


def test_drain_takes_nothing_new_and_evicts_on_request() -> None:
    books = Ledger([Node("n1", 2), Node("n2", 2)])
    books.submit(spec(), 0.0)
    (start,) = books.decide(0.0)
    assert isinstance(start, Start)
    (where,) = start.devices
    books.drain(where, 1.0)
    assert books.decide(1.0) == []
    books.drain(where, 2.0, evict=True)
    (stop,) = books.decide(2.0)
    assert isinstance(stop, Stop)
    assert stop.purpose == "drain"
    books.exited(1, 1, 0, 3.0)
    (moved,) = books.decide(3.0)
    assert isinstance(moved, Start)
    assert where not in moved.devices


def test_reported_steps_teach_what_is_left() -> None:
    books = ledger()
    books.submit(spec(size_gpu_s=1000.0), 0.0)
    books.decide(0.0)
    books.started(1, 1, 0.0)
    books.progress(1, 1, 0, 100, 1.0)
    books.progress(1, 1, 10, 100, 11.0)  # a second a step: 90 s are left, not 989
    assert books.left(books.jobs[1]) == pytest.approx(90.0)
    books.exited(1, 1, 0, 101.0)
    assert books.learned_size(spec()) == pytest.approx(101.0)


def test_sizes_of_names_in_use_are_not_forgotten_for_new_ones() -> None:
    books = ledger()
    for number in range(2 * LEARNED):
        books.learn("o", "nightly", 50.0)
        books.learn("o", f"once{number}", 10.0)
    assert books.learned_size(spec(owner="o", name="nightly")) == 50.0
    assert books.learned_size(spec(owner="o", name="once1")) == books.rules.default_size_gpu_s
    for size in (1.0, 2.0, 3.0) * 10:
        books.learn("o", "nightly", size)
    assert books.learned_size(spec(owner="o", name="nightly")) == 2.0


def test_growth_waits_until_a_run_is_old_enough() -> None:
    books = ledger(policy=make("maxmin"), rules=Rules(hold_growth_s=60.0))
    books.submit(spec(max_gpus=4), 0.0)
    books.submit(spec(max_gpus=4), 0.0)
    books.decide(0.0)
    for number in (1, 2):
        books.started(number, 1, 0.0)
    books.exited(1, 1, 0, 10.0)
    assert books.decide(10.0) == []
    assert books.next_timer() == pytest.approx(60.0)
    assert [type(order) for order in books.decide(60.0)] == [Stop]


def test_a_job_survives_the_way_to_the_store() -> None:
    books = ledger()
    job = books.submit(
        spec(size_gpu_s=0, demand={"1": 10, "2": 6}, labels={"team": "a"}, env={"A": "b"}), 0.0
    )
    books.decide(0.0)
    plain = json.loads(json.dumps(job_to_plain(job)))
    again = job_from_plain(plain)
    assert job_to_plain(again) == job_to_plain(job)
    assert again.spec == job.spec


def test_a_forbidden_transition_tells_the_story() -> None:
    books = ledger()
    job = books.submit(spec(), 0.0)
    with pytest.raises(StateError, match="submitted -> finished; before: submitted@0"):
        books._move(job, State.FINISHED, 1.0, "")


def test_predictions_start_from_the_books() -> None:
    books = ledger(1)
    books.submit(spec(), 0.0)
    books.decide(0.0)
    books.submit(spec(), 10.0)
    snapshot, keys = books.snapshot(10.0)
    assert keys == [1, 2]
    assert Predictor().submit(snapshot, keys).p50_s == pytest.approx(200.0)
    with_third, keys = books.snapshot(10.0, spec(size_gpu_s=50.0))
    assert keys == [1, 2, 0]
    assert with_third.play_out()[-1] == pytest.approx(250.0)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"command": []}, "command"),
        ({"min_gpus": 3, "max_gpus": 2}, "max_gpus"),
        ({"min_gpus": True}, "min_gpus"),
        ({"size_gpu_s": float("nan")}, "size_gpu_s"),
        ({"size_gpu_s": 0.0, "demand": {}}, "demand"),
        ({"demand": {"1": -1}, "size_gpu_s": 0}, r"demand\[1\]"),
        ({"demand": {"2": 5}, "size_gpu_s": 0}, "minimum of 1"),
        ({"env": {"INTENTD_X": "1"}}, "env.INTENTD_X"),
        ({"workdir": "here"}, "workdir"),
        ({"checkpoint_signal": "SIGKILL"}, "checkpoint_signal"),
        ({"profile": "nope"}, "profile"),
        ({"speed": 1}, "speed"),
        ({"grace_s": -1}, "grace_s"),
    ],
)
def test_a_wrong_spec_is_named(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError, match=where):
        spec(**fields)


def test_a_profile_gives_the_speeds() -> None:
    made = spec_from_plain(
        {"command": ["x"], "profile": "vgg", "max_gpus": 2, "size_gpu_s": 100},
        {"vgg": (0.0, 1.0, 1.5)},
    )
    assert made.function(1.0).demand(2) == pytest.approx(100 / 1.5)
    assert spec_from_plain(spec_to_plain(made)) == made


NODES = (Node("n1", 4), Node("n2", 3), Node("n3", 1))
POLICIES = tuple(make(name) for name in ("fifo", "srsf", "maxmin", "themis", "afs"))


class Books(RuleBasedStateMachine):
    """The model: the runs that were started and have not been reported as ended."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.books = Ledger(
            NODES,
            rules=Rules(quotas={"q": 3}),
            costs=Costs(start_s=1.0, min_runtime_s=5.0),
        )
        self.runs: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
        self.asked: set[tuple[int, int]] = set()
        self.epochs: dict[int, int] = {}
        self.over: dict[int, State] = {}
        self.seen: dict[int, State] = {}

    def take(self, orders: list[Instruction]) -> None:
        for order in orders:
            key = (order.job, order.epoch)
            if isinstance(order, Start):
                assert all(job != order.job for job, _ in self.runs), "runs twice"
                assert order.epoch > self.epochs.get(order.job, 0)
                self.epochs[order.job] = order.epoch
                self.runs[key] = dict(order.devices)
            else:
                assert key in self.runs
                self.asked.add(key)

    @rule(
        least=st.integers(1, 5),
        more=st.integers(0, 4),
        size=st.floats(1, 1e4),
        owner=st.sampled_from(["q", "p"]),
        limit=st.sampled_from([0.0, 20.0]),
    )
    def submit(self, least: int, more: int, size: float, owner: str, limit: float) -> None:
        wanted = spec(
            min_gpus=least,
            max_gpus=least + more,
            size_gpu_s=size,
            owner=owner,
            time_limit_s=limit,
            retries=1,
        )
        if owner == "q" and least > 3:
            with pytest.raises(InputError):
                self.books.submit(wanted, self.now)
            return
        self.books.submit(wanted, self.now)

    @rule(seconds=st.floats(0.1, 50))
    def decide(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.books.decide(self.now))
        usable = sum(n.gpus for n in NODES) if not self.books.lost else 0
        drained = any(node.drained for node in self.books.nodes.values())
        waiting = [j for j in self.books.jobs.values() if j.state is State.PENDING]
        idle_ok = drained or self.asked or usable == 0
        if not idle_ok:  # nothing on its way out: a job that fits the free GPUs runs
            free = usable - sum(len(x) for run in self.runs.values() for x in run.values())
            assert not any(
                job.spec.min_gpus == 1 and free > 0 and job.spec.owner == "p" for job in waiting
            )

    @rule(data=st.data(), status=st.sampled_from([0, 0, 1, -15, -9]))
    def end(self, data: st.DataObject, status: int) -> None:
        if self.runs:
            job, epoch = data.draw(st.sampled_from(sorted(self.runs)))
            self.finish(job, epoch)
            self.books.exited(job, epoch, status, self.now)
            self.books.exited(job, epoch, status, self.now)  # told twice

    @rule(data=st.data(), began=st.booleans())
    def vanish(self, data: st.DataObject, began: bool) -> None:
        if self.runs:
            job, epoch = data.draw(st.sampled_from(sorted(self.runs)))
            self.finish(job, epoch)
            self.books.lost_run(job, epoch, self.now, "gone", began=began)

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        if self.runs:
            job, epoch = data.draw(st.sampled_from(sorted(self.runs)))
            self.books.started(job, epoch, self.now)
            self.books.progress(job, epoch, 1, 10, self.now)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.books.jobs:
            job = data.draw(st.sampled_from(sorted(self.books.jobs)))
            if self.books.jobs[job].state not in OVER:
                self.take(self.books.cancel(job, self.now))

    @rule(name=st.sampled_from(["n1", "n2", "n3"]), evict=st.booleans())
    def drain(self, name: str, evict: bool) -> None:
        if self.books.nodes[name].drained:
            self.books.undrain(name)
        else:
            self.books.drain(name, self.now, evict=evict)

    @rule(name=st.sampled_from(["n1", "n2", "n3"]))
    def lose(self, name: str) -> None:
        if name in self.books.lost:
            node = next(node for node in NODES if node.name == name)
            self.books.node_joined(replace(node, drained=self.books.nodes[name].drained))
            return
        orders = self.books.node_lost(name, self.now)
        gone = [run for run, where in self.runs.items() if set(where) <= self.books.lost]
        for job, epoch in gone:
            self.finish(job, epoch)
        self.take(orders)

    @rule(policy=st.sampled_from(POLICIES))
    def policy(self, policy: Any) -> None:
        self.books.set_policy(policy)

    @rule()
    def restart(self) -> None:
        """As after kill -9: the same books from what was stored."""
        kept = [
            job_from_plain(json.loads(json.dumps(job_to_plain(j))))
            for j in self.books.jobs.values()
        ]
        old = self.books
        self.books = Ledger(old.nodes.values(), policy=old.policy, costs=old.costs, rules=old.rules)
        self.books.lost, self.books._evict = old.lost, old._evict
        for job in kept:
            self.books.restore(job)

    def finish(self, job: int, epoch: int) -> None:
        del self.runs[(job, epoch)]
        self.asked.discard((job, epoch))

    @invariant()
    def books_and_model_agree(self) -> None:
        holding = {
            (job.id, job.epoch): job.devices
            for job in self.books.jobs.values()
            if job.state in HOLDING
        }
        assert holding == self.runs
        given = [
            (node, index)
            for run in self.runs.values()
            for node, indices in run.items()
            for index in indices
        ]
        assert len(given) == len(set(given)), "a GPU given twice"
        assert all(index < self.books.nodes[node].gpus for node, index in given)
        quota = [j.gpus for j in self.books.jobs.values() if j.spec.owner == "q"]
        assert sum(quota) <= 3
        for job in self.books.jobs.values():
            before = self.seen.get(job.id, job.state)
            assert before not in OVER or before is job.state
            self.seen[job.id] = job.state
            assert job.lost <= job.spec.retries + 1

    @invariant()
    def everybody_can_be_told_why(self) -> None:
        for job in self.books.jobs.values():
            if job.state not in OVER:
                assert self.books.reason(job.id)["text"]


Books.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_books = Books.TestCase


def test_every_state_can_be_left_or_is_an_end() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(bool(TRANSITIONS[state]) != (state in OVER) for state in State)
