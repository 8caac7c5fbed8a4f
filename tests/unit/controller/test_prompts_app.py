"""The prompts application alone: outcomes in, numbered policies out, on a clock of the test's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intentd.controller.config import IntentSection, PromptsSection
from intentd.controller.policies import MIGRATIONS, PolicyBook, StoredPolicy
from intentd.controller.prompts_app import PromptsApplication
from intentd.core.errors import InputError
from intentd.core.prompts.outcomes import Outcomes, bin_of
from intentd.core.prompts.steering import differences
from intentd.daemons.kit.clock import ManualClock
from intentd.daemons.kit.config import validate
from intentd.daemons.kit.store import Store

PROXY = ("proxy", "p")
WANTED = PromptsSection(intents=(IntentSection(service_type="t", quality=8.5),))


class Controlled:
    """An application over a store of its own, and one proxy that reports to it."""

    def __init__(self, base: Path, config: PromptsSection = WANTED) -> None:
        self.clock = ManualClock(1000.0)
        self.store = Store(base / "db", MIGRATIONS)
        self.book = PolicyBook(
            self.store,
            witness=base / "witness",
            wall=self.clock.wall,
            differences={"prompts": differences},
        )
        self.issued: list[StoredPolicy] = []
        self.rng = random.Random(5)
        self.told = Outcomes()
        self.today = 0
        self.restart(config)

    def restart(self, config: PromptsSection = WANTED) -> None:
        self.app = PromptsApplication(
            config, self.clock, self.store, self.book, on_issue=self.issued.append
        )

    def serve(self, count: int, *, mean: float = 8.0, name: str = "t") -> None:
        """Requests answered since the last report, under the threshold 8."""
        seen = self.told.of(name, "verify")
        for _ in range(count):
            score = min(10, max(1, round(self.rng.gauss(mean, 1.5))))
            seen.signals[bin_of("verify", score)] += 1
            seen.requests += 1
            for step, nano in (("first", 1000), ("judge", 500)):
                seen.costs[step] = [seen.costs[step][0] + 1, seen.costs[step][1] + nano]
            if score < 8:
                second = seen.costs["second"]
                seen.costs["second"] = [second[0] + 1, second[1] + 40_000]
                self.today += 40_000
            self.today += 1500
        self.report()

    def report(self, **more: Any) -> None:
        day = "2023-11-14"  # of the manual clock
        today = {"day": day, "cost_nano": {"t": self.today}}
        self.app.take_report(PROXY, {**self.told.to_plain(), "today": today, **more})

    async def step(self) -> list[StoredPolicy]:
        before = len(self.issued)
        app = self.app
        await app.enforce_thresholds(app.compute_thresholds(app.get_workload_info()))
        await app.enforce_rates(app.compute_rates(app.get_class_load()))
        return self.issued[before:]


@pytest.fixture
def controlled(tmp_path: Path) -> Iterator[Controlled]:
    made = Controlled(tmp_path)
    yield made
    made.store.close()


def threshold(policy: StoredPolicy) -> float:
    (row,) = policy.body["service_types"]
    value: float = row["threshold"]
    return value


async def test_outcomes_become_a_threshold_with_its_reasons(controlled: Controlled) -> None:
    assert await controlled.step() == []
    controlled.serve(50)
    assert await controlled.step() == []  # too few
    controlled.clock.advance(10)
    controlled.serve(500)
    (issued,) = await controlled.step()
    assert issued.author == "automatic"
    assert issued.body["service_types"][0]["strategy"] == "verify"
    why = issued.inputs["service_types"]["t"]
    assert why["expected"]["quality_low"] >= 8.5
    assert any(option["threshold"] != threshold(issued) for option in why["options"])
    assert "quality" in issued.reason
    assert await controlled.step() == []  # nothing new
    told = controlled.app.describe()["service_types"]["t"]
    assert told["intent"] == {"quality": 8.5, "daily_nano": None}
    assert told["requests"] == pytest.approx(550, rel=0.01)


async def test_a_worse_cheap_model_raises_the_threshold(controlled: Controlled) -> None:
    controlled.serve(1000, mean=9.5)
    (first,) = await controlled.step()
    controlled.clock.advance(5 * 86_400.0)  # five half-lives
    controlled.serve(3000, mean=6.0)
    (second,) = await controlled.step()
    assert threshold(second) > threshold(first)


async def test_a_proxy_that_restarts_counts_from_zero(controlled: Controlled) -> None:
    controlled.serve(300)
    await controlled.step()
    controlled.app.member_restarted(PROXY)
    controlled.told = Outcomes()
    controlled.serve(200)
    await controlled.step()
    told = controlled.app.describe()["service_types"]["t"]
    assert told["requests"] == pytest.approx(500)


async def test_the_operator_sets_rolls_back_and_releases(controlled: Controlled) -> None:
    controlled.serve(1000)
    (first,) = await controlled.step()
    document = {"service_type": "t", "quality": 9.8}
    second = await controlled.app.set_policy(document, author="anna")
    assert second is not None
    assert threshold(second) > threshold(first)
    assert (second.author, second.reason) == ("anna", "set: t")
    controlled.restart()  # the intent is kept
    assert controlled.app.intents()["t"].quality == 9.8
    back = await controlled.app.rollback(first.number, author="anna")
    assert back.body == first.body
    controlled.serve(500)
    assert await controlled.step() == []  # held
    assert await controlled.app.release()
    assert await controlled.app.set_policy({"service_type": "t", "reset": True}, author="a") is None
    assert controlled.app.intents()["t"].quality == 8.5


async def test_a_daily_budget_binds_everybody_and_steers(controlled: Controlled) -> None:
    controlled.serve(2000)
    (free,) = await controlled.step()
    controlled.clock.advance(100.0)
    controlled.serve(2000)
    await controlled.step()
    issued = await controlled.app.set_policy({"daily": "0.40"}, author="anna")
    assert issued is not None
    assert issued.body["budgets"] == [
        {"scope": "global", "unit": "nano_dollars", "limit": 400_000_000, "period": "day"}
    ]
    assert threshold(issued) < threshold(free)
    assert "budget" in issued.inputs["service_types"]["t"]["because"]


async def test_a_service_types_amount_is_a_budget_even_without_a_cascade(
    controlled: Controlled,
) -> None:
    controlled.report(offers=["cost", "t"])
    issued = await controlled.app.set_policy(
        {"service_type": "cost", "daily": "0.01"}, author="anna"
    )
    assert issued is not None
    assert issued.body["budgets"] == [
        {"scope": "type:cost", "unit": "nano_dollars", "limit": 10_000_000, "period": "day"}
    ]
    back = await controlled.app.set_policy({"service_type": "cost", "reset": True}, author="anna")
    assert back is not None
    assert "budgets" not in back.body or back.body["budgets"] == []


async def test_a_type_that_no_proxy_offers_is_refused(controlled: Controlled) -> None:
    typo = {"service_type": "nosuch", "daily": "0.01"}
    await controlled.app.set_policy(typo, author="anna")  # no proxy has said what it offers
    await controlled.app.set_policy({"service_type": "nosuch", "reset": True}, author="anna")
    controlled.report(offers=["cost", "t"])
    with pytest.raises(InputError, match=r"service_type: got 'nosuch'.*cost, t"):
        await controlled.app.set_policy(typo, author="anna")
    assert "nosuch" not in controlled.app.intents()


async def test_models_that_fail_cool_down_longer(controlled: Controlled) -> None:
    for number in range(1, 3):
        controlled.told.calls["m"] = {"ok": 10 * number, "timeout": 10 * number}
        controlled.report()
        (issued,) = await controlled.step()
        assert issued.body["models"] == [{"name": "m", "cooldown_s": 5.0 * 2**number}]
    assert "fail" in issued.reason


@pytest.mark.parametrize(
    ("document", "where"),
    [
        (7, "policy"),
        ({"service_type": "t", "quality": 11}, "quality"),
        ({"quality": 8}, "service_type"),
        ({"service_type": "t", "daily": "-3"}, "daily"),
        ({"service_type": "t", "taste": 1}, "taste"),
        ({"intents": [{"service_type": "t", "quality": "x"}]}, r"intents\[0\]"),
        ({"intents": []}, "intents"),
        ({"service_type": "t", "reset": 1}, "reset"),
    ],
)
async def test_bad_intents_change_nothing(
    controlled: Controlled, document: object, where: str
) -> None:
    with pytest.raises(InputError, match=where):
        await controlled.app.set_policy(document, author="anna")
    assert controlled.app.intents()["t"].quality == 8.5


def test_bad_reports_are_refused_whole(controlled: Controlled) -> None:
    with pytest.raises(InputError, match="today"):
        controlled.report(today={"day": 7})
    with pytest.raises(InputError, match="today"):
        controlled.report(today={"day": "", "cost_nano": {"t": -1}})
    with pytest.raises(InputError, match="offers"):
        controlled.report(offers=[7])
    assert controlled.app.describe()["proxies"] == []


def test_intents_in_the_configuration_are_checked() -> None:
    with pytest.raises(InputError, match="service_type"):
        validate(PromptsSection, {"intents": [{"service_type": "t"}, {"service_type": "t"}]})
    with pytest.raises(InputError, match="daily"):
        validate(PromptsSection, {"daily": "much"})
