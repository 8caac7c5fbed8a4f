"""Budgets that hold under concurrency and crashes: reserve, then settle or release.

The rules are pure functions over account rows. A store runs them inside one transaction over the
rows it has locked (SQLite: one writer; PostgreSQL: SELECT ... FOR UPDATE), so several processes
share a budget exactly, and the same functions serve tests and replay.

An amount is reserved before a prompt leaves: the counted input plus the most the answer may have,
which is also what is sent upstream as the cap. What was reserved and never answered (the process
died) is settled at the reserved amount and marked estimated: it may have been billed, so it is
never released.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from intentd.core.errors import InputError, StateError

UNITS: Final = ("nano_dollars", "tokens", "requests")
PERIODS: Final = ("total", "day", "month")


@dataclass(frozen=True, slots=True)
class BudgetRule:
    """A limit an operator set: at most `limit` units a period for one scope.

    scope: whom it binds, such as ``key:alice``, ``tenant:course``, ``type:cost``,
        ``global``.
    unit: one of UNITS. period: one of PERIODS, in UTC.
    """

    scope: str
    unit: str
    limit: int
    period: str = "total"

    def __post_init__(self) -> None:
        if not self.scope:
            raise InputError("scope", self.scope, "a name such as key:alice")
        if self.unit not in UNITS:
            raise InputError("unit", self.unit, f"one of {', '.join(UNITS)}")
        if self.period not in PERIODS:
            raise InputError("period", self.period, f"one of {', '.join(PERIODS)}")
        if isinstance(self.limit, bool) or self.limit < 0:
            raise InputError("limit", self.limit, "a number >= 0")

    def account_id(self, wall_s: float) -> str:
        """The account a reservation made at wall_s (seconds since 1970, UTC) draws on."""
        return f"{self.scope}/{self.unit}/{period_name(self.period, wall_s)}"


def period_name(period: str, wall_s: float) -> str:
    """``"2026-11-22"`` for day, ``"2026-11"`` for month, ``"total"``."""
    if period == "total":
        return "total"
    moment = datetime.datetime.fromtimestamp(wall_s, tz=datetime.UTC)
    return moment.strftime("%Y-%m-%d" if period == "day" else "%Y-%m")


@dataclass(frozen=True, slots=True)
class Account:
    """One row of the ledger. spent + reserved never exceeds limit through a reservation."""

    account_id: str
    unit: str
    limit: int
    spent: int = 0
    reserved: int = 0

    @property
    def left(self) -> int:
        return self.limit - self.spent - self.reserved


class ReservationState(enum.Enum):
    """OPEN -> SETTLED (with what it cost) | RELEASED (nothing left the proxy)."""

    OPEN = "open"
    SETTLED = "settled"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a request holds: per unit the same amount on each of its accounts of that unit.

    estimated: settled at the reserved amount because the outcome was lost.
    """

    request_id: str
    account_ids: tuple[str, ...]
    amounts: Mapping[str, int]
    state: ReservationState = ReservationState.OPEN
    settled: Mapping[str, int] | None = None
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """No reservation was made: the account that has too little left, and how much it has."""

    account_id: str
    unit: str
    left: int
    wanted: int


Change = tuple[list[Account], Reservation]


def reserve(
    accounts: Iterable[Account], request_id: str, amounts: Mapping[str, int]
) -> Change | Refused:
    """Hold `amounts` (unit -> number >= 0) on every account, or on none.

    Returns the changed rows and the reservation, or the first account that refuses. Raises
    InputError for a negative amount or an unknown unit.
    """
    for unit, amount in amounts.items():
        if unit not in UNITS or amount < 0:
            raise InputError(f"amounts.{unit}", amount, f"a number >= 0 of {', '.join(UNITS)}")
    rows = list(accounts)
    for row in rows:
        wanted = amounts.get(row.unit, 0)
        if wanted > row.left:
            return Refused(row.account_id, row.unit, max(row.left, 0), wanted)
    changed = [replace(row, reserved=row.reserved + amounts.get(row.unit, 0)) for row in rows]
    return changed, Reservation(request_id, tuple(r.account_id for r in rows), dict(amounts))


def settle(
    accounts: Iterable[Account],
    reservation: Reservation,
    amounts: Mapping[str, int],
    *,
    estimated: bool = False,
) -> Change:
    """Turn what was held into what it cost. Again with the same amounts: nothing changes.

    More than was reserved is booked as it is (the provider has billed it); the account then shows
    less than nothing left and refuses until its period ends. Raises StateError after a release
    or for other amounts, InputError for negative ones.
    """
    rows = _held_rows(accounts, reservation)
    if reservation.state is ReservationState.SETTLED and dict(amounts) == reservation.settled:
        return rows, reservation
    if reservation.state is not ReservationState.OPEN:
        raise StateError(
            f"request {reservation.request_id} settles {dict(amounts)}, but is "
            f"{reservation.state.value} at {reservation.settled}"
        )
    for unit, amount in amounts.items():
        if unit not in UNITS or amount < 0:
            raise InputError(f"amounts.{unit}", amount, f"a number >= 0 of {', '.join(UNITS)}")
    changed = [
        replace(
            row,
            reserved=row.reserved - reservation.amounts.get(row.unit, 0),
            spent=row.spent + amounts.get(row.unit, 0),
        )
        for row in rows
    ]
    return changed, replace(
        reservation,
        state=ReservationState.SETTLED,
        settled=dict(amounts),
        estimated=estimated,
    )


def settle_estimated(accounts: Iterable[Account], reservation: Reservation) -> Change:
    """The outcome is lost: book the whole reservation, marked estimated."""
    return settle(accounts, reservation, reservation.amounts, estimated=True)


def release(accounts: Iterable[Account], reservation: Reservation) -> Change:
    """Give back what was held: only when nothing has been sent upstream. Idempotent."""
    rows = _held_rows(accounts, reservation)
    if reservation.state is ReservationState.RELEASED:
        return rows, reservation
    if reservation.state is not ReservationState.OPEN:
        raise StateError(
            f"request {reservation.request_id} is released, but was settled at "
            f"{reservation.settled}"
        )
    changed = [
        replace(row, reserved=row.reserved - reservation.amounts.get(row.unit, 0)) for row in rows
    ]
    return changed, replace(reservation, state=ReservationState.RELEASED)


def most_tokens(in_tokens: int, max_tokens: int | None, cap_tokens: int) -> tuple[int, int]:
    """(tokens to reserve, cap to send upstream) for one call.

    The cap is the client's max_tokens or the service type's, whichever is less.
    """
    if in_tokens < 0:
        raise InputError("in_tokens", in_tokens, "a count >= 0")
    if cap_tokens <= 0:
        raise InputError("cap_tokens", cap_tokens, "a count > 0")
    if max_tokens is not None and max_tokens <= 0:
        raise InputError("max_tokens", max_tokens, "a count > 0")
    cap = cap_tokens if max_tokens is None else min(max_tokens, cap_tokens)
    return in_tokens + cap, cap


def _held_rows(accounts: Iterable[Account], reservation: Reservation) -> list[Account]:
    rows = list(accounts)
    got = tuple(row.account_id for row in rows)
    if got != reservation.account_ids:
        raise StateError(
            f"request {reservation.request_id} holds {reservation.account_ids}, was given {got}"
        )
    return rows
