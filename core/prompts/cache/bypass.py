"""Requests whose answers must not be shared: each with the reason, told in the metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

MAX_PROMPT_CHARS: Final = 20_000

# Questions whose right answer moves with the clock. "Current" alone may be electric, so it
# counts only beside what has a present state.
_TIME_BOUND: Final = re.compile(
    r"""\b(?:
        today(?:'s)? | tonight(?:'s)? | tomorrow(?:'s)? | yesterday(?:'s)? | right\ now
      | at\ the\ moment | (?:this|next|last)\ (?:hour|morning|afternoon|evening|night|week|weekend
        |month|year|quarter|season)
      | (?:latest|breaking|recent|live)\ (?:news|score|scores|price|prices|results?|version|update
        |updates|headlines?|exchange)
      | current(?:ly)?\ (?:time|date|weather|temperature|price|prices|president|prime|ceo|score
        |rate|rates|exchange|status|events?|in)
      | what(?:'s|\ is)\ the\ (?:time|date|weather) | what\ time\ is\ it | what\ day\ is\ it
      | weather\ (?:in|for|at|like) | how\ (?:long|many\ days)\ (?:until|till)
      | (?:minutes?|hours?|days?|weeks?)\ ago | is\ it\ (?:raining|snowing|open)
      | stock\ price | exchange\ rate
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)


def is_time_bound(prompt: str) -> bool:
    return _TIME_BOUND.search(prompt) is not None


def bypass_reason(
    prompt: str,
    *,
    turn: Sequence[Mapping[str, Any]] = (),
    params: Mapping[str, Any] | None = None,
) -> str:
    """Why the cache is left alone, or "".

    turn: the chat messages of this turn. params: the request's parameters beside the messages.
    """
    params = params or {}
    if params.get("tools") or params.get("functions"):
        return "tools"
    if (params.get("n") or 1) != 1:
        return "n"
    if params.get("logprobs") or params.get("top_logprobs"):
        return "logprobs"
    for message in turn:
        if message.get("role") in ("tool", "function") or message.get("tool_calls"):
            return "tool_calls"
        content = message.get("content")
        if isinstance(content, (list, tuple)) and any(
            isinstance(part, Mapping) and part.get("type") not in ("text", "input_text")
            for part in content
        ):
            return "not_text"
    if not prompt.strip():
        return "no_text"
    if len(prompt) > MAX_PROMPT_CHARS:
        return "too_long"
    if is_time_bound(prompt):
        return "time_bound"
    return ""
