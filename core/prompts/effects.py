"""What a pipeline asks for and what it is told: the whole boundary between policy and I/O.

A pipeline is a generator that yields effects and is sent outcomes. The proxy performs effects for
real, a replay answers them from recorded outcomes, tests from tables. The driver also keeps the
money (reserve before CallModel, settle after), retries and concurrency; a pipeline sees a call
either answered or failed for good.
"""

from __future__ import annotations

import enum
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ChatMessage = Mapping[str, Any]
Vector = Sequence[float]


class Purpose(enum.StrEnum):
    """Why a model is called; names the stage in metadata, spans and metrics."""

    ANSWER = "answer"
    VERIFY = "verify"
    COMPARE = "compare"
    CONTEXT = "context"
    SUMMARIZE = "summarize"
    RELEVANCE = "relevance"
    REWRITE = "rewrite"
    KEYS = "keys"
    FOLLOWUPS = "followups"
    CHECK = "check"


@dataclass(frozen=True, slots=True)
class Message:
    """A prompt-response pair of a conversation (section 4.3.4).

    chat: the exact chat messages of the pair when they hold more than two texts (images, tool
    calls and their results). message_id: of the request that made it. is_summary: stands for
    older messages.
    """

    prompt: str
    response: str
    chat: tuple[ChatMessage, ...] = ()
    message_id: str = ""
    is_summary: bool = False

    def as_chat(self) -> tuple[ChatMessage, ...]:
        if self.chat:
            return self.chat
        if self.is_summary:
            return ({"role": "system", "content": self.response},)
        return (
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.response},
        )


# -- effects ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallModel:
    """Ask one model of the pool. Outcome: Reply or CallFailed.

    params: what goes upstream beside model and messages (temperature, tools, max_tokens, ...).
    max_tokens: the cap to reserve and to send. stream: deltas may go to the client as they come;
    only the call whose answer is final whatever it says has it set.
    """

    model: str
    messages: tuple[ChatMessage, ...]
    purpose: Purpose = Purpose.ANSWER
    params: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Together:
    """Perform these at the same time. Outcome: a tuple of their outcomes, in order."""

    effects: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class LookupCache:
    """Find stored objects like the text. Outcome: CacheFound, best first.

    exact: only a key equal to the text (after normalising). kinds: cached types searched, () all.
    min_similarity: cosine. limit: items at most. context_hash: what of the conversation the
    answer depends on; the driver adds tenant, system prompt, tools and format to the scope.
    model_floor: the least model, by price, whose answers will do. given: objects that an
    application put are searched too, whatever the scope. max_tokens: longer answers are left out.
    max_age_s: older ones too.
    """

    text: str
    exact: bool = False
    kinds: tuple[str, ...] = ()
    min_similarity: float = 0.0
    limit: int = 1
    context_hash: str = ""
    model_floor: str = ""
    given: bool = True
    max_tokens: int | None = None
    max_age_s: float | None = None


@dataclass(frozen=True, slots=True)
class StoreCache:
    """Keep an answer under typed keys ((cached type, text), ...). Outcome: Done.

    cost_nano: what it took to get, so what a hit avoids.
    """

    prompt: str
    response: str
    keys: tuple[tuple[str, str], ...]
    context_hash: str = ""
    model: str = ""
    cost_nano: int = 0
    out_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadContext:
    """The messages of a conversation, oldest first. Outcome: ContextLoaded.

    without: message ids left out, such as the answer being replaced. before: only those whose
    sequence number is lower; 0: all. newest: so many of the last ones will do; None: all.
    """

    conversation: str
    without: tuple[str, ...] = ()
    before: int = 0
    newest: int | None = None


@dataclass(frozen=True, slots=True)
class Embed:
    """Outcome: Embedded with one unit vector a text."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Foretell:
    """What the dear model is expected to gain on a prompt. Outcome: Prediction."""

    prompt: str
    weak: str
    strong: str


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Answer this later, in the background, and cache it. Outcome: Done, at once.

    what: "better" (the same prompt by a better model) or "followups" (questions that are likely
    next, and their answers). service_type: whose models answer. history: the conversation the
    prompt came in.
    """

    what: str
    service_type: str
    prompt: str
    response: str = ""
    history: tuple[Message, ...] = ()


Effect = CallModel | Together | LookupCache | StoreCache | LoadContext | Embed | Foretell | Prefetch


# -- outcomes --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer of a model. choice: the upstream's first choice as it came."""

    model: str
    text: str
    in_tokens: int = 0
    out_tokens: int = 0
    cached_in_tokens: int = 0
    cost_nano: int = 0
    latency_s: float = 0.0
    finish_reason: str = "stop"
    choice: Mapping[str, Any] | None = None
    raw: Any = None


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A call that has no complete answer, after the driver's retries.

    status: HTTP status, 0 when there was none. started: the client has seen a part of the
    answer, so no other model may take over. retryable: another model may do better. cost_nano:
    what the attempts are booked at.
    """

    model: str
    reason: str
    status: int = 0
    started: bool = False
    retryable: bool = True
    cost_nano: int = 0


@dataclass(frozen=True, slots=True)
class CacheItem:
    """One stored object that was found. kind: the cached type whose key matched.

    put: an application gave it; it was not made for a request of this scope.
    """

    item_id: str
    kind: str
    key: str
    response: str
    similarity: float
    prompt: str = ""
    source: str = ""
    age_s: float = 0.0
    model: str = ""
    cost_nano: int = 0
    put: bool = False


@dataclass(frozen=True, slots=True)
class CacheFound:
    items: tuple[CacheItem, ...] = ()


@dataclass(frozen=True, slots=True)
class ContextLoaded:
    """available: messages of the conversation, where not all were asked for."""

    messages: tuple[Message, ...] = ()
    available: int = 0


@dataclass(frozen=True, slots=True)
class Embedded:
    vectors: tuple[Vector, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the router expects of the dear model over the cheap one. known: it has seen such."""

    gain: float
    known: bool


@dataclass(frozen=True, slots=True)
class Done:
    """The effect is under way or done; nothing to say. error: why it was not, for metadata."""

    error: str = ""


Outcome = (
    Reply
    | CallFailed
    | CacheFound
    | ContextLoaded
    | Embedded
    | Prediction
    | Done
    | tuple["Reply | CallFailed | CacheFound | ContextLoaded | Embedded | Done", ...]
)

# Steps[T]: a part of a pipeline that comes to a T
Steps = Generator[Effect, Outcome, Any]
