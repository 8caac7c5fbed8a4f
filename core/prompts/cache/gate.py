"""The second gate: may this stored answer serve this question?

Cosine alone cannot tell: "capital of France" and "capital of Germany" lie nearer than many
paraphrases. The gate looks at what an embedding blurs: numbers, names, negation, polarity, words
that only one side has and how telling they are. Features are plain Python; the score is a small
set of boosted trees, fitted by `controller.search.prompts_cache` on paraphrases, neighbours with
another meaning, edited questions and harmless rewordings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from intentd.core.prompts.cache.lexicon import ENTITIES, NEGATIONS, NUMBER_WORDS, OPPOSITES, stem
from intentd.core.prompts.request import Verdict
from intentd.core.prompts.router import Array, Trees

_WORD: Final = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|\d+(?:[.,:]\d+)*|[^\W\d_]+")
_CONTRACTED: Final = (
    ("won't", "will not"),
    ("can't", "can not"),
    ("cannot", "can not"),
    ("n't", " not"),
    ("what's", "what is"),
    ("where's", "where is"),
    ("who's", "who is"),
    ("how's", "how is"),
    ("it's", "it is"),
    ("i'm", "i am"),
    ("i've", "i have"),
    ("i'd", "i would"),
    ("i'll", "i will"),
)
_STOP: Final = frozenset(
    [
        "a",
        "an",
        "the",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "do",
        "does",
        "did",
        "to",
        "of",
        "in",
        "on",
        "at",
        "for",
        "and",
        "or",
        "my",
        "me",
        "i",
        "you",
        "your",
        "it",
        "this",
        "that",
        "with",
        "please",
        "can",
        "could",
        "would",
        "will",
        "tell",
        "know",
        "want",
        "need",
        "like",
        "just",
        "so",
        "there",
        "have",
        "has",
        "what",
        "which",
        "us",
        "we",
        "hi",
        "hello",
        "hey",
        "thanks",
        "thank",
        "if",
        "by",
        "from",
        "as",
        "am",
    ]
)
_ASKING: Final = frozenset(["who", "when", "where", "why", "how", "which", "whose"])
UNSEEN_IDF: Final = 8.0
MAX_CHARS: Final = 2000
FEATURES: Final = (
    "cosine",
    "grams",
    "idf_overlap",
    "cover_less",
    "cover_more",
    "only_telling_less",
    "only_telling_more",
    "only_count_less",
    "only_count_more",
    "length_ratio",
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


@dataclass(frozen=True, slots=True)
class _Seen:
    """One text taken apart."""

    words: tuple[str, ...]
    stems: frozenset[str]
    content: tuple[str, ...]
    grams: frozenset[str]
    numbers: frozenset[str]
    names: frozenset[str]
    negated: int
    asked: frozenset[str]


@lru_cache(maxsize=4096)
def _see(text: str) -> _Seen:
    plain = text[:MAX_CHARS].replace("’", "'")
    low = plain.lower()
    for short, long in _CONTRACTED:
        low = low.replace(short, long)
    words = tuple(_WORD.findall(low))
    numbers = frozenset(
        NUMBER_WORDS.get(word, word.replace(",", ""))
        for word in words
        if word[0].isdigit() or word in NUMBER_WORDS
    )
    # a capital that does not begin a sentence is a name
    inner = re.findall(r"(?<![.!?]\s)(?<!^)\b[A-Z][A-Za-z]+\b", plain)
    capitals = {word.lower() for word in inner if word not in ("I", "I'm")}
    if plain.isupper() or plain.istitle():
        capitals = set()
    names = frozenset(word for word in words if word in ENTITIES) | frozenset(capitals)
    content = tuple(stem(word) for word in words if word not in _STOP and word not in NEGATIONS)
    joined = f" {' '.join(words)} "
    return _Seen(
        words,
        frozenset(map(stem, words)),
        content,
        frozenset(joined[place : place + 3] for place in range(len(joined) - 2)),
        numbers,
        names,
        sum(word in NEGATIONS for word in words) % 2,
        frozenset(word for word in words if word in _ASKING),
    )


def content_stems(text: str) -> tuple[str, ...]:
    """The stems that carry meaning, in order."""
    return _see(text).content


def features(asked: str, stored: str, cosine: float, idf: Mapping[str, float]) -> list[float]:
    """FEATURES of a pair; symmetric in the two texts."""
    a, b = _see(asked), _see(stored)
    first, second = set(a.content), set(b.content)

    def weight(words: set[str]) -> float:
        return sum(idf.get(word, UNSEEN_IDF) for word in words)

    common, every = weight(first & second), weight(first | second)
    cover = sorted((common / (weight(first) or 1.0), common / (weight(second) or 1.0)))
    only = first - second, second - first
    telling = sorted(max((idf.get(w, UNSEEN_IDF) for w in side), default=0.0) for side in only)
    counts = sorted(len(side) for side in only)
    lengths = sorted((len(a.words), len(b.words)))
    opposed = sum(
        1 for word in a.stems - b.stems if OPPOSITES.get(word, frozenset()) & (b.stems - a.stems)
    )
    names = a.names - b.names, b.names - a.names
    same_words = sorted(a.content) == sorted(b.content)
    return [
        cosine,
        len(a.grams & b.grams) / max(1, len(a.grams | b.grams)),
        common / every if every else 1.0,
        cover[0],
        cover[1],
        telling[0],
        telling[1],
        float(counts[0]),
        float(counts[1]),
        lengths[0] / max(1, lengths[1]),
        float(bool(a.numbers - b.numbers) and bool(b.numbers - a.numbers)),
        float(bool(a.numbers - b.numbers) != bool(b.numbers - a.numbers)),
        float(a.negated != b.negated),
        float(min(opposed, 3)),
        float(bool(names[0]) and bool(names[1])),
        float(bool(names[0]) != bool(names[1])),
        float(bool(a.asked) and bool(b.asked) and not a.asked & b.asked),
        float(same_words and a.content != b.content),
        float(counts[0] == counts[1] == 1 and len(first & second) >= 2),
    ]


def reason(values: list[float]) -> str:
    """What speaks loudest against a pair."""
    named = dict(zip(FEATURES, values, strict=True))
    if named["numbers_differ"] or named["numbers_on_one_side"]:
        return "numbers"
    if named["negation_differs"]:
        return "negation"
    if named["opposites"]:
        return "polarity"
    if named["names_differ"] or named["name_on_one_side"]:
        return "names"
    return "wording"


@dataclass(frozen=True, slots=True)
class GateModel:
    """Trees over FEATURES; their sum is the log-odds that the stored answer serves."""

    trees: Trees
    idf: Mapping[str, float]
    threshold: float

    def score(self, asked: str, stored: str, cosine: float) -> float:
        """The chance, 0 to 1, that the two ask for the same."""
        return self.chance(features(asked, stored, cosine, self.idf))

    def chance(self, values: list[float]) -> float:
        odds = self.trees.sum(np.array(values))
        return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, odds))))

    def chances(self, table: Array) -> Array:
        """`chance` of many at a time. table: (..., FEATURES)."""
        odds = self.trees.sums(table.reshape(-1, table.shape[-1]))
        found: Array = 1.0 / (1.0 + np.exp(-np.clip(odds, -60.0, 60.0)))
        return found.reshape(table.shape[:-1])

    def judge(self, prompt: str, key: str, similarity: float) -> Verdict:
        values = features(prompt, key, similarity, self.idf)
        chance = self.chance(values)
        hit = chance >= self.threshold
        return Verdict(hit, chance, "" if hit else reason(values))


class OnlineThreshold:
    """Holds a false-hit rate as traffic changes.

    Feedback on served hits (a thumb down, a regeneration, a sampled check by a model) moves the
    threshold: up by `step` times (1 - target) for a false hit, down by step times target for a
    right one, so that it rests where the share of false hits is the target (Robbins-Monro; the
    same rule as online conformal inference). least, most bound it.
    """

    def __init__(
        self, threshold: float, target: float, *, step: float = 0.02, least: float, most: float
    ) -> None:
        self.threshold = threshold
        self.target = target
        self.step = step
        self.least = least
        self.most = most

    def learn(self, *, false_hit: bool) -> float:
        """Take in the outcome of one hit; returns the threshold from now on."""
        change = (1.0 - self.target) if false_hit else -self.target
        self.threshold = min(self.most, max(self.least, self.threshold + self.step * change))
        return self.threshold
