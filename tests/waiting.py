"""Waiting for what another process does: until it holds, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_S = 60.0  # generous: a loaded machine is slow, not wrong


def until(holds: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """Return once holds() is true. Fails, naming what was waited for, when the limit passes."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.02)
