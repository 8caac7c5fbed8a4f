"""How many recent messages a prompt needs, without asking a model.

What tells: pronouns whose noun is elsewhere, a missing subject, how far back the last name lies,
words shared with recent messages. Boosted trees, fitted by `controller.search.prompts_context`,
give the chance that more than k messages are needed for a few k; the least k whose chance lies
under the threshold is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from intentd.core.prompts.cache.gate import content_stems
from intentd.core.prompts.router import Trees

# the messages kept: one of these
LEVELS: Final = (0, 1, 2, 3, 5)
LOOKED_AT: Final = 5
FAR: Final = 9.0
_PERSON: Final = frozenset(["he", "she", "him", "her", "his", "hers", "they", "them", "their"])
_THING: Final = frozenset(["it", "its", "this", "that", "these", "those", "there", "one", "ones"])
_LEANING: Final = frozenset(
    ["other", "else", "also", "besides", "aside", "another", "more", "same", "such", "then"]
)
_WORD: Final = re.compile(r"[^\W\d_]+(?:'[a-z]+)?|\d+")
_NAME: Final = re.compile(r"(?<!^)\b[A-Z][\w'-]+")
_FIRST: Final = ("what", "who", "when", "where", "why", "how", "did", "was", "is", "are", "and")
FEATURE_COUNT: Final = 17 + 3 * LOOKED_AT + len(_FIRST)


def features(prompt: str, messages: Sequence[str]) -> list[float]:
    """FEATURE_COUNT numbers. messages: texts of the conversation's messages, oldest first."""
    words = _WORD.findall(prompt)
    low = [word.lower() for word in words]
    names = {name.lower().removesuffix("'s") for name in _NAME.findall(prompt)}
    stems = set(content_stems(prompt))
    recent = list(messages)[::-1][:LOOKED_AT]
    seen_names: set[str] = set()
    seen_stems: set[str] = set()
    last_name = FAR
    by_message: list[float] = []
    for place in range(LOOKED_AT):
        if place >= len(recent):
            by_message += [0.0, 0.0, 0.0]
            continue
        own = {name.lower().removesuffix("'s") for name in _NAME.findall(recent[place])}
        own_stems = set(content_stems(recent[place]))
        shared = len(stems & own_stems) / max(1, len(stems))
        by_message += [shared, float(len(own)), float(len(own - names - seen_names))]
        if own and last_name == FAR:
            last_name = place + 1.0
        seen_names |= own
        seen_stems |= own_stems
    oldest = " ".join(messages[:1])
    title_stems = set(content_stems(oldest))
    persons = sum(word in _PERSON for word in low)
    things = sum(word in _THING for word in low)
    return [
        float(len(words)),
        float(len(stems)),
        float(persons),
        float(things),
        float(sum(word in _LEANING for word in low)),
        float(len(names)),
        float(len(names & seen_names)),
        float(len(stems & seen_stems)) / max(1, len(stems)),
        float(len(stems & title_stems)),
        float(len(stems & title_stems)) / max(1, len(title_stems)),
        float(len(messages)),
        last_name,
        float(bool(persons) and not names),
        float(bool(things) and not names),
        float(low[:2] in (["what", "about"], ["how", "about"])),
        float(sum(word == "the" for word in low)),
        float(prompt[:1].isupper()),
        *by_message,
        *(float(low[:1] == [first]) for first in _FIRST),
    ]


@dataclass(frozen=True, slots=True)
class ChooserModel:
    """Trees for "more than k messages are needed", one set for each of LEVELS but the last.

    threshold: for needing any message at all; further: for needing more than some.
    """

    trees: tuple[Trees, ...]
    threshold: float
    further: float

    def chances(self, prompt: str, messages: Sequence[str]) -> list[float]:
        values = np.array(features(prompt, messages))
        odds = [max(-60.0, min(60.0, one.sum(values))) for one in self.trees]
        return [1.0 / (1.0 + math.exp(-value)) for value in odds]

    def choose(self, prompt: str, messages: Sequence[str]) -> int:
        """How many of the most recent messages to send."""
        if not messages:
            return 0
        return min(
            len(messages),
            level_of(self.chances(prompt, messages), self.threshold, self.further),
        )


def level_of(chances: Sequence[float], threshold: float, further: float) -> int:
    """The least level whose chance of being too little is acceptable."""
    for place, chance in enumerate(chances):
        if chance <= (threshold if place == 0 else further):
            return LEVELS[place]
    return LEVELS[-1]
