"""Streams out: a provider's as they are, a pipeline's as its answer comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

import orjson
from aiohttp import web

from intentd.core.prompts.effects import CallFailed, Reply
from intentd.core.prompts.pipeline import Answer
from intentd.daemons.kit.clock import Clock
from intentd.proxy.adapter.native import Event, UpstreamError, Usage
from intentd.proxy.adapter.sse import DONE, encode_event
from intentd.proxy.call import Call, Exchange, guessed_usage
from intentd.proxy.driver import with_cost
from intentd.proxy.engine import Attempt, Engine
from intentd.proxy.errors import ApiError

DONE_EVENT: Final = encode_event(DONE)


class Relaying(Protocol):
    """What turns a provider's events into bytes for the client. size_bytes: taken so far."""

    size_bytes: int

    def take(self, events: list[Event]) -> bytes: ...

    def broken(self, error: ApiError) -> bytes: ...


async def pass_stream(
    engine: Engine,
    request: web.BaseRequest,
    call: Call,
    exchange: Exchange,
    relay_of: Callable[[Call, Exchange, Attempt], Relaying] | None = None,
) -> web.StreamResponse:
    """A provider's stream to the client as it is, [DONE] only when it came whole."""
    async with engine.stream(call, exchange) as (stream, attempt):
        exchange.model = attempt.model.name
        exchange.first_token_s = engine.clock.now() - exchange.started_s
        engine.metrics.first(exchange.model, exchange.service_type, exchange.first_token_s)
        response = stream_response(exchange)
        exchange.status = 200
        await response.prepare(request)
        relay: Relaying = (
            Relay(engine.clock, call, exchange, attempt)
            if relay_of is None
            else relay_of(call, exchange, attempt)
        )
        try:
            while events := await stream.read():
                data = relay.take(events)
                if data:
                    await response.write(data)
        except UpstreamError as error:
            attempt.failed(error, relay.size_bytes)
            exchange.outcome = f"upstream_{error.kind}"
            await response.write(relay.broken(broken_stream(exchange, error)))
        except (asyncio.CancelledError, ConnectionError):
            attempt.left(relay.size_bytes)
            raise
        await response.write_eof()
    return response


class ChatSink:
    """A chat stream that a pipeline answers into; what came whole is sent as one chunk."""

    def __init__(
        self, engine: Engine, http: web.BaseRequest, call: Call, exchange: Exchange
    ) -> None:
        self._engine = engine
        self._http = http
        self._call = call
        self._exchange = exchange
        self._response: web.StreamResponse | None = None
        self._streamed = False
        self._last: dict[str, Any] = {}

    @property
    def started(self) -> bool:
        return self._response is not None

    async def stream(self, call: Call) -> Reply | CallFailed:
        """Perform one call, its deltas to the client as they come."""
        engine, exchange = self._engine, self._exchange
        text: list[str] = []
        async with engine.stream(call, exchange) as (stream, attempt):
            exchange.model = attempt.model.name
            began_s = engine.clock.now()
            response = await self._open()
            self._streamed = True
            relay = Relay(self._engine.clock, self._call, exchange, attempt, text)
            try:
                while events := await stream.read():
                    data = relay.take(events)
                    if data:
                        await response.write(data)
            except UpstreamError as error:
                attempt.failed(error, relay.size_bytes)
                return CallFailed(call.model, str(error), 502, started=True, retryable=False)
            except (asyncio.CancelledError, ConnectionError):
                attempt.left(relay.size_bytes)
                raise
        usage = relay.usage or guessed_usage(call, relay.size_bytes)
        if relay.last is not None and relay.last.value is not None:
            self._last = relay.last.value
        reply = Reply(
            call.model, "".join(text), usage.in_tokens, usage.out_tokens, usage.cached_in_tokens,
            finish_reason=relay.finish_reason or "stop",
        )  # fmt: skip
        return with_cost(reply, engine, engine.clock.now() - began_s)

    async def finish(self, answer: Answer) -> web.StreamResponse:
        exchange = self._exchange
        raw = answer.reply.raw if answer.reply is not None and answer.reply.raw else {}
        chunk = {
            "id": raw.get("id", exchange.request_id),
            "object": "chat.completion.chunk",
            "created": raw.get("created", int(exchange.wall_s)),
            "model": raw.get("model", exchange.model),
        }
        response = await self._open()
        if not self._streamed:
            choice = answer.reply.choice if answer.reply is not None else None
            delta = dict((choice or {}).get("message") or {"content": answer.text})
            delta["role"] = "assistant"
            for place, tool in enumerate(delta.get("tool_calls") or ()):
                tool.setdefault("index", place)
            reason = answer.reply.finish_reason if answer.reply is not None else "stop"
            await response.write(
                chunk_event(
                    {**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                )
                + chunk_event(
                    {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
                )
            )
        if self._call.wants_usage:
            last = self._last or {**chunk, "choices": [], "usage": raw.get("usage")}
            await response.write(chunk_event({**last, "intentd": exchange.document()}))
        await response.write(DONE_EVENT)
        await response.write_eof()
        return response

    async def fail(self, text: str) -> web.StreamResponse:
        """Said in the stream, because its status is already sent. No [DONE] follows."""
        response = await self._open()
        error = broken_stream(self._exchange, UpstreamError("cut", text))
        await response.write(encode_event(orjson.dumps(error.document())))
        await response.write_eof()
        return response

    async def _open(self) -> web.StreamResponse:
        if self._response is None:
            exchange = self._exchange
            exchange.first_token_s = self._engine.clock.now() - exchange.started_s
            self._response = stream_response(exchange)
            exchange.status = 200
            await self._response.prepare(self._http)
        return self._response


class Relay:
    """Turns a provider's events into the client's, and notes what the books need."""

    def __init__(
        self,
        clock: Clock,
        call: Call,
        exchange: Exchange,
        attempt: Attempt,
        text: list[str] | None = None,
    ) -> None:
        self._clock = clock
        self._text = text  # of a pipeline's call: it is collected, and the end is not sent
        self.finish_reason = ""
        self._hide_usage = not call.wants_usage
        self._exchange = exchange
        self._attempt = attempt
        self.usage: Usage | None = None
        self.last: Event | None = None
        self.size_bytes = 0

    def take(self, events: list[Event]) -> bytes:
        """The bytes to send on. The usage chunk waits for [DONE]: it carries the metadata."""
        out: list[bytes] = []
        for event in events:
            value = event.value
            if value is None:
                out += self._end()
                break
            self.size_bytes += len(event.raw)
            if event.usage is not None:
                self.usage = event.usage
                if not value.get("choices"):
                    self.last = event
                    continue
            if self._text is not None:
                self._collect(value, self._text)
            out.append(event.raw)
            out.append(b"\n\n")
        return b"".join(out)

    def broken(self, error: ApiError) -> bytes:
        return encode_event(orjson.dumps(error.document()))

    def _collect(self, value: dict[str, Any], text: list[str]) -> None:
        choices = value.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if isinstance(choice, dict):
            delta = choice.get("delta")
            content = delta.get("content") if isinstance(delta, dict) else None
            if isinstance(content, str):
                text.append(content)
            self.finish_reason = str(choice.get("finish_reason") or self.finish_reason)

    def _end(self) -> list[bytes]:
        exchange = self._exchange
        self._attempt.answered(self.usage, self.size_bytes)
        exchange.total_s = self._clock.now() - exchange.started_s
        if self._text is not None:
            return []
        if self._hide_usage or self.last is None or self.last.value is None:
            return [DONE_EVENT]
        document = {**self.last.value, "intentd": exchange.document()}
        return [encode_event(orjson.dumps(document)), DONE_EVENT]


def answer_headers(exchange: Exchange) -> dict[str, str]:
    headers = {"X-Request-Id": exchange.request_id}
    if exchange.steps or exchange.first_token_s is not None:
        headers["X-Intentd-Service-Type"] = exchange.service_type
        headers["X-Intentd-Model"] = exchange.model
        headers["X-Intentd-Cache"] = "off"
        headers["X-Intentd-Attempts"] = str(max(1, len(exchange.steps)))
        if exchange.first_token_s is None:
            headers["X-Intentd-Cost-Nano"] = str(exchange.cost_nano)
        if exchange.trace is not None:
            headers |= exchange.trace.headers(final=exchange.first_token_s is None)
    return headers


def with_metadata(raw: bytes, value: dict[str, Any], exchange: Exchange) -> bytes:
    """The provider's answer with the metadata object in it, its own bytes untouched."""
    if "intentd" in value:  # a proxy behind this one: ours replaces its own
        return orjson.dumps({**value, "intentd": exchange.document()})
    body = raw.rstrip()
    comma = b"," if value else b""
    return body[:-1] + comma + b'"intentd":' + exchange.encode() + b"}"


def stream_response(exchange: Exchange) -> web.StreamResponse:
    headers = answer_headers(exchange)
    headers["Cache-Control"] = "no-cache"
    headers["X-Accel-Buffering"] = "no"
    response = web.StreamResponse(headers=headers)
    response.content_type = "text/event-stream"
    return response


def chunk_event(document: dict[str, Any]) -> bytes:
    return encode_event(orjson.dumps(document))


def broken_stream(exchange: Exchange, error: UpstreamError) -> ApiError:
    """Said in the stream, because its status is already sent. No [DONE] follows."""
    return ApiError(
        502,
        f"{error} (request {exchange.request_id})",
        code=f"upstream_{error.kind}",
        kind="upstream_error",
    )
