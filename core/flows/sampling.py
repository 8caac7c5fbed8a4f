"""Draws from size distributions, and traces of flows (numpy)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError
from intentd.core.flows.workloads import SizeCdf

Array = NDArray[np.float64]
MAX_FLOWS = 50_000_000


def quantiles(cdf: SizeCdf, u: Array) -> Array:
    """SizeCdf.quantile for many u in 0..1 at once."""
    shares = np.asarray(cdf.shares)
    sizes = np.asarray(cdf.sizes_bytes)
    right = np.searchsorted(shares, u, side="left")
    right = np.minimum(right, len(shares) - 1)
    left = np.maximum(right - 1, 0)
    width = shares[right] - shares[left]
    inside = np.where(width > 0, (u - shares[left]) / np.where(width > 0, width, 1.0), 0.0)
    # u below the first share: the atom there, where left == right == 0
    return np.asarray(sizes[left] + (sizes[right] - sizes[left]) * inside)


def sample_sizes(cdf: SizeCdf, count: int, rng: np.random.Generator) -> Array:
    """`count` flow sizes in whole bytes, at least 1."""
    return np.maximum(np.rint(quantiles(cdf, rng.random(count))), 1.0)


@dataclass(frozen=True, slots=True)
class FlowTrace:
    """Flows that arrive at one link domain. arrivals_s ascends; both arrays have one length."""

    arrivals_s: Array
    sizes_bytes: Array

    def __post_init__(self) -> None:
        if self.arrivals_s.shape != self.sizes_bytes.shape or self.arrivals_s.ndim != 1:
            raise InputError("trace", self.arrivals_s.shape, "two lists of one length")
        if not (np.isfinite(self.arrivals_s).all() and np.isfinite(self.sizes_bytes).all()):
            raise InputError("trace", "nan or inf", "finite times and sizes")
        if (np.diff(self.arrivals_s) < 0).any():
            raise InputError("trace.arrivals_s", "a step back", "times that never fall")
        if (self.sizes_bytes < 0).any():
            raise InputError("trace.sizes_bytes", float(self.sizes_bytes.min()), "sizes >= 0")


def poisson_trace(
    cdf: SizeCdf, *, load: float, rate_bps: float, flows: int, seed: int
) -> FlowTrace:
    """Poisson arrivals that offer `load` of the link: lambda = load x rate / mean size.

    Raises InputError unless 0 < load < 1.5 and 1 <= flows <= MAX_FLOWS.
    """
    check_load(load)
    if not 1 <= flows <= MAX_FLOWS:
        raise InputError("flows", flows, f"1 to {MAX_FLOWS}")
    if not (math.isfinite(rate_bps) and rate_bps > 0):
        raise InputError("rate_bps", rate_bps, "a finite number > 0")
    rng = np.random.default_rng(seed)
    per_s = load * rate_bps / (8.0 * cdf.mean_bytes)
    arrivals = np.cumsum(rng.exponential(1.0 / per_s, flows))
    return FlowTrace(arrivals, sample_sizes(cdf, flows, rng))


def check_load(load: float) -> None:
    """Raises InputError unless 0 < load < 1.5 (a link may be overloaded, within reason)."""
    if not 0.0 < load < 1.5:
        raise InputError("load", load, "a share of the link in (0, 1.5)")
