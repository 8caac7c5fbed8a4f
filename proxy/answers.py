"""How a request is answered: as it is by the model it names, or by a service type."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from aiohttp import web

from intentd.core.prompts.pipeline import Answer, PipelineError
from intentd.core.prompts.regenerate import Previous, best_of, regenerate
from intentd.core.prompts.service_types import CacheStage, ServiceType, get_type, with_options
from intentd.daemons.kit.clock import Clock
from intentd.proxy import native
from intentd.proxy.cache.control import with_cache_control
from intentd.proxy.call import Call, Exchange, guessed_usage, models_named
from intentd.proxy.dialects.dialect import Dialect
from intentd.proxy.dialects.openai_chat import CHAT
from intentd.proxy.dialects.openai_responses import ResponsesRequest
from intentd.proxy.dialects.responses_out import RESPONSES
from intentd.proxy.driver import Driver
from intentd.proxy.engine import Engine, PoolModel
from intentd.proxy.errors import ApiError, bad_field, no_answer, shown
from intentd.proxy.feedback import Feedback, FeedbackBook
from intentd.proxy.keys import Key
from intentd.proxy.outgoing import WholeResponse
from intentd.proxy.reading import RequestLog
from intentd.proxy.responses import Continuation
from intentd.proxy.service import FIXED, QUALITY, quota_rules, restricted
from intentd.proxy.store.base import Turn
from intentd.proxy.streams import (
    Sink,
    answer_headers,
    answer_usage,
    answer_value,
    json_response,
    pass_stream,
    with_metadata,
)


class Answers:
    """The half of the API that asks models. types and policy: swapped by reloads and policies."""

    def __init__(
        self,
        engine: Engine,
        driver: Driver,
        clock: Clock,
        log: RequestLog,
        feedback: FeedbackBook,
    ) -> None:
        self.types: dict[str, ServiceType] = {}
        self.policy: list[int] | None = None
        self.memory = native.Memory(log.most)
        self._engine = engine
        self._driver = driver
        self._clock = clock
        self._log = log
        self._feedback = feedback

    async def converse(
        self,
        request: web.BaseRequest,
        call: Call,
        exchange: Exchange,
        dialect: Dialect,
        raw: bytes,
        read: native.Reader,
    ) -> web.StreamResponse:
        """A chat: as it is to the model it names, or by a service type. raw: the client's body;
        read: what made the call of it."""
        conversation, options = self._wishes(request, call)
        passes = call.service_type == FIXED and not conversation and not options
        if passes and not self._fixed_is_cached(call):
            response = await self.pass_through(request, call, exchange, dialect)
            self.memory.keep_passed(
                exchange.request_id, exchange.key.key_id, exchange.model, raw, read
            )
            return response
        if call.service_type == FIXED:
            self._named_model(call, exchange.key)
            options = {"model": call.model, **options}
        asked = native.chat_request(call, conversation, options)
        return await self.delegate(request, asked, exchange, call, dialect=dialect)

    async def respond(
        self, request: web.BaseRequest, read: ResponsesRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """A response: a stored one can be gone on from."""
        call = read.call
        conversation, options = self._wishes(request, call, read.conversation)
        kept = not conversation and (read.store or read.previous is not None)
        passes = call.service_type == FIXED and not conversation and not options and not kept
        if passes and not self._fixed_is_cached(call):
            return await self.pass_through(request, call, exchange, RESPONSES)
        if call.service_type == FIXED:
            self._named_model(call, exchange.key)
            options = {"model": call.model, **options}
        asked = native.chat_request(call, conversation, options)
        continuation = Continuation(read, exchange) if kept else None
        return await self.delegate(
            request, asked, exchange, call, dialect=RESPONSES, continuation=continuation
        )

    def count_tokens(
        self, request: web.BaseRequest, call: Call, exchange: Exchange
    ) -> web.StreamResponse:
        """An estimate by what providers counted of earlier requests; it costs nothing."""
        self._wishes(request, call)
        if call.service_type == FIXED:
            self._admit(call, exchange)
            exchange.model = ""  # nothing is asked, nothing booked
            model = self._engine.models[call.model]
        elif call.service_type not in self.types or not self._engine.models:
            get_type(self.types, call.service_type)
            raise ApiError(503, "no models configured")
        else:
            model = next(iter(self._engine.models.values()))
        tokens = model.ratio.count(call.size_bytes)
        tokens += call.images * model.upstream.model.image_tokens
        told = {
            "estimated": True,
            "model": model.name,
            "bytes_per_token": round(model.ratio.bytes_per_token, 3),
            "learned_from": model.ratio.requests,
        }
        return json_response({"input_tokens": tokens, "intentd": told}, exchange)

    async def pass_through(
        self,
        request: web.BaseRequest,
        call: Call,
        exchange: Exchange,
        dialect: Dialect = CHAT,
    ) -> web.StreamResponse:
        self._admit(call, exchange)
        if call.stream:
            return await pass_stream(self._engine, request, call, exchange, dialect)
        answer = await self._engine.complete(call, exchange)
        exchange.model = exchange.steps[-1].model
        exchange.total_s = self._clock.now() - exchange.started_s
        exchange.status = 200
        if dialect is not CHAT:
            usage = answer.usage or guessed_usage(call, len(answer.raw))
            return json_response(dialect.document(answer.value, usage, call, exchange), exchange)
        return WholeResponse(
            with_metadata(answer.raw, answer.value, exchange), answer_headers(exchange)
        )

    async def regenerate(
        self, request: web.BaseRequest, wanted: native.Regenerate, exchange: Exchange
    ) -> web.StreamResponse:
        """A better answer in place of another."""
        async with self.again(wanted, exchange) as (asked, before):
            return await self.delegate(request, asked, exchange, None, before)

    @contextlib.asynccontextmanager
    async def again(
        self, wanted: native.Regenerate, exchange: Exchange
    ) -> AsyncIterator[tuple[native.Asked, native.Remembered]]:
        """What to ask in place of a turn's newest answer, which is thereby rated bad; one after
        the other. Raises ApiError."""
        wait_s = self._engine.section.total_timeout_s
        alone = self.memory.alone(wanted.request_id, exchange.key.key_id, wait_s)
        async with alone as before:
            yield await self._again(wanted, before, exchange.key.grants.service_types)

    async def _again(
        self, wanted: native.Regenerate, before: native.Remembered, granted: tuple[str, ...]
    ) -> tuple[native.Asked, native.Remembered]:
        """granted: the service types of the key; none is all."""
        options = {**before.asked.options, **wanted.options}
        name = wanted.service_type or before.asked.service_type
        better = QUALITY in self.types and (not granted or QUALITY in granted)
        if before.passed and better and not wanted.service_type:
            name = QUALITY  # no pipeline has run that could go a step further
        if name != before.asked.service_type:
            options = wanted.options  # those of the other type may mean nothing here
        asked = native.Asked(name, before.asked.request, options)
        newest, key_id = before.ids[-1], before.key_id
        document = await self._log.find(newest, key_id) or {}
        self._feedback.tell(Feedback(newest, key_id, False, "regenerated", document))
        return asked, before

    async def delegate(
        self,
        http: web.BaseRequest,
        asked: native.Asked,
        exchange: Exchange,
        call: Call | None,
        before: native.Remembered | None = None,
        dialect: Dialect = CHAT,
        continuation: Continuation | None = None,
    ) -> web.StreamResponse:
        """Run a service type. call: the chat it came as; None for the native API."""
        asked = controlled(asked, http)
        sink = None
        if call is not None and call.stream:
            sink = Sink(self._engine, http, call, exchange, dialect)
            exchange.stream = True
        try:
            answer = await self.perform(asked, exchange, sink, before, continuation)
        except PipelineError as error:
            if sink is not None and sink.started:
                return await sink.fail(str(error))
            raise no_answer(error, exchange.retry_after_s) from None
        if sink is not None:
            return await sink.finish(answer)
        if call is not None:
            value = answer_value(answer, exchange)
            return json_response(
                dialect.document(value, answer_usage(answer), call, exchange), exchange
            )
        return json_response(answer_document(answer, exchange), exchange)

    async def perform(
        self,
        asked: native.Asked,
        exchange: Exchange,
        sink: Sink | None = None,
        before: native.Remembered | None = None,
        continuation: Continuation | None = None,
    ) -> Answer:
        """Answer by a service type, in the conversation's turn. Raises ApiError, InputError and
        PipelineError."""
        made = self._made(asked, exchange)
        request = asked.request
        pool = self._driver.pool
        if before is not None:
            previous = Previous(
                before.ids[-1], before.asked.service_type, best_of(before.models, pool),
                len(before.ids) - 1, before.cached, before.ids[:-1],
            )  # fmt: skip
            made, request = regenerate(
                previous,
                request,
                {**self.types, made.name: made},
                pool,
                service_type=asked.service_type,
            )
            request = replace(request, before=before.sequence)
        exchange.rules = quota_rules(made, exchange.key.key_id)
        exchange.policy = self.policy
        async with contextlib.AsyncExitStack() as stack:
            conversations, key_id = self._driver.conversations, exchange.key.key_id
            turn: Turn | None = None
            waits_for = request.conversation or (continuation and continuation.conversation)
            if waits_for:
                turn = await stack.enter_async_context(conversations.turn(key_id, waits_for))
            if continuation is not None:
                request = await continuation.enter(request, conversations)
                if request.conversation != waits_for:  # it only read there
                    await stack.aclose()
                    turn = None
                if request.conversation and turn is None:
                    name = request.conversation
                    turn = await stack.enter_async_context(conversations.turn(key_id, name))
            if turn is not None:
                exchange.sequence = turn.sequence
            try:
                answer = await self._driver.run(
                    made, request, exchange, sink.stream if sink is not None else None
                )
            except PipelineError as error:
                exchange.trace = error.trace
                exchange.outcome = "no_answer"
                raise
            exchange.trace = answer.trace
            answer.trace.regenerates = before.ids[-1] if before is not None else ""
            exchange.model = answer.trace.answered_by
            seed = continuation.seed if continuation is not None else ()
            missed = before.sequence if before is not None and not before.joined else 0
            await self._driver.remember(answer, request, exchange, turn, seed, missed)
        kept = native.Asked(asked.service_type, replace(request, replaces=()), asked.options)
        joined = bool(answer.updates and turn is not None)
        self.memory.keep(
            native.Remembered(
                exchange.key.key_id,
                kept,
                (*(before.ids if before is not None else ()), exchange.request_id),
                (*(before.models if before is not None else ()), answer.trace.answered_by),
                answer.item is not None,
                before.sequence if before is not None else exchange.sequence,
                joined or (before is not None and before.joined),
            )
        )
        exchange.total_s = self._clock.now() - exchange.started_s
        exchange.status = 200
        return answer

    # -- inside --------------------------------------------------------------------------------

    def _wishes(
        self, request: web.BaseRequest, call: Call, named: object = None
    ) -> tuple[str, dict[str, Any]]:
        """(conversation, options) of a chat; fills in the service type that its model names.

        named: a conversation in the dialect's own field.
        """
        if not call.service_type and call.model not in self._engine.models:
            call.service_type = call.model if call.model in self.types else FIXED
        call.service_type = call.service_type or FIXED
        header = request.headers.get(native.CONVERSATION_HEADER)
        if named is not None:
            conversation = native.conversation_name(named, "conversation")
        elif "conversation" in call.extension:
            given = call.extension["conversation"]
            conversation = native.conversation_name(given, "intentd.conversation")
        else:
            conversation = native.conversation_name(header, native.CONVERSATION_HEADER)
        options = call.extension.get("options", {})
        if not isinstance(options, dict):
            raise bad_field("intentd.options", options, "an object")
        return conversation, options

    def _fixed_is_cached(self, call: Call) -> bool:
        """An operator gave `fixed` a cache; several answers at once are not kept."""
        fixed = self.types.get(FIXED)
        return fixed is not None and fixed.stage(CacheStage) is not None and call.answers == 1

    def _made(self, asked: native.Asked, exchange: Exchange) -> ServiceType:
        """The service type with the request's options, for this key. Raises ApiError."""
        grants = exchange.key.grants
        if grants.service_types and asked.service_type not in grants.service_types:
            raise ApiError(
                403,
                f"service_type: this key may use {models_named(grants.service_types)}",
                param="service_type",
            )
        made = get_type(self.types, asked.service_type)
        exchange.service_type = made.name
        exchange.model = made.name  # until somebody has answered
        if "cache" in asked.options and self._driver.cache is None:
            raise bad_field("options.cache", asked.options["cache"], "nothing: there is no cache")
        return with_options(restricted(made, grants.models), asked.options)

    def _named_model(self, call: Call, key: Key) -> PoolModel:
        """The model that a request names. Raises ApiError 404 for one this key has not."""
        model = self._engine.models.get(call.model)
        allowed = key.grants.models
        if model is None or (allowed and call.model not in allowed):
            names = [name for name in self._engine.models if not allowed or name in allowed]
            raise ApiError(
                404,
                f"model: got {shown(call.model)}, expected one of {models_named(names)}, "
                "or a service type",
                param="model",
                code="model_not_found",
            )
        return model

    def _admit(self, call: Call, exchange: Exchange) -> None:
        """Whether there is such a model, and this key may use it."""
        exchange.service_type = call.service_type = FIXED
        grants = exchange.key.grants
        if grants.service_types and call.service_type not in grants.service_types:
            raise ApiError(
                403,
                f"service_type: this key may use {models_named(grants.service_types)}",
                param="service_type",
            )
        model = self._named_model(call, exchange.key)
        exchange.model = call.model
        exchange.stream = call.stream
        exchange.context_messages = call.messages
        exchange.policy = self.policy
        for need, field in model.lacks(call).items():
            able = [one.name for one in self._engine.models.values() if not one.lacks(call)]
            others = models_named(able) if able else "no model of the pool can"
            raise bad_field(
                field, need, f"nothing that {model.name} cannot do; able: {others}",
                code="unsupported_by_model",
            )  # fmt: skip
        window = model.upstream.model.window
        if window and call.size_bytes > window * 16:
            # No tokenizer in use has longer tokens on average; what is nearer to the window is
            # the provider's to judge, who counts exactly.
            raise ApiError(
                400,
                f"messages: {call.size_bytes} bytes cannot fit the window of {window} tokens",
                param="messages",
                code="context_length_exceeded",
            )


def answer_document(answer: Answer, exchange: Exchange) -> dict[str, Any]:
    """An answer in the words of the native API."""
    return {
        "id": exchange.request_id, "response": answer.text, "metadata": exchange.document(),
    }  # fmt: skip


def controlled(asked: native.Asked, request: web.BaseRequest) -> native.Asked:
    """With what Cache-Control asks for. Raises ApiError."""
    if "Cache-Control" not in request.headers:
        return asked
    return replace(asked, request=with_cache_control(asked.request, request.headers))
