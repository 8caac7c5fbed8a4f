"""OpenAI's /v1/responses on models that speak chat: requests in.

Messages, images, function tools and their results are translated; hosted tools, prompt templates
and what else has no counterpart is refused by name rather than dropped. Answers: responses_out.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any, Final

import orjson

from intentd.proxy.call import Call
from intentd.proxy.dialects.openai_chat import MAX_TOKENS, integer, read_chat, read_object
from intentd.proxy.errors import ApiError, bad_field, shown

_SAME: Final = (
    "model", "temperature", "top_p", "stream", "service_type", "intentd", "parallel_tool_calls",
    "user", "service_tier", "prompt_cache_key", "safety_identifier",
)  # fmt: skip
# Wishes that change nothing here: metadata are given back, the window is fitted by service types.
_IGNORED: Final = frozenset({"metadata", "truncation", "stream_options", "background"})
_READ: Final = frozenset(
    {"input", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "reasoning",
     "top_logprobs", "include", "store", "previous_response_id", "conversation"}
)  # fmt: skip
_ECHOED: Final = (
    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "previous_response_id",
    "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user",
    "reasoning",
)  # fmt: skip
_INCLUDED: Final = frozenset({"reasoning.encrypted_content", "message.output_text.logprobs"})
_ROLES: Final = frozenset({"user", "assistant", "system", "developer"})
_ID: Final = re.compile(r"resp_([0-9a-f]{24})_(.{1,128})\Z", re.DOTALL)
_NAMED: Final = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")


@dataclass(frozen=True, slots=True)
class ResponseId:
    """Which answer of which kept conversation: ``resp_<24 hex digits>_<request id>``."""

    root: str
    request_id: str

    def __str__(self) -> str:
        return f"resp_{self.root}_{self.request_id}"

    @property
    def conversation(self) -> str:
        return f"resp-{self.root}"

    @classmethod
    def new(cls, request_id: str) -> ResponseId:
        return cls(secrets.token_hex(12), request_id)

    @classmethod
    def read(cls, value: object, field: str) -> ResponseId:
        """Raises ApiError 404 for what is no id of a response."""
        found = _ID.match(value) if isinstance(value, str) else None
        if found is None:
            raise unknown_response(value, field)
        return cls(found[1], found[2])


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """previous: the answer it goes on from. conversation: named by the client, "" for none."""

    call: Call
    previous: ResponseId | None
    store: bool
    conversation: object


def unknown_response(value: object, field: str) -> ApiError:
    return ApiError(
        404,
        f"{field}: got {shown(value)}, expected the id of a response this key had stored",
        param=field,
        code="previous_response_not_found" if field == "previous_response_id" else None,
    )


def read_responses(raw: bytes, service_header: str) -> ResponsesRequest:
    """A validated request, translated. Raises ApiError naming the field."""
    given = read_object(raw)
    for name in sorted(given):
        if name not in _READ and name not in _SAME and name not in _IGNORED:
            if given[name] is None:
                continue
            raise bad_field(name[:64], given[name], "nothing: it has no counterpart")
    if given.get("background"):
        raise bad_field("background", True, "false: answers come while the client waits")
    body = {name: given[name] for name in _SAME if given.get(name) is not None}
    body["messages"] = [
        *_instructions(given.get("instructions")),
        *read_input(given.get("input")),
    ]
    body |= _tools(given.get("tools"))
    if given.get("tool_choice") is not None:
        body["tool_choice"] = _tool_choice(given["tool_choice"])
    body |= _text(given.get("text"))
    body |= _reasoning(given.get("reasoning"))
    body |= _logprobs(given)
    store = given.get("store")
    if store is not None and not isinstance(store, bool):
        raise bad_field("store", store, "true or false")
    previous = None
    if given.get("previous_response_id") is not None:
        if given.get("conversation") is not None:
            raise bad_field(
                "conversation", given["conversation"], "no conversation with previous_response_id"
            )
        previous = ResponseId.read(given["previous_response_id"], "previous_response_id")
    call = read_chat(orjson.dumps(body), service_header)
    cap = integer(given, "max_output_tokens", 1, MAX_TOKENS)
    call.cap = cap or None
    call.wants_usage = True
    call.echo = {name: given[name] for name in _ECHOED if given.get(name) is not None}
    call.echo["store"] = store is not False
    conversation = given.get("conversation")
    if isinstance(conversation, dict):
        conversation = conversation.get("id", conversation)
    return ResponsesRequest(call, previous, store is not False, conversation)


def read_input(value: object) -> list[dict[str, Any]]:
    """Chat messages of an input: text, or a list of items. Raises ApiError."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise bad_field("input", value, "text or a list of items")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(value):
        where = f"input[{index}]"
        if not isinstance(item, dict):
            raise bad_field(where, item, "an object")
        kind = item.get("type", "message")
        if kind == "message":
            messages.append(_message(item, where))
        elif kind == "function_call":
            _add_call(messages, item, where)
        elif kind == "function_call_output":
            text = _plain(item.get("output"), f"{where}.output")
            call_id = _string(item.get("call_id"), f"{where}.call_id")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        elif kind != "reasoning":  # what a model thought before means nothing to another one
            raise bad_field(
                f"{where}.type", kind, "message, function_call, function_call_output or reasoning"
            )
    if not messages:
        raise bad_field("input", value, "at least one message")
    return messages


def _instructions(value: object) -> list[dict[str, Any]]:
    if value is None:
        return []
    return [{"role": "system", "content": _plain(value, "instructions")}]


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_field(f"{where}.role", role, f"one of {', '.join(sorted(_ROLES))}")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list) or not content:
        raise bad_field(f"{where}.content", content, "text or a list of parts")
    if role != "user":
        return {"role": role, "content": _plain(content, f"{where}.content")}
    parts = [_part(part, f"{where}.content[{place}]") for place, part in enumerate(content)]
    return {"role": role, "content": parts}


def _part(part: object, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise bad_field(where, part, "an object with a type")
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": _string(part.get("text"), f"{where}.text")}
    if kind == "input_image":
        image: dict[str, Any] = {"url": _string(part.get("image_url"), f"{where}.image_url")}
        if part.get("detail") is not None:
            image["detail"] = part["detail"]
        return {"type": "image_url", "image_url": image}
    if kind == "input_file":
        data = _string(part.get("file_data"), f"{where}.file_data")
        file = {"file_data": data, "filename": part.get("filename") or "file"}
        return {"type": "file", "file": file}
    if kind == "input_audio" and isinstance(part.get("input_audio"), dict):
        return {"type": "input_audio", "input_audio": part["input_audio"]}
    raise bad_field(f"{where}.type", kind, "input_text, input_image, input_file or input_audio")


def _plain(value: object, where: str) -> str:
    """Text, or the text of a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_field(where, value, "text or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        texts.append(_string(text, f"{where}[{index}].text"))
    return "".join(texts)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise bad_field(where, value, "text")
    return value


def _add_call(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """Chat has the calls of one turn in one message, with the text that came before them."""
    call = {
        "id": _string(item.get("call_id"), f"{where}.call_id"),
        "type": "function",
        "function": {
            "name": _string(item.get("name"), f"{where}.name"),
            "arguments": _string(item.get("arguments"), f"{where}.arguments"),
        },
    }
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _tools(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, list):
        raise bad_field("tools", value, "a list of tools")
    tools = []
    for index, tool in enumerate(value):
        where = f"tools[{index}]"
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(tool, dict) or kind != "function":
            raise bad_field(f"{where}.type", kind, "function: other tools are the provider's own")
        name = tool.get("name")
        if not isinstance(name, str) or not _NAMED.match(name):
            raise bad_field(f"{where}.name", name, "letters, digits, _ and -, at most 128")
        function = {
            field: tool[field]
            for field in ("name", "description", "parameters", "strict")
            if tool.get(field) is not None
        }
        tools.append({"type": "function", "function": function})
    return {"tools": tools} if tools else {}


def _tool_choice(value: object) -> Any:
    if value in ("auto", "none", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        name = _string(value.get("name"), "tool_choice.name")
        return {"type": "function", "function": {"name": name}}
    raise bad_field("tool_choice", value, "auto, none, required or a function")


def _text(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_field("text", value, "an object")
    made: dict[str, Any] = {}
    if value.get("verbosity") is not None:
        made["verbosity"] = value["verbosity"]
    form = value.get("format")
    kind = form.get("type") if isinstance(form, dict) else None
    if form is None or kind == "text":
        return made
    if isinstance(form, dict) and kind == "json_object":
        return {**made, "response_format": {"type": "json_object"}}
    if isinstance(form, dict) and kind == "json_schema":
        schema = {
            field: form[field]
            for field in ("name", "description", "schema", "strict")
            if form.get(field) is not None
        }
        return {**made, "response_format": {"type": "json_schema", "json_schema": schema}}
    raise bad_field("text.format", kind or form, "text, json_object or json_schema")


def _reasoning(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_field("reasoning", value, "an object")
    return {} if value.get("effort") is None else {"reasoning_effort": value["effort"]}


def _logprobs(given: dict[str, Any]) -> dict[str, Any]:
    included = given.get("include")
    if included is not None and not isinstance(included, list):
        raise bad_field("include", included, "a list")
    for index, name in enumerate(included or ()):
        if not isinstance(name, str) or name not in _INCLUDED:
            raise bad_field(f"include[{index}]", name, f"one of {', '.join(sorted(_INCLUDED))}")
    most = integer(given, "top_logprobs", 0, 20)
    if most:
        return {"logprobs": True, "top_logprobs": most}
    wanted = "message.output_text.logprobs" in (included or ())
    return {"logprobs": True} if wanted else {}
