"""Texts of items: the last used in memory, all on disk, answers a moment after they came."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.store import StoreError
from intentd.proxy.cache.metrics import CacheMetrics
from intentd.proxy.store.cache import CacheRows, ItemRow

_log = logging.getLogger(__name__)

FLUSH_S: Final = 0.2
RETRY_S: Final = 1.0


class Behind:
    """What is in memory is found before it is on disk; what is forgotten is gone at once.

    memory_bytes: bound on the texts kept in memory. kept: small values as they are on disk.
    before_flush: names and values that may have changed.
    """

    def __init__(
        self,
        rows: CacheRows,
        clock: Clock,
        metrics: CacheMetrics,
        memory_bytes: Callable[[], int],
        before_flush: Callable[[], dict[str, str]],
    ) -> None:
        self.kept: dict[str, str] = {}
        self._rows = rows
        self._clock = clock
        self._metrics = metrics
        self._memory_bytes = memory_bytes
        self._before_flush = before_flush
        self._texts: OrderedDict[str, tuple[ItemRow, int]] = OrderedDict()
        self._texts_bytes = 0
        self._unwritten: dict[str, ItemRow] = {}
        self._writing: dict[str, ItemRow] = {}
        self._gone: list[str] = []
        self._late: list[tuple[str, int, bytes, str]] = []
        self._dirty = asyncio.Event()
        self._flushing = asyncio.Lock()

    def __len__(self) -> int:
        """Items that are not on disk yet."""
        return len(self._unwritten)

    def unwritten(self) -> dict[str, ItemRow]:
        return {**self._writing, **self._unwritten}

    def is_going(self, name: str) -> bool:
        return name in self._gone

    # -- changes -------------------------------------------------------------------------------

    def remember(self, row: ItemRow, size_bytes: int) -> None:
        """Keep its texts in memory, without vectors; the least used go."""
        if row.item_id in self._texts or not row.response:
            return
        bare = replace(row, keys=tuple(replace(key, vector=b"") for key in row.keys))
        self._texts[row.item_id] = bare, size_bytes
        self._texts_bytes += size_bytes
        while self._texts_bytes > self._memory_bytes() and len(self._texts) > 1:
            _, (_, size) = self._texts.popitem(last=False)
            self._texts_bytes -= size

    def write(self, row: ItemRow) -> None:
        self._unwritten[row.item_id] = row
        self._dirty.set()

    def add_vectors(self, late: Iterable[tuple[str, int, bytes, str]]) -> None:
        """(item id, place of the key, vector, space) of items written without them."""
        self._late += late
        self._dirty.set()

    def changed(self) -> None:
        """Something that is kept has changed."""
        self._dirty.set()

    def drop(self, name: str) -> None:
        """Out of memory; on disk it may stay."""
        text = self._texts.pop(name, None)
        if text is not None:
            self._texts_bytes -= text[1]

    def forget(self, name: str) -> None:
        """Out of memory now, off the disk a moment later."""
        self.drop(name)
        if self._unwritten.pop(name, None) is None:
            self._gone.append(name)
        self._dirty.set()

    # -- reading -------------------------------------------------------------------------------

    async def fetch(self, sizes: dict[str, int]) -> dict[str, ItemRow] | None:
        """Items by id, with one look at the disk at most; None when the store refuses.

        sizes: bytes of each that is wanted.
        """
        found: dict[str, ItemRow] = {}
        for name in sizes:
            row = self._unwritten.get(name) or self._writing.get(name)
            if row is None and name in self._texts:
                self._texts.move_to_end(name)
                row = self._texts[name][0]
            if row is not None:
                found[name] = row
        missing = [name for name in sizes if name not in found]
        if not missing:
            return found
        try:
            fetched = await self._rows.fetch(missing)
        except StoreError as error:
            self._metrics.failed("store")
            _log.warning("cache not read", extra={"error": str(error)})
            return None
        for row in fetched:
            found[row.item_id] = row
            self.remember(row, sizes[row.item_id])
        return found

    # -- writing -------------------------------------------------------------------------------

    async def remove(self, names: Sequence[str]) -> None:
        """For good when it returns. Raises StoreError."""
        async with self._flushing:  # a write of them that is under way comes first
            for name in names:
                self.drop(name)
                self._unwritten.pop(name, None)
            await self._rows.remove(names)

    async def run(self) -> None:
        while True:
            await self._dirty.wait()
            await self._clock.sleep(FLUSH_S)
            try:
                await self.flush()
            except StoreError as error:
                self._metrics.failed("store")
                _log.warning("cache not written", extra={"error": str(error)})
                await self._clock.sleep(RETRY_S)

    async def flush(self) -> None:
        """Raises StoreError; then all waits for the next time."""
        async with self._flushing:
            self._dirty.clear()
            try:
                await self._flush()
            except StoreError:
                self._dirty.set()
                raise

    async def _flush(self) -> None:
        if self._unwritten or self._gone:
            self._writing, self._unwritten = self._unwritten, {}
            gone, self._gone = self._gone, []
            try:
                await self._rows.put(list(self._writing.values()), replaces=gone)
            except StoreError:
                self._unwritten = {**self._writing, **self._unwritten}
                self._gone = [*gone, *self._gone]
                raise
            finally:
                self._writing = {}
        if self._late:
            late, self._late = self._late, []
            try:
                await self._rows.set_vectors(late)
            except StoreError:
                self._late = [*late, *self._late]
                raise
        for name, value in self._before_flush().items():
            if value != self.kept.get(name):
                await self._rows.keep(name, value)
                self.kept[name] = value
