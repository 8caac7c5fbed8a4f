"""Documents in pieces by their kind, and keys by rule and by a model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.core.prompts.pipeline_driver import Table

from intentd.core.errors import InputError
from intentd.core.prompts.cache.chunking import (
    KINDS,
    chunks_of,
    document_kind,
    rule_facts,
    rule_keywords,
    rule_questions,
    rule_summary,
)
from intentd.core.prompts.cache.delegate import Delegated, delegate, parse_keys
from intentd.core.prompts.cache.followups import parse_followups
from intentd.core.prompts.effects import CallFailed, CallModel, Reply, Together

FAQ = """Welcome.

**Q: How do I reset my password?**
A: Click on "Forgot password".

2. Can I change my plan?
Yes, at any time.
It takes effect next month.
"""
POLICY = """# Policy

Intro.

## Leave
Employees get 25 days.

TRAVEL
Economy class only.

Appendix
--------
Forms.
"""
CODE = """import os

def first(x):
    return x + 1


@cached
def second(y):
    z = y
    return z
"""


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        (FAQ, "", "faq"),
        (POLICY, "", "sections"),
        (CODE, "", "code"),
        ("x", "a.py", "code"),
        ("One sentence. Is this a question? It is not.", "", "prose"),
        ("", "", "prose"),
    ],
)
def test_the_kind_is_seen(text: str, name: str, kind: str) -> None:
    assert document_kind(text, name) == kind


def test_pieces_by_kind() -> None:
    faq = [(one.question, one.text) for one in chunks_of(FAQ, "faq")]
    assert faq == [
        ("", "Welcome."),
        ("How do I reset my password?", 'Click on "Forgot password".'),
        ("Can I change my plan?", "Yes, at any time.\nIt takes effect next month."),
    ]
    sections = [(one.title, one.text) for one in chunks_of(POLICY, "sections")]
    assert sections == [
        ("Policy", "Intro."),
        ("Leave", "Employees get 25 days."),
        ("TRAVEL", "Economy class only."),
        ("Appendix", "Forms."),
    ]
    code = [one.text for one in chunks_of(CODE, "code", most_chars=60)]
    assert code[1].startswith("@cached\ndef second"), "decorators stay with what they decorate"
    with pytest.raises(InputError, match="kind"):
        chunks_of("x", "poem")


MARKS = ("A", "cat.", "sat?", "#", "##", "Q:", "A:", "\n", "\n\n", "-", "1.", "def f(x):", "CAPS")
WORDS = st.lists(st.sampled_from(MARKS))


@given(
    st.one_of(WORDS.map(" ".join), st.text(max_size=300)),
    st.sampled_from(KINDS),
    st.sampled_from([8, 40, 1000]),
)
def test_no_word_is_lost_or_moved(text: str, kind: str, most_chars: int) -> None:
    chunks = chunks_of(text, kind, most_chars=most_chars)
    assert all(one.text.strip() for one in chunks)
    kept = "".join(f"{one.title}{one.question}{one.text}" for one in chunks)
    if kind in ("prose", "code"):
        assert "".join(kept.split()) == "".join(text.split())
        assert all(len(one.text) <= most_chars for one in chunks)
    else:
        # headings repeat above each of their pieces, and marks go
        letters = [c for c in text if c.isalnum() and c not in "QA12"]
        rest = iter(kept)
        assert all(any(c == other for other in rest) for c in letters)


def test_keys_by_rule() -> None:
    text = "The library in Oslo opens at 9. It has books. Books may be kept for 21 days."
    (chunk,) = chunks_of(f"## Opening\n{text}", "sections")
    assert rule_keywords(text).split(", ")[0] == "books"
    assert "Oslo" in rule_keywords(text)
    assert rule_summary(chunk) == "Opening: The library in Oslo opens at 9."
    assert rule_facts(text) == [
        "The library in Oslo opens at 9.", "Books may be kept for 21 days."
    ]  # fmt: skip
    assert rule_questions(chunk) == ["What about Opening?"]


def test_what_a_model_wrote_is_read_leniently() -> None:
    written = """Sure!
**Questions:**
1. When does it open?
- Where is it?
KEYWORDS: library, Oslo
Summary: A library.
FACTS:
* It opens at 9.
"""
    assert parse_keys(written) == {
        "question": ["When does it open?", "Where is it?"],
        "keywords": ["library, Oslo"],
        "summary": ["A library."],
        "facts": ["It opens at 9."],
    }
    assert parse_keys("I cannot do that.") == {}
    assert parse_followups("1. Why is it?\n- Who?\nNo question\n3) Why is it?", 3) == [
        "Why is it?", "Who?"
    ]  # fmt: skip


class Writer(Table):
    """Answers calls for keys; every `fails`-th one fails."""

    def __init__(self, fails: int) -> None:
        super().__init__()
        self.fails = fails
        self.asked = 0

    def perform(self, effect: Any) -> Any:
        if isinstance(effect, Together):
            return tuple(self.perform(one) for one in effect.effects)
        assert isinstance(effect, CallModel)
        self.asked += 1
        if self.asked % self.fails == 0:
            return CallFailed(effect.model, "down", 503)
        return Reply(effect.model, "QUESTIONS:\n- What is said?\n")


def delegated(text: str, table: Table, **fields: Any) -> Delegated:
    made: Delegated = table.drive(delegate(text, **fields))
    return made


def test_delegated_put_takes_from_the_model_what_it_gives_and_the_rest_by_rule() -> None:
    text = "\n\n".join(f"Part {n} tells of Oslo in {n}. " * 25 for n in range(1, 4))
    table = Writer(3)
    made = delegated(text, table, model="small", name="o.txt")
    assert (made.kind, len(made.pieces), made.by_model, made.failure) == ("prose", 3, 2, "down")
    first, third = dict(made.pieces[0].keys), dict(made.pieces[2].keys)
    assert (first["question"], first["document"]) == ("What is said?", "o.txt")
    assert first["keywords"], "by rule"
    assert "question" not in third
    assert third["summary"] == "Part 3 tells of Oslo in 3."


def test_a_model_that_is_down_is_not_asked_for_every_piece() -> None:
    text = "\n\n".join(f"Part {n}. " * 110 for n in range(40))
    table = Writer(1)
    made = delegated(text, table, model="small")
    assert (made.by_model, table.asked) == (0, 8)
    assert delegated(text, Writer(1)).failure == ""


@pytest.mark.parametrize("text", ["", " \n ", "x" * 1_000_000, "a\n\n" * 3000])
def test_a_document_that_cannot_be_put_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="document"):
        delegated(text, Writer(1), max_chunks=2)
