"""Decisions on seeded outcomes: the cheapest threshold for a quality, and money before quality."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.prompts.outcomes import (
    SIGNALS,
    Outcomes,
    TypeOutcomes,
    bin_of,
    difference,
    escalates,
    forget,
    outcomes_from_plain,
    thresholds,
)
from intentd.core.prompts.steering import (
    Choice,
    Cooldown,
    Intent,
    PromptsPolicy,
    choose,
    differences,
    left_a_request,
    options_of,
    policy_from_plain,
)


def verified(count: int = 1000, seed: int = 1) -> TypeOutcomes:
    """Scores mostly high; a cheap answer costs 10, judging 5, the dear answer 300 nano-dollars."""
    rng = random.Random(seed)
    seen = TypeOutcomes("verify")
    for _ in range(count):
        score = min(10, max(1, round(rng.gauss(8.0, 2.0))))
        seen.signals[bin_of("verify", score)] += 1
        seen.requests += 1
        seen.costs["first"][0] += 1
        seen.costs["first"][1] += 10
        seen.costs["judge"][0] += 1
        seen.costs["judge"][1] += 5
        if score < 8:
            seen.costs["second"][0] += 1
            seen.costs["second"][1] += 300
    return seen


def decide(seen: TypeOutcomes, quality: float | None, **more: Any) -> Choice:
    settings: dict[str, Any] = {"present": 8.0, "min_outcomes": 100.0, "most_nano": math.inf}
    return choose(seen, Intent("t", quality), **{**settings, **more})


def test_the_cheapest_threshold_that_reaches_the_quality_is_taken() -> None:
    seen = verified()
    low, high = decide(seen, 8.2), decide(seen, 9.6)
    assert low.chosen is not None
    assert high.chosen is not None
    assert low.threshold < high.threshold
    assert low.chosen.quality_low >= 8.2
    cheaper = [o for o in options_of(seen) if o.threshold < low.threshold]
    assert all(option.quality_low < 8.2 for option in cheaper)
    assert low.chosen.cost_nano is not None
    assert low.chosen.cost_nano == pytest.approx(15 + 300 * low.chosen.escalated)
    beyond = decide(seen, 10.0, present=3.0)
    assert beyond.threshold == 10.0
    assert "out of reach" not in beyond.because
    seen.asked = [1000, 200.0]  # people say the dear model is no good
    assert "out of reach" in decide(seen, 9.9).because


def test_too_few_outcomes_leave_things_as_they_are() -> None:
    found = decide(verified(30), 9.0, present=4.0)
    assert (found.threshold, found.chosen) == (4.0, None)
    assert "30 outcomes" in found.because
    assert decide(verified(), None).threshold == 8.0


def test_money_goes_before_quality() -> None:
    seen = verified()
    rich, poor = decide(seen, 9.6), decide(seen, 9.6, most_nano=60.0)
    assert rich.chosen is not None
    assert poor.chosen is not None
    assert poor.chosen.cost_nano is not None
    assert poor.chosen.cost_nano <= 60.0 < (rich.chosen.cost_nano or 0)
    assert "budget" in poor.because
    broke = decide(seen, 9.6, most_nano=0.0)
    assert broke.threshold == 1.0


def test_ratings_correct_the_verifier() -> None:
    seen = verified()
    before = decide(seen, 9.0)
    for _ in range(400):  # people do not like what it gave an 8
        seen.rate(0.1, signal=8, escalated=False)
    after = decide(seen, 9.0)
    assert after.threshold > before.threshold
    for _ in range(2000):  # and find the dear model no better
        seen.rate(0.1, signal=5, escalated=True)
    assert "out of reach" in decide(seen, 9.0).because


def test_agreement_and_router_are_steered_by_expected_loss() -> None:
    rng = random.Random(2)
    agree, route = TypeOutcomes("agree"), TypeOutcomes("route")
    for seen in (agree, route):
        for _ in range(2000):
            signal = rng.random() ** 3 if seen is agree else rng.gauss(0.1, 0.2)
            seen.signals[bin_of(seen.strategy, signal)] += 1
        for step in ("first", "second"):
            seen.costs[step] = [100, 1000 if step == "first" else 50_000]
    for seen in (agree, route):
        strict, loose = decide(seen, 0.99, present=0.5), decide(seen, 0.9, present=0.5)
        assert strict.chosen is not None
        assert loose.chosen is not None
        assert strict.chosen.escalated > loose.chosen.escalated
        assert strict.chosen.quality_low >= 0.99
        costs = [option.cost_nano for option in options_of(seen)]
        assert all(cost is not None for cost in costs)
        assert costs == sorted(costs, key=lambda cost: cost or 0)


@given(st.sampled_from(sorted(SIGNALS)), st.lists(st.integers(0, 50), min_size=40, max_size=40))
def test_dearer_options_never_promise_less(strategy: str, counts: list[int]) -> None:
    seen = TypeOutcomes(strategy)
    seen.signals = [float(count) for count in counts[: len(seen.signals)]]
    options = options_of(seen)
    shares = [option.escalated for option in options]
    assert shares == sorted(shares)
    qualities = [option.quality for option in options]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(qualities))


def test_a_bin_escalates_as_the_pipeline_does() -> None:
    assert escalates("verify", bin_of("verify", 7), 8.0)
    assert not escalates("verify", bin_of("verify", 8), 8.0)
    assert escalates("verify", bin_of("verify", None), 1.0)
    assert escalates("agree", bin_of("agree", 0.52), 0.5)
    assert not escalates("route", bin_of("route", -0.3), 0.0)
    for strategy in SIGNALS:
        tried = thresholds(strategy)
        bins = range(SIGNALS[strategy][0])
        asked = [sum(escalates(strategy, place, t) for place in bins) for t in tried]
        assert asked == sorted(asked)
        assert asked[-1] == len(bins)


def test_the_day_lasts_until_its_end() -> None:
    noon = 20_000 * 86_400 + 43_200
    left = left_a_request(1_000_000, 400_000, wall_s=noon, requests_per_s=0.01)
    assert left == pytest.approx(600_000 / (0.01 * 43_200))
    assert left_a_request(5, 7, wall_s=noon, requests_per_s=1.0) == 0.0
    assert left_a_request(5, 0, wall_s=noon, requests_per_s=0.0) == math.inf


def test_cooldowns_grow_while_a_model_fails() -> None:
    cooldown = Cooldown()
    assert cooldown.learn({"ok": 2}) == 0
    grown = [cooldown.learn({"ok": 5, "timeout": 5}) for _ in range(6)]
    assert grown == [1, 2, 3, 4, 4, 4]
    assert cooldown.learn({"ok": 100, "rate_limited": 50}) == 3
    assert [cooldown.learn({"ok": 100}) for _ in range(4)] == [2, 1, 0, 0]


def test_policies_come_back_and_wrong_ones_are_refused_by_path() -> None:
    policy = PromptsPolicy(
        {"model_selector": ("verify", 7.0), "router": ("route", -0.05)},
        {"m": 20.0},
        (("global", "nano_dollars", 5, "day"),),
    )
    plain = policy.to_plain()
    assert policy_from_plain(plain) == policy
    assert differences({}, plain) == [
        "model_selector: threshold None -> 7.0",
        "router: threshold None -> -0.05",
        "m: cooldown_s None -> 20.0",
        "global: limit None -> 5",
    ]
    for change, path in (
        ({"service_types": [{"name": "x", "strategy": "verify", "threshold": 12}]}, r"\[0\].thr"),
        ({"service_types": [{"name": "x", "strategy": "dice", "threshold": 1}]}, "strategy"),
        ({"models": [{"name": "", "cooldown_s": 1}]}, "name"),
        ({"models": [{"name": "m", "cooldown_s": math.inf}]}, "cooldown_s"),
        ({"budgets": [{"scope": "global", "unit": "x", "limit": -1, "period": "day"}]}, "limit"),
        ({"other": 1}, "other"),
        ({"models": 3}, "models"),
    ):
        with pytest.raises(InputError, match=path):
            policy_from_plain(change)


def test_reports_are_sums_whose_differences_merge() -> None:
    first, second = Outcomes(), Outcomes()
    first.types["t"] = verified(100, 3)
    first.calls["m"] = {"ok": 10}
    second.types["t"] = verified(100, 3)
    second.types["t"].merge(verified(50, 4))
    second.calls["m"] = {"ok": 15, "timeout": 1}
    again = outcomes_from_plain(second.to_plain())
    grown = difference(again, first)
    assert grown.types["t"].signals == verified(50, 4).signals
    assert grown.calls == {"m": {"ok": 5, "timeout": 1}}
    total = Outcomes()
    total.merge(first)
    total.merge(grown)
    assert total.types["t"].signals == second.types["t"].signals
    half = forget(total, 0.5)
    assert sum(half.types["t"].signals) == pytest.approx(75)
    other = TypeOutcomes("agree", requests=3)
    total.types["t"].merge(other)
    assert total.types["t"].strategy == "agree"
    assert difference(first, second).types["t"] is first.types["t"]


@pytest.mark.parametrize(
    "change",
    [
        {"types": {"t": {"strategy": "dice"}}},
        {"types": {"t": {"strategy": "verify", "signals": [1, 2]}}},
        {"types": {"t": {"requests": -1}}},
        {"types": {"t": {"requests": 1.5}}},
        {"types": {"t": {"asked": [1, 2.0]}}},
        {"types": {"t": {"asked": [1, math.nan]}}},
        {"types": {"": {}}},
        {"types": []},
        {"calls": {"m": {"ok": "many"}}},
        {"calls": {"m": 3}},
        7,
    ],
)
def test_bad_reports_are_refused(change: object) -> None:
    with pytest.raises(InputError, match="prompts"):
        outcomes_from_plain(change)


def test_intents_are_checked() -> None:
    with pytest.raises(InputError, match="quality"):
        Intent("t", 11.0)
    with pytest.raises(InputError, match="daily"):
        Intent("t", None, -1)
