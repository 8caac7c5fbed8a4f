"""The learned router: what the dear model is expected to gain over the cheap one on a prompt.

Inference alone, on arrays that `controller.search.prompts_routing` fitted: five heads (linear over
TF-IDF terms, linear and boosted trees over an embedding's main components and the prompt's shape,
linear over what is asked at its end, neighbours) foretell the gain; a weighted sum makes one gain
of them. A prompt unlike all that was learned from gets the mean gain and is told as not known:
routers do not carry over between kinds of prompts (measured: worse than a coin).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intentd.core.errors import InputError
from intentd.core.prompts.effects import Prediction
from intentd.core.prompts.shape import MAX_CHARS, shape

Array = npt.NDArray[np.float64]
Embedder = Callable[[Sequence[str]], npt.NDArray[Any]]

_TERM: Final = re.compile(r"\w\w+")


def terms(prompt: str) -> Counter[str]:
    """Words and pairs of words, lower case."""
    words = _TERM.findall(prompt[:MAX_CHARS].lower())
    counted = Counter(words)
    counted.update(f"{a} {b}" for a, b in itertools.pairwise(words))
    return counted


@dataclass(frozen=True, slots=True)
class TermWeights:
    """TF-IDF terms and each head's weight for them. weights: (terms, heads)."""

    places: Mapping[str, int]
    idf: Array
    weights: Array

    def row(self, prompt: str) -> tuple[list[int], Array]:
        """Columns and values of length 1 (sublinear counts)."""
        found = [
            (place, 1.0 + math.log(count))
            for term, count in terms(prompt).items()
            if (place := self.places.get(term)) is not None
        ]
        columns = [place for place, _ in found]
        values = np.array([value for _, value in found]) * self.idf[columns]
        length = float(np.sqrt((values**2).sum()))
        return columns, values / length if length else values

    def heads(self, prompt: str) -> Array:
        columns, values = self.row(prompt)
        found: Array = values @ self.weights[columns]
        return found


@dataclass(frozen=True, slots=True)
class Trees:
    """Boosted regression trees of one head as arrays (trees, nodes).

    feature -1 marks a leaf; a value <= threshold goes left.
    """

    feature: npt.NDArray[np.int64]
    threshold: Array
    left: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    value: Array

    def sum(self, features: Array) -> float:
        rows = np.arange(len(self.feature))
        node = np.zeros(len(rows), np.int64)
        while True:
            split = self.feature[rows, node]
            inner = split >= 0
            if not inner.any():
                return float(self.value[rows, node].sum())
            goes_left = features[np.maximum(split, 0)] <= self.threshold[rows, node]
            next_node = np.where(goes_left, self.left[rows, node], self.right[rows, node])
            node = np.where(inner, next_node, node)

    def sums(self, features: Array) -> Array:
        """`sum` of many rows at a time. features: (rows, features)."""
        total = np.zeros(len(features))
        every = np.arange(len(features))
        for tree in range(len(self.feature)):
            node = np.zeros(len(features), np.int64)
            while True:
                split = self.feature[tree, node]
                inner = split >= 0
                if not inner.any():
                    break
                left = features[every, np.maximum(split, 0)] <= self.threshold[tree, node]
                follow = np.where(left, self.left[tree, node], self.right[tree, node])
                node = np.where(inner, follow, node)
            total += self.value[tree, node]
        return total


@dataclass(frozen=True, slots=True)
class RouterModel:
    """Everything that was fitted for one pair of models.

    components: (dimensions, kept) main components of embeddings about `middle`. linear: weights of
    the standardized dense features, (features + 1, linear heads), the last row the intercept.
    stack: one weight a column of all heads, standardized by stack_mean and stack_scale. seen:
    embeddings of the prompts learned from, with their gains. least_similarity: below it a prompt is
    unknown.
    """

    weak: str
    strong: str
    mean_gain: float
    text: TermWeights
    text_intercepts: Array
    middle: Array
    components: Array
    dense_mean: Array
    dense_scale: Array
    linear: Array
    trees: tuple[Trees, ...]
    seen: npt.NDArray[np.float32]
    seen_gain: Array
    neighbours: int
    stack: Array
    stack_mean: Array
    stack_scale: Array
    least_similarity: float
    labels: int

    def renamed(self, names: Mapping[str, str]) -> RouterModel:
        """The same for a pool that calls the models by other names."""
        weak, strong = (names.get(name, name) for name in (self.weak, self.strong))
        return replace(self, weak=weak, strong=strong)

    def dense(self, prompt: str, vector: npt.NDArray[Any]) -> Array:
        parts = (np.asarray(vector, np.float64) - self.middle) @ self.components
        return np.concatenate([parts, shape(prompt)])

    def columns(self, prompt: str, vector: npt.NDArray[Any]) -> tuple[Array, float]:
        """(heads' values in the stack's order, similarity to what was learned from)."""
        dense = self.dense(prompt, vector)
        scaled = np.append((dense - self.dense_mean) / self.dense_scale, 1.0)
        similarities = self.seen @ np.asarray(vector, np.float32)
        near, similarity = near_gain(similarities, self.seen_gain, self.neighbours)
        parts = [
            self.text.heads(prompt) + self.text_intercepts,
            scaled @ self.linear,
            np.array([one.sum(dense) for one in self.trees]),
            np.array([near]),
        ]
        return np.concatenate(parts), similarity

    def predict(self, prompt: str, vector: npt.NDArray[Any]) -> Prediction:
        columns, similarity = self.columns(prompt, vector)
        if similarity < self.least_similarity:
            return Prediction(self.mean_gain, known=False)
        scaled = (columns - self.stack_mean) / self.stack_scale
        return Prediction(self.mean_gain + float(scaled @ self.stack), known=True)


SIMILAR_COUNT: Final = 10


def near_gain(similarities: npt.NDArray[Any], gains: Array, neighbours: int) -> tuple[float, float]:
    """(mean gain of the nearest prompts, weighted by nearness; mean similarity of the ten best)."""
    count = min(neighbours, len(gains))
    nearest = np.argpartition(-similarities, count - 1)[:count]
    best = similarities[nearest].astype(np.float64)
    weight = np.exp(10.0 * (best - best.max()))
    top = np.sort(best)[::-1][:SIMILAR_COUNT]
    return float((weight * gains[nearest]).sum() / weight.sum()), float(top.mean())


class LearnedRouter:
    """RouterModels by pair of models, with the embedder they were fitted on."""

    def __init__(self, models: Sequence[RouterModel], embed: Embedder) -> None:
        self._models = {(model.weak, model.strong): model for model in models}
        self._embed = embed

    def predict(self, prompt: str, weak: str, strong: str) -> Prediction:
        """The pair's prediction; an unknown pair is neutral: no gain, not known."""
        model = self._models.get((weak, strong))
        if model is None:
            return Prediction(0.0, known=False)
        return model.predict(prompt, self._embed([prompt])[0])


# -- scoring ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoutingScore:
    """How well an order of prompts recovers the gap between two models.

    shares and recovered: the curve, 0 to 1. cpt: least share of strong calls for a recovery.
    """

    apgr: float
    cpt50: float
    cpt80: float
    shares: Array
    recovered: Array


def score_routing(gains: Array, weak: Array, strong: Array) -> RoutingScore:
    """Send prompts to the strong model in order of predicted gain, most first.

    Equal predictions count as if in random order, so that a router that knows nothing scores
    exactly .5. Raises InputError when the strong model is not the better one.
    """
    gap = float(strong.mean() - weak.mean())
    if len(gains) == 0 or gap <= 0:
        raise InputError("test", gap, "prompts on which the strong model is better")
    order = np.argsort(-gains, kind="stable")
    ordered_gain = (strong - weak)[order]
    _, first, count = np.unique(-gains[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(ordered_gain, first)
    smooth = np.repeat(sums / count, count)
    recovered = np.concatenate([[0.0], np.cumsum(smooth)]) / len(gains) / gap
    shares = np.arange(len(gains) + 1) / len(gains)

    def least(part: float) -> float:
        return float(shares[int(np.argmax(recovered >= part - 1e-12))])

    apgr = float(np.trapezoid(recovered, shares))
    return RoutingScore(apgr, least(0.5), least(0.8), shares, recovered)
