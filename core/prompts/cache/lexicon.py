"""Words that change what is asked: names of things of a kind, opposites, negations, numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_COUNTRIES = (
    "france germany spain italy england britain ireland scotland sweden norway denmark finland "
    "poland austria switzerland portugal greece turkey russia ukraine china japan korea india "
    "pakistan bangladesh nepal thailand vietnam indonesia malaysia philippines australia canada "
    "mexico brazil argentina chile peru colombia egypt sudan nigeria kenya ethiopia ghana morocco "
    "algeria tunisia israel iran iraq syria jordan lebanon qatar dubai america usa uk uae europe "
    "africa asia cuba jamaica iceland netherlands belgium hungary romania serbia croatia"
)
_CITIES = (
    "paris london berlin madrid rome vienna lisbon athens moscow istanbul cairo khartoum lagos "
    "nairobi dubai karachi lahore islamabad delhi mumbai tokyo osaka seoul beijing shanghai sydney "
    "melbourne toronto vancouver chicago boston seattle denver dallas houston atlanta miami "
    "phoenix portland oakland vegas philadelphia detroit orlando tampa austin nashville barcelona"
)
_CALENDAR = (
    "monday tuesday wednesday thursday friday saturday sunday january february march april june "
    "july august september october november december christmas easter ramadan thanksgiving"
)
_LANGUAGES = (
    "french german spanish italian english swedish norwegian danish finnish polish portuguese "
    "greek turkish russian ukrainian chinese mandarin japanese korean hindi urdu arabic thai "
    "vietnamese indonesian dutch hebrew persian swahili latin"
)
_MONEY = "dollar dollars euro euros pound pounds yen rupee rupees franc yuan peso bitcoin ethereum"
_COLOURS = "red blue green yellow black white orange purple pink brown grey"
_MAKERS = (
    "google apple microsoft amazon facebook visa mastercard amex paypal chase netflix spotify "
    "android iphone samsung windows linux mac toyota honda ford tesla bmw python java javascript"
)
ENTITIES: Final = frozenset(
    " ".join((_COUNTRIES, _CITIES, _CALENDAR, _LANGUAGES, _MONEY, _COLOURS, _MAKERS)).split()
)
# groups whose members may stand for each other in an edited question
ENTITY_GROUPS: Final[tuple[tuple[str, ...], ...]] = tuple(
    tuple(group.split())
    for group in (_COUNTRIES, _CITIES, _CALENDAR, _LANGUAGES, _COLOURS, _MAKERS)
)
_SUFFIXES: Final = ("ings", "ing", "edly", "ed", "ies", "es", "s", "ly")
NEGATIONS: Final = frozenset(
    ["not", "no", "never", "without", "nobody", "nothing", "neither", "nor", "none"]
)

OPPOSITE_PAIRS: Final[tuple[tuple[str, str], ...]] = tuple(
    (first, second)
    for first, second in (
        pair.split("/")
        for pair in [
            "increase/decrease",
            "raise/lower",
            "open/close",
            "start/stop",
            "begin/end",
            "enable/disable",
            "activate/deactivate",
            "on/off",
            "add/remove",
            "lock/unlock",
            "buy/sell",
            "send/receive",
            "upload/download",
            "import/export",
            "before/after",
            "more/less",
            "most/least",
            "best/worst",
            "high/low",
            "higher/lower",
            "highest/lowest",
            "maximum/minimum",
            "longest/shortest",
            "largest/smallest",
            "big/small",
            "long/short",
            "old/new",
            "good/bad",
            "safe/dangerous",
            "cheap/expensive",
            "cheapest/dearest",
            "fast/slow",
            "hot/cold",
            "warm/cool",
            "early/late",
            "first/last",
            "always/never",
            "accept/reject",
            "accepted/declined",
            "approve/deny",
            "allow/block",
            "include/exclude",
            "above/below",
            "over/under",
            "inside/outside",
            "up/down",
            "left/right",
            "win/lose",
            "gain/lose",
            "love/hate",
            "like/dislike",
            "legal/illegal",
            "possible/impossible",
            "deposit/withdraw",
            "borrow/lend",
            "freeze/unfreeze",
            "mute/unmute",
            "pros/cons",
            "advantage/disadvantage",
            "advantages/disadvantages",
            "benefits/risks",
            "true/false",
            "public/private",
            "hard/easy",
            "positive/negative",
            "success/failure",
            "incoming/outgoing",
            "arrive/depart",
            "save/delete",
            "install/uninstall",
            "connect/disconnect",
            "subscribe/unsubscribe",
        ]
    )
)


def _opposites() -> dict[str, frozenset[str]]:
    table: dict[str, set[str]] = {}
    for first, second in OPPOSITE_PAIRS:
        for one, other in ((first, second), (second, first)):
            # texts are compared by stems; both spellings are kept
            for spelled in {one, stem(one)}:
                table.setdefault(spelled, set()).update({other, stem(other)})
    return {word: frozenset(others) for word, others in table.items()}


def stem(word: str) -> str:
    """A word without its usual endings: crude, but the same on both sides."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word


OPPOSITES: Final[Mapping[str, frozenset[str]]] = _opposites()

NUMBER_WORDS: Final[Mapping[str, str]] = {
    word: str(value)
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
    if word != "one"  # more often a pronoun
} | {"thirty": "30", "forty": "40", "fifty": "50", "hundred": "100", "thousand": "1000"}
