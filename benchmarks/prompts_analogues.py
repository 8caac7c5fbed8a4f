"""Chapter 4's figures on recorded data: analogues, for the authors' 244 queries are private.

4.1 and 4.6: mixed conversations instead of WhatsApp's; quality is whether a turn had the context it
needs. 4.4 and 4.5: answers to real chats (WildBench) with one judge as the verifier and another as
the measure. 4.7: whether the stored chunk holds the answer, since no small model answers here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from intentd.controller.search import prompts_cascade, prompts_context, prompts_training
from intentd.controller.search.prompts_data import read_rows

CHEAP: Final = "Phi-3-mini-128k-instruct"
DEAR: Final = "Qwen1.5-72B-Chat-greedy"
VERIFIER: Final = "gpt-4-turbo-2024-04-09"
THRESHOLD: Final = 8.0
LOW_SHARE: Final = 0.1
MAX_WRONG: Final = 0.05


def verification(data: Path) -> dict[str, Any]:
    """Figures 4.4 and 4.5: t = 8 beside a random choice with the same share, and with .1."""
    path = data / "routing" / "wildbench_two_judges.jsonl.gz"
    rows = read_rows(path)  # nothing is learned: t is the chapter's
    replay, scores, other = prompts_cascade.judged_replay(rows, CHEAP, VERIFIER, DEAR)
    asked = scores < THRESHOLD
    rng = np.random.default_rng(0)
    first, second = replay.quality_first, replay.quality_second
    strategies = {
        "M1 alone": np.zeros(len(asked), bool),
        "verification, t = 8": asked,
        "random, same share": rng.random(len(asked)) < asked.mean(),
        "random, p = .1": rng.random(len(asked)) < LOW_SHARE,
        "M2 alone": np.ones(len(asked), bool),
    }
    found = {}
    for name, choice in strategies.items():
        below = np.maximum(0.0, second - np.where(choice, second, first))
        found[name] = {
            "asks_m2": round(float(choice.mean()), 4),
            "mean_quality": round(float(np.where(choice, second, first).mean()), 3),
            "within_1_of_m2": round(float((below <= 1).mean()), 4),
            "within_3_of_m2": round(float((below <= 3).mean()), 4),
            "below_m2": [round(float(q), 2) for q in np.quantile(below, np.linspace(0, 1, 41))],
        }
    return {
        "label": "analogue",
        "n": len(asked),
        "m1": CHEAP,
        "m2": DEAR,
        "verifier": VERIFIER,
        "measured_by": other,
        "strategies": found,
        "published": {"asks_m2": {"GPT-3.5 and GPT-4": 0.6, "GPT-4o-mini and GPT-4o": 0.25}},
    }


def context(data: Path) -> dict[str, Any]:
    """Figures 4.1 and 4.6: tokens beside the least, turns with the context they need."""
    path = data / "context" / "mixed_conversations.jsonl.gz"
    model, _ = prompts_training.train_context([path])
    rows = [row for row in read_rows(path) if row.get("split") != "train"]
    turns = prompts_context.turns_of(rows)
    # what every strategy sends: the question itself
    asked = np.array([len(str(turn["query"])) / 4 + 8 for row in rows for turn in row["turns"]])
    every = np.arange(len(asked))
    chances = prompts_context.predict(model, turns)
    limits = np.array([model.threshold, *[model.further] * (chances.shape[1] - 1)])
    needs = chances[:, 0] > model.threshold
    fits = chances <= limits
    chosen = np.array(prompts_context.LEVELS)[
        np.where(fits.any(axis=1), fits.argmax(axis=1), len(prompts_context.LEVELS) - 1)
    ]
    strategies = {
        "LastK(0)": np.zeros(len(asked), int),
        "SmartContext, k = 1": needs.astype(int),
        "LastK(1)": np.ones(len(asked), int),
        "chosen k": chosen,
        "SmartContext, k = 5": np.where(needs, 5, 0),
        "LastK(5)": np.full(len(asked), 5),
    }
    least = float(asked.sum())
    found = {}
    for name, sent in strategies.items():
        tokens = float((asked + turns.tokens[every, sent]).sum())
        counted = prompts_context.count(turns, sent)
        found[name] = {
            "tokens_vs_none": round(tokens / least, 3),
            "tokens_vs_last5": counted["tokens_vs_last5"],
            "enough_context": counted["enough_context"],
            "needless": counted["needless"],
        }
    return {
        "label": "analogue",
        "turns": len(asked),
        "strategies": found,
        "published": {"k=1 against none": 3, "k=50 against none": 55, "saved": "30 % to 50 %"},
    }


def facts(data: Path, embed: Any) -> dict[str, Any]:
    """Figure 4.7: passages put in, questions whose answer stands in what is found."""
    folder = data / "facts"
    names = ("xquad_questions", "nq_open", "mtrag_un_tasks")
    found = prompts_training.evaluate_facts(
        [folder / "xquad_passages.jsonl.gz"],
        [folder / f"{name}.jsonl.gz" for name in names],
        embed,
        max_wrong=MAX_WRONG,
    )
    return {"label": "analogue", **found}
