"""What a gate tells a client about a flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """A flow may send.

    degraded: "" in order, else why not. priority: SO_PRIORITY of its class, 0 for none.
    early_fin_bytes: announce when so much is left, 0: only when done.
    """

    class_index: int = 0
    degraded: str = ""
    dscp: int = 0
    priority: int = 0
    early_fin_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a flow went: its bytes, and the monotonic time of the first and the last of them."""

    size_bytes: int
    first_s: float
    last_s: float


OnTurn = Callable[[int, Turn], None]
