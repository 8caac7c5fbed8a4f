"""A document in pieces that can answer on their own, by its kind, and keys for them by rule.

Policies want their sections, FAQs their question-answer pairs (section 4.5.1, "Supporting RAG-style
workflows"). Nothing of a document is lost: its words are in the pieces, in order. Rules write keys
where no model does: weaker ones, but free.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from intentd.core.errors import InputError

KINDS: Final = ("prose", "faq", "sections", "code")
CHUNK_CHARS: Final = 1200
LEAST_QUESTION: Final = 4
SUMMARY_CHARS: Final = 240
MAX_KEYWORDS: Final = 8
MAX_FACTS: Final = 5
# longer lines are no headings, questions or definitions
LINE_CHARS: Final = 400
_CODE_ENDINGS = (
    ".py .c .h .cc .cpp .hpp .rs .go .java .js .ts .jsx .tsx .rb .php .sh .sql .kt .swift .cs "
    ".scala .lua .pl .r .m .zig"
)
_CODE_NAMES: Final = tuple(_CODE_ENDINGS.split())
_HEADING: Final = re.compile(
    r"""^(?: \#{1,6}\s+(?P<marked>\S.*?)\s*\#*
      | (?P<numbered>(?:\d+\.)+\d*\s+[A-Z][^.?!]{2,70} | \d+(?:\.\d+)*\s+[A-Z][^.?!]{2,70}
        | (?:Section|Chapter|Article|Part|Appendix|Clause)\s+[\dIVXA-Z]+\b.{0,70})
      | (?P<loud>[A-Z][A-Z0-9 ,&/()'-]{3,70})
    )\s*$""",
    re.VERBOSE,
)
_UNDERLINE: Final = re.compile(r"^(?:={3,}|-{3,})\s*$")
_MARK: Final = re.compile(r"(?:Q|Question|FAQ)\s*\d*\s*[:.)-]\s*|\d{1,3}[.)]\s+", re.IGNORECASE)
_ASKING_MARK: Final = re.compile(r"(?:Q|Question)\s*\d*\s*[:.)-]", re.IGNORECASE)
_ANSWERED: Final = re.compile(
    r"^\s*(?:\*\*)?(?:A|Answer)\s*\d*\s*[:.)-](?:\*\*)?\s*", re.IGNORECASE
)
_DEFINES: Final = re.compile(
    r"^(?:@|(?:export\s+|public\s+|private\s+|static\s+|async\s+|pub(?:\(\w+\))?\s+|default\s+)*"
    r"(?:def|class|function|func|fn|struct|enum|trait|impl|interface|type|module|namespace|const|let"
    r"|var|CREATE|create)\b|[A-Za-z_][\w\s*<>,:&]*\([^;]*\)\s*\{?\s*$)"
)
_CODE_LINE: Final = re.compile(
    r"[;{}]\s*$|^\s*(?:#include|import\s|from\s+\S+\s+import|def\s|class\s.*:|return\b|if\s*\(|for\s*\("
    r"|\w[\w.]*\s*(?:=|\+=)\s*\S|//|/\*)"
)
_SENTENCE: Final = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
_WORD: Final = re.compile(r"[^\W\d_][\w'-]{2,}")
_STOP_WORDS = (
    "the and for that this with from are was were has have had not but you your they them their "
    "its his her she him who whom which what when where why how will would can could should may "
    "might must shall into onto over under than then there here also been being does did done "
    "such each any all more most other some only own same very just about after before between "
    "during both few out off our ours one two use used using these those because while until "
    "upon per via "
)
_STOP: Final = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece. title: the headings it stands under. question: what it answers, of a FAQ."""

    text: str
    title: str = ""
    question: str = ""

    def whole(self) -> str:
        """With what says where it belongs."""
        return "\n".join(part for part in (self.title, self.question, self.text) if part)


def document_kind(text: str, name: str = "") -> str:
    """prose, faq, sections or code, by the name's ending and what its lines look like."""
    if name.lower().endswith(_CODE_NAMES):
        return "code"
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "prose"
    coded = sum(bool(_CODE_LINE.search(line[:LINE_CHARS])) for line in lines)
    if len(lines) >= 4 and coded > 0.5 * len(lines):
        return "code"
    pairs = [pair for pair in _pairs(text) if pair.question]
    if len(pairs) >= 2 and sum(len(p.question) + len(p.text) for p in pairs) > 0.6 * len(text):
        return "faq"
    if sum(bool(title) for title, _ in _sections(text)) >= 2:
        return "sections"
    return "prose"


def chunks_of(text: str, kind: str, *, most_chars: int = CHUNK_CHARS) -> list[Chunk]:
    """The document in order. Raises InputError for an unknown kind."""
    if kind not in KINDS:
        raise InputError("kind", kind, f"one of {', '.join(KINDS)}")
    if kind == "faq":
        return [
            replace(pair, text=part)
            for pair in _pairs(text)
            for part in (
                [pair.text] if pair.question else _packed(_paragraphs(pair.text), most_chars)
            )
            if part.strip()
        ]
    if kind == "sections":
        return [
            Chunk(part, title)
            for title, body in _sections(text)
            for part in _packed(_paragraphs(body), most_chars)
        ]
    if kind == "code":
        blocks = (part for block in _blocks(text) for part in _cut_lines(block, most_chars))
        return [Chunk(part) for part in _joined(blocks, most_chars, "\n")]
    return [Chunk(part) for part in _packed(_paragraphs(text), most_chars)]


# -- prose -----------------------------------------------------------------------------------------


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(text: str) -> list[str]:
    return [part for part in (one.strip() for one in _SENTENCE.split(text)) if part]


def _packed(parts: Iterable[str], most_chars: int) -> list[str]:
    """Whole paragraphs together up to the bound; longer ones cut at sentences, then at words."""
    small = (piece for part in parts for piece in _fitting(part, most_chars))
    return _joined(small, most_chars, "\n\n")


def _fitting(text: str, most_chars: int) -> Iterator[str]:
    if len(text) <= most_chars:
        yield text
        return
    short = (piece for one in sentences(text) for piece in _by_words(one, most_chars))
    yield from _joined(short, most_chars, " ")


def _by_words(text: str, most_chars: int) -> Iterator[str]:
    while len(text) > most_chars:
        cut = text.rfind(" ", 1, most_chars + 1)
        cut = cut if cut > 0 else most_chars
        yield text[:cut].strip()
        text = text[cut:].strip()
    if text:
        yield text


def _joined(parts: Iterable[str], most_chars: int, between: str) -> list[str]:
    """Neighbours together while they fit."""
    made: list[str] = []
    for part in parts:
        if made and len(made[-1]) + len(between) + len(part) <= most_chars:
            made[-1] += between + part
        else:
            made.append(part)
    return made


# -- sections and FAQs -----------------------------------------------------------------------------


def _sections(text: str) -> list[tuple[str, str]]:
    """(title, body) in order; what stands before the first heading has the title ""."""
    lines = text.splitlines()
    found: list[tuple[str, list[str]]] = [("", [])]
    place = 0
    while place < len(lines):
        line = lines[place]
        if not line.strip():
            found[-1][1].append("")
            place += 1
            continue
        title = _title(line)
        underlined = place + 1 < len(lines) and _UNDERLINE.match(lines[place + 1])
        if title or (underlined and 0 < len(line.strip()) <= 80):
            found.append((title or line.strip(), []))
            place += 2 if underlined else 1
            continue
        found[-1][1].append(line)
        place += 1
    made: list[tuple[str, str]] = []
    above = ""  # a heading right under another: the body belongs to both
    for title, lines_of in found:
        name = f"{above}: {title}" if above and title else title or above
        body = "\n".join(lines_of).strip()
        if body:
            made.append((name, body))
        above = "" if body else name
    if above:  # a heading at the end, with nothing under it
        made.append((above, above))
    return made


def _title(line: str) -> str:
    matched = _HEADING.match(line.rstrip()) if len(line) <= LINE_CHARS else None
    if matched is None:
        return ""
    title = next(part for part in matched.groups() if part is not None)
    return title.strip() if re.search(r"[A-Za-z]{2}", title) else ""


def _question(line: str) -> str:
    """The question a line is, without its mark; "" when it is none."""
    plain = line.strip(" \t\r-*#>")
    asked = _MARK.sub("", plain, count=1) if _MARK.match(plain) else plain
    asks = asked.endswith("?") or _ASKING_MARK.match(plain) is not None
    return asked.strip(" *") if asks and len(asked) >= LEAST_QUESTION else ""


def _pairs(text: str) -> list[Chunk]:
    """Questions with their answers; text before the first question has none."""
    made: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines():
        question = _question(line) if len(line) <= LINE_CHARS else ""
        if question:
            made.append((question, []))
        else:
            answer = _ANSWERED.sub("", line) if made[-1][0] and not "".join(made[-1][1]) else line
            made[-1][1].append(answer)
    pairs: list[Chunk] = []
    waiting = ""  # a question right after another: one answer for both
    for question, answers in made:
        body = "\n".join(answers).strip()
        asked = f"{waiting} {question}".strip()
        if body:
            pairs.append(Chunk(body, question=asked))
            waiting = ""
        else:
            waiting = asked
    if waiting:
        pairs.append(Chunk(waiting))
    return pairs


# -- code ------------------------------------------------------------------------------------------


def _blocks(text: str) -> Iterator[str]:
    """Top-level definitions with what belongs to them, and what lies between."""
    block: list[str] = []
    body = False  # the block holds more than decorators and comments
    for line in text.splitlines():
        if body and len(line) <= LINE_CHARS and _DEFINES.match(line):
            yield "\n".join(block)
            block, body = [], False
        block.append(line)
        body = body or bool(
            line.strip() and not line.lstrip().startswith(("@", "#", "//", "/*", "*"))
        )
    if any(line.strip() for line in block):
        yield "\n".join(block)


def _cut_lines(block: str, most_chars: int) -> Iterator[str]:
    lines = (part for line in block.split("\n") for part in _long_line(line, most_chars))
    for part in _joined(lines, most_chars, "\n"):
        if part.strip():
            yield part.strip("\n")


def _long_line(line: str, most_chars: int) -> Iterator[str]:
    for first in range(0, max(1, len(line)), most_chars):
        yield line[first : first + most_chars]


# -- keys by rule ----------------------------------------------------------------------------------


def rule_keywords(text: str) -> str:
    """The words that stand out, most telling first."""
    words = [word for word in _WORD.findall(text) if word.lower() not in _STOP]
    counts = Counter(word.lower() for word in words)
    names = {word.lower() for word in words if word[0].isupper()}
    shown = {word.lower(): word for word in reversed(words)}
    ranked = sorted(counts, key=lambda w: (-(counts[w] + (w in names) + min(len(w), 12) / 12), w))
    return ", ".join(shown[word] for word in ranked[:MAX_KEYWORDS])


def rule_summary(chunk: Chunk) -> str:
    """The title and the first sentence."""
    first = next(iter(sentences(chunk.text)), chunk.text)
    text = f"{chunk.title}: {first}" if chunk.title else first
    return " ".join(text.split())[:SUMMARY_CHARS]


def rule_facts(text: str) -> list[str]:
    """Sentences with a number or a name inside."""
    found = []
    for sentence in sentences(text):
        plain = " ".join(sentence.split())
        if len(plain) >= 15 and re.search(r"\d|(?<=[a-z,] )[A-Z][a-z]", plain):
            found.append(plain[: 2 * SUMMARY_CHARS])
    return found[:MAX_FACTS]


def rule_questions(chunk: Chunk) -> list[str]:
    if chunk.question:
        return [chunk.question]
    return [f"What about {chunk.title}?"] if chunk.title else []
