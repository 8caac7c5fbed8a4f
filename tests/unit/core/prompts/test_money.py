from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.prompts.money import Price, format_dollars, parse_dollars, price_at


@pytest.mark.parametrize(
    ("text", "nano"),
    [("0.15", 150_000_000), (0.1, 100_000_000), ("$3", 3 * 10**9), (0, 0), ("0.000000001", 1)],
)
def test_dollars_become_exact_integers(text: object, nano: int) -> None:
    assert parse_dollars(text) == nano


@pytest.mark.parametrize("text", ["", "free", -1, "nan", "inf", True, None, "0.0000000001", 1e30])
def test_what_is_not_money_is_refused(text: object) -> None:
    with pytest.raises(InputError, match="price"):
        parse_dollars(text, "models[0].price_in")


@given(st.integers(0, 10**18))
def test_printing_loses_nothing(nano: int) -> None:
    assert parse_dollars(format_dollars(nano)) == nano


PRICE = Price(parse_dollars("0.15"), parse_dollars("0.60"), parse_dollars("0.075"))


def test_a_call_costs_what_the_provider_prints() -> None:
    assert PRICE.cost_nano(1_000_000, 1_000_000) == 750_000_000
    assert PRICE.cost_nano(1_000_000, 0, 1_000_000) == 75_000_000


@given(st.integers(0, 10**7), st.integers(0, 10**6), st.data())
def test_cost_is_rounded_up_by_less_than_a_nano(i: int, o: int, data: st.DataObject) -> None:
    cached = data.draw(st.integers(0, i))
    exact = (Decimal(i - cached) * PRICE.in_nano + cached * 75_000_000 + o * PRICE.out_nano) / 10**6
    assert exact <= PRICE.cost_nano(i, o, cached) < exact + 1


@pytest.mark.parametrize("counts", [(-1, 0, 0), (0, -1, 0), (1, 0, 2), (1, 0, -1)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="tokens"):
        PRICE.cost_nano(*counts)


def test_the_price_of_the_day_applies() -> None:
    old, new = Price(10, 20, since="2025-01-01"), Price(5, 9, since="2026-03-01")
    assert price_at((new, old), "2026-02-28") is old
    assert price_at((new, old), "2026-03-01") is new
    with pytest.raises(InputError, match="in force"):
        price_at((new, old), "2024-12-31")


@pytest.mark.parametrize("since", ["soon", "2026-13-01", "20260101", "2026-01-01T00:00:00"])
def test_a_price_needs_a_day(since: str) -> None:
    with pytest.raises(InputError, match="since"):
        Price(1, 1, since=since)
