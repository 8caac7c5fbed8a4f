"""Conversations that several proxies work on: one request at a time, in the order of acceptance.

Accepting a request puts a ticket with the conversation's next sequence number into the database,
durably. The ticket with the lowest number has the turn; taking it out hands the turn on, inside
the proxy at once, to another proxy by NOTIFY. A proxy that is not heard of for its lease loses its
tickets (postgres.lease), so an abandoned head does not hold up the others; should it come back, its
answer joins nothing: appending demands the ticket. Whatever notice is lost, every proxy looks
for its turns once in a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from intentd.core.prompts.effects import Message
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.postgres import Database
from intentd.daemons.kit.store import StoreError
from intentd.proxy.config import ConversationsSection
from intentd.proxy.conversations import (
    PRUNE_EVERY,
    PURGE_EVERY_S,
    REMEMBER_S,
    message_row,
    most_rows,
    oldest_wall_s,
    read_messages,
)
from intentd.proxy.errors import ApiError
from intentd.proxy.store.base import Turn
from intentd.proxy.store.grouped import Grouped

CHANNEL: Final = "intentd_turns"
LARGE_CHARS: Final = 1 << 18  # decoding more would hold other requests up
_Place = tuple[str, str]

# The row lock orders accepting and handing on: whoever comes second sees what the first did.
_NUMBER: Final = (
    "INSERT INTO conversations AS c(key, conversation, last, wall_s) "
    "SELECT key, conversation, n, $4 "
    "FROM unnest($1::text[], $2::text[], $3::bigint[]) AS u(key, conversation, n) "
    "ORDER BY key, conversation ON CONFLICT(key, conversation) DO UPDATE "
    "SET last = c.last + excluded.last, wall_s = excluded.wall_s "
    "RETURNING key, conversation, last"
)
_LOCK: Final = (
    "SELECT 1 FROM conversations WHERE (key, conversation) IN "
    "(SELECT * FROM unnest($1::text[], $2::text[])) ORDER BY key, conversation FOR UPDATE"
)
_ADD_TICKETS: Final = (
    "INSERT INTO tickets(key, conversation, sequence, owner) "
    "SELECT key, conversation, sequence, $4 "
    "FROM unnest($1::text[], $2::text[], $3::bigint[]) AS u(key, conversation, sequence)"
)
_REMOVE_TICKETS: Final = (
    "DELETE FROM tickets t USING unnest($1::text[], $2::text[], $3::bigint[]) "
    "AS u(key, conversation, sequence) WHERE t.key = u.key AND t.conversation = u.conversation "
    "AND t.sequence = u.sequence AND t.owner = $4"
)
_HEADS: Final = (
    "SELECT h.* FROM unnest($1::text[], $2::text[]) AS u(key, conversation), LATERAL ("
    "SELECT key, conversation, sequence, owner FROM tickets t WHERE t.key = u.key "
    "AND t.conversation = u.conversation ORDER BY sequence LIMIT 1) h"
)
_HOLD: Final = (
    "SELECT 1 FROM tickets WHERE key = $1 AND conversation = $2 AND sequence = $3 AND owner = $4 "
    "FOR UPDATE"
)
_ADD_MESSAGE: Final = (
    "INSERT INTO messages(key, conversation, sequence, message_id, prompt, response, chat, wall_s, "
    "size_bytes) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
)
_FIND_MESSAGES: Final = (
    "SELECT number FROM messages WHERE key = $1 AND conversation = $2 "
    "AND message_id = ANY($3::text[])"
)
_REPLACE_MESSAGE: Final = (
    "UPDATE messages SET message_id = $1, prompt = $2, response = $3, chat = $4, wall_s = $5, "
    "size_bytes = $6 WHERE number = $7"
)
_REMOVE_MESSAGE: Final = (
    "DELETE FROM messages WHERE key = $1 AND conversation = $2 AND message_id = $3 RETURNING number"
)
# By bytes, as SQLite orders: a page ends where the next one begins, whatever the locale.
_NAMES: Final = (
    "SELECT conversation, count(*) AS messages, min(wall_s) AS first_wall_s, "
    "max(wall_s) AS last_wall_s FROM messages "
    'WHERE key = $1 AND conversation COLLATE "C" > $2 '
    'GROUP BY conversation ORDER BY conversation COLLATE "C" LIMIT $3'
)
_PRUNE_CONVERSATION: Final = (
    "DELETE FROM messages WHERE key = $1 AND conversation = $2 AND number <= ("
    "SELECT number FROM messages WHERE key = $1 AND conversation = $2 "
    "ORDER BY sequence DESC, number DESC LIMIT 1 OFFSET $3)"
)
_PRUNE_BYTES: Final = (
    "DELETE FROM messages WHERE number IN (SELECT number FROM (SELECT number, "
    "sum(size_bytes) OVER w AS held, row_number() OVER w AS place FROM messages "
    "WHERE key = $1 AND conversation = $2 WINDOW w AS (ORDER BY sequence DESC, number DESC)) AS m "
    "WHERE held > $3 AND place > 1)"
)
_PRUNE_MESSAGES: Final = (
    "DELETE FROM messages WHERE number <= (SELECT max(number) FROM messages) - $1"
)
_PRUNE_CONVERSATIONS: Final = (
    "DELETE FROM conversations c WHERE wall_s < $1 "
    "AND NOT EXISTS (SELECT 1 FROM messages m "
    "WHERE m.key = c.key AND m.conversation = c.conversation) "
    "AND NOT EXISTS (SELECT 1 FROM tickets t "
    "WHERE t.key = c.key AND t.conversation = c.conversation)"
)


class _Ticket:
    """A request that waits for or has its turn. sequence: 0 until it is accepted."""

    __slots__ = ("granted", "left", "place", "sequence")

    def __init__(self, place: _Place) -> None:
        self.place = place
        self.sequence = 0
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.left = False

    def grant(self) -> None:
        if not self.granted.done():
            self.granted.set_result(None)


class SharedConversations:
    """A store.base.Turns; accepting.run() and run_handing() must be running."""

    def __init__(
        self, database: Database, clock: Clock, section: ConversationsSection, owner: str
    ) -> None:
        self.section = section
        self._database = database
        self._clock = clock
        self._owner = owner
        self._mine: dict[_Place, dict[int, _Ticket]] = {}
        self._unknown: set[tuple[str, str, int]] = set()
        self._appended = 0
        self.accepting: Grouped[_Ticket, None] = Grouped(self._accept)
        self._leaving: list[_Ticket] = []
        self._leave = asyncio.Event()

    @contextlib.asynccontextmanager
    async def turn(self, key: str, conversation: str) -> AsyncIterator[Turn]:
        ticket = _Ticket((key, conversation))
        try:
            try:
                await self.accepting.ask(ticket)
            except StoreError as error:
                raise _away(error) from None
            try:
                async with asyncio.timeout(self.section.wait_s):
                    await ticket.granted
            except TimeoutError:
                raise ApiError(
                    409, "earlier requests of this conversation take too long", retry_after_s=1
                ) from None
            yield Turn(key, conversation, ticket.sequence)
        finally:
            ticket.left = True
            if ticket.sequence:
                self._hand_on(ticket)

    async def load(
        self,
        key: str,
        conversation: str,
        without: Sequence[str] = (),
        before: int = 0,
        newest: int | None = None,
    ) -> list[Message]:
        sql = (
            "SELECT message_id, prompt, response, chat FROM messages WHERE key = $1 "
            "AND conversation = $2 AND ($4::bigint = 0 OR sequence < $4) AND wall_s >= $5 "
            "ORDER BY sequence DESC, number DESC LIMIT $3"
        )
        most = most_rows(self.section, newest, without)
        if not most:
            return []
        oldest_s = oldest_wall_s(self.section, self._clock)
        try:
            rows = await self._database.read(sql, key, conversation, most, before, oldest_s)
        except StoreError as error:
            raise _away(error) from None
        if sum(len(row["chat"]) for row in rows) < LARGE_CHARS:
            return read_messages(rows, without, newest)
        return await asyncio.to_thread(read_messages, rows, without, newest)

    async def count(self, key: str, conversation: str) -> int:
        sql = "SELECT count(*) AS n FROM messages WHERE key = $1 AND conversation = $2"
        try:
            (row,) = await self._database.read(sql, key, conversation)
        except StoreError as error:
            raise _away(error) from None
        return int(row["n"])

    async def run_purging(self) -> None:
        """Forget what is too old, for ever."""
        while True:
            oldest_s = oldest_wall_s(self.section, self._clock)
            with contextlib.suppress(StoreError):
                async with self._database.transaction() as db:
                    await db.execute("DELETE FROM messages WHERE wall_s < $1", oldest_s)
            await self._clock.sleep(PURGE_EVERY_S)

    async def append(
        self, turn: Turn, message: Message, replaces: Sequence[str], place: int = 0
    ) -> None:
        at = replace(turn, sequence=place) if replaces else turn
        row = message_row(at, message, self._clock.wall())
        which = (turn.key, turn.conversation)
        self._appended += 1
        try:
            async with self._database.transaction() as db:
                await self._hold(db, turn)
                found = await db.fetch(_FIND_MESSAGES, *which, list(replaces)) if replaces else []
                if found:
                    first, *more = sorted(row["number"] for row in found)
                    await db.execute(_REPLACE_MESSAGE, *row[3:], first)
                    await db.execute("DELETE FROM messages WHERE number = ANY($1::bigint[])", more)
                elif place or not replaces:
                    await db.execute(_ADD_MESSAGE, *row)
                await db.execute(_PRUNE_CONVERSATION, *which, self.section.max_messages)
                await db.execute(_PRUNE_BYTES, *which, self.section.max_bytes)
                if self._appended % PRUNE_EVERY == 0:
                    await db.execute(_PRUNE_MESSAGES, self.section.max_rows)
                    await db.execute(_PRUNE_CONVERSATIONS, self._clock.wall() - REMEMBER_S)
        except StoreError as error:
            raise _away(error) from None

    async def remove(self, key: str, conversation: str, message_id: str) -> int:
        try:
            async with self._database.transaction() as db:
                rows = await db.fetch(_REMOVE_MESSAGE, key, conversation, message_id)
        except StoreError as error:
            raise _away(error) from None
        return len(rows)

    async def names(self, key: str, limit: int, after: str) -> list[dict[str, Any]]:
        try:
            rows = await self._database.read(_NAMES, key, after, limit)
        except StoreError as error:
            raise _away(error) from None
        return [dict(row) for row in rows]

    async def forget(self, turn: Turn) -> int:
        try:
            async with self._database.transaction() as db:
                await self._hold(db, turn)
                done: str = await db.execute(
                    "DELETE FROM messages WHERE key = $1 AND conversation = $2",
                    turn.key,
                    turn.conversation,
                )
        except StoreError as error:
            raise _away(error) from None
        return int(done.rpartition(" ")[2])

    async def run_handing(self) -> None:
        """Take out the tickets of those who have finished; again while the database is away."""
        while True:
            await self._leave.wait()
            self._leave.clear()
            group, self._leaving = self._leaving, []
            try:
                await self._remove(group)
            except StoreError:
                self._leaving = group + self._leaving
                self._leave.set()
                await self._clock.sleep(0.2)

    async def close(self) -> None:
        """Take out the rest; what cannot be passes on with the lease."""
        group, self._leaving = self._leaving, []
        if group:
            with contextlib.suppress(StoreError):
                await self._remove(group)

    def noticed(self, text: str) -> None:
        """A turn handed over by another proxy."""
        try:
            owner, key, conversation, sequence = json.loads(text)
        except ValueError:
            return
        if owner == self._owner:
            self._grant((key, conversation), sequence)

    async def look(self) -> None:
        """Find the turns whose notice was lost, and tickets of ours that nobody waits for (of an
        acceptance whose commit was cut off). Raises StoreError."""
        places = [place for place, mine in self._mine.items() if mine]
        sql = "SELECT key, conversation, sequence FROM tickets WHERE owner = $1"
        async with self._database.transaction() as db:
            if places:
                for row in await db.fetch(_HEADS, *_columns(places)):
                    self._found(row)
            rows = {
                (r["key"], r["conversation"], r["sequence"])
                for r in await db.fetch(sql, self._owner)
            }
        known = {(*place, number) for place, mine in self._mine.items() for number in mine}
        leaving = {(*ticket.place, ticket.sequence) for ticket in self._leaving}
        unknown = rows - known - leaving
        # Twice in a row: the first time it may just have been accepted or be on its way out.
        lost, self._unknown = unknown & self._unknown, unknown
        for key, conversation, sequence in lost:
            ticket = _Ticket((key, conversation))
            ticket.sequence = sequence
            self._hand_on(ticket)

    # -- inside --------------------------------------------------------------------------------

    async def _accept(self, tickets: list[_Ticket]) -> list[None]:
        """Number them in the order they came, durably. Raises StoreError."""
        counts: dict[_Place, int] = {}
        for ticket in tickets:
            counts[ticket.place] = counts.get(ticket.place, 0) + 1
        places = sorted(counts)
        columns = _columns(places)
        async with self._database.transaction() as db:
            rows = await db.fetch(
                _NUMBER, *columns, [counts[place] for place in places], self._clock.wall()
            )
            ends = {(row["key"], row["conversation"]): int(row["last"]) for row in rows}
            numbers = []
            for ticket in tickets:
                numbers.append(ends[ticket.place] - counts[ticket.place] + 1)
                counts[ticket.place] -= 1
            await db.execute(
                _ADD_TICKETS, *_columns([ticket.place for ticket in tickets]), numbers, self._owner
            )
            heads = await db.fetch(_HEADS, *columns)
        for ticket, number in zip(tickets, numbers, strict=True):
            ticket.sequence = number
            self._mine.setdefault(ticket.place, {})[number] = ticket
        for row in heads:
            self._found(row)
        for ticket in tickets:
            if ticket.left:  # its client went away while it was accepted
                self._hand_on(ticket)
        return [None] * len(tickets)

    async def _remove(self, tickets: list[_Ticket]) -> None:
        places = sorted({ticket.place for ticket in tickets})
        columns = _columns(places)
        async with self._database.transaction() as db:
            await db.execute(_LOCK, *columns)
            await db.execute(
                _REMOVE_TICKETS,
                *_columns([ticket.place for ticket in tickets]),
                [ticket.sequence for ticket in tickets],
                self._owner,
            )
            heads = await db.fetch(_HEADS, *columns)
            await notify(db, (row for row in heads if row["owner"] != self._owner))
        for row in heads:
            self._found(row)

    async def _hold(self, db: Any, turn: Turn) -> None:
        """The turn must still be ours until the commit. Raises ApiError 409."""
        held = await db.fetchval(_HOLD, turn.key, turn.conversation, turn.sequence, self._owner)
        if held is None:
            raise ApiError(
                409, "this proxy was away too long: the conversation went on", retry_after_s=1
            )

    def _hand_on(self, ticket: _Ticket) -> None:
        mine = self._mine.get(ticket.place)
        if mine is not None:
            mine.pop(ticket.sequence, None)
            if not mine:
                del self._mine[ticket.place]
        self._leaving.append(ticket)
        self._leave.set()

    def _found(self, row: Any) -> None:
        if row["owner"] == self._owner:
            self._grant((row["key"], row["conversation"]), row["sequence"])

    def _grant(self, place: _Place, sequence: int) -> None:
        ticket = self._mine.get(place, {}).get(sequence)
        if ticket is not None:
            ticket.grant()


async def take_tickets(db: Any, owner: str) -> int:
    """Take a dead proxy's tickets out and tell whose turn it is now, in the caller's
    transaction."""
    sql = "SELECT DISTINCT key, conversation FROM tickets WHERE owner = $1 ORDER BY 1, 2"
    places = [(row["key"], row["conversation"]) for row in await db.fetch(sql, owner)]
    if not places:
        return 0
    columns = _columns(places)
    await db.execute(_LOCK, *columns)
    done: str = await db.execute("DELETE FROM tickets WHERE owner = $1", owner)
    await notify(db, await db.fetch(_HEADS, *columns))
    return int(done.rpartition(" ")[2])


async def notify(db: Any, heads: Iterable[Any]) -> None:
    texts = [
        json.dumps([row["owner"], row["key"], row["conversation"], row["sequence"]])
        for row in heads
    ]
    if texts:
        await db.execute("SELECT pg_notify($2, t) FROM unnest($1::text[]) AS t", texts, CHANNEL)


def _columns(places: Sequence[_Place]) -> tuple[list[str], list[str]]:
    return [place[0] for place in places], [place[1] for place in places]


def _away(error: StoreError) -> ApiError:
    return ApiError(503, f"conversations: {error}", retry_after_s=1)
