"""The context chooser: features of any text, and learning from conversations that lean back."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.prompts.chooser import FEATURE_COUNT, LEVELS, features, level_of

FITS = importlib.util.find_spec("lightgbm") is not None
PEOPLE = ("Ada Lovelace", "Alan Turing", "Grace Hopper", "Edsger Dijkstra", "Barbara Liskov")


@given(st.text(max_size=60), st.lists(st.text(max_size=60), max_size=9))
def test_every_turn_has_its_features(prompt: str, messages: list[str]) -> None:
    values = features(prompt, messages)
    assert len(values) == FEATURE_COUNT
    assert np.isfinite(values).all()


@given(st.lists(st.floats(0, 1), min_size=len(LEVELS) - 1, max_size=len(LEVELS) - 1))
def test_a_higher_threshold_never_sends_more(chances: list[float]) -> None:
    sent = [level_of(chances, t, t) for t in (0.1, 0.3, 0.5, 0.9)]
    assert sent == sorted(sent, reverse=True)
    assert set(sent) <= set(LEVELS)


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        turns: list[dict[str, Any]] = []
        for number in range(6):
            who = rng.choice(PEOPLE)
            if number and rng.random() < 0.4:
                turn = {"query": "What did she publish after that?", "k_needed": 1}
            else:
                turn = {"query": f"Where did {who} study mathematics?", "k_needed": 0}
            turns.append({**turn, "answer": f"{who} studied in {rng.randint(1800, 1990)}."})
        made.append({"preamble": [], "turns": turns})
    return made


@pytest.mark.skipif(not FITS, reason="lightgbm is not installed")
def test_a_chooser_learns_which_turns_lean_on_the_last_message() -> None:
    from intentd.controller.search import prompts_context as study

    model = study.fit_chooser(study.turns_of(conversations(40, 1)))
    turns = study.turns_of(conversations(20, 2))
    found = study.score(turns, study.predict(model, turns), model.threshold, model.further)
    assert found["enough_context"] > 0.97
    assert found["needless"] < 0.03
    assert found["tokens_vs_last5"] < 0.4
    before = ["Where did Ada Lovelace study? In London.", "And Alan Turing? In Cambridge."]
    assert model.choose("What did she publish after that?", before) >= 1
    assert model.choose("Where did Grace Hopper study mathematics?", before) == 0
    assert model.choose("What did she publish?", []) == 0


def test_what_no_policy_could_send_is_not_counted_against_one() -> None:
    from intentd.controller.search import prompts_context as study

    turns = [{"query": "a", "k_needed": 3}, {"query": "b", "k_needed": 2}]
    turns += [{"query": "c", "k_needed": 0}]
    table = study.turns_of([{"turns": turns}])
    assert study.count(table, np.array([0, 0, 0]))["enough_context"] == pytest.approx(
        2 / 3, abs=1e-3
    )
    found = study.count(table, np.array([1, 1, 1]))
    assert (found["enough_context"], found["needless"]) == (1.0, pytest.approx(1 / 3, abs=1e-3))
    with pytest.raises(InputError):
        study.turns_of([])
