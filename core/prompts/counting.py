"""How many tokens a text has, where nobody counted yet: learned from what providers counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from intentd.core.errors import InputError

PRIOR_BYTES_PER_TOKEN: Final = 4.0  # English prose
PRIOR_TOKENS: Final = 200.0
MEMORY_TOKENS: Final = 1_000_000.0


@dataclass(slots=True)
class TokenRatio:
    """Bytes of a request's text per token of one model.

    A ratio of sums, so that long requests count by their length; it begins at the prior with the
    weight of PRIOR_TOKENS and forgets what lies more than MEMORY_TOKENS back.
    """

    size_bytes: float = PRIOR_BYTES_PER_TOKEN * PRIOR_TOKENS
    tokens: float = PRIOR_TOKENS
    requests: int = 0

    def learn(self, size_bytes: int, tokens: int) -> None:
        """A request of size_bytes was counted; nonsense (no token, no byte) is left out."""
        if size_bytes <= 0 or tokens <= 0:
            return
        self.requests += 1
        self.size_bytes += size_bytes
        self.tokens += tokens
        if self.tokens > MEMORY_TOKENS:
            keep = MEMORY_TOKENS / self.tokens
            self.tokens *= keep
            self.size_bytes *= keep

    @property
    def bytes_per_token(self) -> float:
        return self.size_bytes / self.tokens

    def count(self, size_bytes: int) -> int:
        """Tokens of a request, at least 1. Raises InputError for a negative size."""
        if size_bytes < 0:
            raise InputError("size_bytes", size_bytes, "a count >= 0")
        return max(1, math.ceil(size_bytes / self.bytes_per_token))
