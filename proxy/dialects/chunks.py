"""A chat's choice out of its chunks, and chunks out of a choice."""

from __future__ import annotations

from typing import Any, Final

import orjson

from intentd.proxy.adapter.native import Event
from intentd.proxy.adapter.sse import encode_event

_TEXTS: Final = ("content", "refusal")


class ChoiceBuilder:
    """Puts the first choice of a stream together: texts, refusal, tool calls, finish reason."""

    def __init__(self) -> None:
        self.finish_reason = ""
        self._texts: dict[str, list[str]] = {}
        self._tools: dict[int, dict[str, Any]] = {}

    def take(self, value: dict[str, Any]) -> None:
        """One chunk."""
        choices = value.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict) or choice.get("index"):
            return
        self.finish_reason = str(choice.get("finish_reason") or self.finish_reason)
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return
        for name in _TEXTS:
            if isinstance(delta.get(name), str):
                self._texts.setdefault(name, []).append(delta[name])
        tools = delta.get("tool_calls")
        for tool in tools if isinstance(tools, list) else ():
            if isinstance(tool, dict):
                self._tool(tool)

    @property
    def text(self) -> str:
        return "".join(self._texts.get("content", ()))

    def choice(self) -> dict[str, Any]:
        """As a whole answer would have it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text or None}
        if "refusal" in self._texts:
            message["refusal"] = "".join(self._texts["refusal"])
        if self._tools:
            message["tool_calls"] = [self._tools[place] for place in sorted(self._tools)]
        return {"index": 0, "message": message, "finish_reason": self.finish_reason or "stop"}

    def _tool(self, part: dict[str, Any]) -> None:
        place = part.get("index")
        place = place if isinstance(place, int) else 0
        known = self._tools.setdefault(
            place, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        if isinstance(part.get("id"), str):
            known["id"] = part["id"]
        function = part.get("function")
        if isinstance(function, dict):
            for name in ("name", "arguments"):
                if isinstance(function.get(name), str):
                    known["function"][name] += function[name]


def choice_events(choice: dict[str, Any], base: dict[str, Any]) -> list[Event]:
    """A whole choice as two chunks. base: id, model and the like of each chunk."""
    delta = {**choice.get("message", {}), "role": "assistant"}
    if delta.get("tool_calls"):
        delta["tool_calls"] = [
            {"index": place, **tool} for place, tool in enumerate(delta["tool_calls"])
        ]
    ends: dict[str, Any] = {
        "index": 0,
        "delta": {},
        "finish_reason": choice.get("finish_reason") or "stop",
    }
    first: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
    if choice.get("logprobs") is not None:
        first["logprobs"] = choice["logprobs"]
    values = [{**base, "choices": [one]} for one in (first, ends)]
    return [
        Event(encode_event(orjson.dumps(value)).removesuffix(b"\n\n"), value, None)
        for value in values
    ]
