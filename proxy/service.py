"""Which service types this proxy offers: the built-in ones it can carry out, and the operator's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Final

from intentd.core.errors import ConfigError
from intentd.core.prompts.budgets import UNITS, BudgetRule
from intentd.core.prompts.models import ModelQuery
from intentd.core.prompts.service_types import (
    CacheStage,
    ModelStage,
    PrefetchStage,
    ServiceType,
    StoreStage,
    types_from_plain,
)

FIXED: Final = "fixed"
QUALITY: Final = "quality"
# What these promise needs a cache with an embedder, a cache to prefetch into, a trained router.
_NEEDS_EMBEDDER: Final = "smart_cache"
_NEEDS_CACHE: Final = ("smart_cache", "latency")
_NEEDS_ROUTER: Final = "router"


def offered_types(
    plain: Sequence[Any], *, cached: bool = False, semantic: bool = True, routed: bool = False
) -> dict[str, ServiceType]:
    """Service types by name. Raises ConfigError with the path for what cannot be carried out.

    cached: there is a cache. semantic: it finds what is asked in other words. routed: there is
    a trained router.
    """
    types = types_from_plain(plain)
    own = {str(table["name"]): index for index, table in enumerate(plain)}
    offered = {}
    for name, made in types.items():
        if name not in own and (
            (name == _NEEDS_ROUTER and not routed)
            or (name in _NEEDS_CACHE and not cached)
            or (name == _NEEDS_EMBEDDER and not semantic)
        ):
            continue
        if name in own:
            where = f"service_types[{own[name]}]"
            _check(made, where, types, cached=cached, semantic=semantic, routed=routed)
        offered[name] = made if cached else _without_cache(made)
    return offered


def check_pool(types: Mapping[str, ServiceType], plain: Sequence[Any], pool: Set[str]) -> None:
    """Raises ConfigError with the path for a model of the operator's types that is not in the
    pool, and for a type that nobody could ask for because a model has its name."""
    for index, table in enumerate(plain):
        made = types[str(table["name"])]
        field = f"service_types[{index}]"
        if made.name in pool:
            raise ConfigError(f"{field}.name", made.name, "a name that no model has")
        for place, stage in enumerate(made.stages):
            where = f"{field}.stages[{place}]"
            if isinstance(stage, ModelStage):
                named = {role: getattr(stage, role) for role in ("first", "verifier", "second")}
                for role, name in named.items():
                    if name and name not in pool:
                        raise ConfigError(f"{where}.{role}", name, "a model of the pool")
            for role in ("models", "small"):
                query = getattr(stage, role, None)
                for name in query.names if isinstance(query, ModelQuery) else ():
                    if name not in pool:
                        raise ConfigError(f"{where}.{role}", name, "models of the pool")


def _without_cache(made: ServiceType) -> ServiceType:
    """``quality`` looks into the cache only for near-equal prompts; it is whole without."""
    return made.without_stage(CacheStage).without_stage(StoreStage)


def _check(
    made: ServiceType,
    field: str,
    types: Mapping[str, ServiceType],
    *,
    cached: bool,
    semantic: bool,
    routed: bool,
) -> None:
    more = (("fast", cached), ("route", routed))
    strategies = ("one", "verify", "agree", *(name for name, there in more if there))
    for index, stage in enumerate(made.stages):
        where = f"{field}.stages[{index}]"
        if isinstance(stage, (CacheStage, StoreStage, PrefetchStage)) and not cached:
            kind = type(stage).__name__.removesuffix("Stage").lower()
            raise ConfigError(where, kind, "context and model stages: this proxy has no cache")
        if isinstance(stage, CacheStage) and stage.mode in ("semantic", "smart") and not semantic:
            raise ConfigError(f"{where}.cache", stage.mode, "skip or exact: cache.semantic is off")
        if isinstance(stage, PrefetchStage) and stage.service_type not in types:
            raise ConfigError(
                f"{where}.service_type", stage.service_type, f"one of {', '.join(sorted(types))}"
            )
        if isinstance(stage, ModelStage) and stage.strategy not in strategies:
            raise ConfigError(f"{where}.model", stage.strategy, f"one of {', '.join(strategies)}")
    for index, quota in enumerate(made.quotas):
        if quota.unit not in UNITS:
            raise ConfigError(f"{field}.quotas[{index}].unit", quota.unit, "tokens or requests")


def quota_rules(made: ServiceType, key_id: str) -> tuple[BudgetRule, ...]:
    """A service type's quotas, as budgets of one key."""
    scope = f"key:{key_id}/type:{made.name}"
    return tuple(BudgetRule(scope, quota.unit, quota.limit, quota.period) for quota in made.quotas)


def restricted(made: ServiceType, models: tuple[str, ...]) -> ServiceType:
    """The same for a key that may use only these models."""
    if not models:
        return made
    allowed = tuple(name for name in made.allowed if name in models) if made.allowed else models
    return replace(made, allowed=allowed or ("",))  # "" is no model's name: none is allowed
