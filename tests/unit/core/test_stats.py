import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.stats import LogHistogram, Reservoir, percentile

VALUES = st.lists(st.floats(0, 1e12, allow_nan=False), max_size=60)


def test_percentile_interpolates_between_ranks() -> None:
    assert percentile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([1.0, 2.0], 1.0) == 2.0
    with pytest.raises(ValueError):
        percentile([], 0.5)
    with pytest.raises(ValueError):
        percentile([1.0], 1.5)


def test_histogram_quantiles_are_within_a_bucket() -> None:
    rng = random.Random(1)
    values = sorted(rng.lognormvariate(0, 3) for _ in range(20_000))
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    for q in (0.01, 0.5, 0.9, 0.99, 0.999):
        assert histogram.quantile(q) == pytest.approx(percentile(values, q), rel=0.05)
        assert histogram.share_up_to(percentile(values, q)) == pytest.approx(q, abs=0.01)
    assert histogram.quantile(0.0) == pytest.approx(values[0], rel=0.05)
    assert histogram.quantile(1.0) == values[-1]
    assert histogram.mean == pytest.approx(math.fsum(values) / len(values))
    assert sum(n for _, _, n in histogram.buckets()) == histogram.count


def test_empty_histogram() -> None:
    histogram = LogHistogram()
    assert (histogram.quantile(0.5), histogram.mean, histogram.share_up_to(1.0)) == (0.0, 0.0, 0.0)
    assert LogHistogram.from_plain(histogram.to_plain()).count == 0


@given(VALUES, VALUES)
def test_merge_is_the_histogram_of_both(left: list[float], right: list[float]) -> None:
    one, two, both = LogHistogram(), LogHistogram(), LogHistogram()
    for value in left:
        one.add(value)
        both.add(value)
    for value in right:
        two.add(value)
        both.add(value)
    one.merge(two)
    merged, expected = one.to_plain(), both.to_plain()
    assert merged.pop("sum") == pytest.approx(expected.pop("sum"))
    assert merged == expected


@given(VALUES)
def test_plain_round_trip_through_json(values: list[float]) -> None:
    histogram = LogHistogram(8)
    for value in values:
        histogram.add(value)
    plain = json.loads(json.dumps(histogram.to_plain()))
    again = LogHistogram.from_plain(plain)
    assert again.to_plain() == histogram.to_plain()
    assert again.count == len(values)


def test_extremes_are_clamped_not_lost() -> None:
    histogram = LogHistogram()
    for value in (5e-324, 1e308, 0.0):
        histogram.add(value)
    assert histogram.count == 3
    assert histogram.quantile(0.0) == 0.0
    assert LogHistogram.from_plain(histogram.to_plain()).count == 3


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_histogram_refuses_what_is_no_size(value: float) -> None:
    with pytest.raises(ValueError):
        LogHistogram().add(value)


def test_merge_refuses_other_buckets() -> None:
    with pytest.raises(ValueError):
        LogHistogram(8).merge(LogHistogram(16))


GOOD = {"per_octave": 16, "zeros": 0, "buckets": [[3, 2]], "sum": 2.0, "min": 1.0, "max": 1.2}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"per_octave": 0}, "h.per_octave"),
        ({"per_octave": True}, "h.per_octave"),
        ({"zeros": -1}, "h.zeros"),
        ({"zeros": 1.5}, "h.zeros"),
        ({"zeros": 2**63}, "h.zeros"),
        ({"buckets": 3}, "h.buckets"),
        ({"buckets": [3]}, "h.buckets"),
        ({"buckets": [[99999, 1]]}, "h.buckets"),
        ({"buckets": [[3, -1]]}, "h.buckets[3]"),
        ({"buckets": [[3, 1], [3, 1]]}, "h.buckets"),
        ({"sum": "x"}, "h.sum"),
        ({"sum": math.inf}, "h.sum"),
        ({"min": 9.0}, "h.min"),
        ({"max": math.nan}, "h.max"),
        ({"surplus": 1}, "h.surplus"),
    ],
)
def test_from_plain_names_what_is_wrong(change: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        LogHistogram.from_plain({**GOOD, **change}, "h")
    assert caught.value.field == field


@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8))
def test_from_plain_never_crashes(plain: object) -> None:
    with pytest.raises(InputError):
        LogHistogram.from_plain(plain)


def test_reservoir_is_bounded_uniform_and_repeats_from_its_seed() -> None:
    def run(seed: int) -> list[float]:
        reservoir = Reservoir(200, random.Random(seed))
        reservoir.extend(float(i) for i in range(10_000))
        assert len(reservoir) == 200
        assert reservoir.offered == 10_000
        return reservoir.values()

    assert run(1) == run(1)
    assert run(1) != run(2)
    means = [math.fsum(run(seed)) / 200 for seed in range(50)]
    assert math.fsum(means) / 50 == pytest.approx(5000, rel=0.03)


def test_reservoir_keeps_all_while_there_is_room_and_forgets() -> None:
    reservoir = Reservoir(3, random.Random(1))
    reservoir.extend([1.0, 2.0])
    assert sorted(reservoir.values()) == [1.0, 2.0]
    reservoir.clear()
    assert (len(reservoir), reservoir.offered) == (0, 0)
    with pytest.raises(ValueError):
        Reservoir(0, random.Random(1))
