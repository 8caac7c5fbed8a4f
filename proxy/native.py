"""Requests as the dissertation's table 4.2 has them, and chats that name a service type: readers.

Both become one pipeline request, and so do chats that passed as they are, once they are asked for
again. What is remembered for ``regenerate`` lives in memory, bounded; a restart forgets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from intentd.core.prompts.cache.bypass import bypass_reason
from intentd.core.prompts.context import chat_texts, split_chat
from intentd.core.prompts.pipeline import Request
from intentd.proxy.call import Call
from intentd.proxy.dialects.openai_chat import MAX_TOKENS, integer, read_object
from intentd.proxy.errors import ApiError, bad_field, shown
from intentd.proxy.service import FIXED

CONVERSATION_HEADER: Final = "X-Intentd-Conversation"
MAX_REMEMBERED_BYTES: Final = 64 << 20
MAX_PASSED_BYTES: Final = 16 << 20
MAX_PASSED_BODY_BYTES: Final = 1 << 20
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
    """What regenerate needs to know of a turn: what was asked last, and all that answered it.

    ids, models: of its answers, oldest first; every id leads to the turn. cached: the newest one
    was a stored one. sequence: the turn's place in its conversation. joined: it is in there.
    passed: a chat that no service type has worked on yet.
    """

    key_id: str
    asked: Asked
    ids: tuple[str, ...]
    models: tuple[str, ...]
    cached: bool = False
    sequence: int = 0
    joined: bool = False
    passed: bool = False

    @property
    def size_bytes(self) -> int:
        """Of everything it keeps alive, about: texts, images, tools, schemas, options."""
        asked, request = self.asked, self.asked.request
        return FLAT_BYTES + (
            held_bytes((request.prompt, request.turn, request.system, request.params))
            + held_bytes((asked.options, self.ids, self.models))
            + sum(held_bytes((m.prompt, m.response, m.chat)) for m in request.history)
        )


FLAT_BYTES: Final = 1000  # the objects themselves
_NODE_BYTES: Final = 100


def held_bytes(value: Any) -> int:
    """What a value read from JSON holds of memory, about."""
    total, rest = 0, [value]
    while rest:
        one = rest.pop()
        total += _NODE_BYTES
        if isinstance(one, str):
            total += len(one) if one.isascii() else 4 * len(one)
        elif isinstance(one, Mapping):
            rest += one.keys()
            rest += one.values()
        elif isinstance(one, (list, tuple)):
            rest += one
    return total


Reader = Callable[[bytes, str], Call]


class Memory:
    """The last turns by the ids of their answers, bounded in number and bytes; the oldest go
    first. Of chats that passed as they are only the body is held, and read when it is needed."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._turns: OrderedDict[str, tuple[Remembered, int]] = OrderedDict()
        self._turn_of: dict[str, str] = {}  # the first answer's id, by that of each
        self._working: dict[str, tuple[asyncio.Lock, int]] = {}
        self.size_bytes = 0
        self._passed: OrderedDict[str, tuple[str, str, bytes, Reader]] = OrderedDict()
        self.passed_bytes = 0

    def keep_passed(
        self, request_id: str, key_id: str, model: str, raw: bytes, read: Reader
    ) -> None:
        """raw: the body, not copied. read: makes a call of it. Larger bodies are not held."""
        size_bytes = len(raw)
        if size_bytes > MAX_PASSED_BODY_BYTES:
            return
        passed = self._passed
        passed[request_id] = (key_id, model, raw, read)
        self.passed_bytes += size_bytes + FLAT_BYTES
        while len(passed) > self.most or self.passed_bytes > MAX_PASSED_BYTES:
            oldest = passed.popitem(last=False)[1]
            self.passed_bytes -= len(oldest[2]) + FLAT_BYTES

    def _read_passed(self, request_id: str, key_id: str) -> None:
        """Make a turn of a chat that passed. Raises ApiError for one no service type takes."""
        found = self._passed.get(request_id)
        if found is None or found[0] != key_id:
            return
        _, model, raw, read = found
        call = read(raw, "")
        call.service_type = FIXED
        asked = chat_request(call, "", {"model": call.model})
        del self._passed[request_id]
        self.passed_bytes -= len(raw) + FLAT_BYTES
        self.keep(Remembered(key_id, asked, (request_id,), (model,), passed=True))

    def keep(self, turn: Remembered) -> None:
        first, size_bytes = turn.ids[0], turn.size_bytes
        self._drop(first)
        self._turns[first] = (turn, size_bytes)
        self._turn_of.update(dict.fromkeys(turn.ids, first))
        self.size_bytes += size_bytes
        while self._turns and (
            len(self._turns) > self.most or self.size_bytes > MAX_REMEMBERED_BYTES
        ):
            self._drop(next(iter(self._turns)))

    def _drop(self, first: str) -> None:
        known = self._turns.pop(first, None)
        if known is not None:
            self.size_bytes -= known[1]
            for name in known[0].ids:
                self._turn_of.pop(name, None)

    @contextlib.asynccontextmanager
    async def alone(self, request_id: str, key_id: str, wait_s: float) -> AsyncIterator[Remembered]:
        """The turn of an answer, while nobody else answers it again. Raises ApiError: 404, and
        409 when that takes too long."""
        first = self.find(request_id, key_id).ids[0]
        lock, users = self._working.get(first, (asyncio.Lock(), 0))
        self._working[first] = (lock, users + 1)
        try:
            try:
                async with asyncio.timeout(wait_s):
                    await lock.acquire()
            except TimeoutError:
                raise ApiError(
                    409, "this answer is being regenerated, and that takes long", retry_after_s=1
                ) from None
            try:
                yield self.find(request_id, key_id)
            finally:
                lock.release()
        finally:
            lock, users = self._working.pop(first)
            if users > 1:
                self._working[first] = (lock, users - 1)

    def find(self, request_id: str, key_id: str) -> Remembered:
        """Raises ApiError 404."""
        self._read_passed(request_id, key_id)
        found, _ = self._turns.get(self._turn_of.get(request_id, ""), (None, 0))
        if found is None or found.key_id != key_id:
            raise ApiError(
                404,
                f"id: got {shown(request_id)}, expected a recent answer of a chat or /v1/request",
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
