"""A better answer on request: how a service type escalates (section 4.3.2, "Iterative nature").

Same type: one step towards quality on every component. Another type: that pipeline as it is. In
both the replaced answer leaves the context, the cache is not asked, and no model cheaper than the
one that answered may answer again. After a fast answer the cache is asked, for the better one that
was prefetched behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from intentd.core.errors import InputError
from intentd.core.prompts import context
from intentd.core.prompts.context import (
    Chooser,
    ContextFilter,
    LastK,
    Narrow,
    Similar,
    SmartContext,
    Summarize,
    Union,
)
from intentd.core.prompts.models import ModelPool, ModelQuery, ModelSpec, named, ordered
from intentd.core.prompts.request import Request
from intentd.core.prompts.service_types import (
    CacheStage,
    ContextStage,
    ModelStage,
    ServiceType,
    get_type,
)

MAX_ROUNDS: Final = 8


@dataclass(frozen=True, slots=True)
class Previous:
    """The answer that is to be replaced. rounds: how often it has been regenerated before.

    request_id: of the newest answer. answered_by: the best model that has answered the turn.
    cached: the newest answer was a stored one. replaced: ids of the answers before it.
    """

    request_id: str
    service_type: str
    answered_by: str = ""
    rounds: int = 0
    cached: bool = False
    replaced: tuple[str, ...] = ()


def best_of(names: Sequence[str], pool: ModelPool) -> str:
    """The dearest of some models; the last of them where none is in the pool any more."""
    known = [pool.get(name) for name in names if name in pool]
    if not known:
        return names[-1] if names else ""
    return max(known, key=lambda model: model.cost_rank).name


def regenerate(
    previous: Previous,
    request: Request,
    types: Mapping[str, ServiceType],
    pool: ModelPool,
    *,
    service_type: str = "",
) -> tuple[ServiceType, Request]:
    """The pipeline and the request to run for a better answer.

    Raises InputError for an unknown type and after MAX_ROUNDS.
    """
    if previous.rounds >= MAX_ROUNDS:
        raise InputError("regenerate", previous.rounds + 1, f"at most {MAX_ROUNDS} rounds")
    wanted = service_type or previous.service_type
    made = get_type(types, wanted)
    lookup = False
    if wanted == previous.service_type:
        lookup = made.stage(ModelStage).strategy == "fast" and not (
            previous.rounds or previous.cached
        )
        made = escalate(made, pool, previous.answered_by, previous.rounds + 1)
        if lookup:
            made = replace(made, stages=(CacheStage("exact"), *made.stages))
    changed = replace(
        request,
        replaces=(*request.replaces, *previous.replaced, previous.request_id),
        lookup=lookup,
        max_age_s=None,
        cached_only=False,
        floor=previous.answered_by if previous.answered_by in pool else "",
    )
    return made, changed


def escalate(
    service_type: ServiceType, pool: ModelPool, answered_by: str, rounds: int
) -> ServiceType:
    """One step towards quality for every earlier round.

    Context: what decided or shortened it goes, and k doubles with each round (5 -> 5 without the
    small model's decision, then 10, 20, ...; none becomes 1). Model: a cascade, router or fast
    answer goes straight to the dear model; a model chosen by price goes up to the next dearer
    one, and one that was named stays.
    """
    made = service_type.without_stage(CacheStage)
    stage = made.stage(ContextStage)
    if stage is not None:
        made = made.with_stage(replace(stage, filters=_more(stage.filters, rounds)))
    return made.with_stage(_better(made.stage(ModelStage), _allowed(made, pool), answered_by))


def _allowed(service_type: ServiceType, pool: ModelPool) -> Sequence[ModelSpec]:
    models = tuple(pool)
    return named(*service_type.allowed)(models) if service_type.allowed else models


def _better(stage: ModelStage, models: Sequence[ModelSpec], answered_by: str) -> ModelStage:
    candidates = stage.models(models) or tuple(models)
    dearest = ordered("dearest")(candidates)
    if not dearest:
        return stage
    if stage.strategy != "one":
        names = (stage.second,) if stage.second else tuple(m.name for m in dearest)
        return replace(stage, strategy="one", models=ModelQuery(names=names))
    if stage.models.names:
        return stage
    now = next((m for m in candidates if m.name == answered_by), None)
    dearer = [m for m in ordered("cheapest")(candidates) if now and m.cost_rank > now.cost_rank]
    names = tuple(m.name for m in (dearer or dearest))
    return replace(stage, models=ModelQuery(names=names))


def _more(filters: ContextFilter, rounds: int) -> ContextFilter:
    """The filters without what drops or shortens, and with more of the recent messages."""
    widened = _widened(filters, rounds)
    return context.ALL if widened is None else widened


def _widened(filters: ContextFilter, rounds: int) -> ContextFilter | None:
    if isinstance(filters, LastK):
        if filters.k is None:
            return filters
        if filters.k == 0:
            return LastK(2 ** (rounds - 1))
        return LastK(filters.k * 2 ** (rounds - 1))
    if isinstance(filters, (SmartContext, Chooser, Similar, Summarize)):
        return None
    if isinstance(filters, (Narrow, Union)):
        members = filters.filters if isinstance(filters, Narrow) else filters.members
        kept = tuple(made for one in members if (made := _widened(one, rounds)) is not None)
        if not kept:
            return None
        return Narrow(kept) if isinstance(filters, Narrow) else Union(kept)
    return filters
