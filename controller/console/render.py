"""Pages from templates: everything is escaped by itself, numbers are written for people."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any, Final

import jinja2

HERE: Final = Path(__file__).parent
STATIC: Final = HERE / "static"
VENDORED: Final = STATIC / "vendor"
MISSING: Final = "–"

# Nothing inline, nothing from elsewhere, in no frame.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def number(value: float | None, digits: int = 3) -> str:
    """3 significant digits: 12 345 678 as 12.3 M."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int) and abs(value) < 100_000:
        return str(value)
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e5, " k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if unit == 1e5 else unit):.{digits}g}{name}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def seconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    sign, value = ("-" if value < 0 else ""), abs(value)
    if value == 0:
        return "0 s"
    for below, unit, name in ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (120.0, 1.0, "s")):
        if value < below:
            return f"{sign}{value / unit:.3g} {name}"
    if value < 7200:
        return f"{sign}{value / 60:.3g} min"
    return f"{sign}{value / 3600:.3g} h" if value < 172_800 else f"{sign}{value / 86400:.3g} d"


def size(value: float | None) -> str:
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "any"
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def rate(value: float | None) -> str:
    if value is None:
        return MISSING
    for unit, name in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g} bit/s"


def percent(value: float | None) -> str:
    """Of a share."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.3g} %"


def dollars(nano: float | None) -> str:
    if nano is None:
        return MISSING
    value = nano / 1e9
    return f"${value:,.2f}" if abs(value) >= 1 or not value else f"${value:.3g}"


def when(wall_s: float | None) -> str:
    if wall_s is None or not 0 <= wall_s < 1e11:
        return MISSING
    at = datetime.datetime.fromtimestamp(wall_s, tz=datetime.UTC)
    return at.strftime("%Y-%m-%d %H:%M:%S")


def pretty(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, default=str)


def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters.update(
        number=number, seconds=seconds, size=size, rate=rate, percent=percent, dollars=dollars,
        when=when, pretty=pretty,
    )  # fmt: skip
    return made
