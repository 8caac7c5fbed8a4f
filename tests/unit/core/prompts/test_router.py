"""Routing: scores, and a router that learns what can be learned and knows what it cannot."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.prompts.router import LearnedRouter, score_routing, terms
from intentd.core.prompts.shape import ASKED, SHAPE_COUNT, shape

FITS = all(importlib.util.find_spec(name) for name in ("lightgbm", "scipy"))


def test_scores_of_the_best_the_worst_and_no_router() -> None:
    weak = np.array([1.0, 0.0, 0.0, 1.0])
    strong = np.array([1.0, 1.0, 1.0, 1.0])
    gain = strong - weak
    best = score_routing(gain, weak, strong)
    assert (best.cpt50, best.cpt80) == (0.25, 0.5)
    assert best.apgr == pytest.approx(0.75)
    assert score_routing(-gain, weak, strong).apgr == pytest.approx(0.25)
    assert score_routing(np.zeros(4), weak, strong).apgr == pytest.approx(0.5)
    with pytest.raises(InputError):
        score_routing(gain, strong, weak)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=2))
def test_curves_start_at_nothing_and_end_at_everything(rows: list[tuple[bool, bool, int]]) -> None:
    weak = np.array([float(row[0]) for row in rows])
    strong = np.array([float(row[1]) for row in rows])
    if strong.mean() <= weak.mean():
        return
    score = score_routing(np.array([float(row[2]) for row in rows]), weak, strong)
    assert score.recovered[0] == 0
    assert score.recovered[-1] == pytest.approx(1)
    assert 0 <= score.cpt50 <= score.cpt80 <= 1


@given(st.text(max_size=300))
def test_every_text_has_a_shape(text: str) -> None:
    assert len(shape(text)) == SHAPE_COUNT
    assert np.isfinite(shape(text)).all()
    assert all(count > 0 for count in terms(text).values())


def test_what_is_asked_at_the_end_is_seen_apart_from_the_story() -> None:
    story = "He picks 8 apples and 9 pears a day, and sells them at $2.50 a bag."
    plain = shape(f"{story} How many does he pick?")[ASKED]
    named = shape(f"{story} How many does he pick in 30 days?")[ASKED]
    # a number, one of them, a bare one, near the end; a time, a time with a number
    changed = [place for place in range(len(plain)) if plain[place] != named[place]]
    assert changed == [0, 1, 2, 3, 11, 12]
    assert shape(f"{story} How much does he earn?")[ASKED][4:6] == [1.0, 1.0]  # cents, asked for


@pytest.mark.parametrize("text", ["if " * 9000, "$" * 20_000, "9," * 9000, "? " * 9000, "1" * 400])
def test_odd_texts_have_a_shape_too(text: str) -> None:
    assert np.isfinite(shape(text)).all()


def embed(texts: Sequence[str]) -> Any:
    """Half of the vector tells the topic, the rest is noise of the text."""
    rows = []
    for text in texts:
        rng = np.random.default_rng(sum(map(ord, text)))
        row = 0.1 * rng.normal(size=16)
        row[0 if "sum" in text else 1 if "poem" in text else 2] = 1.0
        rows.append(row / np.linalg.norm(row))
    return np.array(rows, np.float32)


def outcomes(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        hard = rng.random() < 0.5
        word = "sum" if hard else "poem"
        prompt = f"{word} {rng.randint(0, 10**6)} case {number}"
        right = int(rng.random() < (0.2 if hard else 0.9))
        models = {"weak": {"score": right}, "strong": {"score": int(rng.random() < 0.95)}}
        rows.append({"prompt": prompt, "models": models})
    return rows


@pytest.mark.skipif(not FITS, reason="lightgbm and scipy are not installed")
def test_a_router_learns_a_kind_of_prompt_and_is_neutral_on_another() -> None:
    from intentd.controller.search.prompts_routing import (
        evaluate_routing,
        fit_router,
        outcomes_of,
    )

    learned = outcomes_of(outcomes(200, 1), "weak", "strong")
    model = fit_router(learned, embed, weak="weak", strong="strong")
    test = outcomes_of(outcomes(150, 2), "weak", "strong")
    result = evaluate_routing(model, test, embed, draws=50)
    assert result["apgr"] > 0.65
    assert result["known"] > 0.9
    router = LearnedRouter([model], embed)
    hard = router.predict("sum 17 case 1", "weak", "strong")
    easy = router.predict("poem 17 case 1", "weak", "strong")
    assert hard.known
    assert hard.gain > easy.gain
    other = router.predict("translate this", "weak", "strong")
    assert (other.known, other.gain) == (False, model.mean_gain)
    assert router.predict("sum 17", "weak", "another").known is False


@pytest.mark.skipif(not FITS, reason="lightgbm and scipy are not installed")
def test_one_prompt_is_scored_as_many_are() -> None:
    from intentd.controller.search.prompts_routing import _Fitter, fit_router, outcomes_of

    learned = outcomes_of(outcomes(80, 3), "weak", "strong")
    model = fit_router(learned, embed, weak="weak", strong="strong")
    fitter = _Fitter(learned, embed(learned.prompts))
    every = np.arange(80)
    many, _ = fitter.columns(fitter.fit(every), every, every)
    vectors = embed(learned.prompts)
    for row in (0, 41, 79):
        one, _ = model.columns(learned.prompts[row], vectors[row])
        assert np.allclose(one, many[row], atol=1e-4)
    with pytest.raises(InputError, match="--train"):
        fit_router(
            outcomes_of(outcomes(10, 3), "weak", "strong"), embed, weak="weak", strong="strong"
        )
