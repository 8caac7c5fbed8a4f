"""How a prompt looks, in numbers: what a router and other learned decisions see without its words.

Three parts: the prompt as a whole, its lettered options, and what is asked at its end. How the
question ends matters because answers repeat it: one that names another number ("... in 30 days?")
or sums of money with cents gets answers whose last number is not the result, and is marked so.
"""

from __future__ import annotations

import math
import re
from typing import Final

MAX_CHARS: Final = 20_000
ASKED_CHARS: Final = 600
WHOLE_COUNT: Final = 36
STORY_COUNT: Final = 30
ASKED_COUNT: Final = 17
SHAPE_COUNT: Final = WHOLE_COUNT + STORY_COUNT + ASKED_COUNT
# the places of what is asked at the end
ASKED: Final = slice(WHOLE_COUNT + STORY_COUNT, SHAPE_COUNT)

_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?")
_NEGATION: Final = re.compile(r"\b(?:not|except|never|no)\b", re.IGNORECASE)
_ARITHMETIC: Final = re.compile(
    r"\b(?:each|every|per|times|twice|half|total|left|remaining|more than|less than)\b",
    re.IGNORECASE,
)
_OPTION: Final = re.compile(r"^[(]?[A-J][.)] ?(.*)$", re.MULTILINE)
_YEAR: Final = re.compile(r"\b(?:1[5-9]|20)\d\d\b")
_CASE: Final = re.compile(r"\b(?:he|she|patient|year-old)\b", re.IGNORECASE)

_SENTENCE: Final = re.compile(r"(?<=[.?!])\s+")
_NUMERAL: Final = re.compile(r"\d[\d,]*(?:\.\d+)?")
_BARE_NUMERAL: Final = re.compile(r"(?<![\d.$])\d[\d,]*(?:\.\d+)?(?!%)")
_NUMBER_WORD: Final = re.compile(
    r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|"
    r"fifty|hundred|thousand|dozens?|half|third|quarter|twice|double|triple)\b",
    re.IGNORECASE,
)
_TIME: Final = re.compile(r"\b(?:seconds?|minutes?|hours?|days?|weeks?|months?|years?)\b", re.I)
_HOW: Final = re.compile(r"how (?:many|much|long|far|old|tall)", re.IGNORECASE)
_ASKS: Final = re.compile(r"\b(?:how|what|find|calculate|determine)\b", re.IGNORECASE)
_MONEY: Final = re.compile(
    r"how much|dollars|cost|price|profit|earn|spend|pay\b|paid|money|change|save", re.IGNORECASE
)
_TRADE: Final = re.compile(
    r"profit|earn|make|pay|cost|spend|save|change|money|price|worth", re.IGNORECASE
)
_WITH_POINT: Final = re.compile(r"\$\s?\d*\.\d")
_WITH_CENTS: Final = re.compile(r"\$\d+\.\d\d\b")
_EVEN_SUM: Final = re.compile(r"\$\s?\d+\.00")
_CENTS: Final = re.compile(r"\bcents?\b", re.IGNORECASE)
_SMALL_SUM: Final = re.compile(r"\bcents?\b|\$0?\.\d", re.IGNORECASE)
_IF: Final = re.compile(r"\bif\b", re.IGNORECASE)
_IF_NUMBER: Final = re.compile(r"\bif\b.*\d", re.IGNORECASE)
_EACH: Final = re.compile(r"each|every|per\b", re.IGNORECASE)
_NAME: Final = re.compile(r"[A-Z]\w+")


def shape(prompt: str) -> list[float]:
    """SHAPE_COUNT finite numbers."""
    text = prompt[:MAX_CHARS]
    sentences = [one for one in _SENTENCE.split(text.strip()) if one]
    questions = [one for one in sentences if "?" in one]
    last = (questions or sentences or [""])[-1][-ASKED_CHARS:]
    return [*_whole(text), *_story(text, sentences, last), *_asked(text, last)]


def _whole(text: str) -> list[float]:
    """Length, numbers, marks, negation, and its options."""
    words = text.split()
    numbers = [float(one) for one in _NUMBER.findall(text)]
    chars = max(1, len(text))
    return [
        float(len(text)),
        float(len(words)),
        float(len(numbers)),
        float(text.count("\n")),
        sum(char.isdigit() for char in text) / chars,
        sum(char.isupper() for char in text) / chars,
        float(text.count("?")),
        float(text.count("$")),
        float(text.count("%")),
        float(len(_NEGATION.findall(text))),
        sum(map(len, words)) / max(1, len(words)),
        len(set(words)) / max(1, len(words)),
        float(len(_ARITHMETIC.findall(text))),
        float(max(numbers, default=0.0) < 1000),
        float(text.count("/")),
        float(text.count("_")),
        float("|" in text),
        *_options(text),
    ]


def _options(text: str) -> list[float]:
    """How the question and its lettered options look; a prompt without options has none."""
    options = _OPTION.findall(text)
    stem = _OPTION.split(text, maxsplit=1)[0] if options else text
    low, ending = text.lower(), stem.rstrip()
    lengths = [len(option) for option in options] or [0]
    mean = sum(lengths) / len(lengths)
    words = " ".join(options).lower().split()
    return [
        float(len(stem)),
        mean,
        float(max(lengths)),
        float(min(lengths)),
        math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths)),
        float(sum(option.lstrip("-$ ")[:1].isdigit() for option in options)),
        float("statement 1" in low),
        float("which of the following" in low),
        float(ending.endswith("?")),
        float(ending.endswith(":")),
        float("__" in text),
        float(text.count("\\")),
        sum(char in "=+^*<>" for char in text) / max(1, len(text)),
        float("following" in low),
        len(set(words)) / max(1, len(words)),
        float(stem.count(".")),
        float(any(o.lower().startswith(("all of", "none of", "both")) for o in options)),
        float(len(_YEAR.findall(text))),
        float(bool(_CASE.search(text))),
    ]


def _story(text: str, sentences: list[str], last: str) -> list[float]:
    """Quantities that a story tells, and the sentence that asks."""
    low = last.lower()
    how = _HOW.search(last)
    after = last[how.start() :] if how else last
    values = [one.replace(",", "") for one in _NUMERAL.findall(text)]
    in_last = len(_NUMERAL.findall(last))
    return [
        float(len(last)),
        float(len(last.split())),
        float(in_last),
        float(in_last > 0),
        float("$" in last),
        float("$" in after),
        float(len(re.findall(r"\d\.\d", text))),
        float(bool(_WITH_CENTS.search(text))),
        float(bool(_SMALL_SUM.search(text))),
        float("how much" in low),
        float("how many" in low),
        float("dollars" in low),
        float(len(_NUMBER_WORD.findall(last))),
        float(len(_NUMBER_WORD.findall(text))),
        float(len(_TIME.findall(after))),
        float("percent" in text.lower() or "%" in text),
        float(bool(_IF.search(last))),
        float(" than " in low),
        float("total" in low or "altogether" in low),
        float("left" in low or "remain" in low),
        float("average" in low),
        float(bool(_TRADE.search(last))),
        float(len(sentences)),
        float(len(set(values))),
        float(any(float(one[:300]) >= 1000 for one in values)),
        float(len(re.findall(r"\d/\d", text))),
        float(bool(_EACH.search(last))),
        math.log1p(len(text)),
        math.log1p(len(text.split())),
        math.log1p(text.count(".")),
    ]


def _asked(text: str, last: str) -> list[float]:
    """What an answer to the last question will repeat: numbers, sums of money, times."""
    starts = [found.start() for found in _ASKS.finditer(last)]
    after = last[starts[-1] :] if starts else last
    numerals = len(_NUMERAL.findall(after))
    money, point = bool(_MONEY.search(after)), bool(_WITH_POINT.search(text))
    time = bool(_TIME.search(after))
    return [
        float(numerals > 0),
        float(min(3, numerals)),
        float(bool(_BARE_NUMERAL.search(after))),
        float(bool(_NUMERAL.search(after[-30:]))),
        float(point),
        float(point and money),
        float(money and bool(_CENTS.search(text))),
        float(money),
        float(bool(_NUMBER_WORD.search(after))),
        float(bool(_EVEN_SUM.search(text))),
        float(bool(re.search(r"\d+-\w+", after))),
        float(time),
        float(time and numerals > 0),
        float(bool(_IF_NUMBER.search(after))),
        float("percent" in after.lower() or "%" in after),
        float("$" in text),
        float(len(_NAME.findall(text))),
    ]
