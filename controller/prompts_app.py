"""Scheduling of prompts: outcomes in, thresholds, cooldowns and budgets out on a timer.

The implementation of `controller.application` for prompts. What is wanted comes from the
configuration and the operator (`Intent`, core); what happened from the proxies' reports, forgotten
by half-life; `core.prompts.steering` makes settings of both. Issued is what changed, numbered,
with the options that were weighed.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from intentd.controller.application import SchedulingApplication
from intentd.controller.config import IntentSection, PromptsSection
from intentd.controller.policies import AUTOMATIC, PolicyBook, StoredPolicy
from intentd.core.errors import InputError
from intentd.core.prompts.outcomes import (
    MAX_NAME,
    MAX_TYPES,
    Outcomes,
    TypeOutcomes,
    difference,
    forget,
    outcomes_from_plain,
)
from intentd.core.prompts.steering import (
    Choice,
    Cooldown,
    Intent,
    PromptsPolicy,
    choose,
    left_a_request,
    policy_from_plain,
)
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.config import validate
from intentd.daemons.kit.store import Storage

_log = logging.getLogger(__name__)

APPLICATION: Final = "prompts"
MAX_PROXIES: Final = 256

MemberKey = tuple[str, str]


@dataclass(slots=True)
class _Proxy:
    """What one proxy told last. today: (UTC day, service type -> nano-dollars). offers: its
    service types."""

    outcomes: Outcomes = field(default_factory=Outcomes)
    day: str = ""
    today: dict[str, int] = field(default_factory=dict)
    offers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Load:
    """Requests a second by service type, spent today by it, and the wall clock."""

    rates: Mapping[str, float]
    spent_nano: Mapping[str, float]
    wall_s: float


class PromptsApplication(SchedulingApplication[Outcomes, Load, None, PromptsPolicy | None]):
    """on_issue is called in the loop with each policy that was numbered and stored."""

    name: ClassVar[str] = APPLICATION

    def __init__(
        self,
        config: PromptsSection,
        clock: Clock,
        store: Storage,
        book: PolicyBook,
        *,
        on_issue: Callable[[StoredPolicy], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._store = store
        self._book = book
        self._on_issue = on_issue
        self._proxies: dict[MemberKey, _Proxy] = {}
        self._pending = Outcomes()
        self._window = Outcomes()
        self._weight_s = 0.0  # of the window: what its counts are divided by to be rates
        self._forgotten_s = clock.now()
        self._cooldowns: dict[str, Cooldown] = {}
        self.choices: dict[str, Choice] = {}
        self._overrides = _stored_intents(store)
        self.newest = book.newest(APPLICATION)
        self._policy = policy_from_plain(self.newest.body) if self.newest else PromptsPolicy({}, {})

    # -- measure -----------------------------------------------------------------------------

    def take_report(self, member: MemberKey, body: object) -> None:
        """Queue what a report adds. Raises InputError, whole."""
        told = outcomes_from_plain(body)
        assert isinstance(body, Mapping)  # checked just now
        day, today = _today(body.get("today", {}))
        offers = _offers(body.get("offers", []))
        proxy = self._proxies.get(member)
        if proxy is None:
            if len(self._proxies) >= MAX_PROXIES:
                raise InputError("proxy", member[1], f"at most {MAX_PROXIES} proxies")
            proxy = self._proxies[member] = _Proxy()
        self._pending.merge(difference(told, proxy.outcomes))
        proxy.outcomes, proxy.day, proxy.today, proxy.offers = told, day, today, offers

    def member_restarted(self, member: MemberKey) -> None:
        """Its counters start again from zero; what it spent today stays."""
        proxy = self._proxies.get(member)
        if proxy is not None:
            proxy.outcomes = Outcomes()

    def get_workload_info(self) -> Outcomes:
        """What happened since the last call."""
        pending, self._pending = self._pending, Outcomes()
        return pending

    def get_class_load(self) -> Load:
        wall_s = self._clock.wall()
        day = datetime.datetime.fromtimestamp(wall_s, tz=datetime.UTC).date().isoformat()
        spent: dict[str, float] = {}
        for proxy in self._proxies.values():
            if proxy.day == day:
                for name, nano in proxy.today.items():
                    spent[name] = spent.get(name, 0.0) + nano
        weight_s = max(1.0, self._weight_s)
        rates = {name: one.requests / weight_s for name, one in self._window.types.items()}
        return Load(rates, spent, wall_s)

    # -- compute (in a thread) -----------------------------------------------------------------

    def compute_thresholds(self, workload: Outcomes) -> None:
        """Forget by half-life, take in what is new, and learn who keeps failing."""
        now = self._clock.now()
        passed_s, self._forgotten_s = now - self._forgotten_s, now
        share = 0.5 ** (passed_s / self._config.half_life_s)
        window = forget(self._window, share)
        window.merge(workload)
        half_life = self._config.half_life_s / math.log(2.0)
        self._weight_s = self._weight_s * share + half_life * (1.0 - share)
        self._window = window
        for model, calls in workload.calls.items():
            self._cooldowns.setdefault(model, Cooldown()).learn(calls)

    def compute_rates(self, load: Load) -> PromptsPolicy | None:
        """The policy that the intents ask for now; None when it is the one in force."""
        left = self._left(load)
        thresholds = {}
        choices = {}
        for name, intent in self.intents().items():
            seen = self._window.types.get(name)
            if seen is None or not seen.strategy:
                continue
            known = self._policy.thresholds.get(name)
            default = {"verify": 8.0, "agree": 0.5, "route": 0.0}[seen.strategy]
            present = known[1] if known and known[0] == seen.strategy else default
            own = math.inf
            if intent.daily_nano is not None:
                own = left_a_request(
                    intent.daily_nano,
                    load.spent_nano.get(name, 0.0),
                    wall_s=load.wall_s,
                    requests_per_s=load.rates.get(name, 0.0),
                )
            made = choose(
                seen,
                intent,
                present=present,
                min_outcomes=self._config.min_outcomes,
                most_nano=min(own, left),
            )
            choices[name] = made
            if made.chosen is not None or known is not None:
                thresholds[name] = (seen.strategy, made.threshold)
        self.choices = choices
        cooldowns = {
            model: min(self._config.max_cooldown_s, self._config.cooldown_s * 2**one.doublings)
            for model, one in self._cooldowns.items()
            if one.doublings
        }
        policy = PromptsPolicy(thresholds, cooldowns, self._budgets())
        empty = not (thresholds or cooldowns or policy.budgets)
        if policy.to_plain() == self._policy.to_plain() or (empty and self.newest is None):
            return None
        return policy

    # -- enforce -------------------------------------------------------------------------------

    async def enforce_thresholds(self, thresholds: None) -> None:
        """Nothing of its own: the rates step issues the policy."""

    async def enforce_rates(self, rates: PromptsPolicy | None) -> None:
        if rates is not None and self._book.hold(APPLICATION) is None:
            await self._issue(rates, author=AUTOMATIC, reason=self._why(rates))

    # -- the operator ----------------------------------------------------------------------------

    async def set_policy(self, document: object, *, author: str) -> StoredPolicy | None:
        """Take intents of service types, or the daily budget of all. Raises InputError, whole.

        document: ``{"service_type": NAME, "quality": Q, "daily": DOLLARS}``, ``{"daily": DOLLARS}``
        for all together, or ``{"intents": [tables]}``; ``{"service_type": NAME, "reset": true}``
        goes back to the configuration. Returns what was issued, None if nothing changed.
        """
        accepted = dict(self._accepted(row, where) for where, row in _rows(document))
        await self._store.run(lambda store: _put_intents(store, accepted))
        self._overrides = _stored_intents(self._store)
        before = self.newest
        policy = self.compute_rates(self.get_class_load())
        if policy is not None:
            names = ", ".join(name or "all" for name in accepted)
            await self._issue(policy, author=author, reason=f"set: {names}"[:1000])
        return self.newest if self.newest is not before else None

    async def rollback(self, number: int, *, author: str) -> StoredPolicy:
        """Issue an old policy's content anew and hold the automatic ones."""
        stored = await self._store.run(
            lambda _: self._book.rollback(APPLICATION, number, author=author)
        )
        self._issued(stored)
        return stored

    async def release(self) -> bool:
        """Let automatic policies go on."""
        return await self._store.run(lambda _: self._book.release(APPLICATION))

    def prepare(self, config: PromptsSection) -> Callable[[], None]:
        """Calling the result swaps a reloaded section in."""

        def swap() -> None:
            self._config = config

        return swap

    def intents(self) -> dict[str, Intent]:
        """What is wanted by service type: the operator's word, else the configuration's."""
        found = {section.service_type: section.intent() for section in self._config.intents}
        for name, body in self._overrides.items():
            if name:
                found[name] = validate(IntentSection, body).intent()
        return found

    def describe(self) -> dict[str, Any]:
        """What is known, wanted and chosen, for people."""
        load = self.get_class_load()
        intents = self.intents()
        return {
            "proxies": [f"{role}/{name}" for role, name in sorted(self._proxies)],
            "daily_nano": self._daily_nano(),
            "spent_today_nano": round(sum(load.spent_nano.values())),
            "service_types": {
                name: {
                    "strategy": one.strategy,
                    "requests": round(one.requests, 1),
                    "requests_per_s": round(load.rates.get(name, 0.0), 4),
                    "failed": round(one.failed, 1),
                    "escalated": round(one.escalated, 1),
                    "regenerated": round(one.regenerated, 1),
                    "hits": round(one.hits, 1),
                    "rating": _rating(one),
                    "cost_nano": round(one.cost_nano),
                    "avoided_nano": round(one.avoided_nano),
                    "p50_s": one.latency.quantile(0.5) if one.latency.count else None,
                    "models": {model: round(count, 1) for model, count in one.models.items()},
                    "intent": None if name not in intents else _intent_plain(intents[name]),
                    "choice": None if name not in self.choices else self.choices[name].to_plain(),
                }
                for name, one in sorted(self._window.types.items())
            },
        }

    def seen(self, era: int, number: int, member: str) -> None:
        """A member runs a policy; one this book never issued begins a new era."""
        stored = self._book.seen(APPLICATION, era, number, member)
        if stored is not None:
            _log.warning(
                "new era", extra={"era": stored.era, "member": member, "ran": [era, number]}
            )
            self._issued(stored)

    # -- inside ----------------------------------------------------------------------------------

    def _daily_nano(self) -> int | None:
        own = self._overrides.get("")
        if own is not None:
            return validate(IntentSection, own).intent().daily_nano
        return self._config.daily_nano()

    def _left(self, load: Load) -> float:
        """What any request may cost under the budget of all; inf without one."""
        daily = self._daily_nano()
        if daily is None:
            return math.inf
        return left_a_request(
            daily,
            sum(load.spent_nano.values()),
            wall_s=load.wall_s,
            requests_per_s=sum(load.rates.values()),
        )

    def _accepted(self, row: object, where: str) -> tuple[str, dict[str, Any] | None]:
        """_accepted, of a service type that a proxy offers (any while none has reported)."""
        name, body = _accepted(row, where)
        offered = set().union(*(proxy.offers for proxy in self._proxies.values()))
        if name and body is not None and offered and name not in offered:
            expected = f"one that a proxy offers: {', '.join(sorted(offered))}"
            raise InputError(f"{where}service_type", name, expected)
        return name, body

    def _budgets(self) -> tuple[tuple[str, str, int, str], ...]:
        """What proxies refuse to spend beyond: of all, and of each type that has an amount."""
        daily = {"global": self._daily_nano()}
        daily |= {f"type:{name}": one.daily_nano for name, one in sorted(self.intents().items())}
        return tuple(
            (scope, "nano_dollars", nano, "day")
            for scope, nano in daily.items()
            if nano is not None
        )

    def _why(self, policy: PromptsPolicy) -> str:
        before, words = self._policy, []
        for name, chosen in policy.thresholds.items():
            if before.thresholds.get(name) != chosen and name in self.choices:
                words.append(f"{name}: {self.choices[name].because}")
        if policy.cooldowns_s != before.cooldowns_s:
            words.append("cooldowns: models that fail, or no longer do")
        if policy.budgets != before.budgets:
            words.append("the day's budgets")
        return "; ".join(words)[:1000] or "settings"

    async def _issue(self, policy: PromptsPolicy, *, author: str, reason: str) -> None:
        load = self.get_class_load()
        inputs = {
            "service_types": {name: one.to_plain() for name, one in self.choices.items()},
            "intents": {name: _intent_plain(one) for name, one in self.intents().items()},
            "requests_per_s": {name: round(rate, 4) for name, rate in load.rates.items()},
            "spent_today_nano": round(sum(load.spent_nano.values())),
        }
        stored = await self._store.run(
            lambda _: self._book.issue(
                APPLICATION, policy.to_plain(), inputs=inputs, reason=reason, author=author
            )
        )
        self._issued(stored)

    def _issued(self, stored: StoredPolicy) -> None:
        self.newest = stored
        self._policy = policy_from_plain(stored.body)
        _log.info(
            "policy issued",
            extra={"era": stored.era, "number": stored.number, "reason": stored.reason},
        )
        self._on_issue(stored)


def _rating(outcomes: TypeOutcomes) -> float | None:
    """Mean of what users said of its answers, 0 (bad) to 1; None if they said nothing."""
    rows = [*outcomes.kept, outcomes.asked]
    count = sum(row[0] for row in rows)
    return sum(row[1] for row in rows) / count if count else None


def _intent_plain(intent: Intent) -> dict[str, Any]:
    return {"quality": intent.quality, "daily_nano": intent.daily_nano}


def _stored_intents(store: Storage) -> dict[str, dict[str, Any]]:
    """Service type ("" all together) -> what the operator wants of it."""
    rows = store.read("SELECT name, body FROM intents ORDER BY name")
    return {name: json.loads(body) for name, body in rows}


def _put_intents(store: Storage, intents: Mapping[str, Mapping[str, Any] | None]) -> None:
    """All or none; None goes back to the configuration."""
    with store.transaction() as db:
        for name, body in intents.items():
            if body is None:
                db.execute("DELETE FROM intents WHERE name = ?", (name,))
            else:
                db.execute(
                    "INSERT INTO intents VALUES (?, ?) "
                    "ON CONFLICT (name) DO UPDATE SET body = excluded.body",
                    (name, json.dumps(body)),
                )


def _rows(document: object) -> list[tuple[str, object]]:
    if isinstance(document, Mapping) and "intents" in document:
        rows = document["intents"]
        if len(document) > 1 or not isinstance(rows, (list, tuple)) or not 1 <= len(rows) <= 1000:
            raise InputError("intents", f"{rows!r:.60}", "a list of 1 to 1000 tables, alone")
        return [(f"intents[{index}].", row) for index, row in enumerate(rows)]
    return [("", document)]


def _accepted(row: object, where: str) -> tuple[str, dict[str, Any] | None]:
    """(name of the setting, what to store) of one table of set_policy."""
    if not isinstance(row, Mapping):
        raise InputError(where.rstrip(".") or "policy", f"{row!r:.60}", "a table")
    table = dict(row)
    reset = table.pop("reset", False)
    if not isinstance(reset, bool):
        raise InputError(f"{where}reset", f"{reset!r:.40}", "true or false")
    try:
        section = validate(IntentSection, table)
    except InputError as error:
        raise InputError(f"{where}{error.field}", error.value, error.expected) from None
    name = section.service_type
    if reset:
        return name, None
    if not section.service_type and section.quality is not None:
        raise InputError(f"{where}service_type", "", "the service type whose quality is meant")
    return name, section.model_dump(mode="json", exclude_unset=True)


def _offers(plain: object) -> frozenset[str]:
    if (
        not isinstance(plain, list)
        or len(plain) > MAX_TYPES
        or not all(isinstance(name, str) and len(name) <= MAX_NAME for name in plain)
    ):
        raise InputError("prompts.offers", f"{plain!r:.60}", f"up to {MAX_TYPES} names")
    return frozenset(plain)


def _today(plain: object) -> tuple[str, dict[str, int]]:
    if not isinstance(plain, Mapping):
        raise InputError("prompts.today", f"{plain!r:.60}", "a table")
    day, costs = plain.get("day", ""), plain.get("cost_nano", {})
    good = isinstance(day, str) and len(day) <= 10 and isinstance(costs, Mapping)
    if not good or any(type(nano) is not int or nano < 0 for nano in costs.values()):
        raise InputError("prompts.today", f"{plain!r:.60}", "a day and nano-dollars by type")
    return day, {str(name): nano for name, nano in costs.items()}
