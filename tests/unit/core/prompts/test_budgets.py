from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from intentd.core.errors import InputError, StateError
from intentd.core.prompts.budgets import (
    Account,
    BudgetRule,
    Refused,
    Reservation,
    ReservationState,
    most_tokens,
    release,
    reserve,
    settle,
    settle_estimated,
)
from intentd.core.prompts.limits import Rate, RateLimiter

MONEY = "nano_dollars"


def account(limit: int, name: str = "key:a", unit: str = MONEY) -> Account:
    return Account(f"{name}/{unit}/total", unit, limit)


def held(accounts: list[Account], amount: int) -> tuple[list[Account], Reservation]:
    change = reserve(accounts, "r1", {MONEY: amount})
    assert not isinstance(change, Refused)
    return change


def test_all_accounts_hold_or_none_does() -> None:
    rows = [account(100), account(10, "global")]
    refused = reserve(rows, "r1", {MONEY: 11})
    assert refused == Refused("global/nano_dollars/total", MONEY, 10, 11)
    changed, reservation = held(rows, 10)
    assert [row.reserved for row in changed] == [10, 10]
    assert reservation.state is ReservationState.OPEN


def test_settling_books_the_cost_once() -> None:
    rows, reservation = held([account(100)], 60)
    rows, reservation = settle(rows, reservation, {MONEY: 25})
    assert (rows[0].spent, rows[0].reserved) == (25, 0)
    assert settle(rows, reservation, {MONEY: 25}) == (rows, reservation)
    with pytest.raises(StateError, match="r1"):
        settle(rows, reservation, {MONEY: 26})
    with pytest.raises(StateError, match="settled"):
        release(rows, reservation)


def test_a_lost_outcome_is_booked_whole_and_marked() -> None:
    rows, reservation = held([account(100)], 60)
    rows, reservation = settle_estimated(rows, reservation)
    assert rows[0].spent == 60
    assert reservation.estimated


def test_what_never_left_is_given_back_once() -> None:
    rows, reservation = held([account(100)], 60)
    rows, reservation = release(rows, reservation)
    assert rows == [account(100)]
    assert release(rows, reservation) == (rows, reservation)
    with pytest.raises(StateError, match="released"):
        settle(rows, reservation, {MONEY: 1})


def test_a_bill_above_the_reservation_is_booked_and_blocks() -> None:
    rows, reservation = held([account(100)], 60)
    rows, _ = settle(rows, reservation, {MONEY: 150})
    assert rows[0].left == -50
    assert reserve(rows, "r2", {MONEY: 1}) == Refused(rows[0].account_id, MONEY, 0, 1)


def test_a_reservation_settles_in_the_period_it_was_made() -> None:
    rule = BudgetRule("key:a", "tokens", 5, "day")
    assert rule.account_id(0.0) == "key:a/tokens/1970-01-01"
    assert rule.account_id(86_400.0) == "key:a/tokens/1970-01-02"
    rows, reservation = held([account(100)], 5)
    with pytest.raises(StateError, match="holds"):
        settle([account(100, "key:b")], reservation, {MONEY: 5})
    assert rows[0].reserved == 5


@pytest.mark.parametrize(
    "fields",
    [("", MONEY, 1), ("k", "euros", 1), ("k", MONEY, -1), ("k", MONEY, True), ("k", MONEY, 1, "y")],
)
def test_a_bad_rule_is_refused(fields: tuple[Any, ...]) -> None:
    with pytest.raises(InputError):
        BudgetRule(*fields)


def test_bad_amounts_are_refused() -> None:
    with pytest.raises(InputError, match="nano_dollars"):
        reserve([account(1)], "r", {MONEY: -1})
    rows, reservation = held([account(9)], 1)
    with pytest.raises(InputError, match="euros"):
        settle(rows, reservation, {"euros": 1})


def test_the_cap_is_the_lesser_of_client_and_service_type() -> None:
    assert most_tokens(10, None, 50) == (60, 50)
    assert most_tokens(10, 20, 50) == (30, 20)
    assert most_tokens(10, 90, 50) == (60, 50)
    for bad in [(-1, None, 5), (1, 0, 5), (1, None, 0)]:
        with pytest.raises(InputError):
            most_tokens(*bad)


class Ledger(RuleBasedStateMachine):
    """Random requests on two nested budgets, against sums kept by hand."""

    open_requests = Bundle("open_requests")

    def __init__(self) -> None:
        super().__init__()
        self.rows = [account(1000), account(600, "global")]
        self.count = 0
        self.spent = 0
        self.reserved = 0
        self.ended: set[str] = set()

    @rule(target=open_requests, amount=st.integers(0, 400))
    def reserve_some(self, amount: int) -> Reservation | None:
        self.count += 1
        change = reserve(self.rows, f"r{self.count}", {MONEY: amount})
        fits = self.spent + self.reserved + amount <= 600
        assert isinstance(change, Refused) is not fits
        if isinstance(change, Refused):
            return None
        self.rows, reservation = change
        self.reserved += amount
        return reservation

    @rule(request=open_requests, share=st.floats(0, 1))
    def finish(self, request: Reservation | None, share: float) -> None:
        if request is None or request.request_id in self.ended:
            return
        cost = int(request.amounts[MONEY] * share)
        self.rows, ended = settle(self.rows, request, {MONEY: cost})
        self.ended.add(ended.request_id)
        self.reserved -= request.amounts[MONEY]
        self.spent += cost

    @rule(request=open_requests)
    def give_back(self, request: Reservation | None) -> None:
        if request is None or request.request_id in self.ended:
            return
        self.rows, ended = release(self.rows, request)
        self.ended.add(ended.request_id)
        self.reserved -= request.amounts[MONEY]

    @invariant()
    def books_agree(self) -> None:
        for row in self.rows:
            assert (row.spent, row.reserved) == (self.spent, self.reserved)
            assert row.spent + row.reserved <= row.limit


Ledger.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedger = Ledger.TestCase


def test_a_bucket_says_how_long_to_wait() -> None:
    limiter = RateLimiter(Rate(per_second=2, burst=2))
    assert [limiter.take("a", now=0.0) for _ in range(3)] == [0.0, 0.0, 0.5]
    assert limiter.take("b", now=0.0) == 0.0
    assert limiter.take("a", now=0.5) == 0.0
    assert limiter.take("a", now=100.0, count=3) == float("inf")


def test_the_scope_idle_for_longest_is_forgotten() -> None:
    limiter = RateLimiter(Rate(1, 1), max_scopes=2)
    for scope in "abcab":
        limiter.take(scope, now=0.0)
    assert len(limiter) == 2


@pytest.mark.parametrize("fields", [(0, 1), (float("inf"), 1), (1, 0), (float("nan"), 1)])
def test_a_bad_rate_is_refused(fields: tuple[float, float]) -> None:
    with pytest.raises(InputError):
        Rate(*fields)
