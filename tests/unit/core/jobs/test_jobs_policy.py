"""Job policies: C^2 cuts, weights, validation, and the way to JSON and back."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import PolicyError
from intentd.core.jobs.policy import (
    Costs,
    JobsPolicy,
    cuts,
    from_plain,
    make,
    squared_variation,
    to_plain,
    weights_of,
    wfq,
)

SIZES = np.exp(np.random.default_rng(1).normal(5, 2, 500))


@given(st.floats(0.01, 5))
def test_classes_stay_within_the_limit(limit):
    edges = cuts(SIZES, limit)
    assert edges[-1] == math.inf
    assert edges == sorted(edges)
    ordered = np.sort(SIZES)
    low = 0.0
    for high in edges:
        # the size that closed a class belongs to neither sum, as published: leave it out
        members = ordered[(ordered > low) & (ordered <= high)][1 if low else 0 :]
        if len(members) > 1:
            assert squared_variation(members) <= limit * (1 + 1e-9) + 1e-9
        low = high


def walked(sizes, limit):
    """The same cuts one size at a time, as the chapter tells it."""
    edges, members, previous = [], [], 0.0
    for size in np.sort(sizes).tolist():
        members.append(size)
        mean = sum(members) / len(members)
        if sum(x * x for x in members) / len(members) / mean**2 - 1 > limit:
            edges.append(previous)
            members = []
        previous = size
    return [*dict.fromkeys(edges), math.inf]


@pytest.mark.parametrize("limit", [0.003, 0.02, 0.3, 1.0, 7.0])
def test_cuts_are_those_of_a_walk_through_the_sizes(limit):
    for sizes in (SIZES, np.floor(SIZES) + 1, np.full(9, 4.0), SIZES[:1]):
        assert cuts(sizes, limit) == pytest.approx(walked(sizes, limit), rel=1e-12)


def test_a_wide_limit_is_one_class_and_more_classes_with_less():
    assert cuts(SIZES, 1e9) == [math.inf]
    assert len(cuts(SIZES, 0.1)) > len(cuts(SIZES, 1.0)) > 1


def test_weights_fall_with_the_class_and_sum_to_one():
    row = weights_of(1.0, 3)
    assert row[0] / row[1] == pytest.approx(math.e)
    assert sum(row) == pytest.approx(1)
    assert weights_of(0.0, 4) == pytest.approx((0.25,) * 4)
    assert weights_of(-1.0, 2)[1] > 0.5
    assert min(weights_of(3.0, 200)) > 0


def test_one_weight_row_a_gpu_type():
    policy = wfq(SIZES, T=0.5, W={"v100": 1.0, "k80": -1.0}, zeta=0.5)
    assert policy.for_type("k80").weights[0] < policy.for_type("v100").weights[0]
    assert policy.for_type("h100") is policy


def test_class_of_takes_the_threshold_itself():
    policy = JobsPolicy("wfq", (10.0, math.inf), (1.0, 1.0))
    assert [policy.class_of(size) for size in (1.0, 10.0, 10.5)] == [0, 0, 1]
    assert make("fifo").class_of(1e9) == 0


def test_round_trip():
    for policy in (make("themis"), wfq(SIZES, T=0.5, W=0.7, zeta=0.4, delta=0.2)):
        assert from_plain(to_plain(policy)) == policy


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("policy", {"name": "lottery"}),
        ("weights[0]", {"weights": (0.0, 1.0)}),
        ("weights[1]", {"weights": (1.0, -1.0)}),
        ("weights[1]", {"weights": (1.0, math.nan)}),
        ("weights", {"weights": (1.0,)}),
        ("thresholds[1]", {"thresholds_gpu_s": (5.0, 5.0)}),
        ("thresholds[1]", {"thresholds_gpu_s": (5.0, 6.0)}),
        ("thresholds[0]", {"thresholds_gpu_s": (math.nan, math.inf)}),
        ("thresholds", {"thresholds_gpu_s": (), "weights": ()}),
        ("zeta", {"zeta": 1.5}),
        ("delta", {"delta": 0.0}),
        ("lease_s", {"lease_s": -1.0}),
        ("weights_by_type[a]", {"weights_by_type": {"a": (1.0,)}}),
    ],
)
def test_what_is_wrong_is_named(field, change):
    fields = {"name": "wfq", "thresholds_gpu_s": (5.0, math.inf), "weights": (1.0, 1.0)} | change
    with pytest.raises(PolicyError) as caught:
        JobsPolicy(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [],
        {"name": 3},
        {"name": "wfq", "colour": "red"},
        {"name": "wfq", "weights": 3},
        {"name": "wfq", "thresholds_gpu_s": "x"},
        {"name": "wfq", "zeta": "high"},
        {"name": "wfq", "integral": 1},
        {"name": "wfq", "weights_by_type": []},
        {"name": "wfq", "weights_by_type": {"a": 1}},
    ],
)
def test_plain_input_is_refused_with_its_path(plain):
    with pytest.raises(PolicyError, match="policy"):
        from_plain(plain)


def test_costs_and_parameters_are_checked():
    with pytest.raises(PolicyError, match=r"costs\.start_s"):
        Costs(start_s=-1.0)
    for change in ({"T": 0.0}, {"T": math.nan}, {"W": math.inf}, {"W": {}}):
        with pytest.raises(PolicyError):
            wfq(SIZES, **({"T": 1.0, "W": 1.0, "zeta": 0.5} | change))
    with pytest.raises(PolicyError):
        wfq([], T=1.0, W=1.0, zeta=0.5)
