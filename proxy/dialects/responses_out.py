"""OpenAI's /v1/responses on models that speak chat: answers and streams out."""

from __future__ import annotations

from typing import Any, Final

import orjson

from intentd.proxy.adapter.native import Event, Usage
from intentd.proxy.adapter.sse import encode_event
from intentd.proxy.call import Call, Exchange
from intentd.proxy.dialects.dialect import Dialect
from intentd.proxy.errors import ApiError

_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}
_DEFAULTS: Final[dict[str, Any]] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}


def response_base(call: Call, exchange: Exchange) -> dict[str, Any]:
    """What every response says, answered or not."""
    return {
        "id": call.answer_id or f"resp_{exchange.request_id}",
        "object": "response",
        "created_at": int(exchange.wall_s),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": exchange.model,
        "output": [],
        "usage": None,
        **_DEFAULTS,
        **call.echo,
    }


def output_items(message: dict[str, Any], name: str, logprobs: object = None) -> list[Any]:
    """The items of a chat's message. name: makes their ids. Raises ApiError 502."""
    items: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    if isinstance(message.get("content"), str) and message["content"]:
        part = text_part(message["content"])
        if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
            part["logprobs"] = logprobs["content"]
        parts.append(part)
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        parts.append({"type": "refusal", "refusal": message["refusal"]})
    tools = message.get("tool_calls") or ()
    if parts or not tools:
        items.append(message_item(f"msg_{name}", parts or [text_part("")], "completed"))
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise ApiError(502, "the answer holds a broken tool call", code="upstream_garbage")
        items.append(
            call_item(
                f"fc_{name}_{place}",
                str(tool.get("id") or f"call_{place}"),
                str(function.get("name") or ""),
                str(function.get("arguments") or ""),
                "completed",
            )
        )
    return items


def response_document(
    value: dict[str, Any], usage: Usage, call: Call, exchange: Exchange
) -> dict[str, Any]:
    """A chat completion as a response. Raises ApiError 502 for one without a choice."""
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise ApiError(502, "the answer holds no choice", code="upstream_garbage")
    base = response_base(call, exchange)
    name = exchange.request_id
    return {
        **base,
        **_status(str(choice.get("finish_reason") or "stop")),
        "output": output_items(message, name, choice.get("logprobs")),
        "usage": _usage(usage),
        "intentd": exchange.document(),
    }


class ResponseRenderer:
    """A chat's stream as a response's events."""

    def __init__(self, call: Call, exchange: Exchange) -> None:
        self._call = call
        self._exchange = exchange
        self._number = 0
        self._finish_reason = "stop"
        self._output: list[dict[str, Any]] = []
        self._message = -1  # place in the output of the message that is open
        self._part = ""  # kind of its part that is open
        self._tools: dict[int, int] = {}  # index of a call in the chat: place in the output

    def begin(self) -> bytes:
        base = response_base(self._call, self._exchange)
        return self._event("response.created", response=base) + self._event(
            "response.in_progress", response=base
        )

    def chunk(self, event: Event) -> bytes:
        choices = event.value.get("choices") if event.value is not None else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return b""
        self._finish_reason = str(choice.get("finish_reason") or self._finish_reason)
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return b""
        out: list[bytes] = []
        for field, kind in (("content", "output_text"), ("refusal", "refusal")):
            if isinstance(delta.get(field), str) and delta[field]:
                out += self._text(kind, delta[field])
        tools = delta.get("tool_calls")
        for tool in tools if isinstance(tools, list) else ():
            if isinstance(tool, dict):
                out += self._tool(tool)
        return b"".join(out)

    def end(self, usage: Usage, last: Event | None) -> bytes:
        out = [] if self._output else self._open_message("output_text")
        out += self._close_message()
        for place in self._tools.values():
            out += self._close_call(place)
        status = _status(self._finish_reason)
        response = {
            **response_base(self._call, self._exchange),
            **status,
            "output": self._output,
            "usage": _usage(usage),
            "intentd": self._exchange.document(),
        }
        out.append(self._event(f"response.{status['status']}", response=response))
        return b"".join(out)

    def broken(self, error: ApiError) -> bytes:
        response = {
            **response_base(self._call, self._exchange),
            "status": "failed",
            "output": self._output,
            "error": {"code": "server_error", "message": str(error)},
        }
        return self._event(
            "error", code=error.code, message=str(error), param=error.param
        ) + self._event("response.failed", response=response)

    # -- inside --------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> bytes:
        document = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return encode_event(orjson.dumps(document), kind.encode())

    def _text(self, kind: str, text: str) -> list[bytes]:
        out = self._open_message(kind)
        item = self._output[self._message]
        part = item["content"][-1]
        part["text" if kind == "output_text" else "refusal"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        out.append(self._event(f"response.{kind}.delta", **self._at(item), delta=text, **more))
        return out

    def _at(self, item: dict[str, Any]) -> dict[str, Any]:
        return {
            "item_id": item["id"],
            "output_index": self._message,
            "content_index": len(item["content"]) - 1,
        }

    def _open_message(self, kind: str) -> list[bytes]:
        out: list[bytes] = []
        if self._message < 0:
            name = f"msg_{self._exchange.request_id}_{len(self._output)}"
            item = message_item(name, [], "in_progress")
            out.append(
                self._event("response.output_item.added", output_index=len(self._output), item=item)
            )
            self._message = len(self._output)
            self._output.append(item)
        if self._part != kind:
            out += self._close_part()
            self._part = kind
            item = self._output[self._message]
            part = text_part("") if kind == "output_text" else {"type": kind, "refusal": ""}
            item["content"].append(part)
            out.append(self._event("response.content_part.added", **self._at(item), part=part))
        return out

    def _close_part(self) -> list[bytes]:
        if not self._part:
            return []
        item = self._output[self._message]
        part = item["content"][-1]
        field = "text" if self._part == "output_text" else "refusal"
        more: dict[str, Any] = {"logprobs": []} if field == "text" else {}
        at, kind = self._at(item), self._part
        self._part = ""
        return [
            self._event(f"response.{kind}.done", **at, **{field: part[field]}, **more),
            self._event("response.content_part.done", **at, part=part),
        ]

    def _close_message(self) -> list[bytes]:
        if self._message < 0:
            return []
        out = self._close_part()
        item = self._output[self._message]
        item["status"] = "completed"
        out.append(self._event("response.output_item.done", output_index=self._message, item=item))
        self._message = -1
        return out

    def _tool(self, tool: dict[str, Any]) -> list[bytes]:
        out: list[bytes] = []
        index = tool.get("index")
        index = index if isinstance(index, int) else 0
        function = tool.get("function")
        function = function if isinstance(function, dict) else {}
        place = self._tools.get(index)
        if place is None:
            out += self._close_message()
            place = self._tools[index] = len(self._output)
            call_id = str(tool.get("id") or f"call_{index}")
            name = f"fc_{self._exchange.request_id}_{place}"
            item = call_item(name, call_id, str(function.get("name") or ""), "", "in_progress")
            self._output.append(item)
            out.append(self._event("response.output_item.added", output_index=place, item=item))
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            item = self._output[place]
            item["arguments"] += arguments
            out.append(
                self._event(
                    "response.function_call_arguments.delta",
                    item_id=item["id"],
                    output_index=place,
                    delta=arguments,
                )
            )
        return out

    def _close_call(self, place: int) -> list[bytes]:
        item = self._output[place]
        item["status"] = "completed"
        return [
            self._event(
                "response.function_call_arguments.done",
                item_id=item["id"],
                output_index=place,
                name=item["name"],
                arguments=item["arguments"],
            ),
            self._event("response.output_item.done", output_index=place, item=item),
        ]


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def message_item(name: str, parts: list[dict[str, Any]], status: str) -> dict[str, Any]:
    return {"id": name, "type": "message", "status": status, "role": "assistant", "content": parts}


def call_item(
    name: str, call_id: str, function: str, arguments: str, status: str
) -> dict[str, Any]:
    return {
        "id": name,
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": function,
        "arguments": arguments,
    }


def _status(finish_reason: str) -> dict[str, Any]:
    reason = _INCOMPLETE.get(finish_reason)
    if reason is None:
        return {"status": "completed"}
    return {"status": "incomplete", "incomplete_details": {"reason": reason}}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.in_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_in_tokens},
        "output_tokens": usage.out_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.in_tokens + usage.out_tokens,
    }


RESPONSES: Final = Dialect(ResponseRenderer, response_document, ApiError.document)
