"""The HTTP API: routes, keys, bounds; answers and streams out; one place for errors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Final

import orjson
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from intentd.core.errors import InputError
from intentd.core.prompts.pipeline import PipelineError
from intentd.core.prompts.regenerate import Previous, regenerate
from intentd.core.prompts.service_types import ServiceType, get_type, with_options
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.metrics import Metrics
from intentd.proxy import native
from intentd.proxy.call import Call, Exchange, guessed_usage, models_named
from intentd.proxy.config import ProxyConfig
from intentd.proxy.dialects import anthropic, openai_chat
from intentd.proxy.driver import Driver
from intentd.proxy.engine import Engine
from intentd.proxy.errors import ApiError, bad_field, from_input_error, shown
from intentd.proxy.keys import Key, Keys
from intentd.proxy.metrics import ProxyMetrics
from intentd.proxy.service import FIXED, quota_rules, restricted
from intentd.proxy.store.base import State, Turn
from intentd.proxy.streams import ChatSink, answer_headers, pass_stream, with_metadata

_log = logging.getLogger(__name__)

MESSAGES: Final = "/v1/messages"
SERVICE_HEADER: Final = "X-Intentd-Service-Type"
BODY_TIMEOUT_S: Final = 60.0
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
        self._kit_metrics = kit_metrics
        self._clock = clock
        self._recent: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/chat/completions": ("POST", self._chat),
            MESSAGES: ("POST", self._messages),
            "/v1/request": ("POST", self._request),
            "/v1/regenerate": ("POST", self._regenerate),
            "/v1/completions": ("POST", self._generate(openai_chat.read_completion)),
            "/v1/embeddings": ("POST", self._generate(openai_chat.read_embeddings)),
            "/v1/models": ("GET", self._list_models),
        }

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
        self.active += 1
        self.idle.clear()
        try:
            response = await self._answer(request, exchange)
            exchange.status = response.status
            return response
        except ApiError as error:
            exchange.outcome = error.code or error.kind
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
            raise
        except Exception:  # noqa: BLE001  one bad request must not end the daemon
            self._kit_metrics.errors.labels("proxy").inc()
            _log.exception("request failed", extra={"request": exchange.request_id})
            exchange.outcome = "internal"
            return self._error(exchange, ApiError(500, "internal error"))
        finally:
            self.active -= 1
            if not self.active:
                self.idle.set()
            self._close(exchange)

    async def _answer(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        path = request.path
        exchange.path = path
        route = self._routes.get(path)
        if route is None:
            route = self._route_with_id(path, request.method)
        method, handler = route
        if request.method != method:
            raise ApiError(405, f"{path}: got {shown(request.method)}, expected {method}")
        if self.draining:
            raise ApiError(503, "this proxy is stopping", retry_after_s=1)
        if self.active > self.config.listen.max_requests:
            self.metrics.refuse("overload")
            raise ApiError(503, "too many requests at once", retry_after_s=1)
        exchange.key = await self._authorise(request)
        return await handler(request, exchange)

    def _route_with_id(self, path: str, asked: str) -> tuple[str, Handler]:
        for prefix, handler in (
            ("/v1/models/", self._show_model),
            ("/v1/requests/", self._show_request),
            ("/v1/conversations/", self._conversation),
        ):
            if path.startswith(prefix) and len(path) > len(prefix):
                method = "GET"
                if asked == "DELETE" and prefix == "/v1/conversations/":
                    method = asked
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
        rate = key.grants.rate
        if rate is not None:
            wait_s = await self._rates.take(key.key_id, rate)
            if wait_s:
                self.metrics.refuse("rate")
                raise ApiError(
                    429,
                    f"key {key.name}: more than {rate.per_second:g} requests a second",
                    code="rate_limit_exceeded",
                    retry_after_s=wait_s,
                )
        return key

    def _close(self, exchange: Exchange) -> None:
        """The books of one request, however it ended."""
        exchange.total_s = self._clock.now() - exchange.started_s
        if not exchange.model:
            return
        outcome = exchange.outcome or "ok"
        exchange.outcome = outcome
        self.metrics.finished(exchange.model, exchange.service_type, outcome, exchange.total_s)
        # Bytes, not objects: thousands of live objects would slow every collection down.
        document = exchange.encode_log()
        recent = self._recent
        recent[exchange.request_id] = (exchange.key.key_id, document)
        if len(recent) > self.config.records.recent:
            recent.popitem(last=False)
        self.ledger.log_request(exchange.request_id, exchange.key.key_id, exchange.wall_s, document)

    def _error(self, exchange: Exchange, error: ApiError) -> web.Response:
        exchange.status = error.status
        headers = answer_headers(exchange)
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.Response(
            status=error.status,
            body=orjson.dumps(
                anthropic.error_document(error) if exchange.path == MESSAGES else error.document()
            ),
            headers=headers,
            content_type="application/json",
        )

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
        """A chat: as it is to the model it names, or by a service type."""
        call = openai_chat.read_chat(await self._body(request), _service_header(request))
        if not call.service_type and call.model not in self.engine.models:
            call.service_type = call.model if call.model in self.types else FIXED
        header = request.headers.get(native.CONVERSATION_HEADER)
        conversation = native.conversation_name(
            call.extension.get("conversation", header),
            "intentd.conversation"
            if "conversation" in call.extension
            else "X-Intentd-Conversation",
        )
        options = call.extension.get("options", {})
        if not isinstance(options, dict):
            raise bad_field("intentd.options", options, "an object")
        call.service_type = call.service_type or FIXED
        if call.service_type == FIXED and not conversation and not options:
            return await self._pass_through(request, call, exchange)
        if call.service_type == FIXED:
            options = {"model": call.model, **options}
        asked = native.chat_request(call, conversation, options)
        return await self._delegate(request, asked, exchange, call)

    async def _pass_through(
        self, request: web.BaseRequest, call: Call, exchange: Exchange
    ) -> web.StreamResponse:
        self._admit(call, exchange)
        if call.stream:
            return await pass_stream(self.engine, request, call, exchange)
        answer = await self.engine.complete(call, exchange)
        exchange.model = exchange.steps[-1].model
        exchange.total_s = self._clock.now() - exchange.started_s
        exchange.status = 200
        return web.Response(
            body=with_metadata(answer.raw, answer.value, exchange),
            headers=answer_headers(exchange),
            content_type="application/json",
        )

    async def _messages(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """Anthropic's API, to a model of the pool."""
        call = anthropic.read_messages(await self._body(request), _service_header(request))
        name = call.service_type or FIXED
        if name != FIXED or call.extension:
            raise bad_field("service_type", name, FIXED, code="unknown_service_type")
        self._admit(call, exchange)
        if call.stream:
            return await pass_stream(self.engine, request, call, exchange, anthropic.MessageRelay)
        answer = await self.engine.complete(call, exchange)
        exchange.model = exchange.steps[-1].model
        exchange.total_s = self._clock.now() - exchange.started_s
        usage = answer.usage or guessed_usage(call, len(answer.raw))
        return _json(anthropic.message_document(answer.value, usage, exchange), exchange)

    async def _request(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """``request(prompt, service_type, {key: value})`` (dissertation, table 4.2)."""
        asked = native.read_request(await self._body(request))
        return await self._delegate(request, asked, exchange, None)

    async def _regenerate(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """``regenerate(service_type, {key: value})``: a better answer in place of another."""
        wanted = native.read_regenerate(await self._body(request))
        before = self.memory.find(wanted.request_id, exchange.key.key_id)
        options = {**before.asked.options, **wanted.options}
        name = wanted.service_type or before.asked.service_type
        if wanted.service_type and wanted.service_type != before.asked.service_type:
            options = wanted.options  # those of the other type may mean nothing here
        asked = native.Asked(name, before.asked.request, options)
        return await self._delegate(request, asked, exchange, None, before, wanted.request_id)

    async def _delegate(
        self,
        http: web.BaseRequest,
        asked: native.Asked,
        exchange: Exchange,
        call: Call | None,
        before: native.Remembered | None = None,
        regenerates: str = "",
    ) -> web.StreamResponse:
        """Run a service type. call: the chat it came as; None for the native API."""
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
        sink = (
            ChatSink(self.engine, http, call, exchange)
            if call is not None and call.stream
            else None
        )
        async with contextlib.AsyncExitStack() as stack:
            turn: Turn | None = None
            if request.conversation:
                turn = await stack.enter_async_context(
                    self.driver.conversations.turn(exchange.key.key_id, request.conversation)
                )
                exchange.sequence = turn.sequence
            try:
                answer = await self.driver.run(
                    made, request, exchange, sink.stream if sink is not None else None
                )
            except PipelineError as error:
                exchange.trace = error.trace
                exchange.outcome = "no_answer"
                if sink is not None and sink.started:
                    return await sink.fail(str(error))
                status = error.status if error.status in (400, 413, 429, 503, 504) else 502
                raise ApiError(status, str(error), code="no_answer") from None
            exchange.trace = answer.trace
            answer.trace.regenerates = regenerates
            exchange.model = answer.trace.answered_by
            await self.driver.remember(answer, request, exchange, turn)
        kept = native.Asked(asked.service_type, request, asked.options)
        self.memory.keep(
            exchange.request_id,
            native.Remembered(
                exchange.key.key_id, kept, answer.trace.answered_by, rounds, answer.item is not None
            ),
        )
        exchange.total_s = self._clock.now() - exchange.started_s
        exchange.status = 200
        if sink is not None:
            return await sink.finish(answer)
        if call is not None:
            raw = answer.reply.raw if answer.reply is not None else {}
            return _json({**raw, "intentd": exchange.document()}, exchange)
        document = {
            "id": exchange.request_id, "response": answer.text, "metadata": exchange.document(),
        }  # fmt: skip
        return _json(document, exchange)

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
        if "cache" in asked.options:
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
        model = self.engine.models.get(call.model)
        if model is None or (grants.models and call.model not in grants.models):
            allowed = [n for n in self.engine.models if not grants.models or n in grants.models]
            raise ApiError(
                404,
                f"model: got {shown(call.model)}, expected one of {models_named(allowed)}",
                param="model",
                code="model_not_found",
            )
        exchange.model = call.model
        exchange.stream = call.stream
        exchange.context_messages = call.messages
        exchange.policy = self.policy
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

    # -- reading -------------------------------------------------------------------------------

    async def _list_models(
        self, _request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        allowed = exchange.key.grants.models
        data = [
            _model_object(name) for name in self.engine.models if not allowed or name in allowed
        ]
        return _json({"object": "list", "data": data}, exchange)

    async def _show_model(
        self, name: str, _request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        allowed = exchange.key.grants.models
        if name not in self.engine.models or (allowed and name not in allowed):
            raise ApiError(
                404, f"model: got {shown(name)}, expected a model of the pool",
                param="model", code="model_not_found",
            )  # fmt: skip
        return _json(_model_object(name), exchange)

    async def _conversation(
        self, name: str, request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """The messages of this key's conversation; DELETE forgets them."""
        name = native.conversation_name(name, "conversation")
        conversations = self.driver.conversations
        key_id = exchange.key.key_id
        if request.method == "DELETE":
            async with conversations.turn(key_id, name) as turn:
                return _json({"forgotten": await conversations.forget(turn)}, exchange)
        messages = await conversations.load(key_id, name)
        return _json(
            {
                "conversation": name,
                "messages": [
                    {"id": one.message_id, "prompt": one.prompt, "response": one.response}
                    for one in messages
                ],
            },
            exchange,
        )

    async def _show_request(
        self, name: str, _request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """The metadata of an answered request, for the key that made it."""
        found = self._recent.get(name)
        if found is not None and found[0] == exchange.key.key_id:
            document = found[1]
        else:
            rows = await self.ledger.find_request(name, exchange.key.key_id)
            if not rows:
                raise ApiError(
                    404, f"request: got {shown(name)}, expected one of this key's requests"
                )
            document = rows[0].encode()
        return web.Response(
            body=document, headers=answer_headers(exchange), content_type="application/json"
        )


_NOBODY: Final = Key("", "", "")


def _request_id(given: str | None) -> str:
    """The client's own id where it is one, else a new one."""
    if given and _REQUEST_ID.match(given):
        return given
    return "req_" + secrets.token_hex(12)


def _service_header(request: web.BaseRequest) -> str:
    given = request.headers.get(SERVICE_HEADER)
    if given is None:
        return ""
    if not _SERVICE_NAME.match(given):
        raise bad_field(SERVICE_HEADER, given, "the name of a service type")
    return given


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "intentd"}


def _json(value: Any, exchange: Exchange) -> web.Response:
    return web.Response(
        body=orjson.dumps(value), headers=answer_headers(exchange), content_type="application/json"
    )
