"""Model filters, context filters, cascade arithmetic and service types from configuration."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.core.prompts.pipeline_driver import Table, conversation, pool

from intentd.core.errors import InputError
from intentd.core.prompts import cascade
from intentd.core.prompts.context import (
    Chooser,
    LastK,
    Message,
    SmartContext,
    Union,
    filters_from_plain,
    fit_window,
    says_standalone,
    split_chat,
)
from intentd.core.prompts.models import (
    ModelPool,
    ModelSpec,
    cascade_trio,
    chain,
    in_region,
    not_cheaper_than,
    ordered,
    query_from_plain,
)
from intentd.core.prompts.money import Price
from intentd.core.prompts.service_types import BUILT_IN, get_type, types_from_plain, with_options

FOUR = conversation(4)


def names(models: Any) -> list[str]:
    return [model.name for model in models]


def test_filters_of_models() -> None:
    models = tuple(pool())
    assert names(ordered("cheapest", 2)(models)) == ["tiny", "small"]
    assert names(ordered("dearest", 1)(models)) == ["large"]
    assert names(query_from_plain({"max_price_in": "0.1"}, "m")(models)) == ["tiny", "small"]
    assert names(query_from_plain(["large", "tiny", "none"], "m")(models)) == ["large", "tiny"]
    assert names(query_from_plain({"window_tokens": 9000}, "m")(models)) == ["large"]
    assert names(not_cheaper_than(models[2])(models)) == ["middle", "large"]
    here = ModelSpec("here", regions=frozenset({"eu"}))
    assert names(chain(in_region("us"), ordered("cheapest"))((here, *models)))[0] == "tiny"


@pytest.mark.parametrize(
    ("plain", "path"),
    [
        ({"order": "nicest"}, "m.order"),
        ({"limit": 0}, "m.limit"),
        ({"quality": 2}, "m.quality"),
        ({"max_price_in": "x"}, "m.max_price_in"),
        ({"colour": "red"}, "m.colour"),
        ({"names": [1]}, "m.names"),
        (7, "m"),
    ],
)
def test_wrong_attributes_are_named(plain: object, path: str) -> None:
    with pytest.raises(InputError) as caught:
        query_from_plain(plain, "m")
    assert caught.value.field == path


def test_a_pool_knows_its_models() -> None:
    with pytest.raises(InputError, match="tiny, small"):
        pool().get("gpt-9")
    with pytest.raises(InputError, match=r"models\[1\]\.name"):
        ModelPool([ModelSpec("a"), ModelSpec("a")])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_the_cascade_obeys_the_price_rule_whenever_three_prices_exist(prices: list[int]) -> None:
    models = [ModelSpec(f"m{i}", price=Price(p, p)) for i, p in enumerate(prices)]
    if len(set(prices)) == 1:
        with pytest.raises(InputError):
            cascade_trio(models)
        return
    trio = cascade_trio(models)
    assert trio.by_rule == (len(set(prices)) >= 3)
    assert trio.first.cost_rank < trio.second.cost_rank == max(m.cost_rank for m in models)


# -- context ---------------------------------------------------------------------------------------


def keep(plain: object, table: Table | None = None, count: int = 8) -> list[str]:
    filters = filters_from_plain(plain, "context")
    steps = filters.apply(conversation(count), "now?", [], "tiny")
    return [m.message_id or "summary" for m in (table or Table()).drive(steps)]


STANDALONE = Table({("tiny", "context"): "STANDALONE"})


@pytest.mark.parametrize(
    ("plain", "kept"),
    [
        ("all", [f"m{i}" for i in range(8)]),
        ("none", []),
        ({"last_k": 2}, ["m6", "m7"]),
        ({"last_k": 99}, [f"m{i}" for i in range(8)]),
        ([{"last_k": 5}, "smart_context"], []),
        ([[{"last_k": 4}, "smart_context"], {"last_k": 1}], ["m7"]),
        ([{"last_k": 3}, {"last_k": 1}], ["m7"]),
        ([[{"last_k": 1}], [{"last_k": 2}]], ["m6", "m7"]),
    ],
)
def test_table_4_3_when_the_prompt_stands_alone(plain: object, kept: list[str]) -> None:
    assert keep(plain, STANDALONE) == kept


def test_table_4_3_when_it_does_not() -> None:
    needs = Table({("tiny", "context"): "CONTEXT"})
    assert keep([{"last_k": 5}, "smart_context"], needs) == ["m3", "m4", "m5", "m6", "m7"]
    nested = [[{"last_k": 4}, "smart_context"], {"last_k": 1}]
    assert keep(nested, needs) == ["m4", "m5", "m6", "m7"]


def test_similar_keeps_what_lies_near_most_similar_last() -> None:
    vectors = {"q1": (0.6, 0.8), "q2": (1.0, 0.0), "q5": (0.8, 0.6)}
    table = Table(embed=lambda text: vectors.get(text[:2], (0.0, 1.0)))
    table.embed = lambda text: (1.0, 0.0) if text == "now?" else vectors.get(text[:2], (0.0, 1.0))
    assert keep({"similar": 0.5}, table) == ["m1", "m5", "m2"]


def test_a_chooser_keeps_as_many_as_it_says() -> None:
    for wanted, kept in ((0, 0), (2, 2), (99, 8)):
        chosen = Table().drive(Chooser(lambda _p, _m, k=wanted: k).apply(FOUR * 2, "?", [], ""))
        assert len(chosen) == kept


def test_summaries_replace_messages_and_lead_a_union() -> None:
    table = Table({("tiny", "summarize"): "They spoke."})
    assert keep("summarize", table) == ["summary"]
    assert keep([["summarize"], {"last_k": 1}], table) == ["summary", "m7"]
    assert keep("summarize", Table({("tiny", "summarize"): " "}), 3) == ["m0", "m1", "m2"]
    steps = filters_from_plain("summarize", "c").apply(conversation(3), "?", [], "tiny")
    (only,) = table.drive(steps)
    assert only.as_chat()[0]["content"] == "Summary of the conversation so far: They spoke."


@pytest.mark.parametrize(
    ("plain", "path"),
    [
        ({"last_k": -1}, "c.last_k"),
        ({"last_k": True}, "c.last_k"),
        ({"similar": 2}, "c.similar"),
        ("clever", "c"),
        ([], "c"),
        ([["all"], ["nope"]], "c[1][0]"),
        ({"all": 1}, "c.all"),
        (json.loads("[" * 50 + "]" * 50), "c" + "[0]" * 9),
    ],
)
def test_wrong_filters_are_named(plain: object, path: str) -> None:
    with pytest.raises(InputError) as caught:
        filters_from_plain(plain, "c")
    assert caught.value.field == path


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("STANDALONE", True),
        ("standalone.", True),
        ("NOT STANDALONE", False),
        ("CONTEXT", False),
        ("", False),
        ("It is STANDALONE, no CONTEXT needed", False),
    ],
)
def test_only_a_clear_standalone_counts(text: str, alone: bool) -> None:
    assert says_standalone(text) is alone


filters = st.recursive(
    st.sampled_from(["all", "none", "smart_context"])
    | st.integers(0, 9).map(lambda k: {"last_k": k}),
    lambda inner: st.lists(inner, min_size=1, max_size=3),
    max_leaves=8,
)


@given(plain=filters, count=st.integers(0, 9))
def test_any_composition_keeps_a_part_of_the_conversation_in_order(plain: Any, count: int) -> None:
    kept = keep(plain, STANDALONE, count)
    places = [int(name[1:]) for name in kept]
    assert places == sorted(set(places))
    assert all(0 <= place < count for place in places)


@given(st.lists(st.text(max_size=30), max_size=6), st.integers(20, 200))
def test_what_fits_the_window_fits_and_is_a_tail(texts: list[str], window: int) -> None:
    messages = tuple(Message(text, "x" * 20) for text in texts)
    count = lambda text: len(text.encode())  # noqa: E731  # the worst case: a token a byte
    kept = fit_window(
        messages,
        [{"role": "user", "content": "hi"}],
        window_tokens=window,
        answer_tokens=10,
        count_tokens=count,
    )
    assert kept == messages[len(messages) - len(kept) :]
    used = sum(count(m.prompt) + count(m.response) for m in kept) + 2 + 10
    assert used <= window


def test_a_clients_chat_splits_into_system_pairs_and_this_turn() -> None:
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ]
    system, history, turn = split_chat(chat)
    assert system == (chat[0],)
    assert [(m.prompt, m.response) for m in history] == [("a", "b")]
    assert history[0].as_chat() == tuple(chat[1:5])
    assert turn == (chat[5],)


def test_union_of_plain_objects() -> None:
    filters_made = filters_from_plain([[{"last_k": 4}, "smart_context"], {"last_k": 1}], "c")
    assert isinstance(filters_made, Union)
    assert filters_made.members[1] == LastK(1)
    assert SmartContext().calls == 2


# -- cascade ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("8", 8),
        ("10/10", 10),
        ("Rating: 7.", 7),
        ("I give it 9 / 10", 9),
        ("0", None),
        ("11", None),
        ("between 6 and 8", None),
        ("good", None),
        ("8.5", 8),
        ("-3", None),
    ],
)
def test_scores_of_a_verifier(text: str, score: int | None) -> None:
    assert cascade.parse_score(text) == score


@given(st.text(max_size=200))
def test_no_text_breaks_the_parsers(text: str) -> None:
    score = cascade.parse_score(text)
    assert score is None or 1 <= score <= 10
    once = cascade.normal_answer(text)
    assert isinstance(cascade.final_answer(text), str)
    assert once == once.strip()


@pytest.mark.parametrize(
    ("a", "b"),
    [("1,000", "1000.0"), ("$42", "42"), ("The answer is: 42.", "so #### 42"), ("Yes.", "yes")],
)
def test_answers_that_are_the_same(a: str, b: str) -> None:
    assert cascade.final_answer(a) == cascade.final_answer(b) != ""


def test_agreement_makes_wrong_answers_less_likely() -> None:
    def chance(first: str, *others: str) -> float:
        seen = [cascade.Answered(one, 100) for one in (first, *others)]
        features = cascade.agreement_features(seen[0], seen[1:])
        return cascade.PRIOR_AGREEMENT.chance_wrong(features)

    assert chance("1", "1", "1") < 0.5 < chance("1", "2", "2")
    assert chance("1", "1", "1") < chance("1", "1", "2") < chance("1", "2", "3")
    assert chance("", "", "") > 0.5


# -- service types ---------------------------------------------------------------------------------


def test_operators_write_their_own_types() -> None:
    types = types_from_plain(
        [
            {
                "name": "course",
                "based_on": "usage_based",
                "models": ["tiny", "small"],
                "quotas": [{"unit": "tokens", "limit": 10_000}],
                "max_tokens": 100,
            },
            {
                "name": "own",
                "stages": [
                    {"cache": "smart", "min_similarity": 0.5, "small": "tiny"},
                    {"context": [{"last_k": 5}, "smart_context"], "updates": False},
                    {"model": "verify", "threshold": 6, "first": "small"},
                    {"store": ["prompt", "response"]},
                    {"prefetch": "followups"},
                ],
            },
        ]
    )
    assert set(BUILT_IN) < set(types)
    assert types["course"].allowed == ("tiny", "small")
    assert len(types["own"].stages) == 5
    with pytest.raises(InputError, match=r"options\.model"):
        with_options(types["course"], {"model": "large"})
    with pytest.raises(InputError, match="service_type"):
        get_type(types, "nope")


@pytest.mark.parametrize(
    ("table", "path"),
    [
        ({}, "t[0].name"),
        ({"name": "a"}, "t[0]"),
        ({"name": "a b", "stages": []}, "t[0].name"),
        ({"name": "a", "based_on": "zzz"}, "t[0].based_on"),
        ({"name": "a", "stages": [{"cache": "exact"}]}, "a.stages"),
        ({"name": "a", "stages": [{"cache": "warm"}]}, "t[0].stages[0].cache"),
        ({"name": "a", "stages": [{"model": "one", "threshold": 12}]}, "t[0].stages[0].threshold"),
        ({"name": "a", "stages": [{"model": "agree", "threshold": 2}]}, "t[0].stages[0].threshold"),
        ({"name": "a", "stages": [{"model": "one", "x": 1}]}, "t[0].stages[0].x"),
        ({"name": "a", "stages": [{"context": {"last_k": -1}}]}, "t[0].stages[0].context.last_k"),
        ({"name": "a", "stages": [{"cache": "exact", "model": "one"}]}, "t[0].stages[0]"),
        ({"name": "a", "based_on": "cost", "colour": 1}, "t[0].colour"),
        ({"name": "a", "based_on": "cost", "quotas": [{"unit": "x"}]}, "t[0].quotas[0].unit"),
    ],
)
def test_wrong_types_are_named_by_path(table: dict[str, Any], path: str) -> None:
    with pytest.raises(InputError) as caught:
        types_from_plain([table], "t")
    assert caught.value.field == path


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"threshold": 20}, "options.threshold"),
        ({"threshold": "8"}, "options.threshold"),
        ({"context": {"last_k": -2}}, "options.context.last_k"),
        ({"cache": "hot"}, "options.cache.cache"),
        ({"max_tokens": 0}, "options.max_tokens"),
        ({"api_base": "http://x"}, "options.api_base"),
        ({"first": 1}, "options.first"),
        ({"updates": "no"}, "options.updates"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], path: str) -> None:
    with pytest.raises(InputError) as caught:
        with_options(BUILT_IN["model_selector"], options)
    assert caught.value.field == path


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "stages", "cache", "model", "context", "based_on", "last_k"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_like)
def test_no_configuration_breaks_the_parsers(plain: Any) -> None:
    for parse in (
        lambda: types_from_plain([plain]),
        lambda: filters_from_plain(plain, "c"),
        lambda: query_from_plain(plain, "m"),
        lambda: with_options(BUILT_IN["cost"], {"context": plain, "model": plain, "cache": plain}),
    ):
        with contextlib.suppress(InputError):
            parse()
