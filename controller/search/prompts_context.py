"""Fit the context chooser on labelled conversations, and count what it leaves out and pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from intentd.controller.search.prompts_routing import tree_arrays
from intentd.core.errors import InputError
from intentd.core.prompts.chooser import FEATURE_COUNT, LEVELS, ChooserModel, features
from intentd.core.prompts.router import Array

FOLDS: Final = 5
ROUNDS: Final = 150
OPTIONS: Final[Mapping[str, Any]] = {
    "objective": "binary",
    "num_leaves": 8,
    "learning_rate": 0.05,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "min_data_in_leaf": 20,
    "lambda_l2": 5.0,
    "num_threads": 1,
    "deterministic": True,
    "seed": 0,
    "verbose": -1,
}
MOST_NEEDLESS: Final = 0.055


@dataclass(frozen=True, slots=True)
class Turns:
    """One row a turn. needed: least number of last messages; tokens: (turns, k) of the last k.

    available: messages before the turn.
    """

    features: Array
    needed: Array
    tokens: Array
    available: Array
    conversation: Array


def turns_of(rows: Sequence[Mapping[str, Any]]) -> Turns:
    """Turns of mixed conversations; an article's title counts as the oldest message.

    Tokens are counted as a quarter of the characters: only their ratio is reported.
    """
    table, needed, tokens, available, owner = [], [], [], [], []
    for number, row in enumerate(rows):
        title = " ".join(row.get("preamble") or [])
        messages = [title] if title else []
        for turn in row.get("turns", ()):
            query = str(turn["query"])
            table.append(features(query, messages))
            wanted = int(turn["k_needed"])
            # none found at all: as much as there is
            needed.append(wanted if wanted >= 0 else LEVELS[-1])
            sizes = [len(text) / 4 + 8 for text in messages[::-1][: LEVELS[-1]]]
            sums = np.cumsum([0.0, *sizes])
            tokens.append([float(sums[min(k, len(sizes))]) for k in range(LEVELS[-1] + 1)])
            available.append(len(messages))
            owner.append(number)
            messages.append(f"{query} {turn.get('answer') or ''}")
    if not table:
        raise InputError("--train, --test", 0, "conversations with turns")
    return Turns(
        np.array(table).reshape(-1, FEATURE_COUNT),
        np.array(needed, float),
        np.array(tokens),
        np.array(available, float),
        np.array(owner, float),
    )


def _fit_levels(turns: Turns, rows: Any) -> list[Any]:
    import lightgbm

    return [
        lightgbm.train(
            dict(OPTIONS),
            lightgbm.Dataset(turns.features[rows], (turns.needed[rows] > level).astype(float)),
            ROUNDS,
        )
        for level in LEVELS[:-1]
    ]


def fit_chooser(turns: Turns, *, enough: float = 0.955) -> ChooserModel:
    """Trees on all turns; thresholds by folds of whole conversations.

    Among the pairs of thresholds that keep `enough` with few needless messages, the one that
    sends the fewest tokens.
    """
    chances = np.zeros((len(turns.needed), len(LEVELS) - 1))
    for fold in range(FOLDS):
        own = turns.conversation % FOLDS == fold
        for level, booster in enumerate(_fit_levels(turns, ~own)):
            chances[own, level] = booster.predict(turns.features[own])
    best: tuple[tuple[float, float, float], tuple[float, float]] | None = None
    for threshold in np.linspace(0.04, 0.6, 29):
        for further in np.linspace(0.04, 0.6, 15):
            found = score(turns, chances, float(threshold), float(further))
            lacking = max(0.0, enough - found["enough_context"])
            lacking += max(0.0, found["needless"] - MOST_NEEDLESS)
            key = (round(lacking, 4), found["tokens_vs_last5"], threshold)
            if best is None or key < best[0]:
                best = (key, (float(threshold), float(further)))
    assert best is not None
    every = np.ones(len(turns.needed), bool)
    trees = tuple(tree_arrays(one) for one in _fit_levels(turns, every))
    return ChooserModel(trees, *best[1])


def predict(model: ChooserModel, turns: Turns) -> Array:
    odds = np.stack([one.sums(turns.features) for one in model.trees], axis=1)
    chances: Array = 1.0 / (1.0 + np.exp(-odds))
    return chances


def score(turns: Turns, chances: Array, threshold: float, further: float) -> dict[str, Any]:
    """Enough: turns given at least what they need; needless: given some and needing none."""
    limits = np.array([threshold, *[further] * (chances.shape[1] - 1)])
    fits = chances <= limits
    # as `level_of`, for all turns at a time
    first = np.where(fits.any(axis=1), fits.argmax(axis=1), len(LEVELS) - 1)
    return count(turns, np.array(LEVELS)[first])


def count(turns: Turns, sent: Any) -> dict[str, Any]:
    """The three figures for any choice of k by turn."""
    every = np.arange(len(sent))
    given = np.minimum(sent, turns.available)
    # what lies before the first message cannot be sent by any policy
    short = (given < turns.needed) & (given < turns.available)
    needless = (given > 0) & (turns.needed == 0)
    spent = turns.tokens[every, np.minimum(sent, LEVELS[-1])].sum()
    return {
        "tokens_vs_last5": round(float(spent / turns.tokens[:, LEVELS[-1]].sum()), 4),
        "enough_context": round(float(1.0 - short.mean()), 4),
        "needless": round(float(needless.mean()), 4),
        "n": len(sent),
    }
