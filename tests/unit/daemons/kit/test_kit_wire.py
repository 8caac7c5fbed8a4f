"""docs/wire.md, control plane: the bytes in the document are the bytes on the wire."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from intentd.core.messages import (
    Answer,
    Goodbye,
    Hello,
    Message,
    NumberedPolicy,
    PolicyAck,
    Question,
    Refusal,
    Report,
    Welcome,
)
from intentd.daemons.kit.codec import decode, encode

DOCUMENT = Path(__file__).parents[4] / "docs" / "wire.md"
BOOT = "00f1e2d3c4b5a697"
MESSAGES: dict[str, Message] = {
    "hello": Hello("agent", "h1", "h1", "0.1.0", BOOT, {"flows": [1, 7]}, {}),
    "welcome": Welcome("c1", "8899aabbccddeeff", 2.0),
    "report": Report(BOOT, 1, {"flows": [1, 7]}, {}),
    "policy": NumberedPolicy("flows", 1, 8, 1767225600.0, {"domains": []}),
    "ack": PolicyAck("flows", 1, 8, True),
    "refusal": Refusal("say hello first: this controller does not know you"),
    "goodbye": Goodbye(BOOT),
    "question": Question(1, "jobs.list", {"limit": 2}),
    "answer": Answer(1, error="limit: got 0, expected 1 to 200"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_the_documented_bytes(name: str) -> None:
    match = re.search(rf"```hex control-{name}\n([0-9a-f\s]+)```", DOCUMENT.read_text())
    assert match, f"docs/wire.md has no example of {name}"
    documented = bytes.fromhex(match.group(1))
    assert documented == encode(MESSAGES[name])
    assert decode(documented) == MESSAGES[name]
