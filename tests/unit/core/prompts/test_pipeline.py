"""Every service type against tables of outcomes: what is asked, of whom, and what is told."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.core.prompts.pipeline_driver import Table, conversation, pool

from intentd.core.errors import InputError
from intentd.core.prompts.cache.bypass import bypass_reason
from intentd.core.prompts.cache.keys import context_hash, exact_key, scope_hash
from intentd.core.prompts.effects import (
    CacheItem,
    CallFailed,
    CallModel,
    Foretell,
    LoadContext,
    LookupCache,
    Message,
    Prediction,
    Prefetch,
    Purpose,
    Reply,
    StoreCache,
)
from intentd.core.prompts.pipeline import (
    Answer,
    Env,
    PipelineError,
    Request,
    Verdict,
    relevance_word,
    run,
)
from intentd.core.prompts.regenerate import Previous, regenerate
from intentd.core.prompts.service_types import BUILT_IN, types_from_plain, with_options

ENV = Env(pool())
FIVE = conversation(8)[3:]


def go(name: str, table: Table, request: Request | None = None, **options: Any) -> Answer:
    made = with_options(BUILT_IN[name], options)
    answer: Answer = table.drive(run(made, request or Request("hi"), ENV))
    return answer


def answer_call(table: Table) -> CallModel:
    calls = [e for e in table.seen if isinstance(e, CallModel) and e.purpose is Purpose.ANSWER]
    return calls[-1]


def test_fixed_sends_what_the_client_sent_to_the_model_it_named() -> None:
    table = Table()
    request = Request("hi", params={"temperature": 1}, stream=True, history=FIVE)
    answer = go("fixed", table, request, model="small")
    assert answer.text == "by small"
    assert len(table.seen) == 1
    call = answer_call(table)
    assert (call.model, call.stream, call.params) == ("small", True, {"temperature": 1})
    assert [m["content"] for m in call.messages][-3:] == ["q7", "a7", "hi"]
    assert answer.trace.answered_by == "small"
    assert answer.updates == ""


def test_fixed_without_a_model_says_which_there_are() -> None:
    with pytest.raises(InputError, match=r"model.*tiny, small, middle, large"):
        go("fixed", Table())


def test_cost_takes_the_cheapest_and_no_context_and_goes_on_when_it_fails() -> None:
    table = Table({("tiny", "answer"): CallFailed("tiny", "timeout", 504)})
    answer = go("cost", table, Request("hi", history=FIVE))
    assert table.calls() == [("tiny", "answer"), ("small", "answer")]
    assert len(answer_call(table).messages) == 1
    assert answer.trace.calls[0].error == "timeout"


def test_an_answer_that_has_begun_is_not_begun_again_elsewhere() -> None:
    table = Table({("tiny", "answer"): CallFailed("tiny", "cut", started=True)})
    with pytest.raises(PipelineError) as caught:
        go("cost", table)
    assert caught.value.started
    assert table.calls() == [("tiny", "answer")]


def test_quality_takes_the_dearest_all_context_and_stores_the_answer() -> None:
    table = Table(messages=conversation(8))
    answer = go("quality", table, Request("hi", conversation="c"))
    assert table.calls() == [("large", "answer")]
    assert len(answer_call(table).messages) == 17
    assert answer.updates == "c"
    stored = table.seen[-1]
    assert isinstance(stored, StoreCache)
    assert stored.keys == (("prompt", "hi"),)
    assert stored.context_hash == context_hash(conversation(8))
    assert sum(isinstance(e, LoadContext) for e in table.seen) == 1


@pytest.mark.parametrize(
    ("judged", "calls", "score", "escalated"),
    [
        ("9", ["small", "tiny"], 9, False),
        ("8", ["small", "tiny"], 8, False),
        ("7", ["small", "tiny", "large"], 7, True),
        ("Rating: 3/10", ["small", "tiny", "large"], 3, True),
        ("a fine answer", ["small", "tiny", "large"], None, True),
    ],
)
def test_model_selector_asks_the_dear_model_below_the_threshold(
    judged: str, calls: list[str], score: int | None, escalated: bool
) -> None:
    table = Table({("tiny", "verify"): judged})
    answer = go("model_selector", table, Request("hi", stream=True))
    assert [model for model, _ in table.calls()] == calls
    assert answer.trace.verifier_score == score
    assert answer.trace.escalated is escalated
    assert answer.text == ("by large" if escalated else "by small")
    streams = [e.stream for e in table.seen if isinstance(e, CallModel)]
    assert streams == ([False, False, True] if escalated else [False, False])


def test_the_first_answer_stands_when_the_dear_model_fails() -> None:
    table = Table({("tiny", "verify"): "1", ("large", "answer"): CallFailed("large", "500", 500)})
    assert go("model_selector", table).text == "by small"


def test_the_cascade_uses_models_that_are_named() -> None:
    table = Table({("large", "verify"): "2"})
    go("model_selector", table, first="tiny", verifier="large", second="middle", threshold=5)
    assert table.calls() == [("tiny", "answer"), ("large", "verify"), ("middle", "answer")]


@pytest.mark.parametrize(
    ("words", "kept", "asked"),
    [
        (("STANDALONE", "STANDALONE"), 0, 2),
        (("CONTEXT", "STANDALONE"), 5, 1),
        (("hm", "STANDALONE"), 5, 1),
    ],
)
def test_smart_context_needs_two_calls_to_drop_the_context(
    words: tuple[str, str], kept: int, asked: int
) -> None:
    table = Table({("tiny", "context"): words[0]}, messages=conversation(8))
    answer = go("smart_context", table, Request("hi", conversation="c"))
    assert table.calls().count(("tiny", "context")) == asked
    assert answer.trace.context_messages == kept
    assert answer.trace.context_available == 8
    assert {call.purpose for call in answer.trace.calls} == {"context", "answer"}


def item(kind: str = "prompt", similarity: float = 0.97, *, put: bool = False) -> CacheItem:
    return CacheItem(
        "i1", kind, "hello", "stored", similarity, cost_nano=50, model="large", put=put
    )


def test_an_exact_hit_asks_no_model() -> None:
    table = Table(exact=[item(similarity=1.0)])
    answer = go("quality", table)
    assert answer.text == "stored"
    assert (answer.trace.cache, answer.trace.avoided_nano, answer.reply) == ("exact", 50, None)
    assert table.calls() == []


def test_the_second_gate_has_the_last_word_on_similar_prompts() -> None:
    class Never:
        def judge(self, prompt: str, key: str, similarity: float) -> Verdict:
            return Verdict(False, 0.2, "numbers differ")

    answer = Table(items=[item()]).drive(
        run(BUILT_IN["quality"], Request("hi"), replace(ENV, gate=Never()))
    )
    assert answer.text == "by large"
    assert answer.trace.to_plain()["cache"] == {"result": "miss", "reason": "numbers differ"}
    assert go("quality", Table(items=[item()])).trace.cache == "semantic"
    assert go("quality", Table(items=[item(similarity=0.9)])).trace.cache == "miss"


@pytest.mark.parametrize(
    ("word", "kind", "cache", "text", "calls"),
    [
        ("NONE", "chunk", "miss", "by tiny", ["relevance", "answer"]),
        ("SAME", "question", "as_is", "stored", ["relevance"]),
        ("REWRITE", "response", "rewritten", "by tiny", ["relevance", "answer"]),
        ("USE", "chunk", "answered_from", "by tiny", ["relevance", "answer"]),
        ("perhaps", "chunk", "miss", "by tiny", ["relevance", "answer"]),
    ],
)
def test_smart_cache(word: str, kind: str, cache: str, text: str, calls: list[str]) -> None:
    table = Table({("tiny", "relevance"): word}, items=[item(kind, 0.6)])
    answer = go("smart_cache", table)
    assert [purpose for _, purpose in table.calls()] == calls
    assert (answer.text, answer.trace.cache) == (text, cache)
    if cache in ("rewritten", "answered_from"):
        assert "stored" in answer_call(table).messages[0]["content"]
        assert answer.trace.to_plain()["cache"]["item"] == "i1"
        assert not any(isinstance(e, StoreCache) for e in table.seen)


def test_what_may_not_be_shared_neither_looks_up_nor_stores() -> None:
    table = Table(exact=[item()])
    answer = go("quality", table, Request("hi", bypass="tools"))
    assert answer.trace.to_plain()["cache"] == {"result": "bypass", "reason": "tools"}
    assert not any(isinstance(e, (LookupCache, StoreCache)) for e in table.seen)
    table = Table(exact=[item()])
    go("quality", table, Request("hi", lookup=False, store=False))
    assert not any(isinstance(e, (LookupCache, StoreCache)) for e in table.seen)


def test_latency_answers_short_and_has_a_better_answer_prefetched() -> None:
    table = Table()
    answer = go("latency", table)
    assert answer_call(table).max_tokens == 200
    assert Prefetch("better", "quality", "hi", answer.text) in table.seen


def test_the_router_decides_by_predicted_gain() -> None:
    for gain, model in ((0.4, "large"), (-0.1, "tiny")):
        table = Table()
        table.foretold = Prediction(gain, known=True)
        made = with_options(BUILT_IN["router"], {"threshold": 0.2})
        answer = table.drive(run(made, Request("hi"), replace(ENV, routed=True)))
        assert answer.trace.answered_by == model
        assert table.seen[0] == Foretell("hi", "tiny", "large")
    assert go("router", Table()).trace.answered_by == "tiny"


def test_agreement_keeps_the_cheap_answer_only_when_others_say_the_same() -> None:
    types = types_from_plain([{"name": "a", "stages": [{"model": "agree", "compared": 2}]}])
    for texts, model in ((("42", "42", "42"), "tiny"), (("42", "41", "41"), "large")):
        replies: dict[tuple[str, str], str | CallFailed] = {
            (name, "answer"): text
            for name, text in zip(("tiny", "small", "middle"), texts, strict=True)
        }
        table = Table(replies)
        answer = table.drive(run(types["a"], Request("hi"), ENV))
        assert answer.trace.answered_by == model
        assert answer.trace.chance_wrong is not None


def test_a_prompt_over_every_window_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match=r"messages: got '\d+ tokens'"):
        go("cost", Table(), Request("x " * 200_000))


def test_a_prompt_over_the_cheap_window_goes_to_a_wider_one() -> None:
    table = Table()
    go("cost", table, Request("word " * 4000, max_tokens=100))
    assert table.calls() == [("small", "answer")]


def test_models_that_cool_off_are_not_asked() -> None:
    table = Table()
    env = replace(ENV, down=frozenset({"tiny"}))
    assert table.drive(run(BUILT_IN["cost"], Request("hi"), env)).text == "by small"
    all_down = replace(ENV, down=frozenset({"tiny", "small", "middle", "large"}))
    with pytest.raises(PipelineError, match="cooling down") as caught:
        Table().drive(run(BUILT_IN["cost"], Request("hi"), all_down))
    assert caught.value.status == 503


def test_a_read_only_use_of_a_conversation_adds_nothing_to_it() -> None:
    answer = go("quality", Table(messages=FIVE), Request("mood?", conversation="c"), updates=False)
    assert answer.updates == ""
    assert answer.trace.context_messages == 5


def test_history_from_the_client_is_the_conversation_and_never_doubled() -> None:
    table = Table(messages=conversation(8))
    answer = go("quality", table, Request("hi", conversation="c", history=FIVE))
    assert not any(isinstance(e, LoadContext) for e in table.seen)
    assert answer.trace.context_messages == 5


# -- regenerate ------------------------------------------------------------------------------------


def again(
    name: str, answered_by: str, *, rounds: int = 0, to: str = "", **replies: str
) -> tuple[Table, Answer]:
    previous = Previous("m7", name, answered_by, rounds)
    request = Request("hi", conversation="c")
    made, changed = regenerate(previous, request, BUILT_IN, ENV.pool, service_type=to)
    table = Table(messages=conversation(8), exact=[item()])
    return table, table.drive(run(made, changed, ENV))


def test_regenerating_goes_to_the_dear_model_with_more_context_and_no_cache() -> None:
    for name, by in (("model_selector", "small"), ("router", "tiny")):
        table, answer = again(name, by)
        assert table.calls() == [("large", "answer")], name
        assert answer.trace.cache != "exact"
        assert not any(isinstance(e, LookupCache) for e in table.seen)
    table, answer = again("smart_context", "large")
    assert table.calls() == [("large", "answer")]
    assert answer.trace.context_messages == 5
    table, answer = again("smart_context", "large", rounds=1)
    assert answer.trace.context_messages == 7, "all but the replaced one"
    table, _ = again("cost", "tiny")
    assert table.calls() == [("small", "answer")]


def test_after_a_fast_answer_the_prefetched_better_one_is_served_once() -> None:
    table, answer = again("latency", "tiny")
    assert (table.calls(), answer.trace.cache) == ([], "exact")
    (lookup,) = [e for e in table.seen if isinstance(e, LookupCache)]
    assert lookup.model_floor == "tiny"
    assert lookup.context_hash == context_hash(conversation(8)[6:7])
    table, answer = again("latency", "tiny", rounds=1)
    assert table.calls() == [("large", "answer")]
    cached = Previous("m7", "latency", "tiny", cached=True)
    _, changed = regenerate(cached, Request("hi"), BUILT_IN, ENV.pool)
    assert not changed.lookup


def test_an_answer_is_stored_under_the_messages_it_saw() -> None:
    def scope_of(context: Any) -> str:
        made = with_options(
            BUILT_IN["fixed"], {"model": "small", "context": context, "cache": "exact"}
        )
        table = Table(messages=conversation(8))
        table.drive(run(made, Request("hi", conversation="c"), ENV))
        lookup, stored = table.seen[1 if context != "none" else 0], table.seen[-1]
        assert isinstance(lookup, LookupCache)
        assert isinstance(stored, StoreCache)
        assert (lookup.context_hash, lookup.model_floor) == (stored.context_hash, "small")
        return stored.context_hash

    assert scope_of("none") == ""
    assert scope_of({"last_k": 2}) == context_hash(conversation(8)[6:])
    assert scope_of([{"last_k": 5}, "smart_context"]) == context_hash(FIVE)
    assert scope_of("all") == context_hash(conversation(8))


def test_put_objects_serve_as_they_are_outside_conversations_only() -> None:
    put = item(put=True)
    assert go("quality", Table(items=[put])).trace.cache == "semantic"
    table = Table(items=[put], messages=FIVE)
    assert go("quality", table, Request("hi", conversation="c")).trace.cache == "miss"
    formatted = Request("hi", params={"response_format": {"type": "json_object"}})
    table = Table(items=[put])
    assert go("quality", table, formatted).trace.cache == "miss"
    assert not any(isinstance(e, LookupCache) and e.given for e in table.seen)


def test_only_if_cached_asks_no_model() -> None:
    table = Table(items=[item(similarity=0.5)])
    with pytest.raises(PipelineError, match="only-if-cached") as caught:
        go("smart_cache", table, Request("hi", cached_only=True))
    assert (caught.value.status, table.calls()) == (504, [])
    assert go("quality", Table(exact=[item()]), Request("hi", cached_only=True)).text


def test_followups_are_prefetched_after_a_hit_too() -> None:
    types = types_from_plain(
        [
            {
                "name": "chat",
                "stages": [
                    {"cache": "exact"}, {"context": "all"}, {"model": "one", "models": "small"},
                    {"store": "prompt"}, {"prefetch": "followups"},
                ],
            }
        ]
    )  # fmt: skip
    table = Table(exact=[item()], messages=FIVE)
    answer = table.drive(run(types["chat"], Request("hi", conversation="c"), ENV))
    assert answer.trace.cache == "exact"
    assert table.seen[-1] == Prefetch("followups", "cost", "hi", answer.text, FIVE)


def test_a_clients_own_history_hashes_like_the_same_conversation_kept_here() -> None:
    chat = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    assert context_hash([Message("q", "a", chat)]) == context_hash([Message("q", "a")])
    image = ({"role": "user", "content": [{"type": "text", "text": "q"}]}, chat[1])
    assert context_hash([Message("q", "a", image)]) != context_hash([Message("q", "a")])


def test_the_replaced_answer_leaves_the_context() -> None:
    table, answer = again("quality", "large")
    assert answer.trace.context_messages == 7
    assert "a7" not in str(answer_call(table).messages)


def test_another_type_runs_as_it_is_but_never_with_a_cheaper_model() -> None:
    table, _ = again("quality", "middle", to="cost")
    assert table.calls() == [("middle", "answer")]


def test_regenerating_ends_somewhere() -> None:
    with pytest.raises(InputError, match="regenerate"):
        again("cost", "tiny", rounds=8)


@given(
    name=st.sampled_from(sorted(set(BUILT_IN) - {"fixed"})),
    by=st.sampled_from(["tiny", "small", "middle", "large"]),
    rounds=st.integers(0, 7),
    to=st.sampled_from(["", *sorted(set(BUILT_IN) - {"fixed"})]),
)
def test_a_second_answer_never_comes_from_a_cheaper_model(
    name: str, by: str, rounds: int, to: str
) -> None:
    _, answer = again(name, by, rounds=rounds, to=to)
    ranks = {model.name: model.cost_rank for model in ENV.pool}
    assert ranks[answer.trace.answered_by] >= ranks[by]
    prefetched = name == "latency" and rounds == 0 and to in ("", name)
    assert answer.trace.cache in (["exact"] if prefetched else ["off", "bypass", "miss"])


@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(BUILT_IN)))
def test_no_table_of_outcomes_breaks_a_pipeline(seed: int, name: str) -> None:
    """Whatever models say and however calls fail: an answer of some call, or a named failure."""
    rng = random.Random(seed)
    words = ["", "NONE", "USE", "SAME", "REWRITE", "7", "10", "STANDALONE", "CONTEXT", "x" * 500]
    replies: dict[tuple[str, str], str | CallFailed] = {}
    for model in ENV.pool:
        for purpose in Purpose:
            failed = CallFailed(model.name, "no", 500, rng.random() < 0.3, rng.random() < 0.7)
            text = rng.choice(words)
            replies[model.name, purpose.value] = failed if rng.random() < 0.3 else text
    table = Table(
        replies,
        items=[item(rng.choice(["prompt", "chunk"]), rng.random())] * rng.randint(0, 3),
        messages=conversation(rng.randint(0, 12)),
    )
    options: dict[str, Any] = {"model": "middle"} if name == "fixed" else {}
    failed: PipelineError | None = None
    try:
        answer = go(name, table, Request("hi", conversation="c"), **options)
        trace = answer.trace
        assert answer.text or answer.reply is not None
    except PipelineError as error:
        failed, trace = error, error.trace
    if failed is not None:
        assert failed.status >= 500
        assert trace.calls
    assert trace.cost_nano == 7 * sum(not call.error for call in trace.calls)
    trace.headers()
    trace.to_plain()


# -- keys, bypass, metadata ------------------------------------------------------------------------


def test_a_scope_differs_in_everything_that_shapes_an_answer() -> None:
    base: dict[str, Any] = {"tenant": "a"}
    changes: list[dict[str, Any]] = [
        {},
        {"tenant": "b"},
        {"system": "x"},
        {"context": context_hash(FIVE)},
        {"tools": [{"name": "f"}]},
        {"response_format": {"type": "json_object"}},
        {"params": {"seed": 1}},
        {"model_floor": "large"},
        {"tenant": "", "system": "a"},
    ]
    scopes = {scope_hash(**{**base, **change}) for change in changes}
    assert len(scopes) == len(changes)
    assert exact_key("s", "a  b\n") == exact_key("s", "a b") != exact_key("t", "a b")
    assert context_hash([Message("ab", "c")]) != context_hash([Message("a", "bc")])


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("What is the weather in Lahore?", "time_bound"),
        ("who won the match last night", "time_bound"),
        ("What is the current price of gold?", "time_bound"),
        ("How is electric current measured?", ""),
        ("Explain how HTTP works", ""),
        ("  ", "no_text"),
        ("x" * 30_000, "too_long"),
    ],
)
def test_time_bound_and_unusual_prompts_bypass_the_cache(prompt: str, reason: str) -> None:
    assert bypass_reason(prompt) == reason


def test_tools_images_and_several_answers_bypass_the_cache() -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    assert bypass_reason("hi", turn=image) == "not_text"
    assert bypass_reason("hi", turn=[{"role": "tool", "content": "1"}]) == "tool_calls"
    assert bypass_reason("hi", params={"tools": [{}]}) == "tools"
    assert bypass_reason("hi", params={"n": 2}) == "n"
    assert bypass_reason("hi", params={"n": 1, "tools": []}) == ""


def test_headers_hold_no_line_ends_and_no_prompt() -> None:
    table = Table()
    answer = go("cost", table, Request("secret\r\nX-Evil: 1"))
    answer.trace.answered_by = "naïve\r\nX-Evil: 1"
    headers = answer.trace.headers()
    assert headers["X-Intentd-Cost"] == "$0.000000007"
    text = "".join(f"{k}{v}" for k, v in headers.items())
    assert text.isascii()
    assert text.isprintable()
    assert "secret" not in text


@pytest.mark.parametrize(
    ("text", "word"),
    [("USE", "USE"), (" use.", "USE"), ("I would say NONE", "NONE"), ("SAME or USE", "NONE")],
)
def test_relevance_words(text: str, word: str) -> None:
    assert relevance_word(text) == word


def test_a_reply_is_not_stored_when_it_was_cut() -> None:
    class Cut(Table):
        def perform(self, effect: Any) -> Any:
            outcome = super().perform(effect)
            cut = isinstance(outcome, Reply)
            return replace(outcome, finish_reason="length") if cut else outcome

    table = Cut()
    go("quality", table)
    assert not any(isinstance(e, StoreCache) for e in table.seen)
