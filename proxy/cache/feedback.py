"""What becomes of hits: marked good or bad, answered again, or nothing said for a while."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from intentd.core.prompts.metadata import Trace
from intentd.proxy.cache.cache import Cache

MOST: Final = 10_000
SILENT_AFTER_S: Final = 600.0
HITS: Final = frozenset({"exact", "semantic", "as_is"})


@dataclass(slots=True)
class _Hit:
    tenant: str
    item_id: str
    result: str
    when_s: float


class Hits:
    """The last served items by request. Each is judged once; the gate's threshold learns."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._hits: OrderedDict[tuple[str, str], _Hit] = OrderedDict()

    def served(self, key_id: str, request_id: str, tenant: str, trace: Trace, now: float) -> None:
        item = trace.cache_item
        if item is not None and trace.cache in HITS:
            self._hits[key_id, request_id] = _Hit(tenant, item.item_id, trace.cache, now)
            if len(self._hits) > MOST:
                self._hits.popitem(last=False)

    def record(self, key_id: str, request_id: str, *, good: bool) -> bool:
        """A mark on an answer. False when it was no hit, or is judged already.

        A wrong semantic hit raises the tenant's threshold; an answer found wrong where it fits
        word for word is forgotten (put objects stay: they are the application's).
        """
        hit = self._hits.pop((key_id, request_id), None)
        if hit is None:
            return False
        self._cache.metrics.judged("good" if good else "bad")
        if hit.result == "semantic":
            self._learn(hit, good=good, silent=False)
        elif not good:
            self._cache.invalidate(hit.item_id)
        return True

    def age(self, now: float) -> None:
        """Hits that nobody spoke against for a while count as right."""
        while self._hits:
            place, hit = next(iter(self._hits.items()))
            if now - hit.when_s < SILENT_AFTER_S:
                return
            del self._hits[place]
            if hit.result == "semantic":
                self._learn(hit, good=True, silent=True)

    def _learn(self, hit: _Hit, *, good: bool, silent: bool) -> None:
        semantic = self._cache.semantic
        if semantic is not None:
            semantic.learn(hit.tenant, good=good, silent=silent)
            self._cache.changed()
