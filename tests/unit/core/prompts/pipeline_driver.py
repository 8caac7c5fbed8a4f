"""A driver of pipelines from tables: the third shell beside the proxy and the replay."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

from intentd.core.prompts.effects import (
    CacheFound,
    CacheItem,
    CallFailed,
    CallModel,
    ContextLoaded,
    Done,
    Effect,
    Embed,
    Embedded,
    Foretell,
    LoadContext,
    LookupCache,
    Message,
    Outcome,
    Prediction,
    Reply,
    Together,
)
from intentd.core.prompts.models import ModelPool, ModelSpec
from intentd.core.prompts.money import Price

MILLION = 10**9


def pool() -> ModelPool:
    return ModelPool(
        ModelSpec(name, price=Price(cents * 10**7, cents * 3 * 10**7), window_tokens=window)
        for name, cents, window in (
            ("tiny", 1, 4000),
            ("small", 10, 8000),
            ("middle", 100, 8000),
            ("large", 1000, 32000),
        )
    )


class Table:
    """Answers effects: replies by (model, purpose), stored items, a conversation."""

    def __init__(
        self,
        replies: dict[tuple[str, str], str | CallFailed] | None = None,
        *,
        items: Iterable[CacheItem] = (),
        exact: Iterable[CacheItem] = (),
        messages: Iterable[Message] = (),
        embed: Callable[[str], tuple[float, ...]] | None = None,
    ) -> None:
        self.replies = replies or {}
        self.items = tuple(items)
        self.exact = tuple(exact)
        self.messages = tuple(messages)
        self.embed = embed
        self.foretold = Prediction(0.0, known=False)
        self.seen: list[Effect] = []

    def calls(self) -> list[tuple[str, str]]:
        out = []
        for effect in self.seen:
            if isinstance(effect, CallModel):
                out.append((effect.model, effect.purpose.value))
        return out

    def perform(self, effect: Effect) -> Outcome:
        if isinstance(effect, Together):
            return tuple(self.perform(one) for one in effect.effects)  # type: ignore[return-value, misc]  # never nested
        self.seen.append(effect)
        if isinstance(effect, CallModel):
            text = self.replies.get((effect.model, effect.purpose.value), f"by {effect.model}")
            if isinstance(text, CallFailed):
                return text
            return Reply(effect.model, text, 10, 5, cost_nano=7)
        if isinstance(effect, LookupCache):
            return CacheFound(self.exact if effect.exact else self.items)
        if isinstance(effect, LoadContext):
            kept = [m for m in self.messages if m.message_id not in effect.without]
            return ContextLoaded(tuple(kept))
        if isinstance(effect, Embed):
            assert self.embed is not None
            return Embedded(tuple(self.embed(text) for text in effect.texts))
        if isinstance(effect, Foretell):
            return self.foretold
        return Done()

    def drive(self, steps: Generator[Effect, Outcome, Any]) -> Any:
        try:
            effect = next(steps)
            while True:
                effect = steps.send(self.perform(effect))
        except StopIteration as stop:
            return stop.value


def conversation(count: int) -> tuple[Message, ...]:
    return tuple(Message(f"q{n}", f"a{n}", message_id=f"m{n}") for n in range(count))
