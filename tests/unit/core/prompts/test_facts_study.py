"""Facts stored and asked for: the right chunk, foreign questions, and what cannot be measured."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from intentd.controller.search import prompts_facts as study
from intentd.core.errors import InputError


def embed(texts: Sequence[str]) -> Any:
    table = np.full((len(texts), 256), 1e-3, np.float32)
    for row, text in enumerate(texts):
        for word in text.lower().replace("?", "").replace(".", "").split():
            table[row, zlib.crc32(word.encode()) % 256] += 1.0
    return table / np.linalg.norm(table, axis=1, keepdims=True)


PASSAGES = [
    {"passage_id": "a", "title": "Ada", "text": "Ada Lovelace was born in 1815. She wrote notes."},
    {"passage_id": "b", "title": "Alan", "text": "Alan Turing was born in 1912. He broke ciphers."},
]
OWN = [
    {"question": "When was Ada Lovelace born?", "answers": ["1815"], "passage_id": "a"},
    {"question": "When was Alan Turing born?", "answers": ["1912"], "passage_id": "b"},
]
FOREIGN = [{"question": "who sings yellow submarine", "answers": ["The Beatles"]}] * 3


def test_questions_find_their_passage_and_foreign_ones_are_refused() -> None:
    store = study.store_of(PASSAGES, embed)
    asked = study.ask(store, [*OWN, *FOREIGN], embed)
    chosen = study.choose(store, asked, 0.0)
    found = study.report(store, asked, chosen)
    assert (found["top1"], found["answered_from_right_chunk"]) == (1.0, 1.0)
    assert (found["foreign_answered"], found["questions"], found["foreign_questions"]) == (0, 2, 3)
    assert found["foreign_answered_95"] > 0


def test_what_there_are_no_data_for_is_left_out() -> None:
    store = study.store_of(PASSAGES, embed)
    only_own = study.ask(store, OWN, embed)
    assert study.choose(store, only_own, 0.05).threshold is None
    found = study.report(store, only_own, study.Chosen(0.5, None))
    assert found["threshold"] is None
    assert "answered" not in found
    only_foreign = study.ask(store, FOREIGN, embed)
    assert "top1" not in study.report(store, only_foreign, study.choose(store, only_foreign, 0.05))
    with pytest.raises(InputError, match="--docs"):
        study.store_of([{"text": ""}], embed)


def test_chunks_are_whole_sentences() -> None:
    text = " ".join(f"This is sentence number {n} of a longer text." for n in range(40))
    chunks = study.chunks_of(text)
    assert " ".join(chunks) == text
    assert all(chunk.endswith(".") and len(chunk) <= study.CHUNK_CHARS for chunk in chunks)


def test_tasks_are_answerable_where_their_passages_speak_of_it() -> None:
    def task(question: str, kind: str, passages: list[dict[str, Any]]) -> dict[str, Any]:
        turn = {"role": "user", "text": question}
        return {"conversation": [turn], "passages": passages, "answerability": [kind]}

    tasks = [
        task("When was Ada Lovelace born?", "ANSWERABLE", PASSAGES[:1]),
        task("Who broke ciphers?", "ANSWERABLE", PASSAGES[1:]),
        task("who sings yellow submarine", "UNANSWERABLE", PASSAGES),
        task("and why", "UNANSWERABLE", []),
        task("what", "PARTIAL", PASSAGES),
    ]
    scored = study.task_scores(tasks, embed, 0.5)
    found = study.report_tasks(scored, scored)
    assert (found["n"], found["auc"], found["balanced_accuracy"]) == (3, 1.0, 1.0)
    none = study.task_scores([], embed, 0.5)
    assert "left_out" in study.report_tasks(scored, none)
