"""Cascades replayed on recorded answers: what they keep of the dear model's quality, at what cost.

The verifier is either a judge whose scores were recorded (then another judge's scores are the
measure of quality), or cheap models whose recorded answers are compared with the first one's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intentd.core.errors import InputError
from intentd.core.prompts.cascade import (
    FEATURES,
    AgreementModel,
    Answered,
    TrainedCascade,
    agreement_features,
    final_answer,
    normal_answer,
)
from intentd.core.prompts.router import Array

RIDGE: Final = 5.0
STEPS: Final = 25
FOLDS: Final = 10
SCORE_PREFIX: Final = "score_"


@dataclass(frozen=True, slots=True)
class Replay:
    """One row a prompt: qualities and costs of both answers, and what tells of a wrong first."""

    quality_first: Array
    quality_second: Array
    cost_first: Array
    cost_second: Array
    features: Array
    prompts: tuple[str, ...] = ()

    def part(self, rows: npt.NDArray[Any]) -> Replay:
        return Replay(
            self.quality_first[rows],
            self.quality_second[rows],
            self.cost_first[rows],
            self.cost_second[rows],
            self.features[rows],
        )


def replay_of(
    rows: Sequence[Mapping[str, Any]], first: str, verifiers: Sequence[str], second: str
) -> Replay:
    """Rows in which all named models answered. Raises InputError naming an unknown model."""
    table, features, prompts = [], [], []
    for row in rows:
        models = row.get("models", {})
        if any(models.get(name, {}).get("score") is None for name in (first, second, *verifiers)):
            continue
        seen = [_answered(models[name]) for name in (first, *verifiers)]
        features.append(agreement_features(seen[0], seen[1:]))
        cheap = sum(float(models[name].get("cost_usd") or 0.0) for name in (first, *verifiers))
        dear = float(models[second].get("cost_usd") or 0.0)
        scores = float(models[first]["score"]), float(models[second]["score"])
        table.append((*scores, cheap, dear))
        prompts.append(f"{row.get('dataset')}/{row.get('prompt_id')}")
    if not table:
        raise InputError("models", (first, *verifiers, second), "models recorded in the files")
    columns = np.array(table).T
    first_quality, second_quality, cheap_cost, dear_cost = columns
    return Replay(
        first_quality, second_quality, cheap_cost, dear_cost, np.array(features), tuple(prompts)
    )


def _answered(model: Mapping[str, Any]) -> Answered:
    text = str(model.get("response") or "")
    parsed = model.get("parsed_answer")
    answer = normal_answer(parsed) if parsed is not None else final_answer(text)
    return Answered(answer, int(model.get("out_tokens") or 1), text)


def fit_agreement(replay: Replay) -> AgreementModel:
    """Logistic regression (Newton, ridge) on "the first is wrong and the second right"."""
    centre = replay.features.mean(axis=0)
    scale = replay.features.std(axis=0) + 1e-6
    inputs = np.hstack([(replay.features - centre) / scale, np.ones((len(replay.features), 1))])
    target = (replay.quality_second > replay.quality_first).astype(float)
    penalty = np.diag([RIDGE] * len(FEATURES) + [1e-6])
    weights = np.zeros(inputs.shape[1])
    for _ in range(STEPS):
        chance = 1.0 / (1.0 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        slope = inputs.T @ (target - chance) - penalty @ weights
        curve = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + penalty
        weights = weights + np.linalg.solve(curve, slope)
    return AgreementModel(
        tuple(weights[:-1].tolist()),
        float(weights[-1]),
        tuple(centre.tolist()),
        tuple(scale.tolist()),
    )


def doubts(model: AgreementModel, replay: Replay) -> Array:
    return np.array([model.chance_wrong(row) for row in replay.features.tolist()])


def cheapest_threshold(doubt: Array, replay: Replay, max_loss: float) -> float:
    """The highest threshold whose mean loss of quality stays within max_loss."""
    gain = replay.quality_second - replay.quality_first
    order = np.argsort(doubt)
    # all prompts up to a place in this order keep the first answer
    loss = np.cumsum(gain[order]) / len(gain)
    fits = np.flatnonzero(loss <= max_loss)
    if len(fits) == 0:
        return 0.0
    place = int(fits[-1])
    return 1.0 if place == len(doubt) - 1 else float(doubt[order[place + 1]])


def held_doubts(replay: Replay, seed: int) -> Array:
    """Each row's doubt by a model of the other folds. Raises InputError for too few rows."""
    count = len(replay.quality_first)
    if count < 2 * FOLDS:
        raise InputError("--train", count, f"at least {2 * FOLDS} prompts all models answered")
    folds = np.random.default_rng(seed).permutation(np.arange(count) % FOLDS)
    doubt = np.zeros(count)
    for fold in range(FOLDS):
        own = folds == fold
        doubt[own] = doubts(fit_agreement(replay.part(~own)), replay.part(own))
    return doubt


def fit_cascade(
    replay: Replay, *, max_loss: float, seed: int = 0
) -> tuple[TrainedCascade, dict[str, Any]]:
    """The agreement model of all rows; its threshold from rows the folds' models have not seen.

    Also what the threshold did on those rows. Raises InputError for fewer rows than folds.
    """
    doubt = held_doubts(replay, seed)
    threshold = cheapest_threshold(doubt, replay, max_loss)
    chosen = score_cascade(doubt >= threshold, replay, seed=seed)
    kept = {key: chosen[key] for key in ("n", "loss", "cost_share", "escalated")}
    return TrainedCascade(fit_agreement(replay), threshold), {"folds": FOLDS, **kept}


def curve(doubt: Array, replay: Replay, points: int = 40) -> list[list[float]]:
    """(cost beside the dear model alone, mean quality lost) over all thresholds."""
    order = np.argsort(-doubt, kind="stable")
    gain = (replay.quality_second - replay.quality_first)[order]
    dear = float(replay.cost_second.sum())
    costs = float(replay.cost_first.sum()) + np.cumsum([0.0, *replay.cost_second[order]])
    losses = (gain.sum() - np.cumsum([0.0, *gain])) / len(gain)
    rows = np.unique(np.linspace(0, len(gain), points).astype(int))
    return [[round(float(costs[r]) / dear, 4), round(float(losses[r]), 4)] for r in rows]


def choose_compared(
    rows: Sequence[Mapping[str, Any]],
    first: str,
    candidates: Sequence[str],
    second: str,
    *,
    most: int = 2,
    max_loss: float,
    seed: int = 0,
) -> tuple[tuple[str, ...], TrainedCascade, dict[str, Any]]:
    """Which cheap models to compare with: the cheapest cascade within max_loss, by folds of rows.

    Every set of up to `most` candidates is tried. Raises InputError when none has a price.
    """
    best: tuple[float, tuple[str, ...], TrainedCascade, dict[str, Any]] | None = None
    for size in range(1, most + 1):
        for compared in itertools.combinations(candidates, size):
            replay = replay_of(rows, first, compared, second)
            model, chosen = fit_cascade(replay, max_loss=max_loss, seed=seed)
            share = chosen["cost_share"]
            if share is not None and (best is None or share < best[0]):
                best = (share, compared, model, chosen)
    if best is None:
        raise InputError("candidates", tuple(candidates), "models with recorded costs")
    _, compared, model, chosen = best
    return compared, replace(model, first=first, compared=compared, second=second), chosen


def choose_within_cost(
    rows: Sequence[Mapping[str, Any]],
    first: str,
    candidates: Sequence[str],
    second: str,
    *,
    most: int = 2,
    max_cost_share: float,
    seed: int = 0,
) -> tuple[tuple[str, ...], TrainedCascade, dict[str, Any]]:
    """As `choose_compared`, the other way about: the least loss within a share of the dear model's
    cost, by folds of rows. Raises InputError when every cascade costs more."""
    best: tuple[float, tuple[str, ...], float, Replay, Array] | None = None
    for size in range(1, most + 1):
        for compared in itertools.combinations(candidates, size):
            replay = replay_of(rows, first, compared, second)
            doubt = held_doubts(replay, seed)
            order = np.argsort(doubt, kind="stable")
            # the first k of this order keep the cheap answer
            gain = (replay.quality_second - replay.quality_first)[order]
            loss = np.concatenate([[0.0], np.cumsum(gain)]) / len(gain)
            dear = float(replay.cost_second.sum())
            kept = np.concatenate([[0.0], np.cumsum(replay.cost_second[order])])
            share = (float(replay.cost_first.sum()) + dear - kept) / dear if dear else kept
            # equal doubts go the same way
            apart = np.concatenate([[True], np.diff(doubt[order]) > 0, [True]])
            fits = np.flatnonzero((share <= max_cost_share) & apart)
            if len(fits) == 0:
                continue
            place = int(fits[np.argmin(loss[fits])])
            if best is None or loss[place] < best[0]:
                threshold = float(doubt[order[place]]) if place < len(order) else 1.0
                best = (float(loss[place]), compared, threshold, replay, doubt)
    if best is None:
        raise InputError("max_cost_share", max_cost_share, "a share that some cascade can keep")
    _, compared, threshold, replay, doubt = best
    chosen = score_cascade(doubt >= threshold, replay, seed=seed)
    told = {key: chosen[key] for key in ("n", "loss", "cost_share", "escalated")}
    model = TrainedCascade(fit_agreement(replay), threshold, first, compared, second)
    return compared, model, {"folds": FOLDS, "max_cost_share": max_cost_share, **told}


def choose_within(
    rows: Sequence[Mapping[str, Any]],
    first: str,
    candidates: Sequence[str],
    second: str,
    *,
    most: int = 2,
    max_loss: float,
    max_cost_share: float,
    seed: int = 0,
) -> tuple[tuple[str, ...], TrainedCascade, dict[str, Any]]:
    """The least cost within max_loss where that costs at most the share; else, since it is not to
    be had at that price, the least loss within the share. By folds of rows."""
    cheapest = choose_compared(
        rows, first, candidates, second, most=most, max_loss=max_loss, seed=seed
    )
    share, lost = cheapest[2]["cost_share"], cheapest[2]["loss"]
    if share <= max_cost_share and lost <= max_loss:
        return cheapest
    return choose_within_cost(
        rows, first, candidates, second, most=most, max_cost_share=max_cost_share, seed=seed
    )


def pooled_loss(
    lost: Mapping[str, Array], prompts: Mapping[str, Sequence[str]], *, draws: int = 2000, seed: int
) -> dict[str, Any]:
    """Mean loss over several cascades, with its interval.

    lost: cascade -> quality lost by prompt. prompts: cascade -> which prompts, since cascades on
    the same ones are not independent: prompts are drawn with replacement, with all they are in.
    """
    table: dict[str, list[float]] = {}
    for name, values in lost.items():
        for prompt, value in zip(prompts[name], values.tolist(), strict=True):
            table.setdefault(prompt, []).append(value)
    sums = np.array([sum(values) for values in table.values()])
    counts = np.array([len(values) for values in table.values()])
    rows = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[rows].sum(axis=1) / counts[rows].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean_loss": round(float(sums.sum() / counts.sum()), 4),
        "mean_loss_95": [round(float(low), 4), round(float(high), 4)],
        "answers": int(counts.sum()),
        "prompts": len(sums),
    }


def score_cascade(
    escalated: npt.NDArray[np.bool_], replay: Replay, *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Quality, cost and share escalated, beside the dear model and a random choice."""
    quality = np.where(escalated, replay.quality_second, replay.quality_first)
    cost = replay.cost_first + np.where(escalated, replay.cost_second, 0.0)
    lost = replay.quality_second - quality
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(lost), (draws, len(lost)))
    low, high = np.quantile(lost[rows].mean(axis=1), [0.025, 0.975])
    share = float(escalated.mean())
    random_choice = (1 - share) * replay.quality_first.mean() + share * replay.quality_second.mean()
    dear = float(replay.cost_second.sum())
    return {
        "quality": round(float(quality.mean()), 4),
        "cost": round(float(cost.sum()), 6) if dear else None,
        "escalated": round(share, 4),
        "n": len(lost),
        "quality_m1": round(float(replay.quality_first.mean()), 4),
        "quality_m2": round(float(replay.quality_second.mean()), 4),
        "quality_random": round(float(random_choice), 4),
        "cost_m2": round(dear, 6) if dear else None,
        "cost_share": round(float(cost.sum()) / dear, 4) if dear else None,
        "loss": round(float(lost.mean()), 4),
        "loss_95": [round(float(low), 4), round(float(high), 4)],
    }


def judged_replay(
    rows: Sequence[Mapping[str, Any]], first: str, judge: str, second: str
) -> tuple[Replay, Array, str]:
    """(qualities by the other judge, the judge's scores of the first answer, the other judge)."""
    judges = {
        key.removeprefix(SCORE_PREFIX)
        for row in rows
        for model in row.get("models", {}).values()
        for key in model
        if key.startswith(SCORE_PREFIX)
    }
    if judge not in judges or len(judges) < 2:
        raise InputError("--verifier", judge, f"one of two judges: {', '.join(sorted(judges))}")
    other = min(judges - {judge})
    table = []
    for row in rows:
        models = row.get("models", {})
        one, two = models.get(first, {}), models.get(second, {})
        values = (
            one.get(SCORE_PREFIX + other),
            two.get(SCORE_PREFIX + other),
            one.get(SCORE_PREFIX + judge),
        )
        if None not in values:
            costs = (float(one.get("cost_usd") or 0.0), float(two.get("cost_usd") or 0.0))
            table.append((*map(float, values), *costs))
    if not table:
        raise InputError("--m1, --m2", (first, second), "models recorded in the file")
    columns = np.array(table).T
    none = np.zeros((len(table), len(FEATURES)))
    return Replay(columns[0], columns[1], columns[3], columns[4], none), columns[2], other


def has_judges(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(
        key.startswith(SCORE_PREFIX)
        for row in rows[:1]
        for model in row.get("models", {}).values()
        for key in model
    )
