"""Fit the cache's second gate, choose its one threshold, and score it with half stored."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intentd.controller.search.prompts_data import Embed
from intentd.controller.search.prompts_edits import OTHER_EDITS, TRAINED_EDITS, Edit, reword
from intentd.controller.search.prompts_routing import Progress, tree_arrays
from intentd.core.errors import InputError
from intentd.core.prompts.cache.gate import FEATURES, GateModel, content_stems, features
from intentd.core.prompts.router import Array

NEAREST: Final = 4
FOLDS: Final = 3
# fewer rows a label than this: whole labels are held out, as a new question would be
FEW_OF_A_LABEL: Final = 15
REPEATED: Final = 0.7
EDITS_OF_EACH: Final = 600
EDITED_MOST: Final = 0.02
OPTIONS: Final[Mapping[str, Any]] = {
    "objective": "binary",
    "num_leaves": 15,
    "learning_rate": 0.05,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "min_data_in_leaf": 30,
    "lambda_l2": 5.0,
    "num_threads": 1,
    "deterministic": True,
    "seed": 0,
    "verbose": -1,
}
ROUNDS: Final = 200
SET_WEIGHT: Final = 4000.0
EDIT_WEIGHT: Final = 2000.0
BALANCED_AT: Final = 0.03
BALANCING_ROUNDS: Final = 4
MOST_PENALTY: Final = 24.0
# below so many queries a threshold at 3 % is a matter of a few texts
ENOUGH_HELD: Final = 500
MANY_HELD: Final = 1000
SMALL_SET_PENALTY: Final = 1.5


@dataclass(frozen=True, slots=True)
class Stream:
    """Stored texts and queries of one data set. A query's label "" is nobody's equal."""

    name: str
    stored: list[str]
    stored_labels: list[str]
    queries: list[str]
    query_labels: list[str]


def stream_of(name: str, rows: Sequence[Mapping[str, Any]], seed: int) -> Stream:
    """Half of the items stored at random.

    Labelled texts: the other half asks. Pairs (a, b): all b of the positive pairs ask, so that
    half of them find their a in the store. Out-of-scope texts equal nothing, not even each other.
    """
    rng = random.Random(seed)
    if rows and "text" in rows[0]:
        items = [(str(r["text"]), "" if r["label"] == "oos" else str(r["label"])) for r in rows]
        rng.shuffle(items)
        half = len(items) // 2
        stored, asked = items[:half], items[half:]
    else:
        pairs = [(str(r["a"]), str(r["b"])) for r in rows if r.get("label") == 1]
        firsts = sorted({first for first, _ in pairs})
        labels = _same_statements(firsts)
        rng.shuffle(firsts)
        stored = [(first, labels[first]) for first in firsts[: len(firsts) // 2]]
        asked = [(second, labels[first]) for first, second in pairs]
    if not stored or not asked:
        raise InputError(name, len(rows), "rows with text and label, or pairs a, b with label 1")
    return Stream(
        name,
        [text for text, _ in stored],
        [label for _, label in stored],
        [text for text, _ in asked],
        [label for _, label in asked],
    )


def _same_statements(texts: Sequence[str]) -> dict[str, str]:
    """Label by text; texts that say the same in nearly the same words share one.

    Collections of paraphrases hold repeats ("X is used to specify Y", "X specifies Y"): serving
    one for the other is right. Judged by words alone, not by what the gate uses to decide.
    """
    stems = [frozenset(content_stems(text)) for text in texts]
    labels: dict[str, str] = {}
    for place, text in enumerate(texts):
        same = next(
            (
                texts[other]
                for other in range(place)
                if len(stems[place] & stems[other])
                >= REPEATED * len(stems[place] | stems[other])
                > 0
            ),
            None,
        )
        labels[text] = labels[same] if same is not None else text
    return labels


@dataclass(frozen=True, slots=True)
class Candidates:
    """The nearest stored texts of each query: features (queries, nearest, FEATURES), and right."""

    features: Array
    right: npt.NDArray[np.bool_]


def candidates_of(stream: Stream, embed: Embed, idf: Mapping[str, float]) -> Candidates:
    stored, asked = embed(stream.stored), embed(stream.queries)
    count = min(NEAREST, len(stored))
    table = np.zeros((len(asked), count, len(FEATURES)))
    right = np.zeros((len(asked), count), bool)
    for first in range(0, len(asked), 512):
        similar = asked[first : first + 512] @ stored.T
        nearest = np.argsort(-similar, axis=1)[:, :count]
        for row, places in enumerate(nearest):
            query = first + row
            label = stream.query_labels[query]
            for rank, place in enumerate(places):
                table[query, rank] = features(
                    stream.queries[query], stream.stored[place], float(similar[row, place]), idf
                )
                right[query, rank] = bool(label) and stream.stored_labels[place] == label
    return Candidates(table, right)


def idf_of(texts: Sequence[str]) -> dict[str, float]:
    """Inverse document frequency by stem; a stem not seen counts as rare."""
    frequency: Counter[str] = Counter()
    for text in texts:
        frequency.update(set(content_stems(text)))
    total = len(texts)
    return {word: math.log((1 + total) / (1 + n)) for word, n in frequency.items() if n > 1}


def edited(
    texts: Sequence[str], edits: Mapping[str, Edit], seed: int, most: int = EDITS_OF_EACH
) -> list[tuple[str, str, str]]:
    """(kind, original, edited) for up to `most` texts of each kind that the edit applies to."""
    rng = random.Random(seed)
    order = list(dict.fromkeys(texts))
    made = []
    for kind, edit in edits.items():
        rng.shuffle(order)
        count = 0
        for text in order:
            other = edit(text, rng)
            if other is not None and other != text:
                made.append((kind, text, other))
                count += 1
                if count == most:
                    break
    return made


def reworded(texts: Sequence[str], seed: int, most: int) -> list[tuple[str, str, str]]:
    rng = random.Random(seed)
    order = list(dict.fromkeys(texts))
    rng.shuffle(order)
    return [("reworded", text, reword(text, rng)) for text in order[:most]]


def pair_features(
    pairs: Sequence[tuple[str, str, str]], embed: Embed, idf: Mapping[str, float]
) -> Array:
    first = embed([original for _, original, _ in pairs])
    second = embed([other for _, _, other in pairs])
    cosines = (first * second).sum(axis=1)
    return np.array(
        [
            features(other, original, float(cosine), idf)
            for (_, original, other), cosine in zip(pairs, cosines, strict=True)
        ]
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """What one gate is fitted on: candidates by data set, edits and rewordings."""

    sets: dict[str, Candidates]
    wrong: Array
    same: Array

    def fit(self, penalties: Mapping[str, float]) -> Any:
        """Trees over all of it. penalties: what a false hit of a set weighs."""
        import lightgbm

        tables, rights, weights = [], [], []
        for name, found in self.sets.items():
            right = found.right.reshape(-1)
            tables.append(found.features.reshape(-1, len(FEATURES)))
            rights.append(right.astype(float))
            even = SET_WEIGHT / len(right)
            weights.append(np.where(right, even, even * penalties[name]))
        for table, target in ((self.wrong, 0.0), (self.same, 1.0)):
            tables.append(table)
            rights.append(np.full(len(table), target))
            weights.append(np.full(len(table), EDIT_WEIGHT / max(1, len(table))))
        data = lightgbm.Dataset(
            np.concatenate(tables), np.concatenate(rights), weight=np.concatenate(weights)
        )
        return lightgbm.train(dict(OPTIONS), data, ROUNDS)


Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def _part_of(rows: Rows, embed: Embed, idf: Mapping[str, float], seed: int) -> _Part:
    streams = [stream_of(name, own, seed) for name, own in rows.items()]
    texts = [text for stream in streams for text in (*stream.stored, *stream.queries)]
    wrong = edited(texts, TRAINED_EDITS, seed)
    same = reworded(texts, seed, len(wrong))
    return _Part(
        {stream.name: candidates_of(stream, embed, idf) for stream in streams},
        pair_features(wrong, embed, idf),
        pair_features(same, embed, idf),
    )


def _folds_of(rows: Sequence[Mapping[str, Any]], seed: int) -> npt.NDArray[np.int64]:
    """A fold for each row: whole labels where they are small, rows where labels recur."""
    labels = [str(row.get("label")) if "text" in row else str(row.get("a")) for row in rows]
    if len(rows) >= FEW_OF_A_LABEL * len(set(labels)):
        return np.random.default_rng(seed).permutation(np.arange(len(rows)) % FOLDS)
    names = sorted(set(labels))
    random.Random(seed).shuffle(names)
    fold = {name: place % FOLDS for place, name in enumerate(names)}
    return np.array([fold[label] for label in labels])


def _idf(rows: Rows) -> dict[str, float]:
    texts = []
    for own in rows.values():
        for row in own:
            texts += [str(row["text"])] if "text" in row else [str(row["a"]), str(row["b"])]
    return idf_of(texts)


def fit_gate(
    train: Rows,
    embed: Embed,
    *,
    max_false_hit: float = 0.03,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[GateModel, dict[str, Any]]:
    """One gate for all data sets, and its one threshold.

    Fitted on neighbours with equal and other labels, edits, rewordings. The threshold, and how
    much a false hit of each set weighs so that one threshold fits them all (sets differ in how
    near their labels lie), come from queries and stores the folds' gates have not seen; these are
    reported with the model.
    """

    def say(text: str) -> None:
        if progress is not None:
            progress(text)

    folds = {name: _folds_of(rows, seed) for name, rows in train.items()}
    parts: list[tuple[_Part, dict[str, float], Rows]] = []
    for fold in range(FOLDS):
        say(f"neighbours {fold + 1}/{FOLDS + 1}")
        rest, own = (
            {
                name: [
                    row
                    for row, at in zip(rows, folds[name], strict=True)
                    if bool(at == fold) is held
                ]
                for name, rows in train.items()
            }
            for held in (False, True)
        )
        idf = _idf(rest)
        parts.append((_part_of(rest, embed, idf, seed), idf, own))
    candidates = [prepare(own, embed, idf, seed) for _, idf, own in parts]
    sizes = {name: sum(len(c.sets[name].right) for c in candidates) for name in train}
    penalties = {
        name: 1.0 if size >= ENOUGH_HELD else SMALL_SET_PENALTY for name, size in sizes.items()
    }
    large = [name for name, size in sizes.items() if size >= ENOUGH_HELD]
    rounds = BALANCING_ROUNDS if len(large) > 1 else 1
    for turn in range(rounds):
        say(f"fitting folds {turn + 1}/{rounds}")
        held = [
            scored(GateModel(tree_arrays(part.fit(penalties)), idf, 0.5), ready)
            for (part, idf, _), ready in zip(parts, candidates, strict=True)
        ]
        measured = merged(held)
        if turn + 1 < rounds:
            penalties = _balanced(penalties, large, measured)
    threshold = choose_threshold(measured, max_false_hit)
    say("fitting all")
    idf = _idf(train)
    booster = _part_of(train, embed, idf, seed).fit(penalties)
    weights = {name: round(weight, 2) for name, weight in penalties.items()}
    chosen = {"folds": FOLDS, "false_hits_weigh": weights, **report(measured, threshold)}
    return GateModel(tree_arrays(booster), idf, threshold), chosen


def _balanced(
    penalties: Mapping[str, float], large: Sequence[str], measured: Measured
) -> dict[str, float]:
    """Weigh false hits more where a set's own threshold for BALANCED_AT is higher than others'."""
    wanted = {}
    for name in large:
        best, right = measured.best[name]
        wrong = np.sort(best[~right])[::-1]
        place = min(int(BALANCED_AT * len(best)), len(wrong) - 1)
        chance = float(wrong[place]) if len(wrong) else float(best.min())
        wanted[name] = math.log(max(chance, 1e-6) / max(1.0 - chance, 1e-6))
    least = min(wanted.values())
    found = dict(penalties)
    for name, value in wanted.items():
        found[name] = min(MOST_PENALTY, max(1.0, found[name] * math.exp(value - least)))
    lightest = min(found[name] for name in large)
    return {name: value / lightest if name in large else value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Measured:
    """Each query's best chance and whether that stored text is right; the two kinds of pairs."""

    best: dict[str, tuple[Array, npt.NDArray[np.bool_]]]
    edits: dict[str, Array]
    other_edits: dict[str, Array]
    rewordings: Array


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything of some rows that does not depend on a gate's trees, only on its idf."""

    sets: dict[str, Candidates]
    edits: dict[str, Array]
    other_edits: dict[str, Array]
    rewordings: Array


def prepare(test: Rows, embed: Embed, idf: Mapping[str, float], seed: int) -> Prepared:
    sets = {}
    texts: list[str] = []
    for name, rows in test.items():
        stream = stream_of(name, rows, seed)
        sets[name] = candidates_of(stream, embed, idf)
        texts += [*stream.stored, *stream.queries]

    def by_kind(edits: Mapping[str, Edit]) -> dict[str, Array]:
        pairs = edited(texts, edits, seed + 1)
        if not pairs:
            return {}
        table = pair_features(pairs, embed, idf)
        kinds = np.array([kind for kind, _, _ in pairs])
        return {kind: table[kinds == kind] for kind in edits if (kinds == kind).any()}

    same = reworded(texts, seed + 1, 1500)
    return Prepared(
        sets, by_kind(TRAINED_EDITS), by_kind(OTHER_EDITS), pair_features(same, embed, idf)
    )


def scored(model: GateModel, ready: Prepared) -> Measured:
    best = {}
    for name, found in ready.sets.items():
        scores = model.chances(found.features)
        top = scores.argmax(axis=1)
        every = np.arange(len(top))
        best[name] = (scores[every, top], found.right[every, top])
    return Measured(
        best,
        {kind: model.chances(table) for kind, table in ready.edits.items()},
        {kind: model.chances(table) for kind, table in ready.other_edits.items()},
        model.chances(ready.rewordings),
    )


def measure(model: GateModel, test: Rows, embed: Embed, seed: int) -> Measured:
    return scored(model, prepare(test, embed, model.idf, seed))


def merged(parts: Sequence[Measured]) -> Measured:
    """As if they had been measured at once."""

    def by_kind(tables: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        kinds = dict.fromkeys(kind for table in tables for kind in table)
        return {
            kind: np.concatenate([table[kind] for table in tables if kind in table])
            for kind in kinds
        }

    best = {
        name: (
            np.concatenate([part.best[name][0] for part in parts]),
            np.concatenate([part.best[name][1] for part in parts]),
        )
        for name in parts[0].best
    }
    return Measured(
        best,
        by_kind([part.edits for part in parts]),
        by_kind([part.other_edits for part in parts]),
        np.concatenate([part.rewordings for part in parts]),
    )


def upper_bound(wrong: int, count: int) -> float:
    """Upper 95 % bound (one-sided, Wilson) of a rate."""
    z = 1.6448536
    rate = wrong / count
    middle = rate + z * z / (2 * count)
    width = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return (middle + width) / (1 + z * z / count)


def choose_threshold(measured: Measured, max_false_hit: float) -> float:
    """The least threshold at which few edits pass and no data set has more false hits.

    Of sets with MANY_HELD queries the upper 95 % bound is held to the rate, since what is counted
    here comes out higher elsewhere as often as lower; of smaller ones the rate itself, or a handful
    of texts would decide for all.
    """
    grid = np.unique(np.concatenate([scores for scores, _ in measured.best.values()]))
    edits = np.concatenate(list(measured.edits.values())) if measured.edits else np.zeros(1)
    for threshold in grid[np.linspace(0, len(grid) - 1, min(2000, len(grid))).astype(int)]:
        false = 0.0
        for scores, right in measured.best.values():
            wrong, count = int((scores[~right] >= threshold).sum()), len(scores)
            rate = upper_bound(wrong, count) if count >= MANY_HELD else wrong / count
            false = max(false, rate)
        if false <= max_false_hit and float((edits >= threshold).mean()) <= EDITED_MOST:
            return float(threshold)
    return 1.0


def report(measured: Measured, threshold: float) -> dict[str, Any]:
    """Rates at one threshold: by data set, pooled, by kind of edit."""
    sets: dict[str, Any] = {}
    total = hits = wrong = 0
    for name, (scores, right) in measured.best.items():
        served = scores >= threshold
        false = int((served & ~right).sum())
        sets[name] = {
            "n": len(scores),
            "hit_rate": round(float(served.mean()), 4),
            "right_hit_rate": round(float((served & right).mean()), 4),
            "false_hit_rate": round(false / len(scores), 4),
            "false_hit_rate_95": round(upper_bound(false, len(scores)), 4),
        }
        total, hits, wrong = total + len(scores), hits + int(served.sum()), wrong + false
    edits = {
        kind: round(float((scores >= threshold).mean()), 4)
        for kind, scores in measured.edits.items()
    }
    every = np.concatenate(list(measured.edits.values())) if measured.edits else np.zeros(0)
    return {
        "hit_rate": round(hits / total, 4),
        "false_hit_rate": round(wrong / total, 4),
        "threshold": round(threshold, 6),
        "false_hit_rate_95": round(upper_bound(wrong, total), 4),
        "n": total,
        "sets": sets,
        "edited_answered": round(float((every >= threshold).mean()), 4) if len(every) else None,
        "edited_by_kind": edits,
        "edited_kinds_not_trained_on": {
            kind: round(float((scores >= threshold).mean()), 4)
            for kind, scores in measured.other_edits.items()
        },
        "reworded_recognised": round(float((measured.rewordings >= threshold).mean()), 4),
    }
