"""The ledger on disk: budgets by the rules of core.prompts.budgets, spend, the request log.

One process owns the database. Its loop decides on rows in memory; a single writer puts what
changed on disk, many requests in one transaction. A reservation is on disk before its prompt
leaves; what it cost follows within FLUSH_S. After ``kill -9`` every reservation still open is
settled at its full amount and marked estimated: the books never show less than the bill.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from intentd.core.prompts import budgets
from intentd.core.prompts.budgets import Account, BudgetRule, Refused, Reservation
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.store import Store, StoreError
from intentd.proxy.errors import ApiError
from intentd.proxy.store import sqlite
from intentd.proxy.store.base import Purpose, Sums

_log = logging.getLogger(__name__)

FLUSH_S: Final = 0.2
RETRY_S: Final = 0.5
MAX_UNWRITTEN: Final = 100_000
PRUNE_EVERY: Final = 5_000


@dataclass(slots=True)
class Batch:
    """What goes to disk in one transaction."""

    opened: dict[str, tuple[Reservation, Purpose]] = field(default_factory=dict)
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    dirty: set[str] = field(default_factory=set)
    spend: dict[tuple[str, Purpose], Sums] = field(default_factory=dict)
    requests: list[tuple[str, str, float, str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.opened or self.ended or self.dirty or self.spend or self.requests)


class Ledger:
    """open() first; run() writes until cancelled, close() writes the rest."""

    def __init__(self, store: Store, clock: Clock, *, max_rows: int) -> None:
        self._store = store
        self._clock = clock
        self.max_rows = max_rows
        self._accounts: dict[str, Account] = {}
        self._open: dict[str, Reservation] = {}
        self._next = Batch()
        self._wake = asyncio.Event()
        self._since_prune = 0
        self._today = (-1, "")
        self._timer: asyncio.TimerHandle | None = None
        self.dropped_records = 0
        self.recovered = 0
        self.write_failures = 0

    def open(self) -> None:
        """Load the accounts and settle what a killed process left open. Raises StoreError."""
        now_s = self._clock.wall()
        current = {budgets.period_name(period, now_s) for period in budgets.PERIODS}
        for row in self._store.read("SELECT id, unit, bound, spent, reserved FROM accounts"):
            if row["id"].rpartition("/")[2] not in current and not row["reserved"]:
                continue
            self._accounts[row["id"]] = Account(
                row["id"], row["unit"], row["bound"], row["spent"], row["reserved"]
            )
        batch = Batch()
        for row in self._store.read("SELECT * FROM reservations"):
            held = Reservation(
                row["id"], tuple(json.loads(row["accounts"])), json.loads(row["amounts"])
            )
            accounts, settled = budgets.settle_estimated(self._rows(held), held)
            self._keep(accounts, batch)
            batch.ended.append(held.request_id)
            purpose = Purpose(row["key"], row["tenant"], row["model"], row["service_type"])
            nano = settled.amounts.get("nano_dollars", 0)
            day = budgets.period_name("day", row["wall_s"])
            sums = batch.spend.setdefault((day, purpose), Sums())
            sums.requests += 1
            sums.failed += 1
            sums.cost_nano += nano
            sums.estimated_nano += nano
            self.recovered += 1
        if batch:
            self._write(self._store, batch, self._account_rows(batch))
            _log.warning("settled what was open", extra={"reservations": self.recovered})

    async def reserve(
        self,
        reservation_id: str,
        rules: Iterable[BudgetRule],
        amounts: Mapping[str, int],
        purpose: Purpose,
    ) -> Reservation:
        """Hold the amounts on every rule's account; on disk when it returns.

        Raises ApiError: 429 insufficient_quota naming the budget, 503 when the disk refuses.
        """
        wall_s = self._clock.wall()
        rows = [self._account(rule, wall_s) for rule in rules]
        outcome = budgets.reserve(rows, reservation_id, amounts)
        if isinstance(outcome, Refused):
            raise refusal(outcome)
        accounts, reservation = outcome
        self._keep(accounts, self._next)
        self._open[reservation_id] = reservation
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._next.opened[reservation_id] = (reservation, purpose)
        self._next.waiting.append(done)
        self._wake.set()
        try:
            await done
        except StoreError as error:
            self.release(reservation)
            raise ApiError(503, f"the ledger cannot be written: {error}", retry_after_s=1) from None
        except asyncio.CancelledError:
            self.release(reservation)  # nothing has left the proxy
            raise
        return reservation

    def settle(
        self, reservation: Reservation, amounts: Mapping[str, int], *, estimated: bool = False
    ) -> None:
        """Book what it cost; see budgets.settle."""
        if self._open.pop(reservation.request_id, None) is None:
            return
        accounts, _ = budgets.settle(
            self._rows(reservation), reservation, amounts, estimated=estimated
        )
        self._end(reservation, accounts)

    def release(self, reservation: Reservation) -> None:
        """Give it back: nothing was sent, or the provider refused it."""
        if self._open.pop(reservation.request_id, None) is None:
            return
        accounts, _ = budgets.release(self._rows(reservation), reservation)
        self._end(reservation, accounts)

    def book(self, purpose: Purpose, sums: Sums) -> None:
        """Add to the day's spend."""
        self._soon()
        key = (self._day(), purpose)
        day = self._next.spend.get(key)
        if day is None:
            self._next.spend[key] = sums
            return
        day.add(sums)

    def log_request(
        self, request_id: str, key: str, wall_s: float, document: bytes, client_id: str = ""
    ) -> None:
        """Put a finished request into the log; dropped and counted while the disk is away."""
        if self.max_rows == 0:
            return
        if len(self._next.requests) >= MAX_UNWRITTEN:
            self.dropped_records += 1
            return
        self._next.requests.append((request_id, key, wall_s, document.decode(), client_id))

    async def find_request(self, request_id: str, key: str | None) -> list[str]:
        """The log's document of a request of this key (None: any). Raises ApiError 503."""
        return await self._find(sqlite.FIND_REQUEST, request_id, key)

    async def find_named(self, client_id: str, key: str | None) -> list[str]:
        """Those that their client calls so, newest first. Raises ApiError 503."""
        return await self._find(sqlite.FIND_NAMED, client_id, key)

    async def _find(self, sql: str, *named: str | None) -> list[str]:
        try:
            rows = await self._store.run(lambda store: store.read(sql, named))
        except StoreError as error:
            raise ApiError(503, f"the request log cannot be read: {error}") from None
        return [row["document"] for row in rows]

    async def spend(self, days: int) -> list[dict[str, Any]]:
        """The books of the last days, newest first, as rows. Raises StoreError."""
        first = budgets.period_name("day", self._clock.wall() - (days - 1) * 86400)
        sql = "SELECT * FROM spend WHERE day >= ? ORDER BY day DESC, cost_nano DESC"
        rows = await self._store.run(lambda store: store.read(sql, (first,)))
        return [dict(row) for row in rows]

    async def identity(self) -> str:
        return ""

    async def accounts(self) -> list[Account]:
        return list(self._accounts.values())

    @property
    def open_reservations(self) -> int:
        return len(self._open)

    async def run(self) -> None:
        """Write what changes, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._next and not await self.flush():
                await self._clock.sleep(RETRY_S)

    async def flush(self) -> bool:
        """One transaction with all there is. False when the disk refused: it is tried again,
        except for reservations, whose requests are told."""
        batch, self._next = self._next, Batch()
        rows = self._account_rows(batch)
        try:
            await self._store.run(lambda store: self._write(store, batch, rows))
        except StoreError as error:
            self.write_failures += 1
            refused = self._take_back(batch)
            for future in refused:
                if not future.done():
                    future.set_exception(error)
            return False
        for future in batch.waiting:
            if not future.done():
                future.set_result(None)
        return True

    async def close(self) -> None:
        """Write the rest; what is still open then is settled at the next start."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._next and not await self.flush():
            _log.error("the last entries of the ledger could not be written")

    # -- inside --------------------------------------------------------------------------------

    def _day(self) -> str:
        """Today in UTC; spelling it out costs more than everything else in ``book``."""
        number = int(self._clock.wall() // 86400)
        if number != self._today[0]:
            self._today = (number, budgets.period_name("day", number * 86400.0))
        return self._today[1]

    def _account(self, rule: BudgetRule, wall_s: float) -> Account:
        account_id = rule.account_id(wall_s)
        found = self._accounts.get(account_id)
        if found is not None and found.limit == rule.limit:
            return found
        if found is None:
            self._forget_past(f"{rule.scope}/{rule.unit}/", account_id)
            found = Account(account_id, rule.unit, rule.limit)
        else:
            found = replace(found, limit=rule.limit)
        self._accounts[account_id] = found
        return found

    def _forget_past(self, prefix: str, current: str) -> None:
        """Drop accounts of periods that are over (they stay on disk)."""
        kind = len(current)  # ids of one rule's periods have one length: 2026-11-21, 2026-11
        for account_id in [
            name
            for name, account in self._accounts.items()
            if name.startswith(prefix)
            and len(name) == kind
            and account.reserved == 0
            and name not in self._next.dirty
        ]:
            del self._accounts[account_id]

    def _rows(self, reservation: Reservation) -> list[Account]:
        return [self._accounts[account_id] for account_id in reservation.account_ids]

    def _keep(self, accounts: Iterable[Account], batch: Batch) -> None:
        for account in accounts:
            self._accounts[account.account_id] = account
            batch.dirty.add(account.account_id)

    def _soon(self) -> None:
        """Have what is in memory written within FLUSH_S."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._due)

    def _due(self) -> None:
        self._timer = None
        self._wake.set()

    def _end(self, reservation: Reservation, accounts: list[Account]) -> None:
        self._soon()
        self._keep(accounts, self._next)
        # Opened and ended within one batch: it never needs to reach the disk.
        if self._next.opened.pop(reservation.request_id, None) is None:
            self._next.ended.append(reservation.request_id)

    def _account_rows(self, batch: Batch) -> list[tuple[str, str, int, int, int]]:
        rows = []
        for account_id in batch.dirty:
            account = self._accounts.get(account_id)
            if account is not None:
                rows.append(
                    (account_id, account.unit, account.limit, account.spent, account.reserved)
                )
        return rows

    def _take_back(self, batch: Batch) -> list[asyncio.Future[None]]:
        """A failed write: all but its reservations goes into the next one; who waited for those."""
        later, self._next = self._next, batch
        refused, batch.waiting = batch.waiting, later.waiting
        batch.opened = later.opened
        batch.ended += later.ended
        batch.dirty |= later.dirty
        for (day, purpose), sums in later.spend.items():
            batch.spend.setdefault((day, purpose), Sums()).add(sums)
        batch.requests = [*batch.requests, *later.requests][:MAX_UNWRITTEN]
        self._wake.set()
        return refused

    def _write(
        self, store: Store, batch: Batch, accounts: list[tuple[str, str, int, int, int]]
    ) -> None:
        with store.transaction() as db:
            if accounts:
                db.executemany(sqlite.WRITE_ACCOUNT, accounts)
            if batch.opened:
                db.executemany(
                    sqlite.WRITE_RESERVATION,
                    [_reservation_row(*item, self._clock.wall()) for item in batch.opened.values()],
                )
            if batch.ended:
                db.executemany(sqlite.END_RESERVATION, [(name,) for name in batch.ended])
            if batch.spend:
                db.executemany(sqlite.ADD_SPEND, [_spend_row(*i) for i in batch.spend.items()])
            if batch.requests:
                db.executemany(sqlite.ADD_REQUEST, batch.requests)
                self._since_prune += len(batch.requests)
                if self._since_prune >= PRUNE_EVERY:
                    self._since_prune = 0
                    db.execute(sqlite.PRUNE_REQUESTS, (self.max_rows,))


def refusal(outcome: Refused) -> ApiError:
    """What the client hears when a budget does not suffice."""
    return ApiError(
        429,
        f"budget {outcome.account_id}: {outcome.left} {outcome.unit} left, "
        f"this request may need {outcome.wanted}",
        code="insufficient_quota",
        kind="insufficient_quota",
    )


def _reservation_row(
    reservation: Reservation, purpose: Purpose, wall_s: float
) -> tuple[str, str, str, str, str, str, str, float]:
    return (
        reservation.request_id,
        json.dumps(reservation.account_ids),
        json.dumps(dict(reservation.amounts)),
        purpose.key,
        purpose.tenant,
        purpose.model,
        purpose.service_type,
        wall_s,
    )


def _spend_row(key: tuple[str, Purpose], sums: Sums) -> tuple[Any, ...]:
    day, purpose = key
    return (
        day, purpose.key, purpose.tenant, purpose.model, purpose.service_type,
        sums.requests, sums.failed, sums.in_tokens, sums.out_tokens, sums.cost_nano,
        sums.estimated_nano,
    )  # fmt: skip
