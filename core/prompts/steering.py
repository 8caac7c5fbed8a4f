"""What the operator wants of prompts, and the settings that bring it about (section 4.5.3).

"Quality at least q at least cost": among the thresholds of a cascade or router, the cheapest whose
quality, as outcomes foretell it, is q; "at most b a day": a budget that holds, and thresholds that
spend what is left evenly. Signals are counted whether or not the dear model was asked, so outcomes
under one threshold tell what every other would have done.

Quality of a verify cascade is the verifier's 1 to 10, corrected by people's ratings where there are
any; the dear model's is 10, as in the dissertation, until ratings say otherwise. Of the agreement
cascade and the router it is 1 less the expected loss against always asking the dear model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.core.prompts.outcomes import (
    SIGNALS,
    TypeOutcomes,
    escalates,
    middle,
    thresholds,
)

DAY_S: Final = 86_400.0
BEST: Final = 10.0
PRIOR_RATINGS: Final = 20.0  # what the verifier's own word is worth, in ratings
Z: Final = 1.2815516  # one-sided 90 %
SLACK: Final = 0.02  # of the cost: a threshold in force that does as well stays
MAX_DOUBLINGS: Final = 4
BAD_SHARE: Final = 0.2
MIN_CALLS: Final = 5.0
_TECHNICAL: Final = ("timeout", "status", "refused", "cut", "garbage")
NANO: Final = 10**9


@dataclass(frozen=True, slots=True)
class Intent:
    """What is wanted of one service type. quality: 1 to 10 for verify, 0 to 1 else; None: none.

    daily_nano: most it may cost a day, None: no bound.
    """

    service_type: str
    quality: float | None = None
    daily_nano: int | None = None

    def __post_init__(self) -> None:
        if self.quality is not None and not 0 <= self.quality <= BEST:
            raise InputError("quality", self.quality, "0 to 1, or 1 to 10 for a verifier")
        if self.daily_nano is not None and self.daily_nano < 0:
            raise InputError("daily", self.daily_nano, "an amount >= 0")


@dataclass(frozen=True, slots=True)
class Option:
    """What one threshold would do. quality_low: its lower 90 % bound. cost_nano: a request's."""

    threshold: float
    quality: float
    quality_low: float
    escalated: float
    cost_nano: float | None

    def to_plain(self) -> dict[str, Any]:
        cost = None if self.cost_nano is None else round(self.cost_nano)
        return {
            "threshold": self.threshold,
            "quality": round(self.quality, 4),
            "quality_low": round(self.quality_low, 4),
            "escalated": round(self.escalated, 4),
            "cost_nano": cost,
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """A threshold, why, and what else was possible. options: a few around it, for people."""

    threshold: float
    because: str
    chosen: Option | None = None
    options: tuple[Option, ...] = ()
    outcomes: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "because": self.because,
            "outcomes": round(self.outcomes, 1),
            "expected": None if self.chosen is None else self.chosen.to_plain(),
            "options": [option.to_plain() for option in self.options],
        }


def options_of(seen: TypeOutcomes) -> list[Option]:
    """Every threshold and what it would have done, from never to always the dear model."""
    strategy = seen.strategy
    total = sum(seen.signals)
    if not strategy or total <= 0:
        return []
    best = _second_quality(seen)
    kept = [_kept_quality(seen, place, best) for place in range(len(seen.signals))]
    found = []
    for threshold in thresholds(strategy):
        asks = [escalates(strategy, place, threshold) for place in range(len(kept))]
        values = [best if ask else own for ask, own in zip(asks, kept, strict=True)]
        mean = sum(n * v for n, v in zip(seen.signals, values, strict=True)) / total
        square = sum(n * v * v for n, v in zip(seen.signals, values, strict=True)) / total
        error = math.sqrt(max(0.0, square - mean * mean) / total)
        share = sum(n for n, ask in zip(seen.signals, asks, strict=True) if ask) / total
        cost = _cost_nano(seen, share)
        found.append(Option(threshold, mean, mean - Z * error, share, cost))
    return found


def _second_quality(seen: TypeOutcomes) -> float:
    best = BEST if seen.strategy == "verify" else 1.0
    count, total = seen.asked
    if seen.strategy != "verify":
        return best  # the measure itself
    return (PRIOR_RATINGS * best + _scaled(count, total)) / (PRIOR_RATINGS + count)


def _scaled(count: float, total: float) -> float:
    """The sum of ratings of 0 to 1 on the verifier's scale of 1 to 10."""
    return count + (BEST - 1.0) * total


def _kept_quality(seen: TypeOutcomes, place: int, best: float) -> float:
    """What a cheap answer of that bin is worth."""
    count, total = seen.kept[place]
    value = middle(seen.strategy, place)
    if seen.strategy == "verify":
        # no score: as good as the verifier's worst
        own = max(1.0, value)
        return (PRIOR_RATINGS * own + _scaled(count, total)) / (PRIOR_RATINGS + count)
    loss = value if seen.strategy == "agree" else max(0.0, value)
    asked, asked_total = seen.asked
    if count and asked:
        rated = max(0.0, asked_total / asked - total / count)
        weight = min(count, asked)
        loss = (PRIOR_RATINGS * loss + weight * rated) / (PRIOR_RATINGS + weight)
    return best - loss


def _cost_nano(seen: TypeOutcomes, share: float) -> float | None:
    """Mean cost of a request when that share asks the dear model; None when never seen."""
    (firsts, first), (judges, judge), (seconds, second) = (
        seen.costs[step] for step in ("first", "judge", "second")
    )
    if seen.strategy == "route":
        # the cheap model is not asked where the dear one is
        if (share < 1 and not firsts) or (share > 0 and not seconds):
            return None
        cheap = first / firsts if firsts else 0.0
        return (1 - share) * cheap + (share * second / seconds if seconds else 0.0)
    if not firsts or (share > 0 and not seconds):
        return None
    checked = judge / firsts if judges else 0.0
    return first / firsts + checked + (share * second / seconds if seconds else 0.0)


def choose(
    seen: TypeOutcomes, intent: Intent, *, present: float, min_outcomes: float, most_nano: float
) -> Choice:
    """The threshold for an intent. most_nano: a request may cost so much (inf: any).

    Options run from cheap to dear. The first whose quality's lower bound reaches q; without q the
    best one. If that is too dear, the best one that is not: money goes before quality.
    """
    options = options_of(seen)
    total = sum(seen.signals)
    if not options or total < min_outcomes:
        text = f"{total:.0f} outcomes, fewer than {min_outcomes:.0f}: left as it is"
        return Choice(present, text, None, (), total)
    wanted = intent.quality
    place = len(options) - 1
    if wanted is None:
        reason = "no quality asked for"
        if math.isinf(most_nano):
            return Choice(present, "nothing asked for that a threshold serves", None, (), total)
    else:
        good = [at for at, option in enumerate(options) if option.quality_low >= wanted]
        place = good[0] if good else len(options) - 1
        reason = f"quality {options[place].quality:.3g} for at least {wanted:g}, at least cost"
        if not good:
            reason = f"quality {wanted:g} is out of reach, {options[place].quality:.3g} is the best"
    cost = options[place].cost_nano
    if cost is not None and cost > most_nano:
        fits = [
            at
            for at, one in enumerate(options[: place + 1])
            if one.cost_nano is not None and one.cost_nano <= most_nano
        ]
        place = fits[-1] if fits else 0
        reason = (
            f"quality {options[place].quality:.3g}: {most_nano / NANO:.6f} $ a request is left of "
            "the day's budget"
        )
    now = next((one for one in options if one.threshold == present), None)
    chosen = options[place]
    if now is not None and _as_good(now, chosen, wanted, most_nano):
        chosen = now
    around = tuple(options[max(0, place - 2) : place + 3])
    return Choice(chosen.threshold, reason, chosen, around, total)


def _as_good(now: Option, best: Option, wanted: float | None, most_nano: float) -> bool:
    """Whether the threshold in force may stay: noise alone is no reason for a new policy."""
    if now.escalated == best.escalated:
        return True
    if now.cost_nano is None or best.cost_nano is None or now.cost_nano > most_nano:
        return False
    floor = best.quality if wanted is None else min(wanted, best.quality)
    return now.quality >= floor and now.cost_nano <= best.cost_nano * (1 + SLACK)


def left_a_request(
    daily_nano: int, spent_nano: float, *, wall_s: float, requests_per_s: float
) -> float:
    """What a request may cost so that the day's budget (UTC) lasts to its end; inf if unbounded."""
    if requests_per_s <= 0:
        return math.inf
    remaining_s = DAY_S - wall_s % DAY_S
    return max(0.0, daily_nano - spent_nano) / (requests_per_s * max(1.0, remaining_s))


@dataclass(slots=True)
class Cooldown:
    """Longer where a model keeps failing: doubles with each bad interval, halves with a good one.

    Bad: more than BAD_SHARE of MIN_CALLS calls or more failed for technical reasons.
    """

    doublings: int = 0

    def learn(self, calls: Mapping[str, float]) -> int:
        total = sum(calls.values())
        if total < MIN_CALLS:
            return self.doublings
        failed = sum(calls.get(reason, 0) for reason in _TECHNICAL)
        step = 1 if failed > BAD_SHARE * total else -1
        self.doublings = min(MAX_DOUBLINGS, max(0, self.doublings + step))
        return self.doublings


# -- the policy that goes out ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PromptsPolicy:
    """What proxies apply over their configuration.

    thresholds: service type -> (strategy it is for, threshold). cooldowns_s: model -> seconds.
    budgets: (scope, unit, limit, period) as in core.prompts.budgets.
    """

    thresholds: Mapping[str, tuple[str, float]]
    cooldowns_s: Mapping[str, float]
    budgets: tuple[tuple[str, str, int, str], ...] = ()

    def to_plain(self) -> dict[str, Any]:
        return {
            "service_types": [
                {"name": name, "strategy": strategy, "threshold": threshold}
                for name, (strategy, threshold) in sorted(self.thresholds.items())
            ],
            "models": [
                {"name": name, "cooldown_s": cooldown_s}
                for name, cooldown_s in sorted(self.cooldowns_s.items())
            ],
            "budgets": [
                {"scope": scope, "unit": unit, "limit": limit, "period": period}
                for scope, unit, limit, period in self.budgets
            ],
        }


def policy_from_plain(plain: object) -> PromptsPolicy:
    """Inverse of to_plain for untrusted input. Raises InputError with the path."""
    if not isinstance(plain, Mapping):
        raise InputError("policy", f"{plain!r:.60}", "a table")
    for key in plain:
        if key not in ("service_types", "models", "budgets"):
            raise InputError(str(key)[:60], "...", "service_types, models or budgets")
    chosen = {}
    for index, row in enumerate(_rows(plain, "service_types", ("name", "strategy", "threshold"))):
        where = f"service_types[{index}]"
        strategy = row["strategy"]
        if strategy not in SIGNALS:
            raise InputError(f"{where}.strategy", strategy, f"one of {', '.join(SIGNALS)}")
        least, most = {"verify": (0, 11), "agree": (0, 1), "route": (-1, 1)}[strategy]
        threshold = _number(row["threshold"], f"{where}.threshold", least, most)
        chosen[_name(row["name"], where)] = (str(strategy), threshold)
    cooldowns = {}
    for index, row in enumerate(_rows(plain, "models", ("name", "cooldown_s"))):
        where = f"models[{index}]"
        seconds = _number(row["cooldown_s"], f"{where}.cooldown_s", 0.001, DAY_S)
        cooldowns[_name(row["name"], where)] = seconds
    budgets = []
    for index, row in enumerate(_rows(plain, "budgets", ("scope", "unit", "limit", "period"))):
        limit = row["limit"]
        if type(limit) is not int or limit < 0:
            raise InputError(f"budgets[{index}].limit", f"{limit!r:.40}", "a number >= 0")
        budgets.append((str(row["scope"]), str(row["unit"]), limit, str(row["period"])))
    return PromptsPolicy(chosen, cooldowns, tuple(budgets))


def _rows(plain: Mapping[str, Any], field: str, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    rows = plain.get(field, [])
    if not isinstance(rows, (list, tuple)) or len(rows) > 1000:
        raise InputError(field, f"{rows!r:.60}", "a list of at most 1000 tables")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or set(row) != set(keys):
            raise InputError(f"{field}[{index}]", f"{row!r:.80}", f"a table of {', '.join(keys)}")
    return list(rows)


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise InputError(f"{where}.name", f"{value!r:.60}", "a name")
    return value


def _number(value: object, where: str, least: float, most: float) -> float:
    if type(value) not in (int, float) or not least <= value <= most:  # type: ignore[operator]  # narrowed by type()
        raise InputError(where, f"{value!r:.40}", f"a number from {least:g} to {most:g}")
    return float(value)  # type: ignore[arg-type]  # as above


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a policy changes against the one before, one line a fact."""
    lines = []
    for field, key, value in (
        ("service_types", "name", "threshold"),
        ("models", "name", "cooldown_s"),
        ("budgets", "scope", "limit"),
    ):
        before = {row[key]: row[value] for row in old.get(field, ())}
        after = {row[key]: row[value] for row in new.get(field, ())}
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                lines.append(f"{name}: {value} {before.get(name)} -> {after.get(name)}")
    return lines[:1000]
