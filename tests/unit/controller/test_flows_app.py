"""The flows application alone: reports in, numbered policies out, on a clock of the test's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from intentd.controller.config import DomainSection, FlowsSection
from intentd.controller.flows_app import FORGET_DOMAIN_S, FlowsApplication, differences
from intentd.controller.policies import MIGRATIONS, PolicyBook, StoredPolicy
from intentd.core.errors import InputError
from intentd.core.flows.reports import DomainReport
from intentd.core.flows.sampling import sample_sizes
from intentd.core.flows.workloads import workload
from intentd.core.stats import LogHistogram
from intentd.daemons.kit.clock import ManualClock
from intentd.daemons.kit.store import Store

AGENT = ("agent", "a")


class Controlled:
    """An application over a store of its own."""

    def __init__(self, base: Path, config: FlowsSection | None = None) -> None:
        self.clock = ManualClock(1000.0)
        self.store = Store(base / "db", MIGRATIONS)
        book = PolicyBook(
            self.store,
            witness=base / "witness",
            wall=self.clock.wall,
            differences={"flows": differences},
        )
        self.issued: list[StoredPolicy] = []
        self.app = FlowsApplication(
            config or FlowsSection(), self.clock, self.store, book, on_issue=self.issued.append
        )
        self.histogram = LogHistogram()

    def report(self, sizes: list[float], **more: object) -> bool:
        """Of everything since the agent's boot, with these sizes as the newest sample."""
        for size in sizes:
            self.histogram.add(size)
        whole = LogHistogram.from_plain(self.histogram.to_plain())
        sample = tuple((0.001 * age, size) for age, size in enumerate(reversed(sizes)))
        report = DomainReport(whole, sample, **more)  # type: ignore[arg-type]  # of the test's
        return self.app.take_report(AGENT, {"up": report})

    async def step(self) -> list[StoredPolicy]:
        """Both timers once; what was issued."""
        before = len(self.issued)
        await self.app.enforce_thresholds(self.app.compute_thresholds(self.app.get_workload_info()))
        await self.app.enforce_rates(self.app.compute_rates(self.app.get_class_load()))
        return self.issued[before:]


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Controlled]:
    controlled = Controlled(tmp_path)
    yield controlled
    controlled.store.close()


def sizes_of(name: str, count: int) -> list[float]:
    return list(sample_sizes(workload(name).cdf, count, np.random.default_rng(1)))


async def test_a_domain_starts_with_one_class_and_learns(it: Controlled) -> None:
    assert it.app.note_domains(AGENT, {"domains": [{"name": "up", "rate_bps": 1e8}]})
    assert not it.app.note_domains(AGENT, {"domains": [{"name": "up", "rate_bps": 1e8}]})
    [first] = await it.step()
    assert first.reason == "up: bootstrap with one class"
    assert [len(row["classes"]) for row in first.body["domains"]] == [1]
    assert first.body["domains"][0]["rate_bps"] == 1e8
    assert await it.step() == [], "nothing changed, nothing issued"
    it.report([])
    for start in range(0, 4000, 400):
        it.clock.advance(1.0)
        it.report(sizes_of("web-search", 4000)[start : start + 400])
        await it.step()
    assert len(it.issued[-1].body["domains"][0]["classes"]) == 3
    assert it.issued[-1].inputs["domains"]["up"]["flows"] >= 200
    assert [policy.number for policy in it.issued] == list(range(1, len(it.issued) + 1))


@pytest.mark.parametrize(
    "domains", ["up", [7], [{"name": ""}], [{"name": "x" * 65}], [{"name": "up", "rate_bps": -1}]]
)
def test_wrong_announcements_name_the_field(it: Controlled, domains: object) -> None:
    with pytest.raises(InputError, match=r"capabilities\.domains"):
        it.app.note_domains(AGENT, {"domains": domains})
    assert it.app.domains == {}


async def test_of_different_rates_the_smallest_counts(it: Controlled) -> None:
    it.app.note_domains(AGENT, {"domains": [{"name": "up", "rate_bps": 2e9}]})
    it.app.note_domains(("agent", "b"), {"domains": [{"name": "up", "rate_bps": 1e9}]})
    [policy] = await it.step()
    assert policy.body["domains"][0]["rate_bps"] == 1e9


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"domain": "up", "nonsense": 1}, "nonsense"),
        ({"domain": "up", "policy": "best"}, "policy"),
        ({"domain": "up", "thresholds": [100], "weights": [0.5, 0.4]}, "weight"),
        ({"domain": "up", "thresholds": [200, 100], "weights": [0.5, 0.3, 0.2]}, "threshold"),
        ({"domains": []}, "domains"),
        ({"domains": [{"domain": "up"}, {"domain": "w", "mpl": [-1]}]}, r"domains\[1\]"),
        ([], "policy"),
    ],
)
async def test_what_an_operator_gets_wrong_is_refused_whole(
    it: Controlled, document: object, field: str
) -> None:
    it.report([])
    await it.step()
    with pytest.raises(InputError, match=field):
        await it.app.set_policy(document, author="me")
    assert list(it.app.domains) == ["up"]
    assert it.app.describe("up")["override"] is None
    assert await it.step() == []


async def test_set_rollback_release_and_reset(it: Controlled) -> None:
    it.report([])
    await it.step()
    pinned = {"domain": "up", "thresholds": [1000], "weights": [0.75, 0.25]}
    issued = await it.app.set_policy(pinned, author="me")
    assert issued is not None
    assert (issued.number, issued.author) == (2, "me")
    assert await it.app.set_policy(pinned, author="me") is None, "nothing changed"
    back = await it.app.rollback(1, author="me")
    assert (back.number, back.copy_of, back.body) == (3, 1, it.issued[0].body)
    assert await it.step() == [], "held"
    assert await it.app.release()
    assert not await it.app.release()
    [again] = await it.step()
    assert again.body == issued.body
    reset = await it.app.set_policy({"domain": "up", "reset": True}, author="me")
    assert reset is not None
    assert reset.body == it.issued[0].body
    with pytest.raises(InputError, match="number"):
        await it.app.rollback(99, author="me")


async def test_a_restart_of_the_controller_goes_on_with_the_stored_policy(tmp_path: Path) -> None:
    first = Controlled(tmp_path)
    await first.app.set_policy(
        {"domain": "up", "thresholds": [1000], "weights": [0.75, 0.25]}, author="me"
    )
    first.store.close()
    second = Controlled(tmp_path)
    try:
        assert second.app.newest is not None
        assert second.app.newest.body == first.issued[-1].body
        assert await second.step() == []
    finally:
        second.store.close()


async def test_an_agents_restart_adds_its_flows_and_never_subtracts(it: Controlled) -> None:
    it.report([])
    it.report([100.0] * 10)
    assert len(it.app.get_workload_info()["up"][0]) == 10
    it.app.member_restarted(AGENT)
    it.histogram = LogHistogram()
    it.report([200.0] * 3)
    sizes, _ = it.app.get_workload_info()["up"]
    assert list(sizes) == [200.0] * 3


async def test_queues_of_a_member_that_left_are_not_shown(it: Controlled) -> None:
    it.report([], queue=(4,), active=(1,), degraded={"timeout": 2}, arrivals=7, finished=6)
    await it.step()
    page = it.app.flows("up")
    assert (page["arrivals"], page["finished"], page["degraded"]) == (7, 6, {"timeout": 2})
    assert (page["classes"][0]["waiting"], page["classes"][0]["active"]) == (4, 1)
    it.app.member_gone(AGENT)
    assert it.app.flows("up")["classes"][0]["waiting"] == 0
    with pytest.raises(InputError, match="one of up"):
        it.app.describe("down")


async def test_a_domain_nobody_reports_leaves_unless_it_is_configured(tmp_path: Path) -> None:
    it = Controlled(tmp_path, FlowsSection(domains=(DomainSection(domain="kept"),)))
    try:
        it.report([])
        await it.step()
        it.clock.advance(FORGET_DOMAIN_S + 1)
        [policy] = await it.step()
        assert [row["domain"] for row in policy.body["domains"]] == ["kept"]
        assert policy.changes == ("up: domain left",)
    finally:
        it.store.close()
