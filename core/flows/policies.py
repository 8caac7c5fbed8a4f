"""Every scheduling policy as parameters of the one gate and the one link.

The dissertation's section 2.5.3 and the original papers. Standard library only; classes.py wraps
this for callers that have a numpy sample.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

from intentd.core.errors import InputError
from intentd.core.flows.boost import gamma_of_cdf, gamma_of_sample
from intentd.core.flows.policy import UNLIMITED, ClassPolicy, DomainPolicy
from intentd.core.flows.workloads import SizeCdf
from intentd.core.stats import percentile

POLICIES: Final = (
    "2d",
    "2d-boost",
    "htb",
    "ps",
    "fifo",
    "np-sjf",
    "baraat",
    "aalo",
    "pias",
    "lps",
)
CLASSED: Final = ("2d", "2d-boost", "htb")  # need thresholds of Algorithm 1, or given ones
# A measured load above this counts as this: gamma and mpl have no value at 1.
MAX_LOAD: Final = 0.95

AALO_QUEUES: Final = 10
AALO_FACTOR: Final = 10.0
PIAS_CLASSES: Final = 8
_SEGMENT: Final = 1460.0
# Demotion thresholds of the PIAS authors at 80 % load, in segments (their ns-2 scripts and
# kernel module; Bai et al., NSDI 2015). The chapter uses them for these two workloads alone.
PIAS_SEGMENTS: Final = {
    "web-search": (909, 1329, 1648, 1960, 2143, 2337, 2484),
    "data-mining": (745, 1083, 1391, 13689, 14396, 21149, 27245),
}
BARAAT_SMALL: Final = 0.9
BARAAT_OVERFLOW: Final = 0.05
BARAAT_MAX_CLASSES: Final = 16
LPS_LARGE_FLOWS: Final = 2.0
# Code points for local use: pool 2 (xxxx11) of RFC 2474, section 6, then pool 3 (xxxx01).
_DSCP: Final = (*range(3, 64, 4), *range(1, 64, 4))


class Sizes(Protocol):
    """What a policy asks of a size distribution; SizeCdf and SizeSample have it."""

    @property
    def mean_bytes(self) -> float: ...
    def quantile(self, u: float) -> float: ...
    def share(self, size_bytes: float) -> float: ...


@dataclass(frozen=True, slots=True)
class SizeSample:
    """A sample of flow sizes as a distribution. ordered: ascending bytes, not empty."""

    ordered: Sequence[float]

    @classmethod
    def of(cls, sizes_bytes: Iterable[float]) -> SizeSample:
        """Sorts a copy. Raises InputError when empty, negative or not finite."""
        ordered = sorted(float(size) for size in sizes_bytes)
        if not ordered:
            raise InputError("sizes", "no sizes", "at least one flow size")
        if not all(0 <= size < math.inf for size in ordered):
            raise InputError("sizes", ordered[0], "finite sizes >= 0")
        return cls(ordered)

    @property
    def mean_bytes(self) -> float:
        return math.fsum(self.ordered) / len(self.ordered)

    def quantile(self, u: float) -> float:
        return percentile(self.ordered, u)

    def share(self, size_bytes: float) -> float:
        return bisect_right(self.ordered, size_bytes) / len(self.ordered)


def make_domain_policy(
    name: str,
    *,
    domain: str,
    rate_bps: float,
    sizes: SizeCdf | SizeSample | Iterable[float] | None = None,
    load: float | None = None,
    thresholds_bytes: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    gammas_per_s: Sequence[float | None] | None = None,
    workload: str = "",
    sequencing: str = "local",
    max_wait_s: float = 30.0,
) -> DomainPolicy:
    """The policy `name` for one link domain.

    sizes: the flow sizes it is for, a CDF or a sample; not needed by ps, fifo, np-sjf.
    load: offered share of the link; lps, baraat, 2d-boost need it (2d-boost not with gammas).
    thresholds_bytes: class limits for 2d, 2d-boost, htb, ending in infinity; weights default to
        the shares of flows they cut off; classes without flows are refused.
    gammas_per_s: per class, None where the class stays FIFO; default: solved from sizes and load.
    workload: name that selects the PIAS authors' thresholds. sequencing: of gated classes.
    Raises InputError naming what is missing or wrong.
    """
    if name not in POLICIES:
        hint = f"one of {', '.join(POLICIES)}"
        if name == "srpt":
            hint += " (srpt exists in simulation only: it preempts)"
        raise InputError("policy", name, hint)
    if sizes is not None and not isinstance(sizes, (SizeCdf, SizeSample)):
        sizes = SizeSample.of(sizes)
    if load is not None and not 0 < load < math.inf:
        raise InputError("load", load, "a share of the link > 0")
    dispatch = "size"
    if name in CLASSED:
        classes = _classed(
            name, sizes, load, rate_bps, thresholds_bytes, weights, gammas_per_s, sequencing
        )
    elif name == "ps":
        classes = [ClassPolicy(math.inf, 1.0, mpl=UNLIMITED)]
    elif name == "fifo":
        classes = [ClassPolicy(math.inf, 1.0, sequencing=sequencing)]
    elif name == "np-sjf":
        classes = [ClassPolicy(math.inf, 1.0, order="sjf")]
    elif name == "lps":
        level = lps_level(_need_load(name, load))
        classes = [ClassPolicy(math.inf, 1.0, mpl=level, sequencing=sequencing)]
    elif name == "baraat":
        classes = _baraat(_need_sizes(name, sizes), _need_load(name, load))
        dispatch = "empty_class"
    elif name == "aalo":
        classes = _aalo(_need_sizes(name, sizes), sequencing)
    else:
        classes = _pias(_need_sizes(name, sizes), workload)
    return DomainPolicy(
        domain,
        float(rate_bps),
        tuple(_marked(cls, index) for index, cls in enumerate(classes)),
        name=name,
        dispatch=dispatch,
        max_wait_s=max_wait_s,
    )


def lps_level(load: float) -> int:
    """Multiplexing level of limited processor sharing: ceil(2 / (1 - load)).

    Nair, Wierman and Zwart ("Tail-robust scheduling via limited processor sharing", Performance
    Evaluation 2010) let the level follow the load. With level c, m endless flows leave the
    others (c - m)/c of the link: they are stable while m < c (1 - load). Two large flows at a
    time must be survivable (enough for any tail with finite variance), so c = 2 / (1 - load).
    """
    return math.ceil(LPS_LARGE_FLOWS / (1.0 - min(load, MAX_LOAD)) - 1e-9)


def _classed(
    name: str,
    sizes: SizeCdf | SizeSample | None,
    load: float | None,
    rate_bps: float,
    thresholds_bytes: Sequence[float] | None,
    weights: Sequence[float] | None,
    gammas_per_s: Sequence[float | None] | None,
    sequencing: str,
) -> list[ClassPolicy]:
    """2D: FIFO in a class, weighted sharing across them; htb: the same classes without a gate."""
    if thresholds_bytes is None:
        raise InputError("thresholds_bytes", None, f"class limits for {name} (Algorithm 1)")
    limits = [float(limit) for limit in thresholds_bytes]
    if weights is None:
        weights = _shares(_need_sizes(name, sizes), limits)
    if len(weights) != len(limits):
        raise InputError("weights", len(weights), f"one for each of {len(limits)} thresholds")
    if name == "htb":
        return [
            ClassPolicy(limit, weight, mpl=UNLIMITED)
            for limit, weight in zip(limits, weights, strict=True)
        ]
    if name == "2d":
        return [
            ClassPolicy(limit, weight, sequencing=sequencing)
            for limit, weight in zip(limits, weights, strict=True)
        ]
    if gammas_per_s is None:
        gammas_per_s = _gammas(
            _need_sizes(name, sizes), limits, _need_load(name, load), float(rate_bps)
        )
    if len(gammas_per_s) != len(limits):
        raise InputError("gammas_per_s", len(gammas_per_s), f"one for each of {len(limits)}")
    return [
        ClassPolicy(limit, weight, sequencing=sequencing)
        if gamma is None
        else ClassPolicy(
            limit, weight, order="boost", boost_gamma_per_s=gamma, sequencing=sequencing
        )
        for limit, weight, gamma in zip(limits, weights, gammas_per_s, strict=True)
    ]


def _gammas(
    sizes: SizeCdf | SizeSample, limits: Sequence[float], load: float, rate_bps: float
) -> list[float | None]:
    load = min(load, MAX_LOAD)
    per_s = load * rate_bps / (8.0 * sizes.mean_bytes)
    gammas: list[float | None] = []
    low = -1.0
    for limit in limits:
        if isinstance(sizes, SizeCdf):
            own_per_s = per_s * sizes.partial_moment(0, low, limit)
            own_load = per_s * sizes.partial_moment(1, low, limit) * 8.0 / rate_bps
            gamma = gamma_of_cdf(
                sizes,
                above_bytes=low,
                up_to_bytes=limit,
                rate_bps=rate_bps,
                rate_per_s=own_per_s,
                capacity=1.0 - load + own_load,
            )
        else:
            part = [size * 8.0 / rate_bps for size in sizes.ordered if low < size <= limit]
            own_load = per_s * math.fsum(part) / len(sizes.ordered)
            gamma = gamma_of_sample(
                part,
                rate_per_s=per_s * len(part) / len(sizes.ordered),
                capacity=1.0 - load + own_load,
            )
        gammas.append(gamma)
        low = limit
    return gammas


def _baraat(sizes: Sizes, load: float) -> list[ClassPolicy]:
    """FIFO-LM (Dogar et al., SIGCOMM 2014): small flows, up to the 90th percentile, are FIFO in
    one class; every other flow gets an empty class of its own.

    As many classes for large flows as a PS link of this load exceeds with 5 % probability
    (geometric: P(N >= n) = load^n), at most 15; then flows queue. The chapter gives no weights:
    the small flows' class has their share of the flows, .9, each other class .1, before
    normalising. With equal weights a burst of small flows would have one flow's share: p90
    4.6 (data mining) and 7.6 (cache) times 2D's, where the chapter reports 1.5 and 2.3; with
    these 1.46 and 1.88 (80 % load, published thresholds).
    """
    load = min(load, MAX_LOAD)
    large = math.ceil(math.log(BARAAT_OVERFLOW) / math.log(load))
    count = 1 + min(max(large, 1), BARAAT_MAX_CLASSES - 1)
    other = 1.0 - BARAAT_SMALL
    total = BARAAT_SMALL + (count - 1) * other
    small = ClassPolicy(sizes.quantile(BARAAT_SMALL), BARAAT_SMALL / total)
    return [small, *(ClassPolicy(math.inf, other / total) for _ in range(count - 1))]


def _aalo(sizes: Sizes, sequencing: str) -> list[ClassPolicy]:
    """D-CLAS (Chowdhury and Stoica, SIGCOMM 2015): ten FIFO queues, limits a factor ten apart,
    weights falling linearly, K - i + 1 for queue i.

    The paper's first limit, 10 MB, is for coflows whose largest are terabytes: ten queues up to
    10^17 bytes would put every flow here into the first two. It is scaled to the workload: the
    first power of ten above the smallest flow, so that the queues lie where the flows are.
    Queues beyond the largest flow are left out.
    """
    smallest, largest = max(sizes.quantile(0.0), 1.0), sizes.quantile(1.0)
    limit = 10.0 ** (math.floor(math.log10(smallest)) + 1)
    limits: list[float] = []
    while len(limits) < AALO_QUEUES - 1 and limit < largest:
        limits.append(limit)
        limit *= AALO_FACTOR
    limits.append(math.inf)
    total = math.fsum(AALO_QUEUES - index for index in range(len(limits)))
    return [
        ClassPolicy(size, (AALO_QUEUES - index) / total, sequencing=sequencing)
        for index, size in enumerate(limits)
    ]


def _pias(sizes: Sizes, workload: str) -> list[ClassPolicy]:
    """Eight strict priorities by size, no gate (Bai et al., NSDI 2015; section 2.5.3).

    The authors' thresholds where they exist; else their "equal split", an eighth of the flows
    in each class.
    """
    segments = PIAS_SEGMENTS.get(workload)
    if segments is not None:
        limits = [count * _SEGMENT for count in segments]
    else:
        limits = [sizes.quantile(i / PIAS_CLASSES) for i in range(1, PIAS_CLASSES)]
        limits = [b for a, b in pairwise([-1.0, *limits]) if b > a]
    limits.append(math.inf)
    return [
        ClassPolicy(limit, 1.0 / len(limits), mpl=UNLIMITED, priority=index)
        for index, limit in enumerate(limits)
    ]


def _shares(sizes: Sizes, limits: Sequence[float]) -> list[float]:
    shares = [b - a for a, b in pairwise([0.0, *(sizes.share(limit) for limit in limits)])]
    for index, share in enumerate(shares):
        if not share > 0:
            raise InputError(
                f"thresholds_bytes[{index}]", limits[index], "a class that some flows fall into"
            )
    return shares


def _marked(cls: ClassPolicy, index: int) -> ClassPolicy:
    dscp = _DSCP[index] if index < len(_DSCP) else 0
    return ClassPolicy(
        cls.threshold_bytes,
        cls.weight,
        cls.mpl,
        cls.order,
        cls.boost_gamma_per_s,
        cls.sequencing,
        dscp,
        cls.priority,
    )


def _need_sizes(name: str, sizes: SizeCdf | SizeSample | None) -> SizeCdf | SizeSample:
    if sizes is None:
        raise InputError("sizes", None, f"flow sizes (policy {name} depends on them)")
    return sizes


def _need_load(name: str, load: float | None) -> float:
    if load is None:
        raise InputError("load", None, f"the load of the link (policy {name} depends on it)")
    return load
