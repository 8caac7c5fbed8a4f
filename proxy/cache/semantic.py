"""The semantic half of the cache: vectors, the embedder behind them, the second gate's threshold.

Imported only when the first prompt asks for it: numpy and the model are a hundred megabytes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intentd.core.errors import ConfigError, InputError
from intentd.core.prompts.cache.gate import GateModel, OnlineThreshold
from intentd.core.prompts.cache.rules import RuleGate
from intentd.core.prompts.service_types import CACHED_TYPES
from intentd.proxy.cache.embedder import Embedder, EmbedError
from intentd.proxy.cache.index import ANY_SCOPE, LOOKED_AT, Match, VectorIndex, scope_number
from intentd.proxy.store.cache import ItemRow, KeyRow, VectorSearch

KIND_NUMBER: Final = {name: number for number, name in enumerate(CACHED_TYPES)}
MAX_TENANTS: Final = 1000
STEP: Final = 0.02
WIDEST: Final = 0.25
MOST: Final = 0.995
# keys asked of a store for each item wanted: some belong to one item, some may not serve
REMOTE_TIMES: Final = 4

Gate = GateModel | RuleGate


@dataclass(slots=True)
class ToEmbed:
    """A key without its vector."""

    number: int
    item_id: str
    owner: str
    scope: str
    place: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Remote:
    """A store that compares vectors itself. number_of: an item's number here, None when unknown."""

    search: VectorSearch
    number_of: Callable[[str], int | None]

    async def nearest(
        self, vector: bytes, space: str, owners: Sequence[str], *, allowed: Any, limit: int,
        **filters: Any,
    ) -> list[Match]:  # fmt: skip
        """The nearest items, best first, each once by its nearest key. Raises StoreError."""
        rows = await self.search.nearest(
            vector, space, owners, limit=LOOKED_AT + REMOTE_TIMES * limit, **filters
        )
        found: dict[int, Match] = {}
        for row in rows:
            number = self.number_of(row.item_id)
            if number is not None and number not in found and (allowed is None or allowed(number)):
                found[number] = Match(number, row.place, row.similarity)
                if len(found) == limit:
                    break
        return list(found.values())


class Semantic:
    """Vectors of keys under the numbers of `hot.Entry`; remote: they stay in the store."""

    def __init__(
        self, embedder: Embedder, gate: Gate, max_false_hit: float, remote: Remote | None = None
    ) -> None:
        self._remote = remote
        self.embedder = embedder
        self.gate = gate
        self.max_false_hit = max_false_hit
        self._index: VectorIndex | None = None
        self._thresholds: OrderedDict[str, OnlineThreshold] = OrderedDict()
        self._learned: dict[str, float] = {}

    @property
    def vectors(self) -> int:
        return len(self._index) if self._index is not None else 0

    @property
    def size_bytes(self) -> int:
        return self._index.size_bytes if self._index is not None else 0

    # -- vectors -------------------------------------------------------------------------------

    def with_vectors(self, row: ItemRow) -> ItemRow:
        """The row with the vectors that are known already."""
        return replace(row, keys=tuple(self._key(key) for key in row.keys))

    def _key(self, key: KeyRow) -> KeyRow:
        vector = None if key.vector else self.embedder.known(key.text)
        return key if vector is None else self.key_with(key, vector)

    def key_with(self, key: KeyRow, vector: npt.NDArray[Any]) -> KeyRow:
        return replace(key, vector=self.packed(vector), space=self.embedder.space)

    def packed(self, vector: npt.NDArray[Any]) -> bytes:
        return np.asarray(vector, "<f2").tobytes()

    def add(self, number: int, row: ItemRow) -> list[ToEmbed]:
        """Index the keys that have a vector of this space; what is left to embed."""
        left = []
        for place, key in enumerate(row.keys):
            if key.vector and key.space == self.embedder.space:
                vector = np.frombuffer(key.vector, "<f2").astype(np.float32)
                self.add_vector(number, row.owner, row.scope, place, key.kind, vector)
            else:
                left.append(
                    ToEmbed(
                        number, row.item_id, row.owner, row.scope, place, key.kind, key.text
                    )
                )  # fmt: skip
        return left

    def add_vector(
        self,
        number: int,
        owner: str,
        scope: str,
        place: int,
        kind: str,
        vector: npt.NDArray[Any],
    ) -> None:
        if self._remote is not None:
            return
        if self._index is None:
            self._index = VectorIndex(len(vector))
        if len(vector) == self._index.dimensions:
            kind_number = KIND_NUMBER.get(kind, len(KIND_NUMBER))
            self._index.add(owner, number, place, kind_number, scope_number(scope), vector)

    def drop(self, owner: str, number: int) -> None:
        if self._index is not None:
            self._index.remove(owner, number)

    async def search(
        self,
        text: str,
        owners: Sequence[str],
        *,
        kinds: Iterable[str],
        scopes: Iterable[str],
        min_similarity: float,
        limit: int,
        allowed: Any,
        by: Any,
    ) -> list[Match]:
        """scopes: () any, "" stands for put objects. Raises EmbedError."""
        # also when nothing is stored yet: the answer to this text may be stored next
        (vector,) = await self.embedder.embed([text], by=by)
        if self._remote is not None:
            return await self._remote.nearest(
                self.packed(vector), self.embedder.space, list(dict.fromkeys(owners)),
                kinds=list(kinds), scopes=list(scopes), min_similarity=min_similarity,
                limit=limit, allowed=allowed,
            )  # fmt: skip
        if self._index is None:
            return []
        if len(vector) != self._index.dimensions:
            raise EmbedError("embedder: another number of dimensions than what is stored")
        return self._index.search(
            owners,
            vector,
            kinds=[KIND_NUMBER[kind] for kind in kinds if kind in KIND_NUMBER],
            scopes={scope_number(scope) if scope else ANY_SCOPE for scope in scopes},
            min_similarity=min_similarity,
            limit=limit,
            allowed=allowed,
        )

    # -- the second gate -----------------------------------------------------------------------

    def gate_for(self, tenant: str) -> Gate:
        """The gate with the threshold this tenant's feedback has led to."""
        return replace(self.gate, threshold=self.threshold(tenant).threshold)

    def threshold(self, tenant: str) -> OnlineThreshold:
        known = self._thresholds.get(tenant)
        if known is None:
            base = self.gate.threshold
            least, most = max(0.0, base - WIDEST), max(base, MOST)
            start = min(most, max(least, self._learned.get(tenant, base)))
            known = OnlineThreshold(start, self.max_false_hit, step=STEP, least=least, most=most)
            self._thresholds[tenant] = known
            if len(self._thresholds) > MAX_TENANTS:
                gone, old = self._thresholds.popitem(last=False)
                self._learned[gone] = old.threshold
        return known

    def learn(self, tenant: str, *, good: bool, silent: bool = False) -> None:
        """One served hit was right or wrong. silent: nobody complained, which alone never leads
        below the gate's own threshold: most clients never say anything."""
        rule = self.threshold(tenant)
        before = rule.threshold
        rule.learn(false_hit=not good)
        if silent:
            rule.threshold = max(rule.threshold, min(before, self.gate.threshold))

    def set_target(self, max_false_hit: float) -> None:
        self.max_false_hit = max_false_hit
        for rule in self._thresholds.values():
            rule.target = max_false_hit

    def thresholds(self) -> dict[str, float]:
        """Of tenants whose feedback moved theirs."""
        moved = {tenant: rule.threshold for tenant, rule in self._thresholds.items()}
        return {
            tenant: round(one, 4)
            for tenant, one in {**self._learned, **moved}.items()
            if one != self.gate.threshold
        }

    def learned(self) -> str:
        """Thresholds that moved, for the store."""
        return json.dumps({"base": self.gate.threshold, "tenants": self.thresholds()})

    def recall(self, text: str) -> None:
        """Take what `learned` said, if it was learned on this gate's scale."""
        try:
            plain = json.loads(text)
            if plain["base"] == self.gate.threshold:
                self._learned = {str(k): float(v) for k, v in plain["tenants"].items()}
        except (ValueError, TypeError, KeyError):
            return  # written by another version: start from the gate's own


def load_gate(path: Path | None) -> Gate:
    """The fitted gate of a file, else the rules. Raises ConfigError."""
    if path is None:
        return RuleGate()
    from intentd.core.prompts.modelfile import decode_model

    try:
        trained = decode_model(path.read_bytes(), name=str(path), kind="cache")
    except OSError as error:
        raise ConfigError("cache.gate_file", path, f"a readable file ({error.strerror})") from None
    except InputError as error:
        raise ConfigError("cache.gate_file", path, str(error)) from None
    assert isinstance(trained.model, GateModel)
    return trained.model
