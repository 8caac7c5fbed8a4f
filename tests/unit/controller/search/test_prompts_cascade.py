"""Cascades chosen by what they may lose, and by what they may cost."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from intentd.controller.search import prompts_cascade as study
from intentd.core.errors import InputError


def rows(count: int) -> list[dict[str, Any]]:
    """`other` agrees with `cheap` where that is right; `noise` agrees at random."""
    rng = random.Random(1)
    made = []
    for number in range(count):
        right = rng.random() < 0.7
        answers = {"cheap": "7" if right else "8", "dear": "7"}
        answers["other"] = answers["cheap"] if rng.random() < (0.95 if right else 0.1) else "9"
        answers["noise"] = answers["cheap"] if rng.random() < 0.5 else "9"
        models = {
            name: {
                "score": int(answer == "7"), "parsed_answer": answer, "out_tokens": 50,
                "cost_usd": 20.0 if name == "dear" else 0.5,
            }
            for name, answer in answers.items()
        }  # fmt: skip
        made.append({"prompt_id": str(number), "models": models})
    return made


def test_the_least_loss_within_a_cost() -> None:
    given = rows(300)
    shares = []
    for most in (0.2, 0.45):
        compared, model, chosen = study.choose_within_cost(
            given, "cheap", ["noise", "other"], "dear", max_cost_share=most
        )
        assert "other" in compared
        assert (model.first, model.compared, model.second) == ("cheap", compared, "dear")
        assert chosen["cost_share"] <= most
        replay = study.replay_of(given, "cheap", compared, "dear")
        random_loss = 0.3 * (1 - chosen["escalated"])
        assert chosen["loss"] < random_loss
        held = study.held_doubts(replay, 0) >= model.threshold
        assert np.mean(held) == pytest.approx(chosen["escalated"], abs=1e-4)
        shares.append(chosen["loss"])
    assert shares[1] < shares[0]
    with pytest.raises(InputError, match="max_cost_share"):
        study.choose_within_cost(given, "cheap", ["other"], "dear", max_cost_share=0.01)


def test_a_loss_that_is_not_to_be_had_at_the_price_gives_way_to_the_price() -> None:
    given = rows(300)
    models = ("cheap", ["noise", "other"], "dear")
    cheapest = study.choose_compared(given, *models, max_loss=0.03)
    share = cheapest[2]["cost_share"]
    dear_enough = study.choose_within(given, *models, max_loss=0.03, max_cost_share=share + 0.01)
    assert dear_enough == cheapest
    bound = study.choose_within(given, *models, max_loss=0.03, max_cost_share=share - 0.1)
    assert bound == study.choose_within_cost(given, *models, max_cost_share=share - 0.1)
    assert bound[2]["loss"] > 0.03
