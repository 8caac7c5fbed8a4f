"""The flow gate against a model that keeps lists and sorts them."""

import math
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from intentd.core.flows.boost import boost_s
from intentd.core.flows.gate import FlowGate, FlowState, Release
from intentd.core.flows.policy import ClassPolicy, DomainPolicy

RATE_BPS = 8e3
INF = math.inf


def domain(*classes: ClassPolicy, **more: object) -> DomainPolicy:
    return DomainPolicy("d", RATE_BPS, tuple(classes), **more)  # type: ignore[arg-type]


THIRD = 1 / 3
POLICIES = [
    domain(ClassPolicy(INF, 1.0), max_wait_s=4.0),
    domain(ClassPolicy(INF, 1.0, mpl=3, order="sjf"), max_wait_s=9.0),
    domain(ClassPolicy(INF, 1.0, mpl=0)),
    domain(ClassPolicy(INF, 1.0), early_fin_bytes=200),
    domain(ClassPolicy(500, 0.5, order="boost", boost_gamma_per_s=2.0), ClassPolicy(INF, 0.5)),
    domain(
        ClassPolicy(100, THIRD, mpl=2),
        ClassPolicy(900, THIRD),
        ClassPolicy(INF, THIRD, order="sjf"),
        max_wait_s=2.0,
    ),
    domain(
        ClassPolicy(200, THIRD),
        ClassPolicy(INF, THIRD),
        ClassPolicy(INF, THIRD),
        dispatch="empty_class",
        max_wait_s=6.0,
    ),
]


@dataclass
class ModelFlow:
    size: int
    cls: int
    pinned: bool
    arrived: float
    sequence: int
    state: str = "waiting"
    due: float = INF  # when a hand-over has taken too long


class GateMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.policy = POLICIES[0]
        self.gate = FlowGate(self.policy, max_flows=10**6)
        self.now = 0.0
        self.flows: dict[int, ModelFlow] = {}
        self.count = 0

    def members(self, cls: int, *states: str) -> list[int]:
        return [f for f, m in self.flows.items() if m.cls == cls and m.state in states]

    def choose(self, size: int) -> int:
        policy = self.policy
        if policy.dispatch == "size":
            return next(i for i, c in enumerate(policy.classes) if size <= c.threshold_bytes)
        if size <= policy.classes[0].threshold_bytes:
            return 0
        loads = [
            (len(self.members(i, "waiting", "sending", "announced", "overdue")), i)
            for i in range(1, len(policy.classes))
        ]
        return min(loads)[1]

    def key(self, flow: int) -> tuple[float, int]:
        model = self.flows[flow]
        cls = self.policy.classes[model.cls]
        if cls.order == "fifo":
            return model.arrived, model.sequence
        if cls.order == "sjf":
            return float(model.size), model.sequence
        boost = boost_s(model.size * 8 / RATE_BPS, cls.boost_gamma_per_s)
        return model.arrived - boost, model.sequence

    def pump(self) -> list[Release]:
        released = []
        for index, cls in enumerate(self.policy.classes):
            while True:
                waiting = self.members(index, "waiting")
                sending = len(self.members(index, "sending"))
                announced = len(self.members(index, "announced"))
                most = self.policy.early_fin_bytes
                left = sum(min(self.flows[f].size, most) for f in self.members(index, "announced"))
                full = sending >= cls.mpl or (announced > cls.mpl and left >= most)
                if not waiting or (cls.mpl and full):
                    break
                head = min(waiting, key=self.key)
                overdue = len(self.members(index, "overdue"))
                over = bool(cls.mpl and sending + overdue >= cls.mpl)
                self.flows[head].state = "sending"
                released.append(Release(head, index, "early_fin" if over else ""))
        return released

    @rule(size=st.sampled_from([0, 1, 99, 100, 101, 450, 600, 950, 5000]), step=st.integers(0, 2))
    def arrive(self, size: int, step: int) -> None:
        self.now += step
        self.count += 1
        cls = self.choose(size)
        self.flows[self.count] = ModelFlow(size, cls, False, self.now, self.count)
        assert self.gate.arrive(self.count, size, now=self.now) == self.pump()

    @rule(size=st.integers(1, 1000), index=st.integers(0, 63))
    def arrive_in_named_class(self, size: int, index: int) -> None:
        self.count += 1
        cls = index % len(self.policy.classes)
        self.flows[self.count] = ModelFlow(size, cls, True, self.now, self.count)
        assert self.gate.arrive(self.count, size, now=self.now, class_index=cls) == self.pump()

    @rule(size=st.sampled_from([0, 100, 101, 950, 5000]))
    def arrive_started(self, size: int) -> None:
        self.count += 1
        cls = self.choose(size)
        admitted = self.gate.admits()[cls]
        self.flows[self.count] = ModelFlow(size, cls, False, self.now, self.count)
        released = self.pump()
        assert not released or self.policy.dispatch != "size" or admitted
        if not released:
            assert not admitted
            self.flows[self.count].state = "sending"
            released = [Release(self.count, cls, "raced")]
        assert self.gate.arrive(self.count, size, now=self.now, started=True) == released

    @precondition(lambda self: any(m.state != "waiting" for m in self.flows.values()))
    @rule(pick=st.randoms(use_true_random=False), step=st.integers(0, 1))
    def finish(self, pick: object, step: int) -> None:
        self.now += step
        flow = pick.choice([f for f, m in self.flows.items() if m.state != "waiting"])  # type: ignore[attr-defined]
        del self.flows[flow]
        assert self.gate.finish(flow, now=self.now) == self.pump()

    @precondition(lambda self: self.flows)
    @rule(pick=st.randoms(use_true_random=False))
    def cancel(self, pick: object) -> None:
        flow = pick.choice(list(self.flows))  # type: ignore[attr-defined]
        del self.flows[flow]
        assert self.gate.cancel(flow, now=self.now) == self.pump()

    @precondition(lambda self: any(m.state != "waiting" for m in self.flows.values()))
    @rule(pick=st.randoms(use_true_random=False))
    def announce(self, pick: object) -> None:
        flow = pick.choice([f for f, m in self.flows.items() if m.state != "waiting"])  # type: ignore[attr-defined]
        model = self.flows[flow]
        if model.state == "sending":
            model.state, model.due = "announced", self.now + self.policy.handover_s
        assert self.gate.announce(flow, now=self.now) == self.pump()

    @rule(step=st.integers(0, 5))
    def expire(self, step: int) -> None:
        self.now += step
        expected = []
        late = [f for f, m in self.flows.items() if m.state == "announced" and m.due <= self.now]
        for flow in sorted(late, key=lambda f: self.flows[f].due):
            self.flows[flow].state, self.flows[flow].due = "overdue", INF
            expected += self.pump()
        for flow in sorted(self.flows, key=lambda f: self.flows[f].sequence):
            model = self.flows[flow]
            if model.state == "waiting" and self.now >= model.arrived + self.policy.max_wait_s:
                model.state = "sending"
                expected.append(Release(flow, model.cls, "timeout"))
        assert self.gate.expire(now=self.now) == expected

    @rule(policy=st.sampled_from(POLICIES))
    def change_policy(self, policy: DomainPolicy) -> None:
        before = self.flows
        same = policy == self.policy
        self.policy = policy
        if not same:
            # Running flows first, in order of arrival, then the waiting ones.
            order = sorted(before, key=lambda f: (before[f].state == "waiting", before[f].sequence))
            self.flows = {}
            for flow in order:
                model = before[flow]
                exists = model.cls < len(policy.classes)
                if not (model.pinned and exists):
                    model.pinned = False
                    keeps = (
                        policy.dispatch == "empty_class"
                        and exists
                        and model.cls > 0
                        and model.size > policy.classes[0].threshold_bytes
                    )
                    if not keeps:
                        model.cls = self.choose(model.size)
                self.flows[flow] = model
        assert self.gate.set_policy(policy, now=self.now) == self.pump()

    @invariant()
    def agrees(self) -> None:
        classes = range(len(self.policy.classes))
        assert self.gate.queue_lengths() == [len(self.members(i, "waiting")) for i in classes]
        started = ("sending", "announced", "overdue")
        assert self.gate.active() == [len(self.members(i, *started)) for i in classes]
        assert len(self.gate) == len(self.flows)
        for flow, model in self.flows.items():
            assert self.gate.class_index_of(flow) == model.cls
            assert self.gate.state_of(flow) is FlowState(model.state)
        ages = [m.arrived for m in self.flows.values() if m.state == "waiting"]
        due = min((model.due for model in self.flows.values()), default=INF)
        expected = min(due, min(ages, default=INF) + self.policy.max_wait_s)
        assert self.gate.next_timer() == (None if expected == INF else expected)


GateMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGateAgainstModel = GateMachine.TestCase
