import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import PolicyError
from intentd.core.flows.policy import (
    ClassPolicy,
    DomainPolicy,
    FlowsPolicy,
    domain_from_plain,
    domain_to_plain,
    flows_from_plain,
    flows_to_plain,
)


def two_classes(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "domain": "uplink",
        "rate_bps": 1e9,
        "classes": [
            {"threshold_bytes": 1000, "weight": 0.75},
            {"threshold_bytes": None, "weight": 0.25},
        ],
    }
    return {**plain, **changes}


def test_a_flow_belongs_to_the_first_class_that_takes_its_size() -> None:
    policy = domain_from_plain(two_classes())
    assert [policy.class_of(size) for size in (0, 1000, 1001, 10**15)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"domain": ""}, "domain.domain"),
        ({"rate_bps": 0}, "domain.rate_bps"),
        ({"rate_bps": math.inf}, "domain.rate_bps"),
        ({"rate_bps": "1Gbit"}, "domain.rate_bps"),
        ({"max_wait_s": 0}, "domain.max_wait_s"),
        ({"batch_bytes": -1}, "domain.batch_bytes"),
        ({"turn_mode": "magic"}, "domain.turn_mode"),
        ({"dispatch": "size "}, "domain.dispatch"),
        ({"colour": 1}, "domain.colour"),
        ({"classes": []}, "domain.classes"),
        ({"classes": 3}, "domain.classes"),
        ({"classes": [{"threshold_bytes": None, "weight": 1}] * 65}, "domain.classes"),
        ({"classes": [{"threshold_bytes": 5, "weight": 1}]}, "domain.classes[0].threshold_bytes"),
        ({"classes": [{"weight": 1}]}, "domain.classes[0].threshold_bytes"),
        ({"classes": [{"threshold_bytes": None, "weight": 0}]}, "domain.classes[0].weight"),
        ({"classes": [{"threshold_bytes": None, "weight": 0.9}]}, r"domain.classes[*].weight"),
        (
            {"classes": [{"threshold_bytes": None, "weight": 1, "mpl": 1.5}]},
            "domain.classes[0].mpl",
        ),
        (
            {"classes": [{"threshold_bytes": None, "weight": 1, "order": "boost"}]},
            "domain.classes[0].boost_gamma_per_s",
        ),
        ({"classes": [{"threshold_bytes": None, "weight": 1, "dscp": 64}]}, "classes[0].dscp"),
        (
            {
                "classes": [
                    {"threshold_bytes": 9, "weight": 0.5},
                    {"threshold_bytes": 9, "weight": 0.25},
                    {"threshold_bytes": None, "weight": 0.25},
                ]
            },
            "domain.classes[1].threshold_bytes",
        ),
    ],
)
def test_a_bad_policy_is_refused_with_its_path(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(PolicyError) as caught:
        domain_from_plain(two_classes(**changes))
    assert caught.value.field.endswith(field)


def test_a_domain_may_appear_once() -> None:
    policy = domain_from_plain(two_classes())
    with pytest.raises(PolicyError, match="used once"):
        FlowsPolicy((policy, policy))


@st.composite
def domain_policies(draw: st.DrawFn) -> DomainPolicy:
    count = draw(st.integers(1, 8))
    cuts = sorted(draw(st.sets(st.integers(1, 10**9), min_size=count - 1, max_size=count - 1)))
    shares = draw(st.lists(st.integers(1, 100), min_size=count, max_size=count))
    classes = tuple(
        ClassPolicy(threshold_bytes=cut, weight=share / sum(shares), mpl=draw(st.integers(0, 4)))
        for cut, share in zip([*map(float, cuts), math.inf], shares, strict=True)
    )
    return DomainPolicy("d", draw(st.floats(1, 1e12)), classes)


@given(domain_policies())
def test_plain_form_round_trips(policy: DomainPolicy) -> None:
    assert domain_from_plain(domain_to_plain(policy)) == policy
    assert flows_from_plain(flows_to_plain(FlowsPolicy((policy,)))) == FlowsPolicy((policy,))


@given(st.recursive(st.none() | st.text() | st.floats() | st.integers(), lambda x: st.lists(x)))
def test_no_value_breaks_the_policy_decoder(plain: object) -> None:
    for value in (plain, {"domains": plain}, two_classes(classes=plain), two_classes(domain=plain)):
        try:
            flows_from_plain(value)
        except PolicyError:
            continue
