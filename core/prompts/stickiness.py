"""Staying with a model inside a conversation, where leaving would cost more than it saves.

A provider keeps the beginning of a conversation in its prompt cache for some minutes and asks less
for it. A choice made for the price has to count that: what a cheaper model saves on new tokens it
may lose on the old ones. Choices made for quality are not touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from intentd.core.prompts.context import chat_texts
from intentd.core.prompts.effects import ChatMessage
from intentd.core.prompts.models import ModelSpec

MIN_PREFIX_TOKENS: Final = 1024  # providers keep no shorter ones
EXPECTED_ANSWER_TOKENS: Final = 300


@dataclass(frozen=True, slots=True)
class Warm:
    """What a provider holds of a conversation: the model, and marks of the messages it was sent
    and said, in their order."""

    model: str
    marks: tuple[bytes, ...]


def mark(message: ChatMessage) -> bytes:
    """Stands for a message, so that what is remembered holds no text."""
    plain = {name: value for name, value in message.items() if value is not None}
    raw = json.dumps(plain, sort_keys=True, ensure_ascii=True, default=str).encode()
    return hashlib.blake2b(raw, digest_size=8).digest()


def held_tokens(warm: Warm, chat: Sequence[ChatMessage], count_tokens: Callable[[str], int]) -> int:
    """Tokens of the beginning of `chat` that the provider holds; 0 below MIN_PREFIX_TOKENS.

    Only a beginning counts: after the first message that differs nothing is held.
    """
    same: list[ChatMessage] = []
    for message, known in zip(chat, warm.marks, strict=False):
        if mark(message) != known:
            break
        same.append(message)
    tokens = sum(count_tokens(text) for text in chat_texts(same))
    return tokens if tokens >= MIN_PREFIX_TOKENS else 0


@dataclass(frozen=True, slots=True)
class Switch:
    """What the next answer costs by staying and by switching."""

    stay_nano: int
    switch_nano: int

    @property
    def pays(self) -> bool:
        return self.switch_nano < self.stay_nano


def weigh_switch(
    warm: ModelSpec,
    held: int,
    other: ModelSpec,
    in_tokens: int,
    out_tokens: int = EXPECTED_ANSWER_TOKENS,
    *,
    extra_nano: int = 0,
) -> Switch:
    """held: input tokens in the warm model's prompt cache. extra_nano: what the other way costs
    beside its answer, such as a verifier."""
    held = min(held, in_tokens)
    return Switch(
        warm.price.cost_nano(in_tokens, out_tokens, held),
        other.price.cost_nano(in_tokens, out_tokens) + extra_nano,
    )
