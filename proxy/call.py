"""One request of a client as the proxy works on it: what to ask upstream, what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from intentd.core.prompts.budgets import BudgetRule, most_tokens
from intentd.core.prompts.metadata import Trace
from intentd.core.prompts.money import format_dollars
from intentd.proxy.adapter.litellm import LitellmUpstream
from intentd.proxy.adapter.native import Upstream, Usage
from intentd.proxy.errors import ApiError
from intentd.proxy.keys import Key

TEMPLATE_TOKENS: Final = 64  # what a chat template adds on its own, such as a default system prompt
TOOL_TOKENS: Final = 512  # what providers add to explain tools to the model
GUESSED_BYTES_PER_TOKEN: Final = 4  # for books without the provider's count; English prose


@dataclass(slots=True)
class Call:
    """What the client asked for, validated.

    path: below the provider's base URL. body: the provider's request, changed on the way.
    size_bytes: of the request's text as JSON, images and files left out. media: kinds of parts
    that are not text. cap: the client's own bound on an answer. cap_field: the client's own name
    of it; "" when the model's is to be used. answers: how many it asks for; 0 when nothing is
    generated (embeddings). by_pipeline: the cap is always sent, and the pipeline decides about
    other models. echo, answer_id: what the answer's dialect gives back.
    """

    path: str
    body: dict[str, Any]
    model: str
    service_type: str
    stream: bool = False
    wants_usage: bool = False
    answers: int = 1
    cap: int | None = None
    cap_field: str = ""
    size_bytes: int = 0
    images: int = 0
    media: frozenset[str] = frozenset()
    messages: int = 0
    purpose: str = "answer"
    by_pipeline: bool = False
    extension: dict[str, Any] = field(default_factory=dict)
    echo: dict[str, Any] = field(default_factory=dict)
    answer_id: str = ""

    def needs(self) -> dict[str, str]:
        """What a model must be able to do for it, each with the field that asks for it."""
        body = self.body
        needed = dict.fromkeys(self.media, "messages")
        if body.get("tools") or body.get("functions"):
            needed["tools"] = "tools"
        form = body.get("response_format")
        if isinstance(form, dict) and form.get("type") in ("json_object", "json_schema"):
            needed["json"] = "response_format"
        if body.get("logprobs"):
            needed["logprobs"] = "logprobs"
        if not self.answers:
            needed["embeddings"] = "input"
        return needed

    def most_in_tokens(self, upstream: Upstream | LitellmUpstream) -> int:
        """Upper bound on the input: no token is shorter than the model's min_bytes_per_token."""
        model = upstream.model
        tokens = math.ceil(self.size_bytes / model.min_bytes_per_token)
        tokens += self.images * model.image_tokens
        tokens += TEMPLATE_TOKENS + (TOOL_TOKENS if self.body.get("tools") else 0)
        return tokens

    def most_tokens(self, upstream: Upstream | LitellmUpstream) -> tuple[int, int, int]:
        """(input tokens, output tokens, cap of one answer) that the call may take at most."""
        in_tokens = self.most_in_tokens(upstream)
        if not self.answers:
            return in_tokens, 0, 0
        _, cap = most_tokens(in_tokens, self.cap, upstream.model.max_output_tokens)
        return in_tokens, cap * self.answers, cap

    def payload(self, upstream: Upstream | LitellmUpstream, cap: int) -> bytes:
        """The request for one model; cap 0 leaves the answer's length to the client."""
        body = self.body
        body["model"] = upstream.upstream_model
        if self.by_pipeline:
            cap = min(self.cap or cap, upstream.model.max_output_tokens)
        if not self.cap_field:
            cap = cap or self.cap or 0  # a translated one is nowhere in the body yet
        if cap:
            body[self.cap_field or upstream.model.max_tokens_field] = cap
        if self.stream:
            body["stream"] = True
            if upstream.model.stream_usage:
                options = body.get("stream_options")
                body["stream_options"] = {**(options or {}), "include_usage": True}
        return orjson.dumps(body)


@dataclass(slots=True)
class Step:
    """One call to a model, for the metadata."""

    model: str
    purpose: str
    outcome: str
    usage: Usage | None = None
    cost_nano: int = 0
    estimated: bool = False
    started_s: float = 0.0
    seconds: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "model": self.model,
            "purpose": self.purpose,
            "outcome": self.outcome,
            "ms": round(self.seconds * 1e3, 2),
            "cost_nano": self.cost_nano,
        }
        if self.usage is not None:
            plain["in_tokens"] = self.usage.in_tokens
            plain["out_tokens"] = self.usage.out_tokens
            plain["cached_in_tokens"] = self.usage.cached_in_tokens
        if self.estimated:
            plain["estimated"] = True
        return plain


@dataclass(slots=True)
class Exchange:
    """A request from its arrival to its answer; ``document`` is the metadata everyone gets.

    request_id: ours, never given twice. client_request_id: the client's own, which it may use as
    often as it likes: told and searched for, the key of nothing.
    """

    request_id: str
    key: Key
    started_s: float
    wall_s: float
    path: str = ""
    service_type: str = ""
    model: str = ""
    stream: bool = False
    policy: list[int] | None = None
    context_messages: int = 0
    steps: list[Step] = field(default_factory=list)
    reserve_s: float = 0.0
    wait_s: float = 0.0
    first_token_s: float | None = None
    total_s: float = 0.0
    status: int = 0
    outcome: str = ""
    encoded: bytes = b""
    trace_parent: str = ""
    retry_after_s: float | None = None
    trace: Trace | None = None
    rules: tuple[BudgetRule, ...] = ()
    sequence: int = 0  # in its conversation
    client_request_id: str = ""
    refused: ApiError | None = None  # by a budget, on the way
    deadline_s: float = 0.0  # of all its calls; 0 before the first
    repeats: int = 0  # calls made again, by the same model or a fallback

    @property
    def cost_nano(self) -> int:
        return sum(step.cost_nano for step in self.steps)

    def document(self) -> dict[str, Any]:
        latency: dict[str, Any] = {
            "total": round(self.total_s * 1e3, 2),
            "reserve": round(self.reserve_s * 1e3, 2),
            "wait": round(self.wait_s * 1e3, 2),
        }
        if self.first_token_s is not None:
            latency["first_token"] = round(self.first_token_s * 1e3, 2)
        cost = self.cost_nano
        whole = {
            "cost": format_dollars(cost),
            "cost_nano": cost,
            "estimated": any(step.estimated for step in self.steps),
            "latency_ms": latency,
            "policy": self.policy,
        }
        if self.trace is not None:
            plain = self.trace.to_plain()
            stages = plain.pop("latency_s")
            latency["stages"] = {name: round(value * 1e3, 2) for name, value in stages.items()}
            calls = [step.to_plain() for step in self.steps]
            if self.sequence:
                plain["context"]["sequence"] = self.sequence
            return {**plain, **self._ids(), "models": calls, **whole}
        return {
            **self._ids(),
            "service_type": self.service_type,
            "model": self.model,
            "models": [step.to_plain() for step in self.steps],
            "context": {"messages": self.context_messages, "source": "client"},
            "cache": {"result": "off"},
            **whole,
        }

    def _ids(self) -> dict[str, str]:
        ids = {"request_id": self.request_id}
        if self.client_request_id:
            ids["client_request_id"] = self.client_request_id
        return ids

    def encode(self) -> bytes:
        """The document as JSON, built once: it goes into the answer and into the log."""
        if not self.encoded:
            self.encoded = orjson.dumps(self.document())
        return self.encoded

    def encode_log(self) -> bytes:
        """What GET /v1/requests/ID shows: the metadata and how it ended."""
        end = {
            "status": self.status,
            "outcome": self.outcome,
            "path": self.path,
            "stream": self.stream,
            "key": self.key.name,
            "wall_s": self.wall_s,
        }
        return self.encode()[:-1] + b"," + orjson.dumps(end)[1:]


def guessed_usage(call: Call, answer_bytes: int) -> Usage:
    """Tokens where the provider told none."""
    return Usage(
        call.size_bytes // GUESSED_BYTES_PER_TOKEN, answer_bytes // GUESSED_BYTES_PER_TOKEN
    )


def models_named(models: Iterable[str]) -> str:
    """A few names for an error message."""
    names = sorted(models)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
