"""Requests as the dissertation's table 4.2 has them, and chats that name a service type: readers.

Both become one pipeline request. What is remembered for ``regenerate`` lives in memory, bounded;
a restart forgets it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from intentd.core.prompts.cache.bypass import bypass_reason
from intentd.core.prompts.context import chat_texts, split_chat
from intentd.core.prompts.pipeline import Request
from intentd.proxy.call import Call
from intentd.proxy.dialects.openai_chat import MAX_TOKENS, integer, read_object
from intentd.proxy.errors import ApiError, bad_field, shown

CONVERSATION_HEADER: Final = "X-Intentd-Conversation"
MAX_REMEMBERED_BYTES: Final = 64 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}\Z")
_OWN_FIELDS: Final = frozenset(
    {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n"}
)
_REQUEST_FIELDS: Final = frozenset(
    {"prompt", "service_type", "conversation", "system", "options", "params", "max_tokens"}
)
_REGENERATE_FIELDS: Final = frozenset({"id", "service_type", "options"})


@dataclass(frozen=True, slots=True)
class Asked:
    """A request on its way to a pipeline. options: the key-value pairs of the request."""

    service_type: str
    request: Request
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Regenerate:
    """Which answer is not good enough, and what to try; "" is the same service type."""

    request_id: str
    service_type: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Remembered:
    """What regenerate needs to know of an answer. rounds: how often it was regenerated before.

    cached: it was a stored one.
    """

    key_id: str
    asked: Asked
    answered_by: str
    rounds: int
    cached: bool = False

    @property
    def size_bytes(self) -> int:
        """Roughly: its texts, those of the history twice (as pairs and as chat messages)."""
        request = self.asked.request
        return len(request.prompt) + 2 * sum(
            len(one.prompt) + len(one.response) for one in request.history
        )


class Memory:
    """The last answers by request id, bounded in number and bytes; the oldest go first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._answers: OrderedDict[tuple[str, str], Remembered] = OrderedDict()
        self._bytes = 0

    def keep(self, request_id: str, answer: Remembered) -> None:
        known = self._answers.pop((answer.key_id, request_id), None)
        self._bytes += answer.size_bytes - (known.size_bytes if known is not None else 0)
        self._answers[answer.key_id, request_id] = answer
        while self._answers and (
            len(self._answers) > self.most or self._bytes > MAX_REMEMBERED_BYTES
        ):
            self._bytes -= self._answers.popitem(last=False)[1].size_bytes

    def find(self, request_id: str, key_id: str) -> Remembered:
        """Raises ApiError 404."""
        found = self._answers.get((key_id, request_id))
        if found is None:
            raise ApiError(
                404,
                f"id: got {shown(request_id)}, expected a recent answer of a service type",
                param="id",
            )
        return found


def chat_request(call: Call, conversation: str, options: dict[str, Any]) -> Asked:
    """A chat as a pipeline's request. Raises ApiError."""
    if call.answers != 1:
        raise bad_field("n", call.answers, "1 with a service type other than fixed")
    body = call.body
    system, history, turn = split_chat(body["messages"])
    if not turn:
        raise bad_field("messages", "no user message", "at least one user message")
    params = {name: value for name, value in body.items() if name not in _OWN_FIELDS}
    prompt = "\n".join(chat_texts([one for one in turn if one.get("role") == "user"]))
    request = Request(
        prompt,
        turn=turn,
        system=system,
        history=history,
        conversation=conversation,
        params=params,
        max_tokens=call.cap,
        stream=call.stream,
        bypass=bypass_reason(prompt, turn=turn, params=params),
        needs=frozenset(call.needs()),
    )
    return Asked(call.service_type, request, options)


def read_request(raw: bytes) -> Asked:
    """``request(prompt, service_type, {key: value})``. Raises ApiError naming the field."""
    body = read_object(raw)
    _known(body, _REQUEST_FIELDS)
    prompt = _text(body, "prompt")
    system: tuple[dict[str, str], ...] = ()
    if body.get("system") is not None:
        system = ({"role": "system", "content": _text(body, "system")},)
    params = _object(body, "params")
    _known({f"params.{name}": None for name in params if name in _OWN_FIELDS}, frozenset())
    cap = integer(body, "max_tokens", 1, MAX_TOKENS)
    request = Request(
        prompt,
        system=system,
        conversation=conversation_name(body.get("conversation"), "conversation"),
        params=params,
        max_tokens=cap or None,
        bypass=bypass_reason(prompt, params=params),
    )
    return Asked(_text(body, "service_type"), request, _object(body, "options"))


def read_regenerate(raw: bytes) -> Regenerate:
    """``regenerate(service_type, {key: value})`` of one answer. Raises ApiError."""
    body = read_object(raw)
    _known(body, _REGENERATE_FIELDS)
    service_type = "" if body.get("service_type") is None else _text(body, "service_type")
    return Regenerate(_text(body, "id"), service_type, _object(body, "options"))


def conversation_name(value: object, field: str) -> str:
    """ "" when none is named. Raises ApiError."""
    if value is None:
        return ""
    if not isinstance(value, str) or not _NAME.match(value):
        raise bad_field(field, value, "letters, digits and ._:@+-, at most 128")
    return value


def _known(body: dict[str, Any], names: frozenset[str]) -> None:
    for name in sorted(body):
        if name not in names:
            expected = f"one of {', '.join(sorted(names))}" if names else "nothing there"
            raise bad_field(name[:64], body[name], expected, code="unknown_field")


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value:
        raise bad_field(field, value, "text")
    return value


def _object(body: dict[str, Any], field: str) -> dict[str, Any]:
    value = body.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_field(field, value, "an object")
    return value
