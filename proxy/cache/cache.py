"""The cache: what it holds in memory, what is on disk, and who may be answered from it.

Answers of models are written behind (a crash loses the last fifth of a second of them, which costs
money, not truth); objects that an application puts are on disk before it is told so. Answers make
room for newer ones; put objects never do: a put that does not fit is refused.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from intentd.core.prompts.cache.keys import exact_key
from intentd.core.prompts.effects import CacheFound, CacheItem, LookupCache, StoreCache
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.store import StoreError
from intentd.proxy.cache.asker import Asker
from intentd.proxy.cache.behind import RETRY_S, Behind
from intentd.proxy.cache.hot import Entry, Hot, exact_scope, size_of
from intentd.proxy.cache.metrics import CacheMetrics
from intentd.proxy.config_cache import CacheSection
from intentd.proxy.errors import ApiError
from intentd.proxy.store.cache import CacheRows, ItemRow, KeyRow

if TYPE_CHECKING:
    from intentd.core.prompts.request import Gate
    from intentd.proxy.cache.index import Match
    from intentd.proxy.cache.semantic import Semantic, ToEmbed

_log = logging.getLogger(__name__)

TIDY_S: Final = 5.0
FOLLOW_S: Final = 1.0
PAGE_ROWS: Final = 1000
EMBEDDED_AT_ONCE: Final = 32
MAX_WAITING: Final = 10_000
EMBED_TIMEOUT_S: Final = 5.0
THRESHOLDS: Final = "thresholds"


@dataclass(frozen=True, slots=True)
class Found:
    """An item as GET shows it: which of its keys matched, and how well."""

    row: ItemRow
    kind: str
    key: str
    similarity: float


class Cache:
    """open() first; run() works in the background until cancelled, close() writes the rest.

    make_semantic: builds the semantic half when it is first needed; None when there is none.
    """

    def __init__(
        self,
        section: CacheSection,
        rows: CacheRows,
        clock: Clock,
        make_semantic: Callable[[], Semantic] | None,
    ) -> None:
        self.section = section
        self.metrics = CacheMetrics(self)
        self.semantic: Semantic | None = None
        self.hot = Hot()
        self._rows = rows
        self._clock = clock
        self._make_semantic = make_semantic
        self._behind = Behind(
            rows, clock, self.metrics, lambda: self.section.memory_bytes, self._worth_keeping
        )
        self._to_embed: deque[ToEmbed] = deque()
        self._upto = 0
        self._embeddable = asyncio.Event()
        self._putting = asyncio.Lock()

    # -- life ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Load what is on disk. Raises StoreError."""
        self._behind.kept = await self._rows.kept()
        await self.follow()
        semantic = await self.need_semantic() if self.section.semantic == "on" else None
        if semantic is not None and not self.section.embedder_model:
            await semantic.embedder.embed(["ready"])  # the model is loaded before anybody waits

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._behind.run(), name="cache writer")
            tasks.create_task(self._embed_behind(), name="cache embedder")
            tasks.create_task(self._tidy(), name="cache tidy")
            if self._rows.shared:
                tasks.create_task(self._follow_others(), name="cache follower")

    async def close(self) -> None:
        if self.semantic is not None:
            await self.semantic.embedder.close()
        try:
            await self._behind.flush()
        except StoreError as error:
            _log.warning("cache not written", extra={"error": str(error)})

    @property
    def waiting_for_vectors(self) -> int:
        return len(self._to_embed)

    @property
    def has_semantic(self) -> bool:
        return self.semantic is not None or self._make_semantic is not None

    async def need_semantic(self) -> Semantic | None:
        """The semantic half, built and filled when it is first asked for."""
        if self.semantic is not None or self._make_semantic is None:
            return self.semantic
        make = self._make_semantic
        await asyncio.to_thread(_import_semantic)  # half a second in which others are served
        if self._make_semantic is not make:
            return self.semantic  # somebody else was first
        semantic, self._make_semantic = make(), None
        semantic.recall(self._behind.kept.get(THRESHOLDS, ""))
        self.semantic = semantic  # from now on what is taken is indexed as it comes
        newest = self.hot.newest
        unwritten = self._behind.unwritten()
        for row in unwritten.values():
            entry = self.hot.by_id(row.item_id)
            if entry is not None:
                self._wait_for_vectors(semantic.add(entry.number, row))
        after, more = 0, True
        while more:
            try:
                page = await self._rows.page(after, PAGE_ROWS)
            except StoreError as error:
                _log.warning("cache's vectors not read", extra={"error": str(error)})
                break
            for row in page.items:
                entry = self.hot.by_id(row.item_id)
                if entry is not None and entry.number <= newest and row.item_id not in unwritten:
                    self._wait_for_vectors(semantic.add(entry.number, row))
            after, more = page.upto, page.more
        return semantic

    # -- the pipeline's effects ----------------------------------------------------------------

    async def lookup(self, effect: LookupCache, asker: Asker) -> CacheFound:
        if effect.exact:
            return await self._exact(effect, asker)
        return await self._similar(effect, asker)

    async def _exact(self, effect: LookupCache, asker: Asker) -> CacheFound:
        keys = [exact_key(asker.scope(effect.context_hash), effect.text)]
        if effect.given:
            keys += [exact_key(exact_scope(owner, ""), effect.text) for owner in asker.readable]
        for key in keys:
            entry = self.hot.by_exact(bytes.fromhex(key))
            if entry is None or not self._serves(entry, effect, asker):
                continue
            row = await self.row(entry)
            if row is not None:
                return CacheFound((self._item(entry, row, "prompt", effect.text, 1.0),))
        return CacheFound()

    async def _similar(self, effect: LookupCache, asker: Asker) -> CacheFound:
        semantic = await self.need_semantic()
        if semantic is None:
            return CacheFound()
        # "" stands for what depends on nothing: put objects, whoever of the readable put them
        scopes = [asker.scope(effect.context_hash), *([""] if effect.given else [])]

        def serves(number: int) -> bool:
            entry = self.hot.get(number)
            return entry is not None and self._serves(entry, effect, asker)

        started_s = self._clock.now()
        try:
            async with asyncio.timeout(EMBED_TIMEOUT_S):
                matches = await semantic.search(
                    effect.text,
                    asker.readable,
                    kinds=effect.kinds,
                    scopes=scopes,
                    min_similarity=effect.min_similarity,
                    limit=effect.limit,
                    allowed=serves,
                    by=asker.by,
                )
        except Exception as error:  # noqa: BLE001  a cache that fails is a cache that misses
            self.metrics.failed("embedder")
            _log.warning("no semantic lookup", extra={"error": str(error) or type(error).__name__})
            return CacheFound()
        self.metrics.searched(self._clock.now() - started_s)
        return CacheFound(
            tuple(
                self._item(entry, one.row, one.kind, one.key, one.similarity)
                for entry, one in await self._matched(matches)
            )
        )

    async def _matched(self, matches: Iterable[Match]) -> list[tuple[Entry, Found]]:
        """What was found with its texts, in order."""
        entries = [
            (entry, match) for match in matches if (entry := self.hot.get(match.item)) is not None
        ]
        rows = await self.rows_of([entry for entry, _ in entries])
        found = []
        for entry, match in entries:
            row = rows.get(entry.item_id)
            if row is not None and match.place < len(row.keys):
                key = row.keys[match.place]
                found.append((entry, Found(row, key.kind, key.text, min(1.0, match.similarity))))
        return found

    def store(self, effect: StoreCache, asker: Asker) -> str:
        """Keep a model's answer; on disk a moment later. Why it was not kept, or ""."""
        wall_s = self._clock.wall()
        ttl_s = self.section.ttl_s
        row = ItemRow(
            new_id(), asker.owner, effect.response,
            tuple(KeyRow(kind, text) for kind, text in effect.keys),
            asker.scope(effect.context_hash), effect.prompt, "", effect.model, False,
            effect.cost_nano, effect.out_tokens, wall_s, wall_s + ttl_s if ttl_s else 0.0,
        )  # fmt: skip
        size_bytes = size_of(row)
        if size_bytes > self.section.max_item_bytes:
            return "the answer is too large for the cache"
        if len(self._behind) >= MAX_WAITING:
            return "the store does not keep up"
        key = bytes.fromhex(exact_key(row.scope, effect.prompt))
        known = self.hot.by_exact(key)
        if known is not None and not self._over(known, wall_s):
            ranks = asker.ranks
            if ranks.get(known.model, -1) > ranks.get(effect.model, -1):
                return "a dearer model's answer is kept"
            self._forget(known)
        if not self._make_room(size_bytes, 1):
            return "the cache is full of put objects"
        if self.semantic is not None:
            row = self.semantic.with_vectors(row)
        self._take(row, size_bytes)
        self._behind.write(row)
        return ""

    # -- put, get, delete ----------------------------------------------------------------------

    async def put(self, rows: Sequence[ItemRow], *, source: str | None, by: Any = None) -> None:
        """On disk when it returns. source: its owner's objects of that source are replaced.

        Raises ApiError: 413 and 507 for what does not fit, 503 when the store refuses.
        """
        sizes = [size_of(row) for row in rows]
        for size_bytes in sizes:
            if size_bytes > self.section.max_item_bytes:
                raise ApiError(
                    413, f"object: over {self.section.max_item_bytes} bytes", param="object",
                    code="object_too_large",
                )  # fmt: skip
        if await self.need_semantic() is not None:
            rows = await self._embedded(rows, by)
        async with self._putting:
            replaced = await self._replaced(rows, source)
            entries = [entry for name in replaced if (entry := self.hot.by_id(name)) is not None]
            section = self.section
            count = self.hot.put_count + len(rows) - sum(one.put for one in entries)
            size = self.hot.put_bytes + sum(sizes)
            size -= sum(one.size_bytes for one in entries if one.put)
            if count > section.max_items or size > section.max_bytes:
                raise ApiError(
                    507, "the cache is full of put objects: delete some, or raise cache.max_items "
                    "or cache.max_bytes", code="cache_full",
                )  # fmt: skip
            try:
                await self._rows.put(rows, replaces=replaced)
            except StoreError as error:
                raise ApiError(503, f"cache: {error}", retry_after_s=1) from None
            for entry in entries:
                self._drop(entry)
            for row, size_bytes in zip(rows, sizes, strict=True):
                self._make_room(size_bytes, 1)
                self._take(row, size_bytes)

    async def _replaced(self, rows: Sequence[ItemRow], source: str | None) -> list[str]:
        """Ids that these objects take the place of: of their source, and of their prompts."""
        ids: list[str] = []
        if source:
            try:
                ids = await self._rows.ids(rows[0].owner, source)
            except StoreError as error:
                raise ApiError(503, f"cache: {error}", retry_after_s=1) from None
        for row in rows:
            for key in row.keys:
                if key.kind == "prompt":
                    scope = exact_scope(row.owner, row.scope)
                    known = self.hot.by_exact(bytes.fromhex(exact_key(scope, key.text)))
                    if known is not None:
                        ids.append(known.item_id)
        return list(dict.fromkeys(ids))

    async def _embedded(self, rows: Sequence[ItemRow], by: Any) -> list[ItemRow]:
        """With their vectors, or without when the embedder cannot: they follow later."""
        semantic = self.semantic
        assert semantic is not None
        texts = [key.text for row in rows for key in row.keys]
        vectors: list[Any] = []
        try:
            for first in range(0, len(texts), EMBEDDED_AT_ONCE):
                part = texts[first : first + EMBEDDED_AT_ONCE]
                vectors += list(await semantic.embedder.embed(part, urgent=False, by=by))
        except Exception as error:  # noqa: BLE001  the object is kept all the same
            self.metrics.failed("embedder")
            _log.warning("put without vectors", extra={"error": str(error)})
            return list(rows)
        left = iter(vectors)
        return [
            replace(row, keys=tuple(semantic.key_with(key, next(left)) for key in row.keys))
            for row in rows
        ]

    async def get(
        self,
        text: str,
        asker: Asker,
        *,
        kinds: Iterable[str],
        min_similarity: float,
        limit: int,
        source: str | None,
    ) -> list[Found]:
        """The nearest items the asker may see, whatever conversation they were made in."""
        semantic = await self.need_semantic()
        if semantic is None:
            return []
        wall_s = self._clock.wall()

        def fits(number: int) -> bool:
            entry = self.hot.get(number)
            return (
                entry is not None
                and not self._over(entry, wall_s)
                and (entry.put or entry.owner == asker.owner)
                and source in (None, entry.source)
            )

        matches = await semantic.search(
            text, asker.readable, kinds=kinds, scopes=(), min_similarity=min_similarity,
            limit=limit, allowed=fits, by=asker.by,
        )  # fmt: skip
        return [found for _, found in await self._matched(matches)]

    async def page(
        self, owners: Sequence[str], *, source: str | None, after: int, most: int
    ) -> list[ItemRow]:
        """Items of these owners in the order they were stored. Raises ApiError."""
        try:
            await self._behind.flush()
            return await self._rows.find(owners, source=source, after=after, most=most)
        except StoreError as error:
            raise ApiError(503, f"cache: {error}", retry_after_s=1) from None

    async def delete(self, owner: str, *, item_id: str = "", source: str = "") -> int:
        """How many items of that owner went, for good when it returns. Raises ApiError."""
        try:
            if item_id:
                ids = [item_id]
            elif source:
                ids = await self._rows.ids(owner, source)
            else:
                ids = [entry.item_id for entry in self.hot if entry.owner == owner]
            entries = [
                entry
                for one in ids
                if (entry := self.hot.by_id(one)) is not None and entry.owner == owner
            ]
            for entry in entries:
                self._drop(entry)
            await self._behind.remove([entry.item_id for entry in entries])
        except StoreError as error:
            raise ApiError(503, f"cache: {error}", retry_after_s=1) from None
        self.metrics.removed("deleted", len(entries))
        return len(entries)

    def invalidate(self, item_id: str) -> bool:
        """Forget a model's answer that somebody found wrong; put objects stay."""
        entry = self.hot.by_id(item_id)
        if entry is None or entry.put:
            return False
        self._forget(entry)
        self.metrics.removed("feedback", 1)
        return True

    async def row(self, entry: Entry) -> ItemRow | None:
        """The item with its texts; None when it is gone or the store refuses."""
        return (await self.rows_of([entry])).get(entry.item_id)

    async def rows_of(self, entries: Sequence[Entry]) -> dict[str, ItemRow]:
        """The same of several by id, with one look at the disk at most."""
        found = await self._behind.fetch({one.item_id: one.size_bytes for one in entries})
        if found is None:
            return {}
        for entry in entries:
            if entry.item_id not in found:
                self._drop(entry)
        return found

    def changed(self) -> None:
        """Something that is kept has changed: it is written soon."""
        self._behind.changed()

    def gate_for(self, tenant: str) -> Gate | None:
        return self.semantic.gate_for(tenant) if self.semantic is not None else None

    # -- inside: memory ------------------------------------------------------------------------

    def _serves(self, entry: Entry, effect: LookupCache, asker: Asker) -> bool:
        wall_s = self._clock.wall()
        if self._over(entry, wall_s):
            return False
        if effect.max_age_s is not None and wall_s - entry.wall_s > effect.max_age_s:
            return False
        if entry.put:
            return effect.given
        if effect.max_tokens is not None and entry.out_tokens > effect.max_tokens:
            return False
        floor = effect.model_floor
        if not floor or floor == entry.model:
            return True
        ranks = asker.ranks
        return floor in ranks and ranks.get(entry.model, -1) >= ranks[floor]

    def _over(self, entry: Entry, wall_s: float) -> bool:
        return bool(entry.expires_wall_s) and entry.expires_wall_s <= wall_s

    def _item(
        self, entry: Entry, row: ItemRow, kind: str, key: str, similarity: float
    ) -> CacheItem:
        self.hot.touch(entry)
        age_s = max(0.0, self._clock.wall() - entry.wall_s)
        return CacheItem(
            entry.item_id, kind, key, row.response, similarity, row.prompt, row.source, age_s,
            entry.model, entry.cost_nano, entry.put,
        )  # fmt: skip

    def _take(self, row: ItemRow, size_bytes: int) -> None:
        """Into memory: entry, texts, vectors."""
        entry = self.hot.add(row, size_bytes)
        self._behind.remember(row, entry.size_bytes)
        if self.semantic is not None:
            self._wait_for_vectors(self.semantic.add(entry.number, row))

    def _wait_for_vectors(self, left: Iterable[ToEmbed]) -> None:
        for one in left:
            if len(self._to_embed) >= MAX_WAITING:
                self.metrics.failed("embedder")
                return  # found by its exact key only, until the next start
            self._to_embed.append(one)
        if self._to_embed:
            self._embeddable.set()

    def _drop(self, entry: Entry) -> None:
        """Out of memory."""
        self._behind.drop(entry.item_id)
        self.hot.drop(entry)
        if self.semantic is not None:
            self.semantic.drop(entry.owner, entry.number)

    def _forget(self, entry: Entry) -> None:
        """Out of memory now, off the disk a moment later."""
        self._drop(entry)
        self._behind.forget(entry.item_id)

    def _make_room(self, size_bytes: int, count: int) -> bool:
        """Let the least used answers go. False when there is no room without put objects."""
        hot, section = self.hot, self.section
        while len(hot) + count > section.max_items or (
            hot.size_bytes + size_bytes > section.max_bytes
        ):
            entry = hot.least_used()
            if entry is None:
                return False
            self._forget(entry)
            self.metrics.removed("size", 1)
        return True

    # -- inside: the background ----------------------------------------------------------------

    async def follow(self) -> None:
        """Take what was written to the store since the last time."""
        more = True
        while more:
            page = await self._rows.page(self._upto, PAGE_ROWS)
            for name in page.removed:
                entry = self.hot.by_id(name)
                if entry is not None:
                    self._drop(entry)
            for row in page.items:
                if self.hot.by_id(row.item_id) is None and not self._behind.is_going(row.item_id):
                    self._take(row, 0)
            self._upto, more = page.upto, page.more

    async def _follow_others(self) -> None:
        while True:
            await self._clock.sleep(FOLLOW_S)
            try:
                await self.follow()
            except StoreError as error:
                self.metrics.failed("store")
                _log.warning("cache not followed", extra={"error": str(error)})

    def _worth_keeping(self) -> dict[str, str]:
        return {} if self.semantic is None else {THRESHOLDS: self.semantic.learned()}

    async def _embed_behind(self) -> None:
        """Vectors of what was stored without them."""
        while True:
            await self._embeddable.wait()
            semantic = self.semantic
            if semantic is None or not self._to_embed:
                self._embeddable.clear()
                continue
            count = min(EMBEDDED_AT_ONCE, len(self._to_embed))
            batch = [self._to_embed.popleft() for _ in range(count)]
            batch = [one for one in batch if self.hot.get(one.number) is not None]
            if not batch:
                continue
            try:
                vectors = await semantic.embedder.embed(
                    [one.text for one in batch], urgent=False
                )  # fmt: skip
            except Exception as error:  # noqa: BLE001  any failure of any embedder: try again
                self.metrics.failed("embedder")
                _log.warning("not embedded", extra={"error": str(error)})
                self._to_embed.extendleft(reversed(batch))
                await self._clock.sleep(RETRY_S)
                continue
            late = []
            for one, vector in zip(batch, vectors, strict=True):
                if self.hot.get(one.number) is not None:
                    semantic.add_vector(
                        one.number, one.owner, one.scope, one.place, one.kind, vector
                    )
                    space = semantic.embedder.space
                    late.append((one.item_id, one.place, semantic.packed(vector), space))
            self._behind.add_vectors(late)

    async def _tidy(self) -> None:
        """What is over its time goes."""
        while True:
            await self._clock.sleep(TIDY_S)
            expired = self.hot.expired(self._clock.wall())
            for entry in expired:
                self._forget(entry)
            self.metrics.removed("ttl", len(expired))


def _import_semantic() -> None:
    importlib.import_module("intentd.proxy.cache.semantic")


def new_id() -> str:
    """Of an item; says nothing about others."""
    return "c" + secrets.token_hex(8)
