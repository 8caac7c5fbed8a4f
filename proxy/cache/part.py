"""The cache as the rest of the proxy uses it: effects of pipelines, hits and marks, prefetching."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from intentd.core.errors import ConfigError
from intentd.core.prompts.effects import (
    Done,
    Embed,
    Embedded,
    LookupCache,
    Outcome,
    Prefetch,
    StoreCache,
)
from intentd.core.prompts.metadata import Trace
from intentd.core.prompts.models import ModelPool
from intentd.core.prompts.request import Request, Verdict
from intentd.core.prompts.service_types import HIGHLY_SIMILAR, ServiceType
from intentd.daemons.kit.clock import Clock
from intentd.proxy.cache.asker import Asker, asker_of
from intentd.proxy.cache.cache import Cache
from intentd.proxy.cache.feedback import Hits
from intentd.proxy.cache.prefetch import Performer, Prefetcher
from intentd.proxy.call import Exchange
from intentd.proxy.config_cache import CacheSection
from intentd.proxy.store.cache import CacheRows

if TYPE_CHECKING:
    from intentd.proxy.cache.semantic import Semantic

AGE_S: Final = 5.0
# asks a model of the pool to embed texts for an exchange: (model, texts, exchange or None)
PoolEmbed = Callable[[str, Sequence[str], Any], Awaitable[list[list[float]]]]


class _TenantGate:
    """The second gate with a tenant's own threshold, whatever was loaded when it is asked."""

    def __init__(self, cache: Cache, tenant: str) -> None:
        self._cache = cache
        self._tenant = tenant

    def judge(self, prompt: str, key: str, similarity: float) -> Verdict:
        gate = self._cache.gate_for(self._tenant)
        if gate is None:
            return Verdict(similarity >= HIGHLY_SIMILAR, similarity, "similarity")
        return gate.judge(prompt, key, similarity)


class CachePart:
    """busy: how many requests are worked on now. embed: see PoolEmbed."""

    def __init__(
        self,
        section: CacheSection,
        rows: CacheRows,
        clock: Clock,
        performer: Performer,
        busy: Callable[[], int],
        embed: PoolEmbed,
    ) -> None:
        self._clock = clock
        self._performer = performer
        self._embed = embed
        self._rows = rows
        self.section = section
        self.cache = Cache(section, rows, clock, self._maker(section))
        self.prefetcher = Prefetcher(section, performer, clock, self.cache.metrics, busy)
        self.hits = Hits(self.cache)

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Load, then work in the background. Raises StoreError, ConfigError."""
        await self.cache.open()
        tasks.create_task(self.cache.run(), name="cache")
        tasks.create_task(self.prefetcher.run(), name="prefetch")
        tasks.create_task(self._age(), name="cache hits")

    def reload(self, section: CacheSection) -> None:
        """Take new bounds."""
        self.section = self.cache.section = self.prefetcher.section = section
        if self.cache.semantic is not None:
            self.cache.semantic.set_target(section.max_false_hit)

    # -- pipelines -----------------------------------------------------------------------------

    def asker(self, exchange: Exchange, request: Request | None, user: object = None) -> Asker:
        return asker_of(
            exchange.key,
            self.section.sharing,
            request=request,
            user=user,
            ranks={model.name: model.cost_rank for model in self._pool},
            by=exchange,
        )

    def gate(self, exchange: Exchange) -> _TenantGate:
        return _TenantGate(self.cache, exchange.key.tenant)

    async def perform(
        self,
        effect: LookupCache | StoreCache | Embed | Prefetch,
        made: ServiceType,
        request: Request,
        exchange: Exchange,
    ) -> Outcome:
        if isinstance(effect, LookupCache):
            return await self.cache.lookup(effect, self.asker(exchange, request))
        if isinstance(effect, StoreCache):
            return Done(self.cache.store(effect, self.asker(exchange, request)))
        if isinstance(effect, Embed):
            return await self._vectors(effect, exchange)
        return Done(self.prefetcher.offer(effect, made, request, exchange))

    def finished(self, trace: Trace, exchange: Exchange) -> None:
        """Count what the cache did for a request, and remember its hit for a while."""
        if trace.cache == "off" or exchange.path == "prefetch":
            return
        key = exchange.key
        self.cache.metrics.looked_up(
            trace.service_type, trace.cache, trace.avoided_nano if trace.cache_item else 0
        )
        self.hits.served(key.key_id, exchange.request_id, key.tenant, trace, self._clock.now())

    def record_feedback(self, key_id: str, request_id: str, *, good: bool) -> bool:
        """A mark on an answer, or that it was asked for again. False when it was no hit."""
        return self.hits.record(key_id, request_id, good=good)

    def status(self) -> dict[str, Any]:
        cache = self.cache
        semantic = cache.semantic
        return {
            "items": len(cache.hot),
            "put_items": cache.hot.put_count,
            "size_bytes": cache.hot.size_bytes,
            "semantic": semantic is not None,
            "semantic_available": cache.has_semantic,
            "embedder": semantic.embedder.space if semantic is not None else "",
            "vectors": semantic.vectors if semantic is not None else 0,
            "vectors_bytes": semantic.size_bytes if semantic is not None else 0,
            "waiting_for_vectors": cache.waiting_for_vectors,
            "gate": type(semantic.gate).__name__ if semantic is not None else "",
            "threshold": semantic.gate.threshold if semantic is not None else None,
            "thresholds": semantic.thresholds() if semantic is not None else {},
            "lookups": [[*key, count] for key, count in cache.metrics.lookups.items()],
            "avoided_nano": cache.metrics.avoided_nano,
            "prefetch_waiting": self.prefetcher.waiting,
        }

    # -- inside --------------------------------------------------------------------------------

    @property
    def _pool(self) -> ModelPool:
        return self._performer.pool

    async def _vectors(self, effect: Embed, exchange: Exchange) -> Outcome:
        semantic = await self.cache.need_semantic()
        if semantic is None:
            return Done("no embedder")
        try:
            vectors = await semantic.embedder.embed(effect.texts, by=exchange)
        except Exception as error:  # noqa: BLE001  any failure of any embedder: go on without
            return Done(f"embedder: {error}")
        return Embedded(tuple(vectors.tolist()))

    async def _age(self) -> None:
        while True:
            await self._clock.sleep(AGE_S)
            self.hits.age(self._clock.now())

    def _maker(self, section: CacheSection) -> Callable[[], Semantic] | None:
        """How the semantic half is made; None when it is off or cannot be. Raises ConfigError."""
        if section.semantic == "off":
            return None
        from intentd.proxy.cache.available import missing_parts

        if not section.embedder_model:
            missing = missing_parts(section.model_file)
            if missing and section.semantic == "on":
                raise ConfigError(
                    "cache.semantic", "on", f"an embedder: not installed: {', '.join(missing)}"
                )
            if missing:
                return None
        if section.search == "database" and self._rows.vector_search is None:
            raise ConfigError(
                "cache.search", "database", "store.url of a PostgreSQL with the extension vector"
            )
        gate = Path(section.gate_file) if section.gate_file else None
        if gate is not None and not gate.is_file():
            raise ConfigError("cache.gate_file", section.gate_file, "a file")
        return lambda: self._make(section, gate)

    def _make(self, section: CacheSection, gate_file: Path | None) -> Semantic:
        from intentd.proxy.cache.embedder import Embedder, LocalEmbedder, PoolEmbedder
        from intentd.proxy.cache.semantic import Remote, Semantic, load_gate

        embedder: Embedder
        if section.embedder_model:
            name = section.embedder_model

            def call(texts: Sequence[str], by: Any) -> Awaitable[list[list[float]]]:
                return self._embed(name, texts, by)

            embedder = PoolEmbedder(call, space=f"pool:{name}")
        else:
            embedder = LocalEmbedder(lambda: _minilm(section.model_file), space="minilm-l6-int8")
        search = self._rows.vector_search if section.search == "database" else None
        number_of = self.cache.hot.number_of
        return Semantic(
            embedder, load_gate(gate_file), section.max_false_hit,
            remote=None if search is None else Remote(search, number_of),
        )  # fmt: skip


def _minilm(model_file: str) -> Any:
    from intentd.proxy.minilm import MiniLM

    return MiniLM(Path(model_file) if model_file else None)
