"""Quantities as people write them: ``"1Gbit"``, ``"64KiB"``, ``"250ms"``."""

from __future__ import annotations

import math
import re
from typing import TypeGuard

from intentd.core.errors import InputError

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*\Z")

_RATES = {
    "": 1.0,
    "bit": 1.0,
    "bps": 1.0,
    "kbit": 1e3,
    "mbit": 1e6,
    "gbit": 1e9,
    "tbit": 1e12,
}
_SIZES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_TIMES = {"": 1.0, "s": 1.0, "us": 1e-6, "ms": 1e-3, "min": 60.0, "h": 3600.0, "d": 86400.0}


def is_finite(value: object) -> TypeGuard[float]:
    """Whether this is a number that a float holds: no truth value, no NaN, no 10**400."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _parse(
    text: object, units: dict[str, float] | dict[str, int], field: str, example: str
) -> float:
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise InputError(field, text, f"a number >= 0 or text such as {example}")
    match = _NUMBER.match(str(text))
    factor = units.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise InputError(field, text, f"a number >= 0 or text such as {example}")
    value = float(match.group(1)) * factor
    if value == float("inf"):
        raise InputError(field, text, "a finite number")
    return value


def parse_rate_bps(text: object, field: str = "rate") -> float:
    """Bits per second from ``"1Gbit"`` (decimal prefixes, as tc reads them). Raises InputError."""
    return _parse(text, _RATES, field, "'1Gbit'")


def parse_size_bytes(text: object, field: str = "size") -> int:
    """Bytes from ``"64KiB"`` (binary) or ``"64KB"`` (decimal). Raises InputError."""
    return int(_parse(text, _SIZES, field, "'64KiB'"))


def parse_duration_s(text: object, field: str = "duration") -> float:
    """Seconds from ``"250ms"``. Raises InputError."""
    return _parse(text, _TIMES, field, "'250ms'")


def format_rate(rate_bps: float) -> str:
    """``1e9`` as ``"1Gbit"``: the largest prefix that leaves at least one."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate_bps >= factor:
            return f"{rate_bps / factor:.4g}{prefix}bit"
    return f"{rate_bps:.4g}bit"


def format_size(size_bytes: float) -> str:
    """``65536`` as ``"65.54KB"``; infinity as ``"inf"``."""
    if size_bytes == float("inf"):
        return "inf"
    for prefix, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.4g}{prefix}"
    return f"{size_bytes:.0f}B"


def format_duration(seconds: float) -> str:
    """``0.00025`` as ``"250us"``."""
    if seconds >= 1:
        return f"{seconds:.4g}s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.4g}ms"
    return f"{seconds * 1e6:.3g}us"
