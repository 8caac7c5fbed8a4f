"""OpenAI's /v1/chat/completions, /v1/completions and /v1/embeddings.

What the proxy acts on is checked here; everything else goes to the provider as it came, so that
new fields of the API work on the day they appear. Answers go out as they came, with metadata.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from intentd.proxy.adapter.native import Event, Usage
from intentd.proxy.adapter.sse import DONE, encode_event
from intentd.proxy.call import Call, Exchange
from intentd.proxy.dialects.dialect import Dialect
from intentd.proxy.errors import ApiError, bad_field

MAX_MESSAGES: Final = 10_000
MAX_ANSWERS: Final = 128
MAX_TOKENS: Final = 10**7
MAX_INPUTS: Final = 2048
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
# Where to send a prompt and with whose money is the operator's choice, never the client's.
_FORBIDDEN: Final = frozenset(
    {"api_base", "base_url", "api_key", "api_version", "extra_headers", "custom_llm_provider"}
)
_MEDIA: Final = {"image_url": "images", "input_audio": "audio", "file": "files"}
DONE_EVENT: Final = encode_event(DONE)
EXTENSION_FIELDS: Final = frozenset({"service_type", "conversation", "options"})


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError 400."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        text = str(error).partition("\n")[0][:120]
        raise ApiError(400, f"the body is not JSON: {text}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    if not _FORBIDDEN.isdisjoint(value):
        field = min(_FORBIDDEN & value.keys())
        raise bad_field(field, "(hidden)", "nothing: the operator sets it", code="unknown_field")
    return value


def read_chat(raw: bytes, service_header: str) -> Call:
    """A validated chat request. Raises ApiError naming the field."""
    body = read_object(raw)
    call = _common(body, "/chat/completions", len(raw), service_header)
    messages = body.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise bad_field("messages", messages, f"a list of 1 to {MAX_MESSAGES} messages")
    for index, message in enumerate(messages):
        _check_message(call, message, index)
    call.messages = len(messages)
    for field in ("max_completion_tokens", "max_tokens"):
        if body.get(field) is not None:
            call.cap = integer(body, field, 1, MAX_TOKENS)
            call.cap_field = field
            break
    call.answers = integer(body, "n", 1, MAX_ANSWERS, default=1)
    return call


def read_completion(raw: bytes, service_header: str) -> Call:
    """A request of the older completions API. Raises ApiError."""
    body = read_object(raw)
    call = _common(body, "/completions", len(raw), service_header)
    prompts = _check_inputs(body, "prompt")
    if body.get("max_tokens") is not None:
        call.cap = integer(body, "max_tokens", 1, MAX_TOKENS)
    call.cap_field = "max_tokens"
    call.answers = max(
        integer(body, "n", 1, MAX_ANSWERS, default=1),
        integer(body, "best_of", 1, MAX_ANSWERS, default=1),
    ) * max(prompts, 1)
    return call


def read_embeddings(raw: bytes, service_header: str) -> Call:
    """A request for embeddings. Raises ApiError."""
    body = read_object(raw)
    call = _common(body, "/embeddings", len(raw), service_header)
    _check_inputs(body, "input")
    if call.stream:
        raise bad_field("stream", True, "false: embeddings do not stream")
    call.answers = 0
    return call


class ChatRenderer:
    """Chunks as they came; the metadata in the usage chunk, where one is wanted."""

    def __init__(self, call: Call, exchange: Exchange) -> None:
        self._call = call
        self._exchange = exchange

    def begin(self) -> bytes:
        return b""

    def chunk(self, event: Event) -> bytes:
        return event.raw + b"\n\n"

    def end(self, usage: Usage, last: Event | None) -> bytes:
        return chat_end(self._call, self._exchange, last)

    def broken(self, error: ApiError) -> bytes:
        """No [DONE] follows."""
        return encode_event(orjson.dumps(error.document()))


def chat_end(call: Call, exchange: Exchange, last: Event | None) -> bytes:
    """[DONE], with the usage chunk before it if the client asked for one."""
    if not call.wants_usage:
        return DONE_EVENT
    value = last.value if last is not None else None
    if value is None:
        value = {
            "id": exchange.request_id,
            "object": "chat.completion.chunk",
            "created": int(exchange.wall_s),
            "model": exchange.model,
            "choices": [],
            "usage": None,  # the provider told none; the metadata say what was booked
        }
    document = {**value, "intentd": exchange.document()}
    return encode_event(orjson.dumps(document)) + DONE_EVENT


def _chat_document(
    value: dict[str, Any], _usage: Usage, _call: Call, exchange: Exchange
) -> dict[str, Any]:
    return {**value, "intentd": exchange.document()}


CHAT: Final = Dialect(ChatRenderer, _chat_document, ApiError.document)


def integer(body: dict[str, Any], field: str, low: int, high: int, default: int = 0) -> int:
    """An integer field within bounds; absent or null: the default. Raises ApiError."""
    value = body.get(field)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise bad_field(field, value, f"an integer of {low} to {high}")
    return value


def _common(body: dict[str, Any], path: str, size_bytes: int, service_header: str) -> Call:
    model = body.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= 256:
        raise bad_field("model", model, "the name of a model")
    stream = body.get("stream", False)
    if stream is not None and not isinstance(stream, bool):
        raise bad_field("stream", stream, "true or false")
    options = body.get("stream_options")
    wants_usage = False
    if options is not None:
        if not isinstance(options, dict):
            raise bad_field("stream_options", options, "an object")
        if not stream:
            raise bad_field("stream_options", options, "it only with stream: true")
        wants_usage = options.get("include_usage") is True
    extension: dict[str, Any] = {}
    return Call(
        path,
        body,
        model,
        _service_type(body, service_header, extension),
        extension=extension,
        stream=bool(stream),
        wants_usage=wants_usage,
        size_bytes=size_bytes,
    )


def _service_type(body: dict[str, Any], header: str, call_extension: dict[str, Any]) -> str:
    """From the body (service_type, or intentd.service_type), else the header; "" when neither."""
    if "intentd" in body:
        extension = body.pop("intentd")
        if not isinstance(extension, dict):
            raise bad_field("intentd", extension, "an object")
        unknown = sorted(name for name in extension if name not in EXTENSION_FIELDS)
        if unknown:
            raise bad_field(f"intentd.{unknown[0][:64]}", extension[unknown[0]], "no such field")
        call_extension.update(extension)
        if "service_type" in extension:
            return _name(extension["service_type"], "intentd.service_type")
    if "service_type" in body:
        return _name(body.pop("service_type"), "service_type")
    return header


def _name(value: object, field: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 128:
        raise bad_field(field, value, "the name of a service type")
    return value


def _check_message(call: Call, message: object, index: int) -> None:
    if not isinstance(message, dict):
        raise bad_field(f"messages[{index}]", message, "an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_field(f"messages[{index}].role", role, f"one of {', '.join(sorted(_ROLES))}")
    content = message.get("content")
    if isinstance(content, str):
        return
    if isinstance(content, list):
        for place, part in enumerate(content):
            _check_part(call, part, f"messages[{index}].content[{place}]")
        return
    if content is not None or role in ("system", "developer", "user"):
        raise bad_field(f"messages[{index}].content", content, "text or a list of parts")


def _check_part(call: Call, part: object, where: str) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise bad_field(where, part, "an object with a type")
    if part["type"] in ("text", "refusal"):
        if not isinstance(part.get(part["type"]), str):
            raise bad_field(f"{where}.{part['type']}", part.get(part["type"]), "text")
        return
    kind = str(part["type"])
    call.media |= {_MEDIA.get(kind, kind)}
    call.images += 1  # its bytes are not text: it counts as the model's image_tokens
    call.size_bytes = max(0, call.size_bytes - _data_bytes(part))


def _data_bytes(part: dict[str, Any]) -> int:
    inner = part.get(part["type"])
    if not isinstance(inner, dict):
        return 0
    return sum(
        len(inner[name]) for name in ("url", "data", "file_data")
        if isinstance(inner.get(name), str)
    )  # fmt: skip


def _check_inputs(body: dict[str, Any], field: str) -> int:
    """How many texts a prompt or input holds: text, texts, tokens or lists of tokens."""
    value = body.get(field)
    if isinstance(value, str):
        return 1
    if not isinstance(value, list) or not value:
        raise bad_field(field, value, "text or a list of texts")
    if all(type(item) is int for item in value):
        return 1
    if len(value) > MAX_INPUTS:
        raise bad_field(field, value, f"at most {MAX_INPUTS} texts")
    for index, item in enumerate(value):
        tokens = isinstance(item, list) and all(type(number) is int for number in item)
        if not isinstance(item, str) and not tokens:
            raise bad_field(f"{field}[{index}]", item, "text or a list of tokens")
    return len(value)
