"""Questions likely to be asked next, to be answered before they are (section 4.5.1)."""

from __future__ import annotations

import re
from typing import Final

from intentd.core.prompts.effects import ChatMessage

QUESTION_TOKENS: Final = 160
SHOWN_CHARS: Final = 2000
MAX_QUESTION_CHARS: Final = 300
_BULLET: Final = re.compile(r"^\s*(?:[-*•]|\d+[.):]|Q\d*[.):])\s*")


def followup_messages(prompt: str, response: str, count: int) -> tuple[ChatMessage, ...]:
    """Asks a cheap model what this user asks next."""
    return (
        {
            "role": "system",
            "content": f"Write the {count} questions this user is most likely to ask next, one a "
            "line, each complete on its own and at most 12 words. Nothing else.",
        },
        {
            "role": "user",
            "content": f"Question: {prompt[:SHOWN_CHARS]}\n\nAnswer: {response[:SHOWN_CHARS]}",
        },
    )


def parse_followups(text: str, count: int) -> list[str]:
    """The lines that are questions, without marks; at most `count`, each once."""
    found = []
    for line in text.splitlines():
        plain = _BULLET.sub("", line).strip().strip("\"'*")
        if plain.endswith("?") and 3 < len(plain) <= MAX_QUESTION_CHARS:
            found.append(plain)
    return list(dict.fromkeys(found))[:count]
