"""The HTTP API: routes, keys, bounds; answers and streams out; one place for errors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

import orjson
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from intentd import __version__
from intentd.core.errors import InputError
from intentd.core.prompts.pipeline import Answer, PipelineError
from intentd.core.prompts.regenerate import Previous, regenerate
from intentd.core.prompts.service_types import CacheStage, ServiceType, get_type, with_options
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.metrics import Metrics
from intentd.proxy import native
from intentd.proxy.batch import Batch, read_batch
from intentd.proxy.cache.api import CacheApi
from intentd.proxy.cache.control import with_cache_control
from intentd.proxy.cache.part import CachePart
from intentd.proxy.call import Call, Exchange, guessed_usage, models_named
from intentd.proxy.config import ProxyConfig
from intentd.proxy.dialects import anthropic, openai_chat
from intentd.proxy.dialects.dialect import Dialect
from intentd.proxy.dialects.openai_chat import CHAT
from intentd.proxy.dialects.openai_responses import read_responses
from intentd.proxy.dialects.responses_out import RESPONSES
from intentd.proxy.driver import Driver
from intentd.proxy.engine import Engine, PoolModel
from intentd.proxy.errors import ApiError, bad_field, from_input_error, no_answer, shown
from intentd.proxy.feedback import Feedback, FeedbackBook
from intentd.proxy.keys import Key, Keys
from intentd.proxy.metrics import ProxyMetrics
from intentd.proxy.openapi import openapi_document
from intentd.proxy.outgoing import Gone, WholeResponse
from intentd.proxy.reading import Reading, RequestLog
from intentd.proxy.reports import OutcomeCounter
from intentd.proxy.responses import Continuation
from intentd.proxy.service import FIXED, quota_rules, restricted
from intentd.proxy.store.base import State, Turn
from intentd.proxy.streams import (
    Sink,
    answer_headers,
    answer_usage,
    answer_value,
    json_response,
    pass_stream,
    with_metadata,
)
from intentd.proxy.tracing import Tracing

_log = logging.getLogger(__name__)

MESSAGES: Final = "/v1/messages"
SERVICE_HEADER: Final = "X-Intentd-Service-Type"
BODY_TIMEOUT_S: Final = 60.0
# New request ids: random once, then counted; asking the kernel for random bytes costs as much as
# checking a key.
_BOOT: Final = secrets.token_hex(8)
_NUMBERS: Final = itertools.count()
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\Z")
_SERVICE_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")

Handler = Callable[["web.BaseRequest", Exchange], Awaitable[web.StreamResponse]]


class Api:
    """What answers applications. The daemon owns its parts and swaps them on reload."""

    def __init__(
        self,
        config: ProxyConfig,
        engine: Engine,
        keys: Keys,
        state: State,
        metrics: ProxyMetrics,
        kit_metrics: Metrics,
        clock: Clock,
        driver: Driver,
        feedback: FeedbackBook,
    ) -> None:
        self.config = config
        self.engine = engine
        self.driver = driver
        self.types: dict[str, ServiceType] = {}
        self.memory = native.Memory(config.records.recent)
        self.keys = keys
        self.ledger = state.books
        self._rates = state.rates
        self.metrics = metrics
        self.active = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.draining = False
        self.policy: list[int] | None = None
        self.outcomes = OutcomeCounter()
        feedback.subscribers.append(self.outcomes.heard)
        self._kit_metrics = kit_metrics
        self._clock = clock
        self.log = RequestLog(state.books, config.records.recent)
        self.feedback = feedback
        self.tracing: Tracing | None = None
        self.reading = Reading(engine, state.turns, self.log, feedback)
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/chat/completions": ("POST", self._chat),
            MESSAGES: ("POST", self._messages),
            MESSAGES + "/count_tokens": ("POST", self._count_tokens),
            "/v1/responses": ("POST", self._responses),
            "/v1/request": ("POST", self._request),
            "/v1/batch": ("POST", self._batch),
            "/v1/feedback": ("POST", self._rate),
            "/v1/regenerate": ("POST", self._regenerate),
            "/v1/completions": ("POST", self._generate(openai_chat.read_completion)),
            "/v1/embeddings": ("POST", self._generate(openai_chat.read_embeddings)),
            "/v1/models": ("GET", self.reading.models),
            "/v1/conversations": ("GET", self.reading.conversations),
            "/openapi.json": ("GET", self._openapi),
        }
        self.cache_api: CacheApi | None = None

    def set_cache(self, part: CachePart) -> None:
        """Serve from it, and let applications put into it."""
        driver = self.driver
        driver.cache = part
        api = CacheApi(part, lambda: driver.pool, driver.drive, self._body, self._clock)
        self.cache_api = api
        self._routes["/v1/cache"] = ("GET PUT POST DELETE", api.handle)
        self.reading.followups = part.prefetcher.questions

        def take(word: Feedback) -> None:
            part.record_feedback(word.key_id, word.request_id, good=word.good)

        self.feedback.subscribers.append(take)

    def server(self) -> web.Server:
        """The low-level server: no middlewares, and a client that leaves stops its handler."""
        bound = self.config.listen.max_body_bytes

        loop = asyncio.get_running_loop()

        def request(
            message: RawRequestMessage,
            payload: StreamReader,
            protocol: web.RequestHandler,
            writer: AbstractStreamWriter,
            task: asyncio.Task[None],
        ) -> web.BaseRequest:
            return web.BaseRequest(
                message, payload, protocol, writer, task, loop, client_max_size=bound
            )

        return web.Server(
            self.handle,
            request_factory=request,
            handler_cancellation=True,
            keepalive_timeout=75.0,
            access_log=None,
            max_line_size=16384,
        )

    def exchange(self, key: Key) -> Exchange:
        """A request of this daemon's own, such as the console's."""
        return Exchange(_request_id(None), key, self._clock.now(), self._clock.wall())

    # -- every request -------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer, account, and turn every failure into one OpenAI-shaped error."""
        clock = self._clock
        exchange = Exchange(
            _request_id(request.headers.get("X-Request-Id")),
            _NOBODY,
            clock.now(),
            clock.wall(),
        )
        if self.tracing is not None:
            exchange.trace_parent = request.headers.get("traceparent", "")
        self.active += 1
        self.idle.clear()
        try:
            response = await self._answer(request, exchange)
            exchange.status = response.status
            return response
        except ApiError as error:
            exchange.outcome = exchange.outcome or error.outcome
            return self._error(exchange, error)
        except InputError as error:
            exchange.outcome = "invalid"
            return self._error(exchange, from_input_error(error))
        except web.HTTPException as error:  # aiohttp's own: a body over the bound
            exchange.outcome = "http"
            text = "the body is too large" if error.status == 413 else error.reason
            return self._error(exchange, ApiError(error.status, text))
        except asyncio.CancelledError:
            exchange.outcome = "left"
            exchange.status = 499
            raise
        except ConnectionError:
            exchange.outcome = "left"
            exchange.status = 499
            return Gone()
        except Exception:  # noqa: BLE001  one bad request must not end the daemon
            self._kit_metrics.errors.labels("proxy").inc()
            _log.exception("request failed", extra={"request": exchange.request_id})
            exchange.outcome = "internal"
            return self._error(exchange, ApiError(500, "internal error"))
        finally:
            self.active -= 1
            if not self.active:
                self.idle.set()
            self.close(exchange)

    async def _answer(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        path = request.path
        exchange.path = path
        route = self._routes.get(path)
        if route is None:
            route = self._route_with_id(path, request.method)
        method, handler = route
        if request.method not in method.split():
            raise ApiError(405, f"{path}: got {shown(request.method)}, expected {method}")
        if self.draining:
            raise ApiError(503, "this proxy is stopping", retry_after_s=1)
        if self.active > self.config.listen.max_requests:
            self.metrics.refuse("overload")
            raise ApiError(503, "too many requests at once", retry_after_s=1)
        exchange.key = await self._authorise(request)
        return await handler(request, exchange)

    def _route_with_id(self, path: str, asked: str) -> tuple[str, Handler]:
        reading, cache = self.reading, self.cache_api
        for prefix, methods, handler in (
            ("/v1/models/", "GET", reading.model),
            ("/v1/requests/", "GET", reading.request),
            ("/v1/conversations/", "GET DELETE", reading.conversation),
            ("/v1/responses/", "GET DELETE", reading.response),
            *([("/v1/cache/", "GET DELETE", cache.item)] if cache is not None else []),
        ):
            if path.startswith(prefix) and len(path) > len(prefix):
                method = asked if asked in methods.split() else "GET"
                return method, functools.partial(handler, path[len(prefix) :])
        raise ApiError(404, f"no such path: {shown(path)}", code="unknown_path")

    async def _authorise(self, request: web.BaseRequest) -> Key:
        headers = request.headers
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            token = headers.get("x-api-key", "")
        try:
            key = self.keys.find(token.strip(), required=self.config.keys.required)
        except ApiError:
            self.metrics.refuse("key")
            raise
        wait_s = await self._rate_wait_s(key)
        if wait_s and key.grants.rate is not None:
            self.metrics.refuse("rate")
            raise ApiError(
                429,
                f"key {key.name}: more than {key.grants.rate.per_second:g} requests a second",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
        return key

    async def _rate_wait_s(self, key: Key) -> float:
        """0 when the key's request rate allows one more now, which is then taken."""
        rate = key.grants.rate
        return await self._rates.take(key.key_id, rate) if rate is not None else 0.0

    async def _pace(self, key: Key) -> None:
        while wait_s := await self._rate_wait_s(key):
            await self._clock.sleep(wait_s)

    def close(self, exchange: Exchange) -> None:
        """The books of one request, however it ended."""
        exchange.total_s = self._clock.now() - exchange.started_s
        if not exchange.model:
            if not exchange.steps:
                return
            exchange.model = exchange.steps[-1].model
        outcome = exchange.outcome or "ok"
        exchange.outcome = outcome
        self.metrics.finished(exchange.model, exchange.service_type, outcome, exchange.total_s)
        self.outcomes.finished(exchange)
        self.log.keep(exchange)
        if self.tracing is not None:
            self.tracing.record(exchange, self.engine.models)

    def _error(self, exchange: Exchange, error: ApiError) -> WholeResponse:
        exchange.status = error.status
        headers = answer_headers(exchange)
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        document = (
            anthropic.error_document(error)
            if exchange.path.startswith(MESSAGES)
            else error.document()
        )
        return WholeResponse(orjson.dumps(document), headers, error.status)

    # -- generation ----------------------------------------------------------------------------

    def _generate(self, read: Callable[[bytes, str], Call]) -> Handler:
        async def generate(request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
            call = read(await self._body(request), _service_header(request))
            name = call.service_type or FIXED
            if name != FIXED:
                raise bad_field("service_type", name, FIXED, code="unknown_service_type")
            return await self._pass_through(request, call, exchange)

        return generate

    async def _chat(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        call = openai_chat.read_chat(await self._body(request), _service_header(request))
        return await self._converse(request, call, exchange, CHAT)

    async def _messages(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """Anthropic's API."""
        call = anthropic.read_messages(await self._body(request), _service_header(request))
        return await self._converse(request, call, exchange, anthropic.MESSAGES)

    async def _count_tokens(
        self, request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """An estimate by what providers counted of earlier requests; it costs nothing."""
        call = anthropic.read_count(await self._body(request), _service_header(request))
        self._wishes(request, call)
        if call.service_type == FIXED:
            self._admit(call, exchange)
            exchange.model = ""  # nothing is asked, nothing booked
            model = self.engine.models[call.model]
        elif call.service_type not in self.types or not self.engine.models:
            get_type(self.types, call.service_type)
            raise ApiError(503, "no models configured")
        else:
            model = next(iter(self.engine.models.values()))
        tokens = model.ratio.count(call.size_bytes)
        tokens += call.images * model.upstream.model.image_tokens
        told = {
            "estimated": True,
            "model": model.name,
            "bytes_per_token": round(model.ratio.bytes_per_token, 3),
            "learned_from": model.ratio.requests,
        }
        return json_response({"input_tokens": tokens, "intentd": told}, exchange)

    async def _converse(
        self, request: web.BaseRequest, call: Call, exchange: Exchange, dialect: Dialect
    ) -> web.StreamResponse:
        """A chat: as it is to the model it names, or by a service type."""
        conversation, options = self._wishes(request, call)
        passes = call.service_type == FIXED and not conversation and not options
        if passes and not self._fixed_is_cached(call):
            return await self._pass_through(request, call, exchange, dialect)
        if call.service_type == FIXED:
            self._named_model(call, exchange.key)
            options = {"model": call.model, **options}
        asked = native.chat_request(call, conversation, options)
        return await self._delegate(request, asked, exchange, call, dialect=dialect)

    async def _responses(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """OpenAI's responses: a stored one can be gone on from."""
        read = read_responses(await self._body(request), _service_header(request))
        call = read.call
        conversation, options = self._wishes(request, call, read.conversation)
        kept = not conversation and (read.store or read.previous is not None)
        passes = call.service_type == FIXED and not conversation and not options and not kept
        if passes and not self._fixed_is_cached(call):
            return await self._pass_through(request, call, exchange, RESPONSES)
        if call.service_type == FIXED:
            self._named_model(call, exchange.key)
            options = {"model": call.model, **options}
        asked = native.chat_request(call, conversation, options)
        continuation = Continuation(read, exchange) if kept else None
        return await self._delegate(
            request, asked, exchange, call, dialect=RESPONSES, continuation=continuation
        )

    def _wishes(
        self, request: web.BaseRequest, call: Call, named: object = None
    ) -> tuple[str, dict[str, Any]]:
        """(conversation, options) of a chat; fills in the service type that its model names.

        named: a conversation in the dialect's own field.
        """
        if not call.service_type and call.model not in self.engine.models:
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

    async def _pass_through(
        self,
        request: web.BaseRequest,
        call: Call,
        exchange: Exchange,
        dialect: Dialect = CHAT,
    ) -> web.StreamResponse:
        self._admit(call, exchange)
        if call.stream:
            return await pass_stream(self.engine, request, call, exchange, dialect)
        answer = await self.engine.complete(call, exchange)
        exchange.model = exchange.steps[-1].model
        exchange.total_s = self._clock.now() - exchange.started_s
        exchange.status = 200
        if dialect is not CHAT:
            usage = answer.usage or guessed_usage(call, len(answer.raw))
            return json_response(dialect.document(answer.value, usage, call, exchange), exchange)
        return WholeResponse(
            with_metadata(answer.raw, answer.value, exchange), answer_headers(exchange)
        )

    async def _request(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """``request(prompt, service_type, {key: value})`` (dissertation, table 4.2)."""
        asked = native.read_request(await self._body(request))
        return await self._delegate(request, asked, exchange, None)

    async def _openapi(self, _request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        return json_response(openapi_document(__version__, self._routes, self.types), exchange)

    async def _batch(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """A list of prompts by several models or service types."""
        asked = read_batch(await self._body(request), self.config.batch)

        async def perform(one: native.Asked, own: Exchange) -> Answer:
            return await self.perform(_controlled(one, request), own)

        batch = Batch(asked, exchange, self._clock, perform, self.close, self._pace)
        return await (batch.streamed(request) if asked.stream else batch.whole())

    async def _rate(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        return await self.reading.rate(await self._body(request), exchange)

    async def _regenerate(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """``regenerate(service_type, {key: value})``: a better answer in place of another."""
        wanted = native.read_regenerate(await self._body(request))
        asked, before = await self.again(wanted, exchange)
        return await self._delegate(request, asked, exchange, None, before, wanted.request_id)

    async def again(
        self, wanted: native.Regenerate, exchange: Exchange
    ) -> tuple[native.Asked, native.Remembered]:
        """What to ask in place of an answer, which is thereby rated bad. Raises ApiError."""
        before = self.memory.find(wanted.request_id, exchange.key.key_id)
        options = {**before.asked.options, **wanted.options}
        name = wanted.service_type or before.asked.service_type
        if wanted.service_type and wanted.service_type != before.asked.service_type:
            options = wanted.options  # those of the other type may mean nothing here
        asked = native.Asked(name, before.asked.request, options)
        document = await self.log.find(wanted.request_id, exchange.key.key_id) or {}
        self.feedback.tell(
            Feedback(wanted.request_id, exchange.key.key_id, False, "regenerated", document)
        )
        return asked, before

    async def _delegate(
        self,
        http: web.BaseRequest,
        asked: native.Asked,
        exchange: Exchange,
        call: Call | None,
        before: native.Remembered | None = None,
        regenerates: str = "",
        dialect: Dialect = CHAT,
        continuation: Continuation | None = None,
    ) -> web.StreamResponse:
        """Run a service type. call: the chat it came as; None for the native API."""
        asked = _controlled(asked, http)
        sink = None
        if call is not None and call.stream:
            sink = Sink(self.engine, http, call, exchange, dialect)
            exchange.stream = True
        try:
            answer = await self.perform(asked, exchange, sink, before, regenerates, continuation)
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
        regenerates: str = "",
        continuation: Continuation | None = None,
    ) -> Answer:
        """Answer by a service type, in the conversation's turn. Raises ApiError, InputError and
        PipelineError."""
        made = self._made(asked, exchange)
        request = asked.request
        rounds = 0
        if before is not None:
            rounds = before.rounds + 1
            previous = Previous(
                regenerates, before.asked.service_type, before.answered_by, before.rounds,
                before.cached,
            )  # fmt: skip
            made, request = regenerate(
                previous,
                request,
                {**self.types, made.name: made},
                self.driver.pool,
                service_type=asked.service_type,
            )
        exchange.rules = quota_rules(made, exchange.key.key_id)
        exchange.policy = self.policy
        async with contextlib.AsyncExitStack() as stack:
            conversations, key_id = self.driver.conversations, exchange.key.key_id
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
                answer = await self.driver.run(
                    made, request, exchange, sink.stream if sink is not None else None
                )
            except PipelineError as error:
                exchange.trace = error.trace
                exchange.outcome = "no_answer"
                raise
            exchange.trace = answer.trace
            answer.trace.regenerates = regenerates
            exchange.model = answer.trace.answered_by
            seed = continuation.seed if continuation is not None else ()
            await self.driver.remember(answer, request, exchange, turn, seed)
        kept = native.Asked(asked.service_type, request, asked.options)
        self.memory.keep(
            exchange.request_id,
            native.Remembered(
                exchange.key.key_id, kept, answer.trace.answered_by, rounds, answer.item is not None
            ),
        )
        exchange.total_s = self._clock.now() - exchange.started_s
        exchange.status = 200
        return answer

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
        if "cache" in asked.options and self.driver.cache is None:
            raise bad_field("options.cache", asked.options["cache"], "nothing: there is no cache")
        return with_options(restricted(made, grants.models), asked.options)

    async def _body(self, request: web.BaseRequest) -> bytes:
        bound = self.config.listen.max_body_bytes
        length = request.content_length
        if length is not None and length > bound:
            raise ApiError(413, f"the body is over {bound} bytes", code="body_too_large")
        content = request.content
        if content.is_eof():  # all of it came with the head, as small ones do
            raw = content.read_nowait()
            if len(raw) > bound:
                raise ApiError(413, f"the body is over {bound} bytes", code="body_too_large")
            return raw
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await request.read()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time") from None

    def _named_model(self, call: Call, key: Key) -> PoolModel:
        """The model that a request names. Raises ApiError 404 for one this key has not."""
        model = self.engine.models.get(call.model)
        allowed = key.grants.models
        if model is None or (allowed and call.model not in allowed):
            names = [name for name in self.engine.models if not allowed or name in allowed]
            raise ApiError(
                404,
                f"model: got {shown(call.model)}, expected one of {models_named(names)}",
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
            able = [one.name for one in self.engine.models.values() if not one.lacks(call)]
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


_NOBODY: Final = Key("", "", "")


def answer_document(answer: Answer, exchange: Exchange) -> dict[str, Any]:
    """An answer in the words of the native API."""
    return {
        "id": exchange.request_id, "response": answer.text, "metadata": exchange.document(),
    }  # fmt: skip


def _request_id(given: str | None) -> str:
    """The client's own id where it is one, else a new one."""
    if given and _REQUEST_ID.match(given):
        return given
    return f"req_{_BOOT}{next(_NUMBERS):08x}"


def _controlled(asked: native.Asked, request: web.BaseRequest) -> native.Asked:
    """With what Cache-Control asks for. Raises ApiError."""
    if "Cache-Control" not in request.headers:
        return asked
    return replace(asked, request=with_cache_control(asked.request, request.headers))


def _service_header(request: web.BaseRequest) -> str:
    given = request.headers.get(SERVICE_HEADER)
    if given is None:
        return ""
    if not _SERVICE_NAME.match(given):
        raise bad_field(SERVICE_HEADER, given, "the name of a service type")
    return given
