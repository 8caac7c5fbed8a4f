"""Questions edited so that they ask for something else, and reworded so that they do not.

A cache that answers an edited question from the original's entry is wrong; one that no longer
knows a reworded question is useless. Both are made by rule from real questions, seeded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Final

from intentd.core.prompts.cache.lexicon import ENTITY_GROUPS, NEGATIONS, OPPOSITE_PAIRS

_DIGITS: Final = re.compile(r"\d+")
_AUXILIARY: Final = re.compile(
    r"\b(can|could|do|does|did|is|are|was|were|will|would|should|has|have|must)\b", re.IGNORECASE
)
_OPPOSITE: Final = dict(OPPOSITE_PAIRS) | {b: a for a, b in OPPOSITE_PAIRS}
_GROUP: Final = {word: group for group in ENTITY_GROUPS for word in group}
_WORD: Final = re.compile(r"[A-Za-z]+")
_UNITS: Final = (
    ("miles", "kilometers"),
    ("hours", "minutes"),
    ("hour", "minute"),
    ("day", "week"),
    ("days", "weeks"),
    ("month", "year"),
    ("morning", "evening"),
    ("today", "tomorrow"),
    ("kg", "pounds"),
    ("percent", "dollars"),
    ("mother", "father"),
    ("husband", "wife"),
    ("breakfast", "dinner"),
    ("checking", "savings"),
)


def _swap(text: str, place: re.Match[str], word: str) -> str:
    found = place.group()
    spelled = word.capitalize() if found[:1].isupper() else word
    return text[: place.start()] + spelled + text[place.end() :]


def edit_number(text: str, rng: random.Random) -> str | None:
    places = list(_DIGITS.finditer(text))
    if not places:
        return None
    place = rng.choice(places)
    value = int(place.group()[:12])
    return _swap(text, place, str(value + rng.choice([1, 2, 3, 5, 10, 100])))


def edit_entity(text: str, rng: random.Random) -> str | None:
    places = [place for place in _WORD.finditer(text) if place.group().lower() in _GROUP]
    if not places:
        return None
    place = rng.choice(places)
    word = place.group().lower()
    return _swap(text, place, rng.choice([other for other in _GROUP[word] if other != word]))


def edit_negation(text: str, rng: random.Random) -> str | None:
    present = [place for place in _WORD.finditer(text) if place.group().lower() in NEGATIONS]
    if present:
        place = rng.choice(present)
        return re.sub(r"\s+", " ", text[: place.start()] + text[place.end() :]).strip()
    places = list(_AUXILIARY.finditer(text))
    if not places:
        return None
    place = rng.choice(places)
    rest = text[place.end() :]
    # after "do you" the negation follows the subject
    subject = re.match(r"\s+(?:i|you|we|they|he|she|it|my \w+|the \w+)\b", rest, re.IGNORECASE)
    cut = place.end() + (subject.end() if subject else 0)
    return f"{text[:cut]} not{text[cut:]}"


def edit_polarity(text: str, rng: random.Random) -> str | None:
    places = [place for place in _WORD.finditer(text) if place.group().lower() in _OPPOSITE]
    if not places:
        return None
    place = rng.choice(places)
    return _swap(text, place, _OPPOSITE[place.group().lower()])


def edit_unit(text: str, rng: random.Random) -> str | None:
    """A kind that no gate is trained on: another unit, time of day or relation."""
    table = dict(_UNITS) | {b: a for a, b in _UNITS}
    places = [place for place in _WORD.finditer(text) if place.group().lower() in table]
    if not places:
        return None
    place = rng.choice(places)
    return _swap(text, place, table[place.group().lower()])


def edit_direction(text: str, rng: random.Random) -> str | None:
    """A kind that no gate is trained on: from A to B becomes from B to A."""
    found = re.search(r"\bfrom (\w+(?: \w+)?) to (\w+)\b", text, re.IGNORECASE)
    if found is None or found.group(1).lower() == found.group(2).lower():
        return None
    return f"{text[: found.start()]}from {found.group(2)} to {found.group(1)}{text[found.end() :]}"


Edit = Callable[[str, random.Random], str | None]
TRAINED_EDITS: Final[dict[str, Edit]] = {
    "number": edit_number,
    "entity": edit_entity,
    "negation": edit_negation,
    "polarity": edit_polarity,
}
OTHER_EDITS: Final[dict[str, Edit]] = {"unit": edit_unit, "direction": edit_direction}

_BEFORE: Final = (
    "please ",
    "hey, ",
    "hi, ",
    "can you tell me: ",
    "quick question: ",
    "i'd like to know, ",
    "could you help me? ",
    "so, ",
    "tell me, ",
)
_AFTER: Final = (" please", " thanks", ", thank you", "??", " asap", " - any help is appreciated")
_SPELLED: Final = (
    (r"\bwhat is\b", "what's"),
    (r"\bwhat's\b", "what is"),
    (r"\bi am\b", "i'm"),
    (r"\bi'm\b", "i am"),
    (r"\bdo not\b", "don't"),
    (r"\bdon't\b", "do not"),
    (r"\bcan not\b", "can't"),
    (r"\bcan't\b", "cannot"),
    (r"\bhow do i\b", "how can i"),
    (r"\bhow can i\b", "how do i"),
    (r"\bi want to\b", "i would like to"),
    (r"\bi would like to\b", "i want to"),
    (r"\bi need to\b", "i have to"),
    (r"\btell me\b", "let me know"),
    (r"\bget\b", "obtain"),
    (r"\bbuy\b", "purchase"),
    (r"\bshow me\b", "give me"),
)


def reword(text: str, rng: random.Random) -> str:
    """The same question in other clothes: greetings, contractions, case, marks, a synonym."""
    made = text
    for _ in range(rng.randint(1, 2)):
        choice = rng.randrange(5)
        if choice == 0:
            made = rng.choice(_BEFORE) + made[:1].lower() + made[1:]
        elif choice == 1:
            made = made.rstrip(" ?.!") + rng.choice(_AFTER)
        elif choice == 2:
            made = made.lower().rstrip("?.!") if rng.random() < 0.7 else made.upper()
        elif choice == 3:
            fits = [pair for pair in _SPELLED if re.search(pair[0], made, re.IGNORECASE)]
            if fits:
                pattern, other = rng.choice(fits)
                made = re.sub(pattern, other, made, count=1, flags=re.IGNORECASE)
        else:
            made = made.replace(",", "").rstrip(".!?") + "?"
    return made if made != text else f"please {text}"
