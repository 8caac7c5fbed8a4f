"""Outcomes a proxy reports, and a controller's policy applied while requests go on."""

from __future__ import annotations

from typing import Any

import pytest

from intentd.core.errors import InputError
from intentd.core.messages import NumberedPolicy
from intentd.core.prompts.outcomes import outcomes_from_plain


def pool(site: Any) -> list[dict[str, Any]]:
    return [
        site.model("tiny", price_in="0.1", price_out="1"),
        site.model("mid", price_in="1", price_out="10"),
        site.model("big", price_in="10", price_out="100"),
    ]


def scores(site: Any, score: str) -> None:
    """The verifier gives everything the same score; the others say their name."""

    def words(body: dict[str, Any]) -> tuple[str, ...]:
        if "judge answers" in str(body["messages"][0]["content"]):
            return (score,)
        return (f"I am {body['model']}",)

    site.provider.words_for = words


def policy(number: int, **body: Any) -> NumberedPolicy:
    return NumberedPolicy("prompts", 1, number, 0.0, body)


async def ask(site: Any, prompt: str, kind: str = "model_selector") -> Any:
    status, answer, _ = await site.post("/v1/request", {"prompt": prompt, "service_type": kind})
    assert status == 200, answer
    return answer


async def test_cascades_are_counted_by_score_and_step(site: Any) -> None:
    await site.start(models=pool(site))
    scores(site, "9")
    kept = await ask(site, "easy")
    scores(site, "4")
    asked = await ask(site, "hard")
    assert (kept["response"], asked["response"]) == ("I am up-mid", "I am up-big")
    await ask(site, "cheap", "cost")
    status, _, _ = await site.post("/v1/regenerate", {"id": kept["id"]})
    assert status == 200
    told = outcomes_from_plain(site.proxy._report())
    seen = told.types["model_selector"]
    assert (seen.strategy, seen.requests, seen.escalated, seen.regenerated) == ("verify", 3, 1, 1)
    assert (seen.signals[9], seen.signals[4]) == (1, 1)
    assert seen.kept[9] == [1, 0.0]  # somebody wanted a better answer
    assert [seen.costs[step][0] for step in ("first", "judge", "second")] == [2, 2, 1]
    assert seen.costs["second"][1] > seen.costs["first"][1] > seen.costs["judge"][1]
    assert told.types["cost"].strategy == ""
    assert told.calls["mid"] == {"ok": 2}
    assert seen.latency.count == 3
    today = site.proxy._report()["today"]["cost_nano"]
    assert sum(today.values()) == sum(one.cost_nano for one in told.types.values())


async def test_ratings_are_counted_where_the_answer_came_from(site: Any) -> None:
    await site.start(models=pool(site))
    scores(site, "9")
    kept = await ask(site, "easy")
    for rating in ("good", "bad"):
        status, _, _ = await site.post("/v1/feedback", {"id": kept["id"], "rating": rating})
        assert status == 200
    assert site.proxy.api.outcomes.outcomes.types["model_selector"].kept[9] == [2, 1.0]


async def test_failures_are_counted_too(site: Any) -> None:
    await site.start(models=[site.model("m")], upstream={"attempts": 1})
    site.provider.default.status = 500
    await site.chat()
    told = outcomes_from_plain(site.proxy._report())
    assert told.types["fixed"].failed == 1
    assert told.calls["m"] == {"status": 1}


async def test_a_policy_applies_to_the_next_request(site: Any) -> None:
    await site.start(models=pool(site))
    scores(site, "9")
    assert (await ask(site, "a"))["metadata"]["model"] == "mid"
    row = {"name": "model_selector", "strategy": "verify", "threshold": 10.0}
    ack = site.proxy._on_policy(
        policy(
            3,
            service_types=[row, {**row, "name": "not here"}],
            models=[{"name": "mid", "cooldown_s": 20.0}],
            budgets=[{"scope": "global", "unit": "requests", "limit": 6, "period": "day"}],
        )
    )
    assert ack.applied
    answer = await ask(site, "b")
    assert answer["metadata"]["model"] == "big"
    assert answer["metadata"]["policy"] == [1, 3]
    assert site.proxy.api.engine.models["mid"].health.cooldown_s == 20.0
    await ask(site, "c")
    await ask(site, "d")
    status, refused, _ = await site.post(
        "/v1/request", {"prompt": "e", "service_type": "model_selector"}
    )
    assert (status, refused["error"]["type"]) == (429, "insufficient_quota")
    await site.proxy.reload(site.config(models=pool(site)))  # the policy outlives a reload
    assert site.proxy.api.engine.models["mid"].health.cooldown_s == 20.0
    assert site.proxy._on_policy(policy(4)).applied  # nothing steered: as configured
    assert (await ask(site, "f"))["metadata"]["model"] == "mid"
    assert site.proxy.api.engine.models["mid"].health.cooldown_s == 5.0


async def test_a_budget_of_a_service_type_binds_that_type(site: Any) -> None:
    await site.start(models=pool(site))
    scores(site, "9")
    budget = {"scope": "type:cost", "unit": "requests", "limit": 1, "period": "day"}
    assert site.proxy._on_policy(policy(1, budgets=[budget])).applied
    await ask(site, "a", "cost")
    status, refused, _ = await site.post("/v1/request", {"prompt": "b", "service_type": "cost"})
    assert (status, refused["error"]["type"]) == (429, "insufficient_quota")
    assert "type:cost" in refused["error"]["message"]
    await ask(site, "c")  # another type goes on
    assert "cost" in site.proxy._report()["offers"]


async def test_a_wrong_policy_changes_nothing(site: Any) -> None:
    await site.start(models=pool(site))
    scores(site, "9")
    row = {"name": "model_selector", "strategy": "verify", "threshold": 10.0}
    for budget in (
        {"scope": "key:x", "unit": "requests", "limit": 1, "period": "day"},
        {"scope": "global", "unit": "apples", "limit": 1, "period": "day"},
    ):
        with pytest.raises(InputError):
            site.proxy._on_policy(policy(3, service_types=[row], budgets=[budget]))
    assert (await ask(site, "a"))["metadata"]["model"] == "mid"
    assert not site.proxy._on_policy(NumberedPolicy("flows", 1, 1, 0.0, {})).applied


async def test_the_lower_of_two_budgets_binds(site: Any) -> None:
    budgets = [{"scope": "global", "unit": "requests", "limit": "1", "period": "day"}]
    await site.start(models=pool(site), budgets=budgets)
    scores(site, "9")
    loose = {"scope": "global", "unit": "requests", "limit": 50, "period": "day"}
    assert site.proxy._on_policy(policy(1, budgets=[loose])).applied
    await ask(site, "a")
    status, _, _ = await site.post("/v1/request", {"prompt": "b", "service_type": "cost"})
    assert status == 429
