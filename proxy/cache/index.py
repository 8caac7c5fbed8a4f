"""Nearest neighbours by cosine: every vector is looked at, in memory, one matrix an owner.

Rows are signed bytes with a scale each, the query 16-bit integers: a cosine is off by about .0005,
and 100,000 vectors of 384 are 38 MB instead of 154. The sums are made by a few lines of C
(`scan.c`; 2.3 ms for 100,000, bound by memory), or by numpy where they could not be compiled.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

FIRST_ROWS: Final = 16
LOOKED_AT: Final = 64
BYTE: Final = 127
SUM_BITS: Final = 2**31 - 1
NUMPY_ROWS: Final = 4096
ANY_SCOPE: Final = 0
_COLUMNS: Final = ("code", "scale", "item", "scope", "place", "kind")


@dataclass(frozen=True, slots=True)
class Match:
    """A key that was found: the item's number, the key's place in it, the cosine."""

    item: int
    place: int
    similarity: float


def scope_number(scope: str) -> int:
    """A scope as 63 bits; ANY_SCOPE for ""."""
    if not scope:
        return ANY_SCOPE
    digest = hashlib.blake2b(scope.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) or 1


@cache
def compiled_scan() -> ModuleType | None:
    try:
        return importlib.import_module("intentd.proxy.cache._scan")
    except ImportError:
        return None


def _numpy_scan(
    code: npt.NDArray[np.int8], query: npt.NDArray[np.int16], out: npt.NDArray[np.int32], n: int
) -> None:
    """The same sums: float64 holds them exactly."""
    wide = query.astype(np.float64)
    for first in range(0, n, NUMPY_ROWS):
        rows = slice(first, min(n, first + NUMPY_ROWS))
        out[rows] = code[rows].astype(np.float64) @ wide


class _Segment:
    """The keys of one owner. Columns grow together; a removed row is filled with the last one."""

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.code = np.empty((FIRST_ROWS, dimensions), np.int8)
        self.scale = np.empty(FIRST_ROWS, np.float32)
        self.item = np.empty(FIRST_ROWS, np.int64)
        self.scope = np.empty(FIRST_ROWS, np.int64)
        self.place = np.empty(FIRST_ROWS, np.int16)
        self.kind = np.empty(FIRST_ROWS, np.uint8)

    def add(self, item: int, place: int, kind: int, scope: int, vector: Array) -> None:
        row = self.count
        if row == len(self.item):
            self._resize(row + row // 2)
        most = float(np.abs(vector).max())
        scale = most / BYTE if most > 0 else 1.0
        self.code[row] = np.rint(vector / scale)
        self.scale[row] = scale
        self.item[row], self.scope[row] = item, scope
        self.place[row], self.kind[row] = place, kind
        self.count += 1

    def remove(self, item: int) -> int:
        rows = np.flatnonzero(self.item[: self.count] == item)
        for row in rows[::-1]:
            last = self.count - 1
            if row != last:
                for name in _COLUMNS:
                    column = getattr(self, name)
                    column[row] = column[last]
            self.count = last
        if FIRST_ROWS < 4 * self.count < len(self.item):
            self._resize(2 * self.count)
        return len(rows)

    def _resize(self, size: int) -> None:
        for name in _COLUMNS:
            old = getattr(self, name)
            fresh = np.empty((size, *old.shape[1:]), old.dtype)
            fresh[: self.count] = old[: self.count]
            setattr(self, name, fresh)

    def cosines(self, query: npt.NDArray[np.int16], unit: float) -> Array:
        """unit: what one step of the query is worth."""
        sums = np.empty(self.count, np.int32)
        kernel = compiled_scan()
        if kernel is not None:
            kernel.scan(self.code, query, sums, self.count)
        else:
            _numpy_scan(self.code, query, sums, self.count)
        found: Array = sums * (self.scale[: self.count] * np.float32(unit))
        return found


class VectorIndex:
    """Keys of all owners; a search sees only the owners it names."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        # sums of `dimensions` products of a byte and a step of the query fit 32 bits
        self._most = min(2**15 - 1, SUM_BITS // (BYTE * dimensions))
        self._count = 0
        self._segments: dict[str, _Segment] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def owners(self) -> int:
        return len(self._segments)

    @property
    def size_bytes(self) -> int:
        return sum(
            getattr(segment, name).nbytes
            for segment in self._segments.values()
            for name in _COLUMNS
        )

    def add(
        self, owner: str, item: int, place: int, kind: int, scope: int, vector: npt.NDArray[Any]
    ) -> None:
        """vector: of length 1. scope: ANY_SCOPE or a `scope_number`."""
        segment = self._segments.get(owner)
        if segment is None:
            segment = self._segments[owner] = _Segment(self.dimensions)
        segment.add(item, place, kind, scope, np.asarray(vector, np.float32))
        self._count += 1

    def remove(self, owner: str, item: int) -> int:
        """How many keys of the item went."""
        segment = self._segments.get(owner)
        if segment is None:
            return 0
        gone = segment.remove(item)
        self._count -= gone
        if not segment.count:
            del self._segments[owner]
        return gone

    def search(
        self,
        owners: Sequence[str],
        vector: npt.NDArray[Any],
        *,
        kinds: Collection[int] = (),
        scopes: Collection[int] = (),
        min_similarity: float = -1.0,
        limit: int = 1,
        allowed: Callable[[int], bool] | None = None,
    ) -> list[Match]:
        """The nearest items, best first, each once by its nearest key.

        kinds, scopes: () any. allowed: asked for each item before it is taken.
        """
        asked = np.asarray(vector, np.float32)
        most = float(np.abs(asked).max())
        if not most > 0:
            return []
        unit = most / self._most
        query = np.rint(asked / unit).astype(np.int16)
        found: dict[int, Match] = {}
        for owner in dict.fromkeys(owners):
            segment = self._segments.get(owner)
            if segment is None:
                continue
            cosines = segment.cosines(query, unit)
            mask = cosines >= min_similarity
            for column, wanted in ((segment.kind, kinds), (segment.scope, scopes)):
                if wanted:
                    mask &= _among(column[: segment.count], wanted)
            rows = np.flatnonzero(mask)
            for match in _best(segment, cosines[rows], rows, limit, allowed):
                known = found.get(match.item)
                if known is None or known.similarity < match.similarity:
                    found[match.item] = match
        return sorted(found.values(), key=lambda match: -match.similarity)[:limit]


def _among(column: npt.NDArray[Any], wanted: Collection[int]) -> npt.NDArray[np.bool_]:
    found = np.zeros(len(column), bool)
    for one in wanted:
        found |= column == one
    return found


def _best(
    segment: _Segment,
    cosines: Array,
    rows: npt.NDArray[np.intp],
    limit: int,
    allowed: Callable[[int], bool] | None,
) -> list[Match]:
    """Walk from the nearest on until `limit` items are taken; sorts only as far as it walks."""
    taken: dict[int, Match] = {}
    refused: set[int] = set()
    block = max(LOOKED_AT, 2 * limit)
    while len(rows) and len(taken) < limit:
        if len(rows) > block:
            order = np.argpartition(-cosines, block - 1)
            near, far = order[:block], order[block:]
        else:
            near, far = np.arange(len(rows)), np.arange(0)
        for place in near[np.argsort(-cosines[near], kind="stable")]:
            row = int(rows[place])
            item = int(segment.item[row])
            if item in taken or item in refused:
                continue
            if allowed is not None and not allowed(item):
                refused.add(item)
                continue
            taken[item] = Match(item, int(segment.place[row]), float(cosines[place]))
            if len(taken) == limit:
                break
        cosines, rows = cosines[far], rows[far]
        block *= 4
    return list(taken.values())
