"""Thresholds in hindsight, and a gate that holds its rate while traffic changes."""

from __future__ import annotations

import numpy as np

from intentd.controller.search.prompts_cache import Measured
from intentd.controller.search.prompts_traffic import curve, oracle, simulate


def measured() -> Measured:
    """Two kinds of traffic on which the same chance means different things, and edits."""
    rng = np.random.default_rng(1)
    sets = {}
    for name, hardness in (("easy", 0.3), ("hard", 2.0)):
        chances = rng.random(4000)
        sets[name] = (chances, rng.random(4000) >= np.minimum(1.0, hardness * (1 - chances)))
    edits = {"unit": 0.9 * rng.random(500)}
    return Measured(sets, {}, edits, np.ones(3))


def test_hindsight_hits_more_where_more_is_allowed() -> None:
    found = oracle(measured())
    assert found["easy"]["0.05"] > found["easy"]["0.01"] > 0
    assert found["easy"]["0.03"] > found["hard"]["0.03"]
    points = curve(measured())["easy"]
    assert points == sorted(points)
    assert points[-1][1] == 1.0


def test_an_online_threshold_holds_the_rate_a_fixed_one_does_not() -> None:
    found = simulate(measured(), 0.8, target=0.05, checked=0.3, seed=2)
    names = [row["traffic"] for row in found["phases"]]
    assert names == ["easy", "hard", "easy, edited", "easy again"]
    assert found["settled"]["fixed"]["worst_phase"] > 0.15
    for row in found["phases"]:
        assert row["online"]["settled"] <= 0.08
    again = simulate(measured(), 0.8, target=0.05, checked=0.3, seed=2)
    assert again == found
