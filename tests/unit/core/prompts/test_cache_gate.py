"""The second gate: what it sees in a pair, and a gate fitted on a made-up help desk."""

from __future__ import annotations

import importlib.util
import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.prompts.cache.gate import FEATURES, OnlineThreshold, features, reason

FITS = importlib.util.find_spec("lightgbm") is not None


def seen(first: str, second: str) -> dict[str, float]:
    return dict(zip(FEATURES, features(first, second, 0.9, {}), strict=True))


@pytest.mark.parametrize(
    ("first", "second", "feature", "why"),
    [
        ("move 50 dollars", "move 60 dollars", "numbers_differ", "numbers"),
        ("wait five days", "wait 5 days", "", "wording"),
        ("wait 5 days", "wait days", "numbers_on_one_side", "numbers"),
        ("can I travel", "can I not travel", "negation_differs", "negation"),
        ("I can't log in", "I cannot log in", "", "wording"),
        ("how to open a file", "how to close a file", "opposites", "polarity"),
        ("how do I lock my card", "how do I unlock my card", "opposites", "polarity"),
        ("capital of france", "capital of germany", "names_differ", "names"),
        ("who is Ada Lovelace", "who is Alan Turing", "names_differ", "names"),
        ("weather in paris", "weather today in town", "name_on_one_side", "names"),
        ("who sings this", "where is this sung", "asked_differs", "wording"),
        ("fly from rome to oslo", "fly from oslo to rome", "order_changed", "wording"),
        ("book a table", "book a flight now", "", "wording"),
    ],
)
def test_what_changes_a_question_is_seen(first: str, second: str, feature: str, why: str) -> None:
    flags = ("numbers_differ", "numbers_on_one_side", "negation_differs", "opposites")
    flags += ("names_differ", "name_on_one_side")
    values = seen(first, second)
    if feature:
        assert values[feature] > 0
    else:
        assert all(values[flag] == 0 for flag in flags)
    assert reason(list(values.values())) == why


@given(st.text(max_size=80), st.text(max_size=80))
def test_pairs_look_alike_from_both_sides(first: str, second: str) -> None:
    there = features(first, second, 0.5, {})
    assert there == pytest.approx(features(second, first, 0.5, {}))
    assert np.isfinite(there).all()
    same = seen(first, first)
    assert same["idf_overlap"] == 1
    assert same["only_count_more"] == same["negation_differs"] == 0


def test_the_threshold_holds_the_asked_rate_while_traffic_changes() -> None:
    rng = random.Random(3)
    gate = OnlineThreshold(0.5, 0.05, step=0.01, least=0.0, most=0.99)
    for difficulty in (1.0, 0.3, 0.6):
        false = hits = 0
        for number in range(20_000):
            chance = rng.random()
            if chance < gate.threshold:
                continue
            wrong = rng.random() < min(1.0, difficulty * (1 - chance))
            gate.learn(false_hit=wrong)
            if number > 5_000:
                hits, false = hits + 1, false + wrong
        assert false / hits == pytest.approx(0.05, abs=0.015)


def embed(texts: Sequence[str]) -> Any:
    rows = np.zeros((len(texts), 64), np.float32)
    for row, text in enumerate(texts):
        for word in text.lower().split():
            rows[row, zlib.crc32(word.strip("?.,!").encode()) % 64] += 1.0
        rows[row, 0] += 0.1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def desk(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    acts = ("open", "close", "rename", "share", "print", "delete")
    things = ("account", "report", "invoice", "ticket", "calendar", "photo")
    shapes = ("how do I {} my {}", "I want to {} the {} in 2 steps", "can you {} a {} in paris")
    for _ in range(count):
        act, thing = rng.choice(acts), rng.choice(things)
        text = rng.choice(shapes).format(act, thing) + rng.choice(["", "?", " today", " please"])
        rows.append({"text": text, "label": f"{act} {thing}"})
    return rows


@pytest.mark.skipif(not FITS, reason="lightgbm is not installed")
def test_a_fitted_gate_serves_rewordings_and_not_edits() -> None:
    from intentd.controller.search.prompts_cache import fit_gate, measure, report

    model, chosen = fit_gate({"desk": desk(400, 1)}, embed, max_false_hit=0.02)
    assert chosen["false_hit_rate"] <= 0.02
    result = report(measure(model, {"desk": desk(200, 2)}, embed, 0), model.threshold)
    assert result["hit_rate"] > 0.5
    assert result["false_hit_rate"] <= 0.03 <= result["false_hit_rate_95"] + 0.03
    assert result["edited_answered"] <= 0.02
    assert result["reworded_recognised"] >= 0.9
    verdict = model.judge("how do I close my account", "how do I open my account", 0.95)
    assert (verdict.hit, verdict.reason) == (False, "polarity")


def test_repeated_statements_share_a_label_and_out_of_scope_equals_nothing() -> None:
    from intentd.controller.search.prompts_cache import stream_of

    pairs = [
        {"a": "The method is used to rename columns", "b": "x", "label": 1},
        {"a": "This method is used to rename the columns here", "b": "y", "label": 1},
        {"a": "Rows are sorted by key", "b": "z", "label": 1},
    ]
    stream = stream_of("pairs", pairs, 0)
    assert len(stream.queries) == 3
    assert len(set(stream.query_labels)) == 2
    rows = [{"text": f"t{n}", "label": "oos"} for n in range(6)]
    assert set(stream_of("oos", rows, 0).query_labels) == {""}
