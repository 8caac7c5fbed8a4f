"""Money as integers: nano-dollars, so that sums are exact and no rounding leaks a budget.

A price is given per million tokens, as providers print it, and kept in nano-dollars per million
tokens: $0.0375 is 37,500,000. One rounding happens per call, upwards: what is billed to a budget
is never less than what the provider asks.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Final

from intentd.core.errors import InputError

NANO_PER_DOLLAR: Final = 10**9
TOKENS_PER_PRICE: Final = 10**6
MAX_NANO: Final = 2**62
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}\Z")


def parse_dollars(amount: object, field: str = "amount") -> int:
    """Nano-dollars from ``"0.15"``, ``0.15`` or ``3``. Raises InputError.

    Text and floats go through their decimal spelling, so 0.1 means a tenth; what is finer than a
    nano-dollar is refused, not rounded.
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float, str, Decimal)):
        raise InputError(field, amount, "dollars, such as 0.15")
    try:
        nano = Decimal(str(amount).strip().removeprefix("$")) * NANO_PER_DOLLAR
    except InvalidOperation:
        raise InputError(field, amount, "dollars, such as 0.15") from None
    if not nano.is_finite() or not 0 <= nano <= MAX_NANO:
        raise InputError(field, amount, f"0 to {MAX_NANO // NANO_PER_DOLLAR} dollars")
    if nano != int(nano):
        raise InputError(field, amount, "at most nine decimals (nano-dollars)")
    return int(nano)


def format_dollars(nano: int) -> str:
    """``150_000_000`` as ``"$0.15"``: exact, without trailing zeros, two decimals at least."""
    sign = "-" if nano < 0 else ""
    whole, part = divmod(abs(nano), NANO_PER_DOLLAR)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}${whole}.{decimals}"


@dataclass(frozen=True, slots=True)
class Price:
    """What a model's tokens cost, in nano-dollars per million tokens, from one day on.

    cached_in: input tokens that the provider reports as read from its own prompt cache.
    since: ISO date; a price history keeps the retired entries, so that old requests can be
    audited at what they cost then.
    """

    in_nano: int
    out_nano: int
    cached_in_nano: int | None = None
    since: str = "1970-01-01"

    def __post_init__(self) -> None:
        for name in ("in_nano", "out_nano", "cached_in_nano"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_NANO:
                raise InputError(name, value, f"0 to {MAX_NANO} nano-dollars a million tokens")
        try:
            datetime.date.fromisoformat(self.since)
        except ValueError:
            raise InputError("since", self.since, "a date such as 2026-11-01") from None
        if not _DATE.match(self.since):
            raise InputError("since", self.since, "a date such as 2026-11-01")

    def cost_nano(self, in_tokens: int, out_tokens: int, cached_in_tokens: int = 0) -> int:
        """Nano-dollars of one call, rounded up once.

        cached_in_tokens are part of in_tokens. Raises InputError for negative counts and for
        more cached than given.
        """
        if in_tokens < 0 or out_tokens < 0:
            raise InputError("tokens", (in_tokens, out_tokens), "counts >= 0")
        if not 0 <= cached_in_tokens <= in_tokens:
            raise InputError("cached_in_tokens", cached_in_tokens, f"0 to {in_tokens}")
        cached_price = self.in_nano if self.cached_in_nano is None else self.cached_in_nano
        total = (
            (in_tokens - cached_in_tokens) * self.in_nano
            + cached_in_tokens * cached_price
            + out_tokens * self.out_nano
        )
        return -(-total // TOKENS_PER_PRICE)

    def blended_nano(self) -> int:
        """One figure to compare models by: three input tokens to one of output."""
        return 3 * self.in_nano + self.out_nano


def price_at(history: tuple[Price, ...], day: str) -> Price:
    """The entry in force on an ISO day: the latest that is not after it. Raises InputError."""
    current = [price for price in history if price.since <= day]
    if not current:
        raise InputError("prices", day, "a price that is in force on that day")
    return max(current, key=lambda price: price.since)
