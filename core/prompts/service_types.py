"""Service types: what an application asks for by name, declared as pipelines.

A service type is an ordered tuple of stages (cache, context, model, store, prefetch), each with
its parameters; `pipeline.run` executes any of them. The built-in ones are those of section 4.3.2
and 4.5; operators write their own in configuration, in the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from intentd.core.errors import ConfigError, InputError
from intentd.core.prompts import context
from intentd.core.prompts.cascade import check_threshold
from intentd.core.prompts.context import ContextFilter
from intentd.core.prompts.models import ModelQuery, query_from_plain

CACHE_MODES: Final = ("skip", "exact", "semantic", "smart")
STRATEGIES: Final = ("one", "verify", "agree", "route", "fast")
CACHED_TYPES: Final = (
    "prompt",
    "context",
    "response",
    "document",
    "chunk",
    "question",
    "keywords",
    "summary",
    "facts",
)
MAX_TYPES: Final = 1000
MAX_STAGES: Final = 16


ANY_MODEL: Final = ModelQuery()


@dataclass(frozen=True, slots=True)
class CacheStage:
    """Look for a stored answer.

    mode: exact (the same prompt), semantic (a prompt that asks the same, second gate included),
    smart (a small model decides what to do with what is found, section 4.3.5).
    min_similarity: cosine, for semantic and smart. kinds: cached types searched.
    """

    mode: str = "exact"
    min_similarity: float = 0.9
    kinds: tuple[str, ...] = ("prompt",)
    limit: int = 1
    small: ModelQuery | None = None


@dataclass(frozen=True, slots=True)
class ContextStage:
    """Choose the messages that go along. updates: the answer joins the conversation."""

    filters: ContextFilter = context.ALL
    updates: bool = True
    small: ModelQuery | None = None


@dataclass(frozen=True, slots=True)
class ModelStage:
    """Get the answer.

    strategy: one (the first model of the query, the next ones when it fails), verify (cheap,
    judged, dear below the threshold), agree (cheap models compared, dear when they differ),
    route (the learned router picks weak or strong), fast (a short answer by the first model, a
    better one prefetched).
    models: candidates; their order is the order of preference. first, verifier, second: name the
    cascade's models, else the price rule picks them. threshold: verifier score, chance of being
    wrong (agree), or predicted gain (route) that asks for the dear model.
    """

    strategy: str = "one"
    models: ModelQuery = ANY_MODEL
    first: str = ""
    verifier: str = ""
    second: str = ""
    threshold: float = 8.0
    compared: int = 2
    short_tokens: int = 200


@dataclass(frozen=True, slots=True)
class StoreStage:
    """Keep the answer under these typed keys (prompt, response)."""

    keys: tuple[str, ...] = ("prompt",)


@dataclass(frozen=True, slots=True)
class PrefetchStage:
    """Have likely follow-ups answered in the background."""

    what: str = "followups"
    service_type: str = "cost"


Stage = CacheStage | ContextStage | ModelStage | StoreStage | PrefetchStage


@dataclass(frozen=True, slots=True)
class Quota:
    """At most `limit` of `unit` (tokens, in_tokens, out_tokens, requests) a `period` and key."""

    unit: str
    limit: int
    period: str = "day"


@dataclass(frozen=True, slots=True)
class ServiceType:
    """A named pipeline. max_tokens: the cap of an answer, sent upstream and reserved.

    allowed: the only models it may use, () all (the classroom's curated list). overridable: what
    a request may set by key-value pairs.
    """

    name: str
    stages: tuple[Stage, ...]
    max_tokens: int = 1024
    allowed: tuple[str, ...] = ()
    quotas: tuple[Quota, ...] = ()
    description: str = ""

    def __post_init__(self) -> None:
        models = sum(isinstance(stage, ModelStage) for stage in self.stages)
        if models != 1:
            raise ConfigError(f"{self.name}.stages", models, "exactly one model stage")
        for kind in (CacheStage, ContextStage, StoreStage):
            if sum(isinstance(stage, kind) for stage in self.stages) > 1:
                raise ConfigError(
                    f"{self.name}.stages", kind.__name__, "at most one stage of a kind"
                )

    def stage(self, kind: type[Any]) -> Any:
        """The stage of that class, or None."""
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)

    def with_stage(self, changed: Stage) -> ServiceType:
        """The same with its stage of that kind replaced (appended when there was none)."""
        kind = type(changed)
        if self.stage(kind) is None:
            return replace(self, stages=(*self.stages, changed))
        return replace(
            self,
            stages=tuple(changed if isinstance(stage, kind) else stage for stage in self.stages),
        )

    def without_stage(self, kind: type[Any]) -> ServiceType:
        return replace(self, stages=tuple(s for s in self.stages if not isinstance(s, kind)))


CHEAPEST: Final = ModelQuery(order="cheapest")
DEAREST: Final = ModelQuery(order="dearest")
FASTEST: Final = ModelQuery(order="fastest")
LAST_5: Final = context.LastK(5)
# section 4.3.2: `quality` considers the cache only for a highly similar prompt
HIGHLY_SIMILAR: Final = 0.95

BUILT_IN: Final[Mapping[str, ServiceType]] = {
    one.name: one
    for one in (
        ServiceType(
            "fixed",
            (ContextStage(context.ALL), ModelStage()),
            max_tokens=4096,
            description="the model, context and cache that the request names",
        ),
        ServiceType(
            "quality",
            (
                CacheStage("semantic", HIGHLY_SIMILAR),
                ContextStage(context.ALL),
                ModelStage(models=DEAREST),
                StoreStage(),
            ),
            max_tokens=4096,
            description="the dearest model, all context that fits, cache for near-equal prompts",
        ),
        ServiceType(
            "cost",
            (ContextStage(context.NOTHING), ModelStage(models=CHEAPEST)),
            description="the cheapest model, no context",
        ),
        ServiceType(
            "model_selector",
            (ContextStage(LAST_5), ModelStage("verify", threshold=8.0)),
            max_tokens=2048,
            description="a cheap model first, a dear one when a verifier is not content",
        ),
        ServiceType(
            "smart_context",
            (
                ContextStage(context.Narrow((LAST_5, context.SmartContext())), small=CHEAPEST),
                ModelStage(models=DEAREST),
            ),
            max_tokens=2048,
            description="the last five messages or none, as a small model decides",
        ),
        ServiceType(
            "smart_cache",
            (
                CacheStage("smart", 0.35, CACHED_TYPES, limit=5, small=CHEAPEST),
                ContextStage(LAST_5),
                ModelStage(models=CHEAPEST),
                StoreStage(),
            ),
            description="answered from the cache by a small model where it holds what is asked",
        ),
        ServiceType(
            "usage_based",
            (ContextStage(LAST_5), ModelStage(models=CHEAPEST)),
            description="a curated list of models, quotas in tokens and requests",
        ),
        ServiceType(
            "latency",
            (
                CacheStage("exact"),
                ContextStage(context.LastK(1)),
                ModelStage("fast", models=FASTEST),
            ),
            description="a short answer now, a better one prefetched behind it",
        ),
        ServiceType(
            "router",
            (ContextStage(LAST_5), ModelStage("route", threshold=0.0)),
            max_tokens=2048,
            description="a learned router picks the cheap or the dear model by the prompt",
        ),
    )
}


def get_type(types: Mapping[str, ServiceType], name: object) -> ServiceType:
    """Raises InputError for a name that is not there."""
    found = types.get(name) if isinstance(name, str) else None
    if found is None:
        raise InputError("service_type", name, f"one of {', '.join(sorted(types))}")
    return found


def types_from_plain(plain: object, field: str = "service_types") -> dict[str, ServiceType]:
    """The built-in types and an operator's own, which may also redefine a built-in one.

    plain: a list of tables as `type_from_plain` takes. Raises ConfigError with the path.
    """
    if not isinstance(plain, (list, tuple)) or len(plain) > MAX_TYPES:
        raise ConfigError(field, type(plain).__name__, f"a list of at most {MAX_TYPES} tables")
    types = dict(BUILT_IN)
    own: set[str] = set()
    for index, table in enumerate(plain):
        one = type_from_plain(table, f"{field}[{index}]", types)
        if one.name in own:
            raise ConfigError(f"{field}[{index}].name", one.name, "a name not used before")
        own.add(one.name)
        types[one.name] = one
    return types


def type_from_plain(
    plain: object, field: str, known: Mapping[str, ServiceType] = BUILT_IN
) -> ServiceType:
    """One service type: ``name``, ``stages`` or ``based_on`` (or both: stages replace), and
    ``max_tokens``, ``models`` (the only ones it may use), ``quotas``, ``description``.

    A stage is a table whose first word is its kind: ``{cache = "semantic", min_similarity =
    0.95}``, ``{context = [{last_k = 5}, "smart_context"]}``, ``{model = "verify", threshold =
    8}``, ``{store = ["prompt"]}``, ``{prefetch = "followups"}``.
    """
    if not isinstance(plain, Mapping):
        raise ConfigError(field, plain, "a table with a name and stages")
    unknown = set(plain) - _TYPE_KEYS
    if unknown:
        raise ConfigError(f"{field}.{min(unknown, key=str)}", "...", f"one of {_KEYS_TEXT}")
    name = plain.get("name")
    if not isinstance(name, str) or not _is_name(name):
        raise ConfigError(f"{field}.name", name, "letters, digits, _ - . up to 64")
    made: ServiceType | None = None
    if "based_on" in plain:
        base = known.get(plain["based_on"]) if isinstance(plain["based_on"], str) else None
        if base is None:
            path = f"{field}.based_on"
            raise ConfigError(path, plain["based_on"], f"one of {', '.join(sorted(known))}")
        made = replace(base, name=name)
    if "stages" in plain:
        stages = _stages_from_plain(plain["stages"], f"{field}.stages")
        made = replace(made, stages=stages) if made else ServiceType(name, stages)
    if made is None:
        raise ConfigError(field, name, "stages or based_on")
    changes: dict[str, Any] = {}
    if "max_tokens" in plain:
        changes["max_tokens"] = _count(plain["max_tokens"], f"{field}.max_tokens")
    if "models" in plain:
        changes["allowed"] = query_from_plain(plain["models"], f"{field}.models").names
        if not changes["allowed"]:
            raise ConfigError(f"{field}.models", plain["models"], "a list of names")
    if "description" in plain:
        changes["description"] = str(plain["description"])
    if "quotas" in plain:
        changes["quotas"] = _quotas_from_plain(plain["quotas"], f"{field}.quotas")
    return replace(made, **changes)


_TYPE_KEYS: Final = frozenset(
    ("name", "based_on", "stages", "max_tokens", "models", "quotas", "description")
)
_KEYS_TEXT: Final = ", ".join(sorted(_TYPE_KEYS))
QUOTA_UNITS: Final = ("requests", "tokens", "in_tokens", "out_tokens")


def _is_name(name: str) -> bool:
    return (
        0 < len(name) <= 64
        and name.isascii()
        and name.replace("-", "_").replace(".", "_").replace("_", "a").isalnum()
    )


def _count(value: object, field: str) -> int:
    if type(value) is not int or value <= 0:
        raise ConfigError(field, value, "a count > 0")
    return value


def _quotas_from_plain(plain: object, field: str) -> tuple[Quota, ...]:
    if not isinstance(plain, (list, tuple)):
        raise ConfigError(field, plain, "a list of tables with unit, limit and period")
    quotas = []
    for index, one in enumerate(plain):
        path = f"{field}[{index}]"
        if not isinstance(one, Mapping) or set(one) - {"unit", "limit", "period"}:
            raise ConfigError(path, one, "a table with unit, limit and period")
        if one.get("unit") not in QUOTA_UNITS:
            raise ConfigError(f"{path}.unit", one.get("unit"), f"one of {', '.join(QUOTA_UNITS)}")
        period = one.get("period", "day")
        if period not in ("day", "month", "total"):
            raise ConfigError(f"{path}.period", period, "day, month or total")
        quotas.append(Quota(one["unit"], _count(one.get("limit"), f"{path}.limit"), period))
    return tuple(quotas)


def _stages_from_plain(plain: object, field: str) -> tuple[Stage, ...]:
    if not isinstance(plain, (list, tuple)) or not 1 <= len(plain) <= MAX_STAGES:
        raise ConfigError(field, plain, f"a list of 1 to {MAX_STAGES} stages")
    return tuple(_stage_from_plain(one, f"{field}[{index}]") for index, one in enumerate(plain))


def _stage_from_plain(plain: object, field: str) -> Stage:
    if not isinstance(plain, Mapping):
        raise ConfigError(field, plain, "a table such as {cache = 'exact'}")
    kinds = [key for key in plain if key in _STAGES]
    if len(kinds) != 1:
        raise ConfigError(field, sorted(map(str, plain)), f"exactly one of {', '.join(_STAGES)}")
    (kind,) = kinds
    rest = {str(key): value for key, value in plain.items() if key != kind}
    return _STAGES[kind](plain[kind], rest, field)


def _known(rest: Mapping[str, object], field: str, *names: str) -> None:
    for name in rest:
        if name not in names:
            raise ConfigError(f"{field}.{name}", rest[name], f"one of {', '.join(names) or '-'}")


def _small(rest: Mapping[str, object], field: str) -> ModelQuery | None:
    return query_from_plain(rest["small"], f"{field}.small") if "small" in rest else None


def _cache_stage(mode: object, rest: Mapping[str, object], field: str) -> Stage:
    _known(rest, field, "min_similarity", "kinds", "limit", "small")
    if mode not in CACHE_MODES:
        raise ConfigError(f"{field}.cache", mode, f"one of {', '.join(CACHE_MODES)}")
    stage = CacheStage(str(mode), small=_small(rest, field))
    if mode == "smart":
        stage = replace(stage, min_similarity=0.35, kinds=CACHED_TYPES, limit=5)
    if "min_similarity" in rest:
        value = rest["min_similarity"]
        if type(value) not in (int, float) or not 0 <= value <= 1:  # type: ignore[operator]  # narrowed by type()
            raise ConfigError(f"{field}.min_similarity", value, "a number from 0 to 1")
        stage = replace(stage, min_similarity=float(value))  # type: ignore[arg-type]  # as above
    if "kinds" in rest:
        stage = replace(stage, kinds=_kinds(rest["kinds"], f"{field}.kinds"))
    if "limit" in rest:
        stage = replace(stage, limit=min(100, _count(rest["limit"], f"{field}.limit")))
    return stage


def _kinds(value: object, field: str) -> tuple[str, ...]:
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not listed or set(listed) - set(CACHED_TYPES):
        raise ConfigError(field, value, f"a list of {', '.join(CACHED_TYPES)}")
    return tuple(listed)


def _context_stage(filters: object, rest: Mapping[str, object], field: str) -> Stage:
    _known(rest, field, "updates", "small")
    updates = rest.get("updates", True)
    if not isinstance(updates, bool):
        raise ConfigError(f"{field}.updates", updates, "true or false")
    kept = context.filters_from_plain(filters, f"{field}.context")
    return ContextStage(kept, updates, _small(rest, field))


def _model_stage(strategy: object, rest: Mapping[str, object], field: str) -> Stage:
    names = ("models", "first", "verifier", "second", "threshold", "compared", "short_tokens")
    _known(rest, field, *names)
    if strategy not in STRATEGIES:
        raise ConfigError(f"{field}.model", strategy, f"one of {', '.join(STRATEGIES)}")
    changes: dict[str, Any] = {"strategy": strategy}
    if "models" in rest:
        changes["models"] = query_from_plain(rest["models"], f"{field}.models")
    for name in ("first", "verifier", "second"):
        if name in rest:
            if not isinstance(rest[name], str) or not rest[name]:
                raise ConfigError(f"{field}.{name}", rest[name], "the name of a model")
            changes[name] = rest[name]
    for name in ("compared", "short_tokens"):
        if name in rest:
            changes[name] = _count(rest[name], f"{field}.{name}")
    default = {"agree": 0.5, "route": 0.0}.get(str(strategy), 8.0)
    changes["threshold"] = check_stage_threshold(
        str(strategy), rest.get("threshold", default), f"{field}.threshold"
    )
    return ModelStage(**changes)


def check_stage_threshold(strategy: str, value: object, field: str) -> float:
    """A threshold in the strategy's own unit. Raises ConfigError or InputError."""
    if strategy not in ("agree", "route"):
        return check_threshold(value, field)
    least = -1 if strategy == "route" else 0
    if type(value) not in (int, float) or not least <= value <= 1:  # type: ignore[operator]  # narrowed by type()
        raise ConfigError(field, value, f"a number from {least} to 1")
    return float(value)  # type: ignore[arg-type]  # as above


def _store_stage(keys: object, rest: Mapping[str, object], field: str) -> Stage:
    _known(rest, field)
    listed: object = (keys,) if isinstance(keys, str) else keys
    if not isinstance(listed, (list, tuple)) or not listed or set(listed) - {"prompt", "response"}:
        raise ConfigError(f"{field}.store", keys, "a list of prompt, response")
    return StoreStage(tuple(listed))


def _prefetch_stage(what: object, rest: Mapping[str, object], field: str) -> Stage:
    _known(rest, field, "service_type")
    if what not in ("followups", "better"):
        raise ConfigError(f"{field}.prefetch", what, "followups or better")
    by = rest.get("service_type", "cost")
    if not isinstance(by, str):
        raise ConfigError(f"{field}.service_type", by, "the name of a service type")
    return PrefetchStage(str(what), by)


_STAGES: Final[Mapping[str, Callable[[Any, Mapping[str, object], str], Stage]]] = {
    "cache": _cache_stage,
    "context": _context_stage,
    "model": _model_stage,
    "store": _store_stage,
    "prefetch": _prefetch_stage,
}


def with_options(
    service_type: ServiceType, options: Mapping[str, object], field: str = "options"
) -> ServiceType:
    """The key-value pairs of one request applied: ``model``, ``context``, ``cache``,
    ``threshold``, ``first``, ``verifier``, ``second``, ``max_tokens``, ``updates``.

    Raises InputError naming the option. The models a type allows bind whatever is asked for.
    """
    for key in options:
        if key not in OPTIONS:
            raise InputError(f"{field}.{key}", options[key], f"one of {', '.join(OPTIONS)}")
    made = service_type
    stage: ModelStage = made.stage(ModelStage)
    if "model" in options:
        query = query_from_plain(options["model"], f"{field}.model")
        _check_allowed(made, query.names, f"{field}.model")
        strategy = "one" if query.names else stage.strategy
        stage = replace(stage, models=query, strategy=strategy)
    for name in ("first", "verifier", "second"):
        if name in options:
            value = options[name]
            if not isinstance(value, str) or not value:
                raise InputError(f"{field}.{name}", value, "the name of a model")
            _check_allowed(made, (value,), f"{field}.{name}")
            changed: dict[str, Any] = {name: value}
            stage = replace(stage, **changed)
    if "threshold" in options:
        value = options["threshold"]
        number = check_stage_threshold(stage.strategy, value, f"{field}.threshold")
        stage = replace(stage, threshold=number)
    made = made.with_stage(stage)
    if "max_tokens" in options:
        asked = _count(options["max_tokens"], f"{field}.max_tokens")
        made = replace(made, max_tokens=min(made.max_tokens, asked))
    if "context" in options or "updates" in options:
        made = made.with_stage(_context_option(made, options, field))
    if "cache" in options:
        given = options["cache"]
        table = given if isinstance(given, Mapping) else {"cache": given}
        cache = _stage_from_plain(table, f"{field}.cache")
        made = made.without_stage(CacheStage)
        made = replace(made, stages=(cache, *made.stages))
        if isinstance(cache, CacheStage) and cache.mode != "skip" and not made.stage(StoreStage):
            made = made.with_stage(StoreStage())
    return made


OPTIONS: Final = (
    "model",
    "context",
    "cache",
    "threshold",
    "first",
    "verifier",
    "second",
    "max_tokens",
    "updates",
)


def _check_allowed(service_type: ServiceType, names: Sequence[str], field: str) -> None:
    for name in names:
        if service_type.allowed and name not in service_type.allowed:
            raise InputError(field, name, f"one of {', '.join(service_type.allowed)}")


def _context_option(
    service_type: ServiceType, options: Mapping[str, object], field: str
) -> ContextStage:
    stage = service_type.stage(ContextStage) or ContextStage()
    assert isinstance(stage, ContextStage)
    if "context" in options:
        filters = context.filters_from_plain(options["context"], f"{field}.context")
        stage = replace(stage, filters=filters)
    if "updates" in options:
        if not isinstance(options["updates"], bool):
            raise InputError(f"{field}.updates", options["updates"], "true or false")
        stage = replace(stage, updates=options["updates"])
    return stage
