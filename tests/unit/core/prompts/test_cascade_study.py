"""Cascades replayed: agreement learned from recorded answers, judges measured by each other."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from intentd.controller.search import prompts_cascade as study
from intentd.core.errors import InputError


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The cheap model is wrong on a third; the others then mostly answer something else."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        right = rng.random() < 0.67
        answers = {"cheap": "7" if right else "8", "dear": "7"}
        for name in ("second", "third"):
            agrees = rng.random() < (0.9 if right else 0.1)
            answers[name] = answers["cheap"] if agrees else str(rng.randint(10, 99))
        cost = {"cheap": 1.0, "second": 0.5, "third": 0.5, "dear": 20.0}
        models = {
            name: {
                "score": int(answer == "7"),
                "parsed_answer": answer,
                "out_tokens": 50,
                "cost_usd": cost[name],
            }
            for name, answer in answers.items()
        }
        made.append({"models": models})
    return made


def test_agreement_finds_the_wrong_answers_at_a_part_of_the_cost() -> None:
    learned = study.replay_of(rows(400, 1), "cheap", ["second", "third"], "dear")
    model, chosen = study.fit_cascade(learned, max_loss=0.02)
    assert chosen["loss"] <= 0.02
    tested = study.replay_of(rows(300, 2), "cheap", ["second", "third"], "dear")
    result = study.score_cascade(study.doubts(model.agreement, tested) >= model.threshold, tested)
    assert result["loss"] < 0.06
    assert result["quality"] > result["quality_random"] + 0.1
    assert result["cost_share"] < 0.65
    assert result["loss_95"][0] <= result["loss"] <= result["loss_95"][1]


def test_never_and_always_escalating_are_the_two_models() -> None:
    replay = study.replay_of(rows(50, 3), "cheap", ["second"], "dear")
    never = study.score_cascade(np.zeros(50, bool), replay)
    always = study.score_cascade(np.ones(50, bool), replay)
    assert never["quality"] == never["quality_m1"]
    assert (always["quality"], always["loss"]) == (always["quality_m2"], 0.0)
    assert always["cost"] > always["cost_m2"]


def test_one_judge_decides_and_the_other_measures() -> None:
    judged = [
        {"models": {"a": {"score_x": 4, "score_y": 5.0}, "b": {"score_x": 9, "score_y": 8.0}}},
        {"models": {"a": {"score_x": 9, "score_y": 7.0}, "b": {"score_x": 9, "score_y": None}}},
    ]
    replay, scores, other = study.judged_replay(judged, "a", "x", "b")
    assert (other, scores.tolist(), replay.quality_second.tolist()) == ("y", [4.0], [8.0])
    assert study.score_cascade(scores < 6, replay)["cost"] is None
    with pytest.raises(InputError, match="--verifier"):
        study.judged_replay(judged, "a", "z", "b")
    with pytest.raises(InputError, match="models"):
        study.replay_of(rows(3, 1), "cheap", ["nobody"], "dear")
