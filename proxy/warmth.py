"""Which provider holds which conversation in its prompt cache: in memory, as long as they do."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from intentd.core.prompts.effects import ChatMessage
from intentd.core.prompts.pipeline import Request
from intentd.core.prompts.stickiness import Warm, mark
from intentd.daemons.kit.clock import Clock

MAX_CONVERSATIONS: Final = 10_000
MAX_MARKS: Final = 2000


class Warmth:
    """The last model of each conversation, forgotten after keep_s; the oldest go first.

    A conversation is known by its name, or by how the history that a client sends begins; what
    two share by chance does no harm, because only the messages that are the same count.
    """

    def __init__(self, clock: Clock, keep_s: float) -> None:
        self.keep_s = keep_s
        self._clock = clock
        self._known: OrderedDict[tuple[str, str], tuple[float, Warm]] = OrderedDict()

    def find(self, key_id: str, request: Request) -> Warm | None:
        if not self._known or not (request.conversation or request.history):
            return None
        found = self._known.get((key_id, _name(request)))
        if found is None or self._clock.now() - found[0] > self.keep_s:
            return None
        return found[1]

    def keep(
        self, key_id: str, request: Request, model: str, sent: Sequence[ChatMessage], text: str
    ) -> None:
        """After an answer of a model to the chat that was sent."""
        if self.keep_s <= 0 or len(sent) >= MAX_MARKS:
            return
        said = {"role": "assistant", "content": text}
        marks = tuple(mark(message) for message in (*sent, said))
        place = (key_id, _name(request))
        self._known.pop(place, None)
        self._known[place] = (self._clock.now(), Warm(model, marks))
        if len(self._known) > MAX_CONVERSATIONS:
            self._known.popitem(last=False)

    def __len__(self) -> int:
        return len(self._known)


def _name(request: Request) -> str:
    if request.conversation:
        return request.conversation
    first = request.history[0].as_chat()[:1] if request.history else request.turn_messages()[:1]
    start = mark({"system": json.dumps(request.system, default=str), "first": list(first)})
    return f" {start.hex()}"  # no conversation has a space in its name
