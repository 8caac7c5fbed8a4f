"""Packing grants onto nodes: nothing lost, nothing doubled, little moved."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.jobs.placement import Node, place, spread

FOUR = {name: Node(name, 4) for name in "abcd"}


def test_a_job_that_fits_takes_one_node():
    assert place({"x": 4, "y": 2, "z": 2}, FOUR) == {"x": {"a": 4}, "y": {"b": 2}, "z": {"b": 2}}


def test_best_fit_leaves_whole_nodes_whole():
    placed = place({"x": 2, "y": 2}, FOUR, {"x": {"c": 2}})
    assert placed["y"] == {"c": 2}


def test_unchanged_jobs_stay_and_shrinking_ones_drop_small_pieces():
    present = {"x": {"a": 4, "b": 1}, "y": {"c": 2}}
    assert place({"x": 4, "y": 2}, FOUR, present) == {"x": {"a": 4}, "y": {"c": 2}}


def test_a_growing_job_prefers_its_own_nodes_then_one_node_for_all():
    assert place({"x": 3}, FOUR, {"x": {"b": 2}}) == {"x": {"b": 3}}
    crowded = {"x": {"a": 2}, "y": {"a": 2}}
    assert place({"x": 4, "y": 2}, FOUR, crowded) == {"x": {"b": 4}, "y": {"a": 2}}
    assert spread(place({"x": 10}, FOUR)["x"]) == 3


def test_drained_nodes_keep_what_they_have_and_take_nothing():
    nodes = FOUR | {"a": Node("a", 4, drained=True)}
    assert place({"x": 2, "y": 4}, nodes, {"x": {"a": 2}}) == {"x": {"a": 2}, "y": {"b": 4}}


def test_a_lost_node_is_forgotten():
    assert place({"x": 2}, FOUR, {"x": {"gone": 2}}) == {"x": {"a": 2}}


def test_too_many_gpus_are_refused():
    with pytest.raises(InputError, match="grants"):
        place({"x": 17}, FOUR)
    with pytest.raises(InputError, match="grants"):
        place({"x": -1}, FOUR)
    with pytest.raises(InputError, match="nodes"):
        place({"x": 3, "y": 3}, FOUR, {"x": {"a": 3}, "y": {"a": 3}})


@given(st.lists(st.lists(st.integers(0, 8), min_size=6, max_size=6), min_size=1, max_size=5))
def test_grants_are_met_exactly(rounds):
    nodes = {str(index): Node(str(index), 4 + index % 3) for index in range(6)}
    room = sum(node.gpus for node in nodes.values())
    present: dict = {}
    for amounts in rounds:
        grants = {}
        for job, amount in enumerate(amounts):
            if sum(grants.values()) + amount <= room:
                grants[job] = amount
        present = place(grants, nodes, present)
        for job, amount in grants.items():
            assert sum(present.get(job, {}).values()) == amount
        for name, node in nodes.items():
            assert sum(placement.get(name, 0) for placement in present.values()) <= node.gpus
