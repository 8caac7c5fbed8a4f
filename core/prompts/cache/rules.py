"""The second gate before anything was learned: what an embedding blurs speaks against, by rule.

Stricter than the fitted gate (`gate.GateModel`): one difference in number, name, negation or
polarity is enough, and the cosine has to be high.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from intentd.core.prompts.cache.gate import FEATURES, features, reason
from intentd.core.prompts.request import Verdict

# a cosine of .94 makes the default threshold
LEAST_COSINE: Final = 0.7
RULE_THRESHOLD: Final = 0.8
_AGAINST: Final = tuple(
    FEATURES.index(name)
    for name in (
        "numbers_differ",
        "numbers_on_one_side",
        "negation_differs",
        "opposites",
        "names_differ",
        "name_on_one_side",
        "asked_differs",
        "order_changed",
        "substituted",
    )
)


@dataclass(frozen=True, slots=True)
class RuleGate:
    """threshold: on the chance, which here is the cosine's place between LEAST_COSINE and 1."""

    threshold: float = RULE_THRESHOLD

    def score(self, asked: str, stored: str, cosine: float) -> tuple[float, str]:
        """(chance that the two ask for the same, what speaks against it)."""
        values = features(asked, stored, cosine, {})
        if any(values[place] for place in _AGAINST):
            return 0.0, reason(values)
        return max(0.0, min(1.0, (cosine - LEAST_COSINE) / (1.0 - LEAST_COSINE))), "similarity"

    def judge(self, prompt: str, key: str, similarity: float) -> Verdict:
        chance, why = self.score(prompt, key, similarity)
        hit = chance >= self.threshold
        return Verdict(hit, chance, "" if hit else why)
