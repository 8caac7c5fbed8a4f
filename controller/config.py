"""The controller's configuration file, and what an operator may say about a domain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from pydantic import Field, model_validator

from intentd.core.errors import ConfigError, InputError
from intentd.core.flows.assemble import DomainSettings
from intentd.core.flows.learning import LearnSettings
from intentd.core.jobs.history import HistorySettings
from intentd.core.jobs.metrics import parse_objectives
from intentd.core.jobs.policy import NAMES
from intentd.core.prompts.money import parse_dollars
from intentd.core.prompts.steering import Intent
from intentd.daemons.kit.config import (
    CommonConfig,
    Duration,
    HubSection,
    Rate,
    Section,
    Size,
    check_database,
    validate,
)


class DomainSection(Section):
    """What the operator chose for one link domain; what is left out is learned or the default."""

    domain: str = Field(
        description="Name of the link domain, as agents report it.", min_length=1, max_length=64
    )
    rate: Rate | None = Field(
        default=None, description="Capacity of the link. Default: what its agents report.", gt=0
    )
    policy: str | None = Field(
        default=None, description="2d, 2d-boost, htb, ps, fifo, np-sjf, baraat, aalo, pias or lps."
    )
    mpl: tuple[int, ...] = Field(
        default=(1,), description="Multiplexing level of each class, the last one repeated."
    )
    sequencing: str = Field(
        default="local",
        description="local: order on each host; global: order through the sequencer.",
    )
    turn_mode: str = Field(
        default="hybrid",
        description="hybrid, centralised or decentralised turns (global sequencing).",
    )
    max_wait: Duration = Field(
        default=30.0, description="Longest wait at a gate before a degraded start."
    )
    batch: Size = Field(
        default=0, description="Bytes that may ride on one waiting ticket; 0: none."
    )
    early_fin: Size | None = Field(
        default=None,
        description="Bytes left when the turn is announced; 0: at the end. Default: a millisecond "
        "of the link, two where the order is global.",
    )
    local_below: Size | None = Field(
        default=None,
        description="Flows up to this size skip the global order. Default: a bandwidth-delay "
        "product, .2 ms of the link.",
    )
    thresholds: tuple[Size, ...] = Field(
        default=(), description="Class borders in bytes, pinned, without the last (infinity)."
    )
    weights: tuple[float, ...] = Field(
        default=(), description="Weights, pinned, one more than thresholds; they sum to 1."
    )

    def settings(self, rate_bps: float, family: str) -> DomainSettings:
        """With what is left out filled in. Raises PolicyError."""
        pinned = bool(self.thresholds or self.weights)
        return DomainSettings(
            self.domain,
            self.rate if self.rate is not None else rate_bps,
            family=self.policy or family,
            mpl=self.mpl,
            sequencing=self.sequencing,
            turn_mode=self.turn_mode,
            max_wait_s=self.max_wait,
            batch_bytes=self.batch,
            early_fin_bytes=self.early_fin,
            local_below_bytes=self.local_below,
            thresholds_bytes=(*map(float, self.thresholds), math.inf) if pinned else (),
            weights=self.weights,
        )

    @model_validator(mode="after")
    def _check(self) -> DomainSection:
        self.settings(1e9, "2d")
        return self


class FlowsSection(Section):
    """Scheduling of network flows: how the controller learns and when it speaks."""

    policy: str = Field(
        default="2d",
        description="Policy of domains that name none: 2d or 2d-boost, or a comparison.",
    )
    default_rate: Rate = Field(
        default=1e9, description="Capacity of a domain whose agents report none.", gt=0
    )
    thresholds_interval_s: Duration = Field(
        default=3.0,
        description="Seconds between two computations of class thresholds.",
        gt=0,
        le=3600,
    )
    rates_interval_s: Duration = Field(
        default=1.0, description="Seconds between two computations of class rates.", gt=0, le=3600
    )
    load_window_s: Duration = Field(
        default=60.0,
        description="Window over which the load of a domain is measured.",
        gt=0,
        le=86400,
    )
    window_flows: int = Field(
        default=20_000, description="Newest flows of a domain that are kept.", ge=1000, le=1_000_000
    )
    keep_flows: int = Field(default=3_000, description="Of these, kept whatever their age.", ge=0)
    max_age_s: Duration = Field(
        default=3600.0, description="Age at which other flows are forgotten.", gt=0
    )
    min_flows: int = Field(
        default=200, description="Flows of a workload before its classes are computed.", ge=2
    )
    false_alarm: float = Field(
        default=1e-7,
        description="Chance that one test of an unchanged workload fires.",
        gt=0,
        lt=0.5,
    )
    domains: tuple[DomainSection, ...] = Field(
        default=(), description="Settings of single domains."
    )

    @model_validator(mode="after")
    def _check(self) -> FlowsSection:
        if self.rates_interval_s > self.thresholds_interval_s:
            raise ConfigError(
                "rates_interval_s", self.rates_interval_s, "at most thresholds_interval_s"
            )
        DomainSettings("any", self.default_rate, family=self.policy)
        names = [section.domain for section in self.domains]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ConfigError(f"domains[{index}].domain", name, "a name used once")
        return self

    def learn(self) -> LearnSettings:
        return LearnSettings(
            window_flows=self.window_flows,
            keep_flows=self.keep_flows,
            max_age_s=self.max_age_s,
            min_flows=self.min_flows,
            false_alarm=self.false_alarm,
        )


class JobsSection(Section):
    """Scheduling of GPU jobs: when trade-offs are searched, how, and for how long."""

    bootstrap: str = Field(
        default="fifo", description="First policy, before any front: " + ", ".join(NAMES) + "."
    )
    objectives: tuple[str, ...] = Field(
        default=("jct:avg", "prederr:avg"),
        description="metric:measure of the trade-offs; metrics jct, prederr, unfairness; measures "
        "avg, p99 and the like. An operator's preference goes before them.",
    )
    search: bool = Field(
        default=True,
        description="Search a front by itself: after bootstrap, changes, growth and the interval.",
    )
    front_interval_s: Duration = Field(
        default=86_400.0, description="Seconds between two searches if nothing changed.", gt=0
    )
    rest_s: Duration = Field(
        default=600.0, description="Searches by itself are at least so far apart.", ge=0
    )
    min_jobs: int = Field(default=200, description="Jobs known before the first search.", ge=20)
    window_jobs: int = Field(
        default=10_000, description="Newest jobs of a scheduler that are kept.", ge=200, le=100_000
    )
    evaluations: int = Field(
        default=1000, description="Evaluations of a search.", ge=1, le=1_000_000
    )
    seconds: Duration = Field(
        default=300.0, description="A search stops after so long with what it has.", gt=0, le=86_400
    )
    algorithm: str = Field(
        default="spea2", description="spea2 or nsga2.", pattern="^(spea2|nsga2)$"
    )
    space: str = Field(
        default="direct",
        description="direct (thresholds and weights), wfq (T, W, zeta, delta), or both.",
        pattern="^(direct|wfq|both)$",
    )
    samples: int = Field(
        default=3, description="Resampled training histories a point is tried on.", ge=1, le=100
    )
    sample_jobs: int = Field(
        default=1000, description="Jobs of a training history.", ge=20, le=100_000
    )
    workers: int = Field(
        default=1, description="Processes of a search, beside its own; niced.", ge=1, le=256
    )
    history_interval_s: Duration = Field(
        default=5.0, description="Seconds between two looks at the history.", gt=0, le=3600
    )

    @model_validator(mode="after")
    def _check(self) -> JobsSection:
        if self.bootstrap not in NAMES:
            raise ConfigError("bootstrap", self.bootstrap, f"one of {', '.join(NAMES)}")
        parse_objectives(",".join(self.objectives))
        return self

    def history(self) -> HistorySettings:
        return HistorySettings(window_jobs=self.window_jobs, min_jobs=self.min_jobs)

    def checked(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of one search, given by an operator. Raises InputError."""
        for name in changed:
            if name not in SEARCH_SETTINGS:
                raise InputError(
                    str(name)[:60], changed[name], f"one of {', '.join(SEARCH_SETTINGS)}"
                )
        given = {name: value for name, value in changed.items() if value is not None}
        section = validate(JobsSection, {**self.model_dump(exclude_unset=True), **given})
        return {name: getattr(section, name) for name in given}


SEARCH_SETTINGS: Final = (
    "evaluations", "seconds", "algorithm", "space", "samples", "sample_jobs", "workers",
)  # fmt: skip


class IntentSection(Section):
    """What is wanted of one service type of the proxies."""

    service_type: str = Field(
        default="", description="Name of the service type; empty: all together (daily alone)."
    )
    quality: float | None = Field(
        default=None,
        description="At least this, at least cost: 1 to 10 by the verifier and ratings for verify "
        "cascades, 0 to 1 (less the loss against the dear model) for agree and route.",
        ge=0,
        le=10,
    )
    daily: str = Field(default="", description='At most so many dollars a day, as text: "2.50".')

    @model_validator(mode="after")
    def _check(self) -> IntentSection:
        self.intent()
        return self

    def intent(self) -> Intent:
        daily = parse_dollars(self.daily, "daily") if self.daily else None
        return Intent(self.service_type, self.quality, daily)


class PromptsSection(Section):
    """Prompts of language models: what is wanted, and how outcomes are weighed."""

    intents: tuple[IntentSection, ...] = Field(
        default=(), description="What is wanted, by service type."
    )
    daily: str = Field(
        default="",
        description="All proxies together spend at most so many dollars a day (UTC), as text. Each "
        "proxy's ledger holds it exactly; several proxies hold it together on one PostgreSQL.",
    )
    interval_s: Duration = Field(
        default=10.0, description="Seconds between two computations.", gt=0, le=86_400
    )
    half_life_s: Duration = Field(
        default=86_400.0, description="After so long an outcome counts for half.", gt=0
    )
    min_outcomes: float = Field(
        default=100.0, description="Outcomes of a service type before its threshold moves.", ge=1
    )
    cooldown_s: Duration = Field(
        default=5.0, description="Cooldown of a model that begins to fail; doubles.", gt=0
    )
    max_cooldown_s: Duration = Field(default=60.0, description="Longest cooldown.", gt=0)

    @model_validator(mode="after")
    def _check(self) -> PromptsSection:
        self.daily_nano()
        names = [section.service_type for section in self.intents]
        for index, name in enumerate(names):
            if not name or name in names[:index]:
                raise ConfigError(f"intents[{index}].service_type", name, "a name used once")
        return self

    def daily_nano(self) -> int | None:
        return parse_dollars(self.daily, "daily") if self.daily else None


class StoreSection(Section):
    """Where policies, their inputs and what the operator set are kept."""

    url: str = Field(
        default="",
        description="postgresql://USER@HOST/DATABASE, without a password, for controllers in a "
        "pair: one leads, the others stand by (extra controller-postgres; PostgreSQL 14 or newer, "
        "no pooler that shares sessions). Empty: controller.sqlite3 in the state directory.",
    )
    password_env: str = Field(
        default="", description="Environment variable that holds the database's password."
    )
    timeout_s: Duration = Field(
        default=5.0, description="Longest wait for one statement of the database.", gt=0, le=60
    )
    lease_s: Duration = Field(
        default=2.0,
        description="A leader that the database did not hear for this long leads no more; the "
        "same for all controllers of a database.",
        ge=0.2,
        le=60,
    )

    @model_validator(mode="after")
    def _check(self) -> StoreSection:
        check_database(self.url, self.password_env)
        return self


class ControllerConfig(CommonConfig):
    """Everything in controller.toml."""

    role: ClassVar[str] = "controller"

    hub: HubSection = Field(default=HubSection(), description="Where members connect.")
    store: StoreSection = Field(
        default=StoreSection(), description="Where policies are kept, and who of a pair leads."
    )
    flows: FlowsSection = Field(default=FlowsSection(), description="Scheduling of network flows.")
    jobs: JobsSection = Field(default=JobsSection(), description="Scheduling of GPU jobs.")
    prompts: PromptsSection = Field(
        default=PromptsSection(), description="Quality and cost of language-model prompts."
    )
