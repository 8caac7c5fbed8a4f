"""The model pool and its filters: ``Filter([Model], attributes) -> [Model]`` (section 4.3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from intentd.core.errors import ConfigError, InputError
from intentd.core.prompts.money import Price, parse_dollars

ORDERS: Final = ("cheapest", "dearest", "fastest", "best")
FREE: Final = Price(0, 0)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of the pool.

    name: what clients and pipelines call it. upstream_model: what its provider calls it ("" is
    the same). base_url: an OpenAI-compatible endpoint; "" leaves the way to the adapter.
    capabilities: such as ``tools json images logprobs embeddings``. quality: 0 to 1 from public
    benchmarks, None unknown. latency_s: typical seconds of an answer, None unknown.
    max_concurrency: calls at a time, 0 without limit. max_output_tokens: 0 when the provider
    names none.
    """

    name: str
    upstream_model: str = ""
    base_url: str = ""
    price: Price = FREE
    window_tokens: int = 8192
    max_output_tokens: int = 0
    capabilities: frozenset[str] = frozenset()
    regions: frozenset[str] = frozenset()
    quality: float | None = None
    latency_s: float | None = None
    max_concurrency: int = 0

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise InputError("name", self.name, "a printable name")
        if self.window_tokens <= 0:
            raise InputError("window_tokens", self.window_tokens, "a count > 0")
        for field in ("max_output_tokens", "max_concurrency"):
            if getattr(self, field) < 0:
                raise InputError(field, getattr(self, field), "a count >= 0")
        if self.quality is not None and not 0 <= self.quality <= 1:
            raise InputError("quality", self.quality, "a number from 0 to 1")
        if self.latency_s is not None and not 0 <= self.latency_s < math.inf:
            raise InputError("latency_s", self.latency_s, "seconds >= 0")

    @property
    def cost_rank(self) -> int:
        """What models are compared by: three input tokens to one of output."""
        return self.price.blended_nano()


Models = tuple[ModelSpec, ...]
ModelFilter = Callable[[Iterable[ModelSpec]], Models]


class ModelPool:
    """Models by name, in the order of the pool file. Immutable: a reload makes another."""

    def __init__(self, models: Iterable[ModelSpec]) -> None:
        self._models: dict[str, ModelSpec] = {}
        for index, model in enumerate(models):
            if model.name in self._models:
                raise ConfigError(f"models[{index}].name", model.name, "a name not used before")
            self._models[model.name] = model

    def __iter__(self) -> Iterator[ModelSpec]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, name: object) -> bool:
        return name in self._models

    def get(self, name: str, field: str = "model") -> ModelSpec:
        """Raises InputError naming `field` for a model that is not in the pool."""
        model = self._models.get(name)
        if model is None:
            raise InputError(field, name, f"one of {', '.join(self._models) or 'no models'}")
        return model


def named(*names: str) -> ModelFilter:
    """These models, in the order given; unknown names are left out."""

    def keep(models: Iterable[ModelSpec]) -> Models:
        by_name = {model.name: model for model in models}
        return tuple(by_name[name] for name in names if name in by_name)

    return keep


def capable(*capabilities: str) -> ModelFilter:
    wanted = frozenset(capabilities)
    return lambda models: tuple(model for model in models if wanted <= model.capabilities)


def able(needs: Iterable[str]) -> ModelFilter:
    """Models that can do what a request needs; one that declares nothing is not doubted."""
    wanted = frozenset(needs)
    return lambda models: tuple(
        model for model in models if not model.capabilities or wanted <= model.capabilities
    )


def in_region(region: str) -> ModelFilter:
    """Models offered in the region; one that names no regions is offered everywhere."""
    return lambda models: tuple(m for m in models if not m.regions or region in m.regions)


def window_at_least(tokens: int) -> ModelFilter:
    return lambda models: tuple(model for model in models if model.window_tokens >= tokens)


def quality_at_least(quality: float) -> ModelFilter:
    """Models known to be that good; an unknown quality does not count as good."""
    return lambda models: tuple(m for m in models if (m.quality or 0.0) >= quality)


def price_between(
    least_nano: int = 0, most_nano: int | None = None, *, output: bool = False
) -> ModelFilter:
    """By price in nano-dollars per million input (or output) tokens, both ends included."""

    def keep(models: Iterable[ModelSpec]) -> Models:
        def price(model: ModelSpec) -> int:
            return model.price.out_nano if output else model.price.in_nano

        return tuple(
            m
            for m in models
            if price(m) >= least_nano and (most_nano is None or price(m) <= most_nano)
        )

    return keep


def without(names: Iterable[str]) -> ModelFilter:
    left_out = frozenset(names)
    return lambda models: tuple(model for model in models if model.name not in left_out)


def not_cheaper_than(floor: ModelSpec) -> ModelFilter:
    """What a second answer may come from: the model itself or one at least as dear."""
    return lambda models: tuple(
        m for m in models if m.name == floor.name or m.cost_rank >= floor.cost_rank
    )


def ordered(order: str, limit: int | None = None) -> ModelFilter:
    """Sorted cheapest, dearest, fastest or best first; ties keep the pool's order."""
    if order not in ORDERS:
        raise InputError("order", order, f"one of {', '.join(ORDERS)}")

    def key(model: ModelSpec) -> tuple[float, float]:
        if order == "dearest":
            return (-model.cost_rank, -(model.quality or 0.0))
        if order == "fastest":
            known = model.latency_s is not None
            return (model.latency_s or 0.0, model.cost_rank) if known else (math.inf, 0.0)
        if order == "best":
            return (-(model.quality or 0.0), model.cost_rank)
        return (model.cost_rank, -(model.quality or 0.0))

    return lambda models: tuple(sorted(models, key=key))[:limit]


def chain(*filters: ModelFilter) -> ModelFilter:
    def keep(models: Iterable[ModelSpec]) -> Models:
        kept = tuple(models)
        for one in filters:
            kept = one(kept)
        return kept

    return keep


@dataclass(frozen=True, slots=True)
class ModelQuery:
    """The attributes of a filter as an operator writes them; see `query_from_plain`."""

    names: tuple[str, ...] = ()
    capabilities: frozenset[str] = frozenset()
    region: str = ""
    window_tokens: int = 0
    quality: float = 0.0
    max_in_nano: int | None = None
    max_out_nano: int | None = None
    order: str = ""
    limit: int | None = None

    def __call__(self, models: Iterable[ModelSpec]) -> Models:
        kept = tuple(models)
        if self.names:
            kept = named(*self.names)(kept)
        if self.capabilities:
            kept = capable(*self.capabilities)(kept)
        if self.region:
            kept = in_region(self.region)(kept)
        if self.window_tokens:
            kept = window_at_least(self.window_tokens)(kept)
        if self.quality:
            kept = quality_at_least(self.quality)(kept)
        if self.max_in_nano is not None:
            kept = price_between(most_nano=self.max_in_nano)(kept)
        if self.max_out_nano is not None:
            kept = price_between(most_nano=self.max_out_nano, output=True)(kept)
        if self.order:
            kept = ordered(self.order)(kept)
        return kept[: self.limit]


def query_from_plain(plain: object, field: str) -> ModelQuery:
    """A filter's attributes: ``{"order": "cheapest", "capabilities": ["tools"], ...}``.

    A text or list of texts names models. Prices are dollars per million tokens, spelled
    ``max_price_in`` and ``max_price_out``. Raises ConfigError with the path.
    """
    if isinstance(plain, str):
        return ModelQuery(names=(plain,))
    if isinstance(plain, (list, tuple)):
        return ModelQuery(names=_texts(plain, field))
    if not isinstance(plain, Mapping):
        raise ConfigError(field, plain, "a model's name, a list of names, or attributes")
    known: dict[str, Any] = {}
    for key, value in plain.items():
        path = f"{field}.{key}"
        if key in ("names", "capabilities"):
            texts = _texts(value, path)
            known[key] = texts if key == "names" else frozenset(texts)
        elif key in _CHECKS and _CHECKS[key](value):
            known[key] = value
        elif key == "quality" and type(value) in (int, float) and 0 <= value <= 1:
            known[key] = float(value)
        elif key in ("max_price_in", "max_price_out"):
            known["max_in_nano" if key == "max_price_in" else "max_out_nano"] = parse_dollars(
                value, path
            )
        else:
            raise ConfigError(path, value, _EXPECTED.get(str(key), _ATTRIBUTES))
    return ModelQuery(**known)


_CHECKS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "region": lambda value: isinstance(value, str),
    "order": lambda value: value in ORDERS,
    "window_tokens": lambda value: type(value) is int and value > 0,
    "limit": lambda value: type(value) is int and value > 0,
}
_EXPECTED: Final = {
    "region": "a text",
    "order": f"one of {', '.join(ORDERS)}",
    "window_tokens": "a count > 0",
    "limit": "a count > 0",
    "quality": "a number from 0 to 1",
}
_ATTRIBUTES: Final = (
    "an attribute: names, capabilities, region, window_tokens, quality, max_price_in, "
    "max_price_out, order, limit"
)


def _texts(value: object, field: str) -> tuple[str, ...]:
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple, set, frozenset)) or not all(
        isinstance(text, str) and text for text in listed
    ):
        raise ConfigError(field, value, "a list of names")
    return tuple(listed)


@dataclass(frozen=True, slots=True)
class Trio:
    """Who answers first, who judges, who answers when the judge is not content.

    by_rule: price(verifier) < price(first) < price(second) holds.
    """

    first: ModelSpec
    verifier: ModelSpec
    second: ModelSpec

    @property
    def by_rule(self) -> bool:
        return self.verifier.cost_rank < self.first.cost_rank < self.second.cost_rank


def cascade_trio(
    models: Sequence[ModelSpec],
    *,
    first: ModelSpec | None = None,
    verifier: ModelSpec | None = None,
    second: ModelSpec | None = None,
) -> Trio:
    """Fill in what is not given by the rule price(verifier) < price(M1) < price(M2).

    The dearest becomes M2, the cheapest the verifier, the cheapest above it M1. With fewer than
    three prices the rule cannot hold: M1 then judges itself (`Trio.by_rule` says so). Raises
    InputError when no model is dearer than M1.
    """
    dear = ordered("dearest")(models)
    cheap = ordered("cheapest")(models)
    if not models:
        raise InputError("models", (), "at least two models of different price")
    second = second or dear[0]
    if first is None:
        floor = verifier.cost_rank if verifier is not None else cheap[0].cost_rank
        between = [m for m in cheap if floor < m.cost_rank < second.cost_rank]
        below = [m for m in cheap if m.cost_rank < second.cost_rank]
        if not below:
            raise InputError(
                "models", tuple(m.name for m in models), f"a model cheaper than {second.name}"
            )
        first = (between or below)[0]
    if verifier is None:
        verifier = cheap[0] if cheap[0].cost_rank < first.cost_rank else first
    return Trio(first, verifier, second)
