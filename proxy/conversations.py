"""Conversations kept for clients that name one: on disk, and worked on one request at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from intentd.core.prompts.effects import Message
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.store import Store, StoreError
from intentd.proxy.config import ConversationsSection
from intentd.proxy.errors import ApiError


class Conversations:
    """Messages by (key, conversation); no key sees another's."""

    def __init__(self, store: Store, clock: Clock, section: ConversationsSection) -> None:
        self.section = section
        self._store = store
        self._clock = clock
        self._queues: dict[tuple[str, str], deque[asyncio.Future[None]]] = {}

    @contextlib.asynccontextmanager
    async def turn(self, key: str, conversation: str) -> AsyncIterator[None]:
        """Hold the conversation; requests get it in the order in which they came here.

        Raises ApiError 409 when the ones before take too long.
        """
        place = (key, conversation)
        queue = self._queues.setdefault(place, deque())
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(mine)
        try:
            if queue[0] is not mine:
                try:
                    async with asyncio.timeout(self.section.wait_s):
                        await mine
                except TimeoutError:
                    raise ApiError(
                        409, "earlier requests of this conversation take too long", retry_after_s=1
                    ) from None
            yield
        finally:
            queue.remove(mine)
            if not queue:
                self._queues.pop(place, None)
            elif not queue[0].done():
                queue[0].set_result(None)

    async def load(self, key: str, conversation: str, without: Sequence[str] = ()) -> list[Message]:
        """Oldest first. Raises ApiError 503."""
        sql = (
            "SELECT message_id, prompt, response, chat FROM messages "
            "WHERE key = ? AND conversation = ? ORDER BY number DESC LIMIT ?"
        )
        rows = await self._run(
            lambda store: store.read(sql, (key, conversation, self.section.max_messages))
        )
        return [
            Message(
                row["prompt"],
                row["response"],
                tuple(json.loads(row["chat"])) if row["chat"] else (),
                row["message_id"],
            )
            for row in reversed(rows)
            if row["message_id"] not in without
        ]

    async def append(
        self, key: str, conversation: str, message: Message, replaces: Sequence[str]
    ) -> None:
        """On disk when it returns; the replaced answers are gone. Raises ApiError 503."""
        chat = json.dumps(message.chat) if message.chat else ""
        row = (
            key, conversation, message.message_id, message.prompt, message.response, chat,
            self._clock.wall(),
        )  # fmt: skip

        def write(store: Store) -> None:
            with store.transaction() as db:
                for name in replaces:
                    db.execute(
                        "DELETE FROM messages "
                        "WHERE key = ? AND conversation = ? AND message_id = ?",
                        (key, conversation, name),
                    )
                db.execute(
                    "INSERT INTO messages(key, conversation, message_id, prompt, response, chat, "
                    "wall_s) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
                db.execute(
                    "DELETE FROM messages WHERE key = ? AND conversation = ? AND number <= ("
                    "SELECT number FROM messages WHERE key = ? AND conversation = ? "
                    "ORDER BY number DESC LIMIT 1 OFFSET ?)",
                    (key, conversation, key, conversation, self.section.max_messages),
                )
                db.execute(
                    "DELETE FROM messages WHERE number <= (SELECT max(number) FROM messages) - ?",
                    (self.section.max_rows,),
                )

        await self._run(write)

    async def forget(self, key: str, conversation: str) -> int:
        """How many messages went. Raises ApiError 503."""

        def write(store: Store) -> int:
            with store.transaction() as db:
                return db.execute(
                    "DELETE FROM messages WHERE key = ? AND conversation = ?", (key, conversation)
                ).rowcount

        count: int = await self._run(write)
        return count

    async def _run(self, work: Any) -> Any:
        try:
            return await self._store.run(work)
        except StoreError as error:
            raise ApiError(503, f"conversations: {error}", retry_after_s=1) from None
