"""What became of prompts, by service type: counted in the proxy, reported, merged, decided on.

Only sums leave a proxy: how many requests fell on which verifier score (chance of being wrong,
predicted gain), what the steps cost, how answers were rated and how often they were replaced.
Numbers grow since the proxy's boot; `difference` is what a report adds to the one before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.core.stats import LogHistogram

# strategy: (bins, least value, width); a signal's bin, of what a threshold is compared with
SIGNALS: Final[Mapping[str, tuple[int, float, float]]] = {
    "verify": (11, 0.0, 1.0),  # bin 0: the verifier named no score
    "agree": (20, 0.0, 0.05),
    "route": (40, -1.0, 0.05),
}
STEPS: Final = ("first", "judge", "second")
MAX_TYPES: Final = 1000
MAX_MODELS: Final = 1000
MAX_NAME: Final = 256
MAX_COUNT: Final = 2**53


def bin_of(strategy: str, signal: float | None) -> int:
    """The bin of a verifier score, chance or gain; what is missing is a score of none."""
    count, least, width = SIGNALS[strategy]
    if signal is None:
        return 0
    return min(count - 1, max(0, math.floor((signal - least) / width + 1e-9)))


def middle(strategy: str, place: int) -> float:
    """What a bin stands for."""
    _, least, width = SIGNALS[strategy]
    return float(place) if strategy == "verify" else least + (place + 0.5) * width


def escalates(strategy: str, place: int, threshold: float) -> bool:
    """Whether requests of a bin ask the dear model, as the pipeline decides it."""
    if strategy == "verify":
        return place < threshold
    if strategy == "agree":
        return middle(strategy, place) >= threshold
    return middle(strategy, place) > threshold


def thresholds(strategy: str) -> list[float]:
    """The thresholds worth trying, from never asking the dear model to always."""
    count, least, width = SIGNALS[strategy]
    edges = [round(least + place * width, 6) for place in range(count + 1)]
    return [float(t) for t in range(1, 12)] if strategy == "verify" else edges[::-1]


@dataclass(slots=True)
class TypeOutcomes:
    """One service type. signals: requests by bin. kept, asked: [ratings, their sum of 0 to 1] of
    cheap answers by bin, and of the dear model's. costs: step -> [calls, nano-dollars].

    strategy "": neither cascade nor router; it has no signals. Counts are whole numbers in a proxy,
    fractions once old traffic is forgotten.
    """

    strategy: str = ""
    requests: float = 0
    failed: float = 0
    cost_nano: float = 0
    avoided_nano: float = 0
    escalated: float = 0
    regenerated: float = 0
    hits: float = 0
    models: dict[str, float] = field(default_factory=dict)
    signals: list[float] = field(default_factory=list)
    kept: list[list[float]] = field(default_factory=list)
    asked: list[float] = field(default_factory=lambda: [0, 0.0])
    costs: dict[str, list[float]] = field(default_factory=lambda: {step: [0, 0] for step in STEPS})
    latency: LogHistogram = field(default_factory=lambda: LogHistogram(8))

    def __post_init__(self) -> None:
        bins = SIGNALS[self.strategy][0] if self.strategy else 0
        self.signals = self.signals or [0] * bins
        self.kept = self.kept or [[0, 0.0] for _ in range(bins)]

    def rate(self, rating: float, *, signal: float | None, escalated: bool | None) -> None:
        """A rating, 0 (bad) to 1, of an answer that was kept or came from the dear model."""
        if escalated is None or not self.strategy:
            return
        row = self.asked if escalated else self.kept[bin_of(self.strategy, signal)]
        row[0] += 1
        row[1] += rating

    def merge(self, other: TypeOutcomes) -> None:
        """Add another's counts; one of another strategy replaces this one's signals."""
        if other.strategy != self.strategy:
            fresh = TypeOutcomes(other.strategy)
            self.strategy, self.signals, self.kept = fresh.strategy, fresh.signals, fresh.kept
            self.asked, self.costs = fresh.asked, fresh.costs
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for model, count in other.models.items():
            if model in self.models or len(self.models) < MAX_MODELS:
                self.models[model] = self.models.get(model, 0) + count
        self.signals = [a + b for a, b in zip(self.signals, other.signals, strict=True)]
        self.kept = [
            [a + b for a, b in zip(one, two, strict=True)]
            for one, two in zip(self.kept, other.kept, strict=True)
        ]
        self.asked = [a + b for a, b in zip(self.asked, other.asked, strict=True)]
        for step, (calls, nano) in other.costs.items():
            self.costs[step][0] += calls
            self.costs[step][1] += nano
        if other.latency.per_octave == self.latency.per_octave:
            self.latency.merge(other.latency)

    def to_plain(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            **{name: getattr(self, name) for name in COUNTS},
            "models": dict(self.models),
            "signals": list(self.signals),
            "kept": [list(row) for row in self.kept],
            "asked": list(self.asked),
            "costs": {step: list(row) for step, row in self.costs.items()},
            "latency_s": self.latency.to_plain(),
        }


COUNTS: Final = (
    "requests", "failed", "cost_nano", "avoided_nano", "escalated", "regenerated", "hits",
)  # fmt: skip


@dataclass(slots=True)
class Outcomes:
    """Everything of one proxy. calls: model -> outcome of calls -> how many."""

    types: dict[str, TypeOutcomes] = field(default_factory=dict)
    calls: dict[str, dict[str, float]] = field(default_factory=dict)

    def of(self, name: str, strategy: str) -> TypeOutcomes:
        """The counts of a service type, begun anew when its strategy is another one now."""
        found = self.types.get(name)
        if found is None or found.strategy != strategy:
            found = self.types[name] = TypeOutcomes(strategy)
        return found

    def merge(self, other: Outcomes) -> None:
        for name, one in other.types.items():
            if name in self.types or len(self.types) < MAX_TYPES:
                self.types.setdefault(name, TypeOutcomes(one.strategy)).merge(one)
        for model, table in other.calls.items():
            if model in self.calls or len(self.calls) < MAX_MODELS:
                row = self.calls.setdefault(model, {})
                for outcome, count in table.items():
                    row[outcome] = row.get(outcome, 0) + count

    def to_plain(self) -> dict[str, Any]:
        return {
            "types": {name: one.to_plain() for name, one in self.types.items()},
            "calls": {model: dict(table) for model, table in self.calls.items()},
        }


def difference(new: Outcomes, old: Outcomes) -> Outcomes:
    """What `new` has more than `old`, a report of the same boot before; counters only grow.

    A service type whose counts fell was begun anew: all of it is new. Latency is not subtracted.
    """
    found = Outcomes()
    for name, one in new.types.items():
        before = old.types.get(name)
        same = before is not None and before.strategy == one.strategy
        if before is None or not same or before.requests > one.requests:
            found.types[name] = one
            continue
        found.types[name] = TypeOutcomes(
            one.strategy,
            **{key: max(0, getattr(one, key) - getattr(before, key)) for key in COUNTS},
            models={m: max(0, n - before.models.get(m, 0)) for m, n in one.models.items()},
            signals=[max(0, a - b) for a, b in zip(one.signals, before.signals, strict=True)],
            kept=[
                [max(0, a - b) for a, b in zip(x, y, strict=True)]
                for x, y in zip(one.kept, before.kept, strict=True)
            ],
            asked=[max(0, a - b) for a, b in zip(one.asked, before.asked, strict=True)],
            costs={
                step: [max(0, a - b) for a, b in zip(row, before.costs[step], strict=True)]
                for step, row in one.costs.items()
            },
        )
    for model, table in new.calls.items():
        known = old.calls.get(model, {})
        found.calls[model] = {o: max(0, n - known.get(o, 0)) for o, n in table.items()}
    return found


def forget(outcomes: Outcomes, share: float) -> Outcomes:
    """The same with every count scaled by share (0 to 1): old traffic counts for less."""

    def less(value: float) -> float:
        return value * share

    found = Outcomes()
    for name, one in outcomes.types.items():
        made = TypeOutcomes(one.strategy)
        made.merge(one)
        for key in COUNTS:
            setattr(made, key, less(getattr(one, key)))
        made.models = {model: less(count) for model, count in one.models.items()}
        made.signals = [less(count) for count in one.signals]
        made.kept = [[less(value) for value in row] for row in one.kept]
        made.asked = [less(value) for value in one.asked]
        made.costs = {step: [less(value) for value in row] for step, row in one.costs.items()}
        found.types[name] = made
    return found


# -- untrusted input -------------------------------------------------------------------------------


def outcomes_from_plain(plain: object, field_name: str = "prompts") -> Outcomes:
    """A proxy's report. Raises InputError naming what is wrong."""
    table = _table(plain, field_name, MAX_TYPES)
    types = {
        name: _type(one, f"{field_name}.types.{name:.40}")
        for name, one in _table(table.get("types", {}), f"{field_name}.types", MAX_TYPES).items()
    }
    calls = {}
    where = f"{field_name}.calls"
    for model, row in _table(table.get("calls", {}), where, MAX_MODELS).items():
        counts = _table(row, f"{where}.{model:.40}", 64)
        calls[model] = {k: _count(v, f"{where}.{model:.40}.{k:.40}") for k, v in counts.items()}
    return Outcomes(types, calls)


def _type(plain: object, where: str) -> TypeOutcomes:
    table = _table(plain, where, 64)
    strategy = table.get("strategy", "")
    if strategy != "" and strategy not in SIGNALS:
        raise InputError(f"{where}.strategy", strategy, f"'' or one of {', '.join(SIGNALS)}")
    bins = SIGNALS[strategy][0] if strategy else 0
    counts = {name: _count(table.get(name, 0), f"{where}.{name}") for name in COUNTS}
    models = {
        name: _count(count, f"{where}.models")
        for name, count in _table(table.get("models", {}), f"{where}.models", MAX_MODELS).items()
    }
    signals = [
        _count(count, f"{where}.signals")
        for count in _list(table.get("signals", [0] * bins), f"{where}.signals", bins)
    ]
    kept = [
        _pair(row, f"{where}.kept")
        for row in _list(table.get("kept", [[0, 0]] * bins), f"{where}.kept", bins)
    ]
    costs = {}
    given = _table(table.get("costs", {}), f"{where}.costs", len(STEPS))
    for step in STEPS:
        row = _list(given.get(step, [0, 0]), f"{where}.costs.{step}", 2)
        costs[step] = [_count(value, f"{where}.costs.{step}") for value in row]
    latency = LogHistogram(8)
    if table.get("latency_s") is not None:
        latency = LogHistogram.from_plain(table["latency_s"])
    return TypeOutcomes(
        strategy,
        **counts,
        models=models,
        signals=signals,
        kept=kept,
        asked=_pair(table.get("asked", [0, 0]), f"{where}.asked"),
        costs=costs,
        latency=latency,
    )


def _table(value: object, where: str, most: int) -> Mapping[str, Any]:
    good = (
        isinstance(value, Mapping)
        and len(value) <= most
        and all(isinstance(key, str) and 0 < len(key) <= MAX_NAME for key in value)
    )
    if not good:
        raise InputError(where, f"{value!r:.60}", f"a table of at most {most} names")
    assert isinstance(value, Mapping)
    return value


def _list(value: object, where: str, length: int) -> list[Any]:
    if not isinstance(value, (list, tuple)) or len(value) != length:
        raise InputError(where, f"{value!r:.60}", f"a list of {length}")
    return list(value)


def _count(value: object, where: str) -> float:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise InputError(where, f"{value!r:.60}", "a count")
    return value


def _pair(value: object, where: str) -> list[float]:
    count, total = _list(value, where, 2)
    good = type(count) is int and type(total) in (int, float) and 0 <= total <= count <= MAX_COUNT
    if not good:
        raise InputError(where, f"{value!r:.60}", "[ratings, their sum]")
    return [count, float(total)]
