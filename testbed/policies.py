"""Workloads at a scale that fits a run, and the policies that are played on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from intentd.core.errors import InputError
from intentd.core.flows.assemble import default_early_fin_bytes
from intentd.core.flows.classes import policy_from_sample
from intentd.core.flows.policies import POLICIES
from intentd.core.flows.policy import DomainPolicy
from intentd.core.flows.workloads import parse_cdf, workload
from intentd.daemons.kit.files import read_text
from intentd.testbed.traffic.trace import Workload

# Factors on the sizes at which a 1 Gb/s link sees about a hundred flows a second at 80 % load.
SCALES: Final = {
    "data-mining": 0.08,
    "web-search": 0.5,
    "cache": 0.5,
    "hadoop": 0.12,
    "uniform": 0.1,
    "uniform-chapter": 0.1,
}
MAX_CDF_BYTES: Final = 16 << 20
OTHERS_MEAN_BYTES: Final = 1e6
SAMPLES: Final = 10_000  # Algorithm 1 settles heavy tails with so many
SAMPLE_SEED: Final = 20_000  # far from the seeds of traces: nobody learns from its own run
STUDY_MAX_WAIT_S: Final = 600.0  # in studies order holds, however long the wait


def scaled_workload(name: str, scale: float | None = None) -> Workload:
    """A named workload, or a CDF file's, times its factor. Raises InputError."""
    path = Path(name)
    if path.suffix in (".csv", ".cdf") or path.is_file():
        cdf = parse_cdf(read_text(path, "workload", MAX_CDF_BYTES), name)
        factor = OTHERS_MEAN_BYTES / cdf.mean_bytes if scale is None else scale
        return Workload(path.stem, cdf.quantile, cdf.mean_bytes, _checked(factor))
    found = workload(name)
    factor = SCALES.get(name, OTHERS_MEAN_BYTES / found.cdf.mean_bytes) if scale is None else scale
    return Workload(name, found.cdf.quantile, found.cdf.mean_bytes, _checked(factor))


def _checked(scale: float) -> float:
    if not 0 < scale < 1e6:
        raise InputError("scale", scale, "a factor > 0")
    return scale


def sample(workloads: Sequence[Workload], count: int = SAMPLES, seed: int = 0) -> list[int]:
    """Sizes of flows of the workloads in equal bytes, as the mixture a link would see."""
    rng = random.Random(SAMPLE_SEED + seed)
    rates = [1.0 / source.scaled_mean_bytes for source in workloads]
    chosen = rng.choices(workloads, weights=rates, k=count)
    return [source.draw(rng) for source in chosen]


def policy_for(
    name: str,
    workloads: Sequence[Workload],
    *,
    domain: str,
    rate_bps: float,
    load: float,
    sequencing: str = "local",
) -> DomainPolicy:
    """The policy for the mixture of the workloads, from a sample by Algorithm 1.

    Turns are announced early as the controller has it by default.

    Raises InputError for a policy that does not exist.
    """
    if name not in POLICIES:
        raise InputError("policy", name, f"one of {', '.join(POLICIES)}")
    source = workloads[0]
    policy = policy_from_sample(
        name,
        sample(workloads),
        domain=domain,
        rate_bps=rate_bps,
        load=load,
        workload=source.name if len(workloads) == 1 else "",
        sequencing=sequencing,
        max_wait_s=STUDY_MAX_WAIT_S,
    )
    if name == "pias" and source.name in ("data-mining", "web-search") and len(workloads) == 1:
        # The authors' thresholds are for unscaled sizes.
        classes = tuple(
            replace(cls, threshold_bytes=cls.threshold_bytes * source.scale)
            for cls in policy.classes
        )
        policy = replace(policy, classes=classes)
    return replace(policy, early_fin_bytes=default_early_fin_bytes(rate_bps))
