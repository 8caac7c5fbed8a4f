"""Scheduling of network flows: reports in, numbered policies of all link domains out.

The implementation of `controller.application` for flows. A domain starts with one class; its
Learner (core) says when thresholds or weights are worth a new policy, `assemble` (core) makes it.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from intentd.controller.application import SchedulingApplication
from intentd.controller.config import DomainSection, FlowsSection
from intentd.controller.policies import AUTOMATIC, PolicyBook, StoredPolicy
from intentd.core.errors import InputError
from intentd.core.flows.assemble import DomainSettings, LoadMeter, assemble, estimate_of
from intentd.core.flows.learning import Decision, Learner
from intentd.core.flows.policy import (
    MAX_DOMAINS,
    DomainPolicy,
    FlowsPolicy,
    domain_from_plain,
    domain_to_plain,
    flows_from_plain,
    flows_to_plain,
)
from intentd.core.flows.reports import DomainReport, new_flows
from intentd.core.stats import LogHistogram
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.config import validate
from intentd.daemons.kit.store import Storage

_log = logging.getLogger(__name__)

APPLICATION: Final = "flows"
FORGET_DOMAIN_S: Final = 24 * 3600.0
FORGET_MEMBER_S: Final = 3600.0  # counters of an agent that is gone
MAX_PENDING: Final = 100_000  # flows of a domain that wait for the next computation
PERCENTILES: Final = (("p50_s", 0.5), ("p90_s", 0.9), ("p99_s", 0.99), ("p995_s", 0.995))

Array = NDArray[np.float64]
MemberKey = tuple[str, str]
Workload = dict[str, tuple[Array, float]]


@dataclass(slots=True)
class Domain:
    """One link domain: what was learned, chosen and issued.

    pending: (arrival, size) of flows not yet computed with. reports: newest of each agent.
    why: how the policy in force came about.
    """

    name: str
    settings: DomainSettings
    learner: Learner
    load: LoadMeter
    last_s: float
    policy: DomainPolicy | None = None
    why: dict[str, Any] = field(default_factory=dict)
    pending: list[tuple[float, float]] = field(default_factory=list)
    reports: dict[MemberKey, DomainReport] = field(default_factory=dict)
    gone: dict[MemberKey, float] = field(default_factory=dict)
    rates: dict[MemberKey, float] = field(default_factory=dict)
    dropped_flows: int = 0
    measured_load: float | None = None


@dataclass(frozen=True, slots=True)
class Rates:
    """The policies that differ from those in force, and why."""

    policies: dict[str, DomainPolicy]


class FlowsApplication(
    SchedulingApplication[Workload, dict[str, float | None], dict[str, Decision], Rates]
):
    """on_issue is called in the loop with each policy that was numbered and stored."""

    name: ClassVar[str] = APPLICATION

    def __init__(
        self,
        config: FlowsSection,
        clock: Clock,
        store: Storage,
        book: PolicyBook,
        *,
        on_issue: Callable[[StoredPolicy], None],
        seed: int = 0,
    ) -> None:
        self._config = config
        self._clock = clock
        self._store = store
        self._book = book
        self._on_issue = on_issue
        self._rng = random.Random(seed)
        self.domains: dict[str, Domain] = {}
        self._overrides = book.settings()
        self._left: set[str] = set()
        self.newest = book.newest(APPLICATION)
        self._restore()

    # -- measure -----------------------------------------------------------------------------

    def note_domains(self, member: MemberKey, capabilities: Mapping[str, Any]) -> bool:
        """Domains a member announces: names, or tables with name and rate_bps. True if new.

        Of different rates the smallest counts: nobody may send more than the link takes.
        """
        announced = capabilities.get("domains", ())
        if not isinstance(announced, (list, tuple)):
            raise InputError("capabilities.domains", f"{announced!r:.60}", "a list")
        fresh = False
        for item in announced[:MAX_DOMAINS]:
            table = item if isinstance(item, Mapping) else {"name": item}
            name, rate = table.get("name"), table.get("rate_bps", self._config.default_rate)
            good_rate = type(rate) in (int, float) and 0 < rate < math.inf
            if not isinstance(name, str) or not 1 <= len(name) <= 64 or not good_rate:
                raise InputError("capabilities.domains", f"{item!r:.60}", "name and rate_bps > 0")
            fresh |= self._announce(name)
            self.domains[name].gone.pop(member, None)
            self.domains[name].rates[member] = float(rate)
            self._resettle((name,))
        return fresh

    def take_report(self, member: MemberKey, reports: Mapping[str, DomainReport]) -> bool:
        """Queue what a checked report adds. True if a domain is new."""
        now = self._clock.now()
        fresh = False
        for name, report in reports.items():
            fresh |= self._announce(name)
            domain = self.domains[name]
            domain.last_s = now
            last = domain.reports.get(member)
            before = last.histogram if last is not None else None
            flows = new_flows(before, report, now=now, rng=self._rng)
            room = MAX_PENDING - len(domain.pending)
            domain.dropped_flows += max(0, len(flows) - room)
            domain.pending += flows[:room]
            grown = report.histogram.sum - before.sum if before is not None else 0.0
            domain.load.add(max(0.0, grown), now=now)
            domain.reports[member] = report
            domain.gone.pop(member, None)
        return fresh

    def member_restarted(self, member: MemberKey) -> None:
        """Its counters start again from zero."""
        for domain in self.domains.values():
            last = domain.reports.get(member)
            if last is not None:
                empty = LogHistogram(last.histogram.per_octave)
                domain.reports[member] = DomainReport(histogram=empty)

    def member_gone(self, member: MemberKey) -> None:
        """Its queues are no longer shown; a return with the same boot goes on from here."""
        for domain in self.domains.values():
            last = domain.reports.get(member)
            if last is not None:
                domain.reports[member] = replace(last, queue=(), active=())
            if last is not None or member in domain.rates:
                domain.gone[member] = self._clock.now()

    def get_workload_info(self) -> Workload:
        """Domain -> (sizes that arrived since the last call in order of arrival, now)."""
        now = self._clock.now()
        self._forget_domains(now)
        info: Workload = {}
        for name, domain in self.domains.items():
            if domain.pending:
                rows, domain.pending = sorted(domain.pending, key=lambda row: row[0]), []
                info[name] = (np.array([size for _, size in rows]), now)
        return info

    def get_class_load(self) -> dict[str, float | None]:
        """Domain -> offered share of its link; None where it is not known yet."""
        now = self._clock.now()
        loads: dict[str, float | None] = {}
        for name, domain in self.domains.items():
            rate_bps = domain.load.rate_bps(now=now)
            load = None if rate_bps is None else rate_bps / domain.settings.rate_bps
            domain.measured_load = loads[name] = load
        return loads

    # -- compute (in a thread) -----------------------------------------------------------------

    def compute_thresholds(self, workload: Workload) -> dict[str, Decision]:
        decisions = {}
        for name, (sizes, now) in workload.items():
            domain = self.domains.get(name)
            if domain is None:
                continue
            change = domain.learner.observe(sizes, now=now)
            if change is not None:
                _log.info(
                    "workload changed",
                    extra={
                        "domain": name,
                        "flows": change.flows,
                        "divergence": round(change.divergence, 3),
                    },
                )
            decision = domain.learner.decide()
            if decision is not None:
                decisions[name] = decision
        return decisions

    def compute_rates(self, load: dict[str, float | None]) -> Rates:
        """The policies that differ from those in force."""
        changed = {}
        for name, domain in list(self.domains.items()):
            policy = assemble(
                domain.settings, domain.learner, load=load.get(name), in_force=domain.policy
            )
            if policy != domain.policy:
                changed[name] = policy
        return Rates(changed)

    # -- enforce -------------------------------------------------------------------------------

    async def enforce_thresholds(self, thresholds: dict[str, Decision]) -> None:
        """Note why; the thresholds themselves are in the learners, the rates step issues them."""
        for name, decision in thresholds.items():
            domain = self.domains[name]
            detail = {"detail": decision.detail, "flows": decision.estimate.flows}
            domain.why = {"decision": decision.reason, "because": decision.reason, **detail}

    async def enforce_rates(self, rates: Rates) -> None:
        """Issue one numbered policy of all domains if any of them changed and none is held."""
        if self._book.hold(APPLICATION) is None:
            await self._issue(rates, author=AUTOMATIC, reason=self._why(rates.policies))

    async def _issue(self, rates: Rates, *, author: str, reason: str) -> None:
        known = {name: policy for name, policy in rates.policies.items() if name in self.domains}
        if not known and not self._left:
            return
        policies = {
            name: known.get(name, domain.policy) for name, domain in sorted(self.domains.items())
        }
        body = flows_to_plain(FlowsPolicy(tuple(p for p in policies.values() if p is not None)))
        inputs = {"domains": {name: self._inputs(self.domains[name]) for name in policies}}
        stored = await self._store.run(
            lambda _: self._book.issue(
                APPLICATION, body, inputs=inputs, reason=reason, author=author
            )
        )
        self._left.clear()
        for name, policy in known.items():
            self.domains[name].policy = policy
        self._issued(stored)

    # -- the operator ----------------------------------------------------------------------------

    async def set_policy(self, document: object, *, author: str) -> StoredPolicy | None:
        """Take settings or whole policies of one or more domains. Raises InputError, whole.

        document: a domain's table, or {"domains": [tables]}. A table with "classes" is a whole
        policy, which is pinned; others are settings (DomainSection). {"domain": name, "reset":
        true} goes back to the configuration. Returns what was issued, None if nothing changed.
        """
        accepted = dict(self._checked(row, where) for where, row in _rows(document))
        unknown = [name for name in accepted if name not in self.domains]
        if len(self.domains) + len(unknown) > MAX_DOMAINS:
            raise InputError("domains", len(unknown), f"at most {MAX_DOMAINS} domains in all")
        await self._store.run(lambda _: self._book.put_settings(accepted))
        self._overrides = self._book.settings()
        for name in accepted:
            self._announce(name)
        self._resettle(accepted)
        before = self.newest
        rates = self.compute_rates(self.get_class_load())
        await self._issue(rates, author=author, reason=f"set: {', '.join(accepted)}"[:1000])
        return self.newest if self.newest is not before else None

    async def rollback(self, number: int, *, author: str) -> StoredPolicy:
        """Issue an old policy's content anew and hold the automatic ones."""
        stored = await self._store.run(
            lambda _: self._book.rollback(APPLICATION, number, author=author)
        )
        for policy in flows_from_plain(stored.body).domains:
            self._announce(policy.domain, policy.rate_bps)
            self.domains[policy.domain].policy = policy
        self._issued(stored)
        return stored

    async def release(self) -> bool:
        """Let automatic policies go on."""
        return await self._store.run(lambda _: self._book.release(APPLICATION))

    def prepare(self, config: FlowsSection) -> Callable[[], None]:
        """Build what a reloaded section asks for; calling the result swaps. Raises InputError.

        The windows already gathered are kept.
        """
        fresh = {s.domain for s in config.domains} - set(self.domains)
        if len(self.domains) + len(fresh) > MAX_DOMAINS:
            raise InputError("flows.domains", len(config.domains), f"at most {MAX_DOMAINS} domains")
        rates = {name: _rate_of(domain) for name, domain in self.domains.items()}
        rates.update(dict.fromkeys(fresh, config.default_rate))
        settings = {name: self._settings(name, rate, config) for name, rate in rates.items()}
        learn = config.learn()

        def swap() -> None:
            self._config = config
            for name in fresh:
                self._announce(name)
            for name, domain in self.domains.items():
                domain.learner.settings = learn
                domain.load.window_s = config.load_window_s
                domain.settings = settings[name]

        return swap

    # -- for people ------------------------------------------------------------------------------

    def describe(self, name: str) -> dict[str, Any]:
        """One domain as /api/domains shows it. Raises InputError for an unknown one."""
        domain = self.domains.get(name)
        if domain is None:
            raise InputError("domain", name, f"one of {', '.join(sorted(self.domains)) or 'none'}")
        learner = domain.learner
        change = learner.last_change
        return {
            "domain": name,
            "rate_bps": domain.settings.rate_bps,
            "policy": domain.settings.family if domain.settings.policy is None else "pinned",
            "pinned": bool(domain.settings.policy or domain.settings.thresholds_bytes),
            "override": self._overrides.get(name),
            "classes": learner.in_force.classes
            if domain.policy is None
            else len(domain.policy.classes),
            "load": domain.measured_load,
            "why": {key: value for key, value in domain.why.items() if key != "decision"},
            "window_flows": learner.flows,
            "observed_flows": learner.observed,
            "dropped_flows": domain.dropped_flows,
            "learning": "stale"
            if learner.stale and learner.changes
            else "bootstrap"
            if learner.stale
            else "settled",
            "changes": learner.changes,
            "last_change": None
            if change is None or learner.last_change_s is None
            else {
                "ago_s": round(self._clock.now() - learner.last_change_s, 3),
                "window_flows": change.window,
                "statistic": round(change.statistic, 1),
                "bound": round(change.bound, 1),
                "divergence": round(change.divergence, 4),
            },
            "agents": {
                f"{role}/{member}": {"shaping": r.shaping, "reason": r.shaping_reason}
                for (role, member), r in sorted(domain.reports.items())
            },
        }

    def flows(self, name: str) -> dict[str, Any]:
        """Classes, queues and completion times of a domain over all its agents."""
        domain = self.domains[name]
        policy = domain.policy
        reports = list(domain.reports.values())
        classes = []
        shares = (
            domain.learner.byte_shares(tuple(c.threshold_bytes for c in policy.classes))
            if policy is not None
            else ()
        )
        for index, cls in enumerate(policy.classes if policy is not None else ()):
            load = domain.measured_load
            classes.append(
                {
                    "index": index,
                    "threshold_bytes": None
                    if cls.threshold_bytes == math.inf
                    else cls.threshold_bytes,
                    "weight": cls.weight,
                    "mpl": cls.mpl,
                    "order": cls.order,
                    "sequencing": cls.sequencing,
                    "dscp": cls.dscp,
                    "load": None if load is None else load * shares[index],
                    "waiting": sum(_at(report.queue, index) for report in reports),
                    "active": sum(_at(report.active, index) for report in reports),
                    "fct_s": _summary([r.fct[index] for r in reports if index in r.fct]),
                    "wait_s": _summary([r.wait[index] for r in reports if index in r.wait]),
                }
            )
        degraded: dict[str, int] = {}
        for report in reports:
            for reason, count in report.degraded.items():
                degraded[reason] = degraded.get(reason, 0) + count
        return {
            "domain": name,
            "policy": policy.name if policy is not None else None,
            "rate_bps": domain.settings.rate_bps,
            "load": domain.measured_load,
            "classes": classes,
            "arrivals": sum(report.arrivals for report in reports),
            "finished": sum(report.finished for report in reports),
            "fct_s": _summary([h for r in reports for h in r.fct.values()]),
            "handover_s": _summary([r.handover for r in reports if r.handover is not None]),
            "degraded": degraded,
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

    def _restore(self) -> None:
        """Go on from the newest stored policy, and know the configured domains."""
        if self.newest is not None:
            inputs = self.newest.inputs.get("domains", {})
            for policy in flows_from_plain(self.newest.body).domains:
                self._announce(policy.domain, policy.rate_bps)
                domain = self.domains[policy.domain]
                domain.policy = policy
                flows = int(inputs.get(policy.domain, {}).get("flows", 0))
                learned = domain.settings.policy is None and policy.name == domain.settings.family
                if learned and flows >= self._config.min_flows:
                    domain.learner.restore(estimate_of(policy, flows))
        for section in self._config.domains:
            self._announce(section.domain)
        for name in self._overrides:
            self._announce(name)

    def _announce(self, name: str, rate_bps: float | None = None) -> bool:
        """Make a domain known, with the rate of its stored policy if it has one. True if new."""
        if name in self.domains:
            return False
        if len(self.domains) >= MAX_DOMAINS:
            raise InputError("domain", name[:64], f"at most {MAX_DOMAINS} domains")
        self.domains[name] = Domain(
            name,
            self._settings(name, rate_bps or self._config.default_rate),
            Learner(self._config.learn()),
            LoadMeter(self._config.load_window_s),
            self._clock.now(),
        )
        return True

    def _settings(
        self, name: str, rate_bps: float, config: FlowsSection | None = None
    ) -> DomainSettings:
        """The operator's override, else the configuration, else the default."""
        config = config or self._config
        override = self._overrides.get(name)
        if override is not None and "classes" in override:
            policy = domain_from_plain(override)
            return DomainSettings(name, policy.rate_bps, policy=policy)
        if override is not None:
            section = validate(DomainSection, override)
        else:
            named = [s for s in config.domains if s.domain == name]
            section = named[0] if named else DomainSection(domain=name)
        return section.settings(rate_bps, config.policy)

    def _resettle(self, names: Iterable[str]) -> None:
        for name in names:
            domain = self.domains[name]
            domain.settings = self._settings(name, _rate_of(domain))

    def _checked(self, row: object, where: str) -> tuple[str, dict[str, Any] | None]:
        """(domain, what to store) of one table of set_policy."""
        if not isinstance(row, Mapping):
            raise InputError(where or "policy", f"{row!r:.60}", "a table")
        table = dict(row)
        if "classes" in table:
            policy = domain_from_plain(table, where or "domain")
            return policy.domain, domain_to_plain(policy)
        reset = table.pop("reset", False)
        if not isinstance(reset, bool):
            raise InputError(f"{where}.reset".lstrip("."), reset, "true or false")
        try:
            section = validate(DomainSection, table)
        except InputError as error:
            at = f"{where}.{error.field}" if where else error.field
            raise InputError(at, error.value, error.expected) from None
        if reset:
            return section.domain, None
        return section.domain, section.model_dump(mode="json", exclude_unset=True)

    def _forget_domains(self, now: float) -> None:
        """Drop agents long gone, and domains nobody reported for a day and nobody configured."""
        configured = {section.domain for section in self._config.domains} | set(self._overrides)
        for name, domain in list(self.domains.items()):
            for member, since_s in list(domain.gone.items()):
                if now - since_s > FORGET_MEMBER_S:
                    del domain.gone[member]
                    domain.reports.pop(member, None)
                    domain.rates.pop(member, None)
            if now - domain.last_s > FORGET_DOMAIN_S and name not in configured:
                del self.domains[name]
                self._left.add(name)

    def _inputs(self, domain: Domain) -> dict[str, Any]:
        learner = domain.learner
        return {
            **{key: value for key, value in domain.why.items() if key != "decision"},
            "flows": learner.in_force.flows,
            "window_flows": learner.flows,
            "observed_flows": learner.observed,
            "changes": learner.changes,
            "load": domain.measured_load,
            "family": domain.settings.family if domain.settings.policy is None else "pinned",
            "agents": len(domain.reports),
        }

    def _why(self, changed: Mapping[str, DomainPolicy]) -> str:
        words = []
        for name in changed:
            domain = self.domains[name]
            first = "bootstrap with one class" if domain.policy is None else "settings or load"
            words.append(f"{name}: {domain.why.pop('decision', first)}")
        return "; ".join(words)[:1000] or "domains left"

    def _issued(self, stored: StoredPolicy) -> None:
        self.newest = stored
        _log.info(
            "policy issued",
            extra={"era": stored.era, "number": stored.number, "reason": stored.reason},
        )
        self._on_issue(stored)


def _rate_of(domain: Domain) -> float:
    """The least that an agent says of its link, else what was known."""
    return min(domain.rates.values(), default=domain.settings.rate_bps)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a flows policy changes against the one before, one line a fact."""
    before = {row["domain"]: row for row in old.get("domains", ())}
    after = {row["domain"]: row for row in new.get("domains", ())}
    lines = [f"{name}: domain left" for name in before if name not in after]
    for name, row in after.items():
        was = before.get(name)
        if was is None:
            lines.append(f"{name}: new domain, {len(row['classes'])} classes")
            continue
        lines += [
            f"{name}: {key} {was.get(key)} -> {value}"
            for key, value in row.items()
            if key != "classes" and was.get(key) != value
        ]
        lines += _class_differences(name, was["classes"], row["classes"])
    return lines[:1000]


def _class_differences(
    name: str, old: list[dict[str, Any]], new: list[dict[str, Any]]
) -> list[str]:
    lines = []
    if len(old) != len(new):
        lines.append(f"{name}: {len(old)} -> {len(new)} classes")
    for index, row in enumerate(new):
        was = old[index] if index < len(old) else {}
        lines += [
            f"{name}: classes[{index}].{key} {was.get(key)} -> {value}"
            for key, value in row.items()
            if key in ("threshold_bytes", "weight", "mpl", "order", "boost_gamma_per_s")
            and was.get(key) != value
        ]
    return lines


def _rows(document: object) -> list[tuple[str, object]]:
    if isinstance(document, Mapping) and "domains" in document:
        rows = document["domains"]
        for key in document:
            if key != "domains":
                raise InputError(str(key), f"{document[key]!r:.60}", "domains alone")
        if not isinstance(rows, (list, tuple)) or not 1 <= len(rows) <= MAX_DOMAINS:
            raise InputError("domains", f"{rows!r:.60}", f"a list of 1 to {MAX_DOMAINS} tables")
        return [(f"domains[{index}]", row) for index, row in enumerate(rows)]
    return [("", document)]


def _at(row: tuple[int, ...], index: int) -> int:
    return row[index] if index < len(row) else 0


def _summary(histograms: list[LogHistogram]) -> dict[str, float]:
    """Count, mean and percentiles of merged histograms; count alone when empty."""
    merged: LogHistogram | None = None
    for histogram in histograms:
        if merged is None:
            merged = LogHistogram(histogram.per_octave)
        if histogram.per_octave == merged.per_octave:
            merged.merge(histogram)
    if merged is None or not merged.count:
        return {"count": 0}
    summary = {"count": merged.count, "mean_s": merged.mean}
    summary.update({name: merged.quantile(q) for name, q in PERCENTILES})
    return summary
