"""Demand functions: tables, envelopes, spread, GPU types, and every way to get one wrong."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.jobs.allocator import table_of
from intentd.core.jobs.demand import efficiency, envelope, from_table, from_tables, linear


def test_linear_job_halves_its_time_with_twice_the_gpus():
    job = linear(800.0, 8)
    assert job.demand(1) == 800
    assert job.demand(4) == 200
    assert job.demand(100) == job.demand(8) == 100
    assert job.demand(0.5) == math.inf
    assert job.size_gpu_s == 800


def test_gaps_of_a_table_are_filled_in_speed():
    job = from_table({1: 100.0, 3: 50.0})
    assert job.demand(2) == pytest.approx(100 / 1.5)
    assert job.largest == 3


def test_a_table_that_slows_is_its_envelope_with_a_warning():
    job = from_table({1: 100.0, 2: 60.0, 3: 70.0, 4: 65.0})
    assert job.largest == 2
    assert job.demand(4) == 60
    assert job.warnings
    assert "envelope" in job.warnings[0]


def test_size_and_speeds_of_a_gang_are_per_smallest_allocation():
    job = from_table({4: 100.0, 8: 60.0}, smallest=4)
    assert job.size_gpu_s == 400
    speeds = job.speeds()
    assert speeds[4] == pytest.approx(4)
    assert speeds[8] == pytest.approx(400 / 60)
    assert job.size_gpu_s / speeds[8] == pytest.approx(job.demand(8))


def test_types_and_spread():
    job = from_tables(
        {
            ("v100", 1): {1: 100.0, 2: 55.0, 4: 30.0},
            ("v100", 2): {1: 100.0, 2: 70.0, 4: 50.0},
            ("k80", 1): {1: 300.0, 2: 160.0, 4: 90.0},
        }
    )
    assert job.demand(4, "v100") == 30
    assert job.demand(4, "v100", spread=2) == 50
    assert job.demand(4, "k80", spread=3) == 90
    assert job.size_gpu_s == 100
    packed, spread = job.speeds("v100"), job.speeds("v100", node_gpus=2)
    assert packed[4] == pytest.approx(100 / 30)
    assert spread[4] == pytest.approx(100 / 50)
    assert spread[2] == packed[2]
    with pytest.raises(InputError, match="gpu_type"):
        job.demand(1, "h100")


def test_equal_speeds_share_a_row():
    jobs = table_of([linear(10.0, 4), linear(20.0, 2), from_table({1: 9.0, 2: 6.0})], [0, 1, 2])
    assert len(jobs.speeds) == 3
    assert table_of([linear(10.0, 4), linear(20.0, 4)], [0, 1]).speeds.shape == (1, 5)


@pytest.mark.parametrize(
    "table",
    [
        {},
        {1: -1.0},
        {1: 0.0},
        {1: math.nan},
        {1: math.inf},
        {1: "fast"},
        {1: True},
        {0: 1.0},
        {"x": 1.0},
        {2: 1.0},
        {10**9: 1.0},
    ],
)
def test_a_wrong_table_is_refused(table):
    with pytest.raises(InputError):
        from_table(table)


def test_min_above_max_is_refused():
    with pytest.raises(InputError, match="max_gpus"):
        linear(10.0, 2, smallest=3)
    with pytest.raises(InputError, match="minimum"):
        from_table({2: 1.0, 4: 0.6}, smallest=3)
    with pytest.raises(InputError):
        from_tables({})


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=30))
def test_envelope_rises_and_efficiency_falls(gains):
    speeds, best = envelope([0.0, *gains])
    assert (np.diff(speeds) >= 0).all()
    assert speeds[best] == speeds[-1]
    assert (np.diff(efficiency(speeds)) <= 0).all()
