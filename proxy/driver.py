"""Performs what a pipeline asks for: the shell around core.prompts.pipeline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import orjson

from intentd.core.prompts.cascade import PRIOR_AGREEMENT, AgreementModel
from intentd.core.prompts.effects import (
    CallFailed,
    CallModel,
    ChatMessage,
    ContextLoaded,
    Done,
    Effect,
    Embed,
    Foretell,
    LoadContext,
    LookupCache,
    Message,
    Outcome,
    Prediction,
    Prefetch,
    Purpose,
    Reply,
    StoreCache,
    Together,
)
from intentd.core.prompts.health import RATE_LIMITED, HealthState
from intentd.core.prompts.metadata import Trace
from intentd.core.prompts.models import ModelPool
from intentd.core.prompts.pipeline import Answer, Env, PipelineError, Request, run
from intentd.core.prompts.request import Gate
from intentd.core.prompts.service_types import ServiceType
from intentd.proxy.adapter.native import Usage
from intentd.proxy.call import Call, Exchange, guessed_usage
from intentd.proxy.engine import Engine
from intentd.proxy.errors import ApiError
from intentd.proxy.store.base import Turn, Turns
from intentd.proxy.warmth import Warmth

if TYPE_CHECKING:
    from intentd.proxy.cache.part import CachePart
    from intentd.proxy.routing import Foreteller

T = TypeVar("T")
# Answers one streamed call to the client as it comes; Reply or CallFailed when it is over.
StreamTo = Callable[[Call], Awaitable["Reply | CallFailed"]]
_STAGES: Final[dict[type, str]] = {
    LookupCache: "cache",
    Embed: "cache",
    StoreCache: "store",
    Prefetch: "prefetch",
    LoadContext: "context",
    Foretell: "route",
}
_NO_CACHE: Final = Done("this proxy has no cache")
_CLIENT_FAULTS = frozenset({400, 404, 409, 413, 422})


class Driver:
    """Runs pipelines against the pool, the books and the conversations."""

    def __init__(self, engine: Engine, conversations: Turns) -> None:
        self.pool = ModelPool(())
        self.conversations = conversations
        self.cache: CachePart | None = None
        self.foreteller: Foreteller | None = None
        self.agreement: AgreementModel = PRIOR_AGREEMENT
        self.warmth = Warmth(engine.clock, engine.section.prompt_cache_s)
        self._engine = engine

    async def run(
        self,
        service_type: ServiceType,
        request: Request,
        exchange: Exchange,
        stream_to: StreamTo | None = None,
    ) -> Answer:
        """Raises ApiError, InputError and PipelineError."""
        now = self._engine.clock.now()
        down = frozenset(
            name
            for name, model in self._engine.models.items()
            if model.health.state is HealthState.OPEN and model.health.wait_s(now) > 0
        )
        cache = self.cache
        gate = cache.gate(exchange) if cache is not None else None
        limited = frozenset(
            name for name in down if self._engine.models[name].health.reason == RATE_LIMITED
        )
        request = replace(request, warm=self.warmth.find(exchange.key.key_id, request))
        trace = Trace(service_type.name)
        steps = run(service_type, request, self._env(down, gate, limited), trace)
        if stream_to is not None:
            stream_to = _telling(stream_to, exchange, trace)
        sent: dict[str, tuple[ChatMessage, ...]] = {}
        try:
            effect = next(steps)
            while True:
                began_s = self._engine.clock.now()
                if isinstance(effect, (LookupCache, StoreCache, Embed, Prefetch)):
                    outcome: Outcome = _NO_CACHE
                    if cache is not None:
                        outcome = await cache.perform(effect, service_type, request, exchange)
                else:
                    outcome = await self._perform(effect, exchange, stream_to)
                if isinstance(effect, CallModel) and effect.purpose is Purpose.ANSWER:
                    sent[effect.model] = effect.messages
                stage = stage_of(effect)
                took_s = self._engine.clock.now() - began_s
                trace.stages_s[stage] = trace.stages_s.get(stage, 0.0) + took_s
                effect = steps.send(outcome)
        except PipelineError as error:
            refused = exchange.refused
            if refused is not None and error.reason == str(refused):
                exchange.trace = error.trace
                raise refused from None  # in the words of the budget
            raise
        except StopIteration as end:
            answer: Answer = end.value
            if cache is not None:
                cache.finished(answer.trace, exchange)
            self._note_warm(answer, request, exchange, sent)
            return answer
        finally:
            steps.close()

    async def drive(self, steps: Generator[Effect, Outcome, T], exchange: Exchange) -> T:
        """Perform the effects of anything that asks models. Raises ApiError and what it raises."""
        try:
            effect = next(steps)
            while True:
                effect = steps.send(await self._perform(effect, exchange, None))
                if exchange.refused is not None:
                    raise exchange.refused
        except StopIteration as end:
            found: T = end.value
            return found
        finally:
            steps.close()

    async def ask(self, effect: CallModel, exchange: Exchange) -> Reply | CallFailed:
        """One call outside of a pipeline. Raises ApiError for a budget that is used up."""
        outcome = await self._call(effect, exchange, None)
        if exchange.refused is not None:
            raise exchange.refused
        return outcome

    async def embed(
        self, model: str, texts: Sequence[str], exchange: Exchange
    ) -> list[list[float]]:
        """Vectors by an embeddings model of the pool. Raises ApiError."""
        body: dict[str, Any] = {"input": list(texts)}
        call = Call(
            "/embeddings", body, model, exchange.service_type, answers=0,
            size_bytes=len(orjson.dumps(body)), purpose="embed",
        )  # fmt: skip
        answer = await self._engine.complete(call, exchange)
        data = answer.value.get("data")
        try:
            rows = sorted(data or [], key=lambda row: int(row["index"]))
            return [[float(number) for number in row["embedding"]] for row in rows]
        except (KeyError, TypeError, ValueError):
            raise ApiError(502, f"{model}: no embeddings in the answer") from None

    def _env(self, down: frozenset[str], gate: Gate | None, limited: frozenset[str]) -> Env:
        return Env(
            self.pool, down=down, limited=limited, gate=gate, agreement=self.agreement,
            routed=self.foreteller is not None,
        )  # fmt: skip

    async def remember(
        self,
        answer: Answer,
        request: Request,
        exchange: Exchange,
        turn: Turn | None,
        seed: Sequence[Message] = (),
        place: int = 0,
    ) -> None:
        """Let the answer join its conversation, durably before the client has it all.

        seed: what comes before it in a conversation that is new. place: where an answer given in
        place of others goes when none of them is there; 0: nowhere.
        """
        if answer.updates and turn is not None:
            for number, message in enumerate(seed):
                name = message.message_id or f"{exchange.request_id}.{number}"
                await self.conversations.append(turn, replace(message, message_id=name), ())
            await self.conversations.append(
                turn,
                Message(
                    request.prompt,
                    answer.text,
                    _exact_chat(request, answer),
                    message_id=exchange.request_id,
                ),
                request.replaces,
                place,
            )

    def _note_warm(
        self,
        answer: Answer,
        request: Request,
        exchange: Exchange,
        sent: dict[str, tuple[ChatMessage, ...]],
    ) -> None:
        """Whoever answered now holds the conversation, where that makes its next answer cheaper."""
        model = answer.reply.model if answer.reply is not None else ""
        if model in sent and self.pool.get(model).price.cached_in_nano is not None:
            chat = sent[model]
            self.warmth.keep(exchange.key.key_id, request, model, chat, answer.text)

    # -- inside --------------------------------------------------------------------------------

    async def _perform(
        self, effect: Effect, exchange: Exchange, stream_to: StreamTo | None
    ) -> Outcome:
        if isinstance(effect, CallModel):
            return await self._call(effect, exchange, stream_to)
        if isinstance(effect, Together):
            try:
                async with asyncio.TaskGroup() as tasks:
                    running = [
                        tasks.create_task(self._perform(one, exchange, None), name="together")
                        for one in effect.effects
                    ]
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None
            return tuple(task.result() for task in running)  # type: ignore[misc]  # not nested
        if isinstance(effect, LoadContext):
            which = (exchange.key.key_id, effect.conversation)
            messages = await self.conversations.load(
                *which, effect.without, effect.before, effect.newest
            )
            available = len(messages)
            if effect.newest is not None and available >= effect.newest:
                available = await self.conversations.count(*which)
            return ContextLoaded(tuple(messages), available)
        if isinstance(effect, Foretell):
            if self.foreteller is None:  # gone by a reload since the pipeline began
                return Prediction(0.0, known=False)
            return await self.foreteller.predict(effect)
        return _NO_CACHE

    async def _call(
        self, effect: CallModel, exchange: Exchange, stream_to: StreamTo | None
    ) -> Reply | CallFailed:
        messages = list(effect.messages)
        body: dict[str, Any] = {**effect.params, "messages": messages}
        call = Call(
            "/chat/completions",
            body,
            effect.model,
            exchange.service_type,
            stream=effect.stream and stream_to is not None,
            cap=effect.max_tokens,
            size_bytes=len(orjson.dumps(body)),
            messages=len(messages),
            purpose=effect.purpose.value,
            by_pipeline=True,
        )
        started_s = self._engine.clock.now()
        try:
            if call.stream and stream_to is not None:
                return await stream_to(call)
            answer = await self._engine.complete(call, exchange)
        except ApiError as error:
            if error.kind == "insufficient_quota":
                # What has been answered already may do: the pipeline decides.
                exchange.refused = error
                return CallFailed(effect.model, str(error), error.status, retryable=False)
            waits = (exchange.retry_after_s, error.retry_after_s)
            exchange.retry_after_s = min((wait for wait in waits if wait), default=None)
            return CallFailed(
                effect.model,
                str(error),
                error.status,
                retryable=error.status not in _CLIENT_FAULTS,
            )
        reply = read_reply(
            effect.model, answer.value, answer.usage or guessed_usage(call, len(answer.raw))
        )
        if reply is None:
            return CallFailed(effect.model, "the answer holds no choice", 502)
        return with_cost(reply, self._engine, self._engine.clock.now() - started_s)


def stage_of(effect: Effect) -> str:
    """The name of its stage in the metadata's times."""
    while isinstance(effect, Together):
        effect = effect.effects[0]
    return effect.purpose.value if isinstance(effect, CallModel) else _STAGES[type(effect)]


def _telling(stream_to: StreamTo, exchange: Exchange, trace: Trace) -> StreamTo:
    """The same, after the exchange got the trace: a stream's headers say what is known by then."""

    async def stream(call: Call) -> Reply | CallFailed:
        exchange.trace = trace
        return await stream_to(call)

    return stream


def read_reply(model: str, value: dict[str, Any], usage: Usage) -> Reply | None:
    """A provider's whole answer as pipelines see it; None when it has no first choice."""
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return None
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    return Reply(
        model,
        text if isinstance(text, str) else "",
        usage.in_tokens,
        usage.out_tokens,
        usage.cached_in_tokens,
        finish_reason=str(choice.get("finish_reason") or "stop"),
        choice=choice,
        raw=value,
    )


def with_cost(reply: Reply, engine: Engine, seconds: float) -> Reply:
    price = engine.models[reply.model].upstream.price
    cost = price.cost_nano(reply.in_tokens, reply.out_tokens, reply.cached_in_tokens)
    return Reply(
        reply.model, reply.text, reply.in_tokens, reply.out_tokens, reply.cached_in_tokens, cost,
        seconds, reply.finish_reason, reply.choice, reply.raw,
    )  # fmt: skip


def _exact_chat(request: Request, answer: Answer) -> tuple[Any, ...]:
    """The pair's chat messages where two texts would not say it all."""
    choice = answer.reply.choice if answer.reply is not None else None
    message = choice.get("message") if choice is not None else None
    tools = isinstance(message, dict) and message.get("tool_calls")
    plain = len(request.turn) <= 1 and all(
        one.get("role") == "user" and isinstance(one.get("content"), str) for one in request.turn
    )
    if plain and not tools:
        return ()
    said = {"role": "assistant", "content": answer.text}
    if tools and isinstance(message, dict):
        said["tool_calls"] = message["tool_calls"]
    return (*request.turn_messages(), said)
