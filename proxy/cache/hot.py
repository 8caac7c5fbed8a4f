"""What is in memory of every item: enough to find it, to judge it, and to choose who goes."""

from __future__ import annotations

import heapq
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from intentd.core.prompts.cache.keys import exact_key
from intentd.proxy.store.cache import ItemRow

ENTRY_BYTES: Final = 400
SPENT: Final = 1000  # deadlines of entries that went before them, at least, before these go too


@dataclass(slots=True)
class Entry:
    """One item without its texts. number: this process's own, for the index."""

    number: int
    item_id: str
    owner: str
    scope: str
    source: str
    model: str
    put: bool
    cost_nano: int
    out_tokens: int
    wall_s: float
    expires_wall_s: float
    size_bytes: int
    exact: tuple[bytes, ...]


def exact_keys(row: ItemRow) -> tuple[bytes, ...]:
    """Under what an equal prompt finds it: prompts only, a question may be about a part of it."""
    scope = exact_scope(row.owner, row.scope)
    return tuple(
        dict.fromkeys(
            bytes.fromhex(exact_key(scope, key.text)) for key in row.keys if key.kind == "prompt"
        )
    )


def exact_scope(owner: str, scope: str) -> str:
    """A put object's scope is its owner; an answer's holds its owner already."""
    return scope or f"put:{owner}"


def size_of(row: ItemRow) -> int:
    """Bytes that an item counts for: texts on disk, vectors, what memory holds of it."""
    texts = len(row.prompt) + len(row.response) + len(row.source)
    return ENTRY_BYTES + texts + sum(len(key.text) + 800 for key in row.keys)


class Hot:
    """Entries by number, by id and by exact key; answers in order of use, deadlines in a heap."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.put_count = 0
        self.put_bytes = 0
        self._entries: dict[int, Entry] = {}
        self._numbers: dict[str, int] = {}
        self._exact: dict[bytes, int] = {}
        self._used: OrderedDict[int, None] = OrderedDict()
        self._deadlines: list[tuple[float, int]] = []
        self._next = 1

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    @property
    def newest(self) -> int:
        """The last number given."""
        return self._next - 1

    def get(self, number: int) -> Entry | None:
        return self._entries.get(number)

    def by_id(self, item_id: str) -> Entry | None:
        number = self._numbers.get(item_id)
        return None if number is None else self._entries[number]

    def number_of(self, item_id: str) -> int | None:
        return self._numbers.get(item_id)

    def by_exact(self, key: bytes) -> Entry | None:
        number = self._exact.get(key)
        return None if number is None else self._entries.get(number)

    def add(self, row: ItemRow, size_bytes: int = 0) -> Entry:
        """A new entry; the newest wins an exact key. The id must not be there."""
        entry = Entry(
            self._next, row.item_id, sys.intern(row.owner), row.scope, sys.intern(row.source),
            sys.intern(row.model), row.put, row.cost_nano, row.out_tokens, row.wall_s,
            row.expires_wall_s, size_bytes or size_of(row), exact_keys(row),
        )  # fmt: skip
        self._next += 1
        self._entries[entry.number] = entry
        self._numbers[entry.item_id] = entry.number
        for key in entry.exact:
            self._exact[key] = entry.number
        self.size_bytes += entry.size_bytes
        if entry.put:
            self.put_count += 1
            self.put_bytes += entry.size_bytes
        else:
            self._used[entry.number] = None
        if entry.expires_wall_s:
            heapq.heappush(self._deadlines, (entry.expires_wall_s, entry.number))
        return entry

    def drop(self, entry: Entry) -> None:
        if self._entries.pop(entry.number, None) is None:
            return
        self._numbers.pop(entry.item_id, None)
        for key in entry.exact:
            if self._exact.get(key) == entry.number:
                del self._exact[key]
        self._used.pop(entry.number, None)
        self.size_bytes -= entry.size_bytes
        if entry.put:
            self.put_count -= 1
            self.put_bytes -= entry.size_bytes
        if len(self._deadlines) > 2 * len(self._entries) + SPENT:
            self._deadlines = [row for row in self._deadlines if row[1] in self._entries]
            heapq.heapify(self._deadlines)

    def touch(self, entry: Entry) -> None:
        if entry.number in self._used:
            self._used.move_to_end(entry.number)

    def least_used(self) -> Entry | None:
        """The answer not used for longest; None when only put objects are left."""
        number = next(iter(self._used), None)
        return None if number is None else self._entries[number]

    def expired(self, wall_s: float) -> list[Entry]:
        """Entries whose time is over, each told once."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= wall_s:
            entry = self._entries.get(heapq.heappop(self._deadlines)[1])
            if entry is not None:
                found.append(entry)
        return found
