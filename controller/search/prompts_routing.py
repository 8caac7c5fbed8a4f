"""Fit the learned router on recorded outcomes, and score it on others."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intentd.controller.search.prompts_data import Embed
from intentd.core.errors import InputError
from intentd.core.prompts.router import (
    Array,
    RouterModel,
    TermWeights,
    Trees,
    near_gain,
    score_routing,
    terms,
)
from intentd.core.prompts.shape import ASKED, SHAPE_COUNT, shape

FOLDS: Final = 5
COMPONENTS: Final = 48
MIN_TERM_COUNT: Final = 2
TEXT_RIDGE: Final = 8.0
DENSE_RIDGE: Final = 2000.0
ASKED_RIDGES: Final = (3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5)
NEIGHBOURS: Final = 300
# Columns: text, dense, asked, trees, near. What is asked at the end stands beside all the others.
ASKED_COLUMN: Final = 2
# Both are taken at their word until so many rows say otherwise.
WEIGHTS_PRIOR_ROWS: Final = 500
UNKNOWN_SHARE: Final = 0.02
LEAST_LABELS: Final = 40
MANY_LABELS: Final = 2000
TREE_OPTIONS: Final[Mapping[str, Any]] = {
    "objective": "l2",
    "feature_fraction": 0.3,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 10.0,
    "num_threads": 1,
    "deterministic": True,
    "seed": 0,
    "verbose": -1,
}
# (rounds, options): fewer rounds where labels are few
FEW: Final = (240, {"num_leaves": 7, "learning_rate": 0.02, "min_data_in_leaf": 20})
MANY: Final = (500, {"num_leaves": 7, "learning_rate": 0.015, "min_data_in_leaf": 30})
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Prompts both models answered, with their scores."""

    prompts: list[str]
    weak: Array
    strong: Array

    @property
    def gain(self) -> Array:
        return self.strong - self.weak

    def part(self, rows: npt.NDArray[Any]) -> Outcomes:
        return Outcomes([self.prompts[row] for row in rows], self.weak[rows], self.strong[rows])


def outcomes_of(rows: Sequence[Mapping[str, Any]], weak: str, strong: str) -> Outcomes:
    """The prompts that both models answered. Raises InputError when there are none."""
    pair: dict[str, tuple[float, float]] = {}
    for row in rows:
        models = row.get("models", {})
        first, second = (models.get(name, {}).get("score") for name in (weak, strong))
        if first is not None and second is not None:
            pair[str(row.get("prompt", "")).strip()] = (float(first), float(second))
    if not pair:
        raise InputError("--weak, --strong", (weak, strong), "models with outcomes in the files")
    table = np.array(list(pair.values()))
    return Outcomes(list(pair), table[:, 0], table[:, 1])


class _Text:
    """TF-IDF of prompts as a sparse matrix, counted once for all folds."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.counted = [terms(prompt) for prompt in prompts]

    def fit(self, rows: npt.NDArray[Any], targets: Array) -> tuple[TermWeights, Array]:
        """Ridge from terms to every target; the intercepts are the targets' means."""
        from scipy.sparse import csr_matrix
        from scipy.sparse.linalg import lsqr

        frequency: Counter[str] = Counter()
        for row in rows:
            frequency.update(self.counted[row].keys())
        kept = sorted(term for term, count in frequency.items() if count >= MIN_TERM_COUNT)
        places = {term: place for place, term in enumerate(kept)}
        document = np.array([frequency[term] for term in kept], float)
        idf = np.log((1.0 + len(rows)) / (1.0 + document)) + 1.0
        matrix = self.matrix(rows, places, idf)
        assert isinstance(matrix, csr_matrix)
        means = targets.mean(axis=0)
        weights = [
            lsqr(matrix, column, damp=TEXT_RIDGE**0.5, iter_lim=60)[0]
            for column in (targets - means).T
        ]
        return TermWeights(places, idf, np.stack(weights, axis=1)), means

    def matrix(self, rows: npt.NDArray[Any], places: Mapping[str, int], idf: Array) -> Any:
        from scipy.sparse import csr_matrix

        columns: list[int] = []
        values: list[float] = []
        ends = [0]
        for row in rows:
            for term, count in self.counted[row].items():
                place = places.get(term)
                if place is not None:
                    columns.append(place)
                    values.append((1.0 + np.log(count)) * idf[place])
            ends.append(len(columns))
        made = csr_matrix((values, columns, ends), shape=(len(rows), len(places)))
        lengths = np.sqrt(made.multiply(made).sum(axis=1)).A1
        scale = np.repeat(1.0 / np.maximum(lengths, 1e-12), np.diff(made.indptr))
        made.data *= scale
        return made


@dataclass(frozen=True, slots=True)
class _Heads:
    """All heads fitted on some rows."""

    text: TermWeights
    intercepts: Array
    middle: Array
    components: Array
    mean: Array
    scale: Array
    linear: Array
    trees: list[Any]


class _Fitter:
    """Fits heads on any rows of one set of outcomes."""

    def __init__(self, outcomes: Outcomes, vectors: npt.NDArray[Any]) -> None:
        self.outcomes = outcomes
        self.vectors = np.asarray(vectors, np.float64)
        self.shapes = np.array([shape(prompt) for prompt in outcomes.prompts])
        self.text = _Text(outcomes.prompts)

    def fit(self, rows: npt.NDArray[Any]) -> _Heads:
        import lightgbm

        targets = self.outcomes.gain[rows, None]
        text, intercepts = self.text.fit(rows, targets)
        own = self.vectors[rows]
        middle = own.mean(axis=0)
        _, _, axes = np.linalg.svd(own - middle, full_matrices=False)
        components = axes[:COMPONENTS].T
        dense = np.hstack([(own - middle) @ components, self.shapes[rows]])
        mean, scale = dense.mean(axis=0), dense.std(axis=0) + 1e-9
        scaled = (dense - mean) / scale
        gram = scaled.T @ scaled + DENSE_RIDGE * np.eye(scaled.shape[1])
        middles = targets.mean(axis=0)
        linear = np.vstack([np.linalg.solve(gram, scaled.T @ (targets - middles)), middles])
        linear = np.hstack([linear, self._asked(scaled, rows)])
        rounds, own_options = MANY if len(rows) >= MANY_LABELS else FEW
        options = {**TREE_OPTIONS, **own_options}
        trees = [
            lightgbm.train(options, lightgbm.Dataset(dense, column), rounds) for column in targets.T
        ]
        return _Heads(text, intercepts, middle, components, mean, scale, linear, trees)

    def _asked(self, scaled: Array, rows: npt.NDArray[Any]) -> Array:
        """Weights of what is asked at the end: foretold of each model by itself.

        One of the two is mostly moved by it and the other is not: a ridge of the gain would have
        to shrink both alike.
        """
        asked = np.arange(scaled.shape[1])[-SHAPE_COUNT:][ASKED]
        weights = np.zeros((scaled.shape[1] + 1, 1))
        for sign, scores in ((1.0, self.outcomes.strong[rows]), (-1.0, self.outcomes.weak[rows])):
            weights[asked, 0] += sign * cross_validated_ridge(scaled[:, asked], scores)
            weights[-1, 0] += sign * scores.mean()
        return weights

    def columns(
        self, heads: _Heads, fitted: npt.NDArray[Any], rows: npt.NDArray[Any]
    ) -> tuple[Array, Array]:
        """What `RouterModel.columns` gives, for many rows at a time."""
        matrix = self.text.matrix(rows, heads.text.places, heads.text.idf)
        dense = np.hstack(
            [(self.vectors[rows] - heads.middle) @ heads.components, self.shapes[rows]]
        )
        scaled = np.hstack([(dense - heads.mean) / heads.scale, np.ones((len(rows), 1))])
        trees = np.stack([one.predict(dense) for one in heads.trees], axis=1)
        similar = self.vectors[rows] @ self.vectors[fitted].T
        gains = self.outcomes.gain[fitted]
        near = np.array([near_gain(row, gains, NEIGHBOURS) for row in similar])
        parts = [
            matrix @ heads.text.weights + heads.intercepts,
            scaled @ heads.linear,
            trees,
            near[:, :1],
        ]
        return np.hstack(parts), near[:, 1]


def cross_validated_ridge(inputs: Array, targets: Array) -> Array:
    """Weights of centred inputs, by the ridge of ASKED_RIDGES that foretells left-out rows best.

    Generalised cross-validation (Golub, Heath and Wahba 1979).
    """
    centred = targets - targets.mean()
    left, values, right = np.linalg.svd(inputs, full_matrices=False)
    seen = left.T @ centred
    best: tuple[float, Array] | None = None
    for ridge in ASKED_RIDGES:
        kept = values**2 / (values**2 + ridge)
        rest = centred - left @ (kept * seen)
        score = float((rest**2).mean()) / (1.0 - kept.sum() / len(targets)) ** 2
        if best is None or score < best[0]:
            best = score, right.T @ (values / (values**2 + ridge) * seen)
    assert best is not None
    return best[1]


def weigh_heads(held: Array, gain: Array) -> Array:
    """One weight a column of held-out predictions, for their deviations from their means.

    Two numbers are fitted: for the mean of the heads that see the whole prompt, and for the one
    that sees what is asked, by least squares drawn to 1. A weight a head gained nothing with 7,000
    labels and lost .02 to .03 APGR with 650 (folds of the train rows). All are scaled to the gain,
    to nothing where they foretell none.
    """
    count = held.shape[1]
    others = [column for column in range(count) if column != ASKED_COLUMN]
    parts = np.stack([held[:, others].mean(axis=1), held[:, ASKED_COLUMN]], axis=1)
    parts, centred = parts - parts.mean(axis=0), gain - gain.mean()
    prior = WEIGHTS_PRIOR_ROWS * np.diag(parts.var(axis=0) + 1e-12)
    pair = np.linalg.solve(parts.T @ parts + prior, parts.T @ centred + prior.sum(axis=1))
    pair = np.maximum(pair, 0.0)
    total = parts @ pair
    pair *= max(0.0, float(total @ centred) / max(float(total @ total), 1e-12))
    weights = np.full(count, pair[0] / len(others))
    weights[ASKED_COLUMN] = pair[1]
    return weights


def fit_router(
    outcomes: Outcomes,
    embed: Embed,
    *,
    weak: str,
    strong: str,
    seed: int = 0,
    progress: Progress | None = None,
) -> RouterModel:
    """Fit heads, and weigh them by predictions for rows that a head was not fitted on.

    Raises InputError for too few labels or equal outcomes.
    """
    count = len(outcomes.prompts)
    if count < LEAST_LABELS:
        raise InputError("--train", count, f"at least {LEAST_LABELS} prompts with both outcomes")
    if outcomes.gain.std() < 1e-9:
        raise InputError("--train", "equal outcomes", "prompts on which the models differ")
    fitter = _Fitter(outcomes, embed(outcomes.prompts))
    folds = np.random.default_rng(seed).permutation(np.arange(count) % FOLDS)
    held: npt.NDArray[Any] | None = None
    similarity = np.zeros(count)
    for fold in range(FOLDS):
        if progress is not None:
            progress(f"fitting heads {fold + 1}/{FOLDS + 1}")
        rest, own = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        columns, similarity[own] = fitter.columns(fitter.fit(rest), rest, own)
        if held is None:
            held = np.zeros((count, columns.shape[1]))
        held[own] = columns
    assert held is not None
    mean, scale = held.mean(axis=0), held.std(axis=0) + 1e-9
    every = np.arange(count)
    if progress is not None:
        progress(f"fitting heads {FOLDS + 1}/{FOLDS + 1}")
    heads = fitter.fit(every)
    return RouterModel(
        weak=weak,
        strong=strong,
        mean_gain=float(outcomes.gain.mean()),
        text=heads.text,
        text_intercepts=heads.intercepts,
        middle=heads.middle,
        components=heads.components,
        dense_mean=heads.mean,
        dense_scale=heads.scale,
        linear=heads.linear,
        trees=tuple(tree_arrays(one) for one in heads.trees),
        seen=fitter.vectors.astype(np.float32),
        seen_gain=outcomes.gain,
        neighbours=NEIGHBOURS,
        stack=weigh_heads(held, outcomes.gain) * scale,
        stack_mean=mean,
        stack_scale=scale,
        least_similarity=float(np.quantile(similarity, UNKNOWN_SHARE)),
        labels=count,
    )


def sample(outcomes: Outcomes, count: int, seed: int) -> Outcomes:
    """Some of the prompts, drawn at random."""
    every = len(outcomes.prompts)
    return outcomes.part(
        np.array(sorted(random.Random(seed).sample(range(every), min(count, every))))
    )


def tree_arrays(booster: Any) -> Trees:
    """A fitted booster as arrays, from its public dump."""
    dumped = booster.dump_model()["tree_info"]
    tables = [_nodes(tree["tree_structure"]) for tree in dumped]
    width = max(len(table) for table in tables)
    shape_ = (len(tables), width)
    feature = np.full(shape_, -1, np.int64)
    left, right = np.zeros(shape_, np.int64), np.zeros(shape_, np.int64)
    threshold, value = np.zeros(shape_), np.zeros(shape_)
    for row, table in enumerate(tables):
        for place, node in enumerate(table):
            feature[row, place], threshold[row, place] = node[0], node[1]
            left[row, place], right[row, place], value[row, place] = node[2], node[3], node[4]
    return Trees(feature, threshold, left, right, value)


def _nodes(root: Mapping[str, Any]) -> list[tuple[int, float, int, int, float]]:
    table: list[tuple[int, float, int, int, float]] = []

    def add(node: Mapping[str, Any]) -> int:
        place = len(table)
        table.append((-1, 0.0, 0, 0, float(node.get("leaf_value", 0.0))))
        if "split_feature" in node:
            left, right = add(node["left_child"]), add(node["right_child"])
            table[place] = (node["split_feature"], float(node["threshold"]), left, right, 0.0)
        return place

    add(root)
    return table


def predicted(model: RouterModel, test: Outcomes, embed: Embed) -> tuple[Array, float]:
    """(predicted gains, share of prompts that are known)."""
    found = [
        model.predict(prompt, vector)
        for prompt, vector in zip(test.prompts, embed(test.prompts), strict=True)
    ]
    return np.array([one.gain for one in found]), float(np.mean([one.known for one in found]))


def evaluate_routing(
    model: RouterModel, test: Outcomes, embed: Embed, *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Scores on prompts not learned from, with bootstrap intervals over the prompts."""
    gains, known = predicted(model, test, embed)
    score = score_routing(gains, test.weak, test.strong)
    low, high = bootstrap_apgr([gains], test, draws=draws, seed=seed)
    steps = np.linspace(0, len(gains), 51).astype(int)
    return {
        "apgr": round(score.apgr, 4),
        "cpt50": round(score.cpt50, 4),
        "cpt80": round(score.cpt80, 4),
        "n": len(gains),
        "apgr_95": [low, high],
        "known": round(known, 4),
        "weak": round(float(test.weak.mean()), 4),
        "strong": round(float(test.strong.mean()), 4),
        "labels": model.labels,
        "curve": [
            [round(float(score.shares[i]), 4), round(float(score.recovered[i]), 4)] for i in steps
        ],
    }


def over_floor(
    model: RouterModel,
    learned: Outcomes,
    test: Outcomes,
    embed: Embed,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Against a ridge on TF-IDF terms with the same labels: the paired difference of APGR."""
    text = _Text([*learned.prompts, *test.prompts])
    rows = np.arange(len(learned.prompts))
    weights, mean = text.fit(rows, learned.gain[:, None])
    own = np.arange(len(learned.prompts), len(text.counted))
    plain = (text.matrix(own, weights.places, weights.idf) @ weights.weights + mean)[:, 0]
    gains, _ = predicted(model, test, embed)
    floor = score_routing(plain, test.weak, test.strong).apgr
    apgr = score_routing(gains, test.weak, test.strong).apgr
    low, high = bootstrap_apgr([gains, plain], test, draws=draws, seed=seed)
    return {
        "apgr": round(floor, 4),
        "difference": round(apgr - floor, 4),
        "difference_95": [low, high],
    }


def few_labels(
    learned: Outcomes,
    test: Outcomes,
    embed: Embed,
    *,
    weak: str,
    strong: str,
    count: int = 200,
    draws: int = 5,
) -> dict[str, Any]:
    """What routers learned from `count` labels reach: over draws of which labels."""
    found = []
    for seed in range(draws):
        part = sample(learned, count, seed)
        model = fit_router(part, embed, weak=weak, strong=strong, seed=seed)
        gains, _ = predicted(model, test, embed)
        found.append(score_routing(gains, test.weak, test.strong).apgr)
    return {
        "labels": min(count, len(learned.prompts)),
        "apgr": round(float(np.mean(found)), 4),
        "apgr_of_draws": [round(one, 4) for one in found],
    }


def unlabelled(
    other: Outcomes, test: Outcomes, embed: Embed, *, weak: str, strong: str, seed: int = 0
) -> dict[str, Any]:
    """A router learned from other kinds of prompts alone: it should know that it does not know."""
    model = fit_router(other, embed, weak=weak, strong=strong, seed=seed)
    gains, known = predicted(model, test, embed)
    score = score_routing(gains, test.weak, test.strong)
    low, high = bootstrap_apgr([gains], test, draws=1000, seed=seed)
    return {"apgr": round(score.apgr, 4), "apgr_95": [low, high], "known": round(known, 4)}


def bootstrap_apgr(
    gains: Sequence[Array], test: Outcomes, *, draws: int, seed: int
) -> tuple[float, float]:
    """The central 95 % of APGR over prompts drawn with replacement; of two, of the difference."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        rows = rng.integers(0, len(test.weak), len(test.weak))
        weak, strong = test.weak[rows], test.strong[rows]
        if strong.mean() > weak.mean():
            scores = [score_routing(one[rows], weak, strong).apgr for one in gains]
            found.append(scores[0] - (scores[1] if scores[1:] else 0.0))
    low, high = np.quantile(found, [0.025, 0.975])
    return round(float(low), 4), round(float(high), 4)
