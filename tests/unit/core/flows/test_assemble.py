"""From what was learned and chosen to a policy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from intentd.core.errors import InputError
from intentd.core.flows.assemble import DomainSettings, LoadMeter, assemble, estimate_of
from intentd.core.flows.learning import Learner
from intentd.core.flows.policies import POLICIES
from intentd.core.flows.sampling import sample_sizes
from intentd.core.flows.workloads import workload


def learned(name: str = "web-search", flows: int = 3000, seed: int = 1) -> Learner:
    learner = Learner()
    sizes = sample_sizes(workload(name).cdf, flows, np.random.default_rng(seed))
    learner.observe(sizes, now=0.0)
    learner.decide()
    return learner


SETTINGS = DomainSettings("d", 1e9)


def test_one_class_without_a_gate_until_something_was_learned() -> None:
    policy = assemble(SETTINGS, Learner(), load=None)
    assert [(c.threshold_bytes, c.weight, c.mpl) for c in policy.classes] == [(math.inf, 1.0, 0)]
    policy = assemble(SETTINGS, learned("uniform"), load=None)
    assert [(c.threshold_bytes, c.mpl) for c in policy.classes] == [(math.inf, 1)]


def test_learned_classes_with_the_operators_choices() -> None:
    chosen = replace(SETTINGS, mpl=(3, 1), turn_mode="centralised", max_wait_s=5.0)
    policy = assemble(chosen, learned(), load=0.5)
    assert [c.mpl for c in policy.classes] == [3, 1, 1]
    assert (policy.turn_mode, policy.max_wait_s) == ("centralised", 5.0)
    assert {c.order for c in policy.classes} == {"fifo"}
    assert estimate_of(policy, 7).thresholds_bytes == learned().in_force.thresholds_bytes


def test_boost_needs_a_load_and_keeps_gamma_until_it_moves() -> None:
    boost = replace(SETTINGS, family="2d-boost")
    learner = learned()
    assert {c.order for c in assemble(boost, learner, load=None).classes} == {"fifo"}
    first = assemble(boost, learner, load=0.8)
    assert first.classes[0].order == "boost"
    assert assemble(boost, learner, load=0.79, in_force=first) == first
    later = assemble(boost, learner, load=0.4, in_force=first)
    assert later.classes[0].boost_gamma_per_s > first.classes[0].boost_gamma_per_s


def test_pinned_thresholds_take_measured_weights_and_pinned_weights_stay() -> None:
    pinned = replace(SETTINGS, thresholds_bytes=(20_000.0, math.inf))
    policy = assemble(pinned, learned(), load=None)
    assert policy.classes[0].weight == pytest.approx(0.2, abs=0.03)
    both = replace(pinned, weights=(0.9, 0.1))
    assert [c.weight for c in assemble(both, learned(), load=None).classes] == [0.9, 0.1]


@pytest.mark.parametrize("family", POLICIES)
def test_every_family_stands_from_the_start_and_once_sizes_are_known(family: str) -> None:
    chosen = replace(SETTINGS, family=family)
    assert assemble(chosen, Learner(), load=None).rate_bps == 1e9
    policy = assemble(chosen, learned(), load=0.8)
    assert policy.name == family
    assert assemble(chosen, learned(seed=2), load=0.8, in_force=policy).name == family


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        ({"family": "srpt"}, "policy"),
        ({"mpl": ()}, "mpl"),
        ({"thresholds_bytes": (5.0, 4.0, math.inf)}, "classes[1].threshold_bytes"),
        ({"thresholds_bytes": (5.0, 9.0)}, "classes[1].threshold_bytes"),
        ({"thresholds_bytes": (5.0, math.inf), "weights": (0.6, 0.6)}, "classes[*].weight"),
        ({"thresholds_bytes": (5.0, math.inf), "weights": (1.0,)}, "weights"),
        ({"weights": (1.0,)}, "weights"),
        ({"family": "ps", "thresholds_bytes": (5.0, math.inf)}, "thresholds_bytes"),
        ({"turn_mode": "loud"}, "turn_mode"),
        ({"rate_bps": 0.0}, "rate_bps"),
    ],
)
def test_wrong_settings_are_refused_with_their_path(wrong: dict[str, object], path: str) -> None:
    with pytest.raises(InputError) as caught:
        DomainSettings(**{"domain": "d", "rate_bps": 1e9} | wrong)  # type: ignore[arg-type]
    assert caught.value.field == path


def test_load_is_what_arrived_in_the_window() -> None:
    meter = LoadMeter(window_s=60.0)
    meter.add(1e9, now=0.0)  # how long the first report took is not known
    assert meter.rate_bps(now=5.0) is None
    for second in range(1, 121):
        meter.add(1e6, now=float(second))
    assert meter.rate_bps(now=120.0) == pytest.approx(8e6, rel=0.02)
    assert meter.rate_bps(now=1000.0) == 0.0
