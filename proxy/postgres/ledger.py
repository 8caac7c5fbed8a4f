"""The books of several proxies in PostgreSQL, exact across processes.

Each proxy puts what its requests did meanwhile into one transaction at a time: it locks the
accounts it needs, decides by core.prompts.budgets on the rows as they are, and commits; so a
budget is never overdrawn by two proxies, and a thousand requests cost a few commits. A batch
carries a number: one whose commit was cut off is sent again and takes effect once. What the
database does not take before a stop waits in a file for the next start.

What is open belongs to the proxy that opened it. When a proxy is not heard of for its lease,
another settles that in full, marked estimated. If it comes back after all, its late settlements
find nothing to settle: the books never show less than the bill.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from intentd.core.prompts import budgets
from intentd.core.prompts.budgets import Account, BudgetRule, Refused, Reservation
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.files import write_atomically
from intentd.daemons.kit.postgres import Database
from intentd.daemons.kit.store import StoreError
from intentd.proxy.errors import ApiError
from intentd.proxy.ledger import refusal
from intentd.proxy.store.base import Purpose, Sums

_log = logging.getLogger(__name__)

FLUSH_S: Final = 0.2
RETRY_S: Final = 0.5
MAX_UNWRITTEN: Final = 100_000
MAX_OPENING: Final = 20_000
PRUNE_EVERY: Final = 5_000

_LOCK_ACCOUNTS: Final = (
    "SELECT id, unit, bound, spent, reserved FROM accounts WHERE id = ANY($1::text[]) "
    "ORDER BY id FOR UPDATE"
)
_MAKE_ACCOUNTS: Final = (
    "INSERT INTO accounts(id, unit, bound, spent, reserved) "
    "SELECT id, unit, bound, 0, 0 FROM unnest($1::text[], $2::text[], $3::bigint[]) "
    "AS u(id, unit, bound) ORDER BY id ON CONFLICT DO NOTHING"
)
_WRITE_ACCOUNTS: Final = (
    "UPDATE accounts a SET bound = u.bound, spent = u.spent, reserved = u.reserved "
    "FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[]) "
    "AS u(id, bound, spent, reserved) WHERE a.id = u.id"
)
_ADD_RESERVATION: Final = (
    "INSERT INTO reservations(id, owner, accounts, amounts, key, tenant, model, service_type, "
    "wall_s) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
)
_END_RESERVATIONS: Final = (
    "DELETE FROM reservations WHERE id = ANY($1::text[]) RETURNING id, accounts, amounts"
)
_ADD_SPEND: Final = (
    "INSERT INTO spend AS s(day, key, tenant, model, service_type, requests, failed, in_tokens, "
    "out_tokens, cost_nano, estimated_nano) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) "
    "ON CONFLICT(day, key, model, service_type) DO UPDATE SET "
    "requests = s.requests + excluded.requests, failed = s.failed + excluded.failed, "
    "in_tokens = s.in_tokens + excluded.in_tokens, "
    "out_tokens = s.out_tokens + excluded.out_tokens, "
    "cost_nano = s.cost_nano + excluded.cost_nano, "
    "estimated_nano = s.estimated_nano + excluded.estimated_nano"
)
_ADD_REQUEST: Final = (
    "INSERT INTO requests(id, key, wall_s, document, client_id) VALUES ($1, $2, $3, $4, $5)"
)
_FIND_REQUEST: Final = (
    "SELECT document FROM requests WHERE id = $1 AND ($2::text IS NULL OR key = $2) "
    "ORDER BY number DESC LIMIT 1"
)
_FIND_NAMED: Final = (
    "SELECT document FROM requests WHERE client_id = $1 AND client_id <> '' "
    "AND ($2::text IS NULL OR key = $2) ORDER BY number DESC LIMIT 8"
)
_PRUNE_REQUESTS: Final = (
    "DELETE FROM requests WHERE number <= (SELECT max(number) FROM requests) - $1"
)
_TAKE_BATCH: Final = (
    "INSERT INTO proxies AS p(owner, name, seen, batch) VALUES ($1, $2, clock_timestamp(), $3) "
    "ON CONFLICT(owner) DO UPDATE SET batch = excluded.batch "
    "WHERE p.batch < excluded.batch RETURNING batch"
)


@dataclass(eq=False, slots=True)
class _Opening:
    """A reservation somebody waits for. outcome: set by the transaction, told after its commit."""

    reservation_id: str
    accounts: list[Account]
    amounts: dict[str, int]
    purpose: Purpose
    wall_s: float
    done: asyncio.Future[Reservation | Refused]
    outcome: Reservation | Refused | None = None


@dataclass(slots=True)
class _Batch:
    """What goes into one transaction. ended: by reservation, what it cost (None: released)."""

    owner: str = ""
    number: int = 0
    opening: list[_Opening] = field(default_factory=list)
    ended: dict[str, dict[str, int] | None] = field(default_factory=dict)
    spend: dict[tuple[str, Purpose], Sums] = field(default_factory=dict)
    requests: list[tuple[str, str, float, str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.opening or self.ended or self.spend or self.requests)

    def to_plain(self) -> dict[str, Any]:
        """All but those who wait, who are refused."""
        return {
            "owner": self.owner,
            "number": self.number,
            "ended": self.ended,
            "spend": [_spend_row(*item) for item in self.spend.items()],
            "requests": self.requests,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> _Batch:
        batch = cls(plain["owner"], plain["number"], [], plain["ended"])
        for day, key, tenant, model, service_type, *sums in plain["spend"]:
            batch.spend[day, Purpose(key, tenant, model, service_type)] = Sums(*sums)
        for request_id, key, wall_s, document, *client_id in plain["requests"]:
            batch.requests.append((request_id, key, wall_s, document, *(client_id or ("",))))
        return batch


class SharedLedger:
    """run() writes until cancelled, close() writes the rest. A store.base.Books."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        *,
        owner: str,
        name: str,
        max_rows: int,
        left_file: Path,
    ) -> None:
        """left_file: where close() puts what a database that is away does not take."""
        self._database = database
        self._left_file = left_file
        self._clock = clock
        self._owner = owner
        self._name = name
        self.max_rows = max_rows
        self._open: set[str] = set()
        self._next = _Batch()
        self._doubtful: _Batch | None = None  # failed, perhaps after its commit
        self._number = 0
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._today = (-1, "")
        self._since_prune = 0
        self.dropped_records = 0
        self.recovered = 0
        self.write_failures = 0
        self.late = 0  # settlements of what another proxy had settled already

    @property
    def open_reservations(self) -> int:
        return len(self._open)

    async def reserve(
        self,
        reservation_id: str,
        rules: Iterable[BudgetRule],
        amounts: Mapping[str, int],
        purpose: Purpose,
    ) -> Reservation:
        if len(self._next.opening) >= MAX_OPENING:
            raise ApiError(503, "too many requests wait for the ledger", retry_after_s=1)
        wall_s = self._clock.wall()
        opening = _Opening(
            reservation_id,
            [Account(rule.account_id(wall_s), rule.unit, rule.limit) for rule in rules],
            dict(amounts),
            purpose,
            wall_s,
            asyncio.get_running_loop().create_future(),
        )
        self._next.opening.append(opening)
        self._wake.set()
        try:
            outcome = await opening.done
        except StoreError as error:
            raise ApiError(503, f"the ledger cannot be written: {error}", retry_after_s=1) from None
        except asyncio.CancelledError:
            # Nothing has left the proxy.
            if opening in self._next.opening:
                self._next.opening.remove(opening)
            else:
                self._end(reservation_id, None)
            raise
        if isinstance(outcome, Refused):
            raise refusal(outcome)
        self._open.add(reservation_id)
        return outcome

    def settle(
        self, reservation: Reservation, amounts: Mapping[str, int], *, estimated: bool = False
    ) -> None:
        if reservation.request_id in self._open:
            self._open.discard(reservation.request_id)
            self._end(reservation.request_id, dict(amounts))

    def release(self, reservation: Reservation) -> None:
        if reservation.request_id in self._open:
            self._open.discard(reservation.request_id)
            self._end(reservation.request_id, None)

    def book(self, purpose: Purpose, sums: Sums) -> None:
        self._soon()
        day = self._next.spend.get((self._day(), purpose))
        if day is None:
            self._next.spend[self._day(), purpose] = sums
        else:
            day.add(sums)

    def log_request(
        self, request_id: str, key: str, wall_s: float, document: bytes, client_id: str = ""
    ) -> None:
        if self.max_rows == 0:
            return
        if len(self._next.requests) >= MAX_UNWRITTEN:
            self.dropped_records += 1
            return
        self._next.requests.append((request_id, key, wall_s, document.decode(), client_id))

    async def find_request(self, request_id: str, key: str | None) -> list[str]:
        return await self._find(_FIND_REQUEST, request_id, key)

    async def find_named(self, client_id: str, key: str | None) -> list[str]:
        return await self._find(_FIND_NAMED, client_id, key)

    async def _find(self, sql: str, *named: str | None) -> list[str]:
        try:
            rows = await self._database.read(sql, *named)
        except StoreError as error:
            raise ApiError(503, f"the request log cannot be read: {error}") from None
        return [row["document"] for row in rows]

    async def spend(self, days: int) -> list[dict[str, Any]]:
        first = budgets.period_name("day", self._clock.wall() - (days - 1) * 86400)
        rows = await self._database.read(
            "SELECT * FROM spend WHERE day >= $1 ORDER BY day DESC, cost_nano DESC", first
        )
        return [dict(row) for row in rows]

    async def identity(self) -> str:
        (row,) = await self._database.read(
            "SELECT concat_ws('/', system_identifier, current_database(), current_schema()) AS id "
            "FROM pg_control_system()"
        )
        return str(row["id"])

    async def accounts(self) -> list[Account]:
        now_s = self._clock.wall()
        current = {budgets.period_name(period, now_s) for period in budgets.PERIODS}
        rows = await self._database.read("SELECT * FROM accounts ORDER BY id")
        return [
            _account(row)
            for row in rows
            if row["reserved"] or row["id"].rpartition("/")[2] in current
        ]

    async def run(self) -> None:
        """Write what changes, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not await self.flush():
                self._wake.set()
                await self._clock.sleep(RETRY_S)

    async def flush(self) -> bool:
        async with self._writing:
            doubtful = self._doubtful
            if doubtful is not None:
                if not await self._try(doubtful):
                    self._refuse(self._next)  # who waits hears of it now, not when it is back
                    return False
                self._doubtful = None
            batch, self._next = self._next, _Batch()
            if not batch:
                return True
            self._number += 1
            batch.owner, batch.number = self._owner, self._number
            if await self._try(batch):
                self._tell(batch)
                return True
            # Whether it happened is not known: the same again takes effect once. Its reservations
            # are refused, and given back in case they were made.
            self._refuse(batch)
            self._doubtful = batch
            return False

    async def open(self) -> None:
        """Write what the last run left in a file because the database was away. Raises
        StoreError."""
        if not self._left_file.exists():
            return
        try:
            batches = [_Batch.from_plain(one) for one in json.loads(self._left_file.read_bytes())]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self._left_file}: not readable ({error}): move it away") from None
        for batch in batches:  # each takes effect once, also if this is cut off in the middle
            await self._write(batch)
        self._left_file.unlink()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if await self.flush():
            return
        left = [batch for batch in (self._doubtful, self._next) if batch]
        self._next.owner, self._next.number = self._owner, self._number + 1
        plain = [batch.to_plain() for batch in left]
        write_atomically(self._left_file, json.dumps(plain).encode())
        _log.warning("the database is away: entries kept", extra={"file": str(self._left_file)})

    # -- inside --------------------------------------------------------------------------------

    def _end(self, reservation_id: str, amounts: dict[str, int] | None) -> None:
        self._soon()
        self._next.ended[reservation_id] = amounts

    def _refuse(self, batch: _Batch) -> None:
        for opening in batch.opening:
            self._end(opening.reservation_id, None)
            if not opening.done.done():
                opening.done.set_exception(StoreError(self._database.failure or "store: away"))
        batch.opening = []

    def _tell(self, batch: _Batch) -> None:
        for opening in batch.opening:
            if opening.done.done():  # cancelled: given back in the next batch
                continue
            assert opening.outcome is not None
            opening.done.set_result(opening.outcome)

    async def _try(self, batch: _Batch) -> bool:
        try:
            await self._write(batch)
        except StoreError:
            self.write_failures += 1
            return False
        return True

    async def _write(self, batch: _Batch) -> None:
        """One transaction, once. Raises StoreError."""
        async with self._database.transaction() as db:
            if await db.fetchval(_TAKE_BATCH, batch.owner, self._name, batch.number) is None:
                return  # it did happen
            await self._write_accounts(db, batch)
            for key, sums in sorted(batch.spend.items(), key=_spend_order):
                await db.execute(_ADD_SPEND, *_spend_row(key, sums))
            if batch.requests:
                await db.executemany(_ADD_REQUEST, batch.requests)
                self._since_prune += len(batch.requests)
                if self._since_prune >= PRUNE_EVERY:
                    self._since_prune = 0
                    await db.execute(_PRUNE_REQUESTS, self.max_rows)

    async def _write_accounts(self, db: Any, batch: _Batch) -> None:
        """What ended first, then what wants to begin, in the order it was asked."""
        held: list[Reservation] = []
        if batch.ended:
            rows = await db.fetch(_END_RESERVATIONS, list(batch.ended))
            held = [_reservation(row) for row in rows]
            self.late += sum(amounts is not None for amounts in batch.ended.values()) - sum(
                batch.ended[one.request_id] is not None for one in held
            )
        asked = {row.account_id: row for opening in batch.opening for row in opening.accounts}
        if asked:
            names = sorted(asked)
            await db.execute(
                _MAKE_ACCOUNTS,
                names,
                [asked[name].unit for name in names],
                [asked[name].limit for name in names],
            )
        wanted = {*asked, *(name for one in held for name in one.account_ids)}
        if not wanted:
            return
        accounts = {
            row["id"]: _account(row) for row in await db.fetch(_LOCK_ACCOUNTS, sorted(wanted))
        }
        for one in held:
            amounts = batch.ended[one.request_id]
            rows = [accounts[name] for name in one.account_ids]
            changed, _ = (
                budgets.release(rows, one)
                if amounts is None
                else budgets.settle(rows, one, amounts)
            )
            accounts |= {row.account_id: row for row in changed}
        opened = []
        for opening in batch.opening:
            rows = [replace(accounts[row.account_id], limit=row.limit) for row in opening.accounts]
            outcome = budgets.reserve(rows, opening.reservation_id, opening.amounts)
            if isinstance(outcome, Refused):
                opening.outcome = outcome
                continue
            changed, opening.outcome = outcome
            accounts |= {row.account_id: row for row in changed}
            opened.append(_reservation_row(opening, self._owner))
        if opened:
            await db.executemany(_ADD_RESERVATION, opened)
        await write_accounts(db, accounts.values())

    def _soon(self) -> None:
        """Have what is in memory written within FLUSH_S."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._due)

    def _due(self) -> None:
        self._timer = None
        self._wake.set()

    def _day(self) -> str:
        number = int(self._clock.wall() // 86400)
        if number != self._today[0]:
            self._today = (number, budgets.period_name("day", number * 86400.0))
        return self._today[1]


async def settle_abandoned(db: Any, owner: str) -> int:
    """Settle in full whatever a dead proxy left open, inside the caller's transaction."""
    rows = await db.fetch("DELETE FROM reservations WHERE owner = $1 RETURNING *", owner)
    if not rows:
        return 0
    held = [(row, _reservation(row)) for row in rows]
    wanted = sorted({name for _, one in held for name in one.account_ids})
    accounts = {row["id"]: _account(row) for row in await db.fetch(_LOCK_ACCOUNTS, wanted)}
    spend: dict[tuple[str, Purpose], Sums] = {}
    for row, one in held:
        changed, settled = budgets.settle_estimated(
            [accounts[name] for name in one.account_ids], one
        )
        accounts |= {account.account_id: account for account in changed}
        nano = settled.amounts.get("nano_dollars", 0)
        purpose = Purpose(row["key"], row["tenant"], row["model"], row["service_type"])
        day = budgets.period_name("day", row["wall_s"])
        spend.setdefault((day, purpose), Sums()).add(
            Sums(requests=1, failed=1, cost_nano=nano, estimated_nano=nano)
        )
    await write_accounts(db, accounts.values())
    for key, sums in sorted(spend.items(), key=_spend_order):
        await db.execute(_ADD_SPEND, *_spend_row(key, sums))
    return len(held)


async def write_accounts(db: Any, accounts: Iterable[Account]) -> None:
    rows = list(accounts)
    await db.execute(
        _WRITE_ACCOUNTS,
        [row.account_id for row in rows],
        [row.limit for row in rows],
        [row.spent for row in rows],
        [row.reserved for row in rows],
    )


def _account(row: Any) -> Account:
    return Account(row["id"], row["unit"], row["bound"], row["spent"], row["reserved"])


def _reservation(row: Any) -> Reservation:
    return Reservation(row["id"], tuple(row["accounts"]), json.loads(row["amounts"]))


def _reservation_row(opening: _Opening, owner: str) -> tuple[Any, ...]:
    purpose = opening.purpose
    return (
        opening.reservation_id, owner, [row.account_id for row in opening.accounts],
        json.dumps(opening.amounts), purpose.key, purpose.tenant, purpose.model,
        purpose.service_type, opening.wall_s,
    )  # fmt: skip


def _spend_order(item: tuple[tuple[str, Purpose], Sums]) -> tuple[str, str, str, str]:
    """One order of locking for all proxies."""
    (day, purpose), _ = item
    return day, purpose.key, purpose.model, purpose.service_type


def _spend_row(key: tuple[str, Purpose], sums: Sums) -> tuple[Any, ...]:
    day, purpose = key
    return (
        day, purpose.key, purpose.tenant, purpose.model, purpose.service_type,
        sums.requests, sums.failed, sums.in_tokens, sums.out_tokens, sums.cost_nano,
        sums.estimated_nano,
    )  # fmt: skip
