"""Streams out: a provider's as they are, a pipeline's as its answer comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import orjson
from aiohttp import web

from intentd.core.prompts.effects import CallFailed, Reply
from intentd.core.prompts.pipeline import Answer
from intentd.daemons.kit.clock import Clock
from intentd.proxy.adapter.native import Event, UpstreamError, Usage
from intentd.proxy.call import Call, Exchange, guessed_usage
from intentd.proxy.dialects.chunks import ChoiceBuilder, choice_events
from intentd.proxy.dialects.dialect import Dialect, Renderer
from intentd.proxy.dialects.openai_chat import CHAT, chat_end
from intentd.proxy.driver import with_cost
from intentd.proxy.engine import Attempt, Engine
from intentd.proxy.errors import ApiError
from intentd.proxy.outgoing import EventStream, WholeResponse


class Relaying(Protocol):
    """What turns a provider's events into bytes for the client.

    size_bytes: taken so far. passed: counts events that need no turning; None where all do.
    """

    size_bytes: int

    @property
    def passed(self) -> Callable[[int], None] | None: ...

    def take(self, events: list[Event]) -> bytes: ...

    def broken(self, error: ApiError) -> bytes: ...


async def pass_stream(
    engine: Engine,
    request: web.BaseRequest,
    call: Call,
    exchange: Exchange,
    dialect: Dialect = CHAT,
) -> web.StreamResponse:
    """A provider's stream to the client, whole in the dialect's words only when it came whole."""
    async with engine.stream(call, exchange) as (stream, attempt):
        exchange.model = attempt.model.name
        exchange.first_token_s = engine.clock.now() - exchange.started_s
        engine.metrics.first(exchange.model, exchange.service_type, exchange.first_token_s)
        response = stream_response(exchange)
        exchange.status = 200
        await response.prepare(request)
        relay: Relaying = (
            Relay(engine.clock, call, exchange, attempt)
            if dialect is CHAT
            else RenderRelay(
                engine.clock, call, exchange, attempt, dialect.renderer(call, exchange)
            )
        )
        try:
            await stream.forward(relay.take, response, relay.passed)
        except UpstreamError as error:
            attempt.failed(error, relay.size_bytes)
            exchange.outcome = f"upstream_{error.kind}"
            await response.write(relay.broken(broken_stream(exchange, error)))
        except (asyncio.CancelledError, ConnectionError):
            attempt.left(relay.size_bytes)
            raise
        await response.write_eof()
    return response


class Sink:
    """A stream that a pipeline answers into; what came whole is sent as one chunk."""

    def __init__(
        self,
        engine: Engine,
        http: web.BaseRequest,
        call: Call,
        exchange: Exchange,
        dialect: Dialect = CHAT,
    ) -> None:
        self._engine = engine
        self._http = http
        self._call = call
        self._exchange = exchange
        self._renderer = dialect.renderer(call, exchange)
        self._response: EventStream | None = None
        self._streamed = False
        self._last: Event | None = None

    @property
    def started(self) -> bool:
        return self._response is not None

    async def stream(self, call: Call) -> Reply | CallFailed:
        """Perform one call, its deltas to the client as they come."""
        engine, exchange = self._engine, self._exchange
        builder = ChoiceBuilder()
        async with engine.stream(call, exchange) as (stream, attempt):
            exchange.model = attempt.model.name
            began_s = engine.clock.now()
            response = await self._open()
            self._streamed = True
            relay = RenderRelay(engine.clock, call, exchange, attempt, self._renderer, builder)
            try:
                await stream.forward(relay.take, response)
            except UpstreamError as error:
                attempt.failed(error, relay.size_bytes)
                return CallFailed(call.model, str(error), 502, started=True, retryable=False)
            except (asyncio.CancelledError, ConnectionError):
                attempt.left(relay.size_bytes)
                raise
        self._last = relay.last
        usage = relay.usage or guessed_usage(call, relay.size_bytes)
        reply = Reply(
            call.model, builder.text, usage.in_tokens, usage.out_tokens, usage.cached_in_tokens,
            finish_reason=builder.finish_reason or "stop", choice=builder.choice(),
        )  # fmt: skip
        return with_cost(reply, engine, engine.clock.now() - began_s)

    async def finish(self, answer: Answer) -> web.StreamResponse:
        response = await self._open()
        value = answer_value(answer, self._exchange)
        out: list[bytes] = []
        if not self._streamed:
            base = {
                "id": value["id"],
                "object": "chat.completion.chunk",
                "created": value["created"],
                "model": value["model"],
            }
            choice = value["choices"][0]
            out += [self._renderer.chunk(event) for event in choice_events(choice, base)]
            if value.get("usage") is not None:
                last = {**base, "choices": [], "usage": value["usage"]}
                self._last = Event(b"", last, None)
        out.append(self._renderer.end(answer_usage(answer), self._last))
        await response.write(b"".join(out))
        await response.write_eof()
        return response

    async def fail(self, text: str) -> web.StreamResponse:
        """Said in the stream, because its status is already sent."""
        response = await self._open()
        error = broken_stream(self._exchange, UpstreamError("cut", text))
        await response.write(self._renderer.broken(error))
        await response.write_eof()
        return response

    async def _open(self) -> EventStream:
        if self._response is None:
            exchange = self._exchange
            exchange.first_token_s = self._engine.clock.now() - exchange.started_s
            self._engine.metrics.first(
                exchange.model, exchange.service_type, exchange.first_token_s
            )
            self._response = stream_response(exchange)
            exchange.status = 200
            await self._response.prepare(self._http)
            begins = self._renderer.begin()
            if begins:
                await self._response.write(begins)
        return self._response


def answer_value(answer: Answer, exchange: Exchange) -> dict[str, Any]:
    """An answer as a chat completion: the provider's own document where it came as one."""
    reply = answer.reply
    if reply is not None and reply.raw:
        return {"id": exchange.request_id, "created": int(exchange.wall_s),
                "model": exchange.model, **reply.raw}  # fmt: skip
    choice = reply.choice if reply is not None else None
    if choice is None:
        message = {"role": "assistant", "content": answer.text}
        reason = reply.finish_reason if reply is not None else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
    usage = answer_usage(answer)
    return {
        "id": exchange.request_id,
        "object": "chat.completion",
        "created": int(exchange.wall_s),
        "model": exchange.model,
        "choices": [dict(choice)],
        "usage": {
            "prompt_tokens": usage.in_tokens,
            "completion_tokens": usage.out_tokens,
            "total_tokens": usage.in_tokens + usage.out_tokens,
        },
    }


def answer_usage(answer: Answer) -> Usage:
    """The tokens of the call that answered; none for a stored answer."""
    reply = answer.reply
    if reply is None:
        return Usage(0, 0)
    return Usage(reply.in_tokens, reply.out_tokens, reply.cached_in_tokens)


class Relay:
    """A chat's events as they came: its bytes are not made anew. Notes what the books need."""

    def __init__(self, clock: Clock, call: Call, exchange: Exchange, attempt: Attempt) -> None:
        self._clock = clock
        self._call = call
        self._exchange = exchange
        self._attempt = attempt
        self._usage: Usage | None = None
        self._last: Event | None = None
        self.size_bytes = 0

    def passed(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes

    def take(self, events: list[Event]) -> bytes:
        """The bytes to send on. The usage chunk waits for [DONE]: it carries the metadata."""
        out: list[bytes] = []
        for event in events:
            value = event.value
            if value is None:
                self._attempt.answered(self._usage, self.size_bytes)
                exchange = self._exchange
                exchange.total_s = self._clock.now() - exchange.started_s
                out.append(chat_end(self._call, exchange, self._last))
                break
            self.size_bytes += len(event.raw)
            if event.usage is not None:
                self._usage = event.usage
                if not value.get("choices"):
                    self._last = event
                    continue
            out.append(event.raw)
            out.append(b"\n\n")
        return b"".join(out)

    def broken(self, error: ApiError) -> bytes:
        return CHAT.renderer(self._call, self._exchange).broken(error)


class RenderRelay:
    """A chat's events in a dialect's words.

    builder: of a pipeline's call; the choice is put together in it, and the pipeline ends the
    stream. Without one the stream begins and ends here.
    """

    def __init__(
        self,
        clock: Clock,
        call: Call,
        exchange: Exchange,
        attempt: Attempt,
        renderer: Renderer,
        builder: ChoiceBuilder | None = None,
    ) -> None:
        self._clock = clock
        self._call = call
        self._exchange = exchange
        self._attempt = attempt
        self._renderer = renderer
        self._builder = builder
        self._began = builder is not None
        self.usage: Usage | None = None
        self.last: Event | None = None
        self.size_bytes = 0
        self.passed = None

    def take(self, events: list[Event]) -> bytes:
        out: list[bytes] = []
        if not self._began:
            self._began = True
            out.append(self._renderer.begin())
        for event in events:
            value = event.value
            if value is None:
                self._attempt.answered(self.usage, self.size_bytes)
                if self._builder is None:
                    out.append(self._end())
                break
            self.size_bytes += len(event.raw)
            if event.usage is not None:
                self.usage = event.usage
            if not value.get("choices"):
                self.last = event if event.usage is not None else self.last
                continue
            if self._builder is not None:
                self._builder.take(value)
            out.append(self._renderer.chunk(event))
        return b"".join(out)

    def broken(self, error: ApiError) -> bytes:
        return self._renderer.broken(error)

    def _end(self) -> bytes:
        exchange = self._exchange
        exchange.total_s = self._clock.now() - exchange.started_s
        usage = self.usage or guessed_usage(self._call, self.size_bytes)
        return self._renderer.end(usage, self.last)


def answer_headers(exchange: Exchange) -> dict[str, str]:
    headers = {
        "X-Request-Id": exchange.client_request_id or exchange.request_id,
        "X-Intentd-Request-Id": exchange.request_id,
    }
    answered = exchange.steps or exchange.trace is not None
    if answered or exchange.first_token_s is not None:
        headers["X-Intentd-Service-Type"] = exchange.service_type
        headers["X-Intentd-Model"] = exchange.model
        headers["X-Intentd-Cache"] = "off"
        trace = exchange.trace
        over = trace is not None and bool(trace.answered_by or trace.cache_item)
        under_way = exchange.first_token_s is not None and not over  # headers go before its end
        headers["X-Intentd-Attempts"] = str(len(exchange.steps) + under_way or int(trace is None))
        if exchange.policy is not None:
            headers["X-Intentd-Policy"] = ".".join(map(str, exchange.policy))
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


def stream_response(exchange: Exchange) -> EventStream:
    headers = answer_headers(exchange)
    headers["Cache-Control"] = "no-cache"
    headers["X-Accel-Buffering"] = "no"
    return EventStream(headers)


def broken_stream(exchange: Exchange, error: UpstreamError) -> ApiError:
    """Said in the stream, because its status is already sent. No end of an answer follows."""
    return ApiError(
        502,
        f"{error} (request {exchange.request_id})",
        code=f"upstream_{error.kind}",
        kind="upstream_error",
    )


def json_response(value: Any, exchange: Exchange) -> WholeResponse:
    return WholeResponse(orjson.dumps(value), answer_headers(exchange))
