"""Delegated PUT: a low-cost model writes the keys of a document's pieces (section 4.3.5).

One call a piece asks for questions it answers, keywords, a summary and facts. What the model does
not give, or when there is none, comes by rule. A generator of effects, as pipelines are.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Final

from intentd.core.errors import InputError
from intentd.core.prompts.cache.chunking import (
    CHUNK_CHARS,
    MAX_FACTS,
    Chunk,
    chunks_of,
    document_kind,
    rule_facts,
    rule_keywords,
    rule_questions,
    rule_summary,
)
from intentd.core.prompts.effects import CallModel, Effect, Outcome, Purpose, Reply, Together

KEY_TOKENS: Final = 400
AT_ONCE: Final = 4
MAX_QUESTIONS: Final = 3
MAX_KEY_CHARS: Final = 600
GIVE_UP: Final = 2
KEYS_PROMPT: Final = (
    "You index a text so that it is found by what people ask. Write exactly these four parts, each "
    "line short:\nQUESTIONS:\n- a question the text answers (three of them)\nKEYWORDS: words, "
    "separated by commas\nSUMMARY: one sentence\nFACTS:\n- a fact the text states (at most five)\n"
    "Use only what the text says."
)
_PART: Final = re.compile(
    r"^\W*(QUESTIONS?|KEY ?WORDS?|SUMMARY|FACTS?)\W*?:\**[ \t]*", re.IGNORECASE | re.MULTILINE
)
_BULLET: Final = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s*")


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk and its typed keys."""

    chunk: Chunk
    keys: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Delegated:
    """kind: the document's. by_model: pieces whose keys a model wrote; failure: why not all."""

    kind: str
    pieces: tuple[Piece, ...]
    by_model: int = 0
    failure: str = ""


def delegate(
    text: str, *, kind: str = "", name: str = "", model: str = "", max_chunks: int = 500
) -> Generator[Effect, Outcome, Delegated]:
    """kind: "" to be found out. name: of the document, such as its file name. model: "" for keys
    by rule. Raises InputError for an empty document and for more than max_chunks pieces.
    """
    if len(text) > max_chunks * CHUNK_CHARS:
        most = max_chunks * CHUNK_CHARS
        raise InputError("object.document", f"{len(text)} characters", f"at most {most}")
    kind = kind or document_kind(text, name)
    chunks = chunks_of(text, kind, most_chars=CHUNK_CHARS)
    if not chunks:
        raise InputError("object.document", "", "a text")
    if len(chunks) > max_chunks:
        raise InputError("object.document", f"{len(chunks)} pieces", f"at most {max_chunks}")
    written: list[dict[str, list[str]]] = []
    failures, failure = 0, ""
    for first in range(0, len(chunks), AT_ONCE):
        part = chunks[first : first + AT_ONCE]
        if not model or failures >= GIVE_UP:
            written += [{} for _ in part]
            continue
        outcomes = yield Together(tuple(_call(model, chunk) for chunk in part))
        assert isinstance(outcomes, tuple)
        for outcome in outcomes:
            if isinstance(outcome, Reply):
                written.append(parse_keys(outcome.text))
            else:
                written.append({})
                failure = getattr(outcome, "reason", "no answer")
        failures = failures + 1 if not any(written[first:]) else 0
    pieces = tuple(
        Piece(chunk, _keys(chunk, found, name if place == 0 else ""))
        for place, (chunk, found) in enumerate(zip(chunks, written, strict=True))
    )
    return Delegated(kind, pieces, sum(bool(found) for found in written), failure)


def _call(model: str, chunk: Chunk) -> CallModel:
    return CallModel(
        model,
        (
            {"role": "system", "content": KEYS_PROMPT},
            {"role": "user", "content": chunk.whole()},
        ),
        Purpose.KEYS,
        {"temperature": 0},
        KEY_TOKENS,
    )


def parse_keys(text: str) -> dict[str, list[str]]:
    """What a model wrote, by part; parts that are missing or empty are left out."""
    marks = list(_PART.finditer(text))
    found: dict[str, list[str]] = {}
    for place, mark in enumerate(marks):
        end = marks[place + 1].start() if place + 1 < len(marks) else len(text)
        lines = [_BULLET.sub("", line).strip() for line in text[mark.end() : end].splitlines()]
        lines = [line[:MAX_KEY_CHARS] for line in lines if len(line) >= 3]
        word = mark[1].upper()
        if not lines:
            continue
        if word.startswith("Q"):
            found["question"] = lines[:MAX_QUESTIONS]
        elif word.startswith("K"):
            found["keywords"] = [", ".join(lines)[:MAX_KEY_CHARS]]
        elif word.startswith("S"):
            found["summary"] = [" ".join(lines)[:MAX_KEY_CHARS]]
        else:
            found["facts"] = lines[:MAX_FACTS]
    return found


def _keys(chunk: Chunk, found: dict[str, list[str]], document: str) -> tuple[tuple[str, str], ...]:
    by_rule: dict[str, Sequence[str]] = {
        "question": rule_questions(chunk),
        "keywords": [rule_keywords(chunk.whole())],
        "summary": [rule_summary(chunk)],
        "facts": rule_facts(chunk.text),
    }
    keys = [("prompt", chunk.question)] if chunk.question else []
    keys.append(("chunk", chunk.whole()))
    keys += [("document", document)] if document else []
    for kind, texts in by_rule.items():
        keys += [(kind, text) for text in (found.get(kind) or texts) if text]
    return tuple(dict.fromkeys(keys))
