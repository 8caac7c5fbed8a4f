"""What was done for a request: the metadata object and the headers (section 4.3.2).

A pipeline fills a `Trace` as it goes; the driver adds what only it knows (times, request id) and
renders it. Header values hold no prompt text, only names, numbers and ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from intentd.core.prompts.effects import CacheItem, CallFailed, Reply
from intentd.core.prompts.money import format_dollars

HEADER_PREFIX: Final = "X-Intentd-"
MAX_HEADER_CHARS: Final = 256


@dataclass(slots=True)
class CallRecord:
    """One call to a model. error: "" when it answered."""

    model: str
    purpose: str
    in_tokens: int = 0
    out_tokens: int = 0
    cached_in_tokens: int = 0
    cost_nano: int = 0
    latency_s: float = 0.0
    error: str = ""


@dataclass(slots=True)
class Trace:
    """Everything a pipeline decided, in the order it decided it.

    cache: off, bypass, miss, exact, semantic, as_is, rewritten or answered_from. avoided_nano:
    what was not paid: the stored answer's cost for a hit, else what the dearest candidate would
    have asked for the same tokens, less what was paid (never negative). stages_s: by the driver,
    seconds by stage: cache, store, prefetch, context, route, or a call's purpose.
    """

    service_type: str
    calls: list[CallRecord] = field(default_factory=list)
    answered_by: str = ""
    verifier_score: int | None = None
    threshold: float | None = None
    escalated: bool | None = None
    chance_wrong: float | None = None
    predicted_gain: float | None = None
    router_known: bool | None = None
    context_messages: int = 0
    context_available: int = 0
    context_tokens: int = 0
    context_ids: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    cache: str = "off"
    cache_reason: str = ""
    cache_item: CacheItem | None = None
    cache_sources: tuple[str, ...] = ()
    gate_score: float | None = None
    avoided_nano: int = 0
    regenerates: str = ""
    request_id: str = ""
    stages_s: dict[str, float] = field(default_factory=dict)

    @property
    def cost_nano(self) -> int:
        return sum(call.cost_nano for call in self.calls)

    def record(self, outcome: Reply | CallFailed, purpose: str) -> None:
        if isinstance(outcome, CallFailed):
            self.calls.append(
                CallRecord(
                    outcome.model, purpose, cost_nano=outcome.cost_nano, error=outcome.reason
                )
            )
            return
        self.calls.append(
            CallRecord(
                outcome.model,
                purpose,
                outcome.in_tokens,
                outcome.out_tokens,
                outcome.cached_in_tokens,
                outcome.cost_nano,
                outcome.latency_s,
            )
        )

    def to_plain(self) -> dict[str, Any]:
        """The metadata object; money both as exact nano-dollars and as dollars to read."""
        item = self.cache_item
        plain: dict[str, Any] = {
            "request_id": self.request_id,
            "service_type": self.service_type,
            "model": self.answered_by,
            "models": [
                {
                    "model": call.model,
                    "purpose": call.purpose,
                    "in_tokens": call.in_tokens,
                    "out_tokens": call.out_tokens,
                    "cached_in_tokens": call.cached_in_tokens,
                    "cost_nano": call.cost_nano,
                    "latency_s": round(call.latency_s, 6),
                    **({"error": call.error} if call.error else {}),
                }
                for call in self.calls
            ],
            "context": {
                "messages": self.context_messages,
                "available": self.context_available,
                "tokens": self.context_tokens,
                "decisions": list(self.notes),
            },
            "cache": {"result": self.cache},
            "cost_nano": self.cost_nano,
            "cost": format_dollars(self.cost_nano),
            "avoided_nano": self.avoided_nano,
            "avoided": format_dollars(self.avoided_nano),
            "latency_s": {name: round(value, 6) for name, value in self.stages_s.items()},
        }
        if self.cache_reason:
            plain["cache"]["reason"] = self.cache_reason
        if self.cache_sources:
            plain["cache"]["sources"] = list(self.cache_sources)
        if item is not None:
            plain["cache"] |= {
                "item": item.item_id,
                "kind": item.kind,
                "similarity": round(item.similarity, 4),
                "model": item.model,
                "age_s": round(item.age_s, 1),
                "source": item.source,
                "gate_score": None if self.gate_score is None else round(self.gate_score, 4),
            }
        selection = {
            "verifier_score": self.verifier_score,
            "threshold": self.threshold,
            "escalated": self.escalated,
            "chance_wrong": self.chance_wrong,
            "predicted_gain": self.predicted_gain,
            "router_known": self.router_known,
        }
        plain["selection"] = {key: value for key, value in selection.items() if value is not None}
        if self.regenerates:
            plain["regenerates"] = self.regenerates
        return plain

    def headers(self, *, final: bool = True) -> dict[str, str]:
        """Response headers. final: False for a stream's, when cost is not known yet."""
        values: dict[str, object] = {
            "Service-Type": self.service_type,
            "Model": self.answered_by,
            "Cache": self.cache,
            "Context-Messages": self.context_messages,
            "Context-Tokens": self.context_tokens,
        }
        if self.cache_item is not None:
            values["Cache-Item"] = self.cache_item.item_id
            values["Cache-Similarity"] = f"{self.cache_item.similarity:.4f}"
            values["Cache-Age"] = int(self.cache_item.age_s)
            values["Cache-Source"] = self.cache_item.source
        if self.verifier_score is not None:
            values["Verifier-Score"] = self.verifier_score
        if self.escalated is not None:
            values["Escalated"] = str(self.escalated).lower()
        if self.regenerates:
            values["Regenerates"] = self.regenerates
        if final:
            values["Models"] = ",".join(dict.fromkeys(call.model for call in self.calls))
            values["Cost"] = format_dollars(self.cost_nano)
            values["Avoided"] = format_dollars(self.avoided_nano)
        return {
            HEADER_PREFIX + name: header_text(value)
            for name, value in values.items()
            if value != ""
        }


def header_text(value: object) -> str:
    """Printable ASCII without line ends, bounded: a name from a pool file may hold anything."""
    text = str(value).encode("ascii", "replace").decode()
    return "".join(char if char.isprintable() else "?" for char in text)[:MAX_HEADER_CHARS]
