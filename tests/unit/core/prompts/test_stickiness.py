"""Staying with a model where its provider's prompt cache outweighs a cheaper price."""

from __future__ import annotations

import pytest

from intentd.core.prompts.models import ModelSpec
from intentd.core.prompts.money import Price
from intentd.core.prompts.stickiness import Warm, held_tokens, mark, weigh_switch

LONG = "word " * 2000
CHAT = [
    {"role": "user", "content": LONG},
    {"role": "assistant", "content": "yes", "refusal": None},
    {"role": "user", "content": "and?"},
]


def tokens(text: str) -> int:
    return len(text.split())


def model(name: str, dollars: int, cached: float = 0.1) -> ModelSpec:
    nano = dollars * 10**9
    return ModelSpec(name, price=Price(nano, 4 * nano, int(nano * cached)))


def test_only_the_same_beginning_is_held() -> None:
    said = {"role": "assistant", "content": "yes"}  # a null field makes no difference
    warm = Warm("m", (mark(CHAT[0]), mark(said)))
    assert held_tokens(warm, CHAT, tokens) == 2001
    changed = [{"role": "system", "content": "new"}, *CHAT]
    assert held_tokens(warm, changed, tokens) == 0
    short = Warm("m", (mark({"role": "user", "content": "hi"}),))
    assert held_tokens(short, [{"role": "user", "content": "hi"}], tokens) == 0


@pytest.mark.parametrize(
    ("held", "in_tokens", "cheaper", "pays"),
    [
        (20_000, 20_100, 3, False),  # a tenth of $10 for nearly all of it: $3 is dearer
        (20_000, 20_100, 1, True),  # $1 costs about the same input, but less for the answer
        (20_000, 100_000, 3, True),  # most is new
        (0, 20_100, 3, True),  # nothing is held
        (50_000, 20_100, 3, False),  # no more is held than is sent
    ],
)
def test_a_switch_pays_or_not(held: int, in_tokens: int, cheaper: int, pays: bool) -> None:
    switch = weigh_switch(model("dear", 10), held, model("cheap", cheaper), in_tokens, 100)
    assert switch.pays is pays


def test_a_judge_counts_for_the_other_way() -> None:
    dear, cheap = model("dear", 10), model("cheap", 1)
    assert weigh_switch(dear, 20_000, cheap, 20_100, 100).pays
    assert not weigh_switch(dear, 20_000, cheap, 20_100, 100, extra_nano=10**7).pays
