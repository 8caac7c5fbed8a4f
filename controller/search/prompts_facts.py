"""Facts in the cache: does a question find the passage that holds its answer, and does the store
know when it does not (dissertation, sections 4.3.5 and 4.5.3, figure 4.7).

Passages are put in as chunks; a question asks for the best by cosine and idf-weighted overlap. Only
retrieval is measured, and the decision whether to answer from what was found: what a model then
writes needs a model. Weight and threshold are chosen on the train rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from intentd.controller.search.prompts_cache import idf_of, upper_bound
from intentd.controller.search.prompts_data import Embed
from intentd.core.errors import InputError
from intentd.core.prompts.cache.gate import UNSEEN_IDF, content_stems
from intentd.core.prompts.router import Array

TOP: Final = 5
WEIGHTS: Final = (0.0, 0.25, 0.5, 1.0, 2.0)
CHUNK_CHARS: Final = 600
_SENTENCE: Final = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")


@dataclass(frozen=True, slots=True)
class Store:
    """Chunks of passages. owner: the passage of each chunk. stems: its content words."""

    texts: list[str]
    owner: list[str]
    vectors: npt.NDArray[Any]
    stems: list[frozenset[str]]
    idf: Mapping[str, float]


def chunks_of(text: str) -> list[str]:
    """Whole sentences, up to CHUNK_CHARS a chunk."""
    chunks: list[str] = []
    for sentence in _SENTENCE.split(text.strip()):
        if chunks and len(chunks[-1]) + len(sentence) < CHUNK_CHARS:
            chunks[-1] += " " + sentence
        else:
            chunks.append(sentence)
    return [chunk for chunk in chunks if chunk]


def store_of(rows: Sequence[Mapping[str, Any]], embed: Embed) -> Store:
    """rows: passages with ``text`` and perhaps ``passage_id`` and ``title``. Raises InputError."""
    texts, owner = [], []
    for number, row in enumerate(rows):
        title = str(row.get("title") or "").replace("_", " ")
        for chunk in chunks_of(str(row.get("text") or "")):
            texts.append(f"{title}: {chunk}" if title else chunk)
            owner.append(str(row.get("passage_id", number)))
    if not texts:
        raise InputError("--docs", len(rows), "rows with a text")
    stems = [frozenset(content_stems(text)) for text in texts]
    return Store(texts, owner, embed(texts), stems, idf_of(texts))


@dataclass(frozen=True, slots=True)
class Asked:
    """Questions and the parts of their scores: (questions, chunks). answers: () unanswerable."""

    cosine: Array
    overlap: Array
    answers: list[tuple[str, ...]]


def ask(store: Store, rows: Sequence[Mapping[str, Any]], embed: Embed) -> Asked:
    """rows: ``question`` and ``answers``; without a ``passage_id`` the store has no answer."""
    questions = [str(row["question"]) for row in rows]
    known = set(store.owner)
    answers = [
        tuple(map(str, row.get("answers") or ())) if str(row.get("passage_id")) in known else ()
        for row in rows
    ]
    cosine = np.asarray(embed(questions) @ store.vectors.T, np.float64)
    overlap = np.zeros_like(cosine)
    for number, question in enumerate(questions):
        own = set(content_stems(question))
        weights = {stem: store.idf.get(stem, UNSEEN_IDF) for stem in own}
        total = sum(weights.values()) or 1.0
        overlap[number] = [
            sum(weights[stem] for stem in own & stems) / total for stems in store.stems
        ]
    return Asked(cosine, overlap, answers)


def _holds(text: str, answers: Sequence[str]) -> bool:
    low = " ".join(text.lower().split())
    return any(" ".join(answer.lower().split()) in low for answer in answers)


def found_at(store: Store, asked: Asked, weight: float) -> tuple[Array, Array]:
    """(rank of the first chunk that holds the answer, inf if none or none could; best score)."""
    score = asked.cosine + weight * asked.overlap
    ranks = np.full(len(score), np.inf)
    for number, answers in enumerate(asked.answers):
        if answers:
            best = np.argsort(-score[number])[:TOP]
            hits = [rank for rank, at in enumerate(best) if _holds(store.texts[at], answers)]
            ranks[number] = hits[0] if hits else np.inf
    return ranks, score.max(axis=1)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Weight of overlap beside cosine; threshold of the score, None when nothing to choose on."""

    weight: float
    threshold: float | None


def choose(store: Store, asked: Asked, max_wrong: float) -> Chosen:
    """The weight that finds most at once; the least threshold that lets few foreign questions in.

    threshold None when the questions are all of one kind.
    """
    foreign = np.array([not answers for answers in asked.answers])
    if foreign.all():
        return Chosen(0.5, None)
    weight = max(WEIGHTS, key=lambda w: float((found_at(store, asked, w)[0][~foreign] == 0).mean()))
    if not foreign.any():
        return Chosen(weight, None)
    _, best = found_at(store, asked, weight)
    ordered = np.sort(best[foreign])[::-1]
    place = min(int(max_wrong * len(ordered)), len(ordered) - 1)
    return Chosen(weight, float(np.nextafter(ordered[place], np.inf)))


def report(store: Store, asked: Asked, chosen: Chosen) -> dict[str, Any]:
    """Retrieval, and at the threshold what was answered rightly, wrongly and not at all."""
    ranks, best = found_at(store, asked, chosen.weight)
    own = np.array([bool(answers) for answers in asked.answers])
    result: dict[str, Any] = {
        "passages": len(set(store.owner)),
        "chunks": len(store.texts),
        "questions": int(own.sum()),
        "foreign_questions": int((~own).sum()),
        "overlap_weight": chosen.weight,
        "threshold": None if chosen.threshold is None else round(chosen.threshold, 4),
    }
    if own.any():
        for top in (1, 3, 5):
            result[f"top{top}"] = round(float((ranks[own] < top).mean()), 4)
    if chosen.threshold is not None:
        served = best >= chosen.threshold
        if own.any():
            result["answered"] = round(float(served[own].mean()), 4)
            result["answered_from_right_chunk"] = round(
                float((served & (ranks == 0))[own].mean()), 4
            )
        if (~own).any():
            wrong = int(served[~own].sum())
            result["foreign_answered"] = round(wrong / int((~own).sum()), 4)
            result["foreign_answered_95"] = round(upper_bound(wrong, int((~own).sum())), 4)
    return result


# -- conversations with passages: answerable or not ------------------------------------------------


def task_scores(
    rows: Sequence[Mapping[str, Any]], embed: Embed, weight: float
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """(best score of a task's own passages for its last question, whether it is answerable).

    Tasks that are neither (partial, underspecified) are left out, and those without passages:
    that nothing was found is no decision of ours.
    """
    kinds = [row.get("answerability") for row in rows]
    kept = [
        (row, kind[0] if isinstance(kind, list) and kind else kind)
        for row, kind in zip(rows, kinds, strict=True)
    ]
    kept = [
        (row, kind)
        for row, kind in kept
        if kind in ("ANSWERABLE", "UNANSWERABLE") and row.get("passages")
    ]
    texts = [_task_texts(row) for row, _ in kept]
    # all at once: an embedder is slow to start
    embed([text for question, chunks in texts for text in (question, *chunks)] or [""])
    scores = []
    for question, chunks in texts:
        if not chunks:
            scores.append(0.0)
            continue
        store = store_of([{"text": chunk} for chunk in chunks], embed)
        asked = ask(store, [{"question": question, "passage_id": "none"}], embed)
        scores.append(float(found_at(store, asked, weight)[1][0]))
    return np.array(scores), np.array([kind == "ANSWERABLE" for _, kind in kept], bool)


def _task_texts(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The last question of a conversation, and the chunks of the passages it came with."""
    turns = [turn for turn in row.get("conversation", ()) if turn.get("role") == "user"]
    question = str(turns[-1].get("text", "")) if turns else ""
    return question, [
        c for p in row.get("passages", ()) for c in chunks_of(str(p.get("text") or ""))
    ]


def report_tasks(
    learned: tuple[Array, npt.NDArray[np.bool_]], tested: tuple[Array, npt.NDArray[np.bool_]]
) -> dict[str, Any]:
    """Answerable by score: threshold of the best balanced accuracy on what was learned from."""
    scores, labels = tested
    if not len(scores) or labels.all() or not labels.any():
        reason = "needs answerable and unanswerable tasks that have passages"
        return {"n": len(scores), "left_out": reason}
    order = np.concatenate([scores[labels][:, None] - scores[~labels][None, :]])
    result: dict[str, Any] = {
        "n": len(scores),
        "auc": round(float((order > 0).mean() + 0.5 * (order == 0).mean()), 4),
    }
    known, truth = learned
    if len(known) and truth.any() and not truth.all():
        candidates = np.unique(known)
        balanced = [
            ((known >= t)[truth].mean() + (known < t)[~truth].mean()) / 2 for t in candidates
        ]
        threshold = float(candidates[int(np.argmax(balanced))])
        right = ((scores >= threshold)[labels].mean() + (scores < threshold)[~labels].mean()) / 2
        result |= {"threshold": round(threshold, 4), "balanced_accuracy": round(float(right), 4)}
    return result
