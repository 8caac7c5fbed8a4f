"""Responses that go on from earlier ones: how their ids tell the conversation.

A stored response is a message of a kept conversation. One that goes on from the last answer of it
joins it; one that goes on from an earlier answer begins a conversation of its own with a copy of
what came before, so that no branch sees another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson

from intentd.core.prompts.context import Messages
from intentd.core.prompts.effects import Message
from intentd.core.prompts.pipeline import Request
from intentd.proxy.call import Exchange
from intentd.proxy.dialects.openai_responses import (
    ResponseId,
    ResponsesRequest,
    unknown_response,
)
from intentd.proxy.dialects.responses_out import output_items
from intentd.proxy.store.base import Turns


class Continuation:
    """What a response's conversation holds when it is its turn.

    seed: messages that have to be stored before its own.
    """

    def __init__(self, asked: ResponsesRequest, exchange: Exchange) -> None:
        self.seed: Messages = ()
        self._asked = asked
        self._exchange = exchange

    @property
    def conversation(self) -> str:
        """Whose turn it has to wait for; "" when it begins anew."""
        previous = self._asked.previous
        return previous.conversation if previous is not None else ""

    async def enter(self, request: Request, conversations: Turns) -> Request:
        """The request with its history and the conversation that it joins. Raises ApiError."""
        previous = self._asked.previous
        own = ResponseId.new(self._exchange.request_id)
        self.seed = request.history
        if previous is not None:
            messages = await conversations.load(self._exchange.key.key_id, previous.conversation)
            place = find(messages, previous, "previous_response_id")
            past = messages[: place + 1]
            request = replace(request, history=(*past, *request.history))
            if place == len(messages) - 1:
                own = ResponseId(previous.root, self._exchange.request_id)
            else:
                self.seed = request.history
        self._asked.call.answer_id = str(own)
        return replace(request, conversation=own.conversation if self._asked.store else "")


def find(messages: list[Message], wanted: ResponseId, field: str) -> int:
    """Where a response stands in its conversation. Raises ApiError 404."""
    for place in range(len(messages) - 1, -1, -1):
        if messages[place].message_id == wanted.request_id:
            return place
    raise unknown_response(str(wanted), field)


def stored_document(name: str, message: Message, log: dict[str, Any]) -> dict[str, Any]:
    """A stored response again. log: its entry in the request log, {} when that is gone."""
    last = message.as_chat()[-1]
    calls = [one for one in log.get("models", ()) if one.get("purpose") == "answer"]
    usage = calls[-1] if calls else {}
    in_tokens, out_tokens = usage.get("in_tokens", 0), usage.get("out_tokens", 0)
    return {
        "id": name,
        "object": "response",
        "created_at": int(log.get("wall_s", 0)),
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": log.get("model", ""),
        "output": output_items(dict(last), message.message_id),
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": {
            "input_tokens": in_tokens,
            "input_tokens_details": {"cached_tokens": usage.get("cached_in_tokens", 0)},
            "output_tokens": out_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": in_tokens + out_tokens,
        },
    }


def input_items(message: Message) -> list[dict[str, Any]]:
    """What a stored response answered."""
    items: list[dict[str, Any]] = []
    for place, one in enumerate(message.as_chat()[:-1]):
        name = f"msg_{message.message_id}_in_{place}"
        content = one.get("content")
        text = content if isinstance(content, str) else orjson.dumps(content).decode()
        if one.get("role") == "tool":
            items.append(
                {"id": name, "type": "function_call_output", "status": "completed",
                 "call_id": one.get("tool_call_id"), "output": text}
            )  # fmt: skip
            continue
        part = {"type": "input_text", "text": text}
        items.append(
            {"id": name, "type": "message", "status": "completed", "role": one.get("role"),
             "content": [part]}
        )  # fmt: skip
    return items
