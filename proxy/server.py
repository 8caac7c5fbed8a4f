"""The HTTP API: routes, keys, bounds; one place for errors. Who answers is in answers.py."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

import orjson
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from intentd import __version__
from intentd.core.errors import InputError
from intentd.core.prompts.pipeline import Answer
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.metrics import Metrics
from intentd.proxy import native
from intentd.proxy.answers import Answers, controlled
from intentd.proxy.batch import Batch, read_batch
from intentd.proxy.cache.api import CacheApi
from intentd.proxy.cache.part import CachePart
from intentd.proxy.call import Call, Exchange
from intentd.proxy.config import ProxyConfig
from intentd.proxy.dialects import anthropic, openai_chat
from intentd.proxy.dialects.openai_chat import CHAT
from intentd.proxy.dialects.openai_responses import read_responses
from intentd.proxy.driver import Driver
from intentd.proxy.engine import Engine
from intentd.proxy.errors import ApiError, bad_field, from_input_error, shown
from intentd.proxy.feedback import Feedback, FeedbackBook
from intentd.proxy.handover import Server
from intentd.proxy.keys import Key, Keys
from intentd.proxy.metrics import ProxyMetrics
from intentd.proxy.openapi import openapi_document
from intentd.proxy.outgoing import Gone, WholeResponse
from intentd.proxy.reading import Reading, RequestLog
from intentd.proxy.reports import OutcomeCounter
from intentd.proxy.service import FIXED
from intentd.proxy.store.base import State
from intentd.proxy.streams import (
    answer_headers,
    json_response,
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
        self.keys = keys
        self.ledger = state.books
        self._rates = state.rates
        self.metrics = metrics
        self.active = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.draining = False
        self.outcomes = OutcomeCounter()
        feedback.subscribers.append(self.outcomes.heard)
        self._kit_metrics = kit_metrics
        self._clock = clock
        self.log = RequestLog(state.books, config.records.recent)
        self.feedback = feedback
        self.answers = Answers(engine, driver, clock, self.log, feedback)
        self.tracing: Tracing | None = None
        self.reading = Reading(engine, self.answers, state.turns, self.log, feedback)
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
        part.prefetcher.receipt = self.receipt

        def take(word: Feedback) -> None:
            part.record_feedback(word.key_id, word.request_id, good=word.good)

        self.feedback.subscribers.append(take)

    def server(self) -> Server:
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

        return Server(
            self.handle,
            request_factory=request,
            handler_cancellation=True,
            keepalive_timeout=75.0,
            access_log=None,
            max_line_size=16384,
        )

    def exchange(self, key: Key) -> Exchange:
        """A request of this daemon's own, such as the console's."""
        return Exchange(_request_id(), key, self._clock.now(), self._clock.wall())

    # -- every request -------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer, account, and turn every failure into one OpenAI-shaped error."""
        clock = self._clock
        exchange = Exchange(
            _request_id(),
            _NOBODY,
            clock.now(),
            clock.wall(),
            client_request_id=_client_id(request.headers.get("X-Request-Id")),
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
            text = f"{path}: got {shown(request.method)}, expected {method}"
            raise ApiError(405, text, allow=", ".join(method.split()))
        if self.draining:
            raise ApiError(503, "this proxy takes no new requests", retry_after_s=1)
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

    def receipt(self, exchange: Exchange) -> None:
        """What was spent without a client's request goes into the log only."""
        exchange.total_s = self._clock.now() - exchange.started_s
        exchange.model = exchange.model or exchange.steps[-1].model
        exchange.outcome = exchange.outcome or exchange.steps[-1].outcome
        self.log.keep(exchange)

    def _error(self, exchange: Exchange, error: ApiError) -> WholeResponse:
        exchange.status = error.status
        headers = answer_headers(exchange)
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        if error.allow:
            headers["Allow"] = error.allow
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        document = (
            anthropic.error_document(error)
            if exchange.path.startswith(MESSAGES)
            else error.document()
        )
        response = WholeResponse(orjson.dumps(document), headers, error.status)
        if self.draining:
            response.force_close()  # the next connection finds somebody who serves
        return response

    # -- generation ----------------------------------------------------------------------------

    def _generate(self, read: Callable[[bytes, str], Call]) -> Handler:
        async def generate(request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
            call = read(await self._body(request), _service_header(request))
            name = call.service_type or FIXED
            if name != FIXED:
                raise bad_field("service_type", name, FIXED, code="unknown_service_type")
            return await self.answers.pass_through(request, call, exchange)

        return generate

    async def _chat(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        raw, read = await self._body(request), openai_chat.read_chat
        call = read(raw, _service_header(request))
        return await self.answers.converse(request, call, exchange, CHAT, raw, read)

    async def _messages(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """Anthropic's API."""
        raw, read = await self._body(request), anthropic.read_messages
        call = read(raw, _service_header(request))
        return await self.answers.converse(request, call, exchange, anthropic.MESSAGES, raw, read)

    async def _count_tokens(
        self, request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """An estimate by what providers counted of earlier requests; it costs nothing."""
        call = anthropic.read_count(await self._body(request), _service_header(request))
        return self.answers.count_tokens(request, call, exchange)

    async def _responses(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """OpenAI's responses: a stored one can be gone on from."""
        read = read_responses(await self._body(request), _service_header(request))
        return await self.answers.respond(request, read, exchange)

    async def _request(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """``request(prompt, service_type, {key: value})`` (dissertation, table 4.2)."""
        asked = native.read_request(await self._body(request))
        return await self.answers.delegate(request, asked, exchange, None)

    async def _openapi(self, _request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        return json_response(
            openapi_document(__version__, self._routes, self.answers.types), exchange
        )

    async def _batch(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """A list of prompts by several models or service types."""
        asked = read_batch(await self._body(request), self.config.batch)

        async def perform(one: native.Asked, own: Exchange) -> Answer:
            return await self.answers.perform(controlled(one, request), own)

        batch = Batch(asked, exchange, self._clock, perform, self.close, self._pace)
        return await (batch.streamed(request) if asked.stream else batch.whole())

    async def _rate(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        return await self.reading.rate(await self._body(request), exchange)

    async def _regenerate(self, request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
        """``regenerate(service_type, {key: value})``: a better answer in place of another."""
        wanted = native.read_regenerate(await self._body(request))
        return await self.answers.regenerate(request, wanted, exchange)

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


_NOBODY: Final = Key("", "", "")


def _request_id() -> str:
    """A new one. Never the client's: it may come twice, by a retry or a fixed header."""
    return f"req_{_BOOT}{next(_NUMBERS):08x}"


def _client_id(given: str | None) -> str:
    return given if given and _REQUEST_ID.match(given) else ""


def _service_header(request: web.BaseRequest) -> str:
    given = request.headers.get(SERVICE_HEADER)
    if given is None:
        return ""
    if not _SERVICE_NAME.match(given):
        raise bad_field(SERVICE_HEADER, given, "the name of a service type")
    return given
