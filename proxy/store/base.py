"""What the proxy keeps, by whatever keeps it: one SQLite file for one process, or PostgreSQL for
several proxies on one state. proxy.state opens either; the rest of the proxy knows these."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from intentd.core.prompts.budgets import Account, BudgetRule, Reservation
from intentd.core.prompts.effects import Message
from intentd.core.prompts.limits import Rate
from intentd.daemons.kit.claims import Claim
from intentd.proxy.config import ProxyConfig
from intentd.proxy.store.cache import CacheRows


@dataclass(frozen=True, slots=True)
class Purpose:
    """Whom a sum is booked to."""

    key: str
    tenant: str
    model: str
    service_type: str


@dataclass(slots=True)
class Sums:
    """What one day's requests of one purpose came to."""

    requests: int = 0
    failed: int = 0
    in_tokens: int = 0
    out_tokens: int = 0
    cost_nano: int = 0
    estimated_nano: int = 0

    def add(self, other: Sums) -> None:
        self.requests += other.requests
        self.failed += other.failed
        self.in_tokens += other.in_tokens
        self.out_tokens += other.out_tokens
        self.cost_nano += other.cost_nano
        self.estimated_nano += other.estimated_nano


@dataclass(frozen=True, slots=True)
class Turn:
    """A request's place in its conversation: sequence numbers grow in the order of acceptance and
    are never given twice, also not after a restart."""

    key: str
    conversation: str
    sequence: int


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key as it is stored. grants: the JSON text of keys.Grants.to_plain()."""

    key_id: str
    hashed: str
    name: str
    tenant: str
    created_wall_s: float
    expires_wall_s: float | None
    revoked: bool
    grants: str


@dataclass(frozen=True, slots=True)
class FeedbackRow:
    """The last word of a user on an answer."""

    key_id: str
    request_id: str
    good: bool
    comment: str
    wall_s: float


class Books(Protocol):
    """Budgets by the rules of core.prompts.budgets, spend, the request log."""

    dropped_records: int  # entries of the request log lost while the store was away
    recovered: int  # reservations of killed processes, settled in full and marked estimated
    write_failures: int

    @property
    def open_reservations(self) -> int: ...

    async def reserve(
        self,
        reservation_id: str,
        rules: Iterable[BudgetRule],
        amounts: Mapping[str, int],
        purpose: Purpose,
    ) -> Reservation:
        """Hold the amounts on every rule's account; durable when it returns.

        Raises ApiError: 429 insufficient_quota naming the budget, 503 when the store refuses.
        """

    def settle(
        self, reservation: Reservation, amounts: Mapping[str, int], *, estimated: bool = False
    ) -> None:
        """Book what it cost, soon."""

    def release(self, reservation: Reservation) -> None:
        """Give it back: nothing was sent, or the provider refused it."""

    def book(self, purpose: Purpose, sums: Sums) -> None:
        """Add to the day's spend, soon."""

    def log_request(
        self, request_id: str, key: str, wall_s: float, document: bytes, client_id: str = ""
    ) -> None:
        """Put a finished request into the log, soon. client_id: what its client calls it."""

    async def find_request(self, request_id: str, key: str | None) -> list[str]:
        """The document of this key's request (None: any key's), or none. Raises ApiError 503."""

    async def find_named(self, client_id: str, key: str | None) -> list[str]:
        """The documents of requests that their client calls so, newest first, 8 at most.
        Raises ApiError 503."""

    async def spend(self, days: int) -> list[dict[str, Any]]:
        """The books of the last days, newest first, as rows. Raises StoreError."""

    async def identity(self) -> str:
        """The same text for all who share these books; empty: nobody else. Raises StoreError."""

    async def accounts(self) -> list[Account]:
        """The accounts of periods that are not over. Raises StoreError."""

    async def flush(self) -> bool:
        """Write what waits to be written now. False when the store refused."""


class Turns(Protocol):
    """Conversations: their messages, and whose turn it is."""

    def turn(self, key: str, conversation: str) -> AbstractAsyncContextManager[Turn]:
        """Hold the conversation; requests get it in the order of their sequence numbers.

        Raises ApiError: 409 when the ones before take too long, 503 when the store is away.
        """

    async def load(
        self,
        key: str,
        conversation: str,
        without: Sequence[str] = (),
        before: int = 0,
        newest: int | None = None,
    ) -> list[Message]:
        """Oldest first. before: only those with lower sequence numbers. newest: so many of the
        last ones. Raises ApiError 503."""

    async def count(self, key: str, conversation: str) -> int:
        """Its messages. Raises ApiError 503."""

    async def append(
        self, turn: Turn, message: Message, replaces: Sequence[str], place: int = 0
    ) -> None:
        """Durable when it returns. With `replaces` the message takes the place of those answers;
        where none of them is there, it goes to `place`, or nowhere when that is 0.

        Raises ApiError: 409 when the turn was taken away meanwhile, 503 when the store is away.
        """

    async def forget(self, turn: Turn) -> int:
        """How many messages went. Raises ApiError 503."""

    async def remove(self, key: str, conversation: str, message_id: str) -> int:
        """Forget one message; how many went. Raises ApiError 503."""

    async def names(self, key: str, limit: int, after: str) -> list[dict[str, Any]]:
        """This key's conversations by name, from the one after `after`: conversation, messages,
        first_wall_s, last_wall_s. Raises ApiError 503."""


class Rates(Protocol):
    """Request rates by scope."""

    async def take(self, scope: str, rate: Rate) -> float:
        """0, or the seconds after which it would be. Raises ApiError 503."""


class KeyTable(Protocol):
    """Where keys are stored; keys.Keys holds them in memory."""

    async def load(self) -> list[KeyRow]:
        """Raises StoreError."""

    async def write(self, row: KeyRow) -> None:
        """Insert it, or replace its expiry, revocation and grants.

        Raises StoreError, and InputError for a name somebody else has taken meanwhile.
        """


class FeedbackTable(Protocol):
    """What users said of answers: a row a request, the newest of them kept."""

    async def write(self, row: FeedbackRow) -> None:
        """Durable when it returns; a later word replaces it. Raises StoreError."""

    async def find(self, key_id: str, request_id: str) -> FeedbackRow | None:
        """Raises StoreError."""


class State(Protocol):
    """Everything together, opened."""

    @property
    def books(self) -> Books: ...

    @property
    def turns(self) -> Turns: ...

    @property
    def rates(self) -> Rates: ...

    @property
    def key_table(self) -> KeyTable: ...

    @property
    def feedback_rows(self) -> FeedbackTable: ...

    @property
    def cache_rows(self) -> CacheRows: ...

    async def start(
        self, tasks: asyncio.TaskGroup, reload_keys: Callable[[], Awaitable[None]]
    ) -> None:
        """Write and watch until the tasks are cancelled. reload_keys: called when another proxy
        changed one."""

    async def prove(self) -> list[Claim]:
        """What ``intentctl doctor`` asks of the books. Raises StoreError."""

    async def close(self) -> None:
        """Write the rest and let go."""

    def reload(self, config: ProxyConfig) -> None:
        """Take the bounds of a new configuration."""

    def unready(self) -> list[str]:
        """Why the store does not take writes now."""
