"""The HTTP API: routes, keys, bounds; answers and streams out; one place for errors."""

from __future__ import annotations

import asyncio
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
from intentd.core.prompts.limits import Rate, RateLimiter
from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.metrics import Metrics
from intentd.proxy.adapter.native import Event, UpstreamError
from intentd.proxy.adapter.sse import DONE, encode_event
from intentd.proxy.call import Call, Exchange, models_named
from intentd.proxy.config import ProxyConfig
from intentd.proxy.dialects import openai_chat
from intentd.proxy.engine import Attempt, Engine
from intentd.proxy.errors import ApiError, bad_field, from_input_error, shown
from intentd.proxy.keys import Key, Keys
from intentd.proxy.ledger import Ledger
from intentd.proxy.metrics import ProxyMetrics

_log = logging.getLogger(__name__)

FIXED: Final = "fixed"
SERVICE_HEADER: Final = "X-Intentd-Service-Type"
BODY_TIMEOUT_S: Final = 60.0
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\Z")
_SERVICE_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_DONE_EVENT: Final = encode_event(DONE)

Handler = Callable[["web.BaseRequest", Exchange], Awaitable[web.StreamResponse]]


class Api:
    """What answers applications. The daemon owns its parts and swaps them on reload."""

    def __init__(
        self,
        config: ProxyConfig,
        engine: Engine,
        keys: Keys,
        ledger: Ledger,
        metrics: ProxyMetrics,
        kit_metrics: Metrics,
        clock: Clock,
    ) -> None:
        self.config = config
        self.engine = engine
        self.keys = keys
        self.ledger = ledger
        self.metrics = metrics
        self.active = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.draining = False
        self.policy: list[int] | None = None
        self._kit_metrics = kit_metrics
        self._clock = clock
        self._limiters: dict[Rate, RateLimiter] = {}
        self._recent: OrderedDict[str, Exchange] = OrderedDict()
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/chat/completions": ("POST", self._generate(openai_chat.read_chat)),
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
            route = self._route_with_id(path)
        method, handler = route
        if request.method != method:
            raise ApiError(405, f"{path}: got {shown(request.method)}, expected {method}")
        if self.draining:
            raise ApiError(503, "this proxy is stopping", retry_after_s=1)
        if self.active > self.config.listen.max_requests:
            self.metrics.refuse("overload")
            raise ApiError(503, "too many requests at once", retry_after_s=1)
        exchange.key = self._authorise(request)
        return await handler(request, exchange)

    def _route_with_id(self, path: str) -> tuple[str, Handler]:
        for prefix, handler in (
            ("/v1/models/", self._show_model),
            ("/v1/requests/", self._show_request),
        ):
            if path.startswith(prefix) and len(path) > len(prefix):
                return "GET", functools.partial(handler, path[len(prefix) :])
        raise ApiError(404, f"no such path: {shown(path)}", code="unknown_path")

    def _authorise(self, request: web.BaseRequest) -> Key:
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
            limiter = self._limiters.get(rate)
            if limiter is None:
                limiter = self._limiters[rate] = RateLimiter(rate)
            wait_s = limiter.take(key.key_id, now=self._clock.now())
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
        recent = self._recent
        recent[exchange.request_id] = exchange
        if len(recent) > self.config.records.recent:
            recent.popitem(last=False)
        self.ledger.log_request(
            exchange.request_id, exchange.key.key_id, exchange.wall_s, exchange.encode_log()
        )

    def _error(self, exchange: Exchange, error: ApiError) -> web.Response:
        exchange.status = error.status
        headers = _headers(exchange)
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.Response(
            status=error.status,
            body=orjson.dumps(error.document()),
            headers=headers,
            content_type="application/json",
        )

    # -- generation ----------------------------------------------------------------------------

    def _generate(self, read: Callable[[bytes, str], Call]) -> Handler:
        async def generate(request: web.BaseRequest, exchange: Exchange) -> web.StreamResponse:
            raw = await self._body(request)
            call = read(raw, _service_header(request))
            self._admit(call, exchange)
            if call.stream:
                return await self._stream(request, call, exchange)
            answer = await self.engine.complete(call, exchange)
            exchange.model = exchange.steps[-1].model
            exchange.total_s = self._clock.now() - exchange.started_s
            exchange.status = 200
            return web.Response(
                body=_with_metadata(answer.raw, answer.value, exchange),
                headers=_headers(exchange),
                content_type="application/json",
            )

        return generate

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
        """Names to what they stand for, and whether this key may use it."""
        exchange.service_type = call.service_type = self._service_type(call)
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

    def _service_type(self, call: Call) -> str:
        name = call.service_type or FIXED
        if name != FIXED:
            raise bad_field("service_type", name, FIXED, code="unknown_service_type")
        return name

    async def _stream(
        self, request: web.BaseRequest, call: Call, exchange: Exchange
    ) -> web.StreamResponse:
        async with self.engine.stream(call, exchange) as (stream, attempt):
            exchange.model = attempt.model.name
            exchange.first_token_s = self._clock.now() - exchange.started_s
            self.metrics.first(exchange.model, exchange.service_type, exchange.first_token_s)
            headers = _headers(exchange)
            headers["Cache-Control"] = "no-cache"
            headers["X-Accel-Buffering"] = "no"
            response = web.StreamResponse(headers=headers)
            response.content_type = "text/event-stream"
            exchange.status = 200
            await response.prepare(request)
            relay = _Relay(self, call, exchange, attempt)
            try:
                while events := await stream.read():
                    data = relay.take(events)
                    if data:
                        await response.write(data)
            except UpstreamError as error:
                attempt.failed(error, relay.size_bytes)
                exchange.outcome = f"upstream_{error.kind}"
                await response.write(_error_event(exchange, error))
            except (asyncio.CancelledError, ConnectionError):
                attempt.left(relay.size_bytes)
                raise
            await response.write_eof()
        return response

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

    async def _show_request(
        self, name: str, _request: web.BaseRequest, exchange: Exchange
    ) -> web.StreamResponse:
        """The metadata of an answered request, for the key that made it."""
        found = self._recent.get(name)
        if found is not None and found.key.key_id == exchange.key.key_id:
            document = found.encode_log()
        else:
            rows = await self.ledger.find_request(name, exchange.key.key_id)
            if not rows:
                raise ApiError(
                    404, f"request: got {shown(name)}, expected one of this key's requests"
                )
            document = rows[0].encode()
        return web.Response(
            body=document, headers=_headers(exchange), content_type="application/json"
        )


class _Relay:
    """Turns a provider's events into the client's, and notes what the books need."""

    def __init__(self, api: Api, call: Call, exchange: Exchange, attempt: Attempt) -> None:
        self._api = api
        self._hide_usage = not call.wants_usage
        self._exchange = exchange
        self._attempt = attempt
        self._usage: Any = None
        self._last: Event | None = None
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
                self._usage = event.usage
                if not value.get("choices"):
                    self._last = event
                    continue
            out.append(event.raw)
            out.append(b"\n\n")
        return b"".join(out)

    def _end(self) -> list[bytes]:
        exchange = self._exchange
        self._attempt.answered(self._usage, self.size_bytes)
        exchange.total_s = self._api._clock.now() - exchange.started_s
        if self._hide_usage or self._last is None or self._last.value is None:
            return [_DONE_EVENT]
        document = {**self._last.value, "intentd": exchange.document()}
        return [encode_event(orjson.dumps(document)), _DONE_EVENT]


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


def _headers(exchange: Exchange) -> dict[str, str]:
    headers = {"X-Request-Id": exchange.request_id}
    if exchange.steps or exchange.first_token_s is not None:
        headers["X-Intentd-Service-Type"] = exchange.service_type
        headers["X-Intentd-Model"] = exchange.model
        headers["X-Intentd-Cache"] = "skip"
        headers["X-Intentd-Attempts"] = str(max(1, len(exchange.steps)))
        if exchange.first_token_s is None:
            headers["X-Intentd-Cost-Nano"] = str(exchange.cost_nano)
    return headers


def _with_metadata(raw: bytes, value: dict[str, Any], exchange: Exchange) -> bytes:
    """The provider's answer with the metadata object in it, its own bytes untouched."""
    if "intentd" in value:  # a proxy behind this one: ours replaces its own
        return orjson.dumps({**value, "intentd": exchange.document()})
    body = raw.rstrip()
    comma = b"," if value else b""
    return body[:-1] + comma + b'"intentd":' + exchange.encode() + b"}"


def _error_event(exchange: Exchange, error: UpstreamError) -> bytes:
    """Said in the stream, because its status is already sent. No [DONE] follows."""
    document = ApiError(
        502, str(error), code=f"upstream_{error.kind}", kind="upstream_error"
    ).document()
    document["error"]["request_id"] = exchange.request_id
    return encode_event(orjson.dumps(document))


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "intentd"}


def _json(value: Any, exchange: Exchange) -> web.Response:
    return web.Response(
        body=orjson.dumps(value), headers=_headers(exchange), content_type="application/json"
    )
