"""What the cache keeps on disk, behind one small interface: rows in, rows out, no decisions.

The cache holds its indexes in memory; a store keeps items over restarts and, where several
proxies share one, tells each what the others changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class KeyRow:
    """One typed key of an item. kind: a cached type (prompt, response, chunk, ...).

    vector: its embedding, float16 little endian, b"" while there is none. space: the embedder
    that made it; vectors of another embedder mean nothing.
    """

    kind: str
    text: str
    vector: bytes = b""
    space: str = ""


@dataclass(frozen=True, slots=True)
class ItemRow:
    """One stored object.

    owner: whose it is (a key, a user of a key, a tenant, everybody). scope: hash of everything
    beside the prompt that the answer depends on, "" for an object an application put, which
    depends on nothing. put: given by an application, not by a model's answer to a request.
    expires_wall_s: 0 never. number: the store's own, growing with every write; 0 before the first.
    """

    item_id: str
    owner: str
    response: str
    keys: tuple[KeyRow, ...] = ()
    scope: str = ""
    prompt: str = ""
    source: str = ""
    model: str = ""
    put: bool = False
    cost_nano: int = 0
    out_tokens: int = 0
    wall_s: float = 0.0
    expires_wall_s: float = 0.0
    number: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Items written after a number, oldest first, and ids removed since. upto: where to go on.

    more: this page was cut at its bound.
    """

    items: tuple[ItemRow, ...]
    removed: tuple[str, ...]
    upto: int
    more: bool


@dataclass(frozen=True, slots=True)
class NearKey:
    """A key that a store's own search found: its item, its place in it, the cosine."""

    item_id: str
    place: int
    similarity: float


class VectorSearch(Protocol):
    """A store that compares vectors itself."""

    async def nearest(
        self,
        vector: bytes,
        space: str,
        owners: Sequence[str],
        *,
        kinds: Sequence[str],
        scopes: Sequence[str],
        min_similarity: float,
        limit: int,
    ) -> list[NearKey]:
        """The nearest keys of these owners, best first. vector: as in KeyRow. kinds, scopes: ()
        any. Raises StoreError."""


class CacheRows(Protocol):
    """Every method raises StoreError when the store refuses; then nothing was changed.

    shared: other processes write to it too, so changes must be asked for. vector_search: how the
    store finds neighbours by itself, None where it cannot.
    """

    shared: bool
    vector_search: VectorSearch | None

    async def put(self, items: Sequence[ItemRow], *, replaces: Sequence[str] = ()) -> None:
        """On disk when it returns, with the replaced ones gone, all or nothing. A known id is
        written over."""

    async def remove(self, item_ids: Sequence[str]) -> None:
        """Ids that are not there do no harm."""

    async def fetch(self, item_ids: Sequence[str]) -> list[ItemRow]:
        """Whole items in any order, vectors left out; those not there are left out."""

    async def find(
        self, owners: Sequence[str], *, source: str | None, after: int, most: int
    ) -> list[ItemRow]:
        """Items of these owners (and source) with a number > after, oldest first, no vectors."""

    async def ids(self, owner: str, source: str) -> list[str]:
        """Ids of an owner's items of one source."""

    async def page(self, after: int, most: int) -> Page:
        """For start and following: whole keys with vectors, responses and prompts left empty."""

    async def set_vectors(self, rows: Sequence[tuple[str, int, bytes, str]]) -> None:
        """(item id, place of the key in the item, vector, space)."""

    async def keep(self, name: str, value: str) -> None:
        """A small value under a name, such as a learned threshold."""

    async def kept(self) -> dict[str, str]:
        """All of those."""
