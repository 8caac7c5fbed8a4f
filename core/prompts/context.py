"""Which messages of a conversation go with a prompt: ``Filter([Message], prompt) -> [Message]``.

Filters (Table 4.3) are generators, since some ask a model or the embedder. They compose as nested
lists: a list of filters narrows step by step; a list that holds lists keeps the union of what its
members keep, in the conversation's order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from intentd.core.errors import ConfigError, InputError
from intentd.core.prompts.effects import (
    CallFailed,
    CallModel,
    Effect,
    Embed,
    Embedded,
    Message,
    Outcome,
    Purpose,
    Reply,
)

Messages = tuple[Message, ...]
ContextSteps = Generator[Effect, Outcome, Messages]
CountTokens = Callable[[str], int]

STANDALONE_PROMPT: Final = (
    "You decide whether a message can be answered without the conversation before it. "
    "It needs the conversation when it uses words such as it, that, he, there or again whose "
    "meaning lies in earlier messages, leaves out its subject, or asks to go on or to change "
    "an earlier answer. Answer with one word: STANDALONE or CONTEXT."
)
SUMMARY_PROMPT: Final = (
    "Summarize this conversation in at most 150 words for someone who will answer its next "
    "message. Keep names, numbers, decisions and open questions."
)
DECISION_TOKENS: Final = 8
SUMMARY_TOKENS: Final = 300
EXCERPT_CHARS: Final = 2000
MAX_FILTERS: Final = 64
UNLEARNED_K: Final = 5
MAX_DEPTH: Final = 8
_WORD: Final = re.compile(r"[A-Za-z]+")


class ContextFilter(Protocol):
    def apply(self, messages: Messages, prompt: str, notes: list[str], model: str) -> ContextSteps:
        """Keep some of the messages. notes: gets one line on what was decided."""


@dataclass(frozen=True, slots=True)
class LastK:
    """The k most recent messages; None keeps all."""

    k: int | None

    def __post_init__(self) -> None:
        if self.k is not None and (isinstance(self.k, bool) or self.k < 0):
            raise InputError("k", self.k, "a count >= 0")

    def apply(self, messages: Messages, prompt: str, notes: list[str], model: str) -> ContextSteps:
        kept = messages if self.k is None else messages[len(messages) - self.k :]
        if self.k is not None and self.k > len(messages):
            kept = messages
        notes.append(f"last_k({'all' if self.k is None else self.k}): {len(kept)} messages")
        yield from ()
        return kept


@dataclass(frozen=True, slots=True)
class SmartContext:
    """All that is left, or nothing when the prompt stands alone.

    The context model is asked at most `calls` times and the context is dropped only when every
    call says standalone (section 4.3.4: leaving out needed context costs quality, the other
    mistake only money). A failed or unclear call counts as "needs context".
    model: "" takes the service type's small model.
    """

    model: str = ""
    calls: int = 2

    def apply(self, messages: Messages, prompt: str, notes: list[str], model: str) -> ContextSteps:
        if not messages:
            return messages
        asked = (
            {"role": "system", "content": STANDALONE_PROMPT},
            {"role": "user", "content": _decision_text(messages, prompt)},
        )
        for number in range(1, self.calls + 1):
            outcome = yield CallModel(
                self.model or model,
                asked,
                Purpose.CONTEXT,
                {"temperature": 0 if number == 1 else 0.7},
                DECISION_TOKENS,
            )
            if not isinstance(outcome, Reply) or not says_standalone(outcome.text):
                why = outcome.reason if isinstance(outcome, CallFailed) else "needs context"
                notes.append(f"smart_context: {why} (call {number})")
                return messages
        notes.append(f"smart_context: standalone ({self.calls} calls)")
        return ()


@dataclass(frozen=True, slots=True)
class Chooser:
    """As many recent messages as a learned chooser says; no model is asked.

    choose: how many of the messages the prompt needs (`core.prompts.chooser` over their texts).
    None, before anything was learned: the last UNLEARNED_K.
    """

    choose: Callable[[str, Messages], int] | None = None

    def apply(self, messages: Messages, prompt: str, notes: list[str], model: str) -> ContextSteps:
        if self.choose is None:
            notes.append(f"chooser: nothing learned, the last {UNLEARNED_K}")
            yield from ()
            return messages[-UNLEARNED_K:]
        kept = min(len(messages), max(0, self.choose(prompt, messages)))
        notes.append(f"chooser: {kept} of {len(messages)} messages")
        yield from ()
        return messages[len(messages) - kept :]


@dataclass(frozen=True, slots=True)
class Similar:
    """Messages whose similarity to the prompt lies above theta, in order of similarity.

    The most similar comes last, next to the prompt, and so is the last to go when the window is
    too small.
    """

    theta: float

    def __post_init__(self) -> None:
        if not -1 <= self.theta <= 1:
            raise InputError("similar", self.theta, "a cosine from -1 to 1")

    def apply(self, messages: Messages, prompt: str, notes: list[str], model: str) -> ContextSteps:
        if not messages:
            return messages
        texts = (prompt, *(f"{m.prompt}\n{m.response}"[:EXCERPT_CHARS] for m in messages))
        outcome = yield Embed(texts)
        if not isinstance(outcome, Embedded) or len(outcome.vectors) != len(texts):
            notes.append("similar: no embedder, all messages kept")
            return messages
        own, *others = outcome.vectors
        scored = [
            (sum(a * b for a, b in zip(own, vector, strict=True)), -index)
            for index, vector in enumerate(others)
        ]
        kept = sorted(pair for pair in scored if pair[0] > self.theta)
        notes.append(f"similar({self.theta}): {len(kept)} of {len(messages)} messages")
        return tuple(messages[-index] for _, index in kept)


@dataclass(frozen=True, slots=True)
class Summarize:
    """The messages as one short message, written by the context model.

    Fewer than `least` messages, or a failed call, leave them as they are.
    """

    model: str = ""
    least: int = 2

    def apply(self, messages: Messages, prompt: str, notes: list[str], model: str) -> ContextSteps:
        if len(messages) < self.least:
            return messages
        told = "\n".join(f"User: {m.prompt}\nAssistant: {m.response}" for m in messages)
        outcome = yield CallModel(
            self.model or model,
            (
                {"role": "system", "content": SUMMARY_PROMPT},
                {"role": "user", "content": told},
            ),
            Purpose.SUMMARIZE,
            {"temperature": 0},
            SUMMARY_TOKENS,
        )
        if not isinstance(outcome, Reply) or not outcome.text.strip():
            notes.append("summarize: failed, messages kept")
            return messages
        notes.append(f"summarize: {len(messages)} messages into one")
        text = f"Summary of the conversation so far: {outcome.text.strip()}"
        return (Message("", text, is_summary=True),)


@dataclass(frozen=True, slots=True)
class Narrow:
    """A list of filters: each narrows what the one before it kept."""

    filters: tuple[ContextFilter, ...]

    def apply(self, messages: Messages, prompt: str, notes: list[str], model: str) -> ContextSteps:
        for one in self.filters:
            messages = yield from one.apply(messages, prompt, notes, model)
        return messages


@dataclass(frozen=True, slots=True)
class Union:
    """A list that holds lists: what any member keeps, in order; summaries first."""

    members: tuple[ContextFilter, ...]

    def apply(self, messages: Messages, prompt: str, notes: list[str], model: str) -> ContextSteps:
        places = {id(message): place for place, message in enumerate(messages)}
        kept: dict[int, Message] = {}
        made: list[Message] = []
        for one in self.members:
            for message in (yield from one.apply(messages, prompt, notes, model)):
                if id(message) in places:
                    kept[places[id(message)]] = message
                else:
                    made.append(message)
        return (*made, *(kept[place] for place in sorted(kept)))


ALL: Final = LastK(None)
NOTHING: Final = LastK(0)


def newest_needed(filters: ContextFilter) -> int | None:
    """How many of the most recent messages they look at; None: all there are."""
    if isinstance(filters, LastK):
        return filters.k
    if isinstance(filters, Narrow):
        return newest_needed(filters.filters[0])  # the others see what it keeps
    if isinstance(filters, Union):
        counts = [newest_needed(one) for one in filters.members]
        return None if None in counts else max(count or 0 for count in counts)
    return None


def says_standalone(text: str) -> bool:
    """Whether the answer is clearly STANDALONE; anything else means the context stays."""
    words = [word.upper() for word in _WORD.findall(text)]
    if "CONTEXT" in words or "NOT" in words:
        return False
    return "STANDALONE" in words


def _decision_text(messages: Messages, prompt: str) -> str:
    shown = messages[-2:]
    before = "\n".join(
        f"User: {m.prompt[:EXCERPT_CHARS]}\nAssistant: {m.response[:EXCERPT_CHARS]}" for m in shown
    )
    return f"Conversation:\n{before}\n\nMessage:\n{prompt[:EXCERPT_CHARS]}"


def filters_from_plain(plain: object, field: str, _depth: int = 0) -> ContextFilter:
    """Filters as configuration and requests spell them.

    ``{"last_k": 5}``, ``{"similar": 0.5}``, ``"smart_context"``, ``{"smart_context": "model"}``,
    ``"summarize"``, ``"chooser"``, ``"all"``, ``"none"``, or (nested) lists of these.
    Raises ConfigError.
    """
    if _depth > MAX_DEPTH:
        raise ConfigError(field, "...", f"lists nested at most {MAX_DEPTH} deep")
    if isinstance(plain, (list, tuple)):
        if not 1 <= len(plain) <= MAX_FILTERS:
            raise ConfigError(field, plain, f"1 to {MAX_FILTERS} filters")
        members = tuple(
            filters_from_plain(one, f"{field}[{index}]", _depth + 1)
            for index, one in enumerate(plain)
        )
        has_lists = any(isinstance(one, (list, tuple)) for one in plain)
        return Union(members) if has_lists else Narrow(members)
    if isinstance(plain, str):
        plain = {plain: None}
    if not isinstance(plain, Mapping) or len(plain) != 1:
        raise ConfigError(field, plain, 'one filter, such as {"last_k": 5} or "smart_context"')
    ((name, value),) = plain.items()
    make = _FILTERS.get(str(name))
    if make is None:
        raise ConfigError(field, name, f"one of {', '.join(_FILTERS)}, or a list of them")
    return make(value, f"{field}.{name}")


def with_chooser(
    filters: ContextFilter, choose: Callable[[str, Messages], int] | None
) -> ContextFilter:
    """The same filters with every chooser deciding by `choose`."""
    if isinstance(filters, Chooser):
        return Chooser(choose)
    if isinstance(filters, Narrow):
        return Narrow(tuple(with_chooser(one, choose) for one in filters.filters))
    if isinstance(filters, Union):
        return Union(tuple(with_chooser(one, choose) for one in filters.members))
    return filters


def _last_k(value: object, field: str) -> ContextFilter:
    if type(value) is not int or value < 0:
        raise ConfigError(field, value, "a count >= 0")
    return LastK(value)


def _similar(value: object, field: str) -> ContextFilter:
    if type(value) not in (int, float) or not -1 <= value <= 1:  # type: ignore[operator]  # narrowed by type() above
        raise ConfigError(field, value, "a cosine from -1 to 1")
    return Similar(float(value))  # type: ignore[arg-type]  # as above


def _asking(kind: type[SmartContext | Summarize]) -> Callable[[object, str], ContextFilter]:
    def make(value: object, field: str) -> ContextFilter:
        if value is None:
            return kind()
        if not isinstance(value, str) or not value:
            raise ConfigError(field, value, "the name of a model")
        return kind(model=value)

    return make


def _constant(kept: ContextFilter) -> Callable[[object, str], ContextFilter]:
    def make(value: object, field: str) -> ContextFilter:
        if value is not None:
            raise ConfigError(field, value, "no value")
        return kept

    return make


_FILTERS: Final[Mapping[str, Callable[[Any, str], ContextFilter]]] = {
    "last_k": _last_k,
    "similar": _similar,
    "smart_context": _asking(SmartContext),
    "summarize": _asking(Summarize),
    "chooser": _constant(Chooser()),
    "all": _constant(ALL),
    "none": _constant(NOTHING),
}


def chat_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of chat messages (parts of other kinds left out)."""
    texts = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, (list, tuple)):
            texts += [
                part["text"]
                for part in content
                if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            ]
    return texts


def fit_window(
    messages: Messages,
    others: Sequence[Mapping[str, Any]],
    *,
    window_tokens: int,
    answer_tokens: int,
    count_tokens: CountTokens,
) -> Messages:
    """Drop the oldest messages until all fits the model's window.

    others: what must go along (system prompt and this turn). Raises InputError when that alone
    does not fit. A token is never less than a byte, so short prompts are not counted at all.
    """
    room = window_tokens - answer_tokens
    texts = chat_texts(others)
    parts = [(message, chat_texts(message.as_chat())) for message in messages]
    most = sum(_bytes(text) for text in texts)
    most += sum(_bytes(text) for _, part in parts for text in part)
    overhead = PER_MESSAGE_TOKENS
    most += overhead * (len(others) + 2 * len(parts) + 1)
    if most <= room:
        return messages
    left = room - sum(count_tokens(text) + overhead for text in texts) - overhead
    if left < 0:
        raise InputError(
            "messages", f"{room - left} tokens", f"at most {room} for this model and max_tokens"
        )
    kept: list[Message] = []
    for message, part in reversed(parts):
        left -= sum(count_tokens(text) + overhead for text in part)
        if left < 0:
            break
        kept.append(message)
    return tuple(reversed(kept))


# what chat templates add to a message, roughly (measured on cl100k chats: 3 to 4)
PER_MESSAGE_TOKENS: Final = 4


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def split_chat(
    messages: Sequence[ChatMessageLike],
) -> tuple[tuple[ChatMessageLike, ...], Messages, tuple[ChatMessageLike, ...]]:
    """(system messages, history as pairs, this turn) of a client's chat.

    A pair begins at a user message and takes all that follows up to the next one, so tool calls
    stay with their results. This turn is the last user message and what comes after it.
    """
    system = tuple(m for m in messages if m.get("role") in ("system", "developer"))
    rest = [m for m in messages if m.get("role") not in ("system", "developer")]
    groups: list[list[ChatMessageLike]] = []
    for message in rest:
        if message.get("role") == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    if not groups:
        return system, (), ()
    *past, turn = groups
    history = []
    for group in past:
        asked = " ".join(chat_texts([m for m in group if m.get("role") == "user"]))
        answered = " ".join(chat_texts([m for m in group if m.get("role") == "assistant"]))
        history.append(Message(asked, answered, tuple(group)))
    return system, tuple(history), tuple(turn)


def join_tool_results(messages: Messages) -> Messages:
    """Messages that begin with a tool's result joined to the ones that hold its call: providers
    refuse one without the other."""
    joined: list[Message] = []
    for message in messages:
        if joined and begins_with_result(message.chat):
            before = joined[-1]
            joined[-1] = Message(
                before.prompt,
                message.response or before.response,
                (*before.as_chat(), *message.chat),
                message.message_id or before.message_id,
            )
        else:
            joined.append(message)
    return tuple(joined)


def begins_with_result(chat: Sequence[ChatMessageLike]) -> bool:
    return bool(chat) and chat[0].get("role") in ("tool", "function")


ChatMessageLike = Mapping[str, Any]
