import contextlib
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.flows.workloads import WORKLOADS, SizeCdf, parse_cdf, workload


@pytest.mark.parametrize(
    ("name", "mean", "c2"),
    [
        ("data-mining", 12.66e6, 45.8),
        ("web-search", 1.712e6, 5.37),
        ("cache", 1.357e6, 3.22),
        ("hadoop", 7.70e6, 34.5),
        ("uniform", 10e6, 0.0833),
        ("uniform-chapter", 8e6, 0.2552),
    ],
)
def test_moments_of_the_workloads(name: str, mean: float, c2: float) -> None:
    cdf = workload(name).cdf
    assert cdf.mean_bytes == pytest.approx(mean, rel=1e-3)
    assert cdf.c2 == pytest.approx(c2, rel=2e-3)


def test_published_job_shares_of_data_mining() -> None:
    item = WORKLOADS["data-mining"]
    limits = item.published_thresholds_bytes
    shares = [item.cdf.share(limit) for limit in limits]
    weights = [b - a for a, b in zip([0.0, *shares], shares, strict=False)]
    assert weights == pytest.approx([0.704, 0.098, 0.101, 0.048, 0.030, 0.019], abs=1e-3)


def test_unknown_workload_is_named() -> None:
    with pytest.raises(InputError, match=r"workload: got 'vl3'.*data-mining"):
        workload("vl3")


def test_doubled_first_point_is_an_atom() -> None:
    cdf = WORKLOADS["data-mining"].cdf
    assert [cdf.quantile(u) for u in (0.0, 0.05, 0.1)] == [180.0, 180.0, 180.0]
    assert cdf.quantile(0.15) == 198.0
    assert cdf.share(179.999) == 0.0
    assert cdf.share(180.0) == pytest.approx(0.1)
    assert cdf.pieces()[0] == (180.0, 180.0, 0.1)


def test_atom_in_the_middle_and_gap() -> None:
    cdf = SizeCdf.of([(1, 0.25), (10, 0.25), (20, 0.5), (20, 0.75), (40, 1)])
    assert [cdf.quantile(u) for u in (0.0, 0.25, 0.375, 0.6, 0.875, 1.0)] == [1, 1, 15, 20, 30, 40]
    assert cdf.share(20) == 0.75
    assert math.fsum(p for _, _, p in cdf.pieces()) == pytest.approx(1.0)


def test_scale_keeps_shares_and_c2() -> None:
    cdf = WORKLOADS["cache"].cdf
    small = cdf.scale(0.5)
    assert small.mean_bytes == pytest.approx(cdf.mean_bytes / 2)
    assert small.c2 == pytest.approx(cdf.c2)
    for factor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError):
            cdf.scale(factor)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_quantile_and_share_are_inverse(name: str) -> None:
    cdf = WORKLOADS[name].cdf
    rng = random.Random(3)
    for _ in range(500):
        u = rng.random()
        size = cdf.quantile(u)
        assert cdf.share(size) >= u - 1e-12
        if size > cdf.sizes_bytes[0]:
            assert cdf.share(size) == pytest.approx(u, abs=1e-9)


@given(st.floats(0, 2e9), st.floats(0, 2e9), st.sampled_from(sorted(WORKLOADS)))
def test_partial_moments_add_up(a: float, b: float, name: str) -> None:
    low, high = sorted((a, b))
    cdf = WORKLOADS[name].cdf
    assert cdf.partial_moment(0, low, high) == pytest.approx(
        cdf.share(high) - cdf.share(low), abs=1e-9
    )
    for power in (0, 1, 2):
        parts = [(-1.0, low), (low, high), (high, math.inf)]
        total = math.fsum(cdf.partial_moment(power, lo, hi) for lo, hi in parts)
        assert total == pytest.approx(cdf.partial_moment(power))


def test_parse_accepts_header_comments_blank_lines_and_bom() -> None:
    text = "\ufeff# sizes\n\nsize_bytes,cdf\n100, 0\n 200 ,1e0\n"
    assert parse_cdf(text) == SizeCdf.of([(100, 0), (200, 1)])
    assert parse_cdf("100,0\n200,1") == parse_cdf(text)
    assert parse_cdf("100,1").quantile(0.3) == 100.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no points"),
        ("size_bytes,cdf\n", "no points"),
        ("bytes,probability\n1,1", "line 1.*the header size_bytes,cdf"),
        ("1,0\nx,1", "line 2.*numbers"),
        ("1,0\n2", "line 2.*two columns"),
        ("1,0\n2,1,3", "line 2.*two columns"),
        ("1,0\n2,.5\n3,.4\n4,1", "line 3: cdf: got 0.4.*at least the point before"),
        ("1,0\n3,.5\n2,1", "line 3: size_bytes: got 2.0.*at least the point before"),
        ("1,0\n2,.9", "line 2: cdf: got 0.9, expected 1"),
        ("-1,0\n2,1", "line 1: size_bytes: got -1.0"),
        ("nan,0\n2,1", "line 1: size_bytes: got nan"),
        ("1,nan\n2,1", "line 1: cdf: got nan"),
        ("1,0\ninf,1", "line 2: size_bytes: got inf"),
        ("1,0\n2,100", "line 2: cdf: got 100.0"),
        ("0,0\n0,1", "line 2: size_bytes: got 0.0, expected a largest size > 0"),
    ],
)
def test_parse_names_line_value_and_expectation(text: str, says: str) -> None:
    with pytest.raises(InputError, match=rf"mine\.csv.*{says}"):
        parse_cdf(text, "mine.csv")


@given(st.text(max_size=80))
def test_parse_never_crashes(text: str) -> None:
    with contextlib.suppress(InputError):
        parse_cdf(text)


def test_sizes_have_an_upper_bound() -> None:
    with pytest.raises(InputError, match=r"line 2: size_bytes: got 1e\+300, expected .* to 1e\+18"):
        parse_cdf("1,0\n1e300,1\n")
    assert parse_cdf("1,0\n1e18,1\n").c2 > 0
