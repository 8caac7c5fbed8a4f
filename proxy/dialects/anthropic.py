"""Anthropic's /v1/messages on models that speak OpenAI's chat: requests in, answers out.

Text, images, tools and their results are translated both ways. What has no counterpart (top_k,
thinking, citations) is refused by name rather than dropped; but for hints that change no answer:
metadata, service_tier, and cache_control, whose counterpart providers of OpenAI's API do unasked.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from intentd.proxy.adapter.native import Event, Usage
from intentd.proxy.adapter.sse import encode_event
from intentd.proxy.call import Call, Exchange
from intentd.proxy.dialects.dialect import Dialect
from intentd.proxy.dialects.openai_chat import MAX_TOKENS, integer, read_chat, read_object
from intentd.proxy.errors import ApiError, bad_field

_SAME: Final = ("model", "temperature", "top_p", "stream", "service_type", "intentd")
_IGNORED: Final = frozenset({"metadata", "service_tier"})
_KNOWN: Final = frozenset(
    {*_SAME, *_IGNORED, "max_tokens", "messages", "system", "stop_sequences", "tools",
     "tool_choice"}
)  # fmt: skip
_STOP_REASONS: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_ERROR_TYPES: Final = frozenset(
    {"invalid_request_error", "authentication_error", "permission_error", "not_found_error",
     "rate_limit_error"}
)  # fmt: skip


def read_messages(raw: bytes, service_header: str) -> Call:
    """A validated request, translated. Raises ApiError naming the field."""
    given = read_object(raw)
    if given.get("max_tokens") is None:
        raise bad_field("max_tokens", None, "a count > 0")
    call = _translated(given, service_header)
    call.cap = integer(given, "max_tokens", 1, MAX_TOKENS)
    return call


def read_count(raw: bytes, service_header: str) -> Call:
    """A request of /v1/messages/count_tokens: a message nobody wants answered."""
    given = read_object(raw)
    for name in ("max_tokens", "stream", "temperature", "stop_sequences"):
        if given.get(name) is not None:
            raise bad_field(name, given[name], "nothing: only tokens are counted")
    return _translated(given, service_header)


def _translated(given: dict[str, Any], service_header: str) -> Call:
    for name in sorted(given):
        if name not in _KNOWN:
            raise bad_field(name[:64], given[name], "nothing: it has no counterpart")
    body: dict[str, Any] = {name: given[name] for name in _SAME if name in given}
    body["messages"] = [*_system(given.get("system")), *_messages(given.get("messages"))]
    if given.get("stop_sequences"):
        body["stop"] = given["stop_sequences"]
    if given.get("tools"):
        body["tools"] = _tools(given["tools"])
    if given.get("tool_choice") is not None:
        body |= _tool_choice(given["tool_choice"])
    call = read_chat(orjson.dumps(body), service_header)
    call.wants_usage = True
    return call


def error_document(error: ApiError) -> dict[str, Any]:
    kind = error.kind if error.kind in _ERROR_TYPES else "api_error"
    if error.status == 413:
        kind = "request_too_large"
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def message_document(
    value: dict[str, Any], usage: Usage, _call: Call, exchange: Exchange
) -> dict[str, Any]:
    """A chat completion as a message. Raises ApiError 502 for one without a choice."""
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise ApiError(502, "the answer holds no choice", code="upstream_garbage")
    content: list[dict[str, Any]] = []
    if isinstance(message.get("content"), str) and message["content"]:
        content.append({"type": "text", "text": message["content"]})
    for tool in message.get("tool_calls") or ():
        content.append(_tool_use(tool))
    return {
        "id": f"msg_{exchange.request_id}",
        "type": "message",
        "role": "assistant",
        "model": exchange.model,
        "content": content,
        "stop_reason": _STOP_REASONS.get(str(choice.get("finish_reason")), "end_turn"),
        "stop_sequence": None,
        "usage": _usage(usage),
        "intentd": exchange.document(),
    }


class MessageRenderer:
    """A chat's stream as a message's."""

    def __init__(self, call: Call, exchange: Exchange) -> None:
        self._exchange = exchange
        self._open = ""  # kind of the block under way: text, or a tool's index
        self._blocks = 0
        self._stop_reason = "end_turn"

    def begin(self) -> bytes:
        message: dict[str, Any] = {
            "id": f"msg_{self._exchange.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._exchange.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }
        return _event("message_start", {"type": "message_start", "message": message})

    def chunk(self, event: Event) -> bytes:
        choices = event.value.get("choices") if event.value is not None else None
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            return b"".join(self._choice(choices[0]))
        return b""

    def end(self, usage: Usage, last: Event | None) -> bytes:
        document = {
            "type": "message_delta",
            "delta": {"stop_reason": self._stop_reason, "stop_sequence": None},
            "usage": _usage(usage),
            "intentd": self._exchange.document(),
        }
        return b"".join(
            (
                *self._close(),
                _event("message_delta", document),
                _event("message_stop", {"type": "message_stop"}),
            )
        )

    def broken(self, error: ApiError) -> bytes:
        return _event("error", error_document(error))

    def _choice(self, choice: dict[str, Any]) -> list[bytes]:
        out: list[bytes] = []
        delta = choice.get("delta")
        if isinstance(delta, dict):
            text = delta.get("content")
            if isinstance(text, str) and text:
                out += self._block("text", {"type": "text", "text": ""})
                out.append(self._delta({"type": "text_delta", "text": text}))
            for tool in delta.get("tool_calls") or ():
                out += self._tool(tool)
        if choice.get("finish_reason") is not None:
            self._stop_reason = _STOP_REASONS.get(str(choice["finish_reason"]), "end_turn")
        return out

    def _tool(self, tool: dict[str, Any]) -> list[bytes]:
        function = tool.get("function") or {}
        kind = f"tool {tool.get('index', 0)}"
        start: dict[str, Any] = {"type": "tool_use", "id": tool.get("id") or kind, "input": {}}
        out = self._block(kind, {**start, "name": function.get("name") or ""})
        if function.get("arguments"):
            part = {"type": "input_json_delta", "partial_json": function["arguments"]}
            out.append(self._delta(part))
        return out

    def _block(self, kind: str, start: dict[str, Any]) -> list[bytes]:
        if self._open == kind:
            return []
        out = self._close()
        self._open = kind
        document = {
            "type": "content_block_start", "index": self._blocks, "content_block": start,
        }  # fmt: skip
        return [*out, _event("content_block_start", document)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        document = {"type": "content_block_delta", "index": self._blocks, "delta": delta}
        return _event("content_block_delta", document)

    def _close(self) -> list[bytes]:
        if not self._open:
            return []
        self._open = ""
        document = {"type": "content_block_stop", "index": self._blocks}
        self._blocks += 1
        return [_event("content_block_stop", document)]


MESSAGES: Final = Dialect(MessageRenderer, message_document, error_document)


def _event(name: str, document: dict[str, Any]) -> bytes:
    return encode_event(orjson.dumps(document), name.encode())


def _usage(usage: Usage) -> dict[str, int]:
    # Anthropic counts what its cache served apart from the input; OpenAI as a part of it.
    return {
        "input_tokens": usage.in_tokens - usage.cached_in_tokens,
        "cache_read_input_tokens": usage.cached_in_tokens,
        "output_tokens": usage.out_tokens,
    }


def _tool_use(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise ApiError(502, "the answer holds a broken tool call", code="upstream_garbage")
    try:
        given = orjson.loads(function.get("arguments") or b"{}")
    except orjson.JSONDecodeError:
        raise ApiError(
            502, "the answer holds a tool call that is not JSON", code="upstream_garbage"
        ) from None
    name = function.get("name")
    return {"type": "tool_use", "id": tool.get("id"), "name": name, "input": given}


def _system(value: object) -> list[dict[str, Any]]:
    if value is None:
        return []
    return [{"role": "system", "content": _texts(value, "system")}]


def _texts(value: object, where: str) -> str:
    """Text, or the text of a list of text blocks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_field(where, value, "text or a list of text blocks")
    parts = []
    for index, block in enumerate(value):
        if not isinstance(block, dict) or not isinstance(block.get("text"), str):
            raise bad_field(f"{where}[{index}]", block, "a block of type text")
        parts.append(block["text"])
    return "\n\n".join(parts)


def _messages(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise bad_field("messages", value, "a list of messages")
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise bad_field(where, message, "an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise bad_field(f"{where}.role", role, "user or assistant")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif isinstance(content, list) and content:
            blocks = _assistant if role == "assistant" else _user
            messages += blocks(content, f"{where}.content")
        else:
            raise bad_field(f"{where}.content", content, "text or a list of blocks")
    return messages


def _user(content: list[Any], where: str) -> list[dict[str, Any]]:
    """Tool results become messages of their own, before what else the user says."""
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        path = f"{where}[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            parts.append({"type": "text", "text": block.get("text")})
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _image(block, path)}})
        elif kind == "tool_result":
            text = _texts(block.get("content") or "", f"{path}.content")
            messages.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}
            )
        else:
            raise bad_field(f"{path}.type", kind, "text, image or tool_result")
    return [*messages, {"role": "user", "content": parts}] if parts else messages


def _assistant(content: list[Any], where: str) -> list[dict[str, Any]]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "tool_use":
            arguments = orjson.dumps(block.get("input") or {}).decode()
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        else:
            raise bad_field(f"{where}[{index}].type", kind, "text or tool_use")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or None}
    if calls:
        message["tool_calls"] = calls
    return [message]


def _image(block: dict[str, Any], where: str) -> str:
    source = block.get("source")
    if isinstance(source, dict):
        if source.get("type") == "url" and isinstance(source.get("url"), str):
            return str(source["url"])
        if source.get("type") == "base64" and isinstance(source.get("data"), str):
            return f"data:{source.get('media_type', 'image/png')};base64,{source['data']}"
    raise bad_field(f"{where}.source", source, "a base64 or url source")


def _tools(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise bad_field("tools", value, "a list of tools")
    tools = []
    for index, tool in enumerate(value):
        if not isinstance(tool, dict) or not isinstance(tool.get("input_schema"), dict):
            raise bad_field(f"tools[{index}]", tool, "a tool with name and input_schema")
        function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        tools.append({"type": "function", "function": function})
    return tools


def _tool_choice(value: object) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    kind = kind if isinstance(kind, str) else ""
    choices: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    made: dict[str, Any] = {}
    if isinstance(value, dict) and kind == "tool":
        made["tool_choice"] = {"type": "function", "function": {"name": value.get("name")}}
    elif isinstance(value, dict) and kind in choices:
        made["tool_choice"] = choices[kind]
    else:
        raise bad_field("tool_choice", value, "an object of type auto, any, tool or none")
    if value.get("disable_parallel_tool_use"):
        made["parallel_tool_calls"] = False
    return made
