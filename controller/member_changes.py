"""What was changed at members (reloads, drains, tokens), from their reports onto the audit log."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from intentd.controller.audit import AuditLog
from intentd.daemons.kit.changes import Change, changes_from_plain
from intentd.daemons.kit.store import StoreError

_log = logging.getLogger(__name__)

MAX_WAITING: Final = 1000


class MemberChanges:
    """Takes reports as they come, and writes in a task of its own, in order.

    Members repeat what they told, so what finds no place or no disk is written later.
    """

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._written: dict[str, tuple[str, int]] = {}  # member -> boot, number
        self._waiting: asyncio.Queue[tuple[str, str, list[Change]]] = asyncio.Queue(MAX_WAITING)

    def take(self, member: str, boot: str, value: object) -> None:
        """Of one report. Raises InputError."""
        changes = changes_from_plain(value)
        last = max((change.number for change in changes), default=0)
        known = self._written.get(member)
        news = known is None or known[0] != boot or known[1] < last
        if last and news and not self._waiting.full():
            self._waiting.put_nowait((member, boot, changes))

    async def run(self) -> None:
        while True:
            member, boot, changes = await self._waiting.get()
            if self._written.get(member) == (boot, changes[-1].number):
                continue  # a repeat that came before this was written
            try:
                await self._audit.add_of_member(member, boot, changes)
            except StoreError as error:
                _log.warning("not on the audit log", extra={"member": member, "error": str(error)})
            else:
                self._written[member] = (boot, changes[-1].number)
