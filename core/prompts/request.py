"""A prompt on its way through a service type: what came in, what is known, what comes out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from intentd.core.errors import InputError, IntentdError
from intentd.core.prompts import cascade
from intentd.core.prompts.context import Messages
from intentd.core.prompts.effects import CacheItem, ChatMessage, Effect, Outcome, Reply
from intentd.core.prompts.metadata import Trace
from intentd.core.prompts.models import ModelPool
from intentd.core.prompts.stickiness import Warm

Pipeline = Generator[Effect, Outcome, "Answer"]


class PipelineError(IntentdError):
    """No model gave a complete answer. status: for the client; reason: of the last failure."""

    def __init__(self, reason: str, status: int, trace: Trace, *, started: bool = False) -> None:
        self.reason = reason
        self.status = status
        self.trace = trace
        self.started = started
        super().__init__(f"{trace.service_type}: no model answered: {reason}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The second gate's word on a stored item. reason: what spoke against it."""

    hit: bool
    score: float
    reason: str = ""


class Gate(Protocol):
    def judge(self, prompt: str, key: str, similarity: float) -> Verdict: ...


def _rough_tokens(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass")) // 3 + 1


@dataclass(frozen=True, slots=True)
class Env:
    """What a pipeline knows beside the request. down: models that cool off. limited: those of
    them whose provider said when to come again. routed: there is a learned router to ask."""

    pool: ModelPool
    count_tokens: Callable[[str], int] = _rough_tokens
    down: frozenset[str] = frozenset()
    limited: frozenset[str] = frozenset()
    routed: bool = False
    gate: Gate | None = None
    agreement: cascade.AgreementModel = cascade.PRIOR_AGREEMENT


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and what came with it.

    prompt: the text of this turn. turn: its chat messages as they came (() makes one of the
    prompt). history: messages the client sent itself; they are the conversation then, and the
    stored one is not loaded. conversation: its name, "" for a stateless client. bypass: why the
    cache is left alone, "" if it is not. lookup, store, max_age_s, cached_only: Cache-Control's
    no-cache, no-store, max-age and only-if-cached. floor: the least model by price (a second
    answer is never cheaper). replaces: ids of messages left out. needs: capabilities. warm: what
    a provider holds of the conversation. before: the place of the turn in its conversation when
    it is answered again; what came later is not its context. 0: the end.
    """

    prompt: str
    turn: tuple[ChatMessage, ...] = ()
    system: tuple[ChatMessage, ...] = ()
    history: Messages = ()
    conversation: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stream: bool = False
    bypass: str = ""
    lookup: bool = True
    store: bool = True
    max_age_s: float | None = None
    cached_only: bool = False
    floor: str = ""
    replaces: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    warm: Warm | None = None
    before: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens <= 0:
            raise InputError("max_tokens", self.max_tokens, "a count > 0")

    def turn_messages(self) -> tuple[ChatMessage, ...]:
        return self.turn or ({"role": "user", "content": self.prompt},)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client gets. reply: the model's, None for a stored answer served as it is.

    updates: the conversation that this answer joins, "" for none.
    """

    text: str
    trace: Trace
    reply: Reply | None = None
    item: CacheItem | None = None
    updates: str = ""
