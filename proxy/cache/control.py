"""What a client's Cache-Control asks of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from intentd.core.prompts.request import Request
from intentd.proxy.errors import bad_field


def with_cache_control(request: Request, headers: Mapping[str, str]) -> Request:
    """Cache-Control of the request (RFC 9111, section 5.2.1): no-cache, no-store, max-age and
    only-if-cached; others mean nothing here. Raises ApiError."""
    text = headers.get("Cache-Control", "")
    if not text:
        return request
    changes: dict[str, Any] = {}
    for part in text.lower().split(","):
        name, _, value = part.strip().partition("=")
        if name == "no-cache":
            changes["lookup"] = False
        elif name == "no-store":
            changes["store"] = False
        elif name == "only-if-cached":
            changes["cached_only"] = True
        elif name == "max-age":
            value = value.strip('" ')
            if not value.isascii() or not value.isdecimal() or len(value) > 10:
                raise bad_field("Cache-Control", text[:80], "max-age in seconds")
            changes["max_age_s"] = float(value)
    return replace(request, **changes)
