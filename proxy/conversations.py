"""Conversations kept for clients that name one, in SQLite: worked on one request at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Final

import orjson

from intentd.core.prompts.effects import Message
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.store import Store, StoreError
from intentd.proxy.config import ConversationsSection
from intentd.proxy.errors import ApiError
from intentd.proxy.store import sqlite
from intentd.proxy.store.base import Turn
from intentd.proxy.store.grouped import Grouped

PRUNE_EVERY: Final = 1000
REMEMBER_S: Final = 86400.0
PURGE_EVERY_S: Final = 3600.0


class Conversations:
    """Messages by (key, conversation); no key sees another's. A store.base.Turns."""

    def __init__(self, store: Store, clock: Clock, section: ConversationsSection) -> None:
        self.section = section
        self._store = store
        self._clock = clock
        self._queues: dict[tuple[str, str], deque[asyncio.Future[None]]] = {}
        self.accepting: Grouped[tuple[str, str], int] = Grouped(self._accept)
        self._accepted = 0

    @contextlib.asynccontextmanager
    async def turn(self, key: str, conversation: str) -> AsyncIterator[Turn]:
        place = (key, conversation)
        queue = self._queues.setdefault(place, deque())
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(mine)
        try:
            # Asked for in the order of the queue, so numbers and queue agree.
            sequence = await self.accepting.ask(place)
            if queue[0] is not mine:
                try:
                    async with asyncio.timeout(self.section.wait_s):
                        await mine
                except TimeoutError:
                    raise ApiError(
                        409, "earlier requests of this conversation take too long", retry_after_s=1
                    ) from None
            yield Turn(key, conversation, sequence)
        except StoreError as error:
            raise ApiError(503, f"conversations: {error}", retry_after_s=1) from None
        finally:
            queue.remove(mine)
            if not queue:
                self._queues.pop(place, None)
            elif not queue[0].done():
                queue[0].set_result(None)

    async def load(
        self,
        key: str,
        conversation: str,
        without: Sequence[str] = (),
        before: int = 0,
        newest: int | None = None,
    ) -> list[Message]:
        most = most_rows(self.section, newest, without)
        wanted = (key, conversation, before, most, oldest_wall_s(self.section, self._clock))

        def read(store: Store) -> list[Message]:  # and decoded there, not in the loop
            return read_messages(store.read(sqlite.LOAD_MESSAGES, wanted), without, newest)

        found: list[Message] = await self._run(read) if most else []
        return found

    async def count(self, key: str, conversation: str) -> int:
        rows = await self._run(lambda store: store.read(sqlite.COUNT_MESSAGES, (key, conversation)))
        return int(rows[0][0])

    async def run_purging(self) -> None:
        """Forget what is too old, for ever."""
        while True:
            oldest_s = oldest_wall_s(self.section, self._clock)

            def purge(store: Store, oldest_s: float = oldest_s) -> None:
                with store.transaction() as db:
                    db.execute(sqlite.PRUNE_OLD, (oldest_s,))

            with contextlib.suppress(StoreError):
                await self._store.run(purge)
            await self._clock.sleep(PURGE_EVERY_S)

    async def append(
        self, turn: Turn, message: Message, replaces: Sequence[str], place: int = 0
    ) -> None:
        which = (turn.key, turn.conversation)
        at = replace(turn, sequence=place) if replaces else turn
        wall_s, section = self._clock.wall(), self.section

        def write(store: Store) -> None:
            row = message_row(at, message, wall_s)
            with store.transaction() as db:
                found = [
                    number for name in replaces
                    for (number,) in db.execute(sqlite.FIND_MESSAGE, (*which, name)).fetchall()
                ]  # fmt: skip
                if found:
                    db.execute(sqlite.REPLACE_MESSAGE, (*row[3:], min(found)))
                    for number in set(found) - {min(found)}:
                        db.execute("DELETE FROM messages WHERE number = ?", (number,))
                elif place or not replaces:
                    db.execute(sqlite.ADD_MESSAGE, row)
                db.execute(sqlite.PRUNE_CONVERSATION, (*which, *which, section.max_messages))
                db.execute(sqlite.PRUNE_BYTES, (*which, section.max_bytes))
                db.execute(sqlite.PRUNE_MESSAGES, (section.max_rows,))

        await self._run(write)

    async def remove(self, key: str, conversation: str, message_id: str) -> int:
        def write(store: Store) -> int:
            with store.transaction() as db:
                return db.execute(sqlite.REMOVE_MESSAGE, (key, conversation, message_id)).rowcount

        count: int = await self._run(write)
        return count

    async def names(self, key: str, limit: int, after: str) -> list[dict[str, Any]]:
        rows = await self._run(lambda store: store.read(sqlite.NAMES, (key, after, limit)))
        return [dict(row) for row in rows]

    async def forget(self, turn: Turn) -> int:
        def write(store: Store) -> int:
            with store.transaction() as db:
                return db.execute(
                    "DELETE FROM messages WHERE key = ? AND conversation = ?",
                    (turn.key, turn.conversation),
                ).rowcount

        count: int = await self._run(write)
        return count

    async def _accept(self, places: list[tuple[str, str]]) -> list[int]:
        """Their sequence numbers, on disk. Raises StoreError."""
        wall_s = self._clock.wall()
        before, self._accepted = self._accepted, self._accepted + len(places)
        prune = before // PRUNE_EVERY != self._accepted // PRUNE_EVERY

        def write(store: Store) -> list[int]:
            with store.transaction() as db:
                if prune:
                    db.execute(sqlite.PRUNE_CONVERSATIONS, (wall_s - REMEMBER_S,))
                return [
                    int(db.execute(sqlite.ACCEPT, (*place, wall_s)).fetchone()[0])
                    for place in places
                ]

        return await self._store.run(write)

    async def _run(self, work: Any) -> Any:
        try:
            return await self._store.run(work)
        except StoreError as error:
            raise ApiError(503, f"conversations: {error}", retry_after_s=1) from None


def message_row(turn: Turn, message: Message, wall_s: float) -> tuple[Any, ...]:
    """A message as both stores keep it."""
    chat = _dump(message.chat) if message.chat else ""
    return (
        turn.key, turn.conversation, turn.sequence, message.message_id, message.prompt,
        message.response, chat, wall_s, len(message.prompt) + len(message.response) + len(chat),
    )  # fmt: skip


def _dump(chat: Sequence[Any]) -> str:
    try:
        return orjson.dumps(chat).decode()
    except TypeError:  # half a character, which only Python's own writes down
        return json.dumps(chat)


def most_rows(section: ConversationsSection, newest: int | None, without: Sequence[str]) -> int:
    """Rows to read for the newest messages without some."""
    most = section.max_messages
    return most if newest is None else min(most, newest and newest + len(without))


def oldest_wall_s(section: ConversationsSection, clock: Clock) -> float:
    return clock.wall() - section.max_age_s if section.max_age_s else 0.0


def read_messages(rows: Sequence[Any], without: Sequence[str], newest: int | None) -> list[Message]:
    """rows: newest first. Oldest first."""
    kept = [row for row in rows if row["message_id"] not in without][:newest]
    return [read_message(row) for row in reversed(kept)]


def _load(text: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError:
        return json.loads(text)


def read_message(row: Any) -> Message:
    return Message(
        row["prompt"],
        row["response"],
        tuple(_load(row["chat"])) if row["chat"] else (),
        row["message_id"],
    )
