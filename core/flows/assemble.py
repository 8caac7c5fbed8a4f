"""From what was learned and what the operator chose to the policy of a domain.

The daemon and the simulation of changing workloads call the same function.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Final

from intentd.core.errors import PolicyError
from intentd.core.flows.classes import class_gammas, sorted_sample
from intentd.core.flows.learning import BOOTSTRAP, Estimate, Learner
from intentd.core.flows.policies import CLASSED, POLICIES, make_domain_policy
from intentd.core.flows.policy import MAX_CLASSES, UNLIMITED, DomainPolicy

LEAST_LOAD: Final = 0.05
ASSUMED_LOAD: Final = 0.8  # for comparison policies that need a load, until one is measured
GAMMA_MOVED: Final = 0.25
SIZELESS: Final = ("ps", "fifo", "np-sjf", "lps")  # need no sizes


# The next flow's request travels while the last bytes of the one before do. Handing a turn over
# takes .4-.7 ms on the real kernel; announced a millisecond early, it costs the link nothing.
# Measured, uniform sizes, 80 % of 1 Gb/s, one FIFO class, on a quiet machine: mean 1.5 times the
# simulator's without, 1.06 with; two flows overlap for the rest, which no percentile shows.
EARLY_FIN_S: Final = 1e-3
# Across hosts the word goes over the network and through one more agent: .8 ms in the median, 1.9
# at the 90th percentile (measured: intentctl testbed run global_order).
GLOBAL_EARLY_FIN_S: Final = 2e-3
# A request and its first bytes take .2 ms there: one bandwidth-delay product.
ROUND_TRIP_S: Final = 0.2e-3


def default_early_fin_bytes(rate_bps: float, sequencing: str = "local") -> int:
    """What is left of a flow when its turn is announced: a millisecond of the link, two of them
    where hosts take turns."""
    return round(rate_bps / 8 * (EARLY_FIN_S if sequencing == "local" else GLOBAL_EARLY_FIN_S))


def default_local_below_bytes(rate_bps: float) -> int:
    """One bandwidth-delay product: flows up to this size skip the order across hosts."""
    return round(rate_bps / 8 * ROUND_TRIP_S)


@dataclass(frozen=True, slots=True)
class DomainSettings:
    """What an operator chose for a domain; the rest is learned. Validated; raises PolicyError.

    family: a name of POLICIES; the classes of those in CLASSED are learned.
    mpl: multiplexing level of each class of 2d and 2d-boost, the last one repeated.
    thresholds_bytes, weights: pinned when not empty; the last threshold is infinity.
    early_fin_bytes: None is a millisecond of the link, two where the order is global.
    local_below_bytes: None is one bandwidth-delay product, .2 ms of the link.
    sequencing: of all classes. policy: the whole policy, pinned; nothing else applies then.
    """

    domain: str
    rate_bps: float
    family: str = "2d"
    mpl: tuple[int, ...] = (1,)
    sequencing: str = "local"
    turn_mode: str = "hybrid"
    max_wait_s: float = 30.0
    batch_bytes: int = 0
    early_fin_bytes: int | None = None
    local_below_bytes: int | None = None
    thresholds_bytes: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    policy: DomainPolicy | None = None

    def __post_init__(self) -> None:
        if self.family not in POLICIES:
            raise PolicyError("policy", self.family, f"one of {', '.join(POLICIES)}")
        if not self.mpl or len(self.mpl) > MAX_CLASSES:
            raise PolicyError("mpl", list(self.mpl), f"1 to {MAX_CLASSES} levels")
        if self.thresholds_bytes and self.family not in CLASSED:
            raise PolicyError(
                "thresholds_bytes", self.family, f"none, or a policy of {', '.join(CLASSED)}"
            )
        if self.weights and len(self.weights) != len(self.thresholds_bytes):
            raise PolicyError(
                "weights", list(self.weights), f"{len(self.thresholds_bytes)}, one a threshold"
            )
        count = max(1, len(self.thresholds_bytes))
        thresholds = self.thresholds_bytes or BOOTSTRAP.thresholds_bytes
        _classed(self, thresholds, self.weights or (1.0 / count,) * count, family="2d")


@dataclass(slots=True)
class LoadMeter:
    """Arrived bytes over the last window_s seconds."""

    window_s: float = 60.0
    _rows: deque[tuple[float, float]] | None = None
    _since_s: float | None = None

    def add(self, size_bytes: float, *, now: float) -> None:
        if self._rows is None or self._since_s is None:
            self._rows, self._since_s = deque(), now
            return  # of the first report it is not known how long it took
        self._rows.append((now, size_bytes))
        while self._rows and now - self._rows[0][0] > self.window_s:
            self._rows.popleft()

    def rate_bps(self, *, now: float) -> float | None:
        """None before a sixth of the window was seen."""
        if self._rows is None or self._since_s is None:
            return None
        seen_s = min(now - self._since_s, self.window_s)
        if seen_s < self.window_s / 6:
            return None
        recent = math.fsum(size for at, size in self._rows if now - at <= self.window_s)
        return 8.0 * recent / seen_s


def assemble(
    settings: DomainSettings,
    learner: Learner,
    *,
    load: float | None,
    in_force: DomainPolicy | None = None,
) -> DomainPolicy:
    """The policy of a domain now. load: offered share of the link, None when not known yet.

    Until something was learned there is one class, and it has no gate: the link shares as it would
    without us. One FIFO class would put small flows behind the large ones of a workload nobody
    knows yet (data mining: median 6e5 times worse).
    gamma of the boost is kept from in_force while it moved less than GAMMA_MOVED. Without a known
    load classes are served in arrival order.
    """
    if settings.policy is not None:
        return settings.policy
    if settings.family not in CLASSED:
        return _comparison(settings, learner, load, in_force)
    thresholds = settings.thresholds_bytes or learner.in_force.thresholds_bytes
    if settings.weights:
        weights = settings.weights
    elif settings.thresholds_bytes:
        weights = _settled_weights(learner, thresholds, in_force)
    else:
        weights = learner.in_force.weights
    gammas: tuple[float | None, ...] = (None,) * len(thresholds)
    if settings.family == "2d-boost" and load and learner.flows >= learner.settings.min_flows:
        gammas = class_gammas(
            sorted_sample(learner.sample()),
            thresholds,
            load=max(load, LEAST_LOAD),
            rate_bps=settings.rate_bps,
        )
        gammas = _settled_gammas(gammas, thresholds, in_force)
    learned = bool(learner.in_force.flows or settings.thresholds_bytes)
    return _classed(settings, thresholds, weights, gammas, gated=learned)


def estimate_of(policy: DomainPolicy, flows: int) -> Estimate:
    """What a stored policy says was learned, to go on from after a restart."""
    return Estimate(
        tuple(cls.threshold_bytes for cls in policy.classes),
        tuple(cls.weight for cls in policy.classes),
        flows,
    )


def _settled_weights(
    learner: Learner, thresholds: tuple[float, ...], in_force: DomainPolicy | None
) -> tuple[float, ...]:
    """Job shares at pinned thresholds; those in force while they moved no more than noise."""
    if learner.flows < learner.settings.min_flows:
        return (1.0 / len(thresholds),) * len(thresholds)
    weights = learner.rates(thresholds)
    if in_force is not None and _thresholds(in_force) == thresholds:
        old = tuple(cls.weight for cls in in_force.classes)
        if not learner.shifted(old, weights):
            return old
    return weights


def _settled_gammas(
    found: tuple[float | None, ...], thresholds: tuple[float, ...], in_force: DomainPolicy | None
) -> tuple[float | None, ...]:
    if in_force is None or _thresholds(in_force) != thresholds:
        return found
    kept: list[float | None] = []
    for gamma, cls in zip(found, in_force.classes, strict=True):
        old = cls.boost_gamma_per_s
        near = old > 0 and gamma and abs(math.log(gamma / old)) < math.log1p(GAMMA_MOVED)
        kept.append(old if near else gamma)
    return tuple(kept)


def _thresholds(policy: DomainPolicy) -> tuple[float, ...]:
    return tuple(cls.threshold_bytes for cls in policy.classes)


def _comparison(
    settings: DomainSettings, learner: Learner, load: float | None, in_force: DomainPolicy | None
) -> DomainPolicy:
    """A policy without learned classes, made once from the sizes seen and then left alone.

    Those that need sizes stand as processor sharing until there are enough.
    """
    if in_force is not None and in_force.name == settings.family:
        return replace(in_force, **_common(settings))
    enough = learner.flows >= learner.settings.min_flows
    family = settings.family if enough or settings.family in SIZELESS else "ps"
    policy = make_domain_policy(
        family,
        domain=settings.domain,
        rate_bps=settings.rate_bps,
        sizes=learner.sample().tolist() if enough else None,
        load=load or ASSUMED_LOAD,
        sequencing=settings.sequencing,
    )
    return replace(policy, **_common(settings))


def _common(settings: DomainSettings) -> dict[str, Any]:
    return {
        "rate_bps": settings.rate_bps,
        "turn_mode": settings.turn_mode,
        "max_wait_s": settings.max_wait_s,
        "batch_bytes": settings.batch_bytes,
        "early_fin_bytes": default_early_fin_bytes(settings.rate_bps, settings.sequencing)
        if settings.early_fin_bytes is None
        else settings.early_fin_bytes,
        "local_below_bytes": default_local_below_bytes(settings.rate_bps)
        if settings.local_below_bytes is None
        else settings.local_below_bytes,
    }


def _classed(
    settings: DomainSettings,
    thresholds: tuple[float, ...],
    weights: tuple[float, ...],
    gammas: tuple[float | None, ...] | None = None,
    family: str = "",
    gated: bool = True,
) -> DomainPolicy:
    policy = make_domain_policy(
        family or settings.family,
        domain=settings.domain,
        rate_bps=settings.rate_bps,
        thresholds_bytes=thresholds,
        weights=weights,
        gammas_per_s=gammas or (None,) * len(thresholds),
        sequencing=settings.sequencing,
    )
    classes = policy.classes
    if settings.family != "htb":
        levels = settings.mpl if gated else (UNLIMITED,)
        classes = tuple(
            replace(cls, mpl=levels[min(index, len(levels) - 1)])
            for index, cls in enumerate(classes)
        )
    return replace(policy, classes=classes, **_common(settings))
